"""Scores of single documents and tokens, in the windows of `evaluate`; and two runs compared on the same documents.

D documents, n tokens.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np

from perceiver_ar.data.codec import Codec
from perceiver_ar.data.tokens import TokenFile
from perceiver_ar.errors import require
from perceiver_ar.evaluation import Evaluation, evaluate
from perceiver_ar.network.model import PerceiverAR

TOKEN_COLUMNS = {"document": int, "position": int, "token": int, "byte": int, "bytes": bytes, "bits": float}
DRAWS = 10_000
"""Sign flips that `sign_flip_test` draws when there are more."""


@dataclass(frozen=True)
class DocumentScores:
    """How well a model predicted each document. The nats of all documents together are those of `evaluation`.

    A document's tokens are its own and the separator after it, with which it ends. As in `evaluate`, the first token of
    all has no score, and the context of a document begins in the documents before it (not for pictures).
    """

    codec: Codec
    ids: np.ndarray
    """(n,) all tokens."""
    nats: np.ndarray
    """(n,) float64: -log p of each token; 0 for those without a score."""
    spans: list[tuple[int, int]]
    """Start and stop of the tokens of each document that have a score."""
    names: list[str]
    """The name of each document's file."""
    evaluation: Evaluation

    @cached_property
    def rows(self) -> list[dict[str, Any]]:
        """For each document: number, file, tokens, bytes, bits, nats per token, bits per byte, nats per unit."""
        rows = []
        for number, (name, (start, stop)) in enumerate(zip(self.names, self.spans, strict=True)):
            ids, nats = self.ids[start:stop], math.fsum(self.nats[start:stop])
            size = None if self.evaluation.bytes is None else self.codec.num_bytes(ids)
            bits = nats / math.log(2)
            row = {"document": number, "file": name, "tokens": len(ids), "bytes": size, "bits": bits}
            row["nats_per_token"] = nats / len(ids) if len(ids) else None
            row["bits_per_byte"] = bits / size if size else None
            for unit in self.evaluation.amounts:
                amount = self.codec.amounts(ids).get(unit, 0.0)
                row |= {f"{unit}s": amount, f"nats_per_{unit}": nats / amount if amount else None}
            rows.append(row)
        return rows

    def columns(self) -> dict[str, type]:
        """Name -> type of the values of `rows`."""
        columns: dict[str, type] = dict.fromkeys(self.rows[0], float)
        return columns | {"document": int, "file": str, "tokens": int, "bytes": int}

    def token_rows(self) -> Iterator[dict[str, Any]]:
        """For each token with a score: the document's number, the position in the document, the id, the place of its
        first byte in the document and its bytes (None if ids stand for no bytes), and its bits."""
        known = self.evaluation.bytes is not None
        starts = [start for start, _ in self.spans]
        if starts and self.codec.document_length is None and not (self.codec.separator or self.codec.unknown):
            starts[0] = 0  # its first token has no score
        for number, (first, (start, stop)) in enumerate(zip(starts, self.spans, strict=True)):
            at = self.codec.num_bytes(self.ids[first:start]) if known else 0
            for i in range(start, stop):
                data = self.codec.decode(self.ids[i : i + 1]) if known else None
                row = {"document": number, "position": i - first, "token": int(self.ids[i])}
                yield row | {"byte": at if known else None, "bytes": data, "bits": self.nats[i] / math.log(2)}
                at += len(data or b"")

    @property
    def unit(self) -> str:
        """What bits are divided by to compare documents: byte if every document with a score has some, else token."""
        return "byte" if all(row["bytes"] for row in self.rows if row["tokens"]) else "token"

    def bits_per(self, unit: str) -> np.ndarray:
        """Bits per byte or token of each document (D,); NaN for a document without a token that has a score."""
        return np.array([row["bits"] / row[f"{unit}s"] if row[f"{unit}s"] else math.nan for row in self.rows])

    def document_bytes(self) -> list[int]:
        """Number of bytes of each document, with those of a first token without a score."""
        starts = [0 if number == 0 else start for number, (start, _) in enumerate(self.spans)]
        return [self.codec.num_bytes(self.ids[i:stop]) for i, (_, stop) in zip(starts, self.spans, strict=True)]

    def summary(self) -> dict[str, Any]:
        """The evaluation of all documents together, and the mean of bits per `unit` over documents."""
        each = self.bits_per(self.unit)
        each = each[~np.isnan(each)]
        mean = {"mean_over_documents": float(each.mean()), "mean_standard_error": _standard_error(each)}
        return {**self.evaluation.to_dict(), "documents": len(self.rows), "unit": self.unit, **mean}


def score_documents(
    model: PerceiverAR, codec: Codec, file: TokenFile, names: Sequence[str], **settings: Any
) -> DocumentScores:
    """Scores all documents of a token file.

    Args:
        names: a name for each document.
        settings: stride, num_latents, context_length, batch_size, precision, progress of `evaluate`.

    Raises:
        InputError: see `evaluate`.
    """
    nats = np.zeros(len(file))

    def keep(first: int, row: np.ndarray) -> None:
        nats[first : first + len(row)] = row

    evaluation = evaluate(
        model,
        file,
        byte_lengths=codec.byte_lengths(),
        amounts=codec.amounts,
        document_length=codec.document_length,
        each=keep,
        **settings,
    )
    bounds = file.bounds()
    if codec.document_length is None:  # from after a document's separator to after the next one's
        ends = [max(1, min(start + len(codec.separator), len(file))) for start in bounds[1:]]
        starts = [1, *ends[:-1]]
        if codec.unknown:
            starts = [start + len(codec.separator) + len(codec.unknown) for start in bounds[:-1]]
        spans = list(zip(starts, ends, strict=True))
    else:
        spans = [(start + 1, stop) for start, stop in pairwise(bounds)]
    return DocumentScores(codec, file.tokens, nats, spans, list(names), evaluation)


def compare(scores: DocumentScores, others: DocumentScores) -> dict[str, Any]:
    """Another run's bits per byte (or token) on the same documents, and those of the first run less the other's.

    Raises:
        InputError: the runs read different documents, or other text in one of them, or their tokens differ and stand
            for no bytes.
    """
    require(
        scores.names == others.names,
        f"one run reads {len(scores.names)} documents in these files, the other {len(others.names)}: name files that "
        "both can read",
    )
    unit = "byte" if scores.unit == others.unit == "byte" else "token"
    if unit == "byte":
        sizes = zip(scores.names, scores.document_bytes(), others.document_bytes(), strict=True)
        for name, size, other in sizes:
            require(
                size == other,
                f"{name} has {size:,} bytes for one run and {other:,} for the other, which reads it in another way: "
                "compare runs of one kind of data",
            )
    require(
        unit == "byte" or np.array_equal(scores.ids, others.ids),
        "the two runs make different tokens of these files, and they stand for no bytes: compare runs with one codec",
    )
    own, its = scores.bits_per(unit), others.bits_per(unit)
    scored = ~np.isnan(own - its)
    own, its = own[scored], its[scored]
    total, other_total = (each.evaluation.to_dict()[f"bits_per_{unit}"] for each in (scores, others))
    return {
        "unit": unit,
        "total": other_total,
        "total_difference": total - other_total,
        "mean_over_documents": float(its.mean()),
        "mean_difference": float((own - its).mean()),
        "difference_standard_error": _standard_error(own - its),
        "documents_better": int((own < its).sum()),
        "p_value": sign_flip_test(own - its),
        "test": "two-sided sign-flip permutation test of the mean difference",
    }


def _standard_error(values: np.ndarray) -> float | None:
    return None if len(values) < 2 else float(values.std(ddof=1)) / math.sqrt(len(values))


def sign_flip_test(differences: np.ndarray, draws: int = DRAWS, seed: int = 0) -> float:
    """The two-sided p-value of paired differences (D,), by a permutation test.

    If it makes no difference which of two runs scored a document, every sign is as likely as the other. p is the share
    of all 2^D choices of signs whose sum is at least as far from 0 as the sum found; for 2^D > `draws`, of that many
    random choices and the one found. Nothing is assumed of how the differences are distributed.
    """
    D = len(differences)
    found = abs(differences.sum()) * (1 - 1e-12)  # rounding is no difference
    if math.log2(draws) >= D:
        signs = 1 - 2 * (np.arange(2**D)[:, None] >> np.arange(D) & 1)
        return float((abs(signs @ differences) >= found).mean())
    random, as_far, done = np.random.default_rng(seed), 1, 0
    step = max(1, (1 << 22) // D)
    while done < draws:
        signs = 1 - 2.0 * random.integers(0, 2, (min(step, draws - done), D), dtype=np.int8)
        as_far += int((abs(signs @ differences) >= found).sum())
        done += len(signs)
    return as_far / (draws + 1)

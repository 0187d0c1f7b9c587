"""Strided scoring: how well a model predicts every token of a text, exactly once, with much context before it.

Shapes: B batch, T context_length, N num_latents, V vocabulary; n tokens x[0 ... n-1], whose targets are x[1 ... n-1].
"""

import dataclasses
import gzip
import lzma
import math
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, groupby, islice
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from perceiver_ar.data.codec import Codec
from perceiver_ar.data.token_files import TokenFile
from perceiver_ar.errors import InputError, require
from perceiver_ar.generation import evaluation_mode
from perceiver_ar.network.model import PerceiverAR
from perceiver_ar.objective import IGNORE, next_token_loss
from perceiver_ar.scored_windows import ScoredWindow, evenly, spread_windows, windows
from perceiver_ar.tables import write_rows
from perceiver_ar.windows import longest_context


@dataclass(frozen=True)
class Evaluation:
    """How well a model predicted a text, and how it was measured."""

    tokens: int
    """Targets scored."""
    bytes: int | None
    """Bytes these targets stand for; None: not known."""
    nats_per_token: float
    bits_per_token: float
    bits_per_byte: float | None
    """All bits over all bytes: comparable between tokenizers. None without bytes."""
    perplexity: float
    """exp(nats_per_token)."""
    standard_error: float | None
    """Of nats_per_token, with windows as independent blocks: if window w has mean m_w over its n_w targets, there are
    K windows and m is the mean over all targets, it is sqrt(K / (K - 1) * sum_w (n_w (m_w - m))^2) / sum_w n_w.
    Neighbouring windows are not independent, so the true error is larger, above all with a small stride. None for one
    window."""
    context_length: int
    num_latents: int
    stride: int
    seconds: float
    amounts: dict[str, float] = dataclasses.field(default_factory=dict)
    """Unit -> its amount in these targets, such as {"note": 812, "second": 95.3}."""

    def nats_per(self, unit: str) -> float:
        """All nats over all of a unit: nats per note are sum(-log p(target)) / number of notes among the targets."""
        return self.nats_per_token * self.tokens / self.amounts[unit]

    def bits_per(self, unit: str) -> float:
        """`nats_per` / log 2: bits per dimension are sum(-log2 p(target)) / number of channel values of the pixels."""
        return self.nats_per(unit) / math.log(2)

    def to_dict(self) -> dict[str, Any]:
        """The fields, and `scored_UNITs`, `nats_per_UNIT` and `bits_per_UNIT` for each unit with an amount above 0."""
        fields = dataclasses.asdict(self)
        for unit in (unit for unit, amount in fields.pop("amounts").items() if amount > 0):
            fields |= {f"scored_{unit}s": self.amounts[unit]}
            fields |= {f"nats_per_{unit}": self.nats_per(unit), f"bits_per_{unit}": self.bits_per(unit)}
        return fields


def evaluate(
    model: PerceiverAR,
    tokens: np.ndarray | Tensor | TokenFile,
    *,
    stride: int | None = None,
    num_latents: int | None = None,
    context_length: int | None = None,
    byte_lengths: ArrayLike | None = None,
    amounts: Callable[[np.ndarray], Mapping[str, float]] | None = None,
    document_length: int | None = None,
    batch_size: int = 8,
    max_tokens: int | None = None,
    spread: bool = False,
    first_target: int = 1,
    precision: Literal["32", "bf16"] = "32",
    progress: Callable[[int, int], Any] | None = None,
    each: Callable[[int, np.ndarray], Any] | None = None,
) -> Evaluation:
    """Scores every token after the first, once, in the windows of `windows`.

    The model may be in any mode; it computes in evaluation mode without gradients and is left as it was.

    Args:
        tokens: (n,) integer ids, n >= 2; a memory map is read window by window. In a token file whose documents have
            conditions, these are not scored, and a window that starts within a document has its conditions in place of
            the first tokens.
        stride: new targets per window, 1 ... num_latents. A smaller stride is slower, but gives each target more
            context and so a better and truer score. None: half of num_latents.
        num_latents: more or fewer than in training is allowed (paper, section 5). None: the model's.
        context_length: at most the model's. None: the model's.
        byte_lengths: (V,) bytes that each id stands for (`codec.byte_lengths()`), for bits per byte; all 0: as None.
        amounts: ids -> the amount of each unit (`codec.amounts`), for nats per note and the like.
        document_length: tokens of each document, if all have the same length (`codec.document_length`). Each is then
            scored separately, without its first token, and no context reaches beyond its start.
        batch_size: windows per forward.
        max_tokens: score at most this many targets; of documents of one length, as many whole ones as contain them.
        spread: score about `max_tokens` targets, in windows (or documents of one length) that are spread evenly over
            the text.
        first_target: index (in each document of one length) of the first token to score; those before are context only.
        precision: "32": in the weights' dtype; "bf16": autocast.
        progress: called with the number of targets scored so far, and of all.
        each: called for each window with the index of its first target and the nats of its targets (n,) float64.

    Raises:
        InputError: fewer than two tokens, ids outside the vocabulary, settings that do not fit together, windows
            without room for conditions, or a model whose weights give NaN.
    """
    config = model.config
    longest = longest_context(config)
    T = longest if context_length is None else context_length
    require(1 <= T <= longest, f"context_length is {T}: it must be in 1 ... {longest}, the model's own")
    N = min(config.num_latents, T) if num_latents is None else num_latents
    stride = max(1, N // 2) if stride is None else stride
    require(batch_size >= 1, f"batch_size is {batch_size}: it must be at least 1")
    require(max_tokens is None or max_tokens >= 1, f"max_tokens is {max_tokens}: it must be at least 1, or left out")
    require(precision in ("32", "bf16"), f"precision is {precision!r}: choose 32 or bf16")
    file = tokens if isinstance(tokens, TokenFile) and tokens.conditions[1] > 0 else None
    tokens = tokens.tokens if isinstance(tokens, TokenFile) else tokens
    x = tokens.detach().cpu().numpy() if isinstance(tokens, Tensor) else np.asanyarray(tokens)
    require(x.ndim == 1, f"the tokens to evaluate on have shape {x.shape}: they must be one sequence, (n,)")
    require(x.dtype.kind in "iu", f"the tokens to evaluate on have type {x.dtype}: ids are integers")
    require(
        document_length is None or document_length >= 2, f"document_length is {document_length}: it must be at least 2"
    )
    length = len(x) if document_length is None else document_length
    require(len(x) % max(1, length) == 0, f"{len(x)} tokens are not documents of {length}: encode them again")
    spread = spread and max_tokens is not None and max_tokens < len(x) - first_target
    if document_length is None:
        length = len(x) if max_tokens is None or spread else min(len(x), first_target + max_tokens)
        bases = [0]
    else:
        wanted = len(x) // length if max_tokens is None else -(-max_tokens // max(1, length - first_target))
        bases = [number * length for number in evenly(len(x) // max(1, length), wanted, spread)]
    lengths = None if byte_lengths is None else np.asarray(byte_lengths, dtype=np.int64)
    if lengths is not None and lengths.shape != (config.vocab_size,):
        raise InputError(f"byte_lengths has shape {lengths.shape}: give one number for each of {config.vocab_size} ids")
    lengths = None if lengths is None or not lengths.any() else lengths

    device = model.device
    sums: list[float] = []  # nats of each window
    counts: list[int] = []  # targets of each window
    num_bytes, done = 0, 0
    chosen: Iterable[ScoredWindow] = windows(length, T, N, stride, first_target)
    targets = [(base + first_target, base + length) for base in bases]
    if spread and document_length is None and max_tokens is not None:
        chosen = spread_windows(length, T, N, stride, first_target, max_tokens)
        targets = [(window.first_target, window.end) for window in chosen]
    count = 0 if file is None else file.conditions[1]
    require(
        length <= T or T - stride >= count,
        f"a window of context_length {T} with stride {stride} has no room for {count} tokens of conditions before its "
        "targets: give a longer context or a smaller stride",
    )
    total = sum(stop - start for start, stop in targets)
    began = time.perf_counter()
    # The first window of each document, then the second of each: windows of one shape are computed together.
    plan = (window.moved(base) for window in chosen for base in bases)

    def shape(window: ScoredWindow) -> tuple[int, int, int | None]:
        start = None if document_length is None else window.start % document_length
        return window.end - window.start, window.prefix_len, start

    with (
        evaluation_mode(model.modules()),
        torch.no_grad(),
        torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"),
    ):
        for (_, prefix_len, start), alike in groupby(plan, key=shape):
            while batch := list(islice(alike, batch_size)):
                ids = np.stack([x[window.start : window.end] for window in batch])  # in their stored dtype
                _check_ids(ids, batch, config.vocab_size)
                sizes = [window.end - window.first_target for window in batch]
                scored = np.arange(-max(sizes), 0) >= -np.array(sizes)[:, None]
                if file is not None:
                    for row, window in enumerate(batch):
                        scored[row, -sizes[row] :] &= ~file.are_conditions(window.first_target, window.end)
                        conditions = file.conditions_before(window.start)
                        ids[row, : len(conditions)] = conditions
                losses = _losses(model, torch.from_numpy(ids).to(device), prefix_len, scored, start)
                sums += losses.sum(dim=1).tolist()
                counts += scored.sum(axis=1).tolist()
                if each is not None:
                    for window, size, row in zip(batch, sizes, losses.numpy(), strict=True):
                        each(window.first_target, row[-size:])
                if lengths is not None:
                    num_bytes += sum(int(lengths[row[-size:]].sum()) for row, size in zip(ids, sizes, strict=True))
                done += sum(sizes)
                if progress is not None:
                    progress(done, total)

    total = sum(counts)
    require(total > 0, "there is nothing to score but conditions of documents: score more tokens")
    nats = math.fsum(sums) / total
    require(
        math.isfinite(nats),
        "the model's weights give NaN: use weights from before training diverged, or train at a lower learning rate",
    )
    bits = nats / math.log(2)
    seconds = time.perf_counter() - began
    totals = defaultdict[str, float](float)
    if amounts is not None:
        for start, stop in targets:
            for unit, amount in amounts(np.asarray(x[start:stop])).items():
                totals[unit] += amount
    return Evaluation(
        tokens=total,
        bytes=None if lengths is None else num_bytes,
        nats_per_token=nats,
        bits_per_token=bits,
        bits_per_byte=bits * total / num_bytes if num_bytes > 0 else None,
        perplexity=math.exp(nats) if nats < 700 else math.inf,
        standard_error=_standard_error(np.array(sums), np.array(counts)),
        context_length=T,
        num_latents=N,
        stride=stride,
        seconds=seconds,
        amounts=dict(totals),
    )


def _losses(model: PerceiverAR, ids: Tensor, prefix_len: int, scored: np.ndarray, start: int | None) -> Tensor:
    """Nats (B, n) float64 of the last n ids of each row (B, input + 1); 0 for those that are not `scored` (B, n).
    `start`: the first position, if it matters."""
    if start is None or model.config.positions_from_end:
        positions = None
    else:
        positions = torch.arange(start, start + ids.shape[1] - 1, device=ids.device)
    most = scored.shape[1]
    labels = ids[:, -most:].to(torch.int64, copy=True)
    labels[torch.from_numpy(~scored).to(ids.device)] = IGNORE
    logits = model.head(model.latents(ids[:, :-1], prefix_len, positions=positions)[:, -most:])
    return next_token_loss(logits, labels, reduction="none").cpu().double()


def _check_ids(ids: np.ndarray, batch: Sequence[ScoredWindow], vocab_size: int) -> None:
    if ids.min() < 0 or ids.max() >= vocab_size:
        row, place = np.argwhere((ids < 0) | (ids >= vocab_size))[0]
        raise InputError(
            f"token {batch[row].start + place} is id {ids[row, place]}: this model's vocabulary is ids 0 ... "
            f"{vocab_size - 1}, so encode the text with the model's own codec"
        )


def _standard_error(sums: np.ndarray, counts: np.ndarray) -> float | None:
    blocks, total = len(sums), counts.sum()
    if blocks < 2:
        return None
    deviations = sums - counts * (sums.sum() / total)
    return math.sqrt(blocks / (blocks - 1) * float(np.square(deviations).sum())) / int(total)


def evaluate_context_lengths(
    model: PerceiverAR,
    tokens: np.ndarray | Tensor | TokenFile,
    context_lengths: Sequence[int],
    *,
    stride: int | None = None,
    num_latents: int | None = None,
    first_target: int | None = None,
    **settings: Any,
) -> list[Evaluation]:
    """`evaluate` at each context length, always on the same targets: those with the longest context before them.

    So the first target is x[max(context_lengths)]: no length has easier targets than another, nor too few tokens before
    them. At length L there are at most L latents, and the stride is at most max(1, L // 2), so that targets have a
    context of at least L / 2.

    Args:
        stride: as far as each length allows. None: as in `evaluate`.
        num_latents: as far as each length allows. None: the model's.
        first_target: 1 scores all, but the first ones have less context than a length allows.
        settings: further ones of `evaluate`.

    Raises:
        InputError: see `evaluate`; too few tokens for the longest context.
    """
    longest = max(context_lengths, default=1)
    own = longest_context(model.config)
    require(longest <= own, f"context_length is {longest}: it must be in 1 ... {own}, the model's own")
    if first_target is None:
        first_target = longest
        document_length = settings.get("document_length")
        length = len(tokens) if document_length is None else min(len(tokens), document_length)
        require(
            length > longest,
            f"{length} tokens are too few for context length {longest}: give a longer text or shorter lengths",
        )
    evaluations = []
    for length in context_lengths:
        latents = min(model.config.num_latents if num_latents is None else num_latents, length)
        step = min(max(1, latents // 2) if stride is None else stride, max(1, length // 2), latents)
        sizes = {"context_length": length, "num_latents": latents, "stride": step}
        evaluations.append(evaluate(model, tokens, first_target=first_target, **sizes, **settings))
    return evaluations


def compressors(codec: Codec, tokens: np.ndarray) -> dict[str, float]:
    """Bits per byte that general compressors need for the text of these tokens: gzip at level 9, xz at 9 extreme.

    Sizes of whole files, headers included. Empty if the codec does not write text.
    """
    data = codec.decode(tokens) if codec.writes_text else b""
    if not data:
        return {}
    gzipped = gzip.compress(data, compresslevel=9, mtime=0)
    # A dictionary longer than the text takes time and memory, and saves nothing.
    longest = min(1 << 26, max(1 << 12, len(data)))
    xz = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": longest}]
    sizes = {"gzip": len(gzipped), "xz": len(lzma.compress(data, filters=xz))}
    return {name: 8 * size / len(data) for name, size in sizes.items()}


def write_table(path: str | os.PathLike[str], evaluations: Iterable[Evaluation]) -> None:
    """Writes a table (`tables.write_rows`), a row for each evaluation, with the names of its fields; atomically."""
    rows = [evaluation.to_dict() for evaluation in evaluations]
    columns = dict.fromkeys(chain(*rows), float)
    write_rows(path, columns, [dict.fromkeys(columns) | row for row in rows])

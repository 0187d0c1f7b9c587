"""What context models make of the bases that a run held out, to compare with.

    python benchmarks/genome.py RUN [MAX_BASES]

A context model of order k predicts a base from what followed the same k bases before, in the training records, on both
strands, and in the held-out record up to there. Rare contexts are mixed with shorter ones, for the orders 1, 2, 4, 8,
12 and 16: p_k = (n(context, base) + w_k p_shorter) / (n(context) + w_k). In a genome of some million bases a context of
12 bases comes back by chance, so its w is large; one of 16 hardly ever, so that it was seen says that this is a repeat.
Compressors of genomes are made of such models (Pratas et al. 2016, GeCo), with weights that they learn.

The first MAX_BASES of what the run held out are predicted (default: those that its summary was measured on).
"""

import json
import lzma
import math
import sys
from collections import defaultdict

import numpy as np

from perceiver_ar import Run
from perceiver_ar.data.genome import NucleotideCodec
from perceiver_ar.data.tokens import TokenFile

WEIGHTS = {1: 16.0, 2: 16.0, 4: 16.0, 8: 64.0, 12: 16.0, 16: 0.25}
"""w of each order, chosen by trial on Escherichia coli 536."""
ORDERS = tuple(WEIGHTS)


def records(tokens: np.ndarray, codec: NucleotideCodec) -> list[np.ndarray]:
    starts = np.flatnonzero(tokens == codec.separator[0])
    bases = [np.frombuffer(codec.decode(part), np.uint8) for part in np.split(tokens, starts)]
    table = np.full(256, 4)
    table[np.frombuffer(b"ACGT", np.uint8)] = range(4)
    return [table[part] for part in bases if len(part)]


def contexts(bases: np.ndarray, order: int) -> np.ndarray:
    """For each base from `order` on, the number of the `order` bases before it; -1 if one of them is unknown."""
    keys, known = np.zeros(len(bases) - order, np.int64), np.ones(len(bases) - order, bool)
    for i in range(order):
        part = bases[i : len(bases) - order + i]
        keys, known = keys * 4 + part, known & (part < 4)
    return np.where(known, keys, -1)


def count(table: dict[int, list[int]], bases: np.ndarray, order: int) -> None:
    if len(bases) <= order:
        return
    keys, following = contexts(bases, order), bases[order:]
    good = (keys >= 0) & (following < 4)
    pairs, amounts = np.unique(keys[good] * 4 + following[good], return_counts=True)
    for pair, amount in zip(pairs.tolist(), amounts.tolist(), strict=True):
        table[pair >> 2][pair & 3] += amount


def main() -> None:
    run = Run.open(sys.argv[1])
    codec, summary = run.codec(), run.summary() or {}
    assert isinstance(codec, NucleotideCodec)
    train, held_out = (
        records(np.asarray(TokenFile.open(run.tokens / name).tokens), codec) for name in ("train", "validation")
    )
    wanted = int(sys.argv[2]) if len(sys.argv) > 2 else int(summary.get("scored_bases", 1 << 60))
    tables: list[dict[int, list[int]]] = []
    for order in ORDERS:
        tables.append(defaultdict(lambda: [0, 0, 0, 0]))
        for bases in train:
            count(tables[-1], bases, order)
            count(tables[-1], np.where(bases < 4, 3 - bases, 4)[::-1], order)
    bits, scored = [0.0] * len(ORDERS), 0
    for bases in held_out:
        keys = [np.concatenate([np.full(min(k, len(bases)), -1), contexts(bases, k)]).tolist() for k in ORDERS]
        for i, base in enumerate(bases[: max(0, wanted - scored)].tolist()):
            if base == 4:
                continue
            p, scored = 0.25, scored + 1
            for which, (table, weight) in enumerate(zip(tables, WEIGHTS.values(), strict=True)):
                if (key := keys[which][i]) >= 0:
                    row = table[key]
                    p = (row[base] + weight * p) / (sum(row) + weight)
                    row[base] += 1
                bits[which] -= math.log2(p)
    text = b"".join(np.frombuffer(b"ACGTN", np.uint8)[bases].tobytes() for bases in held_out)[:scored]
    for order, total in zip(ORDERS, bits, strict=True):
        print(json.dumps({"context model of order": order, "bits per base": round(total / scored, 4)}))
    print(json.dumps({"xz": round(8 * len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)) / len(text), 4)}))
    print(json.dumps({"run": str(run.path), "bits per base": summary.get("bits_per_base"), "bases": scored}))


if __name__ == "__main__":
    main()

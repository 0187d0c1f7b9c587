"""What n-gram models make of the tokens that a run was measured on, to compare with.

    python benchmarks/ngram.py RUN [ORDER] [MAX_TOKENS]

Interpolated Kneser-Ney (Chen and Goodman 1999, section 2.7), trained on the run's training tokens and scored on the
first MAX_TOKENS targets it held out (default: those that its summary was measured on), for the orders 1 ... ORDER (5).
"""

import json
import sys

import numpy as np

from perceiver_ar import Run
from perceiver_ar.data.tokens import TokenFile


class KneserNey:
    """p(w | h) for contexts h of up to `order` - 1 ids.

    Of the highest order c counts occurrences, of the lower ones in how many different contexts a gram occurs; D is
    n1 / (n1 + 2 n2), from the numbers of grams with count 1 and 2:

        p(w | h) = max(c(h w) - D, 0) / c(h) + D * |{w: c(h w) > 0}| / c(h) * p(w | h without its first id)
    """

    def __init__(self, tokens: np.ndarray, vocab_size: int, order: int) -> None:
        self.vocab_size, self.order = vocab_size, order
        self.tables = []
        assert vocab_size**order < 2**63
        for n in range(1, order + 1):
            if n == order:
                grams, counts = np.unique(self.keys(tokens, n), return_counts=True)
            else:  # each longer gram counts once
                grams, counts = np.unique(np.unique(self.keys(tokens, n + 1)) % vocab_size**n, return_counts=True)
            contexts, first, kinds = np.unique(grams // vocab_size, return_index=True, return_counts=True)
            ones, twos = (counts == 1).sum(), (counts == 2).sum()
            discount = ones / (ones + 2 * twos) if ones else 0.0
            self.tables.append((grams, counts, contexts, np.add.reduceat(counts, first), kinds, discount))

    def keys(self, tokens: np.ndarray, n: int) -> np.ndarray:
        """Each n ids in a row as one number."""
        keys = np.zeros(len(tokens) - n + 1, dtype=np.int64)
        for i in range(n):
            keys = keys * self.vocab_size + tokens[i : len(tokens) - n + 1 + i]
        return keys

    def probabilities(self, tokens: np.ndarray) -> np.ndarray:
        """p(x[i] | x[i - order + 1 : i]) for all i >= order - 1."""
        p = np.full(len(tokens) - self.order + 1, 1 / self.vocab_size)
        for n, (grams, counts, contexts, totals, kinds, discount) in enumerate(self.tables, 1):
            keys = self.keys(tokens, n)[self.order - n :]
            c = _lookup(grams, counts, keys)
            total, kind = (_lookup(contexts, values, keys // self.vocab_size) for values in (totals, kinds))
            seen = total > 0
            p[seen] = (np.maximum(c - discount, 0) + discount * kind * p)[seen] / total[seen]
        return p


def _lookup(keys: np.ndarray, values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    at = np.searchsorted(keys, wanted).clip(max=len(keys) - 1)
    return np.where(keys[at] == wanted, values[at], 0)


def main() -> None:
    run, order = Run.open(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 5
    train, held_out = (
        np.asarray(TokenFile.open(run.tokens / name).tokens, np.int64) for name in ("train", "validation")
    )
    codec, summary = run.codec(), run.summary() or {}
    count = int(sys.argv[3]) if len(sys.argv) > 3 else summary.get("tokens", len(held_out) - 1)
    targets = held_out[1 : 1 + count]
    amounts = {unit: amount for unit, amount in codec.amounts(targets).items() if amount}
    for n in range(1, order + 1):
        model = KneserNey(train, codec.vocab_size, n)
        every = np.arange(codec.vocab_size)
        context = np.tile(held_out[: n - 1], (codec.vocab_size, 1))
        total = sum(model.probabilities(np.append(row, w))[0] for row, w in zip(context, every, strict=True))
        assert abs(total - 1) < 1e-9
        # The first n - 1 targets have a shorter past; they are predicted as after the end of the training tokens.
        nats = -np.log(model.probabilities(np.append(train[-n:], held_out[: 1 + count])[-count - n + 1 :])).sum()
        per_unit = {f"nats_per_{unit}": nats / amount for unit, amount in amounts.items()}
        print(json.dumps({"order": n, "tokens": count, "nats_per_token": nats / count, **per_unit}))
    if summary:
        names = ["tokens", "nats_per_token", *(f"nats_per_{unit}" for unit in amounts)]
        print(json.dumps({"model": str(run.path), **{name: summary[name] for name in names if name in summary}}))


if __name__ == "__main__":
    main()

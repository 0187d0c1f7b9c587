"""The micro-batches of every step, as each rank gets them."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from perceiver_ar.config import Recipe
from perceiver_ar.data.sampler import TrainingWindows


class Batches:
    """Data rank r of k takes every k-th micro-batch of a step, starting with number r.

    Ranks that share a prefix are one data rank: they get the same micro-batches.
    """

    def __init__(self, windows: TrainingWindows, recipe: Recipe, rank: int = 0) -> None:
        self.windows, self.recipe = windows, recipe
        self.data_rank = rank // recipe.trainer.prefix_ranks

    @property
    def accumulate(self) -> int:
        """Number of micro-batches per step on each rank."""
        settings = self.recipe.trainer
        return settings.batch_size // (settings.micro_batch * settings.data_ranks)

    def of_step(self, step: int, progress: float) -> Iterator[dict[str, Any]]:
        """The micro-batches of step 0, 1, ... on this rank; `progress`: share of the run at that step, 0 ... 1.

        Each has `tokens` (B, P + N), `labels` (B, N), possibly a `mask` (B, P + N), and
            weight: its share of the step's targets, times the number of micro-batches on all ranks. The mean of the
                weighted mean losses is the mean over all targets, however the step is divided.
            targets: number of targets in the whole step.
            seed: seed of its dropout.
        """
        settings = self.recipe.trainer
        pieces, first = self.accumulate * settings.data_ranks, step * settings.batch_size
        targets = np.diff(self.windows.spans(first, settings.batch_size)).reshape(pieces, -1).sum(axis=1)
        total = int(targets.sum())
        weights = pieces * targets / total
        cut = self.cut(step, progress)
        for i in range(self.data_rank, pieces, settings.data_ranks):
            batch = self.windows.batch(first + i * settings.micro_batch, settings.micro_batch, cut)
            seed = (self.recipe.seed * 1_000_003 + step * pieces + i) % 2**63
            yield batch | {"weight": float(weights[i]), "targets": total, "seed": seed}

    def cut(self, step: int, progress: float) -> int:
        """How many tokens a prefix of P is cut by, to 0, P/4, P/2 or 3P/4: at random in a share `short_prefix` of the
        steps, and always to the length that `prefix_growth` allows at `progress`. Conditions of documents stay.

        There are few lengths because every new shape needs new kernels, which stay in memory.
        """
        settings = self.recipe.trainer
        random = np.random.default_rng((self.recipe.seed % 2**63, step))
        quarters = int(random.integers(4))
        if random.random() >= settings.short_prefix:
            quarters = 4
        if settings.prefix_growth:
            quarters = min(quarters, int(5 * progress / settings.prefix_growth))
        if quarters == 4 or self.windows.document_length is not None:
            return 0
        prefix_len = self.windows.context_length - self.windows.num_latents
        return min(prefix_len - quarters * prefix_len // 4, prefix_len - self.windows.num_conditions)

"""Sampling: from logits to ids. Functions of logits (..., V), V vocabulary; ids that must not be drawn get -inf."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from perceiver_ar.errors import require

LogitsProcessor = Callable[[Tensor, Tensor], Tensor]
"""Ids so far (1, T) int64 and logits (1, V) -> logits (1, V), as Hugging Face transformers' logits processors."""


def is_whole(value: Any) -> bool:
    """Whether a value is an integer, of Python or numpy."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


@dataclass(frozen=True)
class Sampling:
    """How to draw; `generation.stream` explains the settings."""

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0

    def __post_init__(self) -> None:
        t, k, p, m = self.temperature, self.top_k, self.top_p, self.min_p
        require(0 <= t < math.inf, f"temperature is {t}: it must be 0 (greedy) or more, and finite")
        require(
            k is None or (is_whole(k) and k >= 1),
            f"top_k is {k}: it must be a whole number and at least 1, or left out",
        )
        require(p is None or 0 < p <= 1, f"top_p is {p}: it must be in (0, 1], or left out")
        require(m is None or 0 <= m <= 1, f"min_p is {m}: it must be in [0, 1], or left out")
        require(
            0.01 <= self.repetition_penalty <= 100,
            f"repetition_penalty is {self.repetition_penalty}: it must be in 0.01 ... 100; 1 changes nothing",
        )
        for name in ("frequency_penalty", "presence_penalty"):
            value = getattr(self, name)
            require(-100 <= value <= 100, f"{name} is {value}: it must be in -100 ... 100; 0 changes nothing")

    @property
    def penalises(self) -> bool:
        return (self.repetition_penalty, self.frequency_penalty, self.presence_penalty) != (1.0, 0.0, 0.0)

    def draw(self, logits: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        """An id (B,) for each row of logits (B, V) after penalties, on their device; each row from its own generator,
        of the CPU."""
        if self.temperature == 0:
            return sample(logits, 0.0)
        # Subtract the largest, so that a temperature near zero does not overflow.
        logits = (logits - logits.amax(-1, keepdim=True)).div_(self.temperature)
        if self.top_k is not None:
            logits = keep_top_k(logits, self.top_k)
        if self.top_p is not None:
            logits = keep_top_p(logits, self.top_p)
        if self.min_p is not None:
            logits = keep_min_p(logits, self.min_p)
        # One number for each row, so that drawing costs little more than the softmax.
        reached = logits.softmax(-1).cumsum_(-1)
        numbers = torch.cat([torch.rand(1, generator=generator, dtype=logits.dtype) for generator in generators])
        at = numbers.to(logits.device)[:, None] * reached[:, -1:]
        return torch.searchsorted(reached, at, right=True)[:, 0].clamp(max=logits.shape[-1] - 1)  # beyond it: NaN


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """Keeps the k most likely ids, or all if there are no more."""
    values, ids = logits.topk(min(k, logits.shape[-1]))
    return torch.full_like(logits, float("-inf")).scatter_(-1, ids, values)


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """Keeps the fewest most likely ids whose probabilities reach p (nucleus sampling, arXiv 1904.09751); of equal ones
    the first."""
    if p >= 1:
        return logits
    wide = logits.detach() if logits.device.type == "mps" else logits.detach().double()  # which has no float64
    # On the CPU numpy sorts values ten times as fast as torch, which sorts indices, too.
    rising = torch.from_numpy(np.sort(wide.numpy())) if wide.device.type == "cpu" else wide.sort(-1).values
    unlikely = (rising.softmax(-1).cumsum(-1)[..., :-1] <= 1 - p).sum(-1, keepdim=True)  # the most likely one stays
    edge = rising.gather(-1, unlikely).to(logits)
    equal = logits == edge
    room = logits.shape[-1] - unlikely - (logits > edge).sum(-1, keepdim=True)
    return logits.masked_fill((logits < edge) | (equal & (equal.cumsum(-1) > room)), float("-inf"))


def keep_min_p(logits: Tensor, p: float) -> Tensor:
    """Keeps ids at least p times as likely as the most likely one (arXiv 2407.01082)."""
    if p <= 0:
        return logits
    return logits.masked_fill(logits < logits.amax(-1, keepdim=True) + math.log(p), float("-inf"))


def penalise_repetition(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Divides positive logits of ids in `seen` (..., V) bool by the penalty and multiplies negative ones by it.

    Above 1 these ids become less likely, below 1 more (CTRL, arXiv 1909.05858).
    """
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def sample(logits: Tensor, temperature: float = 1.0, *, generator: torch.Generator | None = None) -> Tensor:
    """Ids (...) drawn from softmax(logits / temperature), logits (..., V); at temperature 0 the most likely ones."""
    if temperature == 0:
        return logits.argmax(-1)
    probabilities = (logits / temperature).softmax(-1)
    ids = torch.multinomial(probabilities.reshape(-1, logits.shape[-1]), 1, generator=generator)
    return ids.reshape(logits.shape[:-1])

"""The windows of strided scoring: every token of a text is a target exactly once.

Shapes: T context_length, N num_latents; tokens x[0 ... num_tokens-1].
"""

from collections.abc import Iterator
from typing import NamedTuple

from perceiver_ar.errors import require


class ScoredWindow(NamedTuple):
    """One forward of an evaluation: the input is x[start : end - 1], and x[first_target : end] are scored."""

    start: int
    prefix_len: int
    end: int
    first_target: int

    def moved(self, by: int) -> "ScoredWindow":
        return ScoredWindow(self.start + by, self.prefix_len, self.end + by, self.first_target + by)


def windows(
    num_tokens: int, context_length: int, num_latents: int, stride: int, first_target: int = 1
) -> Iterator[ScoredWindow]:
    """The windows that score each of the targets x[first_target ... num_tokens-1] exactly once, in order.

    The first window is all latents and has a target for each, if there are enough. Each further one has the next
    `stride` targets (the last window: the rest) and the last T tokens before its last target as input, or all if
    there are fewer; its last N are latents. So a target has at least T - stride + 1 tokens of context once there are
    T before it; with stride 1 each is predicted as by `model(x[max(0, i - T) : i])[:, -1]`.

    Raises InputError for fewer than two tokens, or numbers that do not fit together.
    """
    require(
        num_tokens >= 2, f"there are {num_tokens} tokens to evaluate on: it takes at least 2, one to predict another"
    )
    require(
        1 <= num_latents <= context_length,
        f"num_latents is {num_latents} with context_length {context_length}: it must be in 1 ... {context_length}",
    )
    require(
        1 <= stride <= num_latents,
        f"stride is {stride} with num_latents {num_latents}: it must be in 1 ... {num_latents}",
    )
    require(
        1 <= first_target < num_tokens,
        f"first_target is {first_target} with {num_tokens} tokens: it must be in 1 ... {num_tokens - 1}",
    )

    def spans() -> Iterator[ScoredWindow]:
        first = first_target
        while first < num_tokens:
            end = min(num_tokens, max(first + stride, num_latents + 1))
            start = max(0, end - 1 - context_length)
            yield ScoredWindow(start, max(0, end - 1 - start - num_latents), end, first)
            first = end

    return spans()


def spread_windows(
    num_tokens: int, context_length: int, num_latents: int, stride: int, first_target: int, max_tokens: int
) -> list[ScoredWindow]:
    """Evenly spread ones of `windows`, with about `max_tokens` targets together."""
    first = next(windows(num_tokens, context_length, num_latents, stride, first_target))
    count = 1 + -(-(num_tokens - first.end) // stride)
    chosen = evenly(count, max(1, max_tokens // stride), spread=True)
    targets = [first.end + (number - 1) * stride if number > 0 else first_target for number in chosen]
    return [next(windows(num_tokens, context_length, num_latents, stride, target)) for target in targets]


def evenly(count: int, wanted: int, spread: bool) -> list[int]:
    """`wanted` numbers of 0 ... count - 1: evenly spread, or the first ones."""
    wanted = min(count, wanted)
    return [(2 * i + 1) * count // (2 * wanted) if spread else i for i in range(wanted)]

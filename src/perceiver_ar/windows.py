"""Windows: which tokens of a row are context, and how many of them latents, for each next token.

Windows follow from numbers of tokens alone. Every token adds a latent; when all are used, the same context is taken
again with fewer (refill; the authors' sampling, Hawthorne et al. 2022, arXiv 2202.07765).
"""

from dataclasses import dataclass

from perceiver_ar.config import PerceiverARConfig


@dataclass(frozen=True)
class Window:
    """Of a row's tokens 0 ... t - 1, those from `start` on are the context, and its last `num_latents` are latents."""

    start: int
    num_latents: int
    refill: bool = False
    """All latents are computed anew; else the last alone, and the others are those of the window before."""


@dataclass(frozen=True)
class Schedule:
    """How windows go on; see `generation.stream`."""

    refill_latents: int | None = None
    prompt_latents: int | None = None
    slide: bool = False


def longest_context(config: PerceiverARConfig) -> int:
    """Most tokens of a window: as many as the model takes and can tell apart."""
    return min(config.context_length, config.max_positions or config.context_length)


def next_window(
    config: PerceiverARConfig, previous: Window | None, num_tokens: int, schedule: Schedule | None = None
) -> Window:
    """The window for the token after the first `num_tokens` of a row; `previous` was for the token before, if any.

    Always 0 <= start, num_tokens - start <= context_length and 1 <= num_latents <= min(config.num_latents,
    num_tokens - start); starts never go back.
    """
    schedule = schedule or Schedule()
    most, longest = config.num_latents, longest_context(config)
    fewer = schedule.refill_latents or max(1, most // 2)
    if previous is None:
        num_latents = schedule.prompt_latents or (num_tokens if num_tokens <= most else fewer)
        # A prompt that is too long leaves room to grow, as a refill does.
        start = 0 if num_tokens <= longest else num_tokens - max(longest - (most - num_latents), 1)
        return Window(start, min(num_latents, num_tokens - start), refill=True)
    full = num_tokens - previous.start > longest
    if schedule.slide and not (full and config.table_sizes):  # a moved position table means other keys
        return Window(max(previous.start, num_tokens - longest), min(previous.num_latents + 1, most))
    # Past the context length the start moves, but only at refills, and then far enough to grow again: latents remember
    # the tokens they have read, so what a cache keeps of them is true only as long as the context begins where it did.
    if full or previous.num_latents >= most:
        start = num_tokens - max(longest - (most - fewer), 1) if full else previous.start
        return Window(start, min(fewer, num_tokens - start), refill=True)
    return Window(previous.start, previous.num_latents + 1)

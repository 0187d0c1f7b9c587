"""Windows: which tokens of a row are context, and how many of them latents, for each next token.

Windows depend on numbers of tokens alone. Every token adds a latent; when all latents are used, the context is
computed again with fewer (refill; the authors' sampling, Hawthorne et al. 2022, arXiv 2202.07765).
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

from perceiver_ar.config import PerceiverARConfig


@dataclass(frozen=True)
class Window:
    """The context is tokens start ... t - 1 of a row's t tokens; its last `num_latents` are latents."""

    start: int
    num_latents: int
    refill: bool = False
    """All latents are computed again; else only the last one, and the others are those of the window before."""


@dataclass(frozen=True)
class Schedule:
    """How one window follows another; see `generation.stream`."""

    refill_latents: int | None = None
    prompt_latents: int | None = None
    slide: bool = False


def longest_context(config: PerceiverARConfig) -> int:
    """Maximum length of a window in tokens, as context_length and the position tables allow."""
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
    if schedule.slide and not (full and config.table_sizes):  # with position tables, another start means other keys
        return Window(max(previous.start, num_tokens - longest), min(previous.num_latents + 1, most))
    # Past the context length the start moves, but only at refills, and then far enough for the context to grow again.
    # Latents depend on all tokens they have read, so cached ones are valid only as long as the start stays.
    if full or previous.num_latents >= most:
        start = num_tokens - max(longest - (most - fewer), 1) if full else previous.start
        return Window(start, min(fewer, num_tokens - start), refill=True)
    return Window(previous.start, previous.num_latents + 1)


class Block(NamedTuple):
    """One forward over tokens start ... end - 1, which predicts the tokens after positions first ... end - 1."""

    start: int
    prefix_len: int
    first: int
    end: int


def blocks(config: PerceiverARConfig, num_tokens: int) -> Iterator[Block]:
    """The forwards that predict the next token at every position of a row, in order and each once.

    Position i is predicted over the window that generation from the row's first token would have for token i + 1
    (`next_window` from 1 on). So its context depends on i alone, not on how many tokens there are.
    """
    most, longest = config.num_latents, longest_context(config)
    t, window = 1, next_window(config, None, 1)
    while True:
        # Until the next refill every window is the beginning of the same one, so causality gives the logits of each.
        end = min(num_tokens, t + most - window.num_latents, window.start + longest) if config.cacheable else t
        num_latents = window.num_latents + end - t
        yield Block(window.start, end - window.start - num_latents, t - 1, end)
        if end == num_tokens:
            return
        t, window = end + 1, next_window(config, replace(window, num_latents=num_latents), end + 1)

"""A row that is generated: its settings, its ids and its window; and how its next token is drawn.

Shapes: T tokens of a row so far, V vocabulary.
"""

import copy
import math
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Literal

import torch
from torch import Tensor, nn

from perceiver_ar.config import PerceiverARConfig
from perceiver_ar.errors import InputError, require
from perceiver_ar.generation.sampling import LogitsProcessor, Sampling, penalise_repetition
from perceiver_ar.network.inputs import NOTHING
from perceiver_ar.windows import Schedule, longest_context, next_window


@dataclass(frozen=True)
class RowSettings:
    """How one row is continued; `generation.stream` explains the settings."""

    sampling: Sampling = field(default_factory=Sampling)
    logits_processors: tuple[LogitsProcessor, ...] = ()
    allowed_next: Callable[[Tensor], Tensor] | None = None
    stops: tuple[tuple[int, ...], ...] = ()
    """The row ends when its output ends with one of these sequences of ids."""
    max_new_tokens: int | None = None
    """None: no limit, for callers that count themselves."""
    schedule: Schedule = field(default_factory=Schedule)
    pinned: tuple[int, ...] = ()
    """Ids in place of the first tokens of every window that does not start with the row."""

    @property
    def plain(self) -> bool:
        """Whether nothing but temperature and filters changes the logits."""
        return not (self.sampling.penalises or self.needs_ids)

    @property
    def needs_ids(self) -> bool:
        """Whether a setting reads all ids of the row so far."""
        return bool(self.logits_processors or self.allowed_next)


class Row:
    """A row: its settings, its window and counts of its ids, and the whole history only if its settings need it."""

    def __init__(
        self,
        index: int,
        prompt: Tensor,
        config: PerceiverARConfig,
        settings: RowSettings | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        """prompt: (T,). config: the network's, or the same with a shorter context_length. generator: None if the
        caller draws."""
        longest = longest_context(config)
        self.index, self.config, self.settings = index, config, settings or RowSettings()
        self.generator = generator or torch.Generator()
        self.num_tokens = len(prompt)
        self.ids = deque(prompt[-longest:].tolist(), maxlen=longest)
        self.seen, self.drawn = set(prompt.bincount().nonzero()[:, 0].tolist()), Counter[int]()
        room = self.settings.max_new_tokens
        self.history = nn.functional.pad(prompt.cpu(), (0, room or 0)) if self.settings.needs_ids else None
        self.ending: deque[int] = deque()
        self.finish_reason: Literal["stop", "length"] | None = None
        self.window = next_window(config, None, self.num_tokens, self.settings.schedule)
        schedule, most = self.settings.schedule, config.num_latents
        fewest = min(schedule.refill_latents or max(1, most // 2), schedule.prompt_latents or most)
        require(
            len(self.settings.pinned) < max(longest - (most - fewest), 1),
            f"{len(self.settings.pinned)} pinned ids (conditions) leave no room in a context of {longest} tokens with "
            f"{most} latents, of which a refill has {fewest}: use more refill_latents, or a run with a longer context",
        )
        self.kept, self.dropped = 0, 0
        """At a refill: cached positions that stay valid, and positions before them that left the window."""

    @property
    def origin(self) -> int:
        """Index of the token at position 0. Without tables only differences of positions count, so it stays 0."""
        return self.window.start if self.config.table_sizes else 0

    @property
    def prefix_len(self) -> int:
        return self.num_tokens - self.window.start - self.window.num_latents

    def last_ids(self, n: int) -> list[int]:
        """The last n ids, oldest first; NOTHING before the window."""
        size = self.num_tokens - self.window.start
        if size - n < len(self.settings.pinned):
            return self.window_ids(size - n, size)
        inside = min(n, size)
        return [NOTHING] * (n - inside) + list(islice(reversed(self.ids), inside))[::-1]

    def window_ids(self, first: int, last: int) -> list[int]:
        """Ids first ... last - 1 of the window; NOTHING before it."""
        start = len(self.ids) - (self.num_tokens - self.window.start)
        ids = list(islice(self.ids, start + max(first, 0), start + last))
        if self.window.start > 0:
            pinned = self.settings.pinned[max(first, 0) : last]
            ids[: len(pinned)] = pinned
        return [NOTHING] * -min(first, 0) + ids

    def add(self, token: int) -> bool:
        """Adds a token and moves on to the next window; False if the row ends, for the reason `finish_reason`."""
        if self.history is not None:
            self.history[self.num_tokens] = token
        self.num_tokens += 1
        self.ids.append(token)
        self.seen.add(token)
        self.drawn[token] += 1
        if stops := self.settings.stops:
            self.ending.append(token)
            if any(tuple(islice(self.ending, max(0, len(self.ending) - len(stop)), None)) == stop for stop in stops):
                self.finish_reason = "stop"
                return False
            if len(self.ending) >= max(map(len, stops)):
                self.ending.popleft()
        if self.drawn.total() == self.settings.max_new_tokens:
            self.finish_reason = "length"
            return False
        before = self.window
        self.window = next_window(self.config, before, self.num_tokens, self.settings.schedule)
        if self.window.refill:
            # All but the newest token are cached; keys of latents may be other than the keys of prefix tokens.
            valid = self.num_tokens - 1 - before.start
            valid -= before.num_latents if self.config.latent_keys == "query" else 0
            self.dropped = self.window.start - before.start
            moved = self.dropped > 0 and self.config.table_sizes
            self.kept = 0 if moved else min(max(valid - self.dropped, 0), self.prefix_len)
        return True

    def adjust(self, logits: Tensor) -> Tensor:
        """Logits (V,) after penalties, processors and `allowed_next`.

        Raises InputError if no id is left, the logits become NaN or infinite, or `allowed_next` returns no mask.
        """
        sampling, settings = self.settings.sampling, self.settings
        if settings.plain:
            return logits
        if sampling.repetition_penalty != 1.0:
            seen = torch.zeros(len(logits), dtype=torch.bool)
            seen[list(self.seen)] = True
            logits = penalise_repetition(logits, seen, sampling.repetition_penalty)
        if sampling.frequency_penalty != 0.0 or sampling.presence_penalty != 0.0:
            times = torch.zeros_like(logits)
            times[list(self.drawn)] = torch.tensor(list(self.drawn.values()), dtype=times.dtype)
            logits = logits - sampling.frequency_penalty * times - sampling.presence_penalty * (times > 0)
        if self.history is not None:
            ids = self.history[: self.num_tokens]
            for processor in settings.logits_processors:
                logits = processor(ids[None], logits[None])[0]
            if settings.allowed_next is not None:
                allowed = settings.allowed_next(ids)
                require(
                    isinstance(allowed, Tensor) and allowed.dtype == torch.bool and allowed.shape == logits.shape,
                    f"allowed_next gave {_kind(allowed)}: it must give a bool tensor ({len(logits)},), one for each id",
                )
                logits = logits.masked_fill(~allowed.cpu(), float("-inf"))
        best = float(logits.amax())
        left = "NaN" if math.isnan(best) else "an infinite logit" if best > 0 else "no id that may come next"
        require(
            math.isfinite(best),
            f"row {self.index} cannot go on after {self.num_tokens} tokens: penalties, logits_processors and "
            f"allowed_next leave {left}",
        )
        return logits

    def fork(self) -> "Row":
        """A copy of the row, to continue with other tokens."""
        row = copy.copy(self)
        for name in ("ids", "seen", "drawn", "ending"):
            setattr(row, name, copy.copy(getattr(self, name)))
        row.history = None if self.history is None else self.history.clone()
        return row


def draw(rows: Sequence[Row], logits: Tensor) -> tuple[list[int], list[float], Tensor]:
    """Draws the next id of each row from its logits (rows, V), with its own settings and generator.

    Returns the ids, their log-probabilities, and those of all ids (rows, V), in nats, float64; of the given logits, not
    of what settings make of them. Raises WeightsError if the logits are not finite, and InputError if a row has no
    allowed next id; then nothing has been drawn. The ids are the only numbers for which the CPU waits, but settings
    that are not `plain` are applied there.
    """
    plain = all(row.settings.plain for row in rows)
    adjusted = exact = (logits if plain and logits.device.type != "mps" else logits.cpu()).double()
    if not plain:
        require_finite(exact)
        adjusted = torch.stack([row.adjust(one) for row, one in zip(rows, exact, strict=True)])
    before = [row.generator.get_state() for row in rows]
    alike: dict[Sampling, list[int]] = {}
    for r, row in enumerate(rows):
        alike.setdefault(row.settings.sampling, []).append(r)
    ids = torch.empty(len(rows), dtype=torch.int64, device=exact.device)
    for sampling, members in alike.items():
        some = adjusted if len(alike) == 1 else adjusted[members]
        ids[members] = sampling.draw(some, [rows[r].generator for r in members])
    logprobs = exact.log_softmax(-1)
    drawn = logprobs.gather(-1, ids[:, None])[:, 0]
    finite = exact.amax(-1).isfinite().all()
    *numbers, finite = torch.cat([ids.double(), drawn, finite.double()[None]]).tolist()  # one copy to the CPU
    if not finite:
        for row, state in zip(rows, before, strict=True):
            row.generator.set_state(state)
        require_finite(exact)
    return list(map(int, numbers[: len(rows)])), numbers[len(rows) :], logprobs


class WeightsError(InputError):
    """The model's weights give NaN or infinite logits."""


def require_finite(logits: Tensor) -> None:
    """Raises WeightsError unless the largest logit of every row (B, V) is finite."""
    if not logits.amax(-1).isfinite().all():
        raise WeightsError(
            "the model's weights give NaN or infinite logits: use weights from before training diverged, or "
            "train at a lower learning rate"
        )


def _kind(value: Any) -> str:
    """A value's type, and its shape if it has one, for messages."""
    return f"a {value.dtype} tensor {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"

"""The decoder that continues rows: windows over cached keys and values (rows.py, windows.py, cache.py).

Each step computes one latent per row. If a row's window refills, its other latents are computed again first, over the
same prefix. (Networks whose latents change when tokens follow are computed again for every token: `config.cacheable`.)
Rows do not depend on each other, so a row gets the same tokens alone and in any batch.

Shapes: B rows, T tokens of a row so far, V vocabulary.
"""

import weakref
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import groupby
from typing import Any, Literal

import torch
from torch import Tensor

from perceiver_ar.generation.cache import Cache
from perceiver_ar.generation.compiled import NextLogits, compile_and_run, compiled_step, next_logits
from perceiver_ar.generation.rows import Row
from perceiver_ar.network.autocast import product_dtype
from perceiver_ar.network.inputs import reach
from perceiver_ar.network.model import PerceiverAR
from perceiver_ar.windows import longest_context

READ = 4096
"""Prefix tokens read in one forward, over all rows. It bounds the memory of activations, which adds to the cache."""


class Decoder:
    """The network over a cache with a slot for each row. `rows` are the unfinished ones, in the order of the slots."""

    def __init__(
        self,
        model: PerceiverAR,
        rows: Sequence[Row],
        num_samples: int,
        max_new_tokens: int,
        compile: bool | Literal["max-autotune"] = False,
    ) -> None:
        """rows: num_samples neighbours for each prompt, which is read once. compile: see `generation.stream`."""
        longest = max(row.num_tokens for row in rows) + max_new_tokens
        if compile:  # one size for many lengths
            longest = 2 ** (longest - 1).bit_length()
        context = min(longest_context(model.config), longest)
        self.model, self.reach = model, reach(model.config)
        self.cache = fixed_cache(self, len(rows), context) if compile else empty_cache(model, len(rows), context)
        if num_samples > 1:
            self._read_once(rows, num_samples, context)
        self.rows = list(rows)
        self._compile(compile, len(rows))

    def _read_once(self, rows: Sequence[Row], num_samples: int, context: int) -> None:
        """Reads each prompt for all of its rows."""
        cache, self.rows = self.cache, list(rows[::num_samples])
        self.cache = empty_cache(self.model, len(self.rows), context)
        self._refill()
        for slot, row in enumerate(rows):
            cache.copy_from(self.cache, slot // num_samples, slot)
            row.window = replace(row.window, refill=False)
        self.cache = cache

    def _compile(self, compile: bool | Literal["max-autotune"], slots: int) -> None:
        """Prepares compiled steps, if wanted, for `slots` rows over the present cache."""
        self.slots = slots if compile else None
        """Number of slots of a compiled decoder, whose shapes stay: rows that end keep their slots. Else None."""
        if compile:
            self.cache.fix()
            self._step = compiled_step(self.model, self.model.device.type, compile == "max-autotune")
            self._first_step: NextLogits | None = partial(compile_and_run, self._step, tuned=compile == "max-autotune")

    def next_logits(self) -> Tensor:
        """Logits (rows, V) of each row's next token."""
        self._refill()
        tokens = [row.last_ids(self.reach + 1) for row in self.rows]
        positions = [row.num_tokens - 1 - row.origin for row in self.rows]
        if self.slots is None:
            logits = next_logits(self.model, self._tensor(tokens), self._positions(positions, 1), self.cache)
        else:
            ended = self.slots - len(self.rows)
            at = self._tensor(positions + [0] * ended)[:, None]
            self.cache.aim()
            step = self._first_step or self._step
            logits = step(self.model, self._tensor(tokens + [[0] * (self.reach + 1)] * ended), at, self.cache)
            self._first_step = None
            logits = logits[: len(self.rows)].clone()  # CUDA graphs write the next ones to the same memory
        self.cache.advance(1)
        return logits

    def add(self, tokens: Sequence[int]) -> None:
        """Adds each row's next token. Rows that end with it give up their slots."""
        self._keep([row.add(token) for row, token in zip(self.rows, tokens, strict=True)])

    def _keep(self, going_on: Sequence[bool]) -> None:
        """Removes the rows that do not go on; the last row takes over a free slot."""
        for slot in reversed(range(len(self.rows))):
            if not going_on[slot]:
                last = len(self.rows) - 1
                if slot < last:
                    self.cache.copy_from(self.cache, last, slot)
                    self.rows[slot] = self.rows[last]
                self.rows.pop()
                if self.slots is None:
                    self.cache = self.cache.rows(0, last)

    def reserve(self, num_tokens: int) -> None:
        """Makes room for rows of this length, but at most for the longest context."""
        room, longest = self.cache.cross.room, longest_context(self.model.config)
        if room < min(num_tokens, longest):
            self.cache.cross.grow(min(max(num_tokens, 2 * room), longest))

    def reorder(self, order: Sequence[int]) -> None:
        """Replaces row r by a copy of row order[r], for beam search."""
        self.rows = [self.rows[source].fork() for source in order]
        self.cache = self.cache.select(order)

    def _refill(self) -> None:
        """Computes all latents but the last of every row whose window refills.

        Neighbours of equal lengths go through the network together.
        """

        def shape(slot: int) -> tuple[int, ...]:
            row = self.rows[slot]
            pinned = len(row.settings.pinned)
            return row.window.refill, pinned, row.dropped, row.kept, row.prefix_len, row.window.num_latents

        for (refill, *_, N), group in groupby(range(len(self.rows)), shape):
            if not refill:
                continue
            slots = list(group)
            for _ in self._fill(self.rows[slots[0] : slots[-1] + 1], self.cache.rows(slots[0], slots[-1] + 1), N):
                pass

    def _fill(self, rows: Sequence[Row], cache: Cache, piece: int, newest: bool = False) -> Iterator[Tensor | None]:
        """`_refill` for rows of equal lengths, those of `cache`. Yields after each piece of the prefix, and after each
        `piece` latents, these latents. newest: also computes the last latent."""
        row = rows[0]
        kept, P, N = row.kept, row.prefix_len, row.window.num_latents
        cache.self_attention.keep(0)
        cache.cross.keep(kept, row.dropped)
        # Keys of the first tokens depend on tokens that have left the window, or are those of pinned ones now.
        if row.dropped and (stale := self.reach + len(row.settings.pinned)):
            cache.cross.keep(0)
            yield from self._read(rows, cache, 0, min(stale, kept))
            cache.cross.advance(max(0, kept - stale))
        yield from self._read(rows, cache, kept, P)
        end = P + N - (not newest)
        for first in range(P, end, piece):
            last = min(first + piece, end)
            tokens, positions = self._window(rows, first, last)
            latents = self.model.cached_latents(tokens, positions, cache)
            cache.advance(last - first)
            yield latents
        for row in rows:
            row.window = replace(row.window, refill=False)

    def _read(self, rows: Sequence[Row], cache: Cache, first: int, last: int) -> Iterator[None]:
        """Caches the keys and values of tokens first ... last - 1 of each row's window, after those in the cache.

        Yields after each piece.
        """
        if first == last:
            return
        tokens, positions = self._window(rows, first, last)
        chunk = max(1, READ // len(rows))
        for start in range(0, last - first, chunk):
            part = positions[:, start : start + chunk]
            self.model.cache_prefix(tokens[:, start : start + part.shape[1] + self.reach], part, cache)
            cache.cross.advance(part.shape[1])
            yield

    def _window(self, rows: Sequence[Row], first: int, last: int) -> tuple[Tensor, Tensor]:
        """Tokens first ... last - 1 of each row's window with the `reach` tokens before them, and their positions."""
        tokens = [row.window_ids(first - self.reach, last) for row in rows]
        return self._tensor(tokens), self._positions(
            [row.window.start + first - row.origin for row in rows], last - first
        )

    def _positions(self, first: Sequence[int], n: int) -> Tensor:
        """n positions, starting at each of `first`: (rows, n), or (1, n) if all are the same."""
        starts = first[:1] if len(set(first)) == 1 else first
        return self._tensor(starts)[:, None] + torch.arange(n, device=self.model.device)

    def _tensor(self, ids: Any) -> Tensor:
        return torch.tensor(ids, dtype=torch.int64, device=self.model.device)


def empty_cache(model: PerceiverAR, rows: int, context: int) -> Cache:
    """A cache of the dtype in which the model computes: that of its weights, or of autocast."""
    dtype = product_dtype(model.embed.weight.dtype, model.device)
    return Cache.empty(model.config, rows, context, dtype, model.device)


def fixed_cache(decoder: Decoder, rows: int, context: int) -> Cache:
    """An empty cache of fixed shapes, for `decoder` alone: if possible that of the last decoder of the same model.

    CUDA graphs are recorded for addresses, and torch stops recording after 128 of them.
    """
    model = decoder.model
    size = rows, context, product_dtype(model.embed.weight.dtype, model.device), model.device
    last, cache = _unused.pop(model, (None, None))
    if cache is not None and last == size:
        for row in range(rows):
            cache.erase(row)
    else:
        cache = empty_cache(model, rows, context)
        cache.fix()
    weakref.finalize(decoder, _unused.__setitem__, model, (size, cache)).atexit = False
    return cache


_unused = weakref.WeakKeyDictionary[PerceiverAR, tuple[Any, Cache]]()
"""The fixed cache of the last compiled stream of each model, with its size."""


class Recomputing:
    """A decoder without a cache, for networks whose latents change when tokens follow: a forward for every token."""

    def __init__(self, model: PerceiverAR, rows: Sequence[Row]) -> None:
        self.model, self.rows = model, list(rows)

    def next_logits(self) -> Tensor:
        device, logits = self.model.device, []
        for row in self.rows:
            ids = row.window_ids(0, row.num_tokens - row.window.start)
            logits.append(self.model.latents(torch.tensor([ids], device=device), row.prefix_len)[:, -1])
        return self.model.head(torch.cat(logits))

    def add(self, tokens: Sequence[int]) -> None:
        self.rows = [row for row, token in zip(self.rows, tokens, strict=True) if row.add(token)]

    def reorder(self, order: Sequence[int]) -> None:
        self.rows = [self.rows[source].fork() for source in order]

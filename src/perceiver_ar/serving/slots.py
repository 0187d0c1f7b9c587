"""A decoder whose rows begin and end independently, each in a slot of its own.

A new row is a refill. Its prompt is read in pieces, and the running rows make steps between the pieces.
"""

from collections.abc import Iterator, Sequence
from itertools import takewhile
from operator import eq

import torch
from torch import Tensor

from perceiver_ar.generation.cache import Cache
from perceiver_ar.generation.decoder import Decoder, Recomputing, empty_cache
from perceiver_ar.generation.rows import Row
from perceiver_ar.network.inputs import reach
from perceiver_ar.network.model import PerceiverAR

LATENTS = 128
"""Maximum number of a prompt's latents in one piece."""
SCORES = 2**22
"""Maximum number of latents in a piece times the tokens that each reads: about a tenth of a second on a CPU."""


class SlotDecoder(Decoder):
    """A `Decoder` with room for `slots` rows of at most `context` cached tokens each.

    The last prompt stays in memory. Of a new prompt that begins with the same tokens, only the rest is read.
    """

    def __init__(self, model: PerceiverAR, slots: int, context: int, compile: bool) -> None:
        self.model, self.reach = model, reach(model.config)
        self.capacity = slots
        self.rows: list[Row] = []
        self.prompt, self.all = empty_cache(model, 1, context), empty_cache(model, slots, context)
        self.cache = self.all
        self.nbytes = self.prompt.nbytes + self.all.nbytes
        self._compile(compile, slots)
        self._cached_start, self._cached_ids = 0, list[int]()
        """The tokens of the keys and values in `prompt`: start of the window in its row, and ids."""

    @property
    def free(self) -> int:
        return self.capacity - len(self.rows)

    def read(self, row: Row, piece: int | None = None, newest: bool = False) -> Iterator[Tensor | None]:
        """Reads a row's window, so that the row, or rows equal to it, can be admitted. Yields after each piece: the
        next latents (1, n, dim), or None after a piece of the prefix. A new read may begin at any time, also before
        the last one has ended.

        piece: number of latents in a piece; None: fewer for longer windows.
        newest: reads the newest latent, too; then no row can be admitted.
        """
        ids = row.window_ids(0, row.num_tokens - row.window.start)
        same = zip(ids, self._cached_ids, strict=False) if row.window.start == self._cached_start else ()
        row.kept = min(sum(1 for _ in takewhile(lambda pair: eq(*pair), same)), row.prefix_len)
        self._cached_start, self._cached_ids = row.window.start, ids[: row.kept]
        piece = piece or min(max(SCORES // len(ids), 1), LATENTS)
        for found in self._fill([row], self.prompt, piece, newest):
            # With latent_keys "query", keys of latents cannot serve as keys of a prefix.
            latents = self.prompt.self_attention.counts[0] if row.config.latent_keys == "query" else 0
            self._cached_ids = ids[: int(self.prompt.cross.counts[0] - latents)]
            yield found

    def admit(self, rows: Sequence[Row]) -> None:
        """Adds rows that are equal to the last one that was read, from the next step on."""
        assert len(rows) <= self.free
        for slot in range(len(self.rows), len(self.rows) + len(rows)):
            self.all.copy_from(self.prompt, 0, slot)
        self.rows += rows
        self._view()

    def remove(self, rows: Sequence[Row], erase: bool = False) -> None:
        """Removes rows and frees their slots. erase: their content may be NaN."""
        going_on = [row not in rows for row in self.rows]
        for slot, keep in enumerate(going_on):
            if erase and not keep:
                self.all.erase(slot)
        self._keep(going_on)

    def clear(self) -> None:
        """Removes all rows and the prompt: after a failure the content of the cache is unknown."""
        self.rows, self._cached_ids = [], []
        for slot in range(self.capacity):
            self.all.erase(slot)
        self.prompt.erase(0)
        self._view()

    def _view(self) -> None:
        if self.slots is None:
            self.cache: Cache = self.all.rows(0, len(self.rows))


class RecomputingSlots(Recomputing):
    """The same interface for networks without a cache."""

    def __init__(self, model: PerceiverAR, slots: int) -> None:
        super().__init__(model, [])
        self.capacity, self.nbytes = slots, 0

    @property
    def free(self) -> int:
        return self.capacity - len(self.rows)

    def read(self, row: Row, newest: bool = False) -> Iterator[Tensor | None]:
        if newest:
            ids = row.window_ids(0, row.num_tokens - row.window.start)
            yield self.model.latents(torch.tensor([ids], device=self.model.device), row.prefix_len)

    def admit(self, rows: Sequence[Row]) -> None:
        self.rows += rows

    def remove(self, rows: Sequence[Row], erase: bool = False) -> None:
        self.rows = [row for row in self.rows if row not in rows]

    def clear(self) -> None:
        self.rows = []


def slot_decoder(model: PerceiverAR, slots: int, context: int, compile: bool = False) -> SlotDecoder | RecomputingSlots:
    """The decoder that suits a network. Call and use it under `torch.inference_mode()`, always in one thread."""
    assert torch.is_inference_mode_enabled() and not model.training
    if model.config.cacheable:
        return SlotDecoder(model, slots, context, compile)
    return RecomputingSlots(model, slots)

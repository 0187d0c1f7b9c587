"""A decoder's cache: keys and values of cross-attention and self-attention for each row.

The network writes to a cache and reads from it (`KeysValues.update`), but only the caller keeps what was written
(`advance`). So a forward that runs twice over the same cache gives the same result twice.

Shapes: B rows, H heads, N new positions, C channels per head.
"""

from collections.abc import Sequence
from itertools import chain
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from perceiver_ar.config import PerceiverARConfig
from perceiver_ar.network.attention import Piece

BLOCK = 1 << 16
"""Positions that are moved together: a copy of a whole context would take its memory again."""


class _Plan(NamedTuple):
    """Where `update` writes new positions and what they see: made once for all layers, to save Python's time."""

    new: list[tuple[Tensor, Tensor]]
    """For each layer, views to write the new keys and values to, if all rows write to the same slots."""
    slots: tuple[Tensor, Tensor] | None
    """Else row indices (B,), and the slot of each (B,)."""
    seen: list[tuple[Tensor, Tensor]]
    """For each layer, the cached keys and values that new positions see; a single new position sees itself there."""
    mask: Tensor | None
    """(B, K) bool, True for filled slots; None: all are."""


class KeysValues:
    """Keys and values of the attention layers of one kind, in memory of fixed size.

    Every row is a ring buffer of its last `room` positions: when it is full, a new position overwrites the oldest. Keys
    are rotated already, so attention does not depend on their order.
    """

    def __init__(self, layers: list[tuple[Tensor, Tensor]], room: int, counts: np.ndarray) -> None:
        """layers: keys and values, each (B, H, room, C), finite; counts: (B,) int64, positions written so far.

        All are shared with the views that `rows` returns.
        """
        self.layers, self.room, self.counts = layers, room, counts
        self._plan: tuple[bytes, _Plan] | None = None
        self._fixed: _Plan | None = None

    @classmethod
    def empty(
        cls, layers: int, rows: int, heads: int, room: int, channels: int, dtype: torch.dtype, device: torch.device
    ) -> "KeysValues":
        def zeros() -> Tensor:  # masked values are multiplied by 0, so NaN would spread
            return torch.zeros(rows, heads, room, channels, dtype=dtype, device=device)

        return cls([(zeros(), zeros()) for _ in range(layers)], room, np.zeros(rows, dtype=np.int64))

    def update(self, k: Tensor, v: Tensor, layer_idx: int) -> list[Piece]:
        """Writes new keys and values (B, H, N, C) of a layer; returns the pieces that their queries attend to.

        Until `advance`, the next call writes to the same slots. N > 1 needs rows with equally many positions so far,
        and room for N more.
        """
        N = k.shape[2]
        plan = self._prepare(N) if self._fixed is None else self._fixed
        if plan.slots is None:
            new_k, new_v = plan.new[layer_idx]
            new_k.copy_(k)
            new_v.copy_(v)
        else:
            keys, values = self.layers[layer_idx]
            rows, slots = plan.slots
            keys[rows, :, slots] = k[:, :, 0]
            values[rows, :, slots] = v[:, :, 0]
        seen = Piece(*plan.seen[layer_idx], mask=plan.mask)
        return [seen] if N == 1 else [seen, Piece(k, v, causal=True)]  # the newest position sees everything

    def advance(self, n: int) -> None:
        """Keeps the last n positions that were written."""
        self.counts += n

    def keep(self, n: int, dropped: int = 0) -> None:
        """Keeps n positions of every row: those after the first `dropped`. The others are forgotten."""
        assert n == 0 or ((dropped + n <= self.counts) & (self.counts <= self.room)).all()
        if dropped and n:
            for x in chain(*self.layers):
                for first in range(0, n, BLOCK):
                    size = min(BLOCK, n - first)
                    x.narrow(2, first, size).copy_(x.narrow(2, first + dropped, size).clone())
        self.counts[:] = n

    def grow(self, room: int) -> None:
        """Makes room for more positions, in new memory. No position may have been overwritten before."""
        assert (self.counts <= self.room).all() and self._fixed is None
        wider = (0, 0, 0, room - self.room)
        self.layers = [(F.pad(k, wider), F.pad(v, wider)) for k, v in self.layers]
        self.room, self._plan = room, None

    def rows(self, first: int, last: int) -> "KeysValues":
        """Rows first ... last - 1, in the same memory."""
        layers = [(k[first:last], v[first:last]) for k, v in self.layers]
        return KeysValues(layers, self.room, self.counts[first:last])

    def copy_from(self, other: "KeysValues", source: int, target: int) -> None:
        """Copies row `source` of another cache of equal room, or of this one, to row `target`."""
        assert other.room == self.room
        held = min(int(other.counts[source]), self.room)
        for x, y in zip(chain(*self.layers), chain(*other.layers), strict=True):
            x[target, :, :held] = y[source, :, :held]
        self.counts[target] = other.counts[source]

    def erase(self, row: int) -> None:
        """Makes a row empty, all zeros: masked values are multiplied by 0, so NaN would spread."""
        for x in chain(*self.layers):
            x[row].zero_()
        self.counts[row] = 0

    def select(self, rows: Sequence[int]) -> "KeysValues":
        """Copies of rows, in this order; a row may come several times, or not at all."""
        index = torch.tensor(rows)
        layers = [(k[index.to(k.device)], v[index.to(k.device)]) for k, v in self.layers]
        return KeysValues(layers, self.room, self.counts[list(rows)])

    def fix(self) -> None:
        """From now on a step writes one position, in operations of constant shapes: for torch.compile and CUDA graphs.

        Call `aim` before each step.
        """
        if not self.layers or self._fixed is not None:
            return
        device, B = self.layers[0][0].device, len(self.counts)
        slots = torch.arange(B, device=device), torch.zeros(B, dtype=torch.int64, device=device)
        mask = torch.zeros(B, self.room, dtype=torch.bool, device=device)
        self._fixed = _Plan([], slots, self.layers, mask)
        if device.type == "cpu":  # no CUDA graphs here, and torch takes tensors of static address for constants
            return
        for x in (*slots, mask, *chain(*self.layers)):
            torch._dynamo.mark_static_address(x, guard=False)  # type: ignore[reportPrivateImportUsage]

    def aim(self) -> None:
        """Makes the next step of a fixed cache write to each row's next slot, and see the filled ones."""
        if self._fixed is not None and self._fixed.slots is not None and self._fixed.mask is not None:
            held = torch.from_numpy(np.minimum(self.counts + 1, self.room)).to(self._fixed.mask.device)
            self._fixed.slots[1].copy_(torch.from_numpy(self.counts % self.room))
            torch.lt(torch.arange(self.room, device=held.device), held[:, None], out=self._fixed.mask)

    def _prepare(self, N: int) -> _Plan:
        """Where N new positions go and what they see, made once for all layers."""
        key = self.counts.tobytes() + N.to_bytes(4, "little")
        if self._plan is None or self._plan[0] != key:
            self._plan = key, self._make_plan(N)
        return self._plan[1]

    def _make_plan(self, N: int) -> _Plan:
        count = int(self.counts[0])
        if (self.counts == count).all():
            assert N == 1 or count + N <= self.room
            past = min(count + 1, self.room) if N == 1 else count
            return _Plan(self._views(count % self.room, N), None, self._views(0, past), None)
        assert N == 1
        held = np.minimum(self.counts + 1, self.room)
        most, device = int(held.max()), self.layers[0][0].device
        mask = None
        if held.min() < most:
            mask = torch.arange(most, device=device) < torch.from_numpy(held).to(device)[:, None]
        slots = torch.arange(len(held), device=device), torch.from_numpy(self.counts % self.room).to(device)
        return _Plan([], slots, self._views(0, most), mask)

    def _views(self, first: int, n: int) -> list[tuple[Tensor, Tensor]]:
        """n slots of every layer."""
        return [(k.narrow(2, first, n), v.narrow(2, first, n)) for k, v in self.layers]


class Cache:
    """For each row, its context in every cross-attention layer and its latents in every self-attention layer."""

    def __init__(self, cross: KeysValues, self_attention: KeysValues) -> None:
        self.cross, self.self_attention = cross, self_attention

    @classmethod
    def empty(
        cls, config: PerceiverARConfig, rows: int, context: int, dtype: torch.dtype, device: torch.device
    ) -> "Cache":
        """For contexts of at most `context` tokens and at most num_latents latents."""
        layers, heads, channels = len(config.cross_layers), config.heads_cross, config.width_head_cross
        cross = KeysValues.empty(layers, rows, heads, context, channels, dtype, device)
        layers, heads, channels = config.num_layers, config.num_heads, config.width_head
        return cls(cross, KeysValues.empty(layers, rows, heads, config.num_latents, channels, dtype, device))

    def advance(self, n: int) -> None:
        """Keeps the last n latents that were computed, as context and as latents."""
        self.cross.advance(n)
        self.self_attention.advance(n)

    def rows(self, first: int, last: int) -> "Cache":
        return Cache(self.cross.rows(first, last), self.self_attention.rows(first, last))

    def copy_from(self, other: "Cache", source: int, target: int) -> None:
        self.cross.copy_from(other.cross, source, target)
        self.self_attention.copy_from(other.self_attention, source, target)

    def erase(self, row: int) -> None:
        self.cross.erase(row)
        self.self_attention.erase(row)

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for kind in (self.cross, self.self_attention) for layer in kind.layers for x in layer)

    def select(self, rows: Sequence[int]) -> "Cache":
        return Cache(self.cross.select(rows), self.self_attention.select(rows))

    def fix(self) -> None:
        self.cross.fix()
        self.self_attention.fix()

    def aim(self) -> None:
        self.cross.aim()
        self.self_attention.aim()

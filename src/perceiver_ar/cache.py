"""What a decoder keeps between calls: keys and values of cross-attention and of self-attention, row by row.

The network writes into a cache and reads from it (`KeysValues.update`), but only the caller moves on (`advance`): a
forward that is run twice over the same cache gives the same twice.

Shapes: B rows, H heads, N new positions, C channels per head.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from perceiver_ar.attention import Piece
from perceiver_ar.config import PerceiverARConfig


class _Plan(NamedTuple):
    """What `update` does with new positions, the same in every layer."""

    slots: int | Tensor
    """First slot of all rows, or (B,) the slot of each."""
    held: int
    """Slots in use afterwards, in the longest row."""
    mask: Tensor | None
    """(B, held), True where a row has something; None: everywhere."""


class KeysValues:
    """Keys and values of the attention layers of one kind, in memory of fixed size.

    Every row holds its last `room` positions. Slots are used in a circle: where there is no room left, a new position
    takes the place of the oldest. Keys carry their rotation, so attention does not mind the order.
    """

    def __init__(self, k: Tensor, v: Tensor, counts: np.ndarray) -> None:
        """k, v: (layers, B, H, room, C), finite everywhere; counts: (B,) int64, positions written to each row so far.

        All three are shared with the views that `rows` gives.
        """
        self.k, self.v, self.counts = k, v, counts
        self._plan: tuple[bytes, _Plan] | None = None

    @classmethod
    def empty(
        cls, layers: int, rows: int, heads: int, room: int, channels: int, dtype: torch.dtype, device: torch.device
    ) -> "KeysValues":
        shape = (layers, rows, heads, room, channels)
        k = torch.zeros(shape, dtype=dtype, device=device)  # what is masked is still multiplied, by 0: no NaN
        return cls(k, torch.zeros_like(k), np.zeros(rows, dtype=np.int64))

    @property
    def room(self) -> int:
        return self.k.shape[3]

    def update(self, k: Tensor, v: Tensor, layer_idx: int) -> list[Piece]:
        """Writes new keys and values (B, H, N, C) of a layer; returns the pieces that their queries attend to.

        Until `advance`, the next call writes to the same places. More than one new position at a time needs rows with
        equally many positions so far, and room for all.
        """
        N = k.shape[2]
        plan = self._prepare(N)
        keys, values = self.k[layer_idx], self.v[layer_idx]
        if isinstance(plan.slots, int):
            keys.narrow(2, plan.slots, N).copy_(k)
            values.narrow(2, plan.slots, N).copy_(v)
        else:
            row = torch.arange(len(k), device=k.device)
            keys[row, :, plan.slots] = k[:, :, 0]
            values[row, :, plan.slots] = v[:, :, 0]
        if N == 1:  # the newest position sees everything
            return [Piece(keys.narrow(2, 0, plan.held), values.narrow(2, 0, plan.held), mask=plan.mask)]
        past = plan.held - N
        return [Piece(keys.narrow(2, 0, past), values.narrow(2, 0, past)), Piece(k, v, causal=True)]

    def advance(self, n: int) -> None:
        """The last n positions that were written are there to stay."""
        self.counts += n

    def keep(self, n: int, dropped: int = 0) -> None:
        """Of every row, keeps n positions: not the first `dropped`, and nothing behind the n next to them."""
        assert n == 0 or ((dropped + n <= self.counts) & (self.counts <= self.room)).all()
        if dropped and n:
            for layer in (*self.k, *self.v):  # one at a time: the copy is small
                layer.narrow(2, 0, n).copy_(layer.narrow(2, dropped, n).clone())
        self.counts[:] = n

    def rows(self, first: int, last: int) -> "KeysValues":
        """Rows first ... last - 1, in the same memory."""
        return KeysValues(self.k[:, first:last], self.v[:, first:last], self.counts[first:last])

    def copy_row(self, source: int, target: int) -> None:
        self.k[:, target], self.v[:, target] = self.k[:, source], self.v[:, source]
        self.counts[target] = self.counts[source]

    def repeat(self, n: int) -> "KeysValues":
        """Every row n times, each copy with its own memory."""
        k, v = (x.repeat_interleave(n, dim=1) for x in (self.k, self.v))
        return KeysValues(k, v, self.counts.repeat(n))

    def select(self, rows: Sequence[int]) -> "KeysValues":
        """Copies of rows, in this order; a row may come several times, or not at all."""
        index = torch.tensor(rows, device=self.k.device)
        return KeysValues(self.k.index_select(1, index), self.v.index_select(1, index), self.counts[list(rows)])

    def _prepare(self, N: int) -> _Plan:
        """Where N new positions go and what they see, made once for all layers."""
        key = self.counts.tobytes() + N.to_bytes(4, "little")
        if self._plan is None or self._plan[0] != key:
            self._plan = key, self._make_plan(N)
        return self._plan[1]

    def _make_plan(self, N: int) -> _Plan:
        held = np.minimum(self.counts + N, self.room)
        if (self.counts == self.counts[0]).all():
            count = int(self.counts[0])
            assert N == 1 or count + N <= self.room
            return _Plan(count % self.room, int(held[0]), None)
        assert N == 1
        most, device = int(held.max()), self.k.device
        mask = None
        if held.min() < most:
            mask = torch.arange(most, device=device) < torch.from_numpy(held).to(device)[:, None]
        return _Plan(torch.from_numpy(self.counts % self.room).to(device), most, mask)


class Cache:
    """Of each row: its context in every cross-attention layer, its latents in every self-attention layer."""

    def __init__(self, cross: KeysValues, own: KeysValues) -> None:
        self.cross, self.own = cross, own

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
        """The last n latents that were computed are there to stay, as context and as latents."""
        self.cross.advance(n)
        self.own.advance(n)

    def rows(self, first: int, last: int) -> "Cache":
        return Cache(self.cross.rows(first, last), self.own.rows(first, last))

    def copy_row(self, source: int, target: int) -> None:
        self.cross.copy_row(source, target)
        self.own.copy_row(source, target)

    def repeat(self, n: int) -> "Cache":
        return Cache(self.cross.repeat(n), self.own.repeat(n))

    def select(self, rows: Sequence[int]) -> "Cache":
        return Cache(self.cross.select(rows), self.own.select(rows))

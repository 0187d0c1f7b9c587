"""What cross-attention layers read: tokens, their positions, and embeddings that know the tokens before them.

Local context. A token's key has to say what came *before* the token: only then can a query that stands behind the same
words find it, and its value says what came next (the look-up of an induction head, arXiv 2209.11895). So the embedding
of token j is a causal depthwise convolution of width W = `local_context`, and half of each head's key channels come
from the embedding of the token before:

    h_j = e_j + sum_{0 < i < W} a_i * e_{j-i}        the latents' first values; values; the first half of key channels
    h_{j-1}                                          the second half of key channels (key offset)

with a_i (E,) learned and e_j the vector of token j's id. Before the first token, and instead of padding, the vector is
zero. A key thus depends on its token and `reach` tokens before it.

Shapes: B batch, T context, P prefix, K some tokens, E embedding width, W local context, n = `reach(config)`.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from perceiver_ar.config import PerceiverARConfig

NOTHING = -1
"""Stands for the id of a token that does not exist."""


class Tables(NamedTuple):
    """The weights that embeddings are made of."""

    tokens: Tensor
    """(V, E)"""
    taps: Tensor | None
    """(W - 1, E), the convolution: row i - 1 weighs the token i places before. None where W is 1."""
    positions: list[Tensor]
    """(rows, E) of each axis."""

    def flat(self) -> list[Tensor]:
        return [self.tokens, *([] if self.taps is None else [self.taps]), *self.positions]

    @classmethod
    def of(cls, config: PerceiverARConfig, flat: Sequence[Tensor]) -> "tuple[Tables, list[Tensor]]":
        """The tables at the beginning of `flat`, in the order of the method of this name, and what follows them."""
        first = 1 + (config.local_context > 1)
        last = first + len(config.table_sizes)
        return cls(flat[0], flat[1] if first > 1 else None, list(flat[first:last])), list(flat[last:])


class Prefix(NamedTuple):
    """Tokens as ids, from which any part can be embedded."""

    tables: Tables
    tokens: Tensor
    """(B, P), of any integer type, on any device; or (B, P, 1 + n) as `with_predecessors` makes them."""
    positions: Tensor | None
    """(B or 1, P) or (B or 1, P, axes), as `coordinates` takes them; None: 0 ... P - 1."""
    mask: Tensor | None
    """(B, P) bool, True for real tokens; None: all are."""
    keep: Tensor | None
    """(B, kept) indices of the tokens that survive prefix dropout; None: all do."""
    reach: int = 0
    """n: how many tokens before it a token's key depends on."""
    chunk: int = 0
    """Tokens of a row to read at once; 0: all."""
    group: str = ""
    """Name of the process group whose ranks share the prefix; none: this process reads it all."""

    @property
    def length(self) -> int:
        return self.tokens.shape[1] if self.keep is None else self.keep.shape[1]

    def rows(self, P: int, keep: Tensor | None) -> "Prefix":
        """The first P tokens, or of these the ones at the indices `keep` (B, kept)."""
        positions, mask = (None if x is None else x[:, :P] for x in (self.positions, self.mask))
        return self._replace(tokens=self.tokens[:, :P], positions=positions, mask=mask, keep=keep)

    def part(self, start: int, stop: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """Ids, positions and mask of the K tokens from `start` to `stop`: what is dropped is never looked at.

        The ids are as `mix` takes them: (B, n + K), or (B, K, 1 + n).
        """
        device, n = self.tables.tokens.device, self.reach
        if device.type == "meta":  # weights that are fetched when their module is called
            device = self.tokens.device

        def take(x: Tensor, back: int = 0) -> Tensor:
            """Rows of x (B or 1, P, ...) for these tokens, or for those `back` places before."""
            if self.keep is None:
                return x[:, start:stop].to(device)
            keep = self.keep[:, start:stop] - back
            row = torch.arange(len(keep), device=keep.device)[:, None]
            return x.expand(len(keep), *x.shape[1:])[row.to(x.device), keep.clamp(min=0).to(x.device)].to(device)

        if self.positions is not None:
            positions = take(self.positions)
        elif self.keep is not None:
            positions = self.keep[:, start:stop].to(device)
        else:
            positions = torch.arange(start, stop, device=device)[None]
        if self.tokens.ndim == 3 or n == 0:
            ids = take(self.tokens).long()
        elif self.keep is None:
            first = max(start - n, 0)
            ids = F.pad(self.tokens[:, first:stop].to(device).long(), (n - start + first, 0), value=NOTHING)
        else:
            keep = self.keep[:, start:stop].to(device)
            ids = torch.stack([take(self.tokens, i).long().masked_fill(keep < i, NOTHING) for i in range(n + 1)], -1)
        return ids, positions, None if self.mask is None else take(self.mask)


def reach(config: PerceiverARConfig) -> int:
    """How many tokens before it a token's key depends on: W - 1 in its embedding, one more by the key offset."""
    return config.local_context if config.local_context > 1 else 0


def with_predecessors(tokens: Tensor, mask: Tensor, n: int) -> Tensor:
    """(B, T) ids, of which `mask` (B, T) says which are real -> (B, T, 1 + n): each id, then the n real ones before it.

    The nearest comes first; NOTHING where there is none.
    """
    tokens, place = tokens.long(), mask.cumsum(1) - mask.long()  # how many real ones are before each
    real = tokens.gather(1, (~mask).byte().argsort(dim=1, stable=True))
    before = [real.gather(1, (place - i).clamp(min=0)).masked_fill(place < i, NOTHING) for i in range(1, n + 1)]
    return torch.stack([tokens, *before], dim=-1)


def place_vectors(tables: Iterable[Callable[[Tensor], Tensor]], places: Tensor) -> Tensor | None:
    """(B or 1, K, E): the sum of what the position tables give for these coordinates; None: there are no tables."""
    vectors = [table(places[..., axis]) for axis, table in enumerate(tables)]
    return sum(vectors[1:], vectors[0]) if vectors else None


def mix(ids: Tensor, rows: Tensor, taps: Tensor | None, at: Tensor | None) -> Tensor:
    """(B, K + 1 or 2 K, E): row i < K is that of the token before token i; the last K rows are those of the tokens.

    Without local context there are only the tokens: (B, K, E). The offset embeddings are for search by content, so
    positions are not in them.

    Args:
        ids: as `Prefix.part` gives them.
        rows: what the token embedding has for them.
        at: `place_vectors`.
    """
    if taps is None:
        return rows if at is None else rows + at
    n = len(taps) + 1
    if ids.ndim == 3:  # (B, K, 1 + n, E): every token brings those before it
        K, by_distance = ids.shape[1], rows.masked_fill((ids < 0)[..., None], 0.0).unbind(2)
        h = torch.cat([_weigh(by_distance[1:], taps), _weigh(by_distance[:n], taps)], dim=1)
    else:  # (B, n + K, E): neighbours share them, and NOTHING is among the first n only
        K, first = ids.shape[1] - n, rows[:, :n].masked_fill((ids[:, :n] < 0)[..., None], 0.0)
        rows = torch.cat([first, rows[:, n:]], dim=1)
        if torch.compiler.is_compiling():  # compilers fuse the plain formula
            h = _weigh([rows[:, n - 1 - i : n + K - i] for i in range(n)], taps)
        else:
            h = _Convolution.apply(rows, taps)
    return h if at is None else torch.cat([h[:, :K], h[:, h.shape[1] - K :] + at], dim=1)


def _weigh(by_distance: Sequence[Tensor], taps: Tensor) -> Tensor:
    h = by_distance[0]
    for tap, rows in zip(taps, by_distance[1:], strict=True):
        h = torch.addcmul(h, tap.to(h.dtype), rows)
    return h


class _Convolution(torch.autograd.Function):
    """`_weigh` over neighbours, (B, n + K, E) -> (B, K + 1, E), in less time.

    Autograd would write the gradient of each shifted slice to a tensor of its own.
    """

    @staticmethod
    def forward(rows: Tensor, taps: Tensor) -> Tensor:
        W = len(taps) + 1
        h = rows[:, W - 1 :].clone()
        for i, tap in enumerate(taps.to(h.dtype), start=1):
            h.addcmul_(rows[:, W - 1 - i : -i], tap)
        return h

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, d_h: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        rows, taps = ctx.saved_tensors
        W = len(taps) + 1
        d_rows = F.pad(d_h, (0, 0, W - 1, 0))
        d_taps = torch.empty_like(taps)
        for i, tap in enumerate(taps.to(d_h.dtype), start=1):
            d_rows[:, W - 1 - i : -i].addcmul_(d_h, tap)
            d_taps[i - 1] = (d_h * rows[:, W - 1 - i : -i]).sum((0, 1))
        return d_rows, d_taps


def coordinates(config: PerceiverARConfig, positions: Tensor) -> Tensor:
    """Positions (B or 1, K) -> (B or 1, K, axes): their rows in the position tables; without tables as they are."""
    sizes = config.table_sizes
    if positions.ndim == 3:
        return positions
    axes = []  # the first axis takes what is left, so that too large a position is an error
    for size in reversed(sizes[1:]):
        axes.insert(0, positions % size)
        positions = positions // size
    return torch.stack([positions, *axes], dim=-1)


def running(config: PerceiverARConfig, places: Tensor) -> Tensor:
    """The inverse of `coordinates`: the positions (B or 1, K) that rotations go by."""
    flat = places[..., 0]
    for axis, size in enumerate(config.table_sizes[1:], start=1):
        flat = flat * size + places[..., axis]
    return flat

"""A decoder's prefix held as ids: attention to it with one query per row, and no keys and values of its tokens.

Without position tables the key of a token is that of its id, turned to the token's position. Of a key with channel
pairs (k1, k2) that turn by an angle a, and a query (q1, q2) that stands in its own place already,

    q . k = sum over pairs of  cos a (q1 k1 + q2 k2) + sin a (q2 k1 - q1 k2)  +  sum over the other channels of  q k

and all but the angles depends on the id alone: a step computes it once for each id. What is held of a token is its
cosines and sines, the same for all heads and layers, in place of 2 H C numbers in every layer. Tokens are sorted by id
into tiles of one id, so that scores are products of small matrices; and the values of ids are weighed, not those of
tokens, after the probabilities of an id's tokens have been added up.

Shapes: B rows, P prefix, K latents, H heads, C channels per head, R turned channels, V vocabulary, G tiles, S slots of
a tile.
"""

from collections.abc import Sequence
from typing import Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from perceiver_ar.attention import Piece
from perceiver_ar.config import PerceiverARConfig
from perceiver_ar.heads import rotary_speeds, rotary_tables, split_heads

TILE, LARGEST = 32, 256
"""Slots of the smallest and of the largest tiles. Of each id at most one tile is not full."""
EMPTY = -1e30
"""The score of an empty slot: finite, as infinity may meet a zero in a product of matrices."""
SMALL = -80.0
"""Logarithm of the smallest weight: its exponential is a normal number in float32, and CPUs are slow with others."""
WRITE = 1 << 16
"""Tokens of a row whose angles are computed at once."""


class HeldPrefix:
    """Of each row, the prefix."""

    def __init__(
        self,
        config: PerceiverARConfig,
        vocabulary: Sequence[tuple[Tensor, Tensor]],
        turns: Tensor,
        ids: Tensor,
        counts: np.ndarray,
    ) -> None:
        """vocabulary: of each layer keys, not turned, and values, each (H, V, C).

        turns: (B, G, R + 2, S), in every slot cosines, sines, 1, and 0 or, if there is no token, EMPTY; ids: (B, G) of
        the tiles; counts: (B,) int64, the tiles that have tokens. All are shared with the views that `rows` gives.
        """
        self.config, self.vocabulary, self.turns, self.ids, self.counts = config, vocabulary, turns, ids, counts
        self._fixed = False

    @staticmethod
    def pay(config: PerceiverARConfig, context: int) -> bool:
        """Whether contexts of so many tokens are read faster as ids, by a network where that is possible."""
        return not config.table_sizes and config.rotary_heads_fraction == 1 and TILE * config.vocab_size <= context

    @classmethod
    def empty(
        cls, config: PerceiverARConfig, rows: int, context: int, vocabulary: Sequence[tuple[Tensor, Tensor]]
    ) -> Self:
        """For prefixes of at most `context` tokens; vocabulary: keys and values (V, H * C) of each layer."""

        def by_heads(x: Tensor) -> Tensor:
            return split_heads(x[None], config.heads_cross)[0].contiguous()

        heads = [(by_heads(k), by_heads(v)) for k, v in vocabulary]
        first = vocabulary[0][0]
        # Four tiles or more for the average id of a full context: then few slots stay empty.
        size = min(LARGEST, max(TILE, 2 ** ((context // config.vocab_size // 4).bit_length() - 1)))
        turned = 2 * rotary_speeds(config, True, first.device).shape[-1] if config.rotary else 0
        most = context // size + min(config.vocab_size, context)
        turns = first.new_zeros(rows, most, turned + 2, size)
        turns[:, :, -1] = EMPTY
        ids = torch.zeros(rows, most, dtype=torch.int64, device=first.device)
        return cls(config, heads, turns, ids, np.zeros(rows, dtype=np.int64))

    def write(self, tokens: Tensor, positions: Tensor) -> None:
        """The prefix of every row is now these tokens (B, P), at positions (B or 1, P)."""
        positions, size = positions.expand_as(tokens), self.turns.shape[-1]
        for row, ids in enumerate(tokens):
            order = ids.argsort()
            times = ids.bincount(minlength=self.config.vocab_size)
            tiles = (times + size - 1) // size
            # A token's slot: its place among those of its id, from the first slot of the id's first tile.
            starts = size * (tiles.cumsum(0) - tiles) - (times.cumsum(0) - times)
            slots = torch.empty_like(order)
            slots[order] = torch.arange(len(ids), device=ids.device) + starts[ids[order]]
            self.turns[row, :, -1] = EMPTY
            for at, slot in zip(positions[row].split(WRITE), slots.split(WRITE), strict=True):
                self.turns[row, slot // size, :, slot % size] = self._turns(at)
            self.counts[row] = G = int(tiles.sum())
            self.ids[row, :G] = torch.repeat_interleave(tiles)

    def _turns(self, positions: Tensor) -> Tensor:
        """What is held of tokens at these positions (P,): (P, R + 2)."""
        rotary = rotary_tables(self.config, positions[None], cross=True, dtype=self.turns.dtype)
        seen = F.pad(self.turns.new_ones(len(positions), 1), (0, 1))
        if rotary is None:
            return seen
        (cos, _), (_, sin) = (x[0, 0].chunk(2, dim=-1) for x in rotary)
        return torch.cat([cos, sin, seen], dim=-1)

    def attend(self, q: Tensor, pieces: Sequence[Piece], layer_idx: int) -> Tensor:
        """Attention of queries (B, H, 1, C), in their places, to the prefix and to the one piece of the latents."""
        (own,) = pieces
        keys, values = self.vocabulary[layer_idx]
        G = self.turns.shape[1] if self._fixed else max(1, int(self.counts.max()))
        turns, ids = self.turns[:, :G], self.ids[:, :G]
        with torch.autocast(q.device.type, enabled=False):
            x = q.to(keys.dtype) * q.shape[-1] ** -0.5
            of_ids = _coefficients(x, keys, turns.shape[2] - 2).transpose(1, 2)  # (B, V, H, R + 2)
            of_tiles = of_ids.gather(1, ids[:, :, None, None].expand(-1, -1, *of_ids.shape[2:]))
            scores = of_tiles @ turns  # (B, G, H, S)
            own_scores = x @ own.k.to(x.dtype).mT  # (B, H, 1, K)
            if own.mask is not None:
                own_scores = own_scores.masked_fill(~own.mask[:, None, None], float("-inf"))
            most = own_scores.amax(-1).maximum(scores.amax((1, 3))[..., None])  # (B, H, 1)
            own_weights = (own_scores - most[..., None]).exp()
            weights = (scores - most[:, None]).clamp_(min=SMALL)
            weights = weights.exp_().sum(-1)  # (B, G, H)
            weights = weights.new_zeros(of_ids.shape[:3]).scatter_add(1, ids[:, :, None].expand_as(weights), weights)
            out = (weights.permute(2, 0, 1) @ values).transpose(0, 1)[:, :, None] + own_weights @ own.v.to(x.dtype)
            out = out / (weights.sum(1)[..., None] + own_weights.sum(-1))[..., None]
        return out.to(q.dtype)

    def rows(self, first: int, last: int) -> "HeldPrefix":
        """Rows first ... last - 1, in the same memory."""
        return HeldPrefix(
            self.config, self.vocabulary, self.turns[first:last], self.ids[first:last], self.counts[first:last]
        )

    def copy_row(self, source: int, target: int) -> None:
        for x in (self.turns, self.ids):
            x[target] = x[source]
        self.counts[target] = self.counts[source]

    def select(self, rows: Sequence[int]) -> "HeldPrefix":
        """Copies of rows, in this order; a row may come several times, or not at all."""
        index = torch.tensor(rows, device=self.ids.device)
        return HeldPrefix(self.config, self.vocabulary, self.turns[index], self.ids[index], self.counts[list(rows)])

    def fix(self) -> None:
        """From here on, steps look at all tiles, used or not: shapes stay, for torch.compile and CUDA graphs."""
        self._fixed = True
        if self.turns.device.type == "cuda":
            for x in (self.turns, self.ids, *(x for layer in self.vocabulary for x in layer)):
                torch._dynamo.mark_static_address(x, guard=False)  # type: ignore[reportPrivateImportUsage]


def _coefficients(q: Tensor, keys: Tensor, R: int) -> Tensor:
    """Factors (B, H, V, R + 2) of `HeldPrefix.turns`, from scaled queries (B, H, 1, C) and keys (H, V, C)."""
    C = q.shape[-1]
    q1, q2, q_rest = q.split([R // 2, R // 2, C - R], dim=-1)
    k1, k2, k_rest = keys.split([R // 2, R // 2, C - R], dim=-1)
    rest = q_rest @ k_rest.mT  # (B, H, 1, V)
    return torch.cat([q1 * k1 + q2 * k2, q2 * k1 - q1 * k2, rest.mT, torch.ones_like(rest.mT)], dim=-1)

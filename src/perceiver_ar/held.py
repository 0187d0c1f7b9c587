"""A decoder's prefix held as ids: attention to it without keys and values of its tokens.

Without position tables the key of a token is that of its id, turned to the token's position. Of a key with channel
pairs (k1, k2) that turn by an angle a, and a query (q1, q2) that stands in its own place already,

    q . k = sum over pairs of  cos a (q1 k1 + q2 k2) + sin a (q2 k1 - q1 k2)  +  sum over the other channels of  q k

and all but the angles depends on the id alone: a step computes it once for each id. What is held of a token is its
cosines and sines, the same for all heads and layers, in place of 2 H C numbers in every layer. Tokens lie in tiles of
one id, so that scores are products of small matrices; and the values of tiles are weighed, not those of tokens, after
the probabilities of a tile's tokens have been added up.

The same for finite weights: one that is NaN or infinite may be seen where no token has its id.

Shapes: B rows, P prefix, H heads, C channels per head, R turned channels, V vocabulary, G tiles, S slots of a tile.
"""

from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any, NamedTuple, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from perceiver_ar.attention import Piece, attend_pieces
from perceiver_ar.config import PerceiverARConfig
from perceiver_ar.heads import place_rows, rotary_speeds, rotary_tables
from perceiver_ar.streaming import piece_length

TILE, LARGEST = 32, 256
"""Slots of the smallest and of the largest tiles. Of each id at most one tile is not full."""
EMPTY = -1e30
"""The score of an empty slot: finite, as infinity may meet a zero in a product of matrices."""
SMALL = -80.0
"""Logarithm of the smallest weight: its exponential is a normal number in float32, and CPUs are slow with others."""
WRITE = 1 << 16
"""Tokens of a row whose angles are computed at once."""


class HeldRows(NamedTuple):
    """What is held, row by row."""

    tokens: Tensor
    """(B, P) int32, in their order."""
    turns: Tensor
    """(B, G, R + 2, S): in every slot cosines, sines, 1, and 0 or, where there is no token, EMPTY."""
    ids: Tensor
    """(B, G) int64, of the tiles."""
    times: Tensor
    """(B, V) int64, tokens of each id."""
    last: Tensor
    """(B, V) int64, the last tile of each id that has one."""
    first: np.ndarray
    """(B,) the first token's position; the others follow one by one."""
    length: np.ndarray
    """(B,) tokens."""
    tiles: np.ndarray
    """(B,) tiles that have tokens."""

    def at(self, rows: slice | list[int]) -> "HeldRows":
        """Some rows: of a slice in the same memory, of a list as copies."""
        return HeldRows(*(x[rows] for x in cast("tuple[Any, ...]", self)))


class HeldPrefix:
    """The prefix of every row: of each token its id, and how its position turns a key."""

    def __init__(
        self,
        config: PerceiverARConfig,
        vocabulary: Sequence[tuple[Tensor, Tensor]],
        held: HeldRows,
    ) -> None:
        """vocabulary: of each layer keys, not turned, and values (V, H * C)."""
        self.config, self.vocabulary, self.held = config, vocabulary, held
        self._fixed = False
        """Whether steps look at all tiles, used or not, so that shapes stay."""

    @staticmethod
    def pays(config: PerceiverARConfig, context: int) -> bool:
        """Whether contexts of up to so many tokens are read faster as ids, by a network where that is possible."""
        possible = bool(config.cross_layers) and not config.table_sizes and config.rotary_heads_fraction == 1
        return possible and TILE * config.vocab_size <= context

    @classmethod
    def empty(
        cls, config: PerceiverARConfig, rows: int, context: int, vocabulary: Sequence[tuple[Tensor, Tensor]]
    ) -> "HeldPrefix":
        """For prefixes of at most `context` tokens."""
        like, V = vocabulary[0][0], config.vocab_size
        # Four tiles or more for the average id of a full context: then few slots stay empty.
        size = min(LARGEST, max(TILE, 2 ** ((context // V // 4).bit_length() - 1)))
        tiles = context // size + min(V, context)
        turned = 2 * rotary_speeds(config, True, like.device).shape[-1] if config.rotary else 0
        turns = like.new_zeros(rows, tiles, turned + 2, size)
        turns[:, :, -1] = EMPTY
        shapes = (rows, context), (rows, tiles), (rows, V), (rows, V)
        tokens, ids, times, last = (torch.zeros(shape, dtype=torch.int64, device=like.device) for shape in shapes)
        first, length, used = (np.zeros(rows, dtype=np.int64) for _ in range(3))
        return cls(config, vocabulary, HeldRows(tokens.int(), turns, ids, times, last, first, length, used))

    def clear(self) -> None:
        """Every row is empty."""
        held = self.held
        held.turns[:, :, -1] = EMPTY
        held.times.zero_()
        held.length[:], held.tiles[:] = 0, 0

    def append(self, tokens: Tensor, first: Sequence[int]) -> None:
        """Adds tokens (B, n) to the rows, which have equally many so far; `first`: their first positions."""
        held, size = self.held, self.held.turns.shape[-1]
        for row, ids in enumerate(tokens):
            start, used, n, before = int(held.length[row]), int(held.tiles[row]), len(ids), held.times[row]
            new = ids.bincount(minlength=len(before))
            had, has = ((times + size - 1) // size for times in (before, before + new))
            added = has - had
            last = used + added.cumsum(0) - 1  # of an id's tiles, where it gets new ones
            # A token's place among those of its id; from there its tile, the id's last one so far or a new one.
            order, place = ids.argsort(), torch.empty_like(ids)
            place[order] = torch.arange(n, device=ids.device) - (new.cumsum(0) - new - before)[ids[order]]
            ahead = has[ids] - 1 - place // size
            tile = torch.where(place // size < had[ids], held.last[row, ids], last[ids] - ahead)
            positions = torch.arange(first[row], first[row] + n, device=ids.device)
            for at, part, slot in zip(*(x.split(WRITE) for x in (positions, tile, place % size)), strict=True):
                held.turns[row, part, :, slot] = self._turns(at)
            held.tokens[row, start : start + n] = ids
            of_new = torch.repeat_interleave(added)
            held.ids[row, used : used + len(of_new)] = of_new
            held.last[row] = torch.where(added > 0, last, held.last[row])
            held.times[row] += new
            held.first[row], held.length[row], held.tiles[row] = first[row] - start, start + n, used + len(of_new)

    def _turns(self, positions: Tensor) -> Tensor:
        """What tokens at these positions (P,) have in `HeldRows.turns`: (P, R + 2)."""
        rotary = rotary_tables(self.config, positions[None], cross=True, dtype=self.held.turns.dtype)
        seen = F.pad(self.held.turns.new_ones(len(positions), 1), (0, 1))
        if rotary is None:
            return seen
        (cos, _), (_, sin) = (x[0, 0].chunk(2, dim=-1) for x in rotary)
        return torch.cat([cos, sin, seen], dim=-1)

    def attend(self, q: Tensor, pieces: Sequence[Piece], layer_idx: int) -> Tensor:
        """Attention of queries (B, H, N, C), in their places, to the prefix and to pieces. No gradients flow.

        More than one query at a time needs rows of equally many tokens.
        """
        with torch.autocast(q.device.type, enabled=False):
            if q.shape[2] == 1:
                (piece,) = pieces
                return self._attend_one(q, piece, *self.vocabulary[layer_idx])
            pieces = [piece for piece in pieces if piece.k.shape[2] > 0]
            return attend_pieces(q, chain(pieces, self._pieces(layer_idx, q.dtype)))[0]

    def _attend_one(self, q: Tensor, own: Piece, keys: Tensor, values: Tensor) -> Tensor:
        B, H, _, C = q.shape
        G = self.held.turns.shape[1] if self._fixed else max(1, int(self.held.tiles.max()))
        turns, ids = self.held.turns[:, :G], self.held.ids[:, :G]
        x = q.to(keys.dtype) * C**-0.5
        of_ids = _factors(x.transpose(1, 2), keys.unflatten(-1, (H, C)), turns.shape[2] - 2)  # (B, V, H, R + 2)
        rows = torch.arange(B, device=ids.device)[:, None] * len(keys)
        of_tiles = F.embedding(ids + rows, of_ids.flatten(0, 1).flatten(1)).unflatten(-1, (H, -1))
        scores = of_tiles @ turns  # (B, G, H, S)
        own_scores = x @ own.k.to(x.dtype).mT  # (B, H, 1, K)
        if own.mask is not None:
            own_scores = own_scores.masked_fill(~own.mask[:, None, None], float("-inf"))
        most = own_scores.amax(-1).maximum(scores.amax((1, 3))[..., None])  # (B, H, 1)
        own_weights = (own_scores - most[..., None]).exp()
        weights = (scores - most[:, None]).clamp_(min=SMALL).exp_().sum(-1)  # (B, G, H)
        tile_values = F.embedding(ids, values).unflatten(-1, (H, C)).transpose(1, 2)  # (B, H, G, C)
        out = weights.transpose(1, 2)[:, :, None] @ tile_values + own_weights @ own.v.to(x.dtype)
        return (out / (weights.sum(1)[..., None] + own_weights.sum(-1))[..., None]).to(q.dtype)

    def _pieces(self, layer_idx: int, dtype: torch.dtype) -> Iterator[Piece]:
        """The prefix in its order, some tokens at a time."""
        held, length = self.held, int(self.held.length[0])
        assert (held.length == length).all()
        first = torch.from_numpy(held.first).to(held.tokens.device)[:, None]
        chunk = piece_length(self.config, len(held.tokens), held.tokens.device)
        for start in range(0, length, chunk):
            tokens = held.tokens[:, start : min(start + chunk, length)]
            positions = first + torch.arange(start, start + tokens.shape[1], device=first.device)
            rotary = rotary_tables(self.config, positions, cross=True, dtype=held.turns.dtype)
            k, v = (F.embedding(tokens, table) for table in self.vocabulary[layer_idx])
            yield Piece(*place_rows(k, v, rotary, self.config, dtype))

    def rows(self, first: int, last: int) -> "HeldPrefix":
        """Rows first ... last - 1, in the same memory."""
        return HeldPrefix(self.config, self.vocabulary, self.held.at(slice(first, last)))

    def copy_row(self, source: int, target: int) -> None:
        for x in cast("tuple[Any, ...]", self.held):
            x[target] = x[source]

    def select(self, rows: Sequence[int]) -> "HeldPrefix":
        """Copies of rows, in this order; a row may come several times, or not at all."""
        return HeldPrefix(self.config, self.vocabulary, self.held.at(list(rows)))

    def fix(self) -> None:
        """From here on, steps are operations whose shapes stay: for torch.compile and CUDA graphs."""
        self._fixed = True
        if self.held.turns.device.type == "cuda":
            for x in (self.held.turns, self.held.ids, *(x for layer in self.vocabulary for x in layer)):
                torch._dynamo.mark_static_address(x, guard=False)  # type: ignore[reportPrivateImportUsage]


def _factors(q: Tensor, keys: Tensor, R: int) -> Tensor:
    """What `HeldRows.turns` are multiplied by: (B, V, H, R + 2), from scaled queries (B, 1, H, C), keys (V, H, C)."""
    C = q.shape[-1]
    q1, q2, q_rest = q.split([R // 2, R // 2, C - R], dim=-1)
    k1, k2, k_rest = keys.split([R // 2, R // 2, C - R], dim=-1)
    rest = (q_rest * k_rest).sum(-1, keepdim=True)
    return torch.cat([q1 * k1 + q2 * k2, q2 * k1 - q1 * k2, rest, torch.ones_like(rest)], dim=-1)

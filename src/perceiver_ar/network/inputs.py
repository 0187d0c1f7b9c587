"""The input of cross-attention: tokens, their positions, and embeddings with local context.

Local context. A token's key must describe the tokens *before* it: only then can a query after the same words find it.
The token's value tells what came next (the look-up of an induction head, arXiv 2209.11895). So the embedding of token j
is a causal depthwise convolution of width W = `local_context`, and half of each head's key channels come from the
embedding of the token before:

    h_j = e_j + sum_{0 < i < W} a_i * e_{j-i}        the initial latents; values; the first half of key channels
    h_{j-1}                                          the second half of key channels (key offset)

with a_i (E,) learned and e_j the vector of token j's id. The vector is zero before the first token and for padding. A
key thus depends on its token and `reach` tokens before it.

Shapes: B batch, T context, P prefix, K some tokens, E embedding width, W local context, n = `reach(config)`.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from perceiver_ar.config import PerceiverARConfig
from perceiver_ar.errors import InputError
from perceiver_ar.network.heads import Rotary

NOTHING = -1
"""Stands for the id of a token that does not exist."""


class Tables(NamedTuple):
    """The weights of the embedding."""

    tokens: Tensor
    """(V, E)"""
    taps: Tensor | None
    """(W - 1, E), the convolution: row i - 1 weighs the token i places before. None if W is 1."""
    positions: list[Tensor]
    """(rows, E) per axis."""

    def flat(self) -> list[Tensor]:
        return [self.tokens, *([] if self.taps is None else [self.taps]), *self.positions]

    @classmethod
    def of(cls, config: PerceiverARConfig, flat: Sequence[Tensor]) -> "tuple[Tables, list[Tensor]]":
        """The inverse of the method `flat`: the tables at the beginning of `flat`, and the tensors that follow them."""
        first = 1 + (config.local_context > 1)
        last = first + len(config.table_sizes)
        return cls(flat[0], flat[1] if first > 1 else None, list(flat[first:last])), list(flat[last:])


class EmbeddedTokens(NamedTuple):
    """Tokens of the context as cross-attention layers read them."""

    h: Tensor
    """(B, K, E) embeddings, not normalised; with local context (B, K + 1 or 2 K, E), see `mix_local_context`."""
    positions: Tensor
    """(B or 1, K)"""
    rotary: Rotary | None
    """Rotates their keys."""
    mask: Tensor | None
    """(B, K) bool, True where the token is real; None: all are."""


class TokenSource(NamedTuple):
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

    @property
    def length(self) -> int:
        return self.tokens.shape[1] if self.keep is None else self.keep.shape[1]

    def first(self, P: int, keep: Tensor | None) -> "TokenSource":
        """The first P tokens; `keep` (B, kept): only those at these indices."""
        positions, mask = (None if x is None else x[:, :P] for x in (self.positions, self.mask))
        return self._replace(tokens=self.tokens[:, :P], positions=positions, mask=mask, keep=keep)

    def part(self, start: int, stop: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """Ids, positions and mask of the K tokens from `start` to `stop`; dropped tokens are never read.

        The ids are as `mix_local_context` takes them: (B, n + K), or (B, K, 1 + n).
        """
        device, n = self.tables.tokens.device, self.reach
        if device.type == "meta":  # offloaded weights, loaded when their module is called
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
    """(B, T) ids and the mask (B, T) of the real ones -> (B, T, 1 + n): each id, then the n real ones before it.

    The nearest comes first; NOTHING replaces missing ones.
    """
    tokens, place = tokens.long(), mask.cumsum(1) - mask.long()  # number of real tokens before each
    real = tokens.gather(1, (~mask).byte().argsort(dim=1, stable=True))
    before = [real.gather(1, (place - i).clamp(min=0)).masked_fill(place < i, NOTHING) for i in range(1, n + 1)]
    return torch.stack([tokens, *before], dim=-1)


def token_source(
    config: PerceiverARConfig, tables: Tables, tokens: Tensor, positions: Tensor | None, mask: Tensor | None
) -> TokenSource:
    """All tokens of a context (B, T); positions as `resolve_positions` gives them."""
    n = reach(config)
    if n > 0 and mask is not None:
        tokens = with_predecessors(tokens, mask.to(tokens.device), n)
    return TokenSource(tables, tokens, positions, mask, None, n)


def position_vectors(tables: Iterable[Callable[[Tensor], Tensor]], coordinates: Tensor) -> Tensor | None:
    """(B or 1, K, E): the sum of the position tables' vectors at these coordinates; None without tables."""
    vectors = [table(coordinates[..., axis]) for axis, table in enumerate(tables)]
    return sum(vectors[1:], vectors[0]) if vectors else None


def mix_local_context(ids: Tensor, rows: Tensor, taps: Tensor | None, at: Tensor | None) -> Tensor:
    """Embeddings of K tokens: (B, K, E), or with local context (B, K + 1 or 2 K, E).

    With local context, row i < K is that of the token before token i, and the last K rows are those of the tokens. The
    former are for search by content, so no positions are added to them. The arguments: ids from `TokenSource.part`,
    their token embeddings, the taps of `Tables`, and `position_vectors`.
    """
    if taps is None:
        return rows if at is None else rows + at
    n = len(taps) + 1
    if ids.ndim == 3:  # (B, K, 1 + n, E): each token has its own predecessors
        K, by_distance = ids.shape[1], rows.masked_fill((ids < 0)[..., None], 0.0).unbind(2)
        h = torch.cat([_weigh(by_distance[1:], taps), _weigh(by_distance[:n], taps)], dim=1)
    else:  # (B, n + K, E): neighbours share them; only the first n can be NOTHING
        K = ids.shape[1] - n
        first, rest = rows.split([n, K], dim=1)
        rows = torch.cat([first.masked_fill((ids[:, :n] < 0)[..., None], 0.0), rest], dim=1)
        if torch.compiler.is_compiling():  # compilers fuse the plain formula
            h = _weigh([rows[:, n - 1 - i : n + K - i] for i in range(n)], taps)
        else:  # as in `activate`
            h = (_Convolution.apply if torch.is_grad_enabled() else _Convolution.forward)(rows, taps)
    return h if at is None else torch.cat([h[:, :K], h[:, h.shape[1] - K :] + at], dim=1)


def _weigh(by_distance: Sequence[Tensor], taps: Tensor) -> Tensor:
    h = by_distance[0]
    for tap, rows in zip(taps, by_distance[1:], strict=True):
        h = torch.addcmul(h, tap.to(h.dtype), rows)
    return h


class _Convolution(torch.autograd.Function):
    """`_weigh` over neighbours, (B, n + K, E) -> (B, K + 1, E), but faster.

    Autograd would write the gradient of each shifted slice to its own tensor.
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
    """Positions (B or 1, K) -> (B or 1, K, axes): their rows in the position tables, or unchanged without tables."""
    sizes = config.table_sizes
    if positions.ndim == 3:
        return positions
    axes = []  # the first axis takes the quotient, so that too large a position is an error
    for size in reversed(sizes[1:]):
        axes.insert(0, positions % size)
        positions = positions // size
    return torch.stack([positions, *axes], dim=-1)


def flat_positions(config: PerceiverARConfig, coordinates: Tensor) -> Tensor:
    """The inverse of `coordinates`: positions (B or 1, K), for the rotary angles."""
    flat = coordinates[..., 0]
    for axis, size in enumerate(config.table_sizes[1:], start=1):
        flat = flat * size + coordinates[..., axis]
    return flat


# Arguments of a forward call: checks and defaults.


def resolve_prefix_len(
    config: PerceiverARConfig,
    tokens: Tensor,
    prefix_len: int | None,
    mask: Tensor | None,
    prefix_keep: Tensor | None,
    blocks: int,
) -> int:
    """P, the prefix length to use. Raises InputError if tokens, prefix length, masks and blocks do not fit together."""
    if not isinstance(tokens, Tensor):
        raise InputError(f"tokens are of type {type(tokens).__name__}: turn them into a tensor with torch.as_tensor")
    if tokens.ndim != 2 or 0 in tokens.shape:
        raise InputError(f"tokens have shape {tuple(tokens.shape)}: they must be (batch, length), neither empty")
    if tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool:
        raise InputError(f"tokens are of {tokens.dtype}: they must be integer ids")
    T = tokens.shape[1]
    if config.context_length < T:
        raise InputError(
            f"{T} tokens are more than context_length {config.context_length}: give only the last "
            f"{config.context_length}, or build the model with a longer context"
        )
    if mask is not None and mask.shape != tokens.shape:
        raise InputError(f"mask has shape {tuple(mask.shape)}, tokens {tuple(tokens.shape)}: they must be equal")
    if mask is not None and mask.dtype != torch.bool:
        raise InputError(f"mask is of {mask.dtype}: it must be of torch.bool, True for real tokens")
    layers = len(config.cross_layers)
    if prefix_keep is not None and prefix_keep.shape[:-1] not in ((len(tokens),), (layers, len(tokens))):
        raise InputError(
            f"prefix_keep has shape {tuple(prefix_keep.shape)} for {layers} cross-attention layers and "
            f"{len(tokens)} rows: it must be (rows, kept) or (layers, rows, kept)"
        )
    P = max(0, T - config.num_latents) if prefix_len is None else prefix_len
    if not 0 <= P < T:
        raise InputError(f"prefix_len is {P} with {T} tokens: it must be in 0 ... {T - 1}")
    if blocks < 1 or (T - P) % blocks:
        raise InputError(f"blocks is {blocks} with {T - P} latents: it must divide them")
    if blocks > 1 and not config.blocks_allowed:
        raise InputError(
            f"blocks is {blocks}: with latent_keys query, positions_from_end, learned_queries each or "
            "latents_per_position the result would not be that of separate forwards, so run each block separately"
        )
    eager, V = not torch.compiler.is_compiling(), config.vocab_size
    comparable = tokens.dtype not in (torch.uint16, torch.uint32, torch.uint64)
    # Only if this does not wait for a GPU, and if there are values (fake tensors have none).
    if eager and type(tokens) is Tensor and tokens.device.type == "cpu" and comparable:
        wrong = [id for id in map(int, tokens.aminmax()) if not 0 <= id < V]
        if wrong:
            raise InputError(f"tokens have the id {wrong[0]}: with vocab_size {V} they must be in 0 ... {V - 1}")
    # An index beyond the prefix would let latents see the future.
    if eager and prefix_keep is not None and prefix_keep.device.type == "cpu":
        wrong = prefix_keep[(prefix_keep < 0) | (prefix_keep >= P)].tolist()
        if wrong:
            raise InputError(f"prefix_keep has index {wrong[0]}: with prefix_len {P} they must be in 0 ... {P - 1}")
    return P


def resolve_positions(
    config: PerceiverARConfig, tokens: Tensor, mask: Tensor | None, positions: Tensor | None
) -> Tensor | None:
    """Positions as `TokenSource` takes them: (B or 1, T) or, by axes, (B or 1, T, axes); None: 0 ... T - 1.

    Raises InputError if they do not fit the tokens, or the position tables are too short.
    """
    if positions is None:
        T, longest = tokens.shape[1], config.max_positions
        if mask is None and longest is not None and longest < T:
            raise InputError(
                f"{T} tokens are more than the {longest} positions of the tables {config.table_sizes}: "
                "give fewer tokens, or give positions"
            )
        if mask is None and not config.positions_from_end:
            return None
        real = torch.ones_like(tokens[:1], dtype=torch.bool) if mask is None else mask
        positions = (real.cumsum(1) - 1).clamp_(min=0)
        return positions[:, -1:] - positions if config.positions_from_end else positions
    if positions.is_floating_point() or positions.dtype == torch.bool:
        raise InputError(f"positions have type {positions.dtype}: they must be integers")
    axes = len(config.table_sizes)
    shape = positions.shape
    positions = positions if positions.ndim > 1 else positions[None]
    fits = positions.ndim == 2 or (positions.ndim == 3 and axes > 1 and shape[-1] == axes)
    if not fits or positions.shape[0] not in (1, tokens.shape[0]) or positions.shape[1] != tokens.shape[1]:
        raise InputError(f"positions have shape {tuple(shape)}, tokens {tuple(tokens.shape)}: give one for each token")
    return positions


def repeat_rows(
    times: int, tokens: Tensor, positions: Tensor | None, mask: Tensor | None, prefix_keep: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Repeats every row of the batch `times` times; copies are neighbours."""
    positions = positions if positions is None or len(positions) == 1 else positions.repeat_interleave(times, 0)
    mask = None if mask is None else mask.repeat_interleave(times, 0)
    prefix_keep = None if prefix_keep is None else prefix_keep.repeat_interleave(times, -2)
    return tokens.repeat_interleave(times, 0), positions, mask, prefix_keep


def prefix_keeps(
    config: PerceiverARConfig, tokens: Tensor, P: int, prefix_keep: Tensor | None, training: bool
) -> Sequence[Tensor | None]:
    """Indices (B, K) of the prefix tokens to read, per cross-attention layer or once for all layers; None: all."""
    if prefix_keep is not None:
        return prefix_keep.unbind() if prefix_keep.ndim == 3 else [prefix_keep]
    dropped = int(P * config.prefix_dropout) if training else 0
    if dropped == 0:
        return [None]
    noise = torch.rand(len(config.cross_layers), tokens.shape[0], P, device=tokens.device)
    return noise.topk(P - dropped, dim=-1, sorted=False).indices.unbind()

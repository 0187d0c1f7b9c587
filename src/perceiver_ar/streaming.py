"""Cross-attention to a prefix that is never held: embed, normalise, project a piece, attend, merge, drop it.

Memory for keys and values does not grow with the context, only the token ids do, in whatever integer type and on
whatever device they are. The backward pass makes every piece again. Output and gradients are those of the dense
computation (attention.py says why the pieces merge exactly). The processes of a group can share the prefix of a
sequence: each reads its part, and what they have read is merged in the same way.

Shapes: B batch, P prefix, K some of its tokens, N latents, E embedding width, H heads, C channels per head.
"""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.distributed_c10d import _resolve_process_group  # type: ignore[reportPrivateImportUsage]

from perceiver_ar.attention import (
    Piece,
    attend_pieces,
    fake_attention,
    fake_heads,
    heads_inside,
    piece_gradients,
    piece_weight,
)
from perceiver_ar.config import PerceiverARConfig
from perceiver_ar.heads import Rotary, place_rows, rotary_tables, split_keys_values, vocabulary_keys_values

SHARE = 1 / 128
"""The prefix is streamed where its keys and values would take more than this share of the device's memory."""
CPU_BYTES = 32 << 20
"""On a CPU also where they would take more than this: pieces stay in its caches and in memory that the process has."""
PIECE = {"cpu": 2048, "cuda": 32768}
"""Tokens of a piece, over all rows of a batch: enough to keep the device busy, few enough to stay in its caches. (Of
each row at least twice num_latents: every piece costs a pass over the latents' output so far.)"""


class Prefix(NamedTuple):
    """The prefix as ids, from which any part can be embedded."""

    tables: list[Tensor]
    """The token embedding (V, E), then the position tables (rows, E)."""
    tokens: Tensor
    """(B, P), of any integer type, on any device."""
    positions: Tensor | None
    """(B or 1, P) or (B or 1, P, axes), as `coordinates` takes them; None: 0 ... P - 1."""
    mask: Tensor | None
    """(B, P) bool, True for real tokens; None: all are."""
    keep: Tensor | None
    """(B, kept) indices of the tokens that survive prefix dropout; None: all do."""
    chunk: int = 0
    """Tokens of a row to read at once; 0: all."""
    group: str = ""
    """Name of the process group whose ranks share the prefix; none: this process reads it all."""

    @property
    def length(self) -> int:
        return self.tokens.shape[1] if self.keep is None else self.keep.shape[1]

    def part(self, start: int, stop: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """Tokens (B, K), positions and mask of those from `start` to `stop`: what is dropped is never looked at."""
        device = self.tables[0].device

        def take(x: Tensor) -> Tensor:
            if self.keep is None:
                return x[:, start:stop].to(device)
            keep = self.keep[:, start:stop]
            row = torch.arange(len(keep), device=keep.device)[:, None]
            return x.expand(len(keep), *x.shape[1:])[row.to(x.device), keep.to(x.device)].to(device)

        if self.positions is not None:
            positions = take(self.positions)
        elif self.keep is not None:
            positions = self.keep[:, start:stop].to(device)
        else:
            positions = torch.arange(start, stop, device=device)[None]
        return take(self.tokens).long(), positions, None if self.mask is None else take(self.mask)


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


def embed(tables: Sequence[Tensor], tokens: Tensor, places: Tensor) -> Tensor:
    """(B, K, E): the vector of each token plus, where there are position tables, those of its coordinates."""
    h = F.embedding(tokens, tables[0])
    for axis, table in enumerate(tables[1:]):
        h = h + F.embedding(places[..., axis], table)
    return h


def automatic_chunk(config: PerceiverARConfig, rows: int, length: int, dtype: torch.dtype, device: torch.device) -> int:
    """Tokens of a piece of a prefix of `length` tokens in each of `rows` rows; 0: hold the prefix as a whole."""
    width = config.heads_cross * config.width_head_cross
    size = len(config.cross_layers) * rows * length * 2 * width * dtype.itemsize
    most = SHARE * device_memory(device.type, device.index or 0)
    if size <= (min(most, CPU_BYTES) if device.type == "cpu" else most):
        return 0
    return piece_length(config, rows, device)


def piece_length(config: PerceiverARConfig, rows: int, device: torch.device) -> int:
    """Tokens of each row that are read at once."""
    return max(2 * config.num_latents, PIECE.get(device.type, PIECE["cpu"]) // rows)


@torch.compiler.assume_constant_result
def device_memory(kind: str, index: int) -> int:
    """Bytes that the device has."""
    return _device_memory(kind, index)


@lru_cache
def _device_memory(kind: str, index: int) -> int:
    if kind == "cuda":
        return torch.cuda.get_device_properties(index).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 8 << 30


def stream_attention(
    settings: str,
    q: Tensor,
    own: Piece,
    prefix: Prefix,
    norm: Sequence[Tensor],
    projection: Sequence[Tensor],
) -> Tensor:
    """Attention of the latents' queries (B, H, N, C) to the prefix and to `own`, the latents' piece. Gradients flow.

    Args:
        settings: the network's, as JSON.
        norm: weights of the context norm, with its bias if it has one.
        projection: weight of the fused key and value projection, with its bias if it has one.
    """
    weights = [*prefix.tables, *norm, *projection]
    ids = prefix.tokens, prefix.positions, prefix.mask, prefix.keep
    return _stream(q, own.k, own.v, own.mask, *ids, weights, settings, prefix.chunk, prefix.group)[0]


class _Reader:
    """Makes the pieces of a prefix, with the projection's weights in the type of the queries."""

    def __init__(
        self, prefix: list[Any], weights: Sequence[Tensor], settings: str, chunk: int, group: str, dtype: torch.dtype
    ):
        self.config = _read_config(settings)
        num_tables, num_norm = 1 + len(self.config.table_sizes), 2 if self.config.norm == "layernorm" else 1
        self.tables = list(weights[:num_tables])
        self.norm = list(weights[num_tables : num_tables + num_norm])
        self.projection = [weight.to(dtype) for weight in weights[num_tables + num_norm :]]
        self.makers = (*self.norm, *self.projection)
        self.prefix, self.chunk = Prefix(self.tables, *prefix), chunk
        self.group = _resolve_process_group(group) if group else None  # type: ignore[arg-type]
        self.rank, self.ranks = (self.group.rank(), self.group.size()) if self.group else (0, 1)
        self.first, self.end = (self.prefix.length * rank // self.ranks for rank in (self.rank, self.rank + 1))
        tokens, piece = (len(self.prefix.tokens) * length for length in (self.end - self.first, chunk))
        # Of the vocabulary there is never much more at once than of a piece.
        self.by_id = self.config.by_id(tokens) and self.config.vocab_size <= 2 * piece

    def parts(self) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
        """Tokens, coordinates and mask, part after part of what this rank reads."""
        for start in range(self.first, self.end, self.chunk):
            tokens, positions, mask = self.prefix.part(start, min(start + self.chunk, self.end))
            yield tokens, coordinates(self.config, positions), mask

    def rotary(self, places: Tensor) -> Rotary | None:
        dtype = torch.float64 if self.tables[0].dtype == torch.float64 else torch.float32
        return rotary_tables(self.config, running(self.config, places), cross=True, dtype=dtype)

    def project(self, h: Tensor, *weights: Tensor) -> Tensor:
        """Embeddings (..., E) to fused keys and values (..., 2 H C), with these weights of the norm and projection."""
        norm, projection = weights[: len(self.norm)], weights[len(self.norm) :]
        x = F.layer_norm(h, h.shape[-1:], *norm) if len(norm) == 2 else F.rms_norm(h, h.shape[-1:], *norm, eps=1e-5)
        return F.linear(x.to(projection[0].dtype), *projection)

    def keys_values(self, rotary: Rotary | None, h: Tensor, *weights: Tensor) -> tuple[Tensor, Tensor]:
        return split_keys_values(self.project(h, *weights), rotary, self.config)

    def vocabulary(self, h: Tensor, *weights: Tensor) -> tuple[Tensor, Tensor]:
        return vocabulary_keys_values(self.project(h, *weights), self.config)

    def recipe(
        self, tokens: Tensor, places: Tensor, vocabulary: tuple[Tensor, Tensor] | None
    ) -> tuple[Callable[..., tuple[Tensor, Tensor]], tuple[Tensor, ...]]:
        """What makes the keys and values of a part, and of which tensors: rows of the vocabulary's where there are."""
        rotary = self.rotary(places)
        if vocabulary is None:
            return partial(self.keys_values, rotary), (embed(self.tables, tokens, places), *self.makers)
        rows = tuple(F.embedding(tokens, table) for table in vocabulary)
        return partial(place_rows, rotary=rotary, config=self.config, dtype=self.projection[0].dtype), rows

    def pieces(self) -> Iterator[Piece]:
        vocabulary = self.vocabulary(self.tables[0], *self.makers) if self.by_id else None
        for tokens, places, mask in self.parts():
            make, sources = self.recipe(tokens, places, vocabulary)
            yield Piece(*make(*sources), mask=mask)

    def merge(self, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
        """Attention to what all ranks have read, from what this one has."""
        if self.group is None:
            return out, lse
        lses = [torch.empty_like(lse) for _ in range(self.ranks)]
        dist.all_gather(lses, lse, group=self.group)
        merged = torch.stack(lses).logsumexp(0)
        total = out.to(lse.dtype) * piece_weight(lse, merged)
        dist.all_reduce(total, group=self.group)
        return total.to(out.dtype), merged

    def add_up(self, *gradients: Tensor) -> None:
        """Sums over the ranks, in place."""
        if self.group is not None:
            for gradient in gradients:
                dist.all_reduce(gradient, group=self.group)


@lru_cache
def _read_config(text: str) -> PerceiverARConfig:
    return PerceiverARConfig.from_dict(json.loads(text))


@torch.library.custom_op("perceiver_ar::stream_attention", mutates_args=())
def _stream(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    own_mask: Tensor | None,
    tokens: Tensor,
    positions: Tensor | None,
    mask: Tensor | None,
    keep: Tensor | None,
    weights: Sequence[Tensor],
    settings: str,
    chunk: int,
    group: str,
) -> tuple[Tensor, Tensor]:
    with torch.autocast(q.device.type, enabled=False):
        reader = _Reader([tokens, positions, mask, keep], weights, settings, chunk, group, q.dtype)

        def pieces() -> Iterator[Piece]:
            if reader.rank == 0:
                yield Piece(k, v, causal=True, mask=own_mask)
            yield from reader.pieces()

        return reader.merge(*attend_pieces(q, pieces()))


@_stream.register_fake
def _(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return fake_attention(q)


@torch.library.custom_op("perceiver_ar::stream_attention_backward", mutates_args=())
def _stream_backward(
    d_out: Tensor,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    own_mask: Tensor | None,
    tokens: Tensor,
    positions: Tensor | None,
    mask: Tensor | None,
    keep: Tensor | None,
    weights: Sequence[Tensor],
    settings: str,
    chunk: int,
    group: str,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    with torch.autocast(q.device.type, enabled=False):
        reader = _Reader([tokens, positions, mask, keep], weights, settings, chunk, group, q.dtype)
        d_weights = [torch.zeros_like(weight, memory_format=torch.contiguous_format) for weight in weights]
        d_tables, d_rest = d_weights[: len(reader.tables)], d_weights[len(reader.tables) :]
        d_q = torch.zeros_like(q, dtype=lse.dtype)  # of many pieces: half precision would lose them
        vocabulary, to_weights = None, None
        if reader.by_id:
            vocabulary, to_weights = torch.func.vjp(reader.vocabulary, reader.tables[0], *reader.makers)  # type: ignore[misc]
        d_vocabulary = [torch.zeros_like(table) for table in vocabulary or ()]
        for part_tokens, places, part_mask in reader.parts():
            # The gradient of any way to make keys and values: nothing of it is written down twice.
            make, sources = reader.recipe(part_tokens, places, vocabulary)
            (part_k, part_v), gradients = torch.func.vjp(make, *sources)  # type: ignore[misc]
            piece = Piece(part_k, part_v, mask=part_mask)
            part_d_q, *d_piece = piece_gradients(d_out, q, piece, out, lse)
            d_q.add_(part_d_q)
            d_sources = gradients(tuple(d_piece))
            if vocabulary is not None:
                for total, d_rows in zip(d_vocabulary, d_sources, strict=True):
                    _add_rows(total, part_tokens, d_rows)
            else:
                d_h, *part_d_rest = d_sources
                _add(d_rest, part_d_rest)
                _add_rows(d_tables[0], part_tokens, d_h)
                for axis, total in enumerate(d_tables[1:]):
                    _add_rows(total, places[..., axis], d_h)
        if to_weights is not None:
            _add([d_tables[0], *d_rest], to_weights(tuple(d_vocabulary)))
        reader.add_up(d_q, *d_weights)
        own_d_q, d_k, d_v = piece_gradients(d_out, q, Piece(k, v, causal=True, mask=own_mask), out, lse)
        d_q = (d_q + own_d_q).to(q.dtype)
        return heads_inside(d_q), heads_inside(d_k), heads_inside(d_v), d_weights


def _add(totals: Sequence[Tensor], parts: Sequence[Tensor]) -> None:
    for total, part in zip(totals, parts, strict=True):
        total.add_(part)


def _add_rows(total: Tensor, rows: Tensor, values: Tensor) -> None:
    """total[rows[b, i]] += values[b, i], for rows (B or 1, K) and values (B, K, E)."""
    if len(rows) < len(values):
        values = values.sum(0, keepdim=True)
    total.index_add_(0, rows.reshape(-1), values.reshape(-1, values.shape[-1]))


@_stream_backward.register_fake
def _(
    d_out: Tensor, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    weights = [torch.empty_like(weight, memory_format=torch.contiguous_format) for weight in rest[5]]
    return fake_heads(q), fake_heads(k), fake_heads(v), weights


def _save_stream(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, weights, ctx.settings, ctx.chunk, ctx.group = inputs
    ctx.save_for_backward(*output, *tensors, *weights)


def _stream_gradients(ctx: Any, d_out: Tensor, d_lse: Any) -> tuple[Any, ...]:
    saved = ctx.saved_tensors
    d_q, d_k, d_v, d_weights = _stream_backward(d_out, *saved[:10], saved[10:], ctx.settings, ctx.chunk, ctx.group)
    return d_q, d_k, d_v, None, None, None, None, None, d_weights, None, None, None


_stream.register_autograd(_stream_gradients, setup_context=_save_stream)

"""Cross-attention to a prefix that is never held: embed, normalise, project a piece, attend, merge, drop it.

Memory for keys and values does not grow with the context. Only the token ids do, in any integer type and on any device.
The backward pass makes every piece again. Output and gradients are those of the dense computation (the reason is in
attention.py). The processes of a group can share the prefix of a sequence: each reads its part, and their results are
merged in the same way.

Shapes: B batch, P prefix, K some of its tokens, N latents, E embedding width, H heads, C channels per head.
"""

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache, partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.distributed_c10d import _resolve_process_group  # type: ignore[reportPrivateImportUsage]

from perceiver_ar.config import PerceiverARConfig
from perceiver_ar.network.attention import (
    Piece,
    attend_pieces,
    fake_attention,
    fake_heads,
    heads_inside,
    piece_gradients,
    piece_weight,
)
from perceiver_ar.network.autocast import without_autocast
from perceiver_ar.network.heads import Rotary, rotary_tables, split_keys_values
from perceiver_ar.network.inputs import (
    Tables,
    TokenSource,
    coordinates,
    flat_positions,
    mix_local_context,
    position_vectors,
    reach,
)

SHARE = 1 / 128
"""The prefix is streamed if its keys and values would take more than this share of the device's memory."""
CPU_BYTES = 32 << 20
"""On a CPU, it is also streamed if they would take more bytes than this: pieces stay in the caches and reuse memory."""
PIECE = {"cpu": 2048, "cuda": 32768}
"""Tokens of a piece, over all rows of a batch: enough to keep the device busy, few enough to stay in its caches. (But
at least 2 * num_latents of each row, because every piece costs a pass over the latents' output so far.)"""


def automatic_chunk(config: PerceiverARConfig, rows: int, length: int, dtype: torch.dtype, device: torch.device) -> int:
    """Tokens per row in a piece, for a prefix of `rows` rows with `length` tokens each; 0: hold the whole prefix."""
    width = config.heads_cross * config.width_head_cross
    size = len(config.cross_layers) * rows * length * 2 * width * dtype.itemsize
    limit = SHARE * device_memory(device.type, device.index or 0)
    if size <= (min(limit, CPU_BYTES) if device.type == "cpu" else limit):
        return 0
    return piece_length(config, rows, device)


def piece_length(config: PerceiverARConfig, rows: int, device: torch.device) -> int:
    """Tokens per row in a piece."""
    return max(2 * config.num_latents, PIECE.get(device.type, PIECE["cpu"]) // rows)


def device_memory(kind: str, index: int) -> int:
    """Total memory of the device in bytes."""
    return _device_memory(kind, index)


device_memory._dynamo_marked_constant = True  # type: ignore[reportFunctionMemberAccess]
"""The effect of `torch.compiler.assume_constant_result`, which would load torch's compiler (one second)."""


@lru_cache
def _device_memory(kind: str, index: int) -> int:
    if kind == "cuda":
        return torch.cuda.get_device_properties(index).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 8 << 30


def stream_attention(
    settings: str,
    q: Tensor,
    latents: Piece,
    prefix: TokenSource,
    norm: Iterable[Tensor],
    projection: Iterable[Tensor],
    chunk: int,
    group: str = "",
) -> Tensor:
    """Attention of the latents' queries (B, H, N, C) to the prefix and to `latents`, their own piece. Gradients flow.

    Args:
        settings: the network's config as JSON.
        norm: weights of the context norm, with its bias if it has one.
        projection: weight of the fused key and value projection, with its bias if it has one.
        chunk: tokens per row in a piece.
        group: name of the process group whose ranks share the prefix; "": this process reads it all.
    """
    weights = [*prefix.tables.flat(), *norm, *projection]
    ids = prefix.tokens, prefix.positions, prefix.mask, prefix.keep
    return _stream(q, latents.k, latents.v, latents.mask, *ids, weights, settings, chunk, group)[0]


class _Reader:
    """Makes the pieces of a prefix, with the projection's weights in the dtype of the queries."""

    def __init__(
        self, prefix: list[Any], weights: Sequence[Tensor], settings: str, chunk: int, group: str, dtype: torch.dtype
    ):
        self.config = _read_config(settings)
        self.tables, rest = Tables.of(self.config, weights)
        norms = 2 if self.config.norm == "layernorm" else 1
        self.norm, self.projection = rest[:norms], [weight.to(dtype) for weight in rest[norms:]]
        self.prefix, self.chunk = TokenSource(self.tables, *prefix, reach=reach(self.config)), chunk
        self.group = _resolve_process_group(group) if group else None  # type: ignore[arg-type]
        self.rank, self.ranks = (self.group.rank(), self.group.size()) if self.group else (0, 1)
        self.first, self.end = (self.prefix.length * rank // self.ranks for rank in (self.rank, self.rank + 1))

    def parts(self) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
        """Ids, coordinates and mask of each part of this rank's share."""
        for start in range(self.first, self.end, self.chunk):
            ids, positions, mask = self.prefix.part(start, min(start + self.chunk, self.end))
            yield ids, coordinates(self.config, positions), mask

    def sources(self, ids: Tensor, coords: Tensor) -> dict[str, Any]:
        """The tensors from which `keys_values` makes a part's keys and values."""
        tables = [partial(F.embedding, weight=table) for table in self.tables.positions]
        optional = {"taps": self.tables.taps, "at": position_vectors(tables, coords)}
        rows = F.embedding(ids.clamp(min=0), self.tables.tokens)
        given = {name: x for name, x in optional.items() if x is not None}
        return {"rows": rows, **given, "norm": self.norm, "projection": self.projection}

    def keys_values(self, ids: Tensor, rotary: Rotary | None, sources: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Rotated keys, and values, each (B, H, K, C)."""
        norm, projection = sources["norm"], sources["projection"]
        h = mix_local_context(ids, sources["rows"], sources.get("taps"), sources.get("at"))
        width = h.shape[-1:]
        x = F.layer_norm(h, width, norm[0], norm[1]) if len(norm) == 2 else F.rms_norm(h, width, norm[0], eps=1e-5)
        K = ids.shape[1] - (self.prefix.reach if ids.ndim == 2 else 0)
        return split_keys_values(F.linear(x.to(projection[0].dtype), *projection), K, rotary, self.config)

    def rotary(self, coords: Tensor) -> Rotary | None:
        positions = flat_positions(self.config, coords)
        return rotary_tables(self.config, positions, cross=True, dtype=self.tables.tokens.dtype)

    def pieces(self) -> Iterator[Piece]:
        for ids, coords, mask in self.parts():
            yield Piece(*self.keys_values(ids, self.rotary(coords), self.sources(ids, coords)), mask=mask)

    def merge(self, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
        """Merges this rank's output and lse with those of the other ranks."""
        if self.group is None:
            return out, lse
        lses = [torch.empty_like(lse) for _ in range(self.ranks)]
        dist.all_gather(lses, lse, group=self.group)
        merged = torch.stack(lses).logsumexp(0)
        total = out.to(lse.dtype) * piece_weight(lse, merged)
        dist.all_reduce(total, group=self.group)
        return total.to(out.dtype), merged

    def add_up(self, *gradients: Tensor) -> None:
        """Sums each gradient over the ranks, in place."""
        if self.group is not None:
            for gradient in gradients:
                dist.all_reduce(gradient, group=self.group)


_read_config = lru_cache(lambda text: PerceiverARConfig.from_dict(json.loads(text)))


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
    with without_autocast(q):
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
    with without_autocast(q):
        reader = _Reader([tokens, positions, mask, keep], weights, settings, chunk, group, q.dtype)
        # Sums over many pieces: in half precision they would lose small terms.
        d_weights = [x.new_zeros(x.shape, dtype=torch.promote_types(x.dtype, lse.dtype)) for x in weights]
        d_tables, d_rest = Tables.of(reader.config, d_weights)
        d_q = torch.zeros_like(q, dtype=lse.dtype)
        for ids, coords, part_mask in reader.parts():
            # Differentiates `keys_values` itself, so no formula is written down twice.
            make = partial(reader.keys_values, ids, reader.rotary(coords))
            (part_k, part_v), gradients = torch.func.vjp(make, reader.sources(ids, coords))  # type: ignore[misc]
            part_d_q, *d_piece = piece_gradients(d_out, q, Piece(part_k, part_v, mask=part_mask), out, lse)
            d_q.add_(part_d_q)
            (d_sources,) = gradients(tuple(d_piece))
            _add_rows(d_tables.tokens, ids.clamp(min=0), d_sources["rows"])
            if d_tables.taps is not None:
                d_tables.taps.add_(d_sources["taps"])
            for axis, total in enumerate(d_tables.positions):
                _add_rows(total, coords[..., axis], d_sources["at"])
            for total, part in zip(d_rest, [*d_sources["norm"], *d_sources["projection"]], strict=True):
                total.add_(part)
        reader.add_up(d_q, *d_weights)
        own_d_q, d_k, d_v = piece_gradients(d_out, q, Piece(k, v, causal=True, mask=own_mask), out, lse)
        d_q = (d_q + own_d_q).to(q.dtype)
        d_weights = [total.to(weight.dtype) for total, weight in zip(d_weights, weights, strict=True)]
        return heads_inside(d_q), heads_inside(d_k), heads_inside(d_v), d_weights


def _add_rows(total: Tensor, rows: Tensor, values: Tensor) -> None:
    """total[rows[b, i]] += values[b, i], for rows (B or 1, ...) and values (B, ..., E)."""
    if len(rows) < len(values):
        values = values.sum(0, keepdim=True)
    total.index_add_(0, rows.reshape(-1), values.reshape(-1, values.shape[-1]).to(total.dtype))


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

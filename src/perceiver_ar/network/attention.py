"""Softmax attention over a set of keys, computed in pieces and merged exactly.

Shapes: B batch, H heads, N queries, K keys, C channels per head.

For a query, piece c of the keys gives an output O_c and lse_c, the log of the sum of its exponentiated scores. Then

    lse = log sum_c exp(lse_c),    O = sum_c exp(lse_c - lse) O_c

is attention over all keys, and the gradient of piece c needs only q, k_c, v_c, the merged O and lse, and dO, because
the probabilities are exp(score - lse) with the merged lse. Fused kernels take exactly these (FlashAttention, arXiv
2205.14135; ring attention, arXiv 2310.01889, uses the same two facts). So a cross-attention of latents to prefix and
latents is one plain piece and one square causal piece, without a rectangular mask (only dropout, exports, and devices
other than CPU and CUDA need one); and a piece can be made, read and dropped before the next is made (streaming.py).
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from perceiver_ar.network.kernels import DEVICES, choose_kernels

GPU_BLOCKS = 256
"""Blocks of a grid that keep a large GPU busy: two for each multiprocessor."""


class Piece(NamedTuple):
    """Some of the keys of an attention."""

    k: Tensor
    """(B, H, K, C)"""
    v: Tensor
    """(B, H, K, C)"""
    causal: bool = False
    """The piece is square (K = N) and query i sees its keys 0 ... i."""
    mask: Tensor | None = None
    """(B, K) bool, True where the key may be seen; None: all."""


def attend(q: Tensor, pieces: Sequence[Piece], *, dropout: float = 0.0) -> Tensor:
    """Attention of `q` (B, H, N, C) to all keys of `pieces`, scores scaled by C^-1/2.

    A query that sees no key at all gets zeros. `dropout` acts on probabilities. Returns (B, H, N, C).
    """
    pieces = [piece for piece in pieces if piece.k.shape[2] > 0]
    assert pieces and all(not piece.causal or piece.k.shape[2] == q.shape[2] for piece in pieces)
    if _ordinary:
        return _attend_masked(q, pieces, dropout)
    # On CUDA, PyTorch's own choice may be cuDNN, which plans anew for each number of keys (pytorch #196678).
    if dropout > 0.0 or q.device.type not in DEVICES:
        return _attend_whole(q, pieces, dropout)
    if not torch.is_grad_enabled():
        if not torch.compiler.is_compiling():  # same result, without the dispatcher's overhead
            return attend_pieces(q, pieces)[0]
        if len(pieces) == 1 and q.device.type == "cpu":  # a decoding step
            return _attend_whole(q, pieces, 0.0)
    k, v, causal, masks = (list(column) for column in zip(*pieces, strict=True))
    return _attention(q, k, v, causal, masks)[0]


def side_by_side(piece: Piece, K: int) -> list[Piece]:
    """A piece whose batch has K latents per position as K neighbouring rows -> K pieces, which each latent sees."""
    k, v = piece.k.unflatten(0, (-1, K)), piece.v.unflatten(0, (-1, K))
    return [
        Piece(k[:, i].repeat_interleave(K, 0), v[:, i].repeat_interleave(K, 0), piece.causal, piece.mask)
        for i in range(K)
    ]


_ordinary = False


@contextmanager
def ordinary_attention() -> Iterator[None]:
    """Inside this context, `attend` is one call of PyTorch's attention under a mask.

    Exporters to other runtimes can translate that, but not this package's own operators. Slower, and holds the mask.
    """
    global _ordinary
    before, _ordinary = _ordinary, True
    try:
        yield
    finally:
        _ordinary = before


# Piece by piece, forward and backward: `attend` and streaming.py both go through these. Autograd does not see them.


def attend_pieces(q: Tensor, pieces: Iterable[Piece]) -> tuple[Tensor, Tensor]:
    """Attention to all keys of `pieces` (B, H, N, C), and its lse (B, H, N), -inf where a query sees nothing."""
    q = _neighbours(q)
    total: Tensor | None = None
    lse = q.new_empty(0)
    for piece in pieces:
        out, piece_lse = piece_forward(q, piece)
        if total is None:
            total, lse = out, piece_lse
        else:
            merged = torch.logaddexp(lse, piece_lse)
            total = total.to(lse.dtype) * piece_weight(lse, merged)
            total.addcmul_(out, piece_weight(piece_lse, merged))
            lse = merged
    if total is None:
        total, lse = torch.zeros_like(q), fake_attention(q)[1].fill_(float("-inf"))
    return heads_inside(total.to(q.dtype)), lse.contiguous()


def piece_gradients(d_out: Tensor, q: Tensor, piece: Piece, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q (the share of `piece`), k and v; `out` and `lse` are the merged ones."""
    if piece.mask is not None:
        # A query that sees nothing has lse -inf. With a finite one its probabilities are exp(-inf - lse) = 0.
        lse = lse.masked_fill(lse == float("-inf"), 0.0)
    d_out, q, k, v = map(_neighbours, (d_out, q, piece.k, piece.v))
    return choose_kernels(q, piece.mask is not None).backward(d_out, q, k, v, out, lse, piece.causal, _bias(piece, q))


def piece_forward(q: Tensor, piece: Piece) -> tuple[Tensor, Tensor]:
    """Output and lse of one piece: 0 and -inf for a query that sees nothing in it."""
    if piece.mask is not None and q.shape[2] == 1 and q.device.type != "cpu":
        parts = parts_of_keys(q.shape[0] * q.shape[1], piece.k.shape[2])
        if parts > 1:
            return attend_side_by_side(q, piece.k, piece.v, piece.mask, parts)
    k, v, bias = _neighbours(piece.k), _neighbours(piece.v), _bias(piece, q)
    out, lse = choose_kernels(q, piece.mask is not None).forward(q, k, v, piece.causal, bias)
    if piece.mask is not None:  # for a query that sees nothing here, kernels return anything
        seen = piece.mask.cummax(-1).values if piece.causal else piece.mask.any(-1, keepdim=True)
        nothing = ~seen[:, None]
        lse = lse.masked_fill(nothing, float("-inf"))
        out = out.masked_fill(nothing[..., None], 0.0)
    return out, lse


def parts_of_keys(blocks: int, K: int) -> int:
    """How many equal parts of K keys, of 128 or more, keep a GPU busy if each is a block of its grid: a power of 2."""
    parts = 1
    while 2 * parts * blocks <= GPU_BLOCKS and K % (2 * parts * 128) == 0:
        parts *= 2
    return parts


def attend_side_by_side(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, parts: int) -> tuple[Tensor, Tensor]:
    """`piece_forward` for one query of each row, as so many heads of attention to parts of the keys.

    CUDA's kernel for masks reads all keys of a head in one block: few rows and heads would leave most of a GPU idle.
    """
    B, H, _, C = q.shape
    k, v = (x.unflatten(2, (parts, -1)).flatten(0, 1) for x in (k, v))  # (B H, parts, K / parts, C)
    seen = mask.unflatten(1, (parts, -1))[:, None].expand(-1, H, -1, -1).flatten(0, 1)
    bias = q.new_zeros(seen.shape).masked_fill_(~seen, float("-inf"))[:, :, None]
    q = q.reshape(B * H, 1, 1, C).expand(-1, parts, -1, -1)
    out, lse = choose_kernels(q, True).forward(q, k, v, False, bias)
    seen = seen.any(-1, keepdim=True)
    lse = lse.masked_fill(~seen, float("-inf"))
    merged = lse.logsumexp(1)
    out = (out.masked_fill(~seen[..., None], 0.0) * piece_weight(lse, merged[:, None])).sum(1)
    return out.view(B, H, 1, C).to(v.dtype), merged.view(B, H, 1)


def piece_weight(piece_lse: Tensor, lse: Tensor) -> Tensor:
    """exp(piece_lse - lse) (B, H, N, 1), and 0 where the piece, or every piece, saw nothing."""
    return torch.exp(piece_lse - lse.masked_fill(lse == float("-inf"), 0.0)).unsqueeze(-1)


def _bias(piece: Piece, q: Tensor) -> Tensor | None:
    """The mask as an additive bias (B, H, N, K): 0 where seen, else -inf. Stride 0 over H and N keeps it small."""
    if piece.mask is None:
        return None
    B, K = piece.mask.shape
    room = q.new_zeros(B, math.ceil(K / 16) * 16)  # kernels on CUDA want aligned rows
    bias = room[:, :K].masked_fill_(~piece.mask, float("-inf"))
    return bias[:, None, None, :].expand(B, q.shape[1], q.shape[2], K)


def _neighbours(x: Tensor) -> Tensor:
    """`x` with its channels contiguous in memory: the kernels ignore the stride of the last dimension."""
    return x if x.stride(-1) == 1 else x.contiguous()


def heads_inside(x: Tensor) -> Tensor:
    """(B, H, K, C), laid out as (B, K, H, C): merging heads then costs nothing."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


# `attend_pieces` as one operator, opaque to torch.compile, with its gradient.


@torch.library.custom_op("perceiver_ar::attention", mutates_args=())
def _attention(
    q: Tensor, k: Sequence[Tensor], v: Sequence[Tensor], causal: Sequence[bool], masks: Sequence[Tensor | None]
) -> tuple[Tensor, Tensor]:
    return attend_pieces(q, map(Piece, k, v, causal, masks))


@_attention.register_fake
def _(q: Tensor, k: Any, v: Any, causal: Any, masks: Any) -> tuple[Tensor, Tensor]:
    return fake_attention(q)


def fake_attention(q: Tensor) -> tuple[Tensor, Tensor]:
    """Empty tensors with the shapes and layouts of the results of `attend_pieces`."""
    B, H, N, _ = q.shape
    lse = torch.float64 if q.dtype == torch.float64 else torch.float32
    return fake_heads(q), q.new_empty(B, H, N, dtype=lse)


def fake_heads(x: Tensor) -> Tensor:
    B, H, K, C = x.shape
    return x.new_empty(B, K, H, C).transpose(1, 2)


@torch.library.custom_op("perceiver_ar::attention_backward", mutates_args=())
def _attention_backward(
    d_out: Tensor,
    q: Tensor,
    k: Sequence[Tensor],
    v: Sequence[Tensor],
    causal: Sequence[bool],
    masks: Sequence[Tensor | None],
    out: Tensor,
    lse: Tensor,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    d_q: Tensor | None = None
    d_k, d_v = [], []
    for piece in map(Piece, k, v, causal, masks):
        piece_d_q, piece_d_k, piece_d_v = piece_gradients(d_out, q, piece, out, lse)
        d_q = piece_d_q if d_q is None else d_q.add_(piece_d_q)
        d_k.append(heads_inside(piece_d_k))
        d_v.append(heads_inside(piece_d_v))
    assert d_q is not None
    return heads_inside(d_q), d_k, d_v


@_attention_backward.register_fake
def _(d_out: Tensor, q: Tensor, k: Any, v: Any, *_: Any) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    return fake_heads(q), [fake_heads(x) for x in k], [fake_heads(x) for x in v]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, ctx.causal, masks = inputs
    ctx.save_for_backward(q, *k, *v, *masks, *output)


def _gradients(ctx: Any, d_out: Tensor, d_lse: Any) -> tuple[Any, ...]:
    pieces = len(ctx.causal)
    q, *saved, out, lse = ctx.saved_tensors
    k, v, masks = (saved[i * pieces : (i + 1) * pieces] for i in range(3))
    d_q, d_k, d_v = _attention_backward(d_out, q, k, v, ctx.causal, masks, out, lse)
    # torch does not take a list with a None in it for a list of tensors: its gradient is a single None.
    d_masks = None if any(mask is None for mask in masks) else [None] * pieces
    return d_q, d_k, d_v, None, d_masks


_attention.register_autograd(_gradients, setup_context=_save)


def _attend_whole(q: Tensor, pieces: Sequence[Piece], dropout: float) -> Tensor:
    """All keys in one call of PyTorch's attention: for dropout, on other devices than `DEVICES`, in compiled steps."""
    plain = dropout == 0.0 and all(piece.mask is None for piece in pieces)
    if plain and (len(pieces) == 1 or not any(piece.causal for piece in pieces)):
        return F.scaled_dot_product_attention(q, *_joined(pieces), is_causal=pieces[0].causal)
    return _attend_masked(q, pieces, dropout)


def _joined(pieces: Sequence[Piece]) -> tuple[Tensor, Tensor]:
    """All keys and all values; those of a single piece, such as a whole cache, are not copied."""
    if len(pieces) == 1:
        return pieces[0].k, pieces[0].v
    return torch.cat([piece.k for piece in pieces], dim=2), torch.cat([piece.v for piece in pieces], dim=2)


def _attend_masked(q: Tensor, pieces: Sequence[Piece], dropout: float) -> Tensor:
    """`_attend_whole` under an explicit mask."""
    queries = q.shape[2]
    columns = []
    for piece in pieces:
        seen = torch.ones(queries, piece.k.shape[2], dtype=torch.bool, device=q.device)
        seen = seen.tril() if piece.causal else seen
        seen = seen.expand(q.shape[0], 1, -1, -1)
        columns.append(seen if piece.mask is None else seen & piece.mask[:, None, None, :])
    seen = torch.cat(columns, dim=-1)
    nothing = ~seen.any(-1, keepdim=True)  # softmax over nothing is NaN: let such a query see all, then drop the result
    out = F.scaled_dot_product_attention(q, *_joined(pieces), attn_mask=seen | nothing, dropout_p=dropout)
    return out.masked_fill(nothing, 0.0)

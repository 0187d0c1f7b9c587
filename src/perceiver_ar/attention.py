"""Softmax attention over a set of keys, computed in pieces and merged exactly.

Shapes: B batch, H heads, N queries, K keys, C channels per head.

For a query, piece c of the keys gives an output O_c and lse_c, the log of the sum of its exponentiated scores. Then

    lse = log sum_c exp(lse_c),    O = sum_c exp(lse_c - lse) O_c

is attention over all keys, and the gradient of piece c needs only q, k_c, v_c, the merged O and lse, and dO, because
the probabilities are exp(score - lse) with the merged lse. Fused kernels take exactly these (FlashAttention, arXiv
2205.14135; ring attention, arXiv 2310.01889, uses the same two facts). So a cross-attention of latents to prefix and
latents is one plain piece and one square causal piece, and no rectangular mask is ever built.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


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
    if dropout > 0.0 or q.device.type != "cpu":
        return _attend_whole(q, pieces, dropout)
    biases = [None if piece.mask is None else _bias(piece.mask, q) for piece in pieces]
    causal = [piece.causal for piece in pieces]
    tensors = [tensor for piece in pieces for tensor in (piece.k, piece.v)]
    # The kernel reads channels as neighbours in memory whatever the stride says.
    q, *tensors = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, *tensors))
    return _MergedAttention.apply(q, causal, biases, *tensors)  # type: ignore[no-any-return]


def _bias(mask: Tensor, q: Tensor) -> Tensor:
    """(B, K) bool -> (B, 1, 1, K), 0 where seen and -inf where not, in the type of the scores."""
    return torch.zeros(mask.shape, dtype=q.dtype, device=q.device).masked_fill_(~mask, float("-inf"))[:, None, None]


def _expand(bias: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
    # The kernel wants the full shape; stride 0 gives it without memory.
    return None if bias is None else bias.expand(q.shape[0], q.shape[1], q.shape[2], k.shape[2])


class _MergedAttention(torch.autograd.Function):
    """Forward: one fused kernel per piece, merged. Backward: one fused kernel per piece, from the merged output."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, causal: list[bool], biases: list[Tensor | None], *tensors: Tensor) -> Tensor:
        pairs = list(zip(tensors[::2], tensors[1::2], strict=True))
        outs, lses = [], []
        for (k, v), square, bias in zip(pairs, causal, biases, strict=True):
            out, lse = _flash(q, k, v, 0.0, square, attn_mask=_expand(bias, q, k))
            if bias is not None:  # for a query that sees nothing here, the kernel returns lse 0
                seen = bias == 0
                seen = seen.cummax(-1).values.transpose(-1, -2) if square else seen.any(-1, keepdim=True)
                lse = lse.masked_fill(~seen.squeeze(-1), float("-inf"))
            outs.append(out)
            lses.append(lse)
        out, lse = outs[0], lses[0]
        if len(pairs) > 1:
            lse = torch.logsumexp(torch.stack(lses), dim=0)
            total = torch.zeros_like(out, dtype=lse.dtype)
            for piece_out, piece_lse in zip(outs, lses, strict=True):
                total.addcmul_(piece_out, _weight(piece_lse, lse).unsqueeze(-1))
            out = total.to(q.dtype)
        # Where nothing is seen every probability is exp(-inf - lse) = 0 for a finite lse.
        ctx.save_for_backward(q, out, lse.masked_fill(lse == float("-inf"), 0.0), *tensors)
        ctx.causal, ctx.biases = causal, biases
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        (d_out,) = grads
        q, out, lse, *tensors = ctx.saved_tensors
        d_q: Tensor | None = None
        d_tensors: list[Tensor] = []
        for k, v, square, bias in zip(tensors[::2], tensors[1::2], ctx.causal, ctx.biases, strict=True):
            piece_d_q, d_k, d_v = _flash_backward(d_out, q, k, v, out, lse, 0.0, square, attn_mask=_expand(bias, q, k))
            d_q = piece_d_q if d_q is None else d_q + piece_d_q
            d_tensors += [d_k, d_v]
        return d_q, None, None, *d_tensors


def _weight(piece_lse: Tensor, lse: Tensor) -> Tensor:
    """exp(piece_lse - lse), and 0 where the piece, or every piece, saw nothing."""
    return torch.exp(piece_lse - lse.masked_fill(lse == float("-inf"), 0.0))


def _attend_whole(q: Tensor, pieces: Sequence[Piece], dropout: float) -> Tensor:
    """All keys in one call of PyTorch's attention: other devices, and dropout on probabilities.

    Without masks and dropout the lower-right causal bias keeps it a fused kernel that builds no mask.
    """
    k = torch.cat([piece.k for piece in pieces], dim=2)
    v = torch.cat([piece.v for piece in pieces], dim=2)
    queries, keys = q.shape[2], k.shape[2]
    causal_last = pieces[-1].causal and not any(piece.causal for piece in pieces[:-1])
    if dropout == 0.0 and all(piece.mask is None for piece in pieces):
        if len(pieces) == 1 and pieces[0].causal:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)
        if causal_last:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=causal_lower_right(queries, keys))
        if not any(piece.causal for piece in pieces):
            return F.scaled_dot_product_attention(q, k, v)
    columns = []
    for piece in pieces:
        seen = torch.ones(queries, piece.k.shape[2], dtype=torch.bool, device=q.device)
        seen = seen.tril() if piece.causal else seen
        seen = seen.expand(q.shape[0], 1, -1, -1)
        columns.append(seen if piece.mask is None else seen & piece.mask[:, None, None, :])
    seen = torch.cat(columns, dim=-1)
    nothing = ~seen.any(-1, keepdim=True)  # softmax over nothing is NaN: let such a query see all, then drop the result
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen | nothing, dropout_p=dropout)
    return out.masked_fill(nothing, 0.0)

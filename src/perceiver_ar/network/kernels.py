"""Kernels for one piece of an attention, forward and backward: PyTorch's fused ones that return the lse, and `Plain`.

The fused ones are private functions of torch, so test a new torch version before allowing it. Only `piece_forward`,
`piece_gradients` and `attend_side_by_side` (attention.py) call kernels. tests/test_kernels.py holds `CpuFlash` and
`Plain` to the contract of `Kernels`, and on a machine with a GPU the kernels that `choose_kernels` returns there.

Shapes: B batch, H heads, N queries, K keys, C channels per head.
"""

from functools import lru_cache
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

aten = torch.ops.aten


class Kernels(Protocol):
    """Attention of q (B, H, N, C) to k and v (B, H, K, C), one piece of all keys; scores are scaled by C^-1/2.

    `forward` returns out (B, H, N, C) in q's dtype, and lse (B, H, N), the log of the sum of a query's exponentiated
    scores in this piece, in float32 (float64 for float64). `backward` gets out and lse of all pieces merged: the
    probabilities are exp(score - lse) and do not sum to 1 within the piece. It returns new tensors.

    N and K may differ, unless `causal`: then query i sees keys 0 ... i. `bias` (B, H, N, K) is an additive mask, 0
    where seen and -inf where not. Its stride over N is 0, unless N = 1; its strides over B and H are any multiples of
    16, also 0. Channels, and the keys of a bias, are contiguous in memory; other strides are any.
    For a query that sees nothing in the piece, `forward` may return anything; `backward` gets a finite lse and
    returns zeros.

    All tensors but lse have one dtype. A class may take only some dtypes and widths C; then `choose_kernels` must not
    return it for others. On the CPU it returns one class for all, so tests/test_kernels.py calls its `KERNELS` with
    float64 and float32 for C = 1 ... 9, and with these, bfloat16 and float16 for C = 64.
    """

    @staticmethod
    def forward(q: Tensor, k: Tensor, v: Tensor, causal: bool, bias: Tensor | None) -> tuple[Tensor, Tensor]: ...

    @staticmethod
    def backward(
        d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, bias: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]: ...


DEVICES = "cpu", "cuda", "meta"
"""Those with fused kernels that return the lse. "meta", where tensors have shapes but no numbers, counts as CUDA."""


def choose_kernels(q: Tensor, masked: bool) -> type[Kernels]:
    """The fastest kernels for queries of this device, dtype and width, with or without a mask of keys.

    An operator of your own for CUDA (`torch.library.custom_op`) also needs `register_fake`: tests/test_cuda.py calls it
    with tensors on device "meta", benchmarks/replay.py with fake ones. test_cuda.py expects PyTorch's operators by name
    (`CHECKS`, and "flash" and "efficient" in its tests), so it fails until you add the name of yours there.
    """
    if q.device.type == "cpu":
        return CpuFlash
    if q.device.type not in DEVICES or q.dtype == torch.float64 or q.shape[-1] % 8 != 0:
        return Plain
    capability = compute_capability(q.device)
    if not masked and q.dtype != torch.float32 and flash_takes(q.shape[-1], capability):
        return CudaFlash
    return CudaEfficient if q.dtype != torch.bfloat16 or capability >= (8, 0) else Plain


def flash_takes(channels: int, capability: tuple[int, int]) -> bool:
    """Whether FlashAttention-2 has a forward and a backward for heads of this width on such a GPU."""
    server = capability in ((8, 0), (9, 0), (10, 0), (10, 3))  # others have too little shared memory for some widths
    return capability >= (8, 0) and channels <= 256 and (server or not 192 < channels <= 224)


@lru_cache
def compute_capability(device: torch.device) -> tuple[int, int]:
    """Of a CUDA device; that of an A100 for "meta", and on a machine without CUDA, as for fake tensors."""
    cuda = device.type == "cuda" and torch.cuda.is_available()
    return torch.cuda.get_device_capability(device) if cuda else (8, 0)


class CpuFlash:
    """float64, float32, bfloat16 and float16 on the CPU."""

    @staticmethod
    def forward(q: Tensor, k: Tensor, v: Tensor, causal: bool, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        return aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, attn_mask=bias)

    @staticmethod
    def backward(
        d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, bias: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        backward = aten._scaled_dot_product_flash_attention_for_cpu_backward
        return backward(d_out, q, k, v, out, lse, 0.0, causal, attn_mask=bias)


class CudaFlash:
    """FlashAttention-2 on CUDA, from compute capability 8.0 on: half precision, no mask."""

    @staticmethod
    def forward(q: Tensor, k: Tensor, v: Tensor, causal: bool, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        out, lse, *_ = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal)
        return out, lse

    @staticmethod
    def backward(
        d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, bias: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        unused = torch.empty(2, dtype=torch.int64, device=q.device)  # the state of dropout's random numbers
        return aten._scaled_dot_product_flash_attention_backward(
            d_out, q, k, v, out, lse, None, None, q.shape[2], k.shape[2], 0.0, causal, unused, unused
        )


class CudaEfficient:
    """Memory-efficient attention on CUDA: float32, and masks. It pads the lse to a multiple of 32 queries."""

    @staticmethod
    def forward(q: Tensor, k: Tensor, v: Tensor, causal: bool, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        out, lse, *_ = aten._scaled_dot_product_efficient_attention(q, k, v, bias, True, 0.0, causal)
        return out, lse[..., : q.shape[2]]

    @staticmethod
    def backward(
        d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, bias: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        unused = torch.empty((), dtype=torch.int64, device=q.device)
        lse = F.pad(lse, (0, -lse.shape[-1] % 32))
        d_q, d_k, d_v, _ = aten._scaled_dot_product_efficient_attention_backward(
            d_out, q, k, v, bias, out, lse, unused, unused, 0.0, [True, True, True, False], causal
        )
        return d_q, d_k, d_v


class Plain:
    """Any device and dtype, in ordinary operations; holds the scores of the piece."""

    @staticmethod
    def forward(q: Tensor, k: Tensor, v: Tensor, causal: bool, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        scores = Plain.scores(q, k, causal, bias)
        lse = scores.logsumexp(-1)
        return (scores - lse.unsqueeze(-1)).exp().to(v.dtype) @ v, lse

    @staticmethod
    def backward(
        d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, bias: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        p = (Plain.scores(q, k, causal, bias) - lse.unsqueeze(-1)).exp()
        delta = (d_out.to(p.dtype) * out).sum(-1, keepdim=True)
        d_scores = (p * ((d_out @ v.mT) - delta) * q.shape[-1] ** -0.5).to(q.dtype)
        return d_scores @ k, d_scores.mT @ q, p.to(d_out.dtype).mT @ d_out

    @staticmethod
    def scores(q: Tensor, k: Tensor, causal: bool, bias: Tensor | None) -> Tensor:
        scores = (q @ k.mT).to(torch.float64 if q.dtype == torch.float64 else torch.float32) * q.shape[-1] ** -0.5
        if bias is not None:
            scores = scores + bias
        if causal:
            hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
            scores = scores.masked_fill(hidden, float("-inf"))
        return scores

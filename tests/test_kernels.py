"""A kernel computes its piece of an attention, and its gradients from the merged one, also over several tiles."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import assert_close
from torch import Tensor

from perceiver_ar.network.kernels import CpuFlash, Kernels, Plain, choose_kernels, flash_takes

KERNELS: list[type[Kernels]] = [CpuFlash, Plain]
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}
ON_A_GPU = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 5e-3}


def check(
    kernel: type[Kernels], dtype: torch.dtype, N: int, K: int, C: int, causal: bool, masks: int, device: str = "cpu"
) -> None:
    """The piece is read beside another one, of which only its lse is known. 1 mask is that of both heads."""
    tolerance = (TOLERANCE if device == "cpu" else ON_A_GPU)[dtype]
    generator = torch.Generator().manual_seed(N + K + C)

    def tensor(length: int) -> Tensor:  # as the network has them: heads transposed out
        x = torch.randn(2, length, 2, C, generator=generator, dtype=torch.float64)
        return x.to(device, dtype).transpose(1, 2)

    q, k, v, d_out, out = tensor(N), tensor(K), tensor(K), tensor(N), tensor(N)
    seen = torch.ones(N, K, dtype=torch.bool, device=device)
    seen, bias = (seen.tril() if causal else seen).expand(2, 1, N, K), None
    if masks:
        mask = (torch.rand(2, masks, 1, K, generator=generator) < 0.7).to(device)
        mask[..., 0] = True
        seen = seen & mask
        room = q.new_zeros(2, masks, 1, math.ceil(K / 16) * 16)  # as the network has it: aligned rows
        bias = room[..., :K].masked_fill_(~mask, float("-inf")).expand(2, 2, N, K)

    exact_q, exact_k = (x.double().requires_grad_() for x in (q, k))
    scores = (exact_q @ exact_k.mT * C**-0.5).masked_fill(~seen, float("-inf"))
    lse = scores.detach().logsumexp(-1)
    found, found_lse = kernel.forward(q, k, v, causal, bias)
    assert found.dtype == dtype and found_lse.dtype == torch.promote_types(dtype, torch.float32)
    assert_close(found, scores.detach().softmax(-1) @ v.double(), tolerance)
    assert_close(found_lse, lse, tolerance)

    merged = torch.logaddexp(lse, lse.flip(2))
    probabilities = (scores.detach() - merged[..., None]).exp()
    delta = (d_out.double() * out.double()).sum(-1, keepdim=True)
    d_scores = probabilities * (d_out.double() @ v.double().mT - delta)
    scores.masked_fill(~seen, 0).backward(d_scores)
    d_v = probabilities.mT @ d_out.double()
    gradients = kernel.backward(d_out, q, k, v, out, merged.to(found_lse.dtype), causal, bias)
    for gradient, expected in zip(gradients, (exact_q.grad, exact_k.grad, d_v), strict=True):
        assert gradient.dtype == dtype and expected is not None
        assert_close(gradient, expected, tolerance * max(1.0, float(expected.abs().max())))


@pytest.mark.parametrize("kernel", KERNELS)
@settings(max_examples=40)
@given(
    dtype=st.sampled_from([torch.float64, torch.float32]),
    sizes=st.tuples(st.integers(1, 6), st.integers(1, 9), st.integers(1, 9)),
    causal=st.booleans(),
    masks=st.integers(0, 2),
)
def test_small_pieces(
    kernel: type[Kernels], dtype: torch.dtype, sizes: tuple[int, int, int], causal: bool, masks: int
) -> None:
    N, K, C = sizes
    check(kernel, dtype, N, N if causal else K, C, causal, masks)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(("N", "K", "masks"), [(40, 511, 0), (300, 512, 1), (33, 513, 0), (70, 1100, 2), (600, 600, 1)])
def test_pieces_of_several_tiles(kernel: type[Kernels], dtype: torch.dtype, N: int, K: int, masks: int) -> None:
    check(kernel, dtype, N, K, 64, causal=N == K, masks=masks)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", ON_A_GPU, ids=str)
@pytest.mark.parametrize("masks", [0, 1, 2])
@pytest.mark.parametrize(("N", "K", "C"), [(1, 700, 64), (40, 511, 24), (300, 1100, 128), (600, 600, 64)])
def test_pieces_on_a_gpu(dtype: torch.dtype, masks: int, N: int, K: int, C: int) -> None:
    kernel = choose_kernels(torch.empty(2, 2, N, C, dtype=dtype, device="cuda"), masks > 0)
    check(kernel, dtype, N, K, C, N == K, masks, "cuda")


@pytest.mark.parametrize(
    ("capability", "widths"),
    [
        ((7, 5), set()),
        ((8, 0), {64, 192, 200, 224, 232, 256}),
        ((8, 6), {64, 192, 232, 256}),
        ((8, 9), {64, 192, 232, 256}),
        ((9, 0), {64, 192, 200, 224, 232, 256}),
        ((12, 0), {64, 192, 232, 256}),
    ],
)
def test_flash_attention_gets_the_widths_that_it_has_a_backward_for(
    capability: tuple[int, int], widths: set[int]
) -> None:
    """PyTorch's own choice (sdp_utils.cpp) leaves out the same widths, if gradients are needed."""
    assert {C for C in (64, 192, 200, 224, 232, 256, 264) if flash_takes(C, capability)} == widths

"""A kernel computes its piece of an attention, and its gradients from the merged one, also over several tiles."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import assert_close
from torch import Tensor

from perceiver_ar.network.kernels import CpuFlash, Kernels, Plain, flash_takes

KERNELS: list[type[Kernels]] = [CpuFlash, Plain]
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}


def check(kernel: type[Kernels], dtype: torch.dtype, N: int, K: int, C: int, causal: bool, masked: bool) -> None:
    """The piece is read beside another one, of which only its lse is known."""
    generator = torch.Generator().manual_seed(N + K + C)

    def tensor(length: int) -> Tensor:  # as the network has them: heads transposed out
        return torch.randn(2, length, 2, C, generator=generator, dtype=torch.float64).transpose(1, 2).to(dtype)

    q, k, v, d_out, out = tensor(N), tensor(K), tensor(K), tensor(N), tensor(N)
    seen = torch.ones(N, K, dtype=torch.bool).tril() if causal else torch.ones(N, K, dtype=torch.bool)
    seen, bias = seen.expand(2, 1, N, K), None
    if masked:
        mask = torch.rand(2, K, generator=generator) < 0.7
        mask[:, 0] = True
        seen = seen & mask[:, None, None]
        bias = q.new_zeros(2, K).masked_fill(~mask, float("-inf"))[:, None, None].expand(2, 2, N, K)

    exact_q, exact_k = (x.double().requires_grad_() for x in (q, k))
    scores = (exact_q @ exact_k.mT * C**-0.5).masked_fill(~seen, float("-inf"))
    lse = scores.detach().logsumexp(-1)
    found, found_lse = kernel.forward(q, k, v, causal, bias)
    assert found.dtype == dtype and found_lse.dtype == torch.promote_types(dtype, torch.float32)
    assert_close(found, scores.detach().softmax(-1) @ v.double(), TOLERANCE[dtype])
    assert_close(found_lse, lse, TOLERANCE[dtype])

    merged = torch.logaddexp(lse, lse.flip(2))
    probabilities = (scores.detach() - merged[..., None]).exp()
    delta = (d_out.double() * out.double()).sum(-1, keepdim=True)
    d_scores = probabilities * (d_out.double() @ v.double().mT - delta)
    scores.masked_fill(~seen, 0).backward(d_scores)
    d_v = probabilities.mT @ d_out.double()
    gradients = kernel.backward(d_out, q, k, v, out, merged.to(found_lse.dtype), causal, bias)
    for gradient, expected in zip(gradients, (exact_q.grad, exact_k.grad, d_v), strict=True):
        assert gradient.dtype == dtype and expected is not None
        assert_close(gradient, expected, TOLERANCE[dtype] * max(1.0, float(expected.abs().max())))


@pytest.mark.parametrize("kernel", KERNELS)
@settings(max_examples=40)
@given(
    dtype=st.sampled_from([torch.float64, torch.float32]),
    sizes=st.tuples(st.integers(1, 6), st.integers(1, 9), st.integers(1, 9)),
    causal=st.booleans(),
    masked=st.booleans(),
)
def test_small_pieces(
    kernel: type[Kernels], dtype: torch.dtype, sizes: tuple[int, int, int], causal: bool, masked: bool
) -> None:
    N, K, C = sizes
    check(kernel, dtype, N, N if causal else K, C, causal, masked)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(("N", "K"), [(40, 511), (300, 512), (33, 513), (70, 1100), (600, 600)])
def test_pieces_of_several_tiles(kernel: type[Kernels], dtype: torch.dtype, N: int, K: int) -> None:
    check(kernel, dtype, N, K, 64, causal=N == K, masked=K % 2 == 0)


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

"""`attend` is softmax attention over the concatenated keys, whatever the pieces."""

import random
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import assert_close, naive_attention
from torch import Tensor

from perceiver_ar.network.attention import (
    Piece,
    _attend_whole,
    attend,
    attend_pieces,
    attend_side_by_side,
    parts_of_keys,
)

DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
# Largest error, relative to the scale of the values. The reference runs in float64 on the same (rounded) inputs. A
# bfloat16 has 8 bits: a result is within 2^-8 of exact, and the kernels round probabilities to it before they sum.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 3e-2}


class Problem(NamedTuple):
    q: Tensor
    pieces: list[Piece]

    def to(self, dtype: torch.dtype, device: str = "cpu") -> "Problem":
        def copy(x: Tensor) -> Tensor:  # detached, in its own layout, ready for gradients
            return x.detach().to(device=device, dtype=dtype, copy=True).requires_grad_()

        pieces = [
            Piece(copy(k), copy(v), causal, None if mask is None else mask.to(device))
            for k, v, causal, mask in self.pieces
        ]
        return Problem(copy(self.q), pieces)

    @property
    def inputs(self) -> list[Tensor]:
        return [self.q, *(x for piece in self.pieces for x in piece[:2])]

    def seen(self) -> Tensor:
        """(B, 1, N, keys of all pieces): which query may see which key."""
        columns = []
        for piece in self.pieces:
            seen = torch.ones(self.q.shape[0], 1, self.q.shape[2], piece.k.shape[2], dtype=torch.bool)
            if piece.causal:
                seen = seen.tril()
            if piece.mask is not None:
                seen = seen & piece.mask.cpu()[:, None, None, :]
            columns.append(seen)
        return torch.cat(columns, dim=-1)

    def naive(self) -> Tensor:
        k = torch.cat([piece.k for piece in self.pieces], dim=2)
        v = torch.cat([piece.v for piece in self.pieces], dim=2)
        return naive_attention(self.q, k, v, self.seen())


@st.composite
def problems(draw: st.DrawFn, max_scale: float = 30.0) -> Problem:
    """Random pieces: plain and causal, masked in part, in whole rows or everywhere, empty ones too."""
    B, H, N, C = (draw(st.integers(1, n)) for n in (3, 2, 6, 9))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    scale = draw(st.sampled_from([0.0, 1.0, max_scale]))
    heads_inside = draw(st.booleans())  # as the network has them: (B, K, H, C) in memory, heads transposed out

    def tensor(length: int) -> Tensor:
        if heads_inside:
            return torch.randn(B, length, H, C, generator=generator, dtype=torch.float64).transpose(1, 2)
        return torch.randn(B, H, length, C, generator=generator, dtype=torch.float64)

    pieces = []
    for kind in draw(st.lists(st.sampled_from(["plain", "causal", "empty"]), min_size=1, max_size=4)):
        K = N if kind == "causal" else draw(st.integers(1, 7)) if kind == "plain" else 0
        masking = draw(st.sampled_from(["none", "none", "some", "rows", "all"]))
        mask = torch.rand(B, K, generator=generator) < 0.5
        if masking == "rows":
            mask = (torch.rand(B, 1, generator=generator) < 0.5).expand(B, K)
        if masking == "all":
            mask = torch.zeros(B, K, dtype=torch.bool)
        pieces.append(Piece(tensor(K), tensor(K), kind == "causal", None if masking == "none" else mask))
    if all(piece.k.shape[2] == 0 for piece in pieces):
        pieces.append(Piece(tensor(N), tensor(N), causal=True))
    return Problem(scale * tensor(N), pieces)


def gradients(out: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    weight = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).reshape(out.shape)
    return list(torch.autograd.grad(out, inputs, weight.to(out), materialize_grads=True))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", TOLERANCE)
@settings(max_examples=80)
@given(problem=problems())
def test_any_pieces_give_attention_over_all_keys_with_its_gradients(
    problem: Problem, dtype: torch.dtype, device: str
) -> None:
    problem = problem.to(dtype, device)
    exact = problem.to(torch.float64)
    tolerance = TOLERANCE[dtype]
    out, expected = attend(problem.q, problem.pieces), exact.naive()
    assert out.dtype == dtype
    assert_close(out.cpu(), expected, tolerance)
    # A gradient passes through scores, so their scale multiplies the rounding of its inputs.
    scale = max(1.0, exact.q.abs().max().item())
    for actual, wanted in zip(gradients(out, problem.inputs), gradients(expected, exact.inputs), strict=True):
        assert_close(actual.cpu(), wanted, tolerance * scale)


@settings(max_examples=80)
@given(problem=problems())
def test_a_query_that_sees_nothing_gets_exact_zeros_and_gives_no_gradient(problem: Problem) -> None:
    problem = problem.to(torch.float64)
    blind = ~problem.seen().any(-1).expand(problem.q.shape[:3])
    out = attend(problem.q, problem.pieces)
    assert torch.equal(out[blind], torch.zeros_like(out[blind]))
    for gradient in torch.autograd.grad(out[blind].sum(), problem.inputs, materialize_grads=True):
        assert torch.equal(gradient, torch.zeros_like(gradient))


@settings(max_examples=25)
@given(problem=problems(max_scale=2.0))
def test_gradients_equal_finite_differences(problem: Problem) -> None:
    problem = problem.to(torch.float64)
    shapes = [(piece.causal, piece.mask) for piece in problem.pieces]

    def function(q: Tensor, *tensors: Tensor) -> Tensor:
        pairs = zip(tensors[::2], tensors[1::2], strict=True)
        return attend(q, [Piece(k, v, *rest) for (k, v), rest in zip(pairs, shapes, strict=True)])

    assert torch.autograd.gradcheck(function, tuple(problem.inputs), fast_mode=True)


@pytest.mark.parametrize("device", DEVICES)
@settings(max_examples=80)
@given(problem=problems())
def test_one_call_over_the_whole_keys_agrees_with_the_merged_pieces(problem: Problem, device: str) -> None:
    problem = problem.to(torch.float64, device)
    pieces = [piece for piece in problem.pieces if piece.k.shape[2] > 0]
    whole = _attend_whole(problem.q, pieces, 0.0)
    merged = problem.to(torch.float64)
    out = attend(merged.q, merged.pieces)
    assert_close(whole.cpu(), out, 1e-10)
    for actual, wanted in zip(gradients(whole, problem.inputs), gradients(out, merged.inputs), strict=True):
        assert_close(actual.cpu(), wanted, 1e-9)


@settings(max_examples=40)
@given(data=st.data(), B=st.integers(1, 3), parts=st.sampled_from([2, 4]), seed=st.integers(0, 2**20))
def test_parts_of_the_keys_side_by_side_give_attention_over_all(
    data: st.DataObject, B: int, parts: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    H, K, C = 2, parts * data.draw(st.integers(1, 4)), 5
    room = K + data.draw(st.integers(0, 3))  # keys may be a part of a larger cache
    q, k, v = (torch.randn(B, H, n, C, generator=generator, dtype=torch.float64) for n in (1, room, room))
    mask = torch.rand(B, K, generator=generator) < data.draw(st.sampled_from([0.1, 0.5, 1.0]))
    out, lse = attend_side_by_side(q, k[:, :, :K], v[:, :, :K], mask, parts)
    expected, expected_lse = attend_pieces(q, [Piece(k[:, :, :K], v[:, :, :K], mask=mask)])
    assert_close(out, expected, 1e-12)
    assert torch.equal(lse.isinf(), expected_lse.isinf())
    assert_close(lse.nan_to_num(neginf=0.0), expected_lse.nan_to_num(neginf=0.0), 1e-12)


@pytest.mark.parametrize(
    ("blocks", "K", "parts"), [(8, 8192, 32), (8, 256, 2), (8, 200, 1), (128, 4096, 2), (300, 8192, 1), (1, 384, 1)]
)
def test_keys_are_divided_to_keep_a_gpu_busy(blocks: int, K: int, parts: int) -> None:
    assert parts_of_keys(blocks, K) == parts


@settings(max_examples=60)
@given(problem=problems(), bad=st.sampled_from([float("nan"), float("inf")]), data=st.data())
def test_nan_or_infinity_in_one_row_of_the_batch_stays_in_that_row(
    problem: Problem, bad: float, data: st.DataObject
) -> None:
    clean, dirty = problem.to(torch.float64), problem.to(torch.float64)
    row = data.draw(st.integers(0, len(problem.q) - 1))
    with torch.no_grad():
        for tensor in dirty.inputs:
            tensor[row] = bad
    out, expected = attend(dirty.q, dirty.pieces), attend(clean.q, clean.pieces)
    others = [i for i in range(len(problem.q)) if i != row]
    assert torch.equal(out[others], expected[others])
    for actual, wanted in zip(gradients(out, dirty.inputs), gradients(expected, clean.inputs), strict=True):
        assert torch.equal(actual[others], wanted[others])


@settings(max_examples=60)
@given(problem=problems(max_scale=2.0), seed=st.integers(0, 1000), rate=st.sampled_from([0.1, 0.5, 0.9]))
def test_dropout_zeroes_probabilities_and_scales_the_others(problem: Problem, seed: int, rate: float) -> None:
    # Values that are unit vectors make the output the probabilities themselves; that shows which ones were kept.
    problem = problem.to(torch.float64)
    keys = problem.seen().shape[-1]
    B, H = problem.q.shape[:2]
    ends = torch.tensor([piece.k.shape[2] for piece in problem.pieces]).cumsum(0).tolist()
    unit = torch.eye(keys, dtype=torch.float64).expand(B, H, -1, -1)
    pieces = [
        piece._replace(v=unit[:, :, end - piece.k.shape[2] : end])
        for piece, end in zip(problem.pieces, ends, strict=True)
    ]
    probabilities = problem._replace(pieces=pieces).naive()
    torch.manual_seed(seed)
    dropped = attend(problem.q, pieces, dropout=rate)
    kept = dropped != 0
    assert_close(dropped, torch.where(kept, probabilities / (1 - rate), 0.0), 1e-10)

    # The same draws with the real values: output and gradients of attention with just those probabilities.
    torch.manual_seed(seed)
    out = attend(problem.q, problem.pieces, dropout=rate)
    exact = problem.to(torch.float64)
    k = torch.cat([piece.k for piece in exact.pieces], dim=2)
    v = torch.cat([piece.v for piece in exact.pieces], dim=2)
    expected = naive_attention(exact.q, k, v, exact.seen(), factor=kept.double() / (1 - rate))
    assert_close(out, expected, 1e-10)
    for actual, wanted in zip(gradients(out, problem.inputs), gradients(expected, exact.inputs), strict=True):
        assert_close(actual, wanted, 1e-9)


def test_dropout_drops_its_share_and_keeps_the_mean() -> None:
    torch.manual_seed(0)
    q, k = torch.randn(8, 4, 16, 8), torch.randn(8, 4, 64, 8)
    pieces = [Piece(k, torch.eye(64).expand(8, 4, -1, -1))]
    dropped = attend(q, pieces, dropout=0.25)  # 32768 draws: the share's standard deviation is 0.0024
    assert abs((dropped == 0).float().mean().item() - 0.25) < 0.015
    assert abs(dropped.sum(-1).mean().item() - 1) < 0.02


def test_the_softmax_scale_is_one_over_the_root_of_the_head_size() -> None:
    q = torch.tensor([[[[2.0, 2.0, 2.0, 2.0]]]])
    k = torch.tensor([[[[0.5, 0.5, 0.5, 0.5], [0.0, 0.0, 0.0, 0.0]]]])  # scores 4 / 2 and 0
    out = attend(q, [Piece(k[:, :, :1], k[:, :, :1] * 0 + 1), Piece(k[:, :, 1:], k[:, :, 1:])])
    assert_close(out, torch.full((1, 1, 1, 4), 1 / (1 + torch.exp(torch.tensor(-2.0)).item())), 1e-6)


def test_scores_that_would_overflow_exp_are_merged_exactly() -> None:
    # Scores of +-4000: exp overflows even in float64 and only differences of the pieces' lse are usable.
    q = torch.tensor([[[[4000.0]], [[-4000.0]]]], dtype=torch.float64)
    k = torch.tensor([[[[1.0]], [[1.0]]]], dtype=torch.float64)
    v = torch.tensor([[[[1.0]], [[1.0]]]], dtype=torch.float64)
    out = attend(q, [Piece(k, v), Piece(-k, -v)])
    assert_close(out.flatten(), torch.tensor([1.0, -1.0]), 1e-12)


@settings(max_examples=30)
@given(problem=problems(), order=st.randoms(use_true_random=False))
def test_the_order_of_the_pieces_does_not_matter(problem: Problem, order: random.Random) -> None:
    problem = problem.to(torch.float64)
    shuffled = list(problem.pieces)
    order.shuffle(shuffled)
    assert_close(attend(problem.q, shuffled), attend(problem.q, problem.pieces), 1e-10)


@pytest.mark.parametrize("device", DEVICES)
def test_strided_slices_expanded_and_transposed_inputs_give_what_copies_give(device: str) -> None:
    torch.manual_seed(0)
    B, H, N, C = 2, 3, 5, 8
    sliced = torch.randn(B, H, 2 * N, 2 * C, device=device)[:, :, ::2, ::2]
    expanded = torch.randn(1, H, 7, C, device=device).expand(B, -1, -1, -1)
    channels_first = torch.randn(B, H, C, 7, device=device).transpose(2, 3)
    chunk = torch.randn(B, N, 3 * H * C, device=device).chunk(3, -1)[1].unflatten(-1, (H, C)).transpose(1, 2)

    def run(*inputs: Tensor) -> list[Tensor]:
        inputs = tuple(x.detach().requires_grad_() for x in inputs)
        q, k, v, own = inputs
        out = attend(q, [Piece(k, v), Piece(own, own, causal=True)])
        return [out, *gradients(out, list(inputs))]

    strided = run(sliced, expanded, channels_first, chunk)
    copies = run(*(x.contiguous() for x in (sliced, expanded, channels_first, chunk)))
    for actual, wanted in zip(strided, copies, strict=True):
        assert_close(actual, wanted, 1e-5)

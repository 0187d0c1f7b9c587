"""The loss is the mean cross-entropy of the labels that are targets."""

import math
import re
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import assert_close
from torch import Tensor

from perceiver_ar.errors import InputError
from perceiver_ar.objective import IGNORE, head_loss, next_token_loss


def by_hand(logits: Tensor, labels: Tensor, ignored: int) -> list[float]:
    """Nats of each target, by the definition: log of the sum of exponentials minus the target's logit."""
    rows = zip(logits.double().flatten(0, 1).tolist(), labels.flatten().tolist(), strict=True)
    return [
        max(row) + math.log(sum(math.exp(x - max(row)) for x in row)) - row[label]
        for row, label in rows
        if label != ignored
    ]


@settings(max_examples=60)
@given(
    B=st.integers(1, 3),
    N=st.integers(1, 5),
    V=st.integers(1, 7),
    ignored=st.sampled_from([IGNORE, 0]),
    scale=st.sampled_from([0.0, 1.0, 1000.0]),
    seed=st.integers(0, 2**20),
)
def test_mean_sum_and_single_losses_are_those_of_the_definition(
    B: int, N: int, V: int, ignored: int, scale: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(B, N, V, generator=generator, dtype=torch.float64)
    labels = torch.randint(V, (B, N), generator=generator)
    labels[torch.rand(B, N, generator=generator) < 0.3] = ignored
    expected = by_hand(logits, labels, ignored)
    single = next_token_loss(logits, labels, ignore_index=ignored, reduction="none")
    assert single.shape == (B, N)
    assert torch.equal(single[labels == ignored], torch.zeros_like(single[labels == ignored]))
    assert_close(single[labels != ignored], torch.tensor(expected, dtype=torch.float64), 1e-12)
    total = next_token_loss(logits, labels, ignore_index=ignored, reduction="sum")
    assert_close(total, torch.tensor(sum(expected), dtype=torch.float64), 1e-12)
    mean = next_token_loss(logits, labels, ignore_index=ignored)
    if expected:
        assert_close(mean, torch.tensor(sum(expected) / len(expected), dtype=torch.float64), 1e-12)
    else:
        assert mean.isnan()


@settings(max_examples=60)
@given(
    V=st.integers(2, 7),
    smoothing=st.sampled_from([0.0, 0.1, 0.4]),
    z=st.sampled_from([0.0, 1e-4, 0.3]),
    seed=st.integers(0, 2**20),
)
def test_smoothed_targets_and_z_loss_are_those_of_the_definition(V: int, smoothing: float, z: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(2, 3, V, generator=generator, dtype=torch.float64)
    labels = torch.randint(V, (2, 3), generator=generator)
    labels[0, 1] = IGNORE
    expected = []
    for row, label in zip(logits.flatten(0, 1).tolist(), labels.flatten().tolist(), strict=True):
        total = math.log(sum(map(math.exp, row)))
        targets = [1 - smoothing if i == label else smoothing / (V - 1) for i in range(V)]
        # The divergence of the model's distribution from the targets', in nats.
        loss = sum(t * (math.log(t) - (x - total)) for t, x in zip(targets, row, strict=True) if t > 0)
        expected.append(0.0 if label == IGNORE else loss + z * total**2)
    weights: dict[str, Any] = {"label_smoothing": smoothing, "z_loss": z}
    single = next_token_loss(logits, labels, reduction="none", **weights)
    assert_close(single.flatten(), torch.tensor(expected, dtype=torch.float64), 1e-12)
    total = next_token_loss(logits, labels, reduction="sum", **weights)
    assert_close(total, torch.tensor(sum(expected), dtype=torch.float64), 1e-12)
    mean = next_token_loss(logits, labels, **weights)
    assert_close(mean, torch.tensor(sum(expected) / 5, dtype=torch.float64), 1e-12)


def test_a_perfect_prediction_of_smoothed_targets_costs_nothing() -> None:
    logits = torch.tensor([0.9, 0.05, 0.05], dtype=torch.float64).log()[None, None]
    loss = next_token_loss(logits.requires_grad_(), torch.tensor([[0]]), label_smoothing=0.1)
    assert abs(loss.item()) < 1e-12
    loss.backward()
    assert logits.grad is not None
    assert logits.grad.abs().max() < 1e-12


def test_only_minus_100_is_ignored_by_default() -> None:
    logits = torch.randn(1, 4, 3, generator=torch.Generator().manual_seed(0)).requires_grad_()
    next_token_loss(logits, torch.tensor([[0, 2, IGNORE, 1]])).backward()
    assert IGNORE == -100
    assert logits.grad is not None
    assert (logits.grad.abs().sum(-1) > 0).tolist() == [[True, True, False, True]]


@pytest.mark.parametrize("label", [3, -1, -99])
def test_a_label_that_is_no_token_is_an_error(label: int) -> None:
    with pytest.raises(IndexError):
        next_token_loss(torch.zeros(1, 1, 3), torch.tensor([[label]]))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.uint16, torch.int32])
@pytest.mark.parametrize("settings_", [{}, {"label_smoothing": 0.1}, {"ignore_index": 2}], ids=str)
def test_labels_may_stay_in_the_type_they_are_stored_in(dtype: torch.dtype, settings_: dict[str, Any]) -> None:
    torch.manual_seed(0)
    latents, head = torch.randn(2, 5, 4), torch.nn.Linear(4, 7)
    labels = torch.randint(7, (2, 5))
    expected = next_token_loss(head(latents), labels, **settings_)
    assert torch.equal(next_token_loss(head(latents), labels.to(dtype), **settings_), expected)
    if not settings_:
        assert_close(head_loss(latents, head, labels.to(dtype)), expected, 1e-6)


@pytest.mark.parametrize(("logits", "labels"), [((2, 5, 7), (2, 6)), ((2, 5, 7), (10,)), ((5, 7), (5,))])
def test_shapes_that_do_not_fit_are_named(logits: tuple[int, ...], labels: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match=re.escape(f"logits have shape {logits} and labels {labels}")):
        next_token_loss(torch.zeros(logits), torch.zeros(labels, dtype=torch.long))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_scored_in_float32(dtype: torch.dtype) -> None:
    # 50,000 equal logits: the mean of 1000 losses of ln 50000 = 10.8198; bfloat16 would give 10.8125.
    logits = torch.zeros(1, 4, 50_000, dtype=dtype)
    loss = next_token_loss(logits, torch.zeros(1, 4, dtype=torch.long))
    assert loss.dtype == torch.float32
    assert abs(loss.item() - math.log(50_000)) < 1e-4


@pytest.mark.parametrize("bias", [False, True])
def test_the_loss_without_all_logits_at_once_is_the_same_with_its_gradients(bias: bool) -> None:
    torch.manual_seed(0)
    latents, head = torch.randn(2, 40, 16, requires_grad=True), torch.nn.Linear(16, 300, bias=bias)
    labels = torch.randint(300, (2, 40))
    labels[0, :7] = -100
    expected, actual = next_token_loss(head(latents), labels), head_loss(latents, head, labels)
    inputs = [latents, *head.parameters()]
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)
    for a, b in zip(torch.autograd.grad(actual, inputs), torch.autograd.grad(expected, inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)

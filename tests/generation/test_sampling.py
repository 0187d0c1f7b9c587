"""Filters keep exactly the ids they promise; samples follow the softmax."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from perceiver_ar.errors import InputError
from perceiver_ar.generation.sampling import (
    Sampling,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    penalise_repetition,
    sample,
)

rows_of_logits = st.lists(
    st.lists(st.floats(-6, 6).map(lambda x: round(x, 3)), min_size=7, max_size=7, unique=True), min_size=1, max_size=3
).map(lambda rows: torch.tensor(rows, dtype=torch.float64))


def kept(logits: Tensor) -> list[set[int]]:
    return [{i for i, x in enumerate(row) if x > -math.inf} for row in logits.tolist()]


@given(rows_of_logits, st.integers(1, 9))
def test_top_k_keeps_the_k_most_likely(logits: Tensor, k: int) -> None:
    filtered = keep_top_k(logits, k)
    assert kept(filtered) == [set(sorted(range(7), key=lambda i, row=row: -row[i])[:k]) for row in logits.tolist()]
    assert torch.equal(torch.where(filtered > -math.inf, filtered, logits), logits)


@given(rows_of_logits, st.floats(0.001, 1))
def test_top_p_keeps_the_fewest_with_that_probability(logits: Tensor, p: float) -> None:
    filtered = keep_top_p(logits, p)
    for row, chosen in zip(logits.softmax(-1).tolist(), kept(filtered), strict=True):
        order = sorted(range(7), key=lambda i: -row[i])
        fewest = next((n for n in range(1, 8) if sum(row[i] for i in order[:n]) >= p - 1e-9), 7)
        most = next((n for n in range(1, 8) if sum(row[i] for i in order[:n]) >= p + 1e-9), 7)
        assert chosen in [set(order[:n]) for n in range(fewest, most + 1)]
    assert torch.equal(torch.where(filtered > -math.inf, filtered, logits), logits)


@given(st.integers(0, 2**32 - 1), st.floats(0.001, 0.999), st.integers(1, 1500), st.floats(0.01, 20))
def test_top_p_of_many_ids_keeps_those_that_stable_sorting_finds(seed: int, p: float, size: int, spread: float) -> None:
    wide = torch.randn(3, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * spread
    logits = torch.cat([wide.round(decimals=1), wide[:1] * 0.01])  # equal ones; nearly equal ones beside them
    logits[0, ::3] = -math.inf
    chosen = keep_top_p(logits, p) > -math.inf
    values, ids = logits.sort(descending=True, stable=True)
    probabilities = values.softmax(-1)
    for row, order, after, kept in zip(logits, ids, probabilities.cumsum(-1), chosen, strict=True):
        counts = [min(int((after < limit).sum()) + 1, size) for limit in (p - 1e-9, p + 1e-9)]
        least, most = (set(order[:count].tolist()) for count in counts)
        assert {i for i in least if row[i] > -math.inf} <= set(kept.nonzero()[:, 0].tolist()) <= most
        alone = keep_top_p(row, p) > -math.inf
        assert torch.equal(alone, kept)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_top_p_takes_any_type_and_keeps_gradients(dtype: torch.dtype) -> None:
    logits = torch.tensor([[2.0, 1.0, 2.0, -3.0]], dtype=dtype, requires_grad=True)
    filtered = keep_top_p(logits, 0.4)
    assert filtered.dtype == dtype and kept(filtered) == [{0}]
    filtered[0, 0].backward()
    assert logits.grad is not None and logits.grad.tolist() == [[1, 0, 0, 0]]


@given(rows_of_logits, st.floats(0, 1))
def test_min_p_keeps_those_not_much_less_likely_than_the_best(logits: Tensor, p: float) -> None:
    for row, chosen in zip(logits.softmax(-1).tolist(), kept(keep_min_p(logits, p)), strict=True):
        assert {i for i in range(7) if row[i] >= (p + 1e-9) * max(row)} <= chosen
        assert chosen <= {i for i in range(7) if row[i] >= (p - 1e-9) * max(row)}
        assert row.index(max(row)) in chosen


@given(rows_of_logits, st.floats(0.1, 5), st.sets(st.integers(0, 6)))
def test_the_penalty_is_for_the_ids_seen(logits: Tensor, penalty: float, ids: set[int]) -> None:
    seen = torch.tensor([i in ids for i in range(7)]).expand_as(logits)
    for row, after in zip(logits.tolist(), penalise_repetition(logits, seen, penalty).tolist(), strict=True):
        for i, (x, y) in enumerate(zip(row, after, strict=True)):
            assert y == (x if i not in ids else x / penalty if x > 0 else x * penalty)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("repetition_penalty", 1e-310),
        ("repetition_penalty", 101),
        ("frequency_penalty", -1.7e308),
        ("frequency_penalty", math.nan),
        ("presence_penalty", -1.7e308),
        ("presence_penalty", 100.5),
    ],
)
def test_penalties_that_make_logits_infinite_are_refused(name: str, value: float) -> None:
    with pytest.raises(InputError, match=f"{name} is .*it must be in"):
        Sampling(**dict[str, Any]({name: value}))


def test_samples_follow_the_softmax() -> None:
    p = torch.tensor([0.5, 0.3, 0.2, 0.0])
    generator = torch.Generator().manual_seed(0)
    logits = 2 * p.log().expand(20, 1000, 4)
    counts = torch.bincount(sample(logits, 2.0, generator=generator).flatten(), minlength=4)
    assert ((counts / 20_000 - p).abs() < 4 * (p * (1 - p) / 20_000).sqrt() + 1e-12).all()
    assert sample(logits, 0.0).shape == (20, 1000)
    assert sample(p, 0.0) == 0

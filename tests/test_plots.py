"""Pictures are drawn whatever there is to draw, whole or not at all, and their labels do not overlap."""

import math
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from perceiver_ar.evaluation import Evaluation
from perceiver_ar.plots import binary_count, plot_context, plot_loss, plot_scaling, spread

PNG = b"\x89PNG\r\n\x1a\n"


def evaluation(context_length: int, bits: float, num_bytes: int | None = 50, error: float | None = 0.1) -> Evaluation:
    return Evaluation(
        tokens=100,
        bytes=num_bytes,
        nats_per_token=bits * math.log(2),
        bits_per_token=bits,
        bits_per_byte=None if num_bytes is None else bits * 100 / num_bytes,
        perplexity=2**bits,
        standard_error=error,
        context_length=context_length,
        num_latents=1,
        stride=1,
        seconds=1.0,
    )


@pytest.mark.parametrize("steps", [0, 1, 3, 500])
def test_the_loss_is_drawn_however_much_there_is_of_it(tmp_path: Path, steps: int) -> None:
    train = [(100.0 * i, 8 * 0.99**i) for i in range(steps)]
    for name, validation in (("with.png", train[::50]), ("without.png", [])):
        plot_loss(tmp_path / name, train, validation, {"gzip": 2.02, "xz": 1.68})
        plot_loss(tmp_path / name, train, validation)
        assert (tmp_path / name).read_bytes().startswith(PNG)
    assert len(list(tmp_path.iterdir())) == 2  # no temporary file is left


def test_values_that_are_not_finite_are_left_out(tmp_path: Path) -> None:
    plot_loss(tmp_path / "loss.png", [(1, math.nan), (2, 3.0), (3, math.inf)], [(1, math.nan)])
    assert (tmp_path / "loss.png").stat().st_size > 1000


@pytest.mark.parametrize("num_bytes", [None, 50])
@pytest.mark.parametrize("error", [None, 0.1])
def test_context_lengths_are_drawn(tmp_path: Path, num_bytes: int | None, error: float | None) -> None:
    results = [evaluation(length, 3 / length, num_bytes, error) for length in (1024, 256, 1536)]
    for n in range(len(results) + 1):
        plot_context(tmp_path / "context.png", results[:n], {"a reference with a long name": 2.0})
        assert (tmp_path / "context.png").read_bytes().startswith(PNG)


def test_counts_are_written_in_powers_of_two() -> None:
    counts = [1, 256, 1000, 1024, 1536, 4096, 65536, 2**20, 3 * 2**19]
    assert [binary_count(n) for n in counts] == ["1", "256", "1000", "1k", "1.5k", "4k", "64k", "1M", "1.5M"]


def test_scaling_is_drawn_also_for_one_size(tmp_path: Path) -> None:
    points = {"1k": [(1e6, 3.0), (1e7, 2.0)], "2k": [(1e7, 2.1), (1e8, 1.5)]}
    for sizes in (["1k"], ["1k", "2k"]):
        some = {size: points[size] for size in sizes}
        plot_scaling(tmp_path / "scaling.png", some, some, [(1e6, 3.0), (1e9, 1.2)], y_label="bits")
        assert (tmp_path / "scaling.png").read_bytes().startswith(PNG)


@given(st.lists(st.floats(0, 1)).map(sorted))
def test_labels_keep_their_distance_and_their_place_where_there_is_room(values: list[float]) -> None:
    placed = spread(values, gap=0.1)
    assert all(b - a >= 0.1 - 1e-9 for a, b in pairwise(placed))
    assert sum(placed) == pytest.approx(sum(values), abs=1e-9)
    apart = [i * 0.2 + 0.01 * value for i, value in enumerate(values)]
    assert spread(apart, gap=0.1) == pytest.approx(apart)

"""The quality benchmark from start to table, at toy sizes, in a process of its own."""

import json
import math
import random
import signal
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from processes import Server

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
QUALITY = BENCHMARKS / "quality.py"
FROM = {"transformers": "dense_muon,dense_adamw,dense_sliding", "perceiver_ar_pytorch": "seed_script,seed_small"}
"""The contenders of each package; either may be missing."""


@pytest.fixture
def books(tmp_path: Path) -> Path:
    words, rng = ["the ", "cat ", "sat ", "on ", "a ", "mat ", "and ", "ran\n", "away\n\n\n\n"], random.Random(0)
    folder = tmp_path / "books"
    folder.mkdir()
    for name in ("train", "validation"):
        (folder / f"{name}.txt").write_text("".join(rng.choice(words) for _ in range(2000)))
    return folder


def test_a_killed_series_goes_on_until_every_contender_has_a_finite_score(
    server: Server, tmp_path: Path, books: Path
) -> None:
    contenders = ["ours", "ours_plain"]
    for package, names in FROM.items():
        contenders += names.split(",") if find_spec(package) else []
    out, results = tmp_path / "out", tmp_path / "out" / "results.jsonl"
    settings = [
        "--rehearse",
        "--out",
        out,
        "--books",
        books,
        "--corpora",
        "books",
        "--contenders",
        ",".join(contenders),
    ]
    server.run_file(QUALITY, *settings, signals=[(results.exists, signal.SIGKILL)])
    before = results.read_text()
    assert server.run_file(QUALITY, *settings) == 0, server.messages()
    lines = results.read_text()
    assert lines.startswith(before)
    records = [json.loads(line) for line in lines.splitlines()]
    runs = sorted((record["name"], record["seed"]) for record in records)
    assert runs == sorted((name, seed) for name in contenders for seed in (0, 1))
    for record in records:
        assert math.isfinite(record["bits_per_byte"]) and record["finite"] and record["steps"] >= 1
    table = (out / "table.md").read_text()
    assert all(f"|{name}|" in table for name in contenders)
    assert (out / "quality.png").stat().st_size > 0
    assert server.run_file(QUALITY, *settings) == 0, server.messages()
    assert results.read_text() == lines


def test_wrong_input_ends_with_status_2_and_a_line(server: Server, tmp_path: Path) -> None:
    assert server.run_file(QUALITY, "--rehearse", "--out", tmp_path, "--contenders", "theirs") == 2
    assert "--contenders has theirs: choose among ours" in server.stderr.read_text()


@pytest.mark.parametrize(("length", "window"), [(12, 4), (13, 4), (3, 8), (7, 1)])
def test_sliding_attention_is_attention_with_a_band_for_a_mask(
    monkeypatch: pytest.MonkeyPatch, length: int, window: int
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from networks import sliding_attention  # pyright: ignore[reportMissingImports]

    q, k, v = torch.randn(3, 2, 2, length, 8, generator=torch.Generator().manual_seed(0))
    distance = torch.arange(length)[:, None] - torch.arange(length)
    expected = F.scaled_dot_product_attention(q, k, v, (distance >= 0) & (distance < window))
    torch.testing.assert_close(sliding_attention(q, k, v, window), expected)

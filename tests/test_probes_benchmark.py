"""The probes at toy sizes: what is asked stands in the context, and the network finds it only if it can search."""

import json
import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import Server

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
NAMES = ["copy", "copy64", "recall, 2 pairs", "passkey", "mirror, plain", "mirror, mirrored"]


@pytest.fixture
def probes(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import probes  # pyright: ignore[reportMissingImports]

    return probes


def test_each_probe_prints_its_rows_and_leaves_table_records_and_picture(server: Server, tmp_path: Path) -> None:
    status = server.run_file(BENCHMARKS / "probes.py", "--rehearse", "--pairs", "2", "--out", tmp_path)
    assert status == 0, server.messages()
    table = server.stdout.read_text()
    assert (tmp_path / "probes.md").read_text() == table
    records = json.loads((tmp_path / "probes.json").read_text())
    assert list(dict.fromkeys(record["probe"] for record in records)) == NAMES
    assert table.count("\n|") == 2 + len(records)
    for record in records:
        shares = [record["first"], record["all"], *(x for x in record["by_distance"] if x is not None)]
        assert all(math.isfinite(share) and 0 <= share <= 1 for share in shares)
        assert f"|{record['probe']}|4|0|{record['trained_at']:,}|" in table
    assert [r["read_at"] // r["trained_at"] for r in records if r["probe"] in NAMES[2:4]] == [1, 4, 16, 1, 16]
    assert (tmp_path / "probes.png").stat().st_size > 0


@pytest.mark.parametrize("arguments", [["copies"], ["recall", "--pairs", "2000"], ["--minutes", "nan"]])
def test_wrong_input_ends_with_status_2_and_a_line(server: Server, arguments: list[str]) -> None:
    assert server.run_file(BENCHMARKS / "probes.py", "--rehearse", *arguments) == 2
    assert "Traceback" not in server.stderr.read_text()


def test_every_target_stands_in_the_context(probes: Any) -> None:
    random = torch.Generator().manual_seed(0)
    for probe in (probe for group in probes.probes([1, 8]).values() for probe in group):
        tokens, sources, scored, first = probe.draw(probe, 3, probe.context, random)
        N = probe.latents
        assert tokens.shape == (3, probe.context + 1) and sources.shape == (3, N)
        assert tokens.min() >= 0 and tokens.max() < probe.ids + probe.marks
        targets, places = tokens[:, -N:], torch.arange(probe.context + 1 - N, probe.context + 1)
        known = sources >= 0
        assert (sources < places).all() and known[:, scored].all() and scored[first].all()
        assert torch.equal(tokens.gather(1, sources.clamp(min=0))[known], targets[known])
        assert (targets[known] < probe.ids).all()


@pytest.mark.parametrize(("pairs", "key", "value"), [(5, 4, 4), (1, 0, 5)])
def test_recall_asks_for_the_value_of_the_one_pair_with_that_key(probes: Any, pairs: int, key: int, value: int) -> None:
    length, queries, T, mark = 1 + key + value, 2, 200, 62
    probe = probes.Probe("recall", None, mark, 2, T, queries * length, 1, 1)
    random = torch.Generator().manual_seed(0)
    tokens, _, scored, first = probes.draw_recall(probe, 4, T, random, pairs=pairs, key=key, value=value)
    assert scored.tolist() == ([False] * (1 + key) + [True] * value) * queries
    assert first.tolist() == ([False] * (1 + key) + [True] + [False] * (value - 1)) * queries
    for row in tokens.tolist():
        asked, prefix = row[-queries * length :], row[: -queries * length]
        marked = [place for place, token in enumerate(prefix) if token == mark]
        values = {tuple(prefix[s + 1 : s + 1 + key]): prefix[s + 1 + key : s + length] for s in marked}
        assert len(marked) == len(values) == pairs
        for query in (asked[:length], asked[length:]):
            assert query[0] == mark
            assert query[1 + key :] == values[tuple(query[1 : 1 + key])]


@pytest.mark.parametrize("mirrored", [False, True])
def test_mirror_is_the_text_again(probes: Any, mirrored: bool) -> None:
    probe = probes.Probe("mirror", None, 256, 1, 32, 8, 1, None)
    (row,) = probes.draw_mirror(probe, 1, 32, torch.Generator().manual_seed(0), mirrored).tokens.tolist()
    assert row[0] == 256
    assert row[17:] == (row[16:0:-1] if mirrored else row[1:17])


def test_copying_is_learned_with_local_context_and_not_without(probes: Any) -> None:
    draw = partial(probes.draw_copy, segment=16)
    probe = probes.Probe("copy", draw, ids=16, marks=0, context=79, latents=32, batch=16, steps=100)
    setting = probes.Setting(local_context=4, seed=0, minutes=1, dim=64, layers=1, read_tokens=2**13)
    (able,) = probes.measure(probe, setting)
    (control,) = probes.measure(probe, replace(setting, local_context=1))
    assert able["all"] > 0.8 and able["steps"] <= control["steps"]
    assert control["all"] < 0.2

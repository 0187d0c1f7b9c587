"""The benchmark of a GPU, at tiny sizes on the CPU: every check holds, and every figure is in both files."""

import json
import math
import os
import time
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
pytestmark = pytest.mark.skipif(find_spec("perceiver_ar_pytorch") is None, reason="extra: bench")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import gpu  # pyright: ignore[reportMissingImports]

    return gpu


def test_a_rehearsal_leaves_checks_that_hold_and_finite_figures(gpu: Any, tmp_path: Path) -> None:
    assert gpu.main(["--rehearse", "--out", str(tmp_path)]) == 0
    records = json.loads((tmp_path / "gpu.json").read_text())["records"]
    assert {record["part"] for record in records} == set(gpu.PARTS)
    assert not [record for record in records if "failed" in record]
    for record in records:
        assert all(math.isfinite(x) and x >= 0 for x in record.values() if isinstance(x, float))
    assert all(record["holds"] for record in records if record["part"] == "checks")
    table = (tmp_path / "gpu.md").read_text()
    assert table.count("\n| ") == len(records) + len(gpu.PARTS)
    assert {row["what"] for row in records} >= {"ours", "perceiver-ar-pytorch", "dense Transformer"}


def test_a_figure_that_fails_hangs_or_kills_its_process_is_a_row_and_the_others_follow(
    gpu: Any, tmp_path: Path
) -> None:
    report = gpu.Report(tmp_path, 5.0)
    report.measure("checks", {"what": "fails"}, partial(math.sqrt, -1))
    report.measure("checks", {"what": "dies"}, partial(os._exit, 7))
    report.measure("checks", {"what": "holds"}, partial(dict, holds=True))
    report.measure("checks", {"what": "hangs"}, partial(time.sleep, 600), longest=0.1)
    report.until = 0.0
    report.measure("training", {"what": "late"}, partial(dict))
    assert report.worker is None
    fails, dies, holds, hangs, late = json.loads((tmp_path / "gpu.json").read_text())["records"]
    assert fails["failed"].startswith("ValueError: ") and fails["failed"] in (tmp_path / "gpu.md").read_text()
    assert dies["failed"].endswith("exit status 7") and holds["holds"] is True
    assert "not finished" in hangs["failed"] and late["failed"] == "no time left"
    assert report.failed_checks == ["fails", "dies", "hangs"]


def test_an_unknown_part_is_refused(gpu: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as refused:
        gpu.main(["--parts", "checks,speed"])
    assert refused.value.code == 2 and "speed" in capsys.readouterr().err

"""The benchmark of a GPU, at tiny sizes on the CPU: every check holds, and every figure is in both files."""

import json
import math
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


def test_a_figure_that_fails_is_a_row_and_the_others_follow(gpu: Any, tmp_path: Path) -> None:
    report = gpu.Report(tmp_path, 1.0)

    def fails() -> dict[str, Any]:
        raise RuntimeError("out of memory\nlong story")

    report.measure("checks", {"what": "one"}, fails)
    report.measure("checks", {"what": "two"}, lambda: {"holds": True})
    late = gpu.Report(tmp_path / "late", 0.0)
    late.measure("training", {"what": "three"}, fails)
    assert report.failed_checks == ["one"]
    assert "RuntimeError: out of memory" in (tmp_path / "gpu.md").read_text()
    assert json.loads((tmp_path / "late" / "gpu.json").read_text())["records"][0]["failed"] == "no time left"


def test_an_unknown_part_is_refused(gpu: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as refused:
        gpu.main(["--parts", "checks,speed"])
    assert refused.value.code == 2 and "speed" in capsys.readouterr().err

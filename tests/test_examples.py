"""The examples run from the first line to the last."""

import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import ROOT
from samples import write_music, write_picture, write_sound

EXAMPLES = {
    "piano": (write_music, "__.mid"),
    "pictures": (write_picture, ".png"),
    "recordings": (write_sound, ".wav"),
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_trains_and_goes_on_from_a_file(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write: Callable[[Path, int], None]
    write, ending = EXAMPLES[name]
    folder, out = tmp_path / "files", tmp_path / "run"
    folder.mkdir()
    for number in range(8):
        write(folder / f"{number}{ending}", number)
    monkeypatch.setattr(sys, "argv", [f"{name}.py", str(folder), str(folder / f"0{ending}"), str(out), "1s"])
    runpy.run_path(str(ROOT / "examples" / f"{name}.py"), run_name="__main__")
    assert all(Path(path).is_file() for path in capsys.readouterr().out.splitlines()[1:])
    assert (out / "summary.json").is_file()


def test_the_plain_training_loop_learns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "text.txt"
    file.write_text("to be or not to be, that is the question. " * 400)
    monkeypatch.setattr(sys, "argv", ["train_loop.py", str(file), "1"])
    runpy.run_path(str(ROOT / "examples" / "train_loop.py"), run_name="__main__")
    captured = capsys.readouterr()
    assert "held out" in captured.err and captured.out


def test_every_example_is_run() -> None:
    assert {path.stem for path in (ROOT / "examples").glob("*.py")} == {*EXAMPLES, "train_loop"}

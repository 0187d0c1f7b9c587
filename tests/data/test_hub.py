"""Datasets by name are streamed into files of rows, each row once, in an order that the seed gives, also after a kill.

Without a network, the names are those of folders in the working folder: `load_dataset` reads these in the same way.
"""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import datasets
import pytest
from helpers import SMALL, assert_refused, content, write_files

from perceiver_ar.cli import main
from perceiver_ar.data.hub import find_datasets
from perceiver_ar.data.rows import find_rows
from perceiver_ar.data.sources import Source
from perceiver_ar.data.tokens import TokenFile
from perceiver_ar.errors import InputError

NAME = "hf://datasets/someone/stories"
TEXTS = [f"story {number}" for number in range(400)]


@pytest.fixture(autouse=True)
def stories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The dataset someone/stories, of four files and two splits."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)  # 5 s before each process could end
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "someone" / "stories" / "data"
    folder.mkdir(parents=True)
    for number in range(4):
        rows = datasets.Dataset.from_dict({"story": TEXTS[number::4], "number": list(range(100))})
        rows.to_parquet(folder / f"train-{number:05}-of-00004.parquet", batch_size=30)
    held_out = datasets.Dataset.from_dict({"story": [f"held out {n}" for n in range(9)], "number": [0] * 9})
    held_out.to_parquet(folder / "test-00000-of-00001.parquet")
    datasets.disable_progress_bars()
    yield folder
    datasets.enable_progress_bars()


def texts(folder: Path, path: str = NAME, max_bytes: int | None = None, seed: int = 0, rows: int = 100) -> list[str]:
    sources = find_rows(find_datasets([path], folder, "story", max_bytes, seed, rows), "story")
    return [b"".join(data).decode() for source in sources for _, data in source.documents(None)]


def test_every_row_comes_once_in_an_order_of_the_seed(tmp_path: Path) -> None:
    first, again, other = texts(tmp_path / "1"), texts(tmp_path / "2"), texts(tmp_path / "3", seed=1)
    assert sorted(first) == sorted(other) == sorted(TEXTS)
    assert first == again != other
    assert first != texts(tmp_path / "4", rows=400)  # shuffled over more rows
    assert len({text[-1] for text in first[:10]}) > 2  # of several files
    assert texts(tmp_path / "1") == first  # read from disk


def test_a_split_and_a_number_of_bytes(tmp_path: Path) -> None:
    assert sorted(texts(tmp_path, f"{NAME}/test")) == [f"held out {number}" for number in range(9)]
    assert texts(tmp_path, f"{NAME}:default/test", max_bytes=25) and len(texts(tmp_path, f"{NAME}:default/test")) == 3


def test_a_dataset_that_is_named_twice_is_read_once(tmp_path: Path) -> None:
    def names(*paths: str) -> list[Source]:
        return find_datasets(paths, tmp_path / "out", "story", 25, 0)

    once = names(NAME)
    assert names(NAME, f"{NAME}/train", NAME) == once
    assert len(names(NAME, f"{NAME}/test")) == 2


def test_rows_without_a_nested_column_are_skipped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [None, {"text": "one"}, None, {"text": "two"}]
    write_files(
        tmp_path / "someone/nested", {"train.jsonl": "".join(f"{json.dumps({'doc': row})}\n" for row in rows).encode()}
    )
    for size in (2, 4, 100):
        found = find_datasets(["hf://datasets/someone/nested"], tmp_path / f"{size}", "doc.text", None, 0, size)
        texts = [json.loads(line)["doc.text"] for source in found for line in source.path.read_text().splitlines()]
        assert sorted(texts) == ["one", "two"]
        said = capsys.readouterr().err
        assert sum(map(int, re.findall(r"skipped (\d) rows of hf://datasets/someone/nested without", said))) == 2
    with pytest.raises(InputError, match=r"has no column 'doc\.other'; set data\.column to one of doc"):
        find_datasets(["hf://datasets/someone/nested"], tmp_path / "other", "doc.other", None, 0)


def test_after_a_kill_the_rows_are_the_same(tmp_path: Path) -> None:
    folder = tmp_path / "killed"
    script = f"""
import datasets
from pathlib import Path
from perceiver_ar.data.hub import find_datasets
find_datasets(["{NAME}"], Path("{folder}"), "story", None, 0, rows=20)
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    with subprocess.Popen([sys.executable, "-c", script], env=environment, cwd=tmp_path) as process:
        while len(list(folder.glob("*/*.jsonl"))) < 3:
            assert process.poll() in (None, 0)
            time.sleep(0.002)
        process.kill()
    kept = content(folder)
    assert texts(folder, rows=20) == texts(tmp_path / "undisturbed", rows=20)
    names = sorted(name for name in kept if name.endswith("jsonl"))[:-1]  # the last may be written again
    assert names and all(content(folder)[name] == kept[name] for name in names)


@pytest.mark.parametrize(
    ("path", "column", "message"),
    [
        ("hf://datasets/stories", "story", "write hf://datasets/OWNER/NAME"),
        ("hf://someone/stories", "story", "write hf://datasets/OWNER/NAME"),
        (f"{NAME}/data/train.parquet", "story", "write hf://datasets/OWNER/NAME"),
        (f"{NAME}/nothing", "story", r"Bad split: nothing\. Available splits"),
        (f"{NAME}:nothing", "story", "nothing.* not found"),
        ("hf://datasets/someone/nothing", "story", "cannot read .*someone/nothing .*check its name and the network"),
        (NAME, "text", "has no column 'text'; set data.column to one of story, number"),
        (NAME, "number", "has 0 in column 'number', not text"),
    ],
)
def test_what_cannot_be_read_is_refused_in_one_line(tmp_path: Path, path: str, column: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        find_datasets([path], tmp_path / "out", column, None, 0)
    assert "\n" not in str(error.value)


def test_the_command_trains_on_a_dataset_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    column = ["--data.column=story", *SMALL, "--max_steps=1"]
    held_out = f"--data.validation={NAME}/test"
    assert main(["train", NAME, "--data.max_bytes=1000", held_out, "--out", "run", *column]) == 0
    assert TokenFile.open("run/tokens/validation").num_documents == 9
    assert 0 <= TokenFile.open("run/tokens/train").num_bytes - 1000 < 10
    assert not Path("run/tokens/downloads").exists()
    for argv, says in {
        ("train", NAME, "--modality=midi"): "of the Hub only text is read",
        ("train", "someone", "--data.max_bytes=10"): "data.max_bytes is for datasets that begin with hf://",
        ("train", f"{NAME}x"): "cannot read hf://datasets/someone/storiesx",
    }.items():
        assert_refused(capsys, *argv, "--out", "other", says=says)
        assert not Path("other").exists()
    assert_refused(capsys, "evaluate", "run", NAME, says="only `train` reads the Hub")

"""The command: what it prints where, its exit status, and that wrong input costs one clear line and nothing else.

`main` is called in this process; torch's import would take most of the time of each other one.
"""

import csv
import json
import math
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from perceiver_ar import PerceiverARConfig, Run, evaluate, generate
from perceiver_ar.cli import main

VERBS = ["train", "evaluate", "generate", "info"]
SMALL = [
    "--model.context_length=32", "--model.num_latents=8", "--model.dim=16", "--model.num_layers=1",
    "--model.num_heads=2", "--trainer.batch_size=4", "--trainer.precision=32", "--trainer.device=cpu",
    "--trainer.evaluations=1", "--trainer.evaluation_tokens=100", "--trainer.sample_tokens=0", "--max_steps=4",
]  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Threads cost models of this size more than they give."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three documents of some 600 bytes, with characters of two and three bytes."""
    folder = tmp_path_factory.mktemp("corpus")
    words, rng = ["the ", "cät ", "säß ", "on ", "a ", "€ ", "mat\n"], random.Random(0)
    for number in range(3):
        (folder / f"{number}.txt").write_text("".join(rng.choice(words) for _ in range(150)))
    return folder


@pytest.fixture(scope="module")
def finished(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, to read from."""
    run = tmp_path_factory.mktemp("finished") / "run"
    assert main(["train", str(corpus), "--out", str(run), *SMALL]) == 0
    return run


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A finished run, to change."""
    return shutil.copytree(finished, tmp_path / "run")


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def parameters(run: Path) -> dict[str, bytes]:
    return {name: tensor.numpy().tobytes() for name, tensor in load_file(run / "model.safetensors").items()}


def assert_refused(capsys: pytest.CaptureFixture[str], *argv: object, says: object) -> None:
    """Exit status 2, nothing on stdout, one line on stderr that holds `says`."""
    capsys.readouterr()
    status = main([str(word) for word in argv])
    captured = capsys.readouterr()
    assert (status, captured.out) == (2, "")
    assert captured.err.startswith("perceiver-ar: ")
    assert captured.err.count("\n") == 1 and captured.err.endswith("\n")
    assert str(says) in captured.err


# The command as a whole.


def test_help_comes_without_torch() -> None:
    program = "import sys; from perceiver_ar.cli import main; assert main(['--help']) == 0; sys.exit('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode == 0
    assert all(verb in result.stdout for verb in VERBS)


def test_the_command_is_a_module_whose_exit_status_is_that_of_main() -> None:
    result = subprocess.run([sys.executable, "-m", "perceiver_ar.cli", "fly"], capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == "perceiver-ar: there is no verb 'fly': use train, evaluate, generate, info\n"


def test_a_command_without_a_verb_shows_how_it_is_used(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "VERB" in capsys.readouterr().out


def test_version_is_the_packages(capsys: pytest.CaptureFixture[str]) -> None:
    from perceiver_ar import __version__

    assert main(["--version"]) == 0
    assert capsys.readouterr().out == __version__ + "\n"


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help_with_examples(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        main([verb, "--help"])
    assert exit.value.code == 0
    assert f"examples:\n  perceiver-ar {verb} " in capsys.readouterr().out


def test_the_help_of_train_has_every_setting_of_the_model(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    shown = capsys.readouterr().out
    assert all(f"--model.{name} " in shown for name in vars(PerceiverARConfig()))


# Wrong input.


WRONG = {
    "an unknown option": (["--colour", "blue"], "--colour"),
    "an abbreviated option": (["--max_step", "3"], "--max_step"),
    "an unknown setting": (["--model.depth", "3"], "--model.depth"),
    "a word for a number": (["--model.dim", "abc"], "model.dim"),
    "a fraction for a count": (["--model.num_layers", "1.5"], "model.num_layers"),
    "a context shorter than the latents": (["--model.context_length", "4"], "context_length 4"),
    "a width that heads do not divide": (["--model.dim", "17"], "dim 17 is not a multiple of num_heads 2"),
    "a duration that is none": (["--max_time", "soon"], "max_time is 'soon'"),
    "a duration without a unit": (["--max_time", "90"], "max_time is '90'"),
    "no time at all": (["--max_time", "0s"], "max_time is '0s'"),
    "no steps at all": (["--max_steps", "0"], "max_steps is 0"),
    "an unknown preset": (["--preset", "gpt5"], "gpt5"),
    "an unknown modality": (["--modality", "video"], "video"),
    "an unknown schedule": (["--optim.schedule", "zigzag"], "optim.schedule"),
    "an interval that is none": (["--trainer.checkpoint_every", "often"], "trainer.checkpoint_every is 'often'"),
    "micro-batches that do not fit": (["--trainer.micro_batch_size", "3"], "micro_batch_size 3"),
    "half precision on a CPU": (["--trainer.precision", "fp16"], "trainer.precision is fp16"),
    "a share of more than all": (["--data.validation_fraction", "1.5"], "data.validation_fraction is 1.5"),
    "two tokenizers": (["--data.tokenizer", "t.json", "--data.bpe_vocab_size", "300"], "choose one"),
    "a missing tokenizer": (["--data.tokenizer", "missing.json"], "missing.json"),
    "a missing config": (["--config", "missing.yaml"], "missing.yaml"),
    "missing files to hold out": (["--data.validation", "[missing.txt]"], "missing.txt"),
    "too long a context for the data": (["--model.context_length", "100000"], "context_length of at most"),
}


@pytest.mark.parametrize("name", WRONG)
def test_train_refuses_with_one_line_and_makes_nothing(
    name: str, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options, says = WRONG[name]
    assert_refused(capsys, "train", corpus, "--out", tmp_path / "run", *SMALL, *options, says=says)
    assert list(tmp_path.iterdir()) == []


def an_empty_folder(tmp_path: Path) -> Path:
    (tmp_path / "empty").mkdir()
    return tmp_path / "empty"


def an_empty_file(tmp_path: Path) -> Path:
    (tmp_path / "empty.txt").touch()
    return tmp_path / "empty.txt"


def binary(tmp_path: Path) -> Path:
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\r\n\x1a\n\xff\xfe" * 100)
    return tmp_path / "picture.png"


def a_damaged_archive(tmp_path: Path) -> Path:
    (tmp_path / "corpus.txt.gz").write_bytes(b"not gzip" * 100)
    return tmp_path / "corpus.txt.gz"


def a_few_words(tmp_path: Path) -> Path:
    (tmp_path / "short.txt").write_text("too short")
    return tmp_path / "short.txt"


def a_missing_file(tmp_path: Path) -> Path:
    return tmp_path / "missing.txt"


def a_pattern_that_matches_nothing(tmp_path: Path) -> Path:
    return tmp_path / "*.md"


def a_device(tmp_path: Path) -> Path:
    return Path("/dev/null")


def a_file_that_may_not_be_read(tmp_path: Path) -> Path:
    if os.geteuid() == 0:
        pytest.skip("root may read everything")
    (tmp_path / "secret.txt").write_text("secret " * 100)
    (tmp_path / "secret.txt").chmod(0)
    return tmp_path / "secret.txt"


@pytest.mark.parametrize(
    "bad_input",
    [
        an_empty_folder, an_empty_file, binary, a_damaged_archive, a_few_words, a_missing_file,
        a_pattern_that_matches_nothing, a_device, a_file_that_may_not_be_read,
    ],
    ids=lambda function: function.__name__.replace("_", " "),
)  # fmt: skip
def test_train_refuses_bad_files_names_them_and_makes_nothing(
    bad_input: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = bad_input(tmp_path)
    before = content(tmp_path)
    assert_refused(capsys, "train", path, "--out", tmp_path / "run", *SMALL, says=path.name)
    assert content(tmp_path) == before and not (tmp_path / "run").exists()


def test_train_without_out_is_refused(corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert_refused(capsys, "train", corpus, *SMALL, says="--out")


def test_a_run_that_exists_is_not_overwritten(
    run: Path, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = content(run)
    assert_refused(capsys, "train", corpus, "--out", run, *SMALL, says=f"{run} already exists")
    assert content(run) == before


def test_a_file_is_no_place_for_a_run(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("mine")
    assert_refused(capsys, "train", corpus, "--out", tmp_path / "file", *SMALL, says="already exists")
    assert_refused(capsys, "train", corpus, "--out", tmp_path / "file" / "run", *SMALL, says=tmp_path / "file")
    assert content(tmp_path) == {"file": b"mine"}

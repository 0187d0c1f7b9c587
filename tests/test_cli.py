"""The command: what it prints where, its exit status, and that wrong input costs one clear line and nothing else.

`main` is called in this process; torch's import would take most of the time of each other one.
"""

import contextlib
import csv
import io
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from helpers import SMALL, assert_refused, assert_same_parameters, content
from processes import Server
from safetensors.torch import load_file

from perceiver_ar import PerceiverAR, PerceiverARConfig, Run, evaluate, generate
from perceiver_ar.cli import main
from perceiver_ar.data.tokens import TokenFile
from perceiver_ar.evaluation import compressors
from perceiver_ar.training.metrics import read_metrics

VERBS = [
    *("train", "evaluate", "score", "embed", "scaling", "generate", "compress", "decompress", "serve"),
    *("info", "convert", "export", "push"),
]


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


# The command as a whole.


HELP = """
import atexit, sys
from perceiver_ar.cli import main

atexit.register(lambda: print("torch" in sys.modules))
main(sys.argv[1:])
"""


@pytest.mark.parametrize("verb", [[], ["train"]])
def test_help_comes_without_torch(verb: list[str]) -> None:
    result = subprocess.run([sys.executable, "-c", HELP, *verb, "--help"], capture_output=True, text=True)
    assert result.returncode == 0 and "perceiver-ar" in result.stdout
    assert result.stdout.endswith("False\n")


def test_the_command_is_a_module_whose_exit_status_is_that_of_main() -> None:
    result = subprocess.run([sys.executable, "-m", "perceiver_ar.cli", "fly"], capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == f"perceiver-ar: there is no verb 'fly': use {', '.join(VERBS)}\n"


def test_a_command_without_a_verb_shows_how_it_is_used(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "VERB" in capsys.readouterr().out


def test_version_is_the_packages(capsys: pytest.CaptureFixture[str]) -> None:
    from perceiver_ar import __version__

    assert main(["--version"]) == 0
    assert capsys.readouterr().out == __version__ + "\n"


def test_the_help_names_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"\n  {verb} " in shown for verb in VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help_with_examples(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        main([verb, "--help"])
    assert exit.value.code == 0
    assert f"examples:\n  perceiver-ar {verb} " in capsys.readouterr().out


def test_the_help_of_train_is_short_and_on_request_has_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["train", "--help=all"])
    everything = capsys.readouterr().out
    assert all(f"--model.{name} " in everything for name in vars(PerceiverARConfig()))
    assert "(required)" not in everything  # the files, for one, are not
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    short = capsys.readouterr().out
    assert all(f"\n  --{name} " in short for name in ("out", "max_time", "model.dim", "trainer.batch_size"))
    assert "--model.qk_norm" not in short and "--help=all" in short
    assert len(short.splitlines()) < 90


# Wrong input.


WRONG = {
    "an unknown option": (["--colour", "blue"], "--colour"),
    "an abbreviated option": (["--max_step", "3"], "--max_step"),
    "an unknown setting": (["--model.depth", "3"], "--model.depth"),
    "a word for a number": (["--model.dim", "abc"], "--model.dim is abc: it must be a whole number;"),
    "a word for a number or none": (
        ["--model.head_dim", "abc"],
        "--model.head_dim is abc: it must be a whole number or left out;",
    ),
    "a word for numbers": (["--model.cross_layers", "abc"], "--model.cross_layers is abc: it must be a list as [1,2];"),
    "a fraction for a count": (["--model.num_layers", "1.5"], "model.num_layers"),
    "a context shorter than the latents": (["--model.context_length", "4"], "context_length 4"),
    "a width that heads do not divide": (["--model.dim", "17"], "dim 17 is not a multiple of num_heads 2"),
    "a duration that is none": (["--max_time", "soon"], "max_time is 'soon'"),
    "a duration without a unit": (["--max_time", "45"], "max_time is '45': write a duration such as 45s, 5m"),
    "a text that looks like an option": (
        ["--data.split_on", "--"],
        "--data.split_on has no value; one that begins with a dash needs an equals sign, as in --data.split_on=-x",
    ),
    "a number with a comment": (["--max_steps", "3 #4"], "--max_steps is '3 #4': give the value without #"),
    "a fraction with a comment": (["--optim.lr=1e-3 # high"], "--optim.lr is '1e-3 # high'"),
    "a choice with a comment": (["--trainer.device", "cpu #1"], "--trainer.device is 'cpu #1'"),
    "a file to hold out with a comment in it": (["--data.validation", "a #1.txt"], "a #1.txt does not exist"),
    "a run whose name is not UTF-8": (["--out", "r\udce9"], "is not UTF-8 (byte 0xe9): give another --out"),
    "no time at all": (["--max_time", "0s"], "max_time is '0s'"),
    "no steps at all": (["--max_steps", "0"], "max_steps is 0"),
    "a number that is none": (["--optim.lr", "abc"], "--optim.lr is abc: it must be a number or left out"),
    "an unknown preset": (["--preset", "gpt5"], "gpt5"),
    "an unknown modality": (["--modality", "video"], "--modality is video: it must be auto or text or bytes or "),
    "an unknown schedule": (["--optim.schedule", "zigzag"], "optim.schedule"),
    "an interval that is none": (["--trainer.checkpoint_every", "often"], "trainer.checkpoint_every is 'often'"),
    "micro-batches that do not fit": (["--trainer.micro_batch_size", "3"], "micro_batch_size 3"),
    "half precision on a CPU": (["--trainer.precision", "fp16"], "trainer.precision is fp16"),
    "a share of more than all": (["--data.validation_fraction", "1.5"], "data.validation_fraction is 1.5"),
    "two tokenizers": (["--data.tokenizer", "t.json", "--data.bpe_vocab_size", "300"], "choose one"),
    "a missing tokenizer": (["--data.tokenizer", "missing.json"], "missing.json"),
    "a missing config": (["--config", "missing.yaml"], "missing.yaml"),
    "missing files to hold out": (["--data.validation", "[missing.txt]"], "missing.txt does not exist"),
    "a missing file to hold out": (["--data.validation", "missing.txt"], "missing.txt does not exist"),
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


def a_file_without_a_name(tmp_path: Path) -> str:
    return ""


def a_missing_file(tmp_path: Path) -> Path:
    return tmp_path / "missing.txt"


def a_pattern_that_matches_nothing(tmp_path: Path) -> Path:
    return tmp_path / "*.md"


def a_device(tmp_path: Path) -> Path:
    return Path("/dev/null")


def a_file_that_may_not_be_read(tmp_path: Path) -> Path:
    (tmp_path / "secret.txt").write_text("secret " * 100)
    (tmp_path / "secret.txt").chmod(0)
    return tmp_path / "secret.txt"


@pytest.mark.usefixtures("bound_by_modes")
@pytest.mark.parametrize(
    "bad_input",
    [
        an_empty_folder, an_empty_file, binary, a_damaged_archive, a_few_words, a_missing_file, a_file_without_a_name,
        a_pattern_that_matches_nothing, a_device, a_file_that_may_not_be_read,
    ],
    ids=lambda function: function.__name__.replace("_", " "),
)  # fmt: skip
def test_train_refuses_bad_files_names_them_and_makes_nothing(
    bad_input: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = bad_input(tmp_path)
    before = sorted(tmp_path.iterdir())
    name = Path(path).name
    says = {"empty.txt": "empty.txt is empty", "short.txt": "give more data", "": "an empty path"}.get(name, name)
    assert_refused(capsys, "train", path, "--out", tmp_path / "run", *SMALL, says=says)
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--model.dims=32"], "no option --model.dims (did you mean --model.dim?)"),
        (["--lr", "1"], "no option --lr (did you mean --optim.lr?)"),
        (["--max-steps", "1"], "no option --max-steps (did you mean --max_steps?)"),
        (["--epochs=3"], "no option --epochs;"),
        (["--config", "modle: {dim: 32}"], "no option modle.dim (did you mean model.dim?)"),
        (["--config", "optim: {muonlr: 1}"], "no option optim.muonlr (did you mean optim.muon_lr?)"),
        (["--config", "modle: 3"], "no option modle (did you mean model?)"),
    ],
)
def test_of_unknown_settings_the_nearest_known_one_is_named(
    options: list[str], says: str, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if options[0] == "--config":
        (tmp_path / "recipe.yaml").write_text(options[1])
        options = ["--config", str(tmp_path / "recipe.yaml")]
    assert_refused(capsys, "train", corpus, "--out", tmp_path / "run", *options, says=says)


@pytest.mark.parametrize(
    ("variables", "options", "names"),
    [
        ({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}, [], "RANK LOCAL_RANK WORLD_SIZE"),
        ({"RANK": "0", "WORLD_SIZE": "4"}, [], "WORLD_SIZE"),
        ({"LOCAL_RANK": "0"}, ["--trainer.devices=2"], "LOCAL_RANK"),
        ({"SLURM_NTASKS": "2", "SLURM_PROCID": "0"}, [], "SLURM_NTASKS"),
        ({"SLURM_PROCID": "3"}, [], "SLURM_PROCID"),
        ({"TORCHELASTIC_RUN_ID": "1"}, [], "TORCHELASTIC_RUN_ID"),
        ({"SLURM_NTASKS": "4", "SLURM_JOB_NAME": "x", "SLURM_STEP_ID": "0"}, [], "SLURM_STEP_ID"),
    ],
)
def test_variables_of_a_launcher_that_is_not_there_are_named(
    variables: dict[str, str], options: list[str], names: str, corpus: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert_refused(capsys, "train", corpus, "--out", tmp_path / "run", *SMALL, *options, says=f"`unset {names}`")
    assert list(tmp_path.iterdir()) == []


def test_variables_of_a_launcher_that_say_one_process_do_not_matter(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "SLURM_NTASKS": "1"}.items():
        monkeypatch.setenv(name, value)
    assert main(["train", str(corpus), "--out", str(tmp_path / "run"), *SMALL, "--max_steps=1"]) == 0


def test_files_whose_names_are_not_utf8(
    server: Server, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, run = tmp_path / "d\udcff", tmp_path / "run"
    shutil.copytree(corpus, folder)
    (folder / "2.txt").rename(tmp_path / "held \udce9 # out.txt")
    monkeypatch.chdir(tmp_path)
    held_out = ["--data.validation", "held \udce9 # out.txt"]
    assert main(["train", "d\udcff", "--out", "run", *held_out, *SMALL, "--max_steps=5"]) == 0
    assert (run / "report.html").exists()
    assert Run(run).recipe().paths == ("d\udcff",)
    assert main(["train", "--resume", "--out", "run", "--max_steps=6"]) == 0
    assert main(["train", "--config", "run/recipe.yaml", "--out", "again", "--max_steps=1"]) == 0
    assert json.loads((run / "summary.json").read_text())["steps"] == 6
    assert server.run("info", run) == 0 and b"d\\udcff" in server.stdout.read_bytes()


def test_a_tilde_is_the_home_directory(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert main(["train", str(corpus), "--out=~/run", *SMALL, "--max_steps=2"]) == 0
    assert main(["train", "--out=~/run", "--resume", "--max_steps=3"]) == 0
    assert main(["train", "--config=~/run/recipe.yaml", "--out", "~/again", "--max_steps=1"]) == 0
    assert main(["generate", "~/run", "--prompt_file=~/run/codec.json", "--out=~/text.txt", "--max_new_tokens=3"]) == 0
    assert {path.name for path in tmp_path.iterdir() if not path.name.startswith(".")} == {"run", "again", "text.txt"}


CLOSED = """
import os, sys
from perceiver_ar.cli import main

for descriptor, name in list(enumerate(("stdin", "stdout", "stderr")))[:count]:
    os.close(descriptor)
    setattr(sys, name, None)  # as Python does that is started so
    setattr(sys, f"__{name}__", None)
sys.exit(main(argv))
"""


def test_closed_streams_cost_nothing_but_what_they_would_carry(server: Server, finished: Path, tmp_path: Path) -> None:
    argv = ["generate", str(finished), "--prompt_file=-", "--max_new_tokens=9", "--out", str(tmp_path / "text.txt")]
    assert server.run(code=CLOSED, given={"argv": argv, "count": 2}) == 0
    assert re.fullmatch(r"\d+ tokens in .*\n", server.stderr.read_text())
    assert (tmp_path / "text.txt").exists()
    assert server.run(code=CLOSED, given={"argv": argv, "count": 3}) == 0


def test_numbers_in_a_recipe_are_those_of_a_config(run: Path, tmp_path: Path) -> None:
    for name in "one", "two":
        shutil.copytree(run, tmp_path / name)
        text = (run / "recipe.yaml").read_text()
        assert "muon_lr: 0.02" in text
        (tmp_path / name / "recipe.yaml").write_text(text.replace("muon_lr: 0.02", "muon_lr: 2e-2"))
    assert main(["train", "--out", str(tmp_path / "one"), "--resume", "--max_steps=61"]) == 0
    config = ["--config", str(tmp_path / "two" / "recipe.yaml"), "--max_steps=1"]
    assert main(["train", *config, "--out", str(tmp_path / "three")]) == 0
    assert Run(tmp_path / "three").recipe().optim.muon_lr == 0.02


def test_train_without_out_is_refused(corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert_refused(capsys, "train", corpus, *SMALL, says="--out")


def test_a_run_that_exists_is_not_overwritten(run: Path, corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = content(run)
    assert_refused(capsys, "train", corpus, "--out", run, *SMALL, says=f"{run} already exists")
    assert content(run) == before


def test_a_file_is_no_place_for_a_run(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("mine")
    assert_refused(capsys, "train", corpus, "--out", tmp_path / "file", *SMALL, says="already exists")
    assert_refused(capsys, "train", corpus, "--out", tmp_path / "file" / "run", *SMALL, says=tmp_path / "file")
    assert content(tmp_path) == {"file": b"mine"}


# Resuming.


def test_resuming_a_finished_run_says_so_and_changes_nothing(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = content(run)
    capsys.readouterr()
    assert main(["train", "--out", str(run), "--resume"]) == 0
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and f"{run} is finished (60 steps)" in captured.err
    assert json.loads(captured.out) == json.loads((run / "summary.json").read_text())
    assert content(run) == before


def test_resuming_with_more_steps_goes_on(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main(["train", "--out", str(run), "--resume", "--max_steps", "62"]) == 0
    assert json.loads(capsys.readouterr().out)["steps"] == 62
    assert Run(run).recipe().max_steps == 62


def test_a_run_can_be_moved_and_resumed_without_its_sources(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    moved = run.rename(tmp_path / "moved")
    (moved / "summary.json").unlink()
    assert main(["train", "--resume", "--out", "moved"]) == 0
    assert (moved / "summary.json").exists() and not run.exists()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--model.dim=32"], "model.dim changed from 16 to 32"),
        (["--model.prefix_dropout=0.5"], "model.prefix_dropout changed from 0.0 to 0.5"),
        (["--trainer.batch_size=8"], "trainer.batch_size changed from 4 to 8"),
        (["--trainer.short_prefix=0"], "trainer.short_prefix changed from 0.5 to 0.0"),
        (["--optim.lr=1", "--seed=1"], "seed changed from 0 to 1, optim.lr changed from None to 1.0: leave that out"),
        (["elsewhere"], "paths changed from"),
    ],
)
def test_resuming_with_other_settings_is_refused(
    run: Path, options: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = content(run)
    assert_refused(capsys, "train", *options, "--out", run, "--resume", "--max_steps=62", says=says)
    assert_refused(capsys, "train", "--preset=lucidrains", "--out", run, "--resume", "--max_steps=62", says="--preset")
    assert content(run) == before


def test_a_finished_run_that_has_lost_its_weights_does_not_begin_again(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(run / "checkpoints")
    (run / "model.safetensors").unlink()
    resume = "train", "--out", run, "--resume", "--max_steps=62"
    assert_refused(capsys, *resume, says="its weights and checkpoints are gone")


def test_a_trained_model_without_checkpoints_is_not_overwritten(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(run / "checkpoints")
    resume = "train", "--out", run, "--resume", "--max_steps=62"
    for change in (lambda: None, (run / "summary.json").unlink, (run / "checkpoints").mkdir):
        change()
        before = content(run)
        assert_refused(
            capsys,
            *resume,
            says=f"put {run / 'checkpoints'} back, or start a new run from its weights with --init_from {run} and",
        )
        assert content(run) == before
    (run / "model.safetensors").unlink()  # now there is nothing to lose
    assert main([str(word) for word in resume]) == 0


def test_a_run_killed_within_its_first_save_begins_again(run: Path, finished: Path) -> None:
    shutil.rmtree(run / "checkpoints")
    (run / "checkpoints").mkdir()
    (run / "checkpoints" / ".unfinished-step-000060.ckpt").write_bytes(b"PK")
    (run / "summary.json").unlink()
    assert main(["train", "--out", str(run), "--resume"]) == 0
    assert_same_parameters(run, finished)


def test_there_must_be_a_run_to_resume(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert_refused(capsys, "train", "--out", tmp_path / "none", "--resume", says=tmp_path / "none")
    assert_refused(capsys, "train", "--resume", says="--out")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "1.jpg").write_text("...")
    assert_refused(capsys, "train", "--out", tmp_path / "photos", "--resume", says=tmp_path / "photos")
    assert_refused(capsys, "train", "--out", tmp_path / "photos" / "1.jpg", "--resume", says="1.jpg")
    assert content(tmp_path) == {"photos/1.jpg": b"..."}


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-7])


def scramble(file: Path) -> None:
    file.write_bytes(b"\xff\x00\x9c{]: no" * 40)


def empty(file: Path) -> None:
    file.write_bytes(b"")


def remove(file: Path) -> None:
    file.unlink()


CHECKPOINT = "checkpoints/step-000060.ckpt"
RESUMED = ["recipe.yaml", "codec.json", CHECKPOINT, "tokens/train.json", "tokens/train.bin",
           "tokens/train.documents.npy", "tokens/validation.json", "tokens/validation.bin"]  # fmt: skip


@pytest.mark.parametrize("damage", [scramble, empty])
@pytest.mark.parametrize("name", RESUMED)
def test_resuming_names_the_damaged_file_and_changes_nothing(
    run: Path, name: str, damage: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(run / name)
    before = content(run)
    assert_refused(capsys, "train", "--out", run, "--resume", "--max_steps=62", says=run / name)
    assert content(run) == before


@pytest.mark.parametrize("name", [CHECKPOINT, "tokens/train.bin", "tokens/train.documents.npy"])
def test_resuming_notices_files_that_are_cut_short(run: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    cut(run / name)
    assert_refused(capsys, "train", "--out", run, "--resume", "--max_steps=62", says=run / name)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("- a\n- list\n", "recipe.yaml"),
        ("colour: blue\n", "unknown settings colour"),
        ("out: x\nmodel: {depth: 3}\n", "unknown settings model.depth"),
        ("out: x\ntrainer: {batchsize: 3}\n", "trainer.batchsize (did you mean trainer.batch_size?)"),
        ("out: x\nmodel: {dim: wide}\n", "dim"),
        ("out: x\nmodel: 3\n", "model"),
        ("out: x\nmodel: {num_heads: 3}\n", "num_heads 3"),
        ("out: x\nmax_steps: many\n", "max_steps"),
    ],
)
def test_resuming_names_what_is_wrong_with_a_recipe(
    run: Path, text: str, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (run / "recipe.yaml").write_text(text)
    assert_refused(capsys, "train", "--out", run, "--resume", says=says)


def test_a_checkpoint_of_something_else_is_refused(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"weights": torch.zeros(3)}, run / CHECKPOINT)
    assert_refused(capsys, "train", "--out", run, "--resume", "--max_steps=62", says=run / CHECKPOINT)


def flip(file: Path) -> None:
    """One bit in the middle."""
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize("damage", [flip, cut, empty, remove])
def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_goes_on(
    run: Path, finished: Path, damage: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "--out", str(run), "--resume", "--max_steps=62"]) == 0
    before = shutil.copytree(run, run.parent / "before")
    damage(run / "checkpoints" / "step-000062.ckpt")
    (run / "summary.json").unlink()
    capsys.readouterr()
    assert main(["train", "--out", str(run), "--resume"]) == 0
    [line] = [line for line in capsys.readouterr().err.splitlines() if "is damaged" in line]
    assert f"{run / 'checkpoints' / 'step-000062.ckpt'} is damaged" in line and "of step 60" in line
    assert_same_parameters(run, before)
    damage(run / CHECKPOINT)
    damage(run / "checkpoints" / "step-000062.ckpt")
    before = content(run)
    assert_refused(capsys, "train", "--out", run, "--resume", "--max_steps=64", says="no earlier one is intact")
    assert content(run) == before


def test_damaged_metrics_do_not_stop_a_run_that_is_resumed(run: Path) -> None:
    scramble(run / "metrics.csv")
    assert main(["train", "--out", str(run), "--resume", "--max_steps=62"]) == 0
    with open(run / "metrics.csv", newline="") as file:
        assert [row["step"] for row in csv.DictReader(file) if row["train_bits"]] == ["62"]
    assert (run / "metrics-before-1.csv").exists()


def test_metrics_that_a_spreadsheet_wrote_are_kept(run: Path) -> None:
    file = run / "metrics.csv"
    before = read_metrics(file)
    cells = before[1] | {"tokens": '"1,234"'}
    lines = file.read_text().splitlines()
    lines[2] = ",".join(cells.values())
    file.write_text("\ufeff" + "\n".join(lines) + "\n", encoding="utf-8")
    assert main(["train", "--out", str(run), "--resume", "--max_steps=62"]) == 0
    after = read_metrics(file)
    assert after[: len(before) - 1] == [row for row in before if row is not before[1]]
    assert after[-1]["step"] == "62" and not list(run.glob("metrics-before*"))


def test_resuming_refuses_other_paths_in_a_file(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.yaml").write_text("paths: [elsewhere]\n")
    args = ["train", "--config", str(tmp_path / "mine.yaml"), "--out", str(run), "--resume", "--max_steps=62"]
    assert main(args) == 2
    assert "elsewhere" in capsys.readouterr().err
    (tmp_path / "mine.yaml").write_text("preset: laptop\n")  # as in a job that begins or goes on
    assert main(args) == 0
    said = f"preset in {tmp_path / 'mine.yaml'} changes nothing: --resume goes on with the same model"
    assert said in capsys.readouterr().err


def test_a_prompt_file_is_not_overwritten(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "story.txt").write_text("Once upon a time")
    story = str(tmp_path / "story.txt")
    assert main(["generate", str(run), "--prompt_file", story, "--out", story, "--max_new_tokens", "2"]) == 2
    assert "story.txt is among the files that are read" in capsys.readouterr().err
    assert (tmp_path / "story.txt").read_text() == "Once upon a time"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A directory of its own with room for a megabyte."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("mounting a small disk is not permitted here")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


def test_no_space_left_for_the_tokens_leaves_nothing(
    small_disk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "big.txt").write_text("tell me more " * 120_000)
    argv = "train", tmp_path / "big.txt", "--out", small_disk / "run", *SMALL
    assert_refused(capsys, *argv, says="No space left on device")
    assert list(small_disk.iterdir()) == []


@pytest.mark.parametrize("room", [20_000, 100_000], ids=["for nothing", "for the weights"])
def test_no_space_left_for_a_checkpoint_leaves_the_last_one(
    small_disk: Path, corpus: Path, room: int, capsys: pytest.CaptureFixture[str]
) -> None:
    run = small_disk / "run"
    assert main(["train", str(corpus), "--out", str(run), *SMALL]) == 0
    before = (run / CHECKPOINT).read_bytes()
    filler = small_disk / "filler"
    filler.write_bytes(bytes(shutil.disk_usage(small_disk).free - room))
    assert_refused(capsys, "train", "--out", run, "--resume", "--max_steps=62", says=run)
    assert (run / CHECKPOINT).read_bytes() == before
    assert len(list((run / "checkpoints").iterdir())) == 2  # nothing half made takes the room
    filler.unlink()
    assert main(["train", "--out", str(run), "--resume"]) == 0
    assert json.loads((run / "summary.json").read_text())["steps"] == 62


def test_a_disk_that_is_full_for_a_while_costs_checkpoints_but_not_the_run(
    small_disk: Path, corpus: Path, tmp_path: Path
) -> None:
    run, filler = small_disk / "run", small_disk / "filler"
    command = ["train", str(corpus), *SMALL, "--optim.schedule=constant", "--optim.warmup=0"]
    assert main([*command, "--out", str(run)]) == 0
    filler.write_bytes(bytes(shutil.disk_usage(small_disk).free - 20_000))

    class Watched(io.StringIO):
        """Makes room on the disk as soon as the run says that it has none."""

        def write(self, text: str) -> int:
            if "cannot save" in text:
                filler.unlink()
            return super().write(text)

    options = ["--max_steps=150", "--trainer.checkpoint_every=0.1s", "--trainer.evaluations=0"]
    with contextlib.redirect_stderr(Watched()) as stderr:
        assert main(["train", "--out", str(run), "--resume", *options]) == 0
    assert stderr.getvalue().count("cannot save") == 1 and "cannot save (No space left on" in stderr.getvalue()
    assert "the last good checkpoint is that of step 60, continuing" in stderr.getvalue()
    again = tmp_path / "again"
    assert main([*command, "--out", str(again), *options]) == 0
    assert_same_parameters(run, again)
    steps = [int(row["step"]) for row in csv.DictReader((run / "metrics.csv").read_text().splitlines())]
    assert steps == sorted(set(steps)) and steps[-1] == 150


# Starting from a trained run.


def test_a_run_starts_from_another_one(finished: Path, corpus: Path, tmp_path: Path, capsys: Any) -> None:
    run, rest = tmp_path / "run", SMALL[-7:-1]
    standing = ["--optim.lr=0", "--optim.muon_lr=0", "--max_steps=2", "--data.validation", str(corpus / "1.txt")]
    argv = ["train", str(corpus / "0.txt"), "--init_from", str(finished), "--out", str(run), *rest, *standing]
    assert main([*argv, "--model.dim=16", "--model.context_length=64", "--model.prefix_dropout=0.1"]) == 0
    assert_same_parameters(run, finished)
    recipe = Run(run).recipe()
    assert recipe.init_from == str(finished)
    sizes = {"context_length": 64, "prefix_dropout": 0.1}
    assert recipe.model == Run(finished).recipe().model.replace(**sizes)
    start = json.loads(capsys.readouterr().out)["nats_per_token"]
    assert main(["evaluate", str(run), str(corpus / "1.txt"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["nats_per_token"] == pytest.approx(start, rel=1e-6)
    shutil.rmtree(run / "checkpoints")  # now it cannot be resumed, but started from
    assert main([*argv[:2], "--init_from", str(run), "--out", str(tmp_path / "further"), *rest, *standing]) == 0
    assert_same_parameters(tmp_path / "further", finished)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--model.dim=512"], "model.dim is 512 instead of 16: leave out model.dim or give the same value"),
        (["--model.context_length=64", "--model.head_dim=4"], "model.head_dim is 4 instead of None: leave out"),
        (["--modality=midi"], "modality is 'midi' instead of 'text'"),
        (["--data.bpe_vocab_size=300"], "data.bpe_vocab_size is 300 instead of no tokenizer"),
        (["--data.image_size=[8,8]"], "data.image_size is (8, 8) instead of (32, 32)"),
        (["--preset=paper"], "--init_from takes the network of a run, so --preset changes nothing"),
        (["--config=RECIPE"], "model.num_layers is 2 instead of 1"),
        (["--out=SOURCE"], "init_from and out are both"),
        (["--out=SOURCE", "--resume"], "so --init_from changes nothing: leave it out"),
        (["--init_from=owner/name"], "hf download OWNER/NAME --local-dir NAME"),
        (["--init_from="], "init_from is empty"),
    ],
)
def test_what_contradicts_the_run_to_start_from_is_refused_and_makes_nothing(
    options: list[str], says: str, finished: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "recipe.yaml").write_text("model: {dim: 16, num_layers: 2}")
    options = [option.replace("SOURCE", str(finished)) for option in options]
    options = [option.replace("RECIPE", str(tmp_path / "recipe.yaml")) for option in options]
    before = content(finished)
    argv = ["train", corpus, "--init_from", finished, "--out", tmp_path / "run", "--max_steps=1", *options]
    assert_refused(capsys, *argv, says=says)
    assert not (tmp_path / "run").exists() and content(finished) == before


# Recipes.


def test_training_a_recipe_again_reproduces_the_run(finished: Path, tmp_path: Path) -> None:
    again = tmp_path / "again"
    assert main(["train", "--config", str(finished / "recipe.yaml"), "--out", str(again)]) == 0
    assert_same_parameters(again, finished)
    first, second = (yaml.safe_load((path / "recipe.yaml").read_text()) for path in (finished, again))
    assert second == first | {"out": str(again)}


def test_options_after_a_config_win(finished: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    argv = ["train", "--config", str(finished / "recipe.yaml"), "--out", str(other), "--model.dim=32", "--max_steps=1"]
    assert main(argv) == 0
    recipe = Run(other).recipe()
    assert (recipe.model.dim, recipe.model.num_latents, recipe.max_steps) == (32, 8, 1)


def test_several_files_of_settings_add_up(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "paths.yaml").write_text(f"paths: ['{corpus}']\nseed: 7\n")
    (tmp_path / "more.yaml").write_text("max_steps: 1\nseed: 8\n")
    configs = [f"--config={tmp_path / name}.yaml" for name in ("paths", "more")]
    small = [option for option in SMALL if not option.startswith("--max_steps")]
    assert main(["train", *configs, "--out", str(tmp_path / "run"), *small]) == 0
    recipe = Run(tmp_path / "run").recipe()
    assert (recipe.paths, recipe.seed, recipe.max_steps) == ((str(corpus),), 8, 1)


def test_a_preset_beside_all_settings_of_the_network_is_refused(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["train", "--config", finished / "recipe.yaml", "--out", tmp_path / "run"]
    assert_refused(capsys, *command, "--preset=laptop", says="leave out the preset: the --config file has every")
    (tmp_path / "settings.yaml").write_text("preset: [laptop]\n")
    assert_refused(capsys, "train", "--config", tmp_path / "settings.yaml", says="there is no preset")


def test_a_file_of_settings_may_name_a_preset(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "settings.yaml").write_text("preset: laptop\nmax_steps: 1\nmodel: {dim: 32}\n")
    small = [option for option in SMALL if not option.startswith(("--model", "--max_steps"))]
    config = ["--config", str(tmp_path / "settings.yaml"), "--model.num_layers=1"]
    assert main(["train", str(corpus), "--out", str(tmp_path / "run"), *small, *config]) == 0
    model = Run.open(tmp_path / "run").model().config
    sizes = {"vocab_size": model.vocab_size, "num_layers": 1, "dim": 32}
    assert model == PerceiverARConfig.preset("laptop", **sizes)


def test_a_preset_sets_the_model_and_options_win(corpus: Path, tmp_path: Path) -> None:
    options = ["--preset", "lucidrains", "--max_steps=1", "--model.rotary_fraction=0.25"]
    assert main(["train", str(corpus), "--out", str(tmp_path / "run"), *SMALL, *options]) == 0
    model = Run(tmp_path / "run").recipe().model
    sizes = {"context_length": 32, "num_latents": 8, "dim": 16, "num_layers": 1, "num_heads": 2}
    assert model == PerceiverARConfig.preset("lucidrains", **sizes, rotary_fraction=0.25)


@pytest.mark.parametrize(
    ("settings_", "says"),
    [
        ("model: [1, 2]", "model is [1, 2]: it must be a group of settings"),
        ("trainer: 3", "trainer is 3: it must be a group of settings"),
        ("paths: 3", "paths is 3: it must be names of files or folders"),
        ("paths: [1]", "paths is [1]: it must be names of files or folders"),
        ("max_time: 45", "--max_time is 45: give a unit, as in 45s"),
        ("trainer: {checkpoint_every: 45}", "--trainer.checkpoint_every is 45: give a unit, as in 45s"),
        ("max_steps: [1]", "--max_steps is [1]: it must be a whole number or left out"),
        ("data: {validation: 5}", "--data.validation is 5: it must be a list as [1,2] or text"),
    ],
)
def test_settings_of_another_kind_in_a_config_are_refused(
    settings_: str, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.yaml").write_text(settings_)
    assert_refused(capsys, "train", "--config", tmp_path / "mine.yaml", "--out", tmp_path / "run", says=says)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.yaml"]


def test_options_of_evaluate_in_a_config_have_kinds_too(
    finished: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "options.yaml"
    for options, says in {"paths: 3": "paths is 3", "run: [1]": "--run is [1]: it must be text"}.items():
        file.write_text(options)
        assert_refused(capsys, "evaluate", finished, "--config", file, says=says)
    results = []
    for paths in (corpus / "0.txt", [str(corpus / "0.txt")]):
        file.write_text(f"paths: {paths}")
        assert main(["evaluate", str(finished), "--config", str(file), "--json"]) == 0
        results.append(json.loads(capsys.readouterr().out)["nats_per_token"])
    assert results[0] == results[1]


def test_paths_in_a_config_may_be_one(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(f"paths: {corpus}\n")
    argv = ["train", "--config", str(tmp_path / "config.yaml"), "--out", str(tmp_path / "run"), *SMALL]
    assert main([*argv, "--max_steps=1"]) == 0
    assert Run(tmp_path / "run").recipe().paths == (str(corpus),)


@pytest.mark.parametrize("text", [b"\xff\xfe", b"{]", b"colour: blue", b"model: {depth: 2}", b"max_steps: many"])
def test_a_config_that_does_not_fit_is_refused(
    text: bytes, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.yaml").write_bytes(text)
    argv = "train", corpus, "--config", tmp_path / "config.yaml", "--out", tmp_path / "run"
    assert_refused(capsys, *argv, says="")
    assert not (tmp_path / "run").exists()


def test_print_config_prints_a_recipe_that_trains(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit:
        main(["train", str(corpus), "--out", str(tmp_path / "run"), *SMALL, "--print_config"])
    assert exit.value.code == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert shown["model"]["num_latents"] == 8
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(shown))
    assert main(["train", "--config", str(tmp_path / "recipe.yaml"), "--max_steps=1"]) == 0
    assert Run(tmp_path / "run").recipe().paths == (str(corpus),)


def test_a_run_may_train_its_own_tokenizer(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    assert main(["train", str(corpus), "--out", str(run), *SMALL, "--data.bpe_vocab_size=270"]) == 0
    assert Run(run).recipe().model.vocab_size == Run(run).codec().vocab_size <= 270
    capsys.readouterr()
    assert main(["evaluate", str(run), str(corpus / "0.txt"), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["bytes"] == (corpus / "0.txt").stat().st_size > shown["tokens"]
    assert shown["bits_per_byte"] == pytest.approx(shown["bits_per_token"] * shown["tokens"] / shown["bytes"])
    assert generated(capsys, run, "--prompt=the c", "--temperature=0", "--max_new_tokens=3").strip()


# Evaluating.


def test_evaluate_prints_one_json_object_that_equals_the_api(
    finished: Path, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for paths in ([], [str(corpus / "0.txt")]):
        capsys.readouterr()
        assert main(["evaluate", str(finished), *paths, "--json"]) == 0
        shown = json.loads(capsys.readouterr().out)
        run = Run(finished)
        codec = run.codec()
        if paths:
            tokens = np.array([0, *(corpus / "0.txt").read_bytes()])
        else:
            tokens = np.fromfile(finished / "tokens" / "validation.bin", dtype=np.uint8)
        expected = evaluate(run.model(), tokens, byte_lengths=codec.byte_lengths()).to_dict()
        del shown["seconds"], expected["seconds"]
        assert shown == expected
        assert shown["tokens"] == len(tokens) - 1
        assert 0 < shown["bits_per_byte"] < 10


def test_stride_one_is_the_naive_loop(finished: Path, corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main(["evaluate", str(finished), str(corpus / "0.txt"), "--stride=1", "--max_tokens=60", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    model, tokens = Run(finished).model(), torch.tensor([0, *(corpus / "0.txt").read_bytes()])
    nats = []
    with torch.no_grad():
        for target in range(1, 61):
            context = tokens[max(0, target - 32) : target]
            logits = model(context[None])[0, -1].double()
            nats.append(-logits.log_softmax(-1)[tokens[target]].item())
    assert shown["tokens"] == 60
    assert shown["nats_per_token"] == pytest.approx(sum(nats) / 60, abs=1e-6)
    assert shown["perplexity"] == pytest.approx(math.exp(sum(nats) / 60), rel=1e-6)


def test_evaluate_without_json_shows_the_same_numbers(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main(["evaluate", str(finished), "--json"]) == 0
    exact = json.loads(capsys.readouterr().out)
    assert main(["evaluate", str(finished)]) == 0
    shown = capsys.readouterr().out
    assert f"bits per byte    {exact['bits_per_byte']:.4f}\n" in shown
    assert f"tokens scored    {exact['tokens']:,}\n" in shown


def test_context_lengths_give_a_table_a_csv_and_a_picture(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main(["evaluate", str(run), "--context_lengths", "8,16,32"]) == 0
    shown = capsys.readouterr().out.splitlines()
    with open(run / "plots" / "context.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["context_length"] for row in rows] == ["8", "16", "32"]
    assert len({row["tokens"] for row in rows}) == 1
    for row, line in zip(rows, shown[1:4], strict=True):
        assert line.split() == [row["context_length"], *(f"{float(row[name]):.4f}" for name in
                                ("bits_per_byte", "bits_per_token"))]  # fmt: skip
    scored = TokenFile.open(run / "tokens" / "validation").tokens[32:][: int(rows[0]["tokens"])]
    assert {name: float(bits) for name, bits in map(str.split, shown[4:])} == pytest.approx(
        compressors(Run(run).codec(), scored), abs=1e-4
    )
    assert (run / "plots" / "context.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert main(["evaluate", str(run), "--context_lengths", "8,16", "--json"]) == 0
    assert [row["context_length"] for row in json.loads(capsys.readouterr().out)["context_lengths"]] == [8, 16]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["missing.txt"], "missing.txt"),
        (["--stride", "0"], "stride is 0"),
        (["--stride", "9"], "stride is 9"),
        (["--num_latents", "99"], "num_latents is 99"),
        (["--max_tokens", "0"], "max_tokens is 0"),
        (["--batch_size", "0"], "batch_size is 0"),
        (["--context_lengths", "8,many"], "--context_lengths is '8,many'"),
        (["--context_lengths", "64"], "context_length is 64"),
        (["--context_lengths", "0"], "context_length is 0"),
        (["--context_lengths", ""], "--context_lengths is ''"),
        (["--temperature", "1"], "--temperature"),
        ([sys.executable], "use a run that was trained with --modality bytes"),
        (["--context_lengths", "1000000"], "context_length is 1000000"),
        (["--stride", "half"], "stride"),
    ],
)
def test_evaluate_refuses_with_one_line(
    finished: Path, options: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert_refused(capsys, "evaluate", finished, *options, says=says)


def test_evaluate_says_when_nothing_was_held_out(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "tokens" / "validation.json").unlink()
    assert_refused(capsys, "evaluate", run, says="held nothing out")


# Generating.


def generated(capsys: pytest.CaptureFixture[str], run: Path, *options: str) -> str:
    capsys.readouterr()
    assert main(["generate", str(run), *options]) == 0
    return capsys.readouterr().out


def test_a_seed_repeats_the_text_and_another_changes_it(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, again, other = (generated(capsys, finished, "--max_new_tokens=40", f"--seed={n}") for n in (1, 1, 2))
    assert first == again != other


def test_temperature_zero_is_the_likeliest_continuation(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = generated(capsys, finished, "--prompt=the c", "--temperature=0", "--max_new_tokens=20")
    run = Run(finished)
    prompt = torch.tensor([[0, *b"the c"]])
    ids = generate(run.model(), prompt, 20, temperature=0.0, stop_tokens=[0])
    assert text == bytes(ids[0].tolist()).decode(errors="replace") + "\n"


def test_the_file_holds_what_stdout_shows_and_statistics_go_to_stderr(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "text.txt"
    argv = ["generate", str(finished), "--seed=3", "--max_new_tokens=60", "--out", str(out)]
    capsys.readouterr()
    assert main(argv) == 0
    captured = capsys.readouterr()
    assert captured.out == out.read_text(errors="replace") + "\n"
    assert re.fullmatch(r"\d+ tokens in [\d.]+ s, [\d.]+ tokens/s\n", captured.err)


def test_samples_of_text_come_one_after_the_other_each_that_of_the_next_seed(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options, out = ["--max_new_tokens=30", "--ignore_end"], tmp_path / "text.txt"
    alone = [generated(capsys, finished, *options, f"--seed={seed}") for seed in (5, 6, 7)]
    assert generated(capsys, finished, *options, "--seed=5", "--samples=3", f"--out={out}") == "\n".join(alone)
    written = [(tmp_path / f"text-{number}.txt").read_text(errors="replace") for number in (1, 2, 3)]
    assert written == [text.removesuffix("\n") for text in alone] and not out.exists()


def test_options_may_stand_in_a_file_and_those_after_it_win(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "options.yaml"
    file.write_text("prompt: the c\ntemperature: 0\nmax_new_tokens: 7\n")
    options = "--prompt=the c", "--temperature=0"
    assert generated(capsys, finished, f"--config={file}") == generated(
        capsys, finished, *options, "--max_new_tokens=7"
    )
    assert generated(capsys, finished, f"--config={file}", "--max_new_tokens=3") == generated(
        capsys, finished, *options, "--max_new_tokens=3"
    )
    file.write_text("stride: 2\nmax_tokens: 50\n")
    capsys.readouterr()
    assert main(["evaluate", str(finished), "--config", str(file), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["stride"] == 2
    file.write_text("colour: blue\n")
    assert_refused(capsys, "generate", finished, "--config", file, says="colour")


def test_a_prompt_file_is_the_prompt(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "prompt.txt").write_text("the cät s")
    options = "--temperature=0", "--max_new_tokens=12"
    from_file = generated(capsys, finished, "--prompt_file", str(tmp_path / "prompt.txt"), *options)
    assert from_file == generated(capsys, finished, "--prompt=the cät s", *options)
    assert from_file != generated(capsys, finished, "--prompt=the c", *options)
    with open(tmp_path / "prompt.txt") as piped:
        monkeypatch.setattr(sys, "stdin", piped)
        assert from_file == generated(capsys, finished, "--prompt_file=-", *options)


def test_a_prompt_file_that_is_no_text_is_refused(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "prompt.txt").write_text("the cat sat", encoding="utf-16-le")
    says = f"--prompt_file {tmp_path / 'prompt.txt'} is UTF-16 or UTF-32, not UTF-8 text; save it as UTF-8"
    assert_refused(capsys, "generate", finished, "--prompt_file", tmp_path / "prompt.txt", says=says)


def knows_single_bytes() -> PerceiverAR:
    """A network whose head reads the last byte, one-hot."""
    settings: dict[str, Any] = {"num_layers": 0, "cross_layers": (), "local_context": 1}
    model = PerceiverAR(PerceiverARConfig(dim=256, context_length=32, num_latents=8, **settings))
    with torch.no_grad():
        model.embed.weight.copy_(torch.eye(256))
    return model


@pytest.fixture
def cycle(run: Path) -> Path:
    """A run whose model knows one text by heart and writes it again and again: "aé€😀"."""
    text = "aé€😀".encode()
    model = knows_single_bytes()
    with torch.no_grad():
        for byte, following in zip(text, text[1:] + text[:1], strict=True):
            model.head.weight[following, byte] = 1.0
    model.save_pretrained(run)
    return run


YAML_HAS_NONE = ["# The quick sort", "#include", "null", "NULL", "~", " # ", "a: b", "[a]", "'a'"]
"""Texts that are something else, many of them nothing, when YAML reads them."""


@pytest.fixture
def successor(run: Path) -> Path:
    """A run whose model writes the byte after the last one: c after b."""
    model = knows_single_bytes()
    with torch.no_grad():
        model.head.weight.copy_(torch.eye(256).roll(1, 0))
    model.save_pretrained(run)
    return run


@pytest.mark.parametrize("text", YAML_HAS_NONE)
def test_text_given_as_an_option_is_that_text(
    text: str, successor: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options, following = ["--temperature=0", "--max_new_tokens=1"], chr(ord(text[-1]) + 1) + "\n"
    monkeypatch.chdir(tmp_path)
    assert generated(capsys, successor, "--prompt", text, *options) == following
    assert generated(capsys, successor, f"--prompt={text}", f"--out=./{text}", *options) == following
    assert (tmp_path / text).read_text() == following[0]
    (tmp_path / "options.yaml").write_text(yaml.safe_dump({"prompt": text}))
    assert generated(capsys, successor, "--config=options.yaml", *options) == following
    assert generated(capsys, successor, "--prompt=!", "--temperature=0", "--stop=#") == '"#\n'
    (tmp_path / "options.yaml").write_text("prompt: null\nstop:\n")
    assert generated(capsys, successor, "--config=options.yaml", *options) == "\x01\n"


@pytest.mark.parametrize("mark", ["# ", "~", "null"])
def test_text_in_a_recipe_is_that_text(mark: str, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text(mark.join(f"note {number}, and more\n" for number in range(20)))
    argv = ["train", str(tmp_path / "notes.txt"), *SMALL, "--max_steps=1"]
    assert main([*argv, "--data.split_on", mark, "--out", str(tmp_path / "one")]) == 0
    assert main(["train", "--config", str(tmp_path / "one" / "recipe.yaml"), "--out", str(tmp_path / "two")]) == 0
    assert main(["train", "--resume", "--out", str(tmp_path / "two"), "--max_steps=2"]) == 0
    for run in Run(tmp_path / "one"), Run(tmp_path / "two"):
        assert run.recipe().data.split_on == mark
        parts = [json.loads((run.tokens / f"{name}.json").read_text()) for name in ("train", "validation")]
        assert sum(part["num_documents"] for part in parts) == 20


def test_characters_of_several_bytes_come_whole(cycle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = "--prompt=a", "--temperature=0"
    assert generated(capsys, cycle, *options, "--max_new_tokens=20") == "é€😀aé€😀a\n"
    assert generated(capsys, cycle, *options, "--max_new_tokens=4") == "é\N{REPLACEMENT CHARACTER}\n"


def test_text_ends_with_the_stop_text(cycle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = "--prompt=a", "--temperature=0"
    assert generated(capsys, cycle, *options, "--stop=😀") == "é€😀\n"
    assert generated(capsys, cycle, *options, "--stop=aé") == "é€😀aé\n"
    assert generated(capsys, cycle, *options, "--stop=a") == "é€😀a\n"


def test_text_ends_with_the_stop_text_within_a_token(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, out = tmp_path / "run", tmp_path / "text.txt"
    assert main(["train", str(corpus), "--out", str(run), *SMALL, "--data.bpe_vocab_size=300"]) == 0
    codec = Run(run).codec()
    whole = generated(capsys, run, "--seed=1", "--max_new_tokens=60").removesuffix("\n")
    long = next(
        text
        for text in (codec.decode([i]).decode(errors="replace") for i in codec.encode(whole.encode()))
        if len(text) > 1
    )
    stop = long[0]
    text = generated(capsys, run, "--seed=1", "--max_new_tokens=60", "--stop", stop, "--out", str(out)).removesuffix(
        "\n"
    )
    assert text == whole[: whole.index(stop) + 1] == out.read_text()


def test_bfloat16_and_sliding_write_text_too(cycle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = "--prompt=a", "--temperature=0", "--max_new_tokens=20"
    assert generated(capsys, cycle, *options, "--precision=bf16", "--slide") == "é€😀aé€😀a\n"


def test_a_reader_that_goes_away_ends_the_text_quietly(
    cycle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        assert main(["generate", str(cycle), "--prompt=a"]) == 0
    assert capsys.readouterr().err == ""


def test_an_interrupt_keeps_what_was_written(cycle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "text.txt"
    capsys.readouterr()
    threading.Timer(1.0, os.kill, [os.getpid(), signal.SIGINT]).start()
    argv = ["generate", str(cycle), "--prompt=a", "--temperature=0", "--max_new_tokens=1000000000", "--out", str(out)]
    assert main(argv) == 130
    captured = capsys.readouterr()
    assert captured.out.startswith("é€😀aé€😀") and captured.out == out.read_text(errors="replace") + "\n"
    assert captured.err.splitlines()[-1].startswith("perceiver-ar: interrupted")


def test_weights_that_give_no_first_token_cost_no_text_of_before(
    cycle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = PerceiverAR.from_pretrained(cycle)
    torch.nn.init.constant_(model.head.weight, math.nan)
    model.save_pretrained(cycle)
    out = tmp_path / "text.txt"
    out.write_text("before")
    assert_refused(capsys, "generate", cycle, "--out", out, says="the model's weights give NaN")
    assert out.read_text() == "before"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--prompt", "a", "--prompt_file", "b"], "--prompt and --prompt_file"),
        (["--prompt_file", "missing.txt"], "missing.txt"),
        (["--temperature", "-1"], "temperature is -1"),
        (["--temperature", "inf"], "temperature"),
        (["--prompt", "caf\udce9"], "--prompt is not UTF-8 text (byte 0xe9 at offset 3)"),
        (["--prompt_file", sys.executable], f"--prompt_file {sys.executable} is not UTF-8 text"),
        (["--prompt_file", "/"], "--prompt_file / is a folder"),
        (["--out", "/"], "--out / is a folder"),
        (["--keep", "1e400"], "--keep is inf"),
        (["--soundfont", "missing.sf2"], "the soundfont missing.sf2 does not exist"),
        (["--top_k", "0"], "top_k is 0"),
        (["--top_p", "2"], "top_p is 2"),
        (["--max_new_tokens", "-1"], "max_new_tokens is -1"),
        (["--max_new_tokens", "many"], "--max_new_tokens is many: it must be a whole number or left out;"),
        (["--temperature", "hot"], "--temperature is hot: it must be a number;"),
        (["--repetition_penalty", "0"], "repetition_penalty is 0"),
        (["--frequency_penalty", "inf"], "frequency_penalty"),
        (["--refill_latents", "9"], "refill_latents is 9: it must be a whole number in 1 ... 8"),
        (["--stop", ""], "--stop '' cannot be encoded"),
        (["--stop", "a\udcff"], "cannot be encoded"),
        (["--samples", "0"], "--samples is 0: it must be at least 1"),
        (["--precision", "int4"], "--precision"),
        (["--promt", "a"], "--promt"),
    ],
)
def test_generate_refuses_with_one_line(
    finished: Path, options: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert_refused(capsys, "generate", finished, *options, says=says)


# Describing.


def test_info_shows_what_the_run_is(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main(["info", str(finished), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["parameters"] == sum(tensor.numel() for tensor in load_file(finished / "model.safetensors").values())
    assert (facts["context_length"], facts["num_latents"], facts["dim"], facts["steps"]) == (32, 8, 16, 60)
    assert (facts["finished"], facts["codec"]) == (True, "bytes")
    assert facts["ended_by"] == "max_steps, at step 60 of 60 steps"
    assert Path(facts["trained_on"][0]).is_dir()
    assert main(["info", str(finished)]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in shown] == [name.replace("_", " ") for name in facts]


def test_info_says_why_a_run_has_stopped_before_its_first_checkpoint(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    diverging = ["--optim.name=adamw", "--optim.lr=1e30", "--optim.warmup=0", "--optim.grad_clip=0"]
    assert main(["train", str(corpus), "--out", str(run), *SMALL, *diverging]) == 2
    assert main(["info", str(run)]) == 0
    assert re.search(r"^stopped +training diverged: ", capsys.readouterr().out, re.MULTILINE)


def test_info_says_why_an_unfinished_run_has_stopped(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "summary.json").unlink()
    (run / "stopped.txt").write_text("stopped at step 60, everything saved\n")
    assert main(["info", str(run)]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"^stopped +stopped at step 60, everything saved$", shown, re.MULTILINE)
    assert re.search(r"^last checkpoint at step +60$", shown, re.MULTILINE)
    assert main(["train", "--out", str(run), "--resume", "--max_steps=61"]) == 0
    assert not (run / "stopped.txt").exists()


# Runs that cannot be used.


@pytest.mark.parametrize("verb", ["evaluate", "generate", "info"])
def test_verbs_say_what_is_wrong_with_a_run(
    verb: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert_refused(capsys, verb, tmp_path / "none", says=tmp_path / "none")
    assert_refused(capsys, verb, tmp_path, says=tmp_path / "config.json")
    assert_refused(capsys, verb, run / "config.json", says="is a file")
    assert_refused(capsys, verb, says="run")
    for damage, name in [
        (cut, "model.safetensors"), (empty, "model.safetensors"), (scramble, "model.safetensors"),
        (remove, "model.safetensors"), (scramble, "config.json"), (cut, "config.json"), (remove, "config.json"),
    ]:  # fmt: skip
        before = (run / name).read_bytes()
        damage(run / name)
        assert_refused(capsys, verb, run, says=run / name)
        (run / name).write_bytes(before)


@pytest.mark.parametrize("verb", ["evaluate", "generate"])
@pytest.mark.parametrize("damage", [scramble, empty, remove])
def test_verbs_name_a_damaged_codec(verb: str, damage: Any, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damage(run / "codec.json")
    assert_refused(capsys, verb, run, says=run / "codec.json")


@pytest.mark.usefixtures("bound_by_modes")
@pytest.mark.parametrize(
    ("name", "argv"),
    [
        ("config.json", ["info"]),
        ("model.safetensors", ["info"]),
        ("codec.json", ["generate"]),
        ("recipe.yaml", ["train", "--resume", "--max_steps=62", "--out"]),
        (CHECKPOINT, ["train", "--resume", "--max_steps=62", "--out"]),
    ],
)
def test_files_of_a_run_that_may_not_be_read_are_not_called_damaged(
    run: Path, name: str, argv: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    (run / name).chmod(0)
    assert_refused(capsys, *argv, run, says=f"Permission denied: {run / name}; change its permissions")


def test_weights_of_another_network_are_refused(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(settings | {"dim": 32}))
    assert_refused(capsys, "info", run, says="embed.weight has shape (256, 16), not (256, 32)")
    (run / "config.json").write_text(json.dumps(settings | {"model_type": "gpt2"}))
    assert_refused(capsys, "info", run, says="'gpt2'")


def test_a_run_from_before_local_context_and_blocks_is_resumed_without_them(corpus: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    old = ["--model.local_context=1", "--trainer.blocks=1"]
    assert main(["train", str(corpus), "--out", str(run), *SMALL, "--max_steps=2", *old]) == 0
    for file in (run / "recipe.yaml", run / "config.json"):
        lines = file.read_text().splitlines(keepends=True)
        file.write_text("".join(line for line in lines if "local_context" not in line and "blocks" not in line))
    assert main(["train", "--out", str(run), "--resume", "--max_steps=4"]) == 0
    assert Run(run).recipe().model.local_context == Run(run).model().config.local_context == 1
    assert Run(run).recipe().blocks == 1
    lines = (run / "recipe.yaml").read_text().splitlines(keepends=True)
    (run / "recipe.yaml").write_text("".join(line for line in lines if not re.search("local_context|blocks", line)))
    again = tmp_path / "again"
    assert main(["train", "--config", str(run / "recipe.yaml"), "--out", str(again), "--max_steps=1"]) == 0
    assert Run(again).recipe().blocks == Run(again).recipe().model.local_context == 1

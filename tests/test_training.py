"""Training: a run is a function of its recipe, whatever happens to the process on the way.

The tests that kill and interrupt use real processes and real signals. They are forked from one process that has
imported torch and the package (`Server`): an import takes seconds, and a kill during it shows nothing.
"""

import csv
import json
import os
import random
import re
import select
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import soundfile
import torch
from helpers import MODEL, SMALL, TRAINER, assert_same_parameters, content, parameters
from processes import Moment, Server, after
from reference import assert_close

from perceiver_ar import InputError, PerceiverAR, Recipe, Run, train
from perceiver_ar.cli import main
from perceiver_ar.config import DataConfig, OptimConfig, PerceiverARConfig
from perceiver_ar.data.sampler import TrainingWindows
from perceiver_ar.data.tokens import TokenFile
from perceiver_ar.evaluation import evaluate
from perceiver_ar.lock import LOCK
from perceiver_ar.objective import IGNORE, next_token_loss
from perceiver_ar.optim import lr_factor, make_optimizer
from perceiver_ar.training.batches import Batches
from perceiver_ar.training.checkpoints import Checkpoints
from perceiver_ar.training.console import SIGNALS

DROPPING = MODEL.replace(prefix_dropout=0.5, mlp_dropout=0.1)
CONSTANT = OptimConfig(schedule="constant", warmup=0.0)
STEPS = 40
"""Of the runs that are killed and interrupted."""


@pytest.fixture
def recipe(corpus: Path, tmp_path: Path) -> Recipe:
    return Recipe(paths=(str(corpus),), out=str(tmp_path / "run"), max_steps=12, model=MODEL, trainer=TRAINER)


def checkpoint(run: str | Path) -> dict[str, Any]:
    newest = Checkpoints(Path(run) / "checkpoints").newest()
    assert newest is not None
    return torch.load(newest.path, weights_only=True)


def metrics(run: str | Path) -> list[dict[str, str]]:
    with open(Path(run) / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


# Processes that are killed and interrupted.


@pytest.fixture(scope="module")
def long_corpus(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """So much text that reading it takes a while."""
    file = tmp_path_factory.mktemp("long") / "corpus.txt"
    file.write_text((corpus / "1.txt").read_text() * 3000)
    return file


@pytest.fixture(scope="module")
def command(corpus: Path, long_corpus: Path) -> list[str]:
    """`train` with all that draws random numbers; without --out."""
    settings = {
        "max_steps": STEPS,
        "model.context_length": 32,
        "model.num_latents": 8,
        "model.dim": 16,
        "model.num_layers": 1,
        "model.num_heads": 2,
        "model.prefix_dropout": 0.5,
        "model.mlp_dropout": 0.1,
        "data.validation": f"[{corpus / '0.txt'}]",
        "trainer.batch_size": 4,
        "trainer.micro_batch_size": 2,
        "trainer.precision": 32,
        "trainer.device": "cpu",
        "trainer.evaluations": 6,
        "trainer.evaluation_tokens": 100,
        "trainer.sample_tokens": 2,
        "trainer.checkpoint_every": "0.1s",
    }
    words = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    return ["train", str(long_corpus), *words]


@pytest.fixture(scope="module")
def undisturbed(server: Server, command: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    assert server.run(*command, "--out", run) == 0, server.messages()
    return run


def assert_same_runs(run: Path, undisturbed: Path) -> None:
    """The same parameters, state of the optimizer, measurements and metrics, but for times."""
    assert_same_parameters(run, undisturbed)
    ours, theirs = (checkpoint(path)["optimizer_states"][0]["state"] for path in (run, undisturbed))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[i][name], theirs[i][name]) for i in ours for name in ours[i])
    ours, theirs = (json.loads((path / "summary.json").read_text()) for path in (run, undisturbed))
    for times in ("seconds", "train_seconds"):
        del ours[times], theirs[times]
    assert ours == theirs
    held_out, expected = (
        [(row["step"], row["validation_bits"]) for row in metrics(path) if row["validation_bits"]]
        for path in (run, undisturbed)
    )
    assert held_out == expected
    steps = [int(row["step"]) for row in metrics(run) if row["train_bits"]]
    assert steps == sorted(set(steps)) and steps[-1] == theirs["steps"]
    assert not [path for path in run.rglob("*") if path.name.startswith(".unfinished")]


def assert_usable(run: Path) -> None:
    """What a kill leaves is whole: what is there can be read."""
    if (run / "model.safetensors").exists():
        PerceiverAR.from_pretrained(run)
    if appears(run, "checkpoints/step-*.json")():
        checkpoint(run)
        assert (run / "model.safetensors").exists()  # saved before: what resuming does not make again is there


def train_with_kills(server: Server, command: list[str], run: Path, moments: Iterable[Moment]) -> int:
    """Starts and resumes until the run is finished; returns how often it was killed."""
    kills, moments = 0, iter(moments)
    while True:
        begin = ["train", "--resume"] if (run / "recipe.yaml").exists() else command
        status = server.run(*begin, "--out", run, signals=[(moment, signal.SIGKILL) for moment in islice(moments, 1)])
        if status == 0:
            return kills
        assert status == -signal.SIGKILL, server.messages()
        kills += 1
        assert_usable(run)


def appears(run: Path, pattern: str) -> Moment:
    return lambda: any(run.glob(pattern))


def last_step(run: Path) -> int:
    """The last one in the metrics, as far as they are written; 0 before the first."""
    rows = metrics(run) if (run / "metrics.csv").exists() else []
    return max((int(row["step"]) for row in rows), default=0)


def test_a_run_killed_at_telling_moments_and_resumed_equals_an_undisturbed_one(
    server: Server, command: list[str], undisturbed: Path, tmp_path: Path
) -> None:
    run, temporary = tmp_path / "run", set(server.temporary.iterdir())
    moments = [
        appears(run, "tokens/.unfinished-*"),  # in the middle of reading the files
        appears(run, "codec.json"),
        appears(run, "metrics.csv"),  # before the first checkpoint
        appears(run, ".unfinished-model*"),
        appears(run, "checkpoints/.unfinished-*"),  # the weights are new, the checkpoint is old
        lambda: last_step(run) >= 25,
        appears(run, f"samples/step-{STEPS:06d}.txt"),  # all steps are made, but it is not finished
        appears(run, "plots/.unfinished-*"),
    ]
    kills = train_with_kills(server, command, run, moments)
    assert kills >= 5  # a moment may be missed on a busy machine
    assert set(server.temporary.iterdir()) == temporary
    assert_same_runs(run, undisturbed)


def test_a_run_that_starts_from_another_one_needs_it_no_more_after_a_kill(
    server: Server, command: list[str], undisturbed: Path, tmp_path: Path
) -> None:
    run, source = tmp_path / "run", shutil.copytree(undisturbed, tmp_path / "source")
    command = [*command, "--init_from", str(source)]
    assert server.run(*command, "--out", tmp_path / "straight") == 0, server.messages()
    reading = appears(run, "tokens/.unfinished-*")
    assert server.run(*command, "--out", run, signals=[(reading, signal.SIGKILL)]) == -signal.SIGKILL
    shutil.rmtree(source)
    moments = [appears(run, "codec.json"), appears(run, "metrics.csv"), appears(run, ".unfinished-model*")]
    train_with_kills(server, command, run, moments)
    assert_same_runs(run, tmp_path / "straight")
    assert not (run / "checkpoints" / "initial").exists()


@pytest.mark.parametrize("pattern", ["tokens/.unfinished-*", "checkpoints/step-*.json"])
def test_a_second_process_is_refused_and_the_first_goes_on_undisturbed(
    server: Server,
    command: list[str],
    undisturbed: Path,
    tmp_path: Path,
    pattern: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run, statuses = tmp_path / "run", list[int]()

    def seconds_came() -> bool:
        if not appears(run, pattern)():
            return False
        statuses.extend([main([*command, "--out", str(run)]), main(["train", "--out", str(run), "--resume"])])
        return True

    assert server.run(*command, "--out", run, signals=[(seconds_came, signal.SIGCONT)]) == 0, server.messages()
    assert statuses == [2, 2]
    assert len(re.findall(rf"process \d+ on \S+ is training in {run}: wait until", capsys.readouterr().err)) == 2
    assert_same_runs(run, undisturbed)
    assert not (run / LOCK).exists()


def test_a_run_that_is_not_prepared_leaves_what_others_put_there(recipe: Recipe, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with ThreadPoolExecutor() as pool:
        failing = pool.submit(train, replace(recipe, paths=(str(tmp_path / "pipe"),)))
        with open(tmp_path / "pipe", "w") as pipe:  # opens when it is read, so the run has been begun
            (Path(recipe.out) / "mine.txt").write_text("mine")
            pipe.write("too short")
        with pytest.raises(InputError, match="give more data"):
            failing.result()
    assert content(Path(recipe.out)) == {"mine.txt": b"mine"}


@pytest.mark.slow
def test_a_run_killed_a_hundred_times_at_random_moments_equals_an_undisturbed_one(
    server: Server, command: list[str], tmp_path: Path
) -> None:
    command = [*command, "--max_steps", "600"]
    assert server.run(*command, "--out", tmp_path / "undisturbed") == 0, server.messages()
    rng = random.Random()
    kills = inside = runs = 0

    def moments(run: Path) -> Iterator[Moment]:
        """Random ones, and every third one inside the writing of a checkpoint."""
        nonlocal inside
        for number in range(60):
            random_moment, writing = after(rng.uniform(0, 2)), appears(run, "checkpoints/.unfinished-*")
            yield writing if number % 3 == 0 else random_moment
            inside += writing()  # what was being written when the kill came lies there until the run is resumed

    while kills < 100:  # the faster the machine, the fewer kills it takes to the end of one run
        run = tmp_path / f"run{runs}"
        kills += train_with_kills(server, command, run, moments(run))
        assert_same_runs(run, tmp_path / "undisturbed")
        runs += 1
    print(f"{kills} kills, {inside} of them inside the writing of a checkpoint, in {runs} runs")
    assert inside >= 10


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])  # SIGHUP: below
def test_an_interrupted_run_saves_says_how_to_go_on_and_then_equals_an_undisturbed_one(
    server: Server, command: list[str], undisturbed: Path, tmp_path: Path, number: int
) -> None:
    run = tmp_path / "my run"
    arguments = [*command, "--trainer.checkpoint_every", "1h", "--out", run]
    assert server.run(*arguments, signals=[(lambda: last_step(run) > 0, number)]) == 130
    step = checkpoint(run)["global_step"]
    assert 0 < step < STEPS
    assert not (run / "summary.json").exists()
    last = server.messages()[-1]
    assert last.startswith(f"perceiver-ar: stopped at step {step},")
    assert Run(run).stopped_file.read_text() in f"{last}\n"
    *_, words = last.partition("resume with: perceiver-ar ")
    assert server.run(*shlex.split(words)) == 0, server.messages()
    assert_same_runs(run, undisturbed)


def test_a_run_whose_terminal_hangs_up_saves(server: Server, command: list[str], tmp_path: Path) -> None:
    run, (ours, theirs) = tmp_path / "run", os.openpty()
    arguments = [*command, "--trainer.checkpoint_every=1h", "--max_steps=100000", "--out", run]
    terminal, gone = os.ttyname(theirs), [(hung_up(ours, lambda: last_step(run) > 0), 0)]
    assert server.run(*arguments, session=True, stdout=terminal, stderr=terminal, signals=gone) == 130
    os.close(theirs)
    assert 0 < checkpoint(run)["global_step"] < 100000


def test_a_run_goes_on_without_its_terminal_if_no_signal_comes(
    server: Server, command: list[str], tmp_path: Path
) -> None:
    run, (ours, theirs) = tmp_path / "run", os.openpty()  # not the controlling terminal of the process
    terminal = os.ttyname(theirs)
    gone = [(hung_up(ours, appears(run, "tensorboard/*")), 0)]  # written shortly before the first step
    assert server.run(*command, "--out", run, stderr=terminal, signals=gone) == 0
    os.close(theirs)
    assert json.loads(server.stdout.read_text()) == Run(run).summary()


def hung_up(terminal: int, moment: Moment) -> Moment:
    """Reads what a terminal shows until the moment has come, and then closes it."""

    def closed() -> bool:
        if select.select([terminal], [], [], 0)[0]:
            os.read(terminal, 1 << 16)
        if not moment():
            return False
        os.close(terminal)
        return True

    return closed


def test_training_goes_on_when_nobody_reads_its_messages_any_more() -> None:
    program = "from perceiver_ar.training.console import say; say('a'); say('b'); print('done')"
    theirs, ours = os.pipe()
    os.close(theirs)
    found = subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=ours, text=True)
    os.close(ours)
    assert (found.returncode, found.stdout) == (0, "done\n")


def test_a_run_stopped_before_its_first_step_can_be_resumed(
    server: Server, command: list[str], undisturbed: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    ready = appears(run, "tensorboard/*")  # written shortly before the first step
    assert server.run(*command, "--out", run, signals=[(ready, signal.SIGTERM)]) == 130
    assert server.messages()[-1].endswith(f"resume with: perceiver-ar train --out {run} --resume")
    assert server.run("train", "--out", run, "--resume") == 0, server.messages()
    assert_same_runs(run, undisturbed)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interrupt_while_files_are_read_leaves_nothing(
    server: Server, command: list[str], tmp_path: Path, number: int
) -> None:
    run = tmp_path / "run"
    assert server.run(*command, "--out", run, signals=[(appears(run, "tokens/.unfinished-*"), number)]) == 130
    assert server.messages()[-1:] == ["perceiver-ar: interrupted"]
    assert not run.exists()


def test_a_run_whose_folder_is_moved_ends_and_goes_on_where_it_is(
    server: Server, command: list[str], tmp_path: Path
) -> None:
    run, moved = tmp_path / "run", tmp_path / "moved"

    def move() -> bool:
        if appears(run, "checkpoints/step-*.json")():
            run.rename(moved)
        return False

    options = ["--max_steps=2000", "--trainer.evaluations=20", "--trainer.checkpoint_every=1h", "--out", str(run)]
    assert server.run(*command, *options, signals=[(move, signal.SIGKILL)]) == 2
    said = f"perceiver-ar: {run} was moved or removed during training: go on with --resume where it is, or train anew"
    assert server.messages()[-1:] == [said]
    assert not run.exists() and not (moved / "stopped.txt").exists()
    step = last_step(moved)
    later = (lambda: last_step(moved) > step), signal.SIGINT
    assert server.run("train", "--resume", "--out", moved, signals=[later]) == 130, server.messages()


def test_files_that_take_long_to_encode_are_encoded_on_after_a_kill_and_an_interrupt(
    server: Server, tmp_path: Path
) -> None:
    run, files, workers = tmp_path / "run", tmp_path / "files", list[psutil.Process]()
    files.mkdir()
    for number in range(16):  # enough bytes for other processes to encode them, each a shard
        soundfile.write(files / f"{number}.wav", np.full(1 << 20, number * 100, np.int16), 16_000)

    def shards() -> dict[str, int]:
        return {path.name: path.stat().st_mtime_ns for path in run.glob("tokens/shards/*.npz")}

    def encoding_goes_on() -> bool:
        """Stops the processes that encode once there are more shards than before."""
        if not kept.items() < shards().items():
            return False
        (command,) = psutil.Process(server.process.pid).children()
        workers[:] = command.children()
        for worker in workers:
            worker.suspend()
        return True

    command, cores = ["train", files, *SMALL, "--max_steps=1"], os.sched_getaffinity(0)
    os.sched_setaffinity(server.process.pid, {min(cores)})  # one more process, not one per core
    try:
        for number, status in (signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, 130):
            kept = shards()
            assert server.run(*command, "--out", run, signals=[(encoding_goes_on, number)]) == status
            for worker in workers:
                with suppress(psutil.NoSuchProcess):
                    worker.resume()
            assert workers and not psutil.wait_procs(workers, 60)[1]
            assert kept.items() < shards().items()
            command = ["train", "--resume"]
    finally:
        os.sched_setaffinity(server.process.pid, cores)
    last = server.messages()[-1]
    assert last.startswith("perceiver-ar: interrupted; ") and last.endswith(f"perceiver-ar train --out {run} --resume")


def test_a_second_interrupt_stops_at_once_and_the_last_checkpoint_goes_on(
    server: Server, command: list[str], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    long_steps = ["--model.dim", 128, "--trainer.batch_size", 256, "--trainer.micro_batch_size", 256, "--max_steps", 6]
    asked = lambda: "once more to stop immediately" in server.stderr.read_text()  # noqa: E731
    signals = [(appears(run, "checkpoints/step-*.json"), signal.SIGINT), (asked, signal.SIGINT)]
    assert server.run(*command, *long_steps, "--out", run, signals=signals) == 130
    assert server.messages()[-1] == (
        "perceiver-ar: stopped immediately; resume from the last checkpoint with: "
        f"perceiver-ar train --out {run} --resume"
    )
    step = checkpoint(run)["global_step"]
    assert server.run("train", "--out", run, "--resume", "--max_steps", step + 1) == 0, server.messages()
    assert checkpoint(run)["global_step"] == step + 1


def test_signals_are_as_before_when_training_is_over(recipe: Recipe) -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    train(replace(recipe, max_steps=1))
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_training_works_in_a_thread_that_gets_no_signals(recipe: Recipe) -> None:
    with ThreadPoolExecutor() as pool:
        assert pool.submit(train, replace(recipe, max_steps=2)).result()["steps"] == 2


# Resuming.


@pytest.mark.parametrize("settings", [{"name": "adamw"}, {"ema": 0.9}], ids=str)
def test_more_steps_for_a_finished_run_are_the_steps_of_a_longer_one(
    recipe: Recipe, tmp_path: Path, settings: dict[str, Any]
) -> None:
    recipe = replace(recipe, model=DROPPING, optim=replace(CONSTANT, **settings))
    train(replace(recipe, max_steps=20, out=str(tmp_path / "long")))
    train(replace(recipe, max_steps=9))
    assert train(replace(recipe, max_steps=20), resume=True)["steps"] == 20
    assert_same_parameters(recipe.out, tmp_path / "long")


def test_resuming_a_finished_run_says_so_and_changes_nothing(
    recipe: Recipe, capsys: pytest.CaptureFixture[str]
) -> None:
    summary = train(recipe)
    before = content(Path(recipe.out))
    capsys.readouterr()
    assert train(recipe, resume=True) == summary
    assert train(replace(recipe, max_steps=3), resume=True) == summary
    assert content(Path(recipe.out)) == before
    assert "is finished (12 steps)" in capsys.readouterr().err


def test_the_recipe_keeps_the_precision_that_auto_chose_and_resuming_keeps_to_it(recipe: Recipe) -> None:
    recipe = replace(recipe, trainer=replace(TRAINER, precision="auto"))
    train(replace(recipe, max_steps=1))
    run = Run(recipe.out)
    chosen = run.recipe()
    assert chosen.trainer.precision in ("32", "bf16")
    other = replace(chosen.trainer, precision="bf16" if chosen.trainer.precision == "32" else "32")
    run.write_recipe(replace(chosen, trainer=other))  # as if it came from a machine that is fast at the other
    train(replace(recipe, max_steps=2), resume=True)
    assert run.recipe().trainer.precision == other.precision


def test_a_finished_run_can_be_resumed_with_more_time(recipe: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    timed = replace(recipe, max_steps=None, max_time="0.3s")
    first = train(timed)
    assert first["ended_by"] == "max_time" and first == Run(recipe.out).summary()
    assert f"ended by max_time, at step {first['steps']:,} of 0.3s\n" in capsys.readouterr().err
    second = train(replace(timed, max_time="0.8s"), resume=True)
    assert second["steps"] > first["steps"]
    assert second["train_seconds"] >= 0.8


def test_a_finished_run_that_goes_on_is_unfinished_until_the_new_end(recipe: Recipe) -> None:
    recipe = replace(recipe, trainer=replace(TRAINER, sample_tokens=1))
    train(replace(recipe, max_steps=3))
    samples = (Path(recipe.out) / "samples").rename(Path(recipe.out) / "moved")
    (Path(recipe.out) / "samples").touch()  # nothing can be written into that
    with pytest.raises(FileExistsError):
        train(recipe, resume=True)
    assert not (Path(recipe.out) / "summary.json").exists()
    (Path(recipe.out) / "samples").unlink()
    samples.rename(Path(recipe.out) / "samples")
    assert train(recipe, resume=True)["steps"] == 12


CHANGES: dict[str, dict[str, Any]] = {
    "model.num_layers": {"model": MODEL.replace(num_layers=2)},
    "optim.lr": {"optim": OptimConfig(lr=1e-4)},
    "data.validation_fraction": {"data": DataConfig(validation_fraction=0.3)},
    "seed": {"seed": 1},
    "modality": {"modality": "bytes"},
    "paths": {"paths": ("elsewhere",)},
    "trainer.batch_size": {"trainer": replace(TRAINER, batch_size=8)},
    "trainer.blocks": {"trainer": replace(TRAINER, blocks=3)},
    "trainer.short_prefix": {"trainer": replace(TRAINER, short_prefix=0.25)},
    "trainer.prefix_growth": {"trainer": replace(TRAINER, prefix_growth=0.25)},
}


@pytest.fixture(scope="module")
def begun(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """Of a run of one step, to read from."""
    out = str(tmp_path_factory.mktemp("begun") / "run")
    recipe = Recipe(paths=(str(corpus),), out=out, max_steps=1, model=MODEL, trainer=TRAINER)
    train(recipe)
    return recipe


@pytest.mark.parametrize("name", CHANGES)
def test_what_the_steps_depend_on_cannot_change_on_resuming(begun: Recipe, name: str) -> None:
    before = content(Path(begun.out))
    with pytest.raises(InputError, match=f", but {name} changed"):
        train(replace(begun, max_steps=2, **CHANGES[name]), resume=True)
    assert content(Path(begun.out)) == before


# Without dropout the micro-batches are the same sums in another order. Muon makes small differences large.
ADAMW = OptimConfig(name="adamw", lr=1e-4, schedule="constant", warmup=0.0)


def test_a_run_may_go_on_with_other_micro_batch_sizes(recipe: Recipe, tmp_path: Path) -> None:
    recipe = replace(recipe, optim=ADAMW)
    train(replace(recipe, out=str(tmp_path / "same")))
    for steps, size in ((2, None), (3, 1), (5, 4), (8, 2), (10, 4), (12, None)):
        trainer = replace(TRAINER, micro_batch_size=size)
        summary = train(replace(recipe, trainer=trainer, max_steps=steps), resume=steps > 2)
        assert summary["steps"] == checkpoint(recipe.out)["global_step"] == steps
    assert_same_parameters(recipe.out, tmp_path / "same", tolerance=1e-5)


# The steps themselves.


def test_the_same_recipe_gives_the_same_parameters_and_another_seed_others(recipe: Recipe, tmp_path: Path) -> None:
    recipe = replace(recipe, model=DROPPING)
    summary = train(recipe)
    torch.manual_seed(123)  # what happened in the process before does not matter
    again = train(replace(recipe, out=str(tmp_path / "again")))
    assert again["bits_per_byte"] == summary["bits_per_byte"]
    assert_same_parameters(recipe.out, tmp_path / "again")
    train(replace(recipe, out=str(tmp_path / "other"), seed=1))
    assert not torch.equal(parameters(recipe.out)["embed.weight"], parameters(tmp_path / "other")["embed.weight"])


@pytest.mark.parametrize("seed", [-1, 20241123225343, 2**64])
def test_any_integer_is_a_seed(recipe: Recipe, seed: int) -> None:
    assert train(replace(recipe, seed=seed, max_steps=1))["steps"] == 1


@pytest.mark.parametrize(
    ("settings", "blocks", "ema", "more"),
    [
        (DROPPING, 1, 0.0, {}),
        (DROPPING, 1, 0.5, {}),
        (DROPPING, 1, 0.0, {"label_smoothing": 0.1, "z_loss": 1e-3}),
        (MODEL, 2, 0.0, {}),
    ],
)
def test_training_is_this_plain_loop(
    recipe: Recipe, settings: PerceiverARConfig, blocks: int, ema: float, more: dict[str, Any]
) -> None:
    recipe = replace(recipe, model=settings, seed=5, trainer=replace(TRAINER, short_prefix=0.0))
    assert recipe.blocks == blocks
    recipe = replace(recipe, optim=OptimConfig(ema=ema, **more))
    summary = train(recipe)
    torch.manual_seed(5)
    model, N = PerceiverAR(recipe.model), 8 * blocks
    mean = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = make_optimizer(model, recipe.optim)
    windows = TrainingWindows(TokenFile.open(Path(recipe.out) / "tokens" / "train"), 32, N, seed=5)
    for step in range(12):
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * lr_factor(recipe.optim, (step + 0.5) / 12)
        batch = windows.batch(4 * step, 4)
        torch.manual_seed(5 * 1_000_003 + step)
        logits = model(batch["tokens"], 32 - N, mask=batch.get("mask"), blocks=blocks)
        loss = next_token_loss(logits, batch["labels"], **more)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.optim.grad_clip)
        optimizer.step()
        for name, tensor in model.state_dict().items():
            mean[name].lerp_(tensor, 1 - min(ema, (2 + step) / (11 + step)))
    trained = parameters(recipe.out)
    assert all(torch.equal(tensor, trained[name]) for name, tensor in mean.items())
    assert all(torch.equal(x, checkpoint(recipe.out)["state_dict"][f"model.{name}"])
               for name, x in model.state_dict().items())  # fmt: skip
    # Whatever it was trained on, it is measured by the plain loss.
    held_out = TokenFile.open(Path(recipe.out) / "tokens" / "validation").tokens
    plain = evaluate(PerceiverAR.from_pretrained(recipe.out), held_out, max_tokens=10 * TRAINER.evaluation_tokens)
    assert summary["nats_per_token"] == plain.nats_per_token


def test_blocks_that_cannot_be_are_refused_before_anything_is_made(recipe: Recipe) -> None:
    too_many = replace(recipe, trainer=replace(TRAINER, blocks=5))
    with pytest.raises(InputError, match=r"trainer\.blocks is 5: with 8 latents each they exceed context_length 32"):
        train(too_many)
    with pytest.raises(
        InputError, match=r"trainer\.blocks is 2, which a network with .*positions_from_end.* does not allow"
    ):
        train(replace(recipe, model=MODEL.replace(positions_from_end=True), trainer=replace(TRAINER, blocks=2)))
    assert not Path(recipe.out).exists() or not list(Path(recipe.out).iterdir())


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_a_share_of_the_steps_has_shorter_prefixes_and_the_same_targets(recipe: Recipe, share: float) -> None:
    tokens = np.arange(1000) % 256
    trainer = replace(TRAINER, micro_batch_size=2, short_prefix=share)
    windows = TrainingWindows(tokens, 32, 8, recipe.seed)
    batches = Batches(windows, replace(recipe, trainer=trainer))
    lengths = []
    for i, batch in enumerate(batch for step in range(100) for batch in batches.of_step(step, 0.0)):
        whole = windows.batch(2 * i, 2)
        lengths.append(batch["tokens"].shape[1])
        assert torch.equal(batch["labels"], whole["labels"])
        assert torch.equal(batch["tokens"], whole["tokens"][:, 32 - lengths[-1] :])
        assert batch.keys() - {"weight", "targets", "seed"} == whole.keys()
    assert lengths[0::2] == lengths[1::2]  # of the two micro-batches of a step
    shorter = [length for length in lengths if length < 32]
    assert abs(len(shorter) / 200 - share) < 0.2
    assert share == 0.0 or (min(shorter) == 8 and len(set(shorter)) > 2)


def test_tokens_seen_are_the_targets_of_all_windows_also_over_a_resumption(recipe: Recipe) -> None:
    recipe = replace(recipe, trainer=replace(TRAINER, batch_size=60, micro_batch_size=20))
    train(replace(recipe, max_steps=5))
    summary = train(recipe, resume=True)
    windows = TrainingWindows(
        TokenFile.open(Path(recipe.out) / "tokens" / "train"), 32, recipe.window_latents, recipe.seed
    )
    targets = int((windows.batch(0, 12 * 60)["labels"] != IGNORE).sum())
    assert summary["tokens_seen"] == targets < 12 * 60 * recipe.window_latents  # fewer at the ends of a pass
    assert int(metrics(recipe.out)[-1]["tokens"]) == targets


@pytest.mark.parametrize("growth", [0.25, 1.0])
def test_the_longest_prefix_grows_by_quarters_over_a_share_of_the_run(recipe: Recipe, growth: float) -> None:
    trainer = replace(TRAINER, prefix_growth=growth, short_prefix=0.5)
    recipe = replace(recipe, max_steps=200, trainer=trainer)
    windows = TrainingWindows(np.arange(1000) % 256, 32, 8, recipe.seed)
    batches = Batches(windows, recipe)
    prefixes = [
        batch["tokens"].shape[1] - 8 for step in range(200) for batch in batches.of_step(step, (step + 0.5) / 200)
    ]
    fifth = int(200 * growth / 5)
    for i in range(5):
        part = prefixes[i * fifth : (i + 1) * fifth if i < 4 else None]
        assert max(part) == 6 * i  # of 24


def test_the_gradient_of_micro_batches_is_that_of_the_whole_batch(recipe: Recipe, tmp_path: Path) -> None:
    trainer = replace(TRAINER, batch_size=60)
    recipe = replace(recipe, model=MODEL.replace(init="normal"), optim=replace(ADAMW, grad_clip=0.0), max_steps=1)
    gradients = {}  # after one step they are, times 1 - beta, the optimizer's means
    for size in (60, 1, 4, 30):
        out = str(tmp_path / str(size))
        train(replace(recipe, out=out, trainer=replace(trainer, micro_batch_size=size)))
        gradients[size] = [state["exp_avg"] for state in checkpoint(out)["optimizer_states"][0]["state"].values()]
        assert len(gradients[size]) == len(parameters(out))
        for ours, theirs in zip(gradients[size], gradients[60], strict=True):
            assert_close(ours / theirs.abs().max(), theirs / theirs.abs().max(), 1e-5)
    windows = TrainingWindows(TokenFile.open(tmp_path / "60" / "tokens" / "train"), 32, 8, recipe.seed)
    ignored = (windows.batch(0, 60)["labels"] == IGNORE).sum(dim=1)
    assert 0 < ignored.count_nonzero() < 60  # rows without all targets count less


def test_the_gradient_is_clipped_to_its_largest_norm(recipe: Recipe) -> None:
    recipe = replace(recipe, optim=replace(ADAMW, grad_clip=1e-3), max_steps=1)
    train(recipe)
    gradients = [
        state["exp_avg"] / (1 - 0.9) for state in checkpoint(recipe.out)["optimizer_states"][0]["state"].values()
    ]
    norm = torch.cat([gradient.flatten() for gradient in gradients]).norm().item()
    assert norm == pytest.approx(1e-3, rel=1e-3)
    assert float(metrics(recipe.out)[-1]["grad_norm"]) > 0.1  # what it was before


def test_no_limit_on_the_gradient_is_a_limit_that_is_never_reached(recipe: Recipe, tmp_path: Path) -> None:
    train(replace(recipe, optim=OptimConfig(grad_clip=0.0)))
    train(replace(recipe, optim=OptimConfig(grad_clip=1e9), out=str(tmp_path / "other")))
    assert_same_parameters(recipe.out, tmp_path / "other")


def test_a_model_learns_what_can_be_learned(recipe: Recipe) -> None:
    summary = train(replace(recipe, max_steps=100))
    assert summary["bits_per_byte"] < 1.5  # of 8 at the start
    assert summary["bits_per_byte"] > 0.75  # words are drawn at random, 0.83 bits per byte: nobody can do better


@pytest.mark.parametrize("name", ["lucidrains", "krasserm", "paper"])
def test_published_networks_can_be_trained(recipe: Recipe, name: str) -> None:
    model = PerceiverARConfig.preset(
        name, context_length=32, num_latents=8, dim=16, num_layers=2, num_heads=2, head_dim=8
    )
    assert train(replace(recipe, model=model))["bits_per_byte"] < 8


def test_bf16_and_recomputed_activations_change_little(recipe: Recipe, tmp_path: Path) -> None:
    exact = train(replace(recipe, max_steps=30))["bits_per_byte"]
    trainer = replace(TRAINER, precision="bf16", activation_checkpointing=True)
    rough = train(replace(recipe, max_steps=30, trainer=trainer, out=str(tmp_path / "rough")))["bits_per_byte"]
    assert rough == pytest.approx(exact, rel=0.02)
    assert {tensor.dtype for tensor in parameters(tmp_path / "rough").values()} == {torch.float32}


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [{}, {"precision": "bf16", "activation_checkpointing": True, "micro_batch_size": 2}]
)
def test_a_compiled_network_learns_the_same_at_all_lengths_of_the_prefix(
    recipe: Recipe, tmp_path: Path, options: Any
) -> None:
    trainer = replace(TRAINER, short_prefix=0.8, **options)
    plain = train(replace(recipe, max_steps=20, trainer=trainer))["bits_per_byte"]
    compiled = replace(recipe, max_steps=20, trainer=replace(trainer, compile=True), out=str(tmp_path / "compiled"))
    assert train(compiled)["bits_per_byte"] == pytest.approx(plain, rel=0.02 if options else 1e-3)


def test_time_and_steps_end_a_run_whichever_comes_first(recipe: Recipe, tmp_path: Path) -> None:
    assert train(replace(recipe, max_time="1h"))["steps"] == 12
    falling = replace(recipe.optim, schedule="cosine", warmup=0.0)
    timed = replace(recipe, optim=falling, max_steps=10**9, max_time="2s", out=str(tmp_path / "timed"))
    assert train(timed)["train_seconds"] >= 2.0
    assert float(metrics(timed.out)[-1]["lr"]) < falling.muon_lr  # it fell with the clock


def test_measurements_are_spread_evenly_over_the_run(recipe: Recipe) -> None:
    train(replace(recipe, max_steps=20, trainer=replace(TRAINER, evaluations=4, sample_tokens=3)))
    measured = [int(row["step"]) for row in metrics(recipe.out) if row["validation_bits"]]
    assert measured == [5, 10, 15]  # and the end, which is in summary.json
    samples = sorted(path.name for path in (Path(recipe.out) / "samples").iterdir())
    assert samples == [f"step-{step:06d}.txt" for step in (5, 10, 15, 20)]


# What is wrong is said before anything is made.


def test_too_little_data_for_one_window_leaves_nothing(recipe: Recipe) -> None:
    with pytest.raises(InputError, match="context_length"):
        train(replace(recipe, model=MODEL.replace(context_length=100_000)))
    assert not Path(recipe.out).exists()


def test_an_error_leaves_an_empty_directory_as_it_was(recipe: Recipe) -> None:
    Path(recipe.out).mkdir()
    with pytest.raises(InputError, match="does not exist"):
        train(replace(recipe, paths=("missing",)))
    assert list(Path(recipe.out).iterdir()) == []


def test_what_a_kill_left_before_the_recipe_was_written_is_in_nobodys_way(recipe: Recipe) -> None:
    Path(recipe.out).mkdir()
    (Path(recipe.out) / ".unfinished-recipe-x.yaml").write_text("pat")
    train(replace(recipe, max_steps=1))
    assert not list(Path(recipe.out).glob(".unfinished-*"))


def test_a_directory_that_holds_anything_is_never_touched(recipe: Recipe) -> None:
    Path(recipe.out).mkdir()
    (Path(recipe.out) / "thesis.tex").write_text("...")
    with pytest.raises(InputError, match="already exists"):
        train(recipe)
    assert content(Path(recipe.out)) == {"thesis.tex": b"..."}


def test_one_document_is_not_split(recipe: Recipe, corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    summary = train(replace(recipe, paths=(str(corpus / "1.txt"),)))
    assert "bits_per_byte" not in summary and summary["steps"] == 12
    assert "none is held out" in capsys.readouterr().err

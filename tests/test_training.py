"""Training: a run is a function of its recipe, whatever happens to the process on the way.

The tests that kill and interrupt use real processes and real signals. They fork them, with the command's `main`, from one
process that has imported torch and the package (`Server`): an import takes seconds, and a kill during it shows nothing.
"""

import csv
import json
import os
import random
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from reference import assert_close
from safetensors.torch import load_file
from torch import Tensor

from perceiver_ar import InputError, PerceiverAR, Recipe, train
from perceiver_ar.config import DataConfig, OptimConfig, PerceiverARConfig, TrainerConfig
from perceiver_ar.data.tokens import TokenFile, Windows
from perceiver_ar.objective import IGNORE, next_token_loss
from perceiver_ar.optim import lr_factor, make_optimizer
from perceiver_ar.training import parse_duration

MODEL = PerceiverARConfig(context_length=32, num_latents=8, dim=16, num_layers=1, num_heads=2)
DROPPING = MODEL.replace(prefix_dropout=0.5, mlp_dropout=0.1)
TRAINER = TrainerConfig(
    batch_size=4, precision="32", device="cpu", evaluations=2, evaluation_tokens=200, sample_tokens=0
)
CONSTANT = OptimConfig(schedule="constant", warmup=0.0)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Threads cost models of this size more than they give, and sums must be in one order to be equal bit by bit."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six documents of some 800 bytes."""
    folder = tmp_path_factory.mktemp("corpus")
    words, rng = "the cat sat on a mat and the dog ran to her house".split(), random.Random(0)
    for number in range(6):
        (folder / f"{number}.txt").write_text(" ".join(rng.choice(words) for _ in range(200)) + "\n")
    return folder


@pytest.fixture
def recipe(corpus: Path, tmp_path: Path) -> Recipe:
    return Recipe(paths=(str(corpus),), out=str(tmp_path / "run"), max_steps=12, model=MODEL, trainer=TRAINER)


def parameters(run: str | Path) -> dict[str, Tensor]:
    return load_file(Path(run) / "model.safetensors")


def assert_same_parameters(run: str | Path, other: str | Path, tolerance: float = 0.0) -> None:
    """Bit by bit where the tolerance is 0."""
    ours, theirs = parameters(run), parameters(other)
    assert ours.keys() == theirs.keys()
    for name in ours:
        if tolerance == 0.0:
            assert torch.equal(ours[name], theirs[name]), name
        else:
            assert_close(ours[name], theirs[name], tolerance)


def checkpoint(run: str | Path) -> dict[str, Any]:
    return torch.load(Path(run) / "checkpoints" / "last.ckpt", weights_only=True)


def metrics(run: str | Path) -> list[dict[str, str]]:
    with open(Path(run) / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# Processes that are killed and interrupted.

SERVER = """
import json, os, signal, sys
import perceiver_ar.plots, perceiver_ar.training, torch._dynamo, torch.utils.tensorboard
from perceiver_ar.cli import main

for line in sys.stdin:
    job = json.loads(line)
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for descriptor, name in enumerate((os.devnull, job["stdout"], job["stderr"])):
            os.dup2(os.open(name, os.O_RDWR | os.O_CREAT | os.O_TRUNC), descriptor)
        sys.exit(main(job["argv"]))
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Server:
    """Starts processes that run the command, one at a time."""

    def __init__(self, folder: Path) -> None:
        self.stdout, self.stderr = folder / "stdout", folder / "stderr"
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0, env=environment
        )
        assert self.process.stdin is not None and self.process.stdout is not None
        self.jobs, self.answers = self.process.stdin, self.process.stdout

    def run(self, *argv: object, until: Callable[[], bool] | None = None, send: Sequence[int] = ()) -> int:
        """Runs the command, and as soon as `until` holds sends it the signals. Returns its exit status."""
        job = {"argv": [str(word) for word in argv], "stdout": str(self.stdout), "stderr": str(self.stderr)}
        self.jobs.write(json.dumps(job).encode() + b"\n")
        child, signals = int(self.answers.readline()), list(send)
        while not select.select([self.answers], [], [], 0.001)[0]:
            if signals and until is not None and until():
                with suppress(ProcessLookupError):  # it has just ended by itself
                    os.kill(child, signals.pop(0))
                if signals:
                    time.sleep(0.05)  # two of a kind at once would be one
        return int(self.answers.readline())

    def messages(self) -> list[str]:
        return self.stderr.read_text().strip().splitlines()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("server"))
    yield server
    server.jobs.close()
    assert server.process.wait(timeout=60) == 0
    server.answers.close()


@pytest.fixture(scope="module")
def long_corpus(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """So much text that reading it takes a while."""
    file = tmp_path_factory.mktemp("long") / "corpus.txt"
    file.write_text((corpus / "1.txt").read_text() * 8000)
    return file


@pytest.fixture(scope="module")
def command(corpus: Path, long_corpus: Path) -> list[str]:
    """`train` with all that draws random numbers; without --out."""
    settings = {
        "max_steps": 90,
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
        "trainer.evaluations": 9,
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
    assert steps == sorted(set(steps)) and steps[-1] == int(expected_steps(undisturbed))
    assert not [path for path in run.rglob("*") if path.name.startswith(".unfinished")]


def expected_steps(run: Path) -> int:
    return json.loads((run / "summary.json").read_text())["steps"]


def assert_usable(run: Path) -> None:
    """What a kill leaves is whole: what is there can be read."""
    if (run / "model.safetensors").exists():
        PerceiverAR.from_pretrained(run)
    if (run / "checkpoints" / "last.ckpt").exists():
        checkpoint(run)


def train_with_kills(server: Server, command: list[str], run: Path, moments: Iterable[Callable[[], bool]]) -> int:
    """Starts and resumes until the run is finished; returns how often it was killed."""
    kills, moments = 0, iter(moments)
    while True:
        begin = ["train", "--resume"] if (run / "recipe.yaml").exists() else command
        status = server.run(*begin, "--out", run, until=next(moments, None), send=[signal.SIGKILL])
        if status == 0:
            return kills
        assert status == -signal.SIGKILL, server.messages()
        kills += 1
        assert_usable(run)


def after(seconds: float) -> Callable[[], bool]:
    begun: list[float] = []

    def passed() -> bool:
        begun.append(time.monotonic())
        return begun[-1] - begun[0] >= seconds

    return passed


def test_a_run_killed_at_telling_moments_and_resumed_equals_an_undisturbed_one(
    server: Server, command: list[str], undisturbed: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"

    def begun(pattern: str) -> Callable[[], bool]:
        return lambda: any(run.glob(pattern))

    def steps(least: int) -> Callable[[], bool]:
        return lambda: (run / "metrics.csv").exists() and any(int(row["step"]) >= least for row in metrics(run))

    moments = [
        begun("tokens/.unfinished-*"),  # in the middle of reading the files
        begun("codec.json"),
        begun("metrics.csv"),  # before the first checkpoint
        begun("checkpoints/.unfinished-*"),
        begun(".unfinished-model*"),  # the checkpoint is new, the weights are old
        steps(50),
        begun("samples/step-000090.txt"),  # all steps are made, but it is not finished
        begun("plots/.unfinished-*"),
    ]
    kills = train_with_kills(server, command, run, moments)
    assert kills >= 5  # a moment may be missed on a busy machine
    assert_same_runs(run, undisturbed)


@pytest.mark.slow
def test_a_run_killed_thirty_times_at_random_moments_equals_an_undisturbed_one(
    server: Server, command: list[str], tmp_path: Path
) -> None:
    command = [*command, "--max_steps", "600"]
    assert server.run(*command, "--out", tmp_path / "undisturbed") == 0, server.messages()
    rng = random.Random()
    kills = train_with_kills(server, command, tmp_path / "run", (after(rng.uniform(0, 3)) for _ in range(60)))
    assert kills >= 30
    assert_same_runs(tmp_path / "run", tmp_path / "undisturbed")

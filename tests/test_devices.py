"""Several devices are one device with more accumulation: real processes that talk through gloo on the CPU."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from processes import Server, variables
from safetensors.torch import load_file
from torch import Tensor

from perceiver_ar import InputError, Recipe, train
from perceiver_ar.config import OptimConfig, PerceiverARConfig, TrainerConfig, dump_yaml
from perceiver_ar.data.sampler import TrainingWindows
from perceiver_ar.training.batches import Batches

MODEL = PerceiverARConfig(
    context_length=32, num_latents=8, dim=16, num_layers=1, num_heads=2, prefix_dropout=0.5, mlp_dropout=0.1
)
TRAINER = TrainerConfig(
    batch_size=12, blocks=2, precision="32", device="cpu", evaluations=2, evaluation_tokens=200, sample_tokens=2
)

MUON = OptimConfig(schedule="constant", warmup=0.0)
ADAMW = OptimConfig(name="adamw", lr=1e-4, schedule="constant", warmup=0.0)


@pytest.fixture
def recipe(corpus: Path, tmp_path: Path) -> Recipe:
    return Recipe(
        paths=(str(corpus),),
        out=str(tmp_path / "run"),
        max_steps=20,
        model=MODEL,
        optim=MUON,
        trainer=TRAINER,
    )


def on_devices(recipe: Recipe, devices: int, micro_batch_size: int = 6) -> Recipe:
    """With the same micro-batches whatever the number of devices.

    Two of them have one sum, bit by bit, wherever they are computed; more are added up in another order.
    """
    return replace(recipe, trainer=replace(recipe.trainer, devices=devices, micro_batch_size=micro_batch_size))


def sharing_prefixes(recipe: Recipe, devices: int, prefix_ranks: int) -> Recipe:
    """As on_devices, with groups of so many devices that read the same windows."""
    trainer = replace(recipe.trainer, devices=devices, prefix_ranks=prefix_ranks, micro_batch_size=6)
    return replace(recipe, trainer=trainer)


class Processes:
    """A command in a session of its own: none of its processes outlives the test."""

    def __init__(self, folder: Path, recipe: Recipe, *launcher: object) -> None:
        self.out, self.stdout, self.stderr = Path(recipe.out), folder / "stdout", folder / "stderr"
        config = folder / "recipe.json"
        config.write_text(json.dumps(recipe.to_dict()))
        words = [*(launcher or [sys.executable]), "-m", "perceiver_ar.cli", "train", "--config", config]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        with open(self.stdout, "w") as stdout, open(self.stderr, "w") as stderr:
            self.process = subprocess.Popen(
                [str(word) for word in words], stdout=stdout, stderr=stderr, env=environment, start_new_session=True
            )

    def __enter__(self) -> "Processes":
        return self

    def __exit__(self, *exception: object) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def status(self) -> int:
        return self.process.wait(timeout=300)

    def lines(self) -> list[str]:
        return self.stderr.read_text().splitlines()

    def until(self, path: str) -> None:
        """A file is in the run directory that fits the pattern."""
        while not list(self.out.glob(path)):
            assert self.process.poll() is None, self.stderr.read_text()
            time.sleep(0.005)

    def rank(self, number: int) -> int:
        """The process id of a worker."""
        for folder in Path("/proc").iterdir():
            if folder.name.isdecimal() and int(folder.name) != self.process.pid:
                with suppress(OSError):
                    environment = (folder / "environ").read_bytes().split(b"\0")
                    mine = os.getpgid(int(folder.name)) in (self.process.pid, int(folder.name))
                    status = (folder / "stat").read_text().rsplit(")", 1)[1].split()
                    if mine and int(status[1]) == self.process.pid and b"LOCAL_RANK=%d" % number in environment:
                        return int(folder.name)
        raise AssertionError(f"no rank {number}")


def torchrun(devices: int, *options: object) -> list[object]:
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", devices, *options]


def parameters(run: str | Path) -> dict[str, Tensor]:
    return load_file(Path(run) / "model.safetensors")


def assert_same_parameters(run: str | Path, other: str | Path) -> None:
    """Each tensor within 1e-5 of its norm."""
    ours, theirs = parameters(run), parameters(other)
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert (ours[name] - theirs[name]).norm() <= 1e-5 * theirs[name].norm(), name


@pytest.fixture(scope="module")
def alone(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Runs on one device, by the optimizer's name."""
    folder = tmp_path_factory.mktemp("alone")
    for name, optim in (("muon", MUON), ("adamw", ADAMW)):
        recipe = Recipe((str(corpus),), str(folder / name), max_steps=20, model=MODEL, optim=optim, trainer=TRAINER)
        train(on_devices(recipe, 1, 6 if name == "muon" else 2))
    return {path.name: path for path in folder.iterdir()}


# Which windows each rank reads.


def test_ranks_that_share_prefixes_have_the_same_windows_and_groups_share_them_as_ranks_do(recipe: Recipe) -> None:
    windows = TrainingWindows(np.arange(2000) % 256, 32, 8, recipe.seed)
    groups = rank_batches(on_devices(recipe, 2), windows)
    ranks = rank_batches(sharing_prefixes(recipe, 6, 3), windows)
    for _ in range(8):
        expected, batches = [next(group) for group in groups], [next(rank) for rank in ranks]
        for rank, ours in enumerate(batches):
            theirs = expected[rank // 3]
            assert ours["weight"] == theirs["weight"]
            assert all(torch.equal(ours[name], theirs[name]) for name in ("tokens", "labels"))


def rank_batches(recipe: Recipe, windows: TrainingWindows, first_step: int = 0) -> list[Iterator[dict[str, Any]]]:
    def endless(rank: int) -> Iterator[dict[str, Any]]:
        batches = Batches(windows, recipe, rank)
        return (batch for step in count(first_step) for batch in batches.of_step(step, 0.0))

    return [endless(rank) for rank in range(recipe.trainer.devices)]


@pytest.mark.parametrize(("before", "after"), [(1, 1), (2, 2), (3, 3), (4, 4), (2, 3), (4, 1), (1, 3)])
def test_all_ranks_together_see_every_target_once_per_pass(recipe: Recipe, before: int, after: int) -> None:
    tokens = np.arange(2000)  # each tells where it stands
    windows = TrainingWindows(tokens, 32, 8, recipe.seed)
    recipe = replace(recipe, trainer=replace(TRAINER, batch_size=24, short_prefix=0.0))
    end = windows.first_window(2)
    steps, half = -(-end // 24), end // 48
    rows: list[Tensor] = []
    for devices, first, last in ((before, 0, half), (after, half, steps)):
        batches = rank_batches(on_devices(recipe, devices, 2), windows, first)
        for _ in range((last - first) * 12 // devices):
            rows += [next(rank)["labels"] for rank in batches]
    whole = windows.batch(0, steps * 24)["labels"]
    seen = torch.cat(rows)
    assert sorted(map(tuple, seen.tolist())) == sorted(map(tuple, whole.tolist()))
    targets = whole[:end][whole[:end] >= 0]
    assert torch.equal(targets.bincount()[1:], torch.full((1999,), 2))


@pytest.mark.parametrize("devices", [2, 3, 6])
def test_micro_batches_of_a_step_are_those_of_one_device_in_the_same_order(recipe: Recipe, devices: int) -> None:
    windows = TrainingWindows(np.arange(2000) % 256, 32, 8, recipe.seed)
    [alone] = rank_batches(on_devices(recipe, 1, 2), windows)
    together = rank_batches(on_devices(recipe, devices, 2), windows)
    for _ in range(4):  # steps
        for _ in range(6 // devices):
            for rank in together:
                ours, theirs = next(rank), next(alone)
                assert ours["weight"] == theirs["weight"]
                assert all(torch.equal(ours[name], theirs[name]) for name in ("tokens", "labels"))


@pytest.mark.parametrize(
    ("settings", "says"),
    [({"devices": 5}, "12 is not a multiple of devices 5"), ({"devices": 3, "micro_batch_size": 3}, "times devices 3")],
)
def test_steps_must_be_shared_evenly(settings: dict[str, int], says: str) -> None:
    with pytest.raises(InputError, match=says):
        replace(TRAINER, **settings)


# Whole runs.


def mean_bits(run: Path) -> float:
    """The training loss over the whole run; each row is the mean since the one before."""
    with open(run / "metrics.csv", newline="") as file:
        rows = [(int(row["step"]), float(row["train_bits"])) for row in csv.DictReader(file) if row["train_bits"]]
    steps = [0, *(step for step, _ in rows)]
    assert steps == sorted(set(steps))
    return sum((step - before) * bits for (step, bits), before in zip(rows, steps, strict=False)) / steps[-1]


def test_two_processes_give_the_parameters_of_one_with_accumulation(
    recipe: Recipe, alone: dict[str, Path], tmp_path: Path
) -> None:
    with Processes(tmp_path, on_devices(recipe, 2)) as two:
        assert two.status() == 0, two.lines()
    assert_same_parameters(recipe.out, alone["muon"])
    # One process writes and prints.
    assert json.loads(two.stdout.read_text())["steps"] == 20
    assert len([line for line in two.lines() if "held out" in line]) == 1
    assert len([line for line in two.lines() if "2 devices" in line]) == 1
    # And the losses that it prints are those of all.
    assert mean_bits(two.out) == pytest.approx(mean_bits(alone["muon"]), rel=1e-5)
    # One device can go on with it.
    longer = replace(on_devices(recipe, 1), max_steps=24)
    train(longer, resume=True)
    train(replace(longer, out=str(tmp_path / "straight")))
    assert_same_parameters(recipe.out, tmp_path / "straight")


def test_torchrun_says_how_many_processes_there_are(recipe: Recipe, alone: dict[str, Path], tmp_path: Path) -> None:
    recipe = replace(recipe, optim=ADAMW, trainer=replace(TRAINER, micro_batch_size=2))
    with Processes(tmp_path, recipe, *torchrun(2)) as two:
        assert two.status() == 0, two.lines()
    assert_same_parameters(recipe.out, alone["adamw"])


# From here on the test starts the ranks, as torchrun does.


def train_on(server: Server, folder: Path, recipe: Recipe, *options: object) -> None:
    """In as many processes as the recipe has devices."""
    (folder / "recipe.json").write_text(json.dumps(recipe.to_dict()))
    ranks = recipe.trainer.devices
    statuses = server.run_ranks(ranks, "train", "--config", folder / "recipe.json", *options)
    assert statuses == [0] * ranks, server.messages()


def test_all_processes_start_from_the_weights_of_another_run(
    server: Server, recipe: Recipe, alone: dict[str, Path], tmp_path: Path
) -> None:
    recipe = replace(recipe, init_from=str(alone["adamw"]), optim=ADAMW, max_steps=4, seed=1)
    train_on(server, tmp_path, on_devices(recipe, 3, 2))
    train(replace(on_devices(recipe, 1, 2), out=str(tmp_path / "straight")))
    assert_same_parameters(recipe.out, tmp_path / "straight")


def test_ranks_that_share_prefixes_give_the_parameters_of_one_process(
    server: Server, recipe: Recipe, alone: dict[str, Path], tmp_path: Path
) -> None:
    train_on(server, tmp_path, sharing_prefixes(recipe, 4, 2))
    assert_same_parameters(recipe.out, alone["muon"])
    assert len([line for line in server.messages() if "4 devices, 2 to a prefix" in line]) == 1
    assert mean_bits(Path(recipe.out)) == pytest.approx(mean_bits(alone["muon"]), rel=1e-5)
    ours, theirs = (json.loads((Path(run) / "summary.json").read_text()) for run in (recipe.out, alone["muon"]))
    for name in ("steps", "tokens_seen", "bits_per_byte"):
        assert ours[name] == pytest.approx(theirs[name], rel=1e-5)


SHARED = """
import torch
from perceiver_ar import PerceiverAR, Recipe
from perceiver_ar.config import PerceiverARConfig, TrainerConfig
from perceiver_ar.training.weighted_loss import WeightedLoss
torch.distributed.init_process_group("gloo")
recipe = Recipe(out="run", model=PerceiverARConfig(context_length=32, num_latents=8, dim=16, num_layers=1, num_heads=2),
                trainer=TrainerConfig(device="cpu", devices=2, prefix_ranks=2))
torch.manual_seed(0)
loss = WeightedLoss(PerceiverAR(recipe.model), recipe)
loss.prefix_group = torch.distributed.group.WORLD
tokens = torch.randint(256, (2, 33))
with torch.profiler.profile() as profile:
    loss({"tokens": tokens[:, :-1], "labels": tokens[:, -16:], "weight": 1.0}).backward()
counts = [event.count for event in profile.key_averages() if event.key in ("gloo:all_reduce", "gloo:all_gather")]
assert len(counts) == 2 and sum(counts) > 2, counts
assert loss.model.prefix_group is None
torch.distributed.destroy_process_group()
"""


def test_in_a_training_step_a_prefix_is_read_in_shares(server: Server) -> None:
    assert server.run_ranks(2, code=SHARED) == [0, 0], server.messages()


@pytest.mark.parametrize("strategy", [pytest.param("ddp", marks=pytest.mark.slow), "fsdp"])
def test_a_run_with_a_mean_of_its_weights_goes_on_with_other_shares_of_windows_prefixes_and_weights(
    server: Server, recipe: Recipe, tmp_path: Path, strategy: Literal["ddp", "fsdp"]
) -> None:
    recipe = replace(recipe, optim=replace(MUON, ema=0.5))
    shared = sharing_prefixes(recipe, 2, 2)
    shared = replace(shared, trainer=replace(shared.trainer, strategy=strategy), max_steps=10)
    train(replace(on_devices(recipe, 1), max_steps=5))
    train_on(server, tmp_path, shared, "--out", recipe.out, "--resume")
    assert json.loads(server.stdout.read_text())["steps"] == 10
    train(replace(on_devices(recipe, 1), max_steps=15), resume=True)
    train(replace(on_devices(recipe, 1), max_steps=15, out=str(tmp_path / "alone")))
    assert_same_parameters(recipe.out, tmp_path / "alone")


def test_devices_that_no_prefix_is_left_for_are_refused(recipe: Recipe, tmp_path: Path) -> None:
    alone = replace(recipe, trainer=replace(recipe.trainer, prefix_ranks=2))
    with pytest.raises(InputError, match="prefix_ranks is 2: devices must be a multiple of it, not 1"):
        train(alone)
    assert not Path(recipe.out).exists()


@pytest.mark.parametrize("optim", [pytest.param(ADAMW, marks=pytest.mark.slow), MUON], ids=["adamw", "muon"])
def test_fsdp_goes_on_with_a_run_of_one_device_and_one_device_with_its(
    server: Server, recipe: Recipe, tmp_path: Path, optim: OptimConfig
) -> None:
    recipe = replace(on_devices(recipe, 1, 2), optim=optim)
    train(replace(recipe, max_steps=10))
    spread = on_devices(recipe, 2, 2)
    spread = replace(spread, trainer=replace(spread.trainer, strategy="fsdp"), max_steps=20)
    train_on(server, tmp_path, spread, "--out", recipe.out, "--resume")
    assert json.loads(server.stdout.read_text())["steps"] == 20
    train(replace(recipe, out=str(tmp_path / "alone"), max_steps=20))
    assert_same_parameters(recipe.out, tmp_path / "alone")
    train(replace(recipe, max_steps=21), resume=True)
    train(replace(recipe, out=str(tmp_path / "alone"), max_steps=21), resume=True)
    assert_same_parameters(recipe.out, tmp_path / "alone")


@pytest.mark.slow
def test_a_rank_that_is_killed_comes_back_under_torchrun(recipe: Recipe, tmp_path: Path) -> None:
    recipe = replace(on_devices(recipe, 2), max_steps=400)
    recipe = replace(recipe, trainer=replace(recipe.trainer, checkpoint_every="0.2s", evaluations=0))
    with Processes(tmp_path, recipe, *torchrun(2, "--max-restarts", 3)) as processes:
        processes.until("checkpoints/step-*.json")
        os.kill(processes.rank(1), signal.SIGKILL)
        assert processes.status() == 0, processes.lines()
    assert any("resuming" in line for line in processes.lines())
    train(replace(on_devices(recipe, 1), out=str(tmp_path / "alone")))
    assert_same_parameters(recipe.out, tmp_path / "alone")


def test_a_signal_to_one_process_stops_all_after_the_same_step(recipe: Recipe, tmp_path: Path) -> None:
    recipe = replace(on_devices(recipe, 2), max_steps=100_000)
    with Processes(tmp_path, recipe) as processes:
        processes.until("metrics.csv")
        while len((Path(recipe.out) / "metrics.csv").read_text().splitlines()) < 2:
            time.sleep(0.01)
        processes.process.send_signal(signal.SIGTERM)
        assert processes.status() == 130, processes.lines()
    assert processes.lines()[-1].startswith("perceiver-ar: stopped at step "), processes.lines()
    steps = int(processes.lines()[-1].split("step ")[1].split(",")[0].replace(",", ""))
    train(replace(on_devices(recipe, 1), max_steps=steps + 1), resume=True)
    train(replace(on_devices(recipe, 1), max_steps=steps + 1, out=str(tmp_path / "alone")))
    assert_same_parameters(recipe.out, tmp_path / "alone")


def test_wrong_input_costs_one_line_whatever_the_number_of_processes(recipe: Recipe, tmp_path: Path) -> None:
    Path(recipe.out).mkdir()
    (Path(recipe.out) / "thesis.tex").write_text("...")
    with Processes(tmp_path, on_devices(recipe, 2)) as two:
        assert two.status() == 2
    assert len(two.lines()) == 1 and "already exists" in two.lines()[0]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_process_that_waits_for_others_obeys_signals(
    server: Server, recipe: Recipe, tmp_path: Path, number: int
) -> None:
    (tmp_path / "recipe.yaml").write_text(dump_yaml(recipe.to_dict()))
    waiting = lambda: "Initializing distributed" in server.stderr.read_text()  # noqa: E731
    argv = ["train", "--config", tmp_path / "recipe.yaml"]
    assert server.run(*argv, variables=variables(0, 2, 0), signals=[(waiting, number)]) == -number

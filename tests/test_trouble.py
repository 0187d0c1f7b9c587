"""What goes wrong in training is said early, with the place and the remedy: each fault is produced for real."""

import json
import os
import random
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import Server
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from perceiver_ar import InputError, PerceiverAR, Recipe, Run, train
from perceiver_ar.config import OptimConfig, PerceiverARConfig, TrainerConfig
from perceiver_ar.data.sampler import TrainingWindows
from perceiver_ar.data.tokens import TokenFile
from perceiver_ar.training.checkpoints import Checkpoints
from perceiver_ar.training.resources import deterministic
from perceiver_ar.training.trouble import first_not_finite, free_bytes, largest_micro_batch, out_of_memory

MODEL = PerceiverARConfig(context_length=32, num_latents=8, dim=16, num_layers=1, num_heads=2)
TRAINER = TrainerConfig(
    batch_size=4,
    precision="32",
    device="cpu",
    evaluations=0,
    evaluation_tokens=100,
    sample_tokens=0,
    short_prefix=0.0,
    blocks=1,
)
POISON = ord("#")


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    """Of three documents; one rare character in each."""
    rng = random.Random(0)
    for number in range(3):
        text = "".join(rng.choice(["the ", "cat ", "sat ", "on ", "mat\n"]) for _ in range(400))
        (tmp_path / f"{number}.txt").write_text(text[:700] + "#" + text[700:])
    return Recipe(
        paths=tuple(str(tmp_path / f"{number}.txt") for number in range(2)),
        out=str(tmp_path / "run"),
        max_steps=3,
        model=MODEL,
        optim=OptimConfig(schedule="constant", warmup=0.0),
        trainer=TRAINER,
    )


def poison(run: str, name: str, row: int | None, value: float) -> None:
    """Writes `value` into weights of the newest checkpoint, which stays a whole one."""
    checkpoints = Checkpoints(Path(run) / "checkpoints")
    newest = checkpoints.newest()
    assert newest is not None
    content = torch.load(newest.path, weights_only=True)
    weights: Tensor = content["state_dict"][f"model.{name}"]
    weights[slice(None) if row is None else row] = value
    with checkpoints.writing(newest.step) as temporary:
        torch.save(content, temporary)


def files(run: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (Path(run) / "checkpoints").iterdir()}


def test_steps_that_meet_a_poisoned_token_are_skipped_and_counted_and_all_others_made(
    recipe: Recipe, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = replace(recipe, data=replace(recipe.data, validation=(recipe.paths[0].replace("0.txt", "2.txt"),)))
    recipe = replace(recipe, trainer=replace(TRAINER, evaluation_tokens=50))  # up to 500, so before the poison
    train(recipe)
    poison(recipe.out, "embed.weight", POISON, float("nan"))
    longer = replace(recipe, max_steps=150)
    windows = TrainingWindows(TokenFile.open(Path(recipe.out) / "tokens" / "train"), 32, 8, recipe.seed)
    poisoned = [step + 1 for step in range(3, 150) if (windows.batch(4 * step, 4)["tokens"] == POISON).any()]
    assert 0 < len(poisoned) < 50
    capsys.readouterr()
    summary = train(longer, resume=True)
    assert summary["skipped_steps"] == len(poisoned) and summary["steps"] == 150
    said = [line for line in capsys.readouterr().err.splitlines() if "skipped" in line]
    assert said == [f"step {step} skipped: the gradient norm is nan" for step in poisoned]
    weights = load_file(Path(recipe.out) / "model.safetensors")
    rest = torch.arange(256) != POISON
    assert weights.pop("embed.weight")[rest].isfinite().all()
    assert all(tensor.isfinite().all() for tensor in weights.values())


def test_a_few_such_steps_in_a_row_end_the_run_with_a_diagnosis_and_its_last_good_state(recipe: Recipe) -> None:
    train(recipe)
    poison(recipe.out, "self_attention.0.mlp.up_proj.weight", 3, float("inf"))
    before = files(recipe.out)
    with pytest.raises(
        InputError, match=r"diverged: the 5 steps up to 8 gave .*; self_attention.0.mlp.up_proj.weight holds 16 values"
    ):
        train(replace(recipe, max_steps=50), resume=True)
    assert files(recipe.out) == before


def test_too_high_a_learning_rate_ends_the_run_with_a_diagnosis(recipe: Recipe) -> None:
    optim = OptimConfig(name="adamw", lr=1e30, schedule="constant", warmup=0.0, grad_clip=0.0)
    with pytest.raises(InputError, match=r"diverged: .* lower optim.lr"):
        train(replace(recipe, optim=optim, max_steps=50))
    assert "training diverged" in Run(recipe.out).stopped_file.read_text()


def test_weights_that_gave_no_finite_gradients_in_the_last_steps_are_not_saved(recipe: Recipe) -> None:
    optim = OptimConfig(name="adamw", lr=1e30, schedule="constant", warmup=0.0, grad_clip=0.0)
    with pytest.raises(InputError, match=r"diverged: the last \d steps gave no finite gradients"):
        train(replace(recipe, optim=optim, max_steps=4))
    assert not Run(recipe.out).weights_file.exists()


def test_the_first_layer_that_gives_no_finite_output_is_named() -> None:
    model = PerceiverAR(MODEL.replace(init="normal", num_layers=3))
    tokens = torch.randint(256, (1, 32))
    torch.nn.init.constant_(model.self_attention[1].qkv_proj.weight, 3e38)  # type: ignore[union-attr, arg-type]
    assert "first layer whose output is not finite is self_attention.1.qkv_proj" in first_not_finite(
        model, lambda: model(tokens)
    )
    assert not any(module._forward_hooks for module in model.modules())
    assert "their gradients are not" in first_not_finite(PerceiverAR(MODEL), lambda: None)


def test_a_spike_of_the_gradient_is_skipped_where_that_is_asked_for(
    recipe: Recipe, capsys: pytest.CaptureFixture[str]
) -> None:
    guarded = replace(recipe, optim=replace(recipe.optim, skip_spikes=1.3), max_steps=60)
    summary = train(guarded)
    said = [line for line in capsys.readouterr().err.splitlines() if "but usually" in line]
    assert 0 < len(said) == summary["skipped_steps"] < 40
    # A run that is resumed remembers what is usual.
    halved = replace(guarded, out=f"{recipe.out}-halved")
    train(replace(halved, max_steps=31))
    assert train(replace(halved, max_steps=60), resume=True)["skipped_steps"] == summary["skipped_steps"]
    ours, theirs = (load_file(Path(each.out) / "model.safetensors") for each in (guarded, halved))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


# Memory.


BIG = {
    "model.context_length": 16384, "model.num_latents": 1024, "model.dim": 128, "model.num_layers": 1,
    "model.num_heads": 2, "trainer.batch_size": 128, "trainer.device": "cpu", "trainer.precision": 32,
    "trainer.evaluations": 0, "trainer.sample_tokens": 0, "trainer.short_prefix": 0, "model.prefix_chunk": 0,
    "trainer.evaluation_tokens": 2, "max_steps": 1,
}  # fmt: skip


LITTLE_MEMORY = """
import resource, sys
from perceiver_ar.cli import main

resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
sys.exit(main(argv))
"""


def train_in_little_memory(server: Server, folder: Path, gigabytes: float, *options: str) -> int:
    """The exit status."""
    (folder / "corpus.txt").write_text("tell me more " * 4000)
    words = [word for name, value in BIG.items() for word in (f"--{name}", str(value))]
    argv = ["train", str(folder / "corpus.txt"), "--out", str(folder / "run"), *words, *options]
    return server.run(code=LITTLE_MEMORY, given={"limit": int(gigabytes * 1e9), "argv": argv})


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux keeps to the limit")
def test_out_of_memory_names_what_to_lower_and_by_how_much(server: Server, tmp_path: Path) -> None:
    assert train_in_little_memory(server, tmp_path, 6) == 2, server.messages()
    last = server.messages()[-1]
    assert "out of memory: micro-batches of 128 windows need about" in last
    assert "--resume with trainer.micro_batch_size 64 (about " in last


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux keeps to the limit")
def test_a_network_that_does_not_fit_says_how_large_it_is(server: Server, tmp_path: Path) -> None:
    assert train_in_little_memory(server, tmp_path, 6, "--model.dim=32768") == 2, server.messages()
    last = server.messages()[-1]
    assert "the weights alone take" in last and "lower model.dim" in last


def test_without_windows_to_give_up_other_settings_are_named() -> None:
    recipe = Recipe(out="x", trainer=replace(TRAINER, micro_batch_size=1))
    assert "trainer.activation_checkpointing" in out_of_memory(recipe, 10**6, "cpu")
    recipe = replace(recipe, trainer=replace(recipe.trainer, activation_checkpointing=True))
    assert "lower model.context_length" in out_of_memory(recipe, 10**6, "cpu")


@pytest.mark.parametrize(("devices", "ranks"), [(1, 1), (2, 1), (6, 3)])
def test_the_largest_micro_batch_fits_divides_and_the_next_one_would_not_fit(devices: int, ranks: int) -> None:
    from perceiver_ar.costs import training_bytes

    model = PerceiverARConfig(prefix_chunk=0)
    trainer = replace(TRAINER, batch_size=24, devices=devices, prefix_ranks=ranks)
    recipe = Recipe(out="x", model=model, trainer=trainer)
    sizes = [size for size in (1, 2, 3, 4, 6, 8, 12, 24) if 24 // (devices // ranks) % size == 0]
    for size, following in zip(sizes, [*sizes[1:], None], strict=True):
        enough = training_bytes(recipe, 10**6, size)
        assert largest_micro_batch(recipe, 10**6, "cpu", enough) == size
        if following:
            assert largest_micro_batch(recipe, 10**6, "cpu", training_bytes(recipe, 10**6, following) - 1) == size
    assert largest_micro_batch(recipe, 10**6, "cpu", 1000.0) is None


@pytest.mark.parametrize("launcher", ["torchrun", "SLURM"])
def test_find_batch_looks_at_one_machine_only(
    launcher: str, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slurm = {"SLURM_NTASKS": "2", "SLURM_JOB_NAME": "train", "SLURM_STEP_ID": "0"}
    slurm |= {"SLURM_NODEID": "0", "SLURM_PROCID": "0"}
    torchrun = {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}
    for name, value in (slurm if launcher == "SLURM" else torchrun).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match="--find_batch measures one machine"):
        train(recipe, find_batch=True)


def test_free_memory_is_some_and_not_more_than_there_is() -> None:
    assert 1e7 < free_bytes("cpu") <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux keeps to the limit")
def test_find_batch_takes_what_fits_and_the_run_succeeds(server: Server, tmp_path: Path) -> None:
    assert train_in_little_memory(server, tmp_path, 8, "--find_batch") == 0, server.messages()
    recipe: Any = json.loads(server.stdout.read_text())
    assert recipe["steps"] == 1
    [line] = [line for line in server.messages() if line.startswith("micro-batches of")]
    assert 1 <= int(line.split()[2]) < 64


@pytest.mark.parametrize("wanted", [False, True])
def test_a_deterministic_run_lets_torch_take_only_deterministic_algorithms_until_it_ends(
    recipe: Recipe, wanted: bool
) -> None:
    def note(module: nn.Module, inputs: Any) -> None:
        found.add(torch.are_deterministic_algorithms_enabled())

    found, hook = set[bool](), register_module_forward_pre_hook(note)
    try:
        train(replace(recipe, trainer=replace(recipe.trainer, deterministic=wanted)))
    finally:
        hook.remove()
    assert found == {wanted} and not torch.are_deterministic_algorithms_enabled()


def test_what_a_program_has_set_for_itself_is_back_after_training() -> None:
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with deterministic():
            assert not torch.is_deterministic_algorithms_warn_only_enabled()
        assert torch.is_deterministic_algorithms_warn_only_enabled()
    finally:
        torch.use_deterministic_algorithms(False)

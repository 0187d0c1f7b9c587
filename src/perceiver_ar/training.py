"""Training: from files to a run directory, on Lightning's Trainer.

A run is a function of its recipe. The weights come from the seed, training window i from the seed and i, the randomness
of step k from the seed and k. So a run that was killed and resumed makes exactly the steps of an undisturbed one.
(Bounded by `max_time` instead of `max_steps`, the learning rate follows the clock, and no two runs are the same.)

On several devices every process (rank) runs all of this: each takes its share of the micro-batches of a step, or of the
prefix of the same ones, all agree on the clock and on stopping, and the first one alone writes, prints and measures.
"""

import csv
import errno
import importlib.util
import logging
import math
import os
import shlex
import shutil
import signal
import statistics
import threading
import time
import timeit
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.fabric.plugins.environments.lsf import LSFEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_only
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from perceiver_ar.checkpoints import Checkpoint, Checkpoints
from perceiver_ar.config import Recipe, TrainerConfig, parse_duration
from perceiver_ar.data.codec import Codec, load_codec, save_codec
from perceiver_ar.data.modalities import make_codec, official_split, recognise
from perceiver_ar.data.rows import find_rows
from perceiver_ar.data.sources import find_files, standard_library
from perceiver_ar.data.tokens import TokenFile, Windows, prepare
from perceiver_ar.errors import InputError, require
from perceiver_ar.evaluation import (
    Evaluation,
    compressors,
    evaluate,
    evaluate_context_lengths,
    write_table,
)
from perceiver_ar.files import TEMPORARY, atomic_path, write_text
from perceiver_ar.generation import generate
from perceiver_ar.lock import locked
from perceiver_ar.memory import keep_freed_memory
from perceiver_ar.model import PerceiverAR
from perceiver_ar.objective import head_loss, next_token_loss
from perceiver_ar.optim import lr_factor, make_optimizer, whole
from perceiver_ar.origin import Origin, fill_in
from perceiver_ar.report import write_report
from perceiver_ar.run import Run
from perceiver_ar.streaming import SHARE, device_memory
from perceiver_ar.tracking import Track, check_tracker, tracking
from perceiver_ar.trouble import (
    ROOM,
    first_not_finite,
    free_bytes,
    gigabytes,
    is_out_of_memory,
    largest_micro_batch,
    out_of_memory,
)

RANK: int = rank_zero_only.rank  # of this process among those of the run, from the environment; 0 writes and prints
console = Console(stderr=True, highlight=False, markup=False, quiet=RANK != 0)
PRECISIONS: dict[str, Literal["32", "bf16", "fp16"]] = {"32-true": "32", "bf16-mixed": "bf16", "16-mixed": "fp16"}
FIRST = "PERCEIVER_AR_FIRST_PROCESS"  # has the id of the process that has started this one as a further rank
FAILURES = 5  # so many steps in a row without finite gradients end the run
SPIKES = 100  # gradient norms that a spike is measured against


def say(message: str, style: str | None = None) -> None:
    """One message on stderr, above the progress bar. A terminal may wrap it, a log does not."""
    console.print(message, style=style, soft_wrap=True)


class Interrupted(KeyboardInterrupt):
    """Training ended early because the user asked for it; the message says how to go on."""


SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
TERMINALS = [stream for stream in (1, 2) if os.isatty(stream)]  # once a terminal has hung up, nobody can tell


def signals_taken(handler: Callable[[int, Any], None]) -> dict[int, Any]:
    """Gives SIGINT, SIGTERM and SIGHUP to `handler`; returns their handlers so far. A signal that is ignored stays so,
    as nohup wants it. Only the main thread can take signals."""
    if threading.current_thread() is not threading.main_thread():
        return {}
    wanted = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
    return {number: signal.signal(number, handler) for number in wanted}


def without_terminal() -> None:
    """After a SIGHUP, output to the terminal is dropped: writing to one that is gone raises OSError."""
    for stream in TERMINALS:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)


@contextmanager
def ending_on_signals() -> Iterator[None]:
    """Meanwhile a signal raises Interrupted, so that what is half made is removed."""

    def stop(number: int, frame: Any) -> None:
        if number not in (signal.SIGINT, signal.SIGTERM):
            without_terminal()
        raise Interrupted("interrupted")

    handlers = signals_taken(stop)
    try:
        yield
    finally:
        while handlers:
            signal.signal(*handlers.popitem())


class StopAtOnce(BaseException):
    """A signal that does not wait for the running step. (At a KeyboardInterrupt Lightning would exit.)"""


def train(recipe: Recipe, *, resume: bool = False, find_batch: bool = False) -> dict[str, Any]:
    """Makes the run that `recipe` describes, or goes on with the one in `recipe.out`.

    Started again by torchrun or SLURM after one of its processes died, it goes on with what it had begun. `find_batch`
    takes the largest micro-batch that the memory holds instead of the recipe's.

    Returns its summary: `bits_per_byte`, `nats_per_token` and more on the held-out documents (absent when nothing is
    held out), `gzip_bits_per_byte` and `xz_bits_per_byte` of the same bytes, `train_seconds`, `tokens_seen` (targets),
    `steps`, `skipped_steps`, `parameters`. It is empty in all processes but the first.

    Raises:
        InputError: the files, the settings or the run directory do not allow it, or another process is training there.
            Nothing half-made is left.
        Interrupted: stopped by SIGINT, SIGTERM or SIGHUP, and saved.
    """
    check_launcher(recipe.trainer)
    recipe = replace(recipe, trainer=replace(recipe.trainer, devices=world(recipe.trainer)[0]))
    devices, ranks = recipe.trainer.devices, recipe.trainer.prefix_ranks
    require(devices % ranks == 0, f"trainer.prefix_ranks is {ranks}: devices must be a multiple of it, not {devices}")
    run = Run(recipe.out)
    if run.path.exists() and not run.path.is_dir():
        raise InputError(f"{run.path} already exists and is a file: give another --out")
    if any(int(os.environ.get(name, 0)) for name in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")):
        resume = resume or run.recipe_file.exists()
    if resume:
        before = check_resumable(run, recipe)
        if recipe.trainer.precision == "auto":
            recipe = replace(recipe, trainer=replace(recipe.trainer, precision=before.trainer.precision))
        recipe = with_settings_taken(recipe, before)
        if (summary := run.summary()) is not None and not goes_further(recipe, before):
            say(
                f"{run.path} is finished ({summary['steps']} steps), so there is nothing to do. "
                "To train it further, resume with a larger --max_steps or --max_time."
            )
            return summary if RANK == 0 else {}
    with locked(run.path) if RANK == 0 else nullcontext():
        return prepare_and_fit(run, recipe, resume, find_batch)


def prepare_and_fit(run: Run, recipe: Recipe, resume: bool, find_batch: bool) -> dict[str, Any]:
    """`train`, once it is clear that there is something to do and that no other process does it."""
    if RANK == 0:
        precision = choose_precision(recipe.trainer)
        recipe = replace(recipe, trainer=replace(recipe.trainer, precision=PRECISIONS[precision]))  # not measured again
        with ending_on_signals():
            recipe = prepare_run(run, recipe, resume, find_batch)
    else:
        wait_for_first(run)
        recipe = with_settings_taken(recipe, run.recipe())
        first = run.recipe().trainer  # what was measured there
        if recipe.trainer.precision == "auto":
            recipe = replace(recipe, trainer=replace(recipe.trainer, precision=first.precision))
        if find_batch:
            recipe = replace(recipe, trainer=replace(recipe.trainer, micro_batch_size=first.micro_batch_size))
        precision = choose_precision(recipe.trainer)
    tokens, held_out, codec = prepare_tokens(run, recipe)
    recipe = replace(recipe, model=codec.fit(recipe.model))
    windows = make_windows(tokens, recipe, codec)
    tracked = recipe if RANK == 0 else replace(recipe, trainer=replace(recipe.trainer, tracker="none"))
    with tracking(run.path, tracked) as track, keep_freed_memory():
        return fit(run, recipe, windows, held_out, codec, precision, track)


def make_windows(tokens: TokenFile, recipe: Recipe, codec: Codec) -> Windows:
    """The sequence of training windows. Raises InputError where there are too few tokens."""
    require(
        recipe.trainer.prefix_growth == 0 or codec.document_length is None,
        "trainer.prefix_growth cannot be had with pictures, whose prefixes are never cut: leave it out",
    )
    model, blocks = recipe.model, recipe.blocks
    require(
        recipe.window_latents <= model.context_length,
        f"trainer.blocks is {blocks}, with {model.num_latents} latents each more than context_length "
        f"{model.context_length}: lower it",
    )
    require(
        blocks == 1 or model.blocks_allowed,
        f"trainer.blocks is {blocks}, which a network with latent_keys query, positions_from_end, learned_queries each "
        "or latents_per_position cannot have: leave it out",
    )
    return Windows(
        tokens,
        model.context_length,
        recipe.window_latents,
        recipe.seed,
        document_length=codec.document_length,
        augment=codec.augment if recipe.data.augment else None,
    )


def check_launcher(settings: TrainerConfig) -> None:
    """Raises InputError for variables of a launcher where none has started this process: it would wait for others, or
    take itself for another one.

    sbatch and salloc set SLURM_NTASKS for the srun in them, which is what sets SLURM_STEP_ID.
    """
    if TorchElasticEnvironment.detect() or os.environ.get(FIRST) == str(os.getppid()):
        return
    slurm = SLURMEnvironment.detect()
    if (slurm and "SLURM_STEP_ID" in os.environ) or LSFEnvironment.detect():
        return
    by_hand = {"RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()
    if by_hand and os.environ.get("WORLD_SIZE") == str(settings.devices):
        return
    alone = dict.fromkeys(("RANK", "LOCAL_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK"), 0) | {"WORLD_SIZE": 1}
    alone |= {"SLURM_NTASKS": 1} if slurm else {}
    alone |= {"LOCAL_RANK": -1} if settings.devices > 1 else {}  # Lightning then starts no others
    values = {name: os.environ.get(name, "") for name in alone}
    left = [name for name in alone if values[name].isdecimal() and int(values[name]) > alone[name]]
    require(
        not left,
        f"the environment has {', '.join(f'{name}={values[name]}' for name in left)}, but neither torchrun nor srun "
        f"has started this process: start it with one of them, or first `unset {' '.join(left)}`",
    )


def world(settings: TrainerConfig) -> tuple[int, int]:
    """Devices of the run, on how many machines."""
    if TorchElasticEnvironment.detect():
        processes = int(os.environ["WORLD_SIZE"])
        return processes, processes // int(os.environ["LOCAL_WORLD_SIZE"])
    if SLURMEnvironment.detect():
        return int(os.environ["SLURM_NTASKS"]), int(os.environ.get("SLURM_NNODES", 1))
    return settings.devices, 1


def prepare_run(run: Run, recipe: Recipe, resume: bool, find_batch: bool) -> Recipe:
    """Makes the run directory with tokens and codec, or checks the one to go on with; returns the complete recipe."""
    check_tracker(recipe.trainer.tracker)
    if not resume and recipe.init_from is not None:
        recipe = Origin.open(recipe.init_from).complete(recipe)
    if not resume and run.is_taken():
        raise InputError(f"{run.path} already exists: give another --out, go on with --resume, or remove it")
    if resume:
        check_weights_have_a_checkpoint(run)
    run.remove_unfinished_files()
    codec = None
    try:
        if not resume:  # first, so that a run killed at any later moment can be resumed
            run.write_recipe(recipe)
        take_weights(run, recipe)
        tokens, _, codec = prepare_tokens(run, recipe)
        recipe = replace(recipe, model=codec.fit(recipe.model))
        make_windows(tokens, recipe, codec)  # says if they are too few
        if find_batch:
            recipe = with_largest_micro_batch(recipe)
        Checkpoints(run.checkpoints).newest()  # says if all are damaged
        run.summary_file.unlink(missing_ok=True)  # from here on the run is unfinished
        run.write_recipe(recipe)
    except BaseException:
        if not resume:  # nothing was learned yet: leave no trace
            run.remove_prepared(codec)
        raise
    return recipe


def take_weights(run: Run, recipe: Recipe) -> None:
    """Copies what the run starts from into it, unless it has that or has gone on from there."""
    if recipe.init_from is None or run.initial.exists() or Checkpoints(run.checkpoints).all():
        return
    Origin.open(recipe.init_from).write(recipe.model, run.initial)


def with_settings_taken(recipe: Recipe, of: Recipe) -> Recipe:
    """With the settings of `of` that init_from decides."""
    return recipe if recipe.init_from is None else replace(recipe, model=of.model, modality=of.modality, data=of.data)


def wait_for_first(run: Run, seconds: float = 24 * 3600.0) -> None:
    """Until the first process has made what all read. Launchers end the others if it fails."""
    deadline = time.monotonic() + seconds
    while not (run.path / "codec.json").exists():
        if time.monotonic() > deadline:
            raise InputError(f"{run.path} does not appear: is it on a disk that all machines share?")
        time.sleep(0.1)


def with_largest_micro_batch(recipe: Recipe) -> Recipe:
    if recipe.trainer.devices > 1 and (TorchElasticEnvironment.detect() or SLURMEnvironment.detect()):
        raise InputError(
            "--find_batch looks at one machine: use it without torchrun or SLURM first, then give what it found"
        )
    with torch.device("meta"):
        parameters = PerceiverAR(recipe.model).num_parameters()
    device = choose_device(recipe.trainer)
    available = free_bytes(device)
    size = largest_micro_batch(recipe, parameters, device, ROOM[device] * available)
    if size is None:
        smallest = replace(recipe, trainer=replace(recipe.trainer, micro_batch_size=1))
        raise InputError(f"{out_of_memory(smallest, parameters, device)} ({gigabytes(available)} are free)")
    say(f"micro-batches of {size} windows, for {gigabytes(available)} of free memory")
    return replace(recipe, trainer=replace(recipe.trainer, micro_batch_size=size))


def check_resumable(run: Run, recipe: Recipe) -> Recipe:
    """The recipe so far. Raises InputError unless there is one and `recipe` keeps all that its steps depend on."""
    before = Run.open(run.path).recipe()
    if recipe.init_from is not None:
        data = before.data if recipe.modality == "auto" else recipe.data  # a recipe.yaml has all that was taken
        recipe = fill_in(recipe, before.model, before.modality, data)
    if (run.path / "codec.json").exists():
        recipe = replace(recipe, model=load_codec(run.path).fit(recipe.model))
    fixed = ("paths", "modality", "init_from", "seed", "model", "data", "optim")
    fixed += ("trainer.batch_size", "trainer.blocks", "trainer.short_prefix", "trainer.prefix_growth")
    was, now = flat(before.to_dict()), flat(recipe.to_dict())
    if recipe.blocks == before.blocks:
        now["trainer.blocks"] = was["trainer.blocks"]
    changed = [name for name in was if name.startswith(fixed) and was[name] != now[name]]
    if changed:
        changes = ", ".join(f"{name} changed from {was[name]!r} to {now[name]!r}" for name in changed)
        raise InputError(
            f"{run.path}: --resume goes on with the same recipe, but {changes}: "
            "leave that out, or start a new run in another --out"
        )
    return before


def check_weights_have_a_checkpoint(run: Run) -> None:
    """Raises InputError for a trained model without checkpoints: training would start anew and overwrite it.

    A kill within the first save leaves weights without a checkpoint, too, but also a part of that: such weights are
    removed, to be made again.
    """
    if Checkpoints(run.checkpoints).all() or not (run.weights_file.exists() or run.summary_file.exists()):
        return
    begun = [*run.checkpoints.glob(f"{TEMPORARY}*"), *run.checkpoints.glob("step-*.ckpt")]
    if run.summary_file.exists() or not begun:
        raise InputError(
            f"{run.path} holds a trained model but no checkpoint to go on from, and training from the start would "
            f"overwrite it: put {run.checkpoints} back, or start a new run from its weights with "
            f"--init_from {shlex.quote(str(run.path))} and another --out"
        )
    run.weights_file.unlink()


def flat(settings: dict[str, Any], group: str = "") -> dict[str, Any]:
    """Settings in groups as one table, by names such as model.dim."""
    parts = (
        flat(value, f"{name}.") if isinstance(value, dict) else {group + name: value}
        for name, value in settings.items()
    )
    return {name: value for part in parts for name, value in part.items()}


def goes_further(recipe: Recipe, before: Recipe) -> bool:
    """Whether `recipe` asks for more training than the recipe `before` did."""
    steps = (recipe.max_steps or math.inf) > (before.max_steps or math.inf)
    seconds = (recipe.max_seconds or math.inf) > (before.max_seconds or math.inf)
    return steps or seconds


def choose_precision(settings: TrainerConfig) -> str:
    """Lightning's name for the precision to compute in. Raises InputError for what the device cannot do."""
    device = choose_device(settings)
    if settings.precision == "auto":
        if device == "cuda":
            fast = torch.cuda.is_bf16_supported()
        else:
            fast = device == "cpu" and torch.cpu._is_avx512_bf16_supported() and bfloat16_is_faster()
        return "bf16-mixed" if fast else "32-true"
    if settings.precision == "fp16" and device != "cuda":
        raise InputError(f"trainer.precision is fp16, which needs a CUDA device, not {device}: use bf16, 32 or auto")
    return {name: lightnings for lightnings, name in PRECISIONS.items()}[settings.precision]


def bfloat16_is_faster() -> bool:
    """Whether the CPU multiplies bfloat16 matrices clearly faster than float32 ones.

    Having the instructions does not say so: AMD's have four times the pace of float32, Intel's without AMX half of it.
    """

    def seconds(dtype: torch.dtype) -> float:
        matrix = torch.ones(512, 512, dtype=dtype)
        times = [timeit.timeit(lambda: matrix @ matrix, number=1) for _ in range(10)]
        return min(times)

    return 1.5 * seconds(torch.bfloat16) < seconds(torch.float32)


def choose_device(settings: TrainerConfig) -> str:
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if settings.device == "auto":
        device = "cuda" if available["cuda"] else "mps" if available["mps"] and settings.devices == 1 else "cpu"
    else:
        device = settings.device
    if not available[device]:
        raise InputError(f"trainer.device is {settings.device}, but there is none on this machine: use auto")
    total, machines = world(settings)
    if device == "cuda" and total // machines > torch.cuda.device_count():
        raise InputError(f"trainer.devices is {total}, but this machine has {torch.cuda.device_count()} GPUs")
    if device == "mps" and total > 1:
        raise InputError(f"trainer.devices is {total}, but there is only one MPS device: use 1")
    return device


def prepare_tokens(run: Run, recipe: Recipe) -> tuple[TokenFile, TokenFile | None, Codec]:
    """The token files of the run and its codec: opened if they are there, made from the files if not."""
    if (run.path / "codec.json").exists():  # written last
        held_out = (run.tokens / "validation.json").exists()
        validation = TokenFile.open(run.tokens / "validation") if held_out else None
        return TokenFile.open(run.tokens / "train"), validation, load_codec(run.path)
    data = recipe.data
    sources = find_files(recipe.paths) if recipe.paths else standard_library()
    out = run.path.resolve()  # may lie in a folder that is trained on
    sources = [source for source in sources if out not in Path(os.path.realpath(source.path)).parents]
    held_out_sources = find_files(data.validation) if data.validation else None
    modality = recipe.modality
    if modality == "auto":
        modality = recognise(sources) if recipe.paths else "text"
    if modality == "text":
        sources = find_rows(sources, data.column)
        held_out_sources = held_out_sources and find_rows(held_out_sources, data.column)
    ruled = data.group_by is not None or held_out_sources is not None
    if modality in ("midi", "audio") and not ruled and (split := official_split(sources)):
        sources, held_out_sources, line = split
        say(line)
    codec = load_codec(run.initial) if recipe.init_from is not None else make_codec(modality, data, sources)
    tokens, validation = prepare(
        sources,
        codec,
        run.tokens,
        validation_fraction=data.validation_fraction,
        validation_sources=held_out_sources,
        split_on=data.split_on,
        group_by=data.group_by,
        seed=recipe.seed,
    )
    save_codec(codec, run.path)
    if validation is None and data.validation_fraction > 0:
        say("Only one document (or group), so none is held out: give --data.validation or --data.split_on to measure.")
    return tokens, validation, codec


class PerceiverARModule(pl.LightningModule):
    """The network with its learning rule, as Lightning wants it."""

    def __init__(self, model: PerceiverAR, recipe: Recipe, rank: int = 0) -> None:
        super().__init__()
        self.model, self.recipe, self.rank = model, recipe, rank
        model.activation_checkpointing = recipe.trainer.activation_checkpointing
        # In lists, so that their parameters are not listed, and saved, a second time.
        self.compiled: list[Any] = [torch.compile(model) if recipe.trainer.compile else model]
        self.prefix_group: Any = None  # of the ranks that have the same windows
        self.mean: dict[str, Tensor] = {}  # of the weights, where the recipe asks for it; from the first step on
        self.first_window = 0
        self.tokens_seen = 0  # targets of all steps; windows at the ends of a pass, or of a picture, have fewer
        self.seconds_before = 0.0  # spent in earlier parts of a resumed run
        self.started = time.perf_counter()
        self.now = 0.0  # the time spent training that all ranks go by
        self.step_loss: Tensor | float = 0.0  # of the running step, so far
        self.loss_sum: Tensor | float = 0.0
        self.losses = 0
        self.grad_norm = 0.0
        self.norms: list[float] = []  # of the last steps
        self.step_skipped = False
        self.skipped = 0
        self.failures = 0  # steps without finite gradients in a row, up to the last one
        self.trouble: str | None = None
        """Why the run cannot go on."""

    @property
    def data_rank(self) -> int:
        """Of this process's group among those that share the windows; neighbours share a prefix."""
        return self.rank // self.recipe.trainer.prefix_ranks

    def configure_model(self) -> None:
        """Finds who shares a prefix; under FSDP, divides the network among all ranks, layer by layer.

        Gradients are averaged over all ranks, too. Those of a prefix group are the same but for rounding, and this way
        nothing ever lets their weights drift apart.
        """
        settings = self.recipe.trainer
        if settings.prefix_ranks > 1 and self.prefix_group is None:
            shape = (settings.data_ranks, settings.prefix_ranks)
            mesh = init_device_mesh(choose_device(settings), shape, mesh_dim_names=("data", "prefix"))
            self.prefix_group = mesh["prefix"].get_group()
        if settings.sharded and not isinstance(self.model, FSDPModule):
            assert self.device_mesh is not None
            mesh = self.device_mesh["data_parallel"]
            for layer in (*self.model.cross_attention, *self.model.self_attention, self.model):
                fully_shard(layer, mesh=mesh)

    def usable(self) -> PerceiverAR:
        """What is measured, sampled from, and written for use: the network with the running mean of the weights if
        there is one. Under FSDP all ranks have to call this, and only the first has the weights."""
        if not (self.mean or self.recipe.trainer.sharded):
            return self.model
        state = self.whole_on_first(self.mean or self.weights())
        model = PerceiverAR(self.recipe.model)
        if state:
            model.load_state_dict(state)
        return model.to(self.device)

    def weights(self) -> dict[str, Tensor]:
        """By all their names."""
        return {name: parameter.detach() for name, parameter in self.model.named_parameters(remove_duplicate=False)}

    def whole_on_first(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """All of what FSDP has divided, in the first rank's main memory; nothing on the others."""
        if not self.recipe.trainer.sharded:
            return state
        device = choose_device(self.recipe.trainer)  # Lightning takes the network from it at the end
        gathered = ((name, whole(tensor.to(device))) for name, tensor in state.items())
        return {name: tensor.cpu() for name, tensor in gathered if self.rank == 0}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        dtype = torch.bfloat16 if self.recipe.trainer.precision == "bf16" else torch.float32
        return make_optimizer(self.model, self.recipe.optim, dtype)

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: Any = None, gradient_clip_algorithm: Any = None
    ) -> None:
        limit = self.recipe.optim.grad_clip or math.inf
        self.grad_norm = float(whole(nn.utils.clip_grad_norm_(self.model.parameters(), limit)))
        if self.trainer.precision == "16-mixed" and not math.isfinite(self.grad_norm):
            return  # the scaler tries how far it can go, and skips such steps itself
        reason = self.why_to_skip()
        self.step_skipped = reason is not None
        if math.isfinite(self.grad_norm):
            self.failures = 0
            self.norms = [*self.norms, self.grad_norm][-SPIKES:]
        else:
            self.failures += 1
        if reason is not None:
            for parameter in self.model.parameters():
                parameter.grad = None  # which our optimizers leave as it is, with all state
            self.skipped += 1
            say(f"step {self.steps + 1:,} skipped: {reason}")

    def why_to_skip(self) -> str | None:
        """Why the gradient of the running step would do harm; None: it would not. The same on all ranks."""
        if not math.isfinite(self.grad_norm):
            return f"the norm of the gradient is {self.grad_norm}"
        factor = self.recipe.optim.skip_spikes
        if factor and len(self.norms) >= 10 and self.grad_norm > factor * (usual := statistics.median(self.norms)):
            return f"the norm of the gradient is {self.grad_norm:.3g}, where {usual:.3g} is usual"
        return None

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        factor = lr_factor(self.recipe.optim, self.progress())
        for group in self.optimizers(use_pl_optimizer=False).param_groups:  # type: ignore[union-attr]
            group["lr"] = group["initial_lr"] * factor
        place = batch_idx * self.recipe.trainer.data_ranks + self.data_rank  # of the micro-batch among all of the run
        torch.manual_seed((self.recipe.seed * 1_000_003 + place) % 2**63)

    def forward_loss(self, batch: dict[str, Any]) -> Tensor:
        tokens, labels, rule = batch["tokens"], batch["labels"], self.recipe.optim
        inputs = {"prefix_len": tokens.shape[1] - labels.shape[1], "mask": batch.get("mask")}
        inputs["blocks"] = labels.shape[1] // self.model.config.num_latents
        self.model.prefix_group = self.prefix_group
        try:
            if self.large_vocabulary(labels.numel()):
                return batch["weight"] * head_loss(self.model.latents(tokens, **inputs), self.model.head, labels)
            logits = self.compiled[0](tokens, **inputs)
        finally:
            self.model.prefix_group = None  # whoever measures or samples is alone
        loss = next_token_loss(logits, labels, label_smoothing=rule.label_smoothing, z_loss=rule.z_loss)
        return batch["weight"] * loss

    def large_vocabulary(self, targets: int) -> bool:
        """Whether logits would take a large share of the memory, and nothing wants them, or the network, whole."""
        settings, rule, device = self.recipe.trainer, self.recipe.optim, self.device
        size = 4 * targets * self.recipe.model.vocab_size
        whole = settings.compile or settings.strategy == "fsdp" or rule.label_smoothing or rule.z_loss
        return not whole and size > SHARE * device_memory(device.type, device.index or 0)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        loss = self.forward_loss(batch)
        self.step_loss = self.step_loss + loss.detach()
        return loss

    def end_step(self, batch: dict[str, Any]) -> None:
        """What is to be done after each optimizer step; `batch` is its last micro-batch."""
        self.tokens_seen += batch["targets"]
        if not self.step_skipped:
            self.loss_sum, self.losses = self.loss_sum + self.step_loss, self.losses + self.accumulate
            if self.mean:
                # Short runs and beginnings would otherwise remember where they started.
                decay = min(self.recipe.optim.ema, (1 + self.steps) / (10 + self.steps))
                with torch.no_grad():
                    for name, own in self.weights().items():
                        self.mean[name].lerp_(own, 1 - decay)
        if self.failures == FAILURES:
            where = first_not_finite(self.model, lambda: self.forward_loss(batch))
            self.trouble = (
                f"training diverged: the {FAILURES} steps up to {self.steps} gave no finite gradients; {where}: "
                f"lower optim.lr or optim.muon_lr; what was saved before is kept in {self.recipe.out}"
            )
        self.step_loss = 0.0

    def take_mean_loss(self) -> float:
        """Mean loss in nats, over all ranks, since the last call."""
        mean = torch.as_tensor(self.loss_sum / max(1, self.losses), device=self.device)
        self.loss_sum, self.losses = 0.0, 0
        return float(self.trainer.strategy.reduce(mean, reduce_op="mean"))

    def agree(self, stop: bool) -> bool:
        """Takes the first rank's clock; returns whether any rank asks to stop."""
        self.now = self.seconds
        if self.recipe.trainer.devices > 1:
            own = torch.tensor([self.now if self.rank == 0 else 0.0, stop], dtype=torch.float64, device=self.device)
            torch.distributed.all_reduce(own, torch.distributed.ReduceOp.MAX)
            self.now, stop = own[0].item(), bool(own[1])
        return stop

    @property
    def accumulate(self) -> int:
        """Micro-batches of a step on each device."""
        settings = self.recipe.trainer
        return settings.batch_size // (settings.micro_batch * settings.data_ranks)

    @property
    def steps(self) -> int:
        return self.trainer.global_step

    @property
    def seconds(self) -> float:
        """Time spent training, evaluations included, over all parts of the run."""
        return self.seconds_before + time.perf_counter() - self.started

    def progress(self, step: int | None = None) -> float:
        """Share of the run that is done, 0 ... 1, half of the running step, or of another one, included."""
        step = self.steps if step is None else step
        by_steps = (step + 0.5) / self.recipe.max_steps if self.recipe.max_steps else 0.0
        by_time = self.now / self.recipe.max_seconds if self.recipe.max_seconds else 0.0
        return min(1.0, max(by_steps, by_time))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["seconds"] = self.seconds
        checkpoint["windows"] = self.steps * self.recipe.trainer.batch_size
        checkpoint["tokens_seen"] = self.tokens_seen
        checkpoint["skipped"] = self.skipped
        checkpoint["norms"] = list(self.norms)
        if self.mean:
            checkpoint["mean"] = self.whole_on_first(self.mean)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.seconds_before, self.first_window = checkpoint["seconds"], checkpoint["windows"]
        self.tokens_seen = checkpoint.get("tokens_seen", self.first_window * self.recipe.window_latents)
        self.skipped = checkpoint["skipped"]
        self.norms = list(checkpoint["norms"])
        self.mean = checkpoint.get("mean", {})
        # Lightning counts micro-batches, and there may now be more or fewer of them in a step.
        counts = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        further = checkpoint["global_step"] * self.accumulate - counts["total"]["ready"]
        for group in (counts["total"], counts["current"]):
            group.update({name: count + further for name, count in group.items()})

    def on_train_start(self) -> None:
        if self.recipe.optim.ema:
            weights = self.weights()
            self.mean = {name: divided_as(own, self.mean.get(name, own)) for name, own in weights.items()}


def divided_as(own: Tensor, values: Tensor) -> Tensor:
    """A copy of `values` on the device of `own`, divided among the ranks as FSDP has divided that."""
    if isinstance(own, DTensor) and not isinstance(values, DTensor):
        values = values.to(own.device_mesh.device_type)
        return distribute_tensor(values, own.device_mesh, own.placements, src_data_rank=None)
    return values.detach().to(own.device, copy=True)


class Batches:
    """The endless sequence of a rank's micro-batches, from the window on that the module says (a resumed run skips
    ahead). Of the micro-batches of a step, data rank r of k takes every k-th, from the r-th on.

    `weight` is a micro-batch's share of the targets of its step, times the number of micro-batches: a step's mean of
    the weighted mean losses is the mean over its targets, however it is divided. `targets` are those of the whole step.
    """

    def __init__(self, windows: Windows, module: PerceiverARModule) -> None:
        self.windows, self.module = windows, module

    def __iter__(self) -> Iterator[dict[str, Any]]:
        settings = self.module.recipe.trainer
        pieces, size = self.module.accumulate * settings.data_ranks, settings.batch_size
        first = self.module.first_window
        while True:
            targets = np.diff(self.windows.spans(first, size)).reshape(pieces, -1).sum(axis=1)
            total = int(targets.sum())
            weights = pieces * targets / total
            for i in range(self.module.data_rank, pieces, settings.data_ranks):
                batch = self.windows.batch(first + i * settings.micro_batch, settings.micro_batch)
                yield self.shorten(batch, first // size) | {"weight": float(weights[i]), "targets": total}
            first += size

    def shorten(self, batch: dict[str, Tensor], step: int) -> dict[str, Tensor]:
        """Cuts a prefix of P to 0, P/4, P/2 or 3P/4: at random in the share of the steps that the recipe says, and
        always to what it lets prefixes have by then.

        Few lengths, because kernels are made, and kept, for every new shape.
        """
        recipe = self.module.recipe
        random = np.random.default_rng((recipe.seed % 2**63, step))
        quarters = int(random.integers(4))
        if random.random() >= recipe.trainer.short_prefix:
            quarters = 4
        if growth := recipe.trainer.prefix_growth:
            quarters = min(quarters, int(5 * self.module.progress(step) / growth))
        if quarters == 4 or self.windows.document_length is not None:
            return batch
        prefix_len = self.windows.context_length - self.windows.num_latents
        cut = prefix_len - quarters * prefix_len // 4
        return {name: x if name == "labels" else x[:, cut:] for name, x in batch.items()}


class Watch(Callback):
    """All that happens between steps: the progress bar, metrics, evaluations and samples, checkpoints, stopping.

    What decides when something happens is the same on all ranks; what happens, the first one does.
    """

    COLUMNS: tuple[str, ...] = (
        "step",
        "tokens",
        "seconds",
        "train_bits",
        "validation_bits",
        "lr",
        "grad_norm",
        "tokens_per_second",
    )

    def __init__(
        self,
        run: Run,
        held_out: TokenFile | None,
        codec: Codec,
        recipe: Recipe,
        autocast: bool,
        files: "CheckpointFiles",
        track: Track,
    ) -> None:
        self.run, self.held_out, self.codec, self.recipe, self.files = run, held_out, codec, recipe, files
        self.track = track
        self.precision: Literal["32", "bf16"] = "bf16" if autocast else "32"
        self.signalled = False  # in this process
        self.stop_asked = self.finished = False  # in any, as all agreed
        self.disk_full = False
        self.handlers: dict[int, Any] = {}
        self.checkpoint_seconds = parse_duration(recipe.trainer.checkpoint_every, "trainer.checkpoint_every")
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}%"),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]} left"),
            console=console,
            disable=not console.is_terminal,
            transient=True,
        )

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        module = as_module(pl_module)
        module.started = time.perf_counter()
        module.agree(False)
        self.logged_at = self.saved_at = self.printed_at = module.now
        self.logged_tokens = module.tokens_seen
        self.evaluations_done = int(module.progress() * self.recipe.trainer.evaluations)
        if module.rank == 0:
            self.rows = [row for row in read_metrics(self.run.metrics_file) if int(row["step"]) <= module.steps]
            self.write_rows()
        self.task = self.bar.add_task("training", total=1.0, left="")
        self.bar.start()
        for number in self.handlers:  # Lightning has just taken one
            signal.signal(number, self.on_signal)

    @contextmanager
    def stopping_on_signals(self) -> Iterator[None]:
        """Meanwhile SIGINT, SIGTERM or SIGHUP ends the training after the running step, a second one at once."""
        self.handlers = signals_taken(self.on_signal)
        try:
            yield
        finally:
            self.bar.stop()
            while self.handlers:
                signal.signal(*self.handlers.popitem())

    def on_signal(self, number: int, frame: Any) -> None:
        if number not in (signal.SIGINT, signal.SIGTERM):
            without_terminal()
        if self.signalled:
            raise StopAtOnce
        self.signalled = True
        say("\nStopping after this step; once more to stop at once.")

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        module = as_module(pl_module)
        if (batch_idx + 1) % module.accumulate:
            return
        module.end_step(batch)
        self.stop_asked = module.agree(self.signalled)
        finished = module.progress() >= 1.0 if self.recipe.max_seconds else False
        self.finished = finished = finished or module.steps == self.recipe.max_steps
        if module.trouble:
            trainer.should_stop = True
            return
        if module.failures and not finished:
            return  # what is saved is known to give finite gradients
        if finished or module.now - self.logged_at >= 1.0:
            self.report(module)
        due = int(module.progress() * self.recipe.trainer.evaluations)
        evaluated = due > self.evaluations_done and not finished
        bits = None
        due_to_save = finished or self.stop_asked or module.now - self.saved_at >= self.checkpoint_seconds
        if evaluated or due_to_save:
            model = module.usable()
        if evaluated:
            self.evaluations_done = due
            if module.rank == 0:
                with self.going_on():
                    bits = self.examine(module, model)
        if evaluated or due_to_save:
            self.saved_at = module.now
            self.files.model, self.files.validation_bits = model, bits
            trainer.save_checkpoint(self.files.checkpoints.path(module.steps), weights_only=False)
            if (error := self.files.error) is not None:  # only where it is written; the others have gone on
                if finished or self.stop_asked:
                    raise error
                last = self.files.checkpoints.all()
                safe = f"the last good checkpoint is that of step {last[-1].step:,}" if last else "there is none yet"
                say(f"step {module.steps:,}: {error.strerror}; {safe}, going on")
        if finished or self.stop_asked:
            trainer.should_stop = True

    @contextmanager
    def going_on(self) -> Iterator[None]:
        """A full disk loses what is written within, but does not end the training."""
        try:
            yield
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            if not self.disk_full:
                say(f"{error.strerror}: {error.filename or self.run.path}; going on without samples and metrics")
            self.disk_full = True

    def report(self, module: PerceiverARModule) -> None:
        bits = module.take_mean_loss() / math.log(2)
        if module.rank > 0:
            self.logged_at = module.now
            return
        seconds = module.now
        rate = (module.tokens_seen - self.logged_tokens) / (seconds - self.logged_at + 1e-9)
        lr = module.optimizers(use_pl_optimizer=False).param_groups[0]["lr"]  # type: ignore[union-attr]
        self.add_row(module, train_bits=bits, lr=lr, grad_norm=module.grad_norm, tokens_per_second=round(rate))
        self.logged_at, self.logged_tokens = seconds, module.tokens_seen
        progress = module.progress()
        left = duration(seconds * (1 - progress) / progress) if seconds > 5 else "..."
        text = f"step {module.steps:,}  {bits:.3f} bits/token  {rate:,.0f} tokens/s"
        self.bar.update(self.task, completed=progress, description=text, left=left)
        if self.bar.disable and seconds - self.printed_at >= 10:
            say(f"{text}  {100 * progress:.0f}%  {left} left")
            self.printed_at = seconds

    def examine(self, module: PerceiverARModule, model: PerceiverAR) -> float | None:
        """Measures bits per token on held-out text, if there is any, and lets the model write some."""
        bits = None
        if self.held_out is not None and len(self.held_out.tokens) > 1:
            limit = self.recipe.trainer.evaluation_tokens
            result = evaluate(
                model,
                self.held_out.tokens,
                document_length=self.codec.document_length,
                max_tokens=limit,
                spread=True,
                precision=self.precision,
            )
            bits = result.bits_per_token
            self.add_row(module, validation_bits=bits)
            say(f"step {module.steps:,}  held out: {bits:.3f} bits/token")
        with self.going_on():
            sample(model, self.codec, self.run, self.recipe, module.steps)
        return bits

    def add_row(self, module: PerceiverARModule, **values: float) -> None:
        row = {"step": module.steps, "tokens": module.tokens_seen, "seconds": round(module.seconds, 2), **values}
        self.rows.append({name: str(row.get(name, "")) for name in self.COLUMNS})
        with self.going_on():
            if self.disk_full:  # the last row may be half there
                self.write_rows()
                self.disk_full = False
            else:
                with open(self.run.metrics_file, "a", newline="", encoding="utf-8") as file:
                    csv.DictWriter(file, self.COLUMNS).writerow(self.rows[-1])
            for logger in module.loggers:
                logger.log_metrics(dict(values), step=module.steps)
            self.track(values, module.steps)

    def write_rows(self) -> None:
        with (
            atomic_path(self.run.metrics_file) as temporary,
            open(temporary, "w", newline="", encoding="utf-8") as file,
        ):
            writer = csv.DictWriter(file, self.COLUMNS)
            writer.writeheader()
            writer.writerows(self.rows)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self.bar.stop()


def fit(
    run: Run,
    recipe: Recipe,
    windows: Windows,
    held_out: TokenFile | None,
    codec: Codec,
    precision: str,
    track: Track,
) -> dict[str, Any]:
    """Trains to the end of the recipe, then measures, draws and writes the summary."""
    quiet_lightning()
    checkpoints = Checkpoints(run.checkpoints, recipe.trainer.keep_best)
    checkpoint = newest(checkpoints)
    torch.manual_seed(recipe.seed % 2**63)
    try:
        if recipe.init_from is not None and checkpoint is None:
            model = PerceiverAR.from_pretrained(run.initial).train()
        else:
            model = PerceiverAR(recipe.model)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        with torch.device("meta"):
            size = gigabytes(4 * PerceiverAR(recipe.model).num_parameters())
        raise InputError(
            f"out of memory: the weights alone take {size}; lower model.dim or model.num_layers, and start again in "
            "another --out, or remove this one"
        ) from error
    module = PerceiverARModule(model, recipe, RANK)
    files = CheckpointFiles(run, checkpoints, recipe, model)
    watch = Watch(run, held_out, codec, recipe, autocast=precision != "32-true", files=files, track=track)
    devices, machines = world(recipe.trainer)
    if devices > 1:
        os.environ[FIRST] = str(os.getpid())  # of the processes that Lightning starts
    trainer = pl.Trainer(
        accelerator=choose_device(recipe.trainer),
        devices=devices // machines,
        num_nodes=machines,
        strategy=choose_strategy(recipe.trainer) if devices > 1 else "auto",
        precision=precision,  # type: ignore[arg-type]
        max_steps=recipe.max_steps or -1,
        max_epochs=-1,
        accumulate_grad_batches=module.accumulate,
        callbacks=[watch],
        logger=TensorBoardLogger(run.path, name="tensorboard", version="") if has_tensorboard() else False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        use_distributed_sampler=False,
        default_root_dir=run.path,
        plugins=[files],
    )
    say(
        f"{model.num_parameters():,} parameters, {windows_text(recipe)}, {precision}"
        + (f", {devices} devices" if devices > 1 else "")
        + (f", {recipe.trainer.prefix_ranks} to a prefix" if recipe.trainer.prefix_ranks > 1 else "")
        + (f", from {recipe.init_from}" if recipe.init_from and not checkpoint else "")
        + (", resuming" if checkpoint else "")
    )
    resume = f"perceiver-ar train --out {shlex.quote(str(run.path))} --resume"
    try:
        with watch.stopping_on_signals(), suppress(SystemExit):  # Lightning's, at a SIGTERM before the first step
            path = checkpoint.path if checkpoint else None
            trainer.fit(module, Batches(windows, module), ckpt_path=path, weights_only=True)
    except StopAtOnce:
        if RANK > 0:
            return {}
        raise Interrupted(f"stopped at once; go on from the last checkpoint with: {resume}") from None
    except (RuntimeError, MemoryError) as error:
        if is_out_of_memory(error):
            device = choose_device(recipe.trainer)
            raise InputError(out_of_memory(recipe, model.num_parameters(), device)) from error
        if devices > 1 and ("closed by peer" in str(error) or isinstance(error, torch.distributed.DistError)):
            say(f"perceiver-ar: another process of the run has died; go on from the last checkpoint with: {resume}")
            raise SystemExit(1) from None
        raise
    if module.trouble and RANK == 0:
        raise InputError(module.trouble)
    stopped = watch.stop_asked or (watch.signalled and not watch.finished)
    if stopped and RANK == 0:
        raise Interrupted(f"stopped at step {module.steps:,}, everything saved; go on with: {resume}")
    if module.trouble or stopped:
        return {}
    model = module.usable().to(choose_device(recipe.trainer)).eval()
    return finish(run, recipe, module, model, watch) if RANK == 0 else {}


def choose_strategy(settings: TrainerConfig) -> DDPStrategy | ModelParallelStrategy:
    if not settings.sharded:
        return DDPStrategy()
    # A checkpoint is one file with all weights and states, whatever the number of devices.
    return ModelParallelStrategy(settings.devices, tensor_parallel_size=1, save_distributed_checkpoint=False)


def newest(checkpoints: Checkpoints) -> Checkpoint | None:
    """The checkpoint to go on from; says which newer ones are damaged."""
    found = checkpoints.newest()
    for step in sorted(checkpoints.damaged):
        before = f"going on from the one before, of step {found.step:,}" if found else ""
        say(f"{checkpoints.path(step)} is damaged, so it is passed over: {before}")
    return found


def finish(run: Run, recipe: Recipe, module: PerceiverARModule, model: PerceiverAR, watch: Watch) -> dict[str, Any]:
    """The last evaluation and sample, pictures, the report, and `summary.json`, which marks the run as finished."""
    held_out, codec = watch.held_out, watch.codec
    summary: dict[str, Any] = {
        "steps": module.steps,
        "tokens_seen": module.tokens_seen,
        "skipped_steps": module.skipped,
        "train_seconds": round(module.seconds, 1),
        "parameters": model.num_parameters(),
    }
    references: dict[str, float] = {}
    last: list[tuple[float, float]] = []
    tokens_per_byte: float | None = None
    if held_out is not None and len(held_out) > 1:
        some = recipe.trainer.evaluation_tokens
        limit = 10 * some

        def score(most: int, spread: bool = False) -> Evaluation:
            return evaluate(
                model,
                held_out.tokens,
                byte_lengths=codec.byte_lengths(),
                amounts=codec.amounts,
                document_length=codec.document_length,
                max_tokens=most,
                spread=spread,
                precision=watch.precision,
            )

        result = score(limit)
        shorter = score(some, spread=True) if result.tokens > some else result  # what was scored on the way
        references = compressors(codec, held_out.tokens[: limit + 1])
        compressed = {f"{name}_bits_per_byte": bits for name, bits in references.items()}
        last = [(module.tokens_seen, shorter.bits_per_token)]
        tokens_per_byte = shorter.tokens / shorter.bytes if codec.writes_text and shorter.bytes else None
        if shorter is not result:
            bits = result.bits_per_token if tokens_per_byte is None else result.bits_per_byte
            assert bits is not None  # of text
            references["all held out"] = bits
        summary = {**result.to_dict(), **compressed, **summary, "held_out_documents": held_out.num_documents}
        if codec.document_length is None:
            draw_context(run, recipe, watch, model)
    sample(model, codec, run, recipe, module.steps, whole=True)
    draw_loss(run, last, references, tokens_per_byte)
    watch.track({name: value for name, value in summary.items() if isinstance(value, (int, float))}, module.steps)
    report = write_report(run, summary)
    shutil.rmtree(run.initial, ignore_errors=True)
    run.write_summary(summary)
    say(f"report: {report}")
    return summary


class CheckpointFiles(TorchCheckpointIO):
    """Writes the weights for use and a checkpoint; each file replaces the last good one when it is whole.

    Lightning calls this on the first rank only, and all ranks wait until it returns. So an error is kept in `error`,
    to be raised, or not, by who asked. (Lightning's own way makes a copy in memory and one in /tmp, which a kill leaves
    there.) In the file the optimizer's states are numbered as the model's parameters are, as Lightning does it under
    FSDP, so that every run can go on with every file.
    """

    def __init__(self, run: Run, checkpoints: Checkpoints, recipe: Recipe, model: PerceiverAR) -> None:
        self.run, self.checkpoints, self.recipe, self.model = run, checkpoints, recipe, model
        places = {id(parameter): i for i, parameter in enumerate(model.parameters())}
        groups = make_optimizer(model, recipe.optim).param_groups
        self.order = [places[id(parameter)] for group in groups for parameter in group["params"]]
        self.validation_bits: float | None = None
        self.error: OSError | None = None

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """The checkpoint comes last: resuming from one that is at the end of the run saves no weights again."""
        self.error = None
        if not self.recipe.trainer.sharded:
            checkpoint = checkpoint | {"optimizer_states": renumber(checkpoint["optimizer_states"], self.order)}
        try:
            with self.checkpoints.writing(checkpoint["global_step"], self.validation_bits) as temporary:
                self.model.save_pretrained(self.run.path)  # within: so that a kill leaves a sign beside the weights
                torch.save(checkpoint, temporary)
        except (OSError, SafetensorError, RuntimeError) as error:  # the latter are what writers make of the first
            message = error.strerror if isinstance(error, OSError) and error.strerror else " ".join(str(error).split())
            reason = f"cannot save ({message}); make room on the disk"
            self.error = OSError(errno.EIO, reason, str(self.run.path))

    def load_checkpoint(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """FSDP does not come here."""
        checkpoint = super().load_checkpoint(*args, **kwargs)
        back = [self.order.index(i) for i in range(len(self.order))]
        return checkpoint | {"optimizer_states": renumber(checkpoint["optimizer_states"], back)}


def renumber(states: list[dict[str, Any]], numbers: list[int]) -> list[dict[str, Any]]:
    """Optimizers' states whose parameter i becomes `numbers[i]`."""
    return [
        {
            "state": {numbers[i]: values for i, values in state["state"].items()},
            "param_groups": [
                {**group, "params": [numbers[i] for i in group["params"]]} for group in state["param_groups"]
            ],
        }
        for state in states
    ]


def sample(model: PerceiverAR, codec: Codec, run: Run, recipe: Recipe, step: int, whole: bool = False) -> None:
    """Keeps what the model generates from nothing, and shows it on stderr if it is text.

    whole: where all documents have one length, the sample has it, too, whatever the recipe says.
    """
    length = recipe.trainer.sample_tokens
    if length == 0:
        return
    if codec.document_length is not None:
        rest = codec.document_length - len(codec.start())
        length = rest if whole else min(length, rest)
    start = codec.start() if len(codec.start()) else np.zeros(1, np.int64)
    stop = codec.separator[-1:]
    ids = generate(
        model,
        torch.from_numpy(start.astype(np.int64))[None],
        length,
        temperature=0.8,
        stop_tokens=stop,
        seed=recipe.seed,
        allowed_next=codec.constraint(),
    )[0]
    stem = f"step-{step:06d}"
    if not codec.writes_text:
        paths = codec.show([np.append(start, ids.cpu().numpy())], 0, run.samples, stem)
        say(f"step {step:,}  sample: {', '.join(path.name for path in paths)}")
        return
    text = codec.decode(ids.cpu().numpy()).decode("utf-8", errors="replace")
    write_text(run.samples / f"{stem}.txt", text)
    say(f"step {step:,}  sample:")
    say("  " + text.replace("\n", "\n  "), style="dim")


def draw_loss(
    run: Run, last: list[tuple[float, float]], references: dict[str, float], tokens_per_byte: float | None
) -> None:
    """tokens_per_byte: of the held-out text that was scored on the way, separators counted; None: no text."""
    from perceiver_ar.plots import plot_loss

    rows = read_metrics(run.metrics_file)
    curves = {
        name: [(float(row["tokens"]), float(row[name])) for row in rows if row[name]]
        for name in ("train_bits", "validation_bits")
    }
    scale = tokens_per_byte or 1.0
    train, validation = (
        [(tokens, scale * bits) for tokens, bits in points]
        for points in (curves["train_bits"], curves["validation_bits"] + last)
    )
    plot_loss(
        run.plots / "loss.png",
        train,
        validation,
        references,
        y_label="bits per token" if tokens_per_byte is None else "bits per byte",
    )


def draw_context(run: Run, recipe: Recipe, watch: Watch, model: PerceiverAR) -> None:
    """What ever more context brings on held-out text, up to all that the model can take."""
    from perceiver_ar.plots import plot_context

    assert watch.held_out is not None
    longest = min(recipe.model.context_length, len(watch.held_out) // 2)  # and as many targets
    lengths = [longest, *(longest // 4**i for i in (1, 2, 3) if longest // 4**i >= 16)]
    results = evaluate_context_lengths(
        model,
        watch.held_out.tokens,
        lengths,
        byte_lengths=watch.codec.byte_lengths(),
        max_tokens=max(2, recipe.trainer.evaluation_tokens // 10),
        precision=watch.precision,
    )
    write_table(run.plots / "context.csv", results)
    references = compressors(watch.codec, watch.held_out.tokens[longest:][: results[0].tokens])
    plot_context(run.plots / "context.png", results, references)


def read_metrics(path: Path) -> list[dict[str, str]]:
    """The whole rows of metrics.csv; a row cut off by a kill is left out, and all of what is not our table."""
    if not path.exists():
        return []
    with open(path, newline="", encoding="utf-8", errors="replace") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != Watch.COLUMNS:
            return []
        return [row for row in reader if None not in row.values() and row["step"].isdigit()]


def as_module(module: pl.LightningModule) -> PerceiverARModule:
    assert isinstance(module, PerceiverARModule)
    return module


def windows_text(recipe: Recipe) -> str:
    model = recipe.model
    return (
        f"context {model.context_length:,}, {model.num_latents:,} latents, {recipe.trainer.batch_size} windows a step"
        + (f" of {recipe.blocks} blocks" if recipe.blocks > 1 else "")
    )


def duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def has_tensorboard() -> bool:
    return importlib.util.find_spec("tensorboard") is not None


def quiet_lightning() -> None:
    """Lightning's notices about devices and loaders say nothing about our runs."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")

"""Before training: makes or checks the run directory with recipe, tokens and codec."""

import math
import shlex
import time
from dataclasses import dataclass, replace
from typing import Any

import torch

from perceiver_ar.adapters import import_peft
from perceiver_ar.config import Recipe, flat
from perceiver_ar.data.codec import Codec
from perceiver_ar.data.codec_file import load_codec
from perceiver_ar.data.conditions import ConditionedCodec
from perceiver_ar.data.sampler import TrainingWindows
from perceiver_ar.data.tokens import TokenFile
from perceiver_ar.errors import InputError, require
from perceiver_ar.files import TEMPORARY
from perceiver_ar.network.model import PerceiverAR
from perceiver_ar.origin import Origin, fill_in
from perceiver_ar.run import Run
from perceiver_ar.training.checkpoints import Checkpoints
from perceiver_ar.training.console import Interrupted, interrupt, say, signals_taken_by
from perceiver_ar.training.documents import check_windows, open_or_make_tokens
from perceiver_ar.training.resources import Resources, choose_precision
from perceiver_ar.training.tracking import check_tracker
from perceiver_ar.training.trouble import ROOM, free_bytes, gigabytes, largest_micro_batch, out_of_memory


@dataclass(frozen=True)
class Prepared:
    """Everything that training needs."""

    run: Run
    recipe: Recipe
    """Complete: the network fits the codec, and `trainer` has the precision and the number of devices to use."""
    resources: Resources
    windows: TrainingWindows
    held_out: TokenFile | None
    codec: Codec


def prepare(run: Run, recipe: Recipe, resources: Resources, resume: bool, find_batch: bool) -> Prepared:
    """The first rank makes the run directory, or checks the one to resume; the others wait for it.

    Raises InputError if files, settings or the directory do not allow training; then removes what it made.
    """
    if resources.rank == 0:
        precision = choose_precision(recipe.trainer.precision, resources.device)
        with signals_taken_by(interrupt):
            return prepare_first(run, with_trainer(recipe, precision=precision), resources, resume, find_batch)
    wait_for_first(run)
    recipe = with_settings_taken(recipe, run.recipe())
    first = run.recipe().trainer  # the first rank has measured them
    precision = first.precision if recipe.trainer.precision == "auto" else recipe.trainer.precision
    recipe = with_trainer(recipe, precision=choose_precision(precision, resources.device))
    if find_batch:
        recipe = with_trainer(recipe, micro_batch_size=first.micro_batch_size)
    return with_tokens(run, recipe, resources)


def prepare_first(run: Run, recipe: Recipe, resources: Resources, resume: bool, find_batch: bool) -> Prepared:
    check_tracker(recipe.trainer.tracker)
    if recipe.adapter is not None:
        import_peft()  # raises if it is missing
    if resume:
        check_weights_have_a_checkpoint(run)
    else:
        if recipe.init_from is not None:
            recipe = Origin.open(recipe.init_from).complete(recipe)
        require(not run.is_taken(), f"{run.path} already exists: give another --out, go on with --resume, or remove it")
    run.remove_unfinished_files()
    prepared = None
    try:
        if not resume:  # first, so that a run killed at any later moment can be resumed
            run.write_recipe(recipe)
        copy_origin(run, recipe)
        prepared = with_tokens(run, recipe, resources)
        if find_batch:
            prepared = replace(prepared, recipe=with_largest_micro_batch(prepared.recipe, resources))
        Checkpoints(run.checkpoints).newest()  # raises if all are damaged
        run.remove_intermediate_tokens()
        run.summary_file.unlink(missing_ok=True)  # from here on the run is unfinished
        run.write_recipe(prepared.recipe)
    except BaseException as error:
        if run.has_intermediate_tokens():
            if isinstance(error, InputError | Interrupted):
                go_on = f"perceiver-ar train --out {shlex.quote(str(run.path))} --resume"
                raise type(error)(f"{error}; what is read and encoded is kept, go on with: {go_on}") from error
        elif not resume:  # nothing has been trained yet, so remove everything
            run.remove_prepared(None if prepared is None else prepared.codec)
        raise
    return prepared


def with_tokens(run: Run, recipe: Recipe, resources: Resources) -> Prepared:
    """Raises InputError for too few tokens, or settings that do not fit them or each other."""
    tokens, held_out, codec = open_or_make_tokens(run, recipe)
    require(
        held_out is not None or (recipe.trainer.patience is None and recipe.trainer.final_weights == "last"),
        "trainer.patience and final_weights best need held-out documents, and there are none: give --data.validation",
    )
    recipe = replace(recipe, model=codec.fit(recipe.model))
    check_windows(recipe, codec)
    windows = TrainingWindows(
        tokens,
        recipe.model.context_length,
        recipe.window_latents,
        recipe.seed,
        document_length=codec.document_length,
        augment=codec.augment if recipe.data.augment else None,
        forget=codec.forget if isinstance(codec, ConditionedCodec) else None,
    )
    return Prepared(run, recipe, resources, windows, held_out, codec)


def copy_origin(run: Run, recipe: Recipe) -> None:
    """Copies the weights and codec of `init_from` into the run, unless they are there or no longer needed."""
    begun = recipe.adapter is None and Checkpoints(run.checkpoints).all()
    if recipe.init_from is None or run.initial.exists() or begun:
        return
    Origin.open(recipe.init_from).write(recipe.model, run.initial)


def with_settings_taken(recipe: Recipe, of: Recipe) -> Recipe:
    """`recipe` with the settings of `of` that init_from determines."""
    return recipe if recipe.init_from is None else replace(recipe, model=of.model, modality=of.modality, data=of.data)


def with_trainer(recipe: Recipe, **settings: Any) -> Recipe:
    return replace(recipe, trainer=replace(recipe.trainer, **settings))


def wait_for_first(run: Run) -> None:
    """Waits until the first process has made the files that all read. If it fails, launchers end the others."""
    deadline = time.monotonic() + 24 * 3600
    while not (run.path / "codec.json").exists():
        require(time.monotonic() < deadline, f"{run.path} does not appear: is it on a disk that all machines share?")
        time.sleep(0.1)


def with_largest_micro_batch(recipe: Recipe, resources: Resources) -> Recipe:
    if resources.devices > 1 and resources.launched:
        raise InputError(
            "--find_batch measures one machine: first use it without torchrun or SLURM, then set "
            "trainer.micro_batch_size to the size that it found"
        )
    with torch.device("meta"):
        parameters = PerceiverAR(recipe.model).num_parameters()
    device = resources.device
    available = free_bytes(device)
    size = largest_micro_batch(recipe, parameters, device, ROOM[device] * available)
    if size is None:
        smallest = with_trainer(recipe, micro_batch_size=1)
        raise InputError(f"{out_of_memory(smallest, parameters, device)} ({gigabytes(available)} are free)")
    say(f"micro-batches of {size} windows, for {gigabytes(available)} of free memory")
    return with_trainer(recipe, micro_batch_size=size)


# Resuming a run.


def check_resumable(run: Run, recipe: Recipe) -> Recipe:
    """The run's earlier recipe. Raises InputError if it is missing, or if `recipe` changes what its steps depend on."""
    before = Run.open(run.path).recipe()
    if recipe.init_from is not None:
        data = before.data if recipe.modality == "auto" else recipe.data  # a recipe.yaml has all that was taken
        recipe = fill_in(recipe, before.model, before.modality, data)
    if (run.path / "codec.json").exists():
        recipe = replace(recipe, model=load_codec(run.path).fit(recipe.model))
    fixed = ("paths", "modality", "init_from", "adapter", "seed", "model", "optim")
    # Before there are tokens, only what a download depends on is fixed.
    fixed += ("data",) if (run.path / "codec.json").exists() else ("data.column", "data.max_bytes")
    fixed += ("trainer.batch_size", "trainer.blocks", "trainer.short_prefix", "trainer.prefix_growth")
    was, now = flat(before.to_dict()), flat(recipe.to_dict())
    if recipe.blocks == before.blocks:
        now["trainer.blocks"] = was["trainer.blocks"]
    changed = [name for name in was if name.startswith(fixed) and was[name] != now[name]]
    if changed:
        changes = ", ".join(f"{name} changed from {was[name]!r} to {now[name]!r}" for name in changed)
        raise InputError(
            f"{run.path}: --resume continues with the same recipe, but {changes}: "
            "leave that out, or start a new run in another --out"
        )
    return before


def check_weights_have_a_checkpoint(run: Run) -> None:
    """Raises InputError for a trained model without checkpoints: training would start from scratch and overwrite it.

    A kill during the first save leaves weights and an incomplete checkpoint: then the weights are removed.
    """
    if Checkpoints(run.checkpoints).all() or not (run.weights_file.exists() or run.summary_file.exists()):
        return
    if not run.weights_file.exists():
        raise InputError(f"{run.path} has ended, and its weights and checkpoints are gone: start a new run, elsewhere")
    begun = [*run.checkpoints.glob(f"{TEMPORARY}*"), *run.checkpoints.glob("step-*.ckpt")]
    if run.summary_file.exists() or not begun:
        raise InputError(
            f"{run.path} holds a trained model but no checkpoint to resume from, and training from the start would "
            f"overwrite it: put {run.checkpoints} back, or start a new run from its weights with "
            f"--init_from {shlex.quote(str(run.path))} and another --out"
        )
    run.weights_file.unlink()


def goes_further(recipe: Recipe, before: Recipe, impatient: bool) -> bool:
    """Whether `recipe` trains longer than the recipe `before`, which ran out of patience if `impatient`."""
    if impatient:
        return (recipe.trainer.patience or math.inf) > (before.trainer.patience or math.inf)
    steps = (recipe.max_steps or math.inf) > (before.max_steps or math.inf)
    seconds = (recipe.max_seconds or math.inf) > (before.max_seconds or math.inf)
    return steps or seconds

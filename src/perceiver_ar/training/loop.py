"""The training loop."""

import shlex
import signal
from typing import Literal

import torch

from perceiver_ar.adapters import with_adapter
from perceiver_ar.errors import InputError
from perceiver_ar.network.model import PerceiverAR
from perceiver_ar.optim import lr_factor
from perceiver_ar.threads import adaptive_spins
from perceiver_ar.training.batches import Batches
from perceiver_ar.training.checkpoints import Checkpoints
from perceiver_ar.training.console import Interrupted, StopAtOnce, StopRequest, say, signals_taken_by
from perceiver_ar.training.prepare import Prepared
from perceiver_ar.training.resources import FABRIC_PRECISIONS, launch_fabric
from perceiver_ar.training.saving import read_checkpoint
from perceiver_ar.training.state import Training
from perceiver_ar.training.tracking import Track
from perceiver_ar.training.trouble import gigabytes, is_out_of_memory, out_of_memory
from perceiver_ar.training.watch import Watch

Ending = Literal["end", "signal", "trouble"]
"""Why no more steps are made. end: `Training.ended_by`; signal: a rank received one; trouble: `Training.trouble`."""


def fit(prepared: Prepared, track: Track) -> Training | None:
    """Trains to the end of the recipe. Returns None on other ranks than the first if the run stopped before the end.

    On the first rank raises Interrupted if a signal stopped the run, and InputError if training diverged; on each rank
    InputError for too little memory.
    """
    recipe, first = prepared.recipe, prepared.resources.rank == 0
    checkpoints = Checkpoints(prepared.run.checkpoints, recipe.trainer.keep_best)
    found = checkpoints.newest()
    for step in sorted(checkpoints.damaged):
        before = f"resuming from the earlier one of step {found.step:,}" if found else ""
        say(f"{checkpoints.path(step)} is damaged, so it is skipped: {before}")
    model = make_model(prepared, begins=found is None)
    announce(prepared, model, resuming=found is not None)
    request = StopRequest()
    go_on = f"perceiver-ar train --out {shlex.quote(str(prepared.run.path))} --resume"
    try:
        with signals_taken_by(request.on_signal):
            with signals_taken_by(signal.SIG_DFL):  # other processes may never come; waiting for them hears no handler
                fabric = launch_fabric(prepared.resources, recipe.trainer)
            training = Training(model, recipe, fabric, None if found is None else read_checkpoint(found))
            ending = run_steps(prepared, training, checkpoints, request, track)
    except StopAtOnce:
        if not first:
            return None
        raise Interrupted(f"stopped immediately; resume from the last checkpoint with: {go_on}") from None
    except (RuntimeError, MemoryError) as error:
        if is_out_of_memory(error):
            raise InputError(out_of_memory(recipe, model.num_parameters(), prepared.resources.device)) from error
        lost = "closed by peer" in str(error) or isinstance(error, torch.distributed.DistError)
        if prepared.resources.devices > 1 and lost:
            raise SystemExit(
                f"perceiver-ar: another process of the run has died; resume from the last checkpoint with: {go_on}"
            ) from None
        raise
    if ending == "trouble" and first:
        raise InputError(
            f"training diverged: {training.trouble}; start a new run with lower optim.lr and optim.muon_lr; "
            f"{recipe.out} keeps earlier weights"
        )
    if ending == "signal" and first:
        raise Interrupted(f"stopped at step {training.step:,}, everything saved; resume with: {go_on}")
    return training if ending == "end" else None


def run_steps(
    prepared: Prepared, training: Training, checkpoints: Checkpoints, request: StopRequest, track: Track
) -> Ending:
    """Makes the remaining steps."""
    recipe = prepared.recipe
    batches = Batches(prepared.windows, recipe, prepared.resources.rank)
    training.start_clock()
    with Watch(prepared, training, checkpoints, track) as watch, adaptive_spins():
        while training.ended_by is None:
            factor = lr_factor(recipe.optim, training.progress)
            for group in training.optimizer.param_groups:
                group["lr"] = group["initial_lr"] * factor
            training.make_step(batches.of_step(training.step, training.progress), batches.accumulate)
            stop = training.agree(request.made) and not training.failures  # only good weights are saved
            training.note_failing_end()
            watch.after_step(stop)
            if training.trouble:
                return "trouble"
            if stop:
                return "signal"
    return "end"


def make_model(prepared: Prepared, begins: bool) -> PerceiverAR:
    """The network with its initial weights; if training begins, with those of `init_from`.

    Raises InputError if they do not fit into memory.
    """
    recipe = prepared.recipe
    torch.manual_seed(recipe.seed % 2**63)
    try:
        if recipe.adapter is not None:
            return with_adapter(PerceiverAR.from_pretrained(prepared.run.initial).train(), recipe)
        if begins and recipe.init_from is not None:
            return PerceiverAR.from_pretrained(prepared.run.initial).train()
        return PerceiverAR(recipe.model)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        with torch.device("meta"):
            size = gigabytes(4 * PerceiverAR(recipe.model).num_parameters())
        raise InputError(
            f"out of memory: the weights alone take {size}; lower model.dim or model.num_layers, and start again in "
            "another --out, or remove this one"
        ) from error


def announce(prepared: Prepared, model: PerceiverAR, resuming: bool) -> None:
    recipe, devices = prepared.recipe, prepared.resources.devices
    settings, network = recipe.trainer, recipe.model
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    say(
        f"{model.num_parameters():,} parameters"
        + (f", {trained:,} of them in the adapter" if recipe.adapter else "")
        + f", context {network.context_length:,}, {network.num_latents:,} latents, "
        f"{settings.batch_size} windows a step"
        + (f" of {recipe.blocks} blocks" if recipe.blocks > 1 else "")
        + f", {FABRIC_PRECISIONS[settings.precision]}"
        + (f", {devices} devices" if devices > 1 else "")
        + (f", {settings.prefix_ranks} to a prefix" if settings.prefix_ranks > 1 else "")
        + f", up to {recipe.limits}"
        + (", resuming" if resuming else f", from {recipe.init_from}" if recipe.init_from else "")
    )

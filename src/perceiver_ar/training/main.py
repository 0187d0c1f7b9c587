"""From a recipe to a trained run: resolve, prepare, fit, finish."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from typing import Any

from perceiver_ar.config import Recipe
from perceiver_ar.errors import InputError, require
from perceiver_ar.files import write_text
from perceiver_ar.lock import locked
from perceiver_ar.run import Run
from perceiver_ar.training.console import Interrupted, say
from perceiver_ar.training.finish import finish
from perceiver_ar.training.loop import fit
from perceiver_ar.training.memory import keep_freed_memory
from perceiver_ar.training.prepare import check_resumable, goes_further, prepare, with_settings_taken, with_trainer
from perceiver_ar.training.resources import deterministic, resolve
from perceiver_ar.training.tracking import tracking


def train(recipe: Recipe, *, resume: bool = False, find_batch: bool = False) -> dict[str, Any]:
    """Makes the run that `recipe` describes, or resumes the one in `recipe.out`.

    A restart by torchrun or SLURM after one of its processes died resumes, too. `find_batch` replaces the recipe's
    micro-batch by the largest one that fits into memory.

    Returns the summary: `bits_per_byte`, `nats_per_token` and more on the held-out documents (absent if nothing is
    held out), `gzip_bits_per_byte` and `xz_bits_per_byte` of the same bytes, `train_seconds`, `tokens_seen` (targets),
    `steps`, `ended_by` (patience, max_steps or max_time), `skipped_steps`, `parameters`. It is empty in all processes
    but the first.

    Raises:
        InputError: the files, the settings or the run directory do not allow it, or another process is training there.
            No half-written run is left.
        Interrupted: SIGINT, SIGTERM or SIGHUP stopped it; the run can be resumed.
    """
    resources = resolve(recipe.trainer)
    first, devices, ranks = resources.rank == 0, resources.devices, recipe.trainer.prefix_ranks
    recipe = with_trainer(recipe, devices=devices)
    require(devices % ranks == 0, f"trainer.prefix_ranks is {ranks}: devices must be a multiple of it, not {devices}")
    run = Run(recipe.out)
    require(run.path.is_dir() or not run.path.exists(), f"{run.path} already exists and is a file: give another --out")
    if any(os.environ.get(name, "") not in ("", "0") for name in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")):
        resume = resume or run.recipe_file.exists()
    if resume:
        before = check_resumable(run, recipe)
        possible = before.trainer.precision != "fp16" or resources.device == "cuda"
        if recipe.trainer.precision == "auto" and possible:
            recipe = with_trainer(recipe, precision=before.trainer.precision)
        recipe = with_settings_taken(recipe, before)
        summary = run.summary()
        impatient = summary is not None and summary.get("ended_by") == "patience"
        if summary is not None and not goes_further(recipe, before, impatient):
            options = "--trainer.patience" if impatient else "--max_steps or --max_time"
            say(
                f"{run.path} is finished ({summary['steps']} steps), so there is nothing to do. "
                f"To train it further, resume with a larger {options}."
            )
            return summary if first else {}
    with locked(run.path) if first else nullcontext():
        prepared = prepare(run, recipe, resources, resume, find_batch)
        recording = reason_recorded(run) if first else nullcontext()
        in_order = deterministic() if recipe.trainer.deterministic else nullcontext()
        with recording, tracking(run.path, prepared.recipe, first) as track, keep_freed_memory(), in_order:
            training = fit(prepared, track)
            if training is None:
                return {}
            model = training.usable().eval()
            if not first:
                return {}
            if training.ended_by == "patience":
                reason = training.patience.reason(training.step)
                say(reason)
                write_text(run.stopped_file, f"{reason}\n")
            else:
                say(f"ended by {training.ended_by}, at step {training.step:,} of {recipe.limits}")
            return finish(prepared, training, model, track)


@contextmanager
def reason_recorded(run: Run) -> Iterator[None]:
    """Writes why training ended before its end into the run, for `perceiver-ar info`; a kill leaves nothing."""
    run.stopped_file.unlink(missing_ok=True)
    try:
        yield
    except BaseException as error:
        expected = isinstance(error, InputError | Interrupted | SystemExit)
        with suppress(OSError):
            if run.recipe_file.exists():  # else the folder was moved or removed
                write_text(run.stopped_file, f"{error}\n" if expected else f"{type(error).__name__}: {error}\n")
        raise

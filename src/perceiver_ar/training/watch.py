"""What happens between steps: progress bar, metrics, evaluations, samples and checkpoints.

All ranks decide alike when something happens; the first one does it.
"""

import errno
import importlib.util
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Self

from perceiver_ar.config import parse_duration
from perceiver_ar.errors import require
from perceiver_ar.network.model import PerceiverAR
from perceiver_ar.progress import ProgressBar
from perceiver_ar.training.checkpoints import Checkpoints
from perceiver_ar.training.console import console, say
from perceiver_ar.training.measure import sample, score
from perceiver_ar.training.metrics import Metrics
from perceiver_ar.training.prepare import Prepared
from perceiver_ar.training.saving import write_checkpoint
from perceiver_ar.training.state import Training
from perceiver_ar.training.tracking import Track


class Watch:
    def __init__(self, prepared: Prepared, training: Training, checkpoints: Checkpoints, track: Track) -> None:
        self.prepared, self.training, self.checkpoints, self.track = prepared, training, checkpoints, track
        self.run, self.settings = prepared.run, prepared.recipe.trainer
        self.first = prepared.resources.rank == 0
        self.disk_full = False
        self.checkpoint_seconds = parse_duration(self.settings.checkpoint_every, "trainer.checkpoint_every")
        self.evaluations_done = int(training.progress * self.settings.evaluations)
        self.logged_at = self.saved_at = self.printed_at = training.now
        self.logged_tokens = training.tokens_seen
        self.tensorboard: Any = None
        """A writer of event files, if TensorBoard is installed. Events after `step` are dropped: they are repeated."""
        if self.first:
            self.metrics = Metrics(self.run.metrics_file, training.step)
            if importlib.util.find_spec("tensorboard") is not None:
                from torch.utils.tensorboard import SummaryWriter

                self.tensorboard = SummaryWriter(str(self.run.tensorboard), purge_step=training.step + 1)
        self.bar = ProgressBar("training", 1.0, console)

    def __enter__(self) -> Self:
        self.bar.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.__exit__()
        if self.tensorboard is not None:
            with self.despite_full_disk():
                self.tensorboard.close()

    def after_step(self, stop: bool) -> None:
        """`stop`: the run stops after this step, before its end."""
        training = self.training
        finished = training.ended_by is not None
        if training.trouble or (training.failures and not finished):
            return  # only weights that gave finite gradients are saved
        if finished or training.now - self.logged_at >= 1.0:
            self.report()
        due = int(training.progress * self.settings.evaluations)
        evaluated = due > self.evaluations_done and not finished
        if not (evaluated or finished or stop or training.now - self.saved_at >= self.checkpoint_seconds):
            return
        model, bits = training.usable(), None
        if evaluated:
            self.evaluations_done = due
            if self.first:
                with self.despite_full_disk():
                    bits = self.examine(model)
            training.patience.note(training.fabric.broadcast(bits), training.step)
        self.saved_at = training.now
        self.save(model, bits, may_fail=not (training.ended_by or stop))

    def save(self, model: PerceiverAR, validation_bits: float | None, may_fail: bool) -> None:
        """Writes a checkpoint. On failure, raises OSError on the first rank unless `may_fail`."""
        training, failure = self.training, None
        checkpoint = training.checkpoint()
        try:
            if self.first:
                self.check_folder()
                write_checkpoint(self.prepared, self.checkpoints, checkpoint, model, validation_bits)
        except OSError as error:
            failure = error
        training.fabric.barrier()  # also after a failure, so that no rank waits forever
        if failure is not None:
            if not may_fail:
                raise failure
            last = self.checkpoints.all()
            safe = f"the last good checkpoint is that of step {last[-1].step:,}" if last else "no checkpoint exists yet"
            say(f"step {training.step:,}: {failure.strerror}; {safe}, continuing")

    @contextmanager
    def despite_full_disk(self) -> Iterator[None]:
        """Inside, writes that fail because the disk is full are lost, but do not end the training."""
        self.check_folder()
        try:
            yield
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            if not self.disk_full:
                say(f"{error.strerror}: {error.filename or self.run.path}; continuing without samples and metrics")
            self.disk_full = True

    def check_folder(self) -> None:
        """Raises InputError if the run is no longer at its path: writing would make a folder with a part of it."""
        gone = f"{self.run.path} was moved or removed during training: go on with --resume where it is, or train anew"
        require(self.run.recipe_file.exists(), gone)

    def report(self) -> None:
        """Adds a row of training metrics. All ranks have to call it."""
        training = self.training
        loss, seconds = training.take_mean_loss(), training.now
        rate = (training.tokens_seen - self.logged_tokens) / (seconds - self.logged_at + 1e-9)
        self.logged_at, self.logged_tokens = seconds, training.tokens_seen
        if not self.first:
            return
        lr = training.optimizer.param_groups[0]["lr"]
        train = {} if loss is None else {"train_bits": loss / math.log(2)}
        self.add_row(**train, lr=lr, grad_norm=training.grad_norm, tokens_per_second=round(rate))
        progress = training.progress
        bits = "skipped" if loss is None else f"{loss / math.log(2):.3f} bits/token"
        text = f"step {training.step:,}  {bits}  {rate:,.0f} tokens/s"
        self.bar.update(progress, text)
        if not console.is_terminal and seconds - self.printed_at >= 10:
            left = duration(seconds * (1 - progress) / progress)
            say(f"{text}  {100 * progress:.0f}%  {left} left")
            self.printed_at = seconds

    def examine(self, model: PerceiverAR) -> float | None:
        """Evaluates on held-out text, if there is any, and writes a sample. Returns bits per token."""
        result = score(self.prepared, model, self.settings.evaluation_tokens, spread=True)
        if result is not None:
            self.add_row(validation_bits=result.bits_per_token)
            say(f"step {self.training.step:,}  held out: {result.bits_per_token:.3f} bits/token")
        with self.despite_full_disk():
            sample(self.prepared, model, self.training.step)
        return None if result is None else result.bits_per_token

    def add_row(self, **values: float) -> None:
        training = self.training
        row = {"step": training.step, "tokens": training.tokens_seen, "seconds": round(training.seconds, 2), **values}
        with self.despite_full_disk():
            self.metrics.add(row, whole=self.disk_full)
            self.disk_full = False
            if self.tensorboard is not None:
                for name, value in values.items():
                    self.tensorboard.add_scalar(name, value, training.step)
            self.track(values, training.step)


def duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"

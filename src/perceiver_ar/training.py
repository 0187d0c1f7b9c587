"""Training: from files to a run directory, on Lightning's Trainer.

A run is a function of its recipe. The weights come from the seed, training window i from the seed and i, the randomness
of step k from the seed and k. So a run that was killed and resumed makes exactly the steps of an undisturbed one.
(Bounded by `max_time` instead of `max_steps`, the learning rate follows the clock, and no two runs are the same.)
"""

import csv
import errno
import importlib.util
import logging
import math
import shlex
import shutil
import signal
import threading
import time
import timeit
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.plugins.io import TorchCheckpointIO
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from safetensors import SafetensorError
from torch import Tensor, nn

from perceiver_ar.config import Recipe, TrainerConfig, parse_duration
from perceiver_ar.data.codec import Codec, load_codec, save_codec
from perceiver_ar.data.sources import find_files, read_text, standard_library
from perceiver_ar.data.text import BytesCodec, TokenizerCodec, train_bpe
from perceiver_ar.data.tokens import TokenFile, Windows, prepare
from perceiver_ar.errors import InputError
from perceiver_ar.evaluation import compressed_bits_per_byte, evaluate
from perceiver_ar.files import atomic_path, write_text
from perceiver_ar.generation import generate
from perceiver_ar.model import PerceiverAR
from perceiver_ar.objective import next_token_loss
from perceiver_ar.optim import lr_factor, make_optimizer
from perceiver_ar.run import Run

console = Console(stderr=True, highlight=False, markup=False)
PRECISIONS: dict[str, Literal["32", "bf16", "fp16"]] = {"32-true": "32", "bf16-mixed": "bf16", "16-mixed": "fp16"}
BPE_BYTES = 100_000_000  # enough text to choose merges from


def say(message: str, style: str | None = None) -> None:
    """One message on stderr, above the progress bar. A terminal may wrap it, a log does not."""
    console.print(message, style=style, soft_wrap=True)


class Interrupted(KeyboardInterrupt):
    """Training ended early because the user asked for it; the message says how to go on."""


class StopAtOnce(BaseException):
    """A signal that does not wait for the running step. (At a KeyboardInterrupt Lightning would exit.)"""


def train(recipe: Recipe, *, resume: bool = False) -> dict[str, Any]:
    """Makes the run that `recipe` describes, or goes on with the one in `recipe.out`.

    Returns its summary: `bits_per_byte`, `nats_per_token` and more on the held-out documents (absent when nothing is
    held out), `gzip_bits_per_byte` and `xz_bits_per_byte` of the same bytes, `train_seconds`, `tokens_seen` (targets),
    `steps`, `parameters`.

    Raises:
        InputError: the files, the settings or the run directory do not allow it. Nothing half-made is left.
        Interrupted: stopped by SIGINT or SIGTERM, and saved.
    """
    run = Run(recipe.out)
    if resume:
        before = check_resumable(run, recipe)
        if recipe.trainer.precision == "auto":
            recipe = replace(recipe, trainer=replace(recipe.trainer, precision=before.trainer.precision))
        if (summary := run.summary()) is not None and not goes_further(recipe, before):
            say(
                f"{run.path} is finished ({summary['steps']} steps), so there is nothing to do. "
                "To train it further, resume with a larger --max_steps or --max_time."
            )
            return summary
    elif run.is_taken():
        raise InputError(f"{run.path} already exists: give another --out, or go on with --resume")
    run.remove_unfinished_files()
    precision = choose_precision(recipe.trainer)
    recipe = replace(recipe, trainer=replace(recipe.trainer, precision=PRECISIONS[precision]))  # not measured again
    existed = run.path.exists()
    try:
        if not resume:  # first, so that a run killed at any later moment can be resumed
            run.write_recipe(recipe)
        tokens, held_out, codec = prepare_tokens(run, recipe)
        recipe = replace(recipe, model=recipe.model.replace(vocab_size=codec.vocab_size))
        windows = Windows(tokens, recipe.model.context_length, recipe.model.num_latents, recipe.seed)
        if run.checkpoint_file.exists():
            check_checkpoint(run.checkpoint_file)
        run.summary_file.unlink(missing_ok=True)  # from here on the run is unfinished
        run.write_recipe(recipe)
    except BaseException:
        if not resume:  # nothing was learned yet: leave no trace
            shutil.rmtree(run.path, ignore_errors=True)
            if existed:
                run.path.mkdir(exist_ok=True)
        raise
    return fit(run, recipe, windows, held_out, codec, precision)


def check_resumable(run: Run, recipe: Recipe) -> Recipe:
    """The recipe so far. Raises InputError unless there is one and `recipe` keeps all that its steps depend on."""
    before = Run.open(run.path).recipe()
    recipe = replace(recipe, model=recipe.model.replace(vocab_size=before.model.vocab_size))  # the codec's, not ours
    fixed = ("paths", "modality", "seed", "model", "data", "optim")
    changed = [name for name in fixed if getattr(before, name) != getattr(recipe, name)]
    for name in ("batch_size", "short_prefix"):
        if getattr(before.trainer, name) != getattr(recipe.trainer, name):
            changed.append(f"trainer.{name}")
    if changed:
        raise InputError(
            f"{run.path}: --resume goes on with the same recipe, but {', '.join(changed)} changed: "
            "leave that out, or start a new run in another --out"
        )
    return before


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
        return "cuda" if available["cuda"] else "mps" if available["mps"] else "cpu"
    if not available[settings.device]:
        raise InputError(f"trainer.device is {settings.device}, but there is none on this machine: use auto")
    return settings.device


def prepare_tokens(run: Run, recipe: Recipe) -> tuple[TokenFile, TokenFile | None, Codec]:
    """The token files of the run and its codec: opened if they are there, made from the files if not."""
    if (run.path / "codec.json").exists():  # written last
        held_out = (run.tokens / "validation.json").exists()
        validation = TokenFile.open(run.tokens / "validation") if held_out else None
        return TokenFile.open(run.tokens / "train"), validation, load_codec(run.path)
    data = recipe.data
    sources = find_files(recipe.paths) if recipe.paths else standard_library()
    out = run.path.resolve()  # may lie in a folder that is trained on
    sources = [source for source in sources if out not in source.path.resolve().parents]
    held_out_sources = find_files(data.validation) if data.validation else None
    if data.tokenizer is not None:
        codec: Codec = TokenizerCodec.from_file(data.tokenizer)
    elif data.bpe_vocab_size is not None:
        codec = train_bpe(read_text(sources, max_bytes=BPE_BYTES), data.bpe_vocab_size)
    else:
        codec = BytesCodec(text=recipe.modality == "text")
    tokens, validation = prepare(
        sources,
        codec,
        run.tokens,
        validation_fraction=data.validation_fraction,
        validation_sources=held_out_sources,
        split_on=data.split_on,
        seed=recipe.seed,
    )
    save_codec(codec, run.path)
    if validation is None and data.validation_fraction > 0:
        say("Only one document, so none is held out: give --data.validation or --data.split_on to measure.")
    return tokens, validation, codec


class PerceiverARModule(pl.LightningModule):
    """The network with its learning rule, as Lightning wants it."""

    def __init__(self, model: PerceiverAR, recipe: Recipe) -> None:
        super().__init__()
        self.model, self.recipe = model, recipe
        model.activation_checkpointing = recipe.trainer.activation_checkpointing
        # In a list, so that its parameters are not listed, and saved, a second time.
        # Kernels for one shape each: there are few (see Batches), and inductor cannot lower attention of any length.
        self.compiled: list[Any] = [torch.compile(model) if recipe.trainer.compile else model]
        self.first_window = 0
        self.seconds_before = 0.0  # spent in earlier parts of a resumed run
        self.started = time.perf_counter()
        self.loss_sum: Tensor | float = 0.0
        self.losses = 0
        self.last_loss: Tensor | float = 0.0
        self.grad_norm: Tensor | float = 0.0

    def configure_optimizers(self) -> torch.optim.Optimizer:
        dtype = torch.bfloat16 if self.recipe.trainer.precision == "bf16" else torch.float32
        return make_optimizer(self.model, self.recipe.optim, dtype)

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: Any = None, gradient_clip_algorithm: Any = None
    ) -> None:
        limit = self.recipe.optim.grad_clip or math.inf
        self.grad_norm = nn.utils.clip_grad_norm_(self.model.parameters(), limit)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        factor = lr_factor(self.recipe.optim, self.progress())
        for group in self.optimizers(use_pl_optimizer=False).param_groups:  # type: ignore[union-attr]
            group["lr"] = group["initial_lr"] * factor
        torch.manual_seed((self.recipe.seed * 1_000_003 + batch_idx) % 2**63)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        tokens, labels = batch["tokens"], batch["labels"]
        prefix_len = tokens.shape[1] - labels.shape[1]
        loss = batch["weight"] * next_token_loss(self.compiled[0](tokens, prefix_len, mask=batch.get("mask")), labels)
        self.last_loss = loss.detach()
        self.loss_sum, self.losses = self.loss_sum + self.last_loss, self.losses + 1
        return loss

    def take_mean_loss(self) -> float:
        """Mean loss in nats since the last call."""
        mean = float(self.loss_sum) / max(1, self.losses)
        self.loss_sum, self.losses = 0.0, 0
        return mean

    @property
    def accumulate(self) -> int:
        settings = self.recipe.trainer
        return settings.batch_size // (settings.micro_batch_size or settings.batch_size)

    @property
    def steps(self) -> int:
        return self.trainer.global_step

    @property
    def seconds(self) -> float:
        """Time spent training, evaluations included, over all parts of the run."""
        return self.seconds_before + time.perf_counter() - self.started

    @property
    def tokens_seen(self) -> int:
        return self.steps * self.recipe.trainer.batch_size * self.recipe.model.num_latents

    def progress(self) -> float:
        """Share of the run that is done, 0 ... 1, half of the running step included."""
        by_steps = (self.steps + 0.5) / self.recipe.max_steps if self.recipe.max_steps else 0.0
        by_time = self.seconds / self.recipe.max_seconds if self.recipe.max_seconds else 0.0
        return min(1.0, max(by_steps, by_time))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["seconds"] = self.seconds
        checkpoint["windows"] = self.steps * self.recipe.trainer.batch_size

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.seconds_before, self.first_window = checkpoint["seconds"], checkpoint["windows"]
        # Lightning counts micro-batches, and there may now be more or fewer of them in a step.
        counts = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        further = checkpoint["global_step"] * self.accumulate - counts["total"]["ready"]
        for group in (counts["total"], counts["current"]):
            group.update({name: count + further for name, count in group.items()})

    def on_train_start(self) -> None:
        self.started = time.perf_counter()


class Batches:
    """The endless sequence of micro-batches, from the window on that the module says (a resumed run skips ahead).

    `weight` is a micro-batch's share of the targets of its step, times the number of micro-batches: a step's mean of
    the weighted mean losses is the mean over its targets, however it is divided.
    """

    def __init__(self, windows: Windows, module: PerceiverARModule) -> None:
        self.windows, self.module = windows, module

    def __iter__(self) -> Iterator[dict[str, Any]]:
        pieces, size = self.module.accumulate, self.module.recipe.trainer.batch_size
        first = self.module.first_window
        while True:
            targets = np.diff(self.windows.spans(first, size)).reshape(pieces, -1).sum(axis=1)
            for i, weight in enumerate(pieces * targets / targets.sum()):
                batch = self.windows.batch(first + i * size // pieces, size // pieces)
                yield self.shorten(batch, first // size) | {"weight": float(weight)}
            first += size

    def shorten(self, batch: dict[str, Tensor], step: int) -> dict[str, Tensor]:
        """Cuts a prefix of P to 0, P/4, P/2 or 3P/4, in the share of the steps that the recipe says.

        Few lengths, because kernels are made, and kept, for every new shape.
        """
        recipe = self.module.recipe
        random = np.random.default_rng((recipe.seed % 2**63, step))
        prefix_len = recipe.model.context_length - recipe.model.num_latents
        cut = prefix_len - random.integers(4) * prefix_len // 4
        if random.random() >= recipe.trainer.short_prefix:
            return batch
        return {name: x if name == "labels" else x[:, cut:] for name, x in batch.items()}


class Watch(Callback):
    """All that happens between steps: the progress bar, metrics, evaluations and samples, checkpoints, stopping."""

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

    def __init__(self, run: Run, held_out: TokenFile | None, codec: Codec, recipe: Recipe, autocast: bool) -> None:
        self.run, self.held_out, self.codec, self.recipe = run, held_out, codec, recipe
        self.precision: Literal["32", "bf16"] = "bf16" if autocast else "32"
        self.stop_asked = False
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
        self.logged_at = self.saved_at = self.printed_at = module.seconds
        self.logged_steps = module.steps
        self.evaluations_done = int(module.progress() * self.recipe.trainer.evaluations)
        self.rows = [row for row in read_metrics(self.run.metrics_file) if int(row["step"]) <= module.steps]
        self.write_rows()
        self.task = self.bar.add_task("training", total=1.0, left="")
        self.bar.start()
        for number in self.handlers:  # Lightning has just taken one
            signal.signal(number, self.on_signal)

    @contextmanager
    def stopping_on_signals(self) -> Iterator[None]:
        """Meanwhile SIGINT or SIGTERM ends the training after the running step, a second one at once."""
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self.handlers[number] = signal.signal(number, self.on_signal)
        try:
            yield
        finally:
            self.bar.stop()
            while self.handlers:
                signal.signal(*self.handlers.popitem())

    def on_signal(self, number: int, frame: Any) -> None:
        if self.stop_asked:
            raise StopAtOnce
        self.stop_asked = True
        say("\nStopping after this step; once more to stop at once.")

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        module = as_module(pl_module)
        if (batch_idx + 1) % module.accumulate:
            return
        finished = module.progress() >= 1.0 if self.recipe.max_seconds else False
        finished = finished or module.steps == self.recipe.max_steps
        if finished or module.seconds - self.logged_at >= 1.0:
            self.report(module)
        due = int(module.progress() * self.recipe.trainer.evaluations)
        if due > self.evaluations_done and not finished:
            self.evaluations_done = due
            self.examine(module)
        if finished or self.stop_asked or module.seconds - self.saved_at >= self.checkpoint_seconds:
            if not math.isfinite(float(module.last_loss)):
                raise InputError(
                    f"training diverged by step {module.steps} (the loss is {float(module.last_loss)}): lower optim.lr "
                    f"or optim.muon_lr; what was saved before is kept in {self.run.path}"
                )
            save(trainer, module, self.run)
            self.saved_at = module.seconds
        if finished or self.stop_asked:
            trainer.should_stop = True

    def report(self, module: PerceiverARModule) -> None:
        seconds = module.seconds
        bits = module.take_mean_loss() / math.log(2)
        new = module.steps - self.logged_steps
        rate = new * self.recipe.trainer.batch_size * self.recipe.model.num_latents / (seconds - self.logged_at + 1e-9)
        lr = module.optimizers(use_pl_optimizer=False).param_groups[0]["lr"]  # type: ignore[union-attr]
        self.add_row(module, train_bits=bits, lr=lr, grad_norm=float(module.grad_norm), tokens_per_second=round(rate))
        self.logged_at, self.logged_steps = seconds, module.steps
        progress = module.progress()
        left = duration(seconds * (1 - progress) / progress) if seconds > 5 else "..."
        text = f"step {module.steps:,}  {bits:.3f} bits/token  {rate:,.0f} tokens/s"
        self.bar.update(self.task, completed=progress, description=text, left=left)
        if self.bar.disable and seconds - self.printed_at >= 10:
            say(f"{text}  {100 * progress:.0f}%  {left} left")
            self.printed_at = seconds

    def examine(self, module: PerceiverARModule) -> None:
        """Measures on held-out text, and lets the model write some."""
        if self.held_out is not None and len(self.held_out.tokens) > 1:
            limit = self.recipe.trainer.evaluation_tokens
            result = evaluate(module.model, self.held_out.tokens, max_tokens=limit, precision=self.precision)
            self.add_row(module, validation_bits=result.bits_per_token)
            say(f"step {module.steps:,}  held out: {result.bits_per_token:.3f} bits/token")
        sample(module.model, self.codec, self.run, self.recipe, module.steps)

    def add_row(self, module: PerceiverARModule, **values: float) -> None:
        row = {"step": module.steps, "tokens": module.tokens_seen, "seconds": round(module.seconds, 2), **values}
        self.rows.append({name: str(row.get(name, "")) for name in self.COLUMNS})
        with open(self.run.metrics_file, "a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, self.COLUMNS).writerow(self.rows[-1])
        for logger in module.loggers:
            logger.log_metrics(dict(values), step=module.steps)

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
    run: Run, recipe: Recipe, windows: Windows, held_out: TokenFile | None, codec: Codec, precision: str
) -> dict[str, Any]:
    """Trains to the end of the recipe, then measures, draws and writes the summary."""
    quiet_lightning()
    torch.manual_seed(recipe.seed % 2**63)
    model = PerceiverAR(recipe.model)
    module = PerceiverARModule(model, recipe)
    watch = Watch(run, held_out, codec, recipe, autocast=precision != "32-true")
    trainer = pl.Trainer(
        accelerator=choose_device(recipe.trainer),
        devices=1,
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
        plugins=[DirectCheckpoints()],
    )
    checkpoint = run.checkpoint_file if run.checkpoint_file.exists() else None
    say(
        f"{model.num_parameters():,} parameters, {windows_text(recipe)}, {precision}"
        + (", resuming" if checkpoint else "")
    )
    resume = f"perceiver-ar train --out {shlex.quote(str(run.path))} --resume"
    try:
        with watch.stopping_on_signals(), suppress(SystemExit):  # Lightning's, at a SIGTERM before the first step
            trainer.fit(module, Batches(windows, module), ckpt_path=checkpoint, weights_only=True)
    except StopAtOnce:
        raise Interrupted(f"stopped at once; go on from the last checkpoint with: {resume}") from None
    if watch.stop_asked:
        raise Interrupted(f"stopped at step {module.steps:,}, everything saved; go on with: {resume}")
    model.to(choose_device(recipe.trainer)).eval()
    return finish(run, recipe, module, watch)


def finish(run: Run, recipe: Recipe, module: PerceiverARModule, watch: Watch) -> dict[str, Any]:
    """The last evaluation and sample, the loss curve, and `summary.json`, which marks the run as finished."""
    held_out, codec = watch.held_out, watch.codec
    model = module.model
    summary: dict[str, Any] = {
        "steps": module.steps,
        "tokens_seen": module.tokens_seen,
        "train_seconds": round(module.seconds, 1),
        "parameters": model.num_parameters(),
    }
    references: dict[str, float] = {}
    last: list[tuple[float, float]] = []
    if held_out is not None and len(held_out) > 1:
        limit = 10 * recipe.trainer.evaluation_tokens
        result = evaluate(
            model,
            held_out.tokens,
            byte_lengths=codec.byte_lengths(),
            max_tokens=limit,
            precision=watch.precision,
        )
        compressed = compressed_bits_per_byte(codec.decode(held_out.tokens[: limit + 1]))
        references = {"gzip": compressed["gzip_bits_per_byte"], "xz": compressed["xz_bits_per_byte"]}
        last = [(module.tokens_seen, result.bits_per_token)]
        summary = {**result.to_dict(), **compressed, **summary, "held_out_documents": held_out.num_documents}
    sample(model, codec, run, recipe, module.steps)
    draw_loss(run, codec, last, references)
    run.write_summary(summary)
    return summary


class DirectCheckpoints(TorchCheckpointIO):
    """Writes the file itself: Lightning's own way is a copy in memory and one in /tmp, which a kill leaves there."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        torch.save(checkpoint, path)


def save(trainer: pl.Trainer, module: PerceiverARModule, run: Run) -> None:
    """The weights for use, and everything needed to go on; each file replaces the last good one when it is whole.

    The checkpoint comes last: resuming from one that is at the end of the run saves no weights again.
    """
    try:
        module.model.save_pretrained(run.path)
        with atomic_path(run.checkpoint_file) as temporary:
            trainer.save_checkpoint(temporary)
    except (SafetensorError, RuntimeError) as error:  # what these writers raise instead of an OSError
        reason = f"cannot save ({' '.join(str(error).split())}); make room on the disk, then --resume"
        raise OSError(errno.EIO, reason, str(run.path)) from error


def check_checkpoint(path: Path) -> None:
    """Raises InputError where the checkpoint cannot be read or is none of ours. No pickled code runs."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        missing = {"state_dict", "optimizer_states", "loops", "seconds", "windows"} - set(content)
        reason = f"without {', '.join(sorted(missing))}" if missing else ""
    except PermissionError:
        raise
    except Exception as error:
        reason = type(error).__name__
    if reason:
        raise InputError(f"{path} is damaged ({reason}): restore it, or delete it to train again from the start")


def sample(model: PerceiverAR, codec: Codec, run: Run, recipe: Recipe, step: int) -> None:
    """Shows on stderr, and keeps, what the model writes from nothing."""
    length = recipe.trainer.sample_tokens
    if length == 0:
        return
    prompt = torch.tensor([codec.separator or (0,)])
    stop = codec.separator[-1:]
    ids = generate(model, prompt, length, temperature=0.8, stop_tokens=stop, seed=recipe.seed)
    text = codec.decode(ids[0].cpu().numpy()).decode("utf-8", errors="replace")
    write_text(run.samples / f"step-{step:06d}.txt", text)
    say(f"step {step:,}  sample:")
    say("  " + text.replace("\n", "\n  "), style="dim")


def draw_loss(run: Run, codec: Codec, last: list[tuple[float, float]], references: dict[str, float]) -> None:
    from perceiver_ar.plots import plot_loss

    rows = read_metrics(run.metrics_file)
    curves = {
        name: [(float(row["tokens"]), float(row[name])) for row in rows if row[name]]
        for name in ("train_bits", "validation_bits")
    }
    bytewise = codec.vocab_size == 256  # then a token is a byte, and compressors compare
    plot_loss(
        run.plots / "loss.png",
        curves["train_bits"],
        curves["validation_bits"] + last,
        references if bytewise else {},
        y_label="bits per byte" if bytewise else "bits per token",
    )


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
    )


def duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def has_tensorboard() -> bool:
    return importlib.util.find_spec("tensorboard") is not None


def quiet_lightning() -> None:
    """Lightning's notices about devices and loaders say nothing about our runs."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")

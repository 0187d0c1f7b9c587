"""The only thread that computes with the model: it reads prompts in pieces and makes steps of the rows between them.

Jobs wait in a queue, first come, first served. A row gets the same tokens as with `generation.generate` alone.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch
from torch import Tensor

from perceiver_ar.errors import InputError, require
from perceiver_ar.generation.rows import Row, RowSettings, draw, require_finite
from perceiver_ar.network.model import PerceiverAR
from perceiver_ar.scored_windows import windows
from perceiver_ar.serving.outbox import Outbox
from perceiver_ar.serving.slots import slot_decoder
from perceiver_ar.windows import Window, blocks, longest_context

Finish = Literal["stop", "length"]

READ_SECONDS = 0.03
"""Time in which pieces of prompts are read between two steps: several short prompts, or one piece of a long one."""

logger = logging.getLogger(__name__)


class Busy(Exception):
    """The queue is full."""


class TooSlow(Exception):
    """A prompt was not scored in the time of a job."""


class Listener(Protocol):
    """Receives a job's results. Its methods are called in the engine's thread, so they must be quick."""

    def scored(self, tokens: Sequence[int], logprobs: Tensor | None) -> None:
        """The next n tokens of the prompt, and the log-probabilities (n, V) at each; None for the first token."""
        ...

    def begun(self, last: bool) -> None:
        """The prompt has been read. last: no tokens follow."""
        ...

    def token(self, sample: int, token: int, logprobs: Tensor, finish: Finish | None) -> bool:
        """A sample's next token, and the log-probabilities (V,) of its draw. Returns False to end the sample.

        finish: why this is the sample's last token; None: more follow.
        """
        ...

    def out_of_time(self, sample: int) -> None:
        """The sample ends here, because the job took too long."""
        ...

    def failed(self, error: Exception) -> None:
        """The job has failed; no more results follow."""
        ...


@dataclass(eq=False)
class Job:
    """A prompt (T,) and the settings of its continuations."""

    prompt: Tensor
    settings: RowSettings
    seeds: Sequence[int | None]
    """Seed of each sample; None: a random one. Without samples the prompt is only scored."""
    listener: Listener
    score: bool = False
    """Whether the listener wants the log-probabilities of the prompt's own tokens."""
    cancelled: bool = False
    started: float | None = field(default=None, init=False)
    """Time at which reading the prompt began, by `time.monotonic`."""


class Engine:
    """Owns the model and its decoder. All methods may be called from any thread."""

    def __init__(
        self,
        model: PerceiverAR,
        *,
        slots: int,
        max_context: int | None = None,
        queue: int = 128,
        seconds: float = 600.0,
        compile: bool = False,
    ) -> None:
        """
        slots: maximum number of rows that run simultaneously.
        max_context: maximum context of a row in tokens; None: the model's.
        queue: maximum number of waiting jobs.
        seconds: time after which a job ends, counted from when its prompt began to be read.

        Raises:
            InputError: a context that the model does not allow, or `compile` for a network without a cache.
        """
        require(
            model.config.cacheable or not compile,
            "compile needs a cache, which this model's settings rule out: leave compile out",
        )
        longest = longest_context(model.config)
        context = longest if max_context is None else max_context
        least = model.config.num_latents
        if not least <= context <= longest:
            raise InputError(f"max_context is {context}: it must be in {least} ... {longest}, for this model's latents")
        self.model = model.eval()
        self.config = model.config if context == longest else model.config.replace(context_length=context)
        self.slots, self.context, self.queue, self.seconds = slots, context, queue, seconds
        self.outbox = Outbox()
        """For listeners; flushed when they may have received results."""
        self._compile = compile
        self._waiting: deque[Job] = deque()
        self._wake = threading.Condition()
        self._closing = False
        self._out_of_time = False
        """Whether all jobs end now."""
        self._reading: tuple[Job, Iterator[None]] | None = None
        self._running: dict[int, tuple[Job, int]] = {}
        """Row index -> its job, and the number of its sample."""
        self._rows = 0
        self._started = Future[None]()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Returns when the first job can begin. Raises errors of the start, such as too little memory."""
        self._thread.start()
        self._started.result()

    def end_jobs(self) -> None:
        """Ends waiting and running jobs, and all later ones, as if they had taken too long."""
        self._out_of_time = True

    def close(self) -> None:
        """Ends the thread; waiting and running jobs fail."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        if self._thread.is_alive():
            self._thread.join()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive() and not self._closing

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def running(self) -> int:
        return len(self._running)

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values that it ever holds."""
        return self._decoder.nbytes

    def submit(self, jobs: Sequence[Job]) -> None:
        """Adds all of these jobs to the queue, or none: raises Busy if it has no room for all."""
        with self._wake:
            if self._closing or len(self._waiting) + len(jobs) > self.queue:
                raise Busy
            self._waiting.extend(jobs)
            self._wake.notify()

    def cancel(self, jobs: Sequence[Job]) -> None:
        """Removes these jobs from the queue now, and their rows before the next step."""
        with self._wake:
            for job in jobs:
                job.cancelled = True
                if job in self._waiting:
                    self._waiting.remove(job)
            self._wake.notify()

    def _run(self) -> None:
        with torch.inference_mode():
            try:
                self._decoder = slot_decoder(self.model, self.slots, self.context, self._compile)
                if self._compile:
                    self._warm_up()
            except BaseException as error:
                self._started.set_exception(error)
                return
            self._started.set_result(None)
            while self._wait_for_work():
                try:
                    self._remove_unwanted()
                    self._read()
                    self._step()
                except Exception as error:
                    self._fail(error)
                self.outbox.flush()
            self._fail(RuntimeError("the server is closing"))
            self.outbox.flush()

    def _warm_up(self) -> None:
        """Compiles the step before the first request, since it takes half a minute."""
        row = Row(0, torch.zeros(1, dtype=torch.int64), self.config)
        for _ in self._decoder.read(row):
            pass
        self._decoder.admit([row])
        self._decoder.next_logits()
        self._decoder.clear()

    def _wait_for_work(self) -> bool:
        """Waits for a job; False: the engine is closing."""
        with self._wake:
            while not (self._closing or self._waiting or self._running or self._reading):
                self._wake.wait()
            return not self._closing

    def _remove_unwanted(self) -> None:
        removed = []
        for row in self._decoder.rows:
            job, sample = self._running[row.index]
            late = self._late(job)
            if late and not job.cancelled:
                job.listener.out_of_time(sample)
            if late or job.cancelled:
                removed.append(row)
        self._remove(removed)
        if self._reading is not None:
            job, _ = self._reading
            late = self._late(job)
            if late and not job.cancelled:
                self._end_unread(job)
            if late or job.cancelled:
                self._reading = None

    def _late(self, job: Job) -> bool:
        return self._out_of_time or (job.started is not None and time.monotonic() - job.started > self.seconds)

    def _end_unread(self, job: Job) -> None:
        """Ends a job whose prompt is not read yet. Half of the scores would look like all, so then it fails."""
        if job.score:
            job.listener.failed(TooSlow())
            return
        job.listener.begun(last=False)
        for sample in range(len(job.seeds)):
            job.listener.out_of_time(sample)

    def _remove(self, rows: list[Row], erase: bool = False) -> None:
        if rows:
            self._decoder.remove(rows, erase)
            for row in rows:
                del self._running[row.index]

    def _read(self) -> None:
        """Reads prompts for READ_SECONDS, but at least one piece."""
        until = time.monotonic() + READ_SECONDS
        while self._read_piece() and time.monotonic() < until:
            self._remove_unwanted()

    def _read_piece(self) -> bool:
        """Reads a piece of the first job's prompt; False if no job can be read."""
        if self._reading is None:
            with self._wake:
                if not self._waiting or len(self._waiting[0].seeds) > self._decoder.free:
                    return False
                job = self._waiting.popleft()
            job.started = time.monotonic()
            self._reading = job, self._begin(job)
        job, pieces = self._reading
        try:
            next(pieces)
        except StopIteration:
            self._reading = None
        except Exception as error:
            self._reading = None
            logger.exception("a prompt could not be read")
            job.listener.failed(error)
        return True

    def _begin(self, job: Job) -> Iterator[None]:
        """Scores a job's prompt if requested, reads it once, and admits its rows. Yields after each piece."""
        if job.score:
            yield from self._score(job)
        if not job.seeds:
            job.listener.begun(last=True)
            return
        row = Row(0, job.prompt, self.config, job.settings)
        for _ in self._decoder.read(row):
            yield
        rows = []
        for sample, seed in enumerate(job.seeds):
            rows.append(row.fork())
            rows[-1].index, rows[-1].generator = self._rows + sample, torch.Generator()
            if seed is None:
                rows[-1].generator.seed()
            else:
                rows[-1].generator.manual_seed(seed % 2**64)
        self._decoder.admit(rows)
        self._running |= {row.index: (job, sample) for sample, row in enumerate(rows)}
        self._rows += len(rows)
        job.listener.begun(last=False)

    def _score(self, job: Job) -> Iterator[None]:
        """Log-probabilities of a prompt's tokens, in the windows of generation from its first token (`blocks`); of a
        network without a cache in those of `evaluate`, which are fewer. Yields after each piece."""
        config, ids = self.config, job.prompt
        job.listener.scored(ids[:1].tolist(), None)
        if len(ids) < 2:
            return
        if config.cacheable:
            spans = ((*block[:2], block.end, block.first + 1) for block in blocks(config, len(ids) - 1))
        else:
            context = longest_context(config)
            latents = min(config.num_latents, context)
            few = windows(len(ids), context, latents, max(1, latents // 2))
            spans = ((*window[:2], window.end - 1, window.first_target) for window in few)
        for start, prefix_len, end, first_target in spans:
            row = Row(0, ids[:end], config, RowSettings(pinned=job.settings.pinned))
            row.window = Window(start, end - start - prefix_len)
            target = row.num_tokens - row.window.num_latents + 1  # that of the next latent
            for found in self._decoder.read(row, newest=True):
                if found is not None:
                    scored = found[0, max(0, first_target - target) :]
                    target += found.shape[1]
                    if len(scored) > 0:
                        logits = self.model.head(scored)
                        require_finite(logits)
                        targets = ids[target - len(scored) : target].tolist()
                        job.listener.scored(targets, logits.float().log_softmax(-1).cpu())
                yield

    def _step(self) -> None:
        """One token for each row."""
        rows = list(self._decoder.rows)
        if not rows:
            return
        logits = self._decoder.next_logits()
        try:
            tokens, _, logprobs = draw(rows, logits)
        except InputError:  # nothing has been drawn yet
            logits = logits[self._fail_stuck(rows, logits)]
            rows = list(self._decoder.rows)
            if not rows:
                return
            tokens, _, logprobs = draw(rows, logits)
        self._decoder.add(tokens)
        unwanted = []
        for row, token, all_logprobs in zip(rows, tokens, logprobs, strict=True):
            job, sample = self._running[row.index]
            more = job.cancelled or job.listener.token(sample, token, all_logprobs, row.finish_reason)
            if row.finish_reason is not None:
                del self._running[row.index]
            elif not more:
                unwanted.append(row)
        self._remove(unwanted)

    def _fail_stuck(self, rows: list[Row], logits: Tensor) -> list[int]:
        """Fails the jobs of rows that cannot continue after these logits (rows, V), and removes their rows. Returns the
        indices in `logits` of the remaining rows, in the decoder's new order."""
        stuck = dict[Job, Exception]()
        for row, one in zip(rows, logits.cpu().double(), strict=True):
            try:
                require_finite(one[None])
                row.adjust(one)
            except InputError as error:
                stuck[self._running[row.index][0]] = error
        self._remove([row for row in rows if self._running[row.index][0] in stuck], erase=True)
        for job, error in stuck.items():
            job.listener.failed(error)
        return [rows.index(row) for row in self._decoder.rows]

    def _fail(self, error: Exception) -> None:
        """Ends running jobs with an error, on closing also waiting jobs. Later jobs start from an empty decoder."""
        if not self._closing:
            logger.error("a step failed", exc_info=error)
        jobs = {job for job, _ in self._running.values()}
        if self._reading is not None:
            jobs.add(self._reading[0])
        if self._closing:
            with self._wake:
                jobs.update(self._waiting)
                self._waiting.clear()
        self._running, self._reading = {}, None
        self._decoder.clear()
        for job in jobs:
            if not job.cancelled:
                job.listener.failed(error)

"""POST /v1/generate: continues music, a picture, a recording or numbers; the results are files behind links."""

import asyncio
import base64
import mimetypes
import secrets
import time
from collections import OrderedDict
from collections.abc import AsyncIterator
from functools import partial
from itertools import takewhile
from operator import eq
from typing import Annotated, Any

import numpy as np
import torch
from fastapi import UploadFile
from pydantic import BaseModel, ConfigDict, Field
from starlette.concurrency import run_in_threadpool
from torch import Tensor

from perceiver_ar.data.codec import Codec, parse_conditions, row_prompt_and_count
from perceiver_ar.data.image import ImageCodec
from perceiver_ar.data.midi import MusicCodec
from perceiver_ar.errors import InputError
from perceiver_ar.generation.rows import RowSettings
from perceiver_ar.serving.engine import Engine, Finish, Job
from perceiver_ar.serving.metrics import Metrics, TokenTimes
from perceiver_ar.serving.outbox import Outbox
from perceiver_ar.serving.protocol import MAX_UNREAD, Refused, sampling_of
from perceiver_ar.serving.worker import TooMuch, Worker

EXPIRE_SECONDS = 3600.0
MAX_RESULTS = 256 * 2**20
"""Maximum bytes of results to keep; the oldest are removed first."""
EVENT_SECONDS = 0.2
MAX_NEW_TOKENS = 1_000_000


class GenerateForm(BaseModel):
    """Fields of the form; the settings are those of `perceiver-ar generate`."""

    model_config = ConfigDict(extra="forbid")

    file: UploadFile | None = None
    prompt: str = ""
    condition: list[str] = []
    """Of the form key=value, as `--condition`."""
    infill: str | None = None
    """Of the form FIRST:LAST, as `--infill`."""
    keep: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    max_new_tokens: Annotated[int, Field(ge=1, le=MAX_NEW_TOKENS)] | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    seed: int | None = None
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    stream: bool = False


class Results:
    """Sets of files in memory, each under an unguessable key, for at most an hour."""

    def __init__(self) -> None:
        self._sets: OrderedDict[str, tuple[float, dict[str, bytes]]] = OrderedDict()

    def add(self, files: dict[str, bytes]) -> str:
        """Keeps files; returns their key. Raises TooMuch if they alone exceed MAX_RESULTS."""
        if sum(map(len, files.values())) > MAX_RESULTS:
            raise TooMuch
        now, key = time.monotonic(), secrets.token_urlsafe(16)
        self._expire(now)
        self._sets[key] = now + EXPIRE_SECONDS, files
        while sum(len(content) for _, kept in self._sets.values() for content in kept.values()) > MAX_RESULTS:
            self._sets.popitem(last=False)
        return key

    def get(self, key: str, name: str) -> bytes | None:
        self._expire(time.monotonic())
        return self._sets[key][1].get(name) if key in self._sets else None

    def _expire(self, now: float) -> None:
        for old in [other for other, (until, _) in self._sets.items() if until < now]:
            del self._sets[old]


class Tokens:
    """A listener that passes tokens on to the event loop."""

    def __init__(self, outbox: Outbox, metrics: Metrics) -> None:
        self.results = asyncio.Queue[tuple[int, int | None, bool] | Exception]()
        self.send, self.times = partial(outbox.put, self.results), TokenTimes(metrics)

    def scored(self, tokens: object, logprobs: object) -> None: ...

    def begun(self, last: bool) -> None: ...

    def token(self, sample: int, token: int, logprobs: Tensor, finish: Finish | None) -> bool:
        self.times.token(sample)
        last = finish is not None or self.results.qsize() >= MAX_UNREAD
        self.send((sample, token, last))
        return not last

    def out_of_time(self, sample: int) -> None:
        self.send((sample, None, True))

    def failed(self, error: Exception) -> None:
        self.send(error)


class Progress:
    """What a page can draw of a sample while it is drawn: notes of music, a picture's rows."""

    def __init__(self, codec: Codec) -> None:
        self.codec, self.notes = codec.plain, list[list[float]]()

    def update(self, ids: np.ndarray) -> dict[str, Any]:
        """
        notes: the notes of ids (n,) that differ from those before, each [start, end, pitch, velocity], in seconds; the
            first `kept` notes stay.
        picture: a PNG file in base64.
        """
        ids = ids[ids < self.codec.vocab_size]  # without conditions
        if isinstance(self.codec, ImageCodec):
            return {"picture": base64.b64encode(self.codec.decode(ids)).decode()}
        if not isinstance(self.codec, MusicCodec):
            return {}
        notes = self.codec.decode_notes(ids).round(3).tolist()
        kept = sum(1 for _ in takewhile(lambda pair: eq(*pair), zip(notes, self.notes, strict=False)))
        self.notes = notes
        return {"kept": kept, "notes": notes[kept:]}


class Generation:
    """One request: the prompt's ids, its job, and the resulting files."""

    def __init__(
        self, form: GenerateForm, codec: Codec, engine: Engine, worker: Worker, results: Results, metrics: Metrics
    ) -> None:
        self.form, self.codec, self.engine = form, codec, engine
        self.worker, self.results, self.metrics = worker, results, metrics
        self.sampling = sampling_of(form)
        self.samples = form.n or (1 if codec.document_length is None else min(4, engine.slots))
        if self.samples > engine.slots:
            raise Refused(f"n is {self.samples}: this server draws at most {engine.slots} samples together", "n")
        self.original: np.ndarray | None = None
        """The ids of `file`."""
        self.jobs: list[Job] = []
        self.left = 0

    async def read(self) -> bool:
        """Makes the prompt from the form; True. Raises InputError for a file that cannot be read; TooMuch, Busy."""
        form, file = self.form, self.form.file
        try:
            conditions = parse_conditions(word.replace("\r\n", "\n") for word in form.condition)  # as browsers send it
            front = self.codec.condition_ids(conditions)
        except InputError as error:
            raise Refused(str(error), "condition") from None
        if file is not None and form.prompt:
            raise Refused("prompt and file are both given: choose one", "prompt")
        if file is not None and (first := [key for key in conditions if key in self.codec.header_conditions]):
            raise Refused(f"condition {first[0]} begins a new document: leave out file", "condition")
        if file is None:
            document = await run_in_threadpool(self.codec.start, form.prompt, conditions)
        else:
            document = self.original = await self.worker.encode(await file.read(), front)
        self.row, self.prompt, count = await run_in_threadpool(self._what_to_draw, document)
        if count < 1:
            raise Refused("keep leaves nothing to draw: the prompt is a whole picture", "keep")
        self.drawn: list[list[int]] = [[] for _ in range(self.samples)]
        separator = self.codec.separator[-1:]
        settings = RowSettings(
            self.sampling,
            allowed_next=self.codec.constraint(),
            stops=(separator,) if separator else (),
            max_new_tokens=count,
            pinned=tuple(front),
        )
        seeds = [None if form.seed is None else form.seed + sample for sample in range(self.samples)]
        self.listener = Tokens(self.engine.outbox, self.metrics)
        self.jobs = [Job(torch.from_numpy(self.prompt), settings, seeds, self.listener)]
        return True

    def _what_to_draw(self, document: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
        """The row that results begin with, the prompt, and the number of tokens to draw."""
        form = self.form
        if form.infill is not None and (self.original is None or form.keep is not None):
            raise Refused("infill needs a whole piece: give file, and leave out keep", "infill")
        counts = form.keep, form.max_new_tokens, form.infill
        try:
            row, prompt, count = row_prompt_and_count(self.codec, document, *counts, self.engine.context)
        except InputError as error:
            raise Refused(str(error), "keep" if form.infill is None else "infill") from None
        return row, prompt, min(count, MAX_NEW_TOKENS)

    def submit(self) -> None:
        """Raises Busy if the queue has no room. Call `cancel` afterwards in any case."""
        self.engine.submit(self.jobs)
        self.metrics.prompt_tokens.inc(len(self.prompt))
        self.left = self.samples

    def cancel(self) -> None:
        if self.left:
            self.engine.cancel(self.jobs)

    async def pieces(self) -> AsyncIterator[dict[str, Any]]:
        """Yields tokens as they come, several together, with what a page can draw of them; at the end the links."""
        new: dict[int, list[int]] = {}
        shown = time.monotonic()
        progress = [Progress(self.codec) for _ in self.drawn] if self.form.stream else []
        if progress:
            yield {"type": "prompt", **await run_in_threadpool(Progress(self.codec).update, self.row)}
        while self.left:
            result = await self.listener.results.get()
            if isinstance(result, Exception):
                raise result
            sample, token, last = result
            if token is not None:
                self.drawn[sample].append(token)
                new.setdefault(sample, []).append(token)
            self.left -= last
            if new and (not self.left or time.monotonic() - shown > EVENT_SECONDS):
                samples: list[dict[str, Any]] = [{"index": i, "ids": ids} for i, ids in sorted(new.items())]
                for one in samples if progress else ():
                    row = self._row(self.drawn[one["index"]])
                    one |= await run_in_threadpool(progress[one["index"]].update, row)
                yield {"type": "tokens", "samples": samples}
                new, shown = {}, time.monotonic()
        yield {"type": "done", **await self._links()}

    async def whole(self) -> dict[str, Any]:
        """The last event."""
        last: dict[str, Any] = {}
        async for event in self.pieces():
            last = event
        return last

    async def _links(self) -> dict[str, Any]:
        rows = await run_in_threadpool(lambda: [self._row(drawn) for drawn in self.drawn])
        files = await self.worker.show(rows, len(self.row), self.original)
        key = self.results.add(files)
        links = [
            {"name": name, "url": f"/v1/files/{key}/{name}", "bytes": len(content), "media_type": media_type(name)}
            for name, content in files.items()
        ]
        usage = {"prompt_tokens": len(self.prompt), "completion_tokens": sum(map(len, self.drawn))}
        return {"files": links, "expires_in": int(EXPIRE_SECONDS), "usage": usage}

    def _row(self, drawn: list[int]) -> np.ndarray:
        return np.concatenate([self.row, np.array(drawn, dtype=np.int64)])


def media_type(name: str) -> str:
    return mimetypes.guess_type(name)[0] or "application/octet-stream"

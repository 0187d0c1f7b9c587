"""Completions: from tokens that the engine draws to text, log-probabilities and finish reasons."""

import asyncio
import time
import uuid
from collections import deque
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from perceiver_ar.errors import InputError
from perceiver_ar.generation.rows import RowSettings
from perceiver_ar.serving.engine import Engine, Finish, Job
from perceiver_ar.serving.metrics import Metrics, TokenTimes
from perceiver_ar.serving.outbox import Outbox
from perceiver_ar.serving.protocol import MAX_SCORES, MAX_UNREAD, CompletionRequest, Refused
from perceiver_ar.serving.text import CharacterCount, StoppedText, Vocabulary


@dataclass
class Token:
    """A token in the form of `logprobs`."""

    name: str
    logprob: float | None
    """In nats. None: no token comes before it."""
    top: dict[str, float] | None
    start: int
    """Bytes of the text before it."""
    size: int
    offset: int
    """Characters of the text before it."""


@dataclass
class Delta:
    """The new part of a choice."""

    index: int
    text: str
    tokens: list[Token] = field(default_factory=list)
    finish: Finish | None = None
    drawn: int = 0
    """Tokens drawn so far."""

    def choice(self, logprobs: bool) -> dict[str, Any]:
        """In OpenAI's form."""
        return {
            "index": self.index,
            "text": self.text,
            "logprobs": {
                "tokens": [token.name for token in self.tokens],
                "token_logprobs": [token.logprob for token in self.tokens],
                "top_logprobs": [token.top for token in self.tokens],
                "text_offset": [token.offset for token in self.tokens],
            }
            if logprobs
            else None,
            "finish_reason": self.finish,
        }


class Choice:
    """The text of one choice while it is drawn. Only the engine's thread uses it."""

    def __init__(self, index: int, vocabulary: Vocabulary, stops: Sequence[bytes], top: int | None) -> None:
        self.index, self.vocabulary, self.top = index, vocabulary, top
        self.text = StoppedText(stops)
        self.tokens = deque[Token]()
        self.drawn, self.echoed, self.num_bytes, self.characters = 0, 0, 0, CharacterCount()

    def echo(self, tokens: Sequence[int], logprobs: Tensor | None) -> None:
        """Adds tokens of the prompt. logprobs: (n, V), the log-probabilities at each; None: no token comes before."""
        for i, token in enumerate(tokens):
            self._record(token, None if logprobs is None else logprobs[i])
            self.echoed += len(self.vocabulary.bytes[token])

    def echo_of(self, other: "Choice") -> None:
        """Has the echo of another choice of the same prompt."""
        self.tokens, self.echoed = deque(other.tokens), other.echoed
        self.num_bytes, self.characters = other.num_bytes, other.characters.copy()

    def push(self, token: int, logprobs: Tensor, finish: Finish | None) -> Delta:
        """Adds a token that was drawn from these log-probabilities (V,)."""
        self.drawn += 1
        self._record(token, logprobs)
        text = self.text.push(self.vocabulary.bytes[token])
        return self.delta(text, "stop" if self.text.stopped else finish)

    def delta(self, text: str, finish: Finish | None = None) -> Delta:
        """New text, with the tokens that it completes; at the end of the choice, also those that it holds in part."""
        if finish is not None:
            text += self.text.close()
        shown, ready = self.echoed + self.text.num_bytes, list[Token]()
        while self.tokens:
            token = self.tokens[0]
            if self.text.stopped:
                wanted = token.start < shown
            else:
                wanted = finish is not None or token.start + token.size <= shown
            if not wanted:
                break
            ready.append(self.tokens.popleft())
        return Delta(self.index, text, ready, finish, self.drawn)

    def _record(self, token: int, logprobs: Tensor | None) -> None:
        if self.top is None:
            return
        data, names = self.vocabulary.bytes[token], self.vocabulary.names
        offset = self.characters.push(data)
        logprob, top = None, None
        if logprobs is not None and token < self.vocabulary.conditions:  # those are given, not predicted
            logprob = float(logprobs[token])
            values, ids = logprobs.topk(min(self.top, len(logprobs)))
            top = {names[index]: value for index, value in zip(ids.tolist(), values.tolist(), strict=True)}
            top.setdefault(names[token], logprob)
        self.tokens.append(Token(names[token], logprob, top, self.num_bytes, len(data), offset))
        self.num_bytes += len(data)


class Listener:
    """Passes the results of a job on to the event loop."""

    def __init__(
        self, outbox: Outbox, results: "asyncio.Queue[Delta | Exception]", choices: Sequence[Choice],
        echo: bytes | None, metrics: Metrics,
    ) -> None:  # fmt: skip
        self.results, self.choices, self.prompt = results, choices, echo
        self.send, self.times = partial(outbox.put, results), TokenTimes(metrics)

    def scored(self, tokens: Sequence[int], logprobs: Tensor | None) -> None:
        self.choices[0].echo(tokens, logprobs)

    def begun(self, last: bool) -> None:
        for choice in self.choices[1:]:
            choice.echo_of(self.choices[0])
        for choice in self.choices:
            if self.prompt is not None or last:
                self.send(choice.delta(choice.text.echo(self.prompt or b""), "length" if last else None))

    def token(self, sample: int, token: int, logprobs: Tensor, finish: Finish | None) -> bool:
        self.times.token(sample)
        if finish is None and self.results.qsize() >= MAX_UNREAD:
            finish = "length"
        delta = self.choices[sample].push(token, logprobs, finish)
        if delta.text or delta.tokens or delta.finish:
            self.send(delta)
        return delta.finish is None

    def out_of_time(self, sample: int) -> None:
        self.send(self.choices[sample].delta("", "length"))

    def failed(self, error: Exception) -> None:
        self.send(error)


Prompt = tuple[Tensor, bytes | None]
"""The ids (T,) of a prompt, and its text as UTF-8 if the answer repeats it."""


class Completion:
    """One request: its jobs, their results, and the answer in OpenAI's form."""

    def __init__(
        self, request: CompletionRequest, prompts: Sequence[Prompt], engine: Engine, vocabulary: Vocabulary,
        model: str, metrics: Metrics,
    ) -> None:  # fmt: skip
        """Raises Refused for invalid settings."""
        self.request, self.engine, self.metrics = request, engine, metrics
        self.results = asyncio.Queue[Delta | Exception]()
        self.head = {"id": f"cmpl-{uuid.uuid4().hex}", "object": "text_completion", "created": int(time.time())}
        self.head["model"] = model
        self.prompt_tokens = sum(len(ids) for ids, _ in prompts)
        self.drawn = [0] * (len(prompts) * request.samples)
        self.left = len(self.drawn)
        """Choices that have not ended."""
        stops, n = request.stops(), request.samples
        settings = RowSettings(
            request.sampling(),
            allowed_next=vocabulary.codec.constraint(),
            stops=() if vocabulary.end is None else ((vocabulary.end,),),
            max_new_tokens=request.count,
        )
        score = request.top is not None and bool(request.echo)
        if request.top is not None and score and self.prompt_tokens * n * (request.top + 1) > MAX_SCORES:
            raise Refused(
                f"prompt has {self.prompt_tokens} tokens to score, with n {n} and logprobs {request.top}: "
                f"tokens * n * (logprobs + 1) must be at most {MAX_SCORES}",
                "prompt",
            )
        self.jobs = list[Job]()
        for number, (ids, echo) in enumerate(prompts):
            first = number * n
            choices = [Choice(first + i, vocabulary, stops, request.top) for i in range(n)]
            listener = Listener(engine.outbox, self.results, choices, echo, metrics)
            seeds = [None if request.seed is None else request.seed + first + i for i in range(n)]
            pinned = tuple(vocabulary.codec.conditions_of(ids.numpy()))
            count, whole = request.count, vocabulary.codec.document_length
            if whole is not None and len(ids) > whole:
                raise Refused(
                    f"prompt has {len(ids)} ids, and a whole picture {whole}: give one, or its beginning", "prompt"
                )
            count = count if whole is None else min(count, whole - len(ids))
            each = replace(settings, pinned=pinned, max_new_tokens=count)
            self.jobs.append(Job(ids, each, seeds if count else [], listener, score))

    def submit(self) -> None:
        """Raises Busy if the queue has no room. Call `cancel` afterwards in any case."""
        self.engine.submit(self.jobs)
        self.metrics.prompt_tokens.inc(self.prompt_tokens)

    def cancel(self) -> None:
        """Cancels the choices that have not ended."""
        if self.left:
            self.engine.cancel(self.jobs)

    async def deltas(self) -> AsyncIterator[Delta]:
        """Yields new parts until all choices have ended. Raises the engine's errors."""
        while self.left:
            delta = await self.results.get()
            if isinstance(delta, Exception):
                raise delta
            self.drawn[delta.index] = delta.drawn
            self.left -= delta.finish is not None
            yield delta

    async def whole(self) -> dict[str, Any]:
        """The complete answer."""
        whole = [Delta(index, "") for index in range(len(self.drawn))]
        async for delta in self.deltas():
            one = whole[delta.index]
            one.text += delta.text
            one.tokens += delta.tokens
            one.finish = delta.finish
        return self.head | {"choices": self._choices(whole), "usage": self.usage()}

    async def pieces(self) -> AsyncIterator[dict[str, Any]]:
        """The answer piece by piece."""
        options = self.request.stream_options
        with_usage = options is not None and bool(options.include_usage)
        usage = {"usage": None} if with_usage else {}
        async for delta in self.deltas():
            yield self.head | {"choices": self._choices([delta])} | usage
        if with_usage:
            yield self.head | {"choices": [], "usage": self.usage()}

    def usage(self) -> dict[str, int]:
        prompt, drawn = self.prompt_tokens, sum(self.drawn)
        return {"prompt_tokens": prompt, "completion_tokens": drawn, "total_tokens": prompt + drawn}

    def _choices(self, deltas: Iterable[Delta]) -> list[dict[str, Any]]:
        return [delta.choice(self.request.top is not None) for delta in deltas]


def read_prompts(request: CompletionRequest, vocabulary: Vocabulary) -> list[Prompt]:
    """The prompts of a request; slow for long ones. Raises Refused."""
    found = list[Prompt]()
    try:
        vocabulary.codec.condition_ids(request.condition or {})
    except InputError as error:
        raise Refused(str(error), "condition") from None
    for prompt in request.prompts():
        if request.condition and not isinstance(prompt, str):
            raise Refused("condition is for texts, and prompt holds ids: put the condition's ids first", "condition")
        try:
            ids = torch.from_numpy(vocabulary.prompt_ids(prompt, request.condition or {}))
        except InputError as error:
            raise Refused(f"prompt cannot be read: {str(error).partition(';')[0]}", "prompt") from None
        text = prompt.encode() if isinstance(prompt, str) else b"".join(vocabulary.bytes[index] for index in prompt)
        found.append((ids, text if request.echo else None))
    return found

"""The routes. Handlers run on the event loop and never compute: other threads encode texts, and the engine runs the
model."""

import asyncio
import json
import logging
import re
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

from fastapi import FastAPI, Form, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse
from fastapi.routing import APIRoute
from fastapi.sse import KEEPALIVE_COMMENT, EventSourceResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.types import Message, Receive, Scope, Send

from perceiver_ar.data.codec import Codec, of_trained
from perceiver_ar.data.text import END_OF_TEXT
from perceiver_ar.errors import InputError
from perceiver_ar.generation.rows import WeightsError
from perceiver_ar.serving.completions import Completion, read_prompts
from perceiver_ar.serving.engine import Busy, Engine, TooSlow
from perceiver_ar.serving.errors import FAILED, describe, error_body, error_response
from perceiver_ar.serving.files import GenerateForm, Generation, Results, media_type
from perceiver_ar.serving.metrics import Metrics
from perceiver_ar.serving.protocol import MAX_PROMPTS, MAX_SCORES, CompletionRequest, Refused, StrictModel
from perceiver_ar.serving.security import RETRY, Guard
from perceiver_ar.serving.text import Vocabulary
from perceiver_ar.serving.worker import Stopping, TooMuch, Worker

MAX_BODY, MAX_BODIES = 16 * 2**20, 128 * 2**20
BODY_SECONDS = 60.0
PING_SECONDS = 15.0
IDS = re.compile(rb'"(prompt|tokens)"\s*:\s*\[[\s\[]*[-\d]')
"""Where a list of ids begins in a body."""
PAGE = {path.name: path for path in Path(__file__).with_name("page").iterdir()}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data:; media-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""The page loads nothing from other hosts, and other pages cannot frame it."""

FAILURES = {
    Busy: (503, "the queue of this server is full: try again later"),
    TooMuch: (413, "the file, or a result, exceeds the limit of memory, time or tokens"),
    TooSlow: (503, "the prompt could not be scored in time: send a shorter one"),
    Stopping: (503, "the server stops before the file is ready: try again later"),
}
"""Status and message of requests that are valid and cannot be served."""

T = TypeVar("T")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Service:
    """The served run and its name."""

    engine: Engine
    codec: Codec
    path: Path
    name: str
    api_key: str | None
    infills: bool
    """Whether the model was trained to infill bars."""
    scores: Mapping[str, float]
    """Bits for each byte, token, ... of held-out files, by name."""


GenerateFields = Annotated[GenerateForm, Form(media_type="multipart/form-data")]


class TokenizeRequest(StrictModel):
    prompt: str
    model: str | None = None
    add_special_tokens: bool = True


class DetokenizeRequest(StrictModel):
    tokens: list[int]
    model: str | None = None


def bounded_route(most: int) -> type[APIRoute]:
    """A route that refuses a JSON body of more than `most` bytes that is a list of ids. Python's parser holds the
    interpreter while it reads, which for such lists takes ten times as long as for a text of as many bytes."""

    class BoundedRequest(Request):
        async def json(self) -> Any:
            body = await self.body()
            if len(body) > most and (found := IDS.search(body)):
                field = found[1].decode()
                raise HTTPException(413, f"{field} is a list of ids in more than {most} bytes: send fewer, or the text")
            return await super().json()

    class BoundedRoute(APIRoute):
        def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
            handle = super().get_route_handler()

            async def handle_bounded(request: Request) -> Response:
                return await handle(BoundedRequest(request.scope, request.receive))

            return handle_bounded

    return BoundedRoute


class Events(EventSourceResponse):
    """Server-sent events, and a comment every `ping_seconds` for proxies that close quiet connections. When they end in
    any way, also before they begin, calls `on_end(whether all were sent)`."""

    def __init__(
        self, content: AsyncIterator[bytes], on_end: Callable[[bool], None], ping_seconds: float = PING_SECONDS
    ) -> None:
        super().__init__(content, headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self.content, self.on_end, self.ping_seconds, self.complete = content, on_end, ping_seconds, False

    async def stream_response(self, send: Send) -> None:
        async def ping() -> None:
            while True:
                await asyncio.sleep(self.ping_seconds)
                await send(body(KEEPALIVE_COMMENT))

        def body(chunk: bytes, more: bool = True) -> Message:
            return {"type": "http.response.body", "body": chunk, "more_body": more}

        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        # Beside the events: to wait for each with a time limit takes several times as long.
        pings = asyncio.ensure_future(ping())
        try:
            async for chunk in self.content:
                await send(body(chunk))
        finally:
            pings.cancel()
        await send(body(b"", more=False))
        self.complete = True

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.on_end(self.complete)


def create_app(service: Service) -> FastAPI:
    engine, name = service.engine, service.name
    worker, results = Worker(service.path), Results()
    vocabulary, metrics, created = Vocabulary(service.codec), Metrics(engine), int(time.time())

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        engine.outbox.loop = asyncio.get_running_loop()
        yield
        await run_in_threadpool(engine.close)
        await run_in_threadpool(worker.close)

    # No documentation pages: FastAPI's load scripts from other hosts.
    app = FastAPI(title="perceiver-ar", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.add_middleware(
        Guard,
        api_key=service.api_key,
        max_body=MAX_BODY,
        max_bodies=MAX_BODIES,
        body_seconds=BODY_SECONDS,
        answered=metrics.answered,
    )
    add_error_handlers(app)
    app.state.worker = worker
    size = len(f"{service.codec.vocab_size}, ")
    app.router.route_class = bounded_route(size * max(MAX_SCORES, MAX_PROMPTS * engine.context))

    def check_model(model: str | None) -> None:
        if model not in (None, name):
            raise Refused(f"model is {model!r}, but this server has {name!r}", "model", "model_not_found")

    @app.post("/v1/completions")
    async def completions(request: Request, body: CompletionRequest) -> Response:
        check_model(body.model)
        body.check(engine.slots)
        prompts = await run_in_threadpool(read_prompts, body, vocabulary)
        completion = Completion(body, prompts, engine, vocabulary, name, metrics)
        completion.submit()
        return await answer_with(request, completion, bool(body.stream), metrics)

    @app.post("/v1/generate")
    async def generate(request: Request, form: GenerateFields) -> Response:
        for field, times in Counter(field for field, _ in (await request.form()).multi_items()).items():
            if times > 1 and field != "condition":  # FastAPI would use the last one silently
                raise Refused(f"the form has {field} {times} times: send it once", field)
        if form.infill is not None and not service.infills:
            raise Refused("this model has not learned to infill bars: leave infill out", "infill")
        generation = Generation(form, service.codec, engine, worker, results, metrics)
        try:
            if await unless_gone(request, generation.read()) is None:
                return client_gone(metrics)
        except Refused:
            raise
        except InputError as error:  # a file of another kind, or a damaged one
            return error_response(422, of_trained(str(error)), param="prompt" if form.file is None else "file")
        generation.submit()
        return await answer_with(request, generation, form.stream, metrics)

    @app.get("/v1/files/{key}/{name}")
    async def file(key: str, name: str) -> Response:
        content = results.get(key, name)
        if content is None:
            raise HTTPException(404, "the file does not exist or has expired")
        headers = {"Content-Disposition": f'inline; filename="{name}"', "X-Content-Type-Options": "nosniff"}
        return Response(content, media_type=media_type(name), headers=headers)

    @app.get("/", include_in_schema=False)
    @app.get("/page/{name}", include_in_schema=False)
    async def page(name: str = "index.html") -> FileResponse:
        if name not in PAGE:
            raise HTTPException(404, "the page has no such file")
        headers = {"Content-Security-Policy": POLICY, "X-Content-Type-Options": "nosniff", "Cache-Control": "no-cache"}
        return FileResponse(PAGE[name], headers=headers)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        card = {"id": name, "object": "model", "created": created, "owned_by": "perceiver-ar"}
        card |= {"context_length": engine.context, "writes_text": service.codec.writes_text}
        card |= {"document_length": service.codec.document_length, "file_ending": service.codec.ending}
        card |= {"conditions": dict(service.codec.conditions), "slots": engine.slots}
        card |= {"header_conditions": service.codec.header_conditions, "classes": service.codec.classes}
        card |= {"infills": service.infills}
        card |= {"parameters": engine.model.num_parameters(), "evaluation": service.scores}
        return {"object": "list", "data": [card]}

    @app.get("/health")
    async def health() -> JSONResponse:
        return JSONResponse({"status": "ok" if engine.alive else "stopped"}, 200 if engine.alive else 503)

    @app.get("/metrics")
    async def show_metrics() -> Response:
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    @app.get("/tokenizer_info")
    async def tokenizer_info() -> dict[str, Any]:
        end = None if vocabulary.end is None else END_OF_TEXT
        names = {"bos_token": end, "eos_token": end, "pad_token": end, "chat_template": None}
        return {"tokenizer_class": type(service.codec).__name__, "vocab_size": service.codec.vocab_size} | names

    @app.post("/tokenize")
    async def tokenize(body: TokenizeRequest) -> dict[str, Any]:
        check_model(body.model)
        tokens = await run_in_threadpool(vocabulary.tokenize, body.prompt, body.add_special_tokens)
        return {"tokens": tokens, "count": len(tokens), "max_model_len": engine.context}

    @app.post("/detokenize")
    async def detokenize(body: DetokenizeRequest) -> dict[str, Any]:
        check_model(body.model)

        def text() -> str:
            return vocabulary.text(vocabulary.check(body.tokens, "tokens"))

        return {"prompt": await run_in_threadpool(text)}

    return app


async def answer_with(request: Request, work: Completion | Generation, stream: bool, metrics: Metrics) -> Response:
    """Responds with pieces of the answer as they come, or with the whole. Cancels the work if the client goes away."""
    if stream:

        def end(complete: bool) -> None:
            work.cancel()
            if not complete:
                metrics.gone.inc()

        return Events(events(work.pieces()), end)
    try:
        answer = await unless_gone(request, work.whole())
    finally:
        work.cancel()
    return client_gone(metrics) if answer is None else JSONResponse(answer)


def client_gone(metrics: Metrics) -> Response:
    """The answer that nobody reads; its status is that of nginx."""
    metrics.gone.inc()
    return Response(status_code=499)


def add_error_handlers(app: FastAPI) -> None:
    @app.exception_handler(Refused)
    async def refused(_: Request, error: Refused) -> Response:
        status = 404 if error.code == "model_not_found" else 400
        return error_response(status, str(error), param=error.param, code=error.code)

    async def known(_: Request, error: Exception) -> Response:
        param = "file" if isinstance(error, TooMuch) else None
        headers = RETRY if isinstance(error, Busy) else None
        return error_response(*status_and_message(error), param=param, headers=headers)

    for kind in (*FAILURES, InputError):
        app.add_exception_handler(kind, known)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        message, param = describe(error.errors())
        return error_response(400, message, param=param)

    @app.exception_handler(HTTPException)
    async def http(_: Request, error: HTTPException) -> Response:
        return error_response(error.status_code, str(error.detail), headers=error.headers)


def status_and_message(error: Exception) -> tuple[int, str]:
    if isinstance(error, InputError):
        return 500 if isinstance(error, WeightsError) else 400, str(error)
    return FAILURES.get(type(error), (500, FAILED))


async def events(chunks: AsyncIterator[dict[str, Any]]) -> AsyncIterator[bytes]:
    """Chunks as server-sent events, up to [DONE] or an error."""
    try:
        async for chunk in chunks:
            yield event(json.dumps(chunk))
        yield event("[DONE]")
    except Exception as error:
        status, message = status_and_message(error)
        if message is FAILED:
            logger.exception("a stream failed")
        yield event(json.dumps(error_body(status, message)))


def event(line: str) -> bytes:
    return f"data: {line}\n\n".encode()


async def unless_gone(request: Request, answer: Awaitable[T]) -> T | None:
    """The answer; None if the client goes away first. uvicorn does not cancel a request whose client has gone."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    tasks = [asyncio.ensure_future(answer), asyncio.ensure_future(gone())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return tasks[0].result() if tasks[0].done() else None
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

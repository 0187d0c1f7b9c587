"""From a run to a server that listens."""

import asyncio
import copy
import logging
import socket
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
import uvicorn
from uvicorn.config import LOGGING_CONFIG

from perceiver_ar.data.codec import Codec
from perceiver_ar.errors import InputError, require
from perceiver_ar.generation.quantization import int8_weights
from perceiver_ar.network.model import PerceiverAR
from perceiver_ar.run import Run
from perceiver_ar.serving.app import Service, create_app
from perceiver_ar.serving.engine import Engine
from perceiver_ar.serving.security import is_loopback
from perceiver_ar.threads import in_own_thread

SHUTDOWN_SECONDS = 30
"""Seconds in which running requests must end after SIGTERM."""
LAST_SECONDS = 10
"""Seconds of these that remain for files and answers when the engine ends all jobs."""


def serve(
    path: str | Path,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    api_key: str | None = None,
    **settings: Any,
) -> None:
    """Serves a run until SIGINT or SIGTERM.

    settings: further ones of `load`.

    Raises:
        InputError: invalid settings, no key although others can reach the server, or an address in use.
    """
    require(api_key is None or api_key.strip() != "", "api_key is empty: give a key that nobody guesses")
    require(api_key is None or api_key == api_key.strip(), "api_key has white space at an end: requests cannot send it")
    require(
        api_key is not None or is_loopback(host),
        f"host is {host}, which others can reach: give --api_key, which every request then needs",
    )
    with listen(host, port) as listening:
        service = load(path, api_key, **settings)
        place, number = listening.getsockname()[:2]
        url = f"http://{f'[{place}]' if ':' in place else place}:{number}"
        engine = service.engine
        print(
            f"{service.name} on {engine.model.device}: {engine.slots} slots of {engine.context:,} tokens, "
            f"{engine.nbytes / 2**20:,.0f} MiB of keys and values\n{url}",
            file=sys.stderr,
            flush=True,
        )
        Server(service).run(sockets=[listening])


def load(
    path: str | Path,
    api_key: str | None = None,
    slots: int = 8,
    max_context: int | None = None,
    compile: bool = False,
    precision: str = "32",
    device: str | None = None,
) -> Service:
    """Loads a run and starts its engine. Raises InputError."""
    require(slots >= 1, f"slots is {slots}: it must be at least 1")
    run = Run.open(path)
    model, codec = in_own_thread(partial(load_model, run, precision, device))  # now only the engine's thread computes
    whole = codec.document_length is None or max_context is None or max_context >= model.config.context_length
    require(whole, f"max_context is {max_context}, but a picture of this run has {codec.document_length}: leave it out")
    engine = Engine(model, slots=slots, max_context=max_context, compile=compile)
    try:
        engine.start()
    except (RuntimeError, MemoryError) as error:
        reason = next(iter(str(error).splitlines()), "too little memory")
        raise InputError(
            f"slots is {slots}, of {engine.context} tokens each, and the engine does not start ({reason}): use fewer "
            "--slots, or a shorter --max_context"
        ) from error
    scores = {name: value for name, value in (run.summary() or {}).items() if "bits_per_" in name}
    return Service(engine, codec, run.path, run.path.resolve().name, api_key, run.infills(codec), scores)


def load_model(run: Run, precision: str, device: str | None) -> tuple[PerceiverAR, Codec]:
    model, codec = run.model(), run.codec()
    try:
        model = model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device is {device}, which does not work here ({str(error).splitlines()[0]})") from None
    if precision != "32":
        model = model.to(torch.bfloat16)
    if precision == "int8":
        int8_weights(model)
    return model, codec


class Server(uvicorn.Server):
    """On shutdown ends all jobs, and at last their files, before uvicorn would cut off their answers."""

    def __init__(self, service: Service) -> None:
        app = create_app(service)
        super().__init__(
            uvicorn.Config(
                app,
                log_config=logging_to_stderr(),
                timeout_graceful_shutdown=SHUTDOWN_SECONDS,
                server_header=False,
            )
        )
        self.engine, self.job_seconds = service.engine, SHUTDOWN_SECONDS - LAST_SECONDS
        self.worker, self.file_seconds = app.state.worker, SHUTDOWN_SECONDS - 1

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        loop = asyncio.get_running_loop()
        timers = [
            loop.call_later(self.job_seconds, self.engine.end_jobs),
            loop.call_later(self.file_seconds, self.worker.stop),
        ]
        await super().shutdown(sockets)
        for timer in timers:
            timer.cancel()


def listen(host: str, port: int) -> socket.socket:
    """A listening socket. Raises InputError if the address cannot be used."""
    require(0 <= port <= 65535, f"port is {port}: it must be in 0 ... 65535")
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listening = socket.create_server((host, port), family=family, backlog=2048)
    except (OSError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no host name"
        raise InputError(f"cannot listen on {host}, port {port} ({reason}): choose another") from None
    # Connections inherit it. asyncio sets it only for sockets that name their protocol; without it an event waits 40 ms
    # for the client to acknowledge the one before.
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listening


def logging_to_stderr() -> dict[str, object]:
    """Logging settings for uvicorn's messages and ours. No message contains a prompt."""
    settings = copy.deepcopy(LOGGING_CONFIG)
    settings["handlers"]["access"]["stream"] = "ext://sys.stderr"
    settings["loggers"]["perceiver_ar"] = {"handlers": ["default"], "level": logging.getLevelName(logging.INFO)}
    return settings

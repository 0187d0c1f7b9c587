"""A tiny random model as a run, and a server that listens on loopback."""

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
from reference import randomize

from perceiver_ar.config import PerceiverARConfig
from perceiver_ar.data.codec_file import save_codec
from perceiver_ar.data.text import BytesCodec
from perceiver_ar.network.model import PerceiverAR

CONFIG: dict[str, Any] = {
    "vocab_size": 256,
    "context_length": 64,
    "num_latents": 16,
    "dim": 16,
    "num_layers": 2,
    "num_heads": 2,
}

Serving = Callable[..., AbstractContextManager[str]]


@pytest.fixture(scope="session")
def serving() -> Serving:
    """A function (run, **options of `load`) whose context is the server's address."""
    from perceiver_ar.serving.server import Server, listen, load

    @contextmanager
    def serve(run: Path, **options: Any) -> Iterator[str]:
        server, listening = Server(load(run, **options)), listen("127.0.0.1", 0)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(60)
            listening.close()

    return serve


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "tiny"
    randomize(PerceiverAR(PerceiverARConfig(**CONFIG)), seed=1).save_pretrained(path)
    save_codec(BytesCodec(), path)
    return path


@pytest.fixture(scope="module")
def model(run: Path) -> PerceiverAR:
    return PerceiverAR.from_pretrained(run)


@pytest.fixture(scope="module")
def url(serving: Serving, run: Path) -> Iterator[str]:
    with serving(run, slots=4) as url:
        yield url

"""The documents of many sources -> their ids, in order. Codecs that allow it encode in threads, on all cores."""

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

from perceiver_ar.data.codec import Codec, WrongModality
from perceiver_ar.data.sources import Source
from perceiver_ar.errors import InputError
from perceiver_ar.threads import available_cores

BATCH = 1 << 17  # characters that a thread encodes before it needs the interpreter again
PART = 64  # characters that take as much memory as a `Part` itself


@dataclass(slots=True)
class Part:
    """A part of a document, or the end of a source (`document` is None). Either may hold an error instead of ids."""

    source: int
    document: int | None
    num_bytes: int = 0
    content: Any = None
    """A piece from `Codec.pieces`; ids (n,) once encoded. None: only bytes to count, or an error."""
    error: InputError | None = None


def encode_documents(
    sources: Iterable[Source],
    codec: Codec,
    split_on: bytes | None,
    advance: Callable[[int], Any] = lambda num_bytes: None,
    threads: int | None = None,
) -> Generator[Part]:
    """Yields the encoded parts of all documents in order, and the end of each source. Empty documents have no parts.

    `threads` (None: one per core) encode ahead, each by at most 2 `BATCH` characters. Their number does not change the
    ids. Close the iterator to stop: this waits for the batches that are being encoded and drops the others.
    """
    batches = _batches(_parts(sources, codec, split_on, advance))
    if not codec.encodes_in_threads:
        for batch in batches:
            yield from _encode(codec, batch)
        return
    threads = threads or available_cores()
    waiting = deque[Future[list[Part]]]()
    with ThreadPoolExecutor(threads) as pool:
        try:
            for batch in batches:
                waiting.append(pool.submit(_encode, codec, batch))
                if len(waiting) > 2 * threads:
                    yield from waiting.popleft().result()
            while waiting:
                yield from waiting.popleft().result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _parts(
    sources: Iterable[Source], codec: Codec, split_on: bytes | None, advance: Callable[[int], Any]
) -> Iterator[Part]:
    """The same parts as in `encode_documents`, not yet encoded."""
    size = 0  # bytes of the document that are in no part yet

    def counted(chunks: Iterable[bytes]) -> Iterator[bytes]:
        nonlocal size
        for chunk in chunks:
            size += len(chunk)
            yield chunk

    for number, source in enumerate(sources):
        try:
            for index, (where, chunks) in enumerate(source.documents(split_on, advance, codec.reads_text)):
                part, size = partial(Part, number, index), 0
                try:
                    for piece in codec.pieces(counted(chunks), where):
                        yield part(size, piece)
                        size = 0
                except WrongModality as error:
                    if not source.of_rows:
                        raise
                    yield part(error=error)
                    size = 0
                if size:
                    yield part(size)
            yield Part(number, None)
        except InputError as error:
            yield Part(number, None, error=error)


def _batches(parts: Iterable[Part]) -> Iterator[list[Part]]:
    batch, size = list[Part](), 0
    for part in parts:
        batch.append(part)
        size += PART + (0 if part.content is None else len(part.content))
        if size >= BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _encode(codec: Codec, batch: list[Part]) -> list[Part]:
    """The same parts, encoded."""
    whole = [part for part in batch if part.content is not None]
    for part, ids in zip(whole, codec.encode_pieces([part.content for part in whole]), strict=True):
        part.content = ids
    return batch

"""The documents of many sources -> their ids, in order. Codecs that allow it encode in threads, on all cores; of large
corpora, slow codecs encode in processes (see shards.py)."""

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

from perceiver_ar.data.codec import Codec, WrongModality
from perceiver_ar.data.shards import Encoded, Encoders, Piece, encode_pieces
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
    """A piece from `Codec.pieces`, or a whole document; ids (n,) once encoded. None: only bytes to count, or an
    error."""
    error: InputError | None = None
    where: str = ""
    """The document's name in messages, if `content` is the whole document."""


def encode_documents(
    sources: Sequence[Source],
    codec: Codec,
    split_on: bytes | None,
    advance: Callable[[int], Any] = lambda num_bytes: None,
    threads: int | None = None,
    encoders: Encoders | None = None,
) -> Generator[Part]:
    """Yields the encoded parts of all documents in order, and the end of each source. Empty documents have no parts.

    `threads` (None: one per core) encode ahead, each by at most 2 `BATCH` characters; with `encoders`, processes encode
    instead, ahead by 2 shards each. Their number does not change the ids. Close the iterator to stop: this waits for
    the batches that threads are encoding, kills processes, and drops the others.
    """
    whole = encoders is not None and not codec.encodes_in_threads
    parts = _parts(sources, codec, split_on, advance, whole)
    if encoders is not None:
        encode = partial(_encode, encoders.encode, sources)
        parts = _ahead(_batches(parts, encoders.shard), encode, encoders.processes, encoders.kill)
    elif codec.encodes_in_threads:
        encode = partial(_encode, partial(encode_pieces, codec), sources)
        parts = _ahead(_batches(parts, BATCH), encode, threads or available_cores(), lambda: None)
    yield from _ended_by_errors(parts, sources) if whole else parts  # pieces of other codecs are ids already


def _ahead(
    batches: Iterable[list[Part]], encode: Callable[[list[Part]], list[Part]], threads: int, stop: Callable[[], None]
) -> Iterator[Part]:
    """The parts of all batches in order, encoded ahead. An early end calls `stop`."""
    waiting = deque[Future[list[Part]]]()
    with ThreadPoolExecutor(threads) as pool:
        try:
            for batch in batches:
                waiting.append(pool.submit(encode, batch))
                if len(waiting) > 2 * threads:
                    yield from waiting.popleft().result()
            while waiting:
                yield from waiting.popleft().result()
        except BaseException:
            stop()
            raise
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _parts(
    sources: Iterable[Source], codec: Codec, split_on: bytes | None, advance: Callable[[int], Any], whole: bool
) -> Iterator[Part]:
    """The same parts as in `encode_documents`, not yet encoded. `whole`: each is a whole document, as bytes."""
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
                    pieces = [b"".join(counted(chunks))] if whole else codec.pieces(counted(chunks), where)
                    for piece in pieces:
                        yield part(size, piece, where=where if whole else "")
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


def _batches(parts: Iterable[Part], limit: int) -> Iterator[list[Part]]:
    batch, size = list[Part](), 0
    for part in parts:
        batch.append(part)
        size += PART + (0 if part.content is None else len(part.content))
        if size >= limit:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _encode(
    encode: Callable[[Sequence[Piece]], list[Encoded]], sources: Sequence[Source], batch: list[Part]
) -> list[Part]:
    """The same parts, encoded. A document that cannot be read gets an error."""
    filled = [part for part in batch if part.content is not None]
    pieces = [(part.where or sources[part.source].name, part.content) for part in filled]
    for part, ids in zip(filled, encode(pieces) if filled else [], strict=True):
        part.content, part.error = (None, ids) if isinstance(ids, InputError) else (ids, None)
    return batch


def _ended_by_errors(parts: Iterable[Part], sources: Sequence[Source]) -> Iterator[Part]:
    """The same parts, but a document that cannot be read ends its source, as when it is encoded while it is read."""
    ended = -1
    for part in parts:
        if part.source == ended:
            continue
        rows = sources[part.source].of_rows and isinstance(part.error, WrongModality)
        if part.document is not None and part.error is not None and not rows:
            ended, part = part.source, Part(part.source, None, error=part.error)
        yield part

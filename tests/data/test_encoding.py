"""Documents are encoded ahead, in any number of threads, and come in order."""

import gzip
import signal
import threading
from collections.abc import Callable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from perceiver_ar.data.codec import Codec
from perceiver_ar.data.encoding import BATCH, Part, encode_documents
from perceiver_ar.data.rows import find_rows
from perceiver_ar.data.sources import Source, find_files
from perceiver_ar.data.text import BytesCodec, train_bpe
from perceiver_ar.data.tokens import prepare

SAMPLE = Path(threading.__file__).read_text()
BPE = train_bpe([SAMPLE], 500)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[Source]:
    """Many documents in a file, few, none; one of many batches; rows that are no text; what cannot be read."""
    folder = tmp_path_factory.mktemp("files")
    (folder / "1.txt").write_text("\n\n".join(SAMPLE.splitlines()))
    (folder / "2.txt").write_text(SAMPLE * 10)
    (folder / "3.txt").write_bytes(SAMPLE.encode() * 3 + b"\xff")
    (folder / "4.txt").touch()
    (folder / "5.txt.gz").write_bytes(gzip.compress(SAMPLE.encode())[:-9])
    (folder / "6.txt").write_text(SAMPLE[:1000])
    (folder / "7.jsonl").write_text('{"text": "one"}\n{"text": "\\ud800"}\n{"text": ""}\n{"text": "two"}\n' * 9)
    return find_rows(find_files(folder), "text")


def comparable(parts: Iterator[Part]) -> list[tuple[int, int | None, int, bytes | None, str]]:
    return [
        (
            part.source,
            part.document,
            part.num_bytes,
            None if part.content is None else part.content.tobytes(),
            str(part.error or ""),
        )
        for part in parts
    ]


@pytest.mark.parametrize("threads", [1, 2, 7])
@pytest.mark.parametrize("split_on", [None, b"\n\n"])
def test_the_number_of_threads_changes_nothing(sources: list[Source], split_on: bytes | None, threads: int):
    assert sum(source.size for source in sources) > 2 * BATCH
    expected = comparable(encode_documents(sources, BPE, split_on, threads=1))
    assert comparable(encode_documents(sources, BPE, split_on, threads=threads)) == expected


@pytest.mark.parametrize("codec", [BPE, BytesCodec()], ids=lambda codec: codec.name)
def test_ids_are_those_of_each_document_alone(sources: list[Source], codec: Codec):
    parts = encode_documents([source for source in sources if not source.of_rows], codec, b"\n\n")
    encoded = {
        key: np.concatenate([part.content for part in group if part.content is not None] or [np.empty(0)])
        for key, group in groupby(parts, key=lambda part: (part.source, part.document))
    }
    for number in 0, 1, 5:
        for index, (where, chunks) in enumerate(sources[number].documents(b"\n\n")):
            alone = np.concatenate([np.empty(0), *codec.encode_stream(chunks, where)])
            assert encoded.get((number, index), np.empty(0)).tolist() == alone.tolist()


def test_every_source_has_an_end_that_says_what_is_wrong(sources: list[Source]):
    parts = list(encode_documents(sources, BPE, None))
    ends = [part for part in parts if part.document is None]
    assert [part.source for part in ends] == list(range(len(sources)))
    reasons = [str(end.error or "") for end in ends]
    assert [bool(reason) for reason in reasons] == [False, False, True, False, True, False, False]
    assert "byte 0xff" in reasons[2] and "damaged" in reasons[4]
    refused = [part.document for part in parts if part.error and part.document is not None]
    assert refused == list(range(1, 36, 4))


def test_reading_is_only_so_far_ahead(tmp_path: Path):
    for number in range(60):
        (tmp_path / f"{number:02}.txt").write_text(SAMPLE)
    read = []
    parts = encode_documents(find_files(tmp_path), BPE, None, read.append, threads=2)
    next(parts)
    assert 0 < sum(read) <= 7 * BATCH < 60 * len(SAMPLE)
    parts.close()


def test_closing_stops_the_threads_and_the_reading(tmp_path: Path):
    (tmp_path / "x.txt").write_text(SAMPLE * 100)
    before = threading.active_count()
    parts = encode_documents(find_files(tmp_path), BPE, None, threads=3)
    next(parts)
    assert threading.active_count() > before
    parts.close()
    assert threading.active_count() == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_preparation_within_a_batch(tmp_path: Path, number: int):
    """The file is endless, so only the signal ends it."""

    class Stopped(BaseException):
        pass

    class Endless(Source):
        def chunks(self, advance: Callable[[int], Any] = lambda num_bytes: None) -> Iterator[bytes]:
            while True:
                yield SAMPLE.encode()

    def stop(*arguments: object) -> None:
        raise Stopped

    running, before = set(threading.enumerate()), signal.signal(number, stop)
    timer = threading.Timer(0.3, signal.pthread_kill, (threading.get_ident(), number))
    try:
        timer.start()
        with pytest.raises(Stopped):
            prepare([Endless(tmp_path, "endless", 0)], BPE, tmp_path / "out", progress=False)
    finally:
        timer.cancel()
        signal.signal(number, before)
    assert not any((tmp_path / "out").iterdir())
    for thread in set(threading.enumerate()) - running:
        thread.join(60)
        assert not thread.is_alive()

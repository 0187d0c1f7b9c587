"""Large corpora are encoded by processes: the bytes are those of one process, and a kill loses only what is in work."""

from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from helpers import content, write_files
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import write_music
from test_encoding import BPE, SAMPLE, comparable, sources  # noqa: F401  (a fixture)

from perceiver_ar.data.codec import Codec
from perceiver_ar.data.conditions import ConditionedCodec
from perceiver_ar.data.encoding import encode_documents
from perceiver_ar.data.midi import PerformanceCodec
from perceiver_ar.data.shards import SHARDS, Encoders
from perceiver_ar.data.sources import Source, find_files
from perceiver_ar.data.tokens import prepare
from perceiver_ar.errors import InputError

SHARD = 1 << 14


def children() -> set[psutil.Process]:
    return {*psutil.Process().children()}


def token_files(folder: Path) -> dict[str, bytes]:
    return {name: data for name, data in content(folder).items() if not name.startswith(SHARDS)}


def shards(folder: Path) -> dict[str, int]:
    """When each was written, by its name."""
    return {path.name: path.stat().st_mtime_ns for path in (folder / SHARDS).glob("*.npz")}


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Encoders]:
    before = children()
    with Encoders(BPE, tmp_path_factory.mktemp("shards"), processes=2, shard=200) as encoders:
        yield encoders
        assert len(children() - before) == 2
    assert not children() - before


def check_same(codec: Codec, files: list[Source], split_on: bytes | None, encoders: Encoders) -> None:
    expected = comparable(encode_documents(files, codec, split_on))
    for _ in "encoded", "read from shards":
        assert comparable(encode_documents(files, codec, split_on, encoders=encoders)) == expected


@pytest.mark.parametrize("split_on", [None, b"\n\n"])
def test_processes_give_what_one_gives(sources: list[Source], encoders: Encoders, split_on: bytes | None) -> None:  # noqa: F811
    encoders.shard = SHARD
    check_same(BPE, sources, split_on, encoders)


@settings(max_examples=15, deadline=None)
@given(st.lists(st.binary(max_size=30) | st.text(max_size=300).map(str.encode), max_size=6), st.integers(1, 400))
def test_any_files_give_what_one_process_gives(
    tmp_path_factory: pytest.TempPathFactory, encoders: Encoders, texts: list[bytes], shard: int
) -> None:
    folder = tmp_path_factory.mktemp("files")
    write_files(folder, {f"{number}.txt": text for number, text in enumerate([*texts, b"one more"])})
    encoders.shard = shard
    check_same(BPE, find_files(folder), b"a", encoders)


def test_conditions_do_not_matter_to_processes(sources: list[Source], tmp_path: Path) -> None:  # noqa: F811
    codec = ConditionedCodec(BPE, {"author": ["austen", "melville"]})
    assert codec.encodes_slowly
    with Encoders(codec, tmp_path, processes=1, shard=SHARD) as encoders:
        check_same(codec, sources, None, encoders)


def test_whole_documents_that_cannot_be_read_are_skipped_or_refused_alike(tmp_path: Path) -> None:
    for number in range(4):
        write_music(tmp_path / f"{number}.mid", number)
    write_files(tmp_path, {"2b.mid": b"no music", "3b.mid": b""})
    codec = PerformanceCodec()
    with Encoders(codec, tmp_path / SHARDS, processes=1, shard=300) as encoders:
        check_same(codec, [*find_files(tmp_path / "[0-9]*.mid"), *find_files(tmp_path / "2b.mid")], None, encoders)


def test_a_process_that_is_killed_is_named_with_its_file(tmp_path: Path) -> None:
    before = children()
    with Encoders(BPE, tmp_path, processes=1) as encoders:
        assert len(encoders.encode([("a.txt", "some text")])) == 1
        (child,) = children() - before
        child.kill()
        with pytest.raises(InputError, match=r"^b\.txt: the process .* was killed \(signal 9\); .*memory"):
            encoders.encode([("b.txt", "other text")])


def test_a_process_whose_answer_is_damaged_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sitecustomize.py").write_text("print('a word', flush=True)")  # Python runs it when a process starts
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    damaged = pytest.raises(InputError, match=r"^a\.txt: the process that encoded it gave a damaged answer")
    with Encoders(BPE, tmp_path, processes=1) as encoders, damaged:
        encoders.encode([("a.txt", "some text")])


def test_what_is_on_disk_is_not_encoded_again_and_what_changed_is(tmp_path: Path) -> None:
    files = write_files(tmp_path / "files", {f"{number}.txt": SAMPLE.encode() for number in range(9)})
    prepare(find_files(files), BPE, tmp_path / "one", progress=False)

    def prepared(name: str) -> dict[str, bytes]:
        prepare(find_files(files), BPE, tmp_path / name, progress=False, processes=1, shard=SHARD)
        return token_files(tmp_path / name)

    assert prepared("several") == token_files(tmp_path / "one")
    before = shards(tmp_path / "several")
    assert len(before) > 8
    last = max(before, key=before.__getitem__)
    (tmp_path / "several" / SHARDS / last).write_bytes(b"PK damaged")
    (tmp_path / "several" / SHARDS / min(before)).write_bytes(b"")
    (files / "8.txt").write_text(f"{SAMPLE}and more\n")
    prepare(find_files(files), BPE, tmp_path / "one", progress=False)
    assert prepared("several") == token_files(tmp_path / "one")
    after = shards(tmp_path / "several")
    assert before.keys() < after.keys()
    written = {name for name, when in after.items() if before.get(name) != when}
    assert len(written) <= len(after) - len(before) + 2

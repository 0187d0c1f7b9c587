"""Files become token files whole or not at all; the sampler makes every token a target exactly once in each pass."""

import bz2
import codecs
import gzip
import io
import json
import lzma
import math
import os
import pickle
import random
import re
import resource
import subprocess
import sys
import tarfile
import textwrap
import zipfile
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zstandard
from helpers import write_files
from hypothesis import given, settings
from hypothesis import strategies as st

from perceiver_ar.data.codec import WrongModality
from perceiver_ar.data.sampler import TrainingWindows, _permute
from perceiver_ar.data.sources import Source, split_documents
from perceiver_ar.data.text import BytesCodec, train_bpe
from perceiver_ar.data.tokens import TokenFile, find_files, prepare, read_text, standard_library
from perceiver_ar.errors import InputError

TEXT, BYTES = BytesCodec(), BytesCodec(text=False)


def run_python(script: str, *arguments: object, **options) -> str:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)]
    return subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, **options).stdout.decode()


def names(sources: list[Source], folder: Path) -> list[str]:
    return [os.path.relpath(source.path, folder) for source in sources]


def documents(file: TokenFile) -> list[bytes]:
    edges = [*file.documents.tolist(), file.num_tokens]
    return [TEXT.decode(file.tokens[a:b]) for a, b in pairwise(edges)]


# --- finding and reading -------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    contents = {"b.txt": b"b", "a.py": b"a", "sub/c.txt": b"c", "sub/deep/d.txt": b"d"}
    unwanted = {".hidden": b"h", ".git/e.txt": b"e", "__pycache__/f.txt": b"f", "sub/.g/h.txt": b"h"}
    return write_files(tmp_path / "data", contents | unwanted)


@pytest.mark.parametrize(
    ("paths", "expected"),
    [
        (["."], ["a.py", "b.txt", "sub/c.txt", "sub/deep/d.txt"]),
        (["b.txt", "a.py"], ["b.txt", "a.py"]),
        (["*.txt"], ["b.txt"]),
        (["*"], ["a.py", "b.txt", "sub/c.txt", "sub/deep/d.txt"]),
        (["**/*.txt"], ["b.txt", "sub/c.txt", "sub/deep/d.txt"]),
        (["sub/**"], ["sub/c.txt", "sub/deep/d.txt"]),
        (["**/deep/*"], ["sub/deep/d.txt"]),
        (["[ab].*", "sub", "b.txt"], ["a.py", "b.txt", "sub/c.txt", "sub/deep/d.txt"]),  # each file once
    ],
)
@pytest.mark.parametrize("relative", [True, False])
def test_files_folders_and_patterns(folder, monkeypatch, paths, expected, relative):
    monkeypatch.chdir(folder)
    assert names(find_files(paths if relative else [folder / path for path in paths]), folder) == expected


def test_a_name_that_looks_like_a_pattern_is_a_file_first(tmp_path):
    write_files(tmp_path, {"a[1].txt": b"x", "a1.txt": b"y"})
    assert names(find_files(tmp_path / "a[1].txt"), tmp_path) == ["a[1].txt"]


def test_links_are_followed_but_not_in_circles(folder):
    (folder / "sub" / "circle").symlink_to(folder)
    (folder / "sub" / "circle2").symlink_to(folder / "sub")
    (folder / "broken").symlink_to(folder / "nowhere")
    (folder / "twin.txt").symlink_to(folder / "b.txt")
    expected = ["a.py", "b.txt", "broken", "sub/c.txt", "sub/deep/d.txt"]  # who reads `broken` will say what it is
    for path in (folder, folder / "**" / "*", folder / "*"):
        sources = find_files(path)
        assert names(sources, folder) == expected
        with pytest.raises(InputError, match=r"broken is a broken link"):
            list(sources[2].chunks())


def test_a_pipe_in_a_folder_is_passed_over(folder):
    os.mkfifo(folder / "pipe.txt")
    assert "pipe.txt" not in names(find_files(folder), folder)


@pytest.mark.parametrize("size", [0, 1, 1_500_000])
def test_compressed_files_are_read_like_plain_ones(tmp_path, size):
    data = random.Random(size).randbytes(size)
    half = zstandard.compress(data[: size // 2]) + zstandard.compress(data[size // 2 :])  # two frames
    forms = {"x": data, "x.gz": gzip.compress(data, 1), "x.bz2": bz2.compress(data), "x.ZST": half}
    forms["x.xz"] = lzma.compress(data, preset=0)
    forms["two.bz2"] = bz2.compress(data[: size // 2]) + bytes(3) + bz2.compress(data[size // 2 :]) + bytes(2)
    first, second = (lzma.compress(part, preset=0) for part in (data[: size // 2], data[size // 2 :]))
    forms["padded.xz"] = first + bytes(8) + second + bytes(4)
    for source in find_files(write_files(tmp_path, forms)):
        steps: list[int] = []
        assert b"".join(source.chunks(steps.append)) == data, source.name
        assert sum(steps) in (0, source.size)


@pytest.mark.parametrize("ending", ["gz", "xz", "bz2", "zst"])
@pytest.mark.parametrize("damage", ["cut", "changed", "not compressed", "more behind it", "cut behind it"])
def test_damaged_compressed_files_are_named(tmp_path, ending, damage):
    compress = {"gz": gzip.compress, "xz": lzma.compress, "bz2": bz2.compress, "zst": zstandard.compress}[ending]
    data = compress(random.Random(0).randbytes(100_000))
    changed = {"cut": data[:50_000], "changed": data[:5] + b"\xaa" * 90 + data[95:], "not compressed": b"plain" * 99}
    changed |= {"more behind it": data + b"plain" * 99, "cut behind it": data + data[:50_000]}
    path = write_files(tmp_path, {f"x.{ending}": changed[damage]}) / f"x.{ending}"
    (source,) = find_files(path)
    with pytest.raises(InputError, match=rf"x\.{ending} is damaged"):
        list(source.chunks())


def test_standard_input_can_be_read_twice(tmp_path):
    script = """
        import os
        from perceiver_ar.data.sources import find_files
        (source,) = find_files("-")
        assert [b"".join(source.chunks()) for _ in range(2)] == [b"hello" * 1000] * 2 and source.size == 5000
        print(source.named, source.name, source.path, sep="|")
    """
    named, name, path = run_python(script, input=b"hello" * 1000).strip().split("|")
    assert (named, name) == ("True", "standard input") and not Path(path).exists()


def test_a_shell_process_substitution_is_read_like_a_file(tmp_path):
    read, write = os.pipe()
    os.write(write, b"hello")
    os.close(write)
    (source,) = find_files(f"/dev/fd/{read}")
    os.close(read)
    assert list(source.chunks()) == [b"hello"]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("missing.txt", r"missing\.txt does not exist"),
        ("sub/missing.txt", r"missing\.txt does not exist"),
        ("b.txt/x", "does not exist"),
        ("*.md", r"no file matches .*\*\.md"),
        ("nowhere/**/*.md", "no file matches"),
        ("empty", "the folder .*empty holds no files"),
        ("/dev/null", "neither a file nor a folder"),
    ],
)
def test_what_cannot_be_found_is_named(folder, path, message):
    write_files(folder, {"empty/.hidden": b"x"})
    with pytest.raises(InputError, match=message) as error:
        find_files(folder / path)
    assert "\n" not in str(error.value)


def test_no_paths_at_all_is_an_error():
    with pytest.raises(InputError, match="no files given"):
        find_files([])


def test_a_file_that_vanishes_is_named(tmp_path):
    (source,) = find_files(write_files(tmp_path, {"x.txt": b"x"}))
    source.path.unlink()
    with pytest.raises(InputError, match=r"x\.txt vanished"):
        prepare([source], TEXT, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_a_file_that_may_not_be_read_is_named(tmp_path):
    path = write_files(tmp_path, {"sub/x.txt": b"x"}) / "sub" / "x.txt"
    (source,) = find_files(path)
    path.chmod(0)
    path.parent.chmod(0)
    user = os.geteuid()
    try:
        if user == 0:  # root may read everything
            os.seteuid(65534)
        with pytest.raises(InputError, match=r"no permission to read .*x\.txt"):
            list(source.chunks())
        with pytest.raises(InputError, match=r"no permission to read .*x\.txt"):
            find_files(path)
        with pytest.raises(InputError, match=r"no permission to read .*sub"):
            find_files(path.parent)
    finally:
        os.seteuid(user)
        path.parent.chmod(0o755)


@pytest.mark.usefixtures("bound_by_modes")
def test_what_cannot_be_read_in_a_folder_does_not_end_a_run_with_a_tokenizer(tmp_path, capsys):
    contents = {"a.txt": b"good text", "b.txt.gz": gzip.compress(b"cut " * 99)[:-9], "c.txt": b"x", "d/e.txt": b"x"}
    folder = write_files(tmp_path / "data", contents)
    (folder / "nowhere").symlink_to(folder / "missing")
    (folder / "c.txt").chmod(0)
    (folder / "d").chmod(0)
    sources = find_files(folder)
    assert capsys.readouterr().err == f"skipped the folder {folder / 'd'}: no permission to read it\n"
    assert b"good text" in "".join(read_text(sources)).encode()
    train, _ = prepare(sources, train_bpe(read_text(sources), 260), tmp_path / "out", validation_fraction=0)
    assert train.num_documents == 1
    assert capsys.readouterr().err.startswith("skipped 3 of 4 files:\n")
    (folder / "d").chmod(0o755)
    with pytest.raises(InputError, match=r"b\.txt\.gz is damaged"):
        list(read_text(find_files(folder / "b.txt.gz")))


def test_the_standard_library_is_a_corpus():
    sources = standard_library()
    parts = {part for source in sources for part in source.path.parts[-4:]}
    assert {"argparse.py", "json", "asyncio"} <= parts
    assert not {"site-packages", "test", "tests", "__pycache__", "idlelib"} & parts
    assert sum(source.size for source in sources) > 5_000_000
    assert [source.path for source in sources] == [source.path for source in standard_library()]


@given(
    st.lists(st.sampled_from([b"a", b"\r", b"\n", b"\r\n", b"\r\n\r\n"])),
    st.integers(1, 4),
    st.sampled_from([b"\n", b"\n\n", b"a\n"]),
)
def test_line_ends_of_windows_separate_documents_too(pieces, size, separator):
    data = b"".join(pieces)
    chunks = [data[i : i + size] for i in range(0, len(data), size)]
    found = [b"".join(document) for document in split_documents(chunks, separator)]
    assert found == re.split(separator.replace(b"\n", b"\r?\n"), data)


def test_a_byte_order_mark_is_no_text(tmp_path):
    path = tmp_path / "windows.txt"
    path.write_bytes("\ufeffone\r\n\r\ntw\u00f6\r\n\r\nthree".encode())
    for codec in TEXT, BPE:
        train, _ = prepare(find_files(path), codec, tmp_path / "out", split_on="\n\n", validation_fraction=0)
        starts = [*train.documents.tolist(), len(train)]
        texts = [codec.decode(train.tokens[a:b]).decode() for a, b in pairwise(starts)]
        assert texts == ["one", "tw\u00f6", "three"]
    path.write_bytes(codecs.BOM_UTF8 + b"ab\0c")
    with pytest.raises(InputError, match="byte 0x00 at offset 5"):
        prepare(find_files(path), TEXT, tmp_path / "out")


@pytest.mark.parametrize("marks", [["recipe.yaml", "codec.json"], ["codec.json", "model.safetensors"]])
def test_runs_beside_the_files_are_no_documents(tmp_path, monkeypatch, capsys, marks):
    run = tmp_path / "runs" / "first"
    for name in [*marks, "samples/step-1.txt"]:
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text("not to be read")
    (tmp_path / "book.txt").write_text("to be read")
    (tmp_path / "recipe.yaml").write_text("flour")
    monkeypatch.chdir(tmp_path)
    for path in ".", "*", "**/*":
        assert {source.path.name for source in find_files(path)} == {"book.txt", "recipe.yaml"}
        assert "runs/first: it holds a run" in capsys.readouterr().err
    assert {source.path.name for source in find_files("runs/first/samples")} == {"step-1.txt"}
    assert len(find_files("runs/first")) == 3


@settings(max_examples=200)
@given(
    st.lists(st.sampled_from([b"a", b"|", b"-", b"|-|", b"|-", b"bb"])),
    st.integers(1, 4),
    st.sampled_from([b"|-|", b"|"]),
)
def test_splitting_is_the_same_however_the_file_comes(pieces, size, separator):
    data = b"".join(pieces)
    chunks = [data[i : i + size] for i in range(0, len(data), size)]
    found = [b"".join(document) for document in split_documents(chunks, separator)]
    assert found == data.split(separator)
    assert [b"".join(document) for document in split_documents(chunks, None)] == [data]


def test_a_tokenizer_is_trained_on_what_is_text(tmp_path):
    sources = find_files(write_files(tmp_path, {"a.txt": b"abc " * 50, "b.bin": b"\xff", "c.txt": b"xyz " * 50}))
    assert "".join(read_text(sources)) == "abc " * 50 + "xyz " * 50
    assert "".join(read_text(sources, max_bytes=10)) == "abc " * 50
    assert train_bpe(read_text(sources), 260).vocab_size == 260
    with pytest.raises(WrongModality, match=r"b\.bin"):
        list(read_text(find_files(tmp_path / "b.bin")))


# --- token files ---------------------------------------------------------------------------------------------------


def test_every_document_is_preceded_by_the_separator(tmp_path):
    sources = find_files(write_files(tmp_path / "data", {"a": b"one", "b": b"", "c": "zw\u00f6lf".encode()}))
    train, validation = prepare(sources, TEXT, tmp_path / "out", validation_fraction=0)
    assert validation is None
    assert train.tokens.tobytes() == b"\0one\0zw\xc3\xb6lf" and len(train) == train.num_tokens == 11
    assert train.documents.tolist() == [0, 4] and train.num_bytes == 9 and train.num_documents == 2
    assert (train.codec, train.vocab_size, train.dtype) == ("bytes", 256, np.uint8)
    train, _ = prepare(sources, BYTES, tmp_path / "out", validation_fraction=0)
    assert train.tokens.tobytes() == b"onezw\xc3\xb6lf" and train.documents.tolist() == [0, 3]
    codec = train_bpe(["one zw\u00f6lf"], 300)
    train, _ = prepare(sources, codec, tmp_path / "out", validation_fraction=0)
    assert train.dtype == np.uint16 and codec.decode(train.tokens) == "onezw\u00f6lf".encode()
    assert train.num_bytes == 9 == codec.num_bytes(train.tokens)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "train.bin",
        "train.documents.npy",
        "train.json",
    ]


def test_one_file_may_hold_many_documents(tmp_path):
    books = [f"Book {i}\n\n{'words ' * i}\n".encode() for i in range(40)]
    sources = find_files(write_files(tmp_path / "data", {"books.txt.xz": lzma.compress(b"\n\n\n\n".join(books))}))
    train, validation = prepare(sources, TEXT, tmp_path / "out", split_on="\n\n\n\n", validation_fraction=0.2)
    assert validation is not None
    kept, held_out = documents(train), documents(validation)
    # Five line ends between books: the fifth begins the next book.
    assert sorted(book.strip() for book in kept + held_out) == sorted(book.strip() for book in books)
    assert 0.15 < validation.num_bytes / (validation.num_bytes + train.num_bytes) < 0.3


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 300), min_size=1, max_size=30), st.floats(0, 0.99), st.integers(0, 5), st.booleans())
def test_splits_share_no_document_and_keep_every_one(tmp_path_factory, sizes, fraction, seed, one_file):
    texts = [(f"<{i}>" + "x" * size).encode() for i, size in enumerate(sizes)]
    tmp_path = tmp_path_factory.mktemp("split")
    contents = {"all": b"|".join(texts)} if one_file else {f"{i:03}": text for i, text in enumerate(texts)}
    sources = find_files(write_files(tmp_path / "data", contents))
    options: dict[str, Any] = {"validation_fraction": fraction, "seed": seed, "progress": False}
    options |= {"split_on": "|"} if one_file else {}
    train, validation = prepare(sources, TEXT, tmp_path / "out", **options)
    kept, held_out = documents(train), documents(validation) if validation else []
    assert kept == [text for text in texts if text not in held_out] and set(held_out) <= set(texts)
    assert (validation is None) == (len(texts) == 1 or fraction == 0)
    wanted = fraction * sum(map(len, texts))
    assert sum(map(len, held_out)) <= max(1.5 * wanted, min(map(len, texts)))
    again = prepare(sources, TEXT, tmp_path / "again", **options)
    assert documents(again[0]) == kept
    for file in filter(None, (train, validation)):
        assert file.num_bytes == TEXT.num_bytes(file.tokens) and file.tokens[file.documents.astype(int)].max() == 0


def test_the_validation_split_is_about_as_large_as_asked_and_follows_the_seed(tmp_path):
    rng = random.Random(0)
    contents = {f"{i:03}": b"x" * rng.randrange(1, 1000) for i in range(300)} | {"huge": b"x" * 50_000}
    sources = find_files(write_files(tmp_path / "data", contents))
    starts = set()
    for seed in range(5):
        train, validation = prepare(sources, TEXT, tmp_path / "out", seed=seed)
        assert validation is not None
        assert 0.05 <= validation.num_bytes / (train.num_bytes + validation.num_bytes) <= 0.075
        starts.add(tuple(validation.documents.tolist()))
    assert len(starts) == 5


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.sampled_from(["a", "b", "cc", "dd", "eee", "ffff"]), min_size=1, max_size=30),
    st.floats(0.05, 0.9),
    st.integers(0, 5),
    st.booleans(),
)
def test_copies_are_on_one_side_of_the_split(tmp_path_factory, texts, fraction, seed, grouped):
    tmp_path = tmp_path_factory.mktemp("split")
    contents = {f"{i % 7}/{i:03}": text.encode() for i, text in enumerate(texts)}
    sources = find_files(write_files(tmp_path / "data", contents))
    options: dict[str, Any] = {"validation_fraction": fraction, "seed": seed, "group_by": "(./)" if grouped else None}
    train, validation = prepare(sources, TEXT, tmp_path / "out", **options)
    kept, held_out = documents(train), documents(validation) if validation else []
    assert not set(kept) & set(held_out)
    assert sorted(kept + held_out) == sorted(contents.values())
    if not grouped:
        assert (validation is None) == (len(set(texts)) == 1)
        sizes = [texts.count(text) * len(text) for text in set(texts)]
        assert sum(map(len, held_out)) <= max(1.5 * fraction * sum(sizes), min(sizes))


def test_copies_are_counted(tmp_path, capsys):
    contents = {"a.txt": b"same", "b.txt": b"other", "c.txt": b"same", "d.txt": b"third"}
    folder = write_files(tmp_path / "data", contents)
    os.link(folder / "b.txt", folder / "e.txt")
    prepare(find_files(folder), TEXT, tmp_path / "out")
    says = "2 of 5 documents are copies of others; all copies are on one side of the split"
    assert capsys.readouterr().err.splitlines()[0] == says
    prepare(find_files(folder), TEXT, tmp_path / "out", validation_fraction=0)
    assert "copies" not in capsys.readouterr().err


def test_copies_of_what_is_held_out_are_not_trained_on(tmp_path, capsys):
    folder = write_files(tmp_path / "data", {"a": b"aaa", "b": b"bbb", "c": b"ccc", "d": b"bbb", "val/e": b"bbb"})
    train, validation = prepare(
        find_files(folder), TEXT, tmp_path / "out", validation_sources=find_files(folder / "val")
    )
    assert validation is not None
    assert (documents(train), documents(validation)) == ([b"aaa", b"ccc"], [b"bbb"])
    assert train.num_bytes == 6
    assert capsys.readouterr().err.startswith("2 documents are held out as well, so they are not trained on\n")
    with pytest.raises(InputError, match="all training documents are validation documents as well"):
        prepare(find_files(folder / "d"), TEXT, tmp_path / "new", validation_sources=find_files(folder / "val"))
    assert list((tmp_path / "new").iterdir()) == []


def test_files_given_for_validation_are_not_trained_on(tmp_path):
    folder = write_files(tmp_path / "data", {"a": b"aaa", "b": b"bbb", "val/c": b"ccc"})
    held_out = find_files(folder / "val")
    train, validation = prepare(find_files(folder), TEXT, tmp_path / "out", validation_sources=held_out)
    assert validation is not None
    assert documents(train) == [b"aaa", b"bbb"] and documents(validation) == [b"ccc"]
    with pytest.raises(InputError, match="all training files are validation files"):
        prepare(find_files(folder / "val"), TEXT, tmp_path / "out", validation_sources=held_out)


def test_files_found_that_are_no_text_are_skipped_and_counted(tmp_path, capsys):
    late = b"good start " * 200_000 + b"\xff"  # found out long after the first tokens are written
    contents = {"a.txt": b"aaa", "b.bin": late, "c.nul": b"x\0", "d.txt": b"ddd", "e": b"\xfe", "f": b"\xfe"}
    contents |= {"g": b"\xfe", "h.gz": gzip.compress(b"")}
    folder = write_files(tmp_path / "data", contents)
    train, _ = prepare(find_files(folder), TEXT, tmp_path / "out", validation_fraction=0)
    assert documents(train) == [b"aaa", b"ddd"] and train.num_bytes == 6
    first, *lines, last = capsys.readouterr().err.splitlines()
    assert first == "skipped 6 of 8 files:"
    reasons = {
        "b.bin": r"byte 0xff at .*",
        "c.nul": "byte 0x00 .*",
        "e": "byte 0xfe .*",
        "f": "byte .*",
        "g": "byte .*",
    }
    for line, (name, reason) in zip(lines[:-1], reasons.items(), strict=True):
        assert re.fullmatch(rf"  .*/{name} is not UTF-8 text \({reason}", line)
    assert lines[-1] == "  and 1 more"
    assert last == "2 documents (8 tokens) to train on"
    prepare(find_files(folder / "[ah]*"), TEXT, tmp_path / "out", validation_fraction=0)
    assert re.match(r"skipped 1 of 2 files:\n  .*h\.gz has nothing in it\n", capsys.readouterr().err)
    with pytest.raises(
        InputError,
        match=r"b\.bin is not UTF-8 text \(byte 0xff at offset 2200000\); save it as UTF-8, or use --modality bytes",
    ):
        prepare(find_files([folder / "a.txt", folder / "b.bin"]), TEXT, tmp_path / "out")
    with pytest.raises(InputError, match=r"none of 3 files can be read: .*use --modality bytes"):
        prepare(find_files([folder / "[c]*", folder / "[ef]"]), TEXT, tmp_path / "out")
    train, _ = prepare(find_files(folder), BYTES, tmp_path / "out", validation_fraction=0)
    assert train.num_documents == 7


def archive(form: str, name: str = "story.txt", content: bytes = b"Once upon a time. " * 50) -> bytes:
    """The content of a tar ("", "gz", ...) or zip file that holds one text."""
    buffer = io.BytesIO()
    if form == "zip":
        with zipfile.ZipFile(buffer, "w") as file:
            file.writestr(name, content)
    else:
        mode: Any = f"w:{form}"
        with tarfile.open(fileobj=buffer, mode=mode) as file:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


STORY = "Once upon a time, in a cité. " * 50
NO_TEXT = {
    "a.tar": (archive(""), "a tar archive, not UTF-8 text; unpack it, or use --modality bytes"),
    "a.tar.gz": (archive("gz"), "a tar archive"),
    "a.tar.xz": (archive("xz"), "a tar archive"),
    "a.tgz": (archive("gz"), "a tar archive"),
    "a.zip": (archive("zip"), "a zip archive"),
    "a.docx": (archive("zip"), "save it as text"),
    "a.zip.gz": (gzip.compress(archive("zip")), "a zip archive"),
    "xz.txt": (lzma.compress(STORY.encode()), "let its name end in .xz"),
    "bz2.txt": (bz2.compress(STORY.encode()), "let its name end in .bz2"),
    "zst.txt": (zstandard.compress(STORY.encode()), "let its name end in .zst"),
    "a.pdf": (b"%PDF-1.4\n1 0 obj <</Type /Catalog>> endobj\n", "a PDF, not UTF-8 text; save it as text"),
    "a.png": (b"\x89PNG\r\n\x1a\n\0", "a picture, not UTF-8 text; leave it out, or use --modality bytes"),
    "a.mp3": (b"ID3\3\0\0\0\0\0\0\xff\xfb", "a recording, not UTF-8 text; leave it out"),
    "a.mid": (b"MThd\0\0\0\6\0\0\0\1\1\xe0", "a MIDI file, not UTF-8 text"),
    "a.m4a": (
        b"\0\0\0\x1cftypM4A \0\0\2\0",
        "sound or video (m4a, mp4, wma, webm), not UTF-8 text; save its",
    ),
    "a.heic": (b"\0\0\0\x18ftypheic\0\0\0\0", "a picture in HEIF (heic, avif), not UTF-8 text; save it as PNG"),
    "16.txt": (STORY.encode("utf-16"), "UTF-16 or UTF-32, not UTF-8 text; save it as UTF-8"),
    "le.txt": (STORY.encode("utf-16-le"), "UTF-16 or UTF-32"),
    "be.txt.gz": (gzip.compress(STORY.encode("utf-16-be")), "UTF-16 or UTF-32"),
    "32.txt": (STORY.encode("utf-32-be"), "UTF-16 or UTF-32"),
    "early.txt": (b"\0" + STORY.encode(), "not UTF-8 text (byte 0x00 at offset 0); use --modality bytes"),
    "late.txt": (b"good start " * 200_000 + b"\0", "not UTF-8 text (byte 0x00 at offset 2200000)"),
}
BPE = train_bpe([STORY], 300)


@pytest.mark.parametrize("codec", [TEXT, BPE], ids=["bytes", "tokenizer"])
@pytest.mark.parametrize("name", NO_TEXT)
def test_archives_and_other_encodings_are_no_text_and_the_message_says_what_they_are(tmp_path, name, codec):
    content, says = NO_TEXT[name]
    path = write_files(tmp_path / "data", {name: content}) / name
    for split_on in None, "\n":
        with pytest.raises(InputError, match=rf"{name} is .*{re.escape(says)}") as error:
            prepare(find_files(path), codec, tmp_path / "out", split_on=split_on)
        assert "\n" not in str(error.value)
    with pytest.raises(InputError, match=re.escape(says)):
        list(read_text(find_files(path)))
    file, _ = prepare(find_files(path), BYTES, tmp_path / "out", validation_fraction=0)
    assert file.num_bytes == len(b"".join(find_files(path)[0].chunks()))


@pytest.mark.parametrize("codec", [TEXT, BPE], ids=["bytes", "tokenizer"])
def test_text_that_speaks_of_archives_is_text(tmp_path, codec):
    contents = [
        b"PK is a name",
        b"Rar!",
        b"PAR1 is a gene",
        b"x" * 256 + b"star",
        b"BZh",
        "ÿþ é".encode(),
        b"a",
        b"%PDF",
    ]
    folder = write_files(tmp_path / "data", {f"{number}.txt": content for number, content in enumerate(contents)})
    file, _ = prepare(find_files(folder), codec, tmp_path / "out", validation_fraction=0)
    assert codec.decode(file.tokens) == b"".join(contents)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"validation_fraction": 1.0}, "validation_fraction is 1.0"),
        ({"validation_fraction": -0.1}, "validation_fraction is -0.1"),
        ({"split_on": ""}, "split_on is empty"),
    ],
)
def test_wrong_settings_are_named(tmp_path, options, message):
    sources = find_files(write_files(tmp_path / "data", {"a": b"a", "b": b"b"}))
    with pytest.raises(InputError, match=message):
        prepare(sources, TEXT, tmp_path / "out", **options)


def test_nothing_to_train_on_is_an_error(tmp_path):
    with pytest.raises(InputError, match="data/a is empty; give files"):
        prepare(find_files(write_files(tmp_path / "data", {"a": b""})), TEXT, tmp_path / "out")
    with pytest.raises(InputError, match="data/a and all other files are empty; give files"):
        prepare(find_files(write_files(tmp_path / "data", {"b": b""})), TEXT, tmp_path / "out")
    with pytest.raises(InputError, match="no files given"):
        prepare([], TEXT, tmp_path / "out")


def test_an_error_leaves_the_old_token_file(tmp_path):
    folder = write_files(tmp_path / "data", {"a": b"aaa", "b": b"bbb"})
    prepare(find_files(folder), TEXT, tmp_path / "out")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert len(before) == 6
    write_files(folder, {"b": b"\xff"})
    with pytest.raises(InputError):
        prepare(find_files([folder / "a", folder / "b"]), TEXT, tmp_path / "out")
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


def test_a_full_disk_leaves_nothing_behind(tmp_path):
    sources = find_files(write_files(tmp_path / "data", {"a": b"a" * 3_000_000, "b": b"b"}))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_500_000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            prepare(sources, TEXT, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list((tmp_path / "out").iterdir()) == []


def test_an_old_validation_split_does_not_outlive_its_training_split(tmp_path):
    folder = write_files(tmp_path / "data", {"a": b"aaa", "b": b"bbb"})
    assert prepare(find_files(folder), TEXT, tmp_path / "out")[1] is not None
    assert prepare(find_files(folder / "a"), TEXT, tmp_path / "out")[1] is None
    assert not list((tmp_path / "out").glob("validation*"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("train.json", None, r"train\.json does not exist: there is no finished token file"),
        ("train.json", b"{", r"train\.json is damaged"),
        ("train.json", b"[]", r"train\.json is damaged"),
        ("train.json", b"\xff", r"train\.json is damaged"),
        ("train.json", b'{"version": 1, "vocab_size": "many"}', r"train\.json is damaged"),
        ("train.json", b'{"version": 1}', r"train\.json is damaged"),
        ("train.bin", b"\0aa", r"train\.bin is damaged: 3 bytes instead of 8"),
        ("train.bin", None, r"train\.bin is damaged: 0 bytes instead of 8"),
        ("train.documents.npy", None, r"train\.documents\.npy is damaged or missing"),
        ("train.documents.npy", b"", r"train\.documents\.npy is damaged or missing"),
        ("train.documents.npy", b"\x93NUMPY\x01\0v\0{'descr'", r"train\.documents\.npy is damaged or missing"),
    ],
)
def test_a_damaged_token_file_is_named(tmp_path, name, content, message):
    sources = find_files(write_files(tmp_path / "data", {"a": b"aaa", "b": b"bbb"}))
    prepare(sources, TEXT, tmp_path, validation_fraction=0)
    (tmp_path / name).unlink()
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message + ".*; prepare the data again") as error:
        TokenFile.open(tmp_path / "train")
    assert "\n" not in str(error.value)


def test_a_token_file_that_becomes_shorter_while_it_is_used_is_named(tmp_path):
    prepare(find_files(write_files(tmp_path / "data", {"a": b"aaa" * 9000})), TEXT, tmp_path, validation_fraction=0)
    file = TokenFile.open(tmp_path / "train")
    assert file.tokens[-1] == file.read(27_000, 27_001)[0] == 97
    os.truncate(tmp_path / "train.bin", 5000)
    for use in (lambda: file.read(4990, 5010), lambda: file.tokens[-1]):
        with pytest.raises(InputError, match=r"train\.bin is damaged: .*; prepare the data again"):
            use()


def test_a_token_file_of_another_version_is_refused(tmp_path):
    prepare(find_files(write_files(tmp_path / "data", {"a": b"aaa"})), TEXT, tmp_path)
    path = tmp_path / "train.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"version": 2}))
    with pytest.raises(InputError, match="is of version 2, not 1; prepare the data again"):
        TokenFile.open(tmp_path / "train")


# --- windows -------------------------------------------------------------------------------------------------------

SHAPES = st.tuples(st.integers(1, 12), st.integers(0, 12), st.integers(1, 80), st.integers(0, 3))


def windows_of(shape: tuple[int, int, int, int]) -> tuple[TrainingWindows, np.ndarray]:
    """TrainingWindows over tokens that are their own index, from (N, T - N, n - T, seed)."""
    num_latents, prefix, more, seed = shape
    tokens = np.arange(num_latents + prefix + more, dtype=np.uint16)
    return TrainingWindows(tokens, num_latents + prefix, num_latents, seed), tokens


@given(SHAPES)
def test_every_target_exactly_once_per_pass(shape):
    windows, tokens = windows_of(shape)
    for number in range(4):
        first, end = windows.first_window(number), windows.first_window(number + 1)
        assert end - first - math.ceil((len(tokens) - 1) / windows.num_latents) in (0, 1)
        labels = windows.batch(first, end - first)["labels"]
        assert sorted(labels[labels >= 0].tolist()) == tokens[1:].tolist()


@given(SHAPES, st.integers(0, 1000))
def test_windows_are_right_aligned_with_all_the_context_there_is(shape, index):
    windows, tokens = windows_of(shape)
    batch = windows.batch(index, 1)
    row, labels = batch["tokens"][0], batch["labels"][0]
    assert row.shape == (windows.context_length,) and labels.shape == (windows.num_latents,)
    assert row.dtype == torch.int32 and labels.dtype == torch.int64
    ((a, b),) = windows.spans(index, 1).tolist()
    assert 1 <= a < b <= len(tokens) and b - a <= windows.num_latents
    padding = max(0, windows.context_length - (b - 1))
    assert row[:padding].eq(0).all() and row[padding:].tolist() == list(range(b - 1 - len(row) + padding, b - 1))
    assert labels[: -(b - a)].eq(-100).all() and labels[-(b - a) :].tolist() == list(range(a, b))
    assert ("mask" in batch) == (padding > 0)
    if padding:
        assert batch["mask"][0].tolist() == [False] * padding + [True] * (len(row) - padding)
    # Each label is the token after the one above it.
    targets = labels[labels >= 0]
    assert (row[len(row) - len(targets) :] + 1).tolist() == targets.tolist()


@given(SHAPES, st.integers(0, 100), st.integers(1, 30))
def test_a_batch_is_its_windows_one_by_one(shape, first, count):
    windows, _ = windows_of(shape)
    batch = windows.batch(first, count)
    fresh, _ = windows_of(shape)  # as after a restart
    singles = [fresh.batch(index, 1) for index in reversed(range(first, first + count))][::-1]
    for name in ("tokens", "labels"):
        assert torch.equal(batch[name], torch.cat([single[name] for single in singles]))
    if "mask" in batch:
        whole = torch.ones(1, windows.context_length, dtype=torch.bool)
        assert torch.equal(batch["mask"], torch.cat([single.get("mask", whole) for single in singles]))
    else:
        assert not any("mask" in single for single in singles)


@settings(max_examples=50)
@given(st.integers(1, 3000), st.integers(0, 2**64 - 1))
def test_the_permutation_is_a_bijection(size, key):
    places = _permute(np.arange(size), size, np.array([key], dtype=np.uint64))
    assert sorted(places.tolist()) == list(range(size))


def test_passes_and_seeds_differ_in_order_and_cuts():
    tokens = np.zeros(10_001, dtype=np.uint8)
    spans = {
        (seed, number): windows.spans(windows.first_window(number), 50).tolist()
        for seed in (0, 1, -1, 2**63)
        for windows in [TrainingWindows(tokens, 128, 100, seed)]
        for number in range(5)
    }
    assert len({str(value) for value in spans.values()}) == 20
    assert len({starts[0][0] % 100 for starts in spans.values()}) > 12  # where the cuts are
    # The order is thorough: neighbours in a pass are no neighbours in the file.
    order = np.array(spans[0, 0])[:, 0] // 100
    assert np.abs(np.diff(order)).mean() > 20 and np.abs(np.corrcoef(order, np.arange(50))[0, 1]) < 0.5


def test_a_huge_corpus_costs_nothing_to_shuffle():
    tokens = np.broadcast_to(np.uint8(7), (50_000_000_000,))
    windows = TrainingWindows(tokens, 4096, 512)
    spans = windows.spans(windows.first_window(2) - 2, 4)  # the end of one pass, the start of the next
    assert spans.max() > 1_000_000_000 and len(np.unique(spans[:, 0])) == 4
    assert windows.batch(12345, 2)["tokens"].eq(7).all()


def test_too_short_a_corpus_says_what_to_do():
    tokens = np.zeros(100, dtype=np.uint8)
    assert TrainingWindows(tokens, 99, 10).batch(0, 3)["tokens"].shape == (3, 99)
    message = r"holds 100 tokens, but a window takes context_length \+ 1 = 101; .*context_length of at most 99"
    with pytest.raises(InputError, match=message):
        TrainingWindows(tokens, 100, 10)
    for num_latents in (0, 11):
        with pytest.raises(InputError, match=f"num_latents {num_latents} is not between 1 and context_length 10"):
            TrainingWindows(tokens, 10, num_latents)


def test_windows_travel_to_workers_without_the_data(tmp_path):
    data = random.Random(0).randbytes(1_000_000)
    train, _ = prepare(find_files(write_files(tmp_path, {"a": data})), BYTES, tmp_path / "out")
    windows = TrainingWindows(train, 64, 16)
    batch = windows.batch(0, 4)
    travelled = pickle.dumps(windows)
    assert len(travelled) < 5000
    assert torch.equal(pickle.loads(travelled).batch(0, 4)["tokens"], batch["tokens"])


def test_reading_is_the_same_as_the_memory_map(tmp_path):
    codec = train_bpe(["a rose is a rose is a rose"], 265)
    sources = find_files(write_files(tmp_path / "data", {"a": b"a rose is a rose " * 100}))
    train, _ = prepare(sources, codec, tmp_path / "out")
    assert train.dtype == np.uint16
    for start, stop in [(0, 1), (3, 50), (0, len(train))]:
        assert train.read(start, stop).tolist() == train.tokens[start:stop].tolist()
    windows, plain = (TrainingWindows(data, 32, 8, seed=3) for data in (train, np.array(train.tokens)))
    assert torch.equal(windows.batch(5, 20)["tokens"], plain.batch(5, 20)["tokens"])


def test_a_file_of_gigabytes_needs_no_memory(tmp_path):
    """4 GB of zeros that take no room on the disk: opening, shuffling and reading them, in a process of its own."""
    size = 4 << 30
    with open(tmp_path / "train.bin", "wb") as file:
        file.truncate(size)
    np.save(tmp_path / "train.documents.npy", np.zeros(1, dtype=np.uint64))
    content = {"version": 1, "codec": "bytes", "vocab_size": 256, "dtype": "uint8", "num_tokens": size}
    (tmp_path / "train.json").write_text(json.dumps(content | {"num_documents": 1, "num_bytes": size}))
    script = """
        import resource, sys, tracemalloc
        from perceiver_ar.data.sampler import TrainingWindows
        from perceiver_ar.data.tokens import TokenFile
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        tracemalloc.start()
        windows = TrainingWindows(TokenFile.open(sys.argv[1]), 8192, 1024)
        for index in range(0, 400, 8):
            assert windows.batch(index, 8)["tokens"].sum() == 0
        print(tracemalloc.get_traced_memory()[1], (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
    """
    traced, resident = map(int, run_python(script, tmp_path / "train").split())
    assert traced < 50e6 and resident < 200e6


def test_preparing_needs_memory_for_a_chunk_not_for_the_file(tmp_path):
    """100 MB in one file, with many documents and some held out."""
    with gzip.GzipFile(tmp_path / "big.gz", "wb", compresslevel=1) as file:
        for number in range(100):
            file.write(b"%04d " % number + b"word " * 199_998 + b"END\n\n")
    script = """
        import sys, tracemalloc
        from perceiver_ar.data.text import BytesCodec
        from perceiver_ar.data.tokens import find_files, prepare
        tracemalloc.start()
        train, validation = prepare(find_files(sys.argv[1]), BytesCodec(), sys.argv[2], split_on="END\\n\\n")
        print(tracemalloc.get_traced_memory()[1], train.num_bytes + validation.num_bytes)
    """
    traced, num_bytes = map(int, run_python(script, tmp_path / "big.gz", tmp_path / "out").split())
    assert num_bytes == 100 * 5 * 199_999 and traced < 50e6


# --- documents of one length ---------------------------------------------------------------------------------------


@given(st.integers(1, 5), st.integers(2, 40), st.data(), st.integers(0, 2**32))
def test_within_documents_every_target_comes_once_with_all_before_it_in_its_document(documents, length, data, seed):
    num_latents = data.draw(st.integers(1, length - 1))
    tokens = np.arange(documents * length, dtype=np.uint16)
    windows = TrainingWindows(tokens, length - 1, num_latents, seed, document_length=length)
    for number in (0, 1, 2):
        first, last = windows.first_window(number), windows.first_window(number + 1)
        targets = []
        batch = windows.batch(first, last - first)
        mask = batch.get("mask", torch.ones_like(batch["tokens"], dtype=torch.bool))
        for row, kept, labels in zip(batch["tokens"], mask, batch["labels"], strict=True):
            new = labels[labels >= 0].tolist()
            start = new[0] // length * length
            assert row[kept].tolist() == list(range(start, new[-1]))  # a token's place is its place in the document
            targets += new
        expected = [i for i in range(documents * length) if i % length]  # the first of a document is no target
        assert sorted(targets) == expected


def test_windows_need_documents_of_their_length():
    tokens = np.zeros(30, dtype=np.uint8)
    with pytest.raises(InputError, match="30 tokens are not documents of 7"):
        TrainingWindows(tokens, 6, 2, document_length=7)
    with pytest.raises(InputError, match=r"the 10 tokens of a document; give 9"):
        TrainingWindows(tokens, 8, 2, document_length=10)


# --- augmentation --------------------------------------------------------------------------------------------------


@given(st.integers(0, 300), st.integers(0, 2**63))
def test_augmented_windows_follow_from_seed_and_index_alone(index, seed):
    def augment(ids, random):
        return ids.astype(np.int64) + random.integers(1000)

    tokens = np.arange(500, dtype=np.uint16)
    plain, windows, again = (TrainingWindows(tokens, 16, 4, seed, augment=a) for a in (None, augment, augment))
    again.batch(0, 3)  # has been elsewhere before
    one, whole = windows.batch(index, 1), again.batch(max(0, index - 2), 4)
    row = min(2, index)
    assert torch.equal(one["tokens"][0], whole["tokens"][row]) and torch.equal(one["labels"][0], whole["labels"][row])
    original = plain.batch(index, 1)
    kept = original.get("mask", torch.ones_like(original["tokens"], dtype=torch.bool))[0]
    shifts = set((one["tokens"] - original["tokens"])[0][kept].tolist())
    shifts |= set((one["labels"] - original["labels"])[0][original["labels"][0] >= 0].tolist())
    assert len(shifts) == 1


# --- groups --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "pattern", ["(.*)__", "[^/]*__", r"(piece\d+)", r"(of no name)|piece\d+", r"(of no name)|(piece\d+)"]
)
def test_performances_of_a_piece_are_on_one_side(tmp_path, pattern):
    contents = {f"data/piece{i}__{player}.txt": f"piece{i} ".encode() * 20 for i in range(9) for player in "abc"}
    sources = find_files(write_files(tmp_path, contents) / "data")
    for seed in range(8):
        train, validation = prepare(
            sources, TEXT, tmp_path / str(seed), group_by=pattern, validation_fraction=0.25, seed=seed
        )
        assert validation is not None
        sides = [{document[:6] for document in documents(file)} for file in (train, validation)]
        assert sides[0].isdisjoint(sides[1]) and len(sides[0] | sides[1]) == 9
        assert len(documents(validation)) == 3 * len(sides[1]) and len(sides[1]) in (2, 3)


def test_a_rule_that_groups_nothing_is_an_error(tmp_path):
    sources = find_files(write_files(tmp_path, {"a.txt": b"x", "b.txt": b"y"}))
    with pytest.raises(InputError, match=r"group_by '__' finds nothing in any file name, such as .*a\.txt"):
        prepare(sources, TEXT, tmp_path / "out", group_by="__")
    train, validation = prepare(sources, TEXT, tmp_path / "out", group_by=r"a\.txt", validation_fraction=0.5)
    assert validation is not None and len(train) == len(validation)


def test_a_file_that_is_named_has_to_be_readable_although_its_folder_is_given_too(tmp_path):
    (tmp_path / "bad.txt").write_bytes(b"\x00\xff")
    for paths in ([tmp_path, tmp_path / "bad.txt"], [tmp_path / "bad.txt", tmp_path]):
        assert [source.named for source in find_files(paths)] == [True]


def test_files_found_in_a_folder_that_cannot_be_read_are_skipped(tmp_path, capsys):
    folder = write_files(tmp_path / "data", {"a.txt": b"fine", "b.txt.gz": b"no gzip", "c.txt": b"fine, too"})
    train, _ = prepare(find_files(folder), TEXT, tmp_path / "out", validation_fraction=0)
    assert documents(train) == [b"fine", b"fine, too"]
    assert re.search(r"skipped 1 of 3 files:\n  .*b\.txt\.gz is damaged", capsys.readouterr().err)
    with pytest.raises(InputError, match="damaged"):  # named by the user, it is an error
        prepare(find_files([folder / "a.txt", folder / "b.txt.gz"]), TEXT, tmp_path / "out")

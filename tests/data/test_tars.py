"""Tar files hold documents as in WebDataset: the members with the modality's ending, in order."""

import bz2
import gzip
import io
import json
import lzma
import tarfile
from pathlib import Path
from typing import Any

import pytest
import zstandard
from helpers import SMALL, assert_refused, content, write_files
from samples import write_music, write_numbers, write_picture, write_words

from perceiver_ar.cli import main
from perceiver_ar.config import DataConfig
from perceiver_ar.data.codec import Codec
from perceiver_ar.data.modalities import find_members, make_codec, recognise
from perceiver_ar.data.sources import Source, find_files
from perceiver_ar.data.text import BytesCodec, OffsetBytesCodec
from perceiver_ar.data.tokens import TokenFile, prepare
from perceiver_ar.errors import InputError

WRITERS = {
    ".mid": ("midi", write_music),
    ".png": ("image", write_picture),
    ".npy": ("integers", write_numbers),
    ".txt": ("text", write_words),
}


def tar(members: dict[str, bytes], format: int = tarfile.PAX_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as archive:
        folder = tarfile.TarInfo("folder.txt")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def documents(path: Path | str, modality: str = "text", column: str = "text") -> dict[str, bytes]:
    sources = find_members(find_files(path), modality, column)
    text = modality == "text"
    return {where: b"".join(data) for source in sources for where, data in source.documents(None, text=text)}


def tokens(sources: list[Source], codec: Codec, out: Path, **options: Any) -> dict[str, bytes]:
    prepare(sources, codec, out, progress=False, **options)
    return content(out)


@pytest.mark.parametrize("ending", WRITERS)
def test_members_give_the_tokens_and_the_split_of_the_same_files(tmp_path: Path, ending: str) -> None:
    modality, write = WRITERS[ending]
    (tmp_path / "files").mkdir()
    for number in range(9):
        write(tmp_path / "files" / f"{number}{ending}", number)
    files = dict(sorted(content(tmp_path / "files").items()))
    notes = {f"{name[0]}.json": b"{}" for name in files} | {f"{name[0]}.seg{ending}": b"a mask" for name in files}
    members = dict(sorted((files | notes).items()))
    names = sorted(members)
    first = {name: members[name] for name in names[:13]}
    rest = {f"deep/er/{name}": members[name] for name in names[13:]}
    write_files(tmp_path / "tars", {"1.tar": tar(first), "2.tar.gz": gzip.compress(tar(rest))})
    assert recognise(find_files(tmp_path / "tars")) == modality

    def made(folder: str) -> dict[str, bytes]:
        sources = find_members(find_files(tmp_path / folder), modality, "text")
        codec = make_codec(modality, DataConfig(image_size=(4, 4), image_colours="palette", palette_size=8), sources)
        return tokens(sources, codec, tmp_path / f"{folder}-tokens", validation_fraction=0.3)

    assert made("tars") == made("files")


@pytest.mark.parametrize(
    "compress", [bytes, gzip.compress, bz2.compress, lzma.compress, zstandard.compress], ids=lambda how: how.__module__
)
@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_documents_are_named_by_archive_and_member(tmp_path: Path, compress: Any, format: int) -> None:
    members = {"a/1.txt": b"one", "a/1.txt.b": b"no", "a/.2.txt": b"no", "a.b/2.TXT": b"two", "3": b"no", "4.txt": b""}
    ending = {"gzip": ".gz", "bz2": ".bz2", "lzma": ".xz", "builtins": ""}.get(compress.__module__, ".zst")
    path = write_files(tmp_path, {f"x.tar{ending}": compress(tar(members, format))}) / f"x.tar{ending}"
    found = documents(path)
    assert found == {f"{path}/a/1.txt": b"one", f"{path}/a.b/2.TXT": b"two", f"{path}/4.txt": b""}
    path.rename(tmp_path / f"y{'.tgz' if ending == '.gz' else path.suffixes[0] + ending}")
    assert [*documents(str(tmp_path / "y*")).values()] == [b"one", b"two", b""]


def test_the_column_is_an_ending_or_a_field_of_a_json_member(tmp_path: Path) -> None:
    rows = [{"en": {"text": "one"}}, {"en": {"text": "tw\u00f6"}}]
    members = {f"{n}.json": json.dumps(row).encode() for n, row in enumerate(rows)} | {"0.seg.md": b"# title"}
    path = write_files(tmp_path, {"x.tar": tar(members)}) / "x.tar"
    assert [*documents(path, column="json.en.text").values()] == [b"one", "tw\u00f6".encode()]
    assert [*documents(path, column="seg.md").values()] == [b"# title"]


def test_a_field_of_a_json_member_is_read_for_every_codec(tmp_path: Path) -> None:
    path = write_files(tmp_path, {"x.tar": tar({"1.json": b'{"caption": "one"}'})}) / "x.tar"
    sources = find_members(find_files(path), "text", "json.caption")
    written = {}
    for codec in (BytesCodec(), OffsetBytesCodec(reserved=6)):
        tokens(sources, codec, tmp_path / codec.name, validation_fraction=0)
        written[codec.name] = codec.decode(TokenFile.open(tmp_path / codec.name / "train").tokens)
    assert [text.strip(b"\0") for text in written.values()] == [b"one", b"one"]


def test_archives_one_after_the_other_are_read_to_the_end(tmp_path: Path) -> None:
    first, second = tar({"1.txt": b"one"}), tar({"2.txt": b"two"})
    path = write_files(tmp_path, {"x.tar": first + second + bytes(512)}) / "x.tar"
    assert [*documents(path).values()] == [b"one", b"two"]


def test_with_bytes_a_tar_file_is_a_file(tmp_path: Path) -> None:
    data = tar({"1.txt": b"one"})
    path = write_files(tmp_path, {"x.tar": data}) / "x.tar"
    assert documents(path, "bytes") == {str(path): data}


def test_members_that_cannot_be_read_are_skipped_and_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_files(tmp_path, {"x.tar": tar({"1.txt": b"one", "2.txt": b"\xff", "3.txt": b"a\0b", "4.txt": b"4"})})
    sources = find_members(find_files(path / "x.tar"), "text", "text")
    tokens(sources, BytesCodec(), tmp_path / "out", validation_fraction=0)
    assert (tmp_path / "out" / "train.bin").read_bytes() == b"\0one\x004"
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "skipped 2 rows:" and all(f"x.tar/{n}.txt is not UTF-8" in lines[n - 1] for n in (2, 3))


def test_members_with_another_dot_in_their_names_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    members = {"a.txt": b"one", "a.b.txt": b"of a", "dr. who.txt": b"two", "b.json": b"{}", "._a.txt": b"of macOS"}
    path = write_files(tmp_path, {"x.tar": tar(members)}) / "x.tar"
    tokens(find_members(find_files(path), "text", "text"), BytesCodec(), tmp_path / "out", validation_fraction=0)
    assert (tmp_path / "out" / "train.bin").read_bytes() == b"\0one"
    first, second, *_ = capsys.readouterr().err.splitlines()
    assert first == "skipped 1 rows:" and "dr. who.txt is no document: its name ends, from the first dot on" in second


WHOLE = tar({f"{number}.txt": b"x" * 2000 for number in range(9)})


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "x.tar is damaged, or no tar file (empty header)"),
        (b"no tar file " * 99, "x.tar is damaged, or no tar file"),
        (WHOLE[:700], "x.tar is damaged"),  # in a header
        (WHOLE[: 512 + 512 + 900], "x.tar is damaged"),  # in a member
        (WHOLE[: 512 + 2560], "x.tar is damaged"),  # between members
        (WHOLE[:3072] + b"\xaa" * 512 + WHOLE[3584:], "x.tar is damaged"),  # a header
        (WHOLE + b"no header " * 99, "x.tar is damaged"),  # behind the end
        (WHOLE + WHOLE[:700], "x.tar is damaged"),  # in the header of another archive
        (WHOLE + WHOLE[: 512 + 2560], "x.tar is damaged"),  # between its members
        (tar({"1.jpg": b"", "1.json": b"", "2": b""}), "no member that ends in .txt or .text, only .jpg, .json"),
        (tar({"a.b.txt": b"one"}), "ends in .txt or .text, only .b.txt (from the first dot of a name on); set"),
        (tar({}), "x.tar is empty"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], data: bytes, message: str
) -> None:
    files = write_files(tmp_path / "files", {"x.tar": data})
    command = ["train", files / "x.tar", "--out", tmp_path / "run", "--modality", "text", *SMALL]
    assert_refused(capsys, *command, says=message)
    write_files(files, {"y.tar": WHOLE})
    prepare(find_members(find_files(files), "text", "text"), BytesCodec(), tmp_path / "out")  # found: skipped
    assert "skipped 1 of 2 files:" in capsys.readouterr().err


def test_other_misuse_is_refused(tmp_path: Path) -> None:
    files = write_files(tmp_path, {"x.tar": tar({"1.png": b"", "1.txt": b""}), "y.tar": tar({"1.fa": b">a\nACGT"})})
    with pytest.raises(InputError, match=r"several kinds \(1 image, .*1 text, .*set --modality"):
        recognise(find_files(files / "x.tar"))
    with pytest.raises(InputError, match=r"x\.tar is a tar file: unpack it"):
        make_codec("image", DataConfig(classes=True), find_members(find_files(files / "x.tar"), "image", "text"))


def test_the_command_trains_on_shards_and_evaluates_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(3):
        members = {f"{number}-{n}.txt": b"%d-%d words of text " % (number, n) * 9 for n in range(5)}
        write_files(tmp_path, {f"{number}.tar": tar(members)})
    run = str(tmp_path / "run")
    assert main(["train", str(tmp_path / "*.tar"), "--out", run, *SMALL, "--max_steps=1"]) == 0
    capsys.readouterr()
    tokens = Path(run) / "tokens"
    assert sum(TokenFile.open(tokens / name).num_documents for name in ("train", "validation")) == 15
    assert main(["evaluate", run, str(tmp_path / "0.tar"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["bytes"] > 0
    (tmp_path / "g.tar").write_bytes(tar({"1.fa": b">a\nACGT"}))
    assert_refused(capsys, "train", tmp_path / "g.tar", "--out", tmp_path / "g", *SMALL, says="g.tar is a tar file")

"""What files are of is seen from them; the official split is kept; a missing extra says how to get it."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import get_args, get_type_hints

import numpy as np
import pytest
from helpers import assert_refused

from perceiver_ar.config import DataConfig, Recipe
from perceiver_ar.data.modalities import make_codec, official_split, recognise
from perceiver_ar.data.sources import find_files
from perceiver_ar.errors import InputError


def folder_of(tmp_path: Path, *names: str, content: bytes = b"x") -> Path:
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    return tmp_path


@pytest.mark.parametrize(
    ("names", "modality"),
    [
        (["a.mid", "b/C.MIDI"], "midi"),
        (["a.png", "b.JPG", "c.jpeg", "d.webp", "e.gif", "f.bmp", "g.tif"], "image"),
        (["a.wav", "b.flac", "c.ogg", "d.mp3", "e.aiff"], "audio"),
        (["a.npy", "b.npz"], "integers"),
        (["a.txt", "b.py", "noending"], "text"),
        (["genes.fasta", "b.fa.gz", "c.FNA", "reads.fq"], "genome"),
        (["proteins.faa"], "text"),
        (["a.mid.gz"], "midi"),
        (["a.mid", "maestro.csv", "maestro.json", "README", "LICENSE.txt"], "midi"),
        (["README.md", "data.csv"], "text"),
    ],
)
def test_a_modality_is_known_by_its_endings(tmp_path: Path, names: list[str], modality: str) -> None:
    assert recognise(find_files(folder_of(tmp_path, *names))) == modality


@pytest.mark.parametrize(
    ("start", "modality"),
    [
        (b"MThd\0\0\0\6", "midi"),
        (b"RIFF\x10\0\0\0RMIDdata", "midi"),
        (b"\x89PNG\r\n\x1a\n", "image"),
        (b"\xff\xd8\xff\xe0", "image"),
        (b"RIFF\1\2\3\4WAVEfmt ", "audio"),
        (b"RIFF\1\n\3\4WEBPVP8 ", "image"),
        (b"fLaC", "audio"),
        (b"\x93NUMPY\1\0", "integers"),
        (b"Once upon a time", "text"),
        (b"", "text"),
    ],
)
def test_without_a_known_ending_the_first_bytes_tell(tmp_path: Path, start: bytes, modality: str) -> None:
    assert recognise(find_files(folder_of(tmp_path, "file", "file.dat", content=start))) == modality


def test_a_mixed_folder_is_an_error_that_counts(tmp_path: Path) -> None:
    folder_of(tmp_path, "a.png", "b.png", "c.mid", "notes.txt", "d.png", "README.md")
    counts = r"3 image, such as .*a\.png, 1 midi, such as .*c\.mid, 1 text, such as .*notes\.txt"
    with pytest.raises(InputError, match=rf"several kinds \({counts}\).* --modality"):
        recognise(find_files(tmp_path))


@pytest.mark.parametrize(("encoding", "separator"), [("utf-8", ","), ("utf-8-sig", ","), ("utf-8", ";")])
@pytest.mark.parametrize("spelled", [str, str.title])
def test_official_splits_are_read_from_their_table(
    tmp_path: Path, encoding: str, separator: str, spelled: Callable[[str], str]
) -> None:
    folder_of(tmp_path, "2004/a.midi", "2004/b.midi", "2006/c.midi", "2006/d.midi", "2006/e.midi")
    rows = {"split": ("title", "midi_filename"), "train": ("A", "2004/a.midi"), "validation": ("B", "2004/b.midi")}
    rows |= {"test": ("C", "2006/c.midi"), "train ": ("D", "2006/d.midi")}
    table = "".join(separator.join((spelled(first), *others)) + "\n" for first, others in rows.items())
    (tmp_path / "maestro.csv").write_text(table, encoding=encoding)
    split = official_split(find_files(tmp_path))
    assert split is not None
    train, validation, line = split
    assert [source.path.name for source in train] == ["a.midi", "d.midi"]
    assert [source.path.name for source in validation] == ["b.midi"]
    assert "2 files to train on, 1 to validate, 2 left out" in line


@pytest.mark.parametrize("table", ["a,b\n1,2\n", "split,midi_filename\n", "\0\xff", ""])
def test_other_tables_split_nothing(tmp_path: Path, table: str) -> None:
    folder_of(tmp_path, "a.midi")
    (tmp_path / "t.csv").write_text(table, encoding="latin-1")
    assert official_split(find_files(tmp_path)) is None


def test_a_table_of_a_split_with_an_impossible_name_is_refused(tmp_path: Path) -> None:
    folder_of(tmp_path, "a.midi")
    (tmp_path / "t.csv").write_text("split,midi_filename\ntrain,a.midi\ntrain,b\0.midi\n")
    with pytest.raises(InputError, match=r"t\.csv, row 2, names a file 'b\\x00\.midi', as no file can be named"):
        official_split(find_files(tmp_path))


def test_a_tokenizer_reads_text_only() -> None:
    with pytest.raises(InputError, match="the modality is midi, but a tokenizer reads text"):
        make_codec("midi", DataConfig(bpe_vocab_size=300), [])


@pytest.mark.parametrize(
    ("name", "package", "option", "extra"),
    [
        ("a.mid", "miditok", "--data.midi_tokens=remi", "midi"),
        ("a.wav", "soundfile", "--data.sample_rate=8000", "audio"),
        ("a.wav", "transformers", "--data.audio_codec=mimi", "codecs"),
        ("a.parquet", "datasets", "--data.column=text", "datasets"),
    ],
)
def test_a_missing_extra_says_how_to_install_it(
    name: str, package: str, option: str, extra: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    file, out = folder_of(tmp_path / "data", name) / name, tmp_path / "run"
    monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
    says = f"{package}: pip install 'perceiver-ar[{extra}]'"
    assert_refused(capsys, "train", file, "--out", out, option, says=says)
    assert not out.exists()


def test_every_modality_that_a_recipe_can_name_has_its_codec(tmp_path: Path) -> None:
    for modality in get_args(get_type_hints(Recipe)["modality"]):
        sources = find_files(folder_of(tmp_path, "a.npy")) if modality == "integers" else []
        if sources:
            np.save(tmp_path / "a.npy", np.arange(3))
        make_codec(modality, DataConfig(), sources)  # an AssertionError otherwise

"""Rows of real files, written by the datasets library, are documents like any others."""

import bz2
import csv
import gzip
import json
import logging
import lzma
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.parquet
import pytest
import zstandard

from perceiver_ar.cli import main
from perceiver_ar.data.rows import Rows, find_rows
from perceiver_ar.data.sources import find_files
from perceiver_ar.data.text import BytesCodec, Codec, train_bpe
from perceiver_ar.data.tokens import TokenFile, prepare, read_text
from perceiver_ar.errors import InputError

TEXTS = [f"Story {number}: " + "é, 日本\n\n" * number for number in range(1, 12)]
TEXT = BytesCodec()


@pytest.fixture(autouse=True)
def quiet_and_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No bars, and the library's cache in a folder of the test's."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


def write(folder: Path, form: str, columns: dict[str, list[Any]] | None = None) -> Path:
    """The texts, or other columns, as a file or folder of the form."""
    folder.mkdir(exist_ok=True)
    data = datasets.Dataset.from_dict(columns or {"number": list(range(len(TEXTS))), "text": TEXTS})
    path = folder / f"rows.{form}"
    match form.partition("."):
        case "parquet", _, _:
            data.to_parquet(path, batch_size=4)
        case "arrow", _, _:
            data.save_to_disk(folder / "written")
            (folder / "written" / "data-00000-of-00001.arrow").rename(path)
        case "saved", _, _:
            data.save_to_disk(path, num_shards=3)
        case "splits", _, _:
            half = len(data) // 2
            first, second = data.select(range(half)), data.select(range(half, len(data)))
            datasets.DatasetDict([("a", first), ("b", second)]).save_to_disk(path)
        case "jsonl", _, compression:
            data.to_json(folder / "rows.plain")
            content = (folder / "rows.plain").read_bytes()
            compress = {"gz": gzip, "xz": lzma, "bz2": bz2, "zst": zstandard}
            path.write_bytes(compress[compression].compress(content) if compression else content)
    return path


def texts_as_files(folder: Path, texts: list[str] = TEXTS) -> Path:
    folder.mkdir()
    for number, text in enumerate(texts):
        (folder / f"{number:02d}.txt").write_text(text, encoding="utf-8")
    return folder


def tokens(path: Path, out: Path, codec: Codec = TEXT, column: str = "text", **options: Any) -> list[TokenFile | None]:
    return list(prepare(find_rows(find_files(path), column), codec, out, progress=False, **options))


def contents(files: list[TokenFile | None]) -> list[tuple[Any, ...]]:
    return [(f.tokens.tolist(), f.documents.tolist(), f.num_bytes) if f else () for f in files]


@pytest.mark.parametrize("name", ["bytes", "tokenizer"])
@pytest.mark.parametrize(
    "form",
    [*("parquet", "arrow", "jsonl", "jsonl.gz", "jsonl.xz", "jsonl.bz2", "jsonl.zst"), "saved", "splits"],
)
def test_rows_give_the_tokens_and_the_split_of_the_same_texts_in_files(tmp_path: Path, form: str, name: str) -> None:
    codec = TEXT if name == "bytes" else train_bpe(TEXTS, 280)
    expected = tokens(texts_as_files(tmp_path / "files"), tmp_path / "one", codec, validation_fraction=0.3)
    found = tokens(write(tmp_path / "rows", form), tmp_path / "two", codec, validation_fraction=0.3)
    assert found[1] is not None and found[1].num_documents >= 2
    assert contents(found) == contents(expected)


def test_another_column_holds_the_text(tmp_path: Path) -> None:
    path = write(tmp_path, "parquet", {"text": ["no"], "story": ["yes"]})
    [train, _] = tokens(path, tmp_path / "out", column="story")
    assert train and TEXT.decode(train.tokens) == b"yes"


def test_rows_without_text_are_left_out_and_a_row_may_hold_several_documents(tmp_path: Path) -> None:
    path = write(tmp_path, "parquet", {"text": ["a", None, "", "b--c"]})
    [train, _] = tokens(path, tmp_path / "out", split_on="--", validation_fraction=0)
    assert train and train.num_documents == 3 and train.tokens.tolist() == [0, 97, 0, 98, 0, 99]


def write_csv(path: Path, delimiter: str = ",") -> Path:
    with open(path, "w", newline="", encoding="utf-8-sig") as file:  # as spreadsheets do, with a mark at the start
        writer = csv.writer(file, delimiter=delimiter)
        writer.writerow(["number", "text"])
        writer.writerows(enumerate(TEXTS))
    return path


@pytest.mark.parametrize("form", ["ndjson", "csv", "semicolons.CSV", "tsv", "csv.gz"])
def test_other_tables_have_a_document_in_each_row_too(tmp_path: Path, form: str) -> None:
    path = tmp_path / f"rows.{form}"
    if form == "ndjson":
        write(tmp_path, "jsonl").rename(path)
    else:
        write_csv(path, {"tsv": "\t", "semicolons.CSV": ";"}.get(form, ","))
        path.write_bytes(gzip.compress(path.read_bytes()) if form == "csv.gz" else path.read_bytes())
    expected = tokens(texts_as_files(tmp_path / "files"), tmp_path / "one", validation_fraction=0.3)
    assert contents(tokens(path, tmp_path / "two", validation_fraction=0.3)) == contents(expected)


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_a_column_may_be_a_field_of_a_field(tmp_path: Path, form: str) -> None:
    rows = [{"a": {"b": "one"}, "a.b": "by its name"}, {"a": {"b": None}, "a.b": None}, {"a": {"b": "two"}, "a.b": ""}]
    path = write(tmp_path, form, {"doc": rows, "id": [1, 2, 3]})
    for column, expected in {"doc.a.b": b"onetwo", "doc.a.b.c": None, "doc.x": None, "ID.x": None}.items():
        if expected is None:
            with pytest.raises(InputError, match=f"has no column '{column}'; set data.column to one of doc"):
                tokens(path, tmp_path / "out", column=column)
        else:
            [train, _] = tokens(path, tmp_path / "out", column=column, validation_fraction=0)
            assert train and TEXT.decode(train.tokens) == expected


@pytest.mark.parametrize("others", [
    [{}, {"more": 1}], [{"more": None}, {"more": "x"}], [{"more": 1}, {"more": "x"}],
    [{"more": 1}, {"more": {"x": []}}],
    [{"text": None}, {"text": "2026-01-31"}], [{"text": "2026-01-31T12:00:00"}, {"text": "2026-02-01"}],
])  # fmt: skip
def test_of_json_lines_only_the_column_matters(tmp_path: Path, others: list[dict[str, Any]]) -> None:
    rows = [{"text": f"text {number}"} | other for number, other in enumerate(200 * others[:1] + others[1:])]
    path = tmp_path / "x.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    [train, _] = tokens(path, tmp_path / "out", validation_fraction=0)
    assert train and TEXT.decode(train.tokens).decode() == "".join(row["text"] or "" for row in rows)


def test_rows_that_are_no_text_are_left_out_and_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.jsonl").write_text(rows_of("a", "b\0c", "d", "\ud800"))
    [train, _] = tokens(tmp_path / "x.jsonl", tmp_path / "out", validation_fraction=0)
    assert train and TEXT.decode(train.tokens) == b"ad" and train.num_documents == 2
    first, *lines = capsys.readouterr().err.splitlines()
    assert first == "skipped 2 rows:"
    assert [re.search(r"row \d, is not UTF-8 text \(byte 0x..", line) is not None for line in lines] == [True, True]
    assert "".join(read_text(find_rows(find_files(tmp_path / "x.jsonl"), "text"))) == "ab\0cd"


def test_csv_files_may_be_documents_or_about_others(tmp_path: Path) -> None:
    def found(*names: str) -> list[str]:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        for name in names:
            (folder / name).write_text("text\na\n")
        return [type(source).__name__[0] + source.path.name for source in find_rows(find_files(folder), "text")]

    assert found("a.csv", "README.md", "notes.json") == ["Ra.csv"]
    assert found("a.csv", "README.md", "b.txt") == ["SREADME.md", "Ra.csv", "Sb.txt"]
    assert found("a.csv", "README.md", "b.jsonl") == ["Rb.jsonl"]


def test_names_that_look_like_patterns_and_hidden_folders_are_read(tmp_path: Path) -> None:
    (tmp_path / ".hidden").mkdir()
    path = write(tmp_path, "parquet").rename(tmp_path / ".hidden" / "a[1] *?.PARQUET")
    [train, _] = tokens(path, tmp_path / "out", validation_fraction=0)
    assert train and train.num_documents == len(TEXTS)


def test_what_lies_beside_rows_is_left_out_unless_named(tmp_path: Path) -> None:
    folder = write(tmp_path / "rows", "saved")
    datasets.load_from_disk(folder).map(lambda row: {"text": row["text"] * 2})  # leaves a cache-….arrow there
    assert list(folder.glob("cache-*.arrow"))
    (folder / "README.md").write_text("about")
    (folder / "more.txt").write_text("a document, too")
    found = find_rows(find_files([folder, folder / "dataset_info.json"]), "text")
    assert [source.path.suffix for source in found] == [".arrow"] * 3 + [".json", ".txt"]
    found = find_rows(find_files([folder / "README.md", folder]), "text")
    assert found[0].path.name == "README.md"


def test_without_rows_nothing_changes(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("about")
    (tmp_path / "notes.json").write_text("{}")
    sources = find_files(tmp_path)
    assert find_rows(sources, "text") == sources


def test_a_tokenizer_is_trained_on_the_column_alone(tmp_path: Path) -> None:
    sources = find_rows(find_files(write(tmp_path, "parquet")), "text")
    assert isinstance(sources[0], Rows) and list(read_text(sources)) == TEXTS


def test_nothing_is_left_in_the_cache(tmp_path: Path) -> None:
    path = write(tmp_path / "rows", "parquet")
    tokens(path, tmp_path / "out")
    assert {file.suffix for file in (tmp_path / "cache").iterdir()} <= {".lock"}


def rows_of(*values: Any) -> str:
    return "".join(json.dumps({"text": value}) + "\n" for value in values)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "x.jsonl",
            '{"a": 1, "b": 2}\n',
            r"x\.jsonl has no column 'text'; set data\.column to one of a, b, or use --mod",
        ),
        (
            "x.csv",
            "a;b\n1;2\n",
            r"x\.csv has no column 'text'; set data\.column to one of a, b, or use --modality bytes",
        ),
        ("x.jsonl", rows_of({"a": "x", "b": "y"}), r"row 1, has fields in .* 'text'; set .* one of text\.a, text\.b$"),
        ("x.jsonl", "[1]\n", r"x\.jsonl is damaged, or its ending is wrong \(row 1 is no JSON object\)"),
        ("x.ndjson", rows_of("a") + "a\n", r"x\.ndjson is damaged, or .* \(row 2: Expecting value"),
        ("x.csv", "", r"x\.csv is empty"),
        ("x.tsv", "text\n", r"x\.tsv is empty"),
        ("x.jsonl", rows_of(1), r"x\.jsonl, row 1, has 1 in column 'text', not text; set data\.column$"),
        ("x.csv", 'text\n"open\ntwo\n', r"x\.csv is damaged"),
        (
            "x.jsonl",
            rows_of("b\0c"),
            r"none of its rows can be read: \S*x\.jsonl, row 1, is not UTF-8 text .*or a tokenizer$",
        ),
        ("x.jsonl", "", r"x\.jsonl is empty"),
        ("x.jsonl", "\n\n", r"x\.jsonl is empty"),
        ("x.jsonl", rows_of("", None), r"x\.jsonl is empty"),
        ("x.jsonl", '{"text": "a', r"x\.jsonl is damaged, or its ending is wrong \(.+\); write it again$"),
        ("x.jsonl.gz", "junk", r"x\.jsonl\.gz is damaged"),
        ("x.parquet", "PAR1 junk", r"x\.parquet is damaged"),
        ("x.arrow", "ARROW1 junk", r"x\.arrow is damaged"),
    ],
)
def test_what_cannot_be_read_is_refused_in_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    name: str,
    content: str,
    message: str,
) -> None:
    path = tmp_path / name
    path.write_text(content)
    monkeypatch.setattr(logging.getLogger("datasets"), "handlers", [caplog.handler])
    with pytest.raises(InputError, match=message) as error:
        tokens(path, tmp_path / "out")
    assert "\n" not in str(error.value)
    assert caplog.records == []  # which would be more lines
    assert not list((tmp_path / "out").glob("*"))


def test_rows_cut_short_are_refused(tmp_path: Path) -> None:
    for form in "parquet", "arrow", "jsonl.gz":
        path = write(tmp_path / form, form)
        path.write_bytes(path.read_bytes()[:-12])
        with pytest.raises(InputError, match=rf"rows\.{form} is damaged"):
            tokens(path, tmp_path / "out")


def test_an_empty_table_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, "parquet", {"text": []})
    with pytest.raises(InputError, match=r"rows\.parquet is empty"):
        tokens(path, tmp_path / "out")


@pytest.mark.parametrize("form", ["parquet", "arrow"])
def test_a_table_without_rows_is_empty_whatever_its_columns(tmp_path: Path, form: str) -> None:
    table = pyarrow.table({"story": pyarrow.array([], pyarrow.string())})
    path = tmp_path / f"rows.{form}"
    if form == "parquet":
        pyarrow.parquet.write_table(table, path)
    else:
        with pyarrow.ipc.new_stream(path, table.schema) as writer:
            writer.write_table(table)
    for column in "story", "text":
        with pytest.raises(InputError, match=rf"rows\.{form} is empty"):
            tokens(path, tmp_path / "out", column=column)


@pytest.mark.parametrize("row", ['{"text": "t\0wo"}', '{"te\0\0\0', "\0" * 9, '{"text": "\\u0000"}'])
def test_a_row_with_nul_is_skipped_and_named(tmp_path: Path, capsys: pytest.CaptureFixture[str], row: str) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text(f'{{"text": "one"}}\n{row}\n{{"text": "three", "other": "\0"}}\n')
    train, _ = tokens(path, tmp_path / "out", validation_fraction=0)
    assert train is not None and TEXT.decode(train.tokens) == b"onethree"
    assert re.search(r"skipped 1 rows:\n .*x\.jsonl, row 2,", capsys.readouterr().err)


def test_a_row_without_text_in_the_column_is_skipped_and_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"text": "one"}\n{"text": 2}\n{"text": ["b"]}\n{"text": "four"}\n')
    train, _ = tokens(path, tmp_path / "out", validation_fraction=0)
    assert train is not None and TEXT.decode(train.tokens) == b"onefour"
    shown = capsys.readouterr().err
    assert "row 2, has 2 in column 'text'" in shown and "row 3, has ['b'] in column" in shown


def test_rows_without_the_column_are_skipped_and_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.jsonl").write_text('{"id": 1}\n{}\n{"text": "one"}\n{"id": 4}\n{"text": null}\n{"text": "six"}\n')
    (tmp_path / "x.csv").write_text("id,text\n1\n\n2,one\n3,six\n4\n")
    (tmp_path / "blank.csv").write_text("id,text\n" + 1000 * "\n" + "1\n2,one\n3,six\n4\n")
    for name, numbers in (("x.jsonl", (1, 4)), ("x.csv", (1, 5)), ("blank.csv", (1001, 1004))):
        train, _ = tokens(tmp_path / name, tmp_path / "out", validation_fraction=0)
        assert train is not None and TEXT.decode(train.tokens) == b"onesix"
        first, *lines = capsys.readouterr().err.splitlines()
        assert first == "skipped 2 rows:" and len(lines) == 2
        for number, line in zip(numbers, lines, strict=True):
            assert f"{name}, row {number}, has no column 'text'" in line


def test_a_table_whose_path_its_reader_cannot_take_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a::b").mkdir()
    path = write(tmp_path, "parquet").rename(tmp_path / "a::b" / "x.parquet")
    with pytest.raises(InputError, match=r"x\.parquet has :: in its path.*: rename it"):
        tokens(path, tmp_path / "out")


def test_a_row_of_csv_with_too_many_fields_is_skipped_and_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "x.csv"
    path.write_text('\nid,text\n1,Hello, world\n2,"Hello, world"\n')
    train, _ = tokens(path, tmp_path / "out", validation_fraction=0)
    assert train is not None and TEXT.decode(train.tokens) == b"Hello, world"
    assert "row 1, has 3 fields for 2 columns: write texts with ',' in quotes" in capsys.readouterr().err


def test_a_tokenizer_reads_nul_only_where_it_is_escaped(tmp_path: Path) -> None:
    """As itself it is what a crash leaves of a row."""
    codec, path = train_bpe(TEXTS, 300), tmp_path / "x.jsonl"
    path.write_text('{"text": "one"}\n{"text": "t\0wo"}\n{"text": "\\u0000"}\n{"text": "four", "other": "\0"}\n')
    train, _ = tokens(path, tmp_path / "out", codec, validation_fraction=0)
    assert train is not None and codec.decode(train.tokens) == b"one\0four"


@pytest.mark.parametrize("codec", [TEXT, train_bpe(TEXTS, 300)], ids=["bytes", "tokenizer"])
def test_nul_in_a_csv_costs_its_row_if_it_is_in_the_column(tmp_path: Path, codec: Codec) -> None:
    path = tmp_path / "x.csv"
    path.write_text("text,other\none,a\nt\0wo,b\nthree,\0\n")
    train, _ = tokens(path, tmp_path / "out", codec, validation_fraction=0)
    assert train is not None and codec.decode(train.tokens) == b"onethree"


def test_a_file_that_vanishes_is_named(tmp_path: Path) -> None:
    path = write(tmp_path, "parquet")
    sources = find_rows(find_files(path), "text")
    path.unlink()
    with pytest.raises(InputError, match=r"rows\.parquet vanished"):
        prepare(sources, TEXT, tmp_path / "out")


SMALL = [
    *("--max_steps", "2", "--model.dim", "32", "--model.num_layers", "1", "--model.num_heads", "1"),
    *("--model.context_length", "64", "--model.num_latents", "16", "--trainer.batch_size", "1"),
    *("--trainer.evaluations", "1", "--trainer.sample_tokens", "0"),
]


def test_the_command_trains_on_rows_and_evaluates_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path, "parquet", {"story": TEXTS})
    files = texts_as_files(tmp_path / "files")
    for name, source in ("rows", path), ("files", files):
        argv = ["train", str(source), "--data.column", "story", "--out", str(tmp_path / "runs" / name), *SMALL]
        assert main(argv) == 0
    one, two = ((tmp_path / "runs" / name / "tokens" / "train.bin").read_bytes() for name in ("rows", "files"))
    assert one == two
    capsys.readouterr()
    for source in path, files:
        assert main(["evaluate", str(tmp_path / "runs" / "rows"), str(source), "--json"]) == 0
    scored = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert scored[0]["tokens"] == scored[1]["tokens"] and np.isclose(
        scored[0]["bits_per_byte"], scored[1]["bits_per_byte"]
    )
    argv = ["train", str(path), "--modality", "bytes", "--out", str(tmp_path / "raw"), *SMALL]
    assert main(argv) == 0
    assert TokenFile.open(tmp_path / "raw" / "tokens" / "train").tokens.tobytes() == path.read_bytes()
    assert main(["train", str(path), "--out", str(tmp_path / "none"), *SMALL]) == 2
    assert (
        capsys.readouterr()
        .err.splitlines()[-1]
        .endswith("set data.column to one of story, or use --modality bytes for the file as it is")
    )
    assert not (tmp_path / "none").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux for the peak of memory")
def test_memory_is_for_a_part_of_the_file(tmp_path: Path) -> None:
    """Of 160 MB, the last seven eighths take little more memory than the first."""
    letters = np.random.default_rng(0).integers(97, 123, (8000, 20_000), np.uint8)
    data = datasets.Dataset.from_dict({"text": [row.tobytes().decode() for row in letters]})
    data.to_parquet(tmp_path / "big.parquet", batch_size=100)
    program = """
        import re, sys
        from perceiver_ar.data.rows import find_rows
        from perceiver_ar.data.sources import find_files
        [source], peaks = find_rows(find_files(sys.argv[1]), "text"), []
        for number, (_, document) in enumerate(source.documents(None), 1):
            assert sum(map(len, document)) == 20_000
            if number in (1000, 8000):
                peaks.append(int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]))
        print(peaks[1] - peaks[0])
    """
    command = [sys.executable, "-c", textwrap.dedent(program), str(tmp_path / "big.parquet")]
    assert int(subprocess.run(command, capture_output=True, text=True, check=True).stdout) < 70_000  # kB

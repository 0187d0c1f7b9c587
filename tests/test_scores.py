"""Scores of documents and tokens: together they are what `evaluate` says; tables and pictures hold them."""

import csv
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import assert_refused
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from samples import write_music, write_numbers, write_picture

from perceiver_ar import PerceiverAR, PerceiverARConfig, evaluate
from perceiver_ar.cli import main
from perceiver_ar.data.codec import Codec
from perceiver_ar.data.codec_file import save_codec
from perceiver_ar.data.genome import NucleotideCodec, find_records
from perceiver_ar.data.image import ImageCodec
from perceiver_ar.data.integers import IntegerCodec
from perceiver_ar.data.midi import PerformanceCodec
from perceiver_ar.data.text import BytesCodec, train_bpe
from perceiver_ar.data.tokens import find_files, prepare_all
from perceiver_ar.errors import InputError
from perceiver_ar.scores import DocumentScores, compare, score_documents, sign_flip_test

TEXTS = ["It was a dark and stormy night.\n" * 3, "ä", "the €uro, the cät, " * 9, "A new day.\n"]


def network(codec: Codec, seed: int = 0) -> PerceiverAR:
    torch.manual_seed(seed)
    config = PerceiverARConfig(context_length=32, num_latents=8, dim=16, num_layers=1, num_heads=2)
    return PerceiverAR(codec.fit(config)).eval()


def make_run(path: Path, codec: Codec, seed: int = 0) -> Path:
    network(codec, seed).save_pretrained(path)
    save_codec(codec, path)
    return path


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    folder = tmp_path / "texts"
    folder.mkdir()
    for number, text in enumerate(TEXTS):
        (folder / f"{number}.txt").write_text(text)
    return folder


def scored(codec: Codec, files: Path, folder: Path, seed: int = 0) -> DocumentScores:
    file, names = prepare_all(find_files(files), codec, folder / "tokens")
    return score_documents(network(codec, seed), codec, file, names, batch_size=3)


def write_all(folder: Path, write: Any, ending: str) -> Path:
    folder.mkdir()
    for number in range(3):
        write(folder / f"{number}{ending}", number)
    return folder


@pytest.mark.parametrize("kind", ["text", "any bytes", "bpe", "integers", "music", "pictures"])
def test_documents_and_tokens_add_up_to_the_evaluation(kind: str, tmp_path: Path, texts: Path) -> None:
    files, codec = texts, BytesCodec(text=kind == "text")
    if kind == "bpe":
        codec = train_bpe(TEXTS, 280)
    elif kind == "integers":
        files, codec = write_all(tmp_path / "files", write_numbers, ".npy"), IntegerCodec(40)
    elif kind == "music":
        files, codec = write_all(tmp_path / "files", write_music, ".mid"), PerformanceCodec()
    elif kind == "pictures":
        files, codec = write_all(tmp_path / "files", write_picture, ".png"), ImageCodec(6, 6)
    scores = scored(codec, files, tmp_path)
    settings = {"document_length": codec.document_length, "byte_lengths": codec.byte_lengths()}
    whole = evaluate(network(codec), scores.ids, **settings)
    bits = whole.bits_per_token * whole.tokens
    assert sum(row["tokens"] for row in scores.rows) == whole.tokens
    assert math.fsum(row["bits"] for row in scores.rows) == pytest.approx(bits, abs=1e-9)
    tokens = list(scores.token_rows())
    assert len(tokens) == whole.tokens
    assert math.fsum(row["bits"] for row in tokens) == pytest.approx(bits, abs=1e-9)
    assert scores.names == [str(path) for path in sorted(files.iterdir())]
    if whole.bytes is not None:
        assert sum(row["bytes"] for row in scores.rows) == whole.bytes
    for number, row in enumerate(scores.rows):
        own = [token["bits"] for token in tokens if token["document"] == number]
        assert len(own) == row["tokens"] and math.fsum(own) == pytest.approx(row["bits"])


@pytest.mark.parametrize("bpe", [False, True])
def test_tokens_hold_the_bytes_of_the_file_at_their_places(bpe: bool, tmp_path: Path, texts: Path) -> None:
    scores = scored(train_bpe(TEXTS, 280) if bpe else BytesCodec(), texts, tmp_path)
    read = [bytearray() for _ in TEXTS]
    for row in scores.token_rows():
        assert row["byte"] == len(read[row["document"]])
        read[row["document"]] += row["bytes"]
    assert [data.decode() for data in read] == TEXTS


@pytest.mark.parametrize("ending", [".csv", ".jsonl", ".parquet"])
def test_tables_hold_what_was_scored(
    ending: str, tmp_path: Path, texts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, out = make_run(tmp_path / "run", BytesCodec()), tmp_path / f"s{ending}"
    assert main(["score", str(run), str(texts), "--out", str(out), "--tokens", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    read = [rows(out), rows(tmp_path / f"s-tokens{ending}")]
    scores = scored(BytesCodec(), texts, tmp_path)
    assert [float(row["bits"]) for row in read[0]] == pytest.approx([row["bits"] for row in scores.rows], abs=1e-6)
    assert [row["file"] for row in read[0]] == scores.names
    assert len(read[1]) == result["tokens"] == scores.evaluation.tokens
    euro = [row["bytes"] for row in read[1] if int(row["token"]) == "€".encode()[0]]
    assert euro == [b"\xe2" if ending == ".parquet" else r"\xe2"] * 9
    each = [row["bits"] / row["bytes"] for row in scores.rows]
    assert (result["unit"], result["documents"]) == ("byte", 4)
    assert result["mean_over_documents"] == pytest.approx(np.mean(each), abs=1e-6)


def rows(path: Path) -> list[dict[str, Any]]:
    if path.suffix == ".parquet":
        return pytest.importorskip("pyarrow.parquet").read_table(path).to_pylist()
    lines = path.read_text(encoding="utf-8").split("\n")
    return list(csv.DictReader(lines)) if path.suffix == ".csv" else [json.loads(line) for line in lines if line]


def test_two_runs_are_compared_on_the_same_documents(
    tmp_path: Path, texts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, other = BytesCodec(), train_bpe(TEXTS, 280)
    for name, codec in (("one", one), ("other", other)):
        make_run(tmp_path / name, codec)
    words = ["score", str(tmp_path / "one"), str(texts), "--against", str(tmp_path / "other")]
    assert main([*words, "--json", "--out", str(tmp_path / "s.csv")]) == 0
    found = json.loads(capsys.readouterr().out)["against"]
    own, its = (scored(codec, texts, tmp_path / name) for name, codec in (("a", one), ("b", other)))
    differences = own.bits_per("byte") - its.bits_per("byte")
    assert found["mean_difference"] == pytest.approx(differences.mean(), abs=1e-6)
    assert found["total"] == pytest.approx(its.evaluation.bits_per_byte, abs=1e-6)
    assert found["p_value"] == sign_flip_test(differences) == compare(own, its)["p_value"]
    assert found["documents_better"] == (differences < 0).sum()
    kept = [float(row["bits_against"]) for row in rows(tmp_path / "s.csv")]
    assert kept == pytest.approx([row["bits"] for row in its.rows], abs=1e-4)
    assert main(words) == 0
    assert f"p = {found['p_value']:.2g} " in capsys.readouterr().out


def test_documents_that_the_other_run_may_have_been_trained_on_are_reported(
    tmp_path: Path, texts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [make_run(tmp_path / name, BytesCodec()) for name in ("one", "other")]
    held_out = [texts / "0.txt"], [texts / "1.txt"]
    note = "other did not hold out the same documents: it may have been trained on these"
    for other, noted in zip(held_out, (False, True), strict=True):
        for run, paths in zip(runs, (held_out[0], other), strict=True):
            prepare_all(find_files(paths), BytesCodec(), run / "tokens" / "validation")
        assert main(["score", str(runs[0]), "--against", str(runs[1])]) == 0
        assert (note in capsys.readouterr().err) == noted


def test_a_run_is_as_good_as_itself(tmp_path: Path, texts: Path) -> None:
    scores = scored(BytesCodec(), texts, tmp_path)
    result = compare(scores, scores)
    assert (result["mean_difference"], result["documents_better"], result["p_value"]) == (0.0, 0, 1.0)


def test_runs_that_read_other_text_or_make_other_tokens_are_not_compared(tmp_path: Path) -> None:
    (tmp_path / "a.fa").write_text(">name\n" + "ACGT" * 20)
    file, names = prepare_all(find_records(find_files(tmp_path / "a.fa"), None)[0], NucleotideCodec(), tmp_path / "t")
    bases = score_documents(network(NucleotideCodec()), NucleotideCodec(), file, names)
    with pytest.raises(InputError, match=r"a\.fa has 80 bytes for one run and 86 for the other"):
        compare(bases, scored(BytesCodec(), tmp_path / "a.fa", tmp_path))
    pictures = write_all(tmp_path / "files", write_picture, ".png")
    grey, palette = ImageCodec(6, 6, "grey"), ImageCodec(6, 6, "palette", [[0, 0, 0], [255, 255, 255]])
    with pytest.raises(InputError, match="different tokens of these files"):
        compare(scored(grey, pictures, tmp_path), scored(palette, pictures, tmp_path))


def test_a_document_without_a_score_does_not_count(tmp_path: Path) -> None:
    for name, text in (("0", "a"), ("1", "bcd" * 9), ("2", "efg" * 9)):
        (tmp_path / name).write_text(text)
    files = [tmp_path / "0", tmp_path / "1", tmp_path / "2"]
    file, names = prepare_all(find_files(files), BytesCodec(text=False), tmp_path / "t")
    scores = score_documents(network(BytesCodec()), BytesCodec(text=False), file, names)
    assert (scores.rows[0]["tokens"], scores.rows[0]["bits_per_byte"]) == (0, None)
    each = [row["bits_per_byte"] for row in scores.rows[1:]]
    assert (scores.summary()["unit"], scores.summary()["documents"]) == ("byte", 3)
    assert scores.summary()["mean_over_documents"] == pytest.approx(np.mean(each))
    assert compare(scores, scores)["p_value"] == 1.0


def test_the_p_value_is_the_share_of_signs_as_far_from_zero() -> None:
    assert sign_flip_test(np.ones(5)) == 2 / 32
    assert sign_flip_test(np.array([1.0, -1.0])) == 1.0
    assert sign_flip_test(np.array([3.0, 1.0, 1.0])) == 2 / 8


@given(st.lists(st.floats(-1, 1), min_size=1, max_size=12))
def test_drawn_signs_are_near_all_signs(differences: list[float]) -> None:
    values = np.array(differences)
    assert sign_flip_test(values, draws=2000, seed=1) == pytest.approx(sign_flip_test(values, draws=4096), abs=0.06)


def test_pictures_show_where_the_bits_are(tmp_path: Path) -> None:
    def drawn(codec: Codec, file: Path, heavy: int) -> np.ndarray:
        ids = np.concatenate(list(codec.encode_stream([file.read_bytes()], str(file))))
        ids = ids[1:] if codec.document_length else ids
        bits = np.zeros(len(ids))
        bits[np.flatnonzero(ids < 128)[heavy]] = 9.0  # a character, the start of a note, a dark value
        codec.draw_bits(ids, bits, tmp_path / "out.png")
        return np.asarray(Image.open(tmp_path / "out.png").convert("L"), dtype=float)

    (tmp_path / "a.txt").write_text("one €uro\n\ttwo " + "and more " * 40)
    write_music(tmp_path / "a.mid", 1)
    write_picture(tmp_path / "a.png", 1)
    for codec, name in ((BytesCodec(), "a.txt"), (PerformanceCodec(), "a.mid"), (ImageCodec(6, 6), "a.png")):
        first, last = (drawn(codec, tmp_path / name, heavy) for heavy in (3, -2))
        assert first.shape == last.shape and (first != last).any()


def test_bad_input_is_refused(tmp_path: Path, texts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "run", BytesCodec())
    words = ("score", run, texts)
    assert_refused(capsys, *words, "--out", "s.txt", says="--out is s.txt: its name must end in .csv, .jsonl or")
    assert_refused(capsys, *words, "--out", texts, says="is a folder")
    assert_refused(capsys, *words, "--tokens", says="give --out, too")
    assert_refused(capsys, *words, "--picture", "s.jpg", says="--picture is s.jpg: its name must end in .png")
    assert_refused(capsys, *words, "--against", tmp_path / "no", says="no such run")
    assert_refused(capsys, "score", run, says="held nothing out")
    read = "is among the files that are read: name another file"
    out, tokens, picture = (texts / name for name in ("a.csv", "b-tokens.csv", "c.png"))
    for path in (out, tokens, picture):
        path.write_bytes(b"mine")
    assert_refused(capsys, *words, "--out", out, says=f"--out {out} {read}")
    assert_refused(capsys, *words, "--out", texts / "b.csv", "--tokens", says=f"--tokens {tokens} {read}")
    assert_refused(capsys, *words, "--picture", picture, says=f"--picture {picture} {read}")
    assert_refused(capsys, "embed", run, texts / "a.*", "--out", out, says=f"--out {out} {read}")
    for path in (out, tokens, picture):
        assert path.read_bytes() == b"mine"
        path.unlink()
    assert_refused(capsys, *words, "--stride", "9", says="stride is 9")
    numbers = make_run(tmp_path / "numbers", IntegerCodec(40))
    write_numbers(tmp_path / "a.npy", 0)
    out = tmp_path / "p.png"
    assert_refused(capsys, "score", numbers, tmp_path / "a.npy", "--picture", out, says="'integers' have no picture")
    assert not out.exists()

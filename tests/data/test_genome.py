"""Genomes: FASTA and FASTQ as records, regions held out, bases and k-mers as ids."""

import gzip
import json
import re
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from helpers import SMALL, assert_refused, write_files
from hypothesis import given
from hypothesis import strategies as st

from perceiver_ar import Run
from perceiver_ar.cli import main
from perceiver_ar.data.codec import WrongModality
from perceiver_ar.data.codec_file import load_codec, save_codec
from perceiver_ar.data.genome import NucleotideCodec, _with_line_feeds, find_records, merged
from perceiver_ar.data.sources import find_files
from perceiver_ar.data.tokens import TokenFile, prepare
from perceiver_ar.errors import InputError

CODEC = NucleotideCodec()
kmers = st.integers(1, 4)
sequences = st.binary(max_size=60).map(lambda data: bytes(b"ACGTN"[byte % 5] for byte in data))


def reverse_complement(bases: bytes) -> bytes:
    return bases[::-1].translate(bytes.maketrans(b"ACGT", b"TGCA"))


def documents(tokens: TokenFile | None, codec: NucleotideCodec = CODEC) -> list[bytes]:
    assert tokens is not None
    (separator,) = codec.separator
    starts = np.flatnonzero(np.asarray(tokens.tokens) == separator)
    return [codec.decode(part) for part in np.split(np.asarray(tokens.tokens), starts)[1:]]


def prepared(
    tmp_path: Path, files: dict[str, bytes], validation: list[str] | None = None
) -> tuple[list[bytes], list[bytes]]:
    """The training and the validation documents."""
    folder = write_files(tmp_path / "data", files)
    names = [folder / name for name in files if name not in (validation or [])]
    held_out = None if validation is None else find_files([folder / name for name in validation])
    sources, held_out = find_records(find_files(names), held_out)
    train, kept = prepare(sources, CODEC, tmp_path / "out", validation_sources=held_out, validation_fraction=0)
    return documents(train), [] if kept is None else documents(kept)


@given(kmer=kmers, bases=sequences, cuts=st.lists(st.integers(0, 60), max_size=4))
def test_every_sequence_comes_back_wherever_it_is_cut(kmer: int, bases: bytes, cuts: list[int]) -> None:
    codec = NucleotideCodec(kmer)
    ids = codec.encode(bases)
    assert codec.decode(ids) == bases
    assert codec.num_bytes(ids) == codec.amounts(ids)["base"] == len(bases)
    edges = [0, *sorted(cuts), len(bases)]
    pieces = codec.encode_stream((bases[start:end] for start, end in pairwise(edges)), "x")
    assert np.concatenate(list(pieces)).tolist() == ids.tolist()


@given(kmer=kmers, bases=sequences)
def test_the_other_strand_is_the_reverse_complement_with_documents_apart(kmer: int, bases: bytes) -> None:
    codec = NucleotideCodec(kmer)
    ids = np.concatenate([codec.encode(bases), codec.separator, codec.encode(b"ACG")]).astype(codec.dtype)
    variants = {codec.decode(codec.augment(ids, np.random.default_rng(seed))) for seed in range(20)}
    assert variants == {bases + b"ACG", b"CGT" + reverse_complement(bases)}
    other = codec._complement[ids[::-1]]
    assert np.array_equal(codec._complement[other[::-1]], ids)


def test_letters_follow_the_stated_rule() -> None:
    assert CODEC.decode(CODEC.encode(b"acgtnU uRYSWKMBDHV\n")) == b"ACGTNTTNNNNNNNNNN"
    for wrong in (b"ACGE", b"AC-GT", b"MKVL*"):
        with pytest.raises(WrongModality, match="no nucleotide sequence"):
            CODEC.encode(wrong)


def test_a_prompt_may_be_a_file_with_one_record_and_a_document_is_written_as_one() -> None:
    written = CODEC.file_of(b"ACGT" * 50)
    assert written == b">generated\n" + b"ACGT" * 20 + b"\n" + b"ACGT" * 20 + b"\n" + b"ACGT" * 10 + b"\n"
    assert CODEC.decode(CODEC.encode(written)) == b"ACGT" * 50
    with pytest.raises(WrongModality, match="2 records"):
        CODEC.encode(written + written)


def test_records_are_documents_without_headers_and_line_ends(tmp_path: Path) -> None:
    files = {
        "a.fasta": b"\n>one first record\nACGT\nac\n\n>two\r\nGG\r\nTT\r\n>empty\n>three\nA\n>\nCC\nTT\n> four\nG",
        "b.fa.gz": gzip.compress(b">four\nTT\n") + gzip.compress(b">five\nCC\n"),  # members, as bgzip writes them
        "c.fastq": b"@r1 x\nACGTA\n+\n@>@II\n@r2\r\nGG\r\n+r2\r\n!!\r\n",
    }
    train, _ = prepared(tmp_path, files)
    assert train == [b"ACGTAC", b"GGTT", b"A", b"CCTT", b"G", b"TT", b"CC", b"ACGTA", b"GG"]


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"])
def test_lines_may_end_as_in_any_system(tmp_path: Path, end: bytes) -> None:
    files = {"a.fa": b">one\nACGT\nac\n\n>two\nGG\n", "b.fq": b"@r1 x\nACGTA\n+\n@>@II\n@r2\nGG\n+\n!!\n"}
    train, _ = prepared(tmp_path, {name: data.replace(b"\n", end) for name, data in files.items()})
    assert train == [b"ACGTAC", b"GG", b"ACGTA", b"GG"]


@given(data=st.lists(st.sampled_from([b"\r", b"\n", b"A"])).map(b"".join), cut=st.integers(1, 4))
def test_ends_of_lines_are_found_wherever_a_chunk_ends(data: bytes, cut: int) -> None:
    chunks = [data[start : start + cut] for start in range(0, len(data), cut)]
    assert b"".join(_with_line_feeds(chunks)) == data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")


def test_a_long_record_in_one_line_is_one_document(tmp_path: Path) -> None:
    bases = bytes(np.random.default_rng(0).choice(list(b"ACGT"), 3 << 20).astype(np.uint8))
    train, _ = prepared(tmp_path, {"a.fa": b">x\n" + bases})
    assert train == [bases]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.fa", b"ACGT\n", "begins with neither '>' nor '@'"),
        ("a.fa", b">p\nMKVLE\n", r"a\.fa, record p, is no nucleotide sequence"),
        ("a.fq", b"@r\nACGT\n+\nII\n", r"a\.fq, record r, is damaged, or not of four lines"),
        ("a.fq", b"@r\nAC\nGT\n+\nIIII\n", "not of four lines"),
        ("a.fa", b">x\n>y\n", "nothing in it|empty"),
    ],
)
def test_files_that_are_none_are_refused(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    with pytest.raises(InputError, match=message):
        prepared(tmp_path, {name: content})


def test_a_bed_file_holds_out_regions_and_whole_records(tmp_path: Path) -> None:
    files = {
        "a.fa": b">chr1\nAACC\nGGTT\n>track2\nACGT\n>chr3 x\nTTTT\n",
        "b.fa": b">other\nGAGA\n",
        "held.bed": b"# name start end\ntrack x\nchr1\t2\t4\tgene\nchr1\t3\t5\nchr1\t7\t99\ntrack2\n",
    }
    train, validation = prepared(tmp_path, files, ["held.bed"])
    assert train == [b"AA", b"GT", b"TTTT", b"GAGA"]
    assert validation == [b"CCG", b"T", b"ACGT"]


@pytest.mark.parametrize(
    ("bed", "message"),
    [
        (b"chr1\t5\t3\n", r"held\.bed, line 1: 'chr1\\t5\\t3' is no region; write NAME START END"),
        (b"chr1\tx\ty\n", "is no region"),
        (b"chr1 2\n", "is no region"),
        (b"# nothing\n", "has no regions"),
        (b"chrX 2 3\n", r"no record that the \.bed file names; its records are chr1, chr2"),
        (b"chr1 9 12\n", r"a\.fa is without a base in the regions of the \.bed file"),
        (b"chr1\nchr2\n", r"a\.fa is empty, or held out by the \.bed file as a whole"),
    ],
)
def test_a_bed_file_that_holds_out_nothing_or_all_is_refused(tmp_path: Path, bed: bytes, message: str) -> None:
    with pytest.raises(InputError, match=message):
        prepared(tmp_path, {"a.fa": b">chr1\nACGT\n>chr2\nA\n", "held.bed": bed}, ["held.bed"])


@given(st.lists(st.tuples(st.integers(0, 20), st.integers(1, 9)).map(lambda span: (span[0], sum(span)))))
def test_merged_regions_are_the_same_places(spans: list[tuple[int, int]]) -> None:
    places = {place for start, end in spans for place in range(start, end)}
    result = merged(spans)
    assert [place for start, end in result for place in range(start, end)] == sorted(places)
    assert all(end < start for (_, end), (start, _) in pairwise(result))


def test_a_saved_codec_is_the_same(tmp_path: Path) -> None:
    save_codec(NucleotideCodec(3), tmp_path)
    codec = load_codec(tmp_path)
    assert isinstance(codec, NucleotideCodec)
    assert codec.vocab_size == 4**3 + 6
    with pytest.raises(InputError, match=re.escape("data.kmer is 9: it must be in 1 ... 8")):
        NucleotideCodec(9)


def test_what_is_for_genomes_is_refused_with_other_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_files(tmp_path / "data", {"a.txt": b"ACGT" * 40, "held.bed": b"chr1\n"})
    words = ["train", folder / "a.txt", "--out", tmp_path / "run"]
    assert_refused(capsys, *words, "--data.kmer=2", says="data.kmer is for genomes, but the files are text")
    held_out = f"--data.validation={folder / 'held.bed'}"
    assert_refused(capsys, *words, held_out, says="held.bed in data.validation is for genomes, but the files are")
    (folder / "a.fa").write_text(">a\n" + "ACGT" * 40)
    words[1] = folder / "a.fa"
    column = "data.column is bases, for rows and tar files of text, but the files are genome"
    assert_refused(capsys, *words, "--data.column=bases", says=column)


def test_a_genome_is_trained_on_measured_and_continued(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    random = np.random.default_rng(0)
    bases = {name: bytes(random.choice(list(b"ACGT"), 600).astype(np.uint8)) for name in ("chr1", "chr2")}
    files = {"g.fa.gz": gzip.compress(b"".join(b">%b\n%b\n" % (name.encode(), bases[name]) for name in bases))}
    folder = write_files(tmp_path / "data", files | {"held.bed": b"chr2 100 300\nchrX\n", "start.fa": b">x\nACG\n"})
    run, out = str(tmp_path / "run"), tmp_path / "new.fa"
    argv = ["train", str(folder / "g.fa.gz"), "--out", run, "--data.kmer=2", "--max_steps=2", *SMALL]
    assert main([*argv, f"--data.validation={folder / 'held.bed'}"]) == 0
    assert "names records that are in no file, so they are not held out: chrX" in capsys.readouterr().err
    summary = Run(run).summary()
    assert summary is not None and summary["scored_bases"] == 200 and summary["held_out_documents"] == 1
    assert summary["bits_per_base"] == pytest.approx(summary["bits_per_byte"])
    capsys.readouterr()
    assert main(["evaluate", run, str(folder / "g.fa.gz"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["scored_bases"] == 1200
    prompt = ["--prompt_file", str(folder / "start.fa"), "--max_new_tokens=9", "--ignore_end", "--out", str(out)]
    assert main(["generate", run, *prompt]) == 0
    assert out.read_bytes().startswith(b">generated\n") and set(out.read_bytes()[11:]) <= set(b"ACGTN\n")
    again = ["train", str(folder / "g.fa.gz"), "--init_from", run, "--out", str(tmp_path / "more"), "--max_steps=1"]
    assert main([*again, *SMALL[-7:-1]]) == 0

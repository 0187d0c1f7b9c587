"""Text codecs give back exactly what they were given, whole or streamed, and count its bytes exactly."""

import os
import random
import re
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from perceiver_ar.data.codec import WrongModality
from perceiver_ar.data.text import (
    LONG_WORDS,
    WORD,
    BytesCodec,
    OffsetBytesCodec,
    TokenizerCodec,
    Utf8Stream,
    _short_words,
    text_pieces,
    train_bpe,
)
from perceiver_ar.errors import InputError

SAMPLE = Path(tempfile.__file__).read_text()  # some real text
BPE = train_bpe([SAMPLE], 600)
CODECS = {
    "text": BytesCodec(),
    "bytes": BytesCodec(text=False),
    "offset_bytes": OffsetBytesCodec(reserved=3, start_id=2),
    "tokenizer": BPE,
}


def chunked(data: bytes, sizes: list[int]) -> list[bytes]:
    """`data` cut into chunks of these sizes, over and over."""
    chunks = []
    while data:
        size = sizes[len(chunks) % len(sizes)]
        chunks.append(data[:size])
        data = data[size:]
    return chunks


@pytest.mark.parametrize("name", CODECS)
@settings(max_examples=60, deadline=None)
@given(text=st.text(), sizes=st.lists(st.integers(1, 5), min_size=1))
def test_round_trip_whole_and_streamed(name, text, sizes):
    codec = CODECS[name]
    data = (text.replace("\0", "") if name == "text" else text).encode()
    ids = codec.encode(data)
    assert ids.dtype == codec.dtype and codec.decode(ids) == data
    assert codec.num_bytes(ids) == len(data)
    pieces = list(codec.encode_stream(chunked(data, sizes), "x"))
    assert codec.decode([i for piece in pieces for i in piece]) == data


@given(st.binary())
def test_bytes_modality_takes_any_bytes(data):
    codec = CODECS["bytes"]
    assert codec.decode(codec.encode(data)) == data and codec.num_bytes(codec.encode(data)) == len(data)


@given(st.lists(st.integers(0, BPE.vocab_size - 1)))
def test_any_ids_decode_to_as_many_bytes_as_are_counted(ids):
    assert len(BPE.decode(ids)) == BPE.num_bytes(ids) == sum(len(BPE.decode([i])) for i in ids)
    small = [i % 256 for i in ids]
    assert len(BytesCodec().decode(small)) == BytesCodec().num_bytes(small)


def test_offset_bytes_leave_room_for_special_ids():
    codec = OffsetBytesCodec(reserved=6)
    assert codec.vocab_size == 262 and codec.dtype == np.uint16 and codec.separator == ()
    assert codec.encode(b"\0a\xff").tolist() == [6, 103, 261]
    assert codec.decode([0, 103, 5, 261]) == b"a\xff" and codec.num_bytes([0, 103, 5, 261]) == 2
    assert OffsetBytesCodec(reserved=3, start_id=2).separator == (2,)


@pytest.mark.parametrize(
    ("chunks", "where"),
    [
        ([b"ab\xff"], "byte 0xff at offset 2"),
        ([b"abc\xc3", b"(d"], "byte 0xc3 at offset 3"),
        ([b"ab", b"c\xe2\x82"], "byte 0xe2 at offset 3"),
        ([b"a\xe2", b"\x82", b"\xac\x80"], "byte 0x80 at offset 4"),
        ([b"\xc3\xa4b", b"c\0"], "byte 0x00 at offset 4"),
    ],
)
def test_what_is_no_text_is_refused_by_byte_and_offset(chunks, where):
    remedy = (
        "use --modality bytes or a tokenizer" if b"\0" in chunks[-1] else "save it as UTF-8, or use --modality bytes"
    )
    with pytest.raises(WrongModality, match=rf"^some file is not UTF-8 text \({where}\); {remedy}$"):
        list(BytesCodec().encode_stream(chunks, "some file"))
    if b"\0" not in chunks[-1]:
        with pytest.raises(WrongModality, match=where):
            list(BPE.encode_stream(chunks, "some file"))


def test_encoded_prompts_can_be_written_to():
    assert BytesCodec().encode(b"abc").flags.writeable


@given(st.text(alphabet=st.sampled_from("ab \n\u00e4"), max_size=300), st.integers(1, 40))
def test_pieces_are_the_text_and_no_longer_than_asked(text, size):
    pieces = list(text_pieces(chunked(text.encode(), [7]), "x", size))
    assert "".join(pieces) == text and all(0 < len(piece) <= size for piece in pieces)


def test_cutting_at_lines_changes_no_ids():
    lines = "".join(line for line in SAMPLE.splitlines(keepends=True) if line[0] not in " \n")
    pieces = list(text_pieces([lines.encode()], "x", size=400))
    assert len(pieces) > 5
    cut = [i for piece in pieces for i in BPE.encode(piece.encode()).tolist()]
    assert cut == BPE.encode(lines.encode()).tolist()


def test_train_bpe_is_lossless_and_repeatable():
    again = train_bpe((piece.encode() for piece in text_pieces([SAMPLE.encode()], "x", 1000)), 600)
    assert BPE.vocab_size == 600 and BPE.dtype == np.uint16
    assert train_bpe([SAMPLE], 600).tokenizer.to_str() == BPE.tokenizer.to_str()
    assert again.decode(again.encode(SAMPLE.encode())) == SAMPLE.encode()
    assert len(BPE.encode(SAMPLE.encode())) < len(SAMPLE) / 2
    assert train_bpe(["ab"], 5000).vocab_size == 258  # no more to be learned
    with pytest.raises(InputError, match="vocab_size 256 is too small"):
        train_bpe([SAMPLE], 256)


GENOME = """
import random, sys
from perceiver_ar.data.text import train_bpe

train_bpe(["".join(random.Random(0).choices("ACGT", k=1_000_000))], int(sys.argv[1]))
"""


def test_a_tokenizer_is_trained_on_text_without_spaces():
    """One word of 1 MB, whole, takes a quarter of an hour."""
    subprocess.run([sys.executable, "-c", GENOME, "270"], check=True, timeout=120)


def test_an_interrupt_ends_the_training_of_a_tokenizer():
    """This one would take many minutes; a terminal shows when it can no longer stop by itself."""
    ours, theirs = os.openpty()
    environment = {**os.environ, "TERM": "xterm"}  # without it the progress bar hides
    command = [sys.executable, "-c", GENOME, "1000000"]
    process = subprocess.Popen(command, stdout=theirs, stderr=theirs, env=environment)
    os.close(theirs)
    shown = b""
    while b"merges" not in shown:
        assert select.select([ours], [], [], 120)[0], shown
        shown += os.read(ours, 1 << 16)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == -signal.SIGINT
    os.close(ours)


def test_an_interrupt_ends_the_reading_of_text_for_a_tokenizer():
    read = 0

    def texts() -> Iterator[str]:
        nonlocal read
        while True:
            read += 1
            yield "some words, over and over"

    timer = threading.Timer(0.2, signal.pthread_kill, (threading.get_ident(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        train_bpe(texts(), 300)
    until_then = read
    time.sleep(0.1)
    assert read == until_then


@pytest.mark.parametrize("letters", ["ACGT", " \n", "a b"])
def test_words_that_a_tokenizer_is_trained_on_are_short(letters):
    text = "".join(random.Random(0).choices(letters, k=10_000))
    pieces = list(_short_words([text, "x" * (WORD + 1), "one two"]))
    assert "".join(pieces) == text + "x" * (WORD + 1) + "one two"
    assert max(len(word) for piece in pieces for word in re.findall(r"\S+|\s+", piece)) <= WORD


def test_only_so_much_text_without_spaces_makes_a_tokenizer():
    pieces = list(_short_words(["ACGT" * LONG_WORDS, "one two"]))
    assert LONG_WORDS <= sum(map(len, pieces)) <= LONG_WORDS + 2 * WORD and pieces[-1] == "one two"


def test_special_tokens_are_not_made_from_text():
    (end,) = BPE.separator
    ids = BPE.encode(b"a<|endoftext|>b")
    assert end not in ids and BPE.decode(ids) == b"a<|endoftext|>b"
    assert BPE.decode([end, *ids, end]) == b"a<|endoftext|>b" and BPE.num_bytes([end]) == 0


def test_a_saved_tokenizer_with_dropout_encodes_without():
    settings = BPE.tokenizer.to_str().replace('"dropout":null', '"dropout":0.5')
    assert settings != BPE.tokenizer.to_str()
    codec = TokenizerCodec(Tokenizer.from_str(settings))
    assert codec.encode(SAMPLE.encode()).tolist() == BPE.encode(SAMPLE.encode()).tolist()


def test_what_a_saved_tokenizer_adds_cuts_or_pads_is_left_out():
    tokenizer = Tokenizer.from_str(BPE.tokenizer.to_str())
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=10)
    tokenizer.add_tokens(["\u00fcber"])
    data = "def f(x): ich bin \u00fcberall".encode()
    codec = TokenizerCodec(tokenizer)
    assert codec.decode(codec.encode(data)) == data and codec.num_bytes(codec.encode(data)) == len(data)


def byte_level(**changes) -> Tokenizer:
    tokenizer = Tokenizer.from_str(BPE.tokenizer.to_str())
    for name, value in changes.items():
        setattr(tokenizer, name, value)
    return tokenizer


@pytest.mark.parametrize(
    ("tokenizer", "message"),
    [
        (byte_level(normalizer=normalizers.Lowercase()), "does not decode to the"),
        (byte_level(normalizer=normalizers.NFKC()), "does not decode to the"),
        (byte_level(normalizer=normalizers.Strip()), "does not decode to the"),
        (byte_level(pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=True)), "does not decode to the"),
        (byte_level(decoder=decoders.WordPiece()), "is not byte-level"),
        (Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]")), "is not byte-level"),
    ],
)
def test_lossy_tokenizers_are_refused(tmp_path, tokenizer, message):
    path = tmp_path / "tokenizer.json"
    tokenizer.save(str(path))
    with pytest.raises(InputError, match=message) as error:
        TokenizerCodec.from_file(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_a_tokenizer_that_composes_characters_is_accepted():
    codec = TokenizerCodec(byte_level(normalizer=normalizers.NFC()))
    assert codec.decode(codec.encode("e\u0301".encode())).decode() == "\u00e9"


def test_what_is_no_tokenizer_file_is_named(tmp_path):
    (tmp_path / "a.json").write_text('{"hello": 1}')
    (tmp_path / "b.json").write_bytes(b"\xff")
    for name in ("a.json", "b.json"):
        with pytest.raises(InputError, match=rf"{name} is not a tokenizer\.json"):
            TokenizerCodec.from_file(tmp_path / name)
    with pytest.raises(InputError, match=r"cannot read the tokenizer .*c\.json: No such file"):
        TokenizerCodec.from_file(tmp_path / "c.json")


@given(st.text(), st.binary(max_size=20))
def test_a_stream_shows_whole_characters(text, other):
    stream = Utf8Stream()
    shown = [stream.push(bytes([byte])) for byte in text.encode()]
    assert "".join(shown) + stream.close() == text and all(len(part) <= 1 for part in shown)
    stream = Utf8Stream()
    parts = [stream.push(bytes([byte])) for byte in other]
    assert "".join(parts) + stream.close() == other.decode(errors="replace")

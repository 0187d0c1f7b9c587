"""A codec saved in a run directory comes back the same, and what is wrong with one is said in one line."""

import json

import numpy as np
import pytest

from perceiver_ar.data.codec import Codec, WrongModality, row_prompt_and_count
from perceiver_ar.data.codec_file import load_codec, save_codec
from perceiver_ar.data.text import BytesCodec, train_bpe
from perceiver_ar.errors import InputError


class Hexadecimal(Codec):
    """The smallest codec: two ids per byte."""

    name = "hexadecimal"
    vocab_size = 16

    def encode(self, data: bytes) -> np.ndarray:
        if data.startswith(b"#"):
            raise WrongModality("starts with #")
        return np.array([int(digit, 16) for digit in data.hex()], dtype=self.dtype)

    def decode(self, ids) -> bytes:
        return bytes.fromhex("".join(f"{i:x}" for i in np.asarray(ids).tolist()))

    def byte_lengths(self) -> np.ndarray:
        return np.zeros(16, dtype=np.int64)


@pytest.mark.parametrize("text", [True, False])
def test_bytes_codec_comes_back(tmp_path, text):
    save_codec(BytesCodec(text=text), tmp_path / "run")
    codec = load_codec(tmp_path / "run")
    assert isinstance(codec, BytesCodec)
    assert codec.text is text and codec.separator == ((0,) if text else ())
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["codec.json"]


def test_tokenizer_codec_comes_back(tmp_path):
    codec = train_bpe(["the cat and the hat and the bat"] * 3, 300)
    save_codec(codec, tmp_path)
    again = load_codec(tmp_path)
    assert again.vocab_size == codec.vocab_size and again.separator == codec.separator
    assert again.encode(b"the rat").tolist() == codec.encode(b"the rat").tolist()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["codec.json", "tokenizer.json"]


@pytest.mark.parametrize(("vocab_size", "dtype"), [(2, "uint8"), (256, "uint8"), (257, "uint16"), (1 << 17, "uint32")])
def test_dtype_is_the_smallest_that_holds_every_id(vocab_size, dtype):
    codec = Hexadecimal()
    codec.vocab_size = vocab_size
    assert codec.dtype == dtype


def test_a_codec_that_only_knows_whole_documents_is_streamed_whole():
    (ids,) = Hexadecimal().encode_stream([b"a", b"", b"bc"], "x")
    assert ids.tolist() == Hexadecimal().encode(b"abc").tolist()
    with pytest.raises(WrongModality, match=r"^some\.hex: starts with #$"):
        list(Hexadecimal().encode_stream([b"#", b"1"], "some.hex"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is damaged"),
        ("[]", "is damaged"),
        ('"x"', "is damaged"),
        ("{}", "is damaged"),
        (json.dumps({"codec": "bytes", "settings": {"colour": 1}}), "is damaged"),
        (json.dumps({"codec": "bytes", "settings": None}), "is damaged"),
        (json.dumps({"codec": ["bytes"], "settings": {}}), "known are"),
        (json.dumps({"codec": "os:system", "settings": {}}), "known are bytes, .*tokenizer"),
        (json.dumps({"codec": "image", "settings": {"rows": 0, "columns": 4}}), "is damaged"),
        (json.dumps({"codec": "image", "settings": {"rows": "4", "columns": 4}}), "is damaged"),
        (json.dumps({"codec": "image", "settings": {"rows": 4, "columns": 4, "palette": [[1, 2]]}}), "is damaged"),
        (json.dumps({"codec": "image", "settings": {"rows": 4, "columns": 4, "palette": [[300, 0, 0]]}}), "is damaged"),
        (json.dumps({"codec": "mulaw", "settings": {"sample_rate": 0}}), "is damaged .sample_rate is 0"),
        (json.dumps({"codec": "integers", "settings": {"num_values": -1}}), "is damaged .num_values is -1"),
        (json.dumps({"codec": "tokenizer", "settings": {}}), "cannot read the tokenizer"),
    ],
)
def test_a_damaged_codec_is_one_clear_line(tmp_path, content, message):
    (tmp_path / "codec.json").write_text(content)
    with pytest.raises(InputError, match=message) as error:
        load_codec(tmp_path)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_a_missing_codec_is_named(tmp_path):
    with pytest.raises(InputError, match=r"codec\.json does not exist: .* is not a run directory"):
        load_codec(tmp_path / "nowhere")


@pytest.mark.parametrize(("keep", "kept"), [(None, 10), (0.5, 5), (0.01, 1), (3, 3), (1, 1)])
def test_of_a_prompt_a_share_or_a_number_of_tokens_is_kept_and_never_none(keep, kept):
    document = np.arange(1, 11)
    row, prompt, count = row_prompt_and_count(Hexadecimal(), document, keep, 7, None, 100)
    assert row.tolist() == prompt.tolist() == document[:kept].tolist() and count == 7

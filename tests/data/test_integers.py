"""Arrays of integers come back exactly; anything else is one clear line."""

import io
import re
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from perceiver_ar.data.codec import WrongModality
from perceiver_ar.data.codec_file import load_codec, save_codec
from perceiver_ar.data.integers import IntegerCodec, count_values
from perceiver_ar.data.sources import find_files
from perceiver_ar.errors import InputError

CODEC = IntegerCodec(1000)


def archive_of(data: bytes, compression: int = zipfile.ZIP_STORED, name: str = "a.npy") -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        archive.writestr(name, data)
    return buffer.getvalue()


def changed(data: bytes, at: int, by: bytes) -> bytes:
    return data[:at] + by + data[at + len(by) :]


def file_of(array: object) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.asarray(array))
    return buffer.getvalue()


STORED = archive_of(file_of([1]))


@given(
    arrays.arrays(
        st.sampled_from([np.int64, np.uint16, np.int32]), arrays.array_shapes(max_dims=3), elements=st.integers(0, 999)
    )
)
def test_arrays_come_back_as_one_row(array: np.ndarray) -> None:
    ids = CODEC.encode(file_of(array))
    assert ids.tolist() == array.reshape(-1).tolist() == np.load(io.BytesIO(CODEC.decode(ids))).tolist()


@given(st.lists(st.integers(0, 1000)))
def test_any_ids_are_an_array(ids: list[int]) -> None:
    assert np.load(io.BytesIO(CODEC.decode(ids))).tolist() == [i for i in ids if i < 1000]


def test_the_arrays_of_an_npz_file_are_separated() -> None:
    buffer = io.BytesIO()
    np.savez(buffer, a=np.array([1, 2]), b=np.empty(0, int), c=np.array([[3], [4]]))
    assert CODEC.encode(buffer.getvalue()).tolist() == [1, 2, 1000, 3, 4]


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "no .npy or .npz"),
        (b"hello", "no .npy or .npz"),
        (file_of([1, 2, 3])[:-4], "no .npy or .npz"),
        (b"PK\x03\x04 no archive", "no .npy or .npz"),
        (file_of([0.5]), "float64, not of integers"),
        (file_of([-1, 5]), "-1 ... 5"),
        (file_of([2**40]), "ids are 0"),
        (file_of([1000]), "this codec knows 0 ... 999"),
        (file_of(np.array([{}], dtype=object)), "no .npy or .npz"),
        (archive_of(b"words", name="words.txt"), "does not hold arrays only"),
        (changed(archive_of(file_of(range(99)), zipfile.ZIP_DEFLATED), 35, b"\xff" * 9), "no .npy or .npz"),
        (changed(STORED, STORED.index(b"PK\x01\x02") + 8, b"\x01"), "encrypted"),
        (changed(STORED, STORED.index(b"PK\x01\x02") + 10, b"\x63"), "compression method"),
    ],
)
def test_what_is_no_array_of_ids_is_refused_in_one_line(data: bytes, says: str) -> None:
    with pytest.raises(WrongModality, match=says) as error:
        CODEC.encode(data)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("number", [0, -3, 2.5, "9", False])
def test_the_number_of_values_is_a_whole_one(number: Any) -> None:
    with pytest.raises(ValueError, match=re.escape(f"num_values is {number!r}: it must be")):
        IntegerCodec(number)


def test_the_vocabulary_is_counted_and_kept(tmp_path: Path) -> None:
    (tmp_path / "a.npy").write_bytes(file_of([1, 5]))
    (tmp_path / "b.npy").write_bytes(b"damaged")
    (tmp_path / "c.npy").write_bytes(file_of([70_000]))
    codec = IntegerCodec(count_values(find_files(tmp_path)))
    assert (codec.vocab_size, codec.separator, codec.dtype) == (70_002, (70_001,), np.uint32)
    save_codec(codec, tmp_path)
    assert load_codec(tmp_path).vocab_size == codec.vocab_size
    with pytest.raises(InputError, match=r"b\.npy: no .npy or .npz"):
        count_values(find_files(tmp_path / "b.npy"))
    with pytest.raises(InputError, match="no integers in these files"):
        count_values(find_files(str(tmp_path / "b.*")))

"""Any integers: arrays in .npy and .npz files, whose numbers are the ids."""

import io
from collections.abc import Iterable

import numpy as np
from numpy.typing import ArrayLike

from perceiver_ar.data.codec import Codec, WrongModality, check_positive
from perceiver_ar.data.sources import Source, read_documents
from perceiver_ar.errors import require

LARGEST = (1 << 31) - 2


def read_arrays(data: bytes) -> list[np.ndarray]:
    """The arrays of a .npy or .npz file, each as (n,). Raises `WrongModality` unless all numbers are integers >= 0."""
    if not data.startswith((b"\x93NUMPY", b"PK")):  # numpy would take it for a pickle
        raise WrongModality("no .npy or .npz file")
    try:
        content = np.load(io.BytesIO(data), allow_pickle=False)
        arrays = [content] if isinstance(content, np.ndarray) else [content[name] for name in content.files]
    except Exception as error:  # numpy and zipfile raise many kinds for damaged files
        reason = " ".join(str(error).split())
        raise WrongModality(f"no .npy or .npz file of numbers, or a damaged one ({reason})") from None
    for array in arrays:
        if not isinstance(array, np.ndarray):  # numpy returns other files of an archive as bytes
            raise WrongModality("an .npz file that does not hold arrays only")
        if array.dtype.kind not in "iu":
            raise WrongModality(f"an array of {array.dtype}, not of integers")
        if array.size and not (int(array.min()) >= 0 and int(array.max()) <= LARGEST):
            raise WrongModality(f"an array with {array.min()} ... {array.max()}: ids are 0 ... {LARGEST}")
    return [array.reshape(-1) for array in arrays]


class IntegerCodec(Codec):
    """Ids 0 ... num_values - 1 are themselves, in the order of the array's memory (rows first); the last id separates
    documents, and the arrays of an .npz file."""

    name = "integers"
    saved = ("num_values",)
    ending = ".npy"

    def __init__(self, num_values: int) -> None:
        check_positive(num_values=num_values)
        self.num_values = num_values
        self.vocab_size = num_values + 1
        self.separator = (num_values,)

    def encode(self, data: bytes) -> np.ndarray:
        arrays = [array for array in read_arrays(data) if array.size]
        if (largest := max((int(array.max()) for array in arrays), default=0)) >= self.num_values:
            raise WrongModality(f"an array with {largest}: this codec knows 0 ... {self.num_values - 1}")
        parts = [part for array in arrays for part in (np.array(self.separator), array)][1:]
        return np.concatenate([np.empty(0, self.dtype), *parts]).astype(self.dtype)

    def decode(self, ids: ArrayLike) -> bytes:
        """A .npy file with one array (n,)."""
        ids, buffer = np.asarray(ids), io.BytesIO()
        np.save(buffer, ids[ids < self.num_values].astype(self.dtype))
        return buffer.getvalue()


def count_values(sources: Iterable[Source]) -> int:
    """One more than the largest number in all files. Raises `InputError` for a named file that cannot be read, or if no
    file holds a number."""
    largest = -1
    for arrays in read_documents(sources, read_arrays):
        largest = max([largest, *(int(array.max()) for array in arrays if array.size)])
    require(largest >= 0, "no integers in these files; give .npy or .npz files of whole numbers from 0 on")
    return largest + 1

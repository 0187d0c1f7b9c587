"""Checkpoint files of other implementations, read without running anything in them.

A pickle is a program. Torch's own files are read by torch's restricted reader (`weights_only`). Google's checkpoints
are plain pickles: `read_dill` lets them build containers, numbers and arrays, from stand-ins of our own for the few
names that such files use, and refuses every other name.
"""

import io
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from perceiver_ar.errors import InputError, require

MANY = 8
"""Maximum number of names that an error lists; it counts the others."""


def listed(names: Sequence[str]) -> str:
    return ", ".join(names[:MANY]) + (f" and {len(names) - MANY} more" if len(names) > MANY else "")


def existing(path: Path) -> Path:
    require(path.exists(), f"{path}: no such file or directory")
    return path


def existing_file(path: Path) -> Path:
    require(not existing(path).is_dir(), f"{path} is a directory: give the checkpoint's file in it")
    return path


class StandIn:
    """Takes the place of a foreign object that weights do not need."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def read_torch(path: Path, stand_ins: str | None = None) -> Any:
    """Reads a file of `torch.save`, by torch's restricted reader, or of safetensors.

    numpy's scalars become numbers. Other `HARMLESS` objects, and those of the package `stand_ins`, become `StandIn`s.
    Raises InputError if it is missing, damaged, no torch file, or needs code to run, which the message names.
    """
    if path.suffix == ".safetensors":
        try:
            return load_file(existing_file(path))
        except SafetensorError as error:
            raise InputError(f"{path} is damaged ({error}): get it again") from None
    with open(existing_file(path), "rb") as file:
        try:
            foreign = torch.serialization.get_unsafe_globals_in_checkpoint(file)
        except Exception:  # not a zip file: a very old torch file, or none, which the reader reports
            foreign = list(HARMLESS)
        known = {name: HARMLESS[name] for name in foreign if name in HARMLESS}
        if stand_ins is not None:
            known |= {name: StandIn for name in foreign if name.startswith(f"{stand_ins}.")}
        if refused := sorted(set(foreign) - set(known)):
            raise InputError(
                f"{path} holds Python objects that only code could rebuild ({listed(refused)}), and code in files is "
                "not run: save the state dict alone, torch.save(model.state_dict(), ...), where it was written"
            )
        file.seek(0)
        try:
            with torch.serialization.safe_globals([(stand_in, name) for name, stand_in in known.items()]):
                return torch.load(file, map_location="cpu", weights_only=True)
        except Exception:  # torch's own message would advise to run the code
            raise InputError(
                f"{path} is damaged, or not of torch.save, or holds Python objects that only code could rebuild, and "
                "code in files is not run: get it again, or save the state dict alone where it was written"
            ) from None


def read_npz(path: Path) -> dict[str, np.ndarray]:
    """Raises InputError if the file is missing or damaged, or holds anything but arrays of numbers."""
    with open(existing_file(path), "rb") as file:
        try:
            with np.load(file, allow_pickle=False) as arrays:
                return {name: arrays[name] for name in arrays.files}
        except Exception as error:  # numpy and zipfile raise various errors for damaged files
            reason = " ".join(str(error).split())
            raise InputError(f"{path} is damaged or no .npz of plain arrays ({reason})") from None


def read_dill(path: Path) -> Any:
    """Reads a file of dill or pickle that consists of containers, numbers, strings and arrays alone.

    Raises InputError if it is missing, damaged, or names anything beyond `_ArrayUnpickler.KNOWN`.
    """
    data = existing_file(path).read_bytes()
    try:
        return _ArrayUnpickler(io.BytesIO(data)).load()
    except InputError as error:
        raise InputError(f"{path} {error}") from None
    except Exception as error:  # a damaged pickle may raise any error
        raise InputError(f"{path} is damaged or no pickle ({type(error).__name__}: {error})") from None


class _Array:
    """Stand-in of numpy.ndarray; becomes a real one when its state is set."""

    def __init__(self, *_args: Any) -> None:
        self.value: np.ndarray | None = None

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _version, shape, dtype, fortran, data = state
        self.value = _from_buffer(data, dtype, shape, "F" if fortran else "C").value


class _DType:
    """Stand-in of numpy.dtype: numbers only."""

    def __init__(self, name: str, *_args: Any) -> None:
        self.name, self.order = name, "="

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.order = state[1]

    def is_number(self) -> bool:
        return isinstance(self.name, str) and self.name.lstrip("<>=|") in _NUMBERS

    def real(self) -> np.dtype:
        require(self.is_number(), f"holds arrays of {self.name!r}: only numbers are read")
        return np.dtype(self.name).newbyteorder(self.order if self.order in ("<", ">") else "=")


_NUMBERS = {f"{kind}{size}" for kind in "iu" for size in (1, 2, 4, 8)} | {"f2", "f4", "f8", "b1"}


def _from_buffer(data: Any, dtype: _DType, shape: tuple[int, ...], order: str) -> _Array:
    array = _Array()
    array.value = np.frombuffer(bytes(data), dtype.real()).reshape(shape, order="F" if order == "F" else "C").copy()
    return array


def _scalar(dtype: _DType, data: Any) -> Any:
    """Stand-in of the function that makes numpy's scalars: returns plain numbers."""
    return np.frombuffer(data, dtype.real())[0].item() if dtype.is_number() else StandIn()


def _reconstruct_array(_function: Any, _args: Any, state: tuple[Any, ...], _aval: Any) -> _Array:
    array = _Array()
    array.__setstate__(state)
    return array


class _Named(tuple):
    """Stand-in of the named tuples of optax."""

    def __new__(cls, *values: Any) -> "_Named":
        return super().__new__(cls, values)


def _create_namedtuple(*_args: Any) -> type[_Named]:
    return _Named


class _Mapping(dict[Any, Any]):
    """Stand-in of haiku's FlatMapping."""


HARMLESS: dict[str, Any] = {
    # Objects in torch files beside weights (numbers, random states, options), and their replacements.
    "numpy.core.multiarray.scalar": _scalar,  # numpy 1
    "numpy._core.multiarray.scalar": _scalar,  # numpy 2
    "numpy.dtype": _DType,
    "numpy.core.multiarray._reconstruct": StandIn,
    "numpy._core.multiarray._reconstruct": StandIn,
    "numpy.ndarray": StandIn,
    "argparse.Namespace": StandIn,
    "pathlib.PosixPath": StandIn,
    "pathlib.WindowsPath": StandIn,
    "pathlib._local.PosixPath": StandIn,  # Python 3.13
}


class _ArrayUnpickler(pickle.Unpickler):
    """Knows only the names below, which stand for functions and classes of this file."""

    KNOWN = {  # noqa: RUF012
        ("numpy.core.multiarray", "_reconstruct"): _Array,
        ("numpy.core.numeric", "_frombuffer"): _from_buffer,  # the same in pickle protocol 5
        ("numpy.core.multiarray", "scalar"): _scalar,
        ("numpy", "ndarray"): _Array,
        ("numpy", "dtype"): _DType,
        ("jax._src.array", "_reconstruct_array"): _reconstruct_array,
        ("dill._dill", "_create_namedtuple"): _create_namedtuple,
        ("haiku._src.data_structures", "FlatMapping"): _Mapping,
    }

    def find_class(self, module: str, name: str) -> Any:
        known = self.KNOWN.get((module.replace("numpy._core", "numpy.core"), name))  # as in numpy 1
        if known is None:
            raise InputError(
                f"names {module}.{name}, which weights do not need, and code in files is not run: "
                "save the params alone as .npz, one array for each 'module/name'"
            )
        return known

"""Checkpoint files of other implementations: read without running anything in them, and their weights by our names.

A pickle is a program. Torch's own files are read by torch's restricted reader (`weights_only`). Google's checkpoints
are plain pickles: `read_dill` lets them build containers, numbers and arrays, from stand-ins of our own for the few
names that such files use, and refuses every other name.
"""

import dataclasses
import io
import pickle
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from perceiver_ar.config import PerceiverARConfig
from perceiver_ar.errors import InputError
from perceiver_ar.files import atomic_path
from perceiver_ar.network.model import PerceiverAR

MANY = 8
"""How many names an error lists before it only counts."""


class Weight(NamedTuple):
    """One parameter of ours, and the parameters of theirs that it holds, one above the other."""

    ours: str
    theirs: tuple[str, ...]
    rows: tuple[Tensor | None, ...] = ()
    """For each of `theirs`, which of its rows come in which order; None, or (): as they are."""

    def orders(self) -> Sequence[Tensor | None]:
        return self.rows or (None,) * len(self.theirs)


def to_ours(weights: Iterable[Weight], tensors: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """Their tensors under our names. Raises InputError that lists, in their names, what is missing or unknown.

    Warns of unknown integers: they are counters, not weights.
    """
    weights = list(weights)
    expected = [name for weight in weights for name in weight.theirs]
    missing = [name for name in expected if name not in tensors]
    others = sorted(set(tensors) - set(expected))
    counters = [name for name in others if not tensors[name].is_floating_point()]
    unknown = [name for name in others if name not in counters]
    if missing or unknown:
        parts = [f"{what}: {listed(names)}" for what, names in (("missing", missing), ("unknown", unknown)) if names]
        raise InputError(f"{where} does not hold the weights that its settings ask for: {'; '.join(parts)}")
    say_left_out(counters, where)
    ours = {}
    for weight in weights:
        parts = []
        for name, order in zip(weight.theirs, weight.orders(), strict=True):
            tensor = tensors[name]
            if not tensor.is_floating_point():
                raise InputError(f"{where}: {name} is of {tensor.dtype}: weights must be floating-point numbers")
            if order is not None and len(tensor) != len(order):
                raise InputError(f"{where}: {name} has {len(tensor)} rows, its settings ask for {len(order)}")
            parts.append(tensor if order is None else tensor[order])
        if len({part.shape[1:] for part in parts}) != 1:
            raise InputError(f"{where}: {' and '.join(weight.theirs)} have different widths")
        ours[weight.ours] = torch.cat(parts) if len(parts) > 1 else parts[0]
    return ours


def plain_tensors(model: PerceiverAR) -> dict[str, Tensor]:
    """What to write for others. Raises InputError where some weights are made of others."""
    tensors = model.stored_tensors()
    if replaced := [name for name in tensors if REPLACED.search(name)]:
        raise InputError(
            f"the model holds adapters, parametrizations or pruning ({listed(replaced)}): merge them into its weights, "
            "by peft's merge_and_unload, parametrize.remove_parametrizations or prune.remove"
        )
    return tensors


def to_theirs(weights: Iterable[Weight], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our tensors under their names: the inverse of `to_ours`."""
    theirs = {}
    for weight in weights:
        for name, part, order in zip(
            weight.theirs, tensors[weight.ours].chunk(len(weight.theirs)), weight.orders(), strict=True
        ):
            theirs[name] = (part if order is None else part[order.argsort()]).contiguous()
    return theirs


def from_interleaved(heads: int, channels: int, rotated: int) -> Tensor:
    """Rows of query and key projections in our order, where theirs turn the pairs (2j, 2j + 1) of each head.

    Ours are (j, j + rotated / 2). Scores do not change when queries and keys are reordered alike.
    """
    pairs = torch.arange(rotated // 2)
    one = torch.cat([2 * pairs, 2 * pairs + 1, torch.arange(rotated, channels)])
    return (one + channels * torch.arange(heads)[:, None]).flatten()


def rotated_channels(config: PerceiverARConfig, channels: int) -> int:
    """How many channels of a head are turned."""
    return 2 * int(config.rotary_fraction * channels / 2 + 1e-6)


def inverse_frequencies(rotated: int) -> Tensor:
    """The buffer `inv_freq` that torch implementations store."""
    return 1.0 / (10000 ** (torch.arange(0, rotated, 2).float() / rotated))


def rotary_settings(rotated: int, head_dim: int) -> dict[str, float]:
    """Our settings for `inverse_frequencies(rotated)` on heads of `head_dim` channels.

    An odd number has (rotated + 1) / 2 frequencies, so these implementations turn one channel more.
    """
    turned = rotated + rotated % 2
    return {"rotary_fraction": turned / head_dim, "rotary_base": 10000.0 ** (turned / rotated) if rotated else 10000.0}


def refuse_differences(ours: PerceiverARConfig, theirs: PerceiverARConfig, package: str) -> None:
    """Raises InputError naming the settings in which the function of `ours` differs from the nearest of `package`."""
    one, other = (_function(config) for config in (ours, theirs))
    if different := [f"{name} is {one[name]!r}, not {other[name]!r}" for name in one if one[name] != other[name]]:
        raise InputError(f"{package} cannot compute what this model does: {', '.join(different)}")


def _function(config: PerceiverARConfig) -> dict[str, Any]:
    """The settings that the function of weights and tokens depends on, with their defaults filled in."""
    settings = dataclasses.asdict(config) | {
        "head_dim": config.width_head,
        "embed_dim": config.width_embed,
        "cross_num_heads": config.heads_cross,
        "cross_head_dim": config.width_head_cross,
        "cross_mlp_ratio": config.cross_mlp_ratio or config.mlp_ratio,
        "index_dims": config.table_sizes,
        "rotary_fraction": rotated_channels(config, config.width_head) / config.width_head,
        "rotary_base": config.context_length if config.rotary_base is None else config.rotary_base,
        "rotary_layers": config.num_layers
        if config.rotary_layers is None
        else min(config.rotary_layers, config.num_layers),
    }
    without = "prefix_chunk", "prefix_dropout", "attention_dropout", "mlp_dropout", "init", "query_mlp_activation"
    for name in without:
        del settings[name]
    return settings


class LeftOut(UserWarning):
    """Names what a checkpoint holds beside the network, and what is therefore not read."""


def say_left_out(names: Sequence[str], where: str) -> None:
    if names:
        warnings.warn(f"{where}: left out {listed(names)}, not weights of the network", LeftOut, stacklevel=5)


WRAPPERS = re.compile(r"(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
"""What torch.compile, FSDP and activation checkpointing put into names, before any module's."""
REPLACED = re.compile(
    r"\.(?:parametrizations|base_layer|modules_to_save)\.|\.lora_|\.(?:weight|bias)_(?:g|v|orig|mask)$"
)
"""Names that weights have where adapters, parametrizations or pruning make them of others."""
OPTIMIZER = re.compile(r"(?:^|[^a-z])optim(?:izer)?s?(?:$|[^a-z])", re.IGNORECASE)


class Found(NamedTuple):
    """A state dict in a file."""

    depth: int
    place: str
    """The keys that lead to the mapping it is in."""
    tensors: dict[str, Tensor]
    """By their names without the prefix."""
    others: list[str]
    """What else is in the mapping."""


def find_state(content: Any, marker: str, package: str, where: str) -> dict[str, Tensor]:
    """The state dict in what `torch.save` saved, without the prefix before its parameter `marker`.

    It may be the whole content, an entry, or lie deeper where no entry is one; its names may have any prefix (net.,
    module., ema_model.). Warns of tensors beside it without the prefix: a criterion, counters of an average.

    Raises:
        InputError: there is none, or more than one, or some of its weights are made of others.
    """
    found: dict[str, Found] = {}
    mappings = list(_mappings(content))
    for depth, place, mapping in mappings:
        # What is no tensor has nothing to do with weights.
        tensors = {WRAPPERS.sub("", str(name)): x for name, x in mapping.items() if isinstance(x, Tensor)}
        for name in tensors:
            prefix = name.removesuffix(marker)
            if f".{name}".endswith(f".{marker}") and not OPTIMIZER.search(place + prefix):
                own = {key.removeprefix(prefix): x for key, x in tensors.items() if key.startswith(prefix)}
                others = [key for key in tensors if not key.startswith(prefix)]
                found[place + name] = Found(max(depth, 1), place, own, others)
    highest = min((state.depth for state in found.values()), default=0)
    found = {name: state for name, state in found.items() if state.depth == highest}
    searched = [state.tensors for state in found.values()] or [mapping for _, _, mapping in mappings]
    if replaced := [name for names in searched for name in map(str, names) if REPLACED.search(name)]:
        raise InputError(
            f"{where} holds weights that adapters, parametrizations or pruning make of others ({listed(replaced)}): "
            "merge them where it was written, then save the state dict"
        )
    if not found and any(OPTIMIZER.search(place) or "param_groups" in mapping for _, place, mapping in mappings):
        raise InputError(f"{where} holds an optimizer's state and no {marker}: give the file with the model's weights")
    if not found:
        raise InputError(f"{where} has no {marker}, so it is not of {package}")
    state, *more = found.values()
    if not all(other.place == state.place and _equal(other.tensors, state.tensors) for other in more):
        raise InputError(f"{where} holds several models ({listed(list(found))}): save the one you mean alone")
    say_left_out(state.others, where)
    return state.tensors


def _mappings(content: Any) -> Iterator[tuple[int, str, Mapping[Any, Any]]]:
    """Every mapping in `content`, itself included, with its depth and the keys that lead to it."""
    waiting, seen = [(0, "", content)], set[int]()
    for depth, place, value in waiting:
        if isinstance(value, Mapping | list | tuple) and id(value) not in seen:
            seen.add(id(value))
            entries = value.items() if isinstance(value, Mapping) else enumerate(value)
            waiting += [(depth + 1, f"{place}{key}: ", entry) for key, entry in entries]
            if isinstance(value, Mapping):
                yield depth, place, value


def _equal(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    """Whether two prefixes in a state dict are of one module."""
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]) for name in one
    )


def listed(names: Sequence[str]) -> str:
    return ", ".join(names[:MANY]) + (f" and {len(names) - MANY} more" if len(names) > MANY else "")


# Files.


def existing(path: Path) -> Path:
    if not path.exists():
        raise InputError(f"{path}: no such file or directory")
    return path


def existing_file(path: Path) -> Path:
    if existing(path).is_dir():
        raise InputError(f"{path} is a directory: give the checkpoint's file in it")
    return path


class StandIn:
    """Takes the place of a foreign object that weights do not need."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def read_torch(path: Path, stand_ins: str | None = None) -> Any:
    """What `torch.save` or safetensors wrote, the former read by torch's restricted reader.

    numpy's scalars become numbers; what else is `HARMLESS`, and objects of the package `stand_ins`, `StandIn`s.

    Raises:
        InputError: missing, damaged, not a torch file, or it needs code to run; the message names that code.
    """
    if path.suffix == ".safetensors":
        return read_safetensors(path)
    with open(existing_file(path), "rb") as file:
        try:
            foreign = torch.serialization.get_unsafe_globals_in_checkpoint(file)
        except Exception:  # not a zip file: the oldest torch files, or none at all, as the reader will say
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
        except Exception:  # torch's own words would advise to run the code
            raise InputError(
                f"{path} is damaged, or not of torch.save, or holds Python objects that only code could rebuild, and "
                "code in files is not run: get it again, or save the state dict alone where it was written"
            ) from None


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Raises InputError where it is missing or damaged."""
    try:
        return load_file(existing_file(path))
    except SafetensorError as error:
        raise InputError(f"{path} is damaged ({error}): get it again") from None


def write_safetensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    with atomic_path(path) as temporary:
        save_file({name: tensor.detach().clone() for name, tensor in tensors.items()}, temporary, {"format": "pt"})


def read_npz(path: Path) -> dict[str, np.ndarray]:
    """Raises InputError where it is missing or damaged, or holds anything but arrays of numbers."""
    with open(existing_file(path), "rb") as file:
        try:
            with np.load(file, allow_pickle=False) as arrays:
                return {name: arrays[name] for name in arrays.files}
        except Exception as error:  # what a damaged header or archive leads numpy and zipfile to
            reason = " ".join(str(error).split())
            raise InputError(f"{path} is damaged or no .npz of plain arrays ({reason})") from None


def read_dill(path: Path) -> Any:
    """What dill or pickle wrote, where it consists of containers, numbers, strings and arrays alone.

    Raises:
        InputError: missing, damaged, or it names anything beyond `_ArrayUnpickler.KNOWN`.
    """
    data = existing_file(path).read_bytes()
    try:
        return _ArrayUnpickler(io.BytesIO(data)).load()
    except InputError as error:
        raise InputError(f"{path} {error}") from None
    except Exception as error:  # a damaged pickle may do anything to the little machine that reads it
        raise InputError(f"{path} is damaged or no pickle ({type(error).__name__}: {error})") from None


class _Array:
    """Stand-in of numpy.ndarray; becomes a real one when its state comes."""

    def __init__(self) -> None:
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
        if not self.is_number():
            raise InputError(f"holds arrays of {self.name!r}: only numbers are read")
        return np.dtype(self.name).newbyteorder(self.order if self.order in ("<", ">") else "=")


_NUMBERS = {f"{kind}{size}" for kind in "iu" for size in (1, 2, 4, 8)} | {"f2", "f4", "f8", "b1"}


def _from_buffer(data: Any, dtype: _DType, shape: tuple[int, ...], order: str) -> _Array:
    array = _Array()
    array.value = np.frombuffer(bytes(data), dtype.real()).reshape(shape, order="F" if order == "F" else "C").copy()
    return array


def _scalar(dtype: _DType, data: Any) -> Any:
    """Stand-in of what makes numpy's scalars: plain numbers."""
    return np.frombuffer(data, dtype.real())[0].item() if dtype.is_number() else StandIn()


def _reconstruct(*_args: Any) -> _Array:
    return _Array()


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
    # What files of torch hold beside weights (numbers, random states, options), and what takes its place.
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
    """Knows the names below, all of them functions and classes of this file, and no other."""

    KNOWN = {  # noqa: RUF012
        ("numpy.core.multiarray", "_reconstruct"): _reconstruct,  # numpy 1
        ("numpy._core.multiarray", "_reconstruct"): _reconstruct,  # numpy 2
        ("numpy.core.numeric", "_frombuffer"): _from_buffer,  # the same in pickle protocol 5
        ("numpy._core.numeric", "_frombuffer"): _from_buffer,
        ("numpy.core.multiarray", "scalar"): _scalar,
        ("numpy._core.multiarray", "scalar"): _scalar,
        ("numpy", "ndarray"): _Array,
        ("numpy", "dtype"): _DType,
        ("jax._src.array", "_reconstruct_array"): _reconstruct_array,
        ("dill._dill", "_create_namedtuple"): _create_namedtuple,
        ("haiku._src.data_structures", "FlatMapping"): _Mapping,
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.KNOWN:
            raise InputError(
                f"names {module}.{name}, which weights do not need, and code in files is not run: "
                "save the params alone as .npz, one array for each 'module/name'"
            )
        return self.KNOWN[module, name]

"""Foreign files are read without running anything in them, and weights find their names."""

import argparse
import io
import pickle
import struct
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from recorded import GOLDEN

from perceiver_ar.compat.checkpoint_files import read_dill, read_npz, read_torch
from perceiver_ar.compat.weights import (
    LeftOut,
    Weight,
    find_state,
    from_interleaved,
    to_ours,
    to_theirs,
)
from perceiver_ar.errors import InputError


def by_name(module: str, name: str, argument: bytes = b"'true'") -> bytes:
    """A pickle, as short as can be, that calls module.name('true')."""
    return b"\x80\x04c" + module.encode() + b"\n" + name.encode() + b"\n(S" + argument + b"\ntR."


@pytest.mark.parametrize("protocol", range(3, pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize(
    "array",
    [
        np.arange(6, dtype=np.float32).reshape(2, 3),
        np.asfortranarray(np.arange(6, dtype=np.float64).reshape(2, 3)),
        np.arange(3, dtype=">i4"),
        np.array(2.5, dtype=np.float16),
        np.zeros((0, 4), dtype=np.float32),
        np.array([True, False]),
    ],
    ids=lambda array: f"{array.dtype}{array.shape}",
)
def test_arrays_are_read_as_they_were(array: np.ndarray, protocol: int, tmp_path: Path) -> None:
    file = tmp_path / "arrays.dill"
    file.write_bytes(pickle.dumps({"a": array, "b": [1, ("x", None)]}, protocol=protocol))
    content = read_dill(file)
    assert content["b"] == [1, ("x", None)]
    assert content["a"].value.dtype == array.dtype
    assert np.array_equal(content["a"].value, array)


@pytest.mark.parametrize("kind", ["dill", "torch", "torch's old format"])
def test_numpys_scalars_beside_weights_are_numbers(kind: str, tmp_path: Path) -> None:
    file = tmp_path / "file"
    numbers = {"loss": np.float64(2.5), "step": np.int64(3), "best": np.bool_(True), "rate": np.float32(0.25)}
    if kind == "dill":
        file.write_bytes(pickle.dumps(numbers))
    else:
        torch.save(numbers, file, _use_new_zipfile_serialization=kind == "torch")
    read = (read_dill if kind == "dill" else read_torch)(file)
    assert read == {"loss": 2.5, "step": 3, "best": True, "rate": 0.25}
    assert [type(x) for x in read.values()] == [float, int, bool, float]


@pytest.mark.parametrize("new", [True, False])
def test_random_states_options_and_paths_beside_weights_of_torch_do_no_harm(new: bool, tmp_path: Path) -> None:
    others = {
        "random": np.random.RandomState(0).get_state(),
        "options": argparse.Namespace(lr=1e-3, out=tmp_path),
        "names": np.array(["a", None], dtype=object),
        "name": np.str_("a"),
    }
    torch.save({**others, "w": torch.ones(2)}, tmp_path / "file.pt", _use_new_zipfile_serialization=new)
    read = read_torch(tmp_path / "file.pt")
    assert torch.equal(read["w"], torch.ones(2))
    assert read.keys() == {*others, "w"}


@pytest.mark.parametrize("name", ["step_40/checkpoint.dill", "checkpoint_flatmapping.dill", "checkpoint_modern.dill"])
def test_the_three_kinds_of_dill_files_hold_the_same(name: str) -> None:
    content = read_dill(GOLDEN / "checkpoints/google" / name)
    plain = np.load(GOLDEN / "checkpoints/google/params.npz")
    assert content["global_step"] == 40
    read = {f"{module}/{key}": x.value for module, group in content["params"].items() for key, x in group.items()}
    assert read.keys() == set(plain.files)
    assert all(np.array_equal(x, plain[key]) for key, x in read.items())


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("os", "system"),
        ("posix", "system"),
        ("subprocess", "Popen"),
        ("builtins", "eval"),
        ("builtins", "exec"),
        ("builtins", "getattr"),
        ("builtins", "__import__"),
        ("importlib", "import_module"),
        ("dill._dill", "_import_module"),
        ("dill._dill", "_create_function"),
        ("numpy", "load"),
        ("numpy.core.multiarray", "fromfile"),
        ("numpy", "ndarray.tofile"),
        ("numpy.core.multiarray", "_reconstruct.__globals__"),
        ("numpy.core.multiarray", "scalar.__globals__"),
        ("jax._src.array", "os.system"),
        ("haiku._src.data_structures", "FlatMapping.fromkeys"),
    ],
)
def test_every_other_name_in_a_pickle_is_refused_and_said(module: str, name: str, tmp_path: Path) -> None:
    file = tmp_path / "evil.dill"
    file.write_bytes(by_name(module, name))
    with pytest.raises(InputError, match=rf"evil\.dill names {module}\.{name}, .* is not run"):
        read_dill(file)


def array_state(kind: str, data: Any = b"\0" * 8, shape: tuple[int, ...] = (2,)) -> bytes:
    """A pickle of an array of dtype `kind` with any state."""

    class Faked:
        def __reduce__(self) -> tuple[Any, ...]:
            real = np.zeros(1, dtype=np.float32)
            function, args, _ = real.__reduce__()
            return function, args, (1, shape, np.dtype(kind), False, data)

    return pickle.dumps(Faked())


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (array_state("O", [1, 2]), "only numbers"),
        (array_state("S4"), "only numbers"),
        (array_state("f4", b"\0" * 7), "is damaged"),
        (array_state("f4", shape=(3,)), "is damaged"),
        (array_state("f4", shape=(-1, 3)), "is damaged"),
        (b"\x80\x04\x95" + struct.pack("<Q", 2**60) + b".", "is damaged"),  # a frame that is not there
        (b"\x80\x04\x8e" + struct.pack("<Q", 2**60), "is damaged"),  # so many bytes that are not there
        (b"\x80\x04Pname\n.", "is damaged"),  # a persistent id
        (b"\x80\x04\x82\x01.", "is damaged"),  # from the registry of extensions
    ],
)
def test_arrays_that_are_none_are_refused(content: bytes, says: str, tmp_path: Path) -> None:
    (tmp_path / "file.dill").write_bytes(content)
    with pytest.raises(InputError, match=f"file.dill .*{says}"):
        read_dill(tmp_path / "file.dill")


@pytest.mark.parametrize("head", [b"", b"\x80\x04", b"\x80\x04cnumpy.core.multiarray\n_reconstruct\n"])
@given(data=st.binary(max_size=60))
def test_any_bytes_are_a_value_or_a_refusal(tmp_path_factory: pytest.TempPathFactory, head: bytes, data: bytes) -> None:
    file = tmp_path_factory.getbasetemp() / "any.dill"
    file.write_bytes(head + data)
    with suppress(InputError):
        read_dill(file)


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "content",
    [
        npy(np.ones(3)),  # no archive
        b"PK\x03\x04",
        b"",
        b"words",
    ],
)
def test_a_file_that_is_no_archive_of_arrays_is_one_line(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "file.npz").write_bytes(content)
    with pytest.raises(InputError, match=r"file\.npz is damaged or no \.npz of plain arrays \(.+\)$"):
        read_npz(tmp_path / "file.npz")


def test_an_archive_whose_header_claims_more_than_any_memory_is_one_line(tmp_path: Path) -> None:
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f8", "fortran_order": False, "shape": (10**16,)})
    with zipfile.ZipFile(tmp_path / "file.npz", "w") as archive:
        archive.writestr("a.npy", header.getvalue())
    with pytest.raises(InputError, match=r"file\.npz is damaged"):
        read_npz(tmp_path / "file.npz")


def test_objects_of_the_packages_own_are_stood_in_for_and_others_refused(tmp_path: Path) -> None:
    file = GOLDEN / "checkpoints/krasserm/lightning/clm_script_full.ckpt"
    before = set(torch.serialization.get_safe_globals())
    task = read_torch(file, stand_ins="perceiver")["datamodule_hyper_parameters"]["task"]
    assert type(task).__name__ == "StandIn"
    with pytest.raises(InputError, match=r"perceiver\.data\.text\.common\.Task.* is not run"):
        read_torch(file)
    torch.save({"a": io.BytesIO}, tmp_path / "other.pt")
    with pytest.raises(InputError, match=r"io\.BytesIO.* is not run"):
        read_torch(tmp_path / "other.pt", stand_ins="perceiver")
    assert set(torch.serialization.get_safe_globals()) == before


# Names.


@given(heads=st.integers(1, 3), pairs=st.integers(0, 4), rest=st.integers(0, 3), seed=st.integers(0, 2**20))
def test_reordered_heads_give_the_scores_of_interleaved_rotation(heads: int, pairs: int, rest: int, seed: int) -> None:
    C, R = 2 * pairs + rest, 2 * pairs
    generator = torch.Generator().manual_seed(seed)
    q, k = torch.randn(2, heads, C, generator=generator, dtype=torch.float64)
    angle = torch.randn(2, pairs, generator=generator, dtype=torch.float64)

    def turned(x: torch.Tensor, angle: torch.Tensor, first: slice, second: slice) -> torch.Tensor:
        x, y = x.clone(), x
        x[:, first] = y[:, first] * angle.cos() - y[:, second] * angle.sin()
        x[:, second] = y[:, second] * angle.cos() + y[:, first] * angle.sin()
        return x

    even, odd = slice(0, R, 2), slice(1, R, 2)
    theirs = (turned(q, angle[0], even, odd) * turned(k, angle[1], even, odd)).sum(-1)
    order = from_interleaved(heads, C, R)
    q, k = q.flatten()[order].unflatten(0, (heads, C)), k.flatten()[order].unflatten(0, (heads, C))
    low, high = slice(0, pairs), slice(pairs, R)
    ours = (turned(q, angle[0], low, high) * turned(k, angle[1], low, high)).sum(-1)
    assert torch.allclose(ours, theirs, atol=1e-12)


def test_weights_go_to_our_names_and_back() -> None:
    order = from_interleaved(2, 4, 4)
    weights = [Weight("qkv", ("q", "k", "v"), (order, order, None)), Weight("norm", ("scale",), (None,))]
    theirs = {name: torch.randn(8, 3) for name in "qkv"} | {"scale": torch.randn(3)}
    ours = to_ours(weights, theirs, "here")
    assert {name: tuple(x.shape) for name, x in ours.items()} == {"qkv": (24, 3), "norm": (3,)}
    back = to_theirs(weights, ours)
    assert back.keys() == theirs.keys()
    assert all(torch.equal(back[name], x) for name, x in theirs.items())


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda theirs: theirs.pop("k"), "here .* missing: k$"),
        (lambda theirs: theirs.update(a=torch.ones(1), b=torch.ones(1)), "unknown: a, b$"),
        (lambda theirs: theirs.update({str(i): torch.ones(1) for i in range(20)}), "unknown: 0, 1.* and 12 more$"),
        (lambda theirs: theirs.update(q=torch.ones(8, 3, dtype=torch.int8)), "q is of torch.int8: weights must be"),
        (lambda theirs: theirs.update(q=torch.ones(7, 3)), "q has 7 rows, its settings ask for 8"),
        (lambda theirs: theirs.update(q=torch.ones(8, 4)), "q and k have different widths"),
    ],
)
def test_weights_that_do_not_fit_are_said(change: Callable[[dict[str, torch.Tensor]], Any], says: str) -> None:
    order = from_interleaved(2, 4, 4)
    theirs = {"q": torch.ones(8, 3), "k": torch.ones(8, 3)}
    change(theirs)
    with pytest.raises(InputError, match=says):
        to_ours([Weight("qk", ("q", "k"), (order, order))], theirs, "here")


def test_a_file_with_two_models_is_refused_with_their_names() -> None:
    content = {"model": {"net.w": torch.ones(1)}, "ema": {"w": torch.ones(1)}}
    with pytest.raises(InputError, match=r"here holds several models \(model: net\.w, ema: w\)"):
        find_state(content, "w", "some-package", "here")


STATE = {"w": torch.ones(2), "layers.0.module.v": torch.zeros(3)}
ADAM = {"state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.ones(2)}}, "param_groups": [{"lr": 1e-3}]}


def prefixed(prefix: str, state: dict[str, torch.Tensor] = STATE) -> dict[str, torch.Tensor]:
    return {prefix + name: tensor for name, tensor in state.items()}


AROUND = {
    "nothing": STATE,
    "DistributedDataParallel": prefixed("module."),
    "torch.compile": prefixed("_orig_mod."),
    "compiled layers": {"net.w": STATE["w"], "net.layers.0._orig_mod.module.v": STATE["layers.0.module.v"]},
    "FSDP": {"w": STATE["w"], "layers.0._fsdp_wrapped_module._checkpoint_wrapped_module.module.v": torch.zeros(3)},
    "model_state_dict": {"epoch": 3, "model_state_dict": STATE, "optimizer_state_dict": ADAM},
    "Lightning": {"state_dict": prefixed("model."), "optimizer_states": [ADAM], "callbacks": {}},
    "DeepSpeed": {"module": prefixed("module."), "optimizer": ADAM, "ds_config": {"fp16": {"enabled": False}}},
    "shadow": {"ema": {"shadow": STATE, "decay": 0.99}, "optimizer": ADAM},
    "callbacks": {"state_dict": STATE, "callbacks": {"averaging": {"average_model_state": prefixed("module.")}}},
    "a list": [3, STATE, ADAM],
    "moments by name": {"model": STATE, "optimizer": {"exp_avg": prefixed("", {"w": torch.zeros(2)})}},
    "parameters": {name: torch.nn.Parameter(tensor) for name, tensor in STATE.items()},
}
BESIDE = {
    "an average's counter": (prefixed("module.") | {"n_averaged": torch.tensor(3)}, ["n_averaged"]),
    "ema_pytorch": (prefixed("ema_model.") | {"initted": torch.ones(1), "step": torch.ones(())}, ["initted", "step"]),
    "a criterion": (prefixed("net.") | {"criterion.weight": torch.ones(5)}, ["criterion.weight"]),
    "moments": (prefixed("net.") | prefixed("optimizer.exp_avg.net."),
                ["optimizer.exp_avg.net.w", "optimizer.exp_avg.net.layers.0.module.v"]),
    "the same module": ({"net.w": STATE["w"], "all.net.w": STATE["w"].clone()}, ["all.net.w"]),
    "many": (prefixed("net.") | {f"other.{i}": torch.ones(1) for i in range(9)}, ["other.0", "other.7 and 1 more"]),
}  # fmt: skip


@pytest.mark.parametrize("around", AROUND)
def test_a_state_is_found_in_what_training_code_puts_around_it(around: str) -> None:
    state = find_state(AROUND[around], "w", "some-package", "here")
    assert state.keys() == STATE.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in STATE.items())


@pytest.mark.parametrize("beside", BESIDE)
def test_tensors_beside_the_state_are_left_out_and_named(beside: str) -> None:
    content, names = BESIDE[beside]
    with pytest.warns(LeftOut) as warned:
        state = find_state(content, "w", "some-package", "here")
    assert torch.equal(state["w"], STATE["w"])
    message = str(warned[0].message)
    assert message.startswith("here: left out ")
    assert all(name in message for name in names)


def test_a_counter_among_the_weights_is_left_out_and_named() -> None:
    theirs = {"w": torch.ones(1), "num_updates": torch.tensor(3)}
    with pytest.warns(LeftOut, match="here: left out num_updates, not weights"):
        assert to_ours([Weight("w", ("w",), (None,))], theirs, "here") == {"w": torch.ones(1)}


@pytest.mark.parametrize(
    "content", [ADAM, {"optimizer_state_dict": ADAM, "epoch": 3}, {"optimizer": {"w": STATE["w"]}}]
)
def test_a_file_of_an_optimizer_alone_is_refused_as_that(content: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="here holds an optimizer's state and no w: give the file with the model's"):
        find_state(content, "w", "some-package", "here")


@pytest.mark.parametrize(
    "names",
    [
        ["w", "q.parametrizations.weight.original0"],
        ["q.weight_orig", "q.weight_mask"],
        ["w", "q.weight_g", "q.weight_v"],
        ["w", "q.base_layer.weight", "q.lora_A.default.weight"],
    ],
)
def test_weights_that_are_made_of_others_are_refused_by_name(names: list[str]) -> None:
    with pytest.raises(InputError, match=f"adapters, parametrizations or pruning .*{names[-1]}.*: merge them"):
        find_state({name: torch.ones(1) for name in names}, "w", "some-package", "here")


def test_a_mapping_that_holds_itself_is_searched_once() -> None:
    content: dict[str, Any] = {"model": STATE}
    content["self"] = content
    assert find_state(content, "w", "some-package", "here").keys() == STATE.keys()

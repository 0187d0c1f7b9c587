"""Checkpoints: whole or seen to be damaged, and never removed before a newer one is safe."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from perceiver_ar import InputError
from perceiver_ar.training.checkpoints import Checkpoint, Checkpoints
from perceiver_ar.training.saving import load_optimizer, stored_optimizer


def add(checkpoints: Checkpoints, step: int, bits: float | None = None) -> Path:
    with checkpoints.writing(step, bits) as temporary:
        temporary.write_bytes(b"state of step %d" % step * 100)
    return checkpoints.path(step)


def steps(checkpoints: Checkpoints) -> list[int]:
    return [checkpoint.step for checkpoint in checkpoints.all()]


def flip(path: Path, at: int) -> None:
    """One bit of one byte."""
    data = bytearray(path.read_bytes())
    data[at % len(data)] ^= 1
    path.write_bytes(data)


def test_a_manifest_says_what_the_file_must_be(tmp_path: Path) -> None:
    import hashlib

    path = add(Checkpoints(tmp_path), 12, 2.5)
    assert path == tmp_path / "step-000012.ckpt"
    assert json.loads(path.with_suffix(".json").read_text()) == {
        "step": 12,
        "validation_bits": 2.5,
        "bytes": path.stat().st_size,
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
    }


def test_the_newest_is_by_step_and_not_by_name(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.newest() is None
    for step in (999_999, 1_000_000):
        add(checkpoints, step)
    newest = checkpoints.newest()
    assert newest is not None and newest.step == 1_000_000


@pytest.mark.parametrize("at", [0, 7, -1])
def test_one_flipped_bit_is_seen_and_the_one_before_is_taken(tmp_path: Path, at: int) -> None:
    checkpoints = Checkpoints(tmp_path)
    add(checkpoints, 10)
    flip(add(checkpoints, 20), at)
    newest = checkpoints.newest()
    assert newest is not None and newest.step == 10
    assert checkpoints.damaged == {20}


@pytest.mark.parametrize("content", [b"", b"short"])
def test_a_cut_file_and_a_missing_one_are_damaged(tmp_path: Path, content: bytes) -> None:
    checkpoints = Checkpoints(tmp_path)
    path = add(checkpoints, 10)
    path.write_bytes(content)
    with pytest.raises(InputError, match=rf"000010.ckpt is damaged \({len(content)} bytes instead of"):
        checkpoints.newest()
    path.unlink()
    with pytest.raises(InputError, match="no earlier one is intact"):
        checkpoints.newest()


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"bytes": 3, "colour": 1}', '{"bytes": "x"}',
                                  '{"bytes": 3, "validation_bits": "x"}', "\0"])  # fmt: skip
def test_a_damaged_manifest_makes_a_damaged_checkpoint(tmp_path: Path, text: str) -> None:
    checkpoints = Checkpoints(tmp_path)
    add(checkpoints, 10)
    add(checkpoints, 20).with_suffix(".json").write_text(text)
    newest = checkpoints.newest()
    assert newest is not None and newest.step == 10
    assert checkpoints.damaged == {20}


def test_a_file_without_a_manifest_is_none_and_goes_with_the_next_one(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    add(checkpoints, 10)
    (tmp_path / "step-000020.ckpt").write_bytes(b"whole, but the kill came before its manifest")
    newest = checkpoints.newest()
    assert newest is not None and newest.step == 10
    add(checkpoints, 30)
    assert {path.name for path in tmp_path.glob("*.ckpt")} == {"step-000010.ckpt", "step-000030.ckpt"}


@given(
    bits=st.lists(st.none() | st.floats(0.5, 8.0), min_size=1, max_size=8),
    keep_best=st.integers(0, 3),
)
@settings(max_examples=30)
def test_the_newest_two_and_the_best_are_kept(
    tmp_path_factory: pytest.TempPathFactory, bits: list[float | None], keep_best: int
) -> None:
    checkpoints = Checkpoints(tmp_path_factory.mktemp("checkpoints"), keep_best)
    for step, measured in enumerate(bits):
        add(checkpoints, step, measured)
    kept = steps(checkpoints)
    assert set(range(max(0, len(bits) - 2), len(bits))) <= set(kept)
    measured = sorted(value for value in bits if value is not None)[:keep_best]
    found = sorted(value for step in kept if (value := bits[step]) is not None)
    assert found[:keep_best] == measured
    assert len(kept) <= 2 + keep_best
    assert {path.stem for path in checkpoints.folder.glob("*.ckpt")} == {f"step-{step:06d}" for step in kept}


def test_damaged_ones_are_no_reserve(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    add(checkpoints, 10)
    flip(add(checkpoints, 20), 5)
    checkpoints.newest()
    add(checkpoints, 30)
    assert steps(checkpoints) == [10, 30]


def test_those_of_a_future_that_is_made_again_go(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    add(checkpoints, 10)
    flip(add(checkpoints, 20), 5)
    checkpoints.newest()
    add(checkpoints, 15)
    assert steps(checkpoints) == [10, 15]


def test_old_ones_stay_until_the_new_one_is_whole(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep_best=0)
    add(checkpoints, 10)
    add(checkpoints, 20)
    with checkpoints.writing(30) as temporary:
        temporary.write_bytes(b"whole")
        assert steps(checkpoints) == [10, 20]
    assert steps(checkpoints) == [20, 30]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_an_error_leaves_all_others_and_nothing_of_this_one(tmp_path: Path, error: type[BaseException]) -> None:
    checkpoints = Checkpoints(tmp_path)
    add(checkpoints, 10)
    before = {path.name for path in tmp_path.iterdir()}
    with pytest.raises(error), checkpoints.writing(20) as temporary:
        temporary.write_bytes(b"half")
        raise error
    assert {path.name for path in tmp_path.iterdir()} == before


def test_removing_starts_with_the_manifest(tmp_path: Path) -> None:
    path = add(Checkpoints(tmp_path), 10)
    path.unlink()
    path.mkdir()  # cannot be unlinked: as if the kill came between the two
    with pytest.raises(OSError):
        Checkpoint(path, 10).remove()
    assert not path.with_suffix(".json").exists()


@pytest.mark.parametrize("fused", [None, True])
def test_an_optimizer_keeps_its_own_kernel_when_it_resumes_from_another_device(fused: bool | None) -> None:
    """With the stored choice, the loss scaling of fp16 raises an error, or a GPU takes the slow kernel."""
    model = torch.nn.Linear(2, 2)
    before, after = (torch.optim.AdamW(model.parameters(), fused=each) for each in (None if fused else True, fused))
    model(torch.ones(2)).sum().backward()
    before.step()
    load_optimizer(after, model, stored_optimizer(before, model, lambda state: state))
    assert after.param_groups[0]["fused"] is fused
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(model(torch.ones(2)).sum()).backward()
    scaler.step(after)
    assert all(after.state[parameter]["step"] == 2 for parameter in model.parameters())

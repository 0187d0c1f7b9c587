"""The replay of a training step on fake CUDA tensors, under CUDA's own rules of autocast, in a process of its own."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "replay.py"
pytestmark = pytest.mark.skipif(
    shutil.which("g++") is None or torch.version.cuda is not None or torch.version.hip is not None,
    reason="replays need g++, and a torch without CUDA",
)


def test_under_autocast_a_step_multiplies_in_bfloat16_and_never_waits_for_the_device() -> None:
    run = subprocess.run([sys.executable, SCRIPT, "tiny"], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-2000:]
    found = json.loads(run.stdout)
    assert found["wide products"] == 0 and found["copies"] == 0
    # A change may lower these numbers of kernels, but not raise them unnoticed.
    for part, budget in {"forward": 186, "backward": 280, "update": 133}.items():
        assert found["kernels"][part] <= budget, found
    assert 0 < found["fused, ms"] < found["eager, ms"]


OWN = """
import sys
sys.path.append(sys.argv[1])
import replay
import torch
from torch import Tensor

@torch.library.custom_op("own::attention", mutates_args=())
def attention(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    return torch.empty_like(q)

@torch.library.custom_op("own::scale", mutates_args=())
def scale(x: Tensor) -> Tensor:
    return 2 * x

attention.register_fake(lambda q, k, v, causal: torch.empty_like(q))
scale.register_fake(torch.empty_like)
q = torch.empty(1, 2, 3, 8, device="meta")
with replay.Replay() as found:
    attention(q, q, q, True)
assert found.kernels == 1 and found.by_name["attention"] > 0, found.by_name
with replay.Replay():
    scale(q)
"""


def test_an_operator_of_ones_own_is_counted_as_attention_or_refused_by_name() -> None:
    run = subprocess.run([sys.executable, "-c", OWN, SCRIPT.parent], capture_output=True, text=True, timeout=300)
    assert "NotImplementedError: the time of own.scale.default is unknown" in run.stderr, run.stderr[-2000:]

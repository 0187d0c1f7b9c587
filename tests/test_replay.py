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

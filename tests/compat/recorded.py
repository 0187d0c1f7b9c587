"""Results that other implementations' own code gave, in tests/golden: `NAME.npz` with weights and cases, `NAME.json`.

In the npz: param/NAME, buffer/NAME, case/CASE/in/X, case/CASE/out/X; out/logits is float32, out/logits_f64 the same
code in float64. The json holds the constructor's arguments (config) and a note for each case.
"""

import json
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

GOLDEN = Path(__file__).parent.parent / "golden"
FLOAT32, FLOAT64 = 1e-5, 1e-10  # largest error relative to the recorded values' scale


@dataclass(frozen=True)
class Golden:
    arguments: dict[str, Any]
    notes: dict[str, Any]
    arrays: dict[str, Tensor]

    @classmethod
    def load(cls, name: str) -> Self:
        about = json.loads((GOLDEN / f"{name}.json").read_text())
        arrays = np.load(GOLDEN / f"{name}.npz", allow_pickle=False)
        return cls(about["config"], about, {key: torch.from_numpy(arrays[key]) for key in arrays.files})

    def case(self, name: str) -> dict[str, Tensor]:
        start = f"case/{name}/"
        return {key.removeprefix(start): value for key, value in self.arrays.items() if key.startswith(start)}

    def note(self, name: str) -> dict[str, Any]:
        note = self.notes["cases"][name]
        return note if isinstance(note, dict) else {}

    def parameters(self) -> OrderedDict[str, Tensor]:
        """And buffers, by their names."""
        kinds = ("param", "buffer")
        named = (key.split("/", 1) for key in self.arrays)
        return OrderedDict((name, self.arrays[f"{kind}/{name}"]) for kind, name in named if kind in kinds)

    def cases(self) -> set[str]:
        return {key.split("/")[1] for key in self.arrays if key.startswith("case/")}


def cases(files: dict[str, Any], output: str) -> list[tuple[str, str]]:
    """The names of every file and case with this output."""
    ends = f"/out/{output}"
    return [(name, key.split("/")[1]) for name, golden in files.items() for key in golden.arrays if key.endswith(ends)]


def assert_close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    assert actual.shape == expected.shape
    if expected.numel() == 0:
        return
    error = (actual.double() - expected.double()).abs().max().item()
    assert error <= tolerance * expected.abs().max().item(), error

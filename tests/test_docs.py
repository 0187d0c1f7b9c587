"""The code on the pages for those who come from another implementation is run as it stands, on small checkpoints."""

import pickle
import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_readme import ROOT

from perceiver_ar import PerceiverAR, PerceiverARConfig
from perceiver_ar.cli import main
from perceiver_ar.compat import save_krasserm
from perceiver_ar.compat.lucidrains import PerceiverAR as Package

SMALL = {"vocab_size": 262, "dim": 16, "num_layers": 1, "num_heads": 2}


def lucidrains() -> dict[str, Any]:
    net = Package(num_tokens=256, dim=16, depth=1, heads=8, dim_head=64, max_seq_len=4096, cross_attn_seq_len=3072)
    torch.save(net.state_dict(), "model.pt")
    Path("some_file").write_text("It was night. " * 9)
    return {"tokens": torch.randint(256, (1, 4096))}


def krasserm() -> dict[str, Any]:
    config = PerceiverARConfig.preset("krasserm", context_length=4096, num_latents=512, **SMALL)
    save_krasserm(PerceiverAR(config), "perceiver-ar-clm")
    return {"tokens": torch.randint(262, (1, 4096)), "pad_mask": torch.arange(4096)[None] < 9}


def google() -> dict[str, Any]:
    """Recorded weights, made wide enough for 16 heads."""
    params = {}
    with np.load(ROOT / "tests/golden/checkpoints/google/params.npz") as recorded:
        for name, array in recorded.items():
            params[name] = np.resize(array, [4 * n if n in (8, 32) else n for n in array.shape])
    np.savez("params.npz", allow_pickle=False, **params)
    modules: dict[str, dict[str, np.ndarray]] = {}
    for name, array in params.items():
        module, _, weight = name.rpartition("/")
        modules.setdefault(module, {})[weight] = array
    Path("checkpoint.dill").write_bytes(pickle.dumps({"params": modules}))
    return {}


@pytest.mark.parametrize(
    ("page", "prepare"),
    [("from-perceiver-ar-pytorch", lucidrains), ("from-perceiver-io", krasserm), ("from-google-research", google)],
)
def test_what_a_page_shows_runs(page: str, prepare: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = prepare()
    found = re.findall(r"```(python|bash)\n(.*?)```", (ROOT / f"docs/{page}.md").read_text(), flags=re.DOTALL)
    assert found
    for language, code in found:
        if language == "python":
            exec(compile(code, page, "exec"), names)  # what a reader would paste
            assert isinstance(names["model"], PerceiverAR)
        else:
            for command in code.splitlines():
                assert main(shlex.split(command)[1:]) == 0, command

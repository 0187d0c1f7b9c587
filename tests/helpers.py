"""Runs and commands that are small, and what tests ask of them."""

import re
from collections.abc import Iterator
from pathlib import Path
from textwrap import dedent

import pytest
import torch
from reference import assert_close
from safetensors.torch import load_file
from torch import Tensor

from perceiver_ar.cli import main
from perceiver_ar.config import PerceiverARConfig, TrainerConfig
from perceiver_ar.network.model import PerceiverAR
from perceiver_ar.windows import next_window

ROOT = Path(__file__).parents[1]
FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```", flags=re.DOTALL | re.MULTILINE)

MODEL = PerceiverARConfig(context_length=32, num_latents=8, dim=16, num_layers=1, num_heads=2)
TRAINER = TrainerConfig(
    batch_size=4, precision="32", device="cpu", evaluations=2, evaluation_tokens=200, sample_tokens=0
)
SMALL = [
    "--model.context_length=32", "--model.num_latents=8", "--model.dim=16", "--model.num_layers=1",
    "--model.num_heads=2", "--trainer.batch_size=4", "--trainer.precision=32", "--trainer.device=cpu",
    "--trainer.evaluations=1", "--trainer.evaluation_tokens=100", "--trainer.sample_tokens=0", "--max_steps=60",
]  # fmt: skip


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_refused(capsys: pytest.CaptureFixture[str], *argv: object, says: object) -> None:
    """Exit status 2, nothing on stdout, one line on stderr that holds `says`, but for notes of what was begun."""
    capsys.readouterr()
    status = main([str(word) for word in argv])
    captured = capsys.readouterr()
    assert (status, captured.out) == (2, "")
    lines = [
        line for line in captured.err.splitlines() if not re.search(r"to train on|none is held out|, resuming$", line)
    ]
    assert len(lines) == 1 and lines[0].startswith("perceiver-ar: "), captured.err
    assert str(says) in lines[0]


def parameters(run: str | Path) -> dict[str, Tensor]:
    return load_file(Path(run) / "model.safetensors")


def assert_same_parameters(run: str | Path, other: str | Path, tolerance: float = 0.0) -> None:
    """Bit by bit where the tolerance is 0."""
    ours, theirs = parameters(run), parameters(other)
    assert ours.keys() == theirs.keys()
    for name in ours:
        if tolerance == 0.0:
            assert torch.equal(ours[name], theirs[name]), name
        else:
            assert_close(ours[name], theirs[name], tolerance)


def window_nats(model: PerceiverAR, row: Tensor) -> Tensor:
    """Nats (T - 1,) of the tokens of a row (T,) after the first, as generation from that one would draw them."""
    with torch.no_grad():
        return -window_logits(model, row[:-1]).log_softmax(-1).gather(1, row[1:, None])[:, 0]


@torch.no_grad()
def window_logits(model: PerceiverAR, row: Tensor, prompt_len: int = 1, first: int | None = None) -> Tensor:
    """Logits (T - first + 1, V) after each token of a row (T,) from `first` on (None: the last one of its prompt), each
    by a forward of its own over the window that generation from that prompt would report."""
    logits, window = [], None
    for t in range(prompt_len, len(row) + 1):
        window = next_window(model.config, window, t)
        prefix_len = t - window.start - window.num_latents
        if t >= (prompt_len if first is None else first):
            logits.append(model(row[None, window.start : t], prefix_len)[0, -1])
    return torch.stack(logits)


def blocks(page: str) -> Iterator[tuple[str, str]]:
    """The language and the content of every block of code."""
    for _, language, code in FENCE.findall((ROOT / page).read_text(encoding="utf-8")):
        yield language, dedent(code)


def write_files(folder: Path, contents: dict[str, bytes]) -> Path:
    """Files by their paths below `folder`, which is returned."""
    for name, content in contents.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder

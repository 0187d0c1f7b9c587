"""ONNX files give what the network gives, whatever the lengths, run by onnxruntime; and generate what it generates."""

import json
import logging
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from helpers import assert_refused
from torch import Tensor

from perceiver_ar import PerceiverAR, PerceiverARConfig, Run, generate, stream
from perceiver_ar.cli import main
from perceiver_ar.config.presets import PUBLISHED
from perceiver_ar.data.codec_file import save_codec
from perceiver_ar.data.text import BytesCodec
from perceiver_ar.errors import InputError
from perceiver_ar.network.inputs import NOTHING, reach
from perceiver_ar.onnx import CACHES, empty_caches, export_onnx
from perceiver_ar.windows import Window, next_window

SIZES: dict[str, Any] = {"vocab_size": 50, "context_length": 24, "num_latents": 8, "dim": 32, "num_layers": 1}
NETWORKS: dict[str, dict[str, Any]] = {
    "rows and columns": {
        "num_heads": 2,
        "local_context": 2,
        "position_table": "learned",
        "index_dims": (6, 4),
        "norm": "layernorm",
    },
}
FROM_END: dict[str, Any] = {"num_heads": 2, "positions_from_end": True, "latents_per_position": 2}
QUERY_KEYS: dict[str, Any] = {"num_heads": 2, "cross_layers": (0, 1), "latent_keys": "query", "local_context": 1}
OTHERS = {"keys of the query": QUERY_KEYS, "positions from the end": FROM_END} | {
    name: {**settings, "head_dim": None, "num_heads": 2} for name, settings in PUBLISHED.items()
}
LENGTHS = [(1, 0, 1), (2, 0, 8), (1, 1, 1), (3, 16, 8), (1, 23, 1), (2, 5, 3)]

Sessions = dict[str, onnxruntime.InferenceSession]
Exported = tuple[PerceiverAR, Sessions]


def sessions(directory: Path) -> Sessions:
    return {path.stem: onnxruntime.InferenceSession(path) for path in directory.glob("*.onnx")}


def run(session: onnxruntime.InferenceSession, inputs: Mapping[str, Tensor]) -> list[Tensor]:
    return [torch.from_numpy(x) for x in session.run(None, {name: x.numpy() for name, x in inputs.items()})]


@pytest.fixture(scope="module", params=[*NETWORKS, *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)])
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    torch.manual_seed(0)
    model = PerceiverAR(PerceiverARConfig(**{**(NETWORKS | OTHERS)[request.param], **SIZES})).double()
    for parameter in model.parameters():  # nothing of what starts at zero may hide
        torch.nn.init.normal_(parameter, std=0.2)
    directory = tmp_path_factory.mktemp("onnx") / "files"
    logging.disable(logging.INFO)  # pytest would keep the many thousand lines that torch traces
    names = export_onnx(model, directory)
    logging.disable(logging.NOTSET)
    assert sorted(path.name for path in directory.glob("*.onnx")) == sorted(names)
    assert all(module.training for module in model.modules())  # nothing of it has changed
    assert model.embed.weight.dtype == torch.float64
    return model.float().eval(), sessions(directory)


def test_scores_are_the_networks_at_any_length(exported: Exported) -> None:
    model, found = exported
    for B, P, N in LENGTHS:
        tokens = torch.randint(50, (B, P + N))
        [got] = run(found["model"], {"prefix": tokens[:, :P], "latents": tokens[:, P:]})
        with torch.no_grad():
            torch.testing.assert_close(got, model(tokens, P), atol=1e-4, rtol=0)


def test_only_networks_that_can_be_cached_have_steps(exported: Exported) -> None:
    model, found = exported
    assert set(found) == ({"model", "read", "step"} if model.config.cacheable else {"model"})


def read_ids(config: PerceiverARConfig, ids: list[int], first: int, last: int, start: int = 0) -> list[int]:
    """Ids first ... last - 1 as the graphs take them: behind those before them in a window from `start` on."""
    n = reach(config)
    before = ids[max(start, first - n) : first]
    return [NOTHING] * (n - len(before)) + before + ids[first:last]


def step(found: Sessions, tokens: Tensor, positions: Tensor, held: tuple[Tensor, Tensor], caches: dict[str, Tensor]):
    """Logits (B, V) of one step, and the caches after it."""
    counts = {"context_held": held[0], "latents_held": held[1]}
    logits, *new = run(found["step"], {"tokens": tokens, "positions": positions, **counts, **caches})
    return logits, dict(zip(CACHES, new, strict=True))


def test_a_growing_window_decodes_what_generate_does_until_the_first_refill(exported: Exported) -> None:
    model, found = exported
    if not model.config.cacheable:
        return  # it has no steps
    N, prompts = model.config.num_latents, [[7, 8, 9], [1], [3, 4, 3, 4, 3]]
    caches, logits = empty_caches(model, 3, N), torch.empty(0)
    rows = [list(prompt) for prompt in prompts]
    for i in range(N):
        for r, row in enumerate(rows):
            if i == len(row):
                row.append(int(logits[r].argmax()))
        held = torch.full((3,), i)
        logits, caches = step(
            found,
            torch.tensor([read_ids(model.config, row, i, i + 1) for row in rows]),
            held[:, None],
            (held, held),
            caches,
        )
    new = generate(model, prompts, N, temperature=0.0)
    for prompt, row, expected in zip(prompts, rows, new.tolist(), strict=True):
        assert row[len(prompt) :] == expected[: N - len(prompt)]


def decoded(model: PerceiverAR, found: Sessions, prompt: list[int], count: int) -> Iterator[tuple[Tensor, Window]]:
    """Greedily, over the windows of `generate`: the logits of each step, and its window."""
    config, ids, window = model.config, list(prompt), None
    caches, context, latents = {}, 0, 0
    for _ in range(count):
        before, window = window, next_window(config, window, len(ids))
        origin = window.start if config.table_sizes else 0
        P, first = len(ids) - window.start - window.num_latents, len(ids) - 1
        if window.refill:
            kept = before is not None and before.start == window.start and config.latent_keys != "query"
            if not kept:
                caches = empty_caches(model, 1, config.context_length)
                if P > 0:
                    tokens = torch.tensor([read_ids(config, ids, window.start, window.start + P, window.start)])
                    positions = torch.arange(P)[None] + window.start - origin
                    new = run(found["read"], {"tokens": tokens, "positions": positions})
                    for name, x in zip(CACHES, new, strict=False):
                        caches[name][:, :, :, :P] = x
            context, latents, first = P, 0, window.start + P
        for i in range(first, len(ids)):
            held = torch.tensor([context]), torch.tensor([latents])
            logits, caches = step(
                found,
                torch.tensor([read_ids(config, ids, i, i + 1, window.start)]),
                torch.tensor([[i - origin]]),
                held,
                caches,
            )
            context, latents = context + 1, latents + 1
        yield logits, window
        ids.append(int(logits.argmax()))


@pytest.mark.parametrize("length", [1, 12, 30])
def test_reading_and_stepping_make_every_window_of_generate(exported: Exported, length: int) -> None:
    model, found = exported
    if not model.config.cacheable:
        return  # it has no steps
    prompt = torch.randint(50, (length,)).tolist()
    steps = list(stream(model, [prompt], max_new_tokens=30, temperature=0.0))
    for (logits, window), expected in zip(decoded(model, found, prompt, 30), steps, strict=True):
        assert (window.start, window.num_latents) == (int(expected.window_start), int(expected.num_latents))
        torch.testing.assert_close(logits, expected.logits, atol=1e-4, rtol=0)


def test_rows_hold_different_amounts(exported: Exported) -> None:
    model, found = exported
    if not model.config.cacheable:
        return  # it has no steps
    single, alone = [], []
    for count in (2, 6):
        caches, logits = empty_caches(model, 1, 8), torch.empty(0)
        for i in range(count + 1):
            single.append(caches)
            at = torch.tensor([i])
            ids = torch.tensor([read_ids(model.config, list(range(5, 12)), i, i + 1)])
            logits, caches = step(found, ids, at[:, None], (at, at), caches)
        alone.append(logits)
    both = {name: torch.cat([single[2][name], single[-1][name]], dim=1) for name in CACHES}
    held = torch.tensor([2, 6])
    ids = torch.tensor([read_ids(model.config, list(range(5, 12)), i, i + 1) for i in held.tolist()])
    logits, _ = step(found, ids, held[:, None], (held, held), both)
    torch.testing.assert_close(logits, torch.cat(alone), atol=1e-5, rtol=0)


def test_a_run_is_exported_with_its_codec_and_without_steps_where_nothing_can_be_cached(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = tmp_path / "run", tmp_path / "onnx"
    sizes = {**SIZES, "vocab_size": 256, "num_heads": 2, "local_context": 1, "positions_from_end": True}
    PerceiverAR(PerceiverARConfig(**sizes)).save_pretrained(source)
    save_codec(BytesCodec(), source)
    logging.disable(logging.INFO)
    assert main(["export", "onnx", str(source), "--out", str(out)]) == 0
    logging.disable(logging.NOTSET)
    captured = capsys.readouterr()
    assert captured.err == "" and json.loads(captured.out) == ["model.onnx"]
    assert Run(out).codec().name == "bytes"
    tokens = torch.tensor([list(b"the cat")])
    [logits] = run(sessions(out)["model"], {"prefix": tokens[:, :3], "latents": tokens[:, 3:]})
    with torch.no_grad():
        torch.testing.assert_close(logits, Run(source).model()(tokens, 3), atol=1e-4, rtol=0)
    assert_refused(capsys, "export", "onnx", source, "--out", out, says=f"--out {out} is there already")


def test_too_small_a_model_is_refused(tmp_path: Path) -> None:
    config = PerceiverARConfig(vocab_size=9, context_length=8, num_latents=4, dim=8, num_layers=1, num_heads=1)
    with pytest.raises(InputError, match="context of 9 tokens and 3 latents to see what varies: here are 8 and 8"):
        export_onnx(PerceiverAR(config), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_missing_package_says_how_to_install_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)  # as if it were not installed
    config = PerceiverARConfig(vocab_size=9, context_length=12, num_latents=4, dim=8, num_layers=1, num_heads=1)
    with pytest.raises(InputError, match=r"this needs the package onnxscript: pip install 'perceiver-ar\[onnx\]'"):
        export_onnx(PerceiverAR(config), tmp_path / "out")
    assert not (tmp_path / "out").exists()

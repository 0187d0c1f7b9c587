"""Weights in eight bits: near those that they were, half of bfloat16's bytes, and good for every way to generate."""

import logging
import sys
from typing import Any

import pytest
import torch
from processes import Server
from reference import assert_close, randomize
from torch import nn

from perceiver_ar.config import PerceiverARConfig
from perceiver_ar.errors import InputError
from perceiver_ar.generation import stream
from perceiver_ar.generation.quantization import int8_weights
from perceiver_ar.network.model import PerceiverAR


def small(**fields: object) -> PerceiverAR:
    base = {"vocab_size": 11, "context_length": 24, "num_latents": 8, "dim": 64, "num_layers": 1, "num_heads": 2}
    return randomize(PerceiverAR(PerceiverARConfig(**{**base, **fields})).eval(), seed=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [False, True])
def test_linear_weights_are_rounded_to_eight_bits_and_nothing_else_changes(dtype: torch.dtype, tied: bool) -> None:
    before, model = (small(tie_embeddings=tied).to(dtype) for _ in range(2))
    int8_weights(model)
    old = dict(before.named_parameters(remove_duplicate=False))
    linear = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert linear
    for name, weight in model.named_parameters(remove_duplicate=False):
        if name in linear:
            assert weight.qdata.dtype == torch.int8  # type: ignore[attr-defined]
            step = old[name].float().abs().amax(1, keepdim=True) / 127
            error = (weight.dequantize().float() - old[name].float()).abs()
            assert (error <= step * (0.51 if dtype == torch.float32 else 1.1)).all(), name  # bfloat16 rounds, too
        else:
            assert torch.equal(weight, old[name]), name


def test_the_network_is_the_one_with_rounded_weights() -> None:
    model, rounded = small(), small()
    int8_weights(model)
    with torch.no_grad():
        for name, module in rounded.named_modules():
            if isinstance(module, nn.Linear):
                module.weight.copy_(model.get_submodule(name).weight.dequantize())  # type: ignore[operator]
        tokens = torch.randint(11, (2, 20), generator=torch.Generator().manual_seed(0))
        assert_close(model(tokens), rounded(tokens), 1e-5)


# torch says that it keeps no compiled code of such tensors for other processes.
@pytest.mark.filterwarnings("ignore:.*does not implement _stable_hash_for_caching:UserWarning")
@pytest.mark.parametrize("compile", [False, True, pytest.param("max-autotune", marks=pytest.mark.slow)])
def test_steps_have_the_logits_of_the_windows_that_they_report(compile: Any) -> None:
    model = small().bfloat16()
    int8_weights(model)
    row = torch.randint(11, (30,), generator=torch.Generator().manual_seed(0))
    windows = set()
    for step in stream(model, row, max_new_tokens=12, seed=0, compile=compile):
        context = row[int(step.window_start) :]
        with torch.no_grad():
            expected = model(context[None], prefix_len=len(context) - int(step.num_latents))[:, -1]
        assert_close(step.logits.float(), expected.float(), 0.05)
        windows.add((int(step.window_start), int(step.num_latents)))
        row = torch.cat([row, step.tokens])
    assert len({start for start, _ in windows}) > 2  # refilled


def test_without_the_package_the_remedy_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(InputError, match=r"torchao.*pip install 'perceiver-ar\[int8\]'"):
        int8_weights(small())
    assert logging.root.manager.disable == 0


NEW = """
import sys, warnings
warnings.simplefilter("error")
assert "torchao" not in sys.modules
import torch
from perceiver_ar.generation.quantization import int8_weights
int8_weights(torch.nn.Linear(64, 64))
"""


def test_nothing_is_said_of_kernels_for_other_devices(server: Server) -> None:
    assert (server.run(code=NEW), server.messages()) == (0, [])

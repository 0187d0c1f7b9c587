"""Compiled steps give what the network gives, for any model, of any shape, and after its weights have changed."""

from functools import partial
from itertools import chain
from typing import Any, Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import assert_close, randomize
from torch import Tensor

from perceiver_ar.config import PerceiverARConfig
from perceiver_ar.generation import compiled, generate, stream
from perceiver_ar.generation.decoder import Decoder
from perceiver_ar.network.model import PerceiverAR


def tiny(seed: int = 1, **fields: Any) -> PerceiverAR:
    base = {"vocab_size": 11, "context_length": 12, "num_latents": 4, "dim": 8, "num_layers": 2, "num_heads": 2}
    return randomize(PerceiverAR(PerceiverARConfig(**{**base, **fields})).double().eval(), seed=seed)


@pytest.mark.parametrize("compile", [True, pytest.param("max-autotune", marks=pytest.mark.slow)])
def test_compiled_steps_have_the_same_logits(compile: bool | Literal["max-autotune"]) -> None:
    model = tiny(num_layers=1, position_table="learned")
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(11, (length,), generator=generator) for length in (15, 3, 6)]
    stop = int(generate(model, rows, 4, temperature=0.0)[1, 2])
    options: dict[str, Any] = {"max_new_tokens": 30, "temperature": 0.0, "stop_tokens": [stop], "num_samples": 2}
    plain, fast = (list(stream(model, rows, **options, compile=compile)) for compile in (False, compile))
    assert any(len({*step.window_start.tolist()}) > 1 for step in plain)  # rows differ
    for step, expected in zip(fast, plain, strict=True):
        assert torch.equal(step.tokens, expected.tokens)
        assert torch.equal(step.num_latents, expected.num_latents)
        assert_close(step.logits, expected.logits, 1e-9)


def test_any_number_of_shapes_can_be_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    # torch stops at eight forms of a function unless told otherwise; without its compiler, only traced, they are cheap.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    compiled._shared_step.cache_clear()
    model = tiny(num_layers=0)
    for rows in range(1, 10):
        prompt = torch.zeros(rows, 2, dtype=torch.long)
        assert torch.equal(
            generate(model, prompt, 3, temperature=0.0, compile=True), generate(model, prompt, 3, temperature=0.0)
        )
    compiled._shared_step.cache_clear()


def test_streams_after_one_another_have_the_same_cache_and_others_have_none_in_common(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """CUDA graphs are recorded for the addresses of a cache."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    compiled._shared_step.cache_clear()
    model, caches = tiny(), list[set[int]]()
    next_logits = Decoder.next_logits

    def noted(decoder: Decoder) -> Tensor:
        caches.append({x.data_ptr() for x in chain(*decoder.cache.cross.layers, *decoder.cache.self_attention.layers)})
        return next_logits(decoder)

    monkeypatch.setattr(Decoder, "next_logits", noted)
    options: dict[str, Any] = {"max_new_tokens": 9, "temperature": 0.0, "num_samples": 2}
    prompts = [torch.arange(3), torch.arange(5) + 4, torch.arange(9)]
    plain, fast = ([generate(model, ids, **options, compile=compile) for ids in prompts] for compile in (False, True))
    assert all(map(torch.equal, plain, fast))
    assert all(cache == caches[-1] for cache in caches[-27:])
    caches.clear()
    steps = zip(*(stream(model, ids, **options, compile=True) for ids in prompts), strict=True)
    together = [
        torch.stack(tokens, dim=1) for tokens in zip(*([x.tokens for x in step] for step in steps), strict=True)
    ]
    assert all(map(torch.equal, plain, together))
    assert len(set.union(*caches)) == 3 * len(caches[0])
    compiled._shared_step.cache_clear()


def logits(model: PerceiverAR, compile: bool | Literal["max-autotune"]) -> Tensor:
    prompt = torch.arange(9)
    return torch.stack([step.logits for step in stream(model, prompt, max_new_tokens=3, seed=0, compile=compile)])


def test_weights_that_became_constants_are_those_of_the_model_when_a_stream_begins(
    capfd: pytest.CaptureFixture[str],
) -> None:
    first, second = (tiny(seed, num_layers=0, cross_mlp_ratio=1.0).float() for seed in (1, 2))
    for factor in (1, -1):
        first.cross_attention[0].mlp.up_proj.weight.data.mul_(factor)  # type: ignore[union-attr]  # autograd sees nothing
        for model in (first, second):
            assert_close(logits(model, "max-autotune"), logits(model, False), 1e-5)
        steps = [compiled.compiled_step(model, "cpu", tuned=True) for model in (first, second)]
        assert steps[0] is not steps[1]
        assert steps == [compiled.compiled_step(model, "cpu", tuned=True) for model in (first, second)]
    assert "autotune" not in capfd.readouterr().err.lower()


@given(
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64, torch.int8]),
    sizes=st.lists(st.integers(1, 7), min_size=0, max_size=3),
    data=st.data(),
)
def test_a_fingerprint_changes_with_every_element(dtype: torch.dtype, sizes: list[int], data: st.DataObject) -> None:
    x = (torch.rand(sizes) * 100).to(dtype)
    before = compiled.fingerprint(x)
    assert compiled.fingerprint(x.clone()) == before
    x.view(-1)[data.draw(st.integers(0, x.numel() - 1))] += 1
    assert compiled.fingerprint(x) != before


def test_ways_to_compile_that_there_are_not_are_refused() -> None:
    with pytest.raises(ValueError, match="compile is 'fast': it must be True, False or 'max-autotune'"):
        generate(tiny(), torch.zeros(1, 3, dtype=torch.long), 1, compile="fast")

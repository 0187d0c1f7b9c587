"""Generation draws from the logits of the windows it reports, row by row, whatever the batch."""

import copy
import math
import os
import statistics
import time
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import assert_close, configs, randomize
from torch import Tensor

from perceiver_ar.config import PerceiverARConfig
from perceiver_ar.config.presets import PUBLISHED
from perceiver_ar.errors import InputError
from perceiver_ar.generation import generate, stream
from perceiver_ar.network.model import PerceiverAR
from perceiver_ar.windows import longest_context


def tiny(**fields: Any) -> PerceiverAR:
    base = {"vocab_size": 11, "context_length": 12, "num_latents": 4, "dim": 8, "num_layers": 2, "num_heads": 2}
    return randomize(PerceiverAR(PerceiverARConfig(**{**base, **fields})).double().eval(), seed=1)


MODEL = tiny()
seeds = st.integers(0, 2**20)


def random_rows(lengths: list[int], vocab_size: int, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(vocab_size, (length,), generator=generator) for length in lengths]


# Steps


def test_position_tables_smaller_than_the_context_limit_the_window() -> None:
    model = tiny(position_table="learned", index_dims=(2, 3))
    assert generate(model, torch.zeros(2, 9, dtype=torch.long), 20).shape == (2, 20)


@st.composite
def small_presets(draw: st.DrawFn) -> PerceiverARConfig:
    context_length = draw(st.integers(1, 10))
    num_layers = draw(st.integers(0, 2))
    return PerceiverARConfig.preset(
        draw(st.sampled_from(sorted(PUBLISHED))),
        vocab_size=draw(st.integers(2, 7)),
        context_length=context_length,
        num_latents=draw(st.integers(1, context_length)),
        dim=8,
        num_heads=2,
        head_dim=draw(st.sampled_from([4, 5])),
        num_layers=num_layers,
        cross_layers=tuple(sorted(draw(st.lists(st.integers(0, num_layers), min_size=1, max_size=3)))),
    )


def last_logits(model: PerceiverAR, context: Tensor, num_latents: int) -> Tensor:
    with torch.no_grad():
        return model(context, prefix_len=context.shape[1] - num_latents)[0, -1]


def check_every_step(data: st.DataObject, seed: int, config: PerceiverARConfig) -> None:
    """Draws weights, a ragged prompt and options; goes on until every row has refilled thrice and its start moved."""
    dtype, tolerance = data.draw(st.sampled_from([(torch.float64, 1e-9), (torch.float32, 1e-4)]))
    model = randomize(PerceiverAR(config).to(dtype).eval(), seed)
    longest = longest_context(config)
    lengths = data.draw(st.lists(st.integers(1, 2 * longest), min_size=1, max_size=3))
    some_latents = st.none() | st.integers(1, config.num_latents)
    options: Any = {"refill_latents": data.draw(some_latents), "prompt_latents": data.draw(some_latents)}
    fewer = options["refill_latents"] or max(1, config.num_latents // 2)
    count = longest + 3 * (config.num_latents - fewer + 1)

    prompt = random_rows(lengths, config.vocab_size, seed)
    rows = [row.tolist() for row in prompt]
    starts, refills, latents = [0] * len(rows), [0] * len(rows), [0] * len(rows)
    steps = list(stream(model, prompt, max_new_tokens=count, seed=seed, **options))
    for step in steps:
        for r, row in enumerate(rows):
            start, num_latents = int(step.window_start[r]), int(step.num_latents[r])
            context = torch.tensor([row[start:]])
            assert context.shape[1] <= config.context_length
            expected = last_logits(model, context, num_latents)
            bound = tolerance
            if dtype == torch.float32 and not torch.allclose(step.logits[r], expected, rtol=0, atol=tolerance):
                # A norm over four nearly equal numbers magnifies rounding beyond the tolerance, uncached too.
                exact = last_logits(copy.deepcopy(model).double(), context, num_latents)
                bound += 4 * float((expected - exact).abs().max())
            assert_close(step.logits[r], expected, bound)
            refills[r] += num_latents != latents[r] + 1
            starts[r], latents[r] = start, num_latents
            row.append(int(step.tokens[r]))
            assert_close(step.logprobs[r], step.logits[r].double().log_softmax(-1)[row[-1]], 1e-12)
    assert len(steps) == count
    assert min(refills) >= 3
    assert min(starts) > 0


@st.composite
def every_network(draw: st.DrawFn) -> PerceiverARConfig:
    config = draw(st.one_of(configs(), small_presets()))
    if config.index_dims and draw(st.booleans()):
        config = config.replace(index_dims=(2, 3))  # fewer positions than the context has tokens
    return config


@settings(max_examples=50)
@given(st.data(), seeds, every_network())
def test_every_step_has_the_logits_of_an_uncached_forward_over_the_window_it_reports(
    data: st.DataObject, seed: int, config: PerceiverARConfig
) -> None:
    check_every_step(data, seed, config)


@pytest.mark.slow
@settings(max_examples=3000)
@given(st.data(), seeds, every_network())
def test_thousands_of_models_give_the_logits_of_uncached_forwards(
    data: st.DataObject, seed: int, config: PerceiverARConfig
) -> None:
    check_every_step(data, seed, config)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
def test_far_from_the_start_the_logits_are_those_of_an_uncached_forward(dtype: torch.dtype, tolerance: float) -> None:
    model = tiny().to(dtype)
    row = torch.randint(11, (1_000_000,), generator=torch.Generator().manual_seed(0))
    for step in stream(model, row, max_new_tokens=30, seed=0):
        context = row[int(step.window_start) :]
        with torch.no_grad():
            expected = model(context[None], prefix_len=len(context) - int(step.num_latents))[:, -1]
        assert_close(step.logits, expected, tolerance)
        row = torch.cat([row, step.tokens])


@settings(max_examples=15)
@given(st.lists(st.integers(1, 20), min_size=2, max_size=4), seeds, st.randoms(use_true_random=False), st.booleans())
def test_a_row_gives_the_same_alone_in_a_batch_and_in_any_order(
    lengths: list[int], seed: int, random: Any, table: bool
) -> None:
    model = tiny(position_table="learned") if table else MODEL
    prompt = random_rows(lengths, 11, seed)
    options: Any = {"top_p": 0.9, "repetition_penalty": 1.2, "temperature": 1.1, "frequency_penalty": 0.1}
    together = generate(model, prompt, 16, seed=seed, **options)
    for r, row in enumerate(prompt):
        assert generate(model, row, 16, seed=seed + r, **options)[0].tolist() == together[r].tolist()
    order = list(range(len(prompt)))
    random.shuffle(order)
    shuffled = generate(model, [prompt[r] for r in order], 16, seed=[seed + r for r in order], **options)
    assert shuffled.tolist() == together[order].tolist()


def test_prompts_may_be_tensors_arrays_or_lists() -> None:
    ids = [[1, 2, 3], [4, 5, 6]]
    expected = generate(MODEL, ids, 5, seed=0)
    assert expected.shape == (2, 5)
    assert expected.dtype == torch.int64
    array = np.array(ids, dtype=np.uint16)
    array.flags.writeable = False
    for prompt in (
        array,
        torch.tensor(ids),
        torch.tensor(ids, dtype=torch.uint8),
        list(array),
        [torch.tensor(r) for r in ids],
    ):
        assert torch.equal(generate(MODEL, prompt, 5, seed=0), expected)
    for row in (torch.tensor(ids[0]), array[0]):
        assert torch.equal(generate(MODEL, row, 5, seed=0), expected[:1])


def test_greedy_takes_the_most_likely_token() -> None:
    for step in stream(MODEL, [[1], [2, 3]], max_new_tokens=20, temperature=0.0, top_k=3):
        assert torch.equal(step.tokens, step.logits.argmax(-1))
    cold = generate(MODEL, [[1], [2, 3]], 20, temperature=1e-300, seed=4)
    assert torch.equal(cold, generate(MODEL, [[1], [2, 3]], 20, temperature=0.0))


def test_steps_draw_as_hugging_face_orders_the_filters() -> None:
    penalty, temperature, k, top_p, min_p = 1.3, 0.7, 8, 0.8, 0.05
    row = [1, 2, 3, 2]
    generator = torch.Generator().manual_seed(9)
    options: Any = {"temperature": temperature, "top_k": k, "top_p": top_p, "min_p": min_p}
    for step in stream(MODEL, [row], max_new_tokens=40, seed=9, repetition_penalty=penalty, **options):
        z = step.logits[0].tolist()
        z = [(x / penalty if x > 0 else x * penalty) if i in row else x for i, x in enumerate(z)]
        z = [x / temperature for x in z]
        alive = sorted(range(len(z)), key=lambda i: -z[i])[:k]
        weights = {i: math.exp(z[i]) for i in alive}
        nucleus, mass = [], 0.0
        for i in alive:
            if mass < top_p * sum(weights.values()):
                nucleus.append(i)
            mass += weights[i]
        alive = [i for i in nucleus if weights[i] >= min_p * weights[nucleus[0]]]
        total = sum(weights[i] for i in alive)
        reached = list(accumulate(weights[i] if i in alive else 0.0 for i in range(len(z))))
        chosen = float(torch.rand(1, generator=generator, dtype=torch.float64)) * total
        assert next(i for i, weight in enumerate(reached) if weight > chosen) == int(step.tokens[0])
        row.append(int(step.tokens[0]))


def test_a_finished_row_repeats_its_stop_token_and_costs_no_forward() -> None:
    prompt, stops = [[1], [2, 3], [4, 5, 6]], [0, 7]
    sizes = []
    free = generate(MODEL, prompt, 60, seed=4)
    first = [next(i for i, token in enumerate(row) if token in stops) for row in free.tolist()]
    assert len(set(first)) == 3
    assert min(first) > 0
    hook = MODEL.head.register_forward_hook(lambda module, inputs, logits: sizes.append(len(logits)))
    steps = list(stream(MODEL, prompt, max_new_tokens=60, seed=4, stop_tokens=stops))
    hook.remove()
    ids = torch.stack([step.tokens for step in steps], dim=1)
    assert len(steps) == max(first) + 1  # ends with the last row
    for r, at in enumerate(first):
        assert ids[r, : at + 1].tolist() == free[r, : at + 1].tolist()
        assert ids[r, at:].tolist() == [int(free[r, at])] * (len(steps) - at)
        assert all(torch.equal(step.logits[r], steps[at].logits[r]) for step in steps[at:])
        assert {int(step.num_latents[r]) for step in steps[at:]} == {int(steps[at].num_latents[r])}
    assert sizes == [sum(at >= i for at in first) for i in range(len(steps))]


def test_a_stop_token_in_the_prompt_stops_nothing() -> None:
    assert torch.equal(generate(MODEL, [[7, 7]], 1, seed=0, stop_tokens=[7]), generate(MODEL, [[7, 7]], 1, seed=0))


def test_seeds_repeat_and_their_absence_does_not() -> None:
    def draw(seed: Any) -> list[list[int]]:
        return generate(MODEL, [[1], [1]], 30, seed=seed).tolist()

    assert draw(5) == draw([5, 6]) == draw(5)
    a, b = draw([5, 5])
    assert a == b
    assert draw(5) != draw(7)
    torch.manual_seed(0)
    fresh = draw(None)
    torch.manual_seed(0)
    assert fresh != draw(None)
    state = torch.get_rng_state()
    assert draw(-1) == draw(-1)
    assert torch.equal(state, torch.get_rng_state())  # the global generator is left alone


def test_between_steps_the_model_is_as_it_was() -> None:
    model = tiny(prefix_dropout=0.5, mlp_dropout=0.5)
    expected = generate(model, [[1, 2, 3, 4, 5, 6]], 10, seed=2)
    model.train()
    model.norm.eval()
    modes = [module.training for module in model.modules()]
    steps = stream(model, [[1, 2, 3, 4, 5, 6]], max_new_tokens=10, seed=2)
    for i, step in enumerate(steps):
        assert int(step.tokens) == int(expected[0, i])
        assert not step.logits.requires_grad
        assert not step.logits.is_inference()
        assert [module.training for module in model.modules()] == modes
        assert torch.is_grad_enabled()
        if i == 5:
            steps.close()  # type: ignore[attr-defined]
    assert [module.training for module in model.modules()] == modes
    assert i == 5


def test_steps_do_not_change_after_they_were_given() -> None:
    steps = list(stream(MODEL, [[1], [2]], max_new_tokens=4, seed=1, stop_tokens=[3]))
    assert len({step.logits.data_ptr() for step in steps}) == len(steps)


def test_low_precision_models_generate() -> None:
    model = tiny().bfloat16()
    step = next(iter(stream(model, [[1, 2]], max_new_tokens=1)))
    assert step.logits.dtype == torch.bfloat16
    assert step.tokens.dtype == torch.int64


def test_autocast_generates_what_its_forward_predicts() -> None:
    model, row = tiny().float(), [1, 2, 3]
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        for step in stream(model, [row], max_new_tokens=12, seed=0):
            context = torch.tensor([row[int(step.window_start) :]])
            expected = model(context, prefix_len=context.shape[1] - int(step.num_latents))[:, -1]
            assert_close(step.logits, expected, 0.05)
            row.append(int(step.tokens))


def test_nothing_is_generated_where_nothing_is_asked_for() -> None:
    assert generate(MODEL, [[1], [2, 3]], 0).shape == (2, 0)
    assert list(stream(MODEL, [[1]], max_new_tokens=0)) == []


@pytest.mark.slow
def test_a_hundred_thousand_tokens_take_constant_memory_and_time_each() -> None:
    config = PerceiverARConfig(context_length=4096, num_latents=64, dim=32, num_layers=2, num_heads=2)
    model = randomize(PerceiverAR(config).eval(), seed=0)
    seconds, memory, start = [], [], time.perf_counter()
    for i, _ in enumerate(stream(model, [[1]], max_new_tokens=100_000, seed=0), start=1):
        if i % 10_000 == 0:
            seconds.append(time.perf_counter() - start)
            memory.append(resident_bytes())
            start = time.perf_counter()
    print(f"seconds per 10,000 tokens {[round(s, 1) for s in seconds]}, MB {[m >> 20 for m in memory]}")
    assert len(seconds) == 10
    assert max(memory[1:]) - memory[1] < 20 << 20
    assert statistics.median(seconds[-3:]) < 1.5 * statistics.median(seconds[1:4])


def resident_bytes() -> int:
    pages = Path("/proc/self/statm")
    if not pages.exists():
        pytest.skip("the memory of a process is read from /proc")
    return int(pages.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


# Settings


def test_samples_are_rows_of_their_own_and_the_prompt_is_read_once() -> None:
    prompt, read = random_rows([9, 5], 11, seed=0), []
    expected = generate(MODEL, [row for row in prompt for _ in range(3)], 20, seed=2)
    hook = MODEL.cross_attention[0].kv_proj.register_forward_hook(  # type: ignore[union-attr]
        lambda module, inputs, output: read.append(output.shape[0] * (output.shape[1] - 1))  # and the token before
    )
    steps = stream(MODEL, prompt, max_new_tokens=20, seed=2, num_samples=3)
    step = next(steps)
    hook.remove()
    assert sum(read) == 9 - 1 + 5 - 1 + 6  # each prompt once, but for its last token
    tokens = torch.stack([step.tokens, *(step.tokens for step in steps)], dim=1)
    assert torch.equal(tokens, expected)


def test_a_row_ends_with_a_stop_sequence() -> None:
    free = generate(MODEL, [[1], [2, 3]], 60, seed=4).tolist()
    sequence = free[0][20:23]
    at = next(i for i in range(3, 60) if free[0][i - 3 : i] == sequence)
    ids = generate(MODEL, [[1], [2, 3]], 60, seed=4, stop_sequences=[[0, 0, 0, 0, 0, 0], sequence])
    assert ids[0].tolist() == free[0][:at] + [sequence[-1]] * (ids.shape[1] - at)
    # What the prompt ends with is no part of it.
    prompt, last = [[1, *sequence[:-1]]], sequence[-1]
    assert generate(MODEL, prompt, 2, allowed_next=only(last), stop_sequences=[sequence]).tolist() == [[last, last]]


def only(*ids: int) -> Any:
    allowed = torch.zeros(11, dtype=torch.bool)
    allowed[list(ids)] = True
    return lambda row: allowed


def test_only_ids_that_may_come_next_are_drawn() -> None:
    def alternate(row: Tensor) -> Tensor:
        return torch.arange(11) % 2 != row[-1] % 2

    for temperature in (0.0, 5.0):
        ids = generate(MODEL, [[1], [2]], 30, seed=0, allowed_next=alternate, temperature=temperature)
        assert (ids[:, 1:] % 2 != ids[:, :-1] % 2).all()
        assert (ids[:, 0] % 2).tolist() == [0, 1]
    with pytest.raises(InputError, match=r"row 1 cannot go on after 3 tokens: .* leave no id that may come next"):
        generate(MODEL, [[1, 1], [2, 2, 2]], 1, allowed_next=lambda row: torch.full((11,), len(row) < 3))


def test_processors_are_called_as_those_of_transformers() -> None:
    seen = []

    def ban_the_last(input_ids: Tensor, scores: Tensor) -> Tensor:
        seen.append(input_ids[0].tolist())
        return scores.scatter(1, input_ids[:, -1:], float("-inf"))

    ids = generate(MODEL, [[1, 2]], 30, seed=0, logits_processors=[ban_the_last])[0].tolist()
    assert all(a != b for a, b in zip([2, *ids], ids, strict=False))
    assert seen == [[1, 2, *ids[:i]] for i in range(30)]
    with pytest.raises(InputError, match=r"row 0 cannot go on after 1 tokens: .* leave NaN"):
        generate(MODEL, [[1]], 1, logits_processors=[lambda input_ids, scores: scores * math.nan])


def test_the_frequency_penalty_counts_what_the_row_has_drawn() -> None:
    row, drawn = [3, 3, 3], [0] * 11
    for step in stream(MODEL, [row], max_new_tokens=40, temperature=0.0, frequency_penalty=0.7):
        expected = [x - 0.7 * n for x, n in zip(step.logits[0].tolist(), drawn, strict=True)]
        assert int(step.tokens) == expected.index(max(expected))
        drawn[int(step.tokens)] += 1
    assert sum(n > 0 for n in drawn) > 2


def test_the_presence_penalty_is_for_what_the_row_has_drawn_however_often() -> None:
    row, drawn = [3, 3, 3], set[int]()
    for step in stream(MODEL, [row], max_new_tokens=20, temperature=0.0, presence_penalty=0.9):
        expected = [x - 0.9 * (index in drawn) for index, x in enumerate(step.logits[0].tolist())]
        assert int(step.tokens) == expected.index(max(expected))
        drawn.add(int(step.tokens))
    assert len(drawn) > 2


@pytest.mark.parametrize("num_layers", [0, 1])
def test_sliding_windows_are_exact_where_latents_know_nothing_of_each_other(num_layers: int) -> None:
    # Keys and values of the first self-attention layer depend on the context alone, and here it drops nothing.
    model = tiny(num_layers=num_layers, context_length=40)
    row = [1, 2, 3, 4, 5, 6, 7]
    for i, step in enumerate(stream(model, [row], max_new_tokens=33, seed=3, slide=True)):
        assert step.window_start == 0
        assert step.num_latents == min(2 + i, 4)
        with torch.no_grad():
            expected = model(torch.tensor([row]), prefix_len=len(row) - int(step.num_latents))[:, -1]
        assert_close(step.logits, expected, 1e-9)
        row.append(int(step.tokens))


@pytest.mark.parametrize("fields", [{}, {"latent_keys": "query", "local_context": 1}, {"position_table": "learned"}])
def test_sliding_rows_give_the_same_alone_and_in_a_batch(fields: dict[str, Any]) -> None:
    model, prompt = tiny(**fields), random_rows([1, 5, 14], 11, seed=0)
    together = list(stream(model, prompt, max_new_tokens=40, seed=0, slide=True))
    for r, row in enumerate(prompt):
        for a, b in zip(together, stream(model, row, max_new_tokens=40, seed=r, slide=True), strict=True):
            assert_close(a.logits[r], b.logits[0], 1e-9)
            assert a.tokens[r] == b.tokens[0]


# Errors


@pytest.mark.parametrize(
    ("prompt", "fields", "message"),
    [
        ([[1], []], {}, "prompt row 1 is empty: generation needs a start token"),
        (torch.zeros(2, 0, dtype=torch.long), {}, "prompt row 0 is empty: generation needs a start token"),
        ([], {}, "no rows"),
        (torch.zeros(1, 1, 1, dtype=torch.long), {}, r"shape \(1, 1, 1\)"),
        ([1, 2], {}, "prompt row 0 is a single id"),
        ([torch.zeros(1, 2, dtype=torch.long)], {}, r"prompt row 0 has shape \(1, 2\)"),
        (["text"], {}, "prompt row 0 is no sequence of ids"),
        ([[0.5]], {}, "ids are integers"),
        ([[1], [2, 11]], {}, r"prompt row 1 has id 11 at place 1: this model's vocabulary is ids 0 \.\.\. 10"),
        ([[-1]], {}, "prompt row 0 has id -1"),
        ([[1]], {"max_new_tokens": -1}, "max_new_tokens is -1"),
        ([[1]], {"temperature": -0.5}, "temperature is -0.5"),
        ([[1]], {"temperature": math.nan}, "temperature is nan"),
        ([[1]], {"top_k": 0}, "top_k is 0"),
        ([[1]], {"top_p": 0.0}, "top_p is 0.0"),
        ([[1]], {"top_p": 1.5}, "top_p is 1.5"),
        ([[1]], {"min_p": -0.1}, "min_p is -0.1"),
        ([[1]], {"min_p": 1.1}, "min_p is 1.1"),
        ([[1]], {"repetition_penalty": 0.0}, "repetition_penalty is 0.0"),
        ([[1]], {"refill_latents": 0}, "refill_latents is 0"),
        ([[1]], {"refill_latents": 5}, r"refill_latents is 5: it must be a whole number in 1 \.\.\. 4"),
        ([[1]], {"refill_latents": 2.5}, r"refill_latents is 2.5: it must be a whole number in 1 \.\.\. 4"),
        ([[1]], {"seed": 1.5}, "seed is 1.5: give a whole number"),
        ([[1]], {"seed": [1.5]}, r"seed is \[1.5\]: give a whole number"),
        ([[1]], {"max_new_tokens": 2.5}, "max_new_tokens is 2.5"),
        ([[1]], {"num_samples": 1.5}, "num_samples is 1.5"),
        ([[1]], {"top_k": 1.5}, "top_k is 1.5"),
        ([[1]], {"prompt_latents": 5}, r"prompt_latents is 5: it must be a whole number in 1 \.\.\. 4"),
        ([[1]], {"stop_tokens": [11]}, "a stop token or sequence has id 11"),
        ([[1]], {"stop_sequences": [[1], []]}, "a stop sequence is empty"),
        ([[1]], {"num_samples": 0}, "num_samples is 0"),
        ([[1]], {"frequency_penalty": math.inf}, "frequency_penalty is inf"),
        ([[1]], {"presence_penalty": math.nan}, "presence_penalty is nan"),
        ([[1]], {"seed": [1, 2]}, "seed has 2 numbers, the prompt 1 rows"),
    ],
)
def test_what_cannot_work_is_refused_at_once(prompt: Any, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        stream(MODEL, prompt, **{"max_new_tokens": 3, **fields})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("allowed", "says"),
    [
        (torch.ones(12, dtype=torch.bool), r"a torch.bool tensor \(12,\)"),
        (torch.ones(1, 11, dtype=torch.bool), r"a torch.bool tensor \(1, 11\)"),
        (torch.ones(11), r"a torch.float32 tensor \(11,\)"),
        ([True] * 11, "a list"),
    ],
)
def test_what_allowed_next_must_give_is_said(allowed: Any, says: str) -> None:
    with pytest.raises(InputError, match=rf"allowed_next gave {says}: it must give a bool tensor \(11,\)"):
        generate(MODEL, [[1]], 3, allowed_next=lambda ids: allowed)


def test_weights_of_nan_are_named() -> None:
    model = tiny()
    torch.nn.init.constant_(model.head.weight, math.nan)
    with pytest.raises(InputError, match="the model's weights give NaN"):
        generate(model, [[1]], 3)


@pytest.mark.parametrize(
    "setting", [{"latents_per_position": 2}, {"learned_queries": "each"}, {"positions_from_end": True}], ids=str
)
def test_models_whose_latents_cannot_be_kept_are_computed_anew(setting: dict[str, Any]) -> None:
    config = PerceiverARConfig(vocab_size=5, context_length=8, num_latents=4, dim=8, num_heads=1, **setting)
    assert not config.cacheable
    model = randomize(PerceiverAR(config).double(), seed=0).eval()
    row = [1, 2, 3]
    for step in stream(model, torch.tensor([row, [4, 0, 1]]), max_new_tokens=20, seed=0, num_samples=2):
        start, N = int(step.window_start[0]), int(step.num_latents[0])
        context = torch.tensor([row[start:]])
        assert_close(step.logits[0], model(context, context.shape[1] - N)[0, -1], 1e-9)
        row.append(int(step.tokens[0]))
    assert start > 0

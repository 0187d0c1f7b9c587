"""Generation draws from the logits of the windows it reports, row by row, whatever the batch."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import assert_close, configs, randomize
from torch import Tensor

from perceiver_ar import generation
from perceiver_ar.config import PerceiverARConfig
from perceiver_ar.errors import InputError
from perceiver_ar.generation import (
    Window,
    generate,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    next_window,
    penalise_repetition,
    sample,
    stream,
)
from perceiver_ar.model import PerceiverAR


def tiny(**fields: Any) -> PerceiverAR:
    base = {"vocab_size": 11, "context_length": 12, "num_latents": 4, "dim": 8, "num_layers": 2, "num_heads": 2}
    return randomize(PerceiverAR(PerceiverARConfig(**{**base, **fields})).double().eval(), seed=1)


MODEL = tiny()
seeds = st.integers(0, 2**20)


def random_rows(lengths: list[int], vocab_size: int, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(vocab_size, (length,), generator=generator) for length in lengths]


# Windows


@st.composite
def plans(draw: st.DrawFn) -> tuple[PerceiverARConfig, int, int | None]:
    context_length = draw(st.integers(1, 24))
    num_latents = draw(st.integers(1, context_length))
    config = PerceiverARConfig(
        context_length=context_length,
        num_latents=num_latents,
        position_table=draw(st.sampled_from(["none", "learned"])),
    )
    return config, draw(st.integers(1, 40)), draw(st.none() | st.integers(1, num_latents))


@given(plans())
def test_windows_keep_within_the_settings_grow_and_refill(plan: tuple[PerceiverARConfig, int, int | None]) -> None:
    config, prompt_length, refill_latents = plan
    most, longest = config.num_latents, config.context_length
    fewer = refill_latents or max(1, most // 2)
    window, refills = None, 0
    for t in range(prompt_length, prompt_length + 100):
        previous, window = window, next_window(config, window, t, refill_latents)
        length = t - window.start
        assert window.start >= 0
        assert 1 <= window.num_latents <= min(most, length)
        assert length <= longest
        if t <= longest:
            assert window.start == 0  # nothing is forgotten before it must be
        if previous is None:
            assert window.num_latents == (t if t <= most else fewer)
            continue
        assert window.start >= previous.start
        if window.num_latents == previous.num_latents + 1:
            grown = True
        else:
            grown = False
            refills += 1
            assert window.num_latents == fewer
            assert previous.num_latents == most or t - previous.start > longest
        assert window.start == previous.start or not grown
        assert length >= min(t, longest - (most - fewer))
    assert refills >= (99 - most) // (most - fewer + 1)


def test_windows_of_a_short_prompt_step_by_step() -> None:
    config = PerceiverARConfig(context_length=8, num_latents=4)
    window, seen = None, []
    for t in range(2, 16):
        window = next_window(config, window, t)
        seen.append((t - window.start, window.num_latents))
    # (length, latents): grow to 4, refill with 2 over the same context; at a full context refill over a shorter one.
    grow = [(2, 2), (3, 3), (4, 4), (5, 2), (6, 3), (7, 4), (8, 2)]
    assert seen == [*grow, (6, 2), (7, 3), (8, 4), (6, 2), (7, 3), (8, 4), (6, 2)]


def test_position_tables_smaller_than_the_context_limit_the_window() -> None:
    model = tiny(position_table="learned", index_dims=(2, 3))
    assert generate(model, torch.zeros(2, 9, dtype=torch.long), 20).shape == (2, 20)


# Steps


@settings(max_examples=40)
@given(st.data(), seeds)
def test_every_step_has_the_logits_of_an_uncached_forward_over_the_window_it_reports(
    data: st.DataObject, seed: int
) -> None:
    config = data.draw(configs())
    model = randomize(PerceiverAR(config).double().eval(), seed)
    longest = 2 * config.context_length
    lengths = data.draw(st.lists(st.integers(1, longest), min_size=1, max_size=3))
    refill_latents = data.draw(st.none() | st.integers(1, config.num_latents))
    prompt = random_rows(lengths, config.vocab_size, seed)
    rows = [row.tolist() for row in prompt]
    count = 0
    for step in stream(model, prompt, max_new_tokens=longest, seed=seed, refill_latents=refill_latents):
        for r, row in enumerate(rows):
            context = torch.tensor([row[int(step.window_start[r]) :]])
            assert context.shape[1] <= config.context_length
            with torch.no_grad():
                expected = model(context, prefix_len=context.shape[1] - int(step.num_latents[r]))[0, -1]
            assert_close(step.logits[r], expected, 1e-9)
            row.append(int(step.tokens[r]))
        count += 1
    assert count == longest


@settings(max_examples=15)
@given(st.lists(st.integers(1, 20), min_size=2, max_size=4), seeds, st.randoms(use_true_random=False), st.booleans())
def test_a_row_gives_the_same_alone_in_a_batch_and_in_any_order(
    lengths: list[int], seed: int, random: Any, table: bool
) -> None:
    model = tiny(position_table="learned") if table else MODEL
    prompt = random_rows(lengths, 11, seed)
    options: Any = {"top_p": 0.9, "repetition_penalty": 1.2, "temperature": 1.1}
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
        torch.tensor(ids),
        torch.tensor(ids, dtype=torch.uint8),
        list(array),
        [torch.tensor(r) for r in ids],
    ):
        assert torch.equal(generate(MODEL, prompt, 5, seed=0), expected)
    assert torch.equal(generate(MODEL, torch.tensor(ids[0]), 5, seed=0), expected[:1])


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
        p = torch.tensor([weights[i] / total if i in alive else 0.0 for i in range(len(z))], dtype=torch.float64)
        assert int(torch.multinomial(p, 1, generator=generator)) == int(step.tokens[0])
        row.append(int(step.tokens[0]))


def test_a_finished_row_repeats_its_stop_token_and_costs_no_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    prompt, stops = [[1], [2, 3], [4, 5, 6]], [0, 7]
    sizes = []
    next_logits = generation.next_logits

    def counting(model: PerceiverAR, contexts: Any, windows: Any) -> Tensor:
        sizes.append(len(contexts))
        return next_logits(model, contexts, windows)

    monkeypatch.setattr(generation, "next_logits", counting)
    free = generate(MODEL, prompt, 60, seed=4)
    first = [next(i for i, token in enumerate(row) if token in stops) for row in free.tolist()]
    assert len(set(first)) == 3
    assert min(first) > 0
    sizes.clear()
    steps = list(stream(MODEL, prompt, max_new_tokens=60, seed=4, stop_tokens=stops))
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


def test_nothing_is_generated_where_nothing_is_asked_for() -> None:
    assert generate(MODEL, [[1], [2, 3]], 0).shape == (2, 0)
    assert list(stream(MODEL, [[1]], max_new_tokens=0)) == []


# Filters

rows_of_logits = st.lists(
    st.lists(st.floats(-6, 6).map(lambda x: round(x, 3)), min_size=7, max_size=7, unique=True), min_size=1, max_size=3
).map(lambda rows: torch.tensor(rows, dtype=torch.float64))


def kept(logits: Tensor) -> list[set[int]]:
    return [{i for i, x in enumerate(row) if x > -math.inf} for row in logits.tolist()]


@given(rows_of_logits, st.integers(1, 9))
def test_top_k_keeps_the_k_most_likely(logits: Tensor, k: int) -> None:
    filtered = keep_top_k(logits, k)
    assert kept(filtered) == [set(sorted(range(7), key=lambda i, row=row: -row[i])[:k]) for row in logits.tolist()]
    assert torch.equal(torch.where(filtered > -math.inf, filtered, logits), logits)


@given(rows_of_logits, st.floats(0.001, 1))
def test_top_p_keeps_the_fewest_with_that_probability(logits: Tensor, p: float) -> None:
    filtered = keep_top_p(logits, p)
    for row, chosen in zip(logits.softmax(-1).tolist(), kept(filtered), strict=True):
        order = sorted(range(7), key=lambda i: -row[i])
        fewest = next((n for n in range(1, 8) if sum(row[i] for i in order[:n]) >= p - 1e-9), 7)
        most = next((n for n in range(1, 8) if sum(row[i] for i in order[:n]) >= p + 1e-9), 7)
        assert chosen in [set(order[:n]) for n in range(fewest, most + 1)]
    assert torch.equal(torch.where(filtered > -math.inf, filtered, logits), logits)


@given(rows_of_logits, st.floats(0, 1))
def test_min_p_keeps_those_not_much_less_likely_than_the_best(logits: Tensor, p: float) -> None:
    for row, chosen in zip(logits.softmax(-1).tolist(), kept(keep_min_p(logits, p)), strict=True):
        assert {i for i in range(7) if row[i] >= (p + 1e-9) * max(row)} <= chosen
        assert chosen <= {i for i in range(7) if row[i] >= (p - 1e-9) * max(row)}
        assert row.index(max(row)) in chosen


@given(rows_of_logits, st.floats(0.1, 5), st.sets(st.integers(0, 6)))
def test_the_penalty_is_for_the_ids_seen(logits: Tensor, penalty: float, ids: set[int]) -> None:
    seen = torch.tensor([i in ids for i in range(7)]).expand_as(logits)
    for row, after in zip(logits.tolist(), penalise_repetition(logits, seen, penalty).tolist(), strict=True):
        for i, (x, y) in enumerate(zip(row, after, strict=True)):
            assert y == (x if i not in ids else x / penalty if x > 0 else x * penalty)


def test_samples_follow_the_softmax() -> None:
    p = torch.tensor([0.5, 0.3, 0.2, 0.0])
    generator = torch.Generator().manual_seed(0)
    logits = 2 * p.log().expand(20, 1000, 4)
    counts = torch.bincount(sample(logits, 2.0, generator=generator).flatten(), minlength=4)
    assert ((counts / 20_000 - p).abs() < 4 * (p * (1 - p) / 20_000).sqrt() + 1e-12).all()
    assert sample(logits, 0.0).shape == (20, 1000)
    assert sample(p, 0.0) == 0


# Errors


@pytest.mark.parametrize(
    ("prompt", "fields", "message"),
    [
        ([[1], []], {}, "prompt row 1 is empty: generation needs a start token"),
        (torch.zeros(2, 0, dtype=torch.long), {}, "prompt row 0 is empty: generation needs a start token"),
        ([], {}, "no rows"),
        (torch.zeros(1, 1, 1, dtype=torch.long), {}, r"shape \(1, 1, 1\)"),
        ([1, 2], {}, "prompt row 0 has shape"),
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
        ([[1]], {"refill_latents": 5}, r"refill_latents is 5: it must be in 1 \.\.\. 4"),
        ([[1]], {"stop_tokens": [11]}, "stop_tokens has id 11"),
        ([[1]], {"seed": [1, 2]}, "seed has 2 numbers, the prompt 1 rows"),
    ],
)
def test_what_cannot_work_is_refused_at_once(prompt: Any, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        stream(MODEL, prompt, **{"max_new_tokens": 3, **fields})
    assert "\n" not in str(error.value)


def test_weights_of_nan_are_named() -> None:
    model = tiny()
    torch.nn.init.constant_(model.head.weight, math.nan)
    with pytest.raises(InputError, match="the model's weights give NaN"):
        generate(model, [[1]], 3)


def test_a_window_is_a_plain_value() -> None:
    assert Window(1, 2) == Window(1, 2)

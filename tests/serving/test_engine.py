"""Rows that come and go beside others give the tokens that they give alone."""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from helpers import window_nats
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import configs, randomize
from torch import Tensor

from perceiver_ar.config import PerceiverARConfig
from perceiver_ar.errors import InputError
from perceiver_ar.evaluation import evaluate
from perceiver_ar.generation import generate
from perceiver_ar.generation.rows import Row, RowSettings, WeightsError
from perceiver_ar.generation.sampling import Sampling
from perceiver_ar.network.model import PerceiverAR
from perceiver_ar.serving.engine import Busy, Engine, Job, TooSlow
from perceiver_ar.serving.slots import LATENTS, SlotDecoder, slot_decoder
from perceiver_ar.windows import Window, longest_context

SETTINGS = {"vocab_size": 11, "context_length": 24, "num_latents": 6, "dim": 8, "num_layers": 2, "num_heads": 2}
seeds = st.integers(0, 2**20)


def tiny(**fields: Any) -> PerceiverAR:
    return randomize(PerceiverAR(PerceiverARConfig(**{**SETTINGS, **fields})).double().eval(), seed=1)


MODEL = tiny()


class Heard:
    """A listener that keeps what it is told, and wants `most` tokens of each sample."""

    def __init__(self, most: int = 1000) -> None:
        self.most, self.samples, self.ends, self.error = most, dict[int, list[int]](), dict[int, str](), None
        self.scores, self.last = list[tuple[int, Tensor | None]](), False
        self.first, self.changed = threading.Event(), threading.Condition()

    def scored(self, tokens: Sequence[int], logprobs: Tensor | None) -> None:
        self.scores += [(token, None if logprobs is None else logprobs[i]) for i, token in enumerate(tokens)]

    def begun(self, last: bool) -> None:
        with self.changed:
            self.last = last
            self.changed.notify_all()

    def token(self, sample: int, token: int, logprobs: Tensor, finish: str | None) -> bool:
        with self.changed:
            tokens = self.samples.setdefault(sample, [])
            tokens.append(token)
            if finish or len(tokens) == self.most:
                self.ends[sample] = finish or "enough"
            self.first.set()
            self.changed.notify_all()
            return sample not in self.ends

    def out_of_time(self, sample: int) -> None:
        with self.changed:
            self.ends[sample] = "late"
            self.changed.notify_all()

    def failed(self, error: Exception) -> None:
        with self.changed:
            self.error: Exception | None = error
            self.changed.notify_all()

    def wait(self, samples: int) -> list[list[int]]:
        """The tokens of all samples when they have ended."""
        with self.changed:
            assert self.changed.wait_for(lambda: self.error is not None or len(self.ends) == samples, timeout=60)
        if self.error is not None:
            raise self.error
        return [self.samples[sample] for sample in range(samples)]


@contextmanager
def running(model: PerceiverAR, **options: Any) -> Iterator[Engine]:
    engine = Engine(model, **options)
    engine.start()
    try:
        yield engine
    finally:
        engine.close()


def job(prompt: list[int], count: int = 5, samples: int = 1, seed: int = 0, most: int = 1000, **sampling: Any) -> Job:
    row = RowSettings(Sampling(**sampling), max_new_tokens=count)
    return Job(torch.tensor(prompt), row, range(seed, seed + samples), Heard(most))


def heard(job: Job) -> Heard:
    assert isinstance(job.listener, Heard)
    return job.listener


@st.composite
def jobs(draw: st.DrawFn, vocab_size: int) -> tuple[Job, dict[str, Any], int]:
    """A job, the same for `generate`, and after how many tokens its listener has enough."""
    ids = st.integers(0, vocab_size - 1)
    sampling = {
        "temperature": draw(st.sampled_from([0.0, 0.7, 1.5])),
        "top_k": draw(st.none() | st.integers(1, 5)),
        "top_p": draw(st.none() | st.floats(0.3, 1.0)),
        "min_p": draw(st.none() | st.floats(0.0, 0.5)),
        "repetition_penalty": draw(st.sampled_from([1.0, 1.3])),
        "frequency_penalty": draw(st.sampled_from([0.0, 0.4])),
        "presence_penalty": draw(st.sampled_from([0.0, 0.8])),
    }
    stops = draw(st.lists(st.lists(ids, min_size=1, max_size=2).map(tuple), max_size=2))
    odd = draw(st.booleans())

    def allowed(row: Tensor) -> Tensor:
        return torch.arange(vocab_size) % 2 == len(row) % 2

    rows = {"num_samples": draw(st.integers(1, 2)), "max_new_tokens": draw(st.integers(1, 40)), "seed": draw(seeds)}
    prompt = draw(st.lists(ids, min_size=1, max_size=40))
    settings = RowSettings(
        Sampling(**sampling),
        allowed_next=allowed if odd else None,
        stops=tuple(stops),
        max_new_tokens=rows["max_new_tokens"],
    )
    most = draw(st.sampled_from([1, 7, 1000]))
    job = Job(torch.tensor(prompt), settings, range(rows["seed"], rows["seed"] + rows["num_samples"]), Heard(most))
    alone = {**sampling, **rows, "prompt": [prompt], "stop_sequences": stops, "allowed_next": settings.allowed_next}
    return job, alone, most


@settings(max_examples=15)
@given(st.data(), seeds)
def test_under_load_every_sample_has_the_tokens_that_it_has_alone(data: st.DataObject, seed: int) -> None:
    config = data.draw(configs())
    model = randomize(PerceiverAR(config).double().eval(), seed)
    several = data.draw(st.lists(jobs(config.vocab_size), min_size=1, max_size=8))
    with running(model, slots=data.draw(st.integers(2, 5))) as engine:
        for job, _, _ in several:
            engine.submit([job])
        left = [job for job, _, _ in several if data.draw(st.integers(0, 3)) == 0]
        engine.cancel(left)
        for job, alone, most in several:
            if job in left:
                continue
            samples = heard(job).wait(len(job.seeds))
            expected = generate(model, **alone)
            for sample, tokens in enumerate(samples):
                assert tokens == expected[sample].tolist()[: len(tokens)]
                assert len(tokens) == min(most, alone["max_new_tokens"]) or (
                    any(tuple(tokens[-len(stop) :]) == stop for stop in job.settings.stops)
                )


def test_a_prompt_that_begins_like_the_last_is_read_from_there_on() -> None:
    ids = torch.randint(11, (24,), generator=torch.Generator().manual_seed(0)).tolist()
    with torch.inference_mode():
        decoder = slot_decoder(MODEL, 1, 24)
        assert isinstance(decoder, SlotDecoder)
        kept = []
        for prompt in (ids[:20], ids[:22], [*ids[:9], 1 - ids[9] % 2, 4, 4, 4, 4], ids[:20]):
            row = Row(0, torch.tensor(prompt), MODEL.config)
            assert sum(1 for _ in decoder.read(row, piece=1)) >= 2
            kept.append(row.kept)
            decoder.admit([row])
            expected = MODEL(torch.tensor([prompt]), prefix_len=row.prefix_len)[:, -1]
            torch.testing.assert_close(decoder.next_logits(), expected, rtol=0, atol=1e-9)
            decoder.remove([row])
    assert kept == [0, 19, 9, 9]


@settings(max_examples=25)
@given(st.data(), seeds)
def test_windows_are_read_in_pieces_with_the_latents_of_one_forward(data: st.DataObject, seed: int) -> None:
    config = data.draw(configs())
    model = randomize(PerceiverAR(config).double().eval(), seed)
    longest = longest_context(config)
    ids = torch.randint(config.vocab_size, (2 * longest,), generator=torch.Generator().manual_seed(seed))
    with torch.inference_mode():
        decoder = slot_decoder(model, 1, longest)
        for _ in range(3):
            end = data.draw(st.integers(1, 2 * longest))
            start = data.draw(st.integers(max(0, end - longest), end - 1))
            N = data.draw(st.integers(1, min(end - start, config.num_latents)))
            row = Row(0, ids[:end], config)
            row.window = Window(start, N)
            found = [part for part in decoder.read(row, newest=True) if part is not None]
            expected = model.latents(ids[None, start:end], end - start - N)
            torch.testing.assert_close(torch.cat(found, dim=1), expected, rtol=0, atol=1e-9)
            assert all(part.shape[1] <= LATENTS for part in found)


def test_a_compiled_engine_draws_the_same() -> None:
    with running(MODEL, slots=2, compile=True) as engine:
        several = [job([1, 2, 3], 12, seed=seed) for seed in range(3)]
        for one in several:
            engine.submit([one])
        for seed, one in enumerate(several):
            [tokens] = heard(one).wait(1)
            assert tokens == generate(MODEL, [[1, 2, 3]], 12, seed=seed)[0].tolist()


def test_a_shorter_context_is_that_of_a_model_with_it() -> None:
    prompt = torch.randint(11, (30,), generator=torch.Generator().manual_seed(0)).tolist()
    shorter = tiny(context_length=10)
    shorter.load_state_dict(MODEL.state_dict())
    with running(MODEL, slots=1, max_context=10) as engine, running(MODEL, slots=1) as longer:
        one = job(prompt, 20)
        engine.submit([one])
        assert heard(one).wait(1) == generate(shorter, [prompt], 20, seed=0).tolist()
        assert engine.nbytes < longer.nbytes
    with pytest.raises(InputError, match="max_context is 25: it must be in 6"):
        Engine(MODEL, slots=1, max_context=25)


def test_a_full_queue_takes_no_more_and_who_leaves_makes_room() -> None:
    with running(MODEL, slots=1, queue=2) as engine:
        endless = job([0], 10**9)
        engine.submit([endless])
        assert heard(endless).first.wait(60)
        waiting = job([0]), job([0])
        with pytest.raises(Busy):
            engine.submit([*waiting, job([0])])
        assert engine.waiting == 0
        engine.submit(waiting)
        with pytest.raises(Busy):
            engine.submit([job([0])])
        engine.cancel([waiting[0]])
        last = job([3])
        engine.submit([last])
        engine.cancel([endless])
        assert heard(last).wait(1) == generate(MODEL, [[3]], 5, seed=0).tolist()
        assert heard(waiting[0]).samples == {}


def test_a_job_that_takes_too_long_ends() -> None:
    with running(MODEL, slots=1, seconds=0.05) as engine:
        one = job([0], 10**9)
        engine.submit([one])
        heard(one).wait(1)
        assert heard(one).ends == {0: "late"}


def test_a_row_that_cannot_go_on_fails_alone() -> None:
    def stuck_at_three(ids: Tensor) -> Tensor:
        return torch.full((11,), len(ids) < 3)

    with running(MODEL, slots=4) as engine:
        stuck = Job(torch.tensor([1]), RowSettings(allowed_next=stuck_at_three, max_new_tokens=9), [0, 1], Heard())
        several = [job([4], 40), stuck, job([5], 40)]
        engine.submit(several)
        with pytest.raises(InputError, match="cannot go on after 3 tokens"):
            heard(stuck).wait(2)
        for one in several[::2]:
            assert heard(one).wait(1) == generate(MODEL, one.prompt, 40, seed=0).tolist()


def test_extreme_penalties_harm_no_other_row() -> None:
    with running(MODEL, slots=3) as engine:
        extremes = [{"frequency_penalty": -100, "presence_penalty": -100}, {"repetition_penalty": 0.01}]
        several = [job([4], 40), *(job([1], 40, **extreme) for extreme in extremes)]
        engine.submit(several)
        for one, extreme in zip(several, [{}, *extremes], strict=True):
            assert heard(one).wait(1) == generate(MODEL, one.prompt, 40, seed=0, **extreme).tolist()


def broken_for_ten() -> PerceiverAR:
    """A model that computes NaN once it reads the id 10."""
    model = tiny()
    with torch.no_grad():
        model.embed.weight[10] = torch.nan
    return model


def test_no_row_sees_the_nan_of_a_row_that_was_in_its_slot() -> None:
    def not_ten(ids: Tensor) -> Tensor:
        return torch.arange(11) != 10

    model, settings = broken_for_ten(), RowSettings(allowed_next=not_ten, max_new_tokens=9)
    with running(model, slots=2) as engine:
        wrong = [job([10] * 20, 5), job([10] * 20, 5)]
        for one in wrong:
            engine.submit([one])
        for one in wrong:
            with pytest.raises(WeightsError, match="weights give NaN"):
                heard(one).wait(1)
        several = [Job(torch.tensor(prompt), settings, [0], Heard()) for prompt in ([2] * 3, [1] * 15)]
        engine.submit(several)
        for one in several:
            assert heard(one).wait(1) == generate(model, one.prompt, 9, seed=0, allowed_next=not_ten).tolist()


def test_a_cleared_decoder_is_all_zeros() -> None:
    with torch.inference_mode():
        decoder = slot_decoder(MODEL, 2, 24)
        assert isinstance(decoder, SlotDecoder)
        row = Row(0, torch.tensor([1, 2, 3]), MODEL.config)
        for _ in decoder.read(row):
            pass
        decoder.admit([row])
        decoder.clear()
        for kind in (decoder.all.cross, decoder.all.self_attention):
            assert not any(x.any() for layer in kind.layers for x in layer)
            assert not kind.counts.any()


def test_a_prompt_that_scores_nan_fails() -> None:
    with running(broken_for_ten(), slots=1) as engine:
        scored = Job(torch.tensor([1, 10, 2]), RowSettings(), [], Heard(), score=True)
        engine.submit([scored])
        with pytest.raises(WeightsError, match="weights give NaN"):
            heard(scored).wait(1)


@pytest.mark.parametrize("score", [False, True])
def test_a_prompt_that_is_read_for_too_long_ends(score: bool) -> None:
    prompt = torch.ones(24 if not score else 5000, dtype=torch.int64)
    with running(MODEL, slots=2, seconds=0.0) as engine:
        one = Job(prompt, RowSettings(max_new_tokens=5), [] if score else [0, 1], Heard(), score)
        engine.submit([one])
        if score:
            with pytest.raises(TooSlow):
                heard(one).wait(1)
            assert len(heard(one).scores) < 5000
        else:
            with heard(one).changed:
                assert heard(one).changed.wait_for(lambda: heard(one).ends == {0: "late", 1: "late"}, timeout=60)
            assert heard(one).samples == {}


@pytest.mark.parametrize("fields", [{}, {"index_dims": (20,)}, {"positions_from_end": True}])
def test_a_prompt_is_scored_as_it_would_be_drawn(fields: dict[str, Any]) -> None:
    """Without a cache, which would take a forward for each token, in the windows of `evaluate`."""
    model = tiny(position_table="learned", **fields)
    ids = torch.randint(11, (50,), generator=torch.Generator().manual_seed(0))
    with running(model, slots=1) as engine:
        scored = Job(ids, RowSettings(), [], Heard(), score=True)
        engine.submit([scored])
        with heard(scored).changed:
            assert heard(scored).changed.wait_for(lambda: heard(scored).last or heard(scored).error, timeout=60)
    nats = [-float(logprobs[token]) for token, logprobs in heard(scored).scores if logprobs is not None]
    if model.config.cacheable:
        assert nats == pytest.approx(window_nats(model, ids).tolist(), abs=1e-5)
    else:
        assert sum(nats) / len(nats) == pytest.approx(evaluate(model, ids).nats_per_token)


def test_what_cannot_be_compiled_is_refused() -> None:
    with pytest.raises(InputError, match="compile needs a cache"):
        Engine(tiny(position_table="learned", positions_from_end=True), slots=1, compile=True)


def test_jobs_can_be_ended_together() -> None:
    with running(MODEL, slots=1) as engine:
        several = [job([0], 10**9), job([0], 10**9)]
        engine.submit(several)
        assert heard(several[0]).first.wait(60)
        engine.end_jobs()
        for one in several:
            with heard(one).changed:
                assert heard(one).changed.wait_for(lambda one=one: heard(one).ends == {0: "late"}, timeout=60)


def test_after_a_failure_the_next_job_is_served() -> None:
    def broken(ids: Tensor) -> Tensor:
        raise RuntimeError("broken")

    with running(MODEL, slots=2) as engine:
        wrong = Job(torch.tensor([1]), RowSettings(allowed_next=broken, max_new_tokens=3), [0], Heard())
        engine.submit([wrong])
        with pytest.raises(RuntimeError, match="broken"):
            heard(wrong).wait(1)
        one = job([5], 9)
        engine.submit([one])
        assert heard(one).wait(1) == generate(MODEL, [[5]], 9, seed=0).tolist()


def test_closing_ends_what_runs_and_what_waits() -> None:
    engine = Engine(MODEL, slots=1)
    engine.start()
    several = [job([0], 10**9), job([0])]
    engine.submit(several)
    engine.close()
    for one in several:
        with pytest.raises(RuntimeError, match="closing"):
            heard(one).wait(1)
    with pytest.raises(Busy):
        engine.submit([job([0])])

"""Strided scoring equals scoring token by token over the same windows, and leaves no target out."""

import csv
import gzip
import lzma
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import configs, randomize
from torch import Tensor

from perceiver_ar.config import PerceiverARConfig
from perceiver_ar.data.integers import IntegerCodec
from perceiver_ar.data.text import BytesCodec
from perceiver_ar.errors import InputError
from perceiver_ar.evaluation import (
    Evaluation,
    compressors,
    evaluate,
    evaluate_context_lengths,
    write_table,
)
from perceiver_ar.network.model import PerceiverAR
from perceiver_ar.scored_windows import spread_windows, windows


def tiny(**fields: Any) -> PerceiverAR:
    base = {"vocab_size": 9, "context_length": 12, "num_latents": 4, "dim": 8, "num_layers": 2, "num_heads": 2}
    return randomize(PerceiverAR(PerceiverARConfig(**{**base, **fields})).double().eval(), seed=3)


MODEL = tiny()
X = torch.randint(9, (57,), generator=torch.Generator().manual_seed(0))
seeds = st.integers(0, 2**20)


@torch.no_grad()
def naive(model: PerceiverAR, x: Tensor, T: int, N: int, stride: int, first: int = 1) -> list[float]:
    """Nats of each target, each by a forward of its own over the part of its window that is before it."""
    nats = []
    while first < len(x):
        end = min(len(x), max(first + stride, N + 1))
        start = max(0, end - 1 - T)
        prefix_len = max(0, end - 1 - start - N)
        for i in range(first, end):
            nats.append(-model(x[None, start:i], prefix_len)[0, -1].log_softmax(-1)[x[i]].item())
        first = end
    return nats


@st.composite
def strides(draw: st.DrawFn, most: int = 40) -> tuple[int, int, int]:
    context_length = draw(st.integers(1, most))
    num_latents = draw(st.integers(1, context_length))
    return context_length, num_latents, draw(st.integers(1, num_latents))


@given(st.integers(2, 150), strides(), st.data())
def test_every_target_is_scored_exactly_once(n: int, stride: tuple[int, int, int], data: st.DataObject) -> None:
    T, N, S = stride
    first = data.draw(st.integers(1, n - 1))
    scored = []
    for window in windows(n, T, N, S, first):
        latents = window.end - 1 - window.start - window.prefix_len
        assert window.start >= 0
        assert window.prefix_len >= 0
        assert 1 <= latents <= N
        assert window.end - 1 - window.start <= T
        assert latents == N or window.prefix_len == 0
        assert window.first_target > window.start + window.prefix_len  # a latent predicts it
        for target in range(window.first_target, window.end):
            assert target - window.start >= min(target, T - S + 1)
        scored += range(window.first_target, window.end)
    assert scored == list(range(first, n))


def test_the_first_window_is_all_latents() -> None:
    assert [tuple(window) for window in windows(12, 6, 4, 2)] == [
        (0, 0, 5, 1),
        (0, 2, 7, 5),
        (2, 2, 9, 7),
        (4, 2, 11, 9),
        (5, 2, 12, 11),
    ]
    assert list(windows(3, 6, 4, 2)) == [(0, 0, 3, 1)]


@settings(max_examples=30)
@given(st.data(), seeds)
def test_evaluate_equals_scoring_each_token_by_itself(data: st.DataObject, seed: int) -> None:
    config = data.draw(configs())
    model = randomize(PerceiverAR(config).double(), seed)
    places = config.max_positions or config.context_length
    T = data.draw(st.integers(1, min(config.context_length, places)))
    N = data.draw(st.integers(1, T))  # more or fewer than in training
    stride = data.draw(st.integers(1, N))
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(config.vocab_size, (data.draw(st.integers(2, 30)),), generator=generator)
    batch_size = data.draw(st.integers(1, 5))
    result = evaluate(model, x, stride=stride, num_latents=N, context_length=T, batch_size=batch_size)
    expected = naive(model.eval(), x, T, N, stride)
    assert result.tokens == len(expected) == len(x) - 1
    assert result.nats_per_token == pytest.approx(sum(expected) / len(expected), abs=1e-6)
    assert (result.context_length, result.num_latents, result.stride) == (T, N, stride)


def test_stride_one_is_the_plain_loop() -> None:
    with torch.no_grad():
        nats = [-MODEL(X[None, max(0, i - 12) : i])[0, -1].log_softmax(-1)[X[i]].item() for i in range(1, len(X))]
    assert evaluate(MODEL, X, stride=1).nats_per_token == pytest.approx(sum(nats) / len(nats), abs=1e-6)


def test_units_and_defaults() -> None:
    byte_lengths = np.array([0, 1, 2, 3, 4, 1, 1, 1, 1])
    result = evaluate(MODEL, X, byte_lengths=byte_lengths)
    assert (result.context_length, result.num_latents, result.stride) == (12, 4, 2)
    nats = sum(naive(MODEL, X, 12, 4, 2))
    assert result.tokens == 56
    assert result.bytes == sum(byte_lengths[X[1:]])
    assert result.bits_per_token == pytest.approx(nats / math.log(2) / 56)
    assert result.bits_per_byte == pytest.approx(nats / math.log(2) / sum(byte_lengths[X[1:]]))
    assert result.perplexity == pytest.approx(math.exp(nats / 56))
    assert result.seconds > 0
    assert evaluate(tiny(num_latents=1), X).stride == 1
    assert evaluate(MODEL, X, context_length=3).num_latents == 3
    assert evaluate(MODEL, X, byte_lengths=[0] * 9).bits_per_byte is None
    plain = evaluate(MODEL, X).to_dict()
    assert plain["bytes"] is None
    assert evaluate(MODEL, X, byte_lengths=[0] * 9).bytes is None
    assert plain["bits_per_byte"] is None
    assert plain["tokens"] == 56


def test_the_standard_error_is_that_of_the_windows() -> None:
    result = evaluate(MODEL, X, stride=4)  # 56 targets: 14 windows of 4, for which it is the textbook's
    means = np.array(naive(MODEL, X, 12, 4, 4)).reshape(14, 4).mean(axis=1)
    assert result.standard_error == pytest.approx(means.std(ddof=1) / math.sqrt(14))
    assert evaluate(MODEL, X[:4]).standard_error is None


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.uint32])
def test_memory_maps_are_read_window_by_window(tmp_path: Path, dtype: Any) -> None:
    X.numpy().astype(dtype).tofile(tmp_path / "x.bin")
    tokens = np.memmap(tmp_path / "x.bin", dtype=np.dtype(dtype).newbyteorder("<"), mode="r")
    longest = 0

    class Watched(np.memmap):
        def __getitem__(self, index: Any) -> Any:
            nonlocal longest
            longest = max(longest, len(range(*index.indices(len(self)))))
            return np.asarray(super().__getitem__(index))

    result = evaluate(MODEL, tokens.view(Watched))
    assert result.nats_per_token == pytest.approx(evaluate(MODEL, X).nats_per_token, abs=1e-12)
    assert longest == 13


def test_max_tokens_scores_the_first_ones() -> None:
    result = evaluate(MODEL, X, max_tokens=20)
    assert result.tokens == 20
    assert result.nats_per_token == pytest.approx(evaluate(MODEL, X[:21]).nats_per_token)
    assert evaluate(MODEL, X, max_tokens=1000).tokens == 56
    later = evaluate(MODEL, X, max_tokens=20, first_target=5)
    assert later.nats_per_token == pytest.approx(sum(naive(MODEL, X[:25], 12, 4, 2, first=5)) / 20)


@given(st.integers(2, 57), st.integers(1, 60), strides(12))
def test_a_spread_sample_is_usual_windows_from_everywhere(n: int, most: int, stride: tuple[int, int, int]) -> None:
    T, N, step = stride
    usual = list(windows(n, T, N, step))
    chosen = spread_windows(n, T, N, step, 1, most)
    assert set(chosen) <= set(usual) and chosen == sorted(set(chosen))
    assert len(chosen) == min(len(usual), max(1, most // step))
    places = [0, *(usual.index(window) + 1 for window in chosen), len(usual) + 1]
    assert max(np.diff(places)) <= -(-len(usual) // len(chosen)) + 1


def test_a_spread_sample_scores_like_its_windows() -> None:
    chosen = spread_windows(57, 12, 4, 2, 1, 20)
    result = evaluate(MODEL, X, max_tokens=20, spread=True, byte_lengths=[1] * 9, amounts=lambda ids: {"id": len(ids)})
    nats = [sum(naive(MODEL, X[:end], 12, 4, 2, first=first)) for _, _, end, first in chosen]
    assert (result.tokens, result.bytes, result.amounts) == (20, 20, {"id": 20})
    assert result.nats_per_token == pytest.approx(sum(nats) / 20)
    assert evaluate(MODEL, X, max_tokens=56, spread=True).nats_per_token == evaluate(MODEL, X).nats_per_token


def test_a_spread_sample_of_documents_of_one_length_is_of_whole_ones_from_everywhere() -> None:
    result = evaluate(MODEL, X[:50], document_length=10, max_tokens=18, spread=True)
    both = torch.cat([X[10:20], X[30:40]])
    assert result.tokens == 18
    assert result.nats_per_token == pytest.approx(evaluate(MODEL, both, document_length=10).nats_per_token)


def test_progress_reaches_the_end() -> None:
    calls: list[tuple[int, int]] = []
    evaluate(MODEL, X, batch_size=3, progress=lambda done, total: calls.append((done, total)))
    assert calls == sorted(set(calls))
    assert calls[-1] == (56, 56)
    assert {total for _, total in calls} == {56}


def test_the_model_is_left_as_it_was() -> None:
    model = tiny(prefix_dropout=0.5, mlp_dropout=0.5)
    expected = evaluate(model, X).nats_per_token
    model.train()
    model.norm.eval()
    modes = [module.training for module in model.modules()]
    assert evaluate(model, X).nats_per_token == expected
    assert [module.training for module in model.modules()] == modes
    with pytest.raises(InputError):
        evaluate(model, torch.tensor([1, 99]))
    assert [module.training for module in model.modules()] == modes


def test_bfloat16_is_near() -> None:
    model = tiny().float()
    exact, near = (evaluate(model, X, precision=precision).nats_per_token for precision in ("32", "bf16"))
    assert near != exact
    assert near == pytest.approx(exact, rel=0.05)


def test_context_lengths_are_compared_on_the_same_targets() -> None:
    lengths = [1, 2, 6, 12]
    results = evaluate_context_lengths(MODEL, X, lengths, byte_lengths=[1] * 9)
    assert [result.context_length for result in results] == lengths
    assert [result.num_latents for result in results] == [1, 2, 4, 4]
    assert [result.stride for result in results] == [1, 1, 2, 2]
    for result in results:
        assert result.tokens == result.bytes == len(X) - 12  # those with 12 tokens before them
        nats = naive(MODEL, X, result.context_length, result.num_latents, result.stride, first=12)
        assert result.nats_per_token == pytest.approx(sum(nats) / len(nats), abs=1e-6)
    narrow = evaluate_context_lengths(MODEL, X, [2, 12], stride=3, num_latents=3, first_target=1)
    assert [(result.tokens, result.num_latents, result.stride) for result in narrow] == [(56, 2, 1), (56, 3, 3)]
    with pytest.raises(InputError, match="12 tokens are too few for context length 12"):
        evaluate_context_lengths(MODEL, X[:12], [4, 12])
    with pytest.raises(InputError, match=r"context_length is 99: it must be in 1 \.\.\. 12"):
        evaluate_context_lengths(MODEL, X, [4, 99])
    with pytest.raises(InputError, match="6 tokens are too few for context length 12"):
        evaluate_context_lengths(MODEL, X[:12], [4, 12], document_length=6)


@pytest.mark.parametrize(
    ("tokens", "fields", "message"),
    [
        ([], {}, "there are 0 tokens"),
        ([1], {}, "there are 1 tokens"),
        ([1, 2], {"stride": 0}, "stride is 0"),
        ([1, 2], {"stride": 5}, r"stride is 5 with num_latents 4: it must be in 1 \.\.\. 4"),
        ([1, 2], {"num_latents": 13}, "num_latents is 13 with context_length 12"),
        ([1, 2], {"num_latents": 0}, "num_latents is 0"),
        ([1, 2], {"num_latents": 4, "context_length": 3}, "num_latents is 4 with context_length 3"),
        ([1, 2], {"context_length": 13}, r"context_length is 13: it must be in 1 \.\.\. 12"),
        ([1, 2], {"context_length": 0}, "context_length is 0"),
        ([1, 2], {"first_target": 2}, "first_target is 2"),
        ([1, 2], {"first_target": 0}, "first_target is 0"),
        ([1, 2], {"batch_size": 0}, "batch_size is 0"),
        ([1, 2], {"max_tokens": 0}, "max_tokens is 0"),
        ([1, 2], {"precision": "64"}, "precision is '64'"),
        ([1, 2], {"byte_lengths": [1]}, r"byte_lengths has shape \(1,\)"),
        ([1] * 30 + [9, 1], {}, r"token 30 is id 9: this model's vocabulary is ids 0 \.\.\. 8"),
        ([1, -2], {}, "token 1 is id -2"),
        ([[1, 2]], {}, "shape"),
        ([0.5, 1.5], {}, "ids are integers"),
    ],
)
@pytest.mark.parametrize("kind", [torch.tensor, np.array])
def test_what_cannot_work_is_refused(
    kind: Callable[..., Any], tokens: list[Any], fields: dict[str, Any], message: str
) -> None:
    values = kind(tokens) if tokens else kind(tokens, dtype=kind([0]).dtype)
    with pytest.raises(InputError, match=message) as error:
        evaluate(MODEL, values, **fields)
    assert "\n" not in str(error.value)


def test_weights_of_nan_are_named() -> None:
    model = tiny()
    torch.nn.init.constant_(model.head.weight, math.nan)
    with pytest.raises(InputError, match="the model's weights give NaN"):
        evaluate(model, X)


def test_compressors_are_those_of_the_standard_library() -> None:
    data, codec = Path(__file__).read_bytes(), BytesCodec()
    bits = compressors(codec, codec.encode(data))
    assert bits == {
        "gzip": pytest.approx(8 * len(gzip.compress(data, 9)) / len(data)),
        "xz": pytest.approx(8 * len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME)) / len(data)),
    }
    assert 1 < bits["gzip"] < 4
    assert compressors(codec, np.array([], dtype=np.int64)) == {}
    assert compressors(IntegerCodec(9), np.arange(9)) == {}


def test_tables_can_be_read_again(tmp_path: Path) -> None:
    results = [evaluate(MODEL, X, stride=stride, byte_lengths=[1] * 9) for stride in (1, 2)] + [evaluate(MODEL, X)]
    write_table(tmp_path / "deep" / "table.csv", results)
    assert [file.name for file in (tmp_path / "deep").iterdir()] == ["table.csv"]
    with open(tmp_path / "deep" / "table.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    read = [Evaluation(**{name: float(value) if value else None for name, value in row.items()}) for row in rows]  # type: ignore[arg-type]
    assert read == results


# Documents of one length, and what tokens stand for.


@pytest.mark.parametrize("fields", [{}, {"position_table": "learned", "index_dims": (2, 3, 2)}], ids=["rotary", "axes"])
@given(st.integers(1, 4), st.integers(2, 13), st.data())
@settings(max_examples=25)
def test_documents_of_one_length_are_scored_each_for_itself(
    fields: dict[str, Any], documents: int, length: int, data: st.DataObject
) -> None:
    model = tiny(**fields)
    x = X[: documents * length]
    T = data.draw(st.integers(1, 12))
    N = data.draw(st.integers(1, T))
    stride = data.draw(st.integers(1, N))
    result = evaluate(model, x, context_length=T, num_latents=N, stride=stride, document_length=length)
    nats = []
    for document in x.split(length):
        first = 1
        while first < length:
            end = min(length, max(first + stride, N + 1))
            start = max(0, end - 1 - T)
            for i in range(first, end):  # with positions in the document, also where the context begins later
                positions = torch.arange(start, i)
                logits = model(document[None, start:i], max(0, end - 1 - start - N), positions=positions)[0, -1]
                nats.append(-logits.log_softmax(-1)[document[i]].item())
            first = end
    assert result.tokens == len(nats) == documents * (length - 1)
    assert result.nats_per_token == pytest.approx(sum(nats) / len(nats), rel=1e-9)


def test_so_many_documents_are_scored_as_hold_the_targets_asked_for() -> None:
    assert [evaluate(MODEL, X[:50], document_length=10, max_tokens=n).tokens for n in (1, 9, 10, 99)] == [9, 9, 18, 45]
    with pytest.raises(InputError, match="50 tokens are not documents of 7"):
        evaluate(MODEL, X[:50], document_length=7)


@given(st.integers(2, 57), st.none() | st.integers(1, 60), st.integers(1, 5))
@settings(max_examples=20)
def test_nats_per_unit_are_all_nats_over_all_that_the_targets_stand_for(n: int, most: int | None, first: int) -> None:
    first = min(first, n - 1)

    def amounts(ids: np.ndarray) -> dict[str, float]:
        return {"note": float((ids < 3).sum()), "second": 0.5 * float((ids == 8).sum()), "nothing": 0.0}

    result = evaluate(MODEL, X[:n], amounts=amounts, first_target=first, max_tokens=most)
    targets = X[first : n if most is None else min(n, first + most)]
    nats = result.nats_per_token * len(targets)
    found = result.to_dict()
    notes, seconds = int((targets < 3).sum()), 0.5 * int((targets == 8).sum())
    if notes:
        assert found["scored_notes"] == notes and found["nats_per_note"] == pytest.approx(nats / notes)
        assert found["bits_per_note"] == pytest.approx(nats / notes / math.log(2))
    assert ("nats_per_second" in found) == (seconds > 0)
    assert "nats_per_nothing" not in found and "amounts" not in found

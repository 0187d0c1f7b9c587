"""A prefix held as ids is attended to as its keys and values would be."""

import weakref
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple
from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import Adapted, assert_close, naive_attention, randomize
from torch import Tensor

from perceiver_ar import held, streaming
from perceiver_ar.attention import Piece, attend_pieces
from perceiver_ar.config import PerceiverARConfig
from perceiver_ar.generation import Decoder, Row, evaluation_mode, stream
from perceiver_ar.heads import merge_heads, rotary_tables, rotate
from perceiver_ar.held import TILE, HeldPrefix
from perceiver_ar.model import PerceiverAR
from perceiver_ar.windows import Schedule

H, C, V = 2, 6, 5


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Prefixes(NamedTuple):
    prefix: HeldPrefix
    tokens: list[list[int]]
    """Of each row."""
    first: list[int]


def held_rows(data: st.DataObject, config: PerceiverARConfig, lengths: list[int], size: int) -> Prefixes:
    """Rows of these lengths, appended in parts, after others that were cleared; in tiles of so many slots."""
    vocabulary = [(merge_heads(k)[0], merge_heads(v)[0]) for k, v in VOCABULARY]
    every = st.integers(0, V - 1)
    with patch.object(held, "TILE", size), patch.object(held, "WRITE", 3):
        prefix = HeldPrefix.empty(config, len(lengths), 20, vocabulary)
        contents: list[list[int]] = []
        firsts = data.draw(st.lists(st.integers(0, 10**7), min_size=len(lengths), max_size=len(lengths)))
        for r, length in enumerate(lengths):
            row = prefix.rows(r, r + 1)
            if data.draw(st.booleans()):
                row.append(torch.tensor([data.draw(st.lists(every, min_size=1, max_size=20))]), [7])
                row.clear()
            contents.append(data.draw(st.lists(every, min_size=length, max_size=length)))
            start = 0
            while start < length:
                stop = data.draw(st.integers(start + 1, length))
                row.append(torch.tensor([contents[r][start:stop]]), [firsts[r] + start])
                start = stop
    return Prefixes(prefix, contents, firsts)


VOCABULARY = [(random(1, H, V, C, seed=2 * i), random(1, H, V, C, seed=2 * i + 1)) for i in range(2)]
rotations = st.builds(
    lambda **rotation: PerceiverARConfig(
        vocab_size=V, context_length=64, num_latents=1, dim=H * C, num_heads=H, num_layers=0, **rotation
    ),
    rotary=st.booleans(),
    rotary_fraction=st.sampled_from([0.4, 0.7, 1.0]),
)


def check_row(
    out: Tensor, q: Tensor, own: Piece, seen: Tensor, held: Prefixes, row: int, config: PerceiverARConfig, layer: int
) -> None:
    """Of a row, that `out` is attention to the keys and values of its tokens, all seen, and to `own`."""
    tokens, first = held.tokens[row], held.first[row]
    k, v = (x[:, :, tokens] for x in VOCABULARY[layer])
    positions = torch.arange(first, first + len(tokens))[None]
    table = rotary_tables(config, positions, cross=True, dtype=torch.float64)
    keys, values = (torch.cat(x, dim=2) for x in ((rotate(k, table), own.k[[row]]), (v, own.v[[row]])))
    seen = torch.cat([torch.ones(len(seen), len(tokens), dtype=torch.bool), seen], dim=1)
    assert_close(out[[row]], naive_attention(q[[row]], keys, values, seen), 1e-9)


@given(st.data(), rotations, st.lists(st.integers(0, 20), min_size=1, max_size=3), st.integers(1, 4))
def test_one_query_attends_to_the_keys_and_values_of_the_tokens(
    data: st.DataObject, config: PerceiverARConfig, lengths: list[int], size: int
) -> None:
    held = held_rows(data, config, lengths, size)
    order = data.draw(st.lists(st.integers(0, len(lengths) - 1), min_size=1, max_size=4))
    held = Prefixes(held.prefix.select(order), *([rows[r] for r in order] for rows in held[1:]))  # type: ignore[arg-type]
    held.prefix.copy_row(0, len(order) - 1)
    for rows in held[1:]:
        rows[-1] = rows[0]  # type: ignore[index]
    if data.draw(st.booleans()):
        held.prefix.fix()
    q, own_k, own_v = (random(len(order), H, n, C, seed=10 + i) for i, n in enumerate((1, 3, 3)))
    seen = torch.tensor([[True, False, True]])
    own = Piece(own_k, own_v, mask=seen.expand(len(order), -1))
    for layer in range(2):
        out = held.prefix.attend(q, [own], layer)
        for r in range(len(order)):
            check_row(out, q, own, seen, held, r, config, layer)


@given(st.data(), rotations, st.integers(0, 20), st.integers(1, 3), st.integers(1, 4))
def test_several_queries_attend_to_the_keys_and_values_of_the_tokens(
    data: st.DataObject, config: PerceiverARConfig, length: int, rows: int, chunk: int
) -> None:
    held = held_rows(data, config, [length] * rows, 2)
    q, k, v = (random(rows, H, 5, C, seed=i) for i in range(3))
    before, own = Piece(k[:, :, :0], v[:, :, :0]), Piece(k, v, causal=True)
    with patch.dict(streaming.PIECE, {"cpu": chunk * rows}):
        out = held.prefix.attend(q, [before, own], 1)
    for r in range(rows):
        check_row(out, q, own, torch.ones(5, 5, dtype=torch.bool).tril(), held, r, config, 1)


def network(**fields: Any) -> PerceiverAR:
    base: dict[str, Any] = {"vocab_size": 5, "num_latents": 8, "dim": 16, "num_layers": 1, "num_heads": 2}
    return randomize(PerceiverAR(PerceiverARConfig(**{**base, "context_length": 5 * TILE, **fields})).eval(), seed=0)


def test_long_contexts_of_few_ids_are_held_as_ids() -> None:
    def as_ids(model: PerceiverAR, prompt: int, **schedule: Any) -> bool:
        rows = [Row(0, torch.zeros(prompt, dtype=torch.int64), model.config, schedule=Schedule(**schedule))]
        with evaluation_mode(model), torch.inference_mode():
            cache = Decoder(model, rows, 1, 10).cache
        assert cache.cross.room == (8 if cache.prefix else min(prompt + 10, 5 * TILE))
        return cache.prefix is not None

    assert as_ids(network(), 1000)
    assert not as_ids(network(), 5 * TILE - 11)
    assert not as_ids(network(), 1000, slide=True)
    assert not as_ids(network(position_table="learned"), 1000)
    assert not as_ids(network(vocab_size=6), 1000)


def test_any_projection_serves_in_any_mode() -> None:
    settings: dict[str, Any] = {"prefix_chunk": 2, "prefix_dropout": 0.5, "num_latents": 2}
    models = [network(**settings) for _ in range(2)]
    adapted, twice = Adapted(16, 32, bias=False), models[1].cross_attention[0].kv_proj
    adapted.load_state_dict(twice.state_dict())  # type: ignore[union-attr]
    models[0].cross_attention[0].kv_proj = adapted  # type: ignore[union-attr]
    twice.weight.data *= 2  # type: ignore[union-attr]
    prompt = torch.randint(5, (3000,), generator=torch.Generator().manual_seed(0))
    rows = [Row(0, prompt, model.config) for model in models]
    with torch.inference_mode():
        decoders = [Decoder(model.train(), [row], 1, 10) for model, row in zip(models, rows, strict=True)]
        for _ in range(5):
            assert decoders[0].cache.prefix is not None
            logits, expected = (decoder.next_logits() for decoder in decoders)
            assert_close(logits, expected, 1e-5)
            for decoder in decoders:
                decoder.add([1], ())


def test_refills_hold_a_piece_of_the_prefix_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[int] = []

    def watched(q: Tensor, pieces: Iterable[Piece]) -> Any:
        def watch() -> Iterator[Piece]:
            keys = []
            for piece in pieces:
                keys.append(weakref.ref(piece.k))
                alive.append(sum(key() is not None for key in keys))
                yield piece

        return attend_pieces(q, watch())

    monkeypatch.setattr(held, "attend_pieces", watched)
    monkeypatch.setitem(streaming.PIECE, "cpu", 1)
    list(stream(network(), torch.zeros(1000, dtype=torch.int64), max_new_tokens=10))
    assert len(alive) > 10
    assert max(alive) <= 3

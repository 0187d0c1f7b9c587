"""A prefix held as ids is attended to as its keys and values would be."""

from typing import Any
from unittest.mock import patch

import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import assert_close, naive_attention, randomize
from torch import Tensor

from perceiver_ar import held
from perceiver_ar.attention import Piece
from perceiver_ar.config import PerceiverARConfig
from perceiver_ar.generation import Decoder, Row, evaluation_mode, stream
from perceiver_ar.heads import merge_heads, rotary_tables, rotate
from perceiver_ar.held import TILE, HeldPrefix
from perceiver_ar.model import PerceiverAR
from perceiver_ar.windows import Schedule

H, C, V = 2, 6, 5


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(data=st.data(), size=st.integers(1, 4), rotary=st.booleans(), fraction=st.sampled_from([0.4, 0.7, 1.0]))
def test_attention_is_that_to_the_keys_and_values_of_the_tokens(
    data: st.DataObject, size: int, rotary: bool, fraction: float
) -> None:
    settings: dict[str, Any] = {"dim": H * C, "num_heads": H, "num_layers": 0, "vocab_size": V, "context_length": 64}
    config = PerceiverARConfig(num_latents=1, rotary=rotary, rotary_fraction=fraction, **settings)
    vocabulary = [(random(1, H, V, C, seed=2 * i), random(1, H, V, C, seed=2 * i + 1)) for i in range(2)]
    B = data.draw(st.integers(1, 3))
    with patch.object(held, "TILE", size), patch.object(held, "WRITE", 7):
        prefix = HeldPrefix.empty(config, B, 20, [(merge_heads(k)[0], merge_heads(v)[0]) for k, v in vocabulary])
        contents: list[tuple[Tensor, Tensor]] = []
        for row in range(B):
            for _ in range(data.draw(st.integers(1, 2))):  # what was there before is gone
                ids = data.draw(st.lists(st.integers(0, V - 1), min_size=0, max_size=20))
                tokens, first = torch.tensor([ids], dtype=torch.int64), data.draw(st.integers(0, 10**7))
                positions = torch.arange(first, first + len(ids))[None]
                prefix.rows(row, row + 1).write(tokens, positions)
            contents.append((tokens, positions))
        order = data.draw(st.lists(st.integers(0, B - 1), min_size=1, max_size=4))
        prefix, contents = prefix.select(order), [contents[r] for r in order]
        prefix.copy_row(0, len(order) - 1)
        contents[-1] = contents[0]
        if data.draw(st.booleans()):
            prefix.fix()
        q, own_k, own_v = (random(len(order), H, n, C, seed=10 + n) for n in (1, 3, 4))
        own = Piece(own_k, own_v[:, :, :3], mask=torch.tensor([True, False, True]).expand(len(order), -1))
        outs = [prefix.attend(q, [own], layer) for layer in range(2)]
    for layer, out in enumerate(outs):
        for r, (tokens, positions) in enumerate(contents):
            k, v = (x[:, :, tokens[0]] for x in vocabulary[layer])
            table = rotary_tables(config, positions, cross=True, dtype=torch.float64)
            both = (rotate(k, table), own.k), (v, own.v)
            keys, values = (torch.cat([x, y[r : r + 1]], dim=2) for x, y in both)
            seen = torch.tensor([True] * (tokens.shape[1] + 1) + [False, True])
            assert_close(out[r : r + 1], naive_attention(q[r : r + 1], keys, values, seen), 1e-9)


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


def test_steps_over_ids_are_exact_in_low_precision_too() -> None:
    model, row = network(), torch.randint(5, (1000,), generator=torch.Generator().manual_seed(0)).tolist()
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        for step in stream(model, [row], max_new_tokens=12, seed=0):
            context = torch.tensor([row[int(step.window_start) :]])
            expected = model(context, prefix_len=context.shape[1] - int(step.num_latents))[:, -1]
            assert_close(step.logits, expected, 0.05)
            row.append(int(step.tokens))

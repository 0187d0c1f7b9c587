"""A cache holds each row's last positions, changes only where it is told to, and hides nothing of another row."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import assert_close, naive_attention
from torch import Tensor

from perceiver_ar.config import PerceiverARConfig
from perceiver_ar.generation.cache import Cache, KeysValues
from perceiver_ar.network.attention import attend

H, C = 2, 3


def make(rows: int, room: int, layers: int = 2) -> KeysValues:
    return KeysValues.empty(layers, rows, H, room, C, torch.float64, torch.device("cpu"))


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(st.lists(st.integers(0, 9), min_size=1, max_size=3), st.integers(1, 6), st.integers(1, 12), st.booleans())
def test_each_row_attends_to_its_own_last_positions(lengths: list[int], room: int, steps: int, views: bool) -> None:
    cache = make(len(lengths), room)
    past: list[list[tuple[Tensor, Tensor]]] = [[] for _ in lengths]
    for r, length in enumerate(lengths):
        for i in range(min(length, room)):  # rows begin at different lengths
            k, v = random(1, H, 1, C, seed=100 * r + i), random(1, H, 1, C, seed=1000 + 100 * r + i)
            row = cache.rows(r, r + 1)
            row.update(k, v, 1)
            row.advance(1)
            past[r].append((k[0], v[0]))
    for step in range(steps):
        q, k, v = (random(len(lengths), H, 1, C, seed=10_000 + 3 * step + i) for i in range(3))
        out = attend(q, cache.update(k, v, 1))
        for r in range(len(lengths)):
            past[r].append((k[r], v[r]))
            keys, values = (torch.cat(x, dim=1)[None] for x in zip(*past[r][-room:], strict=True))
            seen = torch.ones(keys.shape[2], dtype=torch.bool)
            assert_close(out[r : r + 1], naive_attention(q[r : r + 1], keys, values, seen), 1e-12)
        cache.advance(1)
        cache = cache.rows(0, len(lengths)) if views else cache


def test_several_new_positions_are_causal_among_themselves() -> None:
    cache = make(2, 9)
    q, k, v = (random(2, H, 7, C, seed=i) for i in range(3))
    attend(q[:, :, :3], cache.update(k[:, :, :3], v[:, :, :3], 0))
    cache.advance(3)
    out = attend(q[:, :, 3:], cache.update(k[:, :, 3:], v[:, :, 3:], 0))
    causal = torch.ones(7, 7, dtype=torch.bool).tril()
    assert_close(out, naive_attention(q, k, v, causal)[:, :, 3:], 1e-12)


def test_nothing_moves_before_advance() -> None:
    cache = make(1, 4)
    for _ in range(3):
        (piece,) = cache.update(random(1, H, 1, C), random(1, H, 1, C), 0)
        assert piece.k.shape[2] == 1
    assert cache.counts.tolist() == [0]
    cache.advance(1)
    (piece,) = cache.update(random(1, H, 1, C, seed=1), random(1, H, 1, C, seed=1), 0)
    assert torch.equal(piece.k, torch.cat([random(1, H, 1, C), random(1, H, 1, C, seed=1)], dim=2))


def test_what_is_kept_moves_to_the_front_of_its_row_alone() -> None:
    cache, k = make(2, 6, layers=1), random(2, H, 6, C)
    cache.update(k, -k, 0)
    cache.advance(6)
    cache.rows(1, 2).keep(3, dropped=2)
    assert cache.counts.tolist() == [6, 3]
    ((keys, values),) = cache.layers
    assert torch.equal(keys[0], k[0])
    assert torch.equal(keys[1, :, :3], k[1, :, 2:5])
    assert torch.equal(values[1, :, :3], -k[1, :, 2:5])


def test_rows_can_be_copied_and_put_in_another_order_each_with_its_own_memory() -> None:
    config = PerceiverARConfig(vocab_size=3, context_length=5, num_latents=3, dim=4, num_layers=1, num_heads=1)
    cache = Cache.empty(config, 2, 4, torch.float64, torch.device("cpu"))
    assert cache.cross.room == 4
    assert cache.self_attention.room == 3
    for part in (cache.cross, cache.self_attention):
        k = random(2, 1, 2, 4)
        part.update(k, -k, 0)
        part.advance(2)
    cache.rows(0, 1).cross.advance(1)
    several = cache.select([0, 1, 1, 0])
    assert several.cross.counts.tolist() == [3, 2, 2, 3]
    ((keys, values),), ((own, _),) = several.cross.layers, several.self_attention.layers
    before = cache.cross.layers[0][0].clone()
    assert torch.equal(keys, before[[0, 1, 1, 0]])
    assert torch.equal(own[:, :, :2], random(2, 1, 2, 4)[[0, 1, 1, 0]])
    keys[1] += 1
    several.rows(1, 2).cross.advance(1)
    assert torch.equal(values[2], -keys[2])
    assert torch.equal(keys[2], before[1])
    assert torch.equal(cache.cross.layers[0][0], before)
    several.copy_from(several, 1, 3)
    assert several.cross.counts.tolist() == [3, 3, 2, 3]
    assert torch.equal(keys[3, :, :3], keys[1, :, :3])


def test_with_fixed_shapes_a_row_attends_to_the_same() -> None:
    cache, fixed = make(2, 4), make(2, 4)
    for one in (cache, fixed):
        k = random(1, H, 2, C)
        one.rows(1, 2).update(k, -k, 1)
        one.rows(1, 2).advance(2)
    fixed.fix()
    for step in range(6):  # past the room of both rows
        q, k, v = (random(2, H, 1, C, seed=3 * step + i) for i in range(3))
        fixed.aim()
        (piece,) = fixed.update(k, v, 1)
        assert piece.k.shape[2] == 4
        assert_close(attend(q, [piece]), attend(q, cache.update(k, v, 1)), 1e-12)
        cache.advance(1)
        fixed.advance(1)

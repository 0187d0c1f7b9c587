"""Whatever the settings: causality, free split, padding, positions, dropout, initial weights, weights on disk."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from reference import Case, assert_close, cases, configs, naive_logits, randomize
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from perceiver_ar.config import PerceiverARConfig
from perceiver_ar.config.presets import PUBLISHED
from perceiver_ar.errors import InputError
from perceiver_ar.network import model as network
from perceiver_ar.network.heads import rotary_tables
from perceiver_ar.network.inputs import prefix_keeps
from perceiver_ar.network.model import PerceiverAR
from perceiver_ar.objective import next_token_loss

DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def small(**fixed: object) -> PerceiverAR:
    """A fixed network with random float32 weights and two layers of either kind."""
    sizes = {"vocab_size": 11, "context_length": 12, "num_latents": 5, "dim": 16, "num_layers": 2, "num_heads": 2}
    config = PerceiverARConfig.from_dict({**sizes, "cross_layers": (0, 1), **fixed})
    return randomize(PerceiverAR(config).eval(), seed=0)


def random_tokens(model: PerceiverAR, *shape: int, seed: int = 0) -> Tensor:
    return torch.randint(model.config.vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def others(model: PerceiverAR, tokens: Tensor) -> Tensor:
    """Every token replaced by another one."""
    return (tokens + 1) % model.config.vocab_size


def gradients(model: PerceiverAR, loss: Tensor) -> dict[str, Tensor]:
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad(loss, list(named.values()), allow_unused=True, materialize_grads=True)
    return dict(zip(named, grads, strict=True))


# The mathematics.


@pytest.mark.parametrize("device", DEVICES)
@settings(max_examples=100)
@given(case=cases())
def test_the_network_computes_the_plain_formulas(case: Case, device: str) -> None:
    model, tokens, P = case
    expected = naive_logits(model.config, model.state_dict(), tokens, P)
    assert_close(model.to(device)(tokens.to(device), P).cpu(), expected, 1e-10)


@pytest.mark.parametrize("device", DEVICES)
@settings(max_examples=100)
@given(case=cases(), data=st.data())
def test_with_masks_positions_and_kept_prefixes_too(case: Case, device: str, data: st.DataObject) -> None:
    model, tokens, P = case
    config, (B, T) = model.config, case.tokens.shape
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**20)))
    mask = positions = keep = kept = None
    if data.draw(st.booleans(), label="mask"):
        mask = torch.rand(B, T, generator=generator) < 0.7
    if data.draw(st.booleans(), label="positions") or not config.mask_self_attention:
        positions = torch.randint(config.max_positions or 10**6, (B, T), generator=generator)
    if P and data.draw(st.booleans()):
        count = data.draw(st.integers(0, P))
        keep = torch.rand(len(config.cross_layers), B, P, generator=generator).argsort(-1)[..., :count]
        kept = torch.zeros(len(config.cross_layers), B, P, dtype=torch.bool).scatter(-1, keep, value=True)
    expected = naive_logits(
        config, model.state_dict(), tokens, P, mask=mask, positions=positions, kept=None if kept is None else list(kept)
    )
    given_ = {"mask": mask, "positions": positions, "prefix_keep": keep}
    given_ = {name: None if x is None else x.to(device) for name, x in given_.items()}
    actual = model.to(device)(tokens.to(device), P, **given_).cpu()
    real = torch.ones(B, T - P, dtype=torch.bool) if mask is None else mask[:, P:]
    assert_close(actual[real], expected[real], 1e-8)  # positions go to a million


@settings(max_examples=100)
@given(case=cases(), data=st.data())
def test_blocks_of_latents_are_forwards_of_their_own(case: Case, data: st.DataObject) -> None:
    model, tokens, P = case
    (B, T), config = tokens.shape, model.config
    N, layers = T - P, len(config.cross_layers)
    blocks = data.draw(st.sampled_from([n for n in range(1, N + 1) if N % n == 0]), label="blocks")
    if blocks > 1 and not config.blocks_allowed:
        with pytest.raises(InputError, match=f"blocks is {blocks}"):
            model(tokens, P, blocks=blocks)
        return
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**20)))
    mask = positions = keep = None
    if data.draw(st.booleans(), label="mask"):
        mask = torch.rand(B, T, generator=generator) < 0.7
    if data.draw(st.booleans(), label="positions"):
        positions = torch.randint(config.max_positions or 10**6, (B, T), generator=generator)
    if P and data.draw(st.booleans(), label="keep"):
        keep = torch.rand(layers, B, P, generator=generator).argsort(-1)[..., : data.draw(st.integers(0, P))]

    def alone(start: int, stop: int) -> Tensor:
        before = torch.arange(P, start).expand(layers, B, -1)
        kept = None if keep is None else torch.cat([keep, before], dim=-1)
        some = {name: x if x is None else x[:, :stop] for name, x in {"mask": mask, "positions": positions}.items()}
        return model(tokens[:, :stop], start, prefix_keep=kept, **some)

    expected = torch.cat([alone(start, start + N // blocks) for start in range(P, T, N // blocks)], dim=1)
    logits = model(tokens, P, mask=mask, positions=positions, prefix_keep=keep, blocks=blocks)
    real = torch.ones(B, N, dtype=torch.bool) if mask is None else mask[:, P:]
    assert_close(logits[real], expected[real], 1e-8)  # positions go to a million
    weight = torch.linspace(1, 2, N * config.vocab_size, dtype=torch.float64).reshape(N, -1)
    losses = ((x * weight)[real].sum() for x in (logits, expected))
    if logits.requires_grad and real.any():
        actual, wanted = (gradients(model, loss) for loss in losses)
        for name, gradient in wanted.items():
            assert_close(actual[name], gradient, 1e-7, name)


def test_blocks_that_do_not_divide_the_latents_are_named() -> None:
    model = small()
    with pytest.raises(InputError, match="blocks is 2 with 5 latents"):
        model(random_tokens(model, 1, 12), 7, blocks=2)


ONE_SETTING = [
    {"norm": "rmsnorm"},
    {"qk_norm": False},
    {"qk_norm": False, "norm": "rmsnorm"},
    {"activation": "relu"},
    {"activation": "gelu"},
    {"activation": "gelu_tanh"},
    {"final_norm": False},
    {"tie_embeddings": True},
    {"attention_bias": True},
    {"out_bias": "cross"},
    {"out_bias": "all"},
    {"mlp_bias": True},
    {"logits_bias": True},
    {"rotary": False},
    {"rotary_fraction": 0.5},
    {"rotary_heads_fraction": 0.5},
    {"rotary_base": None},
    {"rotary_base": 50.0},
    {"rotary_endpoint": True},
    {"rotary_layers": 0},
    {"rotary_layers": 1},
    {"position_table": "learned"},
    {"position_table": "sinusoidal"},
    {"position_table": "learned", "index_dims": (3, 4)},
    {"query_position_offset": 1},
    {"latent_keys": "query", "local_context": 1},
    {"local_context": 1},
    {"query_proj": True},
    {"query_proj": True, "embed_dim": 10},
    {"query_proj": True, "query_mlp_layers": 2},
    {"query_proj": True, "query_mlp_layers": 2, "query_mlp_activation": "relu"},
    {"learned_queries": "shared"},
    {"learned_queries": "each"},
    {"learned_queries": "each", "embed_dim": 10},
    {"latents_per_position": 2},
    {"latents_per_position": 3, "query_mlp_layers": 1},
    {"positions_from_end": True},
    {"positions_from_end": True, "position_table": "learned"},
    {"query_residual": False},
    {"cross_layers": ()},
    {"cross_layers": (0,)},
    {"cross_layers": (1,)},
    {"cross_layers": (2,)},
    {"cross_layers": (0, 0)},
    {"head_dim": 6},
    {"cross_num_heads": 4},
    {"cross_head_dim": 6},
    {"mlp_ratio": 2.0},
    {"cross_mlp_ratio": 2.0},
]


@pytest.mark.parametrize("setting", ONE_SETTING, ids=lambda d: ",".join(f"{k}={v}" for k, v in d.items()))
def test_each_setting_alone_changes_the_function_to_the_documented_one(setting: dict[str, object]) -> None:
    base, model = small().double(), small(**setting).double()
    weights = base.state_dict()
    own = model.state_dict()
    shared = {name: x for name, x in weights.items() if name in own and x.shape == own[name].shape}
    model.load_state_dict(shared, strict=False)
    tokens = random_tokens(model, 2, 12)
    logits = model(tokens)
    assert_close(logits, naive_logits(model.config, model.state_dict(), tokens, 7), 1e-10)
    assert (logits - base(tokens)).abs().max() > 1e-4


GOOGLES = [
    {"learned_queries": "each", "query_proj": False},
    {"learned_queries": "shared", "query_proj": False, "query_mlp_layers": 1, "latents_per_position": 2,
     "latent_keys": "context"},
    {"latents_per_position": 3, "latent_keys": "context"},
    {"positions_from_end": True, "query_mlp_layers": 2, "query_mlp_activation": "gelu"},
]  # fmt: skip


@pytest.mark.parametrize("fixed", GOOGLES, ids=lambda fixed: ",".join(fixed))
@settings(max_examples=30)
@given(data=st.data())
def test_what_only_google_has_is_as_documented_under_padding_and_dropout(
    fixed: dict[str, object], data: st.DataObject
) -> None:
    model, tokens, P = data.draw(cases(min_length=2, embed_dim=None, mask_self_attention=True, **fixed))
    P = max(P, tokens.shape[1] - model.config.num_latents)
    mask = torch.rand(tokens.shape, generator=torch.Generator().manual_seed(P)) < 0.7
    real = mask[:, P:]
    expected = naive_logits(model.config, model.state_dict(), tokens, P, mask=mask)
    assert_close(model(tokens, P, mask=mask)[real], expected[real], 1e-9)
    keep = torch.arange(P // 2).expand(len(model.config.cross_layers), len(tokens), -1)
    kept = [torch.arange(P).expand(len(tokens), -1) < P // 2 for _ in model.config.cross_layers]
    expected = naive_logits(model.config, model.state_dict(), tokens, P, kept=kept)
    assert_close(model(tokens, P, prefix_keep=keep), expected, 1e-9)
    # A row with padding before it, and later tokens it may not see.
    alone = model(tokens[:1, 1:], max(P - 1, 0))
    padded = model(tokens[:1], max(P, 1), mask=torch.arange(tokens.shape[1])[None] > 0)
    assert_close(padded, alone, 1e-9)
    if not model.config.positions_from_end:
        changed = torch.cat([tokens[:, :-1], others(model, tokens[:, -1:])], dim=1)
        assert torch.equal(model(changed, P)[:, :-1], model(tokens, P)[:, :-1])


@pytest.mark.parametrize(
    "setting",
    [
        {},
        {"learned_queries": "shared"},
        {"learned_queries": "each"},
        {"positions_from_end": True, "position_table": "learned"},
    ],
    ids=str,
)
def test_latents_that_change_when_tokens_follow_are_not_cacheable(setting: dict[str, object]) -> None:
    model = small(**setting).double()
    tokens = random_tokens(model, 2, 12)
    same = (model(tokens, 8)[:, :-1] - model(tokens[:, :-1], 8)).abs().max() < 1e-9
    assert model.config.cacheable == same


def test_more_latents_than_learned_queries_are_refused() -> None:
    model = small(learned_queries="each", num_latents=5)
    with pytest.raises(InputError, match="6 latents are more than the 5 learned_queries"):
        model(random_tokens(model, 1, 8), 2)


@settings(max_examples=40)
@given(case=cases())
def test_gradients_are_those_of_the_plain_formulas(case: Case) -> None:
    model, tokens, P = case
    weight = torch.linspace(-1, 1, len(tokens) * (tokens.shape[1] - P) * model.config.vocab_size, dtype=torch.float64)
    actual = gradients(model, (model(tokens, P).flatten() * weight).sum())
    named = dict(model.named_parameters())
    leaves = {name: p.detach().requires_grad_() for name, p in named.items()}
    weights = {**leaves, "head.weight": leaves.get("head.weight", leaves["embed.weight"])}
    loss = (naive_logits(model.config, weights, tokens, P).flatten() * weight).sum()
    expected = torch.autograd.grad(loss, [leaves[name] for name in actual], allow_unused=True, materialize_grads=True)
    for name, wanted in zip(actual, expected, strict=True):
        assert_close(actual[name], wanted, 1e-9, name)


@settings(max_examples=30)
@given(case=cases())
def test_a_float32_network_is_the_float64_one_up_to_rounding(case: Case) -> None:
    config = case.model.config
    # One normalised channel is a sign, which rounding may flip.
    assume(not (config.qk_norm and 1 in (config.width_head, config.width_head_cross)))
    exact = case.model(case.tokens, case.prefix_len)
    assert_close(case.model.float()(case.tokens, case.prefix_len), exact, 1e-3)  # squared ReLUs in a row amplify


# Causality.


@settings(max_examples=80)
@given(case=cases(), data=st.data())
def test_a_prediction_does_not_change_with_later_tokens(case: Case, data: st.DataObject) -> None:
    model, tokens, P = case
    T = tokens.shape[1]
    last = data.draw(st.integers(P, T - 1), label="last unchanged token")
    changed = torch.cat([tokens[:, : last + 1], others(model, tokens[:, last + 1 :])], dim=1)
    assert torch.equal(model(changed, P)[:, : last - P + 1], model(tokens, P)[:, : last - P + 1])


@settings(max_examples=80)
@given(case=cases(min_length=2), data=st.data())
def test_a_prediction_does_change_with_every_token_it_may_see(case: Case, data: st.DataObject) -> None:
    model, tokens, P = case
    assume(model.config.cross_layers)
    T = tokens.shape[1]
    changed_at = data.draw(st.integers(0, T - 1), label="changed token")
    changed = tokens.clone()
    changed[:, changed_at] = others(model, tokens)[:, changed_at]
    difference = (model(changed, P) - model(tokens, P)).abs().amax(-1)
    assert difference[:, max(0, changed_at - P) :].min() > 1e-9


@pytest.mark.parametrize("how", ["autocast", "model.bfloat16()"])
@settings(max_examples=40)
@given(case=cases(), data=st.data())
def test_causality_holds_bit_by_bit_in_bfloat16(case: Case, how: str, data: st.DataObject) -> None:
    model, tokens, P = case
    model = model.bfloat16() if how == "model.bfloat16()" else model.float()
    last = data.draw(st.integers(P, tokens.shape[1] - 1), label="last unchanged token")
    changed = torch.cat([tokens[:, : last + 1], others(model, tokens[:, last + 1 :])], dim=1)
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        assert torch.equal(model(changed, P)[:, : last - P + 1], model(tokens, P)[:, : last - P + 1])


@pytest.mark.parametrize("how", ["autocast", "model.bfloat16()"])
@pytest.mark.parametrize("preset", PUBLISHED)
def test_bfloat16_trains_and_differs_from_float32_by_rounding_only(preset: str, how: str) -> None:
    model = small(**{**PUBLISHED[preset], "head_dim": 8, "cross_layers": (0,), "prefix_dropout": 0.0})
    tokens = random_tokens(model, 2, 12)
    exact = model(tokens)
    reference = gradients(model, next_token_loss(exact, tokens[:, -5:]))
    model = model.bfloat16() if how == "model.bfloat16()" else model
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        logits = model(tokens)
    # 8 bits of precision through three layers: about 1 % of the scale; a wrong kernel or mask is off by its whole.
    assert_close(logits, exact, 0.1)
    for name, gradient in gradients(model, next_token_loss(logits, tokens[:, -5:])).items():
        scale = reference[name].abs().max().item()
        assert_close(gradient / scale, reference[name] / scale, 0.2, name)


@pytest.mark.parametrize("settings_", [{"query_proj": True}, {"query_residual": False}, {"norm": "layernorm"}])
def test_the_residual_stream_stays_float32_under_autocast(settings_: dict[str, object]) -> None:
    model = small(**settings_)
    seen = []
    for layer in [*model.cross_attention, *model.self_attention]:
        layer.register_forward_hook(lambda _, inputs, out: seen.extend([inputs[0].dtype, out.dtype]))
    with torch.autocast("cpu", torch.bfloat16):
        model(random_tokens(model, 2, 12))
    assert set(seen) == {torch.float32}


# Free split.


@settings(max_examples=80)
@given(case=cases())
def test_any_split_of_any_length_gives_one_prediction_per_latent(case: Case) -> None:
    model, tokens, P = case
    B, T = tokens.shape
    assert model(tokens, P).shape == (B, T - P, model.config.vocab_size)
    assert model.latents(tokens, P).shape == (B, T - P, model.config.dim)
    default = max(0, T - model.config.num_latents)
    assert torch.equal(model(tokens), model(tokens, default))
    assert model(tokens).isfinite().all()


@settings(max_examples=60)
@given(case=cases(num_layers=0, cross_layers=(0, 0), latent_keys="context"))
def test_without_self_attention_a_prediction_does_not_depend_on_the_split(case: Case) -> None:
    # Then a latent's prediction is a function of its own embedding and of the tokens up to it.
    model, tokens, P = case
    assert_close(model(tokens, P), model(tokens, 0)[:, P:], 1e-10)


@settings(max_examples=60)
@given(case=cases(min_length=2), data=st.data())
def test_rows_and_later_latents_do_not_matter_to_a_prediction(case: Case, data: st.DataObject) -> None:
    model, tokens, P = case
    length = data.draw(st.integers(P + 1, tokens.shape[1]))
    together = model(tokens, P)
    for row in range(len(tokens)):
        alone = model(tokens[row : row + 1, :length], P)
        assert_close(alone[0], together[row, : length - P], 1e-10)


@pytest.mark.parametrize(
    ("shape", "prefix_len", "message"),
    [
        ((2, 13), None, "13 tokens are more than context_length 12"),
        ((2, 8), 8, "prefix_len is 8 with 8 tokens: it must be in 0 ... 7"),
        ((2, 8), -1, "prefix_len is -1"),
        ((2, 0), None, r"tokens have shape \(2, 0\)"),
        ((0, 2), None, r"tokens have shape \(0, 2\)"),
        ((8,), None, r"tokens have shape \(8,\)"),
    ],
)
def test_what_does_not_fit_is_named_with_its_numbers(
    shape: tuple[int, ...], prefix_len: int | None, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        small()(torch.zeros(shape, dtype=torch.long), prefix_len)


def test_masks_and_positions_of_other_shapes_are_named_with_their_numbers() -> None:
    model = small()
    tokens = random_tokens(model, 2, 8)
    with pytest.raises(InputError, match=r"mask has shape \(2, 7\), tokens \(2, 8\)"):
        model(tokens, mask=torch.ones(2, 7, dtype=torch.bool))
    for shape in [(7,), (3, 8), (2, 7)]:
        with pytest.raises(InputError, match="positions have shape"):
            model(tokens, positions=torch.zeros(shape, dtype=torch.long))


@pytest.mark.parametrize("tokens", [[[1, 2]], np.ones((1, 2), dtype=np.int64)], ids=["list", "array"])
def test_tokens_that_are_no_tensor_are_refused_with_what_they_are(tokens: Any) -> None:
    with pytest.raises(InputError, match=r"tokens are of type (list|ndarray): .* torch.as_tensor"):
        small()(tokens)


@pytest.mark.parametrize("prefix_chunk", [0, 3])
def test_more_tokens_than_the_tables_have_positions_are_refused_with_both_numbers(prefix_chunk: int) -> None:
    model = small(position_table="learned", index_dims=(2, 4), prefix_chunk=prefix_chunk)
    assert model(random_tokens(model, 2, 8)).shape[0] == 2
    tokens = random_tokens(model, 2, 9)
    with pytest.raises(InputError, match="9 tokens are more than the 8 positions"):
        model(tokens)
    model(tokens, positions=torch.arange(9) % 8)  # given, they may fit


def test_masks_that_are_not_bool_are_refused_with_their_type() -> None:
    model = small()
    with pytest.raises(InputError, match=r"mask.*int64.*bool"):  # an attention_mask of zeros and ones, for instance
        model(random_tokens(model, 2, 8), mask=torch.ones(2, 8, dtype=torch.long))


@pytest.mark.parametrize("shape", [(3, 2, 1), (2, 3, 1), (3, 1), (1,)])
def test_kept_prefixes_of_other_shapes_are_refused_with_their_shape(shape: tuple[int, ...]) -> None:
    model = small()  # two cross-attention layers
    with pytest.raises(InputError, match="prefix_keep has shape"):
        model(random_tokens(model, 2, 12), prefix_keep=torch.zeros(shape, dtype=torch.long))


@pytest.mark.parametrize("index", [-1, 4, 11])
def test_kept_indices_outside_the_prefix_are_refused_and_not_wrapped(index: int) -> None:
    model = small()
    with pytest.raises(
        InputError, match=rf"prefix_keep has index {index}: with prefix_len 4 they must be in 0 \.\.\. 3"
    ):
        model(random_tokens(model, 2, 12), 4, prefix_keep=torch.tensor([[0, 1], [2, index]]))


@pytest.mark.parametrize("id", [-1, 7, 300])
def test_ids_outside_the_vocabulary_are_refused_with_their_number(id: int) -> None:
    model = small(vocab_size=7)
    tokens = random_tokens(model, 2, 12)
    tokens[1, 3] = id
    with pytest.raises(InputError, match=rf"tokens have the id {id}: with vocab_size 7 they must be in 0 \.\.\. 6"):
        model(tokens)


def test_shapes_can_be_had_without_numbers() -> None:
    with FakeTensorMode():
        model = small()
        assert model(random_tokens(model, 2, 12)).shape == (2, model.config.num_latents, model.config.vocab_size)


@pytest.mark.parametrize("index_dims", [(), (3, 4), (2, 2, 3)])
@pytest.mark.parametrize("beyond", [12, 13, 24, -1])
def test_positions_beyond_the_tables_are_errors_and_not_other_positions(
    index_dims: tuple[int, ...], beyond: int
) -> None:
    model = small(position_table="learned", index_dims=index_dims)
    with pytest.raises((IndexError, InputError)):
        model(random_tokens(model, 1, 1), positions=torch.tensor([beyond]))


# Padding.


@settings(max_examples=80)
@given(case=cases(), data=st.data())
def test_a_padded_row_gives_the_logits_and_gradients_of_the_row_alone(case: Case, data: st.DataObject) -> None:
    model, tokens, P = case
    B, T = tokens.shape
    # Where self-attention is not masked (lucidrains), left padding must stay in the prefix.
    most_left = T - 1 if model.config.mask_self_attention else P
    lefts = [data.draw(st.integers(0, min(most_left, T - 1)), label="left pads") for _ in range(B)]
    rights = [data.draw(st.integers(0, T - 1 - left), label="right pads") for left in lefts]
    mask = torch.tensor([[left <= i < T - right for i in range(T)] for left, right in zip(lefts, rights, strict=True)])

    logits = model(tokens, P, mask=mask)
    weight = torch.linspace(1, 2, T * model.config.vocab_size, dtype=torch.float64).reshape(T, -1)
    padded_loss, alone_loss = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for row, (left, right) in enumerate(zip(lefts, rights, strict=True)):
        first = max(P, left)  # the row's first token that is a latent
        if first >= T - right:
            continue
        alone = model(tokens[row : row + 1, left : T - right], first - left)[0]
        padded = logits[row, first - P : T - right - P]
        assert_close(padded, alone, 1e-10)
        padded_loss = padded_loss + (padded * weight[first : T - right]).sum()
        alone_loss = alone_loss + (alone * weight[first : T - right]).sum()
    if padded_loss.requires_grad:
        expected = gradients(model, alone_loss)
        for name, gradient in gradients(model, padded_loss).items():
            assert_close(gradient, expected[name], 1e-9, name)


@settings(max_examples=60)
@given(case=cases(), data=st.data())
def test_the_ids_of_pads_do_not_matter(case: Case, data: st.DataObject) -> None:
    model, tokens, P = case
    T = tokens.shape[1]
    left = data.draw(st.integers(0, T - 1 if model.config.mask_self_attention else P))
    mask = (torch.arange(T) >= left).expand(len(tokens), -1)
    changed = torch.where(mask, tokens, others(model, tokens))
    first = max(P, left) - P
    assert torch.equal(model(changed, P, mask=mask)[:, first:], model(tokens, P, mask=mask)[:, first:])


def test_a_mask_of_all_true_is_no_mask() -> None:
    model = small(position_table="learned").double()
    tokens = random_tokens(model, 2, 12)
    assert_close(model(tokens, mask=torch.ones(2, 12, dtype=torch.bool)), model(tokens), 1e-12)


# Tokens.


@settings(max_examples=40)
@given(case=cases(), data=st.data())
def test_no_token_is_special(case: Case, data: st.DataObject) -> None:
    model, tokens, P = case
    V = model.config.vocab_size
    renamed = torch.tensor(data.draw(st.permutations(range(V)), label="new name of each id"))
    other = PerceiverAR(model.config).double().eval()
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for name in {"embed.weight", "head.weight", "head.bias"} & weights.keys():
        weights[name][renamed] = model.state_dict()[name]
    other.load_state_dict(weights)
    # A product sums in another order for other rows of the head, so the last digits may differ.
    assert_close(other(renamed[tokens], P)[..., renamed], model(tokens, P), 1e-12)


# Prefix dropout.


@settings(max_examples=50)
@given(
    P=st.integers(0, 50),
    rate=st.floats(0, 0.99),
    rows=st.integers(1, 3),
    layers=st.integers(1, 2),
    seed=st.integers(0, 2**20),
)
@example(P=50, rate=0.58, rows=1, layers=1, seed=0)  # the product is 28.999999999999996
def test_prefix_dropout_keeps_exactly_its_share_of_the_prefix_in_each_row_and_layer(
    P: int, rate: float, rows: int, layers: int, seed: int
) -> None:
    # Every token of the context is another id, so the embedding's gradient shows which ones were read.
    sizes = {"vocab_size": 52 * rows, "context_length": 52, "num_layers": 0, "cross_layers": [0] * layers}
    model = small(**sizes, local_context=1, rotary=False, prefix_dropout=rate).train()
    tokens = torch.arange((P + 2) * rows).reshape(rows, P + 2)
    torch.manual_seed(seed)
    keeps = prefix_keeps(model.config, tokens, P, None, True)
    expected = P - int(P * rate)
    for keep in keeps:
        assert expected == P if keep is None else all(len(set(row.tolist())) == expected for row in keep)
    torch.manual_seed(seed)
    gradient = gradients(model, model(tokens, P).square().sum())["embed.weight"]
    read = (gradient.abs().amax(-1) > 0)[tokens][:, :P]
    wanted = torch.zeros(rows, P, dtype=torch.bool)
    for keep in keeps:
        wanted |= torch.ones(rows, P, dtype=torch.bool) if keep is None else wanted.scatter(1, keep, value=True)
    assert torch.equal(read, wanted)


def test_each_row_and_each_layer_draws_its_own() -> None:
    model = small(prefix_dropout=0.5, context_length=60).train()
    torch.manual_seed(0)
    keeps = prefix_keeps(model.config, torch.zeros(2, 60).long(), 55, None, True)
    assert len(keeps) == 2
    sets = {frozenset(row.tolist()) for layer in keeps if layer is not None for row in layer}
    assert len(sets) == 4


def test_every_prefix_token_is_dropped_equally_often() -> None:
    model = small(prefix_dropout=0.5).train()
    torch.manual_seed(0)
    keeps = prefix_keeps(model.config, torch.zeros(2000, 12).long(), 8, None, True)
    keeps = torch.stack([keep for keep in keeps if keep is not None])
    shares = torch.bincount(keeps.flatten(), minlength=8) / 4000  # standard deviation 0.008
    assert (shares - 0.5).abs().max() < 0.04


@settings(max_examples=60)
@given(case=cases(min_length=2, local_context=1), data=st.data())  # a dropped token is still its successor's neighbour
def test_dropping_prefix_tokens_equals_masking_them(case: Case, data: st.DataObject) -> None:
    model, tokens, P = case
    B, T = tokens.shape
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**20)))
    keep = torch.rand(B, P, generator=generator).argsort(-1)[:, : data.draw(st.integers(0, P))]
    mask = torch.ones(B, T, dtype=torch.bool)
    mask[:, :P] = torch.zeros(B, P, dtype=torch.bool).scatter(1, keep, value=True)
    positions = torch.arange(T)  # else the masked tokens would not count
    assert_close(model(tokens, P, prefix_keep=keep), model(tokens, P, mask=mask, positions=positions), 1e-10)


def test_prefix_dropout_works_in_training_only_and_repeats_under_a_seed() -> None:
    model, plain = small(prefix_dropout=0.5), small()
    tokens = random_tokens(model, 2, 12)
    assert torch.equal(model(tokens), plain(tokens))
    model.train()
    torch.manual_seed(3)
    first, second = model(tokens), model(tokens)
    torch.manual_seed(3)
    assert torch.equal(model(tokens), first)
    assert not torch.equal(first, second)
    assert not torch.allclose(first, plain(tokens))


@pytest.mark.parametrize("name", ["attention_dropout", "mlp_dropout"])
def test_the_other_dropouts_work_in_training_only_and_repeat_under_a_seed(name: str) -> None:
    model, plain = small(**{name: 0.5}), small()
    tokens = random_tokens(model, 2, 12)
    assert torch.equal(model(tokens), plain(tokens))
    model.train()
    torch.manual_seed(3)
    first = model(tokens)
    torch.manual_seed(3)
    assert torch.equal(model(tokens), first)
    assert not torch.allclose(first, plain(tokens))


# Positions.


@settings(max_examples=60)
@given(case=cases(position_table="none"), shift=st.sampled_from([1, 17, 4096, 1_000_000]))
def test_without_tables_only_differences_of_positions_matter(case: Case, shift: int) -> None:
    model, tokens, P = case
    positions = torch.arange(tokens.shape[1]) + shift
    assert_close(model(tokens, P, positions=positions), model(tokens, P), 1e-8)


@settings(max_examples=60)
@given(case=cases())
def test_the_default_positions_count_from_zero(case: Case) -> None:
    model, tokens, P = case
    counted = torch.arange(tokens.shape[1])
    default = model(tokens, P)
    assert torch.equal(model(tokens, P, positions=counted), default)
    assert_close(model(tokens, P, positions=counted.expand(len(tokens), -1)), default, 1e-12)


@settings(max_examples=30)
@given(case=cases(position_table="learned", index_dims=(2, 2, 3)), masked=st.booleans())
def test_positions_may_be_given_as_coordinates_along_the_axes(case: Case, masked: bool) -> None:
    model, tokens, P = case
    mask = torch.ones(tokens.shape, dtype=torch.bool) if masked else None
    running = range(tokens.shape[1])
    coordinates = torch.tensor([[[i // 6, i // 3 % 2, i % 3] for i in running]])
    assert_close(model(tokens, P, positions=coordinates, mask=mask), model(tokens, P), 1e-12)


def test_as_many_rows_as_tokens_as_axes_are_not_taken_for_coordinates() -> None:
    # Three rows of one RGB pixel: positions (3, 3) are one running position per token, with and without padding.
    model = small(position_table="learned", index_dims=(2, 2, 3)).double()
    tokens = random_tokens(model, 3, 3)
    mask = torch.ones(3, 3, dtype=torch.bool)
    assert_close(model(tokens, mask=mask), model(tokens), 1e-12)
    assert_close(model(tokens, positions=torch.arange(3).expand(3, 3)), model(tokens), 1e-12)


def test_rotary_and_tables_tell_positions_apart() -> None:
    for positions in ({"rotary": True}, {"rotary": False, "position_table": "learned"}):
        model = small(**positions)
        tokens = random_tokens(model, 2, 12)
        swapped = tokens[:, [1, 0, *range(2, 12)]]
        assert (model(swapped) - model(tokens)).abs().max() > 1e-3
    blind = small(rotary=False, local_context=1).double()  # nothing else does
    assert_close(blind(swapped), blind(tokens), 1e-10)


@pytest.mark.parametrize("offset", [0, 1_000_000])
def test_bfloat16_models_tell_far_positions_apart(offset: int) -> None:
    # bfloat16 has no odd integers beyond 256, and at 10^6 one number for 4096 neighbours: positions kept in it would
    # make the logits another function. Only the rounding of the activations may show, 1 % of the scale or so.
    model = small(context_length=600, num_latents=40, head_dim=16, local_context=1, rotary_fraction=1.0)
    tokens = random_tokens(model, 1, 600)
    rounded = model.bfloat16()
    logits = rounded(tokens, positions=torch.arange(600) + offset).float()
    exact = rounded.float()(tokens)
    assert_close(logits, exact, 0.03)
    collapsed = model(tokens, positions=(torch.arange(600) + offset).bfloat16().long())
    assert (collapsed - exact).abs().max() > 0.1 * exact.abs().max()  # so the bound above would notice


def test_angles_are_exact_far_out() -> None:
    config = PerceiverARConfig(head_dim=8, rotary_fraction=1.0)
    far = 10**7 + torch.arange(5)[None]
    tables = rotary_tables(config, far, cross=False, dtype=torch.float32)
    assert tables is not None
    cos, sin = tables
    for j in range(4):
        speed = 10000 ** (-j / 4)
        for i in range(5):
            assert abs(cos[0, 0, i, j].item() - math.cos((10**7 + i) * speed)) < 1e-6
            assert abs(sin[0, 0, i, 4 + j].item() - math.sin((10**7 + i) * speed)) < 1e-6


# Activation checkpointing.


@settings(max_examples=25)
@given(case=cases(), prefix_dropout=st.sampled_from([0.0, 0.5]), mlp_dropout=st.sampled_from([0.0, 0.3]))
def test_recomputing_activations_gives_equal_gradients(case: Case, prefix_dropout: float, mlp_dropout: float) -> None:
    _, tokens, P = case
    config = case.model.config.replace(prefix_dropout=prefix_dropout, mlp_dropout=mlp_dropout)
    model = PerceiverAR(config).double().train()
    model.load_state_dict(case.model.state_dict())
    results = []
    for model.activation_checkpointing in (False, True):
        torch.manual_seed(0)
        logits = model(tokens, P)
        results.append({"logits": logits, **gradients(model, logits.square().sum())})
    for name, expected in results[0].items():
        assert_close(results[1][name], expected, 1e-12, name)


def test_recomputing_activations_keeps_fewer_of_them() -> None:
    model = small().train()
    tokens = random_tokens(model, 2, 12)
    kept = []
    for model.activation_checkpointing in (False, True):
        count = 0

        def pack(x: Tensor) -> Tensor:
            nonlocal count
            count += x.numel()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            model(tokens)
        kept.append(count)
    assert kept[1] < kept[0] / 2


# Initial weights.


@settings(max_examples=40)
@given(config=configs(init="zero_out", tie_embeddings=False), seed=st.integers(0, 100))
def test_a_new_network_predicts_every_token_alike(config: PerceiverARConfig, seed: int) -> None:
    torch.manual_seed(seed)
    model = PerceiverAR(config)
    tokens = torch.randint(config.vocab_size, (2, config.context_length))
    logits = model(tokens)
    assert abs(next_token_loss(logits, tokens[:, -logits.shape[1] :]).item() - math.log(config.vocab_size)) < 1e-6


@pytest.mark.parametrize("tied", [False, True])
def test_local_contexts_are_compared_evenly_at_first(tied: bool) -> None:
    config = PerceiverARConfig(vocab_size=6, dim=32, num_layers=1, num_heads=2, local_context=16, tie_embeddings=tied)
    model = PerceiverAR(config)
    assert model.local_conv is not None and model.local_conv.abs().unique().tolist() == [0.5]
    torch.testing.assert_close(model.embed.weight.mean(0), torch.zeros(32), atol=1e-6, rtol=0)


@pytest.mark.parametrize("init", ["zero_out", "torch", "normal", "fan_in"])
def test_initial_weights_have_the_documented_spread(init: str) -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 1000, "dim": 256, "num_layers": 1, "num_heads": 4, "mlp_bias": True}
    weights = PerceiverAR(PerceiverARConfig.from_dict({**sizes, "init": init})).state_dict()
    # A normal cut at two deviations has 0.88 of the deviation; a uniform one within +-b has b / sqrt(3).
    expected = {
        "zero_out": (1.0, 1 / 16, 0.0, 0.0),
        "torch": (1.0, 1 / 16 / 3**0.5, 1 / 16 / 3**0.5, 1 / 16 / 3**0.5),
        "normal": (0.02, 0.02, 0.02, 0.02),
        "fan_in": (0.88, 0.88 / 16, 0.88 / 16, 0.0),
    }[init]
    layer = "self_attention.0"
    names = ("embed.weight", f"{layer}.mlp.up_proj.weight", f"{layer}.out_proj.weight", "head.weight")
    for name, std in zip(names, expected, strict=True):
        assert abs(weights[name].std().item() - std) <= 0.02 * std
        assert abs(weights[name].mean().item()) <= 0.02 * std
    assert (weights[f"{layer}.mlp.up_proj.bias"].abs().max().item() == 0) == (init != "torch")


def test_the_same_seed_gives_the_same_weights() -> None:
    states = []
    for _ in range(2):
        torch.manual_seed(5)
        states.append(PerceiverAR(small().config).state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_sinusoidal_tables_are_not_trained_and_learned_ones_are() -> None:
    for kind, trained in (("sinusoidal", False), ("learned", True)):
        table = small(position_table=kind).get_parameter("position_embed.0.weight")
        assert table.requires_grad == trained and table.shape == (12, 16)


CROSS = [
    "cross_attention.mlp.down_proj",
    "cross_attention.mlp.up_proj",
    "cross_attention.q_proj",
    "cross_attention.kv_proj",
]
SELF = [
    "self_attention.mlp.down_proj",
    "self_attention.mlp.up_proj",
    "self_attention.qkv_proj",
    "self_attention.out_proj",
]


@pytest.mark.parametrize(
    ("preset", "biased"),
    [
        ("lucidrains", ["cross_attention.out_proj"]),
        ("krasserm", ["cross_attention.out_proj", "head"]),
        ("paper", ["cross_attention.out_proj", "head", "query_proj", *CROSS, *SELF]),
    ],
)
def test_presets_have_biases_where_the_references_have_them(preset: str, biased: list[str]) -> None:
    config = PerceiverARConfig.preset(preset, dim=16, num_heads=2, num_layers=1, context_length=8, num_latents=4)
    names = [name.replace(".0.", ".") for name in PerceiverAR(config).state_dict() if name.endswith(".bias")]
    assert {name.removesuffix(".bias") for name in names if "norm" not in name} == set(biased)


# Weights on disk.


@settings(max_examples=15)
@given(config=configs(), seed=st.integers(0, 100))
def test_a_saved_network_loads_as_the_same_function_and_saves_as_the_same_bytes(
    config: PerceiverARConfig, seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    first, second = tmp_path_factory.mktemp("first"), tmp_path_factory.mktemp("second")
    model = randomize(PerceiverAR(config).eval(), seed)
    model.save_pretrained(first)
    loaded = PerceiverAR.from_pretrained(first)
    assert loaded.config == config
    assert not loaded.training
    tokens = random_tokens(model, 2, config.context_length)
    assert torch.equal(loaded(tokens), model(tokens))
    loaded.save_pretrained(second)
    for name in ("config.json", "model.safetensors"):
        assert (first / name).read_bytes() == (second / name).read_bytes()
    assert sorted(path.name for path in first.iterdir()) == ["config.json", "model.safetensors"]


def test_tied_embeddings_are_stored_once_and_stay_tied(tmp_path: Path) -> None:
    model = small(tie_embeddings=True)
    model.save_pretrained(tmp_path)
    assert "head.weight" not in load_file(tmp_path / "model.safetensors")
    loaded = PerceiverAR.from_pretrained(str(tmp_path))
    assert loaded.head.weight is loaded.embed.weight
    assert torch.equal(loaded.head.weight, model.embed.weight)
    assert loaded.num_parameters() == small().num_parameters() - 11 * 16


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    small().save_pretrained(tmp_path)
    return tmp_path


def refusal(path: Path) -> str:
    with pytest.raises(InputError) as error:
        PerceiverAR.from_pretrained(path)
    message = str(error.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_missing_file_is_named(saved: Path, name: str) -> None:
    (saved / name).unlink()
    assert str(saved / name) in refusal(saved)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
@pytest.mark.parametrize("content", ["", "half", "noise", "text"])
def test_a_damaged_file_is_named(saved: Path, name: str, content: str) -> None:
    whole = (saved / name).read_bytes()
    damaged = {"": b"", "half": whole[: len(whole) // 2], "noise": bytes(range(255, -1, -1)) * 8, "text": b"[1, 2]"}
    (saved / name).write_bytes(damaged[content])
    message = refusal(saved)
    assert str(saved / name) in message
    assert "damaged" in message


def test_another_kind_of_model_is_refused(saved: Path) -> None:
    (saved / "config.json").write_text(json.dumps({"model_type": "gpt2", "vocab_size": 11}))
    message = refusal(saved)
    assert str(saved / "config.json") in message
    assert "gpt2" in message


def test_arguments_that_mean_nothing_are_named(saved: Path) -> None:
    PerceiverAR.from_pretrained(saved, local_files_only=True)  # as the Hub takes it
    with pytest.raises(InputError, match="from_pretrained has no argument map_location, torch_dtype"):
        PerceiverAR.from_pretrained(saved, torch_dtype=torch.float32, map_location="cpu")


def test_a_directory_that_is_not_there_is_named(tmp_path: Path) -> None:
    assert str(tmp_path / "nowhere") in refusal(tmp_path / "nowhere")


def test_missing_unknown_and_misshapen_tensors_are_all_listed(saved: Path) -> None:
    file = saved / "model.safetensors"
    tensors = load_file(file)
    del tensors["norm.weight"], tensors["head.weight"]
    tensors["tail.weight"] = torch.zeros(2)
    tensors["embed.weight"] = torch.zeros(11, 17)
    save_file(tensors, file)
    message = refusal(saved)
    for part in (
        str(file),
        "norm.weight is missing",
        "head.weight is missing",
        "tail.weight is unknown",
        "embed.weight has shape (11, 17), not (11, 16)",
    ):
        assert part in message


def test_settings_that_do_not_fit_the_weights_are_refused(saved: Path) -> None:
    settings_ = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps({**settings_, "num_layers": 1}))
    assert "self_attention.1.norm.weight is unknown" in refusal(saved)


def test_the_module_has_the_sizes_of_its_settings() -> None:
    model = PerceiverAR(
        PerceiverARConfig(
            vocab_size=7, dim=12, num_heads=2, query_proj=True, embed_dim=5, cross_num_heads=3, num_layers=1
        )
    )
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert shapes["embed.weight"] == (7, 5)
    assert shapes["cross_attention.0.kv_proj.weight"] == (24, 5)
    assert shapes["self_attention.0.qkv_proj.weight"] == (36, 12)
    assert model.num_parameters() == sum(math.prod(shape) for shape in shapes.values())
    assert network.PerceiverAR is PerceiverAR

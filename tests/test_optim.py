"""The learning rule is torch's own Muon and AdamW, each on its parameters, and schedules are what their names say."""

import copy
import io
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import configs
from torch import Tensor, nn

from perceiver_ar import OptimConfig, PerceiverAR, PerceiverARConfig
from perceiver_ar.optim import MuonAdamW, lr_factor, make_optimizer, orthogonalize

SMALL = PerceiverARConfig(
    vocab_size=11, context_length=12, num_latents=4, dim=16, num_layers=2, num_heads=2, mlp_ratio=3.0, mlp_bias=True
)
FUSED = {"qkv_proj.weight": 3, "kv_proj.weight": 2, "q_proj.weight": 1, "out_proj.weight": 1}


def set_gradients(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.randn(parameter.shape, generator=generator)


def is_hidden(name: str) -> bool:
    return name.endswith("_proj.weight")


def pieces_of(name: str) -> int:
    return FUSED.get(".".join(name.split(".")[-2:]), 1)


@settings(max_examples=30)
@given(config=configs(), name=st.sampled_from(["muon", "adamw"]))
def test_every_trainable_parameter_is_in_exactly_one_group(config: PerceiverARConfig, name: Any) -> None:
    model = PerceiverAR(config)
    optimizer = make_optimizer(model, OptimConfig(name=name))
    grouped = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    assert len(grouped) == len(set(grouped))
    assert set(grouped) == {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    assert all(group["initial_lr"] == group["lr"] > 0 for group in optimizer.param_groups)


def test_muon_gets_the_matrices_between_hidden_vectors_and_no_others() -> None:
    model = PerceiverAR(SMALL.replace(position_table="learned", query_proj=True))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    muon, adamw = make_optimizer(model, OptimConfig()).param_groups
    kinds = {names[id(parameter)].split(".", 2)[-1] for parameter in muon["params"]}
    assert kinds == {"weight", "qkv_proj.weight", "q_proj.weight", "kv_proj.weight", "out_proj.weight",
                     "mlp.up_proj.weight", "mlp.down_proj.weight"}  # fmt: skip
    rest = {names[id(parameter)] for parameter in adamw["params"]}
    assert {"embed.weight", "position_embed.0.weight", "head.weight", "query_proj.bias", "norm.weight"} <= rest


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_a_step_is_torchs_muon_on_each_hidden_matrix_and_torchs_adamw_on_the_rest(weight_decay: float) -> None:
    torch.manual_seed(0)
    ours, theirs = PerceiverAR(SMALL), PerceiverAR(SMALL)
    theirs.load_state_dict(ours.state_dict())
    config = OptimConfig(muon_lr=0.03, lr=0.004, weight_decay=weight_decay, momentum=0.9, betas=(0.8, 0.97))
    optimizer = make_optimizer(ours, config, torch.bfloat16)  # as torch's
    named = dict(theirs.named_parameters())
    # Projections fused into one parameter are separate matrices to Muon: here they are separate parameters.
    matrices = {
        name: [nn.Parameter(piece.detach().clone()) for piece in parameter.chunk(pieces_of(name))]
        for name, parameter in named.items()
        if is_hidden(name)
    }
    assert {len(pieces) for pieces in matrices.values()} == {1, 2, 3}
    every = [matrix for pieces in matrices.values() for matrix in pieces]
    muon = torch.optim.Muon(every, lr=0.03, weight_decay=weight_decay, momentum=0.9)
    rest = [parameter for name, parameter in named.items() if not is_hidden(name)]
    adamw = torch.optim.AdamW(rest, lr=0.004, betas=(0.8, 0.97), weight_decay=0.0)
    start = copy.deepcopy(ours.state_dict())
    for step in range(3):
        set_gradients(ours, step)
        set_gradients(theirs, step)
        for name, pieces in matrices.items():
            gradient = named[name].grad
            assert gradient is not None
            for matrix, piece in zip(pieces, gradient.chunk(len(pieces)), strict=True):
                matrix.grad = piece
        optimizer.step()
        muon.step()
        adamw.step()
    for name, parameter in ours.named_parameters():
        moved = (parameter - start[name]).abs().max()
        assert moved > 0
        if is_hidden(name):  # products in bfloat16: their rounding may depend on how they are batched
            torch.testing.assert_close(
                parameter.data, torch.cat([*matrices[name]]).data, rtol=0, atol=0.01 * moved.item()
            )
        else:  # theirs is a loop of single operations, ours one: they round differently
            torch.testing.assert_close(parameter.data, named[name].data, rtol=1e-5, atol=1e-5 * moved.item())


def test_matrices_of_equal_shapes_learn_in_a_stack_what_they_learn_alone() -> None:
    torch.manual_seed(0)
    alone, stacked = PerceiverAR(SMALL), PerceiverAR(SMALL)
    stacked.load_state_dict(alone.state_dict())
    one, other = (make_optimizer(model, OptimConfig(weight_decay=0.1)) for model in (alone, stacked))
    assert isinstance(other, MuonAdamW)
    for step in range(3):
        stacks: dict[Any, list[Tensor]] = {}
        for model in (alone, stacked):
            set_gradients(model, step)
        for pieces, parameters in list(other._stacks()):
            stacks.setdefault((pieces, parameters[0].shape), []).extend(parameters)
        with torch.no_grad():
            for (pieces, _), parameters in stacks.items():
                other._step_stack(parameters, pieces)
        other.adamw.step()
        one.step()
    assert sorted(map(len, stacks.values())) == [1, 2, 3, 3, 4]
    for a, b in zip(alone.parameters(), stacked.parameters(), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-6)


def test_adamw_alone_is_torchs_and_decays_matrices_only() -> None:
    torch.manual_seed(0)
    ours, theirs = PerceiverAR(SMALL), PerceiverAR(SMALL)
    theirs.load_state_dict(ours.state_dict())
    optimizer = make_optimizer(ours, OptimConfig(name="adamw", lr=0.01, weight_decay=0.5))
    convolution = theirs.local_conv
    assert convolution is not None
    matrices = [parameter for parameter in theirs.parameters() if parameter.ndim == 2 and parameter is not convolution]
    vectors = [convolution, *(parameter for parameter in theirs.parameters() if parameter.ndim == 1)]
    adamw = [
        torch.optim.AdamW(matrices, lr=0.01, betas=(0.9, 0.95), weight_decay=0.5),
        torch.optim.AdamW(vectors, lr=0.01, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    for step in range(3):
        set_gradients(ours, step)
        set_gradients(theirs, step)
        optimizer.step()
        for part in adamw:
            part.step()
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_an_optimizer_with_a_restored_state_continues_identically(name: Any) -> None:
    config = OptimConfig(name=name, weight_decay=0.1)
    model = PerceiverAR(SMALL)
    optimizer = make_optimizer(model, config)
    for step in range(2):
        set_gradients(model, step)
        optimizer.step()
    file = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict()], file)
    file.seek(0)
    weights, state = torch.load(file, weights_only=True)
    copied = PerceiverAR(SMALL)
    copied.load_state_dict(weights)
    restored = make_optimizer(copied, config)
    restored.load_state_dict(state)
    for step in range(2, 5):
        for each, its_optimizer in ((model, optimizer), (copied, restored)):
            set_gradients(each, step)
            for group in its_optimizer.param_groups:
                group["lr"] = group["initial_lr"] * 0.5  # as a schedule does
            its_optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), copied.parameters(), strict=True))


def test_the_learning_rate_of_a_group_is_that_of_its_steps() -> None:
    model = PerceiverAR(SMALL)
    optimizer = make_optimizer(model, OptimConfig())
    before = copy.deepcopy(model.state_dict())
    set_gradients(model, 0)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    optimizer.step()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_parameter_without_a_gradient_stays_and_zero_gradients_give_no_nan() -> None:
    model = PerceiverAR(SMALL)
    optimizer = make_optimizer(model, OptimConfig())
    before = copy.deepcopy(model.state_dict())
    optimizer.step()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_closure_is_evaluated_with_gradients_and_its_loss_returned() -> None:
    model = PerceiverAR(SMALL)
    optimizer = make_optimizer(model, OptimConfig())
    before = model.embed.weight.detach().clone()

    def closure() -> float:
        loss = model.embed.weight.square().sum()
        loss.backward()
        return loss.item()

    assert optimizer.step(closure) == pytest.approx(before.square().sum().item())
    assert not torch.equal(model.embed.weight, before)


@settings(max_examples=30)
@given(
    count=st.integers(1, 3), rows=st.integers(1, 24), columns=st.integers(1, 24), scale=st.sampled_from([1e-4, 1, 1e4]),
    seed=st.integers(0, 99), dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)  # fmt: skip
def test_orthogonalized_matrices_keep_their_singular_vectors_and_have_values_near_one(
    count: int, rows: int, columns: int, scale: float, seed: int, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(seed)
    u, _, vh = torch.linalg.svd(torch.randn(count, rows, columns, generator=generator), full_matrices=False)
    values = 0.2 + 0.8 * torch.rand(count, min(rows, columns), generator=generator)  # not so near zero as to stay there
    result = orthogonalize(scale * u @ torch.diag_embed(values) @ vh, dtype)
    assert result.dtype == torch.float32
    inside = u.mT @ result @ vh.mT
    diagonal = torch.diagonal(inside, dim1=1, dim2=2)
    assert diagonal.min() > 0.5 and diagonal.max() < 1.4
    assert (inside - torch.diag_embed(diagonal)).abs().max() < (0.15 if dtype == torch.bfloat16 else 1e-4)


# Schedules.


def schedules(name: str) -> st.SearchStrategy[OptimConfig]:
    return st.builds(OptimConfig, schedule=st.just(name), warmup=st.floats(0.0, 0.4), decay=st.floats(0.05, 0.6))


progress = st.floats(0, 1)


@given(config=st.one_of(*map(schedules, ["wsd", "cosine", "constant"])), at=progress)
def test_factors_are_shares_of_the_peak(config: OptimConfig, at: float) -> None:
    assert 0 <= lr_factor(config, at) <= 1


@given(config=st.one_of(*map(schedules, ["wsd", "cosine", "constant"])), at=progress)
def test_warmup_rises_in_a_line_from_zero(config: OptimConfig, at: float) -> None:
    at *= config.warmup
    if config.warmup > 0:
        assert lr_factor(config, 0.0) == 0.0
        assert lr_factor(config, at) == pytest.approx(at / config.warmup)
    else:
        assert lr_factor(config, 0.0) == 1.0


@given(config=schedules("wsd"), at=progress)
def test_wsd_is_at_the_peak_until_it_falls_in_a_line_to_zero(config: OptimConfig, at: float) -> None:
    if config.warmup <= at <= 1 - config.decay:
        assert lr_factor(config, at) == pytest.approx(1)
    if at >= max(config.warmup, 1 - config.decay):
        assert lr_factor(config, at) == pytest.approx((1 - at) / config.decay)
    assert lr_factor(config, 1.0) == 0.0


@given(config=schedules("cosine"), at=progress)
def test_cosine_falls_from_the_peak_to_zero_symmetrically(config: OptimConfig, at: float) -> None:
    def after_warmup(share: float) -> float:
        return lr_factor(config, config.warmup + share * (1 - config.warmup))

    assert after_warmup(0.0) == pytest.approx(1)
    assert after_warmup(0.5) == pytest.approx(0.5)
    assert after_warmup(1.0) == pytest.approx(0, abs=1e-9)
    assert after_warmup(at) + after_warmup(1 - at) == pytest.approx(1)
    assert after_warmup(at) >= after_warmup(min(1.0, at + 0.01)) - 1e-12


@given(config=schedules("constant"), at=progress)
def test_constant_stays_at_the_peak_after_the_warmup(config: OptimConfig, at: float) -> None:
    if at >= config.warmup:
        assert lr_factor(config, at) == 1


def test_wsd_without_decay_is_constant() -> None:
    config = OptimConfig(decay=0.0)
    assert [lr_factor(config, at) for at in (0.02, 0.5, 1.0)] == [1, 1, 1]


def test_adamw_is_given_more_to_do_more_slowly() -> None:
    model = PerceiverAR(SMALL)
    beside, alone = (make_optimizer(model, OptimConfig(name=name)).param_groups[-1]["lr"] for name in ("muon", "adamw"))
    assert (beside, alone) == (0.03, 0.003)
    assert make_optimizer(model, OptimConfig(lr=0.5)).param_groups[-1]["lr"] == 0.5

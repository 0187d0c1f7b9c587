"""The package's classes on our network: recorded results of perceiver-ar-pytorch 0.0.10, and what is better here.

tests/golden/lucidrains holds them; see recorded.py.
"""

from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from recorded import FLOAT32, FLOAT64, Golden, assert_close, cases
from torch import Tensor
from torch.nn.utils import prune
from torch.nn.utils.parametrizations import weight_norm
from torch.nn.utils.parametrize import register_parametrization

from perceiver_ar.compat.lucidrains import (
    AutoregressiveWrapper,
    PerceiverAR,
    load_lucidrains,
    names,
    save_lucidrains,
)
from perceiver_ar.config import PerceiverARConfig
from perceiver_ar.errors import InputError
from perceiver_ar.network.heads import rotary_tables
from perceiver_ar.network.inputs import prefix_keeps


class Package(Golden):
    def net(self, dtype: torch.dtype = torch.float32, **changes: Any) -> PerceiverAR:
        net = PerceiverAR(**{**self.arguments, **changes})
        net.load_state_dict(self.parameters())
        return net.to(dtype).eval()


FILES = {name: Package.load(f"lucidrains/{name}") for name in ("base", "perceive2", "widehead", "oddhead", "train20")}
BASE = FILES["base"]
SMALL = {"num_tokens": 7, "dim": 8, "depth": 1, "max_seq_len": 12, "cross_attn_seq_len": 5, "dim_head": 32, "heads": 2}


def random_net(**changes: Any) -> PerceiverAR:
    torch.manual_seed(0)
    return PerceiverAR(**{**SMALL, **changes}).eval()


def test_every_recorded_case_is_compared() -> None:
    # A case that no test below looks for would go unseen.
    recorded = set().union(*(golden.cases() for golden in FILES.values()))
    compared = {case for output in ("logits", "loss", "tokens") for _, case in cases(FILES, output)}
    assert recorded == compared
    assert len(cases(FILES, "logits")) == 12
    assert len(cases(FILES, "loss")) == 5
    assert len(cases(FILES, "tokens")) == 3


# The same results.


@pytest.mark.parametrize(("name", "case"), cases(FILES, "logits"))
def test_logits_equal_the_packages(name: str, case: str) -> None:
    golden = FILES[name]
    data = golden.case(case)
    arguments = {"prefix_mask": data.get("in/prefix_mask")}
    if "in/keep_mask" in data:  # what prefix dropout left, as indices
        rows = data["in/keep_mask"]
        arguments["prefix_keep"] = torch.stack([row.nonzero().squeeze(-1) for row in rows])
    logits = golden.net()(data["in/tokens"], **arguments)
    assert_close(logits, data["out/logits"], FLOAT32)
    if "out/logits_f64" in data:
        assert_close(golden.net(torch.float64)(data["in/tokens"], **arguments), data["out/logits_f64"], FLOAT64)


@pytest.mark.parametrize(("name", "rate"), [("prefix_dropout", 0.5), ("prefix_dropout_mask", 0.3)])
def test_prefix_dropout_in_training_keeps_as_many_as_the_package(name: str, rate: float) -> None:
    data = BASE.case(name)
    net = BASE.net(cross_attn_dropout=rate).train()
    keep = prefix_keeps(net.model.config, data["in/tokens"], net.cross_attn_seq_len, None, True)[0]
    assert keep is not None
    assert keep.shape[1] == data["in/keep_mask"].sum(1).unique().item()


@pytest.mark.parametrize("name", ["base", "perceive2"])
def test_the_residual_stream_equals_the_packages_after_each_block(name: str) -> None:
    golden = FILES[name]
    data = golden.case("full")
    net = golden.net()
    places = {}
    for i in range(len(net.model.cross_attention)):
        places[f"perceive{i}_attn_out"] = f"cross_attention.{i}.out_proj"
        places[f"perceive{i}_x"] = f"cross_attention.{i}"
    for i in range(len(net.model.self_attention)):
        places[f"layer{i}_x"] = f"self_attention.{i}"
    seen: dict[str, Tensor] = {}

    def hook(key: str) -> Callable[..., None]:
        return lambda _module, _inputs, out: seen.update({key: out})

    for key, place in places.items():
        net.model.get_submodule(place).register_forward_hook(hook(key))
    net(data["in/tokens"])
    recorded = {key.removeprefix("out/hidden/"): x for key, x in data.items() if key.startswith("out/hidden/")}
    assert recorded.keys() == seen.keys()
    for key, expected in recorded.items():
        assert_close(seen[key], expected, FLOAT32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("name", "case"), [pair for pair in cases(FILES, "loss") if pair[0] != "train20"])
def test_losses_and_gradients_equal_the_packages(name: str, case: str, dtype: torch.dtype) -> None:
    golden = FILES[name]
    data = golden.case(case)
    net = golden.net(dtype)
    if "in/sequence" in data:
        loss = AutoregressiveWrapper(net)(data["in/sequence"])
    else:
        loss = net(data["in/tokens"], prefix_mask=data.get("in/prefix_mask"), labels=data["in/labels"])
    loss.backward()
    ours = dict(net.named_parameters())
    by_name = {theirs: ours[f"model.{name}"] for name, (theirs,), _ in names(net.model)}
    norms = []
    for theirs in golden.notes["grad_norm_order"]:
        gradient = by_name[theirs].grad
        assert gradient is not None
        norms.append(gradient.norm().double())
    suffix, tolerance = ("", FLOAT32) if dtype == torch.float32 else ("_f64", FLOAT64)
    assert_close(loss, data[f"out/loss{suffix}"], tolerance)
    recorded = data.get(f"out/grad_norm{suffix}")
    if recorded is not None:
        for actual, expected in zip(norms, recorded, strict=True):
            assert_close(actual, expected, tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_twenty_adam_steps_equal_the_packages(dtype: torch.dtype) -> None:
    golden = FILES["train20"]
    data = golden.case("train")
    net = golden.net(dtype).train()
    wrapper = AutoregressiveWrapper(net)
    optimizer = torch.optim.Adam(wrapper.parameters(), lr=3e-3)
    losses, norms = [], []
    for step in range(20):
        loss = wrapper(data["in/batches"][step % 4])
        optimizer.zero_grad()
        loss.backward()
        losses.append(loss.detach())
        grads = [p.grad for p in wrapper.parameters() if p.grad is not None]
        norms.append(torch.stack([grad.norm() for grad in grads]).norm())
        optimizer.step()
    suffix, tolerance = ("", FLOAT32) if dtype == torch.float32 else ("_f64", FLOAT64)
    assert_close(torch.stack(losses), data[f"out/loss{suffix}"], tolerance)
    assert_close(torch.stack(norms), data[f"out/global_grad_norm{suffix}"], tolerance)
    assert_close(net.eval()(data["in/probe"]), data[f"out/final_probe_logits{suffix}"], tolerance)
    state = net.state_dict()
    final = torch.stack([state[name].norm() for name in golden.notes["param_norm_order"]])
    assert_close(final, data[f"out/final_param_norm{suffix}"], tolerance)


@pytest.mark.parametrize("case", ["generate", "generate_eos"])
def test_greedy_generation_equals_the_packages_through_the_slide_of_the_window(case: str) -> None:
    data = BASE.case(case)
    note = BASE.notes["cases"][case]
    net = BASE.net()
    lengths, logits = [], list[Tensor]()
    net.register_forward_hook(lambda _module, inputs, _out: lengths.append(inputs[0].shape[1]))

    def record(_module: Any, _inputs: Any, out: Tensor) -> None:
        logits.append(out if out.ndim == 2 else out[:, -1])

    net.model.head.register_forward_hook(record)
    prompt = data["in/tokens"]
    new = AutoregressiveWrapper(net).generate(prompt, note["seq_len"], **note["kwargs"])
    assert torch.equal(new, data["out/tokens"])
    assert_close(torch.stack(logits, dim=1), data["out/step_logits"], FLOAT32)
    if case == "generate":
        assert lengths == [40] * 5  # growing windows, of 30 to 40 tokens, go over a cache


# The same files.


@pytest.mark.parametrize("name", FILES)
def test_state_dicts_have_the_packages_names_order_shapes_and_values(name: str) -> None:
    golden = FILES[name]
    saved = golden.net().state_dict()
    recorded = golden.parameters()
    assert list(saved) == list(recorded)
    for key, tensor in recorded.items():
        assert torch.equal(saved[key], tensor), key
    again = PerceiverAR(**golden.arguments)
    assert str(again.load_state_dict(saved)) == "<All keys matched successfully>"
    for key, tensor in again.state_dict().items():
        assert torch.equal(tensor, saved[key])


def test_state_dicts_go_through_the_wrapper_with_its_prefix(tmp_path: Path) -> None:
    recorded = OrderedDict((f"net.{key}", tensor) for key, tensor in BASE.parameters().items())
    torch.save(recorded, tmp_path / "wrapper.pt")
    wrapper = AutoregressiveWrapper(PerceiverAR(**BASE.arguments)).eval()
    wrapper.load_state_dict(torch.load(tmp_path / "wrapper.pt", weights_only=True))
    data = BASE.case("full")
    assert_close(wrapper.net(data["in/tokens"]), data["out/logits"], FLOAT32)
    saved = wrapper.state_dict()
    assert list(saved) == list(recorded)
    assert all(torch.equal(saved[key], tensor) for key, tensor in recorded.items())


@pytest.mark.parametrize("wrapped", [False, True])
def test_wrong_names_and_shapes_are_errors(wrapped: bool) -> None:
    module = AutoregressiveWrapper(PerceiverAR(**BASE.arguments)) if wrapped else PerceiverAR(**BASE.arguments)
    prefix = "net." if wrapped else ""
    good = {prefix + key: tensor for key, tensor in BASE.parameters().items()}
    missing = {key: tensor for key, tensor in good.items() if not key.endswith("to_logits.weight")}
    with pytest.raises(RuntimeError, match=rf'Missing key.* "{prefix}to_logits\.weight"\. $'):
        module.load_state_dict(missing)
    for name in ("layers.2.0.norm.weight", "layers.1.0.norm.colour", "colour"):
        with pytest.raises(RuntimeError, match=rf'Unexpected key.* "{prefix}{name}"\. $'):
            module.load_state_dict({**good, prefix + name: torch.ones(32)})
    with pytest.raises(RuntimeError, match=rf"size mismatch for {prefix}token_emb\.weight: "):
        module.load_state_dict({**good, prefix + "token_emb.weight": torch.ones(37, 31)})
    # Heads of another size, where no weight tells.
    with pytest.raises(RuntimeError, match=rf"size mismatch for {prefix}rotary_pos_emb\.inv_freq: \(9,\) .* \(16,\)"):
        module.load_state_dict({**good, prefix + "rotary_pos_emb.inv_freq": torch.ones(9)})
    report = module.load_state_dict({**missing, prefix + "layers.1.0.colour": torch.ones(1)}, strict=False)
    assert report.missing_keys == [f"{prefix}to_logits.weight"]
    assert report.unexpected_keys == [f"{prefix}layers.1.0.colour"]


class Adapter(torch.nn.Module):
    """Holds the layer that it replaces, as peft's adapters do."""

    def __init__(self, layer: torch.nn.Module) -> None:
        super().__init__()
        self.base_layer = layer
        self.lora_A = torch.nn.ModuleDict({"default": torch.nn.LazyLinear(64, bias=False)})

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.lora_A["default"](x)


def adapt(net: PerceiverAR) -> None:
    layer = net.model.get_submodule("cross_attention.0")
    layer.q_proj = Adapter(layer.get_submodule("q_proj"))


INSIDE: dict[str, tuple[Callable[[PerceiverAR], object], list[str]]] = {
    "weight_norm": (
        lambda net: weight_norm(net.model.get_submodule("cross_attention.0.q_proj")),
        ["perceive_layers.0.0.to_q.parametrizations.weight.original0",
         "perceive_layers.0.0.to_q.parametrizations.weight.original1"],
    ),
    "pruning": (
        lambda net: prune.random_unstructured(net.model.get_submodule("self_attention.0.mlp.up_proj"), "weight", 0.5),
        ["layers.0.1.1.weight_orig", "layers.0.1.1.weight_mask"],
    ),
    "parametrized embedding": (
        lambda net: register_parametrization(net.model.embed, "weight", torch.nn.Tanh()),
        ["token_emb.parametrizations.weight.original"],
    ),
    "adapter": (  # whose makers look for its keys by the names of modules
        adapt,
        ["model.cross_attention.0.q_proj.base_layer.weight", "model.cross_attention.0.q_proj.lora_A.default.weight"],
    ),
    "torch.compile": (lambda net: setattr(net, "model", torch.compile(net.model, backend="eager")), []),
}  # fmt: skip


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("inside", INSIDE)
def test_what_is_put_into_the_network_is_saved_with_it_and_loaded(inside: str, wrapped: bool) -> None:
    change, own = INSIDE[inside]
    tokens, prefix = torch.randint(7, (2, 12)), "net." if wrapped else ""
    nets = [random_net() for _ in range(2)]
    plain = {prefix + name for name in nets[0].state_dict()}
    for net in nets:
        change(net)
        net(tokens)  # the adapter's shape
    first, second = (AutoregressiveWrapper(net) if wrapped else net for net in nets)
    with torch.no_grad():
        for parameter in first.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    saved = first.state_dict()
    assert {name for name in saved if name not in plain} == {prefix + name for name in own}
    assert len(plain - set(saved)) == bool(own)
    assert str(second.load_state_dict(saved)) == "<All keys matched successfully>"
    assert torch.equal(nets[1](tokens), nets[0](tokens))


@pytest.mark.parametrize("inside", [name for name, (_, own) in INSIDE.items() if own])
def test_a_network_with_something_inside_is_not_exported(inside: str, tmp_path: Path) -> None:
    net = random_net()
    INSIDE[inside][0](net)
    net(torch.randint(7, (2, 12)))
    with pytest.raises(InputError, match=r"the model holds adapters, parametrizations or pruning .*merge them into"):
        save_lucidrains(net.model, tmp_path / "model.pt")
    assert not list(tmp_path.iterdir())


def test_heads_with_an_odd_number_of_frequencies_go_out_as_they_came(tmp_path: Path) -> None:
    golden = FILES["oddhead"]
    recorded = golden.parameters()
    torch.save(recorded, tmp_path / "in.pt")
    model = load_lucidrains(tmp_path / "in.pt", cross_attn_seq_len=12, heads=1)
    data = golden.case("full")
    assert_close(model(data["in/tokens"], 12), data["out/logits"], FLOAT32)
    arguments = save_lucidrains(model, tmp_path / "out.pt")
    assert arguments.items() <= golden.arguments.items()
    saved = torch.load(tmp_path / "out.pt", weights_only=True)
    assert list(saved) == list(recorded)
    assert all(torch.equal(saved[name], tensor) for name, tensor in recorded.items())


def test_an_optimizer_state_of_the_package_continues_here() -> None:
    # The package's parameters, in its order, under Adam; the gradients come from our network through the names. After
    # ten steps the optimizer state goes over to an optimizer of our parameters, by order, and training goes on.
    golden = FILES["train20"]
    data = golden.case("train")
    package = [tensor.clone().requires_grad_() for key, tensor in golden.parameters().items() if "inv_freq" not in key]
    keys = [key for key in golden.parameters() if "inv_freq" not in key]
    theirs = torch.optim.Adam(package, lr=3e-3)
    net = golden.net(torch.float32).train()
    wrapper = AutoregressiveWrapper(net)
    ours = torch.optim.Adam(wrapper.parameters(), lr=1.0)
    named = {key: net.get_parameter(f"model.{name}") for name, (key,), _ in names(net.model)}

    for step in range(10):
        net.zero_grad()
        wrapper(data["in/batches"][step % 4]).backward()
        for key, parameter in zip(keys, package, strict=True):
            parameter.grad = named[key].grad
        theirs.step()
        net.load_state_dict(dict(zip(keys, package, strict=True)), strict=False)
    ours.load_state_dict(theirs.state_dict())
    for p in wrapper.parameters():
        assert ours.state[p]["exp_avg"].shape == p.shape

    losses = []
    for step in range(10, 20):
        loss = wrapper(data["in/batches"][step % 4])
        ours.zero_grad()
        loss.backward()
        ours.step()
        losses.append(loss.detach())
    assert_close(torch.stack(losses), data["out/loss"][10:], FLOAT32)


# What is better than in the package.


@pytest.mark.parametrize("length", [1, 3, 5])
def test_a_short_sequence_has_one_latent(length: int) -> None:
    net = random_net().double()
    tokens = torch.randint(7, (2, 12))
    logits = net(tokens[:, :length])
    assert logits.shape == (2, 1, 7)
    # It is what a latent at that position predicts with the rest as prefix.
    assert torch.equal(logits, net.model(tokens[:, :length], length - 1))
    labels = torch.full((2, length), 3)
    loss = torch.nn.functional.cross_entropy(logits[:, 0], labels[:, -1])
    assert_close(net(tokens[:, :length], labels=labels), loss, 1e-6)


@pytest.mark.parametrize("length", [0, 3, 5, 9, 12])
def test_a_mask_of_any_length_works_with_prefix_dropout(length: int) -> None:
    net = random_net(cross_attn_dropout=0.5).train()
    tokens = torch.randint(7, (2, 12))
    mask = torch.rand(2, length) < 0.6
    torch.manual_seed(1)
    logits = net(tokens, prefix_mask=mask)
    torch.manual_seed(1)
    [keep] = prefix_keeps(net.model.config, tokens, 5, None, True)
    assert keep is not None
    assert keep.shape == (2, 3)
    # It equals hiding the dropped tokens by the mask as well.
    full = torch.cat([mask, torch.ones(2, 12 - length, dtype=torch.bool)], dim=1)
    full[:, :5] &= torch.zeros(2, 5, dtype=torch.bool).scatter(1, keep, value=True)
    assert_close(logits, net.eval()(tokens, prefix_mask=full), 1e-5)


def test_a_mask_longer_than_the_sequence_is_refused_with_its_shape() -> None:
    with pytest.raises(InputError, match=r"prefix_mask has shape \(2, 13\): it must be \(2, at most 12\)"):
        random_net()(torch.zeros(2, 12, dtype=torch.long), prefix_mask=torch.ones(2, 13, dtype=torch.bool))


def test_a_query_that_a_mask_leaves_without_keys_does_not_see_the_future() -> None:
    net = random_net(depth=0)
    tokens = torch.randint(7, (1, 12))
    mask = torch.arange(12)[None] >= 8  # latents 5, 6, 7 see nothing
    later = torch.cat([tokens[:, :8], (tokens[:, 8:] + 1) % 7], dim=1)
    assert torch.equal(net(later, prefix_mask=mask)[:, :3], net(tokens, prefix_mask=mask)[:, :3])
    # Without keys the cross-attention adds nothing but its output bias: the value weights do not matter.
    before = net(tokens, prefix_mask=mask)[:, :3]
    with torch.no_grad():
        net.model.get_parameter("cross_attention.0.kv_proj.weight").mul_(2)
    assert torch.equal(net(tokens, prefix_mask=mask)[:, :3], before)


@pytest.mark.parametrize("dim_head", [1, 7, 8, 31, 32, 33, 63, 64, 65, 66, 67, 80])
def test_heads_of_any_size_work_and_small_ones_are_rotated_whole(dim_head: int) -> None:
    net = random_net(dim_head=dim_head)
    assert net(torch.randint(7, (2, 12))).isfinite().all()
    rotary = rotary_tables(net.model.config, torch.arange(12)[None], cross=True, dtype=torch.float32)
    assert rotary is not None
    pairs = dim_head // 2 if dim_head < 32 else (max(32, dim_head // 2) + 1) // 2
    assert rotary[0].shape[-1] == 2 * pairs
    assert net.state_dict()["rotary_pos_emb.inv_freq"].shape == (pairs,)


def test_bfloat16_positions_do_not_collapse() -> None:
    torch.manual_seed(0)
    arguments = {"num_tokens": 7, "dim": 32, "depth": 2, "max_seq_len": 1000, "cross_attn_seq_len": 988}
    net = PerceiverAR(**arguments, dim_head=32, heads=2).eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(2 if parameter.ndim == 2 else 1)  # sharper attention than new weights give
        net.model.get_parameter("position_embed.0.weight").zero_()
    net.bfloat16()
    tokens = torch.randint(7, (1, 1000))
    mask = torch.arange(1000)[None] >= 980  # twenty neighbours, so that each key's position counts
    rounded = net(tokens, prefix_mask=mask).float()
    exact = net.float()(tokens, prefix_mask=mask)
    assert_close(rounded, exact, 0.03)
    collapsed = torch.arange(1000).bfloat16().long().clamp(max=999)  # bfloat16 has every fourth integer here
    other = net.model(tokens, 988, mask=mask, positions=collapsed)
    assert (other - exact).abs().max() > 0.1 * exact.abs().max()  # so the bound above would notice


def test_dropout_runs_in_training_and_repeats_under_a_seed() -> None:
    net = random_net(dropout=0.3, cross_attn_dropout=0.4).train()
    tokens = torch.randint(7, (2, 12))
    results = []
    for _ in range(2):
        torch.manual_seed(1)
        net.zero_grad()
        loss = net(tokens, labels=tokens)
        loss.backward()
        results.append(loss)
        assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], net.eval()(tokens, labels=tokens))


@pytest.mark.parametrize("silent", ["down_proj", "out_proj"])
def test_dropout_reaches_the_cross_attention_and_the_feed_forward_blocks(silent: str) -> None:
    net = random_net(dropout=0.3).train()
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if silent in name:  # without the one kind of block only the other can make results vary
                parameter.zero_()
    tokens = torch.randint(7, (2, 12))
    assert not torch.equal(net(tokens), net(tokens))
    net.eval()
    assert torch.equal(net(tokens), net(tokens))


def test_an_eos_in_the_prompt_does_not_end_the_sampling() -> None:
    # The package's recorded run stops after one step because of it.
    data = BASE.case("generate_eos_in_prompt")
    note = BASE.notes["cases"]["generate_eos_in_prompt"]
    eos = note["kwargs"]["eos_token"]
    prompt = data["in/tokens"]
    assert (prompt == eos).any()
    wrapper = AutoregressiveWrapper(BASE.net())
    new = wrapper.generate(prompt, note["seq_len"], **note["kwargs"])
    plain = wrapper.generate(prompt, note["seq_len"], filter_thres=note["kwargs"]["filter_thres"])
    drawn = [row.index(eos) if eos in row else len(row) for row in plain.tolist()]
    assert new.shape[1] == min(max(drawn) + 1, note["seq_len"])
    assert new.shape[1] > data["out/tokens"].shape[1]
    for row, at in enumerate(drawn):
        assert torch.equal(new[row, : at + 1], plain[row, : at + 1][: new.shape[1]])


def test_everything_after_an_eos_becomes_the_pad_value() -> None:
    data = BASE.case("generate_eos")
    note = BASE.notes["cases"]["generate_eos"]
    eos = note["kwargs"]["eos_token"]
    new = AutoregressiveWrapper(BASE.net(), pad_value=36).generate(data["in/tokens"], note["seq_len"], **note["kwargs"])
    firsts = [row.index(eos) for row in new.tolist()]
    assert len(set(firsts)) > 1  # so one row goes on after its own
    for row, first in enumerate(firsts):
        assert (new[row, first + 1 :] == 36).all()
        assert torch.equal(new[row, : first + 1], data["out/tokens"][row, : first + 1])


def test_temperature_zero_is_greedy() -> None:
    data = BASE.case("generate")
    new = AutoregressiveWrapper(BASE.net()).generate(data["in/tokens"], 16, temperature=0.0)
    assert torch.equal(new, data["out/tokens"])


def test_at_least_one_candidate_survives_in_a_small_vocabulary() -> None:
    net = random_net(num_tokens=4)  # the package keeps int(0.1 * 4) = 0 of 4
    prompt = torch.randint(4, (2, 6))
    greedy = AutoregressiveWrapper(net).generate(prompt, 5, temperature=0.0)
    assert torch.equal(AutoregressiveWrapper(net).generate(prompt, 5), greedy)


def test_only_the_most_likely_candidates_are_drawn() -> None:
    net = random_net(num_tokens=10)
    prompt = torch.randint(10, (1, 6)).expand(300, -1)
    torch.manual_seed(0)
    drawn = AutoregressiveWrapper(net).generate(prompt, 1, temperature=5.0, filter_thres=0.7)
    allowed = net(prompt[:1])[0, -1].topk(3).indices.tolist()  # (1 - 0.7) * 10
    assert set(drawn.flatten().tolist()) == set(allowed)


@pytest.mark.parametrize("length", [2, 6, 11])
def test_the_cache_of_growing_latents_changes_no_token(length: int) -> None:
    net = random_net()  # one latent up to 6 tokens, then more, then a window of 12 that slides
    prompt = torch.randint(7, (3, length))
    sampled, anew = ({"seq_len": 14}, {"seq_len": 14, "prefix_mask": torch.ones(3, 1, dtype=torch.bool)})
    torch.manual_seed(0)
    expected = AutoregressiveWrapper(net).generate(prompt, **anew)  # arguments for the network go without a cache
    torch.manual_seed(0)
    assert torch.equal(AutoregressiveWrapper(net).generate(prompt, **sampled), expected)


def test_generation_leaves_the_mode_as_it_was_and_the_prompt_out() -> None:
    net = random_net()
    prompt = torch.randint(7, (2, 3))
    for training in (True, False):
        net.train(training)
        new = AutoregressiveWrapper(net).generate(prompt, 12)
        assert new.shape == (2, 12)
        assert net.training == training


# Arguments.


def test_settings_become_those_of_one_network() -> None:
    net = PerceiverAR(
        num_tokens=9, dim=24, depth=3, max_seq_len=20, cross_attn_seq_len=8, heads=3, ff_mult=2, perceive_depth=2
    )
    config = net.model.config
    assert isinstance(config, PerceiverARConfig)
    assert (config.vocab_size, config.context_length, config.num_latents) == (9, 20, 12)
    assert (config.num_layers, config.cross_layers, config.num_heads, config.head_dim) == (3, (0, 0), 3, 64)
    shapes = {name: tuple(tensor.shape) for name, tensor in net.state_dict().items()}
    assert shapes["perceive_layers.1.0.to_kv.weight"] == (384, 24)
    assert shapes["layers.2.1.1.weight"] == (48, 24)


@pytest.mark.parametrize("prefix", [12, 20, -1])
def test_a_prefix_that_leaves_no_latent_is_refused_with_both_numbers(prefix: int) -> None:
    with pytest.raises(InputError, match=f"cross_attn_seq_len is {prefix} and max_seq_len 12"):
        random_net(cross_attn_seq_len=prefix)


def test_too_long_a_sequence_is_refused_with_its_length() -> None:
    with pytest.raises(InputError, match="13 tokens are more than context_length 12"):
        random_net()(torch.zeros(1, 13, dtype=torch.long))


def test_a_sequence_without_a_batch_is_refused_with_its_shape() -> None:
    with pytest.raises(InputError, match=r"tokens have shape \(12,\)"):
        random_net()(torch.zeros(12, dtype=torch.long))


def test_sequences_may_stay_in_the_type_they_are_stored_in() -> None:
    wrapper = AutoregressiveWrapper(random_net())
    tokens = torch.randint(1, 7, (2, 13))
    for dtype in (torch.uint8, torch.uint16, torch.int32):
        assert torch.equal(wrapper(tokens.to(dtype)), wrapper(tokens))
        new = wrapper.generate(tokens[:, :3].to(dtype), 12, temperature=0.0)
        assert torch.equal(new, wrapper.generate(tokens[:, :3], 12, temperature=0.0))


@pytest.mark.parametrize(
    ("start", "temperature", "message"),
    [
        (torch.zeros(2, 0, dtype=torch.long), 1.0, "prompt row 0 is empty"),
        (torch.tensor([[1], [7]]), 1.0, "prompt row 1 has id 7"),
        (torch.tensor([[1]]), -1.0, "temperature is -1.0"),
        (torch.tensor([1, 2]), 1.0, r"start_tokens have shape \(2,\)"),
    ],
)
def test_generation_from_what_cannot_be_is_refused(start: Tensor, temperature: float, message: str) -> None:
    with pytest.raises(InputError, match=message):
        AutoregressiveWrapper(random_net()).generate(start, 3, temperature=temperature)


def test_labels_zero_are_ignored_as_in_the_package_unless_told_otherwise() -> None:
    net = random_net()
    tokens = torch.randint(7, (1, 12))
    labels = torch.zeros(1, 12, dtype=torch.long)
    labels[0, 7] = 3
    logits = net(tokens)[0]
    only = -logits.log_softmax(-1)[2, 3]
    assert_close(net(tokens, labels=labels), only, 1e-6)
    every = -logits.log_softmax(-1)[torch.arange(7), labels[0, 5:]].mean()
    assert_close(net(tokens, labels=labels, ignore_index=-100), every, 1e-6)

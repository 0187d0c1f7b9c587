"""Our network computes what google-research/perceiver-ar computes: its recorded results, see recorded.py.

Outputs of latents that stand before the start of a short row mean nothing there either: they are left out.
"""

import pytest
import torch
from recorded import FLOAT32, FLOAT64, Golden, assert_close, cases
from torch import Tensor

from perceiver_ar.compat.google import from_trailing_zeros, names, network
from perceiver_ar.compat.weights import to_theirs
from perceiver_ar.errors import InputError
from perceiver_ar.generation import stream
from perceiver_ar.network.model import PerceiverAR
from perceiver_ar.objective import next_token_loss


class Package(Golden):
    def parameters(self) -> dict[str, Tensor]:
        """Linear layers as torch has them."""
        return {name: x.T if name.endswith("/w") else x for name, x in super().parameters().items()}

    def model(self, case: str, dtype: torch.dtype = torch.float32) -> PerceiverAR:
        settings = self.arguments | self.note(case).get("override", {})
        return network(self.parameters(), settings, "recorded").to(dtype)

    def logits(self, case: str, model: PerceiverAR) -> Tensor:
        data = self.case(case)
        tokens, input_idxs = data["in/tokens"].long(), data.get("in/input_idxs")
        z = self.note(case).get("call", {}).get("z_index_dim", self.arguments["z_index_dim"])
        if z == 1:  # they mask nothing then, and the latent is the last token, real or not
            assert input_idxs is not None
            return model(tokens, tokens.shape[1] - 1, positions=input_idxs[..., 0])
        tokens, mask, positions = from_trailing_zeros(tokens, None if input_idxs is None else input_idxs.long())
        N = z // model.config.latents_per_position
        return model(tokens, tokens.shape[1] - N, mask=mask, positions=positions)


ABSOLUTE = ("abs_learned", "abs_multidim", "abs_sinusoidal", "lpp2")
OTHERS = ("embed_ne_z", "extra_cross", "no_initial_cross", "q_learned", "q_learned_shared", "q_mlp", "rotary")
FILES = {name: Package.load(f"google/{name}") for name in (*ABSOLUTE, *OTHERS)}
LOSSES = cases(FILES, "total_loss")
FORWARD = [case for case in cases(FILES, "logits") if case not in LOSSES]
UNCACHED = [case for case in cases(FILES, "step_logits") if "uncached" in case[1]]


def test_every_recorded_case_is_compared_but_those_with_their_cache() -> None:
    recorded = {(name, case) for name, golden in FILES.items() for case in golden.cases()}
    cached = {(name, case) for name, case in recorded if case.startswith("sample_cached")}
    assert recorded == {*FORWARD, *LOSSES, *UNCACHED} | cached
    assert (len(FORWARD), len(LOSSES), len(UNCACHED), len(cached)) == (42, 3, 2, 3)


@pytest.mark.parametrize(("name", "case"), FORWARD)
def test_logits_equal_theirs(name: str, case: str) -> None:
    golden, data = FILES[name], FILES[name].case(case)
    valid = data["out/latent_last_steps"] >= 0
    assert_close(golden.logits(case, golden.model(case))[valid], data["out/logits"][valid], FLOAT32)
    exact = golden.logits(case, golden.model(case, torch.float64))
    assert_close(exact[valid], data["out/logits_f64"][valid], FLOAT64)


@pytest.mark.parametrize("name", ["activation_name", "initial_query_embed_activation_name"])
def test_other_activations_are_refused_by_name_where_they_are_used(name: str) -> None:
    with pytest.raises(InputError, match=f"{name} is 'elu': only sq_relu, gelu, relu are computed here"):
        network(FILES["q_mlp"].parameters(), {**FILES["q_mlp"].arguments, name: "elu"}, "recorded")
    unused = {**FILES["rotary"].arguments, "initial_query_embed_activation_name": "elu"}
    assert network(FILES["rotary"].parameters(), unused, "recorded").config.query_mlp_layers == 0


@pytest.mark.parametrize(("name", "case"), cases(FILES, "hidden/self_attention_x"))
def test_the_residual_stream_equals_theirs_after_each_block(name: str, case: str) -> None:
    golden, data = FILES[name], FILES[name].case(case)
    model, seen = golden.model(case), dict[str, Tensor]()
    for kind in ("cross_attention", "self_attention"):
        for i, layer in enumerate(model.get_submodule(kind).children()):
            key = f"out/hidden/{kind}_{i}_x".replace("_0_x", "_x")
            layer.register_forward_hook(lambda _m, _i, out, key=key: seen.update({key: out}))
    golden.logits(case, model)
    assert seen.keys() == {key for key in data if key.startswith("out/hidden/")}
    K = model.config.latents_per_position
    valid = (data["out/latent_last_steps"] >= 0).repeat_interleave(K, 1)
    for key, x in seen.items():
        x = x.unflatten(0, (-1, K)).transpose(1, 2).flatten(1, 2)  # theirs stand side by side among the latents
        assert_close(x[valid], data[key][valid], FLOAT32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("name", "case"), LOSSES)
def test_losses_and_gradients_equal_theirs(name: str, case: str, dtype: torch.dtype) -> None:
    golden, data, note = FILES[name], FILES[name].case(case), FILES[name].note(case)
    events, model = data["in/events"].long(), golden.model(case, dtype)
    # Every row's last token is a target only, and all rows end together.
    tokens, mask, positions = from_trailing_zeros(events, data["in/event_idxs"].long())
    assert positions is not None
    logits = model(tokens[:, :-1], mask=mask[:, :-1], positions=positions[:, :-1])
    labels = tokens[:, -logits.shape[1] :].masked_fill(~mask[:, -1 - logits.shape[1] : -1], 0)
    weights = {"z_loss": note["z_loss"], "label_smoothing": note["label_smoothing"]}
    single = next_token_loss(logits, labels, ignore_index=0, reduction="none", **weights)
    loss = next_token_loss(logits, labels, ignore_index=0, reduction="sum", **weights)
    loss.backward()
    gradients = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
    theirs = to_theirs(names(model), gradients)
    norms = torch.stack([theirs[key].norm() for key in golden.notes["grad_norm_order"]])
    suffix, tolerance = ("", FLOAT32) if dtype == torch.float32 else ("_f64", FLOAT64)
    if note["label_smoothing"] > 0:  # their soft targets are of float32 in either case
        tolerance = FLOAT32
    counted = data["out/loss_mask"].bool()
    assert torch.equal(labels != 0, counted)
    assert_close(single[counted], data[f"out/per_position_loss_unmasked{suffix}"][counted], tolerance)
    assert_close(loss, data[f"out/total_loss{suffix}"], tolerance)
    assert_close(norms, data[f"out/grad_norm{suffix}"], tolerance)


@pytest.mark.parametrize(("name", "case"), UNCACHED)
def test_sampling_without_a_cache_is_a_forward_over_what_is_there(name: str, case: str) -> None:
    golden, data = FILES[name], FILES[name].case(case)
    model, events, logits = golden.model(case), data["out/events"].long(), []
    for at, fed in data["out/steps"][:, :2].tolist():
        fed = min(fed, model.config.context_length)  # the last place of their buffer is always padding
        there = events[:, :fed].clone()
        there[:, at:] = 0
        tokens, mask, positions = from_trailing_zeros(there, data["in/event_idxs"][:, :fed].long())
        P = tokens.shape[1] - golden.arguments["z_index_dim"]
        logits.append(model(tokens, P, mask=mask, positions=positions)[:, -1])
    assert_close(torch.stack(logits, dim=1), data["out/step_logits"], FLOAT32)


@pytest.mark.parametrize(("name", "case"), cases(FILES, "step_logits"))
def test_generation_with_the_authors_schedule_draws_their_tokens(name: str, case: str) -> None:
    golden, data, note = FILES[name], FILES[name].case(case), FILES[name].note(case)
    model = golden.model(case).eval()
    cached = note["use_memory"]
    M = note["z_index_dim_memory"] if cached else golden.arguments["z_index_dim"]
    model.config = model.config.replace(num_latents=M)
    schedule = {"refill_latents": M // 2, "prompt_latents": 1} if cached else {"refill_latents": M, "prompt_latents": M}
    steps = list(stream(model, data["in/prompt"], max_new_tokens=24, temperature=0.0, **schedule))
    n = data["in/prompt"].shape[1]
    assert torch.equal(torch.stack([step.tokens for step in steps], dim=1), data["out/events"][:, n : n + 24].long())
    assert_close(torch.stack([step.logits for step in steps], dim=1), data["out/step_logits"], FLOAT32)

"""Our network computes what perceiver-io's causal sequence model computes: its recorded results, see recorded.py."""

from pathlib import Path

import pytest
import torch
from recorded import FLOAT32, FLOAT64, Golden, assert_close, cases
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.utils.parametrizations import weight_norm

from perceiver_ar.compat.krasserm import load_krasserm, names, network, save_krasserm, to_config
from perceiver_ar.compat.weights import to_theirs
from perceiver_ar.config import PerceiverARConfig
from perceiver_ar.data.text import BytesCodec, OffsetBytesCodec
from perceiver_ar.errors import InputError
from perceiver_ar.network.model import PerceiverAR
from perceiver_ar.objective import IGNORE, next_token_loss


class Package(Golden):
    def model(self, dtype: torch.dtype = torch.float32) -> PerceiverAR:
        return network(self.parameters(), self.arguments, "recorded").to(dtype)

    def prefix_len(self, case: str) -> int:
        return self.note(case).get("prefix_len", self.arguments["max_seq_len"] - self.arguments["max_latents"])

    def keywords(self, case: str) -> dict[str, Tensor]:
        """What beside tokens and prefix_len belongs to the call."""
        data = self.case(case)
        keywords = {}
        if "in/pad_mask" in data:
            keywords["mask"] = ~data["in/pad_mask"]
        if "in/keep_mask" in data:
            keywords["prefix_keep"] = torch.stack([row.nonzero().squeeze(-1) for row in data["in/keep_mask"]])
        return keywords


FILES = {name: Package.load(f"krasserm/{name}") for name in ("abs", "rel", "abs_allrot", "abs_oddrot", "rel_onerot")}
LEAKY = {("abs", "pad_into_latents"), ("abs", "loss_left_pad")}  # padding reaches the latents
FORWARD = [case for case in cases(FILES, "logits") if case not in LEAKY]
LOSSES = [case for case in cases(FILES, "loss") if case not in LEAKY]
GENERATION = [case for case in cases(FILES, "step_logits") if "teacher" not in case[1]]


def test_every_recorded_case_is_compared() -> None:
    recorded = {(name, case) for name, golden in FILES.items() for case in golden.cases()}
    assert recorded == {*FORWARD, *LOSSES, *LEAKY, *cases(FILES, "step_logits")}
    assert (len(FORWARD), len(LOSSES), len(LEAKY), len(cases(FILES, "step_logits"))) == (20, 1, 2, 12)


@pytest.mark.parametrize(("name", "case"), FORWARD)
def test_logits_equal_the_packages(name: str, case: str) -> None:
    golden, data = FILES[name], FILES[name].case(case)
    logits = golden.model()(data["in/tokens"], golden.prefix_len(case), **golden.keywords(case))
    assert_close(logits, data["out/logits"], FLOAT32)  # with a cache, where the case is of one
    if "out/logits_full" in data:
        assert_close(logits, data["out/logits_full"], FLOAT32)
    if "out/logits_f64" in data:
        exact = golden.model(torch.float64)(data["in/tokens"], golden.prefix_len(case), **golden.keywords(case))
        assert_close(exact, data["out/logits_f64"], FLOAT64)


def test_heads_with_an_odd_number_of_frequencies_go_out_as_they_came(tmp_path: Path) -> None:
    golden = FILES["abs_oddrot"]
    model = golden.model()
    save_krasserm(model, tmp_path)
    saved, recorded = load_file(tmp_path / "model.safetensors"), golden.parameters()
    assert saved.keys() == {f"backend_model.{name}" for name in recorded}
    assert all(torch.equal(saved[f"backend_model.{name}"], tensor) for name, tensor in recorded.items())
    assert load_krasserm(tmp_path).config == model.config


def test_odd_heads_that_the_package_fails_on_are_refused_by_name() -> None:
    settings = {**FILES["abs_oddrot"].arguments, "num_channels": 10, "abs_pos_emb": False}
    with pytest.raises(InputError, match="heads of 5 channels without abs_pos_emb: perceiver-io fails on an odd"):
        to_config(settings)


def test_a_model_that_turns_fewer_channels_than_the_package_is_not_exported(tmp_path: Path) -> None:
    config = PerceiverARConfig.preset("krasserm", vocab_size=9, context_length=8, num_latents=4, dim=20, num_heads=2)
    with pytest.raises(InputError, match=r"cannot compute .*: rotary_fraction is 0\.4, not 0\.6, rotary_base is 10000"):
        save_krasserm(PerceiverAR(config), tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_model_with_something_inside_is_not_exported(tmp_path: Path) -> None:
    model = FILES["rel_onerot"].model()
    weight_norm(model.get_submodule("self_attention.0.out_proj"))
    with pytest.raises(InputError, match=r"the model holds adapters, .*out_proj\.parametrizations.*: merge them into"):
        save_krasserm(model, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_head_of_its_own_is_neither_written_nor_read(tmp_path: Path) -> None:
    model = FILES["rel_onerot"].model()
    save_krasserm(model, tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    head = saved["backend_model.input_adapter.txt_embedding.weight"] + 0.1
    save_file(saved | {"backend_model.output_adapter.weight": head}, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=r"output_adapter\.weight is not the embedding"):
        load_krasserm(tmp_path)
    model.head.weight = torch.nn.Parameter(head)
    for save in (save_krasserm, PerceiverAR.save_pretrained):
        with pytest.raises(InputError, match="the head has weights of its own, which tie_embeddings would drop"):
            save(model, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_the_tokenizer_of_bytes_is_stated_only_if_it_is_the_runs(tmp_path: Path) -> None:
    model = PerceiverAR(to_config({**FILES["rel_onerot"].arguments, "vocab_size": 262}))
    for codec, stated in ((None, True), (OffsetBytesCodec(reserved=6), True), (BytesCodec(), False)):
        assert ("tokenizer_class" in save_krasserm(model, tmp_path, codec)) == stated


def test_padding_that_reaches_the_latents_changes_nothing_where_the_package_leaks() -> None:
    golden, data = FILES["abs"], FILES["abs"].case("pad_into_latents")
    tokens, mask = data["in/tokens"], ~data["in/pad_mask"]
    model, P = golden.model(torch.float64), golden.prefix_len("pad_into_latents")
    logits = model(tokens, P, mask=mask)
    assert_close(logits[0], data["out/logits_f64"][0], FLOAT64)  # the row without padding
    real = int(mask[1].sum())
    alone = model(tokens[1:, -real:], 0)
    assert_close(logits[1:, -real:], alone, FLOAT64)
    theirs = data["out/logits_f64"][1, -real:]
    assert (theirs - alone[0]).abs().max() > 0.1 * theirs.abs().max()


def test_a_loss_over_padded_rows_is_that_of_the_rows_alone_where_the_package_leaks() -> None:
    golden, data = FILES["abs"], FILES["abs"].case("loss_left_pad")
    mask, N = ~data["in/pad_mask"], golden.arguments["max_latents"]
    model, labels = golden.model(torch.float64), data["in/labels"].masked_fill(~mask, IGNORE)[:, -N:]
    loss = next_token_loss(model(data["in/tokens"], mask=mask), labels)
    alone = [model(tokens[real][None])[0] for tokens, real in zip(data["in/tokens"], mask, strict=True)]
    targets = torch.cat([row[row != IGNORE] for row in labels])
    assert_close(loss, torch.nn.functional.cross_entropy(torch.cat(alone), targets), FLOAT64)
    assert abs(loss.item() - data["out/loss_f64"].item()) > 0.1


@pytest.mark.parametrize(("name", "case"), cases(FILES, "hidden/cross_layer_x"))
def test_the_residual_stream_equals_the_packages_after_each_block(name: str, case: str) -> None:
    golden, data = FILES[name], FILES[name].case(case)
    model, seen = golden.model(), dict[str, Tensor]()
    places = {"cross_layer": "cross_attention.0"}
    places |= {f"self_layer{i}": f"self_attention.{i}" for i in range(model.config.num_layers)}
    for key, place in places.items():
        model.get_submodule(place).register_forward_hook(lambda _m, _i, out, key=key: seen.update({key: out}))
    model(data["in/tokens"], golden.prefix_len(case), **golden.keywords(case))
    for key, x in seen.items():
        assert_close(x, data[f"out/hidden/{key}_x"], FLOAT32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("name", "case"), LOSSES)
def test_losses_and_gradients_equal_the_packages(name: str, case: str, dtype: torch.dtype) -> None:
    golden, data = FILES[name], FILES[name].case(case)
    model = golden.model(dtype)
    loss = next_token_loss(model(data["in/tokens"]), data["in/labels"][:, -golden.arguments["max_latents"] :])
    loss.backward()
    gradients = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
    theirs = to_theirs(names(model), gradients)
    norms = torch.stack([theirs[key].norm() for key in golden.notes["grad_norm_order"]])
    suffix, tolerance = ("", FLOAT32) if dtype == torch.float32 else ("_f64", FLOAT64)
    assert_close(loss, data[f"out/loss{suffix}"], tolerance)
    assert_close(norms, data[f"out/grad_norm{suffix}"], tolerance)


def recompute(golden: Package, data: dict[str, Tensor], lengths: list[int], prefixes: list[int]) -> Tensor:
    """The last logits of our forward over the last x_len tokens of each step, with its prefix_len."""
    tokens, mask = data["in/tokens"], data["in/attention_mask"].bool()
    if "out/tokens" in data:
        tokens = torch.cat([tokens, data["out/tokens"]], dim=1)
        mask = torch.cat([mask, torch.ones_like(data["out/tokens"], dtype=torch.bool)], dim=1)
    model, steps = golden.model(), len(prefixes)
    first = tokens.shape[1] - steps
    logits = []
    for step, (length, prefix) in enumerate(zip(lengths, prefixes, strict=True)):
        window = slice(first + step - length, first + step)
        logits.append(model(tokens[:, window], prefix, mask=mask[:, window])[:, -1])
    return torch.stack(logits, dim=1)


@pytest.mark.parametrize(("name", "case"), GENERATION)
def test_generation_without_eviction_is_a_forward_over_its_windows(name: str, case: str) -> None:
    golden, data = FILES[name], FILES[name].case(case)
    calls = data["out/calls"]  # x_len, prefix_len, ...
    if case.endswith("uncached"):
        lengths, prefixes = calls[:, 0].tolist(), calls[:, 1].tolist()
    else:  # beyond max_latents its cache forgets latents, which is no forward any more
        note, T = golden.note(case), data["in/tokens"].shape[1]
        steps = golden.arguments["max_latents"] - note["num_latents"] + 1
        lengths = [T + step for step in range(steps)]
        prefixes = [note["prefix_len0"]] * steps
    rest = data["out/tokens"][:, : len(prefixes)]
    logits = recompute(golden, data | {"out/tokens": rest}, lengths, prefixes)
    assert torch.equal(logits.argmax(-1), rest)
    assert_close(logits, data["out/step_logits"][:, : len(prefixes)], FLOAT32)


@pytest.mark.parametrize(("name", "case"), [case for case in cases(FILES, "step_logits") if "teacher" in case[1]])
def test_full_recomputation_equals_the_packages(name: str, case: str) -> None:
    golden, data = FILES[name], FILES[name].case(case)
    prefixes = data["out/prefix_len"].tolist()
    first = data["in/tokens"].shape[1] - len(prefixes)
    lengths = [min(first + step, golden.arguments["max_seq_len"]) for step in range(len(prefixes))]
    assert_close(recompute(golden, data, lengths, prefixes), data["out/step_logits"], FLOAT32)

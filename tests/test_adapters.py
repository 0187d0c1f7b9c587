"""A run that trains a LoRA adapter is a run like others, and its adapter alone is what the PEFT library loads."""

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from helpers import MODEL, TRAINER, assert_refused, assert_same_parameters, parameters
from reference import assert_close
from safetensors.torch import load_file, save_file
from torch import Tensor

from perceiver_ar import InputError, OptimConfig, PerceiverAR, Recipe, Run, generate, train
from perceiver_ar.adapters import TARGETS, merged, with_adapter
from perceiver_ar.cli import main
from perceiver_ar.config import DataConfig
from perceiver_ar.huggingface import PerceiverARForCausalLM
from perceiver_ar.training.checkpoints import Checkpoints

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

TOKENS = torch.randint(256, (2, 40), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def base(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("base") / "run"
    train(Recipe((str(corpus),), str(run), max_steps=40, model=MODEL, trainer=TRAINER))
    return run


@pytest.fixture(scope="module")
def recipe(base: Path, letters: Path, tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """Of a finished run."""
    made = Recipe(
        (str(letters),),
        str(tmp_path_factory.mktemp("adapted") / "run"),
        init_from=str(base),
        adapter="lora",
        adapter_rank=4,
        max_steps=40,
        data=DataConfig(validation=(str(letters / "0.txt"),)),
        trainer=TRAINER,
    )
    train(made)
    return made


def sum_of(base: Path, run: Path) -> dict[str, Tensor]:
    """The weights of `base` plus the products of the matrices in the adapter of `run`."""
    weights, adapter = parameters(base), load_file(run / "adapter" / "adapter_model.safetensors")
    for name in [name for name in adapter if ".lora_A." in name]:
        target = name.removeprefix("base_model.model.network.").replace(".lora_A.", ".")
        weights[target] = weights[target] + adapter[name.replace("lora_A", "lora_B")] @ adapter[name]
    return weights


def bits(run: Path | str, capsys: pytest.CaptureFixture[str], letters: Path) -> float:
    capsys.readouterr()
    assert main(["evaluate", str(run), str(letters / "0.txt"), "--json"]) == 0
    return json.loads(capsys.readouterr().out)["bits_per_byte"]


# The run.


def test_it_learns_and_only_the_projections_change_by_the_product(recipe: Recipe, base: Path) -> None:
    run = Run(recipe.out)
    assert_same_parameters(run.initial, base)  # bit by bit
    weights, before, expected = parameters(run.path), parameters(base), sum_of(base, run.path)
    changed = {name for name in weights if not weights[name].equal(before[name])}
    assert changed == {name for name in before if name.split(".")[-2:-1] and name.split(".")[-2] in TARGETS}
    assert all(weights[name].equal(expected[name]) for name in weights)
    assert run.model().config == Run(base).model().config


def test_every_command_takes_the_run_and_it_is_better_than_the_base(
    recipe: Recipe, base: Path, letters: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bits(recipe.out, capsys, letters) < bits(base, capsys, letters) - 0.5
    assert main(["generate", recipe.out, "--max_new_tokens=9", "--seed=1"]) == 0
    assert main(["info", recipe.out]) == 0
    assert "lora of rank 4" in capsys.readouterr().out


def test_checkpoints_hold_the_adapter_alone(recipe: Recipe) -> None:
    newest = Checkpoints(Run(recipe.out).checkpoints).all()[-1]
    state = torch.load(newest.path, weights_only=True)
    assert state["state_dict"] and all(".lora_" in name for name in state["state_dict"])
    rank = {min(tensor.shape) for tensor in state["state_dict"].values()}
    assert rank == {4} and len(state["optimizer_states"][0]["state"]) == len(state["state_dict"])


def test_a_resumed_run_equals_an_undisturbed_one(recipe: Recipe, base: Path, tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    shutil.copytree(recipe.out, run.path)
    Checkpoints(run.checkpoints).all()[-1].remove()  # as if a kill had come before it was written
    run.summary_file.unlink()
    shutil.rmtree(run.adapter)
    shutil.rmtree(run.initial)  # init_from still has the weights
    resumed = replace(recipe, out=str(run.path))
    assert train(resumed, resume=True)["steps"] == 40
    assert_same_parameters(run.path, recipe.out)
    ours, theirs = (load_file(Run(out).adapter / "adapter_model.safetensors") for out in (run.path, recipe.out))
    assert ours.keys() == theirs.keys() and all(ours[name].equal(theirs[name]) for name in ours)
    Checkpoints(run.checkpoints).all()[-1].remove()
    run.summary_file.unlink()
    shutil.copy(run.weights_file, run.initial)
    with pytest.raises(InputError, match=f"the weights in {run.initial} are not those that the adapter was trained on"):
        train(resumed, resume=True)


def test_the_mean_and_the_best_weights_have_their_adapter_beside_them(
    recipe: Recipe, base: Path, corpus: Path, tmp_path: Path
) -> None:
    held_out = DataConfig(validation=(str(corpus / "0.txt"),))  # what the base knows, and the adapter forgets
    settings: Any = {
        "optim": OptimConfig(lr=0.02, schedule="constant", warmup=0.0, ema=0.3),
        "trainer": replace(TRAINER, evaluations=2, final_weights="best"),
        "data": held_out,
    }
    best = replace(recipe, out=str(tmp_path / "run"), max_steps=8, **settings)
    assert train(best)["weights_of_step"] == 4
    weights, expected = parameters(best.out), sum_of(base, Path(best.out))
    assert all(weights[name].equal(expected[name]) for name in weights)


@pytest.mark.parametrize("chunk", [0, 8])
def test_an_adapted_network_computes_what_the_merged_one_does(base: Path, recipe: Recipe, chunk: int) -> None:
    model = with_adapter(Run(base).model().double(), recipe).double()
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    plain = merged(model, {})
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        name for name, _ in model.named_parameters() if ".lora_" in name
    }
    model.config = model.config.replace(prefix_chunk=chunk)
    tokens = TOKENS[:, :32]
    assert_close(model(tokens), plain(tokens), 1e-12)
    assert not torch.allclose(plain(tokens), Run(base).model().double()(tokens))
    drawn = [generate(each, TOKENS, 30, temperature=1.0, seed=3) for each in (model, plain)]
    assert all(ours.equal(theirs) for ours, theirs in zip(*drawn, strict=True))
    gradients = []
    for length in (0, chunk):
        model.config = model.config.replace(prefix_chunk=length)
        model.zero_grad()
        model(tokens).square().sum().backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    assert all(grad.abs().max() > 0 for grad in gradients[0])
    for dense, streamed in zip(*gradients, strict=True):
        assert_close(streamed, dense, 1e-9)


# The adapter alone.


def test_peft_loads_the_adapter_and_gives_the_logits_of_the_run(recipe: Recipe, base: Path) -> None:
    adapter = Run(recipe.out).adapter
    assert {path.name for path in adapter.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    expected = PerceiverARForCausalLM.from_pretrained(recipe.out)(TOKENS).logits
    model = peft.PeftModel.from_pretrained(PerceiverARForCausalLM.from_pretrained(base), adapter)
    assert_close(model(input_ids=TOKENS).logits, expected, 1e-5)
    found: Any = peft.AutoPeftModelForCausalLM.from_pretrained(adapter)  # finds the base, too
    assert_close(found(input_ids=TOKENS).logits, expected, 1e-5)


@pytest.mark.parametrize("form", ["run", "export"])
def test_an_adapter_is_merged_by_one_command(
    form: str, recipe: Recipe, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = base
    if form == "export":
        place = tmp_path / "exported"
        assert main(["export", "huggingface", str(base), "--out", str(place)]) == 0
    out = tmp_path / "merged"
    assert main(["convert", "peft", f"{recipe.out}/adapter", "--base", str(place), "--out", str(out)]) == 0
    assert_same_parameters(out, recipe.out)
    assert Run(out).codec().name == Run(base).codec().name


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": "all-linear", "use_dora": True},
        {"target_modules": "all-linear", "modules_to_save": ["embed"]},
    ],
    ids=["dora", "saved modules"],
)
def test_adapters_that_peft_made_are_merged_too(settings: dict[str, Any], base: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, init_lora_weights=False, **settings)
    model: Any = peft.get_peft_model(PerceiverARForCausalLM.from_pretrained(base), config).eval()
    model.save_pretrained(tmp_path / "adapter")
    out = tmp_path / "merged"
    assert main(["convert", "peft", str(tmp_path / "adapter"), "--base", str(base), "--out", str(out)]) == 0
    merged_logits = PerceiverARForCausalLM.from_pretrained(out)(TOKENS).logits
    assert_close(merged_logits, model(input_ids=TOKENS).logits, 1e-4)


@pytest.mark.parametrize("name", ["embed", "head"])
def test_an_adapter_of_one_of_two_tied_weights_is_not_merged(
    name: str, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tied, adapter = other_base(base, tmp_path / "tied", tie_embeddings=True), tmp_path / "adapter"
    config = peft.LoraConfig(r=2, init_lora_weights=False, target_modules=[name])
    peft.get_peft_model(PerceiverARForCausalLM.from_pretrained(tied), config).save_pretrained(str(adapter))
    says = f"{adapter} changes the embedding and the head of {tied} differently"
    assert_refused(capsys, "convert", "peft", adapter, "--base", tied, "--out", tmp_path / "merged", says=says)


# What is refused.


def other_base(base: Path, place: Path, **settings: Any) -> Path:
    """A run with other weights, or another network."""
    shutil.copytree(base, place, ignore=shutil.ignore_patterns("checkpoints", "tokens"))
    PerceiverAR(Run(base).model().config.replace(**settings)).save_pretrained(place)
    return place


def test_an_adapter_that_does_not_fit_is_refused(
    recipe: Recipe, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = tmp_path / "adapter"
    shutil.copytree(Run(recipe.out).adapter, adapter)
    weights, settings = adapter / "adapter_model.safetensors", adapter / "adapter_config.json"
    tensors, text = load_file(weights), settings.read_text()
    name = "base_model.model.network.cross_attention.0.q_proj.lora_A.weight"
    wider = other_base(base, tmp_path / "wider", dim=32)
    same = other_base(base, tmp_path / "same")

    def refused(place: Path, says: str) -> None:
        assert_refused(capsys, "convert", "peft", adapter, "--base", place, "--out", tmp_path / "merged", says=says)
        assert not (tmp_path / "merged").exists()

    refused(wider, "lora_A.weight has shape (4, 16), not (4, 32)")
    refused(same, f"{adapter} was trained on other weights than those of {same}")
    refused(tmp_path / "missing", "no such run")
    save_file({**tensors, "base_model.model.network.embed.weight": torch.zeros(2, 2)}, weights)
    refused(base, "network.embed.weight is unknown")
    save_file({each: tensor for each, tensor in tensors.items() if each != name}, weights)
    refused(base, f"{adapter} does not fit {base}: {name} is missing")
    weights.write_bytes(b"damaged")
    refused(base, f"{adapter} cannot be merged into {base}")
    save_file(tensors, weights)
    settings.write_text(json.dumps({**json.loads(text), "target_modules": ["c_attn"]}))
    refused(base, "c_attn")
    settings.write_text(json.dumps({"peft_type": "PROMPT_TUNING", "task_type": "CAUSAL_LM", "num_virtual_tokens": 4}))
    refused(base, "holds a prompt")
    settings.write_text("{")
    refused(base, f"{adapter} cannot be merged into {base}")
    settings.unlink()
    refused(base, "adapter_config.json: no such file, so this is not a PEFT adapter")


def test_convert_needs_a_base_for_peft_alone(
    recipe: Recipe, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "merged"
    assert_refused(capsys, "convert", "peft", f"{recipe.out}/adapter", "--out", out, says="--base is missing")
    assert_refused(
        capsys, "convert", "krasserm", base, "--base", base, "--out", out, says="--base is no option of krasserm"
    )


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--adapter=lora"], "adapter is 'lora', but init_from is missing"),
        (["--init_from={base}", "--adapter_rank=8"], "adapter_rank is 8, but adapter is missing"),
        (["--init_from={base}", "--adapter=lora", "--adapter_rank=0"], "adapter_rank is 0: it must be at least 1"),
        (["--init_from={base}", "--adapter=lora", "--optim.muon_lr=0.1"], "optim.muon_lr is 0.1, but"),
        (
            ["--init_from={base}", "--adapter=lora", "--trainer.strategy=fsdp", "--trainer.devices=2"],
            "trainer.strategy is 'fsdp', which cannot train an adapter",
        ),
    ],
)
def test_settings_that_do_not_go_together_are_refused(
    options: list[str], says: str, base: Path, letters: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [word.format(base=base) for word in options]
    assert_refused(capsys, "train", letters, "--out", tmp_path / "run", *words, says=says)
    assert not (tmp_path / "run").exists()


def test_resuming_keeps_the_adapter(recipe: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    assert_refused(
        capsys, "train", "--out", recipe.out, "--resume", "--adapter_rank=8", "--max_steps=50",
        says="adapter_rank changed from 4 to 8",
    )  # fmt: skip


def test_a_missing_package_is_named(
    recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(InputError, match=r"peft.*pip install 'perceiver-ar\[adapters\]'"):
        train(replace(recipe, out=str(tmp_path / "run")))
    assert not (tmp_path / "run").exists()

"""Fine-tuning with the tools of others: TRL, PEFT and accelerate find in the adapter what they look for."""

from pathlib import Path
from typing import Any

import pytest
import torch
from reference import assert_close
from test_huggingface import SAVED, SMALL, ids, run  # noqa: F401  (a fixture)
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForLanguageModeling
from transformers.integrations.neftune import neftune_post_forward_hook

from perceiver_ar.errors import InputError
from perceiver_ar.network.model import PerceiverAR

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]  # of these packages among themselves

SETTINGS: dict[str, Any] = {
    "per_device_train_batch_size": 2, "max_steps": 2, "report_to": [], "use_cpu": True, "disable_tqdm": True,
    "save_strategy": "no", "logging_steps": 1, "bf16": False, "max_length": 24, "learning_rate": 1e-2,
}  # fmt: skip


def model_of(path: Path, **settings: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, **settings)


# TRL


@pytest.mark.parametrize("packing", [False, True])
def test_sft_trains_the_end_of_a_text(packing: bool, run: Path, tmp_path: Path) -> None:  # noqa: F811
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    texts = datasets.Dataset.from_list([{"text": text} for text in ("The cat", "sat on", "a mat", "and ran")])
    tokenizer = AutoTokenizer.from_pretrained(run)
    arguments = trl.SFTConfig(str(tmp_path), packing=packing, gradient_checkpointing=True, **SETTINGS)
    model = model_of(run)
    trainer = trl.SFTTrainer(model, arguments, train_dataset=texts, processing_class=tokenizer)
    batch = next(iter(trainer.get_train_dataloader()))
    targets = batch["labels"][batch["labels"] != -100]
    assert (targets == tokenizer.eos_token_id).any()  # the end, not its name
    assert len(targets) < 40
    trainer.train()
    assert trainer.state.log_history[0]["loss"] < 10
    assert not torch.equal(model.network.embed.weight, SAVED.embed.weight)


def test_dpo_trains(run: Path, tmp_path: Path) -> None:  # noqa: F811
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    rows = [{"prompt": "The cat", "chosen": " sat", "rejected": f" {word}"} for word in ("ran", "is", "at", "on")]
    arguments = trl.DPOConfig(str(tmp_path), **SETTINGS)
    model = model_of(run)
    tokenizer = AutoTokenizer.from_pretrained(run)
    trainer = trl.DPOTrainer(
        model, args=arguments, train_dataset=datasets.Dataset.from_list(rows), processing_class=tokenizer
    )
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(0.6931, abs=1e-3)  # both models are one so far
    assert not torch.equal(model.network.embed.weight, SAVED.embed.weight)


def test_the_base_model_gives_what_the_head_makes_logits_of(run: Path) -> None:  # noqa: F811
    model, tokens = model_of(run), ids(2, 30)
    mask = torch.ones_like(tokens)
    mask[0, :7] = 0
    hidden = model.base_model(input_ids=tokens, attention_mask=mask, use_cache=False).last_hidden_state
    assert torch.equal(model.network.head(hidden), model(tokens, attention_mask=mask).logits)
    assert model.base_model is model.network and isinstance(model.network, PerceiverAR)


def test_packed_documents_do_not_see_each_other(run: Path) -> None:  # noqa: F811
    model, tokens, lengths = model_of(run), ids(1, 46), (30, 1, 15)
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    packed = model(tokens, position_ids=positions, cu_seq_lens_q=torch.tensor([0, 30, 31, 46]), labels=tokens)
    last = model(tokens, position_ids=positions, logits_to_keep=20).logits
    assert_close(last, packed.logits[:, -20:], 1e-5)
    alone = [model(part, labels=part if part.shape[1] > 1 else None) for part in tokens.split(lengths, dim=1)]
    assert_close(packed.logits, torch.cat([output.logits for output in alone], dim=1), 1e-5)
    assert_close(packed.loss, (alone[0].loss * 29 + alone[2].loss * 14) / 43, 1e-5)
    with pytest.raises(InputError, match="has 5 at row 0, column 0: they must count the tokens of each document"):
        model(tokens, position_ids=positions + 5)


def test_packed_documents_cost_what_they_hold(run: Path) -> None:  # noqa: F811
    """One long document beside many short ones: as many positions are computed as there are tokens, about."""
    model, lengths = model_of(run), [60, *[3] * 40]
    positions, computed = torch.cat([torch.arange(n) for n in lengths])[None], []
    model.network.norm.register_forward_hook(lambda module, inputs, output: computed.append(output[..., 0].numel()))
    model(ids(1, 180), position_ids=positions)
    assert sum(computed) < 2 * 180


def test_recomputed_layers_have_the_same_gradients(run: Path) -> None:  # noqa: F811
    tokens, gradients = ids(2, 24), []
    for checkpointing in (False, True):
        model = model_of(run).train()
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": True})
            assert model.is_gradient_checkpointing and model.network.activation_checkpointing
        model(tokens, labels=tokens).loss.backward()
        gradients.append(model.network.embed.weight.grad)
    assert_close(gradients[1], gradients[0], 1e-6)
    model.activation_checkpointing_disable()
    assert not model.network.activation_checkpointing


def test_the_usual_collator_keeps_the_ends_as_targets(run: Path) -> None:  # noqa: F811
    tokenizer = AutoTokenizer.from_pretrained(run)
    assert tokenizer.pad_token_id not in (None, tokenizer.eos_token_id)
    rows = [tokenizer(text + tokenizer.eos_token) for text in ("The cat", "ÿ")]
    batch = DataCollatorForLanguageModeling(tokenizer, mlm=False)(rows)
    assert batch["labels"].tolist()[1] == [-100] * 5 + [0, 0xC3, 0xBF, 0]


def test_a_vocabulary_grows(run: Path, tmp_path: Path) -> None:  # noqa: F811
    model, tokens = model_of(run), ids(2, 20)
    expected = model(tokens).logits
    assert model.resize_token_embeddings(259).weight.shape[0] == model.config.vocab_size == 259
    assert_close(model(tokens).logits[..., :256], expected, 1e-6)
    model(torch.full((1, 4), 258))
    model.save_pretrained(tmp_path)
    assert PerceiverAR.from_pretrained(tmp_path).config == SMALL.replace(vocab_size=259)


@pytest.mark.parametrize("tie", [False, True])
def test_shards_are_read(tie: bool, tmp_path: Path) -> None:
    network = PerceiverAR(SMALL.replace(tie_embeddings=tie)).eval()
    network.save_pretrained(tmp_path / "whole")
    model_of(tmp_path / "whole").save_pretrained(tmp_path / "shards", max_shard_size="8KB")
    assert len([*(tmp_path / "shards").glob("*.safetensors")]) > 1
    tokens = ids(1, 20)
    assert torch.equal(PerceiverAR.from_pretrained(tmp_path / "shards")(tokens), network(tokens))
    next((tmp_path / "shards").glob("*.safetensors")).unlink()
    with pytest.raises(InputError, match=r"model-.*\.safetensors: no such file"):
        PerceiverAR.from_pretrained(tmp_path / "shards")


def test_the_weights_saved_last_are_loaded_whether_whole_or_in_shards(tmp_path: Path) -> None:
    PerceiverAR(SMALL).save_pretrained(tmp_path)
    for size in ("8KB", "1GB", "8KB"):
        model = model_of(tmp_path)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.5)
        model.save_pretrained(tmp_path, max_shard_size=size)
        for loaded in (PerceiverAR.from_pretrained(tmp_path), model_of(tmp_path).network):
            assert torch.equal(loaded.embed.weight, model.network.embed.weight)


# What is attached to modules acts


def test_a_hook_on_the_embedding_acts_also_where_the_prefix_is_long(run: Path) -> None:  # noqa: F811
    network, tokens = PerceiverAR.from_pretrained(run), ids(2, 24)
    expected = network(tokens)

    def double(module: Any, inputs: Any, output: Any) -> Any:
        return output + output

    network.embed.register_forward_hook(double)
    doubled = PerceiverAR.from_pretrained(run)
    doubled.embed.weight.data *= 2
    assert_close(network(tokens), doubled(tokens), 1e-5)
    assert not torch.equal(network(tokens), expected)
    network.config = network.config.replace(prefix_chunk=4)
    with pytest.raises(InputError, match=r"embed is Embedding with a hook, .* set prefix_chunk to 0"):
        network(tokens)


def test_noise_on_embeddings_is_drawn(run: Path) -> None:  # noqa: F811
    model, tokens = model_of(run).train(), ids(2, 24)
    model.network.embed.neftune_noise_alpha = 5.0
    model.network.embed.register_forward_hook(neftune_post_forward_hook)
    assert not torch.equal(model(tokens).logits, model(tokens).logits)


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["embed"]},
        {"target_modules": "all-linear"},
        {"target_modules": "all-linear", "use_dora": True},
        {"target_modules": ["qkv_proj"], "modules_to_save": ["embed", "head"]},
    ],
)
def test_adapters_train_and_merge_to_the_same_logits(settings: dict[str, Any], run: Path) -> None:  # noqa: F811
    peft = pytest.importorskip("peft")
    tokens = ids(2, 24)
    model = peft.get_peft_model(model_of(run), peft.LoraConfig(r=2, lora_dropout=0.0, **settings))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model(input_ids=tokens, labels=tokens).loss.backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        optimizer.step()
    assert gradients and all(grad is not None and grad.abs().max() > 0 for grad in gradients.values())
    model.eval()
    expected = model(input_ids=tokens).logits
    assert not torch.allclose(expected, model_of(run)(tokens).logits, atol=1e-3)
    assert_close(model.merge_and_unload()(tokens).logits, expected, 1e-4)


def test_weights_on_the_disk_are_fetched(run: Path, tmp_path: Path) -> None:  # noqa: F811
    pytest.importorskip("accelerate")
    expected, tokens = model_of(run), ids(2, 24)
    parts = ["local_conv", *(name for name, _ in expected.network.named_children())]
    parted = {f"network.{name}": "disk" if name in ("embed", "cross_attention") else "cpu" for name in parts}
    for place in ({"": "disk"}, parted):
        model = model_of(run, device_map=place, offload_folder=tmp_path)
        assert model.network.embed.weight.device.type == "meta"
        assert_close(model(tokens).logits, expected(tokens).logits, 1e-6)
        new: list[Tensor] = [m.generate(tokens, max_new_tokens=20, do_sample=False) for m in (model, expected)]
        assert torch.equal(*new)

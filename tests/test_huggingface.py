"""A run is what transformers load, and what they compute is what the network computes over the windows it reports."""

import copy
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import peft
import pytest
import torch
import torch.nn.functional as F
from helpers import window_logits
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import Server
from reference import assert_close, configs, randomize
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    LogitsProcessorList,
    TextIteratorStreamer,
    Trainer,
    TrainingArguments,
    pipeline,
)

from perceiver_ar import cli
from perceiver_ar.config import PerceiverARConfig
from perceiver_ar.data.audio import MuLawCodec
from perceiver_ar.data.codec import Codec
from perceiver_ar.data.codec_file import save_codec
from perceiver_ar.data.conditions import ConditionedCodec
from perceiver_ar.data.genome import NucleotideCodec
from perceiver_ar.data.text import BytesCodec, OffsetBytesCodec, train_bpe
from perceiver_ar.errors import InputError
from perceiver_ar.generation import generate
from perceiver_ar.huggingface import PerceiverARCache, PerceiverARForCausalLM, PerceiverARModelConfig, codec_tokenizer
from perceiver_ar.huggingface.caching import CACHE
from perceiver_ar.network.model import PerceiverAR
from perceiver_ar.run import Run
from perceiver_ar.windows import next_window

SMALL = PerceiverARConfig(vocab_size=256, context_length=24, num_latents=8, dim=16, num_layers=2, num_heads=2)


def network(config: PerceiverARConfig = SMALL, seed: int = 1) -> PerceiverAR:
    return randomize(PerceiverAR(config).double().eval(), seed)


def adapted(model: PerceiverAR) -> PerceiverARForCausalLM:
    """The same weights behind the interface of transformers."""
    adapter: Any = PerceiverARForCausalLM(PerceiverARModelConfig(model.config))
    adapter.to(model.embed.weight.dtype)
    adapter.network.load_state_dict(model.state_dict())
    return adapter.eval()


SAVED = network().float()
NETWORK = copy.deepcopy(SAVED).double()  # the same weights
MODEL: Any = adapted(NETWORK)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "text"
    SAVED.save_pretrained(path)
    save_codec(BytesCodec(), path)
    return path


@pytest.fixture(scope="module")
def exported(run: Path) -> Path:
    path = run.parent / "exported"
    assert cli.main(["export", "huggingface", str(run), "--out", str(path)]) == 0
    return path


def ids(*shape: int, seed: int = 0, vocab_size: int = 256) -> Tensor:
    return torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(seed))


TIED = SAVED.config.replace(tie_embeddings=True)
peft_warns = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


@peft_warns
def test_what_could_not_be_loaded_is_not_saved(tmp_path: Path) -> None:
    tied: Any = PerceiverARForCausalLM(PerceiverARModelConfig(TIED))
    tied.network.head.weight = torch.nn.Parameter(tied.network.head.weight.detach() + 0.1)
    with pytest.raises(InputError, match="the head has weights of its own, which tie_embeddings would drop"):
        tied.save_pretrained(tmp_path / "tied")
    lora = peft.LoraConfig(r=2, target_modules=["q_proj"])
    wrapped: Any = peft.get_peft_model(adapted(network()), lora)
    with pytest.raises(InputError, match=r"the model holds adapters, .*base_layer.*: merge them into its weights"):
        wrapped.base_model.model.save_pretrained(tmp_path / "wrapped")
    wrapped.merge_and_unload().save_pretrained(tmp_path / "merged")
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]


@peft_warns
def test_peft_sees_that_the_head_is_the_embedding() -> None:
    """Else it trains one of the two, and a merge changes both."""
    tied: Any = PerceiverARForCausalLM(PerceiverARModelConfig(TIED)).eval()
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices={"embed": [1, 2]})
    wrapped: Any = peft.get_peft_model(tied, config)
    x = ids(1, 20)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
        before = wrapped(x).logits
        after = wrapped.merge_and_unload()(x).logits
    assert_close(after, before, 1e-4)


def test_another_context_length_leaves_the_angles(tmp_path: Path) -> None:
    settings = SAVED.config.replace(rotary_base=None)
    PerceiverAR(settings).save_pretrained(tmp_path)
    longer, same = (
        PerceiverARForCausalLM.from_pretrained(tmp_path, **changed) for changed in ({"context_length": 999}, {})
    )
    assert longer.config.network.context_length == 999
    with torch.no_grad():
        assert torch.equal(longer(x := ids(1, 20)).logits, same(x).logits)


@torch.no_grad()
def last_logits(model: PerceiverAR, rows: Tensor, prompt_len: int) -> Tensor:
    """Of rows (B, T) that have the same windows, the last ones (B, V) of `window_logits` of each."""
    window = None
    for t in range(prompt_len, rows.shape[1] + 1):
        window = next_window(model.config, window, t)
    assert window is not None
    return model(rows[:, window.start :], rows.shape[1] - window.start - window.num_latents)[:, -1]


# Files


def test_a_run_is_loaded_and_saved_as_it_is(run: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(run)
    assert isinstance(model, PerceiverARForCausalLM)
    assert not model.training
    tokens = ids(2, 20)
    assert torch.equal(model.network(tokens), SAVED(tokens))
    for target in (tmp_path / "once", tmp_path / "twice"):
        model.save_pretrained(target)
        for name in ("config.json", "model.safetensors"):
            assert (target / name).read_bytes() == (run / name).read_bytes()
        model = AutoModelForCausalLM.from_pretrained(target)
    assert (tmp_path / "once/generation_config.json").read_bytes() == (target / "generation_config.json").read_bytes()
    assert torch.equal(PerceiverAR.from_pretrained(target)(tokens), SAVED(tokens))


@given(configs(), st.integers(0, 99))
@settings(max_examples=10)
def test_every_network_goes_there_and_back(
    tmp_path_factory: pytest.TempPathFactory, config: PerceiverARConfig, seed: int
) -> None:
    path = tmp_path_factory.mktemp("model")
    model = network(config, seed).float()
    model.save_pretrained(path)
    loaded: Any = PerceiverARForCausalLM.from_pretrained(path)
    tokens = ids(2, config.context_length, vocab_size=config.vocab_size)
    assert torch.equal(loaded.network(tokens), model(tokens))
    loaded.save_pretrained(path / "again")
    assert (path / "again/config.json").read_bytes() == (path / "config.json").read_bytes()
    assert (path / "again/model.safetensors").read_bytes() == (path / "model.safetensors").read_bytes()


def test_weights_that_are_missing_or_unknown_are_listed(run: Path, tmp_path: Path) -> None:
    NETWORK.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["novel.weight"] = tensors.pop("self_attention.1.qkv_proj.weight")
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"self_attention\.1\.qkv_proj\.weight is missing; .*novel\.weight is unknown"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_settings_of_another_version_are_refused_not_ignored(run: Path, tmp_path: Path) -> None:
    settings = json.loads((run / "config.json").read_text()) | {"novel": 1}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(InputError, match=f"{tmp_path}: unknown settings novel"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_settings_given_on_loading_are_the_networks(run: Path) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(run, context_length=48, prefix_dropout=0.5)
    assert model.network.config == SMALL.replace(context_length=48, prefix_dropout=0.5)
    tokens = ids(2, 20)
    assert torch.equal(model.network(tokens), SAVED(tokens))
    for wrong, says in (
        ({"num_latents": 99}, "^num_latents is 99"),
        ({"hidden_size": 99}, "hidden_size is 99: the network's setting is dim"),
        ({"tie_embeddings": True}, "tie_embeddings is given, but the head has its own weights"),
    ):
        with pytest.raises(InputError, match=says):
            AutoModelForCausalLM.from_pretrained(run, **wrong)


def test_a_new_model_has_the_networks_own_first_weights() -> None:
    torch.manual_seed(3)
    expected = PerceiverAR(SMALL).state_dict()
    torch.manual_seed(3)
    model: Any = AutoModelForCausalLM.from_config(PerceiverARModelConfig(SMALL))
    for name, tensor in model.network.state_dict().items():
        assert torch.equal(tensor, expected[name])


ELSEWHERE = """
import json, sys
sys.modules["perceiver_ar"] = None  # not installed
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline
path, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=True)
inputs = tokenizer(["The cat", "A much longer prompt, longer than the context"], return_tensors="pt", padding=True)
new = model.generate(**inputs, max_new_tokens=40, do_sample=False, eos_token_id=None)
write = pipeline("text-generation", model=model, tokenizer=tokenizer)
print(json.dumps({
    "logits": model(**inputs).logits.tolist(), "new": new.tolist(), "mask": inputs.attention_mask.tolist(),
    "eos": model.generation_config.eos_token_id, "written": write("The cat", max_new_tokens=3)[0]["generated_text"],
}))
model.save_pretrained(out)
"""


def test_an_export_needs_nothing_of_ours(exported: Path, tmp_path: Path) -> None:
    """And equals native logits and greedy tokens through refills and past the context."""
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home")}
    command = [sys.executable, "-c", ELSEWHERE, str(exported), str(tmp_path / "again")]
    output = subprocess.run(command, check=True, capture_output=True, text=True, env=environment, cwd=tmp_path).stdout
    found = json.loads(output)
    assert found["eos"] == 0
    assert found["written"].startswith("The cat")
    logits, new, mask = (torch.tensor(found[name]) for name in ("logits", "new", "mask"))
    for r in range(2):
        prompt = new[r, : mask.shape[1]][mask[r].bool()]
        assert_close(logits[r][mask[r].bool()].double(), window_logits(NETWORK, prompt), 1e-5)
        assert torch.equal(new[r, mask.shape[1] :], generate(NETWORK, prompt, 40, temperature=0.0)[0])
    for name in ("config.json", "model.safetensors", "modeling_perceiver_ar.py", "generation_config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (exported / name).read_bytes()


def test_an_export_is_still_a_run(exported: Path, tmp_path: Path) -> None:
    tokens = ids(1, 24)
    assert torch.equal(Run(exported).model()(tokens), SAVED(tokens))
    assert isinstance(Run(exported).codec(), BytesCodec)
    model = AutoModelForCausalLM.from_pretrained(exported)  # the installed code is the better one
    assert isinstance(model, PerceiverARForCausalLM)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "config.json").read_text() == SMALL.to_json()  # no code there, so it names none


def test_export_refuses_what_is_there(run: Path, exported: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["export", "huggingface", str(run), "--out", str(exported)]) == 2
    assert "is there already" in capsys.readouterr().err


# Logits of every position


@given(configs(), st.data(), st.integers(0, 999))
@settings(max_examples=25)
def test_every_position_has_the_logits_of_its_window_whatever_the_batch(
    config: PerceiverARConfig, data: st.DataObject, seed: int
) -> None:
    """Padding on the left, on the right and in between; rows alone; rows longer than the context."""
    config = config.replace(positions_from_end=data.draw(st.booleans()))  # which no cache serves
    model = network(config, seed)
    T = data.draw(st.integers(1, 2 * config.context_length + 3))
    mask = torch.tensor(data.draw(st.lists(st.lists(st.booleans(), min_size=T, max_size=T), min_size=1, max_size=3)))
    mask[:, 0] |= ~mask.any(1)
    tokens = ids(*mask.shape, seed=seed, vocab_size=config.vocab_size)
    last = data.draw(st.integers(0, T))
    logits = adapted(model)(tokens, attention_mask=mask.long()).logits
    assert logits.shape == (*mask.shape, config.vocab_size)
    assert_close(adapted(model)(tokens, attention_mask=mask, logits_to_keep=last).logits, logits[:, -last:], 1e-9)
    for row, real, found in zip(tokens, mask, logits, strict=True):
        assert_close(found[real], window_logits(model, row[real]), 1e-9)


def test_the_loss_is_the_mean_over_targets_that_follow_a_token() -> None:
    tokens, mask = ids(2, 30), torch.ones(2, 30, dtype=torch.long)
    mask[0, :11] = 0
    labels = tokens.masked_fill(mask == 0, -100)
    labels[1, 4:9] = -100
    losses = []
    for row, real, label in zip(tokens, mask.bool(), labels, strict=True):
        scores = window_logits(NETWORK, row[real])[:-1].log_softmax(-1)
        target = label[real][1:]
        losses += [-score[t] for score, t in zip(scores, target, strict=True) if t != -100]
    loss = MODEL(tokens, attention_mask=mask, labels=labels).loss
    assert_close(loss.double(), torch.stack(losses).mean(), 1e-6)
    flipped = MODEL(tokens.flip(0), attention_mask=mask.flip(0), labels=labels.flip(0), return_dict=False)
    assert_close(flipped[0], loss, 1e-6)


def test_the_loss_trains_every_weight() -> None:
    model: Any = adapted(network())
    model(ids(2, 30), labels=ids(2, 30)).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


# Training with transformers' Trainer


def trained(path: Path, steps: int, resume: Path | None = None, **settings: Any) -> Any:
    """A small model after some steps of two rows, one of them padded."""
    texts = ids(16, 30, seed=4)
    rows = [{"input_ids": text, "labels": text.masked_fill(torch.arange(30) < 3 * (i % 4), -100)}
            for i, text in enumerate(texts)]  # fmt: skip
    config = SMALL.replace(tie_embeddings=True, init="normal")
    torch.manual_seed(0)
    model = PerceiverARForCausalLM(PerceiverARModelConfig(config))
    defaults: dict[str, Any] = {
        "per_device_train_batch_size": 2, "learning_rate": 1e-2, "lr_scheduler_type": "constant", "save_steps": 2,
        "report_to": [], "disable_tqdm": True, "use_cpu": True, "logging_steps": 1,
    }  # fmt: skip
    arguments = TrainingArguments(str(path), max_steps=steps, **(defaults | settings))
    trainer = Trainer(model, arguments, train_dataset=rows)  # pyright: ignore[reportArgumentType]
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return model


def test_a_trainer_that_resumes_ends_where_one_does_that_was_never_stopped(tmp_path: Path) -> None:
    expected = trained(tmp_path / "whole", 4).state_dict()
    found = trained(tmp_path / "resumed", 4, tmp_path / "whole/checkpoint-2")
    for name, tensor in found.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    assert torch.equal(Run(tmp_path / "whole/checkpoint-4").model()(ids(1, 9)), found.eval().network(ids(1, 9)))


def test_accumulated_batches_weigh_as_their_targets(tmp_path: Path) -> None:
    """So two of one row each train as one of two rows, though one row has fewer labels."""
    settings = {"optim": "sgd", "max_grad_norm": 0.0, "save_strategy": "no"}
    expected = trained(tmp_path / "one", 3, **settings).state_dict()
    found = trained(
        tmp_path / "two", 3, per_device_train_batch_size=1, gradient_accumulation_steps=2, **settings
    ).state_dict()
    for name, tensor in found.items():
        assert_close(tensor, expected[name], 1e-5)


def test_the_trainers_label_smoothing_is_that_of_the_next_token(tmp_path: Path) -> None:
    arguments = TrainingArguments(str(tmp_path), label_smoothing_factor=0.2, report_to=[], use_cpu=True)
    tokens = ids(2, 30)
    labels = tokens.masked_fill(torch.arange(30) < 7, -100)
    expected = F.cross_entropy(
        MODEL(tokens).logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100, label_smoothing=0.2
    )
    loss: Any = Trainer(MODEL, arguments).compute_loss(MODEL, {"input_ids": tokens, "labels": labels})
    assert_close(loss.double(), expected.double(), 1e-5)


def test_the_loss_is_a_mean_also_where_a_trainer_counts_what_follows_padding() -> None:
    tokens, mask = ids(2, 30), torch.ones(2, 30, dtype=torch.long)
    mask[0, :11] = 0
    for labels in (tokens, tokens.masked_fill(mask == 0, -100)):
        expected = MODEL(tokens, attention_mask=mask, labels=labels).loss
        count = (labels[:, 1:] != -100).sum()
        assert_close(
            MODEL(tokens, attention_mask=mask, labels=labels, num_items_in_batch=count).loss.double(),
            expected.double(), 1e-5,
        )  # fmt: skip


def test_weights_without_the_prefix_load_where_a_wrapper_has_changed_the_head() -> None:
    """As PEFT does, under whose names a tied head has no entry of its own."""
    model: Any = PerceiverARForCausalLM(PerceiverARModelConfig(SMALL.replace(tie_embeddings=True)))
    model.network.head = torch.nn.Sequential(model.network.head)
    model.load_state_dict(model.state_dict())


def test_arguments_without_a_value_change_nothing() -> None:
    """As PEFT's wrappers give them."""
    tokens = ids(2, 30)
    nothing: dict[str, Any] = {"inputs_embeds": None, "output_attentions": None, "output_hidden_states": False}
    assert torch.equal(MODEL(tokens, **nothing).logits, MODEL(tokens).logits)
    for name in nothing:
        with pytest.raises(InputError, match=f"{name}: .* leave it out"):
            MODEL(tokens, **{name: True})


# Generation


@given(configs(), st.booleans(), st.lists(st.integers(1, 22), min_size=1, max_size=3), st.integers(0, 999))
@settings(max_examples=25)
def test_greedy_tokens_are_those_of_native_generation_for_each_row_alone(
    config: PerceiverARConfig, from_end: bool, lengths: list[int], seed: int
) -> None:
    """Through refills and past the context, left-padded in one batch."""
    config = config.replace(positions_from_end=from_end)
    model, longest, count = network(config, seed), max(lengths), 2 * config.context_length + 4
    tokens = ids(len(lengths), longest, seed=seed, vocab_size=config.vocab_size)
    mask = torch.stack([torch.arange(longest) >= longest - length for length in lengths]).long()
    adapter: Any = adapted(model)
    new = adapter.generate(tokens, attention_mask=mask, max_new_tokens=count, do_sample=False)
    for r, length in enumerate(lengths):
        expected = generate(model, tokens[r, longest - length :], count, temperature=0.0)
        assert torch.equal(new[r : r + 1, longest:], expected)


@pytest.mark.parametrize(
    ("prompt_len", "from_end", "local_context"),
    [(13, False, 4), (4, True, 4)],
)
def test_beam_search_is_that_of_a_model_without_cache(prompt_len: int, from_end: bool, local_context: int) -> None:
    beams, count = 4, 26  # refills, past the context
    config = SMALL.replace(vocab_size=5, positions_from_end=from_end, local_context=local_context)
    model = network(config, seed=5)
    prompts = ids(2, prompt_len, vocab_size=5)
    adapter: Any = adapted(model)
    found = adapter.generate(
        prompts, max_new_tokens=count, do_sample=False, num_beams=beams, num_return_sequences=3,
        return_dict_in_generate=True, output_scores=True,
    )  # fmt: skip
    for r, prompt in enumerate(prompts):
        rows = [(0.0, prompt)]
        for _ in range(count):
            scored = []
            logits = last_logits(model, torch.stack([row for _, row in rows]), prompt_len)
            for (score, row), following in zip(rows, logits.log_softmax(-1), strict=True):
                scored += [(score + float(following[i]), torch.cat([row, torch.tensor([i])])) for i in range(5)]
            rows = sorted(scored, key=lambda item: -item[0])[:beams]
        for i in range(3):
            assert torch.equal(found.sequences[3 * r + i], rows[i][1])
            assert_close(found.sequences_scores[3 * r + i].double(), torch.tensor(rows[i][0] / count).double(), 1e-5)


def test_several_samples_are_drawn_from_the_logits_of_their_windows() -> None:
    torch.manual_seed(0)
    prompt = ids(2, 5)
    drawn = MODEL.generate(
        prompt, max_new_tokens=25, do_sample=True, num_return_sequences=3, top_k=0, output_logits=True,
        return_dict_in_generate=True,
    )  # fmt: skip
    assert drawn.sequences.shape == (6, 30)
    assert len({tuple(row.tolist()) for row in drawn.sequences}) == 6
    for r, row in enumerate(drawn.sequences):
        found = torch.stack([step[r] for step in drawn.logits])
        assert_close(found.double(), window_logits(NETWORK, row[:-1], prompt_len=5), 1e-5)


@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")
@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_a_cache_goes_on_where_it_was(name: str) -> None:
    """Turn by turn, and token by token, as generation in one go; logits are those of windows."""
    prompt, cache = ids(2, 5), {name: PerceiverARCache()}
    first = MODEL.generate(prompt, **cache, max_new_tokens=9, do_sample=False)
    both = torch.cat([first, ids(2, 2, seed=1)], dim=1)
    second = MODEL.generate(both, **cache, max_new_tokens=15, do_sample=False)
    output = MODEL(prompt, use_cache=True)
    for t in range(5, second.shape[1]):
        expected = last_logits(NETWORK, second[:, :t], prompt_len=5)
        assert_close(output.logits[:, -1], expected, 1e-9)
        if t not in (14, 15):  # given, not drawn
            assert torch.equal(output.logits[:, -1].argmax(-1), second[:, t])
        output = MODEL(second[:, t : t + 1], **{name: output[CACHE]})


def test_a_copy_of_a_cache_goes_on_by_itself_over_the_same_network() -> None:
    model = network(SMALL.replace(vocab_size=5))
    adapter, prompt = adapted(model), ids(2, 12, vocab_size=5)
    first = adapter(prompt, use_cache=True)[CACHE]
    second = copy.deepcopy(first)
    assert second.decoder.model is adapter.network
    for seed, cache in enumerate((first, second)):
        rows = torch.cat([prompt, ids(2, 20, seed=seed, vocab_size=5)], dim=1)  # refills, past the context
        for t in range(12, 32):
            logits = adapter(rows[:, t : t + 1], **{CACHE: cache}).logits[:, 0]
            expected = last_logits(model, rows[:, : t + 1], prompt_len=12)
            assert_close(logits, expected, 1e-9)


def test_generation_ends_with_the_document(run: Path) -> None:
    config = SMALL.replace(logits_bias=True)
    model: Any = AutoModelForCausalLM.from_pretrained(run)
    assert model.generation_config.eos_token_id == model.generation_config.bos_token_id == 0

    def end_soon(tokens: Tensor, scores: Tensor) -> Tensor:
        scores[: tokens.shape[1] > 4, 0] = 1e9
        return scores

    assert config.vocab_size == 256
    ended = model.generate(max_new_tokens=20, logits_processor=LogitsProcessorList([end_soon]))  # from the start token
    assert ended.shape == (1, 6)
    assert ended[0, 0] == ended[0, -1] == 0


def test_what_generation_config_says_is_kept(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / "generation_config.json").write_text('{"temperature": 0.7, "do_sample": true}')
    settings = AutoModelForCausalLM.from_pretrained(tmp_path / "run").generation_config
    assert (settings.temperature, settings.do_sample, settings.eos_token_id) == (0.7, True, 0)


def test_a_stream_gives_the_text_as_it_is_drawn(run: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(run)
    streamer: Any = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60, skip_special_tokens=True)
    inputs = tokenizer("The cat sat", return_tensors="pt")
    settings: dict[str, Any] = {"max_new_tokens": 20, "do_sample": False, "streamer": streamer}
    thread = Thread(target=MODEL.generate, kwargs={**inputs, **settings})
    thread.start()
    text = "".join(streamer)
    thread.join()
    new = generate(NETWORK, inputs.input_ids, 20, temperature=0.0)[0]
    assert text == tokenizer.decode(new, skip_special_tokens=True)


def test_a_stop_string_ends_generation(run: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(run)
    inputs = tokenizer("The cat sat", return_tensors="pt")
    settings = {"max_new_tokens": 20, "do_sample": True, "eos_token_id": None, "stop_strings": ["z"]}

    def only_z_from_the_sixteenth(tokens: Tensor, scores: Tensor) -> Tensor:
        scores[:, ord("z")] = 1e9 if tokens.shape[1] >= 16 else -1e9
        return scores

    processors = LogitsProcessorList([only_z_from_the_sixteenth])
    ended = MODEL.generate(**inputs, **settings, tokenizer=tokenizer, logits_processor=processors)
    assert ended.shape == (1, 17)


def test_a_pipeline_writes_batches(run: Path) -> None:
    write: Any = pipeline("text-generation", model=str(run))
    prompts = ["The cat", "A much longer prompt, longer than the context"]
    texts = [found[0]["generated_text"] for found in write(prompts, batch_size=2, max_new_tokens=12, do_sample=False)]
    for prompt, text in zip(prompts, texts, strict=True):
        start = torch.from_numpy(BytesCodec().start(prompt)).long()
        new = generate(NETWORK, start, 12, temperature=0.0, stop_tokens=[0])[0]
        assert text == prompt + write.tokenizer.decode(new, skip_special_tokens=True)


@pytest.mark.parametrize(
    ("settings", "remedy"),
    [
        ({"prefill_chunk_size": 4}, "prefill_chunk_size is 4"),
        ({"cache_implementation": "static"}, "cache_implementation is 'static'"),
        ({"cache_implementation": "offloaded"}, "leave it out"),
        ({"cache_implementation": "paged"}, "use generate"),
        ({"prompt_lookup_num_tokens": 2}, "leave out assistant_model"),
        ({"use_cache": False}, "leave it out"),
        ({"cache": DynamicCache()}, "is a DynamicCache"),
        ({"attention_mask": torch.tensor([[1] * 6, [1] * 4 + [0] * 2])}, "pad them on the left"),
        ({"attention_mask": torch.tensor([[1] * 6, [0] * 6])}, "pad them on the left"),
    ],
)
def test_what_cannot_be_right_is_refused(settings: dict[str, Any], remedy: str) -> None:
    with pytest.raises(InputError, match=remedy):
        MODEL.generate(ids(2, 6), max_new_tokens=3, do_sample=False, **settings)


def test_other_ways_round_the_windows_are_refused() -> None:
    with pytest.raises(InputError, match="use generate"):
        MODEL.generate_batch([[1, 2, 3]])
    with pytest.raises(InputError, match="input_ids are missing: give the ids themselves"):
        MODEL(inputs_embeds=torch.zeros(1, 4, 16))
    with pytest.raises(InputError, match="leave out the cache"):
        MODEL(ids(1, 4), labels=ids(1, 4), use_cache=True)
    with pytest.raises(InputError, match="must be equal"):
        MODEL(ids(1, 4), attention_mask=torch.ones(1, 3))
    cache = MODEL(ids(2, 4), use_cache=True)[CACHE]
    with pytest.raises(InputError, match="two names of one"):
        MODEL(ids(2, 1), cache=cache, past_key_values=cache)
    with pytest.raises(InputError, match="3 rows for 2 in the cache"):
        MODEL(ids(3, 1), cache=cache)
    with pytest.raises(InputError, match="begin a new one"):
        cache.crop(1)
    for shape in ((2, 4), (2, 1), (1, 5)):
        with pytest.raises(InputError, match=r"give \(2, 5\), for 4 cached columns and 1 new ones"):
            MODEL(ids(2, 1), attention_mask=torch.ones(shape), cache=cache)
    with pytest.raises(InputError, match=r"has \[3, 4\] real tokens in cached columns, the cache \[4, 4\]"):
        MODEL(ids(2, 1), attention_mask=torch.tensor([[0, 1, 1, 1, 1], [1] * 5]), cache=cache)
    with pytest.raises(InputError, match="filled by another network: begin a new one"):
        adapted(NETWORK)(ids(2, 1), cache=cache)
    with pytest.raises(InputError, match="row 0 of input_ids does not begin with the 4 tokens"):
        MODEL.generate(ids(2, 6, seed=9), cache=cache, max_new_tokens=3)
    with pytest.raises(InputError, match=r"shape \(2, 0\) after 4 cached columns: give \(B, T\), at least one new"):
        MODEL(ids(2, 0), cache=cache)


def test_a_prompts_logits_are_those_of_every_position_with_a_cache_too() -> None:
    tokens, mask = ids(2, 12), torch.ones(2, 12, dtype=torch.long)
    mask[0, :3] = 0
    output = MODEL(tokens, attention_mask=mask, use_cache=True)
    assert torch.equal(output.logits[:, :-1], MODEL(tokens, attention_mask=mask).logits[:, :-1])
    assert_close(output.logits[0, -1:], window_logits(NETWORK, tokens[0, 3:], prompt_len=9), 1e-9)
    more = MODEL(ids(2, 5, seed=1), cache=output[CACHE]).logits
    row = torch.cat([tokens[1], ids(2, 5, seed=1)[1]])
    assert_close(more[1], window_logits(NETWORK, row, prompt_len=12)[1:], 1e-9)


@pytest.mark.parametrize("length", [3, 5, 30])
def test_a_cache_that_was_returned_goes_on_beyond_its_first_room(length: int) -> None:
    prompt = ids(2, length)
    first = MODEL.generate(prompt, max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
    both = torch.cat([first.sequences, ids(2, 2, seed=1)], dim=1)
    second = MODEL.generate(both, **{CACHE: first[CACHE]}, max_new_tokens=30, do_sample=False)
    for t in range(both.shape[1], second.shape[1]):
        expected = last_logits(NETWORK, second[:, :t], prompt_len=length)
        assert torch.equal(expected.argmax(-1), second[:, t])


# Tokenizers


TEXT_CODECS: list[Codec] = [
    BytesCodec(),
    BytesCodec(text=False),
    OffsetBytesCodec(6, start_id=1),
    OffsetBytesCodec(3),
    train_bpe(["the cat sat on the mat, the cat, the mat"] * 3, 280),
    ConditionedCodec(BytesCodec(), {"kind": ["high", "low"]}),
    ConditionedCodec(train_bpe(["the cat, the cat"], 262), {"kind": ["high"], "year": ["1812"], "note": 5}),
]


def name(codec: Codec) -> str:
    return f"{codec.name}-{len(codec.separator)}" + ("-conditions" if codec.conditions else "")


@pytest.mark.parametrize("codec", TEXT_CODECS, ids=name)
@given(text=st.text(st.characters(blacklist_characters="\0", blacklist_categories=("Cs",))))
def test_a_tokenizer_has_the_codecs_ids_and_gives_any_text_back(codec: Codec, text: str) -> None:
    tokenizer = codec_tokenizer(codec)
    for document in (text, f"a {text} <|endoftext|><|1|>\u0100\u00ff<|padding|>"):
        assert tokenizer(document, split_special_tokens=True).input_ids == codec.start(document).tolist()
        found = tokenizer(document, add_special_tokens=False, split_special_tokens=True).input_ids
        assert found == codec.encode(document.encode()).tolist()
        assert tokenizer.decode(found) == document
        assert tokenizer.decode(codec.start(document).tolist(), skip_special_tokens=True) == document


@pytest.mark.parametrize("codec", [*TEXT_CODECS, MuLawCodec(8000)], ids=name)
def test_a_tokenizer_is_found_with_the_run_and_saved_as_an_ordinary_one(codec: Codec, tmp_path: Path) -> None:
    network(SMALL.replace(vocab_size=codec.vocab_size)).save_pretrained(tmp_path)
    save_codec(codec, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert len(tokenizer) == codec.vocab_size
    assert tokenizer.eos_token_id == tokenizer.bos_token_id == (codec.separator[-1] if codec.separator else None)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    for again in (tokenizer, AutoTokenizer.from_pretrained(tmp_path / "tokenizer")):
        for text in ("A cat, <|endoftext|>", "1 7 200 3"):
            if not codec.writes_text:
                continue
            found = again(text, split_special_tokens=True).input_ids
            assert found == codec.start(text).tolist()
            assert again.decode(found, skip_special_tokens=True) == text
        if codec.separator and codec.writes_text:
            assert again(f"A{again.eos_token}").input_ids == [*codec.start("A"), codec.separator[-1]]
            assert again.pad_token_id not in codec.start("A caf\u00e9 \u00ff") and again.pad_token_id < len(again)
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id


def test_conditions_are_special_tokens() -> None:
    codec = ConditionedCodec(BytesCodec(), {"kind": ["high", "low"], "note": 4})
    words = ["<|endoftext|>", "<|kind=low|>", "<|note=0xc3|>", "<|note=0xa9|>", "<|note=0x61|>", "<|note|>"]
    tokenizer = codec_tokenizer(codec)
    start = codec.start("b", {"kind": "low", "note": "\u00e9a"}).tolist()
    assert tokenizer.convert_ids_to_tokens(start) == [*words, "b"]
    assert tokenizer("".join([*words, "b"]), add_special_tokens=False).input_ids == start


@given(st.integers(1, 4), st.text("ACGTACGTacgtuRN\n", max_size=40))
def test_a_genomes_tokenizer_has_the_codecs_kmers(kmer: int, bases: str) -> None:
    codec = NucleotideCodec(kmer)
    tokenizer = codec_tokenizer(codec)
    ids = tokenizer(bases).input_ids
    assert ids == codec.start(bases).tolist()
    assert tokenizer.decode(ids, skip_special_tokens=True) == codec.decode(ids).decode()


def test_options_of_a_tokenizer_are_kept(run: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(run, padding_side="right", model_max_length=9)
    assert (tokenizer.padding_side, tokenizer.model_max_length) == ("right", 9)
    assert tokenizer(["a", "bc"], padding=True).attention_mask == [[1, 1, 0], [1, 1, 1]]
    assert AutoTokenizer.from_pretrained(run).padding_side == "left"


def test_what_is_no_text_has_ids_as_words() -> None:
    codec = MuLawCodec(8000)
    tokenizer = codec_tokenizer(codec)
    assert tokenizer("3 255 17").input_ids == [*codec.separator, 3, 255, 17]
    assert tokenizer.decode([3, 255, *codec.separator, 17], skip_special_tokens=True) == "3 255 17"


# lm-evaluation-harness

HARNESS = """
import json, os, sys
os.environ["HF_HOME"] = home
assert "huggingface_hub" not in sys.modules  # which reads that at import
import lm_eval
from lm_eval.tasks import TaskManager
manager, found = TaskManager(include_path=tasks, include_defaults=False), []
for batch_size in (1, 4):
    for task, bos in (("local_choice", True), ("local_perplexity", False)):
        result = lm_eval.simple_evaluate(
            model="hf", model_args={"pretrained": path, "trust_remote_code": True, "add_bos_token": bos},
            tasks=[task], task_manager=manager, batch_size=batch_size, device="cpu", bootstrap_iters=0,
        )
        samples = sorted(result["samples"][task], key=lambda sample: sample["doc_id"])
        found += [nats[0] if bos else nats for sample in samples for nats in sample["filtered_resps"]]
print(json.dumps(found))
"""

TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: {kind}
target_delimiter: ""
metric_list: [{{metric: {metric}}}]
{document}
"""

CHOICE = 'doc_to_text: "{{question}}"\ndoc_to_choice: "{{choices}}"\ndoc_to_target: "{{answer}}"'
QUESTIONS = [
    {"question": "The cat sat on", "choices": [" the mat", " a"], "answer": 0},
    {"question": "Two", "choices": [" is more", " is"], "answer": 1},
    {"question": "A question longer than the context", "choices": [" four", " five hundred", " x"], "answer": 1},
]
TEXTS = ["Some text that is longer than two contexts of the model, as they are of 24 tokens.", "short", "Zw\u00f6lf"]


def test_lm_eval_finds_our_likelihoods_at_any_batch_size(server: Server, exported: Path, tmp_path: Path) -> None:
    for name, documents, kind, metric, document in (
        ("local_choice", QUESTIONS, "multiple_choice", "acc", CHOICE),
        ("local_perplexity", [{"text": t} for t in TEXTS], "loglikelihood_rolling", "bits_per_byte",
         'doc_to_text: ""\ndoc_to_target: "{{text}}"'),
    ):  # fmt: skip
        file = tmp_path / f"{name}.jsonl"
        file.write_text("".join(json.dumps(document) + "\n" for document in documents))
        task = TASK.format(name=name, file=file, kind=kind, metric=metric, document=document)
        (tmp_path / f"{name}.yaml").write_text(task)
    given = {"path": str(exported), "tasks": str(tmp_path), "home": str(tmp_path / "home")}
    assert server.run(code=HARNESS, given=given) == 0, server.messages()
    found = json.loads(server.stdout.read_text().splitlines()[-1])

    codec, length = BytesCodec(), SMALL.context_length

    def likelihood(tokens: np.ndarray, count: int) -> float:
        """Nats of the last `count` of tokens, with at most a context before."""
        row = torch.from_numpy(tokens[-length - 1 :]).long()
        scores = window_logits(NETWORK, row[:-1]).log_softmax(-1)
        return float(scores.gather(1, row[1:, None])[-count:].sum())

    expected = [
        likelihood(codec.start(question["question"] + choice), len(choice))
        for question in QUESTIONS
        for choice in question["choices"]
    ]
    for text in TEXTS:
        tokens = codec.start(text)
        ends = [min(first + length, len(tokens)) for first in range(1, len(tokens), length)]
        parts = zip([1, *ends], ends, strict=False)
        expected.append(sum(likelihood(tokens[:end], end - first) for first, end in parts))
    assert found == pytest.approx(expected * 2, rel=1e-5)  # at both batch sizes

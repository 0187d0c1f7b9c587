"""A run that starts from a trained one has its network, weights and codec, and is a run of its own from then on."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import MODEL, TRAINER, assert_same_parameters, content

from perceiver_ar import InputError, PerceiverAR, PerceiverARConfig, Recipe, Run, train
from perceiver_ar.card import write_card
from perceiver_ar.cli import main
from perceiver_ar.config import DataConfig, OptimConfig
from perceiver_ar.data.audio import MuLawCodec
from perceiver_ar.data.codec import Codec
from perceiver_ar.data.codec_file import load_codec, save_codec
from perceiver_ar.data.image import ImageCodec
from perceiver_ar.data.integers import IntegerCodec
from perceiver_ar.data.midi import PerformanceCodec
from perceiver_ar.data.modalities import codec_settings, make_codec
from perceiver_ar.data.text import BytesCodec, OffsetBytesCodec, train_bpe
from perceiver_ar.origin import Origin

STANDING = OptimConfig(lr=0.0, muon_lr=0.0)
"""A learning rule that changes nothing."""
TOKENIZER = train_bpe(["the cat sat on a mat and ran\n" * 9], 270)


@pytest.fixture(scope="module")
def source(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, to read from: with a tokenizer, and a mean of its weights as its model."""
    run = tmp_path_factory.mktemp("source") / "run"
    optim, data = OptimConfig(ema=0.5), DataConfig(bpe_vocab_size=270)
    train(Recipe((str(corpus),), str(run), max_steps=30, model=MODEL, optim=optim, data=data, trainer=TRAINER))
    return run


@pytest.fixture
def recipe(source: Path, letters: Path, tmp_path: Path) -> Recipe:
    data = DataConfig(validation=(str(letters / "0.txt"),))
    return Recipe(
        (str(letters),), str(tmp_path / "run"), init_from=str(source), max_steps=1, data=data, trainer=TRAINER
    )


def exported(model: PerceiverARConfig, codec: Codec, folder: Path) -> Origin:
    """A model with random weights and its codec in a folder, and nothing that says how it was trained."""
    torch.manual_seed(0)
    PerceiverAR(codec.fit(model)).save_pretrained(folder)
    save_codec(codec, folder)
    return Origin.open(str(folder))


@pytest.fixture(scope="module")
def start(source: Path, letters: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, dict[str, Any]]:
    """A run that started from the other one and learned nothing, and its summary."""
    run = Run(tmp_path_factory.mktemp("start") / "run")
    data = DataConfig(validation=(str(letters / "0.txt"),))
    recipe = Recipe((str(letters),), str(run.path), init_from=str(source), data=data, optim=STANDING, trainer=TRAINER)
    return run, train(replace(recipe, max_time=None, max_steps=2))


# What is taken.


def test_the_run_starts_with_the_weights_that_the_other_one_has_for_use(
    start: tuple[Run, dict[str, Any]], source: Path
) -> None:
    run, _ = start
    assert_same_parameters(run.path, source)
    assert run.model().config == Run(source).model().config
    assert (run.path / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    assert not run.initial.exists()  # it is finished


def test_the_start_scores_what_evaluate_says_of_the_other_run(
    start: tuple[Run, dict[str, Any]], source: Path, letters: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert main(["evaluate", str(source), str(letters / "0.txt"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["nats_per_token"] == pytest.approx(start[1]["nats_per_token"], rel=1e-6)


def test_it_learns_from_there(recipe: Recipe, start: tuple[Run, dict[str, Any]]) -> None:
    assert train(replace(recipe, max_steps=20))["bits_per_byte"] < start[1]["bits_per_byte"] - 1


def test_what_the_weights_do_not_depend_on_is_as_the_recipe_says(recipe: Recipe, source: Path) -> None:
    model = PerceiverARConfig.load(source).replace(context_length=64, num_latents=16, prefix_dropout=0.5)
    train(replace(recipe, model=model, optim=replace(STANDING, ema=0.5)))  # the mean of weights begins with them, too
    assert Run(recipe.out).model().config == model
    assert_same_parameters(recipe.out, source)


@pytest.mark.parametrize("settings", [{}, {"rotary_base": None, "rotary_endpoint": True}], ids=str)
def test_a_longer_context_changes_nothing_within_the_shorter_one(tmp_path: Path, settings: dict[str, Any]) -> None:
    origin = exported(MODEL.replace(init="normal", **settings), TOKENIZER, tmp_path / "model")
    origin.write(origin.network.replace(context_length=64), tmp_path / "longer")
    longer, shorter = (PerceiverAR.from_pretrained(tmp_path / name) for name in ("longer", "model"))
    assert longer.config.context_length == 64
    tokens = torch.randint(TOKENIZER.vocab_size, (2, 64))
    assert torch.equal(longer(tokens[:, :32]), shorter(tokens[:, :32]))
    longer(tokens)


def test_a_longer_context_needs_the_wavelengths_of_the_shorter_one(recipe: Recipe, tmp_path: Path) -> None:
    origin = exported(MODEL.replace(rotary_base=None), TOKENIZER, tmp_path / "model")
    stored = PerceiverARConfig.load(origin.path)
    origin.check(replace(recipe, model=stored))
    with pytest.raises(InputError, match=r"model\.rotary_base is None instead of 32\.0"):
        origin.check(replace(recipe, model=stored.replace(context_length=64)))
    copied = replace(recipe, model=stored.replace(context_length=64), init_from=origin.path)  # as Python's users do
    assert origin.complete(copied).model == origin.network.replace(context_length=64, rotary_base=32.0)


def test_a_network_that_its_codec_does_not_go_with_is_refused(tmp_path: Path) -> None:
    PerceiverAR(MODEL.replace(vocab_size=300)).save_pretrained(tmp_path)
    save_codec(TOKENIZER, tmp_path)
    with pytest.raises(InputError, match=r"codec\.json does not match vocab_size 300 in its config\.json"):
        Origin.open(str(tmp_path))


@pytest.mark.parametrize("form", ["weights and codec", "export", "shards"])
def test_an_exported_run_is_as_good(recipe: Recipe, source: Path, tmp_path: Path, form: str) -> None:
    folder = tmp_path / "exported"
    if form == "export":
        assert main(["export", "huggingface", str(source), "--out", str(folder)]) == 0
    else:
        save_codec(Run(source).codec(), folder)
        if form == "shards":
            huggingface = pytest.importorskip("perceiver_ar.huggingface")
            model = huggingface.PerceiverARForCausalLM.from_pretrained(source)
            model.save_pretrained(folder, max_shard_size="8KB")
            assert len(list(folder.glob("*.safetensors"))) > 1
        else:
            Run(source).model().save_pretrained(folder)
    origin = Origin.open(str(folder))
    assert origin.network == PerceiverARConfig.load(source)
    origin.write(origin.complete(recipe).model, tmp_path / "initial")
    assert_same_parameters(tmp_path / "initial", source)
    text = b"the cat sat on a mat"
    assert np.array_equal(load_codec(tmp_path / "initial").encode(text), Run(source).codec().encode(text))


# What contradicts is refused.

CONTRADICTIONS: dict[str, tuple[Codec, dict[str, Any], dict[str, Any], list[str]]] = {
    # codec, settings of the network that is taken, those of the recipe, what the message says
    "width": (BytesCodec(), {}, {"model.dim": 32}, ["model.dim is 32 instead of 16", "leave out model.dim"]),
    "layers": (BytesCodec(), {}, {"model.num_layers": 3}, ["model.num_layers is 3 instead of 1"]),
    "first weights": (BytesCodec(), {}, {"model.init": "torch"}, ["model.init is 'torch' instead of 'zero_out'"]),
    "two": (
        BytesCodec(),
        {},
        {"model.norm": "rmsnorm", "model.qk_norm": False},
        ["model.norm is 'rmsnorm' instead of 'layernorm'; model.qk_norm is False instead of True"],
    ),
    "vocabulary": (BytesCodec(), {}, {"model.vocab_size": 300}, ["model.vocab_size is 300 instead of 256"]),
    "learned positions": (
        BytesCodec(),
        {"position_table": "learned"},
        {"model.context_length": 64},
        ["model.context_length is 64 instead of 32, with a learned position table of that length"],
    ),
    "learned queries": (
        BytesCodec(),
        {"learned_queries": "each"},
        {"model.num_latents": 4},
        ["model.num_latents is 4 instead of 8, each with a learned query"],
    ),
    "bytes": (BytesCodec(), {}, {"modality": "bytes"}, ["modality is 'bytes' instead of 'text'"]),
    "text": (BytesCodec(text=False), {}, {"modality": "text"}, ["modality is 'text' instead of 'bytes'"]),
    "music": (BytesCodec(), {}, {"modality": "midi"}, ["modality is 'midi' instead of 'text'"]),
    "a tokenizer": (
        BytesCodec(),
        {},
        {"data.bpe_vocab_size": 300},
        ["data.bpe_vocab_size is 300 instead of no tokenizer"],
    ),
    "another tokenizer": (
        TOKENIZER,
        {},
        {"data.bpe_vocab_size": 300},
        ["data.bpe_vocab_size is 300 instead of a tokenizer of 270 ids"],
    ),
    "events": (PerformanceCodec(), {}, {"data.midi_tokens": "tsd"}, ["is 'tsd' instead of 'performance'"]),
    "rate": (MuLawCodec(8000), {}, {"data.sample_rate": 16000}, ["data.sample_rate is 16000 instead of 8000"]),
    "neural": (MuLawCodec(8000), {}, {"data.audio_codec": "dac"}, ["data.audio_codec is 'dac' instead of 'mulaw'"]),
    "size": (ImageCodec(4, 6), {}, {"data.image_size": (6, 4)}, ["data.image_size is (6, 4) instead of (4, 6)"]),
    "default size": (ImageCodec(4, 6), {}, {"data.image_size": (32, 32)}, ["is (32, 32) instead of (4, 6)"]),
    "colours": (ImageCodec(4, 6), {}, {"data.image_colours": "grey"}, ["is 'grey' instead of 'rgb'"]),
    "palette": (
        ImageCodec(4, 6, "palette", [(0, 0, 0), (9, 9, 9)]),
        {},
        {"data.palette_size": 256},
        ["data.palette_size is 256 instead of 2"],
    ),
    "classes": (ImageCodec(4, 6), {}, {"data.classes": True}, ["data.classes is True instead of False"]),
    "context of pictures": (ImageCodec(4, 6), {}, {"model.context_length": 99}, ["is 99 instead of 72"]),
    "what others have": (BytesCodec(), {}, {"data.image_size": (4, 4)}, ["is (4, 4) instead of (32, 32)"]),
}


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_settings_that_contradict_are_refused_by_name(name: str, tmp_path: Path) -> None:
    codec, network, settings, parts = CONTRADICTIONS[name]
    origin = exported(MODEL.replace(**network), codec, tmp_path)
    recipe = with_settings(origin.complete(Recipe(out="new", init_from=origin.path)), {})
    origin.check(recipe)  # equal settings are fine
    with pytest.raises(InputError) as error:
        origin.check(with_settings(recipe, settings))
    assert all(part in str(error.value) for part in [*parts, origin.path, "init_from"]), error.value


def with_settings(recipe: Recipe, settings: dict[str, Any]) -> Recipe:
    def of(group: str) -> dict[str, Any]:
        return {name.partition(".")[2]: value for name, value in settings.items() if name.startswith(f"{group}.")}

    model, data = recipe.model.replace(**of("model")), replace(recipe.data, **of("data"))
    return replace(recipe, model=model, data=data, modality=settings.get("modality", recipe.modality))


def test_the_same_tokenizer_is_no_contradiction(source: Path, tmp_path: Path) -> None:
    recipe = Recipe(out="new", init_from=str(source))
    shutil.copy(source / "tokenizer.json", tmp_path / "mine.json")
    train_bpe(["other words"], 262).save(tmp_path)
    for origin in (Origin.open(str(source)), exported(MODEL, Run(source).codec(), tmp_path / "model")):
        for given in (DataConfig(bpe_vocab_size=270), DataConfig(tokenizer=str(tmp_path / "mine.json"))):
            origin.complete(replace(recipe, data=given))
        with pytest.raises(InputError, match=r"data\.tokenizer is '.*tokenizer\.json' instead of"):
            origin.complete(replace(recipe, data=DataConfig(tokenizer=str(tmp_path / "tokenizer.json"))))


@pytest.mark.parametrize(
    ("modality", "data"),
    [
        ("text", DataConfig()),
        ("bytes", DataConfig()),
        ("midi", DataConfig()),
        ("midi", DataConfig(midi_tokens="remi")),
        ("midi", DataConfig(midi_tokens="remi_plus")),
        ("image", DataConfig(image_size=(4, 6), image_colours="grey")),
        ("audio", DataConfig(sample_rate=8000)),
    ],
    ids=str,
)
def test_a_codec_knows_the_settings_that_it_was_made_from(modality: str, data: DataConfig) -> None:
    if data.midi_tokens != "performance":
        pytest.importorskip("miditok")
    settings = codec_settings(make_codec(modality, data, []))
    assert settings.pop("modality") == modality
    changed = {f"data.{name}": value for name, value in vars(data).items() if value != getattr(DataConfig(), name)}
    assert settings == settings | changed
    assert all(getattr(data, name.removeprefix("data.")) == value for name, value in settings.items())


@pytest.mark.parametrize(("codec", "modality"), [(OffsetBytesCodec(6), "text"), (IntegerCodec(9), "integers")])
def test_codecs_without_settings_have_a_modality(codec: Codec, modality: str) -> None:
    assert codec_settings(codec) == {"modality": modality}


# A run of its own.


def test_it_is_resumed_without_the_other_run_as_if_undisturbed(recipe: Recipe, source: Path, tmp_path: Path) -> None:
    moved, undisturbed = shutil.copytree(source, tmp_path / "moved"), tmp_path / "undisturbed"
    network = PerceiverARConfig.load(source).replace(context_length=64, mlp_dropout=0.1)
    optim = OptimConfig(schedule="constant", warmup=0.0, ema=0.9)
    recipe = replace(recipe, init_from=str(moved), model=network, optim=optim, max_steps=12)
    train(replace(recipe, out=str(undisturbed)))
    assert main(["train", "--config", str(undisturbed / "recipe.yaml"), "--max_steps=5", "--out", recipe.out]) == 0
    shutil.rmtree(moved)
    assert train(recipe, resume=True)["steps"] == 12
    assert_same_parameters(recipe.out, undisturbed)
    assert Run(recipe.out).recipe() == replace(Run(undisturbed).recipe(), out=recipe.out)


def test_on_resuming_only_the_place_that_it_came_from_can_be_what_it_was(start: tuple[Run, dict[str, Any]]) -> None:
    run, summary = start
    kept = run.recipe()
    left_out = replace(Recipe(out="x"), **{**vars(kept), "model": Recipe(out="x").model, "modality": "auto"})
    assert train(left_out, resume=True) == summary
    for place in (None, "elsewhere"):
        with pytest.raises(InputError, match=f"init_from changed from {kept.init_from!r} to"):
            train(replace(kept, init_from=place), resume=True)


def test_it_says_where_it_comes_from(
    start: tuple[Run, dict[str, Any]], source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, _ = start
    assert f"started from {source}" in (run.path / "report.html").read_text()
    write_card(run, "me/letters")
    assert "| started from | `run` |" in (run.path / "README.md").read_text()
    capsys.readouterr()
    assert main(["info", str(run.path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["started_from"] == str(source)


# What is wrong is said before anything is made.


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda run: shutil.rmtree(run), r"init_from is '.*copy', and there is no such run.*`hf download"),
        (lambda run: (run / "config.json").write_text("{"), r"config\.json is damaged"),
        (lambda run: (run / "config.json").unlink(), r"config\.json: no such file"),
        (lambda run: (run / "codec.json").unlink(), r"codec\.json does not exist"),
        (lambda run: (run / "tokenizer.json").write_text("{"), r"tokenizer\.json is not a tokenizer\.json"),
        (lambda run: (run / "model.safetensors").unlink(), r"model\.safetensors: no such file"),
        (lambda run: (run / "model.safetensors").write_bytes(b"x" * 99), r"model\.safetensors is damaged"),
        (lambda run: (run / "recipe.yaml").write_text("]"), r"recipe\.yaml is damaged"),
    ],
)
def test_a_run_that_is_missing_or_damaged_is_named_and_nothing_is_made(
    recipe: Recipe, source: Path, tmp_path: Path, damage: Any, says: str
) -> None:
    copy = shutil.copytree(source, tmp_path / "copy")
    damage(copy)
    with pytest.raises(InputError, match=says) as error:
        train(replace(recipe, init_from=str(copy)))
    assert "\n" not in str(error.value)
    assert not Path(recipe.out).exists()


def test_a_run_cannot_start_from_itself(recipe: Recipe, source: Path) -> None:
    before = content(source)
    with pytest.raises(InputError, match=r"init_from and out are both .*: give the new run another --out"):
        train(replace(recipe, out=f"{source}/../run"))
    assert content(source) == before


def test_data_that_cannot_be_read_leaves_nothing(recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "picture.txt").write_bytes(b"\x89PNG\r\n\x1a\n\xff\xfe" * 100)
    says = "is a picture, not UTF-8 text; leave it out, or use a run that was trained with --modality bytes"
    with pytest.raises(InputError, match=says):
        train(replace(recipe, paths=(str(tmp_path / "picture.txt"),)))
    assert not Path(recipe.out).exists()

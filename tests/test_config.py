"""Settings are checked when they are made, survive JSON and YAML, and cannot change afterwards."""

import dataclasses
import inspect
import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st
from reference import configs

from perceiver_ar.config import (
    PRESETS,
    DataConfig,
    OptimConfig,
    PerceiverARConfig,
    Recipe,
    TrainerConfig,
    dump_yaml,
    load_yaml,
    parse_duration,
)
from perceiver_ar.errors import InputError
from perceiver_ar.run import Run

GROUPS = {"model": PerceiverARConfig, "data": DataConfig, "optim": OptimConfig, "trainer": TrainerConfig}


def refusal(function: Any, *args: Any, **kwargs: Any) -> str:
    with pytest.raises(InputError) as error:
        function(*args, **kwargs)
    message = str(error.value)
    assert "\n" not in message
    return message


# The network's settings.


@settings(max_examples=60)
@given(config=configs())
def test_settings_survive_json(config: PerceiverARConfig) -> None:
    text = config.to_json()
    again = PerceiverARConfig.from_dict(json.loads(text))
    assert again == config
    assert hash(again) == hash(config)
    assert again.to_json() == text
    assert json.loads(text)["model_type"] == "perceiver_ar"


@settings(max_examples=20)
@given(config=configs())
def test_settings_survive_yaml_where_tuples_are_lists(config: PerceiverARConfig) -> None:
    settings_ = yaml.safe_load(yaml.safe_dump(json.loads(config.to_json())))
    again = PerceiverARConfig.from_dict(settings_)
    assert again == config
    assert isinstance(again.cross_layers, tuple)
    assert isinstance(again.index_dims, tuple)


def test_settings_load_from_a_file_or_its_directory(tmp_path: Path) -> None:
    config = PerceiverARConfig(dim=24, num_heads=3, cross_layers=(0, 3))
    (tmp_path / "config.json").write_text(config.to_json())
    assert PerceiverARConfig.load(tmp_path) == config
    assert PerceiverARConfig.load(str(tmp_path / "config.json")) == config


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"3", b"\xff\xfe", b'{"dim": }'])
def test_a_damaged_file_is_named(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "config.json"
    file.write_bytes(content)
    message = refusal(PerceiverARConfig.load, tmp_path)
    assert str(file) in message
    assert "damaged" in message


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    assert str(tmp_path / "config.json") in refusal(PerceiverARConfig.load, tmp_path / "config.json")


def test_unknown_settings_are_all_named(tmp_path: Path) -> None:
    message = refusal(PerceiverARConfig.from_dict, {"dim": 64, "depth": 3, "width": 4}, where="here.json")
    assert message == "here.json: unknown settings depth, width"


def test_what_transformers_adds_on_saving_is_no_unknown_setting() -> None:
    added = {"architectures": ["X"], "transformers_version": "5.0", "torch_dtype": "float32", "dtype": "float32"}
    assert PerceiverARConfig.from_dict({"dim": 64, **added}) == PerceiverARConfig(dim=64)


def test_another_kind_of_model_is_refused_by_name() -> None:
    message = refusal(PerceiverARConfig.from_dict, {"model_type": "llama"}, where="here.json")
    assert message.startswith("here.json: ")
    assert "'llama'" in message


@pytest.mark.parametrize(
    ("wrong", "parts"),
    [
        ({"vocab_size": 0}, ["vocab_size is 0", "at least 1"]),
        ({"context_length": 0}, ["context_length is 0", "at least 1"]),
        ({"num_latents": 0}, ["num_latents is 0", "at least 1"]),
        ({"dim": -8}, ["dim is -8", "at least 1"]),
        ({"num_heads": 0}, ["num_heads is 0", "at least 1"]),
        ({"num_layers": -1}, ["num_layers is -1", "at least 0"]),
        ({"num_latents": 65, "context_length": 64}, ["65", "64", "lower num_latents or raise context_length"]),
        ({"dim": 100, "num_heads": 8}, ["dim 100", "num_heads 8", "head_dim"]),
        ({"cross_num_heads": 3}, ["dim 512", "cross_num_heads 3", "cross_head_dim"]),
        ({"head_dim": 0}, ["head_dim is 0", "at least 1"]),
        ({"head_dim": -2}, ["head_dim is -2", "at least 1"]),
        ({"embed_dim": 0}, ["embed_dim is 0", "at least 1"]),
        ({"cross_num_heads": 0}, ["cross_num_heads is 0", "at least 1"]),
        ({"cross_head_dim": 0}, ["cross_head_dim is 0", "at least 1"]),
        ({"cross_mlp_ratio": 0.0}, ["cross_mlp_ratio is 0.0", "positive"]),
        ({"mlp_ratio": -1.0}, ["mlp_ratio is -1.0", "positive"]),
        ({"mlp_ratio": math.inf}, ["mlp_ratio is inf", "finite"]),
        ({"cross_mlp_ratio": math.inf}, ["cross_mlp_ratio is inf", "finite"]),
        ({"prefix_dropout": 1.0}, ["prefix_dropout is 1.0", "[0, 1)"]),
        ({"attention_dropout": -0.1}, ["attention_dropout is -0.1", "[0, 1)"]),
        ({"mlp_dropout": math.nan}, ["mlp_dropout is nan", "[0, 1)"]),
        ({"rotary_fraction": 1.1}, ["rotary_fraction is 1.1", "[0, 1]"]),
        ({"rotary_heads_fraction": -1}, ["rotary_heads_fraction is -1", "[0, 1]"]),
        ({"cross_layers": (0, 9)}, ["cross_layers has 9", "num_layers 8", "0 ... 8"]),
        ({"cross_layers": (-1,)}, ["cross_layers has -1", "0 ... 8"]),
        ({"cross_layers": (3, 0)}, ["cross_layers is (3, 0)", "rising order"]),
        ({"embed_dim": 64}, ["embed_dim 64", "dim 512", "query_proj"]),
        (
            {"embed_dim": 64, "query_proj": True, "latent_keys": "query", "local_context": 1},
            ["embed_dim 64", "latent_keys 'context'"],
        ),
        ({"embed_dim": 64, "query_proj": True, "tie_embeddings": True}, ["embed_dim 64", "tie_embeddings"]),
        ({"query_mlp_layers": -1}, ["query_mlp_layers is -1", "at least 0"]),
        ({"query_mlp_activation": "swish"}, ["query_mlp_activation is 'swish'", "must be 'relu2' or 'relu' or 'gelu'"]),
        ({"learned_queries": "shared", "query_proj": True}, ["learned_queries is 'shared'", "query_proj"]),
        ({"latents_per_position": 0}, ["latents_per_position is 0", "at least 1"]),
        ({"latents_per_position": 2, "latent_keys": "query"}, ["latents_per_position is 2", "latent_keys 'context'"]),
        ({"local_context": 0}, ["local_context is 0", "at least 1"]),
        ({"latent_keys": "query"}, ["local_context is 4", "latent_keys 'context'", "set it to 1"]),
        ({"index_dims": (64, 64)}, ["index_dims is (64, 64)", "set position_table"]),
        # Settings that would fail later, or silently compute something else:
        ({"rotary_base": 0.0}, ["rotary_base is 0.0", "positive"]),
        ({"rotary_layers": -1}, ["rotary_layers is -1", "at least 0"]),
        ({"index_dims": (0, 64), "position_table": "learned"}, ["index_dims is (0, 64)", "at least 1"]),
        ({"dim": 15, "num_heads": 3, "position_table": "sinusoidal"}, ["15", "sinusoidal", "even"]),
        ({"dim": 4, "num_heads": 1, "mlp_ratio": 0.1}, ["mlp_ratio is 0.1", "dim"]),
    ],
    ids=lambda value: ",".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else "",
)
def test_settings_that_cannot_work_are_refused_with_value_and_remedy(wrong: dict[str, Any], parts: list[str]) -> None:
    message = refusal(PerceiverARConfig, **wrong)
    for part in parts:
        assert part in message
    assert refusal(PerceiverARConfig.from_dict, json.loads(json.dumps(wrong)), where="a.json").startswith("a.json: ")


@pytest.mark.parametrize(
    "wrong", [{"dim": "512"}, {"dim": 64.5}, {"num_layers": None}, {"cross_layers": 3}, {"cross_layers": ["a"]}]
)
def test_values_of_the_wrong_type_are_refused_by_name(wrong: dict[str, Any]) -> None:
    message = refusal(PerceiverARConfig.from_dict, wrong, where="a.json")
    assert message.startswith("a.json: ")
    assert next(iter(wrong)) in message


@pytest.mark.parametrize("name", PRESETS)
def test_presets_build_and_take_settings_on_top(name: str) -> None:
    config = PerceiverARConfig.preset(name)
    assert config == PerceiverARConfig(**PRESETS[name])
    assert PerceiverARConfig.preset(name, dim=64, num_layers=3) == config.replace(dim=64, num_layers=3)
    assert PerceiverARConfig.preset(name, norm="layernorm").norm == "layernorm"


def test_an_unknown_preset_is_refused_with_the_choices() -> None:
    message = refusal(PerceiverARConfig.preset, "gpt")
    assert "'gpt'" in message
    assert all(name in message for name in PRESETS)


def test_the_default_preset_is_the_defaults() -> None:
    assert PerceiverARConfig.preset("default") == PerceiverARConfig()


@settings(max_examples=40)
@given(config=configs())
def test_sizes_left_out_have_the_documented_defaults(config: PerceiverARConfig) -> None:
    assert config.width_embed == (config.dim if config.embed_dim is None else config.embed_dim)
    assert config.width_head == (config.dim // config.num_heads if config.head_dim is None else config.head_dim)
    assert config.heads_cross == (config.num_heads if config.cross_num_heads is None else config.cross_num_heads)
    if config.cross_head_dim is not None:
        assert config.width_head_cross == config.cross_head_dim
    elif config.head_dim is not None:
        assert config.width_head_cross == config.head_dim
    else:
        assert config.width_head_cross * config.heads_cross == config.dim
    if config.position_table == "none":
        assert config.table_sizes == ()
        assert config.max_positions is None
    else:
        assert config.table_sizes == (config.index_dims or (config.context_length,))
        assert config.max_positions == math.prod(config.table_sizes)


@pytest.mark.parametrize("config", [PerceiverARConfig(), *(group() for group in GROUPS.values()), Recipe(out="run")])
def test_settings_are_frozen(config: Any) -> None:
    for entry in dataclasses.fields(config):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(config, entry.name, getattr(config, entry.name))


@pytest.mark.parametrize("group", [*GROUPS.values(), Recipe])
def test_every_setting_has_a_docstring_for_the_help(group: type) -> None:
    body = inspect.getsource(group)
    for entry in dataclasses.fields(group):
        if not dataclasses.is_dataclass(entry.type):
            assert re.search(rf'\n    {entry.name}: [^\n]*\n    """', body), entry.name


# A whole run's settings.

RECIPE = Recipe(
    paths=("a", "b"),
    out="run",
    max_steps=5,
    model=PerceiverARConfig(dim=64, num_heads=2, cross_layers=(0, 2)),
    data=DataConfig(validation=("c",), bpe_vocab_size=300),
    optim=OptimConfig(name="adamw", betas=(0.8, 0.9)),
    trainer=TrainerConfig(micro_batch_size=2, checkpoint_every="1m30s"),
)


def test_a_recipe_survives_yaml() -> None:
    text = yaml.safe_dump(RECIPE.to_dict(), sort_keys=False)
    again = Recipe.from_dict(yaml.safe_load(text))
    assert again == RECIPE
    assert yaml.safe_dump(again.to_dict(), sort_keys=False) == text
    assert isinstance(again.optim.betas, tuple)
    assert isinstance(again.data.validation, tuple)


@pytest.mark.parametrize(
    ("text", "value"),
    [("2e-2", 0.02), ("1e-3", 0.001), ("-1.5E+2", -150.0), (".5", 0.5), ("1_000", 1000), ("0", 0), ("true", True),
     ("~", None), ("1:30", "1:30"), ("010", "010"), ("2024-01-31", "2024-01-31"), ("1.2.3", "1.2.3")],
)  # fmt: skip
def test_numbers_in_settings_are_those_of_people(text: str, value: Any) -> None:
    found = load_yaml(f"x: {text}")["x"]
    assert found == value and type(found) is type(value)


@given(st.text() | st.from_regex(r"[-+0-9.:eE_]{1,8}", fullmatch=True))
@example("1e3")
@example("d\udcff")
@example("\x85")
@example("a\u2028\u2029b")
def test_text_in_settings_survives_and_other_readers_see_text(text: str) -> None:
    written = dump_yaml({"text": text})
    assert load_yaml(written) == yaml.safe_load(written) == {"text": text}
    written.encode()


def test_one_path_to_hold_out_needs_no_list() -> None:
    assert DataConfig(validation="held/out") == DataConfig(validation=("held/out",))


@pytest.mark.parametrize(
    "wrong",
    [
        {"color": 1},
        {"model": {"depth": 1}},
        {"data": {"depth": 1}},
        {"optim": {"depth": 1}},
        {"trainer": {"depth": 1}},
        {"trainer": {"batch_size": 0}},
        {"model": {"dim": 0}},
        {"model": 3},
    ],
)
def test_what_does_not_belong_in_a_recipe_is_refused_with_its_place(wrong: dict[str, Any]) -> None:
    message = refusal(Recipe.from_dict, {"out": "run", **wrong}, where="recipe.yaml")
    assert message.startswith("recipe.yaml: ")
    name, value = next(iter(wrong.items()))
    assert (next(iter(value)) if isinstance(value, dict) else name) in message


@pytest.mark.parametrize(
    ("group", "wrong", "parts"),
    [
        (DataConfig, {"validation_fraction": 1.0}, ["data.validation_fraction is 1.0", "[0, 1)"]),
        (DataConfig, {"split_on": ""}, ["data.split_on", "leave it out"]),
        (DataConfig, {"bpe_vocab_size": 256}, ["data.bpe_vocab_size is 256", "more than 256"]),
        (DataConfig, {"bpe_vocab_size": 300, "tokenizer": "t"}, ["tokenizer", "bpe_vocab_size", "choose one"]),
        (OptimConfig, {"lr": -1.0}, ["optim.lr is -1.0", "at least 0"]),
        (OptimConfig, {"muon_lr": math.nan}, ["optim.muon_lr is nan"]),
        (OptimConfig, {"weight_decay": -0.1}, ["optim.weight_decay is -0.1"]),
        (OptimConfig, {"grad_clip": -1}, ["optim.grad_clip is -1"]),
        (OptimConfig, {"warmup": 1.5}, ["optim.warmup is 1.5", "[0, 1]"]),
        (OptimConfig, {"decay": -1}, ["optim.decay is -1", "[0, 1]"]),
        (OptimConfig, {"momentum": 2}, ["optim.momentum is 2", "[0, 1]"]),
        (TrainerConfig, {"batch_size": 0}, ["trainer.batch_size is 0", "at least 1"]),
        (TrainerConfig, {"micro_batch_size": 0}, ["trainer.micro_batch_size is 0", "at least 1"]),
        (TrainerConfig, {"batch_size": 8, "micro_batch_size": 3}, ["8", "micro_batch_size 3", "multiple"]),
        (TrainerConfig, {"prefix_ranks": 0}, ["trainer.prefix_ranks is 0", "at least 1"]),
        (TrainerConfig, {"devices": 4, "prefix_ranks": 3}, ["trainer.prefix_ranks is 3", "devices 4"]),
        (
            TrainerConfig,
            {"batch_size": 6, "devices": 8, "prefix_ranks": 2},
            ["trainer.batch_size 6", "devices 8 / prefix_ranks 2"],
        ),
        (TrainerConfig, {"prefix_growth": 2}, ["trainer.prefix_growth is 2", "[0, 1]"]),
        (OptimConfig, {"z_loss": -1.0}, ["optim.z_loss is -1.0", "at least 0"]),
        (
            Recipe,
            {"out": "run", "optim": OptimConfig(label_smoothing=0.999)},
            ["optim.label_smoothing is 0.999", "256 ids", "0.9961"],
        ),
        (
            Recipe,
            {
                "out": "run",
                "model": PerceiverARConfig(attention_dropout=0.1),
                "trainer": TrainerConfig(devices=2, prefix_ranks=2),
            },
            ["model.attention_dropout is 0.1", "trainer.prefix_ranks to 1"],
        ),
        (TrainerConfig, {"evaluations": -1}, ["trainer.evaluations is -1"]),
        (TrainerConfig, {"sample_tokens": -1}, ["trainer.sample_tokens is -1"]),
        (TrainerConfig, {"evaluation_tokens": 1}, ["trainer.evaluation_tokens is 1", "at least 2"]),
        (TrainerConfig, {"checkpoint_every": "soon"}, ["trainer.checkpoint_every is 'soon'", "90s"]),
        (Recipe, {}, ["out is missing", "--out"]),
        (Recipe, {"out": "run", "max_steps": 0}, ["max_steps is 0", "at least 1"]),
        (Recipe, {"out": "run", "max_time": "5 parsecs"}, ["max_time is '5 parsecs'", "5m"]),
    ],
)
def test_settings_of_a_run_that_cannot_work_are_refused_with_value_and_remedy(
    group: type, wrong: dict[str, Any], parts: list[str]
) -> None:
    message = refusal(group, **wrong)
    for part in parts:
        assert part in message


@pytest.mark.parametrize("group", [*GROUPS.values(), Recipe])
def test_every_choice_is_checked(group: type) -> None:
    defaults = {"out": "run"} if group is Recipe else {}
    for name, kind in get_type_hints(group).items():
        if get_origin(kind) is Literal:
            message = refusal(group, **{**defaults, name: "nonsense"})
            assert name in message
            assert all(str(choice) in message for choice in get_args(kind))


def test_a_run_without_a_limit_takes_ten_minutes() -> None:
    assert Recipe(out="run").max_seconds == 600
    assert Recipe(out="run", max_steps=3).max_seconds is None
    assert Recipe(out="run", max_steps=3, max_time="1h").max_seconds == 3600


def test_the_limits_of_a_run_are_told() -> None:
    assert Recipe(out="run", max_steps=1000, max_time="3m").limits == "1,000 steps or 3m"
    assert Recipe(out="run").limits == "10m"
    assert Recipe(out="run", max_steps=7).limits == "7 steps"


@given(days=st.integers(0, 9), hours=st.integers(0, 99), minutes=st.integers(0, 99), seconds=st.integers(0, 999))
def test_durations_add_up(days: int, hours: int, minutes: int, seconds: int) -> None:
    parts = zip((days, hours, minutes, seconds), "dhms", strict=True)
    text = "".join(f"{n}{unit}" for n, unit in parts if n)
    expected = ((days * 24 + hours) * 60 + minutes) * 60 + seconds
    if expected:
        assert parse_duration(text, "max_time") == expected


@pytest.mark.parametrize("text", ["", "5", "m", "-5m", "5m3", "3s5m", "0s", "1.5m", "five minutes", "5mm"])
def test_what_is_no_duration_is_refused_with_an_example(text: str) -> None:
    assert repr(text) in refusal(parse_duration, text, "max_time")


@pytest.mark.parametrize("word", ["none", "null", None])
def test_a_limit_of_time_can_be_taken_back(word: str | None) -> None:
    assert Recipe(out="x", max_time=word, max_steps=7).max_seconds is None
    assert Recipe(out="x", max_time=word).max_time == "10m"  # with neither


@pytest.mark.parametrize(
    ("model", "blocks"),
    [
        ({"context_length": 1024, "num_latents": 128}, 4),
        ({"context_length": 1024, "num_latents": 256}, 2),
        ({"context_length": 1024, "num_latents": 1024}, 1),
        ({"context_length": 1024, "num_latents": 128, "prefix_dropout": 0.1}, 1),
        ({"context_length": 1024, "num_latents": 128, "positions_from_end": True}, 1),
    ],
)
def test_windows_have_four_blocks_where_there_is_room_for_them(model: dict[str, Any], blocks: int) -> None:
    recipe = Recipe(out="x", model=PerceiverARConfig(**model))
    assert recipe.blocks == blocks and recipe.window_latents == blocks * model["num_latents"]
    assert replace(recipe, trainer=TrainerConfig(blocks=3)).blocks == 3


def test_a_file_that_does_not_name_the_local_context_is_of_a_network_without(tmp_path: Path) -> None:
    config = PerceiverARConfig(dim=64, local_context=1)
    settings = json.loads(config.to_json())
    del settings["local_context"]
    (tmp_path / "config.json").write_text(json.dumps(settings))
    assert PerceiverARConfig.load(tmp_path) == config
    run, recipe = Run(tmp_path), Recipe(out="x", model=config, trainer=TrainerConfig(blocks=1))
    run.write_recipe(recipe)
    written = yaml.safe_load(run.recipe_file.read_text())
    del written["model"]["local_context"], written["trainer"]["blocks"]
    run.recipe_file.write_text(yaml.safe_dump(written))
    assert run.recipe() == recipe

"""The verbs convert and export, on checkpoints that the other implementations' own code wrote.

They are in tests/golden/checkpoints, with what that code computes from them in expected.npz.
"""

import json
import os
import pickle
import shutil
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from recorded import FLOAT32, GOLDEN, assert_close
from safetensors.torch import load_file, save_file
from torch import Tensor

from perceiver_ar import PerceiverAR, PerceiverARConfig, Run
from perceiver_ar.cli import main
from perceiver_ar.compat import lucidrains
from perceiver_ar.compat.google import from_trailing_zeros

FILES = GOLDEN / "checkpoints"
ASKED = {
    "krasserm": [],
    "lucidrains": ["--cross_attn_seq_len", "20", "--heads", "2"],
    "google": ["--settings", "random_mirrored_32", "--num_cross_attend_heads", "4", "--num_transformer_heads", "2"],
}
KRASSERM = {
    "krasserm/clm_pytorch_bin": "clm",
    "krasserm/clm_safetensors": "clm",
    "krasserm/lightning/clm_cli_weights_only.ckpt": "clm",
    "krasserm/sam_safetensors": "sam",
    "krasserm/lightning/clm_script_full.ckpt": "full",
}
LUCIDRAINS = {"lucidrains/model.pt": "logits", "lucidrains/wrapper.pt": "wrapper_logits"}
GOOGLE = ["google/step_40", "google/checkpoint_flatmapping.dill", "google/checkpoint_modern.dill", "google/params.npz"]
SMALL = {"dim": 8, "depth": 2, "max_seq_len": 12, "cross_attn_seq_len": 4}
ALL = [*KRASSERM, *LUCIDRAINS, *GOOGLE]


def expected(name: str) -> dict[str, Tensor]:
    arrays = np.load(FILES / name / "expected.npz", allow_pickle=False)
    return {key: torch.from_numpy(arrays[key]) for key in arrays.files}


def convert(checkpoint: str | Path, out: Path, *options: str) -> int:
    """By the command; `checkpoint` is a path that begins with the format's name in FILES, or any other."""
    form = Path(checkpoint).parts[0] if not Path(checkpoint).is_absolute() else options[0]
    options = options[Path(checkpoint).is_absolute() :]
    return main(["convert", form, str(FILES / checkpoint), "--out", str(out), *ASKED[form], *options])


def content(directory: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in directory.iterdir()}


def assert_refused(capsys: pytest.CaptureFixture[str], argv: list[object], *says: str) -> None:
    """Exit status 2, one line on stderr that says all this, and nothing on stdout."""
    capsys.readouterr()
    status = main([str(word) for word in argv])
    out, err = capsys.readouterr()
    assert (status, out, err.count("\n")) == (2, "", 1), (status, out, err)
    assert all(words in err for words in says), err


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A converted run for each checkpoint, made when first asked for."""
    folder = tmp_path_factory.mktemp("runs")

    def run(checkpoint: str) -> Path:
        out = folder / checkpoint.replace("/", "-")
        if not out.exists():
            assert convert(checkpoint, out) == 0
        return out

    return run


# In, with one command.


@pytest.mark.parametrize("checkpoint", KRASSERM)
def test_krasserms_checkpoints_give_their_logits_and_tokens(checkpoint: str, runs: Callable[..., Path]) -> None:
    data = expected("krasserm")
    of = {key.split("/")[1]: value for key, value in data.items() if key.startswith(f"{KRASSERM[checkpoint]}/")}
    model = Run(runs(checkpoint)).model()
    tokens, mask, P = of["tokens"], of["attention_mask"].bool(), int(of["prefix_len"])
    assert_close(model(tokens, P, mask=mask), of["logits"], FLOAT32)
    short = tokens[:1, : model.config.context_length - 3]
    assert_close(model(short, int(of["short_prefix_len"])), of["short_logits"], FLOAT32)
    row, mask = of["prompt"], of["prompt_attention_mask"].bool()
    P = row.shape[1] - int(of["num_latents"])
    steps = int(of["generated_until_max_latents"])
    for _ in range(steps):
        row = torch.cat([row, model(row, P, mask=mask)[:, -1:].argmax(-1)], dim=1)
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
    assert torch.equal(row[:, -steps:], of["generated"][:, :steps])


@pytest.mark.parametrize("checkpoint", LUCIDRAINS)
def test_lucidrains_checkpoints_give_their_logits_and_tokens(checkpoint: str, runs: Callable[..., Path]) -> None:
    data, model = expected("lucidrains"), Run(runs(checkpoint)).model()
    assert_close(model(data["tokens"]), data[LUCIDRAINS[checkpoint]], FLOAT32)
    if checkpoint.endswith("model.pt"):
        assert_close(model(data["short_tokens"], 20), data["short_logits"], FLOAT32)
        row, new = data["prompt"], data["generated"]
        for _ in range(new.shape[1]):
            row = torch.cat([row, model(row[:, -36:], 20)[:, -1:].argmax(-1)], dim=1)
        assert torch.equal(row[:, -new.shape[1] :], new)


@pytest.mark.parametrize("checkpoint", GOOGLE)
def test_googles_checkpoints_give_their_logits_and_tokens(checkpoint: str, runs: Callable[..., Path]) -> None:
    data, model = expected("google"), Run(runs(checkpoint)).model()
    tokens, mask, positions = from_trailing_zeros(data["tokens"].long(), data["input_idxs"].long())
    valid = data["latent_last_steps"] >= 0
    assert_close(model(tokens, mask=mask, positions=positions)[valid], data["logits"][valid], FLOAT32)
    events = data["sample_uncached_events"].long()
    for at in range(int(data["sample_prompt_len"]), events.shape[1]):
        assert torch.equal(model(events[:, :at], max(0, at - 16))[:, -1].argmax(-1), events[:, at])


def test_training_of_lucidrains_goes_on_from_its_checkpoint() -> None:
    data, arguments = expected("lucidrains"), json.loads((FILES / "lucidrains/args.json").read_text())
    checkpoint = torch.load(FILES / "lucidrains/wrapper.pt", weights_only=True)
    wrapper = lucidrains.AutoregressiveWrapper(lucidrains.PerceiverAR(**arguments | {"cross_attn_dropout": 0.0}))
    wrapper.load_state_dict(checkpoint["model"])
    optimizer = torch.optim.Adam(wrapper.parameters(), lr=1.0)
    optimizer.load_state_dict(checkpoint["optimizer"])
    losses = []
    for sequence in data["resume_sequences"]:
        loss = wrapper(sequence)
        loss.backward()
        losses.append(loss.detach())
        torch.nn.utils.clip_grad_norm_(wrapper.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
    assert_close(torch.stack(losses), data["resume_losses"], FLOAT32)
    assert_close(wrapper.net.eval()(data["tokens"]), data["resume_final_logits"], FLOAT32)


@pytest.mark.parametrize("checkpoint", ALL)
def test_a_converted_run_is_shown_and_saves_itself_byte_for_byte(
    checkpoint: str, runs: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = runs(checkpoint)
    capsys.readouterr()
    assert main(["info", str(run), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["parameters"] == Run(run).model().num_parameters()
    PerceiverAR.from_pretrained(run).save_pretrained(tmp_path)
    assert content(tmp_path) == {name: data for name, data in content(run).items() if name != "codec.json"}


@pytest.mark.parametrize("checkpoint", [name for name in ALL if "sam" not in name and "lucidrains" not in name])
def test_byte_vocabularies_come_with_their_codec(
    checkpoint: str, runs: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = str(runs(checkpoint))
    reserved, start = (6, ()) if checkpoint.startswith("krasserm") else (3, (2,))
    codec = Run(run).codec()
    assert codec.separator == start
    assert codec.encode(b"\x00A\xff").tolist() == [reserved, reserved + 65, reserved + 255]
    assert codec.decode([*range(reserved), reserved + 66]) == b"B"
    (tmp_path / "text").write_text("twenty-one characters")
    capsys.readouterr()
    assert main(["evaluate", run, str(tmp_path / "text"), "--json"]) == 0
    scored = json.loads(capsys.readouterr().out)
    assert scored["bits_per_byte"] == pytest.approx(scored["nats_per_token"] / np.log(2))
    out = tmp_path / "new"
    assert main(["generate", run, "--prompt", "Hi", "--max_new_tokens", "9", "--seed", "1", "--out", str(out)]) == 0
    assert 0 < len(out.read_bytes()) <= 9


def test_where_ids_have_no_known_meaning_the_run_says_so(
    runs: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    run = runs("krasserm/sam_safetensors")
    for verb in ("generate", "evaluate"):
        assert_refused(capsys, [verb, run], "codec.json does not exist", "does not say what its ids stand for")


def test_256_ids_of_lucidrains_are_bytes(tmp_path: Path) -> None:
    net = lucidrains.PerceiverAR(num_tokens=256, **SMALL, dim_head=32, heads=2)
    torch.save(net.state_dict(), tmp_path / "model.pt")
    options = ["--cross_attn_seq_len", "4", "--heads", "2", "--out", str(tmp_path / "run")]
    assert main(["convert", "lucidrains", str(tmp_path / "model.pt"), *options]) == 0
    assert Run(tmp_path / "run").codec().encode(b"A").tolist() == [65]


# What checkpoints do not tell is asked for, and what they tell is not.


@pytest.mark.parametrize(
    ("checkpoint", "says"),
    [
        ("lucidrains/model.pt", ["heads (one of 1, 2)", "cross_attn_seq_len", "below its max_seq_len 36"]),
        ("google/params.npz", ["max_context_length", "z_index_dim", "num_cross_attend_heads", "num_transformer_heads"]),
    ],
)
def test_what_a_checkpoint_does_not_tell_is_asked_for_by_name(
    checkpoint: str, says: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    form = checkpoint.split("/")[0]
    assert_refused(capsys, ["convert", form, FILES / checkpoint, "--out", tmp_path / "run"], *says)
    assert not (tmp_path / "run").exists()


def test_heads_that_only_fit_one_way_are_not_asked_for(tmp_path: Path) -> None:
    net = lucidrains.PerceiverAR(num_tokens=9, **SMALL, dim_head=80, heads=3)
    torch.save({"epoch": 3, "state_dict": net.state_dict()}, tmp_path / "model.pt")
    model = lucidrains.load_lucidrains(tmp_path / "model.pt", cross_attn_seq_len=4)
    assert model.config == net.model.config


def test_settings_of_google_come_from_a_file_too(tmp_path: Path, runs: Callable[..., Path]) -> None:
    out = tmp_path / "run"
    settings = str(FILES / "google/config.json")
    assert main(["convert", "google", str(FILES / "google/params.npz"), "--settings", settings, "--out", str(out)]) == 0
    assert content(out) == content(runs("google/params.npz"))


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ("nowhere.json", ["nowhere.json", "random_mirrored_131072"]),
        ('{"activation_name": "tanh"}', ["activation_name is 'tanh'"]),
        ('{"colour": 1}', ["colour", "no argument"]),
        ('{"num_cross_attend_heads": 3}', ["num_cross_attend_heads is 3", "width 8"]),
        ('{"additional_cross_attend_after_layers": [0]}', ["has 1 cross-attention layers", "1 additional"]),
        ('{"num_cross_attend_heads": 0}', ["num_cross_attend_heads is 0: it must be at least 1"]),
        ('{"num_transformer_heads": 0}', ["num_transformer_heads is 0: it must be at least 1"]),
        ('{"num_transformer_heads": "two"}', ["num_heads is 'two'"]),
        ('{"z_index_dim": [16]}', ["not of their PerceiverAR"]),
        ('{"perceiver_ar_kwargs": 3}', ["perceiver_ar_kwargs 3"]),
        ("[]", ["no JSON object"]),
        ("{", ["is damaged"]),
    ],
)
def test_settings_that_do_not_fit_are_refused(
    settings: str, says: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "settings.json"
    if settings.startswith(("{", "[")):
        sizes = {"max_context_length": 32, "z_index_dim": 16, "num_cross_attend_heads": 4, "num_transformer_heads": 2}
        file.write_text(json.dumps(sizes | json.loads(settings)) if settings.startswith('{"') else settings)
    argv = ["convert", "google", FILES / "google/params.npz", "--out", tmp_path / "run", "--settings"]
    assert_refused(capsys, [*argv, file if file.exists() else settings], *says)


def test_options_of_another_format_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["convert", "krasserm", FILES / "krasserm/clm_safetensors", "--out", tmp_path / "run", "--heads", "2"]
    assert_refused(capsys, argv, "--heads is no option of krasserm")


def test_a_safetensors_file_of_lucidrains_is_read(tmp_path: Path) -> None:
    state = torch.load(FILES / "lucidrains/model.pt", weights_only=True)
    save_file({f"net.{name}": tensor for name, tensor in state.items()}, tmp_path / "model.safetensors")
    model = lucidrains.load_lucidrains(tmp_path / "model.safetensors", cross_attn_seq_len=20, heads=2)
    data = expected("lucidrains")
    assert_close(model(data["tokens"]), data["logits"], FLOAT32)


def test_a_safetensors_file_without_settings_is_refused_as_that(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = shutil.copy(FILES / "krasserm/clm_safetensors/model.safetensors", tmp_path / "clm.safetensors")
    assert_refused(capsys, ["convert", "krasserm", file, "--out", tmp_path / "run"], "no hyper_parameters")


def more_in(form: str, folder: Path) -> tuple[Path, str]:
    """A checkpoint with more than the network in it, and the names of that."""
    if form == "lucidrains":
        state = torch.load(FILES / "lucidrains/model.pt", weights_only=True)
        state = {f"ema_model.{name}": tensor for name, tensor in state.items()}
        more = {"step": torch.tensor(3), "criterion.weight": torch.ones(5)}
        torch.save({"ema": state | more, "best": np.float64(1.5), "optimizer": {}}, folder / "file.pt")
        return folder / "file.pt", "step, criterion.weight"
    if form == "krasserm":
        checkpoint = torch.load(FILES / "krasserm/lightning/clm_cli_weights_only.ckpt", weights_only=True)
        checkpoint["state_dict"]["loss.weight"] = torch.ones(3)
        settings = checkpoint["hyper_parameters"]
        settings["vocab_size"] = np.int64(settings["vocab_size"])
        torch.save(checkpoint, folder / "file.ckpt")
        return folder / "file.ckpt", "loss.weight"
    params = dict(np.load(FILES / "google/params.npz"))
    np.savez(folder / "file.npz", **params, **{"critic/linear/w": np.ones((2, 2)), "global_step": np.int64(3)})
    return folder / "file.npz", "critic/linear/w, global_step"


@pytest.mark.parametrize("form", ASKED)
def test_what_is_no_part_of_the_network_is_left_out_and_named(
    form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], runs: Callable[..., Path]
) -> None:
    file, names = more_in(form, tmp_path)
    plain = {"lucidrains": "lucidrains/model.pt", "krasserm": "krasserm/clm_safetensors", "google": "google/params.npz"}
    run = runs(plain[form])
    capsys.readouterr()
    assert convert(file, tmp_path / "run", form) == 0
    assert f"{file}: left out {names}, not weights of the network\n" in capsys.readouterr().err
    assert content(tmp_path / "run") == content(run)


@pytest.mark.parametrize("prefix", ["net.", "module.net.", "_orig_mod.", "_orig_mod.module."])
@pytest.mark.parametrize("entry", [None, "model", "state_dict"])
def test_prefixes_and_wrappings_do_not_matter(prefix: str, entry: str | None, tmp_path: Path) -> None:
    state = torch.load(FILES / "lucidrains/model.pt", weights_only=True)
    state = OrderedDict((prefix + name, tensor) for name, tensor in state.items())
    torch.save({entry: state, "step": 3} if entry else state, tmp_path / "model.pt")
    model = lucidrains.load_lucidrains(tmp_path / "model.pt", cross_attn_seq_len=20, heads=2)
    data = expected("lucidrains")
    assert_close(model(data["tokens"]), data["logits"], FLOAT32)


# Wrong files: one line, exit status 2, nothing left behind.


@pytest.mark.parametrize("frequencies", [torch.tensor(1.0), torch.ones(999)], ids=["0-d", "too many"])
def test_frequencies_that_go_with_no_heads_are_refused(
    frequencies: torch.Tensor, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = torch.load(FILES / "lucidrains/model.pt", weights_only=True)
    torch.save({**state, "rotary_pos_emb.inv_freq": frequencies}, tmp_path / "model.pt")
    argv = ["convert", "lucidrains", tmp_path / "model.pt", "--out", tmp_path / "run", *ASKED["lucidrains"]]
    assert_refused(capsys, argv, "model.pt is damaged", f"{frequencies.numel()} rotary frequencies")


def damage(checkpoint: str, folder: Path, change: Callable[[bytes], bytes]) -> Path:
    """A copy of a checkpoint with its weights changed."""
    source, target = FILES / checkpoint, folder / Path(checkpoint).name
    if source.is_dir():
        shutil.copytree(source, target)
        [weights] = [file for file in target.iterdir() if file.suffix in (".bin", ".safetensors", ".dill")]
    else:
        shutil.copy(source, target)
        weights = target
    weights.write_bytes(change(weights.read_bytes()))
    return target


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.9, 0.999])
@pytest.mark.parametrize("checkpoint", ALL)
def test_a_truncated_checkpoint_is_refused(
    checkpoint: str, share: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damaged = damage(checkpoint, tmp_path, lambda data: data[: int(share * len(data))])
    form = checkpoint.split("/")[0]
    assert_refused(capsys, ["convert", form, damaged, "--out", tmp_path / "run", *ASKED[form]], str(damaged))
    assert [file.name for file in tmp_path.iterdir()] == [damaged.name]


@pytest.mark.parametrize("form", ASKED)
@pytest.mark.parametrize("foreign", ["random", "text", "nothing", "folder", "run", "pickle", "state", "npz", "missing"])
def test_a_foreign_file_is_refused(
    form: str, foreign: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], runs: Callable[..., Path]
) -> None:
    file = tmp_path / "file"
    match foreign:
        case "random":
            file.write_bytes(np.random.default_rng(0).bytes(1000))
        case "text":
            file.write_text("once upon a time")
        case "nothing":
            file.touch()
        case "folder":
            file.mkdir()
        case "run":
            file = runs("lucidrains/model.pt")
        case "pickle":
            file.write_bytes(pickle.dumps({"params": [1, 2], "state_dict": 3}))
        case "state":
            torch.save({"state_dict": {"weight": torch.ones(2)}}, file)
        case "npz":
            file = tmp_path / "file.npz"
            np.savez(file, weight=np.ones(2))
    argv = ["convert", form, file, "--out", tmp_path / "run", *ASKED[form]]
    assert_refused(capsys, argv, str(file))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("form", ASKED)
def test_a_checkpoint_of_another_implementation_is_refused(
    form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in [name for name in ALL if not name.startswith(form)]:
        assert_refused(capsys, ["convert", form, FILES / name, "--out", tmp_path / "run", *ASKED[form]], name)
    assert not list(tmp_path.iterdir())


def test_missing_and_unknown_weights_are_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def assert_listed(form: str, file: Path, *says: str) -> None:
        assert_refused(capsys, ["convert", form, file, "--out", tmp_path / "run", *ASKED[form]], *says)

    state = torch.load(FILES / "lucidrains/model.pt", weights_only=True)
    del state["layers.1.1.4.weight"], state["to_logits.weight"]
    state["layers.9.colour"] = torch.ones(1)
    torch.save(state, tmp_path / "model.pt")
    assert_listed("lucidrains", tmp_path / "model.pt",
                  "missing: layers.1.1.4.weight, to_logits.weight; unknown: layers.9.colour")  # fmt: skip

    params = dict(np.load(FILES / "google/params.npz"))
    del params["perceiver_ar/~/self_attention_1/layer_norm/scale"]
    np.savez(tmp_path / "params.npz", **params)
    assert_listed("google", tmp_path / "params.npz", "missing: perceiver_ar/~/self_attention_1/layer_norm/scale")

    checkpoint = torch.load(FILES / "krasserm/lightning/clm_cli_weights_only.ckpt", weights_only=True)
    checkpoint["hyper_parameters"]["output_bias"] = False
    torch.save(checkpoint, tmp_path / "clm.ckpt")
    assert_listed("krasserm", tmp_path / "clm.ckpt", "unknown: output_adapter.bias")
    checkpoint["hyper_parameters"].update(output_bias=True, max_seq_len=33)
    torch.save(checkpoint, tmp_path / "clm.ckpt")
    assert_listed("krasserm", tmp_path / "clm.ckpt", "has shape (32, 16), not (33, 16)")


def test_a_place_that_is_taken_is_refused(
    runs: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/mine").touch()
    argv = ["krasserm", FILES / "krasserm/clm_safetensors", "--out", tmp_path / "run"]
    assert_refused(capsys, ["convert", *argv], "is there already")
    argv = ["krasserm", runs("krasserm/clm_safetensors"), "--out", tmp_path / "run"]
    assert_refused(capsys, ["export", *argv], "is there already")
    assert [file.name for file in (tmp_path / "run").iterdir()] == ["mine"]
    argv = ["lucidrains", runs("lucidrains/model.pt"), "--out", tmp_path / "run/mine"]
    assert_refused(capsys, ["export", *argv], "is there already")
    assert (tmp_path / "run/mine").read_bytes() == b""


# Pickles that would do something.


class Evil:
    """Unpickled, it makes a file."""

    def __init__(self, trace: Path):
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.trace}",)


def test_the_evil_pickle_of_these_tests_works(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Evil(tmp_path / "trace")))
    assert (tmp_path / "trace").exists()


@pytest.mark.parametrize(
    ("form", "name", "new"),
    [
        ("lucidrains", "model.pt", True),
        ("lucidrains", "model.pt", False),  # torch's old format
        ("krasserm", "model.ckpt", True),
        ("krasserm", "pytorch_model.bin", True),
        ("google", "checkpoint.dill", None),
        ("google", "params.npz", None),
    ],
)
def test_code_in_a_pickle_is_not_run(
    form: str, name: str, new: bool | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evil, file = Evil(tmp_path / "trace"), tmp_path / name
    shutil.copy(FILES / "krasserm/clm_pytorch_bin/config.json", tmp_path)
    if new is not None:
        torch.save({"state_dict": {}, "hyper_parameters": {}, "more": evil}, file, _use_new_zipfile_serialization=new)
    elif name.endswith(".npz"):
        np.savez(file, weight=np.array([evil], dtype=object))
    else:
        file.write_bytes(pickle.dumps({"params": {}, "more": evil}))
    assert_refused(capsys, ["convert", form, file, "--out", tmp_path / "run", *ASKED[form]], str(file))
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "trace").exists()


# Out.


def test_lucidrains_comes_back(runs: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    for name in ("a.pt", "b.pt"):
        assert main(["export", "lucidrains", str(runs("lucidrains/model.pt")), "--out", str(tmp_path / name)]) == 0
    assert (tmp_path / "a.pt").read_bytes() == (tmp_path / "b.pt").read_bytes()
    original = torch.load(FILES / "lucidrains/model.pt", weights_only=True)
    saved = torch.load(tmp_path / "a.pt", weights_only=True)
    assert list(saved) == list(original)
    assert all(torch.equal(saved[name], tensor) for name, tensor in original.items())
    arguments = json.loads(capsys.readouterr().out.split("\n}\n")[0] + "}")
    theirs = json.loads((FILES / "lucidrains/args.json").read_text())
    assert arguments.items() <= (theirs | {"cross_attn_dropout": 0.0}).items()


@pytest.mark.parametrize("checkpoint", ["krasserm/clm_safetensors", "krasserm/sam_safetensors"])
def test_krasserm_comes_back(checkpoint: str, runs: Callable[..., Path], tmp_path: Path) -> None:
    assert main(["export", "krasserm", str(runs(checkpoint)), "--out", str(tmp_path / "out")]) == 0
    original, saved = (load_file(folder / "model.safetensors") for folder in (FILES / checkpoint, tmp_path / "out"))
    assert saved.keys() == original.keys()
    assert all(torch.equal(saved[name], tensor) for name, tensor in original.items())
    theirs = json.loads((FILES / checkpoint / "config.json").read_text())
    ours = json.loads((tmp_path / "out/config.json").read_text())
    assert ours["model_config"] == theirs["model_config"]
    assert convert(tmp_path / "out", tmp_path / "again", "krasserm") == 0
    assert content(tmp_path / "again") == content(runs(checkpoint))


@pytest.mark.parametrize(
    ("preset", "form"), [(preset, form) for preset in ("lucidrains", "krasserm") for form in ("lucidrains", "krasserm")]
)
def test_a_model_of_ours_goes_out_where_the_package_can_compute_it(
    preset: str, form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = PerceiverARConfig.preset(preset, vocab_size=11, context_length=12, num_latents=5, dim=64, num_layers=2,
                                      num_heads=1, rotary_fraction=0.5)  # fmt: skip
    PerceiverAR(config).save_pretrained(tmp_path / "run")
    argv = ["export", form, tmp_path / "run", "--out", tmp_path / "out"]
    if preset != form:
        assert_refused(capsys, argv, "cannot compute what this model does", "tie_embeddings is")
        assert not (tmp_path / "out").exists()
    else:
        assert main([str(word) for word in argv]) == 0


@pytest.mark.parametrize("form", ["lucidrains", "krasserm"])
def test_a_model_with_our_defaults_is_refused_with_the_settings_in_the_way(
    form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    PerceiverAR(PerceiverARConfig(context_length=12, num_latents=5, dim=64, num_heads=1)).save_pretrained(
        tmp_path / "run"
    )
    argv = ["export", form, tmp_path / "run", "--out", tmp_path / "out"]
    assert_refused(capsys, argv, "qk_norm is True, not False", "activation is 'relu2', not 'gelu'")

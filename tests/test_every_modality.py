"""Every modality from a folder of files to results, through the command: train, evaluate, generate.

Damaged files lie among the good ones everywhere.
"""

import json
import os
import re
import shutil
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import mido
import numpy as np
import pytest
import soundfile
import torch
from helpers import SMALL, assert_refused, assert_same_parameters
from PIL import Image
from samples import write_music, write_numbers, write_picture, write_sound, write_words

from perceiver_ar import PerceiverAR, Run, evaluate, generate
from perceiver_ar.card import shared_files, write_card
from perceiver_ar.cli import main
from perceiver_ar.data.audio import NeuralCodec
from perceiver_ar.data.codec import Codec
from perceiver_ar.data.image import MISSING, ImageCodec
from perceiver_ar.data.tokens import TokenFile


class Modality(NamedTuple):
    write: Callable[[Path, int], None]
    ending: str
    options: list[str]
    results: list[str]
    """What `generate --out new` names its files, from a prompt."""
    unit: str
    """One that evaluations report."""


MIDI_FILES = ["new-continuation.mid", "new.mid", "new.png", "new.wav"]
PICTURES = ["new-1.png", "new-2.png", "new-3.png", "new-4.png", "new-grid.png"]
SOUNDS = ["new-prompt.wav", "new.png", "new.wav"]
IMAGE = ["--data.image_size=[6,6]"]
MODALITIES = {
    "performance": Modality(write_music, ".mid", [], MIDI_FILES, "note"),
    "remi": Modality(write_music, ".mid", ["--data.midi_tokens=remi"], MIDI_FILES, "second"),
    "rgb": Modality(write_picture, ".png", IMAGE, PICTURES, "dimension"),
    "palette": Modality(
        write_picture, ".png", [*IMAGE, "--data.image_colours=palette", "--data.palette_size=9"], PICTURES, "dimension"
    ),
    "mulaw": Modality(write_sound, ".wav", ["--data.sample_rate=4000"], SOUNDS, "second"),
    "neural": Modality(
        write_sound, ".wav", ["--data.audio_codec=dac", "--data.audio_weights=WEIGHTS"], SOUNDS, "second"
    ),
    "integers": Modality(write_numbers, ".npy", [], ["new.npy"], ""),
}
TEXT = Modality(write_words, ".txt", [], [], "")
"""Has tests of its own, but for those of its files."""


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small DAC with random weights."""
    from transformers import DacConfig, DacModel

    torch.manual_seed(0)
    sizes = {"downsampling_ratios": [4, 4], "upsampling_ratios": [4, 4], "sampling_rate": 8000}
    model = DacModel(DacConfig(encoder_hidden_size=8, decoder_hidden_size=32, n_codebooks=3, codebook_size=16, **sizes))
    model.save_pretrained(tmp_path_factory.mktemp("weights"))
    return tmp_path_factory.getbasetemp() / "weights0"


@pytest.fixture(scope="module", params=MODALITIES)
def trained(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, weights: Path
) -> tuple[Modality, Path, Path]:
    """A modality, its folder of files, and a run trained on it."""
    modality = MODALITIES[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    for number in range(6):
        modality.write(folder / f"{number}{modality.ending}", number)
    good = (folder / f"0{modality.ending}").read_bytes()
    (folder / f"cut{modality.ending}").write_bytes(good[: len(good) // 3] if modality.ending != ".wav" else good[:20])
    (folder / f"text{modality.ending}").write_bytes(b"no such thing")
    (folder / f"void{modality.ending}").write_bytes(b"")
    (folder / f"secret{modality.ending}.gz").write_bytes(b"no gzip")
    (folder / "README.md").write_text("about these files")
    out = folder.parent / f"{folder.name}-run"
    options = [option.replace("WEIGHTS", str(weights)) for option in modality.options]
    training = [*SMALL, "--max_steps=6", "--trainer.sample_tokens=30", "--data.validation_fraction=0.2"]
    assert main(["train", str(folder), "--out", str(out), *training, *options]) == 0
    return modality, folder, out


def codec_of(run: Path) -> Codec:
    return Run(run).codec()


def test_the_last_sample_of_pictures_is_whole(trained: tuple[Modality, Path, Path]) -> None:
    modality, _, run = trained
    if modality.ending != ".png":
        return
    picture = np.asarray(Image.open(run / "samples" / "step-000006.png"))
    assert (picture == MISSING).all(axis=-1).mean() < 0.1  # of 36 pixels, 30 tokens leave 26 so, or 6 with a palette


def test_damaged_files_are_skipped_counted_and_named_and_the_rest_is_used(
    trained: tuple[Modality, Path, Path], weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    modality, folder, run = trained
    files = [TokenFile.open(run / "tokens" / name) for name in ("train", "validation")]
    assert sum(file.num_documents for file in files) == 6
    capsys.readouterr()
    assert main(["evaluate", str(run), str(folder), "--max_tokens=100"]) == 0
    assert re.search(r"skipped \d of 11 files:\n(  .+\n)*  .*README\.md: ", capsys.readouterr().err)
    broken = folder / f"text{modality.ending}"
    options = [option.replace("WEIGHTS", str(weights)) for option in modality.options]
    assert_refused(capsys, "train", broken, "--out", tmp_path / "run", *SMALL, *options, says=broken)


def test_evaluation_is_that_of_the_naive_computation(
    trained: tuple[Modality, Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    modality, _, run = trained
    capsys.readouterr()
    assert main(["evaluate", str(run), "--json", "--stride=3", "--max_tokens=150"]) == 0
    result = json.loads(capsys.readouterr().out)
    model, codec = Run(run).model(), codec_of(run)
    tokens = TokenFile.open(run / "tokens" / "validation").tokens.astype(np.int64)
    N, T, length = model.config.num_latents, model.config.context_length, codec.document_length or len(tokens)
    nats, scored = 0.0, []
    for base in range(0, len(tokens), length):
        first = 1
        while first < length and (len(scored) < 150 or first > 1):
            end = min(length, max(first + 3, N + 1))
            start = max(0, end - 1 - T)
            for i in range(first, end):
                if codec.document_length is None and len(scored) == 150:
                    break
                context = torch.from_numpy(tokens[base + start : base + i])[None]
                with torch.no_grad():
                    logits = model(context, max(0, end - 1 - start - N))[0, -1]
                scored.append(int(tokens[base + i]))
                nats -= float(logits.log_softmax(-1)[scored[-1]])
            first = end if codec.document_length or len(scored) < 150 else length
    assert result["tokens"] == len(scored)
    assert result["nats_per_token"] == pytest.approx(nats / len(scored), rel=1e-4)
    if modality.unit:
        amount = codec.amounts(np.array(scored))[modality.unit]
        assert result[f"nats_per_{modality.unit}"] == pytest.approx(nats / amount, rel=1e-4)


def test_a_run_starts_from_another_one_with_its_codec(
    trained: tuple[Modality, Path, Path], weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    modality, folder, run = trained
    standing = ["--optim.lr=0", "--optim.muon_lr=0", "--max_steps=1", "--data.validation_fraction=0.2"]
    argv = ["train", str(folder), "--init_from", str(run), *SMALL[-7:-1], *standing]
    new = tmp_path / "new"
    assert main([*argv, "--out", str(new)]) == 0
    assert (new / "codec.json").read_bytes() == (run / "codec.json").read_bytes()
    assert_same_parameters(new, run)
    own = Run(new).recipe().modality
    other = "text" if own == "midi" else "midi"
    equal = [option.replace("WEIGHTS", str(weights)) for option in modality.options]
    says = f"but modality is '{other}' instead of '{own}': leave out modality or"  # and none of the equal settings
    assert_refused(capsys, *argv, *equal, "--modality", other, "--out", tmp_path / "other", says=says)


@pytest.mark.parametrize("temperature", ["0", "30"])
def test_generation_writes_files_and_every_id_is_allowed(
    trained: tuple[Modality, Path, Path], temperature: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    modality, folder, run = trained
    prompt = folder / f"3{modality.ending}"
    options = ["--max_new_tokens=60"] if codec_of(run).document_length is None else []
    keep = ["--keep=0.5"]
    capsys.readouterr()
    arguments = ["generate", str(run), "--prompt_file", str(prompt), "--temperature", temperature, *keep, *options]
    assert main([*arguments, "--seed=1", "--out", str(tmp_path / "new")]) == 0
    shown = capsys.readouterr()
    assert sorted(path.name for path in tmp_path.iterdir()) == modality.results
    assert sorted(shown.out.split()) == [str(tmp_path / name) for name in modality.results]
    for path in tmp_path.iterdir():
        if path.suffix == ".mid":
            mido.MidiFile(path)
        elif path.suffix == ".wav":
            assert len(soundfile.read(path)[0]) > 0
        elif path.suffix == ".png":
            with Image.open(path) as picture:
                picture.load()
        elif path.suffix == ".npy":
            assert np.load(path).max() < 40
        else:
            assert path.stat().st_size > 0
    for name in modality.results:
        mine = tmp_path / name
        mine.write_bytes(prompt.read_bytes())
        says = f"--out {mine} is among the files that are read: name another file"
        words = ("generate", run, "--prompt_file", mine, *keep, *options, "--out", tmp_path / "new")
        assert_refused(capsys, *words, says=says)
        assert mine.read_bytes() == prompt.read_bytes()


@pytest.mark.parametrize("trained", ["rgb", "palette", "neural"], indirect=True)
def test_no_id_is_out_of_its_channel_or_codebook(trained: tuple[Modality, Path, Path], tmp_path: Path) -> None:
    """By the order of the ids themselves, not by the codec's mask, at a temperature that makes all ids as likely."""
    run = trained[2]
    model, codec, count = Run(run).model(), codec_of(run), 150
    if isinstance(codec, ImageCodec):
        count = codec.num_pixel_values
    start = torch.from_numpy(codec.start().astype(np.int64))[None]
    settings: dict[str, Any] = {"num_samples": 4, "seed": 0, "allowed_next": codec.constraint()}
    new = generate(model, start, count, temperature=1e6, **settings).numpy()
    for row in new:
        if isinstance(codec, ImageCodec):  # each channel has all values; classes and start ids are none
            assert row.max() < codec.num_values
            continue
        assert isinstance(codec, NeuralCodec)
        ends = np.flatnonzero(row == codec.separator[0])
        for recording in np.split(row, ends):
            codes = recording[recording != codec.separator[0]]
            assert (codes // codec.codebook_size == np.arange(len(codes)) % codec.codebooks).all()
        lengths = np.diff(ends, prepend=-1) - 1
        assert (lengths > 0).all() and (lengths % codec.codebooks == 0).all()
    arguments = ["generate", str(run), "--temperature=1e6", "--seed=0", "--samples=4", "--ignore_end"]
    assert main([*arguments, f"--max_new_tokens={count}", "--out", str(tmp_path / "new")]) == 0
    for number, row in enumerate(new, 1):  # the command has drawn the very same
        assert (tmp_path / f"new-{number}{codec.ending}").read_bytes() == codec.decode(np.append(start, row))


UNREADABLE: dict[str, Callable[[Path], Any]] = {
    "locked": lambda path: path.chmod(0),
    "lost": lambda path: (path.unlink(), path.symlink_to(f"no {path.name}")),
    "loop": lambda path: (path.unlink(), path.symlink_to(path)),
}


@pytest.mark.usefixtures("bound_by_modes")
@pytest.mark.parametrize("name", ["performance", "rgb", "mulaw", "integers", "text"])  # one of each kind of files
def test_files_that_cannot_be_read_are_skipped_and_counted(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    modality, folder, run = (MODALITIES | {"text": TEXT})[name], tmp_path / "files", tmp_path / "run"
    (folder / f"inner{modality.ending}").mkdir(parents=True)  # named like a file
    for number, place in enumerate([folder, folder / f"inner{modality.ending}"]):
        modality.write(place / f"good{modality.ending}", number)
    for number, (kind, spoil) in enumerate(UNREADABLE.items()):
        for path in (folder / f"{kind}{modality.ending}", folder / kind):  # with its ending, and without
            modality.write(folder / f"new{modality.ending}", number)
            spoil((folder / f"new{modality.ending}").rename(path))
    training = [*SMALL, "--max_steps=1", "--data.validation_fraction=0", *modality.options]
    assert main(["train", str(folder), "--out", str(run), *training]) == 0
    assert "skipped 6 of 8 files" in capsys.readouterr().err
    assert TokenFile.open(run / "tokens" / "train").num_documents == 2
    for path in folder.iterdir():
        if path.name.split(".")[0] in UNREADABLE:
            assert_refused(capsys, "train", path, "--out", tmp_path / "other", *training, says=path)


def test_generation_starts_from_nothing_too(
    trained: tuple[Modality, Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, _, run = trained
    assert main(["generate", str(run), "--max_new_tokens=20", "--samples=2", "--out", str(tmp_path / "new")]) == 0
    assert len(list(tmp_path.iterdir())) >= 2
    assert_refused(capsys, "generate", run, "--prompt", "Once upon", says="Once upon")
    assert_refused(capsys, "generate", run, "--stop", "The end", says="--stop is text, which this run does not write")
    assert any((run / "samples").iterdir())  # those of training


def test_an_interrupt_keeps_what_was_drawn(
    trained: tuple[Modality, Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    modality, _, run = trained
    if modality is not MODALITIES["integers"]:  # one that ends by itself late, and is shown at once
        return
    capsys.readouterr()
    threading.Timer(1.0, os.kill, [os.getpid(), signal.SIGINT]).start()
    argv = ["generate", str(run), "--max_new_tokens=1000000", "--ignore_end", "--out", str(tmp_path / "new")]
    assert main(argv) == 130
    captured = capsys.readouterr()
    assert captured.out == f"{tmp_path / 'new.npy'}\n" and len(np.load(tmp_path / "new.npy")) > 0
    assert captured.err.splitlines()[-1].startswith("perceiver-ar: interrupted")


def test_info_shows_what_was_measured_and_nothing_else(
    trained: tuple[Modality, Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    modality, _, run = trained
    capsys.readouterr()
    assert main(["info", str(run)]) == 0
    shown = capsys.readouterr().out
    assert "None" not in shown and "nats per token" in shown
    assert ("bits per byte" in shown) == bool(codec_of(run).byte_lengths().any())
    assert ("bits per dimension" in shown) == (modality.unit == "dimension")


def test_the_files_that_are_pushed_are_a_run(
    trained: tuple[Modality, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trained[2]
    for name in shared_files(Run(run)):
        (tmp_path / "run" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(run / name, tmp_path / "run" / name)
    write_card(Run(tmp_path / "run"), "me/mine")
    [code] = re.findall(r"```python\n(.*?)```", (tmp_path / "run" / "README.md").read_text(), flags=re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(compile(code.replace('"mine"', '"run"'), "README.md", "exec"), {})
    assert (tmp_path / f"new{trained[0].ending}").stat().st_size > 0


def test_neural_codecs_keep_their_weights_in_the_run(trained: tuple[Modality, Path, Path]) -> None:
    codec = codec_of(trained[2])
    if isinstance(codec, NeuralCodec):
        assert (trained[2] / "neural_codec" / "model.safetensors").exists()


def test_a_mixed_folder_is_refused_with_counts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "mixed"
    folder.mkdir()
    write_music(folder / "a.mid", 0)
    write_picture(folder / "b.png", 0)
    write_picture(folder / "c.png", 1)
    assert_refused(
        capsys,
        "train",
        folder,
        "--out",
        tmp_path / "run",
        *SMALL,
        says=f"(2 image, such as {folder}/b.png, 1 midi, such as {folder}/a.mid)",
    )
    options = [*SMALL, "--max_steps=1", "--modality=midi", "--data.validation_fraction=0"]
    assert main(["train", str(folder), "--out", str(tmp_path / "run"), *options]) == 0
    assert "skipped 2 of 3 files" in capsys.readouterr().err


def test_classes_are_prompts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("cat", "dog"):
        (tmp_path / "pets" / name).mkdir(parents=True)
        for number in range(3):
            write_picture(tmp_path / "pets" / name / f"{number}.png", number)
    run = tmp_path / "run"
    options = [*SMALL, "--max_steps=2", "--data.classes=true", *IMAGE]
    assert main(["train", str(tmp_path / "pets"), "--out", str(run), *options]) == 0
    assert main(["generate", str(run), "--prompt", "dog", "--samples", "1", "--out", str(tmp_path / "dog")]) == 0
    assert (tmp_path / "dog.png").exists()
    assert_refused(capsys, "generate", run, "--prompt", "cow", says="give one of cat, dog")


def overfit(folder: Path, run: Path, *options: str) -> PerceiverAR:
    training: list[Any] = [
        "--data.validation_fraction=0", "--max_steps=150", "--model.dim=48", "--model.num_layers=2",
        "--model.num_heads=2",
        "--model.num_latents=108", "--trainer.batch_size=8", "--trainer.precision=32", "--trainer.device=cpu",
        "--trainer.evaluations=1", "--trainer.sample_tokens=0", *IMAGE,
    ]  # fmt: skip
    assert main(["train", str(folder), "--out", str(run), *training, *options]) == 0
    return Run(run).model()


def test_training_overfits_and_completes_a_pictures_lower_half_exactly(tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(8):
        write_picture(folder / f"{number}.png", number)
    model = overfit(folder, tmp_path / "run")
    assert model.config.index_dims == (6, 6, 3)
    tokens, codec = TokenFile.open(tmp_path / "run" / "tokens" / "train").tokens, codec_of(tmp_path / "run")
    result = evaluate(model, tokens, document_length=codec.document_length, amounts=codec.amounts)
    assert result.bits_per("dimension") < 0.15
    for number in (2, 5):
        out = tmp_path / f"whole{number}"
        arguments = [
            "--prompt_file",
            str(folder / f"{number}.png"),
            "--temperature=0",
            "--samples=1",
            "--out",
            str(out),
        ]
        assert main(["generate", str(tmp_path / "run"), *arguments]) == 0
        with Image.open(folder / f"{number}.png") as original, Image.open(f"{out}.png") as completion:
            assert (np.asarray(original) == np.asarray(completion)).all()

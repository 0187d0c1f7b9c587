"""The run directory: what a finished run holds, and what is said where something is missing or damaged."""

import csv
import json
import random
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from perceiver_ar import InputError, PerceiverAR, PerceiverARConfig, Recipe, Run, TrainerConfig, evaluate, train
from perceiver_ar.data.tokens import TokenFile
from perceiver_ar.evaluation import compressors
from perceiver_ar.training.measure import CONTINUED


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    folder, rng = tmp_path_factory.mktemp("corpus"), random.Random(0)
    for number in range(4):
        (folder / f"{number}.txt").write_text("".join(rng.choice(["la ", "le ", "lu\n"]) for _ in range(150)))
    return Recipe(
        paths=(str(folder),),
        out=str(tmp_path_factory.mktemp("runs") / "run"),
        max_steps=10,
        model=PerceiverARConfig(context_length=32, num_latents=8, dim=16, num_layers=1, num_heads=2),
        trainer=TrainerConfig(batch_size=4, blocks=1, precision="32", device="cpu", evaluations=2, sample_tokens=5),
    )


@pytest.fixture(scope="module")
def run(recipe: Recipe) -> Run:
    train(recipe)
    return Run.open(recipe.out)


def test_a_finished_run_holds_what_it_should_and_nothing_else(run: Run) -> None:
    files = {str(path.relative_to(run.path)) for path in run.path.rglob("*") if path.is_file()}
    files = {name for name in files if not name.startswith("tensorboard/")}
    assert files == {
        "config.json", "model.safetensors", "codec.json", "recipe.yaml", "summary.json", "metrics.csv",
        "checkpoints/step-000005.ckpt", "checkpoints/step-000005.json",
        "checkpoints/step-000010.ckpt", "checkpoints/step-000010.json",
        "plots/loss.png", "plots/context.png", "plots/context.csv", "report.html",
        "samples/step-000005.txt", "samples/step-000010.txt",
        "tokens/train.bin", "tokens/train.json", "tokens/train.documents.npy",
        "tokens/validation.bin", "tokens/validation.json", "tokens/validation.documents.npy",
    }  # fmt: skip


def test_samples_of_text_continue_what_is_held_out(run: Run) -> None:
    held_out = run.codec().decode(TokenFile.open(run.tokens / "validation").tokens).decode().split("\0")[0]
    for step in ("000005", "000010"):
        before, _, after = (run.samples / f"step-{step}.txt").read_text().partition(CONTINUED)
        assert before and held_out.startswith(before) and len(before) <= 32
        assert after


def test_a_prompt_that_ends_within_a_character_is_shown_whole(recipe: Recipe, tmp_path: Path) -> None:
    for number in range(4):
        (tmp_path / f"{number}.txt").write_text("ж" * (31 + 2 * number))
    train(replace(recipe, paths=(str(tmp_path),), out=str(tmp_path / "run"), max_steps=1))
    before, _, after = (tmp_path / "run/samples/step-000001.txt").read_text().partition(CONTINUED)
    assert {*before} == {"ж"} and after


def test_the_network_is_described_and_stored_for_other_tools(run: Run, recipe: Recipe) -> None:
    described = json.loads((run.path / "config.json").read_text())
    assert described["model_type"] == "perceiver_ar"
    assert PerceiverARConfig.load(run.path) == recipe.model
    model = run.model()
    assert not model.training
    with safe_open(run.path / "model.safetensors", "pt") as stored:
        assert set(stored.keys()) == set(model.state_dict())


def test_the_summary_measures_the_held_out_documents(run: Run, recipe: Recipe) -> None:
    summary = run.summary()
    assert summary is not None
    held_out = TokenFile.open(run.tokens / "validation")
    expected = evaluate(run.model(), held_out.tokens, byte_lengths=run.codec().byte_lengths())
    assert summary["bits_per_byte"] == expected.bits_per_byte
    assert summary["bytes"] == held_out.num_bytes
    references = compressors(run.codec(), held_out.tokens)
    assert {name: summary[f"{name}_bits_per_byte"] for name in ("gzip", "xz")} == references
    assert summary["steps"] == 10
    assert summary["tokens_seen"] == 10 * 4 * 8
    assert summary["parameters"] == sum(parameter.numel() for parameter in run.model().parameters())
    assert 0 < summary["train_seconds"] < 60


def test_the_recipe_comes_back(run: Run, recipe: Recipe) -> None:
    assert run.recipe() == recipe


def test_the_metrics_are_a_table_of_numbers(run: Run) -> None:
    with open(run.metrics_file, newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows][-1] == "10"
    assert all(int(row["tokens"]) == 32 * int(row["step"]) for row in rows)
    assert any(row["validation_bits"] for row in rows)
    assert float(rows[-1]["train_bits"]) < 8.5
    numbers = [value for row in rows for value in row.values() if value]
    assert len([float(value) for value in numbers]) > 8


def test_the_picture_is_a_whole_png(run: Run) -> None:
    data = (run.plots / "loss.png").read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n") and data.endswith(b"IEND\xaeB`\x82")
    from matplotlib.image import imread

    picture = imread(run.plots / "loss.png")
    assert min(picture.shape[:2]) > 100 and picture.std() > 0.01


def test_the_checkpoint_holds_no_code(run: Run) -> None:
    content = torch.load(run.checkpoints / "step-000010.ckpt", weights_only=True)
    assert content["global_step"] == 10
    weights = PerceiverAR.from_pretrained(run.path).state_dict()
    assert all(torch.equal(content["state_dict"][f"model.{name}"], tensor) for name, tensor in weights.items())


# What is not there, or not whole.


def test_opening_what_is_no_run_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"missing: no such run; `perceiver-ar train .* would make it"):
        Run.open(tmp_path / "missing")
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="is a file, not a run directory"):
        Run.open(tmp_path / "file")


def test_a_codec_of_another_number_of_ids_is_refused(run: Run, tmp_path: Path) -> None:
    PerceiverAR(PerceiverARConfig(vocab_size=300, context_length=8, num_latents=4, dim=8, num_heads=1)).save_pretrained(
        tmp_path
    )
    shutil.copy(run.path / "codec.json", tmp_path)
    with pytest.raises(InputError, match=r"codec\.json has 256 ids, but vocab_size in config\.json is 300: take both"):
        Run(tmp_path).codec()


def test_an_empty_directory_has_no_recipe_codec_model_or_summary(tmp_path: Path) -> None:
    run = Run.open(tmp_path)
    with pytest.raises(InputError, match="holds no recipe"):
        run.recipe()
    with pytest.raises(InputError, match=r"codec\.json"):
        run.codec()
    with pytest.raises(InputError, match=r"config\.json"):
        run.model()
    assert run.summary() is None


@pytest.mark.parametrize("text", ["{", "", "[]", "3", "{}", "\udcff"])
def test_a_damaged_summary_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "summary.json").write_text(text, errors="surrogateescape")
    with pytest.raises(InputError, match=r"summary\.json is damaged"):
        Run(tmp_path).summary()


@pytest.mark.parametrize("text", ["{", "", "[]", "3", "out: 2024-99-99", "\udcff"])
def test_a_damaged_recipe_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "recipe.yaml").write_text(text, errors="surrogateescape")
    with pytest.raises(InputError, match=r"recipe\.yaml is damaged"):
        Run(tmp_path).recipe()


def test_a_recipe_in_another_language_survives(tmp_path: Path, recipe: Recipe) -> None:
    run = Run(tmp_path)
    run.write_recipe(replace(recipe, paths=("Bücher/日本語", "a: b", "- c", "#d", "yes", "1e5", "it's\n")))
    assert run.recipe().paths == ("Bücher/日本語", "a: b", "- c", "#d", "yes", "1e5", "it's\n")


def test_only_what_a_kill_left_is_removed(tmp_path: Path) -> None:
    run = Run(tmp_path)
    (tmp_path / "tokens").mkdir()
    for name in (".unfinished-model-1.safetensors", "tokens/.unfinished-train-2.bin", "tokens/train.bin", ".hidden"):
        (tmp_path / name).touch()
    (tmp_path / ".unfinished-model-3" / ".unfinished-part").mkdir(parents=True)
    (tmp_path / ".unfinished-model-3" / "config.json").touch()
    assert run.is_taken()
    run.remove_unfinished_files()
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == [".hidden", "train.bin"]


def test_a_place_is_taken_by_anything_but_unfinished_files(tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    assert not run.is_taken()
    run.path.mkdir()
    assert not run.is_taken()
    (run.path / ".unfinished-recipe-1.yaml").touch()
    assert not run.is_taken()
    (run.path / "notes.txt").touch()
    assert run.is_taken()
    assert Run(run.path / "notes.txt").is_taken()

"""Scaling laws: known constants come back, real runs are read as they are, and runs that cannot determine a fit are
refused in one line."""

import json
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import MODEL, TRAINER, assert_refused

from perceiver_ar import Recipe, train
from perceiver_ar.cli import main
from perceiver_ar.costs import costs, step_flops
from perceiver_ar.errors import InputError
from perceiver_ar.run import Run
from perceiver_ar.scaling import Point, Powers, Runs, analyse, curves, fit_law, markdown, read_runs

TRUE = Powers(1.0, np.array([30.0, 60.0]), np.array([0.34, 0.28]))
SIZES, LENGTHS = (100_000, 1_000_000, 10_000_000), (10**6, 3 * 10**7, 10**9)


def points(
    sizes: Sequence[int] = SIZES, lengths: Sequence[int] = LENGTHS, noise: float = 0.0, loss: Any = TRUE
) -> list[Point]:
    """Runs whose loss is `loss`, and whose targets cost 8 N^0.95 FLOPs, at 1e10 FLOPs a second."""
    draws, found = np.random.default_rng(0), []
    for N in sizes:
        for D in lengths:
            flops, factor = 8 * D * N**0.95, math.exp(noise * draws.standard_normal())
            found.append(Point(f"{N}-{D}", N, D, flops, flops / 1e10, float(loss(N, D)) * factor))
    return found


def runs(of: list[Point], tokens: int | None = None) -> Runs:
    return Runs(of, {}, "bits per byte", [], tokens)


def test_known_constants_come_back() -> None:
    result = analyse(runs(points()), [(1e16, "flops"), (1e6, "seconds")])
    found = result["constants"]
    expected = {"E": 1.0, "A": 30.0, "B": 60.0, "alpha": 0.34, "beta": 0.28, "cost_exponent": 0.95}
    assert found == pytest.approx(expected | {"size_exponent": 0.28 / (0.34 + 0.95 * 0.28)}, rel=1e-4)
    assert max(result["standard_errors"].values()) < 1e-3
    by_flops, by_time = result["budgets"]
    names = "parameters", "targets", "loss"
    assert [by_flops[name] for name in names] == pytest.approx([by_time[name] for name in names])  # 1e10 a second
    assert not result["notes"] and not by_flops["beyond_the_runs"]


def test_the_best_size_is_the_minimum_for_the_budget() -> None:
    law = fit_law(points())
    size, targets, loss = law.best(1e16, "flops")
    assert 8 * targets * size**0.95 == pytest.approx(1e16)
    assert loss == pytest.approx(float(TRUE(size, targets)))
    for factor in (0.8, 0.99, 1.01, 1.2):
        assert TRUE(size * factor, targets * factor**-0.95) > loss


@pytest.mark.parametrize("lengths", [LENGTHS, (10**6, 10**7, 10**8, 10**9)])
def test_standard_errors_cover_what_noise_changes(lengths: tuple[int, ...]) -> None:
    result = analyse(runs(points(lengths=lengths, noise=0.003)), [(1e16, "flops")])
    [best], true = result["budgets"], fit_law(points()).best(1e16, "flops")
    assert 1.01 < best["parameters_factor"] < 2
    for name, value in zip(("parameters", "targets"), true, strict=False):
        assert abs(math.log(best[name] / value)) < 3 * math.log(best[f"{name}_factor"])
    assert abs(best["loss"] - true[2]) < 3 * best["loss_error"]


def test_time_that_hardly_depends_on_the_size_is_about_that_of_the_runs() -> None:
    of = [replace(point, seconds=point.targets * 1e-6) for point in points()]
    result = analyse(runs(of), [(1e3, "seconds")])
    k, g = result["cost_of_a_target"]["seconds"]
    sizes = [point.parameters for point in of]
    assert k * math.exp(np.mean(np.log(sizes))) ** g == pytest.approx(1e-6)
    assert 5e8 < result["budgets"][0]["targets"] < 2e9  # 1e9 if it did not depend on it at all
    assert any("seconds of a target hardly depend on the size" in note for note in result["notes"])
    assert not analyse(runs(of), [(1e16, "flops")])["notes"]


def test_what_the_runs_do_not_tell_is_said() -> None:
    noisy = analyse(runs(points(noise=0.03)), [(1e19, "flops")])
    assert any("do not determine the best size" in note for note in noisy["notes"])
    assert noisy["budgets"][0]["beyond_the_runs"] and "* |" in markdown(noisy)
    lengths = {N: 20 * N for N in (10**5, 3 * 10**5, 10**6, 3 * 10**6, 10**7, 3 * 10**7)}
    together = [point for N, D in lengths.items() for point in points([N], [D])]
    assert any("change together" in note for note in analyse(runs(together))["notes"])
    steep = analyse(runs(points(loss=lambda N, D: 1 + 1e18 * N**-4 + 60 * D**-0.28)))
    assert any("at its limit of 3" in note for note in steep["notes"])
    missed = [replace(p, loss=1.5 * p.loss) if i == 4 else p for i, p in enumerate(points())]
    assert f"The fit misses 1 of 9 runs by more than 5%, such as {missed[4].run}." in analyse(runs(missed))["notes"]
    small_corpus = analyse(runs(points(), tokens=10**9), [(1e19, "flops")])
    [best] = small_corpus["budgets"]
    assert best["passes"] == pytest.approx(best["targets"] / 10**9) and best["passes"] > 4
    assert any("passes over the training files" in note for note in small_corpus["notes"])


@pytest.mark.parametrize(
    ("of", "says"),
    [
        (points()[:5], "needs at least 6 finished runs, but there are 5"),
        (points(sizes=SIZES[:1], lengths=[10**i for i in range(4, 11)]), "1 different sizes"),
        (points(sizes=SIZES[:2]), "2 different sizes"),
        (points(sizes=[10**i for i in range(4, 11)], lengths=[10**6]), "1 different lengths"),
        (points(sizes=[10**5, 101_000, 10**7]), "2 different sizes"),
        (points(loss=lambda N, D: 1 + 60 * D**-0.28), "does not fall with the size"),
        (points(loss=lambda N, D: 1 + 30 * N**-0.34), "does not fall with the length"),
    ],
)  # fmt: skip
def test_runs_that_cannot_determine_a_fit_are_refused(of: list[Point], says: str) -> None:
    with pytest.raises(InputError, match=says):
        analyse(runs(of))


# Real runs.


@pytest.fixture(scope="module")
def trained(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six runs: three sizes, three lengths."""
    folder = tmp_path_factory.mktemp("runs")
    trainer = replace(TRAINER, evaluations=0, evaluation_tokens=50)
    for dim, steps in ((4, 6), (4, 60), (8, 6), (8, 20), (16, 20), (16, 60)):
        model = MODEL.replace(dim=dim, num_heads=1)
        out = str(folder / f"{dim}-{steps}")
        train(Recipe(paths=(str(corpus),), out=out, model=model, trainer=trainer, max_steps=steps))
    return folder


def test_real_runs_become_points(trained: Path) -> None:
    found = read_runs(sorted(trained.iterdir()))
    assert (len(found.points), found.left_out, found.notes) == (6, {}, [])
    for point in found.points:
        run = Run(point.run)
        summary, recipe = run.summary(), run.recipe()
        assert summary is not None
        assert point.loss == summary["bits_per_byte"] and point.parameters == run.model().num_parameters()
        assert point.targets == summary["tokens_seen"] <= summary["steps"] * 4 * recipe.window_latents
        assert point.flops == summary["steps"] * step_flops(recipe)
        assert point.flops < summary["steps"] * 4 * costs(recipe.model, latents=16, blocks=2).training_flops


def test_the_command_prints_and_writes_it(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(trained / "4-6", tmp_path / "unfinished")
    (tmp_path / "unfinished/summary.json").unlink()
    folders = [*sorted(trained.iterdir()), tmp_path / "unfinished"]
    words = ["scaling", *map(str, folders), "--out", str(tmp_path / "out")]
    assert main([*words, "--budget", "1e9"]) == 0
    page = capsys.readouterr().out
    assert page == (tmp_path / "out/scaling.md").read_text()
    result = json.loads((tmp_path / "out/scaling.json").read_text())
    assert all(f"| {run['run']} " in page for run in result["runs"]) and len(result["runs"]) == 6
    assert "1.00e+09 FLOPs" in page and result["budgets"][0]["budget"] == 1e9
    assert (tmp_path / "out/scaling.png").read_bytes().startswith(b"\x89PNG")
    assert f"- Left out: {tmp_path / 'unfinished'} (not finished" in page
    assert main([*words, "--budget", "2h", "--json"]) == 0
    by_time = json.loads(capsys.readouterr().out)
    assert by_time["constants"] == result["constants"]
    assert (by_time["budgets"][0]["budget"], by_time["budgets"][0]["unit"]) == (7200, "seconds")
    drawn = curves(by_time)
    assert drawn["points"].keys() == drawn["lines"].keys() and sum(map(len, drawn["points"].values())) == 6


def edited(run: Path, **settings: Any) -> None:
    recipe = Run(run).recipe()
    groups = {
        name: replace(getattr(recipe, name), **value) for name, value in settings.items() if isinstance(value, dict)
    }
    Run(run).write_recipe(replace(recipe, **(settings | groups)))


def stop_early(run: Path) -> None:
    summary = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(json.dumps(summary | {"ended_by": "patience"}))


def take_best(run: Path) -> None:
    summary = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(json.dumps(summary | {"weights_of_step": 3}))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda run: (run / "summary.json").unlink(), "not finished"),
        (stop_early, "stopped before the end of its schedule"),
        (take_best, "its weights are those of step 3"),
    ],
)  # fmt: skip
def test_only_runs_at_the_end_of_their_schedule_count(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: Callable[[Path], object], reason: str
) -> None:
    shutil.copytree(trained, tmp_path / "runs")
    shutil.copytree(trained / "4-6", tmp_path / "runs/more")
    change(tmp_path / "runs/more")
    folders = sorted((tmp_path / "runs").iterdir())
    [(left_out, why)] = read_runs(folders).left_out.items()
    assert left_out == str(tmp_path / "runs/more") and why.startswith(reason)
    says = f"but there are 5 (left out: {left_out}: {reason}"
    assert_refused(capsys, "scaling", *folders[1:], says=says)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda run: edited(run, model={"context_length": 64}), "model.context_length (32 and 64)"),
        (lambda run: edited(run, paths=("other",)), "training files"),
        (lambda run: edited(run, optim={"schedule": "constant"}), "optim.schedule (wsd and constant)"),
        (lambda run: (run / "codec.json").write_text('{"codec": "bytes", "text": true, "version": 1} '), "codec: "),
    ],
)  # fmt: skip
def test_runs_that_differ_in_more_are_refused(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: Callable[[Path], object], says: str
) -> None:
    shutil.copytree(trained, tmp_path / "runs")
    change(tmp_path / "runs/8-6")
    folders = sorted((tmp_path / "runs").iterdir())
    assert_refused(capsys, "scaling", *folders, says=f"differ in {says}")


def test_training_files_are_equal_by_their_real_paths(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained, tmp_path / "runs")
    folders = sorted((tmp_path / "runs").iterdir())
    (tmp_path / "link").symlink_to(Run(folders[0]).recipe().paths[0])
    edited(folders[0], paths=(str(tmp_path / "link"),))
    assert len(read_runs(folders).points) == 6
    for mine, other in (("/a/books", "/b/books"), ("hf://datasets/a/books", "hf://datasets/b/books")):
        for folder in folders:
            edited(folder, paths=(mine,))
        assert len(read_runs(folders).points) == 6
        edited(folders[2], paths=(other,))
        with pytest.raises(InputError, match=f"differ in training files .*'{mine}'.* and .*'{other}'"):
            read_runs(folders)


def test_a_run_counts_once_by_whatever_path(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(trained)
    (tmp_path / "link").symlink_to(trained / "4-6")
    assert len(read_runs(["4-6", trained / "4-6", tmp_path / "link", "./8-6"]).points) == 2


def test_a_converted_run_is_left_out(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained / "4-6", tmp_path / "converted")
    (tmp_path / "converted" / "recipe.yaml").unlink()
    found = read_runs([trained / "8-6", tmp_path / "converted"])
    assert len(found.points) == 1
    assert found.left_out == {str(tmp_path / "converted"): "converted, not trained here"}


def test_other_differences_are_named(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained, tmp_path / "runs")
    edited(tmp_path / "runs/8-6", optim={"muon_lr": 0.1})
    edited(tmp_path / "runs/8-20", seed=5)
    assert read_runs(sorted((tmp_path / "runs").iterdir())).notes == [
        "The runs also differ in optim.muon_lr, which the fit does not know."
    ]


def test_bad_input_is_refused_in_one_line(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = sorted(trained.iterdir())
    assert_refused(capsys, "scaling", says="scaling needs runs")
    assert_refused(capsys, "scaling", tmp_path / "none", says="no such run")
    assert_refused(capsys, "scaling", tmp_path, says="not a run")
    assert_refused(capsys, "scaling", *folders[:2], says="but there are 2")
    assert_refused(capsys, "scaling", folders[0], folders[0], says="but there are 1")
    for budget in ("soon", "-1", "nan", "inf", "0", "12", "0h"):
        assert_refused(capsys, "scaling", *folders, f"--budget={budget}", says=f"--budget is {budget!r}: write FLOPs")
    (tmp_path / "file").touch()
    assert_refused(capsys, "scaling", *folders, "--out", tmp_path / "file", says="is a file: name a folder")

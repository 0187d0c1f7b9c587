"""A run ends when the held-out score has stopped improving, and may keep its best weights."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import MODEL, TRAINER, assert_refused, assert_same_parameters, content

from perceiver_ar import InputError, OptimConfig, Recipe, Run, train
from perceiver_ar.cli import main
from perceiver_ar.data.tokens import TokenFile
from perceiver_ar.evaluation import evaluate
from perceiver_ar.training.checkpoints import Checkpoints
from perceiver_ar.training.metrics import read_metrics

WILD = OptimConfig(name="adamw", lr=1.0, schedule="constant", warmup=0.0)  # learns, then worse than before


def recipe(corpus: Path, out: Path, optim: OptimConfig, steps: int = 8, **trainer: Any) -> Recipe:
    settings = replace(TRAINER, evaluations=steps // 2, **trainer)  # every two steps
    return Recipe(paths=(str(corpus),), out=str(out), max_steps=steps, model=MODEL, optim=optim, trainer=settings)


def state(run: Path | str) -> dict[str, Any]:
    newest = Checkpoints(Path(run) / "checkpoints").newest()
    assert newest is not None
    return torch.load(newest.path, weights_only=True)


def scores(run: Path | str) -> dict[int, float]:
    rows = read_metrics(Run(run).metrics_file)
    return {int(row["step"]): float(row["validation_bits"]) for row in rows if row["validation_bits"]}


@pytest.fixture(scope="module")
def early(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """Of a run that ran out of patience."""
    asked = recipe(corpus, tmp_path_factory.mktemp("early") / "run", WILD, patience=2)
    assert train(asked)["steps"] == 6  # the first evaluation, and two that are no better
    return asked


def copied(asked: Recipe, out: Path, **trainer: Any) -> Recipe:
    shutil.copytree(asked.out, out)
    return replace(asked, out=str(out), trainer=replace(asked.trainer, **trainer))


def test_a_run_ends_when_its_patience_is_over_and_says_so(early: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    measured = scores(early.out)
    assert list(measured) == [2, 4, 6] and measured[2] < min(measured[4], measured[6])
    reason = Run(early.out).stopped_file.read_text()
    assert reason.startswith("stopped early at step 6: ") and "step 2 " in reason
    before = content(Path(early.out))
    summary = train(early, resume=True)
    assert summary == train(replace(early, max_steps=9), resume=True) == Run(early.out).summary()
    assert content(Path(early.out)) == before
    assert "resume with a larger --trainer.patience" in capsys.readouterr().err
    assert main(["info", early.out]) == 0
    shown = capsys.readouterr().out
    assert "finished " in shown and reason.strip() in shown
    assert "patience, at step 6 of " in shown and summary["ended_by"] == "patience"


def test_runs_without_a_record_of_their_end_are_known_by_their_reason(early: Recipe, tmp_path: Path) -> None:
    run = Run(copied(early, tmp_path / "old").out)
    summary = json.loads(run.summary_file.read_text())
    older = {name: summary[name] for name in summary if name != "ended_by"}
    run.summary_file.write_text(json.dumps(older))
    assert run.summary() == summary
    run.stopped_file.unlink()
    assert run.summary() == older


def test_a_run_that_lost_its_last_steps_stops_at_the_same_one(early: Recipe, tmp_path: Path) -> None:
    resumed = copied(early, tmp_path / "run")
    last = Checkpoints(tmp_path / "run" / "checkpoints").all()[-1]
    last.remove()  # as if a kill had come before it was written
    Run(resumed.out).summary_file.unlink()
    assert train(resumed, resume=True)["steps"] == last.step == 6
    assert_same_parameters(early.out, resumed.out)
    assert scores(early.out) == scores(resumed.out)
    assert Run(early.out).stopped_file.read_text() == Run(resumed.out).stopped_file.read_text()
    assert state(early.out)["patience"] == state(resumed.out)["patience"]


def test_more_patience_goes_on_with_the_steps_that_would_have_come_and_the_best_weights_stay(
    early: Recipe, corpus: Path, tmp_path: Path
) -> None:
    more = copied(early, tmp_path / "more", patience=None, final_weights="best")
    assert train(more, resume=True)["steps"] == 8
    assert not Run(more.out).stopped_file.exists()
    straight = recipe(corpus, tmp_path / "straight", WILD, final_weights="best")
    summary = train(straight)
    assert_same_parameters(more.out, straight.out)
    trained, other = state(more.out)["state_dict"], state(straight.out)["state_dict"]
    assert all(torch.equal(weights, other[name]) for name, weights in trained.items())  # the last ones
    measured = scores(straight.out)
    assert (summary["weights_of_step"], summary["steps"]) == (min(measured, key=measured.__getitem__), 8)
    assert_scores(straight, measured[summary["weights_of_step"]])


def test_the_best_means_of_the_weights_become_those_of_the_run(corpus: Path, tmp_path: Path) -> None:
    asked = recipe(corpus, tmp_path / "run", replace(WILD, ema=0.5), final_weights="best")
    assert train(asked)["weights_of_step"] == 2
    assert_scores(asked, scores(asked.out)[2])


def assert_scores(asked: Recipe, bits: float) -> None:
    held_out = TokenFile.open(Run(asked.out).tokens / "validation").tokens
    scored = evaluate(Run(asked.out).model(), held_out, max_tokens=TRAINER.evaluation_tokens, spread=True)
    assert scored.bits_per_token == pytest.approx(bits, rel=1e-6)


def test_the_last_weights_stay_if_they_are_the_best(corpus: Path, tmp_path: Path) -> None:
    best = recipe(corpus, tmp_path / "best", OptimConfig(), final_weights="best")
    assert train(best)["weights_of_step"] == 8
    trained = state(best.out)["state_dict"]
    assert all(torch.equal(trained[f"model.{name}"], x) for name, x in Run(best.out).model().state_dict().items())


def test_what_cannot_be_measured_is_refused(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(InputError, match=r"trainer\.evaluations is 0"):
        replace(TRAINER, patience=1, evaluations=0)
    with pytest.raises(InputError, match=r"keep_best to at least 1"):
        replace(TRAINER, final_weights="best", keep_best=0)
    words = ("train", corpus, "--out", tmp_path / "run", "--data.validation_fraction", "0", "--max_steps", "2")
    assert_refused(capsys, *words, "--trainer.patience", "2", says="need held-out documents, and there are none")
    assert_refused(capsys, *words, "--trainer.patience", "0", says="trainer.patience")
    assert not (tmp_path / "run").exists()

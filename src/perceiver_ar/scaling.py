"""Scaling laws: how the held-out loss of finished runs depends on their size and their length, and what that says
about a budget.

    L(N, D) = E + A / N^alpha + B / D^beta      N parameters, D training targets

is approach 3 of Hoffmann et al. 2022 (arXiv 2203.15556): least Huber loss of log L. The cost of a target is not 6 N as
in a dense Transformer, since a prefix of any length comes on top: cost(N) = k N^g is fitted to the costs of the runs.
"""

import math
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any, cast

import numpy as np
from scipy.optimize import least_squares, nnls

from perceiver_ar.config import Recipe, flat
from perceiver_ar.costs import step_flops
from perceiver_ar.data.sources import HUB
from perceiver_ar.data.tokens import TokenFile
from perceiver_ar.errors import InputError, require
from perceiver_ar.run import Run

FEWEST = 6
"""Runs for a fit: it has five constants, and each run must be left out once."""
DELTA = 1e-3
"""Of the Huber loss, as Hoffmann et al."""
LOWEST, HIGHEST = 0.01, 3.0
"""Bounds of the exponents."""
FLATTEST = 0.05
"""Least exponent of the cost of a target: `best` divides by it."""
PASSES = 4
"""Over the training tokens; with more, the same targets teach less (Muennighoff et al. 2023, arXiv 2305.16264)."""
EQUAL = ("codec", "training files", "held-out documents", "init_from", "model.context_length", "optim.schedule",
         "data.split_on", "data.column", "data.augment")  # fmt: skip
FREE = re.compile(
    r"out|paths|seed|max_\w+|model\.(dim|num_layers|num_heads|cross_num_heads|head_dim|cross_head_dim)"
    r"|trainer\.(micro_batch_size|evaluations|checkpoint_every|sample_tokens|keep_best)"
)
"""Settings that may differ without a note."""
HELD_OUT = "tokens", "bytes", "held_out_documents", "gzip_bits_per_byte", "xz_bits_per_byte"
"""Results that tell one held-out set from another."""


@dataclass(frozen=True)
class Point:
    """A finished run."""

    run: str
    parameters: int
    """All of them, embeddings included."""
    targets: int
    flops: float
    """Of all training steps, with their prefixes."""
    seconds: float
    loss: float
    """Held out, in `Runs.unit`."""


@dataclass(frozen=True)
class Runs:
    """Runs that can be compared."""

    points: list[Point]
    left_out: dict[str, str]
    """Run -> why it is not a point."""
    unit: str
    notes: list[str]
    training_tokens: int | None
    """In the files; None if the runs' token files are gone."""


@dataclass(frozen=True)
class Powers:
    """L = floor + sum of factors[k] / x[k]^exponents[k]"""

    floor: float
    factors: np.ndarray
    exponents: np.ndarray

    def __call__(self, *x: Any) -> Any:
        terms = zip(self.factors, self.exponents, x, strict=True)
        return self.floor + sum(factor * np.asarray(each) ** -exponent for factor, exponent, each in terms)


@dataclass(frozen=True)
class Law:
    """A fit of the loss, and (k, g) of the cost of a target, k N^g, in "flops" and "seconds"."""

    loss: Powers
    costs: dict[str, tuple[float, float]]

    def best(self, budget: float, unit: str) -> tuple[float, float, float]:
        """(N, D, loss) with the least loss for a budget in "flops" or "seconds"."""
        (k, g), (A, B), (alpha, beta) = self.costs[unit], self.loss.factors, self.loss.exponents
        size = math.exp((math.log(alpha * A / (g * beta * B)) + beta * math.log(budget / k)) / (alpha + g * beta))
        targets = budget / (k * size**g)
        return size, targets, float(self.loss(size, targets))

    def constants(self) -> dict[str, float]:
        (A, B), (alpha, beta), g = self.loss.factors, self.loss.exponents, self.costs["flops"][1]
        found = {"E": self.loss.floor, "A": A, "B": B, "alpha": alpha, "beta": beta, "cost_exponent": g}
        return {name: float(x) for name, x in (found | {"size_exponent": beta / (alpha + g * beta)}).items()}


# From run directories.


def read_runs(paths: Sequence[str | Path]) -> Runs:
    """Reads the finished runs among `paths`.

    A run counts if it came to the end of its own schedule: before that its learning rate and its loss are high.
    Raises InputError if a path is not a run, or finished runs differ in what `EQUAL` names.
    """
    left_out: dict[str, str] = {}
    found: list[tuple[Run, Recipe, dict[str, Any]]] = []
    for run in map(Run.open, {os.path.realpath(path): path for path in paths}.values()):
        summary = run.summary() or {}
        if run.weights_file.exists() and not run.recipe_file.exists():
            left_out[str(run.path)] = "converted, not trained here"
        elif (recipe := run.recipe()) and (reason := why_left_out(summary)):
            left_out[str(run.path)] = reason
        else:
            found.append((run, recipe, summary))
    settings = [
        flat(recipe.to_dict())
        | {"codec": (run.path / "codec.json").read_text(), "training files": [real_path(x) for x in recipe.paths]}
        | {"held-out documents": [summary.get(name) for name in HELD_OUT]}
        for run, recipe, summary in found
    ]
    different = [name for name in (settings or [{}])[0] if any(each[name] != settings[0][name] for each in settings)]
    for name in (name for name in EQUAL if name in different):
        other = next(i for i, each in enumerate(settings) if each[name] != settings[0][name])
        values = "" if name == "codec" else f" ({settings[0][name]} and {settings[other][name]})"
        raise InputError(
            f"{found[0][0].path} and {found[other][0].path} differ in {name}{values}: give runs that differ in size "
            "and length"
        )
    also = [name for name in different if not FREE.fullmatch(name) and name not in EQUAL]
    notes = [f"The runs also differ in {', '.join(also)}, which the fit does not know."] if also else []
    unit = "bits_per_byte" if all(s.get("bits_per_byte") is not None for _, _, s in found) else "bits_per_token"
    points, tokens = list[Point](), list[int]()
    for run, recipe, summary in found:
        flops = summary["steps"] * step_flops(recipe, run.codec().document_length is None)
        counted = summary["parameters"], summary["tokens_seen"], flops, max(summary["train_seconds"], 0.1)
        points.append(Point(str(run.path), *counted, summary[unit]))
        if (run.tokens / "train.json").exists():
            tokens.append(TokenFile.open(run.tokens / "train").num_tokens)
    points.sort(key=lambda point: (point.parameters, point.targets))
    return Runs(points, left_out, unit.replace("_", " "), notes, max(tokens, default=None))


def real_path(path: str) -> str:
    """Names of the Hub stay as they are."""
    return path if path.startswith(HUB) else os.path.realpath(os.path.expanduser(path))


def why_left_out(summary: dict[str, Any]) -> str | None:
    if not summary:
        return "not finished: its learning rate has not come down, so its loss is too high"
    if summary.get("ended_by") == "patience":
        return "stopped before the end of its schedule"
    if summary.get("weights_of_step", summary["steps"]) != summary["steps"]:
        return f"its weights are those of step {summary['weights_of_step']:,}, not of its last one"
    missing = {"tokens_seen", "parameters", "train_seconds", "bits_per_token"} - summary.keys()
    return f"its summary.json lacks {', '.join(sorted(missing))}" if missing else None


# The fit.


def fit_powers(x: np.ndarray, loss: np.ndarray, near: Powers | None = None) -> Powers:
    """Fits `Powers` to the losses (n,) of runs with x (n, K), all positive.

    Starts: for exponents from a grid, the best constants by non-negative least squares; and `near`, if given.
    """
    K, centre = x.shape[1], np.log(x).mean(axis=0)
    u, log_loss, least = np.log(x) - centre, np.log(loss), math.log(loss.min())

    def terms(theta: np.ndarray) -> np.ndarray:
        return np.concatenate([np.full((len(u), 1), theta[0]), theta[1 : K + 1] - theta[K + 1 :] * u], axis=1)

    def jacobian(theta: np.ndarray) -> np.ndarray:
        shares = np.exp(terms(theta) - np.logaddexp.reduce(terms(theta), axis=1, keepdims=True))
        return np.concatenate([shares, -shares[:, 1:] * u], axis=1)

    low = np.array([least - 9, *[least - 14] * K, *[LOWEST] * K])
    high = np.array([least, *[least + 3] * K, *[HIGHEST] * K])
    starts = []
    for exponents in product(np.geomspace(0.05, 2, 8), repeat=K):
        columns = np.concatenate([np.ones((len(u), 1)), np.exp(-np.array(exponents) * u)], axis=1)
        constants, distance = nnls(columns / loss[:, None], np.ones(len(u)))
        with np.errstate(divide="ignore"):
            start = np.array([*np.log(constants), *exponents])
        starts.append((distance, tuple(np.clip(start, low + 1e-3, high - 1e-3))))
    starts = [start for _, start in sorted(starts)[: 2 if near is None else 1]]
    if near is not None:
        start = [math.log(near.floor), *(np.log(near.factors) - near.exponents * centre), *near.exponents]
        starts.append(tuple(np.clip(start, low + 1e-3, high - 1e-3)))
    results = [
        least_squares(
            lambda theta: np.logaddexp.reduce(terms(theta), axis=1) - log_loss,
            np.array(start),
            jac=cast(Any, jacobian),
            bounds=(low, high),
            loss="huber",
            f_scale=DELTA,
            x_scale="jac",
            max_nfev=300,
        )
        for start in starts
    ]
    theta = min(results, key=lambda result: result.cost).x
    factors = np.exp(theta[1 : K + 1] + theta[K + 1 :] * centre)
    return Powers(float(np.exp(theta[0])), factors, theta[K + 1 :])


def fit_law(points: Sequence[Point], near: Powers | None = None) -> Law:
    N, D, loss = arrays(points, "parameters", "targets", "loss")
    costs = {}
    for unit in ("flops", "seconds"):
        log_N, log_cost = np.log(N), np.log(arrays(points, unit)[0] / D)
        g = max(float(np.polyfit(log_N, log_cost, 1)[0]), FLATTEST)
        costs[unit] = math.exp(np.mean(log_cost - g * log_N)), g
    return Law(fit_powers(np.stack([N, D], axis=1), loss, near), costs)


def arrays(points: Sequence[Point], *names: str) -> list[np.ndarray]:
    return [np.array([getattr(point, name) for point in points], dtype=np.float64) for name in names]


def standard_error(values: Iterable[float]) -> float:
    """The jackknife's, from a quantity computed without each of the runs in turn."""
    array = np.array(list(values))
    return float(np.sqrt((len(array) - 1) * array.var()))


def check_enough(runs: Runs) -> None:
    """Raises InputError unless there are runs enough, of several sizes and lengths."""
    count, reasons = len(runs.points), "; ".join(f"{run}: {reason}" for run, reason in runs.left_out.items())
    require(
        count >= FEWEST,
        f"the fit has five constants and needs at least {FEWEST} finished runs, but there are {count}"
        + (f" (left out: {reasons})" if reasons else ""),
    )
    for name, x in zip(("sizes", "lengths"), arrays(runs.points, "parameters", "targets"), strict=True):
        different = 1 + int((np.diff(np.sort(np.log(x))) > math.log(1.1)).sum())
        require(different >= 3, f"the runs have {different} different {name}: a power and a constant need at least 3")


def analyse(runs: Runs, budgets: Sequence[tuple[float, str]] = ()) -> dict[str, Any]:
    """The fit, its standard errors, and the best size and length for each budget, as JSON has them.

    Args:
        budgets: (amount, "flops" or "seconds"); empty: the FLOPs of the most expensive run, 10 and 100 times as many.

    Raises:
        InputError: the runs do not determine a fit.
    """
    check_enough(runs)
    points, notes = runs.points, list(runs.notes)
    N, D, C, loss = arrays(points, "parameters", "targets", "flops", "loss")
    law = fit_law(points)
    for name, x, A, alpha in zip(("size", "length"), (N, D), law.loss.factors, law.loss.exponents, strict=True):
        require(
            A * (x.min() ** -alpha - x.max() ** -alpha) > DELTA * loss.min() and alpha > 1.01 * LOWEST,
            f"the loss does not fall with the {name} of these runs, so they do not determine the best one: add runs "
            f"of other {name}s",
        )
    others = [fit_law([*points[:i], *points[i + 1 :]], law.loss) for i in range(len(points))]
    best, tokens = list[dict[str, Any]](), runs.training_tokens
    for amount, unit in budgets or [(factor * C.max(), "flops") for factor in (1, 10, 100)]:
        size, targets, least = law.best(amount, unit)
        sizes, lengths, losses = zip(*(other.best(amount, unit) for other in others), strict=True)
        factors = [math.exp(min(standard_error(map(math.log, each)), 99.0)) for each in (sizes, lengths)]
        within = all(x.min() / 2 <= each <= 2 * x.max() for x, each in ((N, size), (D, targets)))
        best.append(
            {"budget": amount, "unit": unit, "parameters": size, "parameters_factor": factors[0], "targets": targets,
             "targets_factor": factors[1], "loss": least, "loss_error": standard_error(losses),
             "beyond_the_runs": not within, "passes": targets / tokens if tokens else None}
        )  # fmt: skip
    notes += [
        f"The {name} of a target hardly depend on the size of these runs; they are taken as N^{FLATTEST}."
        for unit, name in (("flops", "FLOPs"), ("seconds", "seconds"))
        if law.costs[unit][1] == FLATTEST and any(each["unit"] == unit for each in best)
    ]
    if max(law.loss.exponents) > 0.99 * HIGHEST:
        notes.append(f"An exponent is at its limit of {HIGHEST:g}: these runs do not determine it.")
    if missed := [p.run for p in points if abs(math.log(law.loss(p.parameters, p.targets) / p.loss)) > 0.05]:
        notes.append(f"The fit misses {len(missed)} of {len(points)} runs by more than 5%, such as {missed[0]}.")
    if abs(np.corrcoef(np.log(N), np.log(D))[0, 1]) > 0.97:
        notes.append("Size and length change together in these runs, which hardly tells the two apart: add others.")
    if (worst := max(max(each["parameters_factor"], each["targets_factor"]) for each in best)) > 3:
        notes.append(
            f"These runs do not determine the best size: a standard error is a factor of {worst:.2g}. Add runs."
        )
    if any(each["beyond_the_runs"] for each in best):
        notes.append("(*) More than twice the size or length of any run, or less than half of it.")
    if tokens and D.max() > PASSES * tokens:
        notes.append(f"Some runs pass over their {short(tokens)} training tokens {D.max() / tokens:.2g} times.")
    elif tokens and best[-1]["passes"] > PASSES:
        notes.append(
            f"{short(best[-1]['targets'])} targets are {best[-1]['passes']:.2g} passes over the training files: the "
            "fit does not know that repeated text teaches less."
        )
    front = [p for p in points if all(other.loss >= p.loss for other in points if other.flops <= p.flops)]
    envelope = fit_powers(np.stack(arrays(front, "flops"), 1), arrays(front, "loss")[0]) if len(front) > 3 else None
    constants, each = law.constants(), [other.constants() for other in others]
    return {
        "unit": runs.unit,
        "constants": constants,
        "standard_errors": {name: standard_error(x[name] for x in each) for name in constants},
        "cost_of_a_target": law.costs,
        "budgets": best,
        "envelope": envelope and {"E": envelope.floor, "a": envelope.factors[0], "b": envelope.exponents[0]},
        "runs": [asdict(p) | {"fit": float(law.loss(p.parameters, p.targets))} for p in points],
        "left_out": runs.left_out,
        "notes": notes,
    }


# The page.


def markdown(result: dict[str, Any]) -> str:
    """The result of `analyse` as a page."""
    unit, errors = result["unit"], result["standard_errors"]
    rows = [(name, f"{value:.4g}", f"{errors[name]:.2g}") for name, value in result["constants"].items()]
    lines = [
        f"# Scaling of {len(result['runs'])} runs",
        "",
        f"{unit} held out = E + A / N^alpha + B / D^beta, with N parameters and D training targets. A target costs "
        "N^cost_exponent; the best N grows as FLOPs^size_exponent. Standard errors: the jackknife's, one run left out "
        "at a time.",
        "",
        *table(("constant", "value", "standard error"), rows),
    ]
    if envelope := result["envelope"]:
        numbers = "{E:.4g} + {a:.4g} / C^{b:.3g}".format(**envelope)
        lines += ["", f"The best runs for their FLOPs C, alone: {unit} = {numbers} (the envelope)."]
    rows = []
    for each in result["budgets"]:
        star = "*" if each["beyond_the_runs"] else ""
        size, targets = (f"{short(each[k])} ×÷ {each[k + '_factor']:.3g}" for k in ("parameters", "targets"))
        rows.append((amount(each["budget"], each["unit"]), size + star, targets + star,
                     f"{each['loss']:.3f} ± {each['loss_error']:.2g}"))  # fmt: skip
    lines += ["", "## What a budget wants", "", *table(("budget", "parameters", "training targets", unit), rows)]
    rows = [
        (run["run"], short(run["parameters"]), short(run["targets"]), f"{run['flops']:.2e}", f"{run['loss']:.4f}",
         f"{run['fit']:.4f}")
        for run in result["runs"]
    ]  # fmt: skip
    head = ("run", "parameters", "training targets", "FLOPs", unit, "fit")
    lines += ["", "## The runs", "", *table(head, rows), ""]
    lines += [f"- {note}" for note in result["notes"]]
    lines += [f"- Left out: {run} ({reason})." for run, reason in result["left_out"].items()]
    return "\n".join(lines).rstrip() + "\n"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A table of Markdown, in columns of equal width: numbers to the right."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    text = [[cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))]
            for row in (head, *rows)]  # fmt: skip
    rule = ["-" * w if i == 0 else "-" * (w - 1) + ":" for i, w in enumerate(widths)]
    return ["| " + " | ".join(row) + " |" for row in (text[0], rule, *text[1:])]


def short(number: float) -> str:
    """1234567 -> "1.23M" """
    for unit, name in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= unit:
            return f"{number / unit:.3g}{name}"
    return f"{number:.3g}"


def amount(budget: float, unit: str) -> str:
    return f"{budget:.2e} FLOPs" if unit == "flops" else f"{budget / 3600:.3g} h" if budget >= 3600 else f"{budget:g} s"


def curves(result: dict[str, Any]) -> dict[str, Any]:
    """What `plots.plot_scaling` draws: the runs, the fit for each of their sizes, and the best size for all FLOPs."""
    c, (k, g) = result["constants"], result["cost_of_a_target"]["flops"]
    law = Law(Powers(c["E"], np.array([c["A"], c["B"]]), np.array([c["alpha"], c["beta"]])), result["cost_of_a_target"])
    points: dict[str, list[tuple[float, float]]] = {}
    for run in result["runs"]:
        points.setdefault(short(run["parameters"]), []).append((run["flops"], run["loss"]))
    numbers, lines = {short(run["parameters"]): run["parameters"] for run in result["runs"]}, {}
    for size, N in numbers.items():
        C = np.geomspace(min(points[size])[0] / 2, 2 * max(points[size])[0], 50)
        lines[size] = list(zip(C, law.loss(N, C / (k * N**g)), strict=True))
    flops = [run["flops"] for run in result["runs"]]
    last = max(flops + [each["budget"] for each in result["budgets"] if each["unit"] == "flops"])
    best = [(C, law.best(C, "flops")[2]) for C in np.geomspace(min(flops), last, 60)]
    return {"points": points, "lines": lines, "best": best}

"""Metrics to Weights & Biases or to trackio, which have the same interface; each is an extra."""

import importlib.util
import secrets
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

from perceiver_ar.config import Recipe
from perceiver_ar.errors import InputError, require
from perceiver_ar.files import write_text

Track = Callable[[Mapping[str, float], int], None]
"""(metrics by name, step) -> None"""


def check_tracker(name: str) -> None:
    """Raises InputError unless the package is installed."""
    require(
        name == "none" or importlib.util.find_spec(name) is not None,
        f"trainer.tracker is {name}, which is not installed: pip install 'perceiver-ar[{name}]'",
    )


@contextmanager
def tracking(path: Path, recipe: Recipe, first: bool) -> Iterator[Track]:
    """Yields a function that sends metrics to the recipe's tracker on the first rank, for the run directory `path`.

    With the file `tracker_id` in it, a resumed run continues the same tracker run. The packages' own environment
    variables (WANDB_MODE, TRACKIO_SPACE_ID, ...) choose the destination. Raises InputError if the tracker fails to
    start.
    """
    name, file = recipe.trainer.tracker, path / "tracker_id"
    if name == "none" or not first:
        yield lambda values, step: None
        return
    if not file.exists():
        write_text(file, secrets.token_hex(4))
    identity = file.read_text(encoding="utf-8").strip()
    settings: dict[str, Any] = {"project": "perceiver-ar", "config": recipe.to_dict(), "resume": "allow"}
    package = importlib.import_module(name)
    if name == "wandb":
        options = package.Settings(console="off")  # leave stdout alone
        settings |= {"name": path.name, "id": identity, "dir": str(path), "settings": options}
    else:
        settings |= {"name": f"{path.name}-{identity}"}  # trackio identifies runs by name
    with redirect_stdout(sys.stderr):  # trackio prints messages; our stdout is for results
        try:
            run = package.init(**settings)
        except Exception as error:  # the packages raise many kinds
            reason = " ".join(str(error).split())
            raise InputError(
                f"{name} does not start ({reason}): fix this or set trainer.tracker to none, then use --resume"
            ) from error
    failed = True
    try:
        yield lambda values, step: run.log(dict(values), step=step)
        failed = False
    finally:
        with redirect_stdout(sys.stderr):
            package.finish(**({"exit_code": int(failed)} if name == "wandb" else {}))

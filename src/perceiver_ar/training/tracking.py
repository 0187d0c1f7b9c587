"""Metrics to Weights & Biases or to trackio, which have one interface; each is an extra."""

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
"""Takes the values of some metrics at a step."""


def check_tracker(name: str) -> None:
    """Raises InputError unless the package is installed."""
    require(
        name == "none" or importlib.util.find_spec(name) is not None,
        f"trainer.tracker is {name}, which is not installed: pip install 'perceiver-ar[{name}]'",
    )


@contextmanager
def tracking(path: Path, recipe: Recipe) -> Iterator[Track]:
    """Meanwhile, what is passed to the function goes to the tracker of the recipe, for the run directory `path`.

    `tracker_id` there lets a resumed run go on with what it began. Where things go, and whether at once, is as the
    packages' own environment variables say (WANDB_MODE, TRACKIO_SPACE_ID, ...). Raises InputError if there is no start.
    """
    name, file = recipe.trainer.tracker, path / "tracker_id"
    if name == "none":
        yield lambda values, step: None
        return
    if not file.exists():
        write_text(file, secrets.token_hex(4))
    identity = file.read_text(encoding="utf-8").strip()
    settings: dict[str, Any] = {"project": "perceiver-ar", "config": recipe.to_dict(), "resume": "allow"}
    package = importlib.import_module(name)
    if name == "wandb":
        options = package.Settings(console="off")  # stdout is not its business
        settings |= {"name": path.name, "id": identity, "dir": str(path), "settings": options}
    else:
        settings |= {"name": f"{path.name}-{identity}"}  # runs are known by their names
    with redirect_stdout(sys.stderr):  # for what trackio has to say; ours is for results
        try:
            run = package.init(**settings)
        except Exception as error:  # whatever the packages raise for what they are not given
            reason = " ".join(str(error).split())
            raise InputError(
                f"{name} does not start ({reason}): mend that or set trainer.tracker to none, then go on with --resume"
            ) from error
    failed = True
    try:
        yield lambda values, step: run.log(dict(values), step=step)
        failed = False
    finally:
        with redirect_stdout(sys.stderr):
            package.finish(**({"exit_code": int(failed)} if name == "wandb" else {}))

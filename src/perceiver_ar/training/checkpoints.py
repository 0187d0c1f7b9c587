"""The checkpoints of a run: everything needed to resume it, in files whose damage can be detected.

A checkpoint is `step-000123.ckpt` with its manifest `step-000123.json`: the step, the bits per token on held-out text
where that was measured, and the file's size and SHA-256. The manifest is written last and removed first, so a file
without a manifest is not a checkpoint: a kill came in between.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from perceiver_ar.errors import InputError
from perceiver_ar.files import atomic_path, write_text

NEWEST = 2
"""Number of newest checkpoints to keep: the last one to resume from, the one before in case it is damaged."""


@dataclass(frozen=True)
class Checkpoint:
    """The content of a manifest. `bytes` is -1 if the manifest itself is damaged."""

    path: Path
    step: int
    validation_bits: float | None = None
    bytes: int = -1
    sha256: str = ""

    @property
    def manifest(self) -> Path:
        return self.path.with_suffix(".json")

    def damage(self) -> str | None:
        """A description of its damage; None: it is intact. Reads the whole file."""
        if self.bytes < 0:
            return "its manifest is damaged"
        size = self.path.stat().st_size if self.path.is_file() else 0
        if size != self.bytes:
            return f"{size:,} bytes instead of {self.bytes:,}"
        return None if checksum(self.path) == self.sha256 else "its checksum does not match"

    def remove(self) -> None:
        self.manifest.unlink(missing_ok=True)
        self.path.unlink(missing_ok=True)


class Checkpoints:
    """The checkpoints in one folder: keeps the newest `NEWEST` and the `keep_best` best on held-out text."""

    def __init__(self, folder: Path, keep_best: int = 1) -> None:
        self.folder, self.keep_best = folder, keep_best
        self.damaged: set[int] = set()
        """Steps of the damaged ones found so far."""

    def path(self, step: int) -> Path:
        return self.folder / f"step-{step:06d}.ckpt"

    def all(self) -> list[Checkpoint]:
        """Oldest first, damaged ones included."""
        found = []
        for manifest in self.folder.glob("step-*.json"):
            number = manifest.stem.removeprefix("step-")
            if not number.isdecimal():
                continue
            path, step = manifest.with_suffix(".ckpt"), int(number)
            try:
                each = Checkpoint(path, **{**json.loads(manifest.read_bytes()), "step": step})
                if not isinstance(each.bytes, int) or not isinstance(each.validation_bits, float | int | None):
                    raise TypeError
            except (ValueError, TypeError):
                each = Checkpoint(path, step)
            found.append(each)
        return sorted(found, key=lambda checkpoint: checkpoint.step)

    def newest(self) -> Checkpoint | None:
        """The newest intact one; None: there are no checkpoints. Adds damaged newer ones to `damaged`.

        Raises InputError if there are checkpoints, and all are damaged.
        """
        first: str | None = None
        for checkpoint in reversed(self.all()):
            damage = checkpoint.damage()
            if damage is None:
                return checkpoint
            self.damaged.add(checkpoint.step)
            first = first or f"{checkpoint.path} is damaged ({damage})"
        if first is None:
            return None
        raise InputError(f"{first}, and no earlier one is intact: restore it, or start a new run in another --out")

    @contextmanager
    def writing(self, step: int, validation_bits: float | None = None) -> Iterator[Path]:
        """Yields the temporary path to write the checkpoint of `step` to; then removes old ones.

        After an error nothing is left of it, and the others are unchanged.
        """
        path = self.path(step)
        manifest = path.with_suffix(".json")
        manifest.unlink(missing_ok=True)  # of a damaged one
        try:
            with atomic_path(path) as temporary:
                yield temporary
            content = {"step": step, "validation_bits": validation_bits}
            content |= {"bytes": path.stat().st_size, "sha256": checksum(path)}
            write_text(manifest, json.dumps(content, indent=2) + "\n")
        finally:
            if not manifest.exists():
                path.unlink(missing_ok=True)
        flush_names(self.folder)
        self.damaged.discard(step)
        self.remove_old(step)

    def remove_old(self, step: int) -> None:
        """Removes all but those to keep, after the one of `step` has been written.

        Later ones are removed, too: the run was resumed from an earlier one and repeats their steps.
        """
        checkpoints = self.all()
        whole = [each for each in checkpoints if each.step <= step and each.step not in self.damaged]
        keep = {each.step for each in whole[-NEWEST:]}
        measured = [each for each in whole if each.validation_bits is not None]
        best = sorted(measured, key=lambda each: each.validation_bits or 0.0)
        keep |= {each.step for each in best[: self.keep_best]}
        for each in checkpoints:
            if each.step not in keep:
                each.remove()
        for path in self.folder.glob("step-*.ckpt"):
            if not path.with_suffix(".json").exists():  # a kill came between the two
                path.unlink(missing_ok=True)


def checksum(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def flush_names(folder: Path) -> None:
    """Makes renames in `folder` survive a power cut. Call it before removing files that they replace."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

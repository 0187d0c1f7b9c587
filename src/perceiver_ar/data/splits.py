"""Which documents are held out. Copies of a document are never on both sides."""

import re
import sys
from collections.abc import Sequence

import numpy as np

from perceiver_ar.data.sources import Source
from perceiver_ar.data.token_files import TokenWriter
from perceiver_ar.errors import InputError


def document_groups(sources: Sequence[Source], pattern: str) -> list[int]:
    """The group number of each source, by the match of `pattern` in its name; without a match a group of its own.

    The match is the first group of the pattern that takes part in it, or else all of it.

    Raises `InputError` if the pattern matches no name.
    """
    if not sources:
        return []
    keys: dict[str, int] = {}
    groups, found = [], False
    for source in sources:
        match = re.search(pattern, source.name)
        found = found or match is not None
        key = source.name + "\0"
        if match is not None:
            key = "/" + next((group for group in match.groups() if group is not None), match[0])
        groups.append(keys.setdefault(key, len(keys)))
    if not found:
        raise InputError(
            f"group_by {pattern!r} finds nothing in any file name, such as {sources[0].name}: "
            "correct it, or give '(.*)', which takes each file for itself"
        )
    return groups


def drop_held_out(train: TokenWriter, validation: TokenWriter) -> None:
    """Removes from `train` all documents that are in `validation`, too. Raises `InputError` if none is left."""
    copies = np.isin(np.array(train.digests, np.uint64), np.array(validation.digests, np.uint64))
    if copies.all():
        raise InputError("all training documents are validation documents as well; give other files for validation")
    if copies.any():
        train.move(copies, None)
        print(f"{copies.sum():,} documents are held out as well, so they are not trained on", file=sys.stderr)


def choose_groups(writer: TokenWriter, fraction: float, seed: int) -> np.ndarray:
    """Which documents are for validation: a mask (documents,). Groups and equal documents are never divided."""
    _, groups = np.unique(np.array(writer.groups, np.int64), return_inverse=True)
    sizes = np.bincount(groups, np.array(writer.sizes, np.uint64))
    _, firsts, inverse = np.unique(np.array(writer.digests, np.uint64), return_index=True, return_inverse=True)
    firsts = firsts[inverse]  # for each document, the first equal one
    copies = np.flatnonzero(firsts != np.arange(len(firsts)))
    together = list(range(len(sizes)))  # union-find over groups that share equal documents: parent of each group

    def root(group: int) -> int:
        while together[group] != group:
            together[group] = group = together[together[group]]
        return group

    for group, other in zip(groups[copies].tolist(), groups[firsts[copies]].tolist(), strict=True):
        together[root(group)] = root(other)
    roots = np.array(list(map(root, range(len(sizes)))), np.int64)
    chosen = _choose(sizes, roots, fraction, seed)[groups]
    if len(copies) and fraction > 0:
        amounts = f"{len(copies):,} of {len(firsts):,} documents are copies of others"
        print(f"{amounts}; all copies are on one side of the split", file=sys.stderr)
    return chosen


def _choose(sizes: np.ndarray, together: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """Which groups are for validation: a mask. Random ones until `fraction` of all bytes is reached.

    Groups with the same number in `together` stay together. Those that would exceed the fraction by more than half are
    skipped; if all would, the smallest is taken. At least one is taken and at least one left; a single one is never
    held out.
    """
    chosen = np.zeros(len(sizes), dtype=bool)
    order = together[np.random.default_rng(seed & (1 << 64) - 1).permutation(len(sizes))]
    order = order[np.sort(np.unique(order, return_index=True)[1])]  # each once
    if len(order) < 2 or fraction == 0:
        return chosen
    wanted, taken = fraction * float(sizes.sum()), 0.0
    whole = np.bincount(together, sizes)
    for index in order[:-1].tolist():
        if taken >= wanted:
            break
        if taken + whole[index] <= 1.5 * wanted:
            chosen[index] = True
            taken += whole[index]
    if not chosen.any():
        chosen[order[np.argmin(whole[order])]] = True
    return chosen[together]

"""Checks that all settings share, and their messages."""

import difflib
import math
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from perceiver_ar.errors import InputError, require


@dataclass(frozen=True)
class Bounds:
    """The values that a field annotated with it can have."""

    words: str
    hold: Callable[[Any], bool]

    def __repr__(self) -> str:  # seen in --help
        return self.words.removeprefix("be ")


Positive = Annotated[int, Bounds("be at least 1", lambda x: x >= 1)]
NotNegative = Annotated[int, Bounds("be at least 0", lambda x: x >= 0)]
PositiveNumber = Annotated[float, Bounds("be positive and finite", lambda x: 0 < x < math.inf)]
NotNegativeNumber = Annotated[float, Bounds("be at least 0", lambda x: x >= 0)]
Share = Annotated[float, Bounds("be in [0, 1]", lambda x: 0 <= x <= 1)]
ShareBelow1 = Annotated[float, Bounds("be in [0, 1)", lambda x: 0 <= x < 1)]


def check_fields(settings: Any, group: str = "") -> None:
    """Refuses values that are not of their field's type or beyond its bounds. Lists, which YAML and JSON have, become
    tuples."""
    annotated = get_type_hints(type(settings), include_extras=True)
    for name, kind in get_type_hints(type(settings)).items():
        value = getattr(settings, name)
        if isinstance(value, (list, tuple)):
            value = tuple(value)
            object.__setattr__(settings, name, value)
        choices = [
            choice for part in (kind, *get_args(kind)) if get_origin(part) is Literal for choice in get_args(part)
        ]
        words = " or ".join(map(repr, choices)) or (str(kind) if get_args(kind) else kind.__name__)
        require(fits_type(value, kind), f"{group}{name} is {value!r}: it must be {words}")
        for bounds in find_bounds(annotated[name]):
            require(value is None or bounds.hold(value), f"{group}{name} is {value}: it must {bounds.words}")


def find_bounds(kind: Any) -> Iterator[Bounds]:
    """The bounds in an annotation such as `Positive | None`."""
    if get_origin(kind) is Annotated:
        yield from (extra for extra in kind.__metadata__ if isinstance(extra, Bounds))
    elif get_origin(kind) in (UnionType, Union):
        for choice in get_args(kind):
            yield from find_bounds(choice)


def fits_type(value: Any, kind: Any) -> bool:
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    if get_origin(kind) is tuple:
        kinds = [part for part in get_args(kind) if part is not Ellipsis]
        kinds = kinds * len(value) if Ellipsis in get_args(kind) and isinstance(value, tuple) else kinds
        return isinstance(value, tuple) and len(value) == len(kinds) and all(map(fits_type, value, kinds))
    if get_origin(kind) in (UnionType, Union):
        return any(fits_type(value, choice) for choice in get_args(kind))
    if kind in (int, float):
        return isinstance(value, (int, kind)) and not isinstance(value, bool)
    return isinstance(value, kind)


def unknown_words(unknown: Iterable[str], known: Iterable[str]) -> str:
    """Names that there are not, each with the nearest one that there is, if any is near."""
    known = sorted(known)

    def nearest(name: str) -> str:
        last = name.lstrip("-").rpartition(".")[2]
        same = [other for other in known if other.lstrip("-").rpartition(".")[2] == last]  # in another group
        near = same[:1] or difflib.get_close_matches(name, known, n=1, cutoff=0.75)
        return f" (did you mean {near[0]}?)" if near else ""

    return ", ".join(f"{name}{nearest(name)}" for name in unknown)


def parse_duration(text: str, name: str) -> float:
    """Seconds in a text such as "90s", "5m", "1h30m" or "2d". Raises InputError naming the setting `name`."""
    match = re.fullmatch(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+(?:\.\d+)?)s)?", str(text).strip())
    if not match or not any(match.groups()):
        example = f"{text}s".replace(" ", "") if re.fullmatch(r"\s*[1-9]\d*\s*", str(text)) else "90s"
        raise InputError(f"{name} is {text!r}: write a duration such as {example}, 5m or 1h30m")
    seconds = sum(float(n or 0) * unit for n, unit in zip(match.groups(), (86400, 3600, 60, 1), strict=True))
    require(seconds > 0, f"{name} is {text!r}: it must be more than nothing")
    return seconds

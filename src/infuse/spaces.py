"""How a setting's range is declared for `infuse tune`: by methods in their own file, and in YAML."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from infuse.errors import InfuseError

Scalar = bool | int | float | str


@dataclass(frozen=True, init=False)
class Choice:
    """One of these values; a single one is held."""

    options: tuple[Scalar, ...]

    def __init__(self, *options: Scalar):
        object.__setattr__(self, "options", options)


@dataclass(frozen=True)
class Uniform:
    """Any number from ``low`` to ``high``."""

    low: float
    high: float


@dataclass(frozen=True)
class Log:
    """Any number from ``low`` to ``high``, each factor as likely: for learning rates."""

    low: float
    high: float


Search = Choice | Uniform | Log
Space = Mapping[str, Search]
"""Setting → where to search it."""


def parse(name: str, value: Any) -> Search:
    """A range from YAML: ``[4, 8]`` to choose from, ``{log: [1e-4, 1e-2]}``, ``{uniform: [0, 0.3]}``, or one value.

    Raises:
        InfuseError: it is none of these.
    """
    if isinstance(value, Scalar):
        return Choice(number(value))
    if isinstance(value, list) and value and all(isinstance(each, Scalar) for each in value):
        return Choice(*dict.fromkeys(map(number, value)))
    if isinstance(value, Mapping) and len(value) == 1:
        ((kind, ends),) = value.items()
        ends = [number(each) for each in ends] if isinstance(ends, list) else []
        if kind in ("log", "uniform") and len(ends) == 2 and all(type(each) in (int, float) for each in ends):
            low, high = map(float, ends)
            if not low < high < float("inf") or (kind == "log" and low <= 0):
                more = "positive and " if kind == "log" else ""
                raise InfuseError(
                    f"The ends of {name}'s range must be {more}in ascending order, not {low:g}, {high:g}."
                )
            return Log(low, high) if kind == "log" else Uniform(low, high)
    raise InfuseError(
        f"The range of {name} can't be read: write a list of values, {{log: [low, high]}}, {{uniform: [low, high]}}, "
        "or one value to hold."
    )


def contains(search: Search, value: Any) -> bool:
    """Whether a value lies in a range."""
    if isinstance(search, Choice):
        return value in search.options
    return isinstance(value, int | float) and search.low <= value <= search.high


def ends(search: Search) -> tuple[Scalar, ...]:
    """The values of a choice, or the ends of a range."""
    return search.options if isinstance(search, Choice) else (search.low, search.high)


def number(value: Scalar) -> Scalar:
    """YAML reads 1e-3 as a string."""
    exponent = isinstance(value, str) and re.fullmatch(r"[+-]?\d+e[+-]?\d+", value, re.IGNORECASE)
    return float(value) if exponent else value

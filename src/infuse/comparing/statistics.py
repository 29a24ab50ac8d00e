"""Means over seeds, a paired test over rows, and the time to come close to the best."""

import statistics
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float

from infuse.report import Measured

DRAWS = 20_000
LEVEL = 0.05
"""Differences that chance alone makes less often than this are called differences."""


def measured(values: Sequence[float], mark: str = "") -> Measured:
    """Mean and, of two or more values, the sample standard deviation."""
    return Measured(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None, mark)


def paired_p(one: Float[np.ndarray, " rows"], other: Float[np.ndarray, " rows"], draws: int = DRAWS) -> float:
    """Two-sided p of a sign-flip test over rows: how often chance alone would part two methods this far.

    A row's value is the share of seeds in which the method got it right. Under the hypothesis that both are equally
    good, the sign of a row's difference is a coin's. Rows are the unit, not predictions: the seeds of one method make
    the same mistakes, and to count each of them would make any difference look certain. With one seed this is McNemar's
    exact test, by simulation.
    """
    difference = one - other
    difference = difference[difference != 0]
    if not len(difference):
        return 1.0
    generator, seen = np.random.default_rng(0), 0
    bound = abs(difference.sum()) - 1e-9
    for _ in range(20):  # in parts, lest thousands of rows take gigabytes
        signs = generator.integers(0, 2, (draws // 20, len(difference)), dtype=np.int8) * np.int8(2) - np.int8(1)
        seen += int((np.abs(signs @ difference) >= bound).sum())
    return (1 + seen) / (1 + draws)


def holm(values: Mapping[str, float]) -> dict[str, float]:
    """The p values of several tests, corrected by Holm's method for there being several."""
    corrected, least = {}, 0.0
    for i, (name, p) in enumerate(sorted(values.items(), key=lambda item: item[1])):
        least = max(least, min(1.0, p * (len(values) - i)))
        corrected[name] = least
    return corrected


def seconds_to(curve: Sequence[Mapping[str, float]], share: float = 0.99) -> float:
    """Seconds of training until ``share`` of the best accuracy, on straight lines between the evaluations."""
    goal = share * max(point["accuracy"] for point in curve)
    before = curve[0]
    if before["accuracy"] >= goal:
        return before["seconds"]
    for point in curve[1:]:
        if point["accuracy"] >= goal:
            part = (goal - before["accuracy"]) / (point["accuracy"] - before["accuracy"])
            return before["seconds"] + part * (point["seconds"] - before["seconds"])
        before = point
    raise ValueError("the best point is one of them")

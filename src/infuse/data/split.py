"""Hold rows out, take a few of each label, and bring a task's data together."""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, TypeVar

from infuse.data.check import check, check_rows
from infuse.data.folder import NoSplitError, odd_names
from infuse.data.read import READERS, Source, files_of, folder_of, has_splits, read
from infuse.data.rows import Rows, Splits
from infuse.errors import InfuseError

T = TypeVar("T")


def stratified(rows: Rows, fraction: float, seed: int = 0) -> tuple[Rows, Rows]:
    """Split ``rows`` into (rest, held out), with about ``fraction`` of every label held out.

    Every label keeps at least one row in the rest, so a label of one row is never held out. (scikit-learn's
    splitter refuses such labels, and fewer held-out rows than labels, so the shares are dealt here.) With
    several labels per row, rows are drawn at random under the same rule. Both parts keep the order of ``rows``.

    Raises:
        InfuseError: ``fraction`` is not between 0 and 1, or there are no labels.
    """
    if not 0 < fraction < 1:
        raise InfuseError(f"the fraction to hold out is {fraction}: choose one between 0 and 1, such as 0.1.")
    if rows.labels is None:
        raise InfuseError("rows without labels cannot be split by label: give labels.")
    draw = random.Random(seed)
    target = max(1, round(fraction * len(rows)))
    out = _any_rows(rows, target, draw) if rows.multi else _shares(rows, fraction, target, draw)
    return rows.take(i for i in range(len(rows)) if i not in out), rows.take(sorted(out))


def few_shot(rows: Rows, per_label: int, seed: int = 0) -> Rows:
    """At most ``per_label`` random rows of every label, in the order of ``rows``.

    With several labels per row, a row is taken while one of its labels still lacks rows, so common labels
    may get more.

    Raises:
        InfuseError: ``per_label`` is less than 1, or there are no labels.
    """
    if per_label < 1:
        raise InfuseError(f"{per_label} rows per label leave nothing to learn from: choose at least 1.")
    if rows.labels is None:
        raise InfuseError("rows without labels cannot be chosen by label: give labels.")
    labels = rows.label_sets()
    taken: Counter[str] = Counter()
    chosen = []
    for i in _shuffled(range(len(rows)), random.Random(seed)):
        if any(taken[label] < per_label for label in labels[i]):
            taken.update(labels[i])
            chosen.append(i)
    return rows.take(sorted(chosen))


def load_splits(
    data: Source,
    *,
    validation: Source | None = None,
    test: Source | None = None,
    text: str = "text",
    label: str = "label",
    multi: bool = False,
    validation_fraction: float = 0.1,
    seed: int = 0,
) -> tuple[Splits, list[str]]:
    """Read and check a task's data; returns the splits and the warnings of `check`.

    Arguments:
        data: where the training rows are (see `read`). Its own validation and test splits are used if it
            has them and none are given here.
        validation, test: where those rows are. Without any validation rows, a stratified part of the
            training rows is held out; duplicates are reported, not moved.
        text, label, multi: as in `read`.
        validation_fraction, seed: how much is held out, and which rows.

    Raises:
        InfuseError: something cannot be read, or training on it cannot work (see `check`).
    """

    taken: dict[str, tuple[Path, ...]] = {}
    given: list[Path] = []

    def load(source: Source, split: str) -> Rows:
        if source is data:
            taken[split] = files_of(source, split)
        else:
            given.extend(files_of(source, split))
        return read(source, text=text, label=label, multi=multi, split=split)

    def own(split: str) -> Rows | None:
        try:
            return load(data, split) if has_splits(data) else None
        except NoSplitError:
            return None

    warnings = []
    train = load(data, "train")
    check_rows(train, "train")  # before rows are held out, so that row numbers are the file's
    tested = own("test") if test is None else load(test, "test")
    if test is None and tested is not None and len(tested) and not any(map(any, tested.label_sets())):
        tested = None
        warnings.append(f"the test split of {data} is left out: its labels are not public.")
    validated = own("validation") if validation is None else load(validation, "validation")
    if validated is None:
        train, validated = stratified(train, validation_fraction, seed)
        if not len(validated):
            raise InfuseError(
                "no row can be held out for validation, as every label has only one row: "
                "add rows, or give validation data of its own."
            )
    if (folder := folder_of(data)) is not None:
        warnings += odd_names(folder, taken, given, READERS)
    splits = Splits(train, validated, tested)
    return splits, warnings + check(splits)


def splits_of(settings: Mapping[str, Any]) -> tuple[Splits, list[str]]:
    """:func:`load_splits` of the data that a command's settings name; those that it lacks keep their defaults."""
    names = ("validation", "test", "text", "label", "multi", "validation_fraction", "seed")
    return load_splits(settings["data"], **{name: settings[name] for name in names if name in settings})


def _shares(rows: Rows, fraction: float, target: int, draw: random.Random) -> set[int]:
    """Rows to hold out, ``target`` in all if that leaves every label one, dealt by largest remainder."""
    members: defaultdict[str, list[int]] = defaultdict(list)
    for i, (label,) in enumerate(rows.label_sets()):
        members[label].append(i)
    shares = {label: min(int(fraction * len(own)), len(own) - 1) for label, own in members.items()}
    # Shuffled before the (stable) sort: labels with equal remainders take turns over seeds.
    order = sorted(_shuffled(members, draw), key=lambda name: shares[name] - fraction * len(members[name]))
    while (missing := target - sum(shares.values())) > 0:
        open_labels = [name for name in order if shares[name] < len(members[name]) - 1]
        if not open_labels:
            break
        for name in open_labels[:missing]:
            shares[name] += 1
    return {i for label, own in members.items() for i in draw.sample(own, shares[label])}


def _any_rows(rows: Rows, target: int, draw: random.Random) -> set[int]:
    """Rows to hold out, drawn one by one and skipped if a label would lose its last row."""
    labels, left = rows.label_sets(), Counter(rows.counts)
    out: set[int] = set()
    for i in _shuffled(range(len(rows)), draw):
        if len(out) < min(target, len(rows) - 1) and all(left[label] > 1 for label in labels[i]):
            left.subtract(labels[i])
            out.add(i)
    return out


def _shuffled(items: Collection[T], draw: random.Random) -> list[T]:
    return draw.sample(list(items), len(items))

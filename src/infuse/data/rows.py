"""Texts with their labels, and the three parts that a training run needs."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from infuse.errors import InfuseError


@dataclass(frozen=True)
class Rows:
    """Texts and their labels, one of each per row.

    A label is a string, or (multi-label) a tuple of strings that may be empty. ``labels`` is ``None``
    for texts that are only to be predicted.

    Raises:
        InfuseError: the numbers of texts and labels differ, or single labels and tuples are mixed.
    """

    texts: tuple[str, ...]
    labels: tuple[str, ...] | tuple[tuple[str, ...], ...] | None = None

    def __post_init__(self) -> None:
        if self.labels is None:
            return
        if len(self.texts) != len(self.labels):
            raise InfuseError(f"there are {len(self.texts)} texts but {len(self.labels)} labels: give one per text.")
        odd = next((i for i, label in enumerate(self.labels) if isinstance(label, tuple) != self.multi), None)
        if odd is not None:
            raise InfuseError(
                f"row 1 has {_kind(self.labels[0])} and row {odd + 1} has {_kind(self.labels[odd])}: "
                "use single labels in every row or lists in every row."
            )

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def multi(self) -> bool:
        """Whether a row may have several labels."""
        return bool(self.labels) and isinstance(self.labels[0], tuple)

    @cached_property
    def counts(self) -> Counter[str]:
        """How many rows have each label."""
        return Counter(label for row in self.label_sets() for label in row)

    @property
    def label_set(self) -> list[str]:
        """The distinct labels, sorted."""
        return sorted(self.counts)

    def label_sets(self) -> list[tuple[str, ...]]:
        """The labels of every row as a tuple, whether single- or multi-label (no labels: no rows)."""
        return [label if isinstance(label, tuple) else (label,) for label in self.labels or ()]

    def take(self, indices: Iterable[int]) -> Rows:
        """The rows at ``indices``, in that order."""
        chosen = list(indices)
        labels = None if self.labels is None else tuple(self.labels[i] for i in chosen)
        return Rows(tuple(self.texts[i] for i in chosen), labels)  # type: ignore[arg-type]  # of one kind


@dataclass(frozen=True)
class Splits:
    """The rows to train on, to choose by, and (if there are any) to report on."""

    train: Rows
    validation: Rows
    test: Rows | None = None


def digest(*parts: Rows) -> str:
    """What identifies rows: a hash of their texts and labels."""
    return hashlib.sha256(repr([(rows.texts, rows.labels) for rows in parts]).encode()).hexdigest()


def _kind(label: object) -> str:
    return "a list of labels" if isinstance(label, tuple) else "a single label"

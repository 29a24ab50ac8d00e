"""Labels that a reader takes for one and the same: told apart by case, accents, spaces or what can't be seen."""

from __future__ import annotations

import unicodedata
from collections import defaultdict
from collections.abc import Iterable

from infuse.errors import listed

UNSEEN = frozenset("\u034f\u115f\u1160\u17b4\u17b5\u3164\ufe0e\ufe0f\u2800")
"""Characters without ink that Unicode does not count among its format characters (Cf)."""


def folded(label: str) -> str:
    """What labels that look alike have in common."""
    seen = "".join(c for c in unicodedata.normalize("NFKC", label) if not _unseen(c))
    return " ".join(unicodedata.normalize("NFKC", seen.casefold()).split())


def alike(labels: Iterable[str]) -> list[list[str]]:
    """Groups of different labels that look alike."""
    groups: defaultdict[str, list[str]] = defaultdict(list)
    for label in sorted(set(labels)):
        groups[folded(label)].append(label)
    return [group for group in groups.values() if len(group) > 1]


def spelled_out(labels: Iterable[str]) -> list[str]:
    """Labels in quotes, spelled so that their difference shows: ``'caf\\xe9'`` beside ``'cafe\\u0301'``."""
    labels = list(labels)
    seen = all(c == " " or not (_unseen(c) or c.isspace()) for label in labels for c in label)
    plain = seen and len({unicodedata.normalize("NFKC", label) for label in labels}) == len(labels)
    return [repr(label) if plain else ascii(label) for label in labels]


def respelled(unseen: Iterable[str], known: Iterable[str]) -> str:
    """What to do about unknown labels that look like known ones, as the start of a list of ways; else nothing."""
    unseen = set(unseen)
    groups = [group for group in alike([*known, *unseen]) if unseen & set(group)]
    return f"spell {listed([' and '.join(spelled_out(group)) for group in groups], 5)} alike, " if groups else ""


def _unseen(c: str) -> bool:
    return c in UNSEEN or (unicodedata.category(c) in ("Cf", "Cc") and not c.isspace())

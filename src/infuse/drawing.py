"""What all pictures share: no window, and names that are drawn as they are."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import matplotlib

matplotlib.use("Agg")
_LONGEST = 60


@contextmanager
def plain_names(formulas: bool = False) -> Iterator[None]:
    """Within the block (or the function), a letter that the font lacks becomes a box without a warning.

    Unless there are ``formulas``, ``$`` begins none: labels are the user's.
    """
    with warnings.catch_warnings(), matplotlib.rc_context({"text.parse_math": formulas}):
        warnings.filterwarnings("ignore", r"Glyph \d+ .*missing from", UserWarning)
        warnings.filterwarnings("ignore", r"Matplotlib currently does not support .* natively", UserWarning)
        yield


def short(name: str) -> str:
    """On one line, and cut where it would leave no room for the data."""
    flat = " ".join(name.split())
    return flat if len(flat) <= _LONGEST else flat[: _LONGEST - 1] + "…"

"""What all pictures share: no window, names that are drawn as they are, and room for them."""

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import matplotlib
from matplotlib import font_manager

matplotlib.use("Agg")
logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)  # it tells of fonts without the weight asked for
_LONGEST = 60
_ALPHABETS = (
    "Noto Sans CJK JP", "Noto Sans CJK SC", "Source Han Sans", "Hiragino Sans", "PingFang SC", "Microsoft YaHei",
    "Yu Gothic", "Malgun Gothic", "Apple SD Gothic Neo", "WenQuanYi Zen Hei", "Noto Sans Devanagari", "Noto Sans Thai",
    "Nirmala UI", "Leelawadee UI", "Arial Unicode MS",
)  # fmt: skip
"""Fonts of common systems with the letters that matplotlib's own lacks."""


@contextmanager
def plain_names(formulas: bool = False) -> Iterator[None]:
    """Within the block (or the function), letters come from any font at hand; where none has one, it becomes a box.

    Unless there are ``formulas``, ``$`` begins none: labels are the user's.
    """
    installed = {font.name for font in font_manager.fontManager.ttflist}
    family = [*matplotlib.rcParams["font.family"], *(name for name in _ALPHABETS if name in installed)]
    with warnings.catch_warnings(), matplotlib.rc_context({"text.parse_math": formulas, "font.family": family}):
        warnings.filterwarnings("ignore", r"Glyph \d+ .*missing from", UserWarning)
        warnings.filterwarnings("ignore", r"Matplotlib currently does not support .* natively", UserWarning)
        yield


def short(name: str) -> str:
    """On one line, and cut where it would leave no room for the data."""
    flat = " ".join(name.split())
    return flat if len(flat) <= _LONGEST else flat[: _LONGEST - 1] + "…"


def room(names: Sequence[str]) -> float:
    """Inches that the longest name takes at 8 points, at least those of a short one."""
    return 0.07 * max(14, *map(len, names))

"""Figures by matplotlib: PNG for papers and slides, SVG that takes its ink from the page it stands on.

Names stand in a column at the right, joined to their points by thin lines: so they never overlap, whatever the data,
and a reader needs no legend.
"""

import io
import re
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter
from sklearn.isotonic import isotonic_regression

from infuse.drawing import plain_names
from infuse.report.model import Drawn, Figure, Lines, Scatter

INK = "#1d2731"
"""The colour of text and axes; in SVG it becomes ``currentColor``."""
COLOURS = (
    "#3b82c4", "#d9722e", "#2f9e68", "#c94f5d", "#8a6bbf", "#9a7355", "#cf5fa3", "#7a8591", "#94911f", "#2398a8",
    "#5b6ee1", "#b5651d",
)  # fmt: skip
"""Middle tones, which stand out on white and on black."""
SIZE = (4.7, 3.6)  # inches: small, so that the text stays readable where a page scales the figure to a phone


def svg(figure: Figure, prefix: str) -> str:
    """An ``<svg>`` element without size, colours of its own for data only, and ids that begin with ``prefix``."""
    buffer = io.StringIO()
    style: Any = {"svg.fonttype": "none", "svg.hashsalt": prefix}
    with plain_names(_has_formulas(figure)), matplotlib.rc_context(style):
        _draw(figure).savefig(buffer, format="svg", metadata={"Date": None}, **_paper(figure, transparent=True))
    drawn = buffer.getvalue()
    drawn = drawn[drawn.index("<svg") :]
    drawn = re.sub(r"<metadata>.*?</metadata>", "", drawn, flags=re.S)
    drawn = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", drawn, count=1)
    drawn = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", drawn, count=1)
    drawn = re.sub(r'(id="|href="#|url\(#)', rf"\1{prefix}-", drawn)
    return drawn.replace(INK, "currentColor").strip()


def png(figure: Figure) -> bytes:
    """The content of a PNG file with the same figure on white."""
    content = io.BytesIO()
    with plain_names(_has_formulas(figure)):
        _draw(figure).savefig(content, format="png", dpi=160, **_paper(figure))
    return content.getvalue()


def _has_formulas(figure: Figure) -> bool:
    return isinstance(figure, Drawn) and figure.formulas


def _paper(figure: Figure, **own: Any) -> dict[str, Any]:
    """What our figures are saved on; those of others bring colours that need white, and margins of any size."""
    return {"facecolor": "white", "bbox_inches": "tight"} if isinstance(figure, Drawn) else own


def _draw(figure: Figure) -> Canvas:
    if isinstance(figure, Drawn):
        return figure.draw()
    style: Any = {
        "font.size": 9, "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": INK, "xtick.color": INK,
        "ytick.color": INK, "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True,
    }  # fmt: skip
    with matplotlib.rc_context(style):
        canvas = Canvas(figsize=SIZE)
        left, room = 0.13, 0.07 + 0.0135 * max(map(len, _names(figure)), default=0)
        axes = canvas.add_axes((left, 0.13, 1 - left - room, 0.83))
        if isinstance(figure, Scatter):
            _scatter(axes, figure)
        else:
            _lines(axes, figure)
    return canvas


def _scatter(axes: Axes, figure: Scatter) -> None:
    log = figure.log_x and all(point.x > 0 for point in figure.points)
    if log:
        axes.set_xscale("log")
    for i, point in enumerate(figure.points):
        axes.errorbar(
            point.x, point.y, xerr=point.dx or None, yerr=point.dy or None, fmt="o", markersize=5.5, capsize=2,
            elinewidth=1, color=_colour(i),
        )  # fmt: skip
    _finish(axes, figure, log)
    _name(axes, figure, [(point.x, point.y) for point in figure.points])


def _lines(axes: Axes, figure: Lines) -> None:
    given = [series for series in figure.series if len(series.x)]
    for i, series in enumerate(given):
        axes.plot(series.x, series.y, marker="o", markersize=3, linewidth=1.5, color=_colour(i))
    _finish(axes, figure, False)
    _name(axes, figure, [(series.x[-1], series.y[-1]) for series in given])


def _finish(axes: Axes, figure: Scatter | Lines, log: bool) -> None:
    axes.margins(0.08)
    for level in figure.lines.values():
        axes.axhline(level, linestyle="--", linewidth=1, color=INK, alpha=0.6)
    axes.set(xlabel=figure.x, ylabel=figure.y)
    axes.grid(color=INK, alpha=0.13, linewidth=0.6)
    if log:
        low, high = axes.get_xlim()
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0,) if high > 100 * low else (1.0, 2.0, 5.0)))
        axes.xaxis.set_minor_formatter(NullFormatter())
    else:
        axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(_short))


def _names(figure: Scatter | Lines) -> list[str]:
    """Names in the column at the right: of points or series, and then of levels."""
    if isinstance(figure, Scatter):
        named = [point.name for point in figure.points]
    else:
        named = [series.name for series in figure.series if len(series.x)]
    return [name if len(name) <= 24 else name[:23] + "…" for name in (*named, *figure.lines)]


def _name(axes: Axes, figure: Scatter | Lines, points: Sequence[tuple[float, float]]) -> None:
    """Names in the order of their points' heights, a line apart at least."""
    axes.autoscale_view()  # the limits are final from here on
    low, high = axes.get_ylim()
    ends = [(axes.get_xlim()[1], level) for level in figure.lines.values()]
    colours = [*map(_colour, range(len(points))), *([INK] * len(ends))]
    ordered = sorted(zip(_names(figure), [*points, *ends], colours, strict=True), key=lambda each: each[1][1])
    size = min(8.0, 8.0 * 19 / max(1, len(ordered)))
    heights = spread([(y - low) / (high - low) for _, (_, y), _ in ordered], 0.052 * size / 8)
    for (name, point, colour), height in zip(ordered, heights, strict=True):
        axes.annotate(
            name, point, (1.06, height), xycoords="data", textcoords="axes fraction", fontsize=size, color=colour,
            va="center", annotation_clip=False,
            arrowprops={
                "arrowstyle": "-", "color": colour, "alpha": 0.45, "linewidth": 0.7, "shrinkA": 0, "shrinkB": 3,
                "relpos": (0, 0.5),
            },
        )  # fmt: skip


def spread(heights: Sequence[float], gap: float) -> list[float]:
    """Heights, ascending, moved as little as need be to be ``gap`` apart, and within 0 to 1 if they fit."""
    if not heights:
        return []
    steps = gap * np.arange(len(heights))
    free = isotonic_regression(np.array(heights) - steps, y_min=0.0, y_max=max(0.0, 1 - steps[-1]))
    return (free + steps).tolist()


def _colour(index: int) -> str:
    return COLOURS[index % len(COLOURS)]


def _short(value: float, _position: object = None) -> str:
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g} {letter}"
    return f"{value:g}"

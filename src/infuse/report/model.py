"""What a report consists of, and how a cell of a table is spelled."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Measured:
    """A mean over several runs, its standard deviation if there were several, and a mark that the caption explains."""

    value: float
    sd: float | None = None
    mark: str = ""


Cell = str | float | int | bool | Measured | tuple[str, ...] | None
"""A tuple is several short texts; ``None`` is what could not be measured or does not apply."""


@dataclass(frozen=True)
class Column:
    """A column: its title, the format of its numbers (as of ``format``), and what it means."""

    title: str
    form: str = ""
    note: str = ""

    def spell(self, cell: Cell) -> str:
        """A cell as people read it."""
        if cell is None:
            return "–"
        if isinstance(cell, bool):
            return "yes" if cell else "no"
        if isinstance(cell, Measured):
            spread = "" if cell.sd is None else f" ± {cell.sd:{self.form.lstrip('+')}}"
            return f"{cell.value:{self.form}}{spread}{cell.mark}"
        if isinstance(cell, tuple):
            return " · ".join(cell)
        return cell if isinstance(cell, str) else f"{cell:{self.form}}"


@dataclass(frozen=True)
class Table:
    """Rows of cells, one per column. The first column names the row."""

    title: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[Cell]]
    caption: str = ""


@dataclass(frozen=True)
class Point:
    """A point of a scatter with the standard deviations of both coordinates."""

    name: str
    x: float
    y: float
    dx: float = 0.0
    dy: float = 0.0


@dataclass(frozen=True)
class Scatter:
    """Named points; ``lines`` are levels of y to compare them with."""

    title: str
    x: str
    y: str
    points: Sequence[Point]
    log_x: bool = False
    lines: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Series:
    """A named line through points."""

    name: str
    x: Sequence[float]
    y: Sequence[float]


@dataclass(frozen=True)
class Lines:
    """Several lines over one axis; ``lines`` are levels of y to compare them with."""

    title: str
    x: str
    y: str
    series: Sequence[Series]
    lines: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Drawn:
    """A figure that others draw: ``draw`` gives a matplotlib figure. It stands on white in any scheme.

    With ``formulas``, ``$`` begins one; without, names are drawn as they are.
    """

    title: str
    draw: Callable[[], Any]
    formulas: bool = False


Figure = Scatter | Lines | Drawn


@dataclass(frozen=True)
class Report:
    """A title, a line below it, an answer in sentences, tables, figures, notes, and the commands that repeat it."""

    title: str
    subtitle: str = ""
    tables: Sequence[Table] = ()
    figures: Sequence[Figure] = ()
    notes: Sequence[str] = ()
    commands: Sequence[str] = ()
    answer: Sequence[str] = ()

"""A report as one HTML page that needs nothing else: no network, no fonts, no library."""

from collections.abc import Sequence
from html import escape
from pathlib import Path
from string import Template

from infuse.report.figures import svg
from infuse.report.model import Cell, Column, Figure, Measured, Report, Table

PAGE = Path(__file__).with_name("page.html")


def as_html(report: Report) -> str:
    """The page. Tables sort by a click on a heading; colours follow the reader's light or dark setting."""
    figures = "".join(_figure(figure, f"f{i}") for i, figure in enumerate(report.figures))
    tables = [_table(table, f"t{i}") for i, table in enumerate(report.tables)]
    return Template(PAGE.read_text(encoding="utf-8")).substitute(
        title=escape(report.title),
        subtitle=escape(report.subtitle),
        answer="".join(f"<p class='answer'>{escape(line)}</p>" for line in report.answer),
        first=tables[0] if tables else "",
        figures=f'<div class="figures">{figures}</div>' if figures else "",
        rest="".join(tables[1:]),
        notes=_section(
            "Notes", "<ul>" + "".join(f"<li>{escape(n)}</li>" for n in report.notes) + "</ul>", report.notes
        ),
        commands=_section("Commands", f"<pre>{escape(chr(10).join(report.commands))}</pre>", report.commands),
    )


def _section(title: str, content: str, given: object) -> str:
    return f"<section><h2>{title}</h2>{content}</section>" if given else ""


def _figure(figure: Figure, prefix: str) -> str:
    label = f'<svg role="img" aria-label="{escape(figure.title)}"'
    drawn = svg(figure, prefix).replace("<svg", label, 1)
    return f"<figure><figcaption>{escape(figure.title)}</figcaption>{drawn}</figure>"


def _table(table: Table, prefix: str) -> str:
    numeric = [_numeric([row[i] for row in table.rows]) for i in range(len(table.columns))]
    head = "".join(_heading(c, right) for c, right in zip(table.columns, numeric, strict=True))
    body = "".join(f"<tr>{_row(table, row, numeric)}</tr>" for row in table.rows)
    caption = f"<p class='caption'>{escape(table.caption)}</p>" if table.caption else ""
    return (
        f'<section><h2 id="{prefix}">{escape(table.title)}</h2><div class="wide" tabindex="0" role="region" '
        f'aria-labelledby="{prefix}"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
        f"{caption}</section>"
    )


def _row(table: Table, row: Sequence[Cell], numeric: Sequence[bool]) -> str:
    cells = zip(table.columns, row, numeric, strict=True)
    return "".join(_cell(column, cell, right, i == 0) for i, (column, cell, right) in enumerate(cells))


def _heading(column: Column, right: bool) -> str:
    note = f' title="{escape(column.note)}"' if column.note else ""
    side = ' class="number"' if right else ""
    return f'<th scope="col"{side} aria-sort="none"><button type="button"{note}>{escape(column.title)}</button></th>'


def _cell(column: Column, cell: Cell, right: bool, names_row: bool) -> str:
    value = cell.value if isinstance(cell, Measured) else cell
    key = "" if value is None else f' data-value="{float(value)!r}"' if isinstance(value, int | float) else ""
    side = ' class="number"' if right else ""
    if isinstance(cell, tuple):
        shown = "".join(f"<q>{escape(text)}</q>" for text in cell)
    else:
        shown = escape(column.spell(cell))
    if names_row:
        return f'<th scope="row">{shown}</th>'
    return f"<td{side}{key}>{shown}</td>"


def _numeric(cells: list[Cell]) -> bool:
    given = [cell for cell in cells if cell is not None]
    return bool(given) and all(isinstance(c, int | float | Measured) for c in given)

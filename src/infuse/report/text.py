"""A report as CSV, JSON and Markdown."""

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from infuse.report.model import Cell, Measured, Report, Table


def as_csv(table: Table) -> str:
    """Raw numbers, not rounded; what is measured over several runs gets columns for its spread and its mark."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    parts = [_parts([row[i] for row in table.rows]) for i in range(len(table.columns))]
    writer.writerow(f"{c.title}{part}" for c, own in zip(table.columns, parts, strict=True) for part in own)
    for row in table.rows:
        writer.writerow(_raw(cell, part) for cell, own in zip(row, parts, strict=True) for part in own)
    return buffer.getvalue()


def as_json(report: Report) -> str:
    """The whole report, numbers not rounded; of a figure that another library draws, the title."""
    return json.dumps(asdict(report), indent=1, ensure_ascii=False, default=lambda draw: None) + "\n"


def as_markdown(report: Report, pictures: Sequence[str]) -> str:
    """The report for a README or an issue; ``pictures`` are the files of its figures."""
    parts = [f"# {report.title}", report.subtitle, *report.answer]
    for table in report.tables:
        parts += [f"## {table.title}", _table(table), table.caption]
    for figure, picture in zip(report.figures, pictures, strict=True):
        parts += [f"## {figure.title}", f"![{figure.title}]({picture})"]
    if report.notes:
        parts += ["## Notes", "\n".join(f"- {note}" for note in report.notes)]
    if report.commands:
        parts += ["## Commands", "```\n" + "\n".join(report.commands) + "\n```"]
    return "\n\n".join(part for part in parts if part) + "\n"


def _table(table: Table) -> str:
    rows = [[c.title for c in table.columns], ["---"] * len(table.columns)]
    rows += [[c.spell(cell) for c, cell in zip(table.columns, row, strict=True)] for row in table.rows]
    return "\n".join("| " + " | ".join(_plain(cell) for cell in row) + " |" for row in rows)


def _plain(text: str) -> str:
    for special in "\\|<*_`[":
        text = text.replace(special, "\\" + special)
    return " ".join(text.split())


def _parts(cells: Sequence[Cell]) -> list[str]:
    measured = [cell for cell in cells if isinstance(cell, Measured)]
    spread = [" sd"] if any(cell.sd is not None for cell in measured) else []
    return ["", *spread, *([" mark"] if any(cell.mark for cell in measured) else [])]


def _raw(cell: Cell, part: str) -> Any:
    if isinstance(cell, Measured):
        found = {"": cell.value, " sd": cell.sd, " mark": cell.mark}[part]
        return "" if found is None else found
    if part or cell is None:
        return ""
    if isinstance(cell, bool):
        return "yes" if cell else "no"
    return " · ".join(cell) if isinstance(cell, tuple) else cell

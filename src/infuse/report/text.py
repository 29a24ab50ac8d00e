"""A report as CSV, JSON and Markdown."""

import json
import re
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from infuse.escaping import csv_text, markdown
from infuse.report.model import Cell, Measured, Report, Table


def as_csv(table: Table) -> str:
    """Raw numbers, not rounded; what is measured over several runs gets columns for its spread and its mark.

    Texts that a spreadsheet would take for a formula begin with ``'``.
    """
    parts = [_parts([row[i] for row in table.rows]) for i in range(len(table.columns))]
    header = [f"{c.title}{part}" for c, own in zip(table.columns, parts, strict=True) for part in own]
    rows = ([_raw(value, part) for value, own in zip(row, parts, strict=True) for part in own] for row in table.rows)
    return csv_text([header, *rows])


def as_json(report: Report) -> str:
    """The whole report, numbers not rounded; of a figure that another library draws, the title."""
    return json.dumps(asdict(report), indent=1, ensure_ascii=False, default=lambda draw: None) + "\n"


def as_markdown(report: Report, pictures: Sequence[str]) -> str:
    """The report for a README or an issue; ``pictures`` are the files of its figures."""
    parts = [f"# {markdown(report.title)}", *map(markdown, (report.subtitle, *report.answer))]
    for table in report.tables:
        parts += [f"## {markdown(table.title)}", _table(table), markdown(table.caption)]
    for figure, picture in zip(report.figures, pictures, strict=True):
        parts += [f"## {markdown(figure.title)}", f"![{markdown(figure.title)}]({picture})"]
    if report.notes:
        parts += ["## Notes", "\n".join(f"- {markdown(note)}" for note in report.notes)]
    if report.commands:
        commands = "\n".join(report.commands)
        fence = "`" * max(3, 1 + max(map(len, re.findall("`+", commands)), default=0))
        parts += ["## Commands", f"{fence}\n{commands}\n{fence}"]
    return "\n\n".join(part for part in parts if part) + "\n"


def _table(table: Table) -> str:
    rows = [[c.title for c in table.columns], ["---"] * len(table.columns)]
    rows += [[c.spell(value) for c, value in zip(table.columns, row, strict=True)] for row in table.rows]
    return "\n".join("| " + " | ".join(markdown(text) for text in row) + " |" for row in rows)


def _parts(cells: Sequence[Cell]) -> list[str]:
    measured = [value for value in cells if isinstance(value, Measured)]
    spread = [" sd"] if any(value.sd is not None for value in measured) else []
    return ["", *spread, *([" mark"] if any(value.mark for value in measured) else [])]


def _raw(value: Cell, part: str) -> Any:
    if isinstance(value, Measured):
        found = {"": value.value, " sd": value.sd, " mark": value.mark}[part]
        return "" if found is None else found
    if part or value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return " · ".join(value) if isinstance(value, tuple) else value

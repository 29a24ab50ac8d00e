"""CSV and TSV: as many rows as the file has, or an error that names the line.

A quoted field may span lines, as spreadsheets and pandas write it. A text that merely begins with a double quote looks
the same, up to a later text that ends with one: what lies between them would be lost. So the lines of such a field are
looked at once more, without quotes, and are refused where they read like rows of their own.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from infuse.errors import InfuseError, listed

FEW = 10
"""Rows from which on it can be told whether the values of a column repeat."""
BROKEN = {
    "unexpected end of data": "a double quote opens there and is never closed",
    "new-line character seen": "a carriage return stands inside a field without quotes",
}
"""What the reader says, and what that means."""


@dataclass(frozen=True)
class Record:
    """A row: its cells, its lines as they are in the file, and the number of the first of them."""

    cells: list[str]
    lines: list[str]
    first: int

    @property
    def where(self) -> str:
        return _lines(self.first, self.first + len(self.lines) - 1)


def read_delimited(content: str, path: Path) -> tuple[list[str], list[list[str]]]:
    """The header and the rows of a file's content; blank lines are no rows.

    Raises:
        InfuseError: quotes are broken or swallow rows, or a row is shorter or longer than the header.
    """
    lines = split_lines(content)
    first = next(line for line in lines if line.strip())
    # Spreadsheets write ";" where "," is the decimal mark.
    delimiter = "\t" if path.suffix.lower() == ".tsv" else max(",;\t", key=first.count)
    header, *records = _records(lines, delimiter, path)
    for record in records:
        if len(record.cells) != len(header.cells):
            raise InfuseError(
                f"{record.where} of {path} has {len(record.cells)} fields but the header has {len(header.cells)}: "
                f"put texts that contain {delimiter!r} in double quotes."
            )
    if len(header.lines) > 1:
        raise InfuseError(
            f"the header of {path}, {header.where}, spans lines: close its double quotes, and write it on one."
        )
    _refuse_swallowed(records, delimiter, path)
    return [name.strip() for name in header.cells], [record.cells for record in records]


def split_lines(content: str) -> list[str]:
    """Lines with their ends: at line feeds, or at carriage returns in a file that has no line feed.

    Not splitlines(), which breaks at other characters too, such as U+2028.
    """
    end = "\n" if "\n" in content else "\r"
    *whole, rest = content.split(end)
    return [line + end for line in whole] + ([rest] if rest else [])


def _records(lines: list[str], delimiter: str, path: Path) -> list[Record]:
    csv.field_size_limit(max(csv.field_size_limit(), sum(map(len, lines))))  # 131,072 characters by default
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    records, done = [], 0
    try:
        for cells in reader:
            if cells:
                records.append(Record(cells, lines[done : reader.line_num], done + 1))
            done = reader.line_num
    except csv.Error as error:
        reason = next((why for said, why in BROKEN.items() if str(error).startswith(said)), str(error))
        raise InfuseError(
            f"{_lines(done + 1, reader.line_num)} of {path} is not valid CSV ({reason}): close every double quote, "
            'and write one inside a quoted text as "".'
        ) from error
    return records


def _lines(first: int, last: int) -> str:
    return f"line {first}" if last <= first else f"the row of lines {first} to {last}"


def _refuse_swallowed(records: list[Record], delimiter: str, path: Path) -> None:
    long = [record for record in records if len(record.lines) > 1]
    if not long or all(_written(record, delimiter, csv.QUOTE_ALL) for record in records):
        return
    width = len(records[0].cells)
    if width == 1 and any(_needs_quotes(record, delimiter) for record in records):
        return
    columns = [_Column([record.cells[i] for record in records]) for i in range(width)]
    swallowed = [record for record in long if _reads_like_rows(record, columns, delimiter)]
    if swallowed:
        raise InfuseError(
            f"{listed([record.where for record in swallowed], 3)} of {path} may be several rows: a double quote opens "
            "in it and another closes it lines later, between which the lines read like rows of their own: put texts "
            'that hold a quote in quotes and write theirs as "", or write JSON lines (.jsonl); where texts do have '
            "several lines, put every field of the file in quotes."
        )


def _written(record: Record, delimiter: str, quoting: Any) -> bool:
    """Whether Python's writer gives these very lines for the row."""
    out = io.StringIO()
    csv.writer(out, delimiter=delimiter, quoting=quoting, lineterminator="").writerow(record.cells)
    return out.getvalue() == "".join(record.lines).rstrip("\r\n")


def _needs_quotes(record: Record, delimiter: str) -> bool:
    """Whether a row of one cell shows that its writer knows of quotes: it doubled one, or put a delimiter in quotes."""
    needs = '"' in record.cells[0] or (len(record.lines) == 1 and delimiter in record.cells[0])
    return needs and _written(record, delimiter, csv.QUOTE_MINIMAL)


class _Column:
    """What the cells of a column look like."""

    def __init__(self, cells: Sequence[str]):
        self.known = set(cells)
        self.repeats = len(cells) >= FEW and 2 * len(self.known) <= len(cells)
        self.blank = any(not cell.strip() for cell in cells)
        self.spaced = any(cell[:1].isspace() for cell in cells)

    def takes(self, cell: str) -> bool:
        """Whether a cell could be one of them: after a comma of prose comes a space, or the end of the line."""
        return (bool(cell.strip()) or self.blank) and (not cell[:1].isspace() or self.spaced)


def _reads_like_rows(record: Record, columns: list[_Column], delimiter: str) -> bool:
    """Whether at least two of a row's lines, and half of them, would do as rows by themselves."""

    def likely(line: str) -> bool:
        cells = line.split(delimiter) if len(columns) > 1 else [line]
        if len(cells) != len(columns) or not all(c.takes(cell) for c, cell in zip(columns, cells, strict=True)):
            return False
        repeating = [cell.strip('"') in c.known for c, cell in zip(columns, cells, strict=True) if c.repeats]
        return any(repeating) or not repeating or len(columns) == 1

    found = sum(likely(line.rstrip("\r\n")) for line in record.lines)
    return found >= max(2, len(record.lines) / 2)

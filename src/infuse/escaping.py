"""Names, labels and texts of anyone, on their way to a terminal, a spreadsheet or a page of Markdown.

JSON needs none of this: it holds data exactly.
"""

import csv
import io
import re
from collections.abc import Iterable
from typing import Any

from infuse.errors import printable

_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)
_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n", "\uff1d", "\uff0b", "\uff0d", "\uff20")
_MARKED = re.compile(r"([\\|<>*_`\[\]~$&])")


def cell(value: Any) -> Any:
    """A value for a CSV file that people open: a text that a spreadsheet would take for a formula begins with ``'``.

    Numbers, and texts that are numbers, stay as they are.
    """
    if isinstance(value, str) and value.startswith(_FORMULA) and not _NUMBER.fullmatch(value):
        return f"'{value}"
    return value


def csv_text(rows: Iterable[Iterable[Any]]) -> str:
    """A CSV file for people: every value as :func:`cell` gives it, a text of several lines in quotes."""
    lines = []
    for row in rows:
        line = io.StringIO(newline="")
        csv.writer(line).writerow(map(cell, row))  # with its own line ends, without which it leaves "\r" unquoted
        lines.append(line.getvalue().removesuffix("\r\n"))
    return "".join(f"{line}\n" for line in lines)


def markdown(text: str) -> str:
    """A text as it is in Markdown, on one line: no HTML, no marks, no columns."""
    flat = _MARKED.sub(r"\\\1", printable(" ".join(text.split())))
    return f"\\{flat}" if flat.startswith(("#", "+", "-", "=")) else flat

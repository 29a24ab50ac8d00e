"""All forms of a report in one folder."""

import re
from pathlib import Path

from infuse import storage
from infuse.report.figures import png
from infuse.report.html import as_html
from infuse.report.model import Report
from infuse.report.text import as_csv, as_json, as_markdown

PAGE = "report.html"


def write(report: Report, folder: str | Path) -> Path:
    """Write what :func:`put` says into a folder, all at once; returns the path of the page."""
    with storage.writing(Path(folder), wait=storage.PATIENCE), storage.replacing(Path(folder)) as new:
        put(report, new)
    return Path(folder) / PAGE


def put(report: Report, folder: Path) -> None:
    """Write ``report.html``, ``.md`` and ``.json``, the first table as ``report.csv``, and a PNG per figure and a CSV
    per further table, named after their titles, into a folder that is there.
    """
    pictures = [f"{_slug(figure.title)}.png" for figure in report.figures]
    for figure, name in zip(report.figures, pictures, strict=True):
        storage.write(folder / name, png(figure))
    for i, table in enumerate(report.tables):
        storage.write(folder / ("report.csv" if i == 0 else f"{_slug(table.title)}.csv"), as_csv(table))
    storage.write(folder / "report.md", as_markdown(report, pictures))
    storage.write(folder / "report.json", as_json(report))
    storage.write(folder / PAGE, as_html(report))


def _slug(title: str) -> str:
    return re.sub(r"\W+", "-", title.lower()).strip("-")

"""All forms of a report in one folder."""

import re
from pathlib import Path

from infuse.report.figures import png
from infuse.report.html import as_html
from infuse.report.model import Report
from infuse.report.text import as_csv, as_json, as_markdown


def write(report: Report, folder: str | Path) -> Path:
    """Write ``report.html``, ``.md`` and ``.json``, the first table as ``report.csv``, and a PNG per figure and a CSV
    per further table, named after their titles; returns the path of the page.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    pictures = [f"{_slug(figure.title)}.png" for figure in report.figures]
    for figure, name in zip(report.figures, pictures, strict=True):
        png(figure, folder / name)
    for i, table in enumerate(report.tables):
        name = "report.csv" if i == 0 else f"{_slug(table.title)}.csv"
        (folder / name).write_text(as_csv(table), encoding="utf-8")
    (folder / "report.md").write_text(as_markdown(report, pictures), encoding="utf-8")
    (folder / "report.json").write_text(as_json(report), encoding="utf-8")
    page = folder / "report.html"
    page.write_text(as_html(report), encoding="utf-8")
    return page


def _slug(title: str) -> str:
    return re.sub(r"\W+", "-", title.lower()).strip("-")

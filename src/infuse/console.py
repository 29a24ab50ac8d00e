"""What the terminal shows: tables and results. Words and numbers only; no work is done here."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
from rich.console import Console
from rich.table import Table
from rich.text import Text

from infuse.errors import printable
from infuse.escaping import csv_text

if TYPE_CHECKING:  # what is shown: importing it takes seconds, which `infuse --help` need not wait for
    from infuse.calibrating.calibrate import Calibration
    from infuse.heads import Answer
    from infuse.recommending.recommend import Recommendation
    from infuse.report import Report
    from infuse.sites import Site
    from infuse.training.run import Run
    from infuse.tuning.run import Tuned

_COMPARED = ("method", "base", "accuracy %", "trained parameters", "peak MiB", "training s", "forgetting")


class Screen(Console):
    """A terminal that shows texts, labels and paths of anyone: nothing in them is a style, an emoji or a command."""

    def __init__(self, **options: Any):
        super().__init__(markup=False, emoji=False, highlight=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str("\n".join(map(printable, text.split("\n"))), **options)

    def tell(self, text: str, style: str | None = None) -> None:
        """One line, however long, whatever is in it."""
        self.print(printable(text), style=style, soft_wrap=True)


class Grid(Table):
    """A table in whose cells and titles a line break is an escape too; ``titles`` stand on a line each."""

    def __init__(self, *titles: str, **options: Any):
        super().__init__(title="\n".join(map(printable, titles)) or None, title_justify="left", **options)

    def add_row(self, *cells: Any, **options: Any) -> None:
        super().add_row(*(printable(text) if isinstance(text, str) else text for text in cells), **options)


out = Screen()
err = Screen(stderr=True)


def write(text: str) -> None:
    """JSON or CSV to standard output: as it is to a file or a program, fit for the eye to a terminal."""
    sys.stdout.write(printable(text, keep="\n\t") if sys.stdout.isatty() else text)


def show_tuned(tuned: Tuned) -> None:
    """The best trial beside the defaults, and what to do with it."""
    best, metrics = tuned.best, tuned.run.metrics
    table = Grid(f"best of {tuned.states['complete']} trials that came to their end")
    for column in ("", "validation macro-F1"):
        table.add_column(column, justify="right" if column else "left", overflow="fold")
    table.add_row(f"trial {best['trial']}: {metrics['method']} on {best['base']}", f"{100 * best['macro_f1']:.2f}")
    for name, score in tuned.defaults.items():
        table.add_row(f"  defaults of {name}", f"{100 * score:.2f}")
    if metrics["baseline"]:
        table.add_row("  logistic regression, frozen base", _percents(metrics["baseline"]["validation"])[1])
    out.print(table)
    if tuned.defaults and best["macro_f1"] <= max(tuned.defaults.values()):
        out.tell("the defaults hold: no trial was better")
    changed = ", ".join(f"{key} {value}" for key, value in best["settings"].items())
    out.tell(f"settings: {changed}")
    out.tell(
        f"{tuned.folder}: best/ (the run), best.yaml (repeats it), trials.csv, report.html (also .md, .json, PNG)",
    )


def show_run(run: Run) -> None:
    """The result table of a run, with the baseline beside it."""
    metrics = run.metrics
    table = Grid(f"{metrics['method']} on {metrics['base']}")
    for column in ("", "rows", "accuracy", "macro-F1"):
        table.add_column(column, justify="left" if not column else "right")
    for name in ("validation", "test"):
        if name in metrics:
            rows = f"{metrics['rows'][name]:,}"
            table.add_row(name, rows, *_percents(metrics[name]))
            if metrics["baseline"]:
                table.add_row("  logistic regression, frozen base", "", *_percents(metrics["baseline"][name]))
    out.print(table)
    parameters = metrics["parameters"]
    out.tell(
        f"trained {parameters['transformer']:,} parameters in the transformer ({parameters['percent_of_base']:g} % of "
        f"the base) and {parameters['head']:,} in the head, in {metrics['seconds']:.0f} s"
    )
    if metrics["baseline"]:
        gain = 100 * (metrics["validation"]["accuracy"] - metrics["baseline"]["validation"]["accuracy"])
        verdict = "beats" if gain > 0 else "does not beat"
        out.tell(f"it {verdict} logistic regression on the frozen base on validation ({gain:+.1f} points of accuracy)")
    names = ("adapter", "report.html", "metrics.json", "per_class.csv", "confusion.png", "curves.png")
    there = ", ".join(name if "." in name else f"{name}/" for name in names if (run.folder / name).exists())
    out.tell(f"run folder: {run.folder}  ({there})")


def say(line: str) -> None:
    """A line about what goes on, beside the results."""
    err.tell(line)


def show_comparison(report: Report, folder: Path) -> None:
    """The first columns of a comparison's table, and where the whole report is."""
    whole = report.tables[0]
    shown = [i for i, column in enumerate(whole.columns) if column.title in _COMPARED]
    table = Grid(report.title, caption=whole.caption, caption_justify="left")
    for i in shown:
        table.add_column(whole.columns[i].title, justify="right" if i else "left")
    for row in whole.rows:
        table.add_row(*(whole.columns[i].spell(row[i]) for i in shown))
    out.print(table)
    out.tell(f"report: {folder / 'report.html'}  (also .csv, .json, .md, and a PNG per figure)")


def show_recommendation(found: Recommendation) -> None:
    """The answer, the candidates with what rules each out, and the command to run."""
    report, whole = found.report, found.report.tables[0]
    rounds = [column.title for column in whole.columns if column.title.startswith("round")]
    titles = ["candidate", "% of base", "file kB", "training MB", *rounds[-1:], "verdict"]
    shown = [i for i, column in enumerate(whole.columns) if column.title in titles]
    table = Grid(report.title, report.subtitle)
    for i in shown:
        text = whole.columns[i].title in ("candidate", "verdict")
        table.add_column(whole.columns[i].title, justify="left" if text else "right", overflow="fold")
    for row in whole.rows:
        table.add_row(*(whole.columns[i].spell(row[i]) for i in shown))
    out.print(table)
    for line in report.answer:
        out.tell(line)
    if found.train is not None:
        out.tell(report.commands[-1])
    out.tell(f"report: {found.folder / 'report.html'}  (also .csv, .json, .md, and train.yaml)")


def seconds_since_start() -> float:
    """How long ago this process began."""
    return time.time() - psutil.Process().create_time()


def show_predictions(texts: Sequence[str], answers: Sequence[Answer], form: str) -> None:
    """The answer to every text and the most probable labels with their confidence: a table, JSON lines, or CSV.

    The answer to a text out of scope is ``null`` in JSON, empty in CSV; several labels are a list, or joined by ``|``.
    In CSV texts and labels that a spreadsheet would take for a formula begin with ``'``; JSON holds them exactly.
    """
    if form == "json":
        for text, given in zip(texts, answers, strict=True):
            several = {} if given.labels is None else {"labels": given.labels}
            top = [{"label": label, "confidence": round(p, 6)} for label, p in given.top]
            whole = {"text": text, "label": given.label, **several, "confidence": round(given.confidence, 6)}
            write(json.dumps({**whole, "predictions": top}, ensure_ascii=False) + "\n")
    elif form == "csv":
        count = len(answers[0].top) if answers else 0
        ranks = (f"{what}_{i + 1}" for i in range(count) for what in ("label", "confidence"))
        lines = [["text", *ranks, "label"]]
        for text, given in zip(texts, answers, strict=True):
            ranked = (cell for label, p in given.top for cell in (label, f"{p:.6f}"))
            lines.append([text, *ranked, given.label or "|".join(given.labels or ())])
        write(csv_text(lines))
    else:
        table = Grid()
        table.add_column("text", overflow="fold")
        table.add_column("label", overflow="fold")
        table.add_column("confidence", justify="right")
        for text, given in zip(texts, answers, strict=True):
            top = [(label, f"{100 * p:.1f} %") for label, p in given.top]
            rows = [("(out of scope)", ""), *top] if given.refused else top
            for rank, row in enumerate(rows):
                table.add_row(text if rank == 0 else "", *row, end_section=rank == len(rows) - 1)
        out.print(table)


def show_evaluation(overall: dict[str, float], classes: list[dict[str, Any]], rows: int, form: str) -> None:
    """Overall measures, then the labels from worst to best."""
    if form == "json":
        write(json.dumps({"rows": rows, **overall, "per_class": classes}, indent=1) + "\n")
        return
    table = Grid(f"{rows:,} rows: accuracy {100 * overall['accuracy']:.2f}, macro-F1 {100 * overall['macro_f1']:.2f}")
    for column in ("label", "precision", "recall", "F1", "rows"):
        table.add_column(column, justify="left" if column == "label" else "right", overflow="fold")
    for row in sorted(classes, key=lambda r: r["f1"]):
        numbers = (f"{100 * row[k]:.1f}" for k in ("precision", "recall", "f1"))
        table.add_row(row["label"], *numbers, f"{row['rows']:.0f}")
    out.print(table)


def show_calibration(found: Calibration, form: str) -> None:
    """Confidences before and after, and what the threshold does."""
    if form == "json":
        write(json.dumps(asdict(found), indent=1) + "\n")
        return
    table = Grid(
        f"{found.rows:,} rows, accuracy {100 * found.accuracy:.2f}",
        caption="measured on the rows that it was fitted to", caption_justify="left",
    )  # fmt: skip
    for column in ("", "before", "after"):
        table.add_column(column, justify="right" if column else "left")
    table.add_row("temperature", "1", f"{found.temperature:.3f}")
    table.add_row("negative log-likelihood", *(f"{value:.4f}" for value in found.nll))
    table.add_row("expected calibration error %", *(f"{100 * value:.2f}" for value in found.ece), end_section=True)
    if found.kept is not None:
        table.add_row("threshold", "0", f"{found.threshold:.4f}")
        table.add_row("rows kept %", "100", f"{100 * found.kept:.1f}")
    if found.refused is not None:
        table.add_row(f"refused of {found.out_of_scope_rows:,} out of scope %", "0", f"{100 * found.refused:.1f}")
    out.print(table)
    for note in found.notes:
        out.tell(note)


def show_sites(base: str, sites: Sequence[Site]) -> None:
    """A row per stack and role: where it is, on which side, how wide, in how many layers."""
    table = Grid(f"sites of {base}")
    for column in ("stack", "role", "module, below the prefix", "side", "slice", "width", "sites"):
        table.add_column(column, justify="right" if column in ("width", "sites") else "left", overflow="fold")
    groups: dict[tuple, list[Site]] = {}
    for site in sites:
        path = ".".join("*" if part.isdigit() and i < 4 else part for i, part in enumerate(site.path.split(".")))
        groups.setdefault((site.stack, site.role, path, site.side), []).append(site)
    for (stack, role, path, side), group in groups.items():
        part = "" if group[0].whole else f"{group[0].start}:{group[0].stop}"
        table.add_row(stack, role, path, side, part, str(group[0].width), str(len(group)))
    out.print(table)


def show_counts(base: str, parameters: int, rows: Sequence[tuple[str, tuple[int, int] | str]]) -> None:
    """Methods with their sites and trained parameters on one base, or with the reason why they don't fit it."""
    table = Grid(f"{base}: {parameters:,} parameters")
    for column in ("method", "sites", "trained in the transformer", "% of base"):
        table.add_column(column, justify="left" if column == "method" else "right")
    if any(isinstance(counted, str) for _, counted in rows):
        table.add_column("why it does not fit", overflow="fold", ratio=1)
    for method, counted in rows:
        if isinstance(counted, str):
            table.add_row(method, "–", "–", "–", counted)
        else:
            table.add_row(method, str(counted[0]), f"{counted[1]:,}", f"{100 * counted[1] / parameters:.3f}")
    out.print(table)


def _percents(measures: dict[str, float]) -> list[str]:
    return [f"{100 * measures[k]:.2f}" for k in ("accuracy", "macro_f1")]

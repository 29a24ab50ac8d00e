"""The pictures of a run as PNG, and its page: measures, pictures, and the command that repeats it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from infuse import storage
from infuse.report import Column, Drawn, Report, Table
from infuse.report.figures import png
from infuse.report.html import as_html
from infuse.settings import command
from infuse.training.config import TrainConfig

PAGE = "report.html"


def write_page(
    folder: Path,
    config: TrainConfig,
    metrics: Mapping[str, Any],
    classes: Sequence[Mapping[str, Any]],
    figures: Mapping[str, Drawn],
) -> None:
    """Write a PNG for every figure, named after its key, and the page.

    Args:
        metrics: what ``metrics.json`` holds.
        classes: what ``per_class.csv`` holds.
    """
    for name, figure in figures.items():
        storage.write(folder / f"{name}.png", png(figure))
    storage.write(folder / PAGE, as_html(_report(config, metrics, classes, list(figures.values()))))


def _report(
    config: TrainConfig,
    metrics: Mapping[str, Any],
    classes: Sequence[Mapping[str, Any]],
    figures: Sequence[Drawn],
) -> Report:
    baseline, parameters, resolved = metrics["baseline"], metrics["parameters"], metrics["resolved"]
    splits = [name for name in ("validation", "test") if name in metrics]
    measured = [
        (who, name, metrics["rows"][name], *(100 * of[name][measure] for measure in ("accuracy", "macro_f1")))
        for name in splits
        for who, of in ((config.method, metrics), ("logistic regression, frozen base", baseline))
        if of is not None
    ]
    percent = (Column("accuracy %", ".2f"), Column("macro-F1 %", ".2f"))
    shares = [Column(f"{name} %", ".1f") for name in ("precision", "recall", "F1")]
    of_labels = [
        (each["label"], *(100 * each[name] for name in ("precision", "recall", "f1")), int(each["rows"]))
        for each in classes
    ]
    return Report(
        title=f"{config.method} on {Path(config.data).stem}",
        subtitle=f"Base {config.base}, {metrics['rows']['train']:,} training rows, {metrics['seconds']:.0f} s",
        answer=[
            f"{parameters['transformer']:,} parameters trained in the transformer ({parameters['percent_of_base']:g} % "
            f"of the base) and {parameters['head']:,} in the head, at learning rates of {resolved['learning_rate']:g} "
            f"and {resolved['head_learning_rate']:g}, the trunk in {resolved['precision']}."
        ],
        tables=[
            Table("Measures", (Column("who"), Column("split"), Column("rows", ",d"), *percent), measured),
            Table("Labels", (Column("label"), *shares, Column("rows", ",d")), of_labels, "Of the validation rows."),
        ],
        figures=figures,
        commands=[command("train", config)],
    )

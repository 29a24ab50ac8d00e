"""The pictures of a run: its confusion matrix, its learning curves, and what its fusion attends to."""

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from infuse.drawing import room, short


def confusion_plot(matrix: np.ndarray, labels: Sequence[str], most: int = 25) -> Figure:
    """Rows: true label; columns: predicted label. Of many labels, the ``most`` with the most confusions are drawn."""
    wrong = matrix.sum(0) + matrix.sum(1) - 2 * np.diag(matrix)
    chosen = np.sort(np.argsort(-wrong, kind="stable")[:most])
    part = matrix[np.ix_(chosen, chosen)]
    names = [short(str(labels[i])) for i in chosen]
    size = 1.5 + 0.32 * len(chosen) + room(names)
    figure = Figure(figsize=(size + 1.5, size), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(part, cmap="Blues", vmin=0)
    axes.set_xticks(range(len(names)), names, rotation=60, ha="right", fontsize=8)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    for (row, column), count in np.ndenumerate(part):
        if count:
            colour = "white" if count > 0.6 * part.max() else "black"
            axes.text(column, row, str(count), ha="center", va="center", fontsize=7, color=colour)
    title = f"Confusion, {int(matrix.sum())} rows"
    if len(chosen) < len(labels):
        title += f": the {len(chosen)} of {len(labels)} labels with the most confusions"
    axes.set_title(title, fontsize=10, wrap=True)
    figure.colorbar(image, ax=axes, shrink=0.6)
    return figure


def curves_plot(history: Sequence[dict[str, float]], baseline: float | None) -> Figure:
    """Training and validation loss, and validation macro-F1 beside the baseline's, over epochs."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for key, name in (("loss", "training"), ("eval_loss", "validation")):
        points = [(h["epoch"], h[key]) for h in history if key in h]
        if points:
            left.plot(*zip(*points, strict=True), marker="o" if key == "eval_loss" else None, label=name)
    left.set(xlabel="epoch", ylabel="loss")
    left.legend()
    points = [(h["epoch"], h["eval_macro_f1"]) for h in history if "eval_macro_f1" in h]
    if points:
        right.plot(*zip(*points, strict=True), marker="o", label="validation")
    if baseline is not None:
        right.axhline(baseline, linestyle="--", color="grey", label="logistic regression")
    right.set(xlabel="epoch", ylabel="macro-F1")
    right.legend()
    return figure


def heat_map(values: np.ndarray, rows: Sequence[str], columns: Sequence[str]) -> Figure:
    """Weights between 0 and 1, (rows, columns), with the number in every cell."""
    left, below = list(map(short, rows)), list(map(short, columns))
    size = 2.5 + 0.9 * len(columns) + room(left), 0.5 + 0.26 * len(rows) + room(below)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(values, cmap="viridis", vmin=0, vmax=1, aspect="auto")
    axes.set_xticks(range(len(columns)), below, rotation=40, ha="right", fontsize=8)
    axes.set_yticks(range(len(rows)), left, fontsize=8)
    for (row, column), value in np.ndenumerate(values):
        axes.text(
            column, row, f"{value:.2f}", ha="center", va="center", fontsize=7, color="white" if value < 0.6 else "black"
        )
    axes.set_title("mean attention of the fusion", fontsize=10)
    figure.colorbar(image, ax=axes, shrink=0.7)
    return figure

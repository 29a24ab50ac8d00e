"""Measures of a classifier, by scikit-learn."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score, precision_recall_fscore_support

_ZERO: Any = 0  # what a label without rows or predictions scores; scikit-learn's stubs want a string


def decide(probabilities: np.ndarray, multi: bool) -> np.ndarray:
    """Class indices (single-label), or a 0/1 matrix of the labels above one half (multi-label)."""
    return (probabilities >= 0.5).astype(int) if multi else probabilities.argmax(-1)


def overall(targets: np.ndarray, predicted: np.ndarray) -> dict[str, float]:
    """Accuracy (of the whole label set, if multi-label) and macro-F1 over the labels that occur."""
    return {
        "accuracy": float(accuracy_score(targets, predicted)),
        "macro_f1": float(f1_score(targets, predicted, average="macro", zero_division=_ZERO)),
    }


def per_class(targets: np.ndarray, predicted: np.ndarray, labels: Sequence[str]) -> list[dict[str, Any]]:
    """Precision, recall, F1 and number of rows of every label."""
    columns: Any = precision_recall_fscore_support(targets, predicted, labels=range(len(labels)), zero_division=_ZERO)
    names = ("precision", "recall", "f1", "rows")
    return [
        {"label": label} | dict(zip(names, map(float, values), strict=True))
        for label, *values in zip(labels, *columns, strict=True)
    ]


def confusion(targets: np.ndarray, predicted: np.ndarray, count: int) -> np.ndarray:
    """Rows: true label; columns: predicted label."""
    return confusion_matrix(targets, predicted, labels=range(count))

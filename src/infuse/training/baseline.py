"""The number to beat: logistic regression on the frozen base's pooled features."""

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.multiclass import OneVsRestClassifier

from infuse.bases import BaseModel
from infuse.data import Rows
from infuse.texts import bare_features
from infuse.training.batches import encode, one_hot
from infuse.training.metrics import overall


def logistic_regression(
    base: BaseModel, train: Rows, evaluated: dict[str, Rows], max_length: int = 128
) -> dict[str, dict[str, float]]:
    """Accuracy and macro-F1 of scikit-learn's logistic regression, at its defaults, on every set in ``evaluated``."""
    given = logistic_predictions(base, train, evaluated, max_length)
    return {name: overall(targets, predicted) for name, (targets, predicted) in given.items()}


def logistic_predictions(
    base: BaseModel, train: Rows, evaluated: dict[str, Rows], max_length: int = 128
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Targets and predictions of the regression on every set in ``evaluated``.

    The features are the pooled hidden states of the bare base; multi-label data gets one regression per label.
    """
    labels = train.label_set

    def prepared(rows: Rows) -> tuple[np.ndarray, np.ndarray]:
        encoded = encode(base, rows, labels, max_length)
        inputs = bare_features(base, encoded.tokens).numpy()
        targets = one_hot(encoded.targets, len(labels)).to(torch.int) if rows.multi else encoded.targets
        return inputs, targets.numpy()

    model = LogisticRegression(max_iter=2000)
    fitted = (OneVsRestClassifier(model) if train.multi else model).fit(*prepared(train))
    results = {}
    for name, rows in evaluated.items():
        inputs, targets = prepared(rows)
        results[name] = targets, np.asarray(fitted.predict(inputs))
    return results

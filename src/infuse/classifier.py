"""The scikit-learn face of Infuse: fit, predict, save."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.metrics import accuracy_score
from sklearn.utils.validation import check_is_fitted

from infuse.bases import load_base
from infuse.checkpoint import save
from infuse.data import Rows, stratified
from infuse.errors import InfuseError
from infuse.heads import head_of
from infuse.method import Method, make, spelled
from infuse.model import store_of
from infuse.precision import dtype_of, name_of
from infuse.training import Settings, fit
from infuse.training.members import ADAPTER
from infuse.training.metrics import decide
from infuse.training.run import Predictor, open_run


class Classifier(ClassifierMixin, BaseEstimator):
    """A text classifier: a frozen base model, one adapter, one head.

    It follows scikit-learn's conventions (``clone``, ``cross_val_score``, ``GridSearchCV`` work). Labels may be strings
    or numbers; a list of labels per text makes it multi-label.

    Args:
        base: ``minilm``, a folder, or a hub id.
        method: ``IA3()``, ``LoRA(rank=4)``, …, or a string such as ``"lora:rank=4"``; also ``"head"`` and ``"full"``.
        head, pooling, layers, epochs, batch_size, learning_rate, label_smoothing, class_weights, patience, precision,
            max_length, seed: as in :class:`infuse.training.Settings`.
        validation_fraction: share of the rows held out to choose the best epoch by; 0 keeps the last epoch.

    Attributes:
        classes_: the labels, sorted.
        history_: the course of the training.
    """

    def __init__(
        self,
        base: str = "minilm",
        method: Method | str | Mapping[str, Any] = "ia3",
        *,
        head: str = "cosine",
        pooling: str = "auto",
        layers: str = "all",
        epochs: int = Settings.epochs,
        batch_size: int = Settings.batch_size,
        learning_rate: float | None = None,
        label_smoothing: float = Settings.label_smoothing,
        class_weights: bool = False,
        patience: int = Settings.patience,
        precision: str = Settings.precision,
        max_length: int = Settings.max_length,
        validation_fraction: float = 0.1,
        seed: int = 0,
    ):
        self.base = base
        self.method = method
        self.head = head
        self.pooling = pooling
        self.layers = layers
        self.epochs = epochs
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.label_smoothing = label_smoothing
        self.class_weights = class_weights
        self.patience = patience
        self.precision = precision
        self.max_length = max_length
        self.validation_fraction = validation_fraction
        self.seed = seed

    def fit(self, texts: Sequence[str], labels: Sequence[Any]) -> "Classifier":
        """Train on texts and their labels (or lists of labels).

        Raises:
            InfuseError: texts that are empty or no strings, fewer than two labels, settings that cannot work.
        """
        rows, self._names = _rows(texts, labels)
        train, validation = rows, None
        if self.validation_fraction:
            train, validation = stratified(rows, self.validation_fraction, self.seed)
        if validation is not None and not len(validation):
            train, validation = rows, None
        names = {f: getattr(self, f) for f in _SETTINGS}
        settings = Settings(method=spelled(make(self.method)), **names)
        settings.check()
        count = len(rows.label_set) if self.head == "hf" else None
        precision = "fp32" if make(self.method).unfreezes else name_of(dtype_of(self.precision))
        base = load_base(self.base, labels=count, pooling=self.pooling, precision=precision, seed=self.seed)
        fitted = fit(base, train, validation, settings, name=ADAPTER)
        fitted.adapter.info = {"run": {"base": self.base, "max_length": self.max_length, "precision": precision}}
        self._predictor = Predictor(base, ADAPTER, fitted.labels, rows.multi, self.max_length)
        classes = np.array([self._names[label] for label in fitted.labels])
        self._order = np.argsort(classes, kind="stable")  # the head's labels are in the order of their names
        self.classes_ = classes[self._order]
        self.history_ = fitted.history
        self.n_features_in_ = 1
        return self

    def predict_proba(self, texts: Sequence[str]) -> np.ndarray:
        """Probability of every label of ``classes_``, (texts, labels)."""
        check_is_fitted(self, "classes_")
        return self._predictor.probabilities(_checked(texts))[:, self._order]

    def predict(self, texts: Sequence[str]) -> Any:
        """The most probable label of every text; in multi-label mode, a list of those at least half probable.

        Always a label of ``classes_``, as scikit-learn wants it: a threshold of ``infuse calibrate`` plays no part.
        """
        decided = decide(self.predict_proba(texts), self._predictor.multi)
        if self._predictor.multi:
            return [list(self.classes_[row.astype(bool)]) for row in decided]
        return self.classes_[decided]

    def score(self, X: Sequence[str], y: Sequence[Any], sample_weight: Any = None) -> float:  # noqa: N803  # scikit-learn's name
        """Accuracy; in multi-label mode, the share of texts whose whole label set is right."""
        predicted = self.predict(X)
        if self._predictor.multi:
            right = [set(p) == set(t) for p, t in zip(predicted, y, strict=True)]
            return float(np.average(right, weights=sample_weight))
        return float(accuracy_score(y, predicted, sample_weight=sample_weight))

    def save(self, path: str | Path) -> Path:
        """Write the adapter with its head; ``infuse predict`` and :meth:`load` read it (``method="full"`` can't)."""
        check_is_fitted(self, "classes_")
        if make(self.method).unfreezes:
            raise InfuseError("Full fine-tuning makes a new base model, not an adapter; train it with `infuse train`.")
        return save(self._predictor.base.model, ADAPTER, path)

    @classmethod
    def load(cls, path: str | Path, base: str | None = None) -> "Classifier":
        """A fitted classifier from a folder of :meth:`save` or of ``infuse train``; its labels are strings."""
        predictor = open_run(path, base)
        model = predictor.base.model
        method, head = spelled(store_of(model)[ADAPTER].method), head_of(model, ADAPTER).kind
        model = cls(predictor.base.name, method, head=head, max_length=predictor.max_length)
        model._predictor = predictor
        model.classes_ = np.array(predictor.labels)
        model._order = np.arange(len(predictor.labels))
        model.history_ = []
        return model

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.string = True
        tags.input_tags.two_d_array = False
        tags.classifier_tags.multi_label = True
        return tags


_SETTINGS = (
    "head", "pooling", "layers", "epochs", "batch_size", "learning_rate", "label_smoothing", "class_weights",
    "patience", "precision", "max_length", "seed",
)  # fmt: skip


def _rows(texts: Sequence[str], labels: Sequence[Any]) -> tuple[Rows, dict[str, Any]]:
    """Rows with labels as strings, and the way back to the labels as given."""
    if labels is None or isinstance(labels, str) or getattr(labels, "ndim", 1) != 1:
        raise InfuseError("Give a list of labels, one per text, or a list of lists: several per text.")
    texts, labels = _checked(texts), list(labels)
    if len(texts) != len(labels):
        raise InfuseError(f"There are {len(texts)} texts but {len(labels)} labels: give one per text.")
    several = [isinstance(label, list | tuple | set) for label in labels]
    if (multi := any(several)) and not all(several):
        raise InfuseError("Some labels are lists and others are not: give every text a list, or none.")
    each = [one for label in labels for one in (label if multi else (label,))]
    if any(one is None or (isinstance(one, float | np.floating) and np.isnan(one)) for one in each):
        raise InfuseError("A label is None or NaN: give every text a label.")
    names = {str(one): one for one in each}
    strings = tuple(tuple(map(str, label)) if multi else str(label) for label in labels)
    return Rows(tuple(texts), strings), names  # type: ignore[arg-type]  # all of one kind


def _checked(texts: Sequence[str]) -> list[str]:
    if isinstance(texts, str):
        raise InfuseError("Give a list of texts, not one string.")
    listed = list(texts)
    odd = next((i for i, text in enumerate(listed) if not isinstance(text, str) or not text.strip()), None)
    if odd is not None:
        raise InfuseError(f"Text {odd} is empty or no string ({listed[odd]!r}): remove or fill it.")
    return listed

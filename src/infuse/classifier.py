"""The scikit-learn face of Infuse: fit, predict, save."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils.validation import check_is_fitted

from infuse.bases import load_base
from infuse.checkpoint import save
from infuse.data import Rows, stratified
from infuse.data.check import check_rows
from infuse.errors import InfuseError, listed
from infuse.heads import head_of
from infuse.method import Method, make, spelled
from infuse.model import store_of
from infuse.training.fit import fit
from infuse.training.folders import ADAPTER
from infuse.training.metrics import decide
from infuse.training.predictor import Predictor, open_run
from infuse.training.settings import Settings


class Classifier(ClassifierMixin, BaseEstimator):
    """A text classifier: a frozen base model, one adapter, one head.

    It follows scikit-learn's conventions (``clone``, ``cross_val_score``, ``GridSearchCV`` work). Labels are strings,
    numbers or booleans, and come back as such, from a saved file too. A list of labels per text makes it multi-label,
    and so does an indicator matrix (an array, a DataFrame, sparse) with a row of 0 and 1 per text and a column per
    label; then ``predict`` gives one, too. scikit-learn's own tools take matrices only.

    Args:
        base: ``minilm``, a folder, or a hub id.
        method: ``IA3()``, ``LoRA(rank=4)``, …, or a string such as ``"lora:rank=4"``; also ``"head"`` and ``"full"``.
        head, pooling, layers, epochs, batch_size, learning_rate, label_smoothing, class_weights, patience, precision,
            max_length, seed: as in :class:`infuse.training.settings.Settings`.
        validation_fraction: share of the rows held out to choose the best epoch by; 0 keeps the last epoch.

    Attributes:
        classes_: the labels, sorted; of an indicator matrix, its columns.
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
        """Train on texts and their labels (or lists of labels, or an indicator matrix).

        Raises:
            InfuseError: texts that are blank or no strings, fewer than two labels, settings that cannot work.
        """
        if not isinstance(self.base, str | Path):
            raise InfuseError(f"base must name a base model or its folder, such as 'minilm', not {self.base!r}.")
        share = self.validation_fraction
        if share is not None and not isinstance(share, int | float | np.number):
            raise InfuseError(f"validation_fraction must be a number of at least 0 and below 1, not {share!r}.")
        names = {f: getattr(self, f) for f in _SETTINGS}
        settings = Settings(method=spelled(make(self.method)), **names)
        settings.check()
        columns, labels = _columns(labels)
        rows, kind = _rows(texts, labels, columns)
        train, validation = stratified(rows, float(share), self.seed) if share else (rows, None)
        if validation is not None and not len(validation):
            train, validation = rows, None
        name = str(self.base)
        count = len(rows.label_set) if self.head == "hf" else None
        base = load_base(name, labels=count, pooling=self.pooling, precision=settings.trunk_precision, seed=self.seed)
        fitted = fit(base, train, validation, settings, name=ADAPTER)
        fitted.adapter.info = {
            "run": {"base": name, "max_length": self.max_length, "precision": settings.trunk_precision},
            "label_type": kind,
            **({} if columns is None else {"label_columns": list(map(str, columns))}),
        }
        predictor = Predictor(base, ADAPTER, fitted.labels, rows.multi, self.max_length)
        self._answer_by(predictor, kind, fitted.adapter.info.get("label_columns"))
        self.history_ = fitted.history
        return self

    def _answer_by(self, predictor: Predictor, kind: Any, columns: Any = None) -> None:
        labels = predictor.labels
        self._predictor, self._matrix = predictor, isinstance(columns, list) and set(labels) <= set(map(str, columns))
        if self._matrix:
            self.classes_ = _restored(columns, kind)
            self._order = np.array([labels.index(name) if name in labels else -1 for name in columns])
        else:  # the head's labels are in the order of their names
            classes = _restored(labels, kind)
            self._order = np.argsort(classes, kind="stable")
            self.classes_ = classes[self._order]
        self.n_features_in_ = 1

    def predict_proba(self, texts: Sequence[str]) -> np.ndarray:
        """Probability of every label of ``classes_``, (texts, labels); 0 for columns that training never saw a 1 in."""
        check_is_fitted(self, "classes_")
        found = self._predictor.probabilities(_checked(texts))
        return np.pad(found, ((0, 0), (0, 1)))[:, self._order]  # the last column is what -1 means

    def predict(self, texts: Sequence[str]) -> Any:
        """The most probable label of every text; in multi-label mode, those at least half probable.

        Always a label of ``classes_``, as scikit-learn wants it: a threshold of ``infuse calibrate`` plays no part.
        """
        decided = decide(self.predict_proba(texts), self._predictor.multi)
        if not self._predictor.multi:
            return self.classes_[decided]
        return decided if self._matrix else [list(self.classes_[row.astype(bool)]) for row in decided]

    def score(self, X: Sequence[str], y: Sequence[Any], sample_weight: Any = None) -> float:  # noqa: N803  # scikit-learn's name
        """Accuracy; in multi-label mode, the share of texts whose whole label set is right."""
        check_is_fitted(self, "classes_")
        columns, y = _columns(y)
        if self._matrix and list(map(str, columns or ())) != list(map(str, self.classes_)):
            raise InfuseError(f"Give an indicator matrix with the columns of training: {listed(self.classes_)}.")
        rows, kind = _rows(X, y, columns)
        if rows.multi != self._predictor.multi:
            what = "a list of labels" if self._predictor.multi else "one label"
            raise InfuseError(f"Give {what} per text, as in training.")
        if rows.counts and (kind == "str") != (self.classes_.dtype.kind == "U"):
            raise InfuseError(
                f"The classifier's labels are such as {self.classes_.tolist()[0]!r}: give labels like them."
            )
        decided = decide(self.predict_proba(rows.texts), rows.multi)
        if rows.multi:
            named = (set(map(str, self.classes_[row.astype(bool)])) for row in decided)
            right = [given == set(labels) for given, labels in zip(named, rows.label_sets(), strict=True)]
        else:
            right = self.classes_[decided] == _restored([*map(str, rows.labels or ())], kind)
        try:
            return float(np.average(right, weights=sample_weight))
        except (TypeError, ValueError, ZeroDivisionError):
            raise InfuseError("sample_weight needs a number per text, and not all zero.") from None

    def save(self, path: str | Path) -> Path:
        """Write the adapter with its head; ``infuse predict`` and :meth:`load` read it (``method="full"`` can't)."""
        check_is_fitted(self, "classes_")
        if make(self.method).unfreezes:
            raise InfuseError("Full fine-tuning makes a new base model, not an adapter; train it with `infuse train`.")
        return save(self._predictor.base.model, ADAPTER, path)

    @classmethod
    def load(cls, path: str | Path, base: str | None = None) -> "Classifier":
        """A fitted classifier from a folder of :meth:`save`, or of ``infuse train``, whose labels are strings."""
        predictor = open_run(path, base)
        model = predictor.base.model
        adapter, head = store_of(model)[ADAPTER], head_of(model, ADAPTER).kind
        model = cls(predictor.base.name, spelled(adapter.method), head=head, max_length=predictor.max_length)
        model._answer_by(predictor, adapter.info.get("label_type", "str"), adapter.info.get("label_columns"))
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


_KINDS: dict[str, Any] = {
    "strings": str, "booleans": bool | np.bool_, "numbers": int | float | np.integer | np.floating,
}  # fmt: skip


def _columns(labels: Any) -> tuple[list[Any] | None, Any]:
    """The columns of an indicator matrix, and its rows as lists of labels; None, and the labels, of anything else."""
    shape = getattr(labels, "shape", ())
    if len(shape) != 2 or shape[1] < 2:
        return None, labels
    columns = list(getattr(labels, "columns", range(shape[1])))
    matrix = labels.toarray() if hasattr(labels, "toarray") else np.asarray(labels)
    if not np.isin(matrix, (0, 1)).all():
        raise InfuseError(
            "An array of labels with several columns has a 1 for each label of a text and 0 elsewhere, as "
            "scikit-learn's MultiLabelBinarizer makes it; this one has other values."
        )
    return columns, [[name for name, one in zip(columns, row, strict=True) if one] for row in matrix]


def _rows(texts: Sequence[str], labels: Sequence[Any], columns: list[Any] | None = None) -> tuple[Rows, str]:
    """Rows with labels as strings, and the kind that makes them (or the ``columns``) what they were again."""
    texts, labels = _checked(texts), _listed(labels, "labels, one per text (or of lists: several per text)")
    if len(texts) != len(labels):
        raise InfuseError(f"There are {len(texts)} texts but {len(labels)} labels: give one per text.")
    several = [isinstance(label, list | tuple | set) for label in labels]
    if (multi := any(several)) and not all(several):
        raise InfuseError("Some labels are lists and others are not: give every text a list, or none.")
    each = [*(columns or ()), *(one for label in labels for one in (label if multi else (label,)))]
    if any(one is None or (isinstance(one, float | np.floating) and np.isnan(one)) for one in each):
        raise InfuseError("A label is None or NaN: give every text a label.")
    typed = _typed(each)
    strings = map(str, typed[len(columns or ()) :])
    given = (tuple(dict.fromkeys(islice(strings, len(label)))) for label in labels) if multi else strings
    rows = Rows(tuple(texts), tuple(given))  # type: ignore[arg-type]  # all of one kind
    check_rows(rows, "the data")
    kind = {"U": "str", "O": "int"}.get(typed.dtype.kind, typed.dtype.name)
    return rows, kind


def _typed(labels: list[Any]) -> np.ndarray:
    """Labels as one array: of strings, booleans or numbers."""
    kinds = {next((n for n, kind in _KINDS.items() if isinstance(one, kind)), type(one).__name__) for one in labels}
    if odd := sorted(kinds - _KINDS.keys()):
        raise InfuseError(f"A label is of the type {odd[0]}: labels are strings, numbers or booleans.")
    if len(kinds) > 1:
        raise InfuseError(f"Some labels are {' and others are '.join(sorted(kinds))}: use one kind.")
    array = np.array(labels)
    whole = kinds == {"numbers"} and all(isinstance(one, int | np.integer) for one in labels)
    return array if array.dtype.kind in "iu" or not whole else np.array(list(map(int, labels)), object)  # beyond int64


def _restored(labels: Sequence[str], kind: Any) -> np.ndarray:
    """Labels of :func:`_typed` from their strings; of a kind that isn't known here they stay strings."""
    try:
        if kind == "bool":
            return np.array([{"True": True, "False": False}[label] for label in labels])
        if kind == "int":
            return np.array(list(map(int, labels)), object)
        known = isinstance(kind, str) and kind != "str" and np.dtype(kind).kind in "iuf"
        return np.array(labels).astype(kind) if known else np.array(labels)
    except (TypeError, ValueError, KeyError, OverflowError):
        return np.array(labels)


def _checked(texts: Sequence[str]) -> list[str]:
    given = _listed(texts, "texts")
    odd = next((i for i, text in enumerate(given) if not isinstance(text, str) or not text.strip()), None)
    if odd is not None:
        shown = " ".join(repr(given[odd]).split())[:60]
        raise InfuseError(f"Text {odd} is empty or no string ({shown}): remove or fill it.")
    return given


def _listed(given: Any, what: str) -> list[Any]:
    odd = isinstance(given, str | bytes | Mapping | set | frozenset) or not isinstance(given, Iterable)
    dimensions = getattr(given, "ndim", 1)
    if odd or dimensions != 1:
        kind = "None" if given is None else "one string" if isinstance(given, str) else type(given).__name__
        raise InfuseError(f"Give a list of {what}, not {kind if odd else f'an array of {dimensions} dimensions'}.")
    return list(given)

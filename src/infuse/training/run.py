"""One run of ``infuse train``: from a data source and a base's name to a run folder."""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from transformers import TrainerCallback

from infuse import storage
from infuse.bases import BaseModel, load_base, write_plain
from infuse.checkpoint import files_of, header
from infuse.data import Rows, Splits, digest, splits_of
from infuse.errors import InfuseError, WriteError
from infuse.formats.bundle import write_files
from infuse.method import Mixer, make
from infuse.model import fusable_sites, store_of, summary
from infuse.report import Drawn
from infuse.sites import find_sites, select
from infuse.texts import probabilities
from infuse.training.baseline import logistic_regression
from infuse.training.batches import encode
from infuse.training.config import TrainConfig
from infuse.training.engine import head_rate
from infuse.training.fit import fit
from infuse.training.folders import (
    ADAPTER,
    CHECKPOINTS,
    CONFIG,
    METRICS,
    MODEL,
    as_yaml,
    changed,
    check_folder,
    config_file,
    ended,
    write_csv,
)  # fmt: skip
from infuse.training.members import ATTENTION, load_members, write_attention
from infuse.training.metrics import confusion, decide, overall, per_class
from infuse.training.page import PAGE, write_page
from infuse.training.plots import confusion_plot, curves_plot
from infuse.training.predictor import Predictor

_DIGEST = "data.sha256"
_WRITTEN = (
    METRICS, CONFIG, ADAPTER, MODEL, PAGE, "per_class.csv", "confusion.png", "curves.csv", "curves.png",
    *(f"{name}.{kind}" for name in ATTENTION for kind in ("csv", "png")),
)  # fmt: skip
"""All that a run may leave in its folder."""


@dataclass
class Run:
    """What a run found."""

    folder: Path
    metrics: dict[str, Any]
    warnings: list[str] = field(default_factory=list)


Say = Callable[[str], None]


def train(
    config: TrainConfig,
    *,
    say: Say = lambda _: None,
    callbacks: Sequence[TrainerCallback] = (),
    base: BaseModel | None = None,
    splits: Splits | None = None,
    keep: bool = False,
) -> Run:
    """Read, check, train, measure, and write the run folder.

    A base and rows that are already loaded as ``config`` says can be handed over; the base keeps the adapter. With
    ``keep``, a finished run of the same settings and rows in the folder is given back as it is.

    The folder holds ``config.yaml`` (every setting), ``adapter/``, ``metrics.json`` (with what ``auto`` and the
    method's learning rate were, under ``resolved``), ``per_class.csv``, ``confusion.png`` (for one label a row),
    ``curves.csv`` and ``curves.png``, and these as one page, ``report.html``; under ``method: full`` also the trained
    model, in ``model/``.
    """
    config.check()
    folder = config.folder()
    if not storage.in_use(folder):
        _check_folder(config, keep)  # before it is made, or touched
    with storage.writing(folder) as cut_short:
        keep |= cut_short and not config.overwrite  # of a command that was killed in its very last steps
        _check_folder(config, keep)
        splits, warnings = (splits, []) if splits else splits_of(vars(config))
        for warning in warnings:
            say(f"warning: {warning}")
        data = digest(splits.train, splits.validation)
        metrics = _kept(config, data)
        if metrics is None:
            metrics = _trained(config, splits, data, base, say, callbacks)
        else:
            say(f"{folder} holds this run already: it is kept")
    return Run(folder, metrics, warnings)


def _check_folder(config: TrainConfig, keep: bool) -> None:
    """Refuse a folder that holds something else, or another run, which is not to be overwritten."""
    folder = config.folder()
    path = config_file(folder)
    known = path.exists()
    check_folder(folder, known or ended(folder))
    if config.overwrite and known:
        return
    begun = path == folder / CHECKPOINTS / CONFIG
    if begun and (others := changed(config, path)):
        raise InfuseError(
            f"{folder} holds an interrupted run with other settings ({', '.join(others)}); "
            "repeat them to resume it, choose another --out, or pass --overwrite."
        )
    if not begun and ended(folder) and not (keep and known and not changed(config, path)):
        raise InfuseError(f"{folder} holds a finished run; choose another --out, or pass --overwrite.")


def _kept(config: TrainConfig, data: str) -> dict[str, Any] | None:
    """The metrics of a finished run in the folder, if there is one and no other has begun to replace it.

    Raises:
        InfuseError: the data isn't that with which the run, begun or finished, was begun.
    """
    folder, begun = config.folder(), config.folder() / CHECKPOINTS / _DIGEST
    if config.overwrite:
        return None
    finished = ended(folder) and not begun.exists()
    facts = header(folder / ADAPTER)["info"] if finished else {}
    # None: nothing was begun here, or by what tells no digest.
    before = begun.read_text(errors="replace") if begun.exists() else facts.get("data_sha256")
    if before not in (None, data):
        raise InfuseError(
            f"The data has changed since the run in {folder} was begun; choose another --out, or pass --overwrite."
        )
    return _metrics(folder) if finished else None


def _trained(
    config: TrainConfig,
    splits: Splits,
    data: str,
    base: BaseModel | None,
    say: Say,
    callbacks: Sequence[TrainerCallback],
) -> dict[str, Any]:
    """Train, measure, and write all of the run; its metrics."""
    folder, method = config.folder(), make(config.method)
    labels = splits.train.label_set
    precision = config.trunk_precision
    count = len(labels) if config.head == "hf" else None
    base = base or load_base(config.base, labels=count, pooling=config.pooling, precision=precision, seed=config.seed)
    for site in select(find_sites(base.model), method.roles, config.layers):
        method.check(site)
    members = load_members(base.model, config.members)
    if bool(members) != isinstance(method, Mixer):
        raise InfuseError("Fusion mixes saved runs: use infuse fuse RUN RUN … (or method: fusion with members).")
    if members:
        fusable_sites(base.model, members, config.layers)  # refuses what can't be fused, before anything is written
    say(f"{len(splits.train):,} training rows, {len(splits.validation):,} to validate on, {len(labels)} labels")

    evaluated = {"validation": splits.validation} | ({"test": splits.test} if splits.test else {})
    baseline = None
    if config.baseline:
        baseline = logistic_regression(base, splits.train, evaluated, config.max_length)
    with _begun(config, data):
        started = time.perf_counter()
        fitted = fit(
            base, splits.train, splits.validation, config,
            name=ADAPTER, checkpoints=folder / CHECKPOINTS, callbacks=callbacks, members=members,
        )  # fmt: skip
        seconds = time.perf_counter() - started
        counts = summary(base.model)
        inside = counts.deltas(ADAPTER)
        metrics: dict[str, Any] = {
            "method": config.method,
            "base": config.base,
            "resolved": {
                "learning_rate": config.learning_rate or method.rate,
                "head_learning_rate": config.head_learning_rate or head_rate(fitted.adapter),
                "precision": precision,
                "pooling": base.pooling,
            },
            "parameters": {
                "transformer": inside,
                "head": counts.adapters[ADAPTER].get("head", 0),
                "base": counts.base,
                "percent_of_base": round(100 * inside / counts.base, 4),
            },
            "rows": {name: len(rows) for name, rows in {"train": splits.train, **evaluated}.items()},
            "seconds": round(seconds, 1),
            "resumed": fitted.resumed,
            "epochs": max((h["epoch"] for h in fitted.history if "eval_loss" in h), default=config.epochs),
            "baseline": baseline,
        }
        reached = baseline["validation"]["macro_f1"] if baseline else None
        figures = {"curves": Drawn("Learning curves", partial(curves_plot, fitted.history, reached))}
        classes: list[dict[str, Any]] = []
        for name, rows in evaluated.items():
            predicted, targets = _predict(base, rows, fitted.labels, config.max_length)
            metrics[name] = overall(targets, predicted)
            if name == "validation":
                classes = per_class(targets, predicted, fitted.labels)
                if not rows.multi:
                    matrix = confusion(targets, predicted, len(labels))
                    figures["confusion"] = Drawn("Confusion", partial(confusion_plot, matrix, fitted.labels))
        fitted.adapter.info = {
            "run": {"base": config.base, "max_length": config.max_length, "precision": precision},
            "metrics": {name: metrics[name] for name in evaluated},
            "data": config.data,
            "data_sha256": data,
        }
        with storage.replacing(folder, (*_WRITTEN, CHECKPOINTS)) as new:
            write_model(base, method.unfreezes, new)
            if members:
                figures |= write_attention(base, fitted.adapter, splits.validation, config.max_length, new)
            _write_curves(new, fitted.history)
            write_csv(new / "per_class.csv", classes)
            write_page(new, config, metrics, classes, figures)
            storage.write(new / CONFIG, as_yaml(config))
            storage.write(new / METRICS, json.dumps(metrics, indent=1) + "\n")
    return metrics


def evaluate(predictor: Predictor, rows: Rows) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Overall measures and measures per class of a predictor on labelled rows."""
    targets = predictor.encoded(rows).targets.numpy()
    predicted = decide(predictor.probabilities(rows.texts), predictor.multi)
    return overall(targets, predicted), per_class(targets, predicted, predictor.labels)


def _metrics(folder: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((folder / METRICS).read_text(encoding="utf-8")))
    except (ValueError, TypeError):
        raise InfuseError(f"{folder / METRICS} is damaged; choose another --out, or pass --overwrite.") from None


@contextmanager
def _begun(config: TrainConfig, data: str) -> Iterator[None]:
    """A folder inside the run's for the states of its training, which says from the first what they belong to."""
    checkpoints, older = config.folder() / CHECKPOINTS, ended(config.folder())
    if config.overwrite or not (checkpoints / CONFIG).exists():
        storage.begin(checkpoints, {CONFIG: as_yaml(config), _DIGEST: data})
    try:
        yield
    except Exception as error:
        if older or (isinstance(error, InfuseError) and not isinstance(error, WriteError)):
            # The older run goes on, or other settings may now use the folder; else the run can be resumed.
            with suppress(InfuseError):
                storage.remove(checkpoints)
        raise


def _predict(base: BaseModel, rows: Rows, labels: Sequence[str], max_length: int) -> tuple[np.ndarray, np.ndarray]:
    encoded = encode(base, rows, labels, max_length)
    given = probabilities(base.model, encoded.tokens, base.pad_id, ADAPTER)
    return decide(given, rows.multi), encoded.targets.numpy()


def write_model(base: BaseModel, whole: bool, folder: Path) -> None:
    """The adapter, in ``adapter/``; with ``whole``, under full fine-tuning, also the model, in ``model/``."""
    write_files(folder / ADAPTER, files_of(base.model, ADAPTER))
    if whole:
        with storage.reported(folder / MODEL):
            write_plain(base, store_of(base.model)[ADAPTER], folder / MODEL)


def _write_curves(folder: Path, history: list[dict[str, float]]) -> None:
    columns = ("step", "epoch", "loss", "learning_rate", "grad_norm", "eval_loss", "eval_accuracy", "eval_macro_f1")
    write_csv(
        folder / "curves.csv", [{c: h.get(c, "") for c in columns} for h in history if {"loss", "eval_loss"} & h.keys()]
    )

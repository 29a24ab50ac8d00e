"""One run of ``infuse train``: from a data source and a base's name to a run folder."""

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from transformers import TrainerCallback

from infuse.bases import BaseModel, load_base
from infuse.checkpoint import header, load, save, setup_of
from infuse.data import Rows, Splits, digest, splits_of
from infuse.data.check import check_rows
from infuse.errors import InfuseError, listed
from infuse.heads import Answer, Head, answer, head_of
from infuse.method import Mixer, make
from infuse.model import summary
from infuse.precision import dtype_of, name_of
from infuse.sites import find_sites, select
from infuse.texts import probabilities, tokenize
from infuse.training.baseline import logistic_regression
from infuse.training.engine import Encoded
from infuse.training.fit import encode, fit
from infuse.training.members import (
    ADAPTER,
    ATTENTION,
    CHECKPOINTS,
    load_members,
    saved_adapter,
    write_attention,
    write_csv,
)  # fmt: skip
from infuse.training.metrics import confusion, decide, overall, per_class
from infuse.training.plots import confusion_plot, curves_plot
from infuse.training.settings import Settings

_CONFIG, _METRICS, MODEL = "config.yaml", "metrics.json", "model"
_DIGEST = "data.sha256"


@dataclass
class TrainConfig(Settings):
    """Train one adapter and leave a run folder."""

    config: Path | None = None
    """A YAML file of these settings (the config.yaml of a run folder, say); flags go before it."""
    data: str = "sample"
    """A CSV, TSV, JSONL or Parquet file, a folder of splits, a hub data set, banking77, or sample (bundled)."""
    base: str = "minilm"
    """The base model: minilm, a folder, or a hub name such as roberta-base."""
    out: Path | None = None
    """The run folder; by default runs/DATA-BASE-METHOD. An interrupted run in it is resumed."""
    validation: str | None = None
    """Data to choose the best epoch by; by default the data's own validation split, or a part of its rows."""
    test: str | None = None
    """Data to report on once at the end; by default the data's own test split, if it has one."""
    text: str = "text"
    """Column of the texts."""
    label: str = "label"
    """Column of the labels."""
    multi: bool = False
    """Several labels a row, separated by | in CSV files (lists in JSONL and Parquet are recognised)."""
    validation_fraction: float = 0.1
    """Share of the rows to validate on where the data has no validation split."""
    baseline: bool = True
    """Fit logistic regression on frozen features as the number to beat."""
    members: tuple[Path, ...] = ()
    """Run folders (or adapters) to fuse, with method: fusion; infuse fuse takes them as arguments too."""
    overwrite: bool = False
    """Replace what the run folder holds, once the new run has succeeded."""

    def folder(self) -> Path:
        if self.out is not None:
            return self.out
        parts = (Path(self.data).stem, Path(self.base).name, make(self.method).name)
        return Path("runs") / "-".join(part.replace("/", "-") for part in parts)


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

    The folder holds ``config.yaml`` (every setting, as resolved), ``adapter/``, ``metrics.json``, ``per_class.csv``,
    ``confusion.png``, ``curves.csv`` and ``curves.png``; under ``method: full`` also the trained model, in ``model/``.
    """
    config.check()
    method = make(config.method)
    folder = _prepare(config, keep)
    warnings: list[str] = []
    if splits is None:
        splits, warnings = splits_of(vars(config))
    for warning in warnings:
        say(f"warning: {warning}")
    data, known = digest(splits.train, splits.validation), folder / CHECKPOINTS / _DIGEST
    if not config.overwrite:
        ended = _metrics(folder) if _ended(folder) else {}
        facts = header(folder / ADAPTER)["info"] if ended else {}
        # Runs of earlier versions tell no digest.
        before = known.read_text(errors="replace") if known.exists() else facts.get("data_sha256")
        if before not in (None, data):
            raise InfuseError(
                f"The data has changed since the run in {folder} was begun; choose another --out, or pass --overwrite."
            )
        if ended:
            say(f"{folder} holds this run already: it is kept")
            return Run(folder, ended, warnings)
    labels = splits.train.label_set
    precision = "fp32" if method.unfreezes else name_of(dtype_of(config.precision))
    count = len(labels) if config.head == "hf" else None
    base = base or load_base(config.base, labels=count, pooling=config.pooling, precision=precision, seed=config.seed)
    for site in select(find_sites(base.model), method.roles, config.layers):
        method.check(site)
    members = load_members(base.model, config.members)
    if bool(members) != isinstance(method, Mixer):
        raise InfuseError("Fusion mixes saved runs: use infuse fuse RUN RUN … (or method: fusion with members).")
    say(f"{len(splits.train):,} training rows, {len(splits.validation):,} to validate on, {len(labels)} labels")

    evaluated = {"validation": splits.validation} | ({"test": splits.test} if splits.test else {})
    baseline = None
    if config.baseline:
        baseline = logistic_regression(base, splits.train, evaluated, config.max_length)
    with _staged(config, data) as new:
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
        for name, rows in evaluated.items():
            predicted, targets = _predict(base, rows, fitted.labels, config.max_length)
            metrics[name] = overall(targets, predicted)
            if name == "validation" or len(evaluated) == 1:
                _write_classes(new, targets, predicted, fitted.labels)
                if not rows.multi:
                    confusion_plot(confusion(targets, predicted, len(labels)), fitted.labels, new / "confusion.png")
        fitted.adapter.info = {
            "run": {"base": config.base, "max_length": config.max_length, "precision": precision},
            "metrics": {name: metrics[name] for name in evaluated},
            "data": config.data,
            "data_sha256": data,
        }
        write_model(base, method.unfreezes, new)
        if members:
            write_attention(base, fitted.adapter, splits.validation, config.max_length, new)
        _write_curves(new, fitted.history)
        curves_plot(fitted.history, baseline["validation"]["macro_f1"] if baseline else None, new / "curves.png")
        (new / _METRICS).write_text(json.dumps(metrics, indent=1) + "\n")
    return Run(folder, metrics, warnings)


@dataclass
class Predictor:
    """A trained adapter over its base, ready to answer."""

    base: BaseModel
    adapter: str
    labels: tuple[str, ...]
    multi: bool
    max_length: int

    def probabilities(self, texts: Sequence[str]) -> np.ndarray:
        """(texts, labels)"""
        tokens = tokenize(self.base.tokenizer, texts, self.max_length)
        return probabilities(self.base.model, tokens, self.base.pad_id, self.adapter)

    @property
    def head(self) -> Head:
        return head_of(self.base.model, self.adapter)

    def answers(self, texts: Sequence[str], top_k: int = 3) -> list[Answer]:
        """An answer per text; its label is ``None`` where the text is out of scope."""
        head = self.head
        return [answer(head, row, top_k) for row in self.probabilities(texts)]

    def encoded(self, rows: Rows) -> Encoded:
        """Labelled rows as tokens and targets; an error for rows that the adapter can't be measured on."""
        check_rows(rows, "the data")
        if rows.multi != self.multi:
            have, mend = ("several labels", "pass") if self.multi else ("one label", "leave out")
            raise InfuseError(f"The run gives each text {have}, unlike the data: {mend} --multi, or use other data.")
        return encode(self.base, rows, self.labels, self.max_length)


def open_run(path: str | Path, base: str | None = None, precision: str | None = None) -> Predictor:
    """The adapter of a run folder (or an adapter's own folder), loaded onto its base.

    Args:
        path: a folder that ``infuse train`` or :meth:`Classifier.save` wrote.
        base: the base to use, if it is not found under the name that was used in training.
        precision: of the trunk; by default the one in which the adapter was trained and measured.
    """
    folder, adapter = Path(path), saved_adapter(path)
    facts = header(adapter)
    if facts["head"] is None:
        raise InfuseError(f"The adapter in {adapter} has no classification head; it can't label texts.")
    setup = setup_of(facts, adapter)
    own = folder / MODEL
    name = base or (str(own) if own.is_dir() else setup.base)
    head = facts["head"]
    loaded = load_base(
        name,
        labels=len(head["labels"]) if head["kind"] == "hf" else None,
        pooling=head["pooling"],
        precision=precision or setup.precision,
    )
    load(loaded.model, adapter, name=ADAPTER)
    return Predictor(loaded, ADAPTER, tuple(head["labels"]), head["multi"], setup.max_length)


def evaluate(predictor: Predictor, rows: Rows) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Overall measures and measures per class of a predictor on labelled rows."""
    targets = predictor.encoded(rows).targets.numpy()
    predicted = decide(predictor.probabilities(rows.texts), predictor.multi)
    return overall(targets, predicted), per_class(targets, predicted, predictor.labels)


def data_of(run: str | Path) -> dict[str, Any]:
    """Where ``config.yaml`` in a run folder says that its rows come from; empty if it is damaged or not there."""
    found = read_settings(Path(run) / _CONFIG) or {}
    names = ("data", "validation", "test", "text", "label", "multi", "validation_fraction", "seed")
    about = {name: found[name] for name in names if name in found}
    try:
        TrainConfig(**about).check()
    except InfuseError:
        return {}
    return about if "data" in about else {}


def read_settings(path: Path) -> dict[str, Any] | None:
    """What a file of :func:`as_yaml` says; ``None`` if it is damaged."""
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return None
    return found if isinstance(found, dict) else None


def as_yaml(config: Any) -> str:
    """A dataclass of settings as YAML that the command line reads back."""
    plain = {k: _plain(v) for k, v in asdict(config).items() if k != "config"}
    return yaml.safe_dump(plain, sort_keys=False)


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(each) for each in value]
    return str(value) if isinstance(value, Path) else value


def changed(config: Any, path: Path, free: Sequence[str] = ("out", "overwrite")) -> list[str]:
    """The settings that differ from those that the same command wrote into a file, but for those that may.

    Raises:
        InfuseError: the file is damaged.
    """
    before, now = read_settings(path), yaml.safe_load(as_yaml(config))
    if before is None:
        raise InfuseError(
            f"{path} is damaged, so that nobody can tell which settings it had; choose another --out, or pass "
            "--overwrite."
        )
    return [name for name in now if name not in free and before.get(name) != now[name]]


def config_file(folder: Path) -> Path:
    """Where the settings of the run in the folder are: a run that has not ended keeps them beside its checkpoints."""
    begun = folder / CHECKPOINTS / _CONFIG
    return begun if begun.exists() else folder / _CONFIG


def check_folder(folder: Path, ours: bool) -> Path:
    """The folder, if a command may write into it: it is not there yet, empty, or ours, written by the same command."""
    if folder.exists() and not folder.is_dir():
        raise InfuseError(f"{folder} is a file; choose another folder to write.")
    above = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise InfuseError(f"{above} is no folder that can be written into; choose another folder to write.")
    if not ours and folder.exists() and (names := sorted(path.name for path in folder.iterdir())):
        raise InfuseError(f"{folder} holds other files ({listed(names, 3)}); choose an empty or new folder.")
    return folder


def _ended(folder: Path) -> bool:
    return (folder / _METRICS).exists() and not (folder / CHECKPOINTS).exists()


def _metrics(folder: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((folder / _METRICS).read_text(encoding="utf-8")))
    except (ValueError, TypeError):
        raise InfuseError(f"{folder / _METRICS} is damaged; choose another --out, or pass --overwrite.") from None


def _prepare(config: TrainConfig, keep: bool) -> Path:
    folder = config.folder()
    known = config_file(folder).exists()
    check_folder(folder, known or _ended(folder))
    if config.overwrite and known:
        return folder
    written = config_file(folder)
    if _ended(folder) and not (keep and known and not changed(config, written)):
        raise InfuseError(f"{folder} holds a finished run; choose another --out, or pass --overwrite.")
    if (folder / CHECKPOINTS).exists() and known and (others := changed(config, written)):
        raise InfuseError(
            f"{folder} holds an interrupted run with other settings ({', '.join(others)}); "
            "repeat them to resume it, choose another --out, or pass --overwrite."
        )
    return folder


@contextmanager
def _staged(config: TrainConfig, data: str) -> Iterator[Path]:
    """A folder for what a run makes, put into the run's own once all is made: an older run stays until then."""
    folder = config.folder()
    begun = folder / CHECKPOINTS
    if config.overwrite:
        shutil.rmtree(begun, ignore_errors=True)
    new = begun / "results"
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    (begun / _CONFIG).write_text(as_yaml(config))
    (begun / _DIGEST).write_text(data)
    try:
        yield new
    except Exception as error:
        if isinstance(error, InfuseError) or (folder / _METRICS).exists():  # else the run can be resumed
            shutil.rmtree(begun, ignore_errors=True)  # other settings may now use the folder, or the older run goes on
        raise
    _clear(folder)
    for made in (*new.iterdir(), begun / _CONFIG):
        os.replace(made, folder / made.name)
    shutil.rmtree(begun)


def _clear(folder: Path) -> None:
    for name in (ADAPTER, MODEL):
        shutil.rmtree(folder / name, ignore_errors=True)
    heat_maps = (f"{name}.{kind}" for name in ATTENTION for kind in ("csv", "png"))
    for name in (_METRICS, _CONFIG, "per_class.csv", "confusion.png", "curves.csv", "curves.png", *heat_maps):
        (folder / name).unlink(missing_ok=True)


def _predict(base: BaseModel, rows: Rows, labels: Sequence[str], max_length: int) -> tuple[np.ndarray, np.ndarray]:
    encoded = encode(base, rows, labels, max_length)
    given = probabilities(base.model, encoded.tokens, base.pad_id, ADAPTER)
    return decide(given, rows.multi), encoded.targets.numpy()


def write_model(base: BaseModel, whole: bool, folder: Path) -> None:
    """The adapter, in ``adapter/``; with ``whole``, under full fine-tuning, also the model, in ``model/``."""
    save(base.model, ADAPTER, folder / ADAPTER)
    if whole:
        model: Any = base.model
        own = {k: v for k, v in model.state_dict().items() if not k.startswith("infuse.")}
        model.save_pretrained(folder / MODEL, state_dict=own)
        base.tokenizer.save_pretrained(folder / MODEL)


def _write_classes(folder: Path, targets: np.ndarray, predicted: np.ndarray, labels: Sequence[str]) -> None:
    write_csv(folder / "per_class.csv", per_class(targets, predicted, labels))


def _write_curves(folder: Path, history: list[dict[str, float]]) -> None:
    columns = ("step", "epoch", "loss", "learning_rate", "grad_norm", "eval_loss", "eval_accuracy", "eval_macro_f1")
    write_csv(
        folder / "curves.csv", [{c: h.get(c, "") for c in columns} for h in history if {"loss", "eval_loss"} & h.keys()]
    )

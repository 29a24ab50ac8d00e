"""A whole comparison: every base, method and seed; what is finished is on disk at once and never run again."""

import hashlib
import json
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from infuse import storage
from infuse.bases import BaseModel, load_base, skeleton
from infuse.comparing.cell import LOGISTIC, Cell, Task, epochs_within, measure, measure_logistic
from infuse.comparing.probe import read_probe
from infuse.comparing.results import report_on
from infuse.comparing.settings import CompareConfig
from infuse.data import splits_of
from infuse.errors import InfuseError, WriteError
from infuse.method import make
from infuse.report import Report, put
from infuse.sites import find_sites, select
from infuse.training.folders import as_yaml, changed, check_folder
from infuse.units import duration

CELLS, _CONFIG = "cells", "config.yaml"
_GROWS = ("out", "overwrite", "base", "methods", "seeds", "baseline")
"""Settings that may differ when a comparison goes on: they add cells, and change none."""


@dataclass
class Comparison:
    """What was compared: the folder, all cells, and the report in it."""

    folder: Path
    cells: list[Cell]
    report: Report


@dataclass(frozen=True)
class Key:
    """Which cell: logistic regression has no seed."""

    base: str
    method: str
    seed: int

    def path(self, folder: Path) -> Path:
        parts = (Path(self.base).name, self.method, f"seed{self.seed}")
        name = "-".join(re.sub(r"[^\w.+]+", "-", part) for part in parts)
        own = hashlib.sha256(repr(self).encode()).hexdigest()[:6]  # two folders may end alike
        return folder / CELLS / f"{name}-{own}.json"


Say = Callable[[str], None]
Callbacks = Callable[[], Sequence[TrainerCallback]]


def compare(config: CompareConfig, *, say: Say = lambda _: None, callbacks: Callbacks = tuple) -> Comparison:
    """Measure every method on every base with every seed, and write the report.

    Args:
        config: what to compare, and on what.
        say: gets a line before every cell, and warnings.
        callbacks: makes callbacks of Trainer for the progress of one run.
    Raises:
        InfuseError: data, bases or settings that cannot work, before anything is trained or written. Once the
            comparison runs, a method that fails is reported with the reason, and the others go on.
    """
    config.check()
    task, warnings = _task(config)
    for warning in warnings:
        say(f"warning: {warning}")
    planned, skipped = _plan(config)
    remarks = [*(f"About the data: {warning}" for warning in warnings), *skipped]
    _check_folder(config)  # before it is made
    with storage.writing(config.folder()):
        _check_folder(config)
        _begin(config)
        return _run(config, task, planned, remarks, say, callbacks)


def _run(
    config: CompareConfig, task: Task, planned: list[Key], remarks: list[str], say: Say, callbacks: Callbacks
) -> Comparison:
    """Measure what is missing, and write the report."""
    cells = {key: cell for key in planned if (cell := _finished(config.folder(), key, task))}
    missing = [key for key in planned if key not in cells]
    say(f"{len(planned)} cells, {len(planned) - len(missing)} of them finished before")
    runner = _Runner(config, task, cells, say, callbacks)
    begun = time.perf_counter()
    for done, key in enumerate(missing):
        left = (time.perf_counter() - begun) / done * (len(missing) - done) if done else None
        about = "" if left is None else f", about {duration(left)} left"
        seed = "" if key.method == LOGISTIC else f", seed {key.seed}"
        say(f"[{len(planned) - len(missing) + done + 1}/{len(planned)}] {key.base}: {key.method}{seed}{about}")
        cells[key] = runner.run(key)
        if "error" in cells[key]:
            say(f"warning: {key.method} failed: {cells[key]['error']}")
        storage.write(key.path(config.folder()), json.dumps(cells[key]) + "\n")
        last_of_round = done + 1 < len(missing) and missing[done + 1].seed != key.seed
        if last_of_round and not config.overwrite:  # a report of what there is so far; an older one stays to the end
            _report(config, report_on(config, task, _in_order(planned, cells), remarks))
    ordered = _in_order(planned, cells)
    report = report_on(config, task, ordered, remarks)
    _report(config, report)
    return Comparison(config.folder(), ordered, report)


class _Runner:
    """Runs cells one after the other, and keeps the base loaded from one to the next."""

    def __init__(self, config: CompareConfig, task: Task, cells: dict[Key, Cell], say: Say, callbacks: Callbacks):
        self.config, self.task, self.cells, self.say, self.callbacks = config, task, cells, say, callbacks
        self.loaded: BaseModel | None = None

    def run(self, key: Key) -> Cell:
        identity = {"base": key.base, "method": key.method, "seed": key.seed, "rows": self.task.digest()}
        try:
            return identity | self.measured(key)
        except WriteError:  # no fault of the method's
            raise
        except (InfuseError, torch.OutOfMemoryError) as error:
            self.loaded = None  # the failed adapter may still be attached
            return identity | {"error": str(error)}

    def measured(self, key: Key) -> Cell:
        config = self.config
        if key.method == LOGISTIC:
            return measure_logistic(self.base(key), self.task, config.max_length)
        epochs = config.epochs
        if config.time is not None:
            same = [c for k, c in self.cells.items() if (k.base, k.method) == (key.base, key.method) and "epochs" in c]
            settings = config.settings(key.method, key.seed)
            epochs = (
                same[0]["epochs"] if same else epochs_within(self.base(key), self.task.train, settings, config.time)
            )
        cell = measure(
            self.base(key), self.task, config.settings(key.method, key.seed, epochs),
            limit=config.time, with_costs=key.seed == config.seed, callbacks=self.callbacks(),
        )  # fmt: skip
        if (cell.get("costs") or {"peak": 0}).get("peak") is None:
            self.say(f"warning: the process that measures the peak memory of {key.method} ended early")
        return {"epochs": epochs, "precision": self.precision(key)} | cell

    def base(self, key: Key) -> BaseModel:
        """The base of a cell: shared by the methods that leave it as it is, fresh for those that change it."""
        if key.method != LOGISTIC and make(key.method).unfreezes:
            self.loaded = None  # one base in memory is enough
            return self.load(key)
        if self.loaded is None or self.loaded.name != key.base:
            self.loaded = None
            self.loaded = self.load(key)
        return self.loaded

    def load(self, key: Key) -> BaseModel:
        return load_base(key.base, pooling=self.config.pooling, precision=self.precision(key))

    def precision(self, key: Key) -> str:
        method = "head" if key.method == LOGISTIC else key.method  # both leave the trunk as it is
        return self.config.settings(method, key.seed).trunk_precision


def _task(config: CompareConfig) -> tuple[Task, list[str]]:
    splits, warnings = splits_of(vars(config))
    if config.report_on == "test" and splits.test is None:
        raise InfuseError("The data has no test split to report on; give one by --test, or report on validation.")
    return Task.of(splits, config.report_on, read_probe(config.probe)), warnings


def _plan(config: CompareConfig) -> tuple[list[Key], list[str]]:
    """All cells, base by base and seed by seed; and a sentence for every default method that does not fit a base."""
    planned, skipped = [], []
    for base in dict.fromkeys(config.base):
        sites, methods = find_sites(skeleton(base)), []
        for name in config.chosen():
            method = make(name)
            try:
                for site in select(sites, method.roles, config.layers):
                    method.check(site)
                methods.append(name)
            except InfuseError as error:
                if config.methods:
                    raise
                skipped.append(f"{name} does not fit {base}: {error}")
        planned += [Key(base, LOGISTIC, config.seed)] if config.baseline else []
        planned += [Key(base, name, config.seed + i) for i in range(config.seeds) for name in methods]
    return planned, skipped


def _check_folder(config: CompareConfig) -> None:
    """Refuse a folder that holds something else, or a comparison with other settings that is not to be overwritten."""
    folder, path = config.folder(), _config_file(config.folder())
    known = path.exists() and ((folder / CELLS).is_dir() or (storage.current(folder) / "report.json").exists())
    check_folder(folder, known)
    if known and not config.overwrite and (others := changed(config, path, _GROWS)):
        raise InfuseError(
            f"{folder} holds a comparison with other settings ({', '.join(others)}); "
            "repeat them to go on with it, choose another --out, or pass --overwrite."
        )


def _config_file(folder: Path) -> Path:
    """The settings of the cells; beside them stand those of the report, which may be older."""
    begun = folder / CELLS / _CONFIG
    return begun if begun.exists() else storage.current(folder) / _CONFIG


def _begin(config: CompareConfig) -> None:
    cells, settings = config.folder() / CELLS, as_yaml(config)
    if config.overwrite or not cells.exists():
        storage.begin(cells, {_CONFIG: settings})
    else:
        storage.write(cells / _CONFIG, settings)


def _report(config: CompareConfig, report: Report) -> None:
    with storage.replacing(config.folder()) as new:
        put(report, new)
        storage.write(new / _CONFIG, as_yaml(config))


def _finished(folder: Path, key: Key, task: Task) -> Cell | None:
    """The cell on disk, unless it failed, is damaged or is not there."""
    try:
        cell = json.loads(key.path(folder).read_text())
    except (OSError, ValueError):
        return None
    if not isinstance(cell, dict) or "rows" not in cell:
        return None
    if cell["rows"] != task.digest():
        raise InfuseError(f"The data has changed since {folder} was begun; choose another --out, or pass --overwrite.")
    return None if "error" in cell else cell


def _in_order(planned: Sequence[Key], cells: dict[Key, Cell]) -> list[Any]:
    return [cells[key] for key in planned if key in cells]

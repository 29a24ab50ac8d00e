"""One run of ``infuse tune``: trials over bases that are loaded once, then the best run, the tables and the plots."""

import importlib.util
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from infuse import storage
from infuse.bases import BaseModel, load_base
from infuse.data import Splits, digest, splits_of
from infuse.errors import InfuseError, WriteError
from infuse.model import detach
from infuse.precision import dtype_of, name_of
from infuse.sites import find_sites, select
from infuse.training.config import TrainConfig
from infuse.training.fit import fit
from infuse.training.folders import as_yaml, changed, check_folder, config_file, read_settings
from infuse.training.run import Run, Say, train
from infuse.training.settings import Settings
from infuse.tuning.config import TuneConfig
from infuse.tuning.space import Candidates, candidates

if TYPE_CHECKING:
    import optuna

BEST, CONFIG = "best", "tune.yaml"


@dataclass(frozen=True)
class Standing:
    """How a study stands, for whoever watches it."""

    done: int
    """Trials that ended, by all workers."""
    wanted: int
    best: float | None
    """The best macro-F1 on validation so far."""
    best_trial: int | None
    seconds_left: float | None
    """An estimate from the trials since this command began; ``None`` before the first one ends."""
    now: str = ""
    """What goes on: the trial and its epoch."""
    event: str = ""
    """A line on a trial that just ended."""


@dataclass
class Tuned:
    """What a study found."""

    folder: Path
    run: Run
    best: dict[str, Any]
    """``trial``, ``macro_f1``, and the ``settings`` that differ from the method's and the training's defaults."""
    defaults: dict[str, float]
    """Method and base → macro-F1 of the trial with the defaults, of those that completed."""
    states: dict[str, int]
    warnings: list[str] = field(default_factory=list)


Watch = Callable[[Standing], None]


def tune(config: TuneConfig, *, say: Say = lambda _: None, watch: Watch = lambda _: None) -> Tuned:
    """Run trials until the study is complete, then train the best one anew as ``infuse train`` does, and report.

    The folder holds ``best.yaml`` (``infuse train --config best.yaml`` repeats the best trial), ``best/`` (that run),
    ``trials.csv``, the report with plots, and, unless the storage is elsewhere, the study.

    Raises:
        InfuseError: settings or data that cannot work, a storage out of reach, or no trial that completed.
    """
    config.check()
    if missing := [name for name in ("optuna", "sqlalchemy") if importlib.util.find_spec(name) is None]:
        raise InfuseError(f"infuse tune needs {missing[0]}, which is not installed: pip install 'infuse[tune]'.")
    from infuse.tuning import report  # Optuna takes a second to import
    from infuse.tuning import study as studies

    precision = name_of(dtype_of(config.precision))
    held = Settings(precision=precision, max_length=config.max_length, seed=config.seed)  # type: ignore[arg-type]  # name_of gives one of the literals
    found = candidates(config.bases, config.methods, config.ranges, held)
    folder = _prepare(config)
    splits, warnings = splits_of(vars(config))
    splits = replace(splits, test=None)
    for warning in warnings:
        say(f"warning: {warning}")
    bases = {name: load_base(name, precision=precision) for name in config.bases}
    _check_sites(bases, found)
    say(f"{len(splits.train):,} training rows, {len(splits.validation):,} to validate on, each base loaded once")

    settings = {**found.described(), "rows": {n: digest(getattr(splits, n))[:16] for n in ("train", "validation")}}
    with storage.writing(folder, wait=storage.PATIENCE), studies.reachable():  # workers share the folder
        database = studies.open_storage(config.storage, folder, config.grace)
        study = studies.join(database, config.study or folder.name, config.seed, settings, found.defaults())
        storage.write(folder / CONFIG, as_yaml(replace(config, storage=None)))  # its URL may hold a password
    progress = _Progress(study, config, watch)
    objective = _objective(found, bases, splits, progress)
    try:
        with studies.reachable():
            studies.work(
                study,
                objective,
                trials=config.trials,
                seconds=config.seconds,
                grace=config.grace,
                finished=progress.ended,
            )
    except KeyboardInterrupt:
        say(f"interrupted after {progress.done()} trials; the same command goes on with the study")
        raise

    best = _best(study)
    trained = config.to_train({**best.user_attrs["settings"], "base": best.user_attrs["base"]})
    with storage.writing(folder, wait=float("inf")):
        say(f"training the best one, trial {best.number}, again for {folder / BEST}")
        run = _train_again(trained, folder / BEST, bases, splits)
        tuned = Tuned(folder, run, *report.summarise(study, best), warnings)
        with storage.replacing(folder) as new:
            storage.write(new / "best.yaml", as_yaml(trained))
            report.write(study, tuned, new)
    return tuned


def _objective(
    found: Candidates, bases: Mapping[str, BaseModel], splits: Splits, progress: "_Progress"
) -> Callable[["optuna.Trial"], float]:
    import optuna

    def objective(trial: "optuna.Trial") -> float:
        started = time.perf_counter()
        try:
            name, settings = found.draw(trial)
            settings.check()
            trial.set_user_attr("base", name)
            trial.set_user_attr("settings", asdict(settings))
            with _trained_on(bases[name], settings) as base:
                callback = _Report(trial, settings, progress)
                fitted = fit(base, splits.train, splits.validation, settings, name="trial", callbacks=[callback])
            return max(entry["eval_macro_f1"] for entry in fitted.history if "eval_macro_f1" in entry)
        except WriteError:  # no fault of the settings
            raise
        except (InfuseError, torch.OutOfMemoryError) as error:  # these settings don't work; others may
            trial.set_user_attr("reason", " ".join(str(error).split()))
            raise optuna.TrialPruned from None
        finally:
            trial.set_user_attr("seconds", round(time.perf_counter() - started, 1))

    return objective


@contextmanager
def _trained_on(base: BaseModel, settings: Settings) -> Iterator[BaseModel]:
    """The base under a setting of its pooling; afterwards it is as it was, and free of adapters."""
    pooling = base.pooling if settings.pooling == "auto" else settings.pooling
    try:
        yield replace(base, pooling=pooling)
    finally:
        base.model.eval()
        if hasattr(base.model, "infuse"):
            detach(base.model)


class _Report(TrainerCallback):
    """Tells a trial its macro-F1 after every epoch, and ends it where the pruner says so."""

    def __init__(self, trial: "optuna.Trial", settings: Settings, progress: "_Progress"):
        self.trial = trial
        self.settings = settings
        self.progress = progress

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, metrics: Any = None, **kwargs: Any
    ) -> None:
        import optuna

        epoch, score = round(state.epoch or 0), float(metrics["eval_macro_f1"])
        self.trial.report(score, epoch)
        method = self.settings.method.partition(":")[0]
        now = f"trial {self.trial.number} ({method}) epoch {epoch}/{self.settings.epochs}: {100 * score:.1f}"
        self.progress.show(now=now)
        if epoch < self.settings.epochs and self.trial.should_prune():
            raise optuna.TrialPruned


class _Progress:
    """Counts trials of all workers and tells who watches."""

    def __init__(self, study: "optuna.Study", config: TuneConfig, watch: Watch):
        self.study = study
        self.config = config
        self.watch = watch
        self.started = time.monotonic()
        self.before = self.done()
        self.show()

    def done(self) -> int:
        from infuse.tuning.study import COUNTED

        return sum(trial.state in COUNTED for trial in self.study.get_trials(deepcopy=False))

    def show(self, now: str = "", event: str = "") -> None:
        complete = _complete(self.study)
        best = max(complete, key=lambda t: t.value or 0.0, default=None)
        done, spent = self.done(), time.monotonic() - self.started
        left = None
        if done > self.before:
            left = spent / (done - self.before) * max(0, self.config.trials - done)
        if self.config.seconds is not None:
            left = min(left or float("inf"), max(0.0, self.config.seconds - spent))
        value, number = (best.value, best.number) if best else (None, None)
        self.watch(Standing(done, self.config.trials, value, number, left, now, event))

    def ended(self, trial: "optuna.trial.FrozenTrial | None") -> None:
        if trial is None:
            self.show(now="waiting for the trials of other workers")
            return
        settings = trial.user_attrs.get("settings", {})
        name = f"trial {trial.number} ({settings.get('method', '?')} on {trial.user_attrs.get('base', '?')})"
        if reason := trial.user_attrs.get("reason"):
            self.show(event=f"{name}: given up, {reason}")
        elif trial.state.name == "FAIL":
            self.show(event=f"{name}: taken for dead by another worker, which repeats it")
        else:
            pruned = f", pruned after epoch {trial.last_step}" if trial.state.name == "PRUNED" else ""
            self.show(event=f"{name}: macro-F1 {100 * (trial.value or 0):.2f}{pruned}")


def _complete(study: "optuna.Study") -> "list[optuna.trial.FrozenTrial]":
    return [trial for trial in study.get_trials(deepcopy=False) if trial.state.name == "COMPLETE"]


def _best(study: "optuna.Study") -> "optuna.trial.FrozenTrial":
    """The best trial, of equals the first; one that repeats another stands in its place."""
    complete = _complete(study)
    if not complete:
        reasons = [trial.user_attrs.get("reason", "") for trial in study.get_trials(deepcopy=False)]
        why = next(filter(None, reasons), "all were pruned")
        raise InfuseError(f"None of {len(reasons)} trials came to its end; the first reason: {why}")
    return max(complete, key=lambda trial: (trial.value or 0.0, -trial.system_attrs.get("failed_trial", trial.number)))


def _train_again(config: TrainConfig, folder: Path, bases: Mapping[str, BaseModel], splits: Splits) -> Run:
    """The run folder of the best trial; one of the same settings that is there already is kept."""
    wanted = replace(config, out=folder)
    path = config_file(folder)
    other = path.exists() and (read_settings(path) is None or bool(changed(wanted, path)))
    wanted = replace(wanted, overwrite=other)
    base = bases[config.base]
    if next(base.model.parameters()).dtype != dtype_of(config.precision):  # the trial of a worker of another machine
        base = load_base(config.base, precision=config.precision)
    with _trained_on(base, config) as base:
        return train(wanted, base=base, splits=splits, keep=True)


def _check_sites(bases: Mapping[str, BaseModel], found: Candidates) -> None:
    """Refuse a method that does not fit a base at its defaults; what fits for some settings only costs trials."""
    for base in bases.values():
        sites = find_sites(base.model)
        for method in filter(None, map(found.start, found.methods)):
            for site in select(sites, method.roles):
                method.check(site)


def _prepare(config: TuneConfig) -> Path:
    folder = config.folder()
    return check_folder(folder, any((folder / own).exists() for own in (CONFIG, "study.db")))

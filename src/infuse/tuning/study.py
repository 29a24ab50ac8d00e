"""The study: where it lives, how workers share it, and the loop in which one worker does its part.

Needs Optuna, which `infuse.tuning.run` asks for before it imports this file.
"""

import json
import os
import socket
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.exceptions import DuplicatedStudyError, ExperimentalWarning, StorageInternalError, UpdateFinishedTrialError
from optuna.pruners import MedianPruner
from optuna.samplers import BaseSampler, TPESampler
from optuna.storages import RDBStorage, RetryHeartbeatStaleTrialCallback, fail_stale_trials
from optuna.trial import FrozenTrial, Trial, TrialState
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, IntegrityError, NoSuchModuleError, OperationalError, SQLAlchemyError

from infuse.errors import InfuseError, WriteError

optuna.logging.set_verbosity(optuna.logging.ERROR)  # progress and reasons are shown by us

COUNTED = (TrialState.COMPLETE, TrialState.PRUNED)
"""States of trials that used up one of the study's trials."""
GONE = (StorageInternalError, OperationalError)
"""What a storage raises that can no longer be reached."""
_SETTINGS = "infuse"


@contextmanager
def reachable() -> Iterator[None]:
    """Turn into one sentence what comes of a storage that takes no more; Optuna stumbles over that in many ways.

    Raises:
        InfuseError: the storage is gone, or its disk is full.
    """
    try:
        yield
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, GONE):
            cause = cause.__cause__ or cause.__context__
        if cause is None or isinstance(error, InfuseError):
            raise
        raise InfuseError(
            "The study's storage can't be reached any more, or its disk is full: once it is back, the same command "
            "goes on, and the trial that was cut short is run again."
        ) from error


class SurplusError(Exception):
    """A trial that two workers began at once when one was left."""


class PerTrial(BaseSampler):
    """TPE, seeded anew by every trial's number: one worker repeats itself, and no two workers draw the same.

    With one generator for each worker, workers of the same seed would begin with the same random draws. Trials that
    failed, as those of killed workers do, don't count, and one that repeats another is drawn as that was: a study goes
    on as if it had never been cut short.
    """

    def __init__(self, seed: int):
        self.seed = seed
        self.inner = TPESampler(seed=seed)

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        earlier = [t.state == TrialState.FAIL for t in study.get_trials(deepcopy=False)[: trial.number]]
        number = trial.system_attrs.get("failed_trial", trial.number - sum(earlier))
        with quiet():
            self.inner = TPESampler(
                seed=(self.seed * 1_000_003 + number) % 2**32, multivariate=True, group=True, constant_liar=True
            )
        self.inner.before_trial(study, trial)

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return self.inner.infer_relative_search_space(study, trial)

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        return self.inner.sample_relative(study, trial, search_space)

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        return self.inner.sample_independent(study, trial, param_name, param_distribution)


@contextmanager
def quiet() -> Iterator[None]:
    """Without Optuna's notes that a feature may change."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        yield


def open_storage(url: str | None, folder: Path, grace: int) -> RDBStorage:
    """The storage behind a URL, by default an SQLite file in ``folder``.

    A worker shows that it lives by a heartbeat in the database. A trial whose worker gave none for ``grace`` seconds
    fails and is queued once more; the failed one never counts.
    """
    try:
        parsed = make_url(url or f"sqlite:///{folder / 'study.db'}")
        if parsed.drivername in ("postgresql", "postgres"):
            parsed = parsed.set(drivername="postgresql+psycopg")
        file = parsed.get_backend_name() == "sqlite"
        options: dict[str, Any] = {"connect_args": {"timeout": 60}} if file else {"pool_pre_ping": True}
    except (ArgumentError, NoSuchModuleError, ValueError):
        raise InfuseError(
            "The storage is no database URL: write postgresql://USER:PASSWORD@HOST/DATABASE or sqlite:///FILE."
        ) from None
    shown = parsed.render_as_string(hide_password=True)
    for attempt in range(10):
        try:
            with quiet():
                return RDBStorage(
                    parsed.render_as_string(hide_password=False),
                    engine_kwargs=options,
                    heartbeat_interval=max(1, grace // 4),
                    grace_period=grace,
                    heartbeat_stale_trial_callback=RetryHeartbeatStaleTrialCallback(max_retry=1),
                )
        except ImportError:
            extra = "postgres" if parsed.drivername == "postgresql+psycopg" else ""
            hint = f"pip install 'infuse[{extra}]' brings it" if extra else "install it"
            raise InfuseError(f"The driver for the storage {shown} is missing: {hint}.") from None
        except NoSuchModuleError:
            raise InfuseError(f"No database of the kind {parsed.drivername} is known: use postgresql://….") from None
        except SQLAlchemyError as error:  # two workers that make the tables at once get in each other's way
            reason = str(getattr(error, "orig", None) or error).strip().splitlines()[0]
            refused = isinstance(error, OperationalError) and not file
            if refused or attempt == 9:
                raise InfuseError(f"The storage {shown} can't be used: {reason.rstrip('.')}.") from None
            time.sleep(0.2 * (attempt + 1))
        except RuntimeError as error:
            raise InfuseError(f"The storage {shown} is of another Optuna: {str(error).splitlines()[0]}") from None
    raise AssertionError("unreachable")


def join(
    storage: RDBStorage, name: str, seed: int, settings: Mapping[str, Any], first: Sequence[tuple[dict[str, Any], bool]]
) -> optuna.Study:
    """The study of that name; whoever makes it queues the trials in ``first``, marked where they are the defaults.

    Raises:
        InfuseError: the study has other settings or data.
    """
    pruner = MedianPruner(n_startup_trials=5, n_warmup_steps=1)
    common: dict[str, Any] = {"study_name": name, "storage": storage, "sampler": PerTrial(seed), "pruner": pruner}
    text = json.dumps(settings, sort_keys=True)
    try:
        study = optuna.create_study(direction="maximize", **common)
    except (DuplicatedStudyError, IntegrityError):
        study = optuna.load_study(**common)
        for _ in range(50):  # its maker is about to say what it is
            if _SETTINGS in study.user_attrs or study.get_trials(deepcopy=False):
                break
            time.sleep(0.1)
    before = study.user_attrs.get(_SETTINGS)
    if before is None and study.get_trials(deepcopy=False):
        raise InfuseError(f"The storage has a study {name!r} that is not one of infuse tune: choose another --study.")
    if before is None:
        study.set_user_attr(_SETTINGS, text)
    elif before != text:
        then = json.loads(before)
        changed = ", ".join(key for key in sorted(settings) if then.get(key) != json.loads(text)[key])
        raise InfuseError(
            f"The study {name!r} holds trials with other settings or data ({changed}): repeat them to go on, or choose "
            "another --out or --study."
        )
    if _queue(study, first) and before is not None:
        time.sleep(1)  # its maker is about to queue them, unless it was killed
    for draw, whole in _queue(study, first):
        study.enqueue_trial(draw, user_attrs={"defaults": whole})
    return study


def _queue(study: optuna.Study, first: Sequence[tuple[dict[str, Any], bool]]) -> list[tuple[dict[str, Any], bool]]:
    """Those of the first trials that nobody has queued yet: they are the study's first, in their order."""
    return list(first[len(study.get_trials(deepcopy=False)) :])


def work(
    study: optuna.Study,
    objective: Callable[[Trial], float],
    *,
    trials: int,
    seconds: float | None = None,
    grace: int = 60,
    finished: Callable[[FrozenTrial | None], None] = lambda _: None,
) -> None:
    """Run trials until the study has ``trials`` of them, by whichever worker, or the time is over.

    At the end it waits for the trials that other workers have begun, lest one of those die unnoticed. Ctrl-C and
    a full disk queue the trial that was cut short again.
    """
    deadline = time.monotonic() + (float("inf") if seconds is None else seconds)
    mine: int | None = None
    broken = False

    def claimed(trial: Trial) -> float:
        nonlocal mine, broken
        mine = trial.number
        # Optuna's first heartbeat comes from a thread; a worker that is killed before it would be waited for for ever.
        storage: Any = study._storage
        storage.record_heartbeat(trial._trial_id)
        trial.set_user_attr("worker", f"{socket.gethostname()}:{os.getpid()}")
        taken = sorted(t.number for t in study.get_trials(deepcopy=False) if t.state in COUNTED or _runs(t))
        if taken.index(trial.number) >= trials:
            trial.set_user_attr("reason", "another worker had begun the last trial")
            raise SurplusError
        try:
            return objective(trial)
        except (optuna.TrialPruned, UpdateFinishedTrialError):
            raise
        except Exception:
            broken = True
            raise

    while True:
        with quiet():
            fail_stale_trials(study)
        _fail_unclaimed(study, grace)
        everything = study.get_trials(deepcopy=False)
        done = sum(t.state in COUNTED for t in everything)
        if done >= trials or (done and time.monotonic() >= deadline):
            return
        if done + sum(map(_runs, everything)) >= trials:
            finished(None)
            time.sleep(0.5)
            continue
        mine = None
        try:
            with quiet():
                study.optimize(claimed, n_trials=1, catch=(SurplusError,))
        except (KeyboardInterrupt, WriteError):
            if mine is not None:
                _again(study, study.get_trials(deepcopy=False)[mine])
            raise
        except (UpdateFinishedTrialError, ValueError):
            # While this worker was held up (a laptop asleep, say), another one took it for dead.
            if broken or mine is None or study.get_trials(deepcopy=False)[mine].state != TrialState.FAIL:
                raise
        if mine is not None:
            finished(study.get_trials(deepcopy=False)[mine])


def _runs(trial: FrozenTrial) -> bool:
    """Whether a worker has the trial: one that was killed before it could say so leaves no heartbeat to miss."""
    return trial.state == TrialState.RUNNING and "worker" in trial.user_attrs


def _fail_unclaimed(study: optuna.Study, grace: int) -> None:
    """Queue again what a worker had drawn that was killed before its first sign of life."""
    storage: Any = study._storage
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        if (
            not _runs(trial)
            and trial.datetime_start
            and datetime.now() - trial.datetime_start > timedelta(seconds=grace)
        ):
            with suppress(UpdateFinishedTrialError):  # by another worker
                storage.set_trial_state_values(trial._trial_id, TrialState.FAIL)
                _again(study, study.get_trials(deepcopy=False)[trial.number])


def _again(study: optuna.Study, trial: FrozenTrial) -> None:
    if trial.state == TrialState.FAIL:
        wanted = {**trial.system_attrs.get("fixed_params", {}), **trial.params}
        kept = {key: value for key, value in trial.user_attrs.items() if key == "defaults"}
        study.enqueue_trial(wanted, user_attrs=kept)

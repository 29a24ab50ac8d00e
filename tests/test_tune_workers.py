"""Workers that share a study: none of them lost, none counted twice, whoever dies when."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import warnings

import optuna
import pytest
from optuna.trial import TrialState
from postgres import postgres  # noqa: F401  # a fixture

from infuse import InfuseError
from infuse.tuning.study import COUNTED, join, open_storage, work

QUICK = "{batch_size: 16, epochs: 2, layers: last:1}"


def counted(study):
    return [trial for trial in study.trials if trial.state in COUNTED]


@pytest.fixture
def shared(tmp_path):
    return join(open_storage(None, tmp_path, 4), "shared", 0, {"a": 1}, [({"x": 0.5}, True)])


def test_the_defaults_come_first_and_once(shared, tmp_path):
    again = join(open_storage(None, tmp_path, 4), "shared", 0, {"a": 1}, [({"x": 0.5}, True)])
    work(again, lambda trial: trial.suggest_float("x", 0, 1), trials=3)
    assert [t.params["x"] == 0.5 for t in again.trials] == [True, False, False]
    with pytest.raises(InfuseError, match=r"other settings or data \(a\)"):
        join(open_storage(None, tmp_path, 4), "shared", 0, {"a": 2}, [])


def test_workers_of_one_seed_draw_differently(shared, tmp_path):
    workers = [shared, join(open_storage(None, tmp_path, 4), "shared", 0, {"a": 1}, [])]
    warnings.simplefilter("ignore", UserWarning)  # a heartbeat belongs to optimize
    drawn = [worker.ask({"x": optuna.distributions.FloatDistribution(0, 1)}).params["x"] for worker in workers * 5]
    assert len(set(drawn)) == 10


def test_a_worker_that_was_taken_for_dead_goes_on(shared):
    """Its trial is another one's now; what it found is dropped, lest it count twice."""

    def held_up(trial):
        x = trial.suggest_float("x", 0, 1)
        if trial.number == 1:
            shared.tell(1, state=TrialState.FAIL)
        trial.report(x, 1)
        return x

    ended = []
    work(shared, held_up, trials=3, finished=ended.append)
    assert [t.state.name for t in shared.trials] == ["COMPLETE", "FAIL", "COMPLETE", "COMPLETE"]
    assert [t.number for t in ended] == [0, 1, 2, 3]


def test_a_bug_is_not_taken_for_a_dead_worker(shared):
    def broken(trial):
        raise ValueError("a bug")

    with pytest.raises(ValueError, match="a bug"):
        work(shared, broken, trials=3)


def test_a_trial_too_many_is_given_back(shared):
    """Two workers that both saw one trial left: the later one does not count."""

    def beside(trial):
        if trial.number == 1:
            late = shared.ask()
            late.set_user_attr("worker", "another:1")
            shared.tell(late, 0.5)
            later = shared.ask()
            later.set_user_attr("worker", "another:1")
        return 0.5

    original = shared.get_trials
    work(shared, beside, trials=3)
    assert len([t for t in original() if t.state in COUNTED]) == 3


WORKER = """
import os, signal, sys, time, torch
from pathlib import Path
torch.set_num_threads(1)
from infuse.cli import main
from infuse.training import engine
step, steps, ready = engine.AdapterTrainer.training_step, [], Path({ready!r})
def counted(self, *args, **options):
    steps.append(1)
    if len(steps) == 1:  # both workers have a trial before either goes on
        (ready / str(os.getpid())).touch()
        while len(list(ready.iterdir())) < 2:
            time.sleep(0.05)
    if len(steps) == {die_at}:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, *args, **options)
engine.AdapterTrainer.training_step = counted
main(sys.argv[1:])
"""


def start(arguments, ready, die_at=0):
    return subprocess.Popen(
        [sys.executable, "-c", WORKER.format(ready=str(ready), die_at=die_at), *map(str, arguments)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def assert_one_killed_and_none_lost(study, wanted, killed):
    """``wanted`` trials counted; that of the killed worker failed and was repeated, with the same settings, once."""
    assert len(counted(study)) == wanted
    assert {t.state for t in study.trials} == {*{t.state for t in counted(study)}, TrialState.FAIL}
    (dead,) = (t for t in study.trials if t.state == TrialState.FAIL)
    assert dead.user_attrs["worker"].endswith(f":{killed}")
    (again,) = (t for t in study.trials if t.system_attrs.get("failed_trial") == dead.number)
    assert again.params == dead.params and again in counted(study)
    assert not again.user_attrs["worker"].endswith(f":{killed}")


def test_two_workers_on_postgresql_one_of_them_killed(postgres, tiny_base, toy, tmp_path):  # noqa: F811  # a fixture
    common = ["tune", "--data", toy, "--bases", tiny_base, "--validation-fraction", "0.25", "--trials", "10",
              "--storage", postgres, "--study", "two", "--grace", "4", "--precision", "fp32",
              "--space", QUICK]  # fmt: skip
    (ready := tmp_path / "ready").mkdir()
    dying = start([*common, "--out", tmp_path / "a"], ready, die_at=20)  # six steps an epoch: in its second trial
    living = start([*common, "--out", tmp_path / "b"], ready)
    out, err = living.communicate(timeout=240)
    assert living.returncode == 0, err
    assert dying.wait(timeout=10) == -signal.SIGKILL, dying.stderr.read()
    study = optuna.load_study(study_name="two", storage=postgres.replace("postgresql:", "postgresql+psycopg:"))
    assert_one_killed_and_none_lost(study, 10, dying.pid)
    workers = {trial.user_attrs["worker"] for trial in counted(study)}
    assert len(workers) == 2
    assert "10 of 10 trials" in err and "best of" in out
    assert len({json.dumps(trial.params, sort_keys=True) for trial in counted(study)}) == 10
    assert not (tmp_path / "b" / "study.db").exists()
    assert (tmp_path / "b" / "trials.csv").read_text().count("\n") == 12  # a header, ten trials, and the dead one
    assert json.loads((tmp_path / "b" / "best" / "metrics.json").read_text())["validation"]


def _worker(folder, dies):
    study = join(open_storage(None, folder, 2), "shared", 0, {}, [])

    def objective(trial):
        value = trial.suggest_float("x", 0, 1)
        if trial.number == 1 and dies:
            os.kill(os.getpid(), signal.SIGKILL)
        return value

    work(study, objective, trials=3)


def test_a_killed_worker_with_the_default_storage(tmp_path):
    """The same command again finds the dead trial by its silence."""
    process = multiprocessing.get_context("fork").Process(target=_worker, args=(tmp_path, True))
    process.start()
    process.join(timeout=30)
    assert process.exitcode == -signal.SIGKILL
    _worker(tmp_path, False)
    study = join(open_storage(None, tmp_path, 2), "shared", 0, {}, [])
    assert_one_killed_and_none_lost(study, 3, process.pid)

"""`infuse tune`: what is searched, what a study keeps, and that killed workers and Ctrl-C cost nothing."""

import csv
import importlib
import io
import json
import os
import shlex
import shutil
import sys
from dataclasses import replace

import optuna
import pytest
import torch
import yaml
from matplotlib import image
from optuna.trial import TrialState

import infuse
from infuse import InfuseError, registry
from infuse.bases import load_base
from infuse.cli import main
from infuse.data import read
from infuse.heads import HEADS, Head
from infuse.method import make, variants
from infuse.spaces import Choice, Log, Uniform, contains
from infuse.training import engine
from infuse.training.settings import SPACE, Settings
from infuse.tuning import run
from infuse.tuning.config import TuneConfig
from infuse.tuning.run import tune
from infuse.tuning.space import candidates

QUICK = "{batch_size: 16, epochs: 2, layers: last:1}"


def config(base, toy, out, **changes):
    settings = {"trials": 3, "space": (QUICK,), "precision": "fp32", "validation_fraction": 0.25}
    return TuneConfig(data=str(toy), bases=(str(base),), out=out, **settings | changes)


def trials(folder):
    with (folder / "trials.csv").open() as file:
        return list(csv.DictReader(file))


def study_in(folder):
    return optuna.load_study(study_name=folder.name, storage=f"sqlite:///{folder / 'study.db'}")


@pytest.fixture
def bare(monkeypatch):
    """Studies without plots and without the run of the best trial, for tests of the trials alone."""
    monkeypatch.setattr("infuse.tuning.report.write", lambda *_: None)
    monkeypatch.setattr(run, "_train_again", lambda *_: None)


# A study


@pytest.fixture(scope="module")
def bases(tiny_base, tmp_path_factory):
    twin = tmp_path_factory.mktemp("bases") / "twin"
    shutil.copytree(tiny_base, twin)
    return str(tiny_base), str(twin)


@pytest.fixture(scope="module")
def study(bases, toy, tmp_path_factory):
    """A folder that the command line made, and what it printed; the bases that it loaded, and how often."""
    folder, loaded = tmp_path_factory.mktemp("tune") / "study", []

    def load(name, **options):
        loaded.append(load_base(name, **options))
        return loaded[-1]

    settings = {
        "data": str(toy), "bases": list(bases), "methods": ["ia3", {"name": "lora", "dropout": 0.1}], "trials": 12,
        "validation_fraction": 0.25, "precision": "fp32", "out": str(folder),
        "space": {"epochs": [2, 4], "batch_size": 16, "lora": {"rank": [2, 8], "roles": "query"}},
    }  # fmt: skip
    path = folder.parent / "settings.yaml"
    path.write_text(yaml.safe_dump(settings))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "load_base", load)
        main(["tune", "--config", str(path), "--trials", "9"])
    return folder, loaded


def test_the_page_of_a_study(study, browser):
    browser.get((study[0] / "report.html").as_uri())
    assert browser.get_log("browser") == []
    drawn = browser.find_elements("css selector", "figure svg")
    assert [each.get_attribute("aria-label") for each in drawn] == ["History", "Importance", "Parallel"]
    for each in drawn:
        assert image.imread(io.BytesIO(each.screenshot_as_png)).std() > 0.02
    assert len(browser.find_elements("css selector", "#t0 ~ .wide tbody tr")) == 9


def test_the_folder_of_a_study(study, bases):
    folder, _ = study
    for name in ("history.png", "importance.png", "parallel.png"):
        assert image.imread(folder / name).std() > 0.02
        assert f"]({name})" in (folder / "report.md").read_text()
    assert len(json.loads((folder / "report.json").read_text())["tables"][0]["rows"]) == 9
    rows = trials(folder)
    assert len(rows) == 9 and all(row["state"] in ("complete", "pruned") for row in rows)
    assert [row["defaults"] for row in rows] == ["True"] * 4 + ["False"] * 5
    assert [(r["base"], make(r["method"]).name) for r in rows[:4]] == [(b, m) for b in bases for m in ("ia3", "lora")]
    best = max(float(row["macro_f1"]) for row in rows if row["state"] == "complete")
    assert best >= max(float(row["macro_f1"]) for row in rows[:4])
    metrics = json.loads((folder / "best" / "metrics.json").read_text())
    assert "test" not in metrics and metrics["validation"]["macro_f1"] == pytest.approx(best)


def test_what_is_given_is_held_and_what_is_listed_is_searched(study):
    rows = trials(study[0])
    methods = [make(row["method"]) for row in rows]
    assert {row["batch_size"] for row in rows} == {"16"} and {row["epochs"] for row in rows} <= {"2", "4"}
    lora = [method for method in methods if method.name == "lora"]
    assert {(m.roles, m.dropout) for m in lora} == {(("query",), 0.1)} and {m.rank for m in lora} <= {2, 8}
    assert len({row["learning_rate"] for row in rows}) > 5
    names = {name for trial in study_in(study[0]).trials for name in trial.params}
    assert {"base", "method", "epochs", "lora.rank", "lora.learning_rate", "ia3.learning_rate"} <= names
    assert not names & {"batch_size", "lora.batch_size", "ia3.rank", "lora.dropout", "lora.roles"}


def test_each_base_is_loaded_once_and_left_as_it_was(study, bases):
    assert [base.name for base in study[1]] == list(bases)
    for base in study[1]:
        fresh = load_base(base.name).model.state_dict()
        now = base.model.state_dict()
        assert fresh.keys() == now.keys() and all(torch.equal(value, now[name]) for name, value in fresh.items())
        assert not base.model.training and not hasattr(base.model, "infuse")


def test_best_yaml_repeats_the_best_trial_exactly(study, tmp_path):
    main(["train", "--config", str(study[0] / "best.yaml"), "--out", str(tmp_path / "again")])
    best = study_in(study[0]).best_trial
    for folder in (tmp_path / "again", study[0] / "best"):
        with (folder / "curves.csv").open() as file:
            course = [float(row["eval_macro_f1"]) for row in csv.DictReader(file) if row["eval_macro_f1"]]
        assert course == list(best.intermediate_values.values())


def test_the_best_run_can_be_made_by_another_machine(study, tmp_path):
    """From the study alone, and in the precision of the trial, whatever this machine prefers."""
    folder = tmp_path / "study"
    shutil.copytree(study[0], folder)
    shutil.rmtree(folder / "best")
    config = ["--config", str(folder / "tune.yaml"), "--trials", "9", "--precision", "bf16", "--out", str(folder)]
    main(["tune", *config])
    assert (folder / "best" / "curves.csv").read_text() == (study[0] / "best" / "curves.csv").read_text()
    assert (folder / "trials.csv").read_text() == (study[0] / "trials.csv").read_text()


def test_more_trials_go_on_with_the_study(study, tmp_path, capsys):
    folder = tmp_path / "study"
    shutil.copytree(study[0], folder)
    before = trials(folder)
    given = ["tune", "--config", str(folder.parent / "tune.yaml")]
    values = yaml.safe_load((folder / "tune.yaml").read_text()) | {"out": str(folder)}
    (folder.parent / "tune.yaml").write_text(yaml.safe_dump(values))
    main([*given, "--trials", "10"])
    assert trials(folder)[:9] == before and len(trials(folder)) == 10
    with pytest.raises(SystemExit):
        main([*given, "--trials", "11", "--seed", "1"])
    assert "other settings or data (held, rows)" in capsys.readouterr().err


def test_one_worker_repeats_itself(tiny_base, toy, tmp_path, bare):
    ways = []
    for name, seed in (("one", 0), ("two", 0), ("three", 1)):
        tune(config(tiny_base, toy, tmp_path / name, methods=("head",), trials=3, seed=seed))
        ways.append([(t.params, t.values) for t in study_in(tmp_path / name).trials])
    assert ways[0] == ways[1]
    assert ways[0][0][0] == ways[2][0][0] and ways[0][1][0] != ways[2][1][0]


# Trials that end early


@pytest.fixture
def scripted(monkeypatch):
    """Makes the validation scores of coming epochs up."""

    def script(*scores):
        left = list(scores)
        module = importlib.import_module("infuse.training.fit")
        monkeypatch.setattr(module, "overall", lambda *_: {"accuracy": 0.5, "macro_f1": left.pop(0)})

    return script


def test_a_trial_below_the_median_is_pruned(tiny_base, toy, tmp_path, scripted, bare):
    scripted(*[0.6, 0.7, 0.7] * 5, 0.3, 0.65, 0.7, 0.9)
    tune(config(tiny_base, toy, tmp_path / "s", methods=("head",), trials=7, space=("{epochs: 3, batch_size: 64}",)))
    states = [(t.state, len(t.intermediate_values), t.value) for t in study_in(tmp_path / "s").trials]
    complete = (TrialState.COMPLETE, 3)
    assert states == [(*complete, 0.7)] * 5 + [(TrialState.PRUNED, 1, 0.3), (*complete, 0.9)]


def test_settings_that_cannot_work_cost_one_trial(tiny_base, toy, tmp_path, monkeypatch):
    loss = Head.loss
    monkeypatch.setattr(
        Head, "loss", lambda s, x, y, w, smoothing: loss(s, x, y, w) * (1 if smoothing else float("nan"))
    )
    space = (QUICK, "label_smoothing: [0.0, 0.1]", "compacter: {width: [4, 5]}")
    tuned = tune(config(tiny_base, toy, tmp_path / "s", methods=("compacter", "head"), trials=9, space=space))
    rows = trials(tmp_path / "s")
    reasons = {row["reason"] for row in rows}
    assert any("became nan" in reason for reason in reasons) and any("must divide" in reason for reason in reasons)
    assert all(bool(row["reason"]) == (row["state"] == "pruned" and not row["macro_f1"]) for row in rows)
    assert tuned.states["complete"] + tuned.states["pruned"] == 9
    assert "must divide" in (tmp_path / "s" / "report.md").read_text()


def test_a_study_in_which_nothing_works_says_why(tiny_base, toy, tmp_path, monkeypatch):
    monkeypatch.setattr(Head, "loss", lambda self, logits, *_: logits.sum() * float("nan"))
    with pytest.raises(InfuseError, match=r"None of 2 trials came to its end.*became nan"):
        tune(config(tiny_base, toy, tmp_path / "s", trials=2))


def test_no_trial_starts_after_the_time(tiny_base, toy, tmp_path, bare):
    seen = []
    tuned = tune(config(tiny_base, toy, tmp_path / "s", trials=1000, time="0.1s"), watch=seen.append)
    assert tuned.states == {"complete": 1, **({"waiting": 1} if "waiting" in tuned.states else {})}
    assert seen[-1].done == 1 and seen[-1].wanted == 1000 and seen[-1].best is not None
    assert any("epoch 1/2" in standing.now for standing in seen)


def test_ctrl_c_and_the_same_command_again(tiny_base, toy, tmp_path, monkeypatch, bare):
    """The trial that was cut short is run again with the same settings; it counts once."""
    settings, step = config(tiny_base, toy, tmp_path / "s", trials=4), engine.AdapterTrainer.training_step
    calls = []

    def interrupted(*args, **options):
        calls.append(1)
        if len(calls) == 20:
            raise KeyboardInterrupt
        return step(*args, **options)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(engine.AdapterTrainer, "training_step", interrupted)
        tune(settings)
    before = study_in(tmp_path / "s").trials
    assert [t.state.name for t in before] == ["COMPLETE", "FAIL", "WAITING"] and not (tmp_path / "s/best").exists()
    tuned = tune(settings)
    after = study_in(tmp_path / "s").trials
    assert tuned.states == {"complete": 4, "fail": 1}
    assert after[2].params == before[1].params and after[0].datetime_complete == before[0].datetime_complete


# The space


@pytest.mark.parametrize("name", [*registry(), *(p for cls in registry().values() for p in cls.presets)])
def test_the_defaults_of_every_method_lie_in_its_space(name):
    """So that the first trial is the defaults; a range is as good as its method's settings allow."""
    method = make(name)
    found = candidates(["minilm"], [name], {}, Settings())
    ((draw, _),) = found.defaults()
    outside = {key for key in found.spaces[name] if f"{name}.{key}" not in draw and key not in draw}
    given = set(method.presets.get(name, {}))
    assert outside <= given, f"{name}: {outside}"
    base, settings = found.draw(optuna.trial.FixedTrial(_middle(found, name) | draw))
    assert base == "minilm" and make(settings.method) == method
    assert replace(settings, method="ia3", learning_rate=None) == Settings(head_learning_rate=HEADS["cosine"])


def _middle(found, name):
    return {
        called: search.options[0] if isinstance(search, Choice) else search.low
        for key, search in found.spaces[name].items()
        for called in (key, f"{name}.{key}")
    }


def test_settings_hold_their_own_space():
    rates = SPACE["head_learning_rate"]
    assert all(contains(search, getattr(Settings, key)) for key, search in SPACE.items() if search != rates)
    assert all(contains(rates, rate) for rate in HEADS.values())
    assert all(infuse.method.make(name).space for name in registry()) and "lora" in variants()


def test_a_method_of_ones_own_is_tuned_around_its_rate():
    found = candidates(["minilm"], ["head"], {"head_learning_rate": {"log": ["1e-3", "1e-2"]}}, Settings())
    assert found.spaces["head"]["head_learning_rate"] == Log(1e-3, 1e-2)
    assert not {"learning_rate", "layers"} & found.spaces["head"].keys()
    found = candidates(
        ["a"], ["lora", "ia3"], {"lora": {"dropout": {"uniform": [0, 0.3]}, "epochs": [1, 3]}}, Settings()
    )
    assert found.spaces["lora"]["dropout"] == Uniform(0, 0.3) and found.spaces["ia3"]["epochs"] == SPACE["epochs"]
    drawn = {key for draw in _draws(found) for key in draw}
    assert {"lora.epochs", "ia3.epochs", "batch_size"} <= drawn and not {"epochs", "ia3.batch_size"} & drawn
    (lora, whole), (ia3, wholly) = found.defaults()
    assert lora["method"] == "lora" and "lora.epochs" not in lora and not whole
    assert ia3["method"] == "ia3" and ia3["ia3.epochs"] == 4 and wholly


def _draws(found):
    study = optuna.create_study()
    for _ in range(20):
        found.draw(study.ask())
    return [trial.params for trial in study.trials]


# What does not work


MISTAKES = {
    "--methods magic": "the methods are",
    "--methods full": "train it apart",
    "--methods fusion": "infuse.fuse",
    "--methods lora lora": "each once",
    "--methods lora:roles=ffn_gate": "no role",
    "--bases ./nowhere": "no folder",
    "--trials 0": "trials",
    "--grace 1": "grace",
    "--time soon": "10m",
    "--time 0s": "10m",
    "--space epochs": "can't be read",
    "--space 'epochs: ['": "can't be read",
    "--space 'epochs: 2024-13-45'": "can't be read",
    "--space '{depth: 3}'": "no setting 'depth'",
    "--space '{rank: 4}'": "no setting 'rank'",
    "--space '{epochs: two}'": "epochs",
    "--space '{epochs: [1,0]}'": "epochs",
    "--space '{epochs: []}'": "epochs",
    "--space '{learning_rate: {log: [0,1]}}'": "positive",
    "--space '{learning_rate: {log: [1,0.1]}}'": "ascending",
    "--space '{learning_rate: {about: 1}}'": "learning_rate",
    "--space '{ia3: 4}'": "mapping",
    "--space '{ia3: {rank: 4}}'": "no setting rank",
    "--space '{seed: 4}'": "seed",
    "--space '{head: [hf,linear]}'": "hf",
    "--methods lora --space '{rank: [0,4]}'": "rank",
    "--methods lora --space '{roles: [key,nonsense]}'": "the roles are",
    "--space '{ia3: {roles: key+nose}}'": "the roles are",
    "--data nope.csv": "nope.csv",
    "--validation nope.csv": "nope.csv",
    "--out full": "other files",
    "--out one.csv": "is a file",
    "--storage nonsense": "no database URL",
    "--storage oracle9://x/y": "kind",
    "--storage postgresql://nobody:secret@localhost:1/none": "can't be used",
    "--config nope.yaml": "can't be read",
}


@pytest.mark.parametrize("flags, message", MISTAKES.items())
def test_mistakes(flags, message, tiny_base, toy, tmp_path, monkeypatch, capsys):
    """Exit code 2, one sentence, and not a file more or less."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    (tmp_path / "one.csv").write_text("text,label\na,b\n")
    before = sorted(os.walk("."))
    usual = ["tune", "--data", str(toy), "--bases", str(tiny_base), "--out", "out", "--trials", "1"]
    with pytest.raises(SystemExit) as ended:
        main([*usual, *shlex.split(flags)])
    shown = capsys.readouterr()
    lines = [line for line in shown.err.splitlines() if "training rows" not in line]
    assert ended.value.code == 2 and shown.out == "" and len(lines) == 1, shown.err
    assert lines[0].startswith("infuse: ") and message in lines[0] and "secret" not in lines[0], shown.err
    assert sorted(os.walk(".")) == before


def test_a_storage_that_goes_away_ends_the_worker_with_advice(tiny_base, toy, tmp_path, monkeypatch):
    def gone(*args, **options):
        raise optuna.exceptions.StorageInternalError("An exception is raised during the commit.")

    monkeypatch.setattr("optuna.trial.Trial.report", gone)
    with pytest.raises(InfuseError, match=r"storage.*same command"):
        tune(config(tiny_base, toy, tmp_path / "s"))


@pytest.mark.parametrize("missing, extra", [("optuna", "infuse[tune]"), ("psycopg", "infuse[postgres]")])
def test_a_missing_extra_is_named(missing, extra, tiny_base, toy, tmp_path, monkeypatch):
    find, url = importlib.util.find_spec, "postgresql://localhost/x"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == missing else find(name, *rest))
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(InfuseError, match=extra.replace("[", r"\[")):
        tune(config(tiny_base, toy, tmp_path / "s", storage=url))


def test_test_rows_play_no_part(tiny_base, tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    rows = read("sample")
    chosen = [i for i, label in enumerate(rows.labels) if label in ("card_lost", "pin_forgotten")]
    for name, part in (("train", chosen[::2]), ("validation", chosen[1::4]), ("test", chosen[3::4])):
        with (folder / f"{name}.csv").open("w", newline="") as file:
            csv.writer(file).writerows([("text", "label"), *((rows.texts[i], rows.labels[i]) for i in part)])
    tuned = tune(config(tiny_base, folder, tmp_path / "s", trials=1))
    assert set(tuned.run.metrics["rows"]) == {"train", "validation"} and "test" not in tuned.run.metrics

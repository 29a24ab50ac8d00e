"""Comparisons: every figure is what it says, nothing finished runs again, and no failure stops the others."""

import csv
import json
import os
import shlex
from dataclasses import replace

import numpy as np
import pytest
import torch
import yaml
from conftest import write_rows
from scipy.stats import binomtest
from torch import nn
from transformers import TrainerCallback

import infuse
from infuse import InfuseError
from infuse.bases import load_base
from infuse.cli import _parse, main
from infuse.comparing import costs
from infuse.comparing.cell import LOGISTIC, bits, epochs_within, measure
from infuse.comparing.clock import Clock
from infuse.comparing.compare import CELLS, _plan, compare
from infuse.comparing.probe import nearest, probe_accuracy, read_probe
from infuse.comparing.settings import CompareConfig, every_method
from infuse.comparing.statistics import holm, paired_p, seconds_to
from infuse.data import read, stratified
from infuse.memory import Peak, bytes_saved
from infuse.model import store_of
from infuse.settings import command
from infuse.training.config import TrainConfig
from infuse.training.fit import fit
from infuse.training.run import train
from infuse.training.settings import Settings

METHODS = ("lora:rank=2", "ia3", "full")


@pytest.fixture(scope="module")
def hard(tmp_path_factory):
    """Sixteen labels with eight rows each: too few to get all right."""
    labels = read("sample").label_set[:16]
    return write_rows(tmp_path_factory.mktemp("data") / "hard.csv", labels, 8)


@pytest.fixture(scope="module")
def config(tiny_base, hard):
    return CompareConfig(
        data=str(hard), base=(str(tiny_base),), methods=METHODS, seeds=2, epochs=2, batch_size=16,
        validation_fraction=0.25,
    )  # fmt: skip


@pytest.fixture(scope="module")
def compared(config, tmp_path_factory):
    """A whole comparison, with everything that is measured (but the slow processes for the peaks: of LoRA's only)."""
    real = costs.peak_memory
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(costs, "peak_memory", lambda *a: real(*a) if a[2].method.startswith("lora") else 2**24)
        return compare(replace(config, out=tmp_path_factory.mktemp("compared") / "out"))


@pytest.fixture
def quick(config, tmp_path, monkeypatch):
    """The settings of a small comparison that measures no costs."""
    for name in ("capabilities", "latency"):
        monkeypatch.setattr(costs, name, lambda *_: {})
    for name in ("file_size", "saved_per_token", "peak_memory"):
        monkeypatch.setattr(costs, name, lambda *_: 3e6)
    return replace(config, methods=("head", "ia3"), epochs=1, out=tmp_path / "out")


def table(report):
    """Method → column → cell."""
    whole = report.tables[0]
    titles = [column.title for column in whole.columns]
    return {row[0]: dict(zip(titles, row, strict=True)) for row in whole.rows}


# What is measured


def test_every_cell_is_on_disk_and_in_the_report(compared):
    assert len(list((compared.folder / CELLS).glob("*.json"))) == len(compared.cells) == 1 + 2 * len(METHODS)
    rows = table(compared.report)
    assert rows.keys() == {LOGISTIC, *METHODS}
    means = [row["accuracy %"].value for row in rows.values()]
    assert means == sorted(means, reverse=True) and 10 < means[-1] < 100
    for name in METHODS:
        own = [cell for cell in compared.cells if cell["method"] == name]
        accuracies = [100 * cell["accuracy"] for cell in own]
        assert rows[name]["accuracy %"].value == pytest.approx(np.mean(accuracies))
        assert rows[name]["accuracy %"].sd == pytest.approx(np.std(accuracies, ddof=1))
        assert [cell["seed"] for cell in own] == [0, 1] and ["costs" in cell for cell in own] == [True, False]
        for cell in own:
            assert [point["epoch"] for point in cell["curve"]] == [0, 1, 2]
            assert max(p["macro_f1"] for p in cell["curve"][1:]) == pytest.approx(cell["macro_f1"], abs=0.02)
            assert 0 < cell["curve"][1]["seconds"] < cell["curve"][2]["seconds"] <= cell["seconds"]
    with (compared.folder / "report.csv").open() as file:
        found = {row["method"]: row for row in csv.DictReader(file)}
    assert {n: float(r["accuracy %"]) for n, r in found.items()} == {n: r["accuracy %"].value for n, r in rows.items()}


def test_what_an_adapter_allows_is_tried(compared):
    rows = table(compared.report)
    columns = ("mixed batch", "mergeable", "fusable", "base restored")
    assert [rows["lora:rank=2"][c] for c in columns] == [True, True, True, True]
    assert [rows["ia3"][c] for c in columns] == [True, True, False, True]
    assert [rows["full"][c] for c in columns] == [False, False, False, False]
    assert rows["ia3"]["merged 32, ms"] > 0 and rows["full"]["merged 32, ms"] is None
    assert rows[LOGISTIC]["mixed batch"] is None and rows[LOGISTIC]["latency 1, ms"] > 0


def test_costs_stand_in_their_known_order(compared, tiny_base):
    lora, full = (table(compared.report)[name] for name in ("lora:rank=2", "full"))
    base = load_base(str(tiny_base)).model.num_parameters()
    head = 16 * 32 + 1
    assert lora["trained parameters"] == 2 * 2 * 4 * 32 + head and full["trained parameters"] == base + head
    assert lora["% of base"] == pytest.approx(100 * lora["trained parameters"] / base)
    assert 4 * lora["trained parameters"] < 1e3 * lora["file kB"] < 0.1 * 4 * base < 1e3 * full["file kB"]
    assert 0 < lora["saved kB/token"] < full["saved kB/token"]
    assert 0 <= lora["peak MiB"] < 40 and full["peak MiB"] == 16 and lora["step ms"].value > 0


def test_a_cell_is_what_its_command_trains(compared, tmp_path):
    words = next(shlex.split(c) for c in compared.report.commands if "lora:rank=2" in c and "train" in c)
    run = train(replace(_parse(words[1:]), out=tmp_path / "run", baseline=False))
    cell = next(c for c in compared.cells if c["method"] == "lora:rank=2" and c["seed"] == 0)
    assert run.metrics["validation"] == {name: cell[name] for name in ("accuracy", "macro_f1")}


def test_pairs_that_are_confused_come_with_their_texts(compared, hard):
    pairs = compared.report.tables[1]
    rows = read(hard)
    labels = dict(zip(rows.texts, rows.labels, strict=True))
    assert pairs.rows and all(row[0] != row[1] for row in pairs.rows)
    assert [row[2] for row in pairs.rows] == sorted((row[2] for row in pairs.rows), reverse=True)
    for true, _, errors, _, texts in pairs.rows:
        assert all(labels[text.rsplit(" (", 1)[0]] == true for text in texts) and errors <= 2 * len(rows)


def test_notes_say_what_the_base_is_afterwards(compared):
    notes = " ".join(compared.report.notes)
    assert "bit for bit what it was before in 4 of 6 runs; not with full" in notes
    assert "chosen by" in notes and "torch" in notes


def test_a_peak_is_what_came_and_went():
    peak = Peak()
    before = torch.ones(2**26)  # 256 MiB, gone before the peak begins
    del before
    peak.begin()
    assert peak.bytes() < 2**26
    during = torch.ones(2**25)
    del during
    assert 2**27 - 2**22 < peak.bytes() < 2**27 + 2**26


def test_bytes_saved_are_those_of_unique_storages():
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU())

    def step():
        x = torch.randn(3, 4)
        (model(x).sum() + (model(x[:2]) ** 2).sum()).backward()

    inputs, outputs = 4 * 3 * 4, 4 * (3 * 8 + 2 * 8)  # x once, though two products read it; ReLU keeps its outputs
    assert bytes_saved(model, [step] * 3) == [inputs + outputs] * 2


# Forgetting


def test_the_probe_notices_a_ruined_encoder(tiny_base, toy):
    base, probe = load_base(str(tiny_base)), read(toy)
    before = bits(base.model)
    bare = probe_accuracy(base, probe, 64)
    infuse.attach(base.model, infuse.IA3(), "same")
    assert probe_accuracy(base, probe, 64, "same") == bare > 0.8
    with torch.no_grad():
        for value in store_of(base.model)["same"].parameters():
            value.fill_(-50.0)
    assert probe_accuracy(base, probe, 64, "same") < bare - 0.2
    assert bits(base.model) != before
    infuse.detach(base.model)
    assert bits(base.model) == before and probe_accuracy(base, probe, 64) == bare


def test_a_row_is_no_neighbour_of_itself():
    targets = torch.arange(4).repeat_interleave(3)
    assert torch.equal(nearest(torch.eye(4)[targets] + 1e-3, targets, 4), targets)
    alone = torch.arange(4)
    assert not (nearest(torch.eye(4), alone, 4) == alone).any()


def test_the_bundled_probe_is_of_another_domain():
    probe, sample = read_probe("probe"), read("sample")
    assert len(set(probe.texts)) == len(probe) >= 140 and len(set(probe.counts.values())) == 1
    words = {word for text in probe.texts for word in text.lower().split()}
    assert not words & {"bank", "account", "card", "loan", "payment", "money", "transfer", "balance"}
    assert not set(probe.texts) & set(sample.texts)


# Statistics


@pytest.mark.parametrize("wins, losses", [(9, 1), (15, 5), (6, 5), (40, 12), (3, 0)])
def test_with_one_seed_the_paired_test_is_mcnemars(wins, losses):
    one = np.array([1.0] * wins + [0.0] * losses + [1.0] * 50)
    other = np.array([0.0] * wins + [1.0] * losses + [1.0] * 50)
    exact = binomtest(wins, wins + losses).pvalue
    assert paired_p(one, other) == pytest.approx(exact, abs=0.012) == paired_p(other, one)


def test_more_seeds_with_the_same_errors_prove_nothing_more():
    one, other = np.array([1.0] * 6 + [0.0] * 3), np.array([0.0] * 6 + [1.0] * 3)
    assert paired_p(one, other) > 0.3  # pooling five seeds as if they were new rows would give p < 0.05
    assert paired_p(one, one) == 1.0


def test_holm():
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03}) == pytest.approx({"a": 0.03, "c": 0.06, "b": 0.06})
    assert holm({}) == {}


def test_time_to_nearly_the_best_is_interpolated():
    curve = [{"seconds": s, "accuracy": a} for s, a in ((0, 0.1), (10, 0.5), (20, 1.0), (30, 0.9))]
    assert seconds_to(curve) == pytest.approx(10 + 10 * 0.49 / 0.5)
    assert seconds_to(curve, 0.5) == pytest.approx(10)
    assert seconds_to([{"seconds": 0, "accuracy": 1.0}, {"seconds": 9, "accuracy": 1.0}]) == 0


# Budgets


def test_a_budget_of_seconds_ends_a_run(tiny_base, hard):
    base = load_base(str(tiny_base))
    rows = stratified(read(hard), 0.25)
    settings = Settings(method="ia3", epochs=500, batch_size=16, patience=0)
    clock = Clock(limit=0.5)
    fit(base, *rows, settings, name="task", callbacks=[clock])
    assert 0.5 <= clock.seconds < 2 and clock.curve[-1]["seconds"] == clock.seconds
    infuse.detach(base.model)
    planned = epochs_within(base, rows[0], settings, 4.0)
    assert 3 <= planned < 1000 and epochs_within(base, rows[0], settings, 1e-6) == 1
    assert not hasattr(base.model, "infuse")


def test_seconds_instead_of_epochs(quick):
    found = compare(replace(quick, time=0.3, seeds=1, methods=("ia3",)))
    (cell,) = (cell for cell in found.cells if cell["method"] == "ia3")
    assert cell["epochs"] >= 1 and cell["seconds"] < 3 and "0.3 s of training" in found.report.subtitle


# Going on


class Stop(TrainerCallback):
    def on_train_begin(self, args, state, control, **options):
        raise KeyboardInterrupt


def test_what_is_finished_is_not_run_again(quick):
    started = []

    def callbacks():
        started.append(1)
        return [Stop()] if len(started) == 3 else []

    with pytest.raises(KeyboardInterrupt):
        compare(quick, callbacks=callbacks)
    cells = {p.name: p.read_text() for p in (quick.folder() / CELLS).glob("*.json")}
    assert len(cells) == 3 and (quick.folder() / "report.html").exists()  # logistic regression and the first round
    started.clear()
    found = compare(quick, callbacks=lambda: started.append(1) or [])
    assert len(started) == 2 and len(found.cells) == 5
    assert all((quick.folder() / CELLS / name).read_text() == text for name, text in cells.items())
    more = compare(replace(quick, seeds=3), callbacks=lambda: started.append(1) or [])
    assert len(started) == 4 and len(more.cells) == 7 and more.cells[:5] == found.cells
    assert {len(row["accuracy %"].mark) for row in table(more.report).values()} <= {0, 1}


def test_other_settings_and_other_rows_are_refused(quick, tmp_path, hard):
    data = tmp_path / "rows.csv"
    data.write_text(hard.read_text())
    quick = replace(quick, data=str(data), methods=("head",), seeds=1)
    compare(quick)
    with pytest.raises(InfuseError, match=r"other settings \(epochs\)"):
        compare(replace(quick, epochs=3))
    data.write_text(hard.read_text().replace("the", "teh"))
    with pytest.raises(InfuseError, match="data has changed"):
        compare(quick)
    assert len(compare(replace(quick, overwrite=True)).cells) == 2


def test_damaged_settings_are_told_and_damaged_cells_run_again(quick):
    quick = replace(quick, methods=("head",), seeds=1)
    found = compare(quick)
    path = quick.folder() / CELLS / "config.yaml"
    whole = path.read_text()
    for content in (b"epochs: [", b"- epochs", b"", b"epochs", b"\xff\x00"):
        path.write_bytes(content)
        with pytest.raises(InfuseError, match=r"config\.yaml is damaged.*--out.*--overwrite"):
            compare(quick)
    path.write_text(whole)
    for cell, content in zip((quick.folder() / CELLS).glob("*.json"), ("[1]", "{}"), strict=True):
        cell.write_text(content)
    again = compare(quick).cells
    assert [cell["predicted"] for cell in again] == [cell["predicted"] for cell in found.cells]
    path.write_text("- epochs")
    assert len(compare(replace(quick, overwrite=True)).cells) == 2


def test_a_method_that_fails_stops_no_other(quick, monkeypatch):
    def failing(base, task, settings, **options):
        if settings.method == "ia3":
            infuse.attach(base.model, "ia3", "left over")
            raise InfuseError("It burst.")
        return measure(base, task, settings, **options)

    monkeypatch.setattr("infuse.comparing.compare.measure", failing)
    lines = []
    found = compare(replace(quick, methods=("ia3", "head"), seeds=1), say=lines.append)
    assert table(found.report).keys() == {LOGISTIC, "head"}
    assert any("It burst." in line for line in lines) and any("It burst." in note for note in found.report.notes)
    monkeypatch.setattr("infuse.comparing.compare.measure", measure)
    again = compare(replace(quick, methods=("ia3", "head"), seeds=1))  # what failed is tried again
    assert table(again.report).keys() == {LOGISTIC, "head", "ia3"}


# The plan and the command line


def test_by_default_every_method_that_fits(config, tiny_base):
    names = every_method()
    assert {"ia3", "lora", "houlsby", "pfeiffer", "parallel", "compacter", "compacter++", "head", "full"} <= set(names)
    assert len({infuse.make(name) for name in names}) == len(names)
    planned, skipped = _plan(replace(config, methods=(), seeds=1))
    fitting = [key.method for key in planned]
    assert set(names) - set(fitting) == {"compacter", "compacter++", "phm"} and len(skipped) == 3
    with pytest.raises(InfuseError, match="must divide"):
        _plan(replace(config, methods=("ia3", "compacter")))


def test_two_bases_share_a_report(quick, tiny_base, tmp_path):
    import shutil

    shutil.copytree(tiny_base, tmp_path / "other")
    found = compare(replace(quick, base=(str(tiny_base), str(tmp_path / "other")), seeds=1, methods=("head",)))
    assert [column.title for column in found.report.tables[0].columns][:2] == ["method", "base"]
    assert len(found.report.tables[0].rows) == 4
    names = {point.name for point in found.report.figures[2].points}
    assert names == {"head, tiny", "head, other"}


def test_command_line_and_yaml(quick, tmp_path, capsys):
    settings = {"data": quick.data, "base": list(quick.base), "methods": [{"name": "ia3"}, "head"], "epochs": 1}
    (tmp_path / "settings.yaml").write_text(yaml.safe_dump(settings | {"seeds": 5, "validation_fraction": 0.25}))
    main(["compare", "--config", str(tmp_path / "settings.yaml"), "--seeds", "1", "--out", str(tmp_path / "out")])
    shown = capsys.readouterr()
    assert "ia3" in shown.out and LOGISTIC.split()[0] in shown.out and "report.html" in shown.out
    assert "[3/3]" in shown.err and "epoch 1/1" in shown.err
    used = yaml.safe_load((tmp_path / "out" / "config.yaml").read_text())
    assert used["methods"] == ["ia3", "head"] and used["seeds"] == 1 and used["base"] == list(quick.base)
    assert len(json.loads((tmp_path / "out" / "report.json").read_text())["tables"][0]["rows"]) == 3


def test_a_command_gives_its_settings_back(config):
    changed = replace(config, time=30.0, baseline=False, report_on="test", test="a b.csv", seed=3)
    assert _parse(shlex.split(command("compare", changed))[1:]) == changed
    run = TrainConfig(method="lora:rank=4", layers="last:2", learning_rate=1e-3)
    assert _parse(shlex.split(command("train", run))[1:]) == run


@pytest.mark.parametrize("flags, message", {
    "--methods magic": "the methods are",
    "--methods fusion": "builds on",
    "--methods compacter": "must divide",
    "--seeds 0": "seeds",
    "--epochs 0": "epochs",
    "--time 0": "time",
    "--base ./nowhere": "no folder",
    "--data nope.csv": "nope.csv",
    "--report-on test": "no test split",
    "--probe nope.csv": "nope.csv",
    "--probe one.csv": "two labels",
    "--layers 9": "layers 0 to 1",
    "--out full": "other files",
    "--out one.csv": "is a file",
}.items())  # fmt: skip
def test_mistakes(config, flags, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "one.csv").write_text("text,label\na b,x\nc d,x\n")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    before = sorted(os.walk("."))
    with pytest.raises(SystemExit) as ended:
        main(f"compare --data {config.data} --base {config.base[0]} --methods ia3 --out out {flags}".split())
    shown = capsys.readouterr()
    assert ended.value.code == 2 and shown.out == "" and sorted(os.walk(".")) == before
    assert shown.err.startswith("infuse: ") and shown.err.count("\n") == 1 and message in shown.err, shown.err

"""Calibration: temperatures and thresholds, where they are kept, who heeds them, and what is refused."""

import csv
import io
import json
import shutil

import numpy as np
import pytest
import torch
from conftest import LABELS, write_rows
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_files import rewrite
from transformers import AutoModel

import infuse
from infuse import IA3
from infuse.bases import load_base
from infuse.calibrating.calibrate import calibrate, calibration_error, choose_threshold, fit_temperature, log_loss
from infuse.calibrating.settings import CalibrateConfig
from infuse.checkpoint import amend, header
from infuse.cli import main
from infuse.data import read
from infuse.errors import InfuseError
from infuse.export import merge_run
from infuse.heads import Answer, Head, answer
from infuse.training.config import AverageConfig, TrainConfig
from infuse.training.fusing import average_runs
from infuse.training.predictor import open_run
from infuse.training.run import evaluate, train

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def trained(tiny_base, toy, tmp_path_factory):
    """A run folder that stays as it is."""
    out = tmp_path_factory.mktemp("calibrate") / "run"
    settings = {"epochs": 2, "batch_size": 16, "learning_rate": 0.01, "validation_fraction": 0.25, "baseline": False}
    train(TrainConfig(data=str(toy), base=str(tiny_base), out=out, method="lora:rank=2", **settings))
    return out


@pytest.fixture
def run(trained, tmp_path):
    """A copy of it to calibrate."""
    return shutil.copytree(trained, tmp_path / "run")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Rows that were not trained on, and texts about something else."""
    folder = tmp_path_factory.mktemp("rows")
    rows = [read("sample", split=split) for split in ("validation", "test")]
    pairs = [pair for part in rows for pair in zip(part.texts, part.labels, strict=True)]
    tables = {
        "fresh": [pair for pair in pairs if pair[1] in LABELS],
        "outside": [pair for pair in pairs if pair[1] not in LABELS],
        "one": [pair for pair in pairs if pair[1] == LABELS[0]] * 5,
        "few": [pair for pair in pairs if pair[1] in LABELS][:19],
    }
    for name, table in tables.items():
        with (folder / f"{name}.csv").open("w", newline="") as file:
            csv.writer(file).writerows([("text", "label"), *table])
    write_rows(folder / "other.csv", ("card_lost", "cash_deposit"))
    (folder / "blank.csv").write_text((folder / "outside.csv").read_text() + " ,x\n")
    return folder


def here(capsys, *arguments):
    main([*map(str, arguments)])
    return capsys.readouterr().out


# The fit


@pytest.mark.parametrize("scale", [0.4, 1.0, 3.0])
@pytest.mark.parametrize("multi", [False, True])
def test_the_temperature_of_scaled_logits_is_their_scale(scale, multi):
    draw = torch.Generator().manual_seed(0)
    z = 2 * torch.randn(4000, 8, generator=draw)
    if multi:
        targets = torch.bernoulli(z.sigmoid(), generator=draw)
    else:
        targets = torch.multinomial(z.softmax(-1), 1, generator=draw)[:, 0]
    assert fit_temperature(scale * z, targets, multi) == pytest.approx(scale, rel=0.06)


cells = st.integers(-1000, 1000).map(lambda n: n / 100)
tables = st.integers(2, 6).flatmap(lambda n: st.lists(st.lists(cells, min_size=n, max_size=n), min_size=1, max_size=20))


@settings(max_examples=60, deadline=None)
@given(tables, st.integers(0, 99), st.booleans())
def test_no_temperature_changes_the_answer_or_makes_it_less_likely(rows, seed, multi):
    z = torch.tensor(rows)
    draw = torch.Generator().manual_seed(seed)
    shape = z.shape if multi else z.shape[:1]
    targets = (
        torch.randint(2, shape, generator=draw).float() if multi else torch.randint(z.shape[1], shape, generator=draw)
    )
    temperature = fit_temperature(z, targets, multi)
    assert log_loss(z.double() / temperature, targets, multi) <= log_loss(z, targets, multi)
    plain, scaled = (
        Head("hf", [str(i) for i in range(z.shape[1])], multi=multi, temperature=t).probabilities(z)
        for t in (1.0, temperature)
    )
    assert torch.equal(plain.argmax(-1), scaled.argmax(-1))
    assert not multi or torch.equal(plain >= 0.5, scaled >= 0.5)


def test_rows_without_a_mistake_tell_no_temperature():
    assert fit_temperature(torch.eye(5), torch.arange(5)) == 1.0


shares = st.lists(st.floats(0, 1), min_size=1, max_size=40).map(np.array)


@given(shares, st.sampled_from([0.1, 0.5, 0.7, 0.9, 0.95, 1.0]))
def test_the_threshold_is_the_largest_that_keeps_so_many(inside, keep):
    threshold = choose_threshold(inside, keep=keep)
    assert 0 <= threshold < 1 and (inside >= threshold).mean() >= keep - 1e-12
    assert threshold == 0.9999 or (inside >= (10_000 * threshold + 1) / 10_000).mean() < keep


@given(shares, shares)
def test_examples_out_of_scope_are_separated_as_well_as_can_be(inside, outside):
    def worth(thresholds):
        at = thresholds[:, None]
        return (inside >= at).mean(1) + (outside < at).mean(1)

    found = worth(np.array([choose_threshold(inside, outside)]))
    assert found[0] == pytest.approx(worth(np.arange(10_000) / 10_000).max())


def test_the_threshold_lies_in_the_middle_of_a_gap():
    assert choose_threshold(np.array([0.8, 0.9]), np.array([0.1, 0.2])) == pytest.approx(0.5, abs=2e-4)


def test_calibration_error_by_hand():
    confidence, right = np.array([0.9] * 10 + [0.5] * 10), np.array([1] * 7 + [0] * 3 + [1] * 6 + [0] * 4)
    assert calibration_error(confidence, right) == pytest.approx((0.2 + 0.1) / 2)
    assert calibration_error(np.ones(3), np.ones(3)) == 0


# Answers


def test_answers():
    head = Head("hf", "abcd", threshold=0.5)
    assert answer(head, np.array([0.1, 0.6, 0.2, 0.1]), 2) == Answer("b", None, 0.6, (("b", 0.6), ("c", 0.2)))
    refused = answer(head, np.array([0.1, 0.4, 0.4, 0.1]), 9)
    assert refused.label is None and refused.refused and refused.confidence == 0.4
    assert [label for label, _ in refused.top] == ["b", "c", "a", "d"]
    several = Head("hf", "abc", multi=True, threshold=0.9)
    found = answer(several, np.array([0.6, 0.1, 0.7]), 1)
    assert found == Answer(None, ("a", "c"), 0.7, (("c", 0.7),)) and not found.refused
    assert answer(several, np.array([0.1, 0.1, 0.2])).labels == ()


# The file


def test_calibrate_writes_the_file_and_nothing_else_changes(run, trained, files, capsys):
    found = json.loads(here(capsys, "calibrate", run, "--data", files / "fresh.csv", "--format", "json"))
    facts, before = header(run / "adapter"), header(trained / "adapter")
    head = before["head"] | {"temperature": found["temperature"], "threshold": found["threshold"]}
    assert found["temperature"] != 1 and 0 < found["threshold"] < 1
    assert facts == before | {"head": head, "info": facts["info"]}
    calibration = facts["info"].pop("calibration")
    assert facts["info"] == before["info"] and calibration["rows"] == found["rows"] == 60
    assert calibration["kept"] == found["kept"] >= 0.95 and found["nll"][1] < found["nll"][0]
    old, new = load_file(trained / "adapter" / WEIGHTS), load_file(run / "adapter" / WEIGHTS)
    assert old.keys() == new.keys() and all(torch.equal(old[n], new[n]) for n in old)
    for path in trained.rglob("*"):
        assert (
            path.name == WEIGHTS or path.is_dir() or path.read_bytes() == (run / path.relative_to(trained)).read_bytes()
        )

    one, two, rows = open_run(trained), open_run(run), read(files / "fresh.csv")
    logits = np.log(one.probabilities(rows.texts)) / found["temperature"]
    expected = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    assert np.abs(two.probabilities(rows.texts) - expected).max() < 1e-9
    assert np.abs(infuse.Classifier.load(run).predict_proba(rows.texts) - expected).max() < 1e-9
    assert evaluate(one, rows) == evaluate(two, rows)
    refused = np.mean([each.refused for each in two.answers(rows.texts)])
    assert refused == pytest.approx(1 - found["kept"])
    merged = open_run(merge_run(run, run.parent / "merged")).head
    assert (merged.temperature, merged.threshold) == (found["temperature"], found["threshold"])

    again = json.loads(here(capsys, "calibrate", run, "--data", files / "fresh.csv", "--format", "json"))
    assert again == found  # not a correction of a correction


def test_peft_reads_a_calibrated_file(run, tiny_base, files):
    from peft import PeftModel

    calibrate(CalibrateConfig(run, data=str(files / "fresh.csv")))
    theirs = PeftModel.from_pretrained(AutoModel.from_pretrained(tiny_base), run / "adapter").eval()
    ours = AutoModel.from_pretrained(tiny_base).eval()
    infuse.load(ours, run / "adapter")
    ids = torch.arange(5, 25).reshape(2, 10)
    with torch.no_grad():
        assert torch.allclose(theirs(ids).last_hidden_state, ours(ids).last_hidden_state, atol=1e-5)


def test_files_from_before_calibration_load(run):
    path = run / "adapter" / WEIGHTS
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    facts = json.loads(metadata["infuse"])
    del facts["head"]["temperature"], facts["head"]["threshold"]
    save_file(load_file(path), path, metadata | {"infuse": json.dumps(facts)})
    head = open_run(run).head
    assert head.temperature == 1 and head.threshold == 0


@pytest.mark.parametrize("name, value", [
    *(("temperature", v) for v in (0, -1, float("nan"), float("inf"), 1e-300, 10**400, "1", True, None, [1])),
    *(("threshold", v) for v in (-0.1, 1, float("nan"), float("inf"), "0", False, None)),
])  # fmt: skip
def test_hostile_values_are_refused(run, name, value):
    before = header(run / "adapter")
    with pytest.raises(InfuseError):
        amend(run / "adapter", head={name: value}, info={})
    assert header(run / "adapter") == before
    rewrite(run / "adapter", head=before["head"] | {name: value})
    with pytest.raises(InfuseError, match=f"{name}|401 digits") as caught:
        open_run(run)
    assert "\n" not in str(caught.value)


def test_averages_start_anew(run, tmp_path):
    for name, temperature in (("a", 0.5), ("b", 2.0)):
        shutil.copytree(run, tmp_path / name)
        values = {"temperature": temperature, "threshold": 0.4}
        amend(tmp_path / name / "adapter", head=values, info={"calibration": values})
    average_runs(AverageConfig((tmp_path / "a", tmp_path / "b"), out=tmp_path / "average"))
    head = open_run(tmp_path / "average").head
    assert head.temperature == 1 and head.threshold == 0
    assert "calibration" not in header(tmp_path / "average")["info"]


# The command line


def test_by_default_the_runs_own_validation_rows(run, capsys):
    shown = here(capsys, "calibrate", run)
    assert "30 rows" in shown and "fitted to" in shown and "threshold" in shown
    assert header(run / "adapter")["info"]["calibration"]["data"] == "the run's validation rows"


@pytest.mark.parametrize("content", ["data: [", "data: 5", "- data", "seed: 1"])
def test_without_a_whole_config_rows_have_to_be_given(run, files, content, capsys):
    (run / "config.yaml").write_text(content)
    with pytest.raises(InfuseError, match=r"no whole config\.yaml .* give --data"):
        calibrate(CalibrateConfig(run))
    assert calibrate(CalibrateConfig(run, data=str(files / "fresh.csv"))).rows > 20


def test_a_run_whose_data_has_changed_has_no_validation_rows(run, toy, tmp_path):
    changed, settings = tmp_path / "changed.csv", run / "config.yaml"
    changed.write_text(toy.read_text() + "where is my card,card_lost\n")
    settings.write_text(settings.read_text().replace(str(toy), str(changed)))
    with pytest.raises(InfuseError, match="changed since the run was trained"):
        calibrate(CalibrateConfig(run))
    amend(run / "adapter", head={}, info={"data_sha256": None})  # as an adapter that no run has made
    assert calibrate(CalibrateConfig(run)).rows == 30


def test_out_of_scope_texts_are_answered_so(run, files, capsys):
    shown = here(capsys, "calibrate", run, "--data", files / "fresh.csv", "--out-of-scope", files / "outside.csv")
    facts = header(run / "adapter")
    found, count = facts["info"]["calibration"], len(read(files / "outside.csv"))
    assert f"{100 * found['refused']:.1f}" in shown and f"{count} out of scope" in shown
    assert found["out_of_scope_rows"] == count and found["kept"] + found["refused"] > 1.05
    predict = ("predict", run, "--data", files / "outside.csv")
    answers = [json.loads(line) for line in here(capsys, *predict, "--format", "json").splitlines()]
    assert np.mean([each["label"] is None for each in answers]) == pytest.approx(found["refused"])
    for each in answers:
        assert each["confidence"] == each["predictions"][0]["confidence"]
        below = each["confidence"] < facts["head"]["threshold"]
        assert each["label"] == (None if below else each["predictions"][0]["label"])
    rows = list(csv.DictReader(io.StringIO(here(capsys, *predict, "--format", "csv"))))
    assert [row["label"] or None for row in rows] == [each["label"] for each in answers]
    table = here(capsys, *predict, "--top-k", "1")
    assert table.count("(out of scope)") == sum(each["label"] is None for each in answers)


def test_keep_decides_how_many_rows_are_kept(run, files):
    found = [calibrate(CalibrateConfig(run, data=str(files / "fresh.csv"), keep=keep)) for keep in (0.5, 1.0)]
    assert 0.5 <= found[0].kept < 0.6 and found[1].kept == 1 and found[0].threshold > found[1].threshold


@pytest.fixture(scope="module")
def several(tiny_base, files, tmp_path_factory):
    """A multi-label adapter, not trained, and rows for it."""
    folder = tmp_path_factory.mktemp("several")
    rows, base = read(files / "fresh.csv"), load_base(str(tiny_base))
    adapter = infuse.attach(base.model, IA3(), "adapter")
    adapter.head = Head("cosine", LABELS, base.width, base.pooling, True)
    adapter.info = {"run": {"base": str(tiny_base)}}
    infuse.save(base.model, "adapter", folder / "adapter")
    with (folder / "rows.csv").open("w", newline="") as file:
        pairs = zip(rows.texts, rows.labels, rows.labels[::-1], strict=True)
        csv.writer(file).writerows([("text", "label"), *((text, f"{a}|{b}") for text, a, b in pairs)])
    return folder


def test_multi_label_adapters_get_a_temperature_only(several, capsys):
    found = calibrate(CalibrateConfig(several / "adapter", data=str(several / "rows.csv"), multi=True))
    assert found.temperature != 1 and found.threshold == 0 and found.kept is None and found.nll[1] < found.nll[0]
    (line,) = here(capsys, "predict", several / "adapter", "hello", "--format", "json").splitlines()
    told = json.loads(line)
    assert told["label"] is None and isinstance(told["labels"], list)
    assert "(out of scope)" not in here(capsys, "predict", several / "adapter", "hello")
    with pytest.raises(InfuseError, match="several labels"):
        calibrate(CalibrateConfig(several / "adapter", data=str(several / "rows.csv"), multi=True, keep=0.9))


MISTAKES = {
    "nowhere": "no folder nowhere",
    "nowhere --data fresh.csv": "nowhere",
    "{run}/adapter": "give --data",
    "{run} --data {toy}": "trained on",
    "{run} --data nope.csv": "nope.csv",
    "{run} --data other.csv": "cash_deposit",
    "{run} --data one.csv": "only one label",
    "{run} --data few.csv": "20 rows or more",
    "{run} --data fresh.csv --multi": "one label",
    "{run} --data fresh.csv --keep 0": "--keep",
    "{run} --data fresh.csv --keep 1.5": "--keep",
    "{run} --data fresh.csv --keep nan": "--keep",
    "{run} --data fresh.csv --keep 0.9 --out-of-scope outside.csv": "not both",
    "{run} --data fresh.csv --out-of-scope nope.csv": "nope.csv",
    "{run} --data fresh.csv --out-of-scope few.csv": "20 texts or more",
    "{run} --data fresh.csv --out-of-scope blank.csv": "1 text in blank.csv is empty (row",
    "{run} --data fresh.csv --base ./nowhere": "no folder",
}


@pytest.mark.parametrize("arguments, message", MISTAKES.items())
def test_mistakes(trained, toy, files, arguments, message, capsys, monkeypatch):
    monkeypatch.chdir(files)
    before = {path: path.read_bytes() for folder in (trained, files) for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(SystemExit) as ended:
        main(["calibrate", *arguments.format(run=trained, toy=toy).split()])
    shown = capsys.readouterr()
    assert ended.value.code == 2 and shown.out == ""
    assert shown.err.startswith("infuse: ") and shown.err.count("\n") == 1 and message in shown.err, shown.err
    assert before == {path: path.read_bytes() for f in (trained, files) for path in f.rglob("*") if path.is_file()}

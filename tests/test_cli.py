"""The command line: every sub-command from end to end, and one sentence for every mistake."""

import csv
import io
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
import yaml
from conftest import LABELS, write_rows
from matplotlib import image
from test_files import rewrite
from transformers import AutoModel, AutoModelForSequenceClassification

import infuse
from infuse import LoRA
from infuse.bases import load_base
from infuse.cli import COMMANDS, main
from infuse.data import read
from infuse.method import registry
from infuse.model import store_of
from infuse.precision import dtype_of, name_of
from infuse.training.page import PAGE
from infuse.training.predictor import open_run

QUICK = ["--epochs", "3", "--batch-size", "16", "--learning-rate", "0.01", "--validation-fraction", "0.25"]
FILES = ["adapter", "config.yaml", "confusion.png", "curves.csv", "curves.png", "metrics.json", "per_class.csv", PAGE]


def command(*arguments, stdin=""):
    """Run ``infuse`` in a process of its own; its standard output."""
    done = subprocess.run(
        [sys.executable, "-m", "infuse", *map(str, arguments)],
        input=stdin, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "120"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr and "Warning" not in done.stderr, done.stderr
    return done.stdout


def here(capsys, *arguments):
    """Run ``infuse`` in this process; its standard output."""
    main([*map(str, arguments)])
    return capsys.readouterr().out


@pytest.fixture(scope="module")
def trained(tiny_base, toy, tmp_path_factory):
    """A run folder that the command line made, and what it printed."""
    folder = tmp_path_factory.mktemp("cli") / "run"
    shown = command("train", "--data", toy, "--base", tiny_base, "--out", folder, "--method", "lora:rank=2", *QUICK)
    return folder, shown


@pytest.fixture(scope="module")
def run(trained):
    return trained[0]


@pytest.fixture(scope="module")
def predictor(run):
    return open_run(run)


def table(path):
    return list(csv.DictReader(path.read_text().splitlines()))


# What works


def test_train_leaves_a_run_folder(trained, tiny_base, toy):
    run, shown = trained
    assert sorted(os.listdir(run)) == FILES
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["validation"]["accuracy"] > 0.7 and metrics["baseline"]["validation"]["accuracy"] > 0.7
    assert metrics["rows"] == {"train": 90, "validation": 30} and metrics["parameters"]["transformer"] == 2 * 4 * 64
    for part in (f"{100 * metrics['validation']['accuracy']:.2f}", "logistic regression", "512 parameters", "beat"):
        assert part in shown
    settings = yaml.safe_load((run / "config.yaml").read_text())
    assert settings["method"] == "lora:rank=2" and settings["base"] == str(tiny_base) and settings["data"] == str(toy)
    classes = table(run / "per_class.csv")
    assert [row["label"] for row in classes] == sorted(LABELS)
    recalled = sum(float(row["recall"]) * float(row["rows"]) for row in classes)
    assert recalled / 30 == pytest.approx(metrics["validation"]["accuracy"])
    assert list(metrics["resolved"].values()) == [0.01, 0.003, name_of(dtype_of("auto")), "mean"]
    curves = table(run / "curves.csv")
    assert [float(row["epoch"]) for row in curves if row["eval_loss"]] == [1, 2, 3]
    assert all(row["loss"] or row["eval_loss"] for row in curves)
    for name in ("confusion.png", "curves.png"):
        picture = image.imread(run / name)
        assert min(picture.shape[:2]) > 100 and picture.std() > 0.01
    assert infuse.checkpoint.header(run / "adapter")["info"]["metrics"]["validation"] == metrics["validation"]


def test_train_takes_yaml_and_flags_go_before_it(tiny_base, toy, tmp_path, capsys):
    settings = {
        "data": str(toy), "base": str(tiny_base), "method": {"name": "lora", "rank": 4}, "epochs": 9, "seed": 5,
        "batch_size": 16, "learning_rate": "1e-2", "baseline": False, "clip": 2, "layers": "last:1",
        "out": str(tmp_path / "elsewhere"),
    }  # fmt: skip
    (tmp_path / "settings.yaml").write_text(yaml.safe_dump(settings))
    here(capsys, "train", "--config", tmp_path / "settings.yaml", "--epochs", "1", "--out", tmp_path / "run")
    used = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert used | {"epochs": 9} == used | settings | {
        "method": "lora:rank=4",
        "learning_rate": 0.01,
        "out": used["out"],
    }
    assert used["out"] == str(tmp_path / "run") and not (tmp_path / "elsewhere").exists()
    adapter = infuse.load(load_base(str(tiny_base)).model, tmp_path / "run" / "adapter")
    assert adapter.method == LoRA(rank=4) and {site.layer for site in adapter.sites.values()} == {1}
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["baseline"] is None


def test_a_runs_own_config_repeats_it(run, tmp_path, capsys):
    here(capsys, "train", "--config", run / "config.yaml", "--out", tmp_path / "again", "--no-baseline")
    one, two = (json.loads((folder / "metrics.json").read_text()) for folder in (run, tmp_path / "again"))
    assert one["validation"] == two["validation"]


def test_evaluate(run, toy, predictor, capsys):
    found = json.loads(here(capsys, "evaluate", run, "--data", toy, "--format", "json"))
    rows = read(toy)
    predicted = [predictor.labels[i] for i in predictor.probabilities(rows.texts).argmax(1)]
    assert found["rows"] == 120
    assert found["accuracy"] == pytest.approx(np.mean([p == t for p, t in zip(predicted, rows.labels, strict=True)]))
    assert [row["label"] for row in found["per_class"]] == sorted(LABELS)
    shown = here(capsys, "evaluate", run / "adapter", "--data", toy)
    assert f"accuracy {100 * found['accuracy']:.2f}" in shown and all(label in shown for label in LABELS)


def test_brackets_and_colons_in_texts_labels_and_paths_are_shown_as_they_are(tiny_base, tmp_path, capsys):
    odd = dict(zip(LABELS, ("[/card]", "[red]x", ":smile:", "a[/]", "[link=b]", "[0]"), strict=True))
    toy = read(str(write_rows(tmp_path / "toy.csv", LABELS)))
    rows = [(text, odd[label]) for text, label in zip(toy.texts, toy.labels, strict=True)]
    twice = ("where is [/card] now", odd[LABELS[0]])  # in both files, so that a warning quotes it
    for name, own in (("train", rows[::2]), ("validation", rows[1::2])):
        with (tmp_path / f"{name}.csv").open("w", newline="") as file:
            csv.writer(file).writerows([("text", "label"), *own, twice])
    out, data = tmp_path / "[/out] [bold]:smile:", tmp_path / "validation.csv"
    main(["train", "--data", str(tmp_path / "train.csv"), "--validation", str(data), "--base", str(tiny_base),
          "--out", str(out), *QUICK])  # fmt: skip
    shown = capsys.readouterr()
    assert twice[0] in shown.err and f"run folder: {out} " in shown.out
    shown = here(capsys, "evaluate", out, "--data", data)
    assert all(label in shown for label in odd.values())
    shown = here(capsys, "predict", out, "[/b] :smile:", "--top-k", "6")
    assert all(part in shown for part in ("[/b] :smile:", *odd.values()))


def test_predict_from_arguments(run, predictor):
    texts = ["I forgot my PIN", "What is the savings rate?"]
    shown = command("predict", run, *texts)
    for text, given in zip(texts, predictor.probabilities(texts), strict=True):
        assert text in shown and predictor.labels[given.argmax()] in shown and f"{100 * given.max():.1f} %" in shown


def test_predict_from_standard_input_as_json(run, predictor):
    texts = ["I forgot my PIN", 'say "größe", 日本']
    shown = command("predict", run, "--format", "json", "--top-k", "2", stdin="\n".join([texts[0], "", texts[1], ""]))
    answers = [json.loads(line) for line in shown.splitlines()]
    assert [answer["text"] for answer in answers] == texts
    for answer, given in zip(answers, predictor.probabilities(texts), strict=True):
        order = np.argsort(-given)[:2]
        assert [p["label"] for p in answer["predictions"]] == [predictor.labels[i] for i in order]
        assert [p["confidence"] for p in answer["predictions"]] == pytest.approx(given[order], abs=1e-4)


def test_predict_from_a_file_as_csv(run, toy, predictor, capsys):
    shown = here(capsys, "predict", run, "--data", toy, "--format", "csv", "--top-k", "99")
    rows = list(csv.DictReader(io.StringIO(shown)))
    texts = read(toy).texts
    assert [row["text"] for row in rows] == list(texts)
    assert list(rows[0]) == ["text", *(f"{what}_{i}" for i in range(1, 7) for what in ("label", "confidence")), "label"]
    assert [row["label"] for row in rows] == [row["label_1"] for row in rows]
    given = predictor.probabilities(texts)
    assert [row["label_1"] for row in rows] == [predictor.labels[i] for i in given.argmax(1)]
    assert [float(row["confidence_6"]) for row in rows] == pytest.approx(given.min(1), abs=1e-4)


def test_summary_counts_methods_and_runs(tiny_base, run, capsys):
    shown = here(capsys, "summary", tiny_base, "--methods", "ia3", "lora:rank=4", "--layers", "last:1")
    assert "224" not in shown and " 112 " in shown and " 512 " in shown
    total = sum(p.numel() for p in AutoModel.from_pretrained(tiny_base).parameters())
    assert f"{total:,} parameters" in " ".join(shown.split())
    shown = " ".join(here(capsys, "summary", tiny_base, "--methods", "full", "head").split())
    assert f"full │ 0 │ {total:,} │ 100.000" in shown and "head │ 0 │ 0 │ 0.000" in shown
    shown = here(capsys, "summary", run)
    assert "512 parameters in the transformer" in shown and "query" in shown and "head" in shown


def test_summary_shows_the_methods_that_fit_and_why_others_do_not(tiny_base, monkeypatch, capsys):
    monkeypatch.setattr("infuse.console.out.width", 150)
    rows = {line.split()[1]: line for line in here(capsys, "summary", tiny_base).splitlines() if line.startswith("│")}
    assert set(registry()) <= set(rows) and " 224 " in rows["ia3"]
    assert "–" in rows["compacter"] and "must divide 32" in rows["compacter"]


def test_sites_shows_every_role(tiny_base, monkeypatch, capsys):
    monkeypatch.setattr("infuse.console.out.width", 120)
    lines = [line for line in here(capsys, "sites", tiny_base).splitlines() if "output" in line or "input" in line]
    shown = {role: line for line in lines for role in line.replace("│", " ").split()[:1]}
    assert {"query", "key", "value", "attention_output", "ffn_up", "ffn_hidden", "ffn_output"} == set(shown)
    assert "input" in shown["ffn_hidden"] and "48" in shown["ffn_hidden"] and "encoder.layer.*" in shown["query"]


def test_merged_models_answer_like_their_runs(run, toy, predictor, tmp_path, capsys):
    assert str(tmp_path / "merged") in here(capsys, "merge", run, tmp_path / "merged")
    texts = read(toy).texts
    merged, exact = open_run(tmp_path / "merged"), open_run(run, precision="fp32")
    assert np.abs(merged.probabilities(texts) - exact.probabilities(texts)).max() < 1e-4
    assert not store_of(merged.base.model)["adapter"].sites
    plain = AutoModel.from_pretrained(tmp_path / "merged" / "model")
    assert plain.state_dict().keys() == AutoModel.from_pretrained(predictor.base.name).state_dict().keys()


def test_a_merged_head_of_transformers_needs_no_infuse(tiny_base, toy, tmp_path, capsys):
    here(capsys, "train", "--data", toy, "--base", tiny_base, "--out", tmp_path / "run", "--head", "hf", *QUICK)
    here(capsys, "merge", tmp_path / "run", tmp_path / "merged")
    texts = read(toy).texts[:20]
    before, after = (open_run(tmp_path / name, precision="fp32").probabilities(texts) for name in ("run", "merged"))
    assert np.abs(before - after).max() < 1e-4
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged" / "model").eval()
    tokens = load_base(str(tmp_path / "merged" / "model")).tokenizer(list(texts), padding=True, return_tensors="pt")
    with torch.no_grad():
        logits = model(tokens["input_ids"], tokens["attention_mask"]).logits
    assert np.abs(logits.softmax(-1).numpy() - before).max() < 1e-4


@pytest.mark.parametrize("name", ["", *COMMANDS])
def test_help(name, capsys):
    with pytest.raises(SystemExit) as ended:
        main([name, "--help"] if name else ["--help"])
    shown = capsys.readouterr().out
    assert ended.value.code == 0
    assert all(part in shown for part in ((name, "--") if name else COMMANDS))


# What does not


@pytest.fixture
def place(tmp_path, run, tiny_base, toy, monkeypatch):
    """A working folder with good and bad things in it, as names for the mistakes below."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "one.csv").write_text("text,label\na b,x\nc d,x\n")
    (tmp_path / "hole.csv").write_text("text,label\na b,x\n,y\nc d,y\n")
    (tmp_path / "bare.csv").write_text("text,label\n")
    (tmp_path / "empty.csv").write_text("")
    (tmp_path / "latin.csv").write_bytes("text,label\ngröße,x\n".encode("latin-1"))
    (tmp_path / "half.jsonl").write_text('{"text": "a b", "label": "x"}\n{"text": "a \\ud83d", "label": "y"}\n')
    (tmp_path / "data.xls").write_text("text,label\n")
    write_rows(tmp_path / "other.csv", ("card_lost", "cash_deposit"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    shutil.copytree(run, tmp_path / "cut")
    (tmp_path / "cut" / "checkpoints").mkdir()
    (tmp_path / "cut" / "metrics.json").unlink()
    shutil.copytree(run, tmp_path / "torn")
    os.truncate(tmp_path / "torn" / "adapter" / "adapter_model.safetensors", 1000)
    shutil.copytree(tiny_base, tmp_path / "twin")
    model = AutoModel.from_pretrained(tiny_base)
    with torch.no_grad():
        model.encoder.layer[0].output.dense.weight += 1
    model.save_pretrained(tmp_path / "twin")
    infuse.attach(model, LoRA(), "headless")
    infuse.save(model, "headless", tmp_path / "headless")
    return {"toy": toy, "base": tiny_base, "run": run}


TRAIN = {
    "--data nope.csv": "nope.csv",
    "--data nope": "nope",
    "--data one.csv": "only one class",
    "--data hole.csv": "empty",
    "--data bare.csv": "no rows",
    "--data empty.csv": "empty",
    "--data latin.csv": "UTF-8",
    "--data half.jsonl": "not valid Unicode (row 2)",
    "--data data.xls": "no type",
    "--data full": "train.csv",
    "--text body": "no column 'body'",
    "--label topic": "no column 'topic'",
    "--validation other.csv": "cash_deposit",
    "--test nope.csv": "nope.csv",
    "--validation-fraction 0": "0",
    "--validation-fraction 2": "2",
    "--method magic": "the methods are",
    "--method lora:depth=3": "no setting 'depth'",
    "--method lora:rank=0": "rank",
    "--method lora:rank=two": "rank",
    "--method lora:rank": "name=value",
    "--method lora:rank=[": "rank",
    "--method lora:rank=2024-13-45": "can't be read",
    "--method houlsby:dropout=1.5": "dropout must lie in [0, 1)",
    "--method houlsby:reduction=.nan": "reduction must be a finite number",
    "--method lora:roles=nose": "the roles are",
    "--method lora:roles=ffn_hidden": "not defined",
    "--layers 9": "layers 0 to 1",
    "--layers some": "not understood",
    "--base no-such/model": "can't be loaded",
    "--base ./nowhere": "no folder",
    "--base full": "can't be loaded",
    "--epochs 0": "epochs",
    "--batch-size 0": "batch_size",
    "--learning-rate -1": "learning_rate",
    "--learning-rate nan": "learning_rate",
    "--warmup 2": "warmup",
    "--seed -1": "seed must lie between 0 and 4,294,967,295",
    "--seed 4294967296": "seed",
    "--max-length 2": "max_length",
    "--out full": "other files",
    "--out one.csv": "is a file",
    "--out one.csv/x": "one.csv is no folder",
    f"--out {300 * 'a'}": "File name too long",
    "--out {run}": "finished run",
    "--out full --overwrite": "other files",
    "--config nope.yaml": "can't be read",
}
YAMLS = {
    "epochs: [": "can't be read",
    "epochs: 2024-13-45": "can't be read",
    "clip: yes": "clip",
    "learning_rate: true": "learning_rate",
    "- epochs": "no mapping",
    "": "no mapping",
    "epoch: 3": "epoch",
    "epochs: three": "epochs",
    "epochs: 2.5": "epochs",
    "epochs: true": "epochs",
    "epochs:": "epochs",
    "learning_rate: fast": "learning_rate",
    "learning_rate: [1]": "learning_rate",
    "head: big": "head",
    "schedule: wild": "schedule",
    "out: 3": "out",
    "out: [a]": "out",
    "validation: [a]": "validation",
    "method: [lora]": "method",
    "method: {{rank: 4}}": "method",
    "method: {{name: lora, depth: 3}}": "depth",
    "method: {{name: lora, rank: two}}": "rank",
    "method: {{name: lora, roles: {{a: 1}}}}": "roles",
    'test: "a\\0.csv"': "zero byte",
    'out: "a\\0"': "zero byte",
    100_000 * "[": "can't be read",
}
OTHERS = {
    "evaluate nowhere --data {toy}": "There is no folder nowhere; give a run folder",
    "evaluate full --data {toy}": "adapter_model.safetensors",
    "evaluate . --data {toy}": "give a run folder in it, such as headless",
    "evaluate one.csv --data {toy}": "one.csv is a file; give a run folder",
    "calibrate nowhere": "There is no folder nowhere; give a run folder",
    "calibrate full": "adapter_model.safetensors",
    "calibrate one.csv": "is a file",
    "calibrate cut": "interrupted",
    "fuse {run} nowhere --base {base} --data {toy}": "There is no folder nowhere; give a run folder",
    "fuse {run} full --base {base} --data {toy}": "adapter_model.safetensors",
    "fuse {run} cut --base {base} --data {toy}": "interrupted",
    "average {run} nowhere": "There is no folder nowhere; give a run folder",
    "average one.csv {run}": "is a file",
    "average cut {run}": "interrupted",
    "merge full out": "adapter_model.safetensors",
    "merge cut out": "interrupted",
    "merge {run} --out out": "needs OUT, an argument without a flag",
    "serve nowhere": "no folder nowhere",
    "serve one.csv": "one.csv",
    "summary one.csv": "is a file",
    "summary cut": "interrupted",
    "summary {base} --methods compacter": "must divide",
    "summary {base} --methods fusion": "builds on trained adapters",
    "evaluate cut --data {toy}": "interrupted",
    "evaluate torn --data {toy}": "truncated",
    "evaluate headless --data {toy}": "no classification head",
    "evaluate {run} --data nope.csv": "nope.csv",
    "evaluate {run} --data other.csv": "cash_deposit",
    "evaluate {run} --data bare.csv": "no rows",
    "evaluate {run} --data hole.csv": "empty",
    "evaluate {run} --data {toy} --multi": "one label",
    "evaluate {run} --data {toy} --base twin": "other weights",
    "evaluate {run} --data {toy} --base ./nowhere": "no folder",
    "predict {run}": "no text",
    "predict {run} --data bare.csv": "no text",
    "predict {run} --data hole.csv": "Text 2 of 3 is blank: fill or leave it out.",
    "predict {run} --data {toy} --text body": "no column 'body'",
    "predict {run} --data half.jsonl": "Text 2 ('a \\ud83d') is not valid Unicode",
    "predict {run} hello --data {toy}": "not both",
    "predict {run} hello --top-k 0": "top-k",
    "predict nowhere hello": "nowhere",
    "predict cut hello": "interrupted",
    "merge {run} full": "other files",
    "merge {run} one.csv": "is a file",
    "merge nowhere out": "nowhere",
    "tune --data {toy} --bases {base} --seed -1": "seed",
    "recommend --base {base} --seed -1": "seed",
    "compare --data {toy} --base {base} --seed -1": "seed",
    "merge {run} one.csv/x": "one.csv is no folder",
    "summary no-such/model": "can't be loaded",
    "summary full": "adapter_model.safetensors",
    "summary {base} --methods magic": "the methods are",
    "summary {run} --methods ia3": "leave out --methods",
    "summary {run} --base ./nowhere": "no folder",
    "summary {base} --base twin": "leave out",
    "summary {base} --layers 9": "layers 0 to 1",
    "sites ./nowhere": "no folder",
    "sites full": "can't be loaded",
}


def refuse(arguments, message, capsys, monkeypatch, stdin=None):
    """Exit code 2, one sentence, and not a file more or less."""
    before = sorted(os.walk("."))
    monkeypatch.setattr(sys, "stdin", stdin or io.StringIO("\n"))
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    shown = capsys.readouterr()
    assert ended.value.code == 2 and shown.out == ""
    assert shown.err.startswith("infuse: ") and shown.err.count("\n") == 1 and message in shown.err, shown.err
    assert sorted(os.walk(".")) == before


@pytest.mark.parametrize("flags, message", TRAIN.items())
def test_mistakes_in_training(place, flags, message, capsys, monkeypatch):
    usual = f"train --data {place['toy']} --base {place['base']} --out out --epochs 1"
    refuse(f"{usual} {flags}".format(**place).split(), message, capsys, monkeypatch)


def test_a_run_whose_weights_are_tied_is_not_merged(place, capsys, monkeypatch):
    def opened(*args, **kwargs):
        predictor = open_run(*args, **kwargs)
        first, second = predictor.base.model.encoder.layer
        second.attention.self.query.weight = first.attention.self.query.weight
        return predictor

    monkeypatch.setattr("infuse.export.open_run", opened)
    pair = "encoder.layer.0.attention.self.query shares its weight with encoder.layer.1.attention.self.query"
    refuse(["merge", str(place["run"]), "out"], pair, capsys, monkeypatch)


@pytest.mark.parametrize("content, message", YAMLS.items())
def test_mistakes_in_yaml(place, content, message, capsys, monkeypatch):
    with open("settings.yaml", "w") as file:
        file.write(content.format())
    usual = f"train --config settings.yaml --data {place['toy']} --base {place['base']}"
    refuse(usual.split(), message, capsys, monkeypatch)


@pytest.mark.parametrize("changes", [
    {"head": {}}, {"head": {"kind": []}}, {"head": {"kind": "cosine", "labels": 3}}, {"info": {"run": [1]}},
    {"info": {"run": {"max_length": "many"}}}, {"info": {"run": {"max_length": float("inf")}}},
    {"info": {"run": {"max_length": 0}}}, {"info": {"run": {"precision": ["x"]}}}, {"info": {"run": {"base": 5}}},
], ids=str)  # fmt: skip
def test_headers_that_make_no_sense(run, changes, tmp_path, monkeypatch, capsys):
    shutil.copytree(run / "adapter", tmp_path / "adapter")
    rewrite(tmp_path / "adapter", **changes)
    monkeypatch.chdir(tmp_path)
    refuse(["predict", "adapter", "hello"], "adapter", capsys, monkeypatch)


@pytest.mark.parametrize("arguments, message", OTHERS.items())
def test_mistakes_elsewhere(place, arguments, message, capsys, monkeypatch):
    refuse(arguments.format(**place).split(), message, capsys, monkeypatch)


@pytest.mark.parametrize("texts", [[""], [" "], ["hello", "\t", "card", ""]], ids=repr)
def test_blank_texts_are_refused_as_a_server_does(place, texts, capsys, monkeypatch):
    refuse(["predict", str(place["run"]), *texts], "blank: fill or leave", capsys, monkeypatch)


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])  # as the locale is UTF-8 or C
def test_standard_input_that_is_not_utf8(place, errors, capsys, monkeypatch):
    stdin = io.TextIOWrapper(io.BytesIO("my café card\n".encode("latin-1")), "utf-8", errors)
    refuse(["predict", str(place["run"])], "UTF-8", capsys, monkeypatch, stdin)


@pytest.mark.parametrize("arguments, message", [
    ("", "Give a command: train, tune"), ("tarin", "no command tarin: did you mean train?"),
    ("train --epochs three", "--epochs takes a whole number, not 'three'"), ("compare --time x", "takes a number"),
    ("train --epoch 3", "no option --epoch: did you mean --epochs?"), ("train --head big", "cosine, linear, hf, not"),
    ("sites a b", "no argument b"), ("predict", "needs STR (A run folder"), ("evaluate run", "needs --data"),
    ("evaluate run --dta x", "no option --dta"), ("evaluate run --format xml", "table, json, not 'xml'"),
])  # fmt: skip
def test_flags_that_make_no_sense(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    refuse(arguments.split(), message, capsys, monkeypatch)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="the system has no /dev/full")
@pytest.mark.parametrize("arguments", ["predict {run} hello", "predict {run} hello --format csv"])
def test_output_that_can_not_be_written(run, arguments):
    with open("/dev/full", "w") as full:
        words = [sys.executable, "-m", "infuse", *arguments.format(run=run).split()]
        done = subprocess.run(words, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2 and "No space left" in done.stderr and done.stderr.count("\n") == 1, done.stderr

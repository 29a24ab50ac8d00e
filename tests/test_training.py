"""Training: what is learnt, what is kept, and that an interrupted run ends as if nothing had happened."""

import csv
import hashlib
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import BertModel, TrainerCallback

import infuse
from infuse import InfuseError, bases, storage
from infuse.bases import load_base
from infuse.data import Rows, read, stratified
from infuse.heads import Head
from infuse.model import store_of
from infuse.texts import probabilities, tokenize
from infuse.training import engine, run
from infuse.training.config import TrainConfig
from infuse.training.engine import TextClassifier, parameter_groups
from infuse.training.fit import class_weights, fit, newest_checkpoint
from infuse.training.metrics import decide, overall
from infuse.training.predictor import open_run
from infuse.training.run import train
from infuse.training.settings import Settings

LORA = Settings(method="lora:rank=4", epochs=4, batch_size=16, learning_rate=0.01)


@pytest.fixture(scope="module")
def rows(toy):
    """Training and validation rows of the toy."""
    return stratified(read(toy), 0.25)


def fitted(base, rows, settings, validation=..., **options):
    labels = len(rows[0].label_set) if settings.head == "hf" else None
    base = load_base(str(base), labels=labels)
    return base, fit(base, rows[0], rows[1] if validation is ... else validation, settings, **options)


def scores(base, adapter, rows):
    tokens = tokenize(base.tokenizer, rows.texts, 64)
    given = probabilities(base.model, tokens, 0, adapter.name)
    index = [[adapter.head.labels.index(label) for label in row] for row in rows.label_sets()]
    targets = np.array([[i in row for i in range(len(adapter.head.labels))] for row in index]).astype(int)
    return overall(targets if rows.multi else targets.argmax(1), decide(given, rows.multi))


def course(history, key="eval_macro_f1"):
    return [entry[key] for entry in history if key in entry]


def weights(adapter):
    return {name: value.clone() for name, value in adapter.state_dict().items()}


def same(one, two):
    return one.keys() == two.keys() and all(torch.equal(value, two[name]) for name, value in one.items())


# Learning


@pytest.mark.parametrize(
    "changes",
    [{"method": "ia3"}, {}, {"method": "head"}, {"method": "full", "learning_rate": 1e-3},
     {"head": "linear", "head_learning_rate": 0.03}, {"head": "hf", "head_learning_rate": 0.01, "epochs": 8},
     {"pooling": "cls", "head": "linear", "head_learning_rate": 0.03, "epochs": 8}],
    ids=str,
)  # fmt: skip
def test_every_method_and_head_learns(tiny_base, rows, changes):
    """Six labels, so that guessing gets 17 %; the frozen base changes under full fine-tuning alone."""
    settings = replace(LORA, **changes)
    base, result = fitted(tiny_base, rows, settings)
    assert scores(base, result.adapter, rows[1])["accuracy"] > 0.7
    assert result.labels == tuple(rows[0].label_set) == result.adapter.head.labels
    before = dict(load_base(str(tiny_base)).model.state_dict())
    after = {n.removeprefix("bert."): v for n, v in base.model.state_dict().items()}
    moved = [name for name, value in before.items() if not torch.equal(value, after[name]) and "pooler" not in name]
    assert bool(moved) == (settings.method == "full")
    assert not base.model.training


@pytest.fixture
def scripted(monkeypatch):
    """Makes the validation scores of coming epochs up."""

    def script(*scores):
        left = list(scores)
        module = importlib.import_module("infuse.training.fit")
        monkeypatch.setattr(module, "overall", lambda *_: {"accuracy": 0.5, "macro_f1": left.pop(0)})

    return script


class Album(TrainerCallback):
    """The trained tensors at every evaluation."""

    def __init__(self):
        self.states = []

    def on_evaluate(self, args, state, control, model=None, **options):
        self.states.append(weights(model.adapter))


def test_the_best_epoch_is_kept(tiny_base, rows, scripted):
    scripted(0.2, 0.6, 0.5, 0.6, 0.1)
    album = Album()
    _, result = fitted(tiny_base, rows, replace(LORA, epochs=5, patience=0), callbacks=[album])
    assert [same(weights(result.adapter), state) for state in album.states] == [False, True, False, False, False]


def test_training_stops_after_as_many_epochs_without_a_better_one(tiny_base, rows, scripted):
    scripted(0.2, 0.1, 0.3, 0.3, 0.2, 0.9)
    _, result = fitted(tiny_base, rows, replace(LORA, epochs=6, patience=2))
    assert course(result.history) == [0.2, 0.1, 0.3, 0.3, 0.2]


def test_without_validation_the_last_state_is_kept(tiny_base, rows):
    base, result = fitted(tiny_base, rows, LORA, None)
    assert course(result.history) == [] and scores(base, result.adapter, rows[1])["accuracy"] > 0.7


def test_seeds_repeat_bit_for_bit(tiny_base, rows):
    settings = replace(LORA, method="lora:rank=4,dropout=0.1", trunk_dropout=True, epochs=2)
    first, again, other = (
        weights(fitted(tiny_base, rows, replace(settings, seed=seed))[1].adapter) for seed in (1, 1, 2)
    )
    assert same(first, again) and not same(first, other)


def test_the_models_own_head_is_drawn_by_the_seed(tiny_base, toy, tmp_path):
    def trained(name, seed):
        torch.rand(1)
        train(config(tiny_base, toy, tmp_path / name, head="hf", epochs=1, seed=seed))
        return outcome(tmp_path / name)[0]

    first, again, other = trained("first", 1), trained("again", 1), trained("other", 2)
    assert same(first, again) and not same(first, other)
    heads = [load_base(str(tiny_base), labels=3, seed=seed).model.classifier.weight for seed in (1, 1, 2)]
    assert torch.equal(*heads[:2]) and not torch.equal(*heads[1:])


def test_a_head_on_weights_that_the_checkpoint_lacks_is_refused(tiny_base, tmp_path):
    base = load_base(str(tiny_base))
    BertModel.from_pretrained(tiny_base, add_pooling_layer=False).save_pretrained(tmp_path)
    base.tokenizer.save_pretrained(tmp_path)
    with pytest.raises(InfuseError, match=r"no weights of bert\.pooler\.dense.*: use the head cosine or linear"):
        load_base(str(tmp_path), labels=3)
    assert load_base(str(tmp_path)).width == base.width


def test_packaged_weights_are_hashed_once_until_they_change(tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(b"right")
    known = bases.Packaged("some_package", "model", hashlib.sha256(b"right").hexdigest(), "demo")
    monkeypatch.setitem(bases.PACKAGED, "a/base", known)
    spec = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(bases.importlib.util, "find_spec", lambda name: spec)
    read, real = [], Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: read.append(path) or real(path))
    assert {bases.locate("a/base") for _ in range(3)} == {str(tmp_path / "model")}
    assert read == [weights]
    weights.write_bytes(b"wrong")
    os.utime(weights, ns=(1, 1))
    with pytest.raises(InfuseError, match="are not those of a/base"):
        bases.locate("a/base")


def test_class_weights():
    assert class_weights(torch.tensor([0, 0, 0, 1]), 2).tolist() == pytest.approx([2 / 3, 2])
    assert class_weights(torch.tensor([[1.0, 0], [1, 0], [1, 0], [0, 1]]), 2).tolist() == pytest.approx([1, 3])


def test_losses_are_the_textbook_ones(rows):
    torch.manual_seed(0)
    logits, weight = torch.randn(5, 3), torch.tensor([1.0, 2.0, 0.5])
    targets, several = torch.tensor([0, 2, 1, 1, 0]), torch.randint(0, 2, (5, 3)).float()
    loss = Head("linear", "abc", 4).loss(logits, targets, weight, 0.2)
    torch.testing.assert_close(loss, F.cross_entropy(logits, targets, weight, label_smoothing=0.2))
    loss = Head("linear", "abc", 4, multi=True).loss(logits, several, weight, 0.2)
    each = several.mul(0.8).add(0.1)
    expected = -(weight * each * logits.sigmoid().log() + (1 - each) * (-logits).sigmoid().log())
    torch.testing.assert_close(loss, expected.mean())


@pytest.mark.parametrize("changes", [{"class_weights": True}, {"label_smoothing": 0.3}, {"weight_decay": 1.0},
                                     {"clip": 1e-3}, {"schedule": "constant"}, {"warmup": 0.9}], ids=str)  # fmt: skip
def test_every_setting_reaches_the_training(tiny_base, rows, changes):
    uneven = rows[0].take([i for i, label in enumerate(rows[0].labels) if label != "card_lost" or i % 3 == 0])
    plain, changed = (
        weights(fitted(tiny_base, (uneven, None), s, None)[1].adapter)
        for s in (replace(LORA, epochs=1), replace(LORA, epochs=1, **changes))
    )
    assert not same(plain, changed)


def test_several_labels_per_text(tiny_base, rows):
    """Texts joined in pairs carry both labels; to call every text everything gives a macro-F1 of about 50 %."""

    def paired(rows):
        texts, labels, count = rows.texts, rows.labels, len(rows)
        order = [(i, (7 * i + 31) % count) for i in range(count)]
        return Rows(
            tuple(f"{texts[i]} {texts[j]}" for i, j in order),
            tuple(tuple({labels[i]: 0, labels[j]: 0}) for i, j in order),
        )

    several = tuple(map(paired, rows))
    base, result = fitted(tiny_base, several, replace(LORA, class_weights=True))
    assert result.adapter.head.multi
    assert scores(base, result.adapter, several[1])["macro_f1"] > 0.7


@pytest.mark.parametrize("method", ["ia3", "lora", "full", "head"])
def test_learning_rates_are_the_methods_own_unless_given(tiny_base, method):
    base = load_base(str(tiny_base))
    adapter = infuse.attach(base.model, method, "a")
    adapter.head = Head("linear", "abc", 32)
    for settings in (Settings(), Settings(learning_rate=0.5, head_learning_rate=0.25, weight_decay=0.1)):
        groups = parameter_groups(TextClassifier(base.model, "a", settings), settings)
        heads = {id(p) for p in adapter.head.parameters()}
        own = settings.learning_rate or adapter.method.learning_rate
        for group in groups:
            for parameter in group["params"]:
                assert group["lr"] == ((settings.head_learning_rate or 0.01) if id(parameter) in heads else own)
                assert group["weight_decay"] == (settings.weight_decay if parameter.dim() > 1 else 0)
        assert sum(len(group["params"]) for group in groups) == sum(p.requires_grad for p in base.model.parameters())


def test_one_label_is_refused(tiny_base):
    with pytest.raises(InfuseError, match="two labels"):
        fitted(tiny_base, (Rows(("a", "b"), ("x", "x")), None), LORA, None)


# Runs


def config(base, toy, out, **changes):
    settings = {"method": "lora:rank=4,dropout=0.1", "trunk_dropout": True, "epochs": 4, "patience": 0}
    settings |= {"head": "linear", "learning_rate": 0.005, "head_learning_rate": 0.001, "batch_size": 16}
    return TrainConfig(base=str(base), data=str(toy), out=out, validation_fraction=0.25, baseline=False,
                       **settings | changes)  # fmt: skip


def outcome(folder):
    """What a run found that no clock or path can change."""
    metrics = json.loads((folder / "metrics.json").read_text())
    tables = {name: (folder / name).read_text() for name in ("per_class.csv", "curves.csv")}
    return load_file(folder / "adapter" / "adapter_model.safetensors"), metrics["validation"], tables


def assert_same_outcome(one, two):
    assert same(outcome(one)[0], outcome(two)[0]) and outcome(one)[1:] == outcome(two)[1:]


@pytest.fixture(scope="module")
def reference(tiny_base, toy, tmp_path_factory):
    """An uninterrupted run of four epochs of six steps, each better than the one before."""
    folder = tmp_path_factory.mktemp("reference") / "run"
    train(config(tiny_base, toy, folder))
    lines = (folder / "curves.csv").read_text().splitlines()
    measured = [float(row["eval_macro_f1"]) for row in csv.DictReader(lines) if row["eval_macro_f1"]]
    assert len(measured) == 4 and sorted(set(measured)) == measured
    return folder


KILLED = """
import os, signal, sys, torch
torch.set_num_threads({threads})
from infuse.cli import main
from infuse.training import engine
step, save = engine.AdapterTrainer.training_step, engine.AdapterTrainer._save
def die(): os.kill(os.getpid(), signal.SIGKILL)
def dying_step(self, *args, **options):
    return die() if self.state.global_step == {step} else step(self, *args, **options)
def torn_save(self, folder, *rest):
    save(self, folder, *rest)
    if folder.endswith("checkpoint-{torn}"):
        os.truncate(os.path.join(folder, engine.WEIGHTS), 300)
        die()
engine.AdapterTrainer.training_step, engine.AdapterTrainer._save = dying_step, torn_save
main(["train", "--config", sys.argv[1]])
"""


@pytest.mark.parametrize("step, torn", [(15, 99), (99, 18)], ids=["in an epoch", "writing a checkpoint"])
def test_a_killed_run_ends_like_an_unbroken_one(tiny_base, toy, reference, tmp_path, step, torn):
    settings = config(tiny_base, toy, tmp_path / "run")
    (tmp_path / "settings.yaml").write_text(run.as_yaml(settings))
    code = KILLED.format(step=step, torn=torn, threads=torch.get_num_threads())
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "settings.yaml")], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    there = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert "checkpoint-12" in there and not (tmp_path / "run" / "adapter").exists()
    with pytest.raises(InfuseError, match="interrupted"):
        open_run(tmp_path / "run")
    with pytest.raises(InfuseError, match=r"other settings \(epochs, seed\)"):
        train(replace(settings, epochs=5, seed=1))
    assert train(settings).metrics["resumed"]
    assert_same_outcome(tmp_path / "run", reference)
    assert not (tmp_path / "run" / "checkpoints").exists()


class CutError(Exception):
    """The power goes."""


def cut(monkeypatch, at):
    """Interrupt training before a step, or after all of it."""
    step = engine.AdapterTrainer.training_step

    def dying(self, *args, **options):
        if self.state.global_step == at:
            raise CutError
        return step(self, *args, **options)

    def predict(*args):
        raise CutError

    monkeypatch.setattr(
        *((run, "_predict", predict) if at == "end" else (engine.AdapterTrainer, "training_step", dying))
    )


def test_an_interrupted_run_is_not_resumed_on_other_data(tiny_base, toy, tmp_path, monkeypatch):
    data = tmp_path / "data.csv"
    shutil.copy(toy, data)
    settings = config(tiny_base, data, tmp_path / "run")
    with monkeypatch.context() as patch, pytest.raises(CutError):
        cut(patch, 7)
        train(settings)
    before = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    data.write_text(toy.read_text().replace("card", "cart"))
    with pytest.raises(InfuseError, match="data has changed"):
        train(settings)
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == before
    shutil.copy(toy, data)
    assert train(settings).metrics["resumed"]


DAMAGED = [b"epochs: [", b"- epochs", b"", b"epochs", b"\xff\x00", b"[" * 5000]


@pytest.mark.parametrize("content", DAMAGED, ids=lambda content: repr(content[:9]))
def test_damaged_settings_of_an_interrupted_run_are_told(tiny_base, toy, tmp_path, monkeypatch, content):
    settings = config(tiny_base, toy, tmp_path / "run")
    with monkeypatch.context() as patch, pytest.raises(CutError):
        cut(patch, 7)
        train(settings)
    checkpoints = tmp_path / "run" / "checkpoints"
    (checkpoints / "config.yaml").write_bytes(content)
    before = sorted(checkpoints.iterdir())
    with pytest.raises(InfuseError, match=r"config\.yaml is damaged.*--out.*--overwrite"):
        train(settings)
    assert sorted(checkpoints.iterdir()) == before
    assert train(replace(settings, epochs=1, overwrite=True)).metrics["epochs"] == 1


@pytest.mark.parametrize("at", [3, 6, 17, 23, "end"])
def test_any_interruption_can_be_resumed(tiny_base, toy, reference, tmp_path, monkeypatch, at):
    settings = config(tiny_base, toy, tmp_path / "run")
    with monkeypatch.context() as patch, pytest.raises(CutError):
        cut(patch, at)
        train(settings)
    assert train(settings).metrics["resumed"] == (at != 3)
    assert_same_outcome(tmp_path / "run", reference)


@pytest.mark.parametrize("at", [15, "end"])
def test_a_resumed_run_stops_as_early(tiny_base, toy, tmp_path, monkeypatch, at):
    settings = config(tiny_base, toy, tmp_path / "whole", method="head", head="cosine", epochs=9, patience=2)
    train(settings)
    with monkeypatch.context() as patch, pytest.raises(CutError):
        cut(patch, at)
        train(replace(settings, out=tmp_path / "cut"))
    train(replace(settings, out=tmp_path / "cut"))
    assert_same_outcome(tmp_path / "whole", tmp_path / "cut")


@pytest.fixture(scope="module")
def cut_run(tiny_base, toy, tmp_path_factory):
    """A run interrupted in its last epoch."""
    folder = tmp_path_factory.mktemp("cut") / "run"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(CutError):
        cut(patch, 20)
        train(config(tiny_base, toy, folder))
    return folder


@pytest.mark.parametrize("size", [None, 0, 100])
@pytest.mark.parametrize("name", ["trainer_state.json", "optimizer.pt", "scheduler.pt", "rng_state.pth",
                                  "trained.safetensors"])  # fmt: skip
def test_a_damaged_checkpoint_is_passed_over(tiny_base, toy, reference, cut_run, tmp_path, name, size):
    """Whichever of its files is missing or cut, and wherever the run has moved, the state before it serves."""
    shutil.copytree(cut_run, tmp_path / "run")
    damaged = tmp_path / "run" / "checkpoints" / "checkpoint-18"
    assert newest_checkpoint(damaged.parent) == damaged
    if size is None:
        (damaged / name).unlink()
    else:
        os.truncate(damaged / name, size)
    assert newest_checkpoint(damaged.parent).name == "checkpoint-12"
    if size == 100:
        assert train(config(tiny_base, toy, tmp_path / "run")).metrics["resumed"]
        assert_same_outcome(tmp_path / "run", reference)


def test_a_finished_run_is_replaced_only_if_asked(tiny_base, toy, tmp_path):
    settings = config(tiny_base, toy, tmp_path / "run", epochs=1)
    train(settings)
    before = outcome(tmp_path / "run")
    (tmp_path / "run" / "notes.txt").write_text("mine")
    with pytest.raises(InfuseError, match=r"finished run.*--overwrite"):
        train(replace(settings, seed=1))
    with pytest.raises(InfuseError, match="No such file"):
        train(replace(settings, overwrite=True, data=str(tmp_path / "typo.csv")))
    assert same(outcome(tmp_path / "run")[0], before[0])
    train(replace(settings, seed=1, overwrite=True))
    assert not same(outcome(tmp_path / "run")[0], before[0])
    assert (tmp_path / "run" / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("failure", [InfuseError("a text is bad"), OSError(28, "No space left on device")])
@pytest.mark.parametrize("at", ["fit", "write_model"])
def test_a_run_is_replaced_only_by_one_that_succeeds(tiny_base, toy, tmp_path, monkeypatch, failure, at):
    settings = config(tiny_base, toy, tmp_path / "run", epochs=1)
    train(settings)
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}

    def fails(*args, **options):
        raise failure

    with monkeypatch.context() as patch, pytest.raises(type(failure)):
        patch.setattr(run, at, fails)
        train(replace(settings, seed=1, overwrite=True))
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before
    open_run(tmp_path / "run")


@pytest.mark.parametrize("when", ["training", "writing", "replacing"])
def test_a_replacement_that_is_killed_goes_on(tiny_base, toy, reference, tmp_path, monkeypatch, when):
    settings = config(tiny_base, toy, tmp_path / "run")
    train(replace(settings, epochs=1, seed=1))
    old = outcome(tmp_path / "run")
    die = Mock(side_effect=KeyboardInterrupt)
    at = {
        "training": (engine.AdapterTrainer, "_save_checkpoint", die),
        "writing": (run, "_write_curves", die),
        "replacing": (storage, "_place", die),
    }
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(*at[when])
        train(replace(settings, overwrite=True))
    read = store_of(open_run(tmp_path / "run").base.model)["adapter"].info["metrics"]["validation"]
    assert read == (outcome(reference) if when == "replacing" else old)[1]
    if when != "replacing":
        assert same(outcome(tmp_path / "run")[0], old[0])
        with pytest.raises(InfuseError, match=r"other settings \(seed\)"):
            train(replace(settings, seed=1))
    assert train(settings).metrics["resumed"] == (when == "writing")
    assert_same_outcome(tmp_path / "run", reference)
    assert sorted(os.listdir(tmp_path / "run")) == sorted(os.listdir(reference))


def test_a_loss_that_is_no_number_stops_the_run_with_advice(tiny_base, toy, tmp_path, monkeypatch):
    settings = config(tiny_base, toy, tmp_path / "run", epochs=2)
    loss = Head.loss
    with monkeypatch.context() as patch, pytest.raises(InfuseError, match=r"became nan at step \d+.*--learning-rate"):
        patch.setattr(Head, "loss", lambda *args: loss(*args) * float("nan"))
        train(settings)
    assert not (tmp_path / "run" / "adapter").exists()
    train(replace(settings, learning_rate=0.001))


def test_full_fine_tuning_leaves_a_model(tiny_base, toy, tmp_path):
    settings = config(tiny_base, toy, tmp_path / "run", method="full", learning_rate=1e-3, epochs=2)
    result = train(settings)
    own = load_base(str(tmp_path / "run" / "model")).model.state_dict()
    assert any(not torch.equal(own[n], v) for n, v in load_base(str(tiny_base)).model.state_dict().items())
    predictor = open_run(tmp_path / "run")
    held_out = stratified(read(toy), 0.25)[1]
    measured = scores(predictor.base, store_of(predictor.base.model)["adapter"], held_out)
    assert measured == pytest.approx(result.metrics["validation"]) and measured["accuracy"] > 0.7

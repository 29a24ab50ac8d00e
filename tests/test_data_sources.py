"""The hub (without a network), and a task's data brought together."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
from data_helpers import fails, table, write

from infuse.data import Rows, load_splits, read

# The hub, without a network


class Label:
    names = ("card_lost", "pin_lost")


class ListOfLabels:
    feature = Label()


class HubSet:
    """What `read` uses of a `datasets.Dataset`."""

    def __init__(self, features: dict[str, Any], **columns: list[Any]):
        self.features, self.columns, self.column_names = features, columns, list(columns)

    def __getitem__(self, column: str) -> list[Any]:
        return self.columns[column]


@pytest.fixture
def hub(monkeypatch):
    """Put a function in the place of `datasets.load_dataset`; returns the calls it got."""
    datasets = pytest.importorskip("datasets")
    calls = []

    def install(answer):
        def load_dataset(*args, **kwargs):
            calls.append((args, kwargs))
            if isinstance(answer, Exception):
                raise answer
            found = answer.get(kwargs["split"])
            if found is None:
                raise ValueError(f'Unknown split "{kwargs["split"]}". Should be one of {list(answer)}.')
            return found

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        return calls

    return install


def test_banking77_is_read_in_its_parquet_form(hub):
    calls = hub({"train": HubSet({"text": object(), "label": Label()}, text=["x", "y"], label=[1, 0])})
    assert read("banking77") == Rows(("x", "y"), ("pin_lost", "card_lost"))
    assert calls == [(("PolyAI/banking77",), {"revision": "refs/convert/parquet", "split": "train"})]


def test_hub_set_with_configuration_and_split(hub):
    calls = hub({"test": HubSet({"utterance": object(), "intent": object()}, utterance=["x"], intent=[7])})
    assert read("some-one/set.2:en_US", split="test") == Rows(("x",), ("7",))
    assert calls == [(("some-one/set.2",), {"name": "en_US", "split": "test"})]


def test_hub_label_lists_and_secret_labels(hub):
    several = HubSet({"text": object(), "labels": ListOfLabels()}, text=["x", "y"], labels=[[1, 0], []])
    secret = HubSet({"text": object(), "label": Label()}, text=["x"], label=[-1])
    hub({"train": several, "test": secret})
    assert read("a/b").labels == (("pin_lost", "card_lost"), ())
    assert read("a/b", split="test").labels == ("",)


def test_hub_split_that_is_not_there(hub):
    hub({"train": HubSet({}, text=[], label=[])})
    with fails("a/b has no split 'dev'", "['train']"):
        read("a/b", split="dev")


def test_hub_split_under_another_name(hub):
    features = {"text": object(), "label": object()}
    parts = {name: HubSet(features, text=[name], label=["a"]) for name in ("train", "dev")}
    hub(parts)
    assert read("a/b", split="validation").texts == read("a/b", split="dev").texts == ("dev",)
    parts["valid"] = parts["dev"]
    with fails("a/b has several splits", "'validation'", "dev, valid"):
        load_splits("a/b")


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ConnectionError("Couldn't reach 'a/b' on the Hub (OfflineModeIsEnabled)"), "HF_HUB_OFFLINE"),
        (ConnectionError("Couldn't reach 'a/b' on the Hub (LocalEntryNotFoundError)"), "cannot be reached"),
        (FileNotFoundError("Dataset 'a/b' is a gated dataset on the Hub."), "gated"),
        (FileNotFoundError("Dataset 'a/b' doesn't exist on the Hub or cannot be accessed."), "no such data set"),
        (RuntimeError("Dataset scripts are no longer supported, but found b.py"), "loading script"),
        (ValueError("Config name is missing.\nPlease pick one among: ['en', 'de']"), "Please pick one among: ['en'"),
    ],
)
def test_hub_failures(hub, error, reason):
    hub(error)
    with fails("'a/b'", "'train'", reason, "local CSV"):
        read("a/b")


def test_hub_offline(monkeypatch, tmp_path):
    """The real library in a process of its own, as it reads the variable when it is imported."""
    pytest.importorskip("datasets")
    code = "from infuse.data import read\ntry: read('banking77')\nexcept ValueError as e: print(type(e).__name__, e)"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "HF_DATASETS_CACHE": str(tmp_path)}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert run.stdout.startswith("InfuseError") and "PolyAI/banking77" in run.stdout
    assert "HF_HUB_OFFLINE" in run.stdout and "local CSV" in run.stdout


def test_datasets_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with fails("datasets", "local CSV"):
        read("a/b")


# Bringing it together


def many(count: int, start: int = 0) -> list[tuple[str, str]]:
    return [(f"text {i}", "ab"[i % 2]) for i in range(start, start + count)]


def test_load_splits_holds_rows_out(tmp_path):
    path = write(tmp_path / "x.csv", table(many(100)))
    splits, warnings = load_splits(path, validation_fraction=0.2, seed=3)
    assert (len(splits.train), len(splits.validation), splits.test, warnings) == (80, 20, None, [])
    assert splits == load_splits(path, validation_fraction=0.2, seed=3)[0]
    assert splits != load_splits(path, validation_fraction=0.2, seed=4)[0]


def test_load_splits_takes_given_files(tmp_path):
    train = write(tmp_path / "x.csv", table(many(10), "body,queue"))
    other = write(tmp_path / "y.csv", table(many(4, 10), "body,queue"))
    splits, warnings = load_splits(train, validation=other, test=other, text="body", label="queue")
    assert (len(splits.train), warnings) == (10, [])
    assert splits.validation == splits.test == read(other, text="body", label="queue")


def test_load_splits_takes_the_parts_of_a_folder(tmp_path):
    for i, split in enumerate(("train", "validation", "test")):
        write(tmp_path / f"{split}.csv", table(many(10, 10 * i)))
    splits, warnings = load_splits(tmp_path)
    assert (splits.validation.texts[0], len(splits.train), warnings) == ("text 10", 10, [])
    assert splits.test == read(tmp_path, split="test")
    given_test, _ = load_splits(tmp_path, validation=tmp_path / "test.csv")
    assert given_test.validation == splits.test


def test_load_splits_of_a_hub_set(hub):
    features = {"text": object(), "label": Label()}
    texts = [f"text {i}" for i in range(20)]
    data = {
        "train": HubSet(features, text=texts, label=[0, 1] * 10),
        "test": HubSet(features, text=["x", "y"], label=[-1, -1]),
    }
    hub(data)
    splits, warnings = load_splits("banking77")
    assert (len(splits.train), len(splits.validation), splits.test) == (18, 2, None)
    assert len(warnings) == 1 and "not public" in warnings[0]
    data["test"] = HubSet(features, text=["x", "y"], label=[0, 1])
    data["validation"] = HubSet(features, text=["v"], label=[0])
    splits, warnings = load_splits("a/b")
    assert (splits.validation, splits.test, warnings) == (
        Rows(("v",), ("card_lost",)),
        Rows(("x", "y"), tuple(Label.names)),
        [],
    )


def test_load_splits_of_several_labels(tmp_path):
    path = write(
        tmp_path / "x.csv", "text,label\n" + "".join(f"text {i},{'a|b' if i % 3 else 'b'}\n" for i in range(30))
    )
    splits, _ = load_splits(path, multi=True)
    assert splits.train.multi and splits.validation.multi and len(splits.validation) == 3


def test_load_splits_reports_what_is_wrong(tmp_path):
    rows = many(40)
    rows[6] = ("", "a")
    with fails("1 text in train is empty (row 7)"):
        load_splits(write(tmp_path / "x.csv", table(rows)))
    with fails("every label has only one row"):
        load_splits(write(tmp_path / "y.csv", table(many(2))))
    with fails("train has no rows"):
        load_splits(write(tmp_path / "z.csv", "text,label\n"))
    write(tmp_path / "validation.csv", table(many(2)))
    with fails("no train.csv"):
        load_splits(tmp_path)
    _, warnings = load_splits(write(tmp_path / "w.csv", table(many(20))), validation=tmp_path / "validation.csv")
    assert "2 texts of validation are also in train" in warnings[0]

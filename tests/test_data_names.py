"""Names: which files are which split, and labels that look alike."""

from __future__ import annotations

import unicodedata

import pytest
from data_helpers import fails, parquet, table, write

from infuse import InfuseError
from infuse.bases import load_base
from infuse.data import Rows, Splits, check, load_splits, read
from infuse.data.folder import SPLITS
from infuse.training.batches import encode

TRAIN = table([(f"text {i}", "ab"[i % 2]) for i in range(20)])
HELD = table([(f"held out {i}", "ab"[i % 2]) for i in range(6)])
OTHERS = [name for split, names in SPLITS.items() if split != "train" for name in names]


def origin(rows):
    return "held" if all(text.startswith("held out") for text in rows.texts) else "train"


@pytest.mark.parametrize("name", [case(name) for name in OTHERS for case in (str.lower, str.title, str.upper)])
def test_usual_names_of_splits(tmp_path, name):
    write(tmp_path / "train.csv", TRAIN)
    write(tmp_path / f"{name}.csv", HELD)
    splits, warnings = load_splits(tmp_path)
    held = splits.test if name.lower() in SPLITS["test"] else splits.validation
    assert held is not None and origin(held) == "held" and len(held) == 6 and not warnings
    assert read(tmp_path, split=name.lower()) == held


@pytest.mark.parametrize("name", ["train", "Training", "TRAIN"])
@pytest.mark.parametrize("suffix", [".csv", ".JSONL", ".json", ".tsv", ".parquet"])
def test_usual_names_of_train_in_every_format(tmp_path, name, suffix):
    path, rows = tmp_path / f"{name}{suffix}", {"text": ["x", "y"], "label": ["a", "b"]}
    if suffix == ".parquet":
        parquet(path, rows)
    else:
        mark = "\t" if suffix == ".tsv" else ","
        records = '{"text": "x", "label": "a"}\n{"text": "y", "label": "b"}'
        write(path, f"text{mark}label\nx{mark}a\ny{mark}b\n" if "sv" in suffix else records)
    assert read(tmp_path) == Rows(("x", "y"), ("a", "b"))


@pytest.mark.parametrize("place", ["", "data"])
@pytest.mark.parametrize("count", [1, 3, 11])
def test_shards_are_one_split(tmp_path, place, count):
    folder = tmp_path / place
    folder.mkdir(exist_ok=True)
    for i in range(count):
        path = folder / f"train-{i:05}-of-{count:05}.parquet"
        parquet(path, {"text": [f"text {i}"], "label": ["a"]})
    write(folder / "validation-00000-of-00001.jsonl", '{"text": "held out", "label": "a"}')
    assert read(tmp_path).texts == tuple(f"text {i}" for i in range(count))
    assert read(tmp_path, split="dev").texts == ("held out",)
    (folder / f"train-00000-of-{count:05}.parquet").rename(folder / f"train-{count:05}-of-{count:05}.parquet")
    with fails("train-…-of-", "copy all"):
        read(tmp_path)


@pytest.mark.parametrize("names", [["train_1", "train_2"], ["train.0", "train.1"], ["train/a", "train/b"]])
def test_numbered_parts_and_folders_are_one_split(tmp_path, names):
    for i, name in enumerate(names):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write(tmp_path / f"{name}.csv", f"text,label\ntext {i},a\n")
    assert read(tmp_path).texts == ("text 0", "text 1")


@pytest.mark.parametrize(
    "names",
    [["dev.csv", "validation.csv"], ["val.csv", "VALID.tsv"], ["eval.json", "dev.jsonl"], ["dev.csv", "dev/a.csv"],
     ["dev_1.csv", "dev_3.csv"], ["my_dev.csv", "val_set.csv"], ["dev.csv", "data/dev.csv"]],
)  # fmt: skip
def test_two_files_for_one_split_are_refused(tmp_path, names):
    write(tmp_path / "train.csv", TRAIN)
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write(tmp_path / name, HELD)
    with fails("several files", "validation", "rename"):
        load_splits(tmp_path)
    splits, _ = load_splits(tmp_path, validation=write(tmp_path / "given.csv", HELD))
    assert origin(splits.validation) == "held"


def test_files_that_are_not_used_are_told(tmp_path):
    write(tmp_path / "train.csv", TRAIN)
    write(tmp_path / "train_10shot.csv", TRAIN)
    write(tmp_path / "extra.jsonl", "{}")
    write(tmp_path / "dev.txt", HELD)
    for quiet in ("README.md", "dataset_info.json", ".hidden.csv", "._train.csv", "notes.txt"):
        write(tmp_path / quiet, "{}")
    splits, (warning,) = load_splits(tmp_path)
    assert "extra.jsonl, train_10shot.csv, dev.txt of" in warning and "not used" in warning
    assert len(splits.train) + len(splits.validation) == 20
    write(tmp_path / "my-dev.csv", HELD)
    splits, (taken, unused) = load_splits(tmp_path)
    assert origin(splits.validation) == "held" and "my-dev.csv" in taken and "validation" in taken
    assert "my-dev.csv" not in unused
    splits, _ = load_splits(tmp_path, validation=tmp_path / "train_10shot.csv", test=tmp_path / "my-dev.csv")
    assert "train_10shot.csv" not in str(_) and "extra.jsonl" in str(_)


def test_one_file_of_another_name_is_the_training_data(tmp_path):
    write(tmp_path / "tickets.csv", TRAIN)
    splits, (warning,) = load_splits(tmp_path)
    assert len(splits.train) + len(splits.validation) == 20 and "tickets.csv" in warning and "train split" in warning


# Labels

ALIKE = {
    "case": ("Lost", "lost"),
    "sharp s": ("Straße", "STRASSE"),
    "accents": ("caf\xe9", "cafe\u0301"),
    "several spaces": ("card  lost", "card lost"),
    "no-break space": ("card\xa0lost", "card lost"),
    "thin space": ("card\u2009lost", "card lost"),
    "tab": ("card\tlost", "card lost"),
    "zero-width space": ("card\u200blost", "cardlost"),
    "byte order mark": ("\ufefflost", "lost"),
    "soft hyphen": ("lo\xadst", "lost"),
    "direction": ("lost\u200e", "lost"),
    "variation": ("lost\ufe0f", "lost"),
    "full width": ("ｌost", "lost"),
    "filler": ("lost\u3164", "lost"),
    "control": ("lo\x08st", "lost"),
    "hangul": (unicodedata.normalize("NFD", "분실"), "분실"),
}


@pytest.mark.parametrize("kind", ALIKE)
def test_labels_that_look_alike_are_told(kind):
    one, other = ALIKE[kind]
    assert one != other
    texts = tuple(f"text {i}" for i in range(6))
    train = Rows(texts, (one, other, "fee") * 2)
    fine = Rows(("held",), ("fee",))
    (warning,) = check(Splits(train, fine))
    shown = warning.split("(")[1].split(")")[0].split(" and ")
    assert len(shown) == 2 and {eval(each) for each in shown} == {one, other}
    assert len({unicodedata.normalize("NFKC", each) for each in shown}) == 2 and "write them alike" in warning
    assert all(each.isascii() for each in shown) or kind in ("case", "sharp s")
    several = Rows(texts, ((one,), (other,), ("fee",)) * 2)
    assert check(Splits(several, Rows(("held",), (("fee",),)))) == [warning]
    for splits in (Splits(Rows(texts, (one, "fee") * 3), Rows(("held",), (other,))),
                   Splits(Rows(texts, (one, "fee") * 3), fine, Rows(("held",), (other,)))):  # fmt: skip
        with fails("not occur in train", "spell", *shown):
            check(splits)


def test_labels_that_differ_are_not_told():
    names = ("a", "b", "ab", "a b", "a-b", "a_b", "é", "e", "1", "10", "日本", "日", "👍", "👎")
    rows = Rows(tuple(f"text {i}" for i in range(2 * len(names))), names * 2)
    assert check(Splits(rows, Rows(("held",), ("a",)))) == []


def test_labels_that_an_adapter_does_not_know_but_for_their_spelling(tiny_base):
    base = load_base(str(tiny_base))
    with pytest.raises(InfuseError, match=r"labels LOST do not occur.*; spell 'LOST' and 'lost' alike, add rows"):
        encode(base, Rows(("a", "b"), ("LOST", "fee")), ["fee", "lost"], 16)

"""Rows, and reading them from files and folders."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pytest
from data_helpers import fails, parquet, table, write
from pyarrow import parquet as pq

from infuse.data import Rows, read

UNICODE = 'He said "naïve, 日本"\nand left 😀'
PAIRS = [("NA", "a"), ("null", "b"), (UNICODE, "a")]


# Rows


def test_rows():
    rows = Rows(("x", "y", "z"), ("b", "a", "b"))
    assert (len(rows), rows.multi, rows.label_set) == (3, False, ["a", "b"])
    assert rows.counts == {"b": 2, "a": 1}
    assert rows.take([2, 0]) == Rows(("z", "x"), ("b", "b"))


def test_rows_with_several_labels():
    rows = Rows(("x", "y"), (("b", "a"), ()))
    assert (rows.multi, rows.label_set) == (True, ["a", "b"])
    assert rows.take([1]) == Rows(("y",), ((),))


def test_rows_without_labels():
    rows = Rows(("x", "y"))
    assert (rows.multi, rows.label_set, rows.take([1])) == (False, [], Rows(("y",)))


def test_rows_must_fit():
    with fails("2 texts but 1 labels"):
        Rows(("x", "y"), ("a",))
    with fails("row 1 has a single label and row 2 has a list"):
        Rows(("x", "y"), ("a", ("b",)))  # type: ignore[arg-type]  # the mistake


# Files


@pytest.mark.parametrize("start", ["", "\ufeff"], ids=["plain", "BOM"])
@pytest.mark.parametrize("end", ["\n", "\r\n"], ids=["LF", "CRLF"])
def test_csv_keeps_every_text(tmp_path, start, end):
    content = start + table(PAIRS).replace("\n", end)
    path = write(tmp_path / "x.csv", content)
    assert read(path) == read(str(path)) == Rows(tuple(t.replace("\n", end) for t, _ in PAIRS), ("a", "b", "a"))


def test_csv_numbers_stay_as_they_are_written(tmp_path):
    assert read(write(tmp_path / "x.csv", "text,label\n1.50,007\n")) == Rows(("1.50",), ("007",))


def test_csv_skips_blank_lines_and_strips_headers_and_labels(tmp_path):
    assert read(write(tmp_path / "x.csv", "text, label\n\nhello , a\n\n")) == Rows(("hello ",), ("a",))


@pytest.mark.parametrize(("name", "mark"), [("x.csv", ";"), ("x.csv", "\t"), ("x.tsv", "\t"), ("X.CSV", ",")])
def test_delimiters(tmp_path, name, mark):
    assert read(write(tmp_path / name, f"text{mark}label\nhello{mark}a\n")) == Rows(("hello",), ("a",))


def test_json_lines(tmp_path):
    lines = [json.dumps({"text": text, "label": label}, ensure_ascii=False) for text, label in PAIRS]
    lines.append('{"text": "break\u2028inside", "label": 3.0}')
    rows = read(write(tmp_path / "x.jsonl", "\r\n".join(lines) + "\n\n"))
    assert rows.texts == (*(text for text, _ in PAIRS), "break\u2028inside")
    assert rows.labels == ("a", "b", "a", "3")


def test_json_list_and_json_named_lines(tmp_path):
    records = [{"text": text, "label": label} for text, label in PAIRS]
    expected = Rows(tuple(text for text, _ in PAIRS), ("a", "b", "a"))
    assert read(write(tmp_path / "x.json", json.dumps(records, indent=2))) == expected
    assert read(write(tmp_path / "y.json", "\n".join(map(json.dumps, records)))) == expected


def test_parquet(tmp_path):
    path = parquet(tmp_path / "x.parquet", {"text": ["NA", "x"], "label": ["a", "b"], "other": [1, 2]})
    assert read(path) == Rows(("NA", "x"), ("a", "b"))


@pytest.mark.parametrize(
    ("cells", "labels"),
    [
        ([1, 2], ("1", "2")),
        ([1.0, 2.0], ("1", "2")),
        ([1.5, 2.0], ("1.5", "2")),
        ([3.0, None], ("3", "")),
        ([float("nan"), 4.0], ("", "4")),
        ([True, False], ("True", "False")),
        ([["a", "b", "a"], []], (("a", "b"), ())),
        ([["a"], None], (("a",), ("",))),
        ([[1.0, 2.0], [3.0]], (("1", "2"), ("3",))),
    ],
)
def test_label_cells(tmp_path, cells, labels):
    lines = [json.dumps({"text": "x", "label": cell}) for cell in cells]
    assert read(write(tmp_path / "x.jsonl", "\n".join(lines))).labels == labels
    assert read(parquet(tmp_path / "x.parquet", {"text": ["x", "x"], "label": cells})).labels == labels


def test_labels_are_split_only_when_asked(tmp_path):
    path = write(tmp_path / "x.csv", "text,label\nx,a|b\ny,\nz, b | a |b\n")
    assert read(path).labels == ("a|b", "", "b | a |b")
    assert read(path, multi=True).labels == (("a", "b"), (), ("b", "a"))


def test_missing_texts_become_empty(tmp_path):
    path = parquet(tmp_path / "x.parquet", {"text": ["x", None], "label": ["a", "b"]})
    assert read(path).texts == ("x", "")
    assert read(write(tmp_path / "x.jsonl", '{"text": NaN, "label": "a"}\n{"label": "b"}')).texts == ("", "")


def test_columns_can_be_named(tmp_path):
    path = write(tmp_path / "x.csv", "text,label,body,queue\nno,no,hello,a\n")
    assert read(path, text="body", label="queue") == Rows(("hello",), ("a",))


@pytest.mark.parametrize("text", ["sentence", "utterance", "query", "question"])
@pytest.mark.parametrize("label", ["intent", "category", "labels", "class", "label_text"])
def test_usual_column_names_are_found(tmp_path, text, label):
    assert read(write(tmp_path / "x.csv", f"id,{label},{text}\n1,a,hello\n")) == Rows(("hello",), ("a",))


def test_csv_texts_may_be_long(tmp_path):
    long = 200_000 * "a"
    assert read(write(tmp_path / "x.csv", table([(long, "a")]))).texts == (long,)


def test_texts_alone(tmp_path):
    path = write(tmp_path / "x.csv", "text\nhello\n")
    assert read(path, labelled=False) == Rows(("hello",))


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_folder(tmp_path, suffix):
    for split in ("train", "validation"):
        path, columns = tmp_path / f"{split}{suffix}", {"text": [split], "label": ["a"]}
        if suffix == ".parquet":
            parquet(path, columns)
        else:
            write(path, table([(split, "a")]) if suffix == ".csv" else json.dumps({"text": split, "label": "a"}))
    assert read(tmp_path).texts == ("train",)
    assert read(str(tmp_path), split="validation").texts == ("validation",)
    with fails("no test.csv", f"train{suffix}"):
        read(tmp_path, split="test")


BROKEN = {
    "x.csv": {
        "text,label\nx,a\ny,b,c\n": ["line 3", "3 fields", "header has 2", "double quotes"],
        "text,label\nx,a\ny\n": ["line 3", "1 fields"],
        'text,label\n"never closed,a\n': ["line 2", "not valid CSV"],
        "text,intention\nx,a\n": ["no column 'label'", "text, intention", "'label'"],
        "body,label\nx,a\n": ["no column 'text'", "body, label"],
        "text,text,label\nx,y,a\n": ["2 columns 'text'"],
        "": ["empty"],
        "\ufeff\n": ["empty"],
        "text,label\nx,a\ncaf\xe9,b\n".encode("latin-1"): ["not UTF-8", "line 3"],
        "text,label\nx,a\n".encode("utf-16"): ["not UTF-8", "line 1"],
    },
    "x.jsonl": {
        '{"text": "x", "label": "a"}\n{"text": "y", "lab': ["line 2", "not valid JSON"],
        '["x", "a"]': ["not a list of records"],
        '{"text": "x", "label": {"a": 1}}': ["row 1", "'label'", "dict"],
        '{"text": ["x"], "label": "a"}': ["row 1", "'text'", "list"],
        '{"text": "x", "label": ["a"]}\n{"text": "y", "label": "b"}': ["row 2 has a single label"],
        "{}": ["empty"],
        f'{{"text": {5000 * "9"}, "label": "a"}}': ["line 1", "can't be read"],
        100_000 * "[": ["line 1", "can't be read"],
        b"\xff\xfe": ["not UTF-8"],
    },
    "x.json": {
        '[{"text": "x",\n "label"': ["line 2", "not valid JSON"],
        '{"text": ["x"]}': ["not a list of records"],
        "[]": ["empty"],
        100_000 * "[": ["can't be read"],
    },
    "x.parquet": {"": ["not a whole Parquet file"], "text,label\nx,a\n": ["not a whole Parquet file"]},
    "x.xlsx": {"PK": [".csv, .tsv"]},
}


@pytest.mark.parametrize(
    ("name", "content", "parts"),
    [(name, content, parts) for name, cases in BROKEN.items() for content, parts in cases.items()],
)
def test_broken_files(tmp_path, name, content, parts):
    with fails(name, *parts) if "single label" not in parts[0] else fails(*parts):
        read(write(tmp_path / name, content))


@pytest.mark.parametrize("cut", [lambda b: b[: len(b) // 2], lambda b: b[:900] + bytes(1500) + b[2400:]])
def test_damaged_parquet(tmp_path, cut):
    columns = {"text": [f"text {i * 7919 % 1000}" for i in range(3000)], "label": ["a", "b"] * 1500}
    path = parquet(tmp_path / "x.parquet", columns)
    path.write_bytes(cut(path.read_bytes()))
    with fails("not a whole Parquet file", "x.parquet"):
        read(path)


def test_parquet_columns_that_can_not_be_read(tmp_path):
    torn = pa.array([b"\xff\xfe", b"a"]).view(pa.string())
    pq.write_table(pa.table({"text": torn, "label": ["a", "b"]}), tmp_path / "x.parquet")
    with fails("Column 'text'", "utf-8", "x.parquet"):
        read(tmp_path / "x.parquet")
    twice = pa.table([pa.array(["x"])] * 3, names=["text", "text", "label"])
    pq.write_table(twice, tmp_path / "twice.parquet")
    with fails("2 columns 'text'", "twice.parquet"):
        read(tmp_path / "twice.parquet")


@pytest.mark.parametrize("source", ["missing.csv", "a/missing.parquet", Path("missing.jsonl"), "~nobody-here/a.csv"])
def test_missing_file(source):
    with fails(Path(source).name, "No such file"):
        read(source)


@pytest.mark.parametrize("source", ["nothing", Path("no/folder"), "a/b/c"])
def test_unknown_source(source):
    with fails("no file or folder", ".csv", "owner/name"):
        read(source)


def test_importing_is_light():
    """The heavy readers wait until they are needed."""
    code = (
        "import sys, types; package = types.ModuleType('infuse'); import importlib.util as u\n"
        "package.__path__ = list(u.find_spec('infuse').submodule_search_locations); sys.modules['infuse'] = package\n"
        "import infuse.data; print({'pandas', 'datasets', 'pyarrow', 'sklearn', 'torch', 'numpy'} & set(sys.modules))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "set()"

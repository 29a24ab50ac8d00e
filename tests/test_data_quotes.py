"""As many rows as a delimited file has, or an error: quotes that swallow rows, and those that are right."""

from __future__ import annotations

import csv
from pathlib import Path

import pandas as pd
import pytest
from data_helpers import fails, write
from hypothesis import given
from hypothesis import strategies as st

from infuse import InfuseError
from infuse.data import Rows, read
from infuse.data.delimited import read_delimited

MANY = "".join(f"text number {i},{'lost' if i % 2 else 'fee'}\n" for i in range(40))
SWALLOWED = {
    "three columns": ("x.tsv", 'id\ttext\tlabel\n1\t"mine\ta\n2\ttwo\tb\n3\ta 27"\tb\n4\tfour\ta\n', "lines 2 to 4"),
    "text first": ("x.tsv", 'text\tlabel\n"mine\ta\nwhat\tb\nit is gone"\ta\nlast\tb\n', "lines 2 to 4"),
    "text last": ("x.csv", 'label,text\na,"gone\nb,what\nb,a fee of 5"\na,last\n', "lines 2 to 4"),
    "texts alone": ("x.csv", 'text\n"what is it\nwhere is it?\nI lost it"\nhow much\n', "lines 2 to 4"),
    "texts alone with commas": ("x.csv", 'text\n"what, is it\nwhere is it?\nI lost it"\nhow much\n', "lines 2 to 4"),
    "two rows": ("x.csv", 'text,label\n"one,a\ntwo",b\nthree,a\n', "lines 2 to 3"),
    "up to the end": ("x.csv", 'text,label\none,a\n"two,b\nthree,a\nfour",b', "lines 3 to 5"),
    "the whole file": ("x.csv", 'label,text\nb,"one\na,two\nb,three"\n', "lines 2 to 4"),
    "twice": ("x.csv", 'text,label\n"one,a\ntwo",b\nthree,a\n"four,b\nfive",a\n', "lines 5 to 6"),
    "semicolons": ("x.csv", 'text;label\n"one;a\ntwo;b\nthree";a\n', "lines 2 to 4"),
    "spaces after commas": ("x.csv", 'text, label\n"one, a\ntwo, b\nthree", a\nfour, b\n', "lines 2 to 4"),
    "empty labels": ("x.csv", 'text,label\n"one,\ntwo",\nthree,\n', "lines 2 to 3"),
    "carriage returns": ("x.csv", 'text,label\r"one,a\rtwo",b\rthree,a\r', "lines 2 to 3"),
    "both ends": ("x.csv", 'text,label\r\n"one,a\r\ntwo",b\r\n', "lines 2 to 3"),
    "in many rows": ("x.csv", f'text,label\n{MANY}"mine,lost\nit, or, there\nis 27"" ""wide",fee\n{MANY}', "42"),
    "many rows": ("x.csv", f'text,label\n{MANY}"mine,lost\n{MANY}a 27",fee\n{MANY}', "lines 42 to 83"),
    "other quoted rows": ("x.csv", 'text,label\n"one, or two",a\n"two,a\nthree",b\n"four, five",b\n', "lines 3 to 4"),
}  # fmt: skip


@pytest.mark.parametrize("case", SWALLOWED)
def test_rows_are_not_swallowed_by_quotes(tmp_path, case):
    name, content, where = SWALLOWED[case]
    path = write(tmp_path / name, content)
    with fails(where, name, "may be several rows", '""'):
        read(path, labelled="label" in content.split("\n")[0])


LETTERS = [
    ("Hello,\nmy card is gone", "lost"), ("Hi, team\nthe fee of 10,000 is wrong,\nis it?", "fee"), ("plain", "lost"),
    ('He said "no", twice\n\n"Never," I said', "fee"), ("a\nb\nc", "lost"), ("\n", "fee"), ("x,y\nthanks", "fee"),
    ("see 1,000\nplease", "lost"), ("27\" wide\nand 30\" high", "fee"), ("a\u2028b\x0bc\x85d", "lost"),
    ("é,\nü", "fee"),
]  # fmt: skip


@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC])
@pytest.mark.parametrize("name, sep", [("x.csv", ","), ("x.csv", ";"), ("x.tsv", "\t"), ("x.csv", "\t")])
@pytest.mark.parametrize("order", [["text", "label"], ["label", "text"], ["id", "text", "label"]])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_what_pandas_writes_is_read_back(tmp_path, quoting, name, sep, order, end):
    frame = pd.DataFrame(LETTERS, columns=["text", "label"]).assign(id=range(len(LETTERS)))[order]
    frame.to_csv(tmp_path / name, sep=sep, index=False, quoting=quoting, lineterminator=end)
    assert read(tmp_path / name) == Rows(*zip(*LETTERS, strict=True))


def test_texts_of_several_lines_alone(tmp_path):
    """Where another text shows that the writer knows of quotes, or all are quoted, they are read."""
    texts = [text for text, _ in LETTERS if text.strip()]
    pd.DataFrame({"text": texts}).to_csv(tmp_path / "x.csv", index=False)
    assert read(tmp_path / "x.csv", labelled=False).texts == tuple(texts)
    plain = ["one\ntwo", "three"]
    pd.DataFrame({"text": plain}).to_csv(tmp_path / "y.csv", index=False, quoting=csv.QUOTE_ALL)
    assert read(tmp_path / "y.csv", labelled=False).texts == tuple(plain)


CELLS = st.text(st.sampled_from('ab ,"\n\t;.'), min_size=1, max_size=12)


@given(st.lists(st.tuples(CELLS, st.sampled_from(["lost", "fee"])), min_size=1, max_size=12))
def test_every_field_in_quotes_is_never_doubted(pairs):
    frame = pd.DataFrame(pairs, columns=["text", "label"])
    content = frame.to_csv(index=False, quoting=csv.QUOTE_ALL)
    assert read_delimited(content, Path("x.csv"))[1] == [list(pair) for pair in pairs]


@given(st.lists(st.tuples(st.text(st.sampled_from('ab "'), min_size=1, max_size=6).filter(str.strip),
                          st.sampled_from(["lost", "fee"])), min_size=1, max_size=8))  # fmt: skip
def test_stray_quotes_never_lose_a_row(pairs):
    """Lines as a program writes them that has never heard of quotes."""
    content = "text\tlabel\n" + "".join(f"{text}\t{label}\n" for text, label in pairs)
    try:
        rows = read_delimited(content, Path("x.tsv"))[1]
    except InfuseError:
        return
    assert len(rows) == len(pairs)


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        ('text,label\n"one,a\ntwo,b\n', ["lines 2 to 3", "never closed"]),
        ('text,label\none,a\n"tw"o,b\n', ["line 3", "not valid CSV"]),
        ('text,label\n"one,a\nt"wo,b\n', ["lines 2 to 3", "not valid CSV"]),
        ("text,label\none,a\nthr\ree,b\n", ["line 3", "carriage return"]),
        ('text,"label\none,a\ntwo",b\n', ["header", "lines 1 to 3"]),
        ("text,label\none,a\ntw\0o,b\n", ["line 3", "zero byte"]),
        ("text,label\none,a\n".encode("utf-16-le"), ["line 1", "zero byte"]),
    ],
)
def test_broken_quotes_and_bytes(tmp_path, content, parts):
    with fails("x.csv", *parts):
        read(write(tmp_path / "x.csv", content))


@pytest.mark.parametrize("name", ["x.csv", "x.jsonl"])
def test_line_ends(tmp_path, name):
    """Of old Macs, and the mark that ends files of DOS."""
    records = ['{"text": "one", "label": "a"}', '{"text": "two", "label": "b"}']
    lines = ["text,label", "one,a", "two,b"] if name == "x.csv" else records
    for end, last in (("\r", ""), ("\r\n", "\x1a"), ("\n", "\n\n"), ("\r", "\r\r")):
        path = write(tmp_path / name, end.join(lines) + end + last)
        assert read(path) == Rows(("one", "two"), ("a", "b")), (end, last)

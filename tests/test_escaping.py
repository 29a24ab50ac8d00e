"""Texts of anyone have no effects: on a terminal, in a spreadsheet, in Markdown, on a page. JSON holds them exactly."""

import csv
import html
import io
import json
import re
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from infuse import console
from infuse.cli import main
from infuse.errors import printable
from infuse.escaping import cell, markdown
from infuse.heads import Answer, Ranked
from infuse.report import Column, Point, Report, Scatter, Table
from infuse.report.html import as_html
from infuse.report.text import as_csv, as_json, as_markdown
from infuse.training.folders import write_csv

FORMULAS = ["=1+1", "+1+1", "-1+1", "@SUM(A1)", "\t=1", "\r=1", "\n=1", "=cmd|' /C calc'!A0", "－1+1", "＝1", "-", "+a",
            "-1_0", "--1", "-1 ", "-²"]  # fmt: skip
PLAIN = ["", "a", "1", "-1", "-1.5", "+3", "-1e-3", ".5", "-.5", "a=1", "'=1", "a-b", " =1", "日本", "-1E+5", 3, -1.5,
         None, True, -7]  # fmt: skip
EFFECTS = ["\x1b[2J", "\x1b]0;title\x07", "a\rb", "a\nb", "a\tb", "\0", "\x7f", "\x9b31m", "\u202etxt", "\u2066x\u2069",
           "\u200f", "\u200bx", "\ufeffx", "\u2028", "\u2029", "\x85", "so\xadft", "\ud800"]  # fmt: skip
KEPT = ["a b", "é", "日本語", "👩\u200d🚀", "می\u200cخواهم", "e\u0301", "🏳️\u200d🌈", "[red]x[/red]", ":smile:", "\xa0"]
MARKS = ["<script>alert(1)</script>", "a|b", "`x`", "```", "[a](javascript:b)", "![a](b)", "*a*", "_a_", "~~a~~", "$a$",
         "&lt;b&gt;", "\\", "# a", "a\n# b", "a\n\n<b>", "- a", "+ a", "a\n---", "<!-- a -->", "--> a"]  # fmt: skip


@pytest.mark.parametrize("text", FORMULAS)
def test_formulas_are_texts_in_spreadsheets(text):
    assert cell(text) == f"'{text}"


@pytest.mark.parametrize("value", PLAIN)
def test_numbers_and_other_texts_stay(value):
    assert cell(value) == value and type(cell(value)) is type(value)


@pytest.mark.parametrize("text", EFFECTS)
def test_effects_are_escapes(text):
    shown = printable(text)
    assert shown != text and all(unicodedata.category(c) not in ("Cc", "Cs", "Zl", "Zp") for c in shown)
    assert shown.encode() and "\\" in shown


@pytest.mark.parametrize("text", KEPT)
def test_what_scripts_and_emoji_need_stays(text):
    assert printable(text) == text


@given(st.text())
def test_markdown_holds_no_mark_that_counts(text):
    shown = markdown(text)
    assert not re.search(r"(?<!\\)(?:\\\\)*[|<>*_`\[\]~$&]", shown) and len(shown.splitlines()) <= 1
    assert shown[:1] not in tuple("#+-=") or not shown


@pytest.mark.parametrize("text", [*EFFECTS[:-1], *KEPT, *FORMULAS])
def test_predictions(text, capsys):
    """A text and a label: shown without effects, for people without formulas, for programs exactly."""
    texts, found = [text], [Answer(text, None, 0.9, (Ranked(text, 0.9), Ranked("b", 0.1)))]
    console.show_predictions(texts, found, "json")
    told = [json.loads(line) for line in capsys.readouterr().out.rstrip("\n").split("\n")]
    assert told[0]["text"] == text and told[0]["predictions"][0]["label"] == text
    console.show_predictions(texts, found, "csv")
    rows = list(csv.reader(io.StringIO(capsys.readouterr().out, newline="")))
    assert rows[1][:3] == [cell(text), cell(text), "0.900000"] and rows[1][-1] == cell(text)
    console.show_predictions(texts, found, "table")
    shown = capsys.readouterr().out
    assert all(c == "\n" or unicodedata.category(c) not in ("Cc", "Cs", "Zl", "Zp") for c in shown), repr(shown)
    assert text in KEPT or text in FORMULAS or text not in shown


@pytest.mark.parametrize("text", EFFECTS)
def test_messages(text, capsys):
    console.say(f"warning: {text} is odd")
    console.out.tell(f"run folder: {text}")
    console.out.print(f"several\nlines: {text}")
    told = capsys.readouterr()
    assert told.err.count("\n") == 1 and text not in told.err and (text not in told.out or text == "a\nb")
    assert "\x1b" not in told.err + told.out and "\u202e" not in told.out and told.out.count("\n") >= 3


def test_arguments_with_effects(capsys):
    for arguments in (["\x1b[2Jx"], ["predict", "a\x1b[2Jb", "x"], ["train", "--data", "a\n\x1b[31mb.csv"],
                      ["train", "--\x1b[2J"], ["sites", "a\u202eb"], ["train", "--epochs", "\x1b[2J"]):  # fmt: skip
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        told = capsys.readouterr().err
        assert ended.value.code == 2 and told.count("\n") == 1 and "\x1b" not in told and "\u202e" not in told, told


def report(name):
    return Report(
        name, name, [Table(name, [Column("label"), Column("n")], [[name, -1.5], ["b", 2]], name)],
        [Scatter(name, "x", "y", [Point(name, 1, 2), Point("b", 2, 3)])], [name], [f"infuse {name}"], [name],
    )  # fmt: skip


@pytest.mark.parametrize("name", [*MARKS, *FORMULAS[:5]])
def test_reports(name):
    whole = report(name)
    page = as_html(whole)
    assert "<script>alert" not in page and "<!-- a" not in page.split("<svg")[0]
    assert html.escape(name) in page
    shown = as_markdown(whole, ["picture.png"])
    outside, fenced = re.fullmatch(r"(?s)(.*?)## Commands\n\n(.*)", shown).groups()
    assert not re.search(r"(?m)(?<!\\)<|^\s*[-=]{3,}$|^# b", outside)
    fence = re.match("`+", fenced)[0]
    assert fenced == f"{fence}\ninfuse {name}\n{fence}\n" and fence not in name
    rows = list(csv.reader(io.StringIO(as_csv(whole.tables[0]))))
    assert rows[1] == [cell(name), "-1.5"]
    assert json.loads(as_json(whole))["tables"][0]["rows"][0] == [name, -1.5]


def test_tables_of_a_run(tmp_path):
    rows = [{"label": "=1+1", "f1": -0.5, "rows": 3}, {"label": "-1", "f1": 1e-9, "rows": 4}]
    write_csv(tmp_path / "x.csv", rows)
    assert list(csv.reader((tmp_path / "x.csv").open())) == [
        ["label", "f1", "rows"], ["'=1+1", "-0.5", "3"], ["-1", "1e-09", "4"]
    ]  # fmt: skip
    write_csv(tmp_path / "x.csv", [{"": "a", "=member": 0.5}])
    assert (tmp_path / "x.csv").read_text() == ",'=member\na,0.5\n"

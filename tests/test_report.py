"""Reports: every form holds what was put in, and the page works in a real browser, without a network."""

import csv
import io
import json
import os
import re
from xml.etree import ElementTree

import numpy as np
import pytest
from matplotlib import image

from infuse.report import Column, Lines, Measured, Point, Report, Scatter, Series, Table, write
from infuse.report.figures import COLOURS, spread, svg
from infuse.report.text import as_csv, as_markdown

RESULTS = Table(
    "Results",
    [
        Column("method"), Column("accuracy %", ".1f", "mean & spread"), Column("size", ",d"), Column("mixes"),
        Column("ms", ".2f"),
    ],
    [
        ["plain", Measured(91.25), 1_234_567, True, 3.14159],
        ["<b>odd|name</b>", Measured(93.5, 0.25, "*"), 20, False, None],
        ["ünïcode", Measured(9.75, 0.5), 300, True, 10.0],
    ],
    'A caption with <tags> & "quotes".',
)  # fmt: skip
PAIRS = Table("Pairs of labels", [Column("label"), Column("texts")], [["a", ("one <i>", "two")]])
REPORT = Report(
    "A <report>",
    "of & for people",
    [RESULTS, PAIRS],
    [
        Scatter("Size", "size", "accuracy", [Point("p", 10, 1, 1, 0.1), Point("q", 1e6, 2)], True, {"level": 1.5}),
        Scatter("Nothing yet", "x", "y", []),
        Lines("Curves", "epoch", "accuracy", [Series("p", [0, 1, 2], [1, 2, 3]), Series("none", [], [])]),
    ],
    ["A note with <tags>."],
    ["infuse compare --data 'my file.csv' && echo <done>"],
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    assert write(REPORT, folder) == folder / "report.html"
    return folder


# Without a browser


def test_a_report_is_these_files(folder):
    assert sorted(os.listdir(folder)) == [
        "curves.png", "nothing-yet.png", "pairs-of-labels.csv", "report.csv", "report.html", "report.json", "report.md",
        "size.png",
    ]  # fmt: skip
    for name in ("size", "curves"):
        picture = image.imread(folder / f"{name}.png")
        assert min(picture.shape[:2]) > 300 and picture[..., :3].std() > 0.02


def test_csv_has_raw_numbers_and_a_column_for_every_spread():
    rows = list(csv.DictReader(io.StringIO(as_csv(RESULTS))))
    assert list(rows[0]) == ["method", "accuracy %", "accuracy % sd", "accuracy % mark", "size", "mixes", "ms"]
    assert [row["accuracy %"] for row in rows] == ["91.25", "93.5", "9.75"]
    assert [row["accuracy % sd"] for row in rows] == ["", "0.25", "0.5"]
    assert [row["accuracy % mark"] for row in rows] == ["", "*", ""]
    assert rows[1]["ms"] == "" and rows[0]["mixes"] == "yes" and rows[0]["size"] == "1234567"


def test_json_is_the_report(folder):
    found = json.loads((folder / "report.json").read_text())
    assert found["tables"][0]["rows"][1][1] == {"value": 93.5, "sd": 0.25, "mark": "*"}
    assert found["figures"][0]["points"][1]["x"] == 1e6 and found["commands"] == list(REPORT.commands)


def test_markdown_is_a_table_that_no_cell_breaks():
    shown = as_markdown(REPORT, ["size.png", "nothing-yet.png", "curves.png"])
    lines = [line for line in shown.splitlines() if line.startswith("|")]
    assert len(lines) == 5 + 3
    assert all(len(re.split(r"(?<!\\)\|", line)) == 7 for line in lines[:5])
    assert "93.5 ± 0.2\\*" in lines[3] and "1,234,567" in lines[2] and lines[3].endswith("| – |")
    assert "![Size](size.png)" in shown and f"```\n{REPORT.commands[0]}\n```" in shown


def test_a_column_spells_its_cells():
    column = Column("points", "+.1f")
    cells = (None, True, Measured(-0.25, 0.125), Measured(2), 3.0, "as it is", ("a", "b"))
    assert [column.spell(cell) for cell in cells] == [
        "–", "yes", "-0.2 ± 0.1", "+2.0", "+3.0", "as it is", "a · b"
    ]  # fmt: skip


def test_the_page_escapes_what_it_shows_and_loads_nothing(folder):
    page = (folder / "report.html").read_text()
    for text in (
        "A &lt;report&gt;",
        "&lt;b&gt;odd|name&lt;/b&gt;",
        "one &lt;i&gt;",
        "A note with &lt;tags&gt;.",
        "&lt;done&gt;",
    ):
        assert text in page
    assert "<b>odd" not in page and "$" not in page.replace("${", "")
    assert not re.findall(r"""(?:src|href)\s*=\s*["'](?!#|data:)|@import|url\((?!#)|fetch\(""", page)


def test_figures_take_their_ink_from_the_page():
    drawn = svg(REPORT.figures[0], "f0")
    ElementTree.fromstring(drawn)
    ids = re.findall(r'\bid="([^"]*)"', drawn)
    assert ids and all(name.startswith("f0-") for name in ids)
    assert set(re.findall(r"href=\"#([^\"]*)\"", drawn)) <= set(ids)
    colours = {colour.lower() for colour in re.findall(r"#[0-9a-fA-F]{6}\b", drawn)}
    assert colours == set(COLOURS[:2]) and "currentColor" in drawn
    assert all(f">{name}</text>" in drawn for name in ("p", "q", "level", "accuracy"))


@pytest.mark.parametrize("count", [1, 2, 5, 19])
def test_names_never_overlap(count):
    generator = np.random.default_rng(count)
    for _ in range(50):
        wanted = np.sort(generator.choice([generator.random(count), np.full(count, 0.97), np.full(count, 0.5)]))
        placed = np.array(spread(wanted.tolist(), 0.05))
        assert (np.diff(placed) >= 0.05 - 1e-9).all() and placed.min() >= -1e-9 and placed.max() <= 1 + 1e-9
    assert spread([0.1, 0.5, 0.9], 0.05) == pytest.approx([0.1, 0.5, 0.9])


# In a browser


@pytest.fixture
def show(browser, folder):
    """Opens the page in a window of some width under a colour scheme."""

    def open_page(width=1280, scheme="light"):
        preference = {"name": "prefers-color-scheme", "value": scheme}
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [preference]})
        size = {"width": width, "height": 4000, "deviceScaleFactor": 1, "mobile": width < 500}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        browser.get((folder / "report.html").as_uri())
        return browser

    return open_page


def pixels(element):
    return image.imread(io.BytesIO(element.screenshot_as_png))[..., :3]


def test_the_page_loads_without_an_error_or_a_request(show):
    page = show()
    assert page.title == REPORT.title and page.get_log("browser") == []
    assert page.execute_script("return performance.getEntriesByType('resource').length") == 0
    assert page.find_element("css selector", "h1").text == REPORT.title
    assert page.find_element("css selector", "pre").text == REPORT.commands[0]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_figure_has_drawn_pixels(show, scheme):
    page = show(scheme=scheme)
    background = image.imread(io.BytesIO(page.get_screenshot_as_png()))[0, 0, :3].mean()
    assert background > 0.95 if scheme == "light" else background < 0.15
    figures = page.find_elements("css selector", "figure svg")
    assert len(figures) == len(REPORT.figures)
    for figure in figures:
        drawn = pixels(figure)
        paper = drawn[0, 0]
        ink = np.abs(drawn - paper).max(-1) > 0.4  # axes and their text stand out in both schemes
        assert min(drawn.shape[:2]) > 200 and 0.002 < ink.mean() < 0.3


def test_nothing_but_the_tables_scrolls_sideways_on_a_phone(show):
    page = show(width=390)
    assert page.execute_script("return document.documentElement.scrollWidth") <= 390
    assert page.execute_script("const t = document.querySelector('.wide'); return t.scrollWidth > t.clientWidth")
    sizes = page.execute_script(
        "return [...document.querySelectorAll('svg text')].map(t => t.getBoundingClientRect())"
        ".map(box => Math.max(box.width, box.height))"  # some texts stand upright
    )
    assert round(min(sizes), 2) >= 9  # the browser's own rounding


def test_tables_sort(show):
    page = show()
    headings = page.find_elements("css selector", "thead")[0].find_elements("css selector", "th")

    def order():
        return [each.text for each in page.find_elements("css selector", "#t0 ~ .wide tbody th")]

    def click(index):
        headings[index].find_element("css selector", "button").click()
        assert [h.get_attribute("aria-sort") != "none" for h in headings] == [i == index for i in range(5)]
        return headings[index].get_attribute("aria-sort"), order()

    plain, odd, unicode = (str(row[0]) for row in RESULTS.rows)
    assert order() == [plain, odd, unicode]
    assert click(1) == ("descending", [odd, plain, unicode])  # numbers, not texts: 9.75 is the least
    assert click(1) == ("ascending", [unicode, plain, odd])
    assert click(2) == ("descending", [plain, unicode, odd])
    assert click(4) == ("descending", [unicode, plain, odd])
    assert click(4) == ("ascending", [plain, unicode, odd])  # what is missing stays last
    assert click(0)[0] == "ascending"

"""Files from strangers: one sentence each, no code of theirs, no waiting, no memory without end."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hostile_files import FAMILIES

SCRIPT = Path(__file__).parent / "hostile_reading.py"
SHARE = 20
SECONDS, MIB = 5, 1000
"""Of a processor (a busy machine takes no more of them), and of memory, for one file."""


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """What came of every file, read in a process of its own without anything at its standard input."""
    root = tmp_path_factory.mktemp("hostile")
    command = [sys.executable, str(SCRIPT), str(root), str(SHARE)]
    try:
        ran = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=500)
    except subprocess.TimeoutExpired:
        pytest.fail(f"Reading has no end after {(root / 'last.json').read_text()}.")
    assert ran.returncode == 0, ran.stderr[-3000:]
    return json.loads((root / "results.json").read_text())


def named(cases):
    return [(case["form"], case["title"], case.get("raised"), case["seconds"], case["MiB"]) for case in cases]


def test_there_are_many_of_every_family(told):
    assert len(told["cases"]) > 600
    assert {case["family"] for case in told["cases"]} == {family.__name__ for family in FAMILIES}


def test_nothing_runs_and_the_base_stays(told):
    assert not told["canary"] and told["base unchanged"]


def test_each_is_read_or_refused_in_one_sentence(told):
    assert not named(case for case in told["cases"] if "raised" in case)
    sentences = [text for case in told["cases"] for text in case["told"]]
    assert not [text for text in sentences if not (text.isprintable() and 3 < len(text) <= 2000)]
    assert sum(text != "read" for text in sentences) > len(sentences) / 2


def test_none_takes_long_or_much_memory(told):
    assert not named(case for case in told["cases"] if case["seconds"] > SECONDS or case["MiB"] > MIB)

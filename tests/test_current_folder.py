"""Commands and the processes that they start take no modules from the current folder, which holds anyone's files."""

import json
import os
import subprocess
import sys

import pytest
from running import Running

from infuse.__main__ import leave_current_folder
from infuse.processes import ROOT, module_command, safe_start

EVIL = """
import pathlib
pathlib.Path({canary!r}).write_text({name!r})
raise ImportError("taken from the current folder")
"""


@pytest.fixture(scope="module")
def taken_before():
    """What Python has imported before the first line of the command runs."""
    done = subprocess.run(
        [sys.executable, "-c", "import infuse, runpy, sys; print(*sys.modules)"], capture_output=True, text=True
    )
    return set(done.stdout.split())


@pytest.fixture
def folder(tmp_path, taken_before):
    """A current folder with a module in the place of each one of Python's."""
    here = tmp_path / "here"
    here.mkdir()
    for name in {*sys.stdlib_module_names, "torch", "transformers", "numpy", "rich"} - taken_before:
        (here / f"{name}.py").write_text(EVIL.format(canary=str(tmp_path / "canary"), name=name))
    return here


def canary(folder):
    path = folder.parent / "canary"
    return path.read_text() if path.exists() else None


def test_compare_and_its_processes(folder, tiny_base, toy):
    done = subprocess.run(
        [sys.executable, "-m", "infuse", "compare", "--data", str(toy), "--base", str(tiny_base), "--methods", "ia3",
         "--seeds", "1", "--epochs", "1", "--out", "out"],
        cwd=folder, capture_output=True, text=True,
    )  # fmt: skip
    assert canary(folder) is None and done.returncode == 0, done.stderr[-2000:]
    table = json.loads((folder / "out" / "report.json").read_text())["tables"][0]
    peak = next(i for i, column in enumerate(table["columns"]) if column["title"].startswith("peak MiB"))
    row = next(row for row in table["rows"] if row[0] == "ia3")
    assert row[peak] is not None  # measured in a process of its own


def test_serve_and_its_processes(folder, tiny_base, monkeypatch):
    monkeypatch.chdir(folder)
    (folder / "adapters").mkdir()
    with Running(folder / "adapters", "--base", str(tiny_base)) as server:
        assert server.models and server.ask("GET", "/healthz").status == 200
        assert canary(folder) is None


def test_a_process_for_a_module(folder):
    """Infuse is found there too where only the parent knows where it is."""
    (folder / "infuse.py").write_text(EVIL.format(canary=str(folder.parent / "canary"), name="infuse"))
    done = subprocess.run([*module_command("infuse"), "--help"], cwd=folder, capture_output=True, text=True)
    assert canary(folder) is None and done.returncode == 0 and "usage: infuse" in done.stdout, done.stderr


def test_the_environment_is_as_it_was(monkeypatch):
    for before in (None, "", "1"):
        if before is None:
            monkeypatch.delenv("PYTHONSAFEPATH", raising=False)
        else:
            monkeypatch.setenv("PYTHONSAFEPATH", before)
        with safe_start():
            assert os.environ["PYTHONSAFEPATH"] == "1"
        assert os.environ.get("PYTHONSAFEPATH") == before


def test_a_folder_that_infuse_comes_from_stays(monkeypatch, tmp_path):
    monkeypatch.setenv("PYTHONSAFEPATH", "")
    monkeypatch.setattr(sys, "path", [str(ROOT), "x"])
    monkeypatch.chdir(ROOT)
    leave_current_folder()
    assert sys.path == [str(ROOT), "x"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), "x"])
    leave_current_folder()
    assert sys.path == ["x"]

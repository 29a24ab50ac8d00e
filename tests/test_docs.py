"""The commands and snippets of the documents work as written, on the real base and a third of the bundled sample."""

import csv
import os
import re
import shlex
import subprocess
import sys
import time
from collections import Counter
from contextlib import ExitStack, contextmanager
from pathlib import Path
from shutil import copytree, which
from urllib.request import urlopen

import pytest

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


SERVER = re.compile(r"^\$ infuse serve .*&$", re.M)


def fenced(path, language):
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text(), re.M | re.S)


def blocks(language):
    return [
        pytest.param(block, id=f"{path.name}-{i}")
        for path in DOCUMENTS
        for i, block in enumerate(fenced(path, language))
    ]


def sessions():
    """The ``console`` blocks; with the one that starts a server, the ``sh`` and ``py`` blocks that ask it."""
    return [
        pytest.param(
            session,
            {language: fenced(path, language) for language in ("sh", "py")} if SERVER.search(session) else {},
            id=f"{path.name}-{i}",
        )
        for path in DOCUMENTS
        for i, session in enumerate(fenced(path, "console"))
    ]


ENVIRONMENT = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
if "PYTEST_XDIST_WORKER" in os.environ:  # other tests run on the other cores
    ENVIRONMENT["OMP_NUM_THREADS"] = "1"


@pytest.fixture(scope="module", autouse=True)
def small_sample(tmp_path_factory):
    """A copy of the package whose bundled sample has the first eight rows of each label and part."""
    copy = tmp_path_factory.mktemp("package")
    copytree(ROOT / "src", copy, dirs_exist_ok=True)
    for path in (copy / "infuse" / "data" / "sample").glob("*.csv"):
        with path.open(newline="", encoding="utf-8") as file:
            names, *rows = csv.reader(file)
        seen = Counter()
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(names)
            for row in rows:
                label = row[names.index("label")]
                seen[label] += 1
                if seen[label] <= 8:
                    writer.writerow(row)
    ENVIRONMENT["PYTHONPATH"] = str(copy)


def run(command, folder, stdin=None):
    done = subprocess.run(command, cwd=folder, env=ENVIRONMENT, input=stdin, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.mark.parametrize("code", blocks("python"))
def test_snippet(code, tmp_path):
    run([sys.executable, "-c", code], tmp_path)


def test_every_block_is_run():
    for path in DOCUMENTS:
        languages = set(re.findall(r"^```(\w+)", path.read_text(), re.M))
        assert languages <= {"python", "console", "sh", "py"}, f"{path.name}: nothing runs {languages}"
        if languages & {"sh", "py"}:
            starting = [session for session in fenced(path, "console") if SERVER.search(session)]
            assert len(starting) == 1, f"{path.name}: {len(starting)} blocks start the server that sh and py blocks ask"


@pytest.mark.parametrize("session, asking", sessions())
def test_commands(session, asking, tmp_path):
    with ExitStack() as servers:
        for line in session.splitlines():
            assert line.startswith("$ infuse "), f"a console block holds commands of infuse: {line!r}"
            *words, last = shlex.split(line.removeprefix("$ infuse "))
            command = [sys.executable, "-m", "infuse", *words]
            if last == "&":
                servers.enter_context(serving(command, tmp_path))
            else:
                assert run([*command, last], tmp_path).strip()
        for code in asking.get("py", ()):
            assert run([sys.executable, "-c", code], tmp_path).strip()
        if asking.get("sh") and not which("curl"):
            pytest.skip("curl is not installed: all but the sh blocks ran")
        for command in asking.get("sh", ()):
            answer = run(["sh", "-ec", command], tmp_path)
            assert answer and '"error"' not in answer, f"{command}\n{answer}"


@contextmanager
def serving(command, folder):
    """A server that is ready, until the end of the block."""
    with subprocess.Popen(command, cwd=folder, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True) as server:
        try:
            assert server.stderr is not None
            said = server.stderr.readline()
            url = re.search(r"http://\S+", said)
            assert url, said + server.stderr.read()
            wait_for(url[0] + "/readyz")
            yield
        finally:
            server.terminate()


def wait_for(url, seconds=60):
    deadline = time.monotonic() + seconds
    while True:
        try:
            return urlopen(url, timeout=5)
        except OSError:
            assert time.monotonic() < deadline, f"{url} does not answer"
            time.sleep(0.1)


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", (ROOT / "README.md").read_text(), re.M):
        assert re.search(rf"^{target}:", makefile, re.M), target


def test_links_lead_somewhere():
    for path in DOCUMENTS:
        for link in re.findall(r"\]\((?!http)([^)#]+)", path.read_text()):
            assert (path.parent / link).exists(), f"{path.name}: {link}"

"""The commands and snippets of the documents work as written, on the real base."""

import os
import re
import shlex
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path
from urllib.request import urlopen

import pytest

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(language):
    return [
        pytest.param(match[1], id=f"{path.name}-{i}")
        for path in DOCUMENTS
        for i, match in enumerate(re.finditer(rf"^```{language}\n(.*?)^```", path.read_text(), re.M | re.S))
    ]


ENVIRONMENT = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
if "PYTEST_XDIST_WORKER" in os.environ:  # other tests run on the other cores
    ENVIRONMENT["OMP_NUM_THREADS"] = "1"


def run(command, folder, stdin=None):
    done = subprocess.run(command, cwd=folder, env=ENVIRONMENT, input=stdin, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.mark.parametrize("code", blocks("python"))
def test_snippet(code, tmp_path):
    run([sys.executable, "-c", code], tmp_path)


@pytest.mark.parametrize("session", blocks("console"))
def test_commands(session, tmp_path):
    with ExitStack() as servers:
        for line in session.splitlines():
            assert line.startswith("$ infuse "), f"a console block holds commands of infuse: {line!r}"
            *words, last = shlex.split(line.removeprefix("$ infuse "))
            command = [sys.executable, "-c", "from infuse.cli import main; main()", *words]
            if last == "&":
                servers.enter_context(serving(command, tmp_path))
            else:
                assert run([*command, last], tmp_path).strip()


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

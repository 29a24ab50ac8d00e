"""A sample of the faults of ``bench/faults.py``, which tries them all."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parent.parent / "bench" / "faults.py"
SAMPLE = ("train --overwrite", "average", "calibrate", "merge", "compare --overwrite", "save a fusion")


def test_after_a_fault_the_same_command_ends_as_if_there_had_been_none():
    """Readers see the old or the new until then, and nothing is left over."""
    if not sys.platform.startswith("linux") or not shutil.which("gcc"):
        pytest.skip("the faults are a library that gcc compiles and Linux preloads")
    source = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    words = [sys.executable, BENCH, "--most", "2", "--commands", *SAMPLE]
    done = subprocess.run(words, capture_output=True, text=True, env=os.environ | source)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert " 0 not green" in done.stdout

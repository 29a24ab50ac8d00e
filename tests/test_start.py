"""What is imported, and when: nobody waits for what is not needed."""

import os
import re
import subprocess
import sys
from importlib.metadata import requires

import pytest

from infuse.__main__ import main


def test_help_and_mistyped_flags_wait_for_no_model_library():
    heavy = ("transformers", "sklearn", "scipy", "matplotlib", "datasets", "optuna", "fastapi")
    code = f"""
import sys
from infuse.cli import main
for arguments in (["--help"], ["train", "--help"], ["train", "--epoch", "3"]):
    try:
        main(arguments)
    except SystemExit:
        pass
print("imported:", sorted(set({heavy}) & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.endswith("imported: []\n"), done.stdout[-200:] + done.stderr
    assert all(name in done.stdout for name in ("pfeiffer", "houlsby", "compacter++", "full")), done.stdout


def test_public_names_come_on_first_use():
    code = """
from infuse import *
import infuse, sys
assert "transformers" in sys.modules and callable(attach) and callable(recommend) and IA3().name == "ia3"
assert {"Client", "Classifier", "heads", "__version__"} <= set(dir(infuse)) and infuse.Client.__name__ == "Client"
try:
    infuse.classifer
except AttributeError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "classifer" in done.stdout, done.stderr


def test_a_mistake_in_a_process_of_its_own():
    done = subprocess.run(
        [sys.executable, "-m", "infuse", "train", "--method", "magic"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("infuse: Unknown method 'magic'") and done.stderr.count("\n") == 1


@pytest.mark.parametrize("arguments, code, shown", [
    ("predict nowhere <&-", 2, "no text to label"), ("sites '{base}' >&-", 0, ""),
])  # fmt: skip
def test_closed_standard_streams_are_empty(tiny_base, arguments, code, shown):
    infuse = f'"{sys.executable}" -c "from infuse.cli import main; main()"'
    shell = f"{infuse} {arguments.format(base=tiny_base)}"
    done = subprocess.run(shell, shell=True, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (code, "") and shown in done.stderr, done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("encoding", ["latin-1", "ascii"])
def test_standard_input_and_output_are_utf8_in_every_locale(encoding):
    """Files are, too; and the mark that Windows puts before a text is no part of it."""
    code = """
import sys
from types import SimpleNamespace
from infuse import cli, console
run = SimpleNamespace(answers=lambda texts, _: texts)
sys.modules["infuse.training.predictor"] = SimpleNamespace(open_run=lambda *_: run)
console.show_predictions = lambda texts, *_: console.out.print(ascii(texts), *texts)
cli.main(["predict", "run"])
"""
    done = subprocess.run(
        [sys.executable, "-c", code], input="\ufeffcafé\n日本\n".encode(), capture_output=True,
        env=os.environ | {"PYTHONIOENCODING": encoding},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout.decode() == f"{('café', '日本')!a} café 日本\n"


def test_threads_may_be_the_first_to_use_names_at_once():
    code = """
import infuse, sys, threading
from concurrent.futures import ThreadPoolExecutor
sys.setswitchinterval(1e-6)
names = ["Classifier", "testing", "load", "recommend"]
ready = threading.Barrier(len(names))
def used(name):
    ready.wait()
    return getattr(infuse, name)
with ThreadPoolExecutor(len(names)) as pool:
    print(*(found.__name__ for found in pool.map(used, names)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "Classifier infuse.testing load recommend\n", done.stderr


@pytest.mark.skipif(
    any(re.match(r"httpx\b(?!.*extra)", each) for each in requires("huggingface_hub") or ()),
    reason="huggingface_hub brings httpx along before version 2",
)
def test_help_names_no_client_where_httpx_is_not_installed():
    code = """
import sys
sys.modules["httpx"] = None
import infuse, inspect, pydoc
from infuse import *
print({name for name, _ in inspect.getmembers(infuse)} >= {"attach", "__version__"}, "Client" in dir(infuse))
print("class Classifier" in pydoc.plain(pydoc.render_doc(infuse)))
try:
    infuse.Client
except InfuseError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.startswith("True False\nTrue\nA client needs httpx"), done.stderr


def test_ctrl_c_is_one_line_while_the_command_line_is_imported(monkeypatch, capsys):
    class Importing:
        @property
        def main(self):
            raise KeyboardInterrupt

    monkeypatch.setitem(sys.modules, "infuse.cli", Importing())
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setenv("PYTHONSAFEPATH", "")
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 130 and capsys.readouterr().err == "infuse: interrupted\n"

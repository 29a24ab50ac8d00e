"""How processes of Python start: the current folder is no place that modules come from.

Commands run in folders of data, which anyone may have put files into: a ``tempfile.py`` there must not take the place
of Python's own.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Lock

ROOT = Path(__file__).parent.parent
"""Where Infuse is imported from."""
_SAFE = "PYTHONSAFEPATH"
_PROGRAM = "import runpy, sys; sys.path.append(sys.argv.pop(1)); runpy.run_module(sys.argv.pop(1), run_name='__main__')"
_changing = Lock()


def module_command(module: str) -> list[str]:
    """The command that runs a module of Infuse by this interpreter."""
    return [sys.executable, "-P", "-c", _PROGRAM, str(ROOT), module]


@contextmanager
def safe_start() -> Iterator[None]:
    """Processes that are started meanwhile, by whatever means, leave the current folder out; one thread at a time."""
    with _changing:
        before = os.environ.get(_SAFE)
        os.environ[_SAFE] = "1"
        try:
            yield
        finally:
            if before is None:
                del os.environ[_SAFE]
            else:
                os.environ[_SAFE] = before

"""The command ``infuse``, and ``python -m infuse`` (before which Python takes a few modules from the current folder
already, if they are there: ``python -P -m infuse`` takes none)."""

import os
import sys


def main() -> None:
    """Run the command line; Ctrl-C ends it in one line from the first second on, while it is still being imported."""
    try:
        leave_current_folder()
        from infuse.cli import main as run

        run()
    except KeyboardInterrupt:
        sys.stderr.write("infuse: interrupted\n")
        sys.exit(130)


def leave_current_folder() -> None:
    """Take no modules from the current folder, which holds anyone's files, here and in all processes that are started.

    ``python -m`` puts that folder first. It stays if Infuse itself is imported from there.
    """
    os.environ["PYTHONSAFEPATH"] = "1"
    try:
        here = os.path.realpath(os.getcwd())
    except OSError:  # a folder that was deleted
        return
    ours = os.path.realpath(os.path.dirname(os.path.dirname(__file__)))
    if not sys.flags.safe_path and os.path.realpath(sys.path[0]) == here != ours:
        del sys.path[0]


if __name__ == "__main__":
    main()

"""The command ``infuse``, and ``python -m infuse``."""

import sys


def main() -> None:
    """Run the command line; Ctrl-C ends it in one line from the first second on, while it is still being imported."""
    try:
        from infuse.cli import main as run

        run()
    except KeyboardInterrupt:
        sys.stderr.write("infuse: interrupted\n")
        sys.exit(130)


if __name__ == "__main__":
    main()

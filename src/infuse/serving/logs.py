"""Lines of the log: one for each event, whatever the names and texts in it hold."""

import json
import logging
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_ODD = re.compile(r"[^ -~]")


def event(name: str, **facts: Any) -> str:
    """``NAME key=value …``, values as JSON: what a client sends can neither end a line nor pass for another fact."""
    return " ".join([name, *(f"{key}={_value(value)}" for key, value in facts.items())])


def escaped(text: str) -> str:
    """``text`` in one line: what can't be printed (line ends, codes of terminals, marks of direction) as in JSON."""
    return _ODD.sub(lambda odd: odd[0] if odd[0].isprintable() else _escape(odd[0]), text)


class Lines(logging.Formatter):
    """``TIME LEVEL event``, tracebacks included in the line."""

    converter = staticmethod(time.gmtime)

    def __init__(self) -> None:
        super().__init__("%(asctime)s.%(msecs)03dZ %(levelname)s %(message)s", "%Y-%m-%dT%H:%M:%S")

    def format(self, record: logging.LogRecord) -> str:
        return escaped(super().format(record))


@contextmanager
def written() -> Iterator[None]:
    """Meanwhile, write what the server logs to standard error, from INFO on; of uvicorn, only warnings."""
    handler = logging.StreamHandler()
    handler.setFormatter(Lines())
    loggers = {logging.getLogger("infuse.serving"): logging.INFO, logging.getLogger("uvicorn"): logging.WARNING}
    for logger, level in loggers.items():
        logger.setLevel(level)
        logger.addHandler(handler)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeHandler(handler)


def _value(value: Any) -> str:
    return escaped(json.dumps(value, ensure_ascii=False, default=str))


def _escape(character: str) -> str:
    return r"\u007f" if character == "\x7f" else json.dumps(character)[1:-1]  # JSON itself leaves that one as it is

"""The one exception that a user's mistake raises, and text of unknown origin made fit for a terminal or a log."""

import re
from unicodedata import category

_LONGEST = 2000
_JOINERS = "\u200c\u200d"
"""Persian, Indian scripts and emoji are written with them."""


class InfuseError(ValueError):
    """A mistake in what the user asked for: one sentence that says what is wrong and how to mend it.

    The command line prints the sentence and exits with code 2; nothing has been written or changed. Names in it may
    come from anybody's file, so that it is made :func:`printable` here, whoever raises it.
    """

    def __init__(self, message: object = ""):
        text = printable(str(message))
        if len(text) > _LONGEST:  # the fix stands at the end
            text = f"{text[: _LONGEST - 503]} … {text[-500:]}"
        super().__init__(text)


def printable(text: str, keep: str = "") -> str:
    """``text`` with what moves a cursor, hides or reorders text, or is no text, written as an escape.

    Args:
        keep: control characters to leave as they are.
    """
    if text.isprintable():
        return text
    return re.sub(r"[^\x20-\x7e]", lambda found: _escaped(found[0], keep), text)


def _escaped(character: str, keep: str) -> str:
    hidden = category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp")
    return character.encode("unicode_escape").decode() if hidden and character not in keep + _JOINERS else character


class WriteError(InfuseError):
    """A file or folder that can't be written: a full disk, say, or no permission. What was there is still there."""


def listed(names, limit: int = 12) -> str:
    """``a, b, c`` for an error message, cut after ``limit`` names; long names lose their middle."""
    names = [str(n) for n in names]
    shown = ", ".join(n if len(n) <= 200 else f"{n[:140]}…{n[-50:]}" for n in names[:limit]) or "none"
    return shown if len(names) <= limit else f"{shown}, … ({len(names)} in all)"

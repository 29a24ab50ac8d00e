"""The one exception that a user's mistake raises."""


class InfuseError(ValueError):
    """A mistake in what the user asked for: one sentence that says what is wrong and how to mend it.

    The command line prints the sentence and exits with code 2; nothing has been written or changed.
    """


class WriteError(InfuseError):
    """A file or folder that can't be written: a full disk, say, or no permission. What was there is still there."""


def listed(names, limit: int = 12) -> str:
    """``a, b, c`` for an error message, cut after ``limit`` names."""
    names = [str(n) for n in names]
    shown = ", ".join(names[:limit]) or "none"
    return shown if len(names) <= limit else f"{shown}, … ({len(names)} in all)"

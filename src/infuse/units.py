"""Numbers with units, as people write and read them: 600MB, 50k, 0.05%, 20ms, 5m."""

import re

from infuse.errors import InfuseError

BYTES = {"b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
COUNTS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9}
SECONDS = {"": 1, "s": 1, "m": 60, "h": 3600}
MILLISECONDS = {"": 1, "ms": 1, "s": 1000}


def quantity(what: str, text: str, units: dict[str, int], example: str) -> float:
    """A positive number with one of ``units``, in any case, in the unit whose factor is 1.

    Raises:
        InfuseError: it is none; the message calls it ``what`` and shows ``example``.
    """
    match = re.fullmatch(r"(\d+(?:[\d_,]*\d)?(?:\.\d+)?)\s*([a-z]*)", text.strip().lower())
    number = float(re.sub("[_,]", "", match[1])) if match else 0.0
    if not match or match[2] not in units or not 0 < number < 1e15:
        raise InfuseError(f"The {what} {text!r} is not understood: write {example}.")
    return number * units[match[2]]


def seconds(text: str) -> float:
    """A span of time."""
    return quantity("time", text, SECONDS, "90s, 10m or 2h")


def duration(seconds: float) -> str:
    """A span of time as people read it."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


def size(text: str) -> float:
    """Bytes."""
    return quantity("size", text, BYTES, "600MB, 2GB or 1.5GiB")


def milliseconds(text: str) -> float:
    """A latency."""
    return quantity("latency", text, MILLISECONDS, "20ms or 0.5s")


def count(text: str, whole: int) -> float:
    """A number of things, or a share of ``whole`` in percent."""
    example = "50k, 200000, 1.5M or 0.05%"
    if text.strip().endswith("%"):
        percent = quantity("number", text.strip()[:-1], {"": 1}, example)
        if percent > 100:
            raise InfuseError(f"The number {text!r} is more than all: write at most 100%.")
        return percent / 100 * whole
    return quantity("number", text, COUNTS, example)

"""One sentence for what is wrong with a command line, from what tyro reports in a box of many lines."""

import re
from collections.abc import Iterable
from difflib import get_close_matches

from infuse.errors import listed

_WORDS = {"INT": "a whole number", "FLOAT": "a number", "PATH": "a path", "STR": "a text"}


def unknown(word: str, known: Iterable[str], where: str) -> str:
    """What to say of a command or an option that nobody knows, with the nearest one that there is."""
    word = word.partition("=")[0]
    near = get_close_matches(word, list(known), 1)
    what = "option" if word.startswith("-") else "argument" if " " in where else "command"
    return f"{where} has no {what} {word}" + (f": did you mean {near[0]}?" if near else f"; see {where} --help.")


def sentence(report: str, where: str) -> str:
    """The sentence for a report of tyro's, of whatever version: its first part, where it says nothing that is known."""
    lines = [line.strip("│ ").strip() for line in re.sub(r"\x1b\[[0-9;]*m", "", report).splitlines()]
    text = " ".join(line for line in lines if line and line[0] not in "╭╰")
    said, *others = re.split(r"\s*─{3,}\s*", text) if text else ["The command can't be read"]
    if said.startswith("Missing from ") and (parts := [p.strip() for p in said.split(": ", 1)[1].split("(required)")]):
        needs = [f"{name} ({about.rstrip('.')})" for name, about in (_named(part) for part in parts if part)]
        strange = re.match(r"Unrecognized options: (\S+)", " ".join(others))
        return f"{where} needs {' and '.join(needs)}" + (f", and has no option {strange[1]}." if strange else ".")
    if wrong := re.match(r"Missing value for argument '(\w.*)'", said):
        return f"{where} needs {wrong[1].upper()}, an argument without a flag; see {where} --help."
    if wrong := re.match(r"Missing value for argument '(.*)'", said):
        return f"{wrong[1]} needs a value; see {where} --help."
    if said.startswith("Expected one of {"):
        return f"Give a command: {said[len('Expected one of {') :].rstrip('}.')}; see infuse --help."
    if wrong := re.match(r"Error parsing ([^ :]+): (.*)", said):
        quoted, flag = re.findall(r"'([^']*)'", said), wrong[1].split("/")[0]
        kind = re.search(rf"{re.escape(flag)} (\S+)", " ".join(others))
        if quoted and kind:
            kinds = [k for k in re.split(r"[|]", kind[1].strip("[]")) if k != "{None}"]
            return f"{flag} takes {listed([_WORDS.get(k, k) for k in kinds])}, not {quoted[-1]!r}."
    if wrong := re.match(r"invalid choice '(.*)' for argument '(.*)'. Expected one of \((.*)\)", said):
        choices = [choice.strip(" '") for choice in wrong[3].split(",") if choice.strip()]
        return f"{wrong[2]} takes {listed(choices, 40)}, not {wrong[1]!r}."
    return f"{said.rstrip('.')}; see {where} --help."


def _named(part: str) -> tuple[str, str]:
    """``--data STR What it is.`` as the name and what it is."""
    name, *words = part.split()
    if name.startswith("--"):
        words = words[1:]
    return name, " ".join(words)

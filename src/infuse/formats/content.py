"""The content of files that anybody may have written: read without blocking, and parsed within limits.

The limits lie far above what adapters hold, and keep a small file from much work: whoever parses what has passed here
need not think of names with thousands of parts, lists without end, or numbers that fill pages.
"""

import json
import os
import stat
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

from infuse.errors import InfuseError, listed

CONFIG_BYTES, HEADER_BYTES = 4 << 20, 8 << 20
"""Of a JSON file beside an adapter's tensors, and of the header before them."""
NAMES, NAME_LENGTH, NAME_PARTS = 100_000, 500, 50
"""How many names (of tensors, say) a file holds, how long one is, and how many parts between dots it has."""
TEXT_LENGTH = 4096
"""Of other words that stand in a line: the name of a base, which may be a path."""
DEPTH, DIGITS = 60, 50
"""How deep JSON is nested, and how long a number in it is."""
T = TypeVar("T")
_SPARSE = 16 << 20
_KINDS = {
    stat.S_IFIFO: "a named pipe", stat.S_IFDIR: "a folder", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}  # fmt: skip


def is_file(path: Path) -> bool:
    """Whether there is a regular file that can be reached; never an error."""
    return os.path.isfile(path)


def read_bytes(path: Path, limit: int | None = None, check: Callable[[bytes, int], Any] | None = None) -> bytes:
    """The content of a regular file; anything else, which may never end or never begin, isn't read at all.

    Args:
        limit: how many bytes it may have.
        check: called with the first bytes of a large file (as many as a header may have) and the number of all, before
            the others are read; it raises an error if they aren't worth it.
    Raises:
        InfuseError: with the file's name and what is wrong.
    """
    try:
        _check_kind(path, os.stat(path))  # before it is opened: that alone does something to some devices
        with open(path, "rb", opener=_open) as file:
            about = os.fstat(file.fileno())  # it may be another file by now
            _check_kind(path, about)
            if limit is not None and about.st_size > limit:
                raise InfuseError(f"{path} has {about.st_size:,} bytes, and at most {limit:,} are read of such a file.")
            if about.st_size > _SPARSE and _data(file.fileno(), about.st_size) < about.st_size // 8:
                raise InfuseError(f"{path} is mostly a hole: hardly any of it was written; save or download it again.")
            if check is not None and about.st_size > HEADER_BYTES + 8:
                check(file.read(HEADER_BYTES + 8), about.st_size)
                file.seek(0)
            return file.read(about.st_size)
    except (FileNotFoundError, NotADirectoryError):
        raise InfuseError(f"There is no file {path.name} in {path.parent}.") from None
    except (OSError, MemoryError) as error:
        why = getattr(error, "strerror", None) or "it is too large for the memory"
        raise InfuseError(f"{path} can't be read: {why}.") from None
    except ValueError as error:
        if isinstance(error, InfuseError):
            raise
        raise InfuseError(f"{path} is no name of a file.") from None  # with a zero byte in it


def _open(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))  # a named pipe would wait for somebody who writes


def _check_kind(path: Path, about: os.stat_result) -> None:
    if not stat.S_ISREG(about.st_mode):
        raise InfuseError(f"{path} is {_KINDS.get(stat.S_IFMT(about.st_mode), 'no file')}, not a regular file.")


def _data(file: int, size: int) -> int:
    """Bytes of a file outside of holes, up to an eighth of its size."""
    if not hasattr(os, "SEEK_DATA"):
        return size
    found = at = 0
    try:
        while at < size and 8 * found < size:
            start = os.lseek(file, at, os.SEEK_DATA)
            at = os.lseek(file, start, os.SEEK_HOLE)
            found += at - start
    except OSError:  # there is nothing but a hole up to the end
        pass
    os.lseek(file, 0, os.SEEK_SET)
    return found


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file, or an error that names the file."""
    return parse_json(read_bytes(path, CONFIG_BYTES), path)


def parse_json(content: bytes | str, where: Path, what: str = "is no valid JSON", numbers: bool = True) -> dict:
    """A JSON object without names that come twice, numbers without end, or depth without end.

    Args:
        where: the file, for errors.
        what: what an error says of the file.
        numbers: refuse ``NaN`` and infinity, which Python writes and JSON does not have.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) < len(pairs):
            twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
            raise ValueError(f"the name {twice[:80]!r} comes twice")
        return made

    def number(text: str) -> float:
        raise ValueError(f"{text} is no number")

    try:
        text = content.decode() if isinstance(content, bytes) else content
        value = json.loads(
            text, object_pairs_hook=unique, parse_int=_integer, parse_float=_real,
            parse_constant=number if numbers else None,
        )  # fmt: skip
        _check_depth(value)
    except (ValueError, RecursionError) as error:
        raise InfuseError(f"{where} {what} ({error}); save or download it again.") from None
    if not isinstance(value, dict):
        raise InfuseError(f"{where} should hold a JSON object, not a {type(value).__name__}.")
    return value


def _integer(text: str) -> int:
    return int(_short(text))


def _real(text: str) -> float:
    return float(_short(text))


def _short(text: str) -> str:
    if len(text) > DIGITS:
        raise ValueError(f"the number {text[:12]}… has {len(text):,} digits")
    return text


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(DEPTH):
        inner = [v for v in level if isinstance(v, dict | list)]
        level = [each for v in inner for each in (v.values() if isinstance(v, dict) else v)]
        if not level:
            return
    raise ValueError(f"it is nested more than {DEPTH} deep")


def sound(parse: Callable[[], T], where: Path) -> T:
    """What a parser of a file's description gives; whatever is not as it should be becomes one sentence."""
    try:
        return parse()
    except InfuseError:
        raise
    except Exception as error:  # of any type: the words are those of whoever wrote the file
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:120]
        raise InfuseError(f"The description in {where} is damaged ({reason}).") from None


def check_names(names: Iterable[Any], where: Path) -> None:
    """Refuse names, of tensors say, that are too many, too long, or of too many parts to be an adapter's."""
    names = list(names)
    if len(names) > NAMES:
        raise InfuseError(
            f"{where} holds {len(names):,} names where an adapter has at most {NAMES:,}, of tensors, say."
        )
    odd = [n for n in names if not isinstance(n, str) or len(n) > NAME_LENGTH or n.count(".") >= NAME_PARTS]
    if odd:
        shown = listed([str(name)[:60] for name in odd], 3)
        raise InfuseError(
            f"{where} holds names that are no paths of modules ({shown}): a path has at most {NAME_LENGTH} characters "
            f"and {NAME_PARTS} parts."
        )

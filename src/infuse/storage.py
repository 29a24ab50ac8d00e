"""Writing to disk, all or nothing: one writer of a folder at a time, whole files, and folders that change at once.

A folder changes in three steps. What is new is written into ``.infuse.part`` inside of it. Renaming that to
``.infuse.new`` is the change: from then on :func:`current` shows readers the new files there. Last, they are linked
into their places and ``.infuse.new`` goes. The folder itself is never moved: it may be a link, a mount or somebody's
working directory, and hold files of others, which stay.

A process that is killed leaves its lock free, and either ``.infuse.part``, which the next writer deletes, or
``.infuse.new``, which the next writer puts in place. The names are fixed: whoever holds the lock knows that what it
finds under them belongs to nobody alive.
"""

import json
import os
import re
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError

from infuse.errors import InfuseError, WriteError

try:
    import fcntl
except ImportError:  # on Windows
    fcntl: Any = None

LOCK, PART, NEW, OLD = ".infuse.lock", ".infuse.part", ".infuse.new", ".infuse.old"
RESERVED = frozenset((LOCK, PART, NEW, OLD))
"""Names in a folder that belong to this module."""
_FILES, _GONE = "files", "gone.json"
_FILE, _LINK = ".infuse.file", ".infuse.link"
_INTERNAL = re.compile(r"(^|/)\.infuse\.\w+(/files\b)?(/gone\.json)?")  # what a path has in it on its way to its place
PATIENCE = 60.0
"""Seconds to wait for a writer that should take a moment."""
T = TypeVar("T")


@contextmanager
def writing(folder: Path, *, wait: float = 0) -> Iterator[bool]:
    """Be the one process that writes a folder, which is made if need be, and goes again if it stays empty.

    What a killed process left is brought to its end or deleted first; gives whether there was any.

    Args:
        folder: the folder.
        wait: seconds to wait for another writer.
    Raises:
        InfuseError: another process writes the folder, or it can't be written.
    """
    made = [each for each in (folder, *folder.parents) if not each.exists()]
    try:
        with reported(folder):
            folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder, wait) as stale:
            with reported(folder):
                left = _recover(folder)
            yield stale or left
    finally:
        for each in made:
            with suppress(OSError):
                if not any(each.iterdir()):
                    each.rmdir()


def in_use(folder: Path) -> bool:
    """Whether a process writes a folder, or was killed when it did."""
    return any(os.path.lexists(folder / name) for name in RESERVED)


@contextmanager
def replacing(folder: Path, old: Iterable[str] = ()) -> Iterator[Path]:
    """A folder for what shall take its place in ``folder``, all at once, when the block ends without an error.

    For whoever holds the lock of :func:`writing`.

    Args:
        folder: the folder.
        old: names in it, of files or folders: what has such a name and isn't written anew goes in the same moment.
    """
    part, files = folder / PART, folder / PART / _FILES
    with reported(folder):
        _delete(part)
        files.mkdir(parents=True)
    try:
        yield files
        with reported(folder):
            _commit(folder, old)
    except BaseException:
        with suppress(OSError):
            _delete(part)
        raise
    with reported(folder):
        _settle(folder)


def current(path: Path) -> Path:
    """Where a reader finds what ``path`` names: in its place, or where a writer that was cut short left the new one."""
    for base in (path, *path.parents[:2]):
        moved = base / NEW / _FILES / path.relative_to(base)
        if os.path.exists(moved):  # unlike Path.exists, not an error where a folder can't be entered
            return moved
    return path


def reading(path: Path, read: Callable[[Path], T]) -> T:
    """``read(current(path))``, again if the folder changed meanwhile: of its files, all are the old or all the new."""
    while True:
        before = _state(path)
        try:
            found = read(current(path))
        except (OSError, InfuseError):
            if _state(path) == before:
                raise
        else:
            if _state(path) == before:
                return found


def write(path: Path, content: bytes | str) -> None:
    """Write a file so that readers see the old or the new one, whole; text becomes UTF-8.

    For whoever holds the lock of its folder: a killed process leaves a file whose name the next one takes.
    """
    part = path.with_name(_FILE)
    with reported(path):
        try:
            with open(part, "wb") as file:
                file.write(content.encode() if isinstance(content, str) else content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, path)
        except OSError:
            with suppress(OSError):
                part.unlink()
            raise


def begin(folder: Path, files: dict[str, str]) -> None:
    """Make a folder that holds these files from its first moment; an older one goes.

    For whoever holds the lock of the folder around it.
    """
    remove(folder)
    part = folder.with_name(PART)
    with reported(folder):
        _delete(part)
        part.mkdir()
        for name, content in files.items():
            write(part / name, content)
        os.rename(part, folder)
        _sync(folder.parent)


def remove(path: Path) -> None:
    """Delete a file or folder, at once for whoever looks; for whoever holds the lock of the folder around it."""
    old = path.with_name(OLD)
    with reported(path):
        if os.path.lexists(path):
            _delete(old)
            os.rename(path, old)
            _delete(old)


@contextmanager
def scratch() -> Iterator[Path]:
    """A folder for what nobody else reads, deleted at the end. Those of killed processes go, too."""
    root = Path(tempfile.gettempdir())
    with reported(root):
        for other in root.glob("infuse-scratch-*"):
            with suppress(InfuseError, OSError):  # its process lives
                with _locked(other, 0):
                    _empty(other)
                other.rmdir()
        folder = Path(tempfile.mkdtemp(prefix="infuse-scratch-"))
    try:
        with _locked(folder, 0):
            yield folder
    finally:
        for _ in range(2):  # what fails once may not fail twice; what does goes when the next one begins
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def reported(path: Path) -> Iterator[None]:
    """Turn what any library raises where it can't write into one sentence.

    Raises:
        WriteError: with the path, the reason, and what to do.
    """
    try:
        yield
    except InfuseError:
        raise
    except Exception as error:
        # safetensors, torch and tokenizers write in Rust and C++, and raise types of their own.
        if not isinstance(error, OSError | SafetensorError | RuntimeError) and type(error) is not Exception:
            raise
        named, reason = getattr(error, "filename", None), getattr(error, "strerror", None)
        reason = reason or (str(error).strip().splitlines() or [type(error).__name__])[0][:120]
        where = _INTERNAL.sub("", str(named or path)) or "."
        raise WriteError(
            f"{where} can't be written ({reason}); check the path, its permissions and the space left, then do the "
            "same again."
        ) from error


@contextmanager
def _locked(folder: Path, wait: float) -> Iterator[bool]:
    """Hold the lock of a folder; gives whether a process died with it. It dies with its process, whatever ends that."""
    path, until = folder / LOCK, time.monotonic() + wait
    while True:
        with reported(folder):
            lock = _opened(path)
        if _take(lock) and _is_at(lock, path):
            break
        holder = _holder(lock)
        os.close(lock)
        if time.monotonic() >= until + (0 if holder else 1):  # it may be about to say who it is
            who = f" ({holder})" if holder else ""
            then = "try again once it has ended" if wait else "wait for it or choose another --out"
            raise InfuseError(f"{folder} is being written by another process{who}; {then}.")
        time.sleep(0.02)
    try:
        stale = bool(_holder(lock))
        with suppress(OSError):  # it only says who
            os.ftruncate(lock, 0)
            os.pwrite(lock, f"{os.getpid()} {socket.gethostname()}".encode(), 0)
        try:
            yield stale
        except BaseException:
            with suppress(OSError):
                path.unlink()
            raise
        with reported(folder):
            path.unlink()  # while it is held: who waits for it sees that it is no longer the one at this path
    finally:
        os.close(lock)


def _opened(path: Path) -> int:
    while True:
        try:
            return os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o666)
        except FileNotFoundError:  # another process had made the folder for nothing
            path.parent.mkdir(parents=True, exist_ok=True)


def _take(lock: int) -> bool:
    """Whether the lock is ours now. Where a file system has no locks, it always is."""
    try:
        if fcntl is None:
            import msvcrt

            msvcrt.locking(lock, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]  # on Windows alone
        else:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError:
        return True
    return True


def _is_at(lock: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(lock), os.stat(path))
    except FileNotFoundError:
        return False


def _holder(lock: int) -> str:
    """Who wrote into a lock last, or nothing."""
    with suppress(OSError):
        pid, _, host = os.pread(lock, 300, 0).decode(errors="replace").partition(" ")
        return f"pid {pid}" + (f" on {host}" if host != socket.gethostname() else "") if pid else ""
    return ""


def _recover(folder: Path) -> bool:
    """End or undo what a killed process left; whether there was any."""
    left = [name for name in (NEW, PART, OLD) if os.path.lexists(folder / name)]
    if NEW in left:
        _settle(folder)
    for name in left:
        _delete(folder / name)
    return bool(left)


def _commit(folder: Path, old: Iterable[str]) -> None:
    part, files = folder / PART, folder / PART / _FILES
    for path in files.rglob("*"):
        there = folder / path.relative_to(files)
        if there.exists() and there.is_dir() != path.is_dir():
            raise InfuseError(f"{there} is in the way of what shall be written; move it, or choose another folder.")
    write(part / _GONE, json.dumps([gone for name in old for gone in _gone(folder, files, name)]))
    for path in (*files.rglob("*"), files, part):
        _sync(path)
    os.rename(part, folder / NEW)
    _sync(folder)


def _gone(folder: Path, files: Path, name: str) -> Iterator[str]:
    """What is at or below a name in the folder, but not among the new files."""
    old = folder / name
    if os.path.lexists(old) and not os.path.lexists(files / name):
        yield name
    elif old.is_dir() and not old.is_symlink():
        for child in sorted(old.iterdir()):
            yield from _gone(folder, files, f"{name}/{child.name}")


def _settle(folder: Path) -> None:
    """Put what is in ``.infuse.new`` into its places; whoever is cut short leaves it for the next to do again.

    Whoever looks into the folder by hand never sees files of two results: all that goes or is replaced goes first. Only
    tensors are replaced in place, since a native file of them is a whole adapter.
    """
    files = folder / NEW / _FILES
    for name in json.loads((folder / NEW / _GONE).read_text()):
        _delete(folder / name)
    paths = sorted((p for p in files.rglob("*") if p.is_file()), key=lambda p: (p.suffix != ".safetensors", p))
    places = {path: folder / path.relative_to(files) for path in paths}
    for path, place in places.items():
        if path.suffix != ".safetensors" and os.path.lexists(place):
            place.unlink()
    for path, place in places.items():
        if not place.parent.is_dir():
            place.parent.mkdir(parents=True)
        _place(path, place)
    for each in {place.parent for place in places.values()}:
        _sync(each)
    _delete(folder / OLD)
    os.rename(folder / NEW, folder / OLD)
    _delete(folder / OLD)


def _place(path: Path, place: Path) -> None:
    if place.exists() and place.samefile(path):
        return
    part = place.with_name(_LINK)
    _delete(part)
    try:
        os.link(path, part)
    except OSError:  # not every file system has links
        shutil.copyfile(path, part)
        _sync(part)
    os.replace(part, place)


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    elif os.path.lexists(path):
        path.unlink()


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        if path.name != LOCK:
            _delete(path)


def _sync(path: Path) -> None:
    """Have a file or folder reach the disk; not every file system can say so of a folder."""
    lock = os.open(path, os.O_RDONLY)
    try:
        os.fsync(lock)
    except OSError:
        if not path.is_dir():
            raise
    finally:
        os.close(lock)


def _state(path: Path) -> tuple[Path, list[tuple[str, int, int]]]:
    """Where a folder's content is, and which files those are: another after every change."""
    at = current(path)
    try:
        with os.scandir(at) as found:
            seen = [(e.name, e.stat()) for e in found if e.is_file() and not e.name.startswith(".infuse.")]
    except OSError:
        return at, []
    return at, sorted((name, stat.st_ino, stat.st_mtime_ns) for name, stat in seen)

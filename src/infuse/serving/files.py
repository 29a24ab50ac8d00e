"""Adapter files as a server reads them: whole, by content, so that a version names exactly what answers."""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from stat import S_ISREG
from typing import Any

import torch
from torch import nn

from infuse import storage
from infuse.adapter import Adapter
from infuse.checkpoint import attach_bundle, facts_of, read_content, setup_of
from infuse.errors import InfuseError
from infuse.fingerprint import Base
from infuse.formats.bundle import WEIGHTS
from infuse.formats.tensors import read_safetensors
from infuse.heads import Head
from infuse.method import make, spelled
from infuse.model import detach, store_of
from infuse.training.folders import ADAPTER, adapter_folder

Stamp = tuple[tuple[int, int, int], ...]
"""Inode, time of change and size of an adapter's files: when these are the same, so is the content."""


@dataclass(frozen=True)
class File:
    """The content of an adapter's file and of its members' files."""

    path: Path
    content: bytes
    facts: dict[str, Any]
    members: tuple["File", ...] = ()

    @property
    def version(self) -> str:
        """The first 12 hexadecimal digits of the content's SHA-256."""
        sha = hashlib.sha256(self.content)
        for member in self.members:
            sha.update(member.version.encode())
        return sha.hexdigest()[:12]

    @property
    def head(self) -> Head:
        """The head's labels and rules, without its weights."""
        with torch.device("meta"):
            return Head(**self.facts["head"])

    @property
    def bytes(self) -> int:
        return len(self.content) + sum(member.bytes for member in self.members)


@dataclass(frozen=True)
class Facts:
    """What a server tells of an adapter without loading it."""

    version: str
    method: str
    base: str
    labels: tuple[str, ...]
    multi: bool
    metrics: dict[str, Any]
    bytes: int
    temperature: float
    threshold: float
    max_length: int
    trained_on: str
    precision: str


def valid(name: str) -> bool:
    """Whether this can be the name of an adapter's folder, and of nothing outside of the root."""
    sound = 0 < len(name) <= 128 and name[0] != "." and all(c.isalnum() or c in "_-+,. " for c in name)
    return sound and len(name.encode()) <= 200  # file systems take 255 bytes, and writing needs a few beside


def find(root: Path, name: str | None = None) -> Iterator[tuple[str, Path, Stamp]]:
    """Name, folder and stamp of every adapter in ``root`` (or of one); runs that still train are left out.

    A folder that can't be entered may be an adapter's: :func:`read` says what is wrong with it.

    Raises:
        OSError: the root itself can't be read.
    """
    for child in [root / name] if name is not None else sorted(root.iterdir()):
        if not valid(child.name):
            continue
        folder = child
        try:
            folder = adapter_folder(child)
            if not S_ISREG(os.stat(storage.current(folder) / WEIGHTS).st_mode):
                continue
        except (InfuseError, FileNotFoundError, NotADirectoryError):
            continue
        except OSError:
            child.lstat()  # fails if it is the root that can't be entered, which tells nothing of its children
        yield child.name, folder, stamp(folder)


def tidy(root: Path) -> None:
    """End or undo what processes that were killed have begun to write; those that live are left alone."""
    for child in root.iterdir():
        for folder in (child, child / ADAPTER):
            with suppress(InfuseError, OSError):
                if storage.in_use(folder):
                    with storage.writing(folder):
                        pass


def stamp(folder: Path) -> Stamp:
    try:
        now = storage.current(folder)
        seen = [os.stat(path) for path in [now / WEIGHTS, *sorted(now.glob(f"members/*/{WEIGHTS}"))]]
    except OSError:  # just removed
        return ()
    return tuple((each.st_ino, each.st_mtime_ns, each.st_size) for each in seen)


def read(folder: Path) -> File:
    """The files of an adapter, members included: all of them of one time, even while they are replaced.

    Raises:
        InfuseError: a file is missing, unreadable, or not Infuse's.
    """
    try:
        return storage.reading(folder, _read)
    except OSError as error:
        raise InfuseError(f"{folder.name} can't be read: {error.strerror}.") from None


def _read(folder: Path) -> File:
    file = _alone(folder)
    members = tuple(_alone(folder / "members" / name) for name in file.facts["members"])
    if any(member.facts["members"] for member in members):
        raise InfuseError(f"{file.path.name} mixes adapters that are mixtures themselves.")
    return replace(file, members=members)


def _alone(folder: Path) -> File:
    path = folder / WEIGHTS
    content = read_safetensors(path)
    return File(path, content, facts_of(content, path))


def facts(file: File, base: Base | None) -> Facts:
    """What a file says about itself, checked: it has a head that can be served, and was made for ``base``.

    Raises:
        InfuseError: with the reason why this adapter can't be served.
    """
    try:
        return _facts(file, base)
    except InfuseError:
        raise
    except Exception as error:  # of any type: the words are those of whoever wrote the file
        raise InfuseError(f"its description is damaged ({type(error).__name__}: {error}).") from None


def _facts(file: File, base: Base | None) -> Facts:
    head, trained, info = file.facts["head"], file.facts["base"], file.facts["info"]
    if head is None:
        raise InfuseError("it has no classification head; train it with infuse train.")
    if head.get("kind") == "hf":
        raise InfuseError(
            "its head is the base model's own (hf), one per process; train it with head: cosine or linear."
        )
    method = make(file.facts["method"])
    if method.unfreezes:
        raise InfuseError("full fine-tuning made a base model of its own, not an adapter.")
    if base is not None and trained["digest"] != base.digest:
        raise InfuseError(
            f"it was trained on {trained['name']!r} ({trained['type']}), and this server runs "
            f"{base.name!r} ({base.type}); start another server for it."
        )
    setup = setup_of(file.facts, file.path)
    found = Facts(
        version=file.version,
        method=spelled(method),
        base=trained["name"],
        labels=tuple(map(str, head["labels"])),
        multi=head["multi"],
        metrics=dict(info.get("metrics", {})),
        bytes=file.bytes,
        temperature=head["temperature"],
        threshold=head["threshold"],
        max_length=setup.max_length,
        trained_on=setup.base,
        precision=setup.precision,
    )
    json.dumps(asdict(found), allow_nan=False, ensure_ascii=False).encode()
    return found


def attach(model: nn.Module, file: File, name: str) -> Adapter:
    """Attach an adapter and its members, under names of their own; all of them or none."""
    members = [f"{name} {i}" for i in range(len(file.members))]
    try:
        for member, each in zip(members, file.members, strict=True):
            attach(model, each, member)
        bundle = read_content(model, file.content, file.path)
        bundle.members = members
        return attach_bundle(model, bundle, name)
    except BaseException:
        remove(model, name)
        raise


def remove(model: nn.Module, name: str) -> None:
    """Detach an adapter and its members; what is not there is no error."""
    try:
        have = store_of(model).adapters
    except InfuseError:
        return
    mine = [each for each in have if each == name or each.startswith(f"{name} ")]
    for each in sorted(mine, key=len):  # a mixer before its members
        detach(model, each)

"""Which files of a folder are which split: by the names that people, and the hub, give them."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from infuse.errors import InfuseError, listed

SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev", "eval", "evaluation"),
    "test": ("test", "testing"),
}
"""What the three splits are called, in any case; the first name is the one that Infuse uses."""
NO_DATA = frozenset({"config.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"})
"""What data sets keep beside their rows."""
SHARD = re.compile(r"(.+)-(\d+)-of-(\d+)(-[0-9a-f]+)?")
NUMBERED = re.compile(r"(.*\D)(\d+)")


class NoSplitError(InfuseError):
    """The source exists but has no split of the name asked for."""


@dataclass(frozen=True)
class Part:
    """Files that belong together: one, the shards or numbered parts of one, or those of a split's own folder."""

    name: str
    files: tuple[Path, ...]

    @property
    def words(self) -> set[str]:
        return set(re.split(r"[-._ 0-9]+", self.name.lower()))

    def __str__(self) -> str:
        return self.files[0].name if len(self.files) == 1 else f"{self.name} ({len(self.files)} files)"


def canonical(split: str) -> str:
    """``validation`` for ``dev`` and the like; any other name as it is."""
    return next((known for known, names in SPLITS.items() if split.lower() in names), split)


def split_files(folder: Path, split: str, suffixes: Collection[str]) -> tuple[Path, ...]:
    """The files of a folder's split, in order.

    A file (or folder) that is called like the split goes before one whose name has that word in it, as ``my_dev.csv``.

    Raises:
        NoSplitError: no file is of that name.
        InfuseError: several could be it, or shards are missing.
    """
    parts = _parts(folder, suffixes)
    known = canonical(split)
    names = SPLITS.get(known, (split.lower(),))
    called = [part for part in parts if part.name.lower() in names]
    if split != known and (same := [part for part in called if part.name.lower() == split.lower()]):
        called = same  # asked for by that very name
    if not called and known in SPLITS:
        called = [part for part in parts if _family(part) == {known}]
    if not called and known == "train" and len(free := [part for part in parts if not _family(part)]) == 1:
        called = free
    if not called:
        there = [str(part) for part in parts]
        raise NoSplitError(f"{folder} has no {split}.csv (its data files: {listed(there)}): add it, or name a file.")
    if len(called) > 1:
        raise InfuseError(
            f"{folder} has several files that could be its {known} split ({listed(called)}): keep one, rename the "
            "others, or name the file that you mean instead of the folder."
        )
    return called[0].files


def odd_names(
    folder: Path, taken: Mapping[str, Sequence[Path]], given: Iterable[Path], suffixes: Collection[str]
) -> list[str]:
    """What to tell of a folder's files: which is a split by a part of its name only, and which are not used.

    Args:
        taken: the files of each split that come from the folder by their names.
        given: files that are used because somebody named them.
    """
    used = {path.resolve() for path in (*given, *(path for files in taken.values() for path in files))}
    usual = {name for names in SPLITS.values() for name in names}
    parts = _parts(folder, suffixes)
    warnings = [
        f"{part} of {folder} is taken for the {split} split, by its name: rename it if it is not."
        for split, files in taken.items()
        for part in parts
        if part.files == files and part.name.lower() not in usual
    ]
    unused = [str(part) for part in parts if not any(path.resolve() in used for path in part.files)]
    unused += [part.files[0].name for part in _unreadable(folder, suffixes) if _family(part)]
    if unused:
        what = "is no split and is" if len(unused) == 1 else "are no splits and are"
        warnings.append(
            f"{listed(unused)} of {folder} {what} not used: give the path to use one, or name it after a split."
        )
    return warnings


def _family(part: Part) -> set[str]:
    """The splits that a name speaks of."""
    return {split for split, names in SPLITS.items() if part.words & set(names)}


def _parts(folder: Path, suffixes: Collection[str]) -> list[Part]:
    """All data of a folder, of the folder ``data`` in it, and of folders in both that are called like a split."""
    above = [folder, *(path for path in [folder / "data"] if path.is_dir())]
    inner = [path for place in above for path in sorted(place.iterdir()) if path.is_dir()]
    found = [part for place in above for part in _joined(_files(place, suffixes))]
    for place in inner:
        if canonical(place.name) in SPLITS and (files := _files(place, suffixes)):
            found.append(Part(place.name, tuple(files)))
    return found


def _files(folder: Path, suffixes: Collection[str]) -> list[Path]:
    return sorted(
        path
        for path in folder.iterdir()
        if path.suffix.lower() in suffixes and path.is_file() and path.name[0] not in "._~" and path.name not in NO_DATA
    )


def _unreadable(folder: Path, suffixes: Collection[str]) -> list[Part]:
    files = sorted(path for path in folder.iterdir() if path.is_file() and path.suffix.lower() not in suffixes)
    return [Part(path.stem, (path,)) for path in files if path.name[0] not in "._~"]


def _joined(files: Sequence[Path]) -> list[Part]:
    """Files one by one, but for shards (``train-00000-of-00002``) and parts that are numbered on (``train_1``, …)."""
    shards: defaultdict[tuple[str, str, str], list[tuple[int, Path]]] = defaultdict(list)
    numbered: defaultdict[tuple[str, str], list[tuple[int, Path]]] = defaultdict(list)
    parts = []
    for path in files:
        if match := SHARD.fullmatch(path.stem):
            shards[match[1], match[3], path.suffix].append((int(match[2]), path))
        elif match := NUMBERED.fullmatch(path.stem):
            numbered[match[1], path.suffix].append((int(match[2]), path))
        else:
            parts.append(Part(path.stem, (path,)))
    for (name, count, suffix), found in shards.items():
        if [number for number, _ in sorted(found)] != list(range(min(int(count), len(found) + 1))):
            raise InfuseError(
                f"{found[0][1].parent} has {len(found)} files {name}-…-of-{count}{suffix}, which are not the {count} "
                "that belong together: copy all of them, each once."
            )
        parts.append(_ordered(name, found))
    for (name, _), found in numbered.items():
        numbers = [number for number, _ in sorted(found)]
        if len(found) > 1 and numbers[0] in (0, 1) and numbers == list(range(numbers[0], numbers[0] + len(found))):
            parts.append(_ordered(name.rstrip("-._ "), found))
        else:
            parts += [Part(path.stem, (path,)) for _, path in found]
    return parts


def _ordered(name: str, found: Iterable[tuple[int, Path]]) -> Part:
    return Part(name, tuple(path for _, path in sorted(found)))

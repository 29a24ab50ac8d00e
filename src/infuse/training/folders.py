"""Run folders: where things are in them, and the settings that they tell."""

import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from infuse import storage
from infuse.errors import InfuseError, listed
from infuse.escaping import csv_text
from infuse.formats.bundle import WEIGHTS
from infuse.formats.content import read_bytes
from infuse.plain_yaml import read_yaml
from infuse.training.config import TrainConfig

ADAPTER, AVERAGE, CHECKPOINTS, CONFIG, MODEL = "adapter", "adapter-average", "checkpoints", "config.yaml", "model"
_SETTINGS_BYTES = 128 << 10
"""Of a file of settings, which YAML's reader takes a second for; ours have two thousand."""
METRICS = "metrics.json"
"""What a finished run has; beside :data:`CHECKPOINTS` it is an older one, which stays until the new one is whole."""


def adapter_folder(path: str | Path) -> Path:
    """The adapter in a run folder, or the folder itself if it is an adapter's; an error for an unfinished run."""
    folder = Path(path)
    if (folder / CHECKPOINTS).exists() and not ended(folder):
        raise InfuseError(
            f"The run in {folder} still trains or was interrupted; wait for it, or give its command again to finish it."
        )
    return folder / ADAPTER if (storage.current(folder) / ADAPTER).is_dir() else folder


def ended(folder: Path) -> bool:
    """Whether a folder holds a finished run, which another one may be about to replace."""
    return (storage.current(folder) / METRICS).exists()


def owner(adapter: Path) -> Path:
    """The folder whose lock (:func:`infuse.storage.writing`) guards an adapter: its run's, if it belongs to one."""
    return adapter.parent if adapter.name == ADAPTER and ended(adapter.parent) else adapter


def saved_adapter(path: str | Path) -> Path:
    """:func:`adapter_folder`, or an error that says what is there instead of an adapter."""
    folder = Path(path)
    if not folder.is_dir():
        what = f"{folder} is a file" if folder.exists() else f"There is no folder {folder}"
        raise InfuseError(f"{what}; give a run folder, or an adapter's folder.")
    adapter = adapter_folder(folder)
    if not (storage.current(adapter) / WEIGHTS).is_file():
        inside = sorted([*folder.glob(f"*/{WEIGHTS}"), *folder.glob(f"*/{ADAPTER}/{WEIGHTS}")])
        runs = [folder / path.relative_to(folder).parts[0] for path in inside if path.is_file()]
        done = [run for run in runs if ended(run) or not (run / CHECKPOINTS).exists()]
        hint = f" in it, such as {done[0]}" if done else ""
        raise InfuseError(f"{adapter} holds no {WEIGHTS}; give a run folder{hint}, or an adapter's folder.")
    return adapter


def data_of(run: str | Path) -> dict[str, Any]:
    """Where ``config.yaml`` in a run folder says that its rows come from; empty if it is damaged or not there."""
    found = read_settings(storage.current(Path(run)) / CONFIG) or {}
    names = ("data", "validation", "test", "text", "label", "multi", "validation_fraction", "seed")
    about = {name: found[name] for name in names if name in found}
    try:
        TrainConfig(**about).check()
    except InfuseError:
        return {}
    return about if "data" in about else {}


def read_settings(path: Path) -> dict[str, Any] | None:
    """What a file of :func:`as_yaml` says; ``None`` if it is damaged."""
    try:
        found = read_yaml(read_bytes(path, _SETTINGS_BYTES).decode())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def as_yaml(config: Any) -> str:
    """A dataclass of settings as YAML that the command line reads back."""
    plain = {k: _plain(v) for k, v in asdict(config).items() if k != "config"}
    return yaml.safe_dump(plain, sort_keys=False)


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(each) for each in value]
    return str(value) if isinstance(value, Path) else value


def changed(config: Any, path: Path, free: Sequence[str] = ("out", "overwrite")) -> list[str]:
    """The settings that differ from those that the same command wrote into a file, but for those that may.

    Raises:
        InfuseError: the file is damaged.
    """
    before, now = read_settings(path), yaml.safe_load(as_yaml(config))
    if before is None:
        raise InfuseError(
            f"{path} is damaged, so that nobody can tell which settings it had; choose another --out, or pass "
            "--overwrite."
        )
    return [name for name in now if name not in free and before.get(name) != now[name]]


def config_file(folder: Path) -> Path:
    """Where the settings of the run in the folder are: a run that has not ended keeps them beside its checkpoints."""
    begun = folder / CHECKPOINTS / CONFIG
    return begun if begun.exists() else storage.current(folder) / CONFIG


def check_folder(folder: Path, ours: bool) -> Path:
    """The folder, if a command may write into it: it is not there yet, empty, or ours, written by the same command."""
    if folder.exists() and not folder.is_dir():
        raise InfuseError(f"{folder} is a file; choose another folder to write.")
    above = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise InfuseError(f"{above} is no folder that can be written into; choose another folder to write.")
    names = sorted({path.name for path in folder.iterdir()} - storage.RESERVED) if folder.exists() else []
    if names and not ours:
        raise InfuseError(f"{folder} holds other files ({listed(names, 3)}); choose an empty or new folder.")
    return folder


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    storage.write(path, csv_text([*rows[:1], *([row.get(name, "") for name in rows[0]] for row in rows)]))

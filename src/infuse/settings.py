"""What the settings of all commands share: they may come from a YAML file, and hold what their annotations say."""

import os
from collections.abc import Iterable
from dataclasses import MISSING, dataclass, fields
from numbers import Integral, Real
from pathlib import Path
from shlex import quote
from types import UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

import tyro
import yaml

from infuse.errors import InfuseError, listed
from infuse.method import make, spelled
from infuse.plain_yaml import read_yaml

METHODS = frozenset({"method", "methods"})
"""The settings that name methods; in YAML they may be mappings, and the help of a command with one lists all."""


@dataclass(kw_only=True)
class FromFile:
    """Settings that a file may give."""

    config: Path | None = None
    """A YAML file of these settings; what is given here goes before what it says."""


def check_kinds(config: Any, names: Iterable[str] | None = None) -> None:
    """Raise :class:`InfuseError` if a field of a dataclass of settings does not hold what its annotation says; with
    ``names``, only these are looked at."""
    hints = get_type_hints(type(config))
    for name in [field.name for field in fields(config)] if names is None else names:
        hint, value = hints[name], getattr(config, name)
        if not _fits(value, hint):
            shown = repr(list(value) if isinstance(value, tuple) else value)  # as the file says it
            shown = shown if len(shown) <= 100 else f"{shown[:99]}…"
            raise InfuseError(f"{name} must be of the kind {_kind(hint)}, not {shown}.")
        if isinstance(value, str | Path) and "\0" in str(value):
            raise InfuseError(f"{name} holds a zero byte, which no name can: {str(value)!r}.")


def _kind(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return listed(get_args(hint))
    if get_origin(hint) is tuple:
        return f"list of {_kind(get_args(hint)[0])}"
    return getattr(hint, "__name__", str(hint))


def _fits(value: Any, hint: Any) -> bool:
    if get_origin(hint) is Literal:
        return value in get_args(hint)
    if isinstance(hint, UnionType):
        return any(_fits(value, part) for part in get_args(hint))
    if get_origin(hint) is tuple:
        return isinstance(value, tuple) and all(_fits(each, get_args(hint)[0]) for each in value)
    wanted = {int: Integral, float: Real}.get(hint, hint)  # numpy's numbers too
    return isinstance(value, wanted) and (hint is bool or not isinstance(value, bool))


def from_yaml(kind: type, path: Path) -> Any:
    """Settings of a kind from a YAML file; required ones that it leaves out stay open for the command line to fill.

    Raises:
        InfuseError: the file can't be read, or names a setting that there is not, or gives one a value of another kind.
    """
    try:
        values = read_yaml(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InfuseError(f"The config {path} can't be read: {error}.") from None
    known = {f.name: f for f in fields(kind) if f.name != "config"}
    if isinstance(values, dict):  # learning-rate is learning_rate, as it is among flags
        values = {k.replace("-", "_") if isinstance(k, str) else k: v for k, v in values.items()}
    unknown = [k for k in values if k not in known] if isinstance(values, dict) else ["no mapping at all"]
    if unknown:
        odd = listed(unknown)
        raise InfuseError(f"The config {path} has unknown settings ({odd}); the settings are {listed(known, 40)}.")
    hints = get_type_hints(kind)
    required = [f.name for f in known.values() if f.default is MISSING and f.default_factory is MISSING]
    try:
        values = {name: _read(value, hints[name], name) for name, value in values.items()}
        config = kind(**dict.fromkeys(required, tyro.MISSING) | values)
        check_kinds(config, values)  # what their values may be is checked once the command line has filled the rest
    except InfuseError as error:
        raise InfuseError(f"In {path}, {error}") from None
    return config


def _read(value: Any, hint: Any, name: str) -> Any:
    """What YAML gave, as the kind that a setting has; what it can't be stays, for :func:`check_kinds` to refuse."""
    kinds = get_args(hint) if isinstance(hint, UnionType) else (hint,)
    if name in METHODS and isinstance(value, dict):
        return spelled(make(value))
    if name == "space" and isinstance(value, dict):
        return (yaml.safe_dump(value, default_flow_style=True, sort_keys=False),)
    if get_origin(hint) is tuple and isinstance(value, list):
        return tuple(_read(each, get_args(hint)[0], name) for each in value)
    if Path in kinds and isinstance(value, str):
        return Path(os.path.expanduser(value))  # as shells do on the command line
    if float in kinds and isinstance(value, int | str) and not isinstance(value, bool):  # YAML reads 1e-3 as a string
        try:
            return float(value)
        except (ValueError, OverflowError):
            raise InfuseError(f"{name} should be a number, not {value!r}.") from None
    return value


def command(name: str, config: Any) -> str:
    """The command line that gives a dataclass of settings: only what is off its default."""
    words = ["infuse", name]
    for field in fields(config):
        value = getattr(config, field.name)
        if value == field.default or field.name == "config":
            continue
        flag = field.name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            words += [f"--{flag}", *map(quote, map(str, value if isinstance(value, tuple) else (value,)))]
    return " ".join(words)

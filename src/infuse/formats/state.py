"""Checkpoints of a whole adapted model (``Trainer``, ``save_pretrained``): the adapters among their tensors.

Beside the base's weights these hold the adapters under ``infuse.adapters.NAME``, and what they are under
``infuse._extra_state`` (see :meth:`infuse.store.Infused.get_extra_state`).
"""

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from infuse.adapter import dotted
from infuse.errors import InfuseError, listed
from infuse.formats.content import check_names, is_file, parse_json, read_json
from infuse.formats.native import HEAD, parse_facts

WHOLE, SHARDS = "model.safetensors", "model.safetensors.index.json"
_KEY = re.compile(r"(?:[\w.]+\.)?infuse\.(.+)")


def is_state(folder: Path) -> bool:
    """Whether a folder holds a model's weights as transformers writes them."""
    return is_file(folder / WHOLE) or is_file(folder / SHARDS)


def read_state(folder: Path, name: str | None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and facts of one adapter of a checkpoint, as Infuse's own files have them.

    Args:
        folder: of the checkpoint.
        name: of the adapter; without such a one, the only one is taken, or the one that was active.
    Raises:
        InfuseError: the checkpoint is damaged, holds no adapters, or does not say which one is meant.
    """
    tensors, where = _tensors(folder), folder / WHOLE
    if "_extra_state" not in tensors:
        raise InfuseError(
            f"{folder} holds a model without adapters: load it with from_pretrained, or give an adapter's folder."
        )
    about = parse_json(bytes(tensors.pop("_extra_state").tolist()), where, "has a damaged description")
    adapters = about.get("adapters")
    if not isinstance(adapters, dict) or not adapters:
        raise InfuseError(f"The description of the adapters in {where} is damaged: save the checkpoint again.")
    chosen = next(
        (n for n in (name, *([*adapters] if len(adapters) == 1 else []), about.get("active")) if n in adapters), None
    )
    if chosen is None:
        raise InfuseError(f"{folder} holds the adapters {listed(adapters)}: give the name of one of them.")
    facts = {"version": 1, "layout": "native", **dict(adapters[chosen]), "base": about.get("base")}
    prefix = f"adapters.{chosen}."
    own = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
    return dict(_native(own)), parse_facts(json.dumps(facts), where)


def _native(tensors: dict[str, Tensor]) -> Iterable[tuple[str, Tensor]]:
    for key, value in tensors.items():
        kind, _, rest = key.partition(".")
        if kind == "deltas":
            site, _, parameter = rest.rpartition(".")
            yield f"deltas.{dotted(site)}.{parameter}", value
        elif kind == "copies":
            path, _, parameter = rest.partition(".")
            yield f"copies.{dotted(path)}/{parameter}", value
        else:
            yield (HEAD + rest if kind == "head" else key), value


def _tensors(folder: Path) -> dict[str, Tensor]:
    """The tensors of all adapters of a checkpoint; those of the base aren't read."""
    files = [folder / WHOLE]
    if is_file(folder / SHARDS):
        shards = read_json(folder / SHARDS).get("weight_map")
        shards = shards if isinstance(shards, dict) else {}
        files = [folder / str(n) for n in sorted({v for k, v in shards.items() if _KEY.fullmatch(k)})]
        check_names([file.name for file in files], folder / SHARDS)
    tensors = {}
    for file in files:
        if not is_file(file) or file.parent != folder:
            raise InfuseError(f"There is no file {file.name} in {folder}: save the checkpoint again.")
        try:
            with safe_open(file, "pt") as content:
                names = {match[1]: key for key in content.keys() if (match := _KEY.fullmatch(key))}  # noqa: SIM118  # no dict
                check_names(names, file)
                tensors |= {name: content.get_tensor(key).clone() for name, key in names.items()}
        except (SafetensorError, ValueError, RuntimeError) as error:
            if isinstance(error, InfuseError):
                raise
            raise InfuseError(f"{file} is truncated or no safetensors file ({error}): save it again.") from None
    return tensors

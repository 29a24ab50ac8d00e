"""What a file of an adapter holds, whoever wrote it; and the writing of such files, safely."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as to_safetensors
from torch import Tensor, nn

from infuse import storage
from infuse.arch import ROLES
from infuse.errors import InfuseError
from infuse.method import Method, Params
from infuse.sites import Site

WEIGHTS, PICKLED = "adapter_model.safetensors", "adapter_model.bin"
CONFIG = "adapter_config.json"
UNNAMED = "an unnamed base"
HUB_WEIGHTS = ("adapter.safetensors", "pytorch_adapter.bin")
HUB_HEAD, HUB_HEAD_WEIGHTS = "head_config.json", ("model_head.safetensors", "pytorch_model_head.bin")
HUB_FUSION = "adapter_fusion_config.json"
HUB_FUSION_WEIGHTS = ("model_adapter_fusion.safetensors", "pytorch_model_adapter_fusion.bin")
FILES = frozenset(
    (WEIGHTS, PICKLED, CONFIG, *HUB_WEIGHTS, HUB_HEAD, *HUB_HEAD_WEIGHTS, HUB_FUSION, *HUB_FUSION_WEIGHTS)
)
"""Every file that an adapter may have, in any format: one that a save leaves behind would be read with the new ones."""


@dataclass
class Bundle:
    """An adapter as read from a file, matched to a model but not yet attached to it.

    Attributes:
        method: the settings of the adapter as a whole.
        deltas: site, its method (settings may differ from site to site), and its tensors.
        shared: tensors that all deltas share.
        copies: module path → tensors, for modules of which the adapter trained its own copy.
        head: the Infuse head, if the file has one.
        base: what the file says about its base model: ``name``, ``type``, ``digest``.
        info: facts that travel with the adapter.
        members: names of the adapters that a mixer mixes.
        name: the name under which it was saved.
    """

    method: Method
    deltas: list[tuple[Site, Method, Params]]
    shared: dict[str, Tensor] = field(default_factory=dict)
    copies: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    head: nn.Module | None = None
    base: dict[str, str] | None = None
    info: dict[str, Any] = field(default_factory=dict)
    name: str = "default"
    members: list[str] = field(default_factory=list)


def to_bytes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> bytes:
    """The content of a ``.safetensors`` file: of equal tensors and metadata, always the same bytes.

    (safetensors writes the metadata in another order each time.)
    """
    plain = {name: value.detach().cpu().contiguous() for name, value in sorted(tensors.items())}
    content = to_safetensors(plain, dict(metadata) if metadata else None)
    end = 8 + int.from_bytes(content[:8], "little")
    head = json.loads(content[8:end])
    if metadata:
        head["__metadata__"] = dict(sorted(metadata.items()))
    text = json.dumps(head, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + content[end:]


def as_json(facts: Any) -> str:
    """JSON whose keys are in order, so that equal facts are equal bytes."""
    return json.dumps(json.loads(json.dumps(facts)), sort_keys=True)  # twice: keys become strings, which have an order


def write_folder(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write the files of an adapter into a folder, all at once: a reader sees those of the old or of the new one.

    Files of an earlier adapter that are not among them go; files of others stay. A name may be a path in the folder.
    """
    if folder.exists() and not folder.is_dir():
        raise InfuseError(f"{folder} is a file; give the path of a folder to save the adapter in.")
    with storage.writing(folder, wait=storage.PATIENCE), storage.replacing(folder, FILES) as new:
        write_files(new, files)


def write_files(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write files into a folder that nobody reads yet."""
    for name, content in files.items():
        if not (folder / name).parent.is_dir():
            with storage.reported(folder):
                (folder / name).parent.mkdir(parents=True)
        storage.write(folder / name, content)


def roles_of(sites: Iterable[Site]) -> tuple[str, ...]:
    """The roles under which a method selects these sites: one of both for a role and its cross-attention twin."""
    roles = {site.role for site in sites}
    roles = {r.removeprefix("cross_") if r.removeprefix("cross_") in roles else r for r in roles}
    return tuple(r for r in ROLES if r in roles)


def fitted(
    name: str, value: Tensor, shape: torch.Size, why: str = "the adapter was made for another base model"
) -> Tensor:
    """``value`` in the shape that the model asks for, apart from dimensions of one; else an error with both and why."""
    if [d for d in value.shape if d != 1] != [d for d in shape if d != 1]:
        raise InfuseError(
            f"{name} in the file has shape {tuple(value.shape)}, but this model needs {tuple(shape)}: {why}."
        )
    if not value.is_floating_point():
        raise InfuseError(f"{name} in the file holds {value.dtype} values; an adapter's are floating-point numbers.")
    return value.float().reshape(shape)

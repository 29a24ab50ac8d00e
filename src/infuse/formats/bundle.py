"""What a file of an adapter holds, whoever wrote it; and the writing of such files, safely."""

import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

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


def write_folder(folder: Path, files: Mapping[str, bytes], *, whole: bool = True) -> None:
    """Write files into a folder so that a reader sees each old or new, whole; the last one is replaced last.

    A new folder appears complete or not at all. If the files are a ``whole`` adapter, those of an earlier one that are
    not among them go before the last is replaced, so that it is never read with them; files of others stay.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    if folder.exists() and not folder.is_dir():
        raise InfuseError(f"{folder} is a file; give the path of a folder to save the adapter in.")
    staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        for name, content in files.items():
            with open(staging / name, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        if not folder.exists():
            staging.chmod(0o755)
            staging.rename(folder)
            return
        *others, last = files
        for name in others:
            os.replace(staging / name, folder / name)
        for name in FILES.difference(files) if whole else ():
            (folder / name).unlink(missing_ok=True)
        os.replace(staging / last, folder / last)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


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

"""What a file of an adapter holds, whoever wrote it; and the reading and writing of such files, safely."""

import io
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as from_safetensors
from safetensors.torch import save as to_safetensors
from torch import Tensor, nn

from infuse import storage
from infuse.arch import ROLES
from infuse.errors import InfuseError, listed
from infuse.method import Method, Params
from infuse.sites import Site

WEIGHTS, PICKLED = "adapter_model.safetensors", "adapter_model.bin"
CONFIG = "adapter_config.json"
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


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and header metadata of a ``.safetensors`` file, or tensors of a ``.bin`` file; nothing is unpickled.

    Raises:
        InfuseError: the file is missing, truncated, corrupt, holds objects, or holds values that are not finite.
    """
    content = read_bytes(path)
    if path.suffix == ".safetensors":
        return parse_tensors(content, path)
    try:
        tensors = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:
        # torch.load reports hostile and broken files through many types; its message may run to paragraphs.
        reason = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
        raise InfuseError(f"{path} can't be read as plain tensors ({reason}); Infuse never unpickles a file.") from None
    if not isinstance(tensors, Mapping) or not all(isinstance(t, Tensor) for t in tensors.values()):
        raise InfuseError(f"{path} holds something other than named tensors.")
    return _finite(dict(tensors), path), {}


def read_bytes(path: Path) -> bytes:
    """The content of a file, or an error that names the file."""
    if not path.is_file():
        raise InfuseError(f"There is no file {path.name} in {path.parent}.")
    return path.read_bytes()


def parse_tensors(content: bytes, path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors, by name, and header metadata of the content of a ``.safetensors`` file; the tensors are copies.

    (safetensors gives them in another order each time. Tensors that are read through a memory map would end the process
    if the file were cut short later on.)
    """
    try:
        tensors = dict(sorted(from_safetensors(content).items()))
    except (SafetensorError, ValueError, TypeError, KeyError, RuntimeError) as error:
        raise InfuseError(f"{path} is truncated or no safetensors file ({error}); save or download it again.") from None
    return _finite(tensors, path), parse_metadata(content, path)


def parse_metadata(content: bytes, path: Path) -> dict[str, str]:
    """The header metadata of the content of a ``.safetensors`` file: eight bytes of length, then JSON."""
    length = int.from_bytes(content[:8], "little")
    try:
        head = json.loads(content[8 : 8 + length].decode())
        return {str(k): str(v) for k, v in head.get("__metadata__", {}).items()}
    except (ValueError, AttributeError, RecursionError) as error:
        raise InfuseError(f"{path} is truncated or no safetensors file ({error}); save or download it again.") from None


def _finite(tensors: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    try:  # as float32, which parameters are in memory: there a large float64 is infinite
        broken = [name for name, t in tensors.items() if t.is_floating_point() and not t.float().isfinite().all()]
    except RuntimeError as error:  # torch stores numbers in formats that it can't compute with
        raise InfuseError(f"{path} holds numbers that can't be read ({error}); save the adapter in float32.") from None
    if broken:
        raise InfuseError(f"{path} holds NaN or infinite values in {listed(broken, 3)}; train the adapter again.")
    return tensors


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file, or an error that names the file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InfuseError(f"There is no file {path.name} in {path.parent}.") from None
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise InfuseError(f"{path} is no valid JSON ({error}); save or download it again.") from None
    if not isinstance(value, dict):
        raise InfuseError(f"{path} should hold a JSON object, not a {type(value).__name__}.")
    return value


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

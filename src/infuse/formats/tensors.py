"""Files of tensors: safetensors, and PyTorch's own, of which nothing is unpickled but plain tensors."""

import io
import pickletools
import re
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as from_safetensors
from torch import Tensor, nn

from infuse.errors import InfuseError, listed
from infuse.formats.content import HEADER_BYTES, check_names, parse_json, read_bytes

_TRUNCATED = "is truncated or no safetensors file"
_GLOBALS = re.compile(r"collections OrderedDict|torch\._utils _rebuild_(tensor_v2|parameter)|torch \w+Storage")
"""What a pickle of plain tensors names."""
_DIMENSIONS = 8


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and header metadata of a ``.safetensors`` file, or tensors of a ``.bin`` file.

    Raises:
        InfuseError: the file is missing, truncated, corrupt, holds objects, tensors that are larger than what they
            store, or values that are not finite.
    """
    if path.suffix == ".safetensors":
        return parse_tensors(read_safetensors(path), path)
    return _parse_pickled(read_bytes(path), path), {}


def read_safetensors(path: Path) -> bytes:
    """The content of a ``.safetensors`` file; only its beginning is read if the header does not fit the file."""
    return read_bytes(path, check=lambda start, size: parse_metadata(start, path, size))


def parse_tensors(content: bytes, path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors, by name, and header metadata of the content of a ``.safetensors`` file; the tensors are copies.

    (safetensors gives them in another order each time. Tensors that are read through a memory map would end the process
    if the file were cut short later on.)
    """
    metadata = parse_metadata(content, path)
    try:
        tensors = dict(sorted(from_safetensors(content).items()))
    except Exception as error:  # of many types, for a header that is not as it should be
        raise InfuseError(f"{path} {_TRUNCATED} ({error}); save or download it again.") from None
    return _finite(tensors, path), metadata


def parse_metadata(content: bytes, path: Path, size: int | None = None) -> dict[str, str]:
    """The header metadata of the content of a ``.safetensors`` file: eight bytes of length, then JSON.

    The names and shapes of the tensors are held to their limits here, before anything is made of them.

    Args:
        size: of the whole file, of which ``content`` may be the beginning.
    """
    length, size = int.from_bytes(content[:8], "little"), size or len(content)
    if length > size - 8:
        raise InfuseError(f"{path} {_TRUNCATED} (its header ends after it); save or download it again.")
    if length > HEADER_BYTES:
        raise InfuseError(f"{path} has a header of {length:,} bytes; an adapter's has at most {HEADER_BYTES:,}.")
    head = parse_json(content[8 : 8 + length], path, _TRUNCATED)
    metadata = head.pop("__metadata__", {})
    check_names(head, path)
    sound = isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())
    if not sound or not all(isinstance(about, dict) and _is_tensor(about) for about in head.values()):
        raise InfuseError(f"{path} {_TRUNCATED} (its header does not describe tensors); save or download it again.")
    if 8 + length + max((about["data_offsets"][1] for about in head.values()), default=0) != size:
        raise InfuseError(f"{path} {_TRUNCATED} (its tensors do not end where it does); save or download it again.")
    return metadata


def _is_tensor(about: dict[str, Any]) -> bool:
    shape, offsets = about.get("shape"), about.get("data_offsets")
    if not isinstance(shape, list) or not isinstance(offsets, list) or len(shape) > _DIMENSIONS or len(offsets) != 2:
        return False
    return all(type(number) is int for number in (*shape, *offsets))


def _parse_pickled(content: bytes, path: Path) -> dict[str, Tensor]:
    """Tensors of a file of ``torch.save``; what it unpickles and how much it stores is known before torch reads it."""
    try:
        _check_pickled(content)
        tensors = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:
        # torch.load reports hostile and broken files through many types; its message may run to paragraphs.
        reason = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
        raise InfuseError(f"{path} can't be read as plain tensors ({reason}); Infuse never unpickles a file.") from None
    if not isinstance(tensors, Mapping) or not all(type(t) in (Tensor, nn.Parameter) for t in tensors.values()):
        raise InfuseError(f"{path} holds something other than named tensors.")
    check_names(tensors, path)
    if odd := [name for name, t in tensors.items() if not _is_plain(t)]:
        raise InfuseError(
            f"{path} holds tensors that are larger than what is stored of them, or of a kind that no adapter has: "
            f"{listed(odd, 3)}; save the adapter as safetensors."
        )
    if sum(t.numel() * t.element_size() for t in tensors.values()) > 4 * len(content):
        raise InfuseError(f"{path} gives the same values to many tensors; save the adapter as safetensors.")
    return _finite(dict(tensors), path)


def _check_pickled(content: bytes) -> None:
    """Refuse what :func:`torch.load` would have to unpack or to construct.

    Raises:
        ValueError: with the reason; of other types, if it is no file of torch's.
    """
    if content.startswith(b"PK\x03\x04"):
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            entries = archive.infolist()
            if len(entries) > 100_100 or any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
                raise ValueError("it is compressed, which torch's files are not")
            if sum(entry.file_size for entry in entries) > len(content):
                raise ValueError("its parts are larger than the file")
            pickles = [io.BytesIO(archive.read(entry)) for entry in entries if entry.filename.endswith(".pkl")]
    else:  # as torch wrote them before 1.6: a pickle after the other, then the values
        whole = io.BytesIO(content)
        pickles = [whole] * 5
    for pickle in pickles:
        for module in _named(pickle):
            if not _GLOBALS.fullmatch(module):
                raise ValueError(f"it names {module[:80]!r}")


def _named(pickle: io.BytesIO) -> Iterator[str]:
    """What a pickle names to be called."""
    start = pickle.tell()
    for number, (operation, argument, position) in enumerate(pickletools.genops(pickle)):
        if number > 1_500_000 or (position or 0) - start > HEADER_BYTES:
            raise ValueError("it has no end")
        if operation.name in ("GLOBAL", "INST"):
            yield str(argument)
        elif operation.name in ("STACK_GLOBAL", "EXT1", "EXT2", "EXT4"):
            yield operation.name


def _is_plain(tensor: Tensor) -> bool:
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
        return False
    stored = tensor.untyped_storage().nbytes()
    return tensor.dim() <= _DIMENSIONS and tensor.numel() * tensor.element_size() <= stored


def _finite(tensors: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    try:  # as float32, which parameters are in memory: there a large float64 is infinite
        broken = [name for name, t in tensors.items() if t.is_floating_point() and not t.float().isfinite().all()]
    except RuntimeError as error:  # torch stores numbers in formats that it can't compute with
        raise InfuseError(f"{path} holds numbers that can't be read ({error}); save the adapter in float32.") from None
    if broken:
        raise InfuseError(f"{path} holds NaN or infinite values in {listed(broken, 3)}; train the adapter again.")
    return tensors

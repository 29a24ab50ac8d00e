"""What the files of a base may say: they come from anywhere, and are looked at before anything is built from them.

No code of a base's own is ever run: neither its Python files (``auto_map``) nor kernels of the hub that it asks for.
"""

import json
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoConfig
from transformers.utils.hub import cached_file

CONFIG, TOKENIZER = "config.json", "tokenizer_config.json"
KERNELS = re.compile(r"_?(attn|experts|attention)_implementation(_internal)?")
"""Settings that may name code of the hub, as ``owner/name`` does."""
LIMITS = (
    (re.compile(r"labels$"), 10**6),
    (re.compile(r"(layers?|blocks?|heads?|groups?|experts?|stages?|depths?)$"), 10**4),
    (re.compile(r"size|dim|embd|embeddings|positions|d_model|d_ff|d_kv|d_inner|ctx"), 2**27),
)
"""What counts something in a config, and how much of it no base has: each is a loop, or a side of a tensor."""
PARAMETERS_PER_BYTE = 16
"""No format packs more parameters into a byte of its files."""
SMALL = 2**28
"""Parameters that any machine can hold: what is wrong with such a base, its weights tell better."""


class UnfitError(ValueError):
    """Why a base can't be used, as the end of a sentence that names it."""


def read_config(source: str) -> Any:
    """The config of a base; any code of its own is left aside.

    Raises:
        UnfitError: it asks for code that is not of transformers, or for what no base has. (And what transformers
            raises for files that are missing or damaged.)
    """
    raw = read_json(source, CONFIG, needed=True) or {}
    _check(raw, CONFIG)
    _check(read_json(source, "generation_config.json") or {}, "generation_config.json")
    if "AutoConfig" in _own_classes(raw) and raw.get("model_type") not in CONFIG_MAPPING:
        _refuse_code(CONFIG)
    return AutoConfig.from_pretrained(source, trust_remote_code=False)


def check_tokenizer(source: str) -> None:
    """Raise :class:`UnfitError` if a tokenizer needs code of its own: no other one knows how it splits texts."""
    raw = read_json(source, TOKENIZER) or {}
    _check(raw, TOKENIZER)
    if "AutoTokenizer" not in _own_classes(raw):
        return
    import transformers

    kind = raw.get("tokenizer_class")
    if not (isinstance(kind, str) and (hasattr(transformers, kind) or hasattr(transformers, f"{kind}Fast"))):
        _refuse_code(TOKENIZER)


def check_size(source: str, outline: nn.Module) -> None:
    """Raise :class:`UnfitError` if a base, outlined without weights, can't be what its files hold, or fits no memory.

    transformers fills tensors that the files lack, of whatever size, before anyone can look at them.
    """
    tensors = [*outline.parameters(), *outline.buffers()]
    count = sum(tensor.numel() for tensor in tensors)
    if count <= SMALL:
        return
    files = [path for path in Path(source).glob("*") if path.suffix in (".safetensors", ".bin")]
    held = sum(path.stat().st_size for path in files)
    if files and count > PARAMETERS_PER_BYTE * held:
        raise UnfitError(f"its {CONFIG} describes {count:,} parameters, and its files hold {held:,} bytes.")
    needed = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    there = psutil.virtual_memory().total + psutil.swap_memory().total
    if needed > there:
        raise UnfitError(
            f"its {count:,} parameters take {needed / 2**30:,.0f} GiB, and this machine has {there / 2**30:,.0f}."
        )


def outlined(auto: Any, config: Any, dtype: torch.dtype) -> nn.Module:
    """A model of a config without weights, on the meta device: it takes no memory, whatever its sizes."""
    with torch.device("meta"):
        return auto.from_config(config, dtype=dtype, trust_remote_code=False)


def read_json(source: str, name: str, needed: bool = False) -> dict[str, Any] | None:
    """A JSON file of a base; ``None`` if it has none, or the hub does not give it."""
    if os.path.isdir(source):
        path = Path(source) / name
        if not path.is_file():
            if needed:
                raise UnfitError(f"that folder has no {name}; give one with a model.")
            return None
    else:
        raises = dict.fromkeys(("missing_entries", "connection_errors", "gated_repo"), needed)
        path = cached_file(source, name, **{f"_raise_exceptions_for_{kind}": which for kind, which in raises.items()})
        if path is None:
            return None
    found = json.loads(Path(path).read_text(encoding="utf-8"))
    if not isinstance(found, dict):
        raise UnfitError(f"its {name} is no JSON object.")
    return found


def _check(raw: dict[str, Any], name: str) -> None:
    for key, value in _settings(raw):
        if KERNELS.fullmatch(key) and "/" in str(value):
            raise UnfitError(
                f"its {name} asks for code of the hub ({key}: {value!r}), which is never run: remove that setting."
            )
        if isinstance(value, float) and math.isnan(value):
            raise UnfitError(f"its {name} says that {key} is not a number: correct it.")
        limit = next((limit for pattern, limit in LIMITS if pattern.search(key)), None)
        if limit is not None and isinstance(value, int) and value > limit:
            raise UnfitError(f"its {name} says that {key} is {value:,}, and no base has more than {limit:,}.")


def _settings(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """All single values of a config, however deep, with the names that they have there."""
    if isinstance(value, dict):
        for name, inner in value.items():
            if KERNELS.fullmatch(name):
                yield name, inner
            yield from _settings(inner, name)
    elif isinstance(value, list):
        for inner in value:
            yield from _settings(inner, key)
    else:
        yield key, value


def _own_classes(raw: dict[str, Any]) -> list[str]:
    """The classes that a base brings in Python files of its own; older tokenizers tell theirs without a name."""
    found = raw.get("auto_map")
    return list(found) if isinstance(found, dict) else ["AutoTokenizer"] if found else []


def _refuse_code(name: str) -> None:
    raise UnfitError(
        f"it needs Python code of its own (auto_map in its {name}), which is never run: choose a base that "
        "transformers knows, or remove auto_map if it does know this one."
    )

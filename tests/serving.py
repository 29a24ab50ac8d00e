"""Folders of adapters for the tests of serving: every method, labels of different numbers, one tiny base."""

from functools import partial
from pathlib import Path
from typing import Any

import torch

import infuse
from infuse.bases import load_base
from infuse.formats.bundle import WEIGHTS
from infuse.heads import Head
from infuse.method import Mixer
from infuse.model import store_of


def fill(
    root: Path, base: str, methods: list[str], seed: int = 0, labels: int = 0, precision: str = "fp32"
) -> list[str]:
    """Write an adapter with random deltas and a random head for every method; their names are NUMBER-METHOD."""
    loaded = load_base(base)
    generator = torch.Generator().manual_seed(seed)
    names = []
    for i, method in enumerate(methods):
        name = f"{i:04}-{method.split(':')[0].replace('+', 'p')}"
        write(loaded, root / name, method, generator, labels or 2 + (seed + i) % 5, precision)
        names.append(name)
    return names


def write(
    loaded, folder: Path, method: str, generator: torch.Generator, labels: int, precision: str = "fp32", **head: Any
) -> None:
    """One adapter of ``method`` with random deltas and a random head (of these settings)."""
    if method == "stack" or isinstance(infuse.make(method), Mixer):
        for member, inner in {"one": "pfeiffer", "two": "lora" if method == "stack" else "pfeiffer"}.items():
            infuse.attach(loaded.model, inner, member)
            _scatter(loaded.model, member, generator)
        join = infuse.stack if method == "stack" else partial(infuse.fuse, method=method)
        adapter = join(loaded.model, ["one", "two"], name="adapter")
    else:
        adapter = infuse.attach(loaded.model, method, "adapter")
    _scatter(loaded.model, "adapter", generator)
    own = Head("cosine", [f"{folder.name} {j}" for j in range(labels)], loaded.width, loaded.pooling, **head)
    with torch.no_grad():
        own.weight.normal_(generator=generator)
    adapter.head = own
    adapter.info = {"run": {"base": loaded.name, "max_length": 64, "precision": precision}}
    infuse.save(loaded.model, "adapter", folder)
    infuse.detach(loaded.model)


def _scatter(model, name: str, generator: torch.Generator) -> None:
    with torch.no_grad():
        for parameter in store_of(model)[name].parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)


def broken_files(good: Path) -> dict[str, bytes]:
    """What may lie in a folder in the place of a good adapter's file."""
    content = (good / WEIGHTS).read_bytes()
    size = 8 + int.from_bytes(content[:8], "little")
    return {
        "empty": b"", "short": content[:100], "cut": content[: len(content) - 1], "half": content[: size + 50],
        "zeros": bytes(len(content)), "pickle": b"\x80\x04\x95", "deep": (9**5).to_bytes(8, "little") + b"[" * 9**5,
        "text": b"hello" * 100, "long": (2**62).to_bytes(8, "little") + content[8:],
    }  # fmt: skip


HEADERS = {
    "no method": {"method": None}, "a number as method": {"method": 3}, "an unknown method": {"method": {"name": "x"}},
    "no head": {"head": None}, "an empty head": {"head": {}}, "hf": {"head": {"kind": "hf", "labels": ["a", "b"]}},
    "full": {"method": {"name": "full"}}, "numbered members": {"members": 3},
    "members outside": {"members": ["../../ada"]},
    "no base": {"base": {}}, "a listed base": {"base": []}, "metrics": {"info": {"metrics": 3}},
    "nan": {"info": {"metrics": {"f1": float("nan")}}}, "surrogates": {"info": {"metrics": {"\ud800": 1}}},
    "too short texts": {"info": {"run": {"max_length": 0}}}, "no length": {"info": {"run": {"max_length": "x"}}},
    "endless texts": {"info": {"run": {"max_length": float("inf")}}},
    "a listed run": {"info": {"run": [1]}}, "a numbered base": {"info": {"run": {"base": 5}}},
    "a listed precision": {"info": {"run": {"precision": ["x"]}}}, "a head of numbers": {"head": {"labels": 3}},
    "many members": {"members": ["a", "a"]},
}  # fmt: skip
"""What a header may say in place of something right."""

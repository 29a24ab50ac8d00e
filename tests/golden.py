"""Reading the golden cases: what a reference library computed on a tiny random model."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModel

GOLDEN = Path(__file__).parent / "golden"


def cases(library: str) -> list[str]:
    return sorted(p.name for p in GOLDEN.glob(f"{library}-*"))


def base(case: str) -> nn.Module:
    kind = json.loads((GOLDEN / case / "case.json").read_text())["model"]
    return AutoModel.from_pretrained(GOLDEN / "bases" / kind, attn_implementation="eager", dtype=torch.float32)


def tensors(case: str) -> dict[str, Tensor]:
    return load_file(GOLDEN / case / "case.safetensors")


def batch(case: str) -> dict[str, Tensor]:
    return {name.removeprefix("in."): value for name, value in tensors(case).items() if name.startswith("in.")}


def compare(case: str, single: dict[str, Tensor], double: dict[str, Tensor]) -> None:
    """Every tensor of a case equals the reference's, within its bound of 1e-5 × max(1, largest |expected|).

    The random T5 cases amplify float32's rounding errors to many times that bound: the reference library itself, run on
    another processor, misses its own file. So the rounding error that float32 shows in a case on this machine (its
    distance from float64) is allowed thrice on top; for the other cases that is a small part of the bound.
    """
    expected = {name: value for name, value in tensors(case).items() if not name.startswith("in.")}
    assert single.keys() == expected.keys()
    for name, value in expected.items():
        actual = single[name].reshape(value.shape)
        rounding = (actual - double[name].reshape(value.shape)).abs().max().item()
        bound = 1e-5 * max(1.0, value.abs().max().item())
        worst = (actual - value).abs().max().item()
        assert worst <= bound + 3 * rounding, (
            f"{name} is off by {worst:.1e}; bound {bound:.1e}, rounding {rounding:.1e}"
        )

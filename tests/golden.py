"""Reading the golden cases: what a reference library computed on a tiny random model."""

import json
from collections.abc import Callable
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


def jitter(seed: int):
    """Change every weight by about half a unit in float32's last place."""

    def vary(model: nn.Module) -> None:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter *= 1 + 6e-8 * torch.randn(parameter.shape, generator=generator)

    return vary


def compare(case: str, run: Callable[[str, Callable[[nn.Module], object]], dict[str, Tensor]]) -> None:
    """Every tensor of a case equals the reference's, within its bound of 1e-5 × max(1, largest |expected|).

    The random T5 cases amplify float32's rounding errors to many times that bound: the reference library itself, run
    on another processor, misses its own file. So the effect of rounding in a case, measured here as the distance
    to the float64 run and to runs with weights changed in the last place, is allowed thrice on top; for all other cases
    that is a small part of the bound. ``run`` gives a case's tensors after applying a function to its model.
    """
    expected = {name: value for name, value in tensors(case).items() if not name.startswith("in.")}
    single = run(case, lambda model: None)
    others = [run(case, vary) for vary in (nn.Module.double, jitter(0), jitter(1), jitter(2))]
    assert single.keys() == expected.keys()
    scales = {name: max(1.0, value.abs().max().item()) for name, value in expected.items()}
    rounding = max((single[n] - other[n]).abs().max().item() / scale for other in others for n, scale in scales.items())
    for name, value in expected.items():
        worst = (single[name].reshape(value.shape) - value).abs().max().item() / scales[name]
        assert worst <= 1e-5 + 3 * rounding, f"{name} is off by {worst:.1e} of its scale; rounding is {rounding:.1e}"

"""(IA)³: learned rescaling of keys, values and the feed-forward activation."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from infuse.method import Method, Params, register
from infuse.sites import Site
from infuse.spaces import Choice, Log


@register
@dataclass(frozen=True)
class IA3(Method):
    """(IA)³: ``h' = l ⊙ h`` with one learned vector ``l`` per site, 1 at the start.

    On keys and values ``h`` is the projection's output, bias included; on ``ffn_hidden`` it is the input of the down
    projection, after the non-linearity. Liu et al. 2022, "Few-Shot Parameter-Efficient Fine-Tuning is Better and
    Cheaper than In-Context Learning" (T-Few), arXiv:2205.05638, §3.3.
    """

    roles: tuple[str, ...] = ("key", "value", "ffn_hidden")

    name = "ia3"
    learning_rate = 1e-2
    space = MappingProxyType(
        {
            "learning_rate": Log(1e-3, 5e-2),
            "roles": Choice("key+value+ffn_hidden", "query+key+value+attention_output+ffn_hidden+ffn_output"),
        }
    )
    sides = ("input", "output")
    mergeable = stackable = True
    peft_type = "IA3"
    peft_keys = MappingProxyType({"l": "ia3_l"})

    @property
    def overlaps(self) -> bool:
        return False  # files have one vector per module

    def init(self, site: Site) -> dict[str, Tensor]:
        return {"l": torch.ones(site.width)}

    def factor(self, p: Params) -> Float[Tensor, "*rows width"]:
        return p["l"]

    def merge(self, p: Params, weight: Tensor, bias: Tensor | None, side: str) -> tuple[Tensor, Tensor | None]:
        if side == "input":
            return weight * p["l"], bias
        return weight * p["l"][:, None], None if bias is None else bias * p["l"]

    def add(self, params: Sequence[Params], weights: Sequence[float]) -> Params:
        return {"l": sum((w * (p["l"] - 1) for p, w in zip(params, weights, strict=True)), torch.ones(()))}

    def to_peft(self, made: Mapping[str, Method], sites: Mapping[str, list[Site]]) -> dict[str, Any]:
        return {"feedforward_modules": sorted(path for path in made if sites[path][0].side == "input")}

    @classmethod
    def from_peft(cls, config: Mapping[str, Any], path: str) -> "IA3":
        return cls()

    def to_peft_tensors(self, p: Params, side: str) -> dict[str, Tensor]:
        return {"ia3_l": p["l"][None, :] if side == "input" else p["l"][:, None]}

    def peft_side(self, tensors: Params) -> str:
        shape = tensors["ia3_l"].shape
        return "input" if shape[:1] == (1,) and shape.numel() > 1 else "output"

    def fuse(self, slices: Sequence[tuple[Site, Params]]) -> tuple[Method, Params]:
        whole = torch.ones(slices[0][0].out_features, device=slices[0][1]["l"].device)
        for site, p in slices:
            whole[site.start : site.stop] = p["l"].detach()
        return self, {"l": whole}

    def split(self, fused: Params, sites: Sequence[Site]) -> list[Params]:
        return [{"l": fused["l"][site.start : site.stop]} for site in sites]

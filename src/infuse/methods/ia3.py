"""(IA)³: learned rescaling of keys, values and the feed-forward activation."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from infuse.method import Method, Params, register
from infuse.sites import Site


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
    learning_rate = 3e-3
    sides = ("input", "output")
    mergeable = True

    def init(self, site: Site) -> dict[str, Tensor]:
        return {"l": torch.ones(site.width)}

    def forward(self, p: Params, h: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch width"]:
        return h * p["l"]

    def merge(self, p: Params, weight: Tensor, bias: Tensor | None, side: str) -> tuple[Tensor, Tensor | None]:
        if side == "input":
            return weight * p["l"], bias
        return weight * p["l"][:, None], None if bias is None else bias * p["l"]

"""LoRA: a low-rank update of a linear layer, with rank-stabilised scaling and DoRA as options."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from infuse.errors import InfuseError
from infuse.method import Method, Params, register
from infuse.sites import Site


@register
@dataclass(frozen=True)
class LoRA(Method):
    """LoRA: ``h' = h + s·B·A·x`` with ``s = α/r``, or ``α/√r`` when rank-stabilised.

    ``A`` (r, in) starts Kaiming-uniform with a = √5 and ``B`` (out, r) at zero. Hu et al. 2021, arXiv:2106.09685; rsLoRA:
    Kalajdzievski 2023, arXiv:2312.03732. With ``dora`` the adapted weight ``V = W + s·B·A`` is renormalised row by row
    to a learned magnitude ``m``, started at ‖W‖: ``h' = (m / ‖V‖) ⊙ V·x + b``, the norm held constant in the gradient.
    Liu et al. 2024, arXiv:2402.09353, §4.3.
    """

    roles: tuple[str, ...] = ("query", "value")
    rank: int = 8
    alpha: float = 16.0
    rslora: bool = False
    dora: bool = False
    dropout: float = 0.0

    name = "lora"
    learning_rate = 1e-3
    mergeable = True

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise InfuseError(f"LoRA's rank must be at least 1, not {self.rank}.")
        if not 0 <= self.dropout < 1:
            raise InfuseError(f"LoRA's dropout must lie in [0, 1), not {self.dropout}.")

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def init(self, site: Site) -> dict[str, Tensor]:
        a = torch.empty(self.rank, site.in_features)
        torch.nn.init.kaiming_uniform_(a, a=math.sqrt(5))
        params = {"A": a, "B": torch.zeros(site.width, self.rank)}
        if self.dora:
            params["m"] = site.weight.detach().float().norm(dim=1)
        return params

    def prepare(self, p: Params, weight: Float[Tensor, "out in"]) -> Params:
        if not self.dora:
            return p
        norm = self._updated(p, weight).norm(dim=1).detach()
        return {**p, "gain": p["m"] / norm.to(p["m"].dtype)}

    def forward(
        self,
        p: Params,
        h: Float[Tensor, "*batch out"],
        x: Float[Tensor, "*batch in"],
        weight: Float[Tensor, "out in"],
        bias: Float[Tensor, " out"] | None,
        training: bool,
    ) -> Float[Tensor, "*batch out"]:
        dropped = F.dropout(x, self.dropout, training) if self.dropout else x
        update = F.linear(F.linear(dropped, p["A"]), p["B"]) * self.scale
        if not self.dora:
            return h + update
        # With dropout the whole of V sees the dropped input in the magnitude's share, as PEFT computes it.
        base = F.linear(dropped, weight) if training and self.dropout else h if bias is None else h - bias
        return h + (p["gain"] - 1) * base + p["gain"] * update

    def merge(self, p: Params, weight: Tensor, bias: Tensor | None, side: str) -> tuple[Tensor, Tensor | None]:
        updated = self._updated(p, weight)
        if self.dora:
            updated = updated * (p["m"] / updated.norm(dim=1))[:, None]
        return updated, bias

    def _updated(self, p: Params, weight: Tensor) -> Tensor:
        return weight + self.scale * (p["B"] @ p["A"]).to(weight.dtype)

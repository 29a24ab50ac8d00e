"""LoRA: a low-rank update of a linear layer, with rank-stabilised scaling and DoRA as options."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from infuse.errors import InfuseError
from infuse.foreign import LORA_VARIANTS, flag, number, pattern_value, refuse_options
from infuse.lean import low_rank
from infuse.method import Method, Params, register
from infuse.ops import joined, started
from infuse.sites import Site
from infuse.spaces import Choice, Log


@register
@dataclass(frozen=True)
class LoRA(Method):
    """LoRA: ``h' = h + s·B·A·x`` with ``s = α/r``, or ``α/√r`` when rank-stabilised.

    ``A`` (r, in) starts Kaiming-uniform with a = √5, ``B`` (out, r) at zero. Hu et al. 2021, arXiv:2106.09685; rsLoRA:
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
    learning_rate = 2e-3
    space = MappingProxyType({
        "learning_rate": Log(3e-4, 1e-2), "rank": Choice(4, 8, 16, 32), "alpha": Choice(8.0, 16.0, 32.0),
        "dropout": Choice(0.0, 0.1),
        "roles": Choice("query+value", "query+key+value+attention_output+ffn_up+ffn_output"),
    })  # fmt: skip
    mergeable = stackable = True
    peft_type = "LORA"
    peft_keys = MappingProxyType({"A": "lora_A.weight", "B": "lora_B.weight", "m": "lora_magnitude_vector"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank < 1:
            raise InfuseError(f"LoRA's rank must be at least 1, not {self.rank}.")

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    @property
    def overlaps(self) -> bool:
        return not self.dora  # the norm is that of V alone

    def init(self, site: Site) -> dict[str, Tensor]:
        params = {"A": started(self.rank, site.in_features, None), "B": torch.zeros(site.width, self.rank)}
        if self.dora:
            params["m"] = site.weight.detach().float().norm(dim=1)
        return params

    def prepare(self, p: Params, weight: Float[Tensor, "out in"] | None = None) -> Params:
        if not self.dora or weight is None:
            return p
        return {**p, "gain": p["m"] / self._updated(p, weight).norm(dim=1).detach().to(p["m"].dtype)}

    def wants(self, function: str) -> frozenset[str]:
        for_dora = {"update": {"h", "weight", "bias"}, "prepare": {"weight"}}.get(function, set())
        return super().wants(function) - (frozenset() if self.dora else for_dora)

    def update(
        self, p: Params, x: Float[Tensor, "*batch in"], training: bool, weight: Float[Tensor, "out in"] | None = None,
        bias: Float[Tensor, " out"] | None = None, h: Float[Tensor, "*batch out"] | None = None,
    ) -> Float[Tensor, "*batch out"]:  # fmt: skip
        dropped = F.dropout(x, self.dropout, training) if self.dropout else x
        update = low_rank(dropped, p["A"], p["B"], self.scale)
        if not self.dora:
            return update
        assert h is not None and weight is not None
        # With dropout the whole of V sees the dropped input in the magnitude's share, as PEFT computes it.
        base = F.linear(dropped, weight) if training and self.dropout else h if bias is None else h - bias
        return (p["gain"] - 1) * base + p["gain"] * update

    def merge(self, p: Params, weight: Tensor, bias: Tensor | None, side: str) -> tuple[Tensor, Tensor | None]:
        updated = self._updated(p, weight)
        if self.dora:
            updated = updated * (p["m"] / updated.norm(dim=1))[:, None]
        return updated, bias

    def _updated(self, p: Params, weight: Tensor) -> Tensor:
        return weight + self.scale * (p["B"] @ p["A"]).to(weight.dtype)

    def to_peft(self, made: Mapping[str, Method], sites: Mapping[str, list[Site]]) -> dict[str, Any]:
        others = {path: m for path, m in made.items() if isinstance(m, LoRA) and m != self}
        return {
            "r": self.rank, "lora_alpha": self.alpha, "lora_dropout": self.dropout, "bias": "none",
            "use_rslora": self.rslora, "use_dora": self.dora,
            "rank_pattern": {path: m.rank for path, m in others.items()},
            "alpha_pattern": {path: m.alpha for path, m in others.items()},
        }  # fmt: skip

    @classmethod
    def from_peft(cls, config: Mapping[str, Any], path: str) -> "LoRA":
        refuse_options(config, LORA_VARIANTS, "LoRA")
        return cls(
            rank=int(pattern_value(config.get("rank_pattern"), path, config.get("r", 8))),
            alpha=number(pattern_value(config.get("alpha_pattern"), path, config.get("lora_alpha", 8)), "lora_alpha"),
            rslora=flag(config, "use_rslora"),
            dora=flag(config, "use_dora"),
            dropout=float(config.get("lora_dropout") or 0.0),
        )

    def fused(self, slices: int) -> Method:
        return replace(self, rank=slices * self.rank, alpha=self.alpha * (slices**0.5 if self.rslora else slices))

    def fuse(self, slices: Sequence[tuple[Site, Params]]) -> tuple[Method, Params]:
        site = slices[0][0]
        a, b = joined([(p["A"], p["B"], slice(s.start, s.stop)) for s, p in slices], site.out_features)
        whole = {"A": a, "B": b}
        if self.dora:
            whole["m"] = replace(site, start=0, stop=site.out_features).weight.detach().float().norm(dim=1)
            for site, p in slices:
                whole["m"][site.start : site.stop] = p["m"].detach()
        return self.fused(len(slices)), whole

    def summed(self, terms: int) -> Method:
        return self.fused(terms)

    def add(self, params: Sequence[Params], weights: Sequence[float]) -> Params:
        if self.dora:
            raise InfuseError("DoRA's magnitudes do not add up: average its adapters instead.")
        parts = [(p["A"], w * p["B"], slice(None)) for p, w in zip(params, weights, strict=True)]
        a, b = joined(parts, len(params[0]["B"]))
        return {"A": a, "B": b}

    def split(self, fused: Params, sites: Sequence[Site]) -> list[Params]:
        parts: list[Params] = []
        for site, a, b in zip(sites, fused["A"].split(self.rank), fused["B"].split(self.rank, dim=1), strict=True):
            rows = slice(site.start, site.stop)
            parts.append({"A": a, "B": b[rows]} | ({"m": fused["m"][rows]} if self.dora else {}))
        return parts

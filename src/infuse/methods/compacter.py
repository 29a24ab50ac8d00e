"""Compacter: bottlenecks whose matrices are sums of Kronecker products with a shared rule."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from infuse.errors import InfuseError
from infuse.lean import Rows
from infuse.method import Method, Params, register
from infuse.methods.bottleneck import SOURCES, check_bottleneck, check_reads, width_at
from infuse.ops import bottleneck
from infuse.sites import Site
from infuse.spaces import Choice, Log


@register
@dataclass(frozen=True)
class Compacter(Method):
    """A bottleneck ``h' = h + s·(f(z·H_D + b)·H_U + c)`` with ``H = Σᵢ Aᵢ ⊗ Wᵢ`` and ``Wᵢ = sᵢ·tᵢ`` of rank 1.

    ``Aᵢ`` (n, n) is the rule, learned, shared by all sites, with σ = 1e-4 at the start; ``Wᵢ`` is (in/n, out/n), and it
    or its factors start Xavier-uniform with a gain of √2, as in the paper's code. Karimi Mahabadi et al. 2021,
    arXiv:2106.04647. Compacter sits at attention and feed-forward outputs and reads ``h``; ``compacter++`` at
    feed-forward outputs only (and reads ``LN(h + r)``, as AdapterHub has it); ``phm`` is the plain parameterised
    hypercomplex layer: whole ``Wᵢ`` and a rule per matrix.
    """

    roles: tuple[str, ...] = ("attention_output", "ffn_output")
    n: int = 4
    rank: int = 1
    """Rank of the factors of Wᵢ; 0 keeps Wᵢ whole."""
    shared_rule: bool = True
    reduction: float = 32.0
    width: int = 0
    activation: str = "gelu"
    reads: str = "output"
    scale: float = 1.0
    """The factor s."""
    dropout: float = 0.0
    train_norms: bool = False
    """Train copies of the LayerNorms that follow the adapted sublayers, too, as the paper does."""

    name = "compacter"
    learning_rate = 3e-3
    stackable = True
    space = MappingProxyType(
        {
            "learning_rate": Log(5e-4, 2e-2),
            "reduction": Choice(8.0, 16.0, 32.0),
            "dropout": Choice(0.0, 0.1),
            "activation": Choice("relu", "gelu", "swish"),
        }
    )
    presets = MappingProxyType(
        {
            "compacter++": {"roles": ("ffn_output",), "reads": "normed"},
            "phm": {"rank": 0, "shared_rule": False, "activation": "swish", "reduction": 16.0},
        }
    )

    def __post_init__(self) -> None:
        check_bottleneck(self)
        if self.n < 1 or self.rank < 0:
            raise InfuseError("Compacter needs n of at least 1 and a rank of 0 or more.")

    @property
    def starts_at_identity(self) -> bool:
        return False

    def check(self, site: Site) -> None:
        super().check(site)
        check_reads(self.reads, site)
        width = width_at(self, site)
        if site.width % self.n or width % self.n:
            fits = [n for n in range(1, 17) if not site.width % n and not width % n]
            wide = self.n * max(1, round(width / self.n))
            hint = f"width={wide}" if not site.width % self.n else f"n={fits[-1]}"
            raise InfuseError(
                f"Compacter's n = {self.n} must divide {site.width} and {width} at {site.name}; use {hint}."
            )

    def trains(self, sites: Sequence[Site]) -> list[nn.Module]:
        return [site.norm for site in sites if site.norm is not None] if self.train_norms else []

    def shared(self, sites: Sequence[Site]) -> dict[str, Tensor]:
        return {"rule": self._rule()} if self.shared_rule else {}

    def init(self, site: Site) -> dict[str, Tensor]:
        width = width_at(self, site)
        params = {"b": torch.zeros(width), "c": torch.zeros(site.width)}
        for side, fan_in, fan_out in (("down", site.width, width), ("up", width, site.width)):
            i, o = fan_in // self.n, fan_out // self.n
            shapes = {"left": (i, self.rank), "right": (self.rank, o)} if self.rank else {"whole": (i, o)}
            for part, shape in shapes.items():
                params[f"{side}_{part}"] = torch.stack([_xavier(*shape) for _ in range(self.n)])
            if not self.shared_rule:
                params[f"{side}_rule"] = self._rule(0.01)
        return params

    def prepare(self, p: Params) -> Params:
        # H is built once per adapter and call; neither that nor the factored product is always cheaper (decisions.md).
        up, c = self.scale * self._matrix(p, "up"), self.scale * p["c"]
        return {"D": self._matrix(p, "down"), "U": up, "b": p["b"], "c": c}

    def wants(self, function: str) -> frozenset[str]:
        return frozenset({SOURCES[self.reads], "training"}) if function == "update" else super().wants(function)

    def update(self, p: Params, training: bool, **source: Rows) -> Rows:
        (z,) = source.values()
        out = bottleneck(z, p["D"], p["b"], p["U"], p["c"], self.activation)
        return F.dropout(out, self.dropout, training) if self.dropout else out

    def _rule(self, deviation: float = 1e-4) -> Tensor:
        return torch.randn(self.n, self.n, self.n) * deviation

    def _matrix(self, p: Params, side: str) -> Float[Tensor, "out in"]:
        rule = p["rule"] if self.shared_rule else p[f"{side}_rule"]
        weight = torch.bmm(p[f"{side}_left"], p[f"{side}_right"]) if self.rank else p[f"{side}_whole"]
        blocks = (rule.flatten(1).T @ weight.flatten(1)).reshape(self.n, self.n, *weight.shape[1:])
        return blocks.permute(1, 3, 0, 2).flatten(2, 3).flatten(0, 1)


def _xavier(rows: int, columns: int) -> Tensor:
    return torch.nn.init.xavier_uniform_(torch.empty(rows, columns), gain=math.sqrt(2))

"""Bottleneck adapters: Houlsby, Pfeiffer, and parallel."""

from collections.abc import Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from infuse.errors import InfuseError
from infuse.lean import Rows
from infuse.method import Method, Params, register
from infuse.ops import STARTS, activation, bottleneck, started
from infuse.sites import Site
from infuse.spaces import Choice, Log


@register
@dataclass(frozen=True)
class Bottleneck(Method):
    """``h' = h + s·(U·f(D·z + b) + c)`` at the outputs of sublayers, before the residual is added and normed.

    - ``houlsby`` (Houlsby et al. 2019, arXiv:1902.00751): attention and feed-forward outputs, ``z = h``.
    - ``pfeiffer`` (Pfeiffer et al. 2021, arXiv:2005.00247; AdapterHub's ``seq_bn``): feed-forward outputs only,
      ``z = LN(h + r)`` with the residual ``r`` and the pretrained LayerNorm, ``z = h + r`` in pre-norm layers.
    - ``parallel`` (He et al. 2022, arXiv:2110.04366; AdapterHub's ``par_bn``): ``z = r``, the sublayer's input, s = 4.

    D is (width, hidden), U (hidden, width), with ``width = ⌊hidden / reduction⌋`` unless given.
    """

    roles: tuple[str, ...] = ("attention_output", "ffn_output")
    reduction: float = 16.0
    width: int = 0
    """Width of the bottleneck; 0 takes it from the reduction."""
    activation: str = "swish"
    reads: str = "output"
    """What ``z`` is: ``output`` (h), ``normed`` (LN(h + r)), or ``residual`` (r)."""
    scale: float = 1.0
    """The factor s; with ``learned_scale`` its start."""
    learned_scale: bool = False
    dropout: float = 0.0
    start: str = "truncated"
    """``zero`` starts at the identity; ``normal`` (σ = 0.02) and ``truncated`` (σ = 0.01) near it."""
    train_norms: bool = False
    """Train copies of the LayerNorms that follow the adapted sublayers, too."""

    name = "bottleneck"
    learning_rate = 1e-3
    stackable = True
    space = MappingProxyType(
        {
            "learning_rate": Log(2e-4, 1e-2),
            "reduction": Choice(2.0, 8.0, 16.0, 32.0),
            "dropout": Choice(0.0, 0.1),
            "activation": Choice("relu", "gelu", "swish"),
        }
    )
    presets = MappingProxyType(
        {
            "houlsby": {},
            "pfeiffer": {"roles": ("ffn_output",), "reads": "normed", "activation": "relu", "start": "normal"},
            "parallel": {
                "roles": ("ffn_output",), "reads": "residual", "activation": "relu", "start": "zero", "scale": 4.0,
                "reduction": 2.0,
            },
        }
    )  # fmt: skip

    def __post_init__(self) -> None:
        check_bottleneck(self)

    @classmethod
    def houlsby(cls, **settings: Any) -> "Bottleneck":
        """After attention and feed-forward, reading ``h``; ``settings`` change fields."""
        return cls(**settings)

    @classmethod
    def pfeiffer(cls, **settings: Any) -> "Bottleneck":
        """After feed-forward only, reading ``LN(h + r)``; ``settings`` change fields."""
        return cls(**{**cls.presets["pfeiffer"], **settings})

    @classmethod
    def parallel(cls, **settings: Any) -> "Bottleneck":
        """Beside feed-forward, reading its input, at twice the learning rate; ``settings`` change fields."""
        return cls(**{**cls.presets["parallel"], **settings})

    @property
    def rate(self) -> float:
        return 2 * self.learning_rate if self.reads == "residual" else self.learning_rate

    @property
    def starts_at_identity(self) -> bool:
        return self.start == "zero"

    def check(self, site: Site) -> None:
        super().check(site)
        check_reads(self.reads, site)

    def trains(self, sites: Sequence[Site]) -> list[nn.Module]:
        return [site.norm for site in sites if site.norm is not None] if self.train_norms else []

    def init(self, site: Site) -> dict[str, Tensor]:
        width = width_at(self, site)
        down, up = STARTS[self.start]
        params = {
            "D": started(width, site.width, down, self.start == "truncated"),
            "b": torch.zeros(width),
            "U": started(site.width, width, up, self.start == "truncated"),
            "c": torch.zeros(site.width),
        }
        return params | ({"s": torch.full((1,), self.scale)} if self.learned_scale else {})

    def wants(self, function: str) -> frozenset[str]:
        return frozenset({SOURCES[self.reads], "training"}) if function == "update" else super().wants(function)

    def update(self, p: Params, training: bool, **source: Rows) -> Rows:
        (z,) = source.values()
        out = bottleneck(z, p["D"], p["b"], p["U"], p["c"], self.activation)
        if self.learned_scale or self.scale != 1:
            out = out * (p["s"] if self.learned_scale else self.scale)
        return F.dropout(out, self.dropout, training) if self.dropout else out


SOURCES = {"output": "h", "normed": "normed", "residual": "residual"}
"""What a bottleneck may read, and the name under which the contract hands it over."""


def check_bottleneck(method: Any) -> None:
    """Raise if the settings that all bottlenecks share can't work."""
    Method.__post_init__(method)
    activation(method.activation)
    for name, allowed in (("reads", SOURCES), ("start", STARTS)):
        if getattr(method, name, "zero") not in allowed:
            raise InfuseError(f"{type(method).__name__}'s {name} is one of {', '.join(allowed)}.")
    if method.reduction <= 0 or method.width < 0:
        raise InfuseError(f"{type(method).__name__} needs a positive reduction and a width of 0 or more.")


def width_at(method: Any, site: Site) -> int:
    """The width of a bottleneck at a site."""
    return method.width or max(1, int(site.width // method.reduction))


def check_reads(reads: str, site: Site) -> None:
    """Raise if a site has no residual for a bottleneck that reads it."""
    if reads != "output" and site.source is None:
        remedy = "adapt attention_output or ffn_output, or add a Residual to the architecture's row"
        raise InfuseError(f"The residual at {site.name} is unknown, which reads={reads!r} needs: {remedy}.")

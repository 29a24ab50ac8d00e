"""Without deltas: a head alone on the frozen base, fine-tuning of everything, and adapters one after the other."""

from dataclasses import dataclass

from torch import Tensor

from infuse.method import Method, Params, register_baseline
from infuse.sites import Site


class _NoDelta(Method):
    """A way to train that puts nothing at any site."""

    def init(self, site: Site) -> dict[str, Tensor]:
        return {}

    def forward(self, p: Params, h: Tensor) -> Tensor:
        return h


@register_baseline
@dataclass(frozen=True)
class HeadOnly(_NoDelta):
    """``head``: the base stays frozen and bare; only the adapter's head is trained (a linear probe)."""

    roles: tuple[str, ...] = ()

    name = "head"
    learning_rate = 3e-3


@register_baseline
@dataclass(frozen=True)
class Chain(_NoDelta):
    """What :func:`infuse.stack` attaches: its members act one after the other; it has no deltas of its own."""

    roles: tuple[str, ...] = ()

    name = "stack"
    maker = "stack"
    learning_rate = 1e-3


@register_baseline
@dataclass(frozen=True)
class Full(_NoDelta):
    """``full``: every parameter of the base is trained. What it saves is a whole model, not an adapter."""

    roles: tuple[str, ...] = ()

    name = "full"
    learning_rate = 5e-5
    unfreezes = True

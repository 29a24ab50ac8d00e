"""AdapterFusion: attention over the updates of several trained adapters."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from infuse.errors import InfuseError
from infuse.lean import linear
from infuse.method import Method, Mixer, Params, register_mixer
from infuse.methods.bottleneck import SOURCES
from infuse.sites import Site


@register_mixer
@dataclass(frozen=True)
class Fusion(Mixer):
    """``h' = h + Σᵢ pᵢ·V·uᵢ`` with ``p = softmax(q·kᵢ)``, ``q = Q·z + b_q`` and ``kᵢ = K·uᵢ + b_k``.

    ``uᵢ`` is what member i would add to the activation, ``z`` what the last member reads (LN(h + r) for Pfeiffer
    adapters in post-norm layers); no 1/√d. Q, K start N(0, 0.02) with zero biases, V (without bias) at the identity
    with 1e-6 beside the diagonal; the loss gets ``regulariser·Σ(I − V)²`` summed over the sites. Members stay frozen.
    Pfeiffer et al. 2021, "AdapterFusion: Non-Destructive Task Composition for Transfer Learning", arXiv:2005.00247.
    """

    roles: tuple[str, ...] = ()
    """Filled from the members' sites."""
    regulariser: float = 0.01
    dropout: float = 0.0
    """Dropout on the scores."""
    adds: str = ""
    """Set in AdapterHub's files, whose fusions let all members read what the last one reads: if that is this
    (``residual``, say), it is added to the activation once more. Empty: each member reads its own, nothing is added."""

    name = "fusion"
    learning_rate = 1e-3  # the papers' 5e-5 leaves the attention uniform on small tasks (docs/results.md)
    undecayed = ("V",)
    stackable = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.adds not in ("", *SOURCES):
            raise InfuseError(f"Fusion's adds is empty or one of {', '.join(SOURCES)}.")

    def mixed(self, members: tuple[Method, ...]) -> tuple[Method, ...]:
        if not self.adds:
            return members
        return tuple(replace(m, reads=_reads(members[-1])) if _reads(m) else m for m in members)

    def adds_query(self, members: tuple[Method, ...]) -> bool:
        return bool(self.adds) and _reads(members[-1]) == self.adds

    def init(self, site: Site) -> dict[str, Tensor]:
        def normal() -> Tensor:
            return torch.randn(site.width, site.width) * 0.02

        value = torch.full((site.width, site.width), 1e-6).fill_diagonal_(1.0)
        return {
            "Q": normal(), "q": torch.zeros(site.width), "K": normal(), "k": torch.zeros(site.width), "V": value,
        }  # fmt: skip

    def weigh(
        self,
        p: Params,
        query: Float[Tensor, "*batch width"],
        updates: Float[Tensor, "*batch members width"],
        training: bool,
    ) -> Float[Tensor, "*batch members"]:
        q, shift = linear(query, p["Q"], p["q"]), 0
        if "K" in p:  # q·(K·u + k) = (Kᵀq)·u + q·k: one product per query instead of one per member
            q, shift = q @ p["K"], linear(q, torch.atleast_2d(p["k"]))
        scores = (updates @ q.unsqueeze(-1)).squeeze(-1) + shift
        if self.dropout:
            scores = F.dropout(scores, self.dropout, training)
        return scores.softmax(-1)

    def condense(self, p: Params) -> Params:
        """``Kᵀ(Q·z + b_q)`` as one map; ``q·b_k`` is the same for all members: softmax, without dropout, drops it."""
        return p if self.dropout else {"Q": p["K"].T @ p["Q"], "q": p["q"] @ p["K"], "V": p["V"]}

    def mix(
        self, p: Params, weights: Float[Tensor, "*batch members"], updates: Float[Tensor, "*batch members width"]
    ) -> Float[Tensor, "*batch width"]:
        return linear((weights.unsqueeze(-2) @ updates).squeeze(-2), p["V"])  # V is linear: mix first

    def penalty(self, p: Params) -> Any:
        return self.regulariser * (p["V"] - torch.eye(len(p["V"]), device=p["V"].device)).square().sum()


def _reads(member: Method) -> str:
    """What a member reads; empty for one without the choice."""
    return getattr(member, "reads", "")

"""Small functions that several methods share."""

from collections.abc import Callable, Sequence
from functools import cache

import torch
from jaxtyping import Float
from torch import Tensor

from infuse import lean
from infuse.errors import InfuseError, listed

STARTS = {
    # name: standard deviation of the down and the up projection; None is Kaiming-uniform with a = √5.
    "normal": (0.02, 0.02),
    "truncated": (0.01, 0.01),
    "zero": (None, 0.0),
}
"""How a bottleneck's two matrices start: as BERT's weights, as Houlsby et al. do, or exactly at the identity."""


@cache
def activation(name: str) -> Callable[[Tensor], Tensor]:
    """A non-linearity by its name in transformers (``swish`` is SiLU, ``gelu`` the exact one).

    Raises:
        InfuseError: there is none of this name.
    """
    from transformers.activations import ACT2FN  # takes seconds to import, and not every method needs it

    if name not in ACT2FN:
        raise InfuseError(f"Unknown activation {name!r}; some that exist are {listed(ACT2FN, 20)}.")
    return ACT2FN[name]


def started(out_features: int, in_features: int, deviation: float | None, cut: bool = False) -> Tensor:
    """A fresh matrix (out, in): normal with a standard deviation (cut at two of them), zero, or Kaiming-uniform."""
    matrix = torch.zeros(out_features, in_features)
    if deviation is None:
        torch.nn.init.kaiming_uniform_(matrix, a=5**0.5)
    elif deviation and cut:
        torch.nn.init.trunc_normal_(matrix, std=deviation, a=-2 * deviation, b=2 * deviation)
    elif deviation:
        torch.nn.init.normal_(matrix, std=deviation)
    return matrix


def bottleneck(
    z: Float[Tensor, "*batch in"],
    down: Float[Tensor, "*rows r in"],
    b: Float[Tensor, "*rows r"],
    up: Float[Tensor, "*rows out r"],
    c: Float[Tensor, "*rows out"],
    name: str,
) -> Float[Tensor, "*batch out"]:
    """``U·f(D·z + b) + c`` with the activation of this name; for ``rows`` see :func:`infuse.lean.linear`."""
    return lean.bottleneck(z, down, b, up, c, activation(name))


def joined(parts: Sequence[tuple[Tensor, Tensor, slice]], out_features: int) -> tuple[Tensor, Tensor]:
    """One low-rank update equal to the sum of several (A, B, rows of the output): A's stacked, B's side by side."""
    a = torch.cat([a.detach() for a, _, _ in parts])
    b = a.new_zeros(out_features, len(a))
    column = 0
    for part, own, rows in parts:
        b[rows, column : column + len(part)] = own.detach()
        column += len(part)
    return a, b

"""What the call of one module leaves for others: residuals, and mixing weights if somebody asks."""

from collections.abc import Iterator
from contextlib import contextmanager
from threading import local
from typing import Any

from torch import Tensor

from infuse.scopes import bind, innermost
from infuse.sites import Site


class _Left(local):
    def __init__(self) -> None:
        self.residuals: dict[tuple[int, str], Tensor] = {}


_LEFT = _Left()
_WEIGHTS = object()
"""What :mod:`infuse.scopes` binds the mixing weights of a block to."""


def keep_residual(store: Any, path: str, value: Tensor) -> None:
    """Remember the input of a site's source until the site itself is called, in this thread."""
    _LEFT.residuals[id(store), path] = value


def residual_at(store: Any, site: Site) -> Tensor | None:
    """What :func:`keep_residual` last remembered for a site."""
    return None if site.source is None else _LEFT.residuals.get((id(store), site.source))


def residuals(store: Any) -> list[str]:
    """Paths of the sources whose inputs are remembered in this thread."""
    return [path for owner, path in _LEFT.residuals if owner == id(store)]


def forget_residuals(store: Any) -> None:
    """Drop what a forward pass has left, so that no activation outlives it."""
    for path in residuals(store):
        del _LEFT.residuals[id(store), path]


@contextmanager
def mixing_weights() -> Iterator[dict[str, list[Tensor]]]:
    """What a fusion attends to: calls within the block leave the weights of its members.

    Route all rows to one fusion: the parts of mixed batches come one by one.

    Yields:
        Name of the site → a tensor (rows, positions, members) per call, without gradient and 1 in sum over the members,
        which are in the order of the adapter's ``members``.
    """
    weights: dict[str, list[Tensor]] = {}
    with bind(_WEIGHTS, weights):
        yield weights


def note_weights(site: str, weights: Tensor) -> None:
    """Keep a mixer's weights if :func:`mixing_weights` listens."""
    noted: dict[str, list[Tensor]] | None = innermost(_WEIGHTS, None)
    if noted is not None:
        noted.setdefault(site, []).append(weights.detach())

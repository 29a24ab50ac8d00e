"""What is computed at one site: the functions of a method and of its members, and the tensors that they ask for."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from infuse.adapter import Adapter
from infuse.banks import Banks
from infuse.calls import note_weights
from infuse.method import Method, Mixer, Params
from infuse.sites import Site


@dataclass(frozen=True)
class Recipe:
    """What is computed at a site: a method, and for a mixer the methods of its members."""

    method: Method
    members: tuple[Method, ...] = ()

    @staticmethod
    def of(adapters: Mapping[str, Adapter], adapter: Adapter, site: Site) -> "Recipe":
        method, members = adapter.method_at(site), tuple(adapters[m].method_at(site) for m in adapter.members)
        return Recipe(method, method.mixed(members) if isinstance(method, Mixer) else members)

    @property
    def needs(self) -> frozenset[str]:
        """Names of the tensors that the functions ask for."""
        asked = [m.wants("update") | {"h"} if m.additive else m.wants("forward") for m in (self.method, *self.members)]
        return frozenset().union(*asked)

    def prepare(self, p: "Parameters", fixed: Mapping[str, Any]) -> "Parameters":
        own, members = p
        prepared = [_ask(m, "prepare", each, fixed) for m, each in zip(self.members, members, strict=True)]
        return _ask(self.method, "prepare", own, fixed), prepared

    def new(self, p: "Parameters", given: Mapping[str, Any], fixed: Mapping[str, Any]) -> Tensor:
        """The new activation from prepared parameters."""
        own, members = p
        given = {**given, **fixed}
        if isinstance(self.method, Mixer):
            updates = [_ask(m, "update", each, given) for m, each in zip(self.members, members, strict=True)]
            stacked = torch.stack(updates, dim=-2)
            query = next(
                (given[n] for n in ("normed", "residual") if n in self.members[-1].wants("update")), given["h"]
            )
            weights = self.method.weigh(own, query, stacked, fixed["training"])
            note_weights(fixed["site"], weights)
            new = given["h"] + self.method.mix(own, weights, stacked)
            return new + query if self.method.adds_query(self.members) else new
        if self.method.additive:
            return given["h"] + _ask(self.method, "update", own, given)
        return _ask(self.method, "forward", own, given)


Parameters = tuple[Params, list[Params]]
"""A delta's own parameters, and those of its members."""


def mapped(change: Callable[[Tensor], Tensor], p: Parameters) -> Parameters:
    """Parameters with every tensor changed (by a fraction of the work of a general tree's ``map``)."""
    own, members = p
    return {n: change(v) for n, v in own.items()}, [{n: change(v) for n, v in m.items()} for m in members]


def parameters(adapters: Mapping[str, Adapter], adapter: Adapter, site: Site) -> Parameters:
    return adapter.params(site), [adapters[m].params(site) for m in adapter.members]


@dataclass
class Call:
    """One call of a site's module: its activation and input, and on demand what the site's surroundings hold.

    Attributes:
        h: the activation, (rows, ..., width).
        x: the input of the site's module, (rows, ..., in_features).
        residual: what the model adds to a sublayer's output; kept from the call of the site's ``source``.
        banks: where mixed batches without gradients find their parameters.
    """

    site: Site
    h: Tensor
    x: Tensor
    training: bool
    residual: Tensor | None = None
    banks: Banks | None = None
    kept: Tensor | None = None

    def rowwise(self, names: Iterable[str], rows: slice | Tensor = slice(None)) -> dict[str, Tensor]:
        """The tensors asked for that have a row per text, of some rows or all."""
        given = {name: getattr(self, name) for name in ("h", "x", "residual", "normed") if name in names}
        every = isinstance(rows, slice) and rows == slice(None)
        return given if every else {name: value[rows] for name, value in given.items()}

    def fixed(self) -> dict[str, Any]:
        """What is the same for all rows."""
        site = self.site
        return {"weight": site.weight, "bias": site.bias, "training": self.training, "site": site.name}

    @property
    def normed(self) -> Tensor:
        """``LN(h + residual)``, or the sum where no LayerNorm follows; computed once."""
        if self.kept is None:
            assert self.residual is not None
            total = self.h + self.residual
            self.kept = total if self.site.norm is None else self.site.norm(total)
        assert self.kept is not None
        return self.kept


def cast(p: "Parameters", dtype: torch.dtype) -> "Parameters":
    return mapped(lambda value: value.to(dtype), p)


def _ask(method: Method, function: str, p: Params, given: Mapping[str, Any]) -> Any:
    """Call a method's function with those of the given tensors that it asks for."""
    return getattr(method, function)(p, **{name: given[name] for name in method.wants(function)})


_KINDS: dict[Any, int] = {}


def kinds(adapters: Mapping[str, Adapter], adapter: Adapter) -> dict[str, int]:
    """Site → a number for what adapters must share to run as one group there: methods up to their roles, and shapes."""
    found = {}
    for site in adapter.sites.values():
        recipe = Recipe.of(adapters, adapter, site)
        bare = (replace(recipe.method, roles=()), *(replace(m, roles=()) for m in recipe.members))
        own, members = parameters(adapters, adapter, site)
        shapes = tuple((n, v.shape) for p in (own, *members) for n, v in p.items())
        found[site.name] = _KINDS.setdefault((bare, shapes), len(_KINDS))
    return found

"""What is computed at one site: the functions of a method and of its members, and the tensors that they ask for."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from infuse.adapter import Adapter
from infuse.banks import Banks
from infuse.calls import note_weights
from infuse.errors import InfuseError
from infuse.method import Method, Mixer, Params
from infuse.sites import Site


@dataclass(frozen=True)
class Recipe:
    """What is computed at a site: a method, and for a mixer the methods of its members.

    Attributes:
        acts: what :meth:`part` gives, see :attr:`infuse.method.Method.acts`.
        needs: names of the tensors that the functions ask for.
        stackable: whether all functions take parameters with a row per text.
        prepares: whether parameters are not used as they are.
        reads_base: whether what is prepared depends on the frozen weight, too.
    """

    method: Method
    members: tuple[Method, ...] = ()
    acts: str = field(init=False)
    needs: frozenset[str] = field(init=False)
    stackable: bool = field(init=False)
    prepares: bool = field(init=False)
    reads_base: bool = field(init=False)

    def __post_init__(self) -> None:  # not on demand: torch.compile can't trace what caches behind a lock
        mixes, methods = isinstance(self.method, Mixer), (self.method, *self.members)
        asked = [m.wants(m.acts) for m in methods]
        facts = {
            "acts": "update" if mixes else self.method.acts,
            "needs": frozenset().union(*asked, {"h"} if mixes else ()),
            "stackable": all(m.stackable for m in methods),
            "prepares": any(type(m).prepare is not Method.prepare for m in methods),
            "reads_base": any("weight" in m.wants("prepare") for m in methods),
        }
        for name, value in facts.items():
            object.__setattr__(self, name, value)

    @staticmethod
    def of(method: Method, *members: Method) -> "Recipe":
        return Recipe(method, method.mixed(members) if isinstance(method, Mixer) else members)

    def prepare(self, p: "Parameters", fixed: Mapping[str, Any]) -> "Parameters":
        own, members = p
        prepared = [_ask(m, "prepare", each, fixed) for m, each in zip(self.members, members, strict=True)]
        return _ask(self.method, "prepare", own, fixed), prepared

    def condense(self, p: "Parameters") -> "Parameters":
        own, members = p
        return self.method.condense(own), [m.condense(each) for m, each in zip(self.members, members, strict=True)]

    def part(self, p: "Parameters", given: Mapping[str, Any], fixed: Mapping[str, Any]) -> Tensor:
        """What the method's function gives, or the mixer's mix of updates; from prepared parameters."""
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
            mix = self.method.mix(own, weights, stacked)
            return mix + query if self.method.adds_query(self.members) else mix
        return _ask(self.method, self.method.acts, own, given)


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
        owned: whether ``h`` may be written to: nobody else has it, and no gradient asks for it.
    """

    site: Site
    h: Tensor
    x: Tensor
    training: bool
    residual: Tensor | None = None
    banks: Banks | None = None
    owned: bool = False

    def rowwise(self, names: Collection[str], rows: slice | Tensor = slice(None)) -> dict[str, Tensor]:
        """The tensors asked for that have a row per text, of some rows or all."""
        every = isinstance(rows, slice) and rows == slice(None)

        if self.residual is None and self.site.source and {"residual", "normed"} & set(names):
            raise InfuseError(
                f"The adapter at {self.site.name} needs the input of {self.site.source}, which this call has not run: "
                "call, or checkpoint, whole layers."
            )

        def own(value: Any) -> Tensor:
            return value if every else value[rows]

        def normed(h: Tensor, residual: Tensor | None) -> Tensor:
            assert residual is not None
            total = h + residual
            return total if norm is None else norm(total)

        norm = self.site.norm
        given = {name: own(getattr(self, name)) for name in ("h", "x", "residual") if name in names}
        if "normed" in names:  # trained copies of the norm look at the route, which is that of all rows
            alone = norm is None or not norm._forward_hooks
            given["normed"] = normed(own(self.h), own(self.residual)) if alone else own(normed(self.h, self.residual))
        return given

    def fixed(self, names: Collection[str] = ("weight", "bias")) -> dict[str, Any]:
        """What is the same for all rows: of the site's weight and bias those that are asked for."""
        given = {name: getattr(self.site, name) for name in ("weight", "bias") if name in names}
        return {**given, "training": self.training, "site": self.site.name}


def cast(p: "Parameters", dtype: torch.dtype) -> "Parameters":
    return mapped(lambda value: value.to(dtype), p)


def _ask(method: Method, function: str, p: Params, given: Mapping[str, Any]) -> Any:
    """Call a method's function with those of the given tensors that it asks for."""
    return getattr(method, function)(p, **{name: given[name] for name in method.wants(function)})


@dataclass(frozen=True, eq=False)
class Kind:
    """What adapters share that run as one group at a site: a recipe (up to roles), and shapes. There is one of each."""

    recipe: Recipe
    shapes: tuple[tuple[str, torch.Size], ...]

    @staticmethod
    def of(recipe: Recipe, shapes: tuple[tuple[str, torch.Size], ...]) -> "Kind":
        return _KINDS.setdefault((recipe, shapes), Kind(recipe, shapes))

    def __reduce__(self) -> tuple[Callable[..., "Kind"], tuple[Any, ...]]:
        return Kind.of, (self.recipe, self.shapes)


_KINDS: dict[Any, Kind] = {}


def kinds(adapters: Mapping[str, Adapter], adapter: Adapter) -> dict[str, Kind]:
    """Site → the kind of an adapter's delta there."""
    found = {}
    for site in adapter.sites.values():
        method, members = adapter.method_at(site), tuple(adapters[m].method_at(site) for m in adapter.members)
        bare = (replace(method, roles=()), *(replace(m, roles=()) for m in members))
        own, inner = parameters(adapters, adapter, site)
        shapes = tuple((n, v.shape) for p in (own, *inner) for n, v in p.items())
        found[site.name] = Kind.of(Recipe.of(*bare), shapes)
    return found

"""Routes: which adapter each row of a batch uses, and the arithmetic of mixed batches.

The route belongs to the call: :func:`use` binds it to the current thread, and gradient checkpointing carries it
into the recomputation. Without one, a model's ``active`` adapter serves plain calls.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from threading import local
from typing import Any, Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.func import vmap
from torch.utils._pytree import tree_map

from infuse.adapter import Adapter
from infuse.banks import Banks
from infuse.errors import InfuseError
from infuse.method import Method, Mixer, Params
from infuse.sites import Site


@dataclass(frozen=True)
class Recipe:
    """What is computed at a site: a method, and for a mixer the methods of its members."""

    method: Method
    members: tuple[Method, ...] = ()

    @staticmethod
    def of(adapters: Mapping[str, Adapter], adapter: Adapter, site: Site) -> "Recipe":
        return Recipe(adapter.method_at(site), tuple(adapters[m].method_at(site) for m in adapter.members))

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
            _CALLS.note(fixed["site"], weights)
            return given["h"] + self.method.mix(own, weights, stacked)
        if self.method.additive:
            return given["h"] + _ask(self.method, "update", own, given)
        return _ask(self.method, "forward", own, given)


Parameters = tuple[Params, list[Params]]
"""A delta's own parameters, and those of its members."""


def _each(change: Callable[[Tensor], Tensor], p: Parameters) -> Parameters:
    """Parameters with every tensor changed (by a fraction of the work of a general tree's ``map``)."""
    own, members = p
    return {n: change(v) for n, v in own.items()}, [{n: change(v) for n, v in m.items()} for m in members]


def parameters(adapters: Mapping[str, Adapter], adapter: Adapter, site: Site) -> Parameters:
    return adapter.params(site), [adapters[m].params(site) for m in adapter.members]


@dataclass(frozen=True)
class Group:
    """Rows of a batch whose adapters run as one: same methods, same shapes, different parameters.

    ``adapters`` are the different ones, each with the version of its parameters, and ``which`` says whose each row is.
    Rows that lie side by side are a slice, which copies nothing.
    """

    kind: int
    adapters: dict[Adapter, int]
    rows: slice | Int[Tensor, " rows"]
    which: Int[Tensor, " rows"]
    found: dict[tuple[int, ...], slice | Int[Tensor, " rows"]] = field(default_factory=dict)

    def index(self, slots: tuple[int, ...]) -> slice | Int[Tensor, " rows"]:
        """The slot of every row, from those of the adapters; most sites have the same."""
        if slots not in self.found:
            every = len(self.which) == len(slots)
            at = torch.tensor(slots, device=self.which.device)
            self.found[slots] = _slots(slots, at.device) if every else at[self.which]
        return self.found[slots]

    @cached_property
    def table(self) -> Int[Tensor, "adapters most"]:
        """The rows of every adapter; those with fewer than the most repeat one."""
        own: list[list[int]] = [[] for _ in self.adapters]
        for row, adapter in enumerate(self.which.tolist()):
            own[adapter].append(row)
        most = max(map(len, own))
        return torch.tensor([rows + rows[:1] * (most - len(rows)) for rows in own], device=self.which.device)

    @cached_property
    def places(self) -> Int[Tensor, " rows"]:
        """Where each row stands in the table."""
        places = {row: place for place, row in enumerate(self.table.flatten().tolist())}
        return torch.tensor([places[row] for row in range(len(self.which))], device=self.which.device)


@dataclass(eq=False)
class Mixed:
    """A route with an entry per row; keeps its plan for each site until the next forward pass."""

    names: tuple[str | None, ...]
    levels: "list[Route] | None" = None
    plans: dict[Any, list[Group]] = field(default_factory=dict)
    alike: dict[tuple[int, ...], tuple[Adapter, list[int]]] = field(default_factory=dict)

    def plan(self, adapters: Mapping[str, Adapter], site: Site, device: torch.device) -> list[Group]:
        """The groups of rows that have a delta at ``site``."""
        if not self.alike:
            for row, name in enumerate(self.names):
                if name is not None:
                    self.alike.setdefault(tuple(adapters[name].kinds.values()), (adapters[name], []))[1].append(row)
        kinds = tuple(adapter.kinds.get(site.name) for adapter, _ in self.alike.values())
        if (kinds, device) not in self.plans:  # most sites share one plan
            rows: dict[int, list[int]] = {}
            for kind, (_, own) in zip(kinds, self.alike.values(), strict=True):
                if kind is not None:
                    rows.setdefault(kind, []).extend(own)
            groups = [_group(adapters, self.names, k, sorted(r), device) for k, r in rows.items()]
            # Scattered rows first: slices are cut from what those have left.
            groups.sort(key=lambda g: (g.rows.start or 0) if isinstance(g.rows, slice) else -1)
            self.plans[kinds, device] = groups
        return self.plans[kinds, device]

    def renew(self) -> None:
        """Forget the plans: parameters may have changed since they were made."""
        self.plans.clear()
        for level in self.levels or ():
            if isinstance(level, Mixed):
                level.plans.clear()


Route = str | Mixed | None


class _Calls(local):
    """The routes in force in this thread, innermost last (a ContextVar would break ``torch.compile``'s graph)."""

    routes: tuple[tuple[Any, Route], ...] = ()
    residuals: dict[tuple[int, str], Tensor]

    weights: dict[str, list[Tensor]] | None = None

    def __init__(self) -> None:
        self.residuals = {}

    def note(self, site: str, weights: Tensor) -> None:
        """Keep a mixer's weights if :func:`mixing_weights` listens."""
        if self.weights is not None:
            self.weights.setdefault(site, []).append(weights.detach())


_CALLS = _Calls()


class Routed(Protocol):
    """What routing needs of the store of a model."""

    active: str | None


def current(store: Routed) -> Route:
    """The route of this call: the innermost one in force for this model, else its active adapter."""
    for owner, route in reversed(_CALLS.routes):
        if owner is store:
            return route
    return store.active


@contextmanager
def use(store: Routed, route: Route) -> Iterator[None]:
    """Bind ``route`` to calls of this store's model within the block, in this thread only."""
    outer = _CALLS.routes
    _CALLS.routes = (*outer, (store, route))
    try:
        yield
    finally:
        _CALLS.routes = outer


def keep_residual(store: Routed, path: str, value: Tensor) -> None:
    """Remember the input of a site's source until the site itself is called, in this thread."""
    _CALLS.residuals[id(store), path] = value


def residual_at(store: Routed, site: Site) -> Tensor | None:
    """What :func:`keep_residual` last remembered for a site."""
    return None if site.source is None else _CALLS.residuals.get((id(store), site.source))


def forget_residuals(store: Routed) -> None:
    """Drop what a forward pass has left, so that no activation outlives it."""
    for key in [key for key in _CALLS.residuals if key[0] == id(store)]:
        del _CALLS.residuals[key]


@contextmanager
def mixing_weights() -> Iterator[dict[str, list[Tensor]]]:
    """Calls under one mixer within the block leave its weights here: site → (rows, positions, members) per call."""
    outer, _CALLS.weights = _CALLS.weights, {}
    try:
        yield _CALLS.weights
    finally:
        _CALLS.weights = outer


def side_by_side(adapters: Mapping[str, Adapter], names: Sequence[str]) -> list[int]:
    """An order of a batch's rows that puts adapters which run as one beside each other: their rows are slices then."""
    signatures = {name: tuple(sorted(adapters[name].kinds.items())) for name in dict.fromkeys(names)}
    first = {signature: i for i, signature in reversed([*enumerate(signatures.values())])}
    return sorted(range(len(names)), key=lambda row: (first[signatures[names[row]]], names[row]))


def route_of(names: str | Sequence[str | None] | None, known: Mapping[str, Any]) -> Route:
    """A route from one name or from a name per row; an error for a name that is not attached."""
    rows = (names,) if names is None or isinstance(names, str) else tuple(names)
    for name in rows:
        if name is not None and name not in known:
            have = ", ".join(known) or "none"
            raise InfuseError(f"Unknown adapter {name!r}; the model has {have}. Attach or load it first.")
    return rows[0] if names is None or isinstance(names, str) else Mixed(rows)


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


def adapted(adapters: Mapping[str, Adapter], route: Route, call: Call) -> Float[Tensor, "rows *positions width"]:
    """The activation of a call's site under ``route``; stacked adapters act one after the other."""
    for level in levels(adapters, route):
        call = replace(call, h=_adapted(adapters, level, call), kept=None)
    return call.h


def levels(adapters: Mapping[str, Adapter], route: Route) -> Sequence[Route]:
    """A route without stacks, or one for the first adapters of all stacks, one for the second, and so on."""
    if not isinstance(route, Mixed):
        return _chain(adapters, route) if route is not None else (None,)
    if route.levels is None:
        chains = [() if name is None else _chain(adapters, name) for name in route.names]
        depth = max([1, *(len(chain) for chain in chains)])
        columns = [tuple(c[i] if i < len(c) else None for c in chains) for i in range(depth)]
        # Not [route]: a cycle would keep the adapters of every call until the next full garbage collection.
        route.levels = [] if columns == [route.names] else [Mixed(names) for names in columns]
    return route.levels or (route,)


def _chain(adapters: Mapping[str, Adapter], name: str) -> tuple[str, ...]:
    adapter = adapters[name]
    return (name,) if not adapter.members or isinstance(adapter.method, Mixer) else adapter.members


def _adapted(adapters: Mapping[str, Adapter], route: Route, call: Call) -> Tensor:
    h, site = call.h, call.site
    if not isinstance(route, Mixed):
        if route is None or adapters[route].delta(site) is None:
            return h
        return _one(adapters, adapters[route], call)
    if len(h) != len(route.names):
        raise InfuseError(f"The route has {len(route.names)} entries, but the batch has {len(h)} rows at {site.name}.")
    groups = route.plan(adapters, site, h.device)
    return _joined(h, [(group.rows, _new(adapters, group, call)) for group in groups])


def _new(adapters: Mapping[str, Adapter], group: Group, call: Call) -> Tensor:
    if len(group.adapters) == 1:
        return _one(adapters, next(iter(group.adapters)), call, group.rows)
    return _many(adapters, group, call)


def _joined(h: Tensor, parts: Sequence[tuple[slice | Tensor, Tensor]]) -> Tensor:
    """``h`` with new values in some of its rows; those of slices, which come in their order, are copied once."""
    pieces, end = [], 0
    for rows, new in parts:
        if not isinstance(rows, slice):
            h = h.index_copy(0, rows, new)
        else:
            start = rows.start or 0
            pieces += [h[end:start], new] if start > end else [new]
            end = start + len(new)
    if pieces and end < len(h):
        pieces.append(h[end:])
    return torch.cat(pieces) if len(pieces) > 1 else pieces[0] if pieces else h


def _one(adapters: Mapping[str, Adapter], adapter: Adapter, call: Call, rows: slice | Tensor = slice(None)) -> Tensor:
    recipe, fixed = Recipe.of(adapters, adapter, call.site), call.fixed()
    p = recipe.prepare(parameters(adapters, adapter, call.site), fixed)
    return recipe.new(_cast(p, call.h.dtype), call.rowwise(recipe.needs, rows), fixed).to(call.h.dtype)


def _many(adapters: Mapping[str, Adapter], group: Group, call: Call) -> Tensor:
    recipe, fixed = Recipe.of(adapters, next(iter(group.adapters)), call.site), call.fixed()
    direct = call.h.ndim == 3 and all(m.stackable for m in (recipe.method, *recipe.members))
    given = call.rowwise(recipe.needs, group.rows)

    def stacked(some: Iterable[Adapter]) -> Any:
        both = tree_map(lambda *values: torch.stack(values), *[parameters(adapters, a, call.site) for a in some])
        if any(type(m).prepare is not Method.prepare for m in (recipe.method, *recipe.members)):
            both = vmap(partial(recipe.prepare, fixed=fixed))(both)
        both = _cast(both, call.h.dtype)
        return _each(lambda value: value.unsqueeze(1) if value.ndim == 2 else value, both) if direct else both

    if torch.is_grad_enabled() or torch.compiler.is_compiling() or call.banks is None:
        p = _each(lambda value: value.index_select(0, group.which), stacked(group.adapters))
    else:
        key = (call.site.name, group.kind, direct, call.h.dtype, call.h.device)
        bank, slots = call.banks.slots(key, group.adapters, stacked)
        if direct and _pays(group, bank, given):
            return _by_adapter(recipe, group, _taken(bank, _slots(slots, call.h.device)), given, fixed).to(call.h.dtype)
        p = _taken(bank, group.index(slots))
    run = partial(recipe.new, fixed=fixed)
    if not direct:
        run = vmap(run, randomness="different")
    return run(p, given).to(call.h.dtype)


def _slots(slots: tuple[int, ...], device: torch.device) -> slice | Int[Tensor, " slots"]:
    """An index of slots; where they follow each other, one that copies nothing."""
    first, last = slots[0], slots[0] + len(slots)
    return slice(first, last) if slots == tuple(range(first, last)) else torch.tensor(slots, device=device)


def _taken(bank: Parameters, at: slice | Tensor) -> Parameters:
    """The parameters in some slots of a bank."""
    return _each(lambda value: value[at] if isinstance(at, slice) else value.index_select(0, at), bank)


def _pays(group: Group, bank: Parameters, given: Mapping[str, Tensor]) -> bool:
    """Whether copying activations together by adapter is less than copying parameters for every row."""
    if len(group.adapters) == len(group.which):
        return False
    size = sum(value[0].numel() for p in (bank[0], *bank[1]) for value in p.values())
    copied = sum(value[0].numel() for value in given.values()) * 2 * group.table.numel()
    return len(group.adapters) * size + copied < len(group.which) * size


def _by_adapter(
    recipe: Recipe, group: Group, p: Parameters, given: Mapping[str, Tensor], fixed: Mapping[str, Any]
) -> Tensor:
    """All rows of an adapter as one long row: methods know no positions."""
    adapters, most = group.table.shape
    flat = group.table.flatten()
    long = {n: v.index_select(0, flat).reshape(adapters, most * v.shape[1], -1) for n, v in given.items()}
    new = recipe.new(p, long, fixed)
    return new.reshape(adapters * most, -1, new.shape[-1]).index_select(0, group.places)


def _ask(method: Method, function: str, p: Params, given: Mapping[str, Any]) -> Any:
    """Call a method's function with those of the given tensors that it asks for."""
    return getattr(method, function)(p, **{name: given[name] for name in method.wants(function)})


def _cast(p: "Parameters", dtype: torch.dtype) -> "Parameters":
    return _each(lambda value: value.to(dtype), p)


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


def _group(
    adapters: Mapping[str, Adapter], names: Sequence[str | None], kind: int, rows: list[int], device: torch.device
) -> Group:
    own = [adapters[name] for row in rows if (name := names[row]) is not None]
    versions = {adapter: _version(adapters, adapter) for adapter in dict.fromkeys(own)}
    index = {adapter: i for i, adapter in enumerate(versions)}
    which = torch.tensor([index[adapter] for adapter in own], device=device)
    first, last = rows[0], rows[-1] + 1
    if len(rows) == len(names):
        at = slice(None)
    elif len(rows) == last - first:
        at = slice(first, last)
    else:
        at = torch.tensor(rows, device=device)
    return Group(kind, versions, at, which)


def _version(adapters: Mapping[str, Adapter], adapter: Adapter) -> int:
    if torch.compiler.is_compiling():  # where no bank is used
        return 0
    return adapter.version() + sum(adapters[member].version() for member in adapter.members)


def run_copies(
    adapters: Mapping[str, Adapter], route: Route, path: str, output: Any, args: tuple, kwargs: dict[str, Any]
) -> Any:
    """The output of the module at ``path`` where an adapter has a trained copy of it."""
    if not isinstance(route, Mixed):
        own = adapters[route].copy_of(path) if route is not None else None
        return output if own is None else _call(own, args, kwargs)
    out = output
    for name in dict.fromkeys(n for n in route.names if n is not None):
        own = adapters[name].copy_of(path)
        if own is None:
            continue
        rows = torch.tensor([i for i, n in enumerate(route.names) if n == name], device=output.device)
        new = _call(own, tuple(a[rows] if isinstance(a, Tensor) else a for a in args), kwargs)
        if new.shape[1:] != output.shape[1:]:
            raise InfuseError(
                f"The head {path!r} of adapter {name!r} gives {new.shape[-1]} values a row and another one in this "
                f"batch {output.shape[-1]}: route adapters with different labels through infuse.heads."
            )
        out = out.index_copy(0, rows, new.to(out.dtype))
    return out


def _call(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
    dtype = next(module.parameters()).dtype
    own = tuple(a.to(dtype) if isinstance(a, Tensor) and a.is_floating_point() else a for a in args)
    out = module(*own, **kwargs)
    # A norm hands on the trunk's dtype, which the next module needs; a head's logits keep their precision.
    return out.to(args[0].dtype) if isinstance(out, Tensor) and out.shape == args[0].shape else out

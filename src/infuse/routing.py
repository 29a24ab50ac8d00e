"""Routes: which adapter each row of a batch uses, and which rows run as one.

The route belongs to the call: :func:`use` binds it to the calls within a block, whatever runs them (see
:mod:`infuse.scopes`). Without one, a model's ``active`` adapter serves plain calls.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import torch
from jaxtyping import Int
from torch import Tensor

from infuse.adapter import Adapter
from infuse.errors import InfuseError
from infuse.method import Mixer
from infuse.packing import current as current_packed
from infuse.scopes import PerThread, bind, innermost
from infuse.sites import Site

TOKENS, RUNS = 32, 4
"""Packed rows of one adapter run together, so many at a time; the number of runs is a multiple."""


@dataclass(frozen=True)
class Group:
    """Rows of a batch whose adapters run as one: same methods, same shapes, different parameters.

    ``adapters`` are the different ones, each with the version of its parameters, and ``which`` says whose each row is.
    Rows that lie side by side are a slice, which copies nothing. ``width`` is that of the table; 0: of the adapter with
    the most rows.
    """

    kind: Any
    adapters: dict[Adapter, int]
    rows: slice | Int[Tensor, " rows"]
    which: Int[Tensor, " rows"]
    width: int = 0
    found: dict[Any, Any] = field(default_factory=dict)

    def index(self, slots: tuple[int, ...]) -> slice | Int[Tensor, " rows"]:
        """The slot of every row, from those of the adapters; most sites have the same."""
        if slots not in self.found:
            every = len(self.which) == len(slots)
            at = torch.tensor(slots, device=self.which.device)
            self.found[slots] = slots_at(slots, at.device) if every else at[self.which]
        return self.found[slots]

    def index_of_runs(self, slots: tuple[int, ...]) -> slice | Int[Tensor, " runs"]:
        """The slot of every run of the table."""
        if ("runs", slots) not in self.found:
            self.found["runs", slots] = slots_at(tuple(slots[i] for i in self.runs), self.which.device)
        return self.found["runs", slots]

    @cached_property
    def table(self) -> Int[Tensor, "runs width"]:
        """Runs of rows of one adapter each, its last ones filled up with another of its rows; see ``runs``."""
        rows, _ = self._cut
        return torch.tensor(rows, device=self.which.device)

    @property
    def runs(self) -> list[int]:
        """The adapter of every run of the table."""
        return self._cut[1]

    @cached_property
    def places(self) -> Int[Tensor, " rows"]:
        """Where each row stands in the table."""
        places = {row: place for place, row in enumerate(row for run in self._cut[0] for row in run)}
        return torch.tensor([places[row] for row in range(len(self.which))], device=self.which.device)

    @cached_property
    def _cut(self) -> tuple[list[list[int]], list[int]]:
        own: list[list[int]] = [[] for _ in self.adapters]
        for row, adapter in enumerate(self.which.tolist()):
            own[adapter].append(row)
        width = self.width or max(map(len, own))
        runs = [(adapter, rows[i : i + width]) for adapter, rows in enumerate(own) for i in range(0, len(rows), width)]
        if self.width:
            runs += runs[:1] * (-len(runs) % RUNS)
        return [rows + rows[:1] * (width - len(rows)) for _, rows in runs], [adapter for adapter, _ in runs]


@dataclass(eq=False)
class Mixed(PerThread):
    """A route with an entry per row; keeps its plan for each site until the next forward pass."""

    names: tuple[str | None, ...]
    levels: "list[Route] | None" = None
    plans: dict[Any, list[Group]] = field(default_factory=dict)
    groups: dict[Any, Group] = field(default_factory=dict)
    versions: dict[str, int] = field(default_factory=dict)
    alike: list[tuple[Adapter, list[int]]] = field(default_factory=list)

    def plan(self, adapters: Mapping[str, Adapter], site: Site, device: torch.device) -> list[Group]:
        """The groups of rows that have a delta at ``site``."""
        kinds = tuple(adapter.kinds.get(site.name) for adapter, _ in self.alike)
        if (kinds, device) not in self.plans:  # most sites share one plan
            alike: dict[Any, list[int]] = {}
            for i, kind in enumerate(kinds):
                if kind is not None:
                    alike.setdefault(kind, []).append(i)
            groups = [self._group(adapters, kind, tuple(which), device) for kind, which in alike.items()]
            # Scattered rows first: slices are cut from what those have left.
            groups.sort(key=lambda g: (g.rows.start or 0) if isinstance(g.rows, slice) else -1)
            self.plans[kinds, device] = groups
        return self.plans[kinds, device]

    def _group(self, adapters: Mapping[str, Adapter], kind: Any, alike: tuple[int, ...], device: torch.device) -> Group:
        if (kind, alike, device) in self.groups:  # sites with different plans may share groups
            return self.groups[kind, alike, device]
        rows = sorted(row for i in alike for row in self.alike[i][1])
        own: list[Any] = [self.names[row] for row in rows]  # none of them None: those have no kind
        index = {name: i for i, name in enumerate(dict.fromkeys(own))}
        for name in index:
            if name not in self.versions:
                self.versions[name] = _version(adapters, adapters[name])
        versions = {adapters[name]: self.versions[name] for name in index}
        which = torch.tensor([index[name] for name in own], device=device)
        first, last = rows[0], rows[-1] + 1
        if len(rows) == len(self.names):
            at = slice(None)
        elif len(rows) == last - first:
            at = slice(first, last)
        else:
            at = torch.tensor(rows, device=device)
        group = Group(kind, versions, at, which, TOKENS if current_packed() else 0)
        self.groups[kind, alike, device] = group
        return group

    def sort(self, adapters: Mapping[str, Adapter]) -> None:
        """Find the rows whose adapters run as one: before a call, as ``torch.compile`` can't compare signatures."""
        signatures = {name: adapters[name].signature for name in dict.fromkeys(self.names) if name is not None}
        alike: dict[Any, tuple[Adapter, list[int]]] = {}
        for row, name in enumerate(self.names):
            if name is not None:
                alike.setdefault(signatures[name], (adapters[name], []))[1].append(row)
        self.alike = list(alike.values())

    def copy(self) -> "Mixed":
        """The same route, with plans of its own."""
        return Mixed(self.names)

    def repeat(self, count: int) -> None:
        """Give every entry ``count`` rows, side by side."""
        self.names = tuple(name for name in self.names for _ in range(count))
        self.levels = None
        self.renew()

    def renew(self) -> None:
        """Forget the plans: parameters may have changed since they were made."""
        self.plans.clear()
        self.groups.clear()
        self.versions.clear()
        for level in self.levels or ():
            if isinstance(level, Mixed):
                level.renew()


Route = str | Mixed | None


class Routed(Protocol):
    """What routing needs of the store of a model."""

    active: str | None


def current(store: Routed) -> Route:
    """The route of this call: the innermost one in force for this model, else its active adapter."""
    return innermost(store, store.active)


def use(store: Routed, route: Route) -> AbstractContextManager[None]:
    """Bind ``route`` to calls of this store's model within the block."""
    return bind(store, route)


def side_by_side(adapters: Mapping[str, Adapter], names: Sequence[str]) -> list[int]:
    """An order of a batch's rows that puts adapters which run as one beside each other: their rows are slices then."""
    signatures = {name: adapters[name].signature for name in dict.fromkeys(names)}
    first = {signature: i for i, signature in reversed([*enumerate(signatures.values())])}
    return sorted(range(len(names)), key=lambda row: (first[signatures[names[row]]], names[row]))


def route_of(names: str | Sequence[str | None] | None, known: Mapping[str, Any]) -> Route:
    """A route from one name or from a name per row; an error for a name that is not attached."""
    rows = (names,) if names is None or isinstance(names, str) else tuple(names)
    for name in dict.fromkeys(rows):
        if name is not None and name not in known:
            have = ", ".join(known) or "none"
            raise InfuseError(f"Unknown adapter {name!r}; the model has {have}. Attach or load it first.")
    return rows[0] if names is None or isinstance(names, str) else Mixed(rows)


def levels(adapters: Mapping[str, Adapter], route: Route) -> Sequence[Route]:
    """A route without stacks, or one for the first adapters of all stacks, one for the second, and so on."""
    if not isinstance(route, Mixed):
        return _chain(adapters, route) if route is not None else (None,)
    if route.levels is None:
        chains = {name: () if name is None else _chain(adapters, name) for name in dict.fromkeys(route.names)}
        depth = max([1, *map(len, chains.values())])
        firsts = [{name: c[i] if i < len(c) else None for name, c in chains.items()} for i in range(depth)]
        columns = [tuple(first[name] for name in route.names) for first in firsts]
        # Not [route]: a cycle would keep the adapters of every call until the next full garbage collection.
        own = [] if columns == [route.names] else [Mixed(names) for names in columns]
        for level in own or (route,):
            level.sort(adapters)
        route.levels = own  # type: ignore[assignment]  # a list of mixed routes
    return route.levels or (route,)


def _chain(adapters: Mapping[str, Adapter], name: str) -> tuple[str, ...]:
    adapter = adapters[name]
    return (name,) if not adapter.members or isinstance(adapter.method, Mixer) else adapter.members


def slots_at(slots: tuple[int, ...], device: torch.device) -> slice | Int[Tensor, " slots"]:
    """An index of slots; where they follow each other, one that copies nothing."""
    first, last = slots[0], slots[0] + len(slots)
    return slice(first, last) if slots == tuple(range(first, last)) else torch.tensor(slots, device=device)


def _version(adapters: Mapping[str, Adapter], adapter: Adapter) -> int:
    if torch.compiler.is_compiling():  # where no bank is used
        return 0
    return adapter.version() + sum(adapters[member].version() for member in adapter.members)

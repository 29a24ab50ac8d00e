"""Routes: which adapter each row of a batch uses, and the arithmetic of mixed batches.

The route belongs to the call: :func:`use` binds it to the current thread, and gradient checkpointing carries it
into the recomputation. Without one, a model's ``active`` adapter serves plain calls.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from threading import local
from typing import Any, Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.func import vmap

from infuse.adapter import Adapter
from infuse.errors import InfuseError
from infuse.method import Method, Params
from infuse.sites import Site


@dataclass(frozen=True)
class Group:
    """Rows of a batch whose adapters run as one: same method, same shapes, different parameters."""

    adapters: tuple[Adapter, ...]
    rows: Int[Tensor, " rows"]
    which: Int[Tensor, " rows"]


@dataclass(eq=False)
class Mixed:
    """A route with an entry per row; keeps its plan for each site."""

    names: tuple[str | None, ...]
    plans: dict[tuple[str, torch.device], list[Group]] = field(default_factory=dict)

    def plan(self, adapters: Mapping[str, Adapter], site: Site, device: torch.device) -> list[Group]:
        """The groups of rows that have a delta at ``site``."""
        if (site.name, device) not in self.plans:
            members: dict[Any, list[tuple[int, Adapter]]] = {}
            for row, name in enumerate(self.names):
                if name is not None and (delta := adapters[name].delta(site)) is not None:
                    shapes = tuple((k, v.shape) for k, v in adapters[name].params(site).items())
                    members.setdefault((replace(delta.method, roles=()), shapes), []).append((row, adapters[name]))
            self.plans[site.name, device] = [_group(rows, device) for rows in members.values()]
        return self.plans[site.name, device]


Route = str | Mixed | None


class _Calls(local):
    """The routes in force in this thread, innermost last (a ContextVar would break ``torch.compile``'s graph)."""

    routes: tuple[tuple[Any, Route], ...] = ()


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


def route_of(names: str | Sequence[str | None] | None, known: Sequence[str]) -> Route:
    """A route from one name or from a name per row; a uniform one becomes that single name."""
    rows = (names,) if names is None or isinstance(names, str) else tuple(names)
    for name in rows:
        if name is not None and name not in known:
            have = ", ".join(known) or "none"
            raise InfuseError(f"Unknown adapter {name!r}; the model has {have}. Attach or load it first.")
    return rows[0] if names is None or isinstance(names, str) else Mixed(rows)


def adapted(
    adapters: Mapping[str, Adapter],
    route: Route,
    site: Site,
    h: Float[Tensor, "rows *positions width"],
    x: Float[Tensor, "rows *positions in_features"],
    training: bool,
) -> Float[Tensor, "rows *positions width"]:
    """The activation ``h`` of ``site`` under ``route``; ``x`` is the input of the site's module."""
    if not isinstance(route, Mixed):
        if route is None or adapters[route].delta(site) is None:
            return h
        return _one(adapters[route], site, h, x, training)
    if len(h) != len(route.names):
        raise InfuseError(f"The route has {len(route.names)} entries, but the batch has {len(h)} rows at {site.name}.")
    out = h
    for group in route.plan(adapters, site, h.device):
        every = len(group.rows) == len(h)
        h_rows, x_rows = (h, x) if every else (h[group.rows], x[group.rows])
        if len(group.adapters) == 1:
            new = _one(group.adapters[0], site, h_rows, x_rows, training)
        else:
            new = _many(group, site, h_rows, x_rows, training)
        out = new if every else out.index_copy(0, group.rows, new)
    return out


def _one(adapter: Adapter, site: Site, h: Tensor, x: Tensor, training: bool) -> Tensor:
    delta = adapter.delta(site)
    assert delta is not None
    method, given = delta.method, _given(site, training)
    p = _cast(_ask(method, "prepare", adapter.params(site), given), h.dtype)
    return _ask(method, "forward", p, given | {"h": h, "x": x}).to(h.dtype)


def _many(group: Group, site: Site, h: Tensor, x: Tensor, training: bool) -> Tensor:
    delta = group.adapters[0].delta(site)
    assert delta is not None
    method, given = delta.method, _given(site, training)
    each = [adapter.params(site) for adapter in group.adapters]
    stacked: Params = {name: torch.stack([p[name] for p in each]) for name in each[0]}
    if type(method).prepare is not Method.prepare:
        stacked = vmap(partial(_ask, method, "prepare", given=given))(stacked)
    rows = {name: value[group.which] for name, value in _cast(stacked, h.dtype).items()}

    def row(p: Params, h: Tensor, x: Tensor) -> Tensor:
        return _ask(method, "forward", p, given | {"h": h, "x": x})

    return vmap(row, randomness="different")(rows, h, x).to(h.dtype)


def _given(site: Site, training: bool) -> dict[str, Any]:
    return {"weight": site.weight, "bias": site.bias, "training": training}


def _ask(method: Method, function: str, p: Params, given: Mapping[str, Any]) -> Any:
    """Call a method's function with those of the given tensors that it asks for."""
    return getattr(method, function)(p, **{name: given[name] for name in method.asks[function]})


def _cast(params: Params, dtype: torch.dtype) -> Params:
    return {name: value.to(dtype) for name, value in params.items()}


def _group(members: list[tuple[int, Adapter]], device: torch.device) -> Group:
    adapters = list(dict.fromkeys(adapter for _, adapter in members))
    index = {adapter: i for i, adapter in enumerate(adapters)}
    rows = torch.tensor([row for row, _ in members], device=device)
    which = torch.tensor([index[adapter] for _, adapter in members], device=device)
    return Group(tuple(adapters), rows, which)


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
    args = tuple(a.to(dtype) if isinstance(a, Tensor) and a.is_floating_point() else a for a in args)
    out = module(*args, **kwargs)
    return out.to(args[0].dtype) if isinstance(out, Tensor) else out

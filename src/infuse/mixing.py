"""The arithmetic of a call: a site's activation under its route, mixed batches included."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import vmap
from torch.utils._pytree import tree_map

from infuse.adapter import Adapter
from infuse.errors import InfuseError
from infuse.lean import scale
from infuse.recipe import Call, Parameters, Recipe, cast, mapped, parameters
from infuse.routing import Group, Mixed, Route, levels


def adapted(adapters: Mapping[str, Adapter], route: Route, call: Call) -> Float[Tensor, "rows *positions width"]:
    """The activation of a call's site under ``route``; stacked adapters act one after the other."""
    for level in levels(adapters, route):
        call.h = _adapted(adapters, level, call)
    return call.h


def _adapted(adapters: Mapping[str, Adapter], route: Route, call: Call) -> Tensor:
    h, site = call.h, call.site
    if not isinstance(route, Mixed):
        if route is None or adapters[route].delta(site) is None:
            return h
        acts, value = _one(adapters, adapters[route], call)
        return NEW[acts](h, value).to(h.dtype)
    if len(h) != len(route.names):
        raise InfuseError(f"The route has {len(route.names)} entries, but the batch has {len(h)} rows at {site.name}.")
    parts = [(group.rows, *_part(adapters, group, call)) for group in route.plan(adapters, site, h.device)]
    if not call.owned:
        return _joined(h, parts)
    for rows, acts, value in parts:
        _write(h, rows, acts, value.to(h.dtype))
    return h


NEW: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "update": torch.add, "factor": scale, "forward": lambda h, value: value,
}  # fmt: skip
"""How an activation and what a method's function gives make the new activation."""
WRITE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "update": Tensor.add_, "factor": Tensor.mul_, "forward": Tensor.copy_,
}  # fmt: skip
"""The same in place."""


def _part(adapters: Mapping[str, Adapter], group: Group, call: Call) -> tuple[str, Tensor]:
    """For the rows of a group: what acts on the activation, and how (see :attr:`infuse.method.Method.acts`)."""
    if len(group.adapters) == 1:
        return _one(adapters, next(iter(group.adapters)), call, group.rows)
    return _many(adapters, group, call)


def _joined(h: Tensor, parts: Sequence[tuple[slice | Tensor, str, Tensor]]) -> Tensor:
    """``h`` with new values in some of its rows; those of slices, which come in their order, are copied once."""
    pieces, end = [], 0
    for rows, acts, value in parts:
        new = NEW[acts](h[rows], value).to(h.dtype)
        if not isinstance(rows, slice):
            h = h.index_copy(0, rows, new)
        else:
            start = rows.start or 0
            pieces += [h[end:start], new] if start > end else [new]
            end = start + len(new)
    if pieces and end < len(h):
        pieces.append(h[end:])
    return torch.cat(pieces) if len(pieces) > 1 else pieces[0] if pieces else h


def _write(h: Tensor, rows: slice | Tensor, acts: str, value: Tensor) -> None:
    """:func:`_joined` for one group, in place."""
    if isinstance(rows, slice):
        WRITE[acts](h[rows], value)
    elif acts == "update":
        h.index_add_(0, rows, value)
    else:
        h.index_copy_(0, rows, NEW[acts](h[rows], value))


def _one(
    adapters: Mapping[str, Adapter], adapter: Adapter, call: Call, rows: slice | Tensor = slice(None)
) -> tuple[str, Tensor]:
    recipe: Recipe = adapter.kinds[call.site.name].recipe
    p = parameters(adapters, adapter, call.site)
    if recipe.prepares:
        p = recipe.prepare(p, call.fixed())
    return recipe.acts, recipe.part(cast(p, call.h.dtype), call.rowwise(recipe.needs, rows), call.fixed(recipe.needs))


def _many(adapters: Mapping[str, Adapter], group: Group, call: Call) -> tuple[str, Tensor]:
    recipe: Recipe = group.kind.recipe
    direct = call.h.ndim == 3 and recipe.stackable
    given, fixed = call.rowwise(recipe.needs, group.rows), call.fixed(recipe.needs)

    def stacked(some: Iterable[Adapter], kept: bool = False) -> Any:
        both = tree_map(lambda *values: torch.stack(values), *[parameters(adapters, a, call.site) for a in some])
        if recipe.prepares:
            both = vmap(partial(recipe.prepare, fixed=call.fixed()))(both)
        if kept:
            both = vmap(recipe.condense)(both)
        both = cast(both, call.h.dtype)
        return mapped(lambda value: value.unsqueeze(1) if value.ndim == 2 else value, both) if direct else both

    if torch.is_grad_enabled() or torch.compiler.is_compiling() or call.banks is None:
        p = mapped(lambda value: value.index_select(0, group.which), stacked(group.adapters))
    else:
        key = (call.site.name, group.kind, direct, call.h.dtype, call.h.device)
        versions: Mapping[Adapter, Any] = group.adapters
        if recipe.reads_base:
            base = _version(call.site.weight)
            versions = {adapter: (own, base) for adapter, own in versions.items()}
        bank, slots = call.banks.slots(key, versions, partial(stacked, kept=True))
        if direct and given and _pays(group, bank, given):
            p = _taken(bank, group.index_of_runs(slots))
            return recipe.acts, _by_adapter(recipe, group, p, given, fixed)
        p = _taken(bank, group.index(slots))
    run = partial(recipe.part, fixed=fixed)
    if direct:
        return recipe.acts, run(p, given)
    value = vmap(run, randomness="different")(p, given)
    return recipe.acts, value.reshape(len(value), *(1,) * (call.h.ndim - value.ndim), *value.shape[1:])


def _version(weight: Tensor) -> tuple[int, int]:
    """What differs once a weight was written to or replaced."""
    return -1 if weight.is_inference() else weight._version, weight.data_ptr()


def _taken(bank: Parameters, at: slice | Tensor) -> Parameters:
    """The parameters in some slots of a bank."""
    return mapped(lambda value: value[at] if isinstance(at, slice) else value.index_select(0, at), bank)


def _pays(group: Group, bank: Parameters, given: Mapping[str, Tensor]) -> bool:
    """Whether copying activations together by adapter is less than copying parameters for every row."""
    if len(group.adapters) == len(group.which):
        return False
    if "pays" not in group.found:
        size = sum(value[0].numel() for p in (bank[0], *bank[1]) for value in p.values())
        copied = sum(value[0].numel() for value in given.values()) * 2 * group.table.numel()
        group.found["pays"] = len(group.runs) * size + copied < len(group.which) * size
    return group.found["pays"]


def _by_adapter(
    recipe: Recipe, group: Group, p: Parameters, given: Mapping[str, Tensor], fixed: Mapping[str, Any]
) -> Tensor:
    """Rows of an adapter as one long row: methods know no positions."""
    runs, width = group.table.shape
    flat = group.table.flatten()
    long = {n: v.index_select(0, flat).reshape(runs, width * v.shape[1], -1) for n, v in given.items()}
    new = recipe.part(p, long, fixed)
    return new.reshape(runs * width, -1, new.shape[-1]).index_select(0, group.places)


def run_copies(
    adapters: Mapping[str, Adapter], route: Route, path: str, output: Any, args: tuple, kwargs: dict[str, Any]
) -> Any:
    """The output of the module at ``path`` where an adapter has a trained copy of it."""
    for level in levels(adapters, route):
        output = _run_copies(adapters, level, path, output, args, kwargs)
    return output


def _run_copies(
    adapters: Mapping[str, Adapter], route: Route, path: str, output: Any, args: tuple, kwargs: dict[str, Any]
) -> Any:
    if not isinstance(route, Mixed):
        own = adapters[route].copy_of(path) if route is not None else None
        return output if own is None else _call(own, args, kwargs)
    out = output
    for name in dict.fromkeys(n for n in route.names if n is not None):
        own = adapters[name].copy_of(path)
        if own is None:
            continue
        count = len(route.names)
        if not isinstance(output, Tensor) or not output.ndim or len(output) != count:
            raise InfuseError(
                f"The copy of {path!r} in adapter {name!r} can't share a batch with other adapters: what that module "
                "gives has no row for each text. Run the rows of this adapter by themselves."
            )
        rows = torch.tensor([i for i, n in enumerate(route.names) if n == name], device=output.device)
        given, named = tuple(_cut(a, rows, count) for a in args), {k: _cut(v, rows, count) for k, v in kwargs.items()}
        new = _call(own, given, named)
        if new.shape[1:] != output.shape[1:]:
            raise InfuseError(
                f"The head {path!r} of adapter {name!r} gives {new.shape[-1]} values a row and another one in this "
                f"batch {output.shape[-1]}: route adapters with different labels through infuse.heads."
            )
        out = out.index_copy(0, rows, new.to(out.dtype))
    return out


def _cut(value: Any, rows: Tensor, count: int) -> Any:
    """Some rows of what has a row for each text."""
    return value[rows] if isinstance(value, Tensor) and value.ndim and len(value) == count else value


def _call(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
    dtype = next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)  # none: quantised
    own = tuple(a.to(dtype) if isinstance(a, Tensor) and a.is_floating_point() else a for a in args)
    out = module(*own, **kwargs)
    # A norm hands on the trunk's dtype, which the next module needs; a head's logits keep their precision.
    given = next((a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)), None)
    return out.to(given.dtype) if isinstance(out, Tensor) and given is not None and out.shape == given.shape else out

"""Taps: the forward hooks through which adapters reach the base model, whose module tree stays as it is."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from infuse.arch import ARCHS
from infuse.calls import forget_residuals, keep_residual, residual_at
from infuse.errors import InfuseError
from infuse.mixing import adapted, run_copies
from infuse.recipe import Call
from infuse.routing import Mixed, Route, current, use
from infuse.sites import Site


class Tap:
    """The hooks of one module: they replace its input, slices of its output, or (for a copy) all of its output."""

    def __init__(self, store: Any, module: nn.Module, path: str):
        self.store = store
        self.path = path
        self.source = False
        self.inputs: list[Site] = []
        self.outputs: list[Site] = []
        self.handles = [
            module.register_forward_pre_hook(self.before, with_kwargs=True),
            module.register_forward_hook(self.after, with_kwargs=True),
        ]

    def add(self, site: Site) -> None:
        sites = self.inputs if site.side == "input" else self.outputs
        if all(s.name != site.name for s in sites):
            sites.append(site)
            sites.sort(key=lambda s: (not s.whole, s.start))

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()

    def before(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        if not (self.inputs or self.source) or (route := self.store.route()) is None:
            return None
        if self.source:
            keep_residual(self.store, self.path, args[0] if args else kwargs["hidden_states"])
        if not self.inputs:
            return None
        h = args[0]
        alone = self.store.arch in ARCHS and not self.store.copied and _unwatched()
        for site in self.inputs:
            h = self._adapted(route, site, h, h, alone and site.role == "ffn_hidden")  # which nothing else reads there
        return (h, *args[1:]), kwargs

    def after(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        if (route := self.store.route()) is None:
            return None
        if self.path in self.store.copied:
            return run_copies(self.store.adapters, route, self.path, output, args, kwargs)
        return self._outputs(route, output, args[0]) if self.outputs else None

    def _adapted(self, route: Route, site: Site, h: Tensor, x: Tensor, owned: bool = False) -> Tensor:
        call = Call(site, h, x, self.store.training, residual_at(self.store, site), self.store.banks, owned)
        return adapted(self.store.adapters, route, call)

    def _outputs(self, route: Route, h: Tensor, x: Tensor) -> Tensor:
        owned = h is not x and _unwatched()
        slices = []
        for site in self.outputs:
            if site.whole:
                h = self._adapted(route, site, h, x, owned)
            else:
                slices.append(site)
        pieces, end, written = [], 0, True
        for site in slices:
            own = h[..., site.start : site.stop]
            new = self._adapted(route, site, own, x, owned)
            written = written and new is own
            pieces += [h[..., end : site.start], new]
            end = site.stop
        return h if written else torch.cat([*pieces, h[..., end:]], dim=-1)


def _unwatched() -> bool:
    """Whether neither autograd nor a compiler follows what happens to tensors: they may be written to."""
    return not (torch.is_grad_enabled() or torch.compiler.is_compiling())


class PerAdapter:
    """Runs a module once per adapter of a mixed batch and puts the rows together again.

    For modules that feed a tensor without batch dimension through an adapted projection (DeBERTa's relative position
    embeddings): no row of a batch could say whose delta that tensor needs.
    """

    def __init__(self, store: Any, module: nn.Module, batched: Sequence[str]):
        self.store = store
        self.module = module
        self.batched = frozenset(batched)
        self.inner: Callable = module.forward
        self.parameters = tuple(inspect.signature(module.forward).parameters)
        module.forward = self

    def remove(self) -> None:
        del self.module.forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        route = self.store.route()
        if not isinstance(route, Mixed):
            return self.inner(*args, **kwargs)
        given = dict(zip(self.parameters, args, strict=False)) | kwargs
        batch = next(v for n, v in given.items() if n in self.batched and isinstance(v, Tensor))
        if len(batch) != len(route.names):
            raise InfuseError(f"The route has {len(route.names)} entries, but the batch has {len(batch)} rows.")
        rows: dict[str | None, list[int]] = {}
        for row, name in enumerate(route.names):
            rows.setdefault(name, []).append(row)
        parts = []
        for name, index in rows.items():
            at = torch.tensor(index, device=batch.device)
            own = {n: v[at] if n in self.batched and isinstance(v, Tensor) else v for n, v in given.items()}
            with use(self.store, name):
                parts.append(self.inner(**own))
        order = torch.tensor([i for index in rows.values() for i in index], device=batch.device).argsort()
        return _joined(parts, order)


class Carry:
    """A model's checkpointing function that takes the route of the forward pass along into the recomputation."""

    def __init__(self, store: Any, inner: Callable):
        self.store = store
        self.inner = inner

    def __call__(self, run: Callable, *args: Any, **kwargs: Any) -> Any:
        route = current(self.store)

        def within(*args: Any, **kwargs: Any) -> Any:
            try:
                with use(self.store, route):
                    return run(*args, **kwargs)
            finally:  # the recomputation ends within no forward pass of the model, and often by an exception
                forget_residuals(self.store)

        return self.inner(within, *args, **kwargs)


def carry_routes(store: Any, layers: Sequence[nn.Module]) -> None:
    """Wrap the checkpointing function of the layers that have gradient checkpointing switched on."""
    for layer in layers:
        inner = getattr(layer, "_gradient_checkpointing_func", None)
        if isinstance(inner, Carry) and inner.store is not store:
            inner = inner.inner
        if inner is not None and not isinstance(inner, Carry):
            layer._gradient_checkpointing_func = Carry(store, inner)  # type: ignore[assignment]  # not a module


def drop_routes(layers: Sequence[nn.Module]) -> None:
    """Undo :func:`carry_routes`."""
    for layer in layers:
        carry = getattr(layer, "_gradient_checkpointing_func", None)
        if isinstance(carry, Carry):
            layer._gradient_checkpointing_func = carry.inner  # type: ignore[assignment]  # not a module


def _joined(parts: list[Any], order: Tensor) -> Any:
    first = parts[0]
    if isinstance(first, Tensor):
        return torch.cat(parts)[order]
    if isinstance(first, tuple):
        return tuple(_joined(list(column), order) for column in zip(*parts, strict=True))
    return first

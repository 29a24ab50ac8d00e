"""Taps: the forward hooks through which adapters reach the base model, whose module tree stays as it is."""

import copy
import inspect
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
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
        for hooks in (module._forward_pre_hooks, module._forward_hooks):  # which a swap of modules has copied
            for key in [
                k for k, hook in hooks.items() if getattr(getattr(hook, "__self__", None), "store", 0) is store
            ]:
                del hooks[key]
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

    def before(self, module: nn.Module, args: tuple, kwargs: dict[str, Any] | None = None) -> tuple | None:
        """A pre-hook; a swap of modules may have copied it as one that gets no ``kwargs``."""
        if not (self.inputs or self.source) or (route := self.store.route()) is None:
            return None
        if self.source:
            keep_residual(self.store, self.path, args[0] if args else (kwargs or {})["hidden_states"])
        if not self.inputs:
            return None
        h = args[0]
        alone = self.store.arch in ARCHS and not self.store.copied and _unwatched()
        for site in self.inputs:
            h = self._adapted(route, site, h, h, alone and site.role == "ffn_hidden")  # which nothing else reads there
        return (h, *args[1:]) if kwargs is None else ((h, *args[1:]), kwargs)

    def after(self, module: nn.Module, args: tuple, *rest: Any) -> Any:
        """A hook, with ``kwargs`` and the output or, copied by a swap of modules, the output alone."""
        kwargs, output = rest if len(rest) == 2 else ({}, *rest)
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


def _nothing() -> None:
    """What a reference gives whose module is gone."""


class Wrapped:
    """A method of one module that is replaced as long as something is attached; copies and pickles take it along.

    The module is referred to weakly: its memory is free with its last user's reference, not with a garbage collection.
    """

    def __init__(self, store: Any, module: nn.Module, name: str):
        self.store = store
        self.refer: Callable[[], Any] = weakref.ref(module)
        self.name = name
        self.before: Callable | None = vars(module).get(name)
        self.__signature__ = inspect.signature(getattr(module, name))
        self.__name__ = name
        setattr(module, name, self)

    def inner(self, *args: Any, **kwargs: Any) -> Any:
        """What is replaced. (A bound method is what ``torch.compile`` would look up again, and find this.)"""
        module = self.refer()
        if self.before is not None:
            return self.before(*args, **kwargs)
        return getattr(type(module), self.name)(module, *args, **kwargs)

    @property
    def __code__(self) -> Any:
        """As of a method: ``torch.export`` asks where it stands."""
        return getattr(self.before or getattr(type(self.refer()), self.name), "__code__")  # noqa: B009  # no type has it

    def remove(self) -> None:
        """Put back what was there; what somebody else has wrapped around this since stays, and reaches through it."""
        module = self.refer()
        if vars(module).get(self.name) is not self:
            return
        if self.before is None:
            delattr(module, self.name)
        else:
            setattr(module, self.name, self.before)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Wrapped":
        """Of a whole model's copy; in the copy of a part it refers to nothing, and what hangs on it rests."""
        twin = memo[id(self)] = type(self).__new__(type(self))
        module = memo.get(id(self.refer()))
        state = {name: copy.deepcopy(value, memo) for name, value in vars(self).items() if name != "refer"}
        vars(twin).update(state, refer=_nothing if module is None else weakref.ref(module))
        return twin

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"refer": self.refer()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, refer=weakref.ref(state["refer"]))


_NONE: Any = object()


class Routable(Wrapped):
    """``forward`` or ``generate`` with one more argument: ``route``, as :func:`infuse.route` takes it."""

    def __init__(self, store: Any, module: nn.Module, name: str):
        super().__init__(store, module, name)
        given = self.__signature__.parameters.values()
        route = inspect.Parameter("route", inspect.Parameter.KEYWORD_ONLY, default=None)
        rest = [p for p in given if p.kind is inspect.Parameter.VAR_KEYWORD]
        self.__signature__ = self.__signature__.replace(parameters=[*(p for p in given if p not in rest), route, *rest])

    def __call__(self, *args: Any, route: Any = _NONE, **kwargs: Any) -> Any:
        if route is _NONE:
            return self.run(*args, **kwargs)
        with use(self.store, self.store.chosen(route)):
            return self.run(*args, **kwargs)

    def run(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner(*args, **kwargs)


class Forward(Routable):
    """``forward``; not hooks of the model, which callers of its ``forward`` pass by, and interrupts leave open."""

    def run(self, *args: Any, **kwargs: Any) -> Any:
        self.store.enter(self.refer())
        try:
            return self.inner(*args, **kwargs)
        finally:
            forget_residuals(self.store)


class Generate(Routable):
    """``generate``: beams and returned samples of a row have its route, which is expanded as the inputs are."""

    def run(self, *args: Any, **kwargs: Any) -> Any:
        route = current(self.store)
        if not isinstance(route, Mixed):
            return self.inner(*args, **kwargs)
        with use(self.store, route.copy()):
            return self.inner(*args, **kwargs)


class Sorted(Routable):
    """A method that takes a list of texts and sorts it by length: a route with an entry per text takes turns."""

    def run(self, *args: Any, **kwargs: Any) -> Any:
        route = current(self.store)
        apart = kwargs.get("pool") is not None or isinstance(kwargs.get("device"), list | tuple)
        if apart and route != self.store.active:
            raise InfuseError(
                f"{self.name} runs in processes of their own here, which know of no route: call infuse.activate before "
                "they are started."
            )
        if not isinstance(route, Mixed):
            return self.inner(*args, **kwargs)
        names = (next(iter(self.__signature__.parameters)), "sentences", "inputs")
        at = 0 if args else next((name for name in names if name in kwargs), None)
        texts = None if at is None else args[0] if args else kwargs[str(at)]
        if (
            texts is None
            or isinstance(texts, str)
            or (len(texts) and isinstance(texts, tuple) and self.name != "encode")
        ):
            raise InfuseError(f"With a route of several entries, give {self.name} a list of texts.")
        if len(texts) != len(route.names):
            raise InfuseError(f"The route has {len(route.names)} entries, but {self.name} got {len(texts)} texts.")
        return self._by_adapter(route, list(texts), at, args, kwargs)

    def _by_adapter(self, route: Mixed, texts: list[Any], at: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        answers: list[Any] = [None] * len(texts)
        part: Any = None
        for name in dict.fromkeys(route.names):
            rows = [row for row, each in enumerate(route.names) if each == name]
            own = [texts[row] for row in rows]
            with use(self.store, name):
                part = self.inner(own, *args[1:], **kwargs) if at == 0 else self.inner(**{**kwargs, str(at): own})
            if isinstance(part, dict) or len(part) != len(rows):
                raise InfuseError(f"{self.name} gives no answer per text here: route one adapter at a time.")
            for row, answer in zip(rows, part, strict=True):
                answers[row] = answer
        if isinstance(part, Tensor):
            return torch.stack(answers)
        return np.stack(answers) if isinstance(part, np.ndarray) else answers


class Expand(Wrapped):
    """``_expand_inputs_for_generation``, through which ``generate`` repeats its inputs for beams and samples."""

    def __call__(self, expand_size: int = 1, *args: Any, **kwargs: Any) -> Any:
        route = current(self.store)
        inputs = kwargs.get("input_ids", kwargs.get("inputs_embeds"))
        if isinstance(route, Mixed) and isinstance(inputs, Tensor):
            names, rows = route.names, len(inputs)
            if len(names) == rows:
                route.repeat(expand_size)
            elif names != tuple(name for name in names[::expand_size] for _ in range(expand_size)):
                raise InfuseError(
                    f"The route has {len(names)} entries for {rows} prompts, and beams or samples of one prompt would "
                    "have different adapters: give one entry per prompt."
                )
        return self.inner(expand_size, *args, **kwargs)


class PerAdapter(Wrapped):
    """Runs a module once per adapter of a mixed batch and puts the rows together again.

    For modules that feed a tensor without batch dimension through an adapted projection (DeBERTa's relative position
    embeddings): no row of a batch could say whose delta that tensor needs.
    """

    def __init__(self, store: Any, module: nn.Module, batched: Sequence[str]):
        super().__init__(store, module, "forward")
        self.batched = frozenset(batched)
        self.parameters = tuple(self.__signature__.parameters)

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


def _joined(parts: list[Any], order: Tensor) -> Any:
    first = parts[0]
    if isinstance(first, Tensor):
        return torch.cat(parts)[order]
    if isinstance(first, tuple):
        return tuple(_joined(list(column), order) for column in zip(*parts, strict=True))
    return first

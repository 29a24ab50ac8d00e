"""The store of a model: the child module under which everything hangs that Infuse adds."""

import json
import sys
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from infuse.adapter import Adapter, dotted
from infuse.arch import Arch
from infuse.banks import Banks
from infuse.checks import check_method, check_present, sorting
from infuse.errors import InfuseError, listed
from infuse.fingerprint import Base
from infuse.method import Mixer
from infuse.optimizers import follow
from infuse.recompute import STORES
from infuse.routing import Mixed, Route, current, levels, route_of, use
from infuse.rows import with_rows
from infuse.sites import Site, base_modules, find_sites, stack_layers
from infuse.taps import Expand, Forward, Generate, PerAdapter, Tap, Wrapped


class Infused(nn.Module):
    """The child module ``model.infuse``: all adapters of one model, its sites, and what is active or merged."""

    def __init__(self, model: nn.Module, arch: Arch):
        super().__init__()
        self.adapters = nn.ModuleDict()
        self.arch = arch
        self.sites = find_sites(model, arch)
        self.base = Base.of(model, arch)
        self.active: str | None = None
        self.merged: str | None = None
        self.originals: list[tuple[nn.Parameter, Tensor]] = []
        self.copied: set[str] = set()
        self.taps: dict[str, Tap] = {}
        self.banks = Banks()
        self.edges: list[tuple[dict[str, nn.Module | None], str, nn.Module]] = []
        self.rows: dict[str, bool] = {}
        self.register_load_state_dict_post_hook(_forget_missing)
        self.flags = {name: p.requires_grad for name, p in model.named_parameters()}
        STORES.add(self)
        self.wrapped: list[Wrapped] = [Forward(self, model, "forward")]
        if hasattr(model, "generate"):
            self.wrapped += [Generate(self, model, "generate"), Expand(self, model, "_expand_inputs_for_generation")]
        self.wrapped += [
            PerAdapter(self, layer.get_submodule(path), names)
            for stack in arch.stacks
            for layer in stack_layers(model, stack).values()
            for path, names in stack.shared_inputs.items()
        ]

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        STORES.add(self)  # of a copy, deep or pickled

    def __getitem__(self, name: str) -> Adapter:
        if name not in self.adapters:
            raise InfuseError(f"Unknown adapter {name!r}; the model has {listed(self.adapters)}.")
        return self.adapters[name]  # type: ignore[return-value]  # an Adapter: nothing else is put there

    def forward(self, *args: Any, **kwargs: Any) -> None:
        """Nothing calls the store, unless a model runs whatever children it has."""
        raise InfuseError(
            "This model calls all its child modules, which model.infuse is not for: detach, and attach to the "
            "transformer inside the model instead."
        )

    def activate(self, name: str | None, trainable: Iterable[str] | None = None) -> None:
        """Make an adapter serve plain calls, and let it alone (or those of ``trainable``) get gradients."""
        chosen = {n for n in (name,) if n is not None} if trainable is None else set(trainable)
        adapters = {each: self[each] for each in (*self.adapters, *chosen)}
        if name is not None:
            self[name]
        stacked = {m for n in chosen if not isinstance(self[n].method, Mixer) for m in self[n].members}
        mixed = {m for a in adapters.values() if isinstance(a.method, Mixer) for m in a.members}
        for each, adapter in adapters.items():
            adapter.rest(each not in (chosen | stacked) - mixed)
        self.active = name

    def choice(self) -> tuple[str | None, dict[str, bool]]:
        """Which adapter is active, and which get no gradients; see :meth:`choose`."""
        return self.active, {name: self[name].resting is not None for name in self.adapters}

    def choose(self, choice: tuple[str | None, dict[str, bool]]) -> None:
        """Go back to a choice that :meth:`choice` told."""
        self.active, resting = choice
        for name, rests in resting.items():
            self[name].rest(rests)

    def chosen(self, names: str | Sequence[str | None] | None) -> Route:
        """The route for a call or a block. With gradients switched on, its adapters get theirs from now on."""
        route = route_of(names, self.adapters)  # type: ignore[arg-type]  # of adapters
        levels(self.adapters, route)  # type: ignore[arg-type]  # of adapters; once here, not in every compiled call
        if isinstance(route, Mixed) and len(set(route.names)) > 1:
            self.check_rows(route)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            asked = route.names if isinstance(route, Mixed) else (route,)
            mixed = {m for n in self.adapters if isinstance(self[n].method, Mixer) for m in self[n].members}
            for name in {n for n in asked if n is not None} - mixed:
                self[name].rest(False)
        return route

    def check_rows(self, route: Mixed) -> None:
        """Refuse adapters in a batch of others where nothing says whose a module's input is.

        Raises:
            InfuseError: an adapter of the route acts at such a module.
        """
        acting = {name: self.places_of(name) for name in dict.fromkeys(route.names) if name is not None}
        if (unknown := set().union(*acting.values()) - self.rows.keys()) and (owner := self.owner) is not None:
            with use(self, None):
                found = with_rows(owner, unknown)
            self.rows |= {path: path in found for path in unknown}
        for name, paths in acting.items():
            if without := [path for path in paths if not self.rows[path]]:
                raise InfuseError(
                    f"Adapter {name!r} can't share a batch with other adapters: what {without[0]} gives has no row for "
                    "each text. Run the rows of this adapter by themselves."
                )

    def places_of(self, name: str) -> list[str]:
        """Paths of the modules outside the table of architectures at which an adapter, or a member of it, acts."""
        adapters = [self[each] for each in (name, *self[name].members)]
        sites = [s.prefix + s.path for a in adapters for s in a.sites.values() if s.role == "module"]
        return [*sites, *(dotted(path) for a in adapters for path in a.copies)]

    def route(self) -> Route:
        """The route of this call; ``None`` when there is nothing to do."""
        if self.wrapped[0].refer() is None:  # of a copied part of a model, which goes without
            return None
        route = current(self)
        if self.merged is None:
            return route
        if route != self.merged:
            raise InfuseError(f"Adapter {self.merged!r} is merged into the base; call infuse.unmerge(model) first.")
        return None

    def enter(self, module: nn.Module) -> None:
        """Before a forward pass: see whether modules were swapped, adapters moved away, or the batch sorted."""
        if not torch.compiler.is_compiling() and any(children.get(n) is not m for children, n, m in self.edges):
            self.follow(module)
        route = current(self)
        for name in set(route.names) if isinstance(route, Mixed) else (route,):
            if name is not None and self.merged is None:
                check_present(self[name])
        if isinstance(route, Mixed):
            refuse_sorting()
            route.renew()

    def state_dict(self, *args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        """The adapters, and what they are; nothing of them while one is merged: the model is a plain one then."""
        if self.merged is not None:
            return OrderedDict() if destination is None else destination
        return super().state_dict(*args, destination=destination, prefix=prefix, keep_vars=keep_vars)

    def get_extra_state(self) -> Tensor:
        """What the adapters are, as the bytes of JSON: files of tensors alone hold it too, as Trainer's do."""
        about = {"version": 1, "active": self.active, "base": asdict(self.base)}
        about["adapters"] = {name: self[name].facts() for name in self.adapters}
        return torch.frombuffer(bytearray(json.dumps(about, default=str).encode()), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        """Check that tensors to be loaded are of adapters like these.

        Raises:
            InfuseError: an adapter of the same name has another method, or acts elsewhere.
        """
        adapters = json.loads(bytes(state.tolist()))["adapters"]
        for name in adapters.keys() & self.adapters.keys():
            now = json.loads(json.dumps(self[name].facts(), default=str))
            if other := [k for k in ("method", "sites", "settings", "members") if adapters[name][k] != now[k]]:
                raise InfuseError(
                    f"The state to be loaded has another {listed(other)} of the adapter {name!r} than this model: "
                    "attach what it was saved with."
                )

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, local_metadata: Any, strict: bool, missing_keys: list[str],
        unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:  # fmt: skip
        rest = (local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        super()._load_from_state_dict(state_dict, prefix, *rest)
        if (own := f"{prefix}_extra_state") in missing_keys:  # tensors that were saved without it fit as well
            missing_keys.remove(own)

    @property
    def owner(self) -> nn.Module | None:
        """The module that this store hangs under; ``None`` if it is gone."""
        return self.wrapped[0].refer()

    def unmerge(self, model: nn.Module) -> None:
        """Put back the base weights that a merge has changed."""
        present = {id(parameter) for parameter in model.parameters()}
        if any(id(parameter) not in present for parameter, _ in self.originals):
            raise InfuseError(
                f"The weights into which {self.merged!r} was merged have been replaced since (quantised, say), so that "
                "the merge can't be undone: load the base again."
            )
        for parameter, original in reversed(self.originals):
            parameter.data = original.to(parameter.data)
        self.originals = []
        self.merged = None

    def follow(self, model: nn.Module) -> None:
        """Act at the modules that have taken the place of others (as quantisation puts them there).

        Raises:
            InfuseError: a module is gone, or has features of other widths.
        """
        present = {id(module) for _, module in base_modules(model)}

        def moved(site: Site) -> Site:
            if id(site.module) in present:
                return site
            module: Any = submodule(model, path := site.prefix + site.path)
            if (getattr(module, "in_features", None), getattr(module, "out_features", None)) != (
                site.in_features,
                site.out_features,
            ):
                raise InfuseError(
                    f"{path}, where adapters act, has become a {type(module).__name__} of other widths: detach the "
                    "adapters before you change the model."
                )
            return replace(site, module=module)

        sites = [moved(site) for site in self.sites]
        acting = {name: {n: moved(site) for n, site in self[name].sites.items()} for name in self.adapters}
        for name, own in acting.items():
            for n, site in own.items():
                if site is not self[name].sites[n]:
                    check_method(self[name].method_at(site), [site])
        self.sites = sites
        for name, own in acting.items():
            self[name].sites = own
        self.retap(model)

    def refresh(self, model: nn.Module) -> None:
        """:meth:`follow` if a module of any site was swapped, acted at or not."""
        present = {id(module) for _, module in base_modules(model)}
        if any(id(site.module) not in present for site in self.sites):
            self.follow(model)

    def tap(self, model: nn.Module, path: str) -> Tap:
        if path not in self.taps:
            self.taps[path] = Tap(self, submodule(model, path), path)
            parts = path.split(".")
            modules = [model.get_submodule(".".join(parts[:i])) for i in range(len(parts) + 1)]
            steps = [
                (a._modules, n, b)
                for a, n, b in zip(modules, parts, modules[1:], strict=False)
                if a._modules.get(n) is b
            ]
            known = {(id(children), name) for children, name, _ in self.edges}
            self.edges += [step for step in steps if (id(step[0]), step[1]) not in known]
        return self.taps[path]

    def retap(self, model: nn.Module) -> None:
        """Hooks at exactly those modules where some adapter acts."""
        for tap in self.taps.values():
            tap.remove()
        self.taps, self.copied, self.edges = {}, set(), []
        for adapter in self.adapters.values():
            self.tap_for(model, adapter)

    def tap_for(self, model: nn.Module, adapter: nn.Module) -> None:
        """Hooks at the modules where one adapter acts, where there are none yet."""
        assert isinstance(adapter, Adapter)
        for site in adapter.sites.values():
            self.tap(model, site.prefix + site.path).add(site)
            if site.source and {"residual", "normed"} & adapter.kinds[site.name].recipe.needs:
                self.tap(model, site.source).source = True
        for name in adapter.copies:
            path = dotted(name)
            self.copied.add(path)
            self.tap(model, path)


def _forget_missing(store: nn.Module, keys: Any) -> None:
    """A merged model's state lacks the adapters by intention (see :meth:`Infused.state_dict`)."""
    if isinstance(store, Infused) and store.merged is not None:
        keys.missing_keys[:] = [key for key in keys.missing_keys if "infuse" not in key.split(".")]


def refuse_sorting() -> None:
    """Refuse a mixed route within a function that sorts its rows before the model gets them.

    Raises:
        InfuseError: this call comes from one.
    """
    frame = None if torch.compiler.is_compiling() else sys._getframe(1)
    while frame is not None:
        if frame.f_globals.get("__name__", "").startswith("sentence_transformers.") and "self" in frame.f_locals:
            caller = frame.f_locals["self"]
            if frame.f_code.co_name == sorting(caller):
                raise InfuseError(
                    f"{frame.f_code.co_name} sorts its texts by length, so that the model gets other rows than the "
                    f"route names: give infuse.route the {type(caller).__name__} itself, not the model inside it."
                )
        frame = frame.f_back


def submodule(model: nn.Module, path: str) -> nn.Module:
    """The module at a path; an error if it is gone."""
    try:
        return model.get_submodule(path)
    except AttributeError:
        raise InfuseError(
            f"{type(model).__name__} has no {path} any more, where adapters act: detach the adapters before you change "
            "the model."
        ) from None


def store_of(model: nn.Module) -> Infused:
    """``model.infuse``, also through wrappers such as DistributedDataParallel or ``torch.compile``."""
    if (store := store_in(model)) is None:
        raise InfuseError("Nothing is attached to this model; call infuse.attach(model, method, name=...) first.")
    return store


def store_in(model: nn.Module) -> Infused | None:
    """:func:`store_of`, or ``None`` if nothing is attached."""
    store = getattr(owner_of(model), "infuse", None)
    return store if isinstance(store, Infused) else None


def owner_of(model: nn.Module) -> nn.Module:
    """The module that the store hangs under, inside any wrappers; the model itself if there is none.

    Raises:
        InfuseError: several parts of the model have one.
    """
    owners = list(_owners(model, ""))
    if len(owners) > 1:
        raise InfuseError(
            f"Several parts of this {type(model).__name__} have adapters: {listed(path for path, _ in owners)}. "
            "Give one of these parts instead of the whole."
        )
    return owners[0][1] if owners else model


def _owners(module: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
    if isinstance(module._modules.get("infuse"), Infused):
        yield path, module
        return
    for name, child in module.named_children():
        yield from _owners(child, f"{path}.{name}".lstrip("."))


register_optimizer_step_pre_hook(follow)

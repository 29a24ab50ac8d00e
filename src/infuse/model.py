"""The core: attach · detach · activate · route · merge · unmerge · summary. The only code that touches a model.

Everything that Infuse adds hangs under one child module, ``model.infuse``. The base model's modules, parameter names
and values stay as they are; adapters act through forward hooks.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from infuse.adapter import Adapter, build, check_copies, classification_head, copies, dotted, key
from infuse.arch import Arch
from infuse.banks import Banks
from infuse.calls import forget_residuals
from infuse.errors import InfuseError, listed
from infuse.fingerprint import Base
from infuse.method import Method, Mixer, default_mixer, make, spelled
from infuse.recipe import kinds
from infuse.routing import Mixed, Route, current, levels, route_of, use
from infuse.sites import Site, arch_of, find_sites, overlap, select, stack_layers, tied, within
from infuse.taps import PerAdapter, Tap, carry_routes, drop_routes


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
        self.trainable = {name: p.requires_grad for name, p in model.named_parameters()}
        self.checkpointed = [m for m in model.modules() if hasattr(m, "gradient_checkpointing")]
        self.ends = [
            model.register_forward_pre_hook(self.enter),
            model.register_forward_hook(self.leave, always_call=True),
        ]
        self.split = [
            PerAdapter(self, layer.get_submodule(path), names)
            for stack in arch.stacks
            for layer in stack_layers(model, stack).values()
            for path, names in stack.shared_inputs.items()
        ]

    def __getitem__(self, name: str) -> Adapter:
        if name not in self.adapters:
            raise InfuseError(f"Unknown adapter {name!r}; the model has {listed(self.adapters)}.")
        return self.adapters[name]  # type: ignore[return-value]  # an Adapter: nothing else is put there

    def route(self) -> Route:
        """The route of this call; ``None`` when there is nothing to do."""
        route = current(self)
        if self.merged is None:
            return route
        if route != self.merged:
            raise InfuseError(f"Adapter {self.merged!r} is merged into the base; call infuse.unmerge(model) first.")
        return None

    def enter(self, module: nn.Module, args: tuple) -> None:
        carry_routes(self, self.checkpointed)
        if isinstance(route := current(self), Mixed):
            route.renew()

    def leave(self, module: nn.Module, args: tuple, output: Any) -> None:
        forget_residuals(self)

    def tap(self, model: nn.Module, path: str) -> Tap:
        if path not in self.taps:
            self.taps[path] = Tap(self, model.get_submodule(path), path)
        return self.taps[path]

    def retap(self, model: nn.Module) -> None:
        """Hooks at exactly those modules where some adapter acts."""
        for tap in self.taps.values():
            tap.remove()
        self.taps, self.copied = {}, set()
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
    """The module that :func:`attach` was called on, inside any wrappers; the model itself if there is none."""
    for module in model.modules():
        if isinstance(getattr(module, "infuse", None), Infused):
            return module
    return model


def attach(
    model: nn.Module,
    method: Method | str | Mapping[str, Any],
    name: str = "default",
    *,
    layers: str | Sequence[int] | None = None,
    arch: Arch | None = None,
    trained: Iterable[str] | None = None,
) -> Adapter:
    """Add a fresh adapter to a model in place, freeze the base, and make the adapter the active one.

    Args:
        model: a transformers model, or any module that contains one or that ``arch`` describes. What has adapters
            inside already gets the new one beside them.
        method: an instance such as ``IA3()``, or what :func:`infuse.make` understands (``"lora:rank=4"``).
        name: the adapter's name: letters, digits, ``_``, ``-``, ``+`` and spaces.
        layers: ``"all"``, ``"last:k"``, ``"first:k"``, or indices; all by default.
        arch: the row to use for an architecture that the table does not have.
        trained: paths of modules of the base of which the adapter trains its own copy; by default the classification
            head of a transformers model that has one.
    Returns:
        the adapter, also at ``model.infuse[name]``.
    Raises:
        InfuseError: the name is taken or malformed, the architecture or a role is unknown, no site matches.
    """
    method = make(method)
    if method.maker:
        raise InfuseError(
            f"{method.name} builds on trained adapters: call infuse.{method.maker}, or give another method."
        )
    store = store_in(model)
    sites = store.sites if store else find_sites(model, arch)
    chosen = select(sites, method.roles, layers)
    if not chosen and (usual := getattr(type(method), "roles", ())):  # by default none: a method without deltas
        raise InfuseError(f"{type(method).__name__} needs a role to adapt; by default it takes {listed(usual)}.")
    return attach_at(model, build(name, method, chosen), arch=arch, trained=trained)


def attach_at(
    model: nn.Module, adapter: Adapter, *, arch: Arch | None = None, trained: Iterable[str] | None = None
) -> Adapter:
    """Hang a built adapter into a model; all checks come before the first change."""
    name = adapter.name
    check_name(name)
    outer, store, model = model, store_in(model), owner_of(model)
    if store and name in store.adapters:
        raise InfuseError(f"The model already has an adapter {name!r}; detach it or choose another name.")
    if store and store.merged is not None:
        raise InfuseError(f"Adapter {store.merged!r} is merged into the base; call infuse.unmerge(model) first.")
    together = [adapter, *map(store.__getitem__, store.adapters)] if store else []
    if whole := [a.method.name for a in together if a.method.unfreezes]:
        raise InfuseError(f"Method {whole[0]} changes the base that the other adapters rest on; detach them first.")
    if not adapter.method.overlaps and (pair := overlap(adapter.sites.values())):
        raise InfuseError(
            f"{spelled(adapter.method)} can't adapt the features of {listed(pair)} twice: choose one role."
        )
    extra = {id(module) for module in adapter.method.trains(list(adapter.sites.values()))}
    norms = [path for path, module in model.named_modules() if id(module) in extra] if extra else []
    if trained is None:
        trained = classification_head(outer) or classification_head(model)
    own = copies(model, [path for path in dict.fromkeys([*trained, *norms]) if adapter.copy_of(path) is None])
    arch = store.arch if store else arch or arch_of(model)
    check_copies(model, map(dotted, (*adapter.copies, *own)), arch)
    adapter.kinds = kinds(store.adapters if store else {}, adapter)  # type: ignore[arg-type]  # of adapters
    if store is None:
        store = model.infuse = Infused(model, arch)
        store.train(model.training)
        for parameter in _base_parameters(model):
            parameter.requires_grad_(adapter.method.unfreezes)
    adapter.copies.update(own)
    adapter.train(model.training)
    store.adapters[name] = adapter
    store.tap_for(model, adapter)
    store.active = name
    return adapter


def fuse(
    model: nn.Module,
    members: Sequence[str],
    method: Method | str | Mapping[str, Any] | None = None,
    name: str | None = None,
    *,
    layers: str | Sequence[int] | None = None,
) -> Adapter:
    """Add a mixer over trained adapters (stage two of AdapterFusion), freeze its members, and make it the active one.

    Args:
        model: a model with the members attached.
        members: names of two or more adapters whose deltas are additive, at common sites.
        method: ``Fusion(…)`` or what :func:`infuse.make` understands; by default the first of the registry's.
        name: the mixer's name; by default the members' names joined by commas.
        layers: as for :func:`attach`; the members act in these layers alone.
    Raises:
        InfuseError: an unknown member, fewer than two, a method that can't be mixed, trained LayerNorms, no site that
            all members adapt in the layers.
    """
    method = default_mixer() if method is None else make(method)
    if not isinstance(method, Mixer):
        raise InfuseError(f"{type(method).__name__} does not mix adapters; use {type(default_mixer()).__name__}.")
    sites = fusable_sites(model, members, layers)
    roles = dict.fromkeys(s.role.removeprefix("cross_") for s in sites)
    adapter = build(name or ",".join(members), replace(method, roles=tuple(roles)), sites)
    return attach_mixer(model, adapter, members)


def attach_mixer(model: nn.Module, adapter: Adapter, members: Sequence[str]) -> Adapter:
    """Hang a built mixer into a model, and freeze its members."""
    store = store_of(model)
    adapter.members = tuple(members)
    for member in members:
        own = store[member]
        if lacking := [
            s.name for s in adapter.sites.values() if not (own.delta(s) and own.method_at(s).acts == "update")
        ]:
            raise InfuseError(f"Adapter {member!r} can't be mixed: it adds nothing at {listed(lacking, 3)}.")
    attach_at(model, adapter, trained=())
    if isinstance(adapter.method, Mixer):
        for member in members:
            store[member].requires_grad_(False)
    return adapter


def fusable_sites(model: nn.Module, members: Sequence[str], layers: str | Sequence[int] | None = None) -> list[Site]:
    """The sites in some layers that all members adapt by additive deltas."""
    store = store_of(model)
    if len(members) < 2 or len(set(members)) < len(members):
        raise InfuseError(f"Fuse two or more different adapters, not {listed(members)}.")
    for member in members:
        if store[member].method.acts != "update":
            raise InfuseError(
                f"Adapter {member!r} can't be fused: {store[member].method.name} is not added to the activation."
            )
        if own := store[member].copies_within(store.sites):
            raise InfuseError(
                f"Adapter {member!r} can't be fused: it was trained with its own copy of {listed(own, 3)}, of which a "
                "fusion runs the base's; train it without (no train_norms)."
            )
    common = set.intersection(*(set(store[m].sites) for m in members))
    sites = [s for s in store[members[0]].sites.values() if s.name in common]
    if not sites:
        raise InfuseError(f"The adapters {listed(members)} have no site in common; fuse adapters of one method.")
    return within(sites, layers, store.sites)


def penalty(model: nn.Module, name: str) -> Tensor | float:
    """What an adapter adds to the loss: a mixer's regulariser, 0 for all others."""
    adapter = store_of(model)[name]
    if not isinstance(adapter.method, Mixer):
        return 0.0
    return sum((adapter.method.penalty(adapter.params(s)) for s in adapter.sites.values()), torch.zeros(()))


def detach(model: nn.Module, name: str | None = None) -> None:
    """Remove one adapter, or all of them; with the last one the model is as it was before Infuse, bit for bit."""
    store = store_of(model)
    model = owner_of(model)
    names = list(store.adapters) if name is None else [store[name].name]
    for each in store.adapters.values():
        if isinstance(each, Adapter) and each.name not in names and (used := set(each.members) & set(names)):
            raise InfuseError(f"Adapter {each.name!r} mixes {listed(sorted(used))}; detach it first.")
    if store.merged in names:
        unmerge(model)
    lonely = {place for each in names for place in store[each].places}
    for each in names:
        store.banks.forget(store[each])
        del store.adapters[each]
        if store.active == each:
            store.active = None
    for each in store.adapters.values():
        if not lonely:  # soon, where many adapters are alike
            break
        lonely -= each.places  # type: ignore[operator]  # of adapters
    if lonely:
        store.retap(model)
    if not store.adapters:
        for handle in store.ends:
            handle.remove()
        for split in store.split:
            split.remove()
        drop_routes(store.checkpointed)
        del model.infuse
        for each, parameter in model.named_parameters():
            parameter.requires_grad_(store.trainable.get(each, parameter.requires_grad))


def activate(model: nn.Module, name: str | None) -> None:
    """Choose the adapter that plain forward calls use; ``None`` is the bare base model."""
    store = store_of(model)
    store.active = None if name is None else store[name].name


@contextmanager
def route(model: nn.Module, names: str | Sequence[str | None] | None) -> Iterator[None]:
    """Within the block, forward calls of this thread use these adapters.

    Args:
        names: one adapter for all rows, or one entry per row of the batch; ``None`` is the bare base model.
    Raises:
        InfuseError: an adapter is unknown; inside the block, the batch has another number of rows.
    """
    store = store_of(model)
    chosen = route_of(names, store.adapters)  # type: ignore[arg-type]  # of adapters
    levels(store.adapters, chosen)  # type: ignore[arg-type]  # of adapters; once here, not in every compiled call
    with use(store, chosen):
        yield


def merge(model: nn.Module, name: str) -> None:
    """Fold an adapter into the base weights, so that it costs nothing at inference; :func:`unmerge` undoes it exactly.

    The originals of the changed weights are kept aside (as much memory again as these weights take).

    Raises:
        InfuseError: the method depends on the input, an adapter is merged already, or a weight is tied to another
            module's, which would change too.
    """
    store = store_of(model)
    outer, model = model, owner_of(model)
    adapter = store[name]
    if store.merged is not None:
        raise InfuseError(f"Adapter {store.merged!r} is merged already; call infuse.unmerge(model) first.")
    if not adapter.method.mergeable:
        why = "its delta depends on the input, not on a weight" if adapter.sites else "it has no delta"
        why = "it trained the base itself, which is whole already" if adapter.method.unfreezes else why
        raise InfuseError(f"{adapter.method.name} can't be merged: {why}.")
    changed = [site.module for site in adapter.sites.values()]
    changed += [model.get_submodule(dotted(path)) for path in adapter.copies]
    if pair := tied(outer.named_modules(memo={store}), changed):
        raise InfuseError(
            f"Adapter {name!r} can't be merged: {pair[0]} shares its weight with {pair[1]}, which would change too; "
            "use the adapter unmerged, or give the two weights of their own before you attach it."
        )
    with torch.no_grad():
        for site in adapter.sites.values():
            weight, bias = _merged(adapter, site)
            _write(store, site.module, "weight", site, weight.T if site.transposed else weight)
            if bias is not None:
                _write(store, site.module, "bias", site, bias)
        for path, own in adapter.copies.items():
            original = dict(model.get_submodule(dotted(path)).named_parameters())
            for each, value in own.named_parameters():
                _replace(store, original[each], value.detach().to(original[each].dtype))
    store.merged = store.active = name


def unmerge(model: nn.Module) -> None:
    """Restore the base weights, bit for bit (cast or moved as the model was meanwhile); the adapter stays active."""
    store = store_of(model)
    for parameter, original in reversed(store.originals):
        parameter.data = original.to(parameter.data)
    store.originals = []
    store.merged = None


@dataclass(frozen=True)
class Summary:
    """Parameters of a model's adapters; ``str()`` of it is a table."""

    base: int
    """Number of parameters of the base model."""
    adapters: dict[str, dict[str, int]]
    """Adapter → role → number of trained parameters; ``shared``, ``head`` (copied modules too) and, where all of it is
    trained, ``base`` stand beside the roles."""

    def total(self, adapter: str) -> int:
        """Trained parameters of one adapter, its head included."""
        return sum(self.adapters[adapter].values())

    def deltas(self, adapter: str) -> int:
        """Trained parameters inside the transformer: without the head."""
        return sum(n for role, n in self.adapters[adapter].items() if role != "head")

    def __str__(self) -> str:
        frozen = not any("base" in roles for roles in self.adapters.values())
        lines = [f"base model: {self.base:,} parameters{', frozen' if frozen else ''}"]
        for name, roles in self.adapters.items():
            inside = self.deltas(name)
            lines.append(
                f"{name}: {inside:,} parameters in the transformer ({100 * inside / max(1, self.base):.3f} % of base)"
            )
            lines += [f"  {role:<24}{count:>12,}" for role, count in roles.items()]
        return "\n".join(lines)


def summary(model: nn.Module) -> Summary:
    """Trained parameters per adapter and role, beside those of the base."""
    store = store_of(model)
    base = sum(p.numel() for p in _base_parameters(owner_of(model)))
    counts: dict[str, dict[str, int]] = {}
    for name in store.adapters:
        adapter = store[name]
        roles: dict[str, int] = {"base": base} if adapter.method.unfreezes else {}
        for site in adapter.sites.values():
            roles[site.role] = roles.get(site.role, 0) + _count(adapter.deltas[key(site.name)])
        roles |= {"shared": n} if (n := _count(adapter.shared)) else {}
        head = _count(adapter.copies) + (_count(adapter.head) if adapter.head else 0)
        counts[name] = roles | ({"head": head} if head else {})
    return Summary(base, counts)


def _base_parameters(model: nn.Module) -> list[nn.Parameter]:
    return [p for name, p in model.named_parameters() if not name.startswith("infuse.")]


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def check_name(name: str) -> str:
    """The name, if it can name an adapter (and a folder)."""
    if not name or not all(c.isalnum() or c in "_-+, " for c in name) or hasattr(nn.ModuleDict(), name):
        raise InfuseError(f"{name!r} can't name an adapter: use letters, digits, '_', '-', '+', ',' and spaces.")
    return name


def _merged(adapter: Adapter, site: Site) -> tuple[Tensor, Tensor | None]:
    delta = adapter.delta(site)
    assert delta is not None
    p = {name: value.detach().float() for name, value in adapter.params(site).items()}
    bias = None if site.bias is None else site.bias.detach().float()
    return delta.method.merge(p, site.weight.detach().float(), bias, site.side)


def _write(store: Infused, module: nn.Module, which: str, site: Site, value: Tensor) -> None:
    parameter: Any = getattr(module, which)
    new = parameter.data.clone()
    if site.side == "input" or site.whole:
        new.copy_(value)
    elif which == "weight" and site.transposed:
        new[:, site.start : site.stop] = value
    else:
        new[site.start : site.stop] = value
    _replace(store, parameter, new)


def _replace(store: Infused, parameter: nn.Parameter, new: Tensor) -> None:
    store.originals.append((parameter, parameter.data))
    parameter.data = new

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
from infuse.checks import check_method, check_model, check_trainable, sorting, warn_of_frozen
from infuse.errors import InfuseError, listed
from infuse.method import Method, Mixer, default_mixer, make, spelled
from infuse.recipe import kinds
from infuse.routing import use
from infuse.sites import Site, arch_of, base_modules, find_sites, overlap, select, within
from infuse.store import Infused, owner_of, store_in, store_of
from infuse.taps import Routable, Sorted


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
    store, host = store_in(model), host_of(model, arch)
    check_model(host)
    if store:
        store.refresh(host)
    sites = store.sites if store else find_sites(host, arch)
    chosen = select(sites, method.roles, layers)
    check_method(method, chosen)
    if not chosen and (usual := getattr(type(method), "roles", ())):  # by default none: a method without deltas
        raise InfuseError(f"{type(method).__name__} needs a role to adapt; by default it takes {listed(usual)}.")
    return attach_at(model, build(name, method, chosen), arch=arch, trained=trained)


def attach_at(
    model: nn.Module, adapter: Adapter, *, arch: Arch | None = None, trained: Iterable[str] | None = None
) -> Adapter:
    """Hang a built adapter into a model; all checks come before the first change."""
    name = adapter.name
    check_name(name)
    outer, store, model = model, store_in(model), host_of(model, arch)
    check_model(model)
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
    given = trained
    if trained is None:
        trained = classification_head(outer) or classification_head(model)
    for site in adapter.sites.values():
        check_method(adapter.method_at(site), [site])
    paths = [path for path in dict.fromkeys([*trained, *norms]) if adapter.copy_of(path) is None]
    modules = {path: module for path, module in base_modules(model) if path in paths}
    if given is None and store is None and not trained:
        warn_of_frozen(model)
    check_trainable(modules | ({type(model).__name__: model} if adapter.method.unfreezes else {}))
    own = copies(model, paths)
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
    store.activate(name)
    keep_order(outer)
    return adapter


def host_of(model: nn.Module, arch: Arch | None = None) -> nn.Module:
    """Where a store hangs or would: inside containers, which run whatever children they have."""
    host = owner_of(model)
    while isinstance(host, nn.Sequential | nn.ModuleList | nn.ModuleDict):
        if isinstance(host._modules.get("infuse"), Infused):
            return host
        inner = [child for child in host.children() if _adaptable(child, arch)]
        if len(inner) != 1:
            return host
        host = inner[0] if isinstance(inner[0], nn.Sequential) else _transformer(inner[0])
    return host


def _transformer(model: nn.Module) -> nn.Module:
    """The model of transformers in a module of sentence-transformers, whose files are those of that model."""
    return getattr(model, "auto_model", None) or getattr(model, "model", None) or model


def _adaptable(model: nn.Module, arch: Arch | None) -> bool:
    try:
        return bool(find_sites(model, arch))
    except InfuseError:
        return False


def keep_order(model: nn.Module) -> None:
    """Let methods of a model that sort its rows respect a route with an entry per row."""
    store = store_of(model)
    for module in (model, *model.children()):
        name = sorting(module)
        if name and not any(isinstance(w, Sorted) and w.refer() is module for w in store.wrapped):
            store.wrapped += [Sorted(store, module, name), Routable(store, module, "forward")]


def fuse(
    model: nn.Module,
    members: Sequence[str],
    method: Method | str | Mapping[str, Any] | None = None,
    name: str | None = None,
    *,
    layers: str | Sequence[int] | None = None,
    trained: Iterable[str] | None = None,
) -> Adapter:
    """Add a mixer over trained adapters (stage two of AdapterFusion), freeze its members, and make it the active one.

    Args:
        model: a model with the members attached.
        members: names of two or more adapters whose deltas are additive, at common sites.
        method: ``Fusion(…)`` or what :func:`infuse.make` understands; by default the first of the registry's.
        name: the mixer's name; by default the members' names joined by commas.
        layers: as for :func:`attach`; the members act in these layers alone.
        trained: as for :func:`attach`: by default the fusion trains its own copy of the model's classification head.
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
    return attach_mixer(model, adapter, members, trained)


def attach_mixer(
    model: nn.Module, adapter: Adapter, members: Sequence[str], trained: Iterable[str] | None = None
) -> Adapter:
    """Hang a built mixer into a model, and freeze its members."""
    store = store_of(model)
    adapter.members = tuple(members)
    for member in members:
        own = store[member]
        if lacking := [
            s.name for s in adapter.sites.values() if not (own.delta(s) and own.method_at(s).acts == "update")
        ]:
            raise InfuseError(f"Adapter {member!r} can't be mixed: it adds nothing at {listed(lacking, 3)}.")
    return attach_at(model, adapter, trained=trained)


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
        store.unmerge(model)
    lonely = {place for each in names for place in store[each].places}
    for each in names:
        store.banks.forget(store[each])
        del store.adapters[each]
    store.activate(None if store.active in names else store.active)
    for each in store.adapters.values():
        if not lonely:  # soon, where many adapters are alike
            break
        lonely -= each.places  # type: ignore[operator]  # of adapters
    if lonely:
        store.retap(model)
    if not store.adapters:
        for wrapped in reversed(store.wrapped):
            wrapped.remove()
        del model.infuse
        for each, parameter in model.named_parameters():
            parameter.requires_grad_(store.flags.get(each, parameter.requires_grad))


def activate(model: nn.Module, name: str | None, *, trainable: Iterable[str] | None = None) -> None:
    """Choose the adapter that plain forward calls use; ``None`` is the bare base model.

    The parameters of other adapters get no gradients from now on, so that optimizers, DistributedDataParallel and
    Trainer see what is trained; members of a fusion stay frozen as long as the fusion is there. Call backward before:
    parameters whose gradients are taken away get none of an earlier forward pass either.

    Args:
        trainable: the adapters that are to be trained, where it is not the active one alone.
    """
    store_of(model).activate(name, trainable)


@contextmanager
def route(model: nn.Module, names: str | Sequence[str | None] | None) -> Iterator[None]:
    """Within the block, forward calls use these adapters: those of its own coroutine, generator or thread, and of tasks
    and threads that it starts. An argument ``route`` of the model's ``forward`` and ``generate`` does so for one call.

    Args:
        names: one adapter for all rows, or one entry per row of the batch; ``None`` is the bare base model.
    Raises:
        InfuseError: an adapter is unknown, or can't share a batch; inside the block, the batch has another number of
            rows.
    """
    store = store_of(model)
    keep_order(model)
    with use(store, store.chosen(names)):
        yield


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

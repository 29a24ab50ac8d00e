"""Fold an adapter into the weights of its base, and take it out again."""

from typing import Any

import torch
from torch import Tensor, nn

from infuse.adapter import Adapter, dotted
from infuse.checks import check_trainable, check_weights, check_whole
from infuse.errors import InfuseError
from infuse.sites import Site, tied
from infuse.store import Infused, owner_of, store_of


def merge(model: nn.Module, name: str) -> None:
    """Fold an adapter into the base weights, so that it costs nothing at inference; :func:`unmerge` undoes it exactly.

    The originals of the changed weights are kept aside (as much memory again as these weights take).

    Raises:
        InfuseError: the method depends on the input, an adapter is merged already, a weight is quantised, or it is
            tied to another module's, which would change too.
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
    check_whole(model)
    store.refresh(model)
    check_weights(adapter.sites.values(), "A merge", written=True)
    check_trainable({dotted(path): model.get_submodule(dotted(path)) for path in adapter.copies})
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
                _replace(store, original[each], value.detach().to(original[each].dtype, copy=True))
    store.activate(name)
    store.merged = name


def unmerge(model: nn.Module) -> None:
    """Restore the base weights, bit for bit (cast or moved as the model was meanwhile); the adapter stays active.

    Raises:
        InfuseError: the merged weights are no longer in the model.
    """
    store_of(model).unmerge(owner_of(model))


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

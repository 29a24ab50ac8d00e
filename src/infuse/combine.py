"""New adapters from trained ones, without training: averages, sums, and differences of what they learnt."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from infuse.adapter import Adapter, Delta, copies, dotted, fresh, key
from infuse.errors import InfuseError, listed
from infuse.method import Method, Params, make
from infuse.model import attach_at, owner_of, store_of


def average(
    model: nn.Module, names: Sequence[str], name: str = "average", weights: Sequence[float] | None = None
) -> Adapter:
    """A weighted soup: every parameter is the weighted mean of the adapters' parameters.

    The weights are normalised to sum to 1 (equal by default); those of a name given twice add up. Wortsman et al. 2022,
    "Model soups", arXiv:2203.05482.
    """
    given = list(weights) if weights is not None else [1.0] * len(names)
    _check_finite(names, given)
    if len(given) != len(names) or not 1e-12 <= abs(sum(given)) < math.inf:
        raise InfuseError(
            f"Averaging {len(names)} adapters needs as many weights with a finite sum other than 0, not {given}."
        )
    terms = dict.fromkeys(names, 0.0)
    for each, weight in zip(names, given, strict=True):
        terms[each] += weight / sum(given)
    return _combined(model, terms, name, start=0.0)


def add(model: nn.Module, terms: Mapping[str, float], name: str = "sum") -> Adapter:
    """Task arithmetic: ``θ = θ₀ + Σᵢ wᵢ·(θᵢ − θ₀)`` with θ₀ changing nothing; a weight of −1 negates a task.

    θ₀ is 1 for (IA)³'s vectors. Methods whose parameters multiply each other (LoRA, bottlenecks) have no linear sum in
    their parameters; for them the sum is taken of the parameters themselves, as AdapterHub does, save that LoRA's
    factors are joined, so that the updates add up exactly. Ilharco et al. 2023, arXiv:2212.04089; Zhang et al. 2023,
    arXiv:2306.14870.
    """
    return _combined(model, terms, name, start=None)


def stack(model: nn.Module, names: Sequence[str], name: str | None = None) -> Adapter:
    """An adapter that applies others one after the other at every site, each to what the one before has made.

    Of modules of the base of which one of them trains its own copy (LayerNorms, a head) that copy is used. Pfeiffer et
    al. 2020, "MAD-X", arXiv:2005.00052 (a task adapter on top of a language adapter).
    """
    store = store_of(model)
    if not names or any(store[each].members for each in names):
        raise InfuseError(f"Stack one or more plain adapters, not {listed(names)}.")
    owners = Counter(path for each in names for path in store[each].copies)
    if twice := [dotted(path) for path, count in owners.items() if count > 1]:
        raise InfuseError(
            f"Can't stack {listed(names)}: more than one has its own copy of {listed(twice, 3)}; "
            "train all but one without (trained=(), no train_norms)."
        )
    chain = Adapter(name or "+".join(names), make("stack"), [], {}, {})
    chain.members = tuple(names)
    return attach_at(owner_of(model), chain, trained=())


@fresh()
def _combined(model: nn.Module, terms: Mapping[str, float], name: str, start: float | None) -> Adapter:
    store, model = store_of(model), owner_of(model)
    _check_finite(terms, terms.values())
    adapters = [store[each] for each in terms]
    made = [adapter.name for adapter in adapters if adapter.members]
    if made or not adapters:
        found = f"{listed(made)}, made of other adapters" if made else "none"
        raise InfuseError(f"Combine one or more plain adapters, not {found}.")
    first = adapters[0]
    for other in adapters[1:]:
        if _methods(other) != _methods(first):
            raise InfuseError(f"Only adapters of one method at the same sites can be combined, not {listed(terms)}.")
    own = [set(map(dotted, adapter.copies)) for adapter in adapters]
    if some := sorted(set.union(*own) - set.intersection(*own)):
        raise InfuseError(
            f"Can't combine {listed(terms)}: only some have their own copy of {listed(some, 3)}; "
            "train all of them with it, or none."
        )
    weights = list(terms.values())
    method = first.method if start is not None else first.method.summed(len(adapters))
    deltas = {}
    for site_name, site in first.sites.items():
        params = [_own(adapter, site_name) for adapter in adapters]
        if start is None:
            at = first.method_at(site)
            deltas[site_name] = Delta(at.summed(len(adapters)), _detached(at.add(params, weights)))
        else:
            deltas[site_name] = Delta(first.method_at(site), _detached(_weighted(params, weights)))
    shared: list[dict[str, Tensor]] = [dict(adapter.shared.items()) for adapter in adapters]
    combined = Adapter(name, method, first.sites.values(), deltas, _detached(_weighted(shared, weights)))
    combined.copies.update(copies(model, map(dotted, first.copies)))
    for path, copy in combined.copies.items():  # θ₀ is the base's own module: 1 − Σw of it, which an average lacks
        states = [*(adapter.copies[path].state_dict() for adapter in adapters), copy.state_dict()]
        copy.load_state_dict(_weighted(states, [*weights, 1 - sum(weights)]))
    return attach_at(model, combined, trained=())


def _check_finite(names: Iterable[str], weights: Iterable[float]) -> None:
    try:
        finite = all(map(math.isfinite, weights))
    except (TypeError, OverflowError):
        finite = False
    if not finite:
        raise InfuseError(f"The weights of {listed(names)} must be finite numbers, not {listed(weights)}.")


def _methods(adapter: Adapter) -> tuple[Method, dict[str, Method]]:
    """What has to be equal in adapters that are combined; files bring the sites in an order of their own."""
    return adapter.method, {name: adapter.method_at(site) for name, site in adapter.sites.items()}


def _own(adapter: Adapter, site: str) -> Params:
    delta = adapter.deltas[key(site)]
    assert isinstance(delta, Delta)
    return delta.params


def _weighted(params: Sequence[Mapping[str, Tensor]], weights: Sequence[float]) -> dict[str, Tensor]:
    return {n: torch.stack([w * p[n] for p, w in zip(params, weights, strict=True)]).sum(0) for n in params[0]}


def _detached(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in params.items()}

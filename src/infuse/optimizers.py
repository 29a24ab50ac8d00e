"""An optimizer that was made for one adapter, and the adapter that is trained now."""

import warnings
from typing import Any

import torch

from infuse.recompute import STORES


def follow(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """Before a step: let the adapter that gets gradients join an optimizer that holds only adapters that get none.

    :class:`transformers.Trainer`, for one, makes its optimizer once, and would train nothing after
    :func:`infuse.activate`. New parameters join the group of those that they take over from, matrices that of matrices,
    as weight decay often tells these from vectors.
    """
    for store in list(STORES):
        adapters = [store[name] for name in store.adapters]
        resting = {id(p) for a in adapters if a.resting is not None for p in a.parameters()}
        groups = [g for g in optimizer.param_groups if any(id(p) in resting for p in g["params"])] if resting else []
        trained = {a.name: [p for p in a.parameters() if p.grad is not None] for a in adapters if a.resting is None}
        held = {id(p) for g in optimizer.param_groups for p in g["params"]}
        new = {name: params for name, params in trained.items() if params and held.isdisjoint(map(id, params))}
        if not groups or not new or len(new) < len([params for params in trained.values() if params]):
            continue
        for parameter in (p for params in new.values() for p in params):
            alike = [g for g in groups if any((p.dim() > 1) == (parameter.dim() > 1) for p in g["params"])]
            (alike or groups)[0]["params"].append(parameter)
        warnings.warn(
            f"The optimizer was made for adapters that are not trained now: {', '.join(new)} joins it, with its "
            "settings. For other settings make a new one after infuse.activate.",
            stacklevel=3,
        )

"""Activation checkpointing: a recomputation runs under the routes of its forward pass, whatever is active by then."""

import functools
from collections.abc import Callable
from typing import Any
from weakref import WeakSet

from torch.utils import checkpoint

from infuse.calls import forget_residuals
from infuse.routing import current
from infuse.scopes import remembered

STORES: WeakSet[Any] = WeakSet()
"""The stores of all models: any of these may be called by a function that is checkpointed."""


def _routed(run: Callable[..., Any]) -> Callable[..., Any]:
    """A checkpointed function that takes the routes that are in force now along into its recomputation."""
    stores = list(STORES)
    if not stores:
        return run
    within = remembered(run, [(store, current(store)) for store in stores])

    @functools.wraps(run)
    def routed(*args: Any, **kwargs: Any) -> Any:
        try:
            return within(*args, **kwargs)
        finally:  # a recomputation ends within no forward pass of the model, and often by an exception
            for store in stores:
                forget_residuals(store)

    return routed


def _carry_into_recomputation() -> None:
    """Wrap what both ways of :func:`torch.utils.checkpoint.checkpoint` recompute.

    Not ``checkpoint`` itself, of which models hold references, and which takes no context for reentrant ones.
    """
    generator: Any = checkpoint._checkpoint_without_reentrant_generator
    forward: Any = checkpoint.CheckpointFunction.forward

    @functools.wraps(generator)
    def non_reentrant(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return generator(_routed(fn), *args, **kwargs)

    @functools.wraps(forward)
    def reentrant(ctx: Any, run_function: Callable[..., Any], *args: Any) -> Any:
        outputs = forward(ctx, run_function, *args)
        ctx.run_function = _routed(run_function)
        return outputs

    checkpoint._checkpoint_without_reentrant_generator = non_reentrant
    setattr(checkpoint.CheckpointFunction, "forward", staticmethod(reentrant))  # noqa: B010  # with *args


_carry_into_recomputation()

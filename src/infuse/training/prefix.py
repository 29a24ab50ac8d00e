"""The frozen layers below the first adapted one: run once per row, then remembered.

With ``layers: last:2`` of six, four layers give the same hidden states in every epoch. They are computed once and kept,
in memory or, beyond a budget, in an unnamed temporary file that is mapped into memory.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from infuse import storage
from infuse.adapter import Adapter
from infuse.bases import BaseModel
from infuse.model import route, store_of
from infuse.sites import stack_layers
from infuse.texts import Tokens, batches, pad, trunk

BUDGET = 2 * 1024**3
"""Bytes of hidden states that are kept in memory; more go to a temporary file."""


@dataclass(frozen=True)
class Prefix:
    """The layers below the first adapted one, and how their last one gives its output."""

    layers: tuple[nn.Module, ...]
    wrap: Callable[[Tensor], Any]

    @contextmanager
    def replaced(self, hidden: Float[Tensor, "rows positions width"]) -> Iterator[None]:
        """Within the block, the layers compute nothing and the last one gives ``hidden``."""
        for layer in self.layers:
            layer.forward = lambda *args, **kwargs: self.wrap(hidden)  # type: ignore[method-assign]  # put back by the end of the block
        try:
            yield
        finally:
            for layer in self.layers:
                del layer.forward


@dataclass
class Remembered:
    """What the last layer of a prefix gives for every row, one row after the other."""

    tokens: Float[Tensor, "tokens width"]
    starts: list[int]

    def __getitem__(self, row: int) -> Float[Tensor, "positions width"]:
        return self.tokens[self.starts[row] : self.starts[row + 1]]


def prefix_of(base: BaseModel, adapter: Adapter) -> Prefix | None:
    """The prefix of a model under an adapter; ``None`` if there is none, or if its layers can't be skipped.

    Layers can be skipped if each runs once and hands on nothing but hidden states: not those of ALBERT, which are
    shared, nor those of T5, whose first layer makes the position bias of all others.
    """
    stacks = [stack for stack in store_of(base.model).arch.stacks if stack_layers(base.model, stack)]
    if len(stacks) != 1 or adapter.method.unfreezes:
        return None
    layers = list(stack_layers(base.model, stacks[0]).values())
    first = min((site.layer for site in adapter.sites.values()), default=len(layers))
    if not first:
        return None
    outputs: list[Any] = []
    handles = [layer.register_forward_hook(lambda _m, _a, out: outputs.append(out)) for layer in layers[:first]]
    device = next(base.model.parameters()).device
    try:
        with torch.no_grad(), route(base.model, None):
            trunk(base.model)(**pad([[0, 0]], 0, device))
    finally:
        for handle in handles:
            handle.remove()
    alone = all(isinstance(o, Tensor) or all(rest is None for rest in o[1:]) for o in outputs)
    if len(outputs) != first or not alone:
        return None
    last = outputs[-1]
    return Prefix(tuple(layers[:first]), _same if isinstance(last, Tensor) else lambda hidden: (hidden, *last[1:]))


def remember(base: BaseModel, prefix: Prefix, tokens: Tokens) -> Remembered:
    """What the prefix gives for every row; the same rows are not run twice while the base is loaded."""

    def compute() -> Remembered:
        starts = [0]
        for ids in tokens:
            starts.append(starts[-1] + len(ids))
        kept = Remembered(_room(starts[-1], base.width, next(prefix.layers[0].parameters()).dtype), starts)
        for index, hidden in _run(base, prefix, tokens):
            for row, value in zip(index, hidden, strict=True):
                kept[row].copy_(value[: len(tokens[row])])
        return kept

    return base.recall(f"prefix {len(prefix.layers)}", tokens, compute)


class _Enough(Exception):  # noqa: N818  # a signal, not an error
    """Ends a forward pass once the prefix has run."""


def _run(base: BaseModel, prefix: Prefix, tokens: Tokens) -> Iterator[tuple[list[int], Tensor]]:
    device = next(base.model.parameters()).device
    caught: list[Tensor] = []

    def stop(_module: nn.Module, _args: tuple, out: Any) -> None:
        caught.append(out if isinstance(out, Tensor) else out[0])
        raise _Enough

    handle = prefix.layers[-1].register_forward_hook(stop)
    try:
        for index in batches(tokens):
            with torch.no_grad(), route(base.model, None):
                try:
                    trunk(base.model)(**pad([tokens[i] for i in index], base.pad_id, device))
                except _Enough:
                    yield index, caught.pop().cpu()
    finally:
        handle.remove()


def _room(count: int, width: int, dtype: torch.dtype) -> Tensor:
    if count * width * dtype.itemsize <= BUDGET:
        return torch.empty(count, width, dtype=dtype)
    with storage.scratch() as folder, storage.reported(folder):  # the mapping outlives the name
        return torch.from_file(str(folder / "hidden"), shared=True, size=count * width, dtype=dtype).view(count, width)


def _same(hidden: Tensor) -> Tensor:
    return hidden

"""Stacked parameters of many adapters: what a mixed batch without gradients gathers its rows from.

Stacking, preparing and casting the parameters of 64 adapters costs more than the adapters themselves. So each adapter
gets a slot when it first takes part in a mixed batch, and keeps it until it is detached or its parameters change.
"""

from collections.abc import Callable, Sequence
from threading import Lock
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from infuse.adapter import Adapter

Tree = Any
"""Parameters as methods take them: tensors in mappings, lists and tuples."""


class Bank:
    """The slots of the adapters of one kind at one site."""

    def __init__(self) -> None:
        self.slots: dict[Adapter, int] = {}
        self.sources: dict[Adapter, tuple[list[Tensor], int]] = {}
        self.free: list[int] = []
        self.stacked: Tree = None
        self.capacity = 0

    def fresh(self, adapter: Adapter) -> bool:
        """Whether the adapter has a slot that holds its parameters as they are now."""
        tensors, stamp = self.sources.get(adapter, ((), -1))
        return stamp == _stamp(tensors)

    def put(self, adapters: Sequence[Adapter], sources: Sequence[Tree], prepared: Tree) -> None:
        """Write prepared parameters, stacked in the order of the adapters, into slots of their own."""
        new = [a for a in adapters if a not in self.slots]
        if len(new) > len(self.free):
            self._grow(prepared, max(8, self.capacity, len(new) - len(self.free)))
        for adapter in new:
            self.slots[adapter] = self.free.pop()
        at = torch.tensor([self.slots[a] for a in adapters])
        tree_map(lambda bank, values: bank.index_copy_(0, at.to(bank.device), values), self.stacked, prepared)
        for adapter, source in zip(adapters, sources, strict=True):
            tensors = tree_leaves(source)
            self.sources[adapter] = tensors, _stamp(tensors)

    def forget(self, adapter: Adapter) -> None:
        """Give an adapter's slot to others."""
        self.sources.pop(adapter, None)
        if adapter in self.slots:
            self.free.append(self.slots.pop(adapter))

    def _grow(self, like: Tree, more: int) -> None:
        self.free += range(self.capacity, self.capacity + more)
        self.capacity += more
        old = self.stacked
        self.stacked = tree_map(lambda value: value.new_zeros(self.capacity, *value.shape[1:]), like)
        if old is not None:
            tree_map(lambda bank, values: bank[: len(values)].copy_(values), self.stacked, old)


class Banks:
    """All banks of one model; safe to use from several threads."""

    def __init__(self) -> None:
        self.banks: dict[Any, Bank] = {}
        self.lock = Lock()

    def gather(
        self,
        key: Any,
        adapters: Sequence[Adapter],
        which: Int[Tensor, " rows"],
        source: Callable[[Adapter], Tree],
        prepare: Callable[[Sequence[Tree]], Tree],
    ) -> Tree:
        """Prepared parameters of every row, (rows, ...).

        Args:
            key: what tells this bank from others: site, kind, dtype, device.
            adapters: the different adapters of the rows, and ``which`` of them each row uses.
            source: an adapter's parameters.
            prepare: parameters of several adapters, stacked and ready to be used.
        """
        with self.lock:
            bank = self.banks.setdefault(key, Bank())
            stale = [a for a in adapters if not bank.fresh(a)]
            if stale:
                with torch.inference_mode(False), torch.no_grad():
                    sources = [source(a) for a in stale]
                    bank.put(stale, sources, prepare(sources))
            slots = torch.tensor([bank.slots[a] for a in adapters]).to(which.device)[which]
            stacked = bank.stacked
        return tree_map(lambda value: value[slots], stacked)

    def forget(self, adapter: Adapter) -> None:
        with self.lock:
            for bank in self.banks.values():
                bank.forget(adapter)

    def __deepcopy__(self, memo: dict) -> "Banks":
        return Banks()


def _stamp(tensors: Sequence[Tensor]) -> int:
    """Changes when one of the tensors is written to or replaced."""
    return hash(tuple((t.data_ptr(), 0 if t.is_inference() else t._version) for t in tensors))

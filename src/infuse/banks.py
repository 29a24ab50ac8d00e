"""Stacked parameters of many adapters: what a mixed batch without gradients gathers its rows from.

Stacking, preparing and casting the parameters of 64 adapters costs more than the adapters themselves. So each adapter
gets a slot when it first takes part in a mixed batch, and keeps it until it is detached or its parameters change.
"""

from collections.abc import Callable, Mapping, Sequence
from threading import Lock
from typing import Any

import torch
from torch.utils._pytree import tree_map

from infuse.adapter import Adapter

Tree = Any
"""Parameters as methods take them: tensors in mappings, lists and tuples."""


class Bank:
    """The slots of the adapters of one kind at one site."""

    def __init__(self) -> None:
        self.slots: dict[Adapter, int] = {}
        self.versions: dict[Adapter, Any] = {}
        self.free: list[int] = []
        self.stacked: Tree = None
        self.capacity = 0

    def put(self, versions: Mapping[Adapter, Any], prepared: Tree) -> None:
        """Write prepared parameters, stacked in the order of the adapters, into slots of their own."""
        new = [a for a in versions if a not in self.slots]
        if len(new) > len(self.free):
            self._grow(prepared, max(8, self.capacity, len(new) - len(self.free)))
        for adapter in new:
            self.slots[adapter] = self.free.pop()
        at = torch.tensor([self.slots[a] for a in versions])
        tree_map(lambda bank, values: bank.index_copy_(0, at.to(bank.device), values), self.stacked, prepared)
        self.versions.update(versions)

    def forget(self, adapter: Adapter) -> None:
        """Give an adapter's slot to others."""
        if adapter in self.slots:
            self.free.append(self.slots.pop(adapter))
            del self.versions[adapter]

    def _grow(self, like: Tree, more: int) -> None:
        self.free = [*reversed(range(self.capacity, self.capacity + more)), *self.free]
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

    def slots(
        self, key: Any, versions: Mapping[Adapter, Any], prepare: Callable[[Sequence[Adapter]], Tree]
    ) -> tuple[Tree, tuple[int, ...]]:
        """Prepared parameters of all adapters of a bank, (slots, ...), and the slots of those that are asked for.

        Args:
            key: what tells this bank from others: site, kind, dtype, device.
            versions: the adapters that are asked for, each with the version of what it is prepared from.
            prepare: parameters of several adapters, stacked and ready to be used.
        """
        with self.lock:
            bank = self.banks.setdefault(key, Bank())
            stale = {a: v for a, v in versions.items() if bank.versions.get(a) != v}
            if stale:
                with torch.inference_mode(False), torch.no_grad():
                    bank.put(stale, prepare(list(stale)))
            return bank.stacked, tuple(bank.slots[a] for a in versions)

    def forget(self, adapter: Adapter) -> None:
        with self.lock:
            for bank in self.banks.values():
                bank.forget(adapter)

    def __reduce__(self) -> tuple[type["Banks"], tuple[()]]:
        return Banks, ()  # a copy, pickled or deep, fills its own

"""Memory of training: bytes that autograd saves for backward, and the peak of a process."""

import ctypes
import gc
import resource
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

Storages = dict[int, torch.UntypedStorage]


@contextmanager
def saved_for_backward() -> Iterator[Storages]:
    """Within the block, every storage that autograd saves between forward and backward is added to what is yielded.

    Each storage counts once, however many tensors share it. Tensors that autograd functions written in Python keep as
    attributes are added when backward begins; what gradient checkpointing recomputes within backward is not.
    """
    kept: Storages = {}
    begun = False

    def keep(tensor: Any) -> Any:
        if isinstance(tensor, Tensor) and tensor.layout is torch.strided:
            kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    def pack(tensor: Tensor) -> Tensor:
        return tensor if torch._C._current_graph_task_id() != -1 else keep(tensor)

    def unpack(tensor: Tensor) -> Tensor:
        nonlocal begun
        if not begun:
            begun = True
            for each in _attributes():
                keep(each)
        return tensor

    with _newborn(), torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield kept


def bytes_saved(model: nn.Module, steps: Iterable[Callable[[], Any]]) -> list[int]:
    """Bytes saved for backward in each of several steps (forward and backward), after a first one that is not counted.

    The model's parameters and buffers, and whatever stays from one step to the next, are left out.
    """
    own = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
    counts, before = [], {}
    for step in steps:
        with saved_for_backward() as kept:
            step()
        counts.append(sum(s.nbytes() for place, s in kept.items() if place not in own and place not in before))
        before = kept  # which also keeps these storages alive: no new one can take their place
    return counts[1:]


class Ledger(TorchDispatchMode):
    """Within the block, counts the bytes of all tensors that operations make, for as long as they live.

    The model's parameters and buffers are left out. On the meta device, where tensors have no values, it also answers
    what models ask about values (is no row padded? is an entry zero?) with no: so a step can be counted from a model's
    configuration alone.

    Attributes:
        peak: the most bytes that lived at once.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.peak = self.live = 0
        self.alive: dict[int, Any] = {}
        """Address → a reference that tells when the storage is gone; none for what the model owns."""
        for tensor in (*model.parameters(), *model.buffers()):
            self.alive[tensor.untyped_storage()._cdata] = None

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        if func is _VALUE and args[0].is_meta:
            return 0
        out = func(*args, **kwargs or {})
        for tensor in out if isinstance(out, list | tuple) else (out,):
            if isinstance(tensor, Tensor):
                self.enter(tensor.untyped_storage())
        return out

    def enter(self, storage: torch.UntypedStorage) -> None:
        place, size = storage._cdata, storage.nbytes()
        if place in self.alive:
            return

        def leave(_: object) -> None:
            del self.alive[place]
            self.live -= size

        self.alive[place] = weakref.ref(storage, leave)
        self.live += size
        self.peak = max(self.peak, self.live)


_VALUE = torch.ops.aten._local_scalar_dense.default


class Peak:
    """How far a process grows over the size that it had when this was made (on a GPU: allocated memory there)."""

    def __init__(self) -> None:
        _rehearse()
        _trim()
        self.cuda = torch.cuda.is_available()
        self.start = torch.cuda.memory_allocated() if self.cuda else _status("VmRSS")
        self.whole = False

    def begin(self) -> None:
        """Let the peak begin now."""
        _trim()
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
            return
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            self.whole = True  # the system refuses: the peak of the whole process is what there is

    def bytes(self) -> int:
        """The growth at its peak so far."""
        if self.cuda:
            return torch.cuda.max_memory_allocated() - self.start
        return (_peak() if self.whole else _status("VmHWM")) - self.start


def resident() -> int:
    """Bytes of this process in memory."""
    return _status("VmRSS")


@contextmanager
def _newborn() -> Iterator[None]:
    """Within the block, Python's collector knows only what was made there: a million older objects take it a second."""
    if gc.get_freeze_count():  # somebody froze them, and keeps them so
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _attributes() -> Iterator[Any]:
    """Tensors that live autograd functions written in Python hold as attributes."""
    for node in gc.get_objects():
        if issubclass(type(node), torch.autograd.function.BackwardCFunction):
            for value in vars(node).values():
                yield from value if isinstance(value, list | tuple) else (value,)


def _rehearse() -> None:
    """Import what the first step of any optimizer imports, before memory is measured."""
    weight = torch.zeros(4, 4, requires_grad=True)
    optimizer = torch.optim.AdamW([weight])
    (weight @ weight).sum().backward()
    nn.utils.clip_grad_norm_([weight], 1.0)
    optimizer.step()


def _trim() -> None:
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)


def _status(name: str) -> int:
    status = Path("/proc/self/status")
    if not status.exists():  # no Linux: the peak so far is the nearest thing to the present size
        return _peak()
    return next(1024 * int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith(name))


def _peak() -> int:
    """Bytes of this process at its largest."""
    return (1 if sys.platform == "darwin" else 1024) * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

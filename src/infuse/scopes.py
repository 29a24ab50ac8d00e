"""Values that belong to the calls within a ``with`` block, whatever runs these calls.

A block is left in the middle wherever its code can be suspended, so that neither a stack in a thread nor a context
variable is enough:

- In a plain function nothing is suspended: the value is in force until the block ends.
- In a coroutine others run meanwhile, each in a context of its own (:pep:`567`).
- In a generator others run meanwhile in the *same* context, and every ``next`` may come from another thread: the value
  is in force while the generator's frame is on the stack.
- Tasks and threads that are started within a block keep its value, as does a task that an executor is given there.
- Recomputation in backward runs under the values of the forward pass (:func:`remembered`).

``torch.compile`` can trace neither context variables nor frames. It reads a copy of the plain blocks of its thread, and
breaks the graph while a block of this thread can be suspended.
"""

import asyncio
import concurrent.futures.thread
import functools
import multiprocessing.pool
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from inspect import CO_ASYNC_GENERATOR, CO_COROUTINE, CO_GENERATOR, CO_ITERABLE_COROUTINE
from types import FrameType
from typing import Any

import torch

from infuse.errors import InfuseError

_GENERATOR = CO_GENERATOR | CO_ASYNC_GENERATOR
_SUSPENDABLE = _GENERATOR | CO_COROUTINE | CO_ITERABLE_COROUTINE
_DRIVERS = frozenset(("contextlib", "_pytest.fixtures", "pytest_asyncio.plugin", "anyio.pytest_plugin"))
"""Modules that run a generator as a context manager: its ``yield`` is the block of whoever asked for it."""


class _Traced(threading.local):
    """What ``torch.compile`` reads: plain blocks of this thread, and how many others are open in it."""

    def __init__(self) -> None:  # not attributes of the class: torch.compile would not see that others hide them
        self.stack: tuple[tuple[Any, Any], ...] = ()
        self.open = [0]


_TRACED = _Traced()


class PerThread:
    """A value of which every thread needs a copy."""

    def copy(self) -> Any:
        raise NotImplementedError


class _Entry:
    """One open block."""

    def __init__(self, owner: Any, value: Any, frame: FrameType | None):
        self.owner, self.value = owner, value
        self.at = id(frame)
        self.generator = frame if frame is not None and frame.f_code.co_flags & _GENERATOR else None
        self.suspends = frame is not None and bool(frame.f_code.co_flags & _SUSPENDABLE)
        self.where = _where()
        self.open = True

    @property
    def left(self) -> bool:
        """Whether the block has ended elsewhere than where it began; tasks that began within it may outlast it."""
        return not self.open and self.where == _where()


_ENTRIES: ContextVar[tuple[_Entry, ...]] = ContextVar("infuse", default=())
_GENERATORS: dict[FrameType, list[_Entry]] = {}
"""Frame of a generator → its open blocks."""


def innermost(owner: Any, default: Any) -> Any:
    """The value that the innermost block around this call binds to ``owner``, or the default.

    Raises:
        InfuseError: the call runs in a task that was started while a generator's block was open, which may or may not
            have been within that block.
    """
    if torch.compiler.is_compiling() and not _TRACED.open[0]:  # else what follows breaks the graph
        for bound, value in reversed(_TRACED.stack):
            if bound is owner:
                return value
        return default
    entry = _innermost(owner)
    return default if entry is None else entry.value


def _innermost(owner: Any) -> _Entry | None:
    entries = _ENTRIES.get()
    if _GENERATORS:
        return _on_stack(owner, entries)
    for entry in reversed(entries):
        if entry.owner is owner and entry.generator is None and not entry.left:
            return entry
    return None


def _on_stack(owner: Any, entries: tuple[_Entry, ...]) -> _Entry | None:
    """The innermost block where generators have some: frame by frame, from the call outwards."""
    mine = [e for e in entries if e.owner is owner and not e.left]
    plain = {e.at: e for e in mine if e.generator is None}
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        for entry in reversed(_GENERATORS.get(frame, ())):
            if entry.owner is owner:
                return entry
        if id(frame) in plain:
            return plain[id(frame)]
        frame = frame.f_back
    for entry in reversed(mine):
        if entry.generator is None:
            return entry
        if entry.open and _task() is not entry.where[1]:
            raise InfuseError(
                "This task was started while a generator's infuse.route was open, so its route is not known: "
                "use infuse.route within the task."
            )
    return None


@contextmanager
def bind(owner: Any, value: Any) -> Iterator[None]:
    """Bind a value to ``owner`` for the calls within the block."""
    if torch.compiler.is_compiling():
        outer = _TRACED.stack
        _TRACED.stack = (*outer, (owner, value))
        try:
            yield
        finally:
            _TRACED.stack = outer
        return
    current, generators = _ENTRIES, _GENERATORS  # a generator may outlive this module when the process ends
    traced = vars(_TRACED)  # of this thread, wherever the block ends
    entry, bound = _Entry(owner, value, _holder()), (owner, value)
    if entry.generator is not None:
        generators.setdefault(entry.generator, []).append(entry)
    current.set((*current.get(), entry))
    if entry.suspends:
        traced["open"][0] += 1
    else:
        traced["stack"] = (*traced["stack"], bound)
    try:
        yield
    finally:
        entry.open = False
        # A block may end in another context than it began in: there is nothing to remove then.
        current.set(tuple(e for e in current.get() if e is not entry))
        if entry.suspends:
            traced["open"][0] -= 1
        else:
            traced["stack"] = tuple(each for each in traced["stack"] if each is not bound)
        if entry.generator is not None:
            generators[entry.generator].remove(entry)
            if not generators[entry.generator]:
                del generators[entry.generator]


def _holder() -> FrameType | None:
    """The frame whose code the block belongs to: context managers around :func:`bind` are looked through."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        back, code = frame.f_back, frame.f_code
        driven = code.co_flags & _GENERATOR and back is not None and back.f_globals.get("__name__") in _DRIVERS
        module = frame.f_globals.get("__name__")
        if not (driven or module in ("contextlib", __name__) or code.co_name in ("__enter__", "__aenter__")):
            return frame
        frame = back
    return None


def _task() -> Any:
    try:
        return asyncio.current_task()
    except RuntimeError:  # no event loop runs in this thread
        return None


def _where() -> tuple[int, Any]:
    return threading.get_ident(), _task()


def _in_force() -> list[_Entry]:
    """One entry per owner that has a value here."""
    owners = {id(e.owner): e.owner for entries in (_ENTRIES.get(), *_GENERATORS.values()) for e in entries}
    return [entry for owner in owners.values() if (entry := _innermost(owner)) is not None]


def _within(bound: list[tuple[Any, Any]], run: Callable[..., Any]) -> Callable[..., Any]:
    """``run`` under the given owners and values."""

    @functools.wraps(run)
    def within(*args: Any, **kwargs: Any) -> Any:
        with ExitStack() as stack:
            for owner, value in bound:
                stack.enter_context(bind(owner, value))
            return run(*args, **kwargs)

    return within


def remembered(run: Callable[..., Any], values: list[tuple[Any, Any]]) -> Callable[..., Any]:
    """``run``, under the given owners and values whenever and wherever it is called."""
    return _within(values, run)


def _carried(run: Callable[..., Any]) -> Callable[..., Any]:
    """``run`` with what is in force here, for another thread."""
    entries = _in_force()
    values = [e.value.copy() if isinstance(e.value, PerThread) else e.value for e in entries]
    return _within([(e.owner, v) for e, v in zip(entries, values, strict=True)], run) if entries else run


_POOLS: dict[type, tuple[str, ...]] = {
    ThreadPoolExecutor: ("submit",),
    multiprocessing.pool.ThreadPool: ("apply_async", "_map_async", "imap", "imap_unordered"),
}
"""Pools of threads, and their methods that take a function to run, under which all others lie."""


def _submitting(submit: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(submit)
    def submit_within(self: Any, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        return submit(self, _carried(function), *args, **kwargs)

    return submit_within


def _carry_into_threads() -> None:
    """Let threads that are started within a block, and tasks that pools of threads are given there, keep its values.

    A new thread has an empty context before Python 3.14, and knows nothing of the one that started it. Threads of pools
    outlive the block, so that their tasks keep its values, and they themselves don't.
    """
    start = threading.Thread.start
    workers = getattr(concurrent.futures.thread, "_worker", ...), getattr(multiprocessing.pool, "worker", ...)

    @functools.wraps(start)
    def start_within(self: threading.Thread) -> None:
        target = getattr(self, "_target", None)
        if all(target is not worker for worker in workers) and (run := _carried(self.run)) != self.run:
            self.run = run
        start(self)

    threading.Thread.start = start_within  # type: ignore[method-assign]
    for pool, names in _POOLS.items():
        for name in names:
            setattr(pool, name, _submitting(getattr(pool, name)))


_carry_into_threads()

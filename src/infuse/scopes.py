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

    def __init__(self, owner: Any, value: Any, frame: FrameType | None = None, until: "_Entry | None" = None):
        suspends = frame is not None and frame.f_code.co_flags & _SUSPENDABLE
        self.owner, self.value, self.until = owner, value, until
        self.at = id(frame)
        self.generator = frame if frame is not None and frame.f_code.co_flags & _GENERATOR else None
        self.task = _task() if self.generator else None
        self.traced = None if not suspends else _TRACED.open
        self.open = True


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
        if entry.owner is owner and entry.generator is None and (entry.until is None or entry.until.open):
            return entry
    return None


def _on_stack(owner: Any, entries: tuple[_Entry, ...]) -> _Entry | None:
    """The innermost block where generators have some: frame by frame, from the call outwards."""
    mine = [e for e in entries if e.owner is owner and (e.until is None or e.until.open)]
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
        if entry.open and _task() is not entry.task:
            raise InfuseError(
                "This task was started while a generator's infuse.route was open, so its route is not known: "
                "use infuse.route within the task."
            )
    return None


@contextmanager
def bind(owner: Any, value: Any, until: Any = None) -> Iterator[None]:
    """Bind a value to ``owner`` for the calls within the block.

    Args:
        until: another block's entry, with whose end this one loses its force.
    """
    if torch.compiler.is_compiling():
        outer = _TRACED.stack
        _TRACED.stack = (*outer, (owner, value))
        try:
            yield
        finally:
            _TRACED.stack = outer
        return
    current, generators, traced = (
        _ENTRIES,
        _GENERATORS,
        _TRACED,
    )  # a generator may outlive this module when the process ends
    entry, bound = _Entry(owner, value, _holder(), until), (owner, value)
    if entry.generator is not None:
        generators.setdefault(entry.generator, []).append(entry)
    current.set((*current.get(), entry))
    try:
        if entry.traced is None:
            traced.stack = (*traced.stack, bound)
        else:
            entry.traced[0] += 1
        yield
    finally:
        entry.open = False
        # A generator may end in another context than it began in: there is nothing to remove then.
        current.set(tuple(e for e in current.get() if e is not entry))
        if entry.traced is None:
            traced.stack = tuple(each for each in traced.stack if each is not bound)
        else:
            entry.traced[0] -= 1
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


def _in_force() -> list[_Entry]:
    """One entry per owner that has a value here."""
    owners = {id(e.owner): e.owner for entries in (_ENTRIES.get(), *_GENERATORS.values()) for e in entries}
    return [entry for owner in owners.values() if (entry := _innermost(owner)) is not None]


def _within(bound: list[tuple[Any, Any, Any]], run: Callable[..., Any]) -> Callable[..., Any]:
    """``run`` under the given owners, values, and entries that these last for."""

    @functools.wraps(run)
    def within(*args: Any, **kwargs: Any) -> Any:
        with ExitStack() as stack:
            for owner, value, until in bound:
                stack.enter_context(bind(owner, value, until))
            return run(*args, **kwargs)

    return within


def _carried(entries: list[_Entry], whole: bool = True) -> list[tuple[Any, Any, Any]]:
    """What another thread gets; unless it is its own ``whole`` life long, for as long as the entries are open."""
    values = [e.value.copy() if isinstance(e.value, PerThread) else e.value for e in entries]
    return [(e.owner, value, None if whole else e) for e, value in zip(entries, values, strict=True)]


def _carry_into_threads() -> None:
    """Let threads and tasks of executors that are started within a block keep its values.

    A new thread has an empty context before Python 3.14, and knows nothing of the one that started it. Threads of pools
    outlive the block: theirs ends with it.
    """
    start, submit = threading.Thread.start, ThreadPoolExecutor.submit
    executor_worker: Any = getattr(concurrent.futures.thread, "_worker", None)
    pool_worker: Any = getattr(multiprocessing.pool, "worker", None)

    @functools.wraps(start)
    def start_within(self: threading.Thread) -> None:
        target = getattr(self, "_target", None)
        if target is not executor_worker and (entries := _in_force()):
            self.run = _within(_carried(entries, target is not pool_worker), self.run)
        start(self)

    @functools.wraps(submit)
    def submit_within(self: ThreadPoolExecutor, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        if entries := _in_force():
            fn = _within(_carried(entries), fn)
        return submit(self, fn, *args, **kwargs)

    threading.Thread.start = start_within  # type: ignore[method-assign]
    ThreadPoolExecutor.submit = submit_within  # type: ignore[method-assign]


def remembered(run: Callable[..., Any], values: list[tuple[Any, Any]]) -> Callable[..., Any]:
    """``run``, under the given owners and values whenever and wherever it is called."""
    return _within([(owner, value, None) for owner, value in values], run)


_carry_into_threads()

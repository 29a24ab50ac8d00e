"""The batcher: rows of all waiting requests, whatever their adapters, in one forward pass of a model's thread."""

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from infuse.serving import refusals
from infuse.texts import Tokens, batches

Forward = Callable[[Tokens, list[str]], list[np.ndarray]]
"""Token ids and an adapter for every row → a row of probabilities for each."""


@dataclass(eq=False)
class Request:
    """Rows that are answered together.

    Attributes:
        adapters: the adapter of every row.
        answer: done when all rows are, with their probabilities in order.
        dead: nobody waits for the answer any more.
    """

    tokens: Tokens
    adapters: list[str]
    answer: "asyncio.Future[list[np.ndarray]]"
    rows: list[np.ndarray | None] = field(default_factory=list)
    left: int = 0
    dead: bool = False
    arrived: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self.left = len(self.tokens)
        self.rows = [None] * self.left


Row = tuple[Request, int]


class Batcher:
    """The threads that own the model: they run forward passes, and between them the changes to the model.

    Args:
        forward: probabilities of rows under their adapters; called in these threads only.
        window: seconds that a row may wait for others.
        max_tokens: padded tokens of a forward pass.
        capacity: rows that may wait.
        mixed: rows of different adapters in one pass.
        threads: passes at the same time, for a model that can run so many.
        observe: called after every pass with its rows, its different adapters and its seconds.
    """

    def __init__(
        self,
        forward: Forward,
        *,
        window: float = 0.002,
        max_tokens: int = 4096,
        capacity: int = 4096,
        mixed: bool = True,
        threads: int = 1,
        observe: Callable[[int, int, float], None] = lambda rows, adapters, seconds: None,
    ):
        self.forward = forward
        self.window, self.max_tokens, self.capacity, self.mixed = window, max_tokens, capacity, mixed
        self.observe = observe
        self.queue: deque[Row] = deque()
        self.jobs: deque[tuple[Future, Callable[[], Any]]] = deque()
        self.reserved = 0
        self.rate = 1000.0  # rows a second of a thread, as lately seen
        self.stopping = self.ended = False
        self.changed = threading.Condition()
        self.threads = [
            threading.Thread(target=self._work, name=f"infuse-model-{i}", daemon=True) for i in range(threads)
        ]
        for thread in self.threads:
            thread.start()

    @contextmanager
    def reserve(self, rows: int) -> Iterator[None]:
        """Places for so many rows, from before they are tokenised until they are answered or given up.

        Raises:
            RefusedError: the queue is full (429), or the server is stopping (503).
        """
        with self.changed:
            if self.stopping:
                raise refusals.stopping()
            if self.reserved and self.reserved + rows > self.capacity:
                raise refusals.full(self.reserved, self.reserved / (self.rate * len(self.threads)))
            self.reserved += rows
        try:
            yield
        finally:
            with self.changed:
                self.reserved -= rows

    async def run(self, tokens: Tokens, adapters: list[str]) -> list[np.ndarray]:
        """Probabilities of every row; if the caller is cancelled, rows that still wait are never run."""
        request = Request(tokens, adapters, asyncio.get_running_loop().create_future())
        with self.changed:
            if self.ended:
                raise refusals.stopping()
            self.queue.extend((request, i) for i in range(len(tokens)))
            self.changed.notify_all()
        try:
            return await request.answer
        finally:
            request.dead = True

    def call(self, job: Callable[[], Any]) -> "Future[Any]":
        """Run ``job`` in a model thread between two of its passes; its result, later."""
        future: Future[Any] = Future()
        with self.changed:
            if self.ended:
                future.set_exception(refusals.stopping())
                return future
            self.jobs.append((future, job))
            self.changed.notify_all()
        return future

    def drain(self, seconds: float) -> bool:
        """Refuse new rows, finish those that wait, and end the threads; whether that was done in time."""
        until = time.monotonic() + seconds
        with self.changed:
            self.stopping = True
            self.changed.notify_all()
        for thread in self.threads:
            thread.join(max(0.0, until - time.monotonic()))
        return not any(thread.is_alive() for thread in self.threads)

    def _work(self) -> None:
        try:
            self._serve()
        finally:
            with self.changed:
                self.ended = True

    def _serve(self) -> None:
        while True:
            with self.changed:
                while not (self.queue or self.jobs or self.stopping):
                    self.changed.wait()
                if not (self.queue or self.jobs):
                    self.ended = True  # while the lock is held: nothing comes in after the last look
                    return
                job = self.jobs.popleft() if self.jobs else None
                rows = self._take() if job is None else []
            if job is not None:
                _do(*job)
                with self.changed:  # a pass after every job, so that loading never starves answering
                    rows = self._take() if self.queue else []
            if rows:
                self._pass(rows)

    def _take(self) -> list[Row]:
        """Rows for the next passes, once the oldest has waited or there are enough; ``changed`` is held."""
        while self.queue and not (self.stopping or self.jobs):
            left = self.queue[0][0].arrived + self.window - time.monotonic()
            if left <= 0 or sum(len(r.tokens[i]) for r, i in self.queue) >= self.max_tokens:
                break
            self.changed.wait(left)
        taken: list[Row] = []
        skipped: list[Row] = []
        tokens, adapter = 0, None
        while self.queue and tokens < self.max_tokens:
            request, i = row = self.queue.popleft()
            if request.dead:
                continue
            if not self.mixed and adapter not in (None, request.adapters[i]):
                skipped.append(row)
                continue
            adapter = request.adapters[i]
            taken.append(row)
            tokens += len(request.tokens[i])
        self.queue.extendleft(reversed(skipped))
        if self.queue:
            self.changed.notify_all()
        return taken

    def _pass(self, rows: list[Row]) -> None:
        for index in batches([r.tokens[i] for r, i in rows], self.max_tokens):
            self._finish(*self._run([rows[i] for i in index if not rows[i][0].dead]))

    def _run(self, rows: list[Row]) -> tuple[list[Row], list[np.ndarray | Exception]]:
        """Results of one forward pass; if it fails, of ever smaller ones, so that a bad row fails alone."""
        if not rows:
            return [], []
        started = time.perf_counter()
        names = [r.adapters[i] for r, i in rows]
        try:
            found: Sequence[np.ndarray | Exception] = self.forward([r.tokens[i] for r, i in rows], names)
        except Exception as error:
            if len(rows) == 1:
                return rows, [error]
            half = len(rows) // 2
            first, second = self._run(rows[:half]), self._run(rows[half:])
            return [*first[0], *second[0]], [*first[1], *second[1]]
        seconds = time.perf_counter() - started
        with self.changed:
            self.rate += 0.2 * (len(rows) / max(seconds, 1e-6) - self.rate)
        self.observe(len(rows), len(set(names)), seconds)
        return rows, list(found)

    def _finish(self, rows: list[Row], found: list[np.ndarray | Exception]) -> None:
        done: dict[asyncio.AbstractEventLoop, list[tuple[Request, Exception | None]]] = {}
        with self.changed:  # the rows of a request may be in several passes at once
            for (request, i), value in zip(rows, found, strict=True):
                failed = value if isinstance(value, Exception) else None
                if failed is None:
                    request.rows[i] = value  # type: ignore[assignment]  # no exception
                request.left -= 1
                request.dead = request.dead or failed is not None
                if not request.left or failed is not None:
                    done.setdefault(request.answer.get_loop(), []).append((request, failed))
        for loop, requests in done.items():
            try:
                loop.call_soon_threadsafe(_tell, requests)
            except RuntimeError:  # the loop is closed: nobody waits
                continue


def _tell(requests: list[tuple[Request, Exception | None]]) -> None:
    for request, failed in requests:
        if request.answer.done():
            continue
        if failed is not None:
            request.answer.set_exception(failed)
        else:
            request.answer.set_result(request.rows)  # type: ignore[arg-type]  # all are there


def _do(future: Future, job: Callable[[], Any]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        future.set_result(job())
    except BaseException as error:
        future.set_exception(error)

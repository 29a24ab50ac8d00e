"""Send hostile cases to a server, many at a time, and judge what comes back."""

import asyncio
import contextlib
import itertools
import json
import socket
import struct
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import unsound as unsound  # its families are among those that are drawn
from hostile import Case, Known
from running import Answer, Running, parse

DEAF = 1.0
"""Seconds for which a client sends that reads nothing."""


@dataclass
class Verdict:
    """What became of the cases.

    Attributes:
        statuses: how often each was answered; "none": the connection ended without an answer, as it may have.
        kinds: how often each family was sent.
        wrong: what must not be, with the bytes that led to it.
    """

    statuses: Counter = field(default_factory=Counter)
    kinds: Counter = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    def add(self, case: Case, answers: list[Answer] | None) -> None:
        self.kinds[case.kind] += 1
        reason = "no answer within the deadline" if answers is None else _fault(case, answers)
        if reason and len(self.wrong) < 100:
            told = [(a.status, a.body[:300]) for a in answers or []]
            self.wrong.append(f"{case.kind}: {reason}: {b''.join(case.pieces)[:600]!r} -> {told}")
        self.statuses.update([a.status for a in answers] or ["none"] if answers is not None else ["hang"])


def known_answers(server: Running, names: Iterable[str], texts: list[str]) -> list[Known]:
    """What adapters say of texts, each asked alone."""
    return [
        Known(name, texts, server.classify(name, *texts, top_k=3).json)
        for name in names
    ]  # fmt: skip


async def send_all(
    port: int, cases: Iterable[Case], total: int, deadline: float, workers: int = 16, slow: int = 32
) -> Verdict:
    """Send so many cases from several clients at once; slow ones don't hold up the others."""
    verdict, todo = Verdict(), iter(itertools.islice(cases, total))
    room, waiting = asyncio.Semaphore(slow), set()

    async def one(case: Case) -> None:
        try:
            answers = await asyncio.wait_for(exchange(port, case), deadline)
        except TimeoutError:
            answers = None
        verdict.add(case, answers)

    async def apart(case: Case) -> None:
        async with room:
            await one(case)

    async def work() -> None:
        for case in todo:
            if case.kind in ("slow", "too slow", "deaf"):
                waiting.add(asyncio.create_task(apart(case)))
            else:
                await one(case)

    await asyncio.gather(*(work() for _ in range(workers)))
    await asyncio.gather(*waiting)
    return verdict


async def exchange(port: int, case: Case) -> list[Answer]:
    """Send one case over a connection of its own, and read up to the end."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=2**24)
    raw = b""
    try:
        if case.then == "deaf":
            writer.transport.pause_reading()  # type: ignore[attr-defined]  # a transport of both directions
            with contextlib.suppress(OSError, TimeoutError):
                async with asyncio.timeout(DEAF):
                    for piece in case.pieces:
                        writer.write(piece)
                        await writer.drain()
            _reset(writer)
            return []
        reading = asyncio.create_task(reader.read(-1))
        try:
            for piece in case.pieces:
                writer.write(piece)
                await writer.drain()
                if case.pause:
                    await asyncio.sleep(case.pause)
            if case.then == "shut":
                writer.write_eof()
        except (OSError, RuntimeError):  # the server had enough; its answer may be there
            pass
        if case.then == "reset":
            reading.cancel()
            _reset(writer)
            return []
        try:
            raw = await reading
        except OSError:
            raw = bytes(reader._buffer)  # type: ignore[attr-defined]  # what came before the reset
    finally:
        writer.close()
    return parse(raw)[0]


def _reset(writer: asyncio.StreamWriter) -> None:
    """Closing the connection will reset it."""
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


def _fault(case: Case, answers: list[Answer]) -> str:
    if len(answers) < case.due:
        return f"{len(answers)} answers of {case.due}"
    if len(answers) > case.most:
        return f"{len(answers)} answers, and {case.most} at most are due"
    for each in answers:
        if each.status not in case.statuses:
            return f"status {each.status}"
        if each.status >= 400 and not _sentence(each):
            return "no sentence"
    if case.told is not None and not close(answers[0].json, case.told):
        return f"not the answer {case.told}"
    return ""


def _sentence(answer: Answer) -> bool:
    try:
        told = answer.json
    except ValueError:
        return False
    return list(told) == ["error"] and isinstance(told["error"], str) and 0 < len(told["error"]) < 1000


def close(one: Any, other: Any) -> bool:
    """Equal but for the last digits of numbers: rows of a batch of another size are summed in another order."""
    if isinstance(one, float) and isinstance(other, float):
        return abs(one - other) < 1e-4
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(close(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(close, one, other))
    return type(one) is type(other) and one == other and json.dumps(one) == json.dumps(other)

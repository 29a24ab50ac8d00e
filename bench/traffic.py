"""What the benchmarks of serving share: a server in a process of its own, a small fast client, random texts."""

import asyncio
import gc
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from infuse.data import read

sys.path.append(str(Path(__file__).parents[1] / "tests"))  # for serving.py, which writes random adapters

TOKEN = "token-of-the-benchmark"
ALPHABETS = (
    "abcdefghijklmnopqrstuvwxyz",
    "0123456789.,;:!?-+*/%€$",
    "äöüßéèñçøåœ",
    "абвгдежзиклмноп",
    "日本語中文한국어",
    "🙂🚀❤️👩‍💻",
)


@contextmanager
def serving(folder: Path, base: str, *flags: str, seconds: float = 120) -> Iterator[int]:
    """``infuse serve`` on a free port, which is yielded, as its own process; ended by SIGTERM."""
    log = folder.with_name(folder.name + ".log")
    command = [sys.executable, "-m", "infuse", "serve", str(folder), "--base", base]
    with log.open("w") as err:
        process = subprocess.Popen(
            [*command, "--port", "0", *flags], stderr=err, stdout=err, env={**os.environ, "INFUSE_ADMIN_TOKEN": TOKEN}
        )
    try:
        until = time.monotonic() + seconds
        while not (found := re.search(r"at http://\S+:(\d+)", log.read_text())):
            if process.poll() is not None or time.monotonic() > until:
                raise RuntimeError(f"the server did not start: {log.read_text()[-2000:]}")
            time.sleep(0.05)
        yield int(found[1])
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            code = process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            code = process.wait()
        if code not in (0, -signal.SIGTERM, 128 + signal.SIGTERM):
            print(f"the server ended with {code}: {log.read_text()[-2000:]}", file=sys.stderr)


class Connection:
    """One kept-alive HTTP/1.1 connection: requests one after the other, with as little work for each as can be.

    (A client of the usual comfort takes longer for a request than the server does.)
    """

    def __init__(self, port: int):
        self.port = port
        self.reader: asyncio.StreamReader | None = None
        self.writer: asyncio.StreamWriter | None = None

    async def request(
        self, method: str, path: str, body: bytes = b"", kind: str = "application/json"
    ) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body of the answer.

        Raises:
            OSError, EOFError: the connection broke.
        """
        if self.reader is None or self.writer is None or self.reader.at_eof():
            self.reader, self.writer = await asyncio.open_connection("127.0.0.1", self.port)
        head = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
        if not path.startswith("/v1/classify"):
            head += f"Authorization: Bearer {TOKEN}\r\n"
        self.writer.write(f"{head}Content-Type: {kind}\r\n\r\n".encode() + body)
        try:
            first, *lines = (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
            headers = {k.lower(): v for k, _, v in (line.partition(": ") for line in lines if line)}
            content = await self.reader.readexactly(int(headers.get("content-length", 0)))
        except BaseException:  # what comes next on this connection would be the answer to this request
            self.close()
            raise
        if headers.get("connection") == "close":
            self.close()
        return int(first.split(" ", 2)[1]), headers, content

    async def json(self, method: str, path: str, body: Any = None) -> Any:
        """The answer's JSON; an error unless its status is 200."""
        status, _, content = await self.request(method, path, b"" if body is None else json.dumps(body).encode())
        if status != 200:
            raise RuntimeError(f"{method} {path}: {status} {content[:300]!r}")
        return json.loads(content)

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()
        self.reader = self.writer = None


async def counters(connection: Connection) -> dict[str, float]:
    """The sums and counts of /metrics that have no labels."""
    _, _, content = await connection.request("GET", "/metrics")
    lines = (line.split(" ") for line in content.decode().splitlines() if line[:1] not in ("#", ""))
    return {name: float(value) for name, value in lines if "{" not in name}


def texts(count: int, generator: random.Random) -> list[str]:
    """Different random texts: rows of the bundled sample, words of them, characters of many scripts; short to long."""
    rows = read("sample").texts
    words = sorted({word for row in rows for word in row.split()})
    found: dict[str, None] = {}
    while len(found) < count:
        length = generator.choice((1, 2, 4, 8, 16, 150))
        text = generator.choice(
            (
                generator.choice(rows),
                " ".join(generator.choices(words, k=length)),
                "".join(generator.choices(generator.choice(ALPHABETS) + " ", k=length)),
            )
        )
        if text.strip():
            found[text] = None
    return list(found)


def quantile(ordered: Sequence[float], q: float) -> float:
    """Of values in order; NaN of none."""
    return ordered[min(len(ordered) - 1, int(q * len(ordered)))] if ordered else float("nan")


def percentiles(seconds: Sequence[float]) -> Mapping[str, float]:
    """p50, p95 and p99 in milliseconds."""
    ordered = sorted(seconds)
    return {f"p{q}": 1e3 * quantile(ordered, q / 100) for q in (50, 95, 99)}


def run(work: Any) -> Any:
    """``asyncio.run`` on the faster loop where it is installed."""
    gc.freeze()  # full collections of all that was imported would look like the server's pauses
    try:
        import uvloop
    except ImportError:
        return asyncio.run(work)
    return uvloop.run(work)

"""Throughput and latency of ``infuse serve`` under load, from a generator in a process of its own on loopback.

    python bench/serve_load.py [--methods ia3 lora pfeiffer] [--counts 1 10 100 1000] [--json OUT]

First what the generator can do by itself (GET /healthz). Then, for every number of adapters, a closed loop (every
connection sends its next request when the last one is answered) finds the saturation, and an open loop (Poisson
arrivals, latencies from the planned time of each arrival) runs at a share of it. Then one server that mixes adapters in
its batches and one that runs them one at a time (``--no-mixed``) take turns over the same adapters.

Every figure comes with where the time went: rows and different adapters of a forward pass, its milliseconds, the share
of the time in which the model ran, and the share of one core that the generator took.
"""

import argparse
import asyncio
import json
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from timing import machine, table, write
from traffic import Connection, counters, percentiles, run, serving, texts

from serving import fill  # isort: skip  # traffic has put it on the path

Row = dict[str, Any]


class Load:
    """Random requests to some of a server's adapters."""

    def __init__(self, port: int, names: Sequence[str], texts_each: int, pool: Sequence[str], seed: int = 0):
        self.port, self.names, self.each, self.pool = port, names, texts_each, pool
        self.random = random.Random(seed)
        self.connections: list[Connection] = []
        self.seconds: list[float] = []
        self.errors = 0

    def body(self) -> bytes:
        own = self.random.choices(self.pool, k=self.each)
        return json.dumps({"adapter": self.random.choice(self.names), "texts": own}).encode()

    async def ask(self, connection: Connection, planned: float, path: str = "/v1/classify") -> None:
        try:
            if path == "/v1/classify":
                status, _, _ = await connection.request("POST", path, self.body())
            else:
                status, _, _ = await connection.request("GET", path)
        except (OSError, EOFError):
            status = 0
        if status == 200:
            self.seconds.append(time.perf_counter() - planned)
        else:
            self.errors += 1

    async def closed(self, connections: int, seconds: float, path: str = "/v1/classify") -> Row:
        """So many connections, each always waiting for an answer."""

        async def client() -> None:
            connection = Connection(self.port)
            while (now := time.perf_counter()) < until:
                await self.ask(connection, now, path)
            connection.close()

        until = time.perf_counter() + seconds
        return await self._measured(asyncio.gather(*(client() for _ in range(connections))))

    async def open(self, rate: float, seconds: float) -> Row:
        """Arrivals at random times, so many a second on average, whether or not earlier ones are answered."""

        async def one(planned: float) -> None:
            connection = free.pop() if free else Connection(self.port)
            await self.ask(connection, planned)
            free.append(connection)

        async def arrive() -> None:
            planned, asked = time.perf_counter(), []
            until = planned + seconds
            while (planned := planned + self.random.expovariate(rate)) < until:
                await asyncio.sleep(max(0.0, planned - time.perf_counter()))
                asked.append(asyncio.create_task(one(planned)))
            await asyncio.gather(*asked)

        free: list[Connection] = []
        row = await self._measured(asyncio.ensure_future(arrive()))
        for connection in free:
            connection.close()
        return {"asked/s": rate, **row}

    async def touch(self) -> float:
        """Ask every adapter once, so that all are in memory; seconds for each."""
        started, waiting = time.perf_counter(), list(self.names)

        async def client() -> None:
            connection = Connection(self.port)
            while waiting:
                await connection.json("POST", "/v1/classify", {"adapter": waiting.pop(), "texts": self.pool[:1]})
            connection.close()

        await asyncio.gather(*(client() for _ in range(8)))
        return (time.perf_counter() - started) / len(self.names)

    async def _measured(self, work: asyncio.Future) -> Row:
        self.seconds, self.errors = [], 0
        watch = Connection(self.port)
        before, started, own = await counters(watch), time.perf_counter(), time.process_time()
        await work
        wall, own = time.perf_counter() - started, time.process_time() - own
        after = await counters(watch)
        watch.close()
        spent = {k: after[k] - before.get(k, 0.0) for k in after}
        passes = max(1.0, spent["infuse_batch_rows_count"])
        return {
            "requests/s": len(self.seconds) / wall,
            **percentiles(self.seconds),
            "errors": self.errors,
            "rows": spent["infuse_batch_rows_sum"] / passes,
            "adapters": spent["infuse_batch_adapters_sum"] / passes,
            "pass ms": 1e3 * spent["infuse_batch_seconds_sum"] / passes,
            "model %": 100 * spent["infuse_batch_seconds_sum"] / wall,
            "generator %": 100 * own / wall,
        }


async def saturation(load: Load, options: argparse.Namespace) -> Row:
    """The best of the closed loops."""
    rows = [{"connections": c, **await load.closed(c, options.seconds)} for c in options.connections]
    return max(rows, key=lambda row: row["requests/s"])


async def by_count(
    root: Path, names: Sequence[str], pool: Sequence[str], options: argparse.Namespace
) -> dict[str, Row]:
    """Saturation, and latencies below it, by the number of adapters."""
    rows: dict[str, Row] = {}
    for count in options.counts:
        with serving(subset(root, names[:count]), options.base, *flags(options)) as port:
            load = Load(port, names[:count], options.texts, pool)
            each = await load.touch()
            await load.closed(max(options.connections), 1)
            full = await saturation(load, options)
            rows[f"{count:,} closed"] = {"first ms": 1e3 * each, **full}
            rows[f"{count:,} open"] = await load.open(options.share * full["requests/s"], options.seconds)
    return rows


async def against_switching(
    root: Path, names: Sequence[str], pool: Sequence[str], options: argparse.Namespace
) -> tuple[dict[str, Row], dict[str, Any]]:
    """Mixed batches and one adapter at a time, in turns; the ratio of their throughputs."""
    own = names[: options.against]
    with ExitStack() as stack:
        loads = {}
        for name, extra in {"mixed": [], "switching": ["--no-mixed"]}.items():
            folder = subset(root, own, f"-{name}")
            port = stack.enter_context(serving(folder, options.base, *flags(options), *extra))
            loads[name] = Load(port, own, options.texts, pool)
            await loads[name].touch()
            await loads[name].closed(max(options.connections), 1)
        rows: dict[str, Row] = {}
        for turn in range(options.turns):
            for name, load in loads.items():
                rows[f"{name} {turn + 1}"] = await saturation(load, options)
        rates = {n: [rows[f"{n} {t + 1}"]["requests/s"] for t in range(options.turns)] for n in loads}
        for name, load in loads.items():
            rows[f"{name} open"] = await load.open(options.share * statistics.median(rates[name]), options.seconds)
    ratios = [a / b for a, b in zip(rates["mixed"], rates["switching"], strict=True)]
    return rows, {"rates": rates, "ratios": ratios, "median": statistics.median(ratios)}


def subset(root: Path, names: Sequence[str], suffix: str = "") -> Path:
    """A folder of links to some of the adapters."""
    folder = root.with_name(f"{root.name}-{len(names)}{suffix}")
    folder.mkdir()
    for name in names:
        (folder / name).symlink_to(root / name, target_is_directory=True)
    return folder


def flags(options: argparse.Namespace) -> list[str]:
    given = ["--precision", options.precision, "--window", str(options.window), "--watch", "0"]
    return [
        *given,
        "--threads",
        str(options.threads),
        "--workers",
        str(options.workers),
        "--resident",
        str(max(*options.counts, options.against)),
    ]


async def everything(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    here = machine()
    pool = texts(1000, random.Random(1)) if options.random_texts else texts_of_the_sample()
    root = folder / "adapters"
    count = max(*options.counts, options.against)
    names = fill(root, options.base, [options.methods[i % len(options.methods)] for i in range(count)], labels=10)
    what = f"{options.texts} text(s) a request, {'+'.join(options.methods)}, {options.precision}"
    what += f" ({here['processor']}, {here['cores']} cores for server and generator)"

    with serving(subset(root, names[:1], "-alone"), options.base, *flags(options)) as port:
        load = Load(port, names[:1], options.texts, pool)
        alone = await load.closed(max(options.connections), min(5.0, options.seconds), "/healthz")
    table("the generator by itself: GET /healthz", {"/healthz": alone})
    rows = await by_count(root, names, pool, options) if options.counts else {}
    table(f"by number of adapters: {what}", rows)
    turns, ratio = await against_switching(root, names, pool, options) if options.turns else ({}, {})
    if turns:
        table(f"{options.against} adapters, mixed against one at a time: {what}", turns)
        print(f"\nmixed / switching: {ratio['median']:.2f} (of {', '.join(f'{r:.2f}' for r in ratio['ratios'])})")
    return {"healthz": alone, "by number": rows, "turns": turns, "ratio": ratio}


def texts_of_the_sample() -> list[str]:
    from infuse.data import read

    return list(read("sample").texts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", default="minilm")
    parser.add_argument("--precision", default="fp32", choices=["auto", "fp32", "bf16"])
    parser.add_argument("--methods", nargs="+", default=["ia3", "lora", "pfeiffer"])
    parser.add_argument("--counts", nargs="+", type=int, default=[1, 10, 100, 1000], help="numbers of adapters")
    parser.add_argument("--against", type=int, default=50, help="adapters of the comparison with switching")
    parser.add_argument("--turns", type=int, default=3, help="rounds of that comparison; 0: none")
    parser.add_argument(
        "--connections", nargs="+", type=int, default=[32, 128], help="of closed loops; the best counts"
    )
    parser.add_argument("--texts", type=int, default=1, help="texts of a request")
    parser.add_argument(
        "--random-texts", action="store_true", help="of many scripts and lengths, not the sample's rows"
    )
    parser.add_argument("--share", type=float, default=0.8, help="of saturation, in the open loop")
    parser.add_argument("--seconds", type=float, default=10.0, help="of every measurement")
    parser.add_argument("--window", type=float, default=2.0, help="the server's, in milliseconds")
    parser.add_argument("--workers", type=int, default=1, help="processes of the server with a model each")
    parser.add_argument("--threads", type=int, default=0, help="of the server's forward passes; 0: torch's choice")
    parser.add_argument("--json")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = run(everything(Path(folder), options))
    write(options.json, {"options": vars(options), **result})


if __name__ == "__main__":
    main()

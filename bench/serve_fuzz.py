"""Fuzz a real server: hostile bytes over raw sockets, and schemathesis against its own OpenAPI description.

    python bench/serve_fuzz.py [--requests 100000] [--generated 10000] [--base tiny] [--seed 0] [--json OUT]

Right requests run among the hostile ones, and their answers must stay those of their own adapters. At the end: answers
by status, whatever must not have been (5xx, wrong answers, requests without an answer), whether the server is alive and
answers as before, growth of the memory of both processes, open files, and how it stops under load.
"""

import argparse
import asyncio
import json
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from timing import machine

sys.path.append(str(Path(__file__).parents[1] / "tests"))

from conftest import make_tiny_base
from fuzzing import close, known_answers, send_all
from hostile import cases
from running import TOKEN, Running, request
from serving import fill

METHODS = ["ia3", "lora", "houlsby", "pfeiffer", "parallel", "compacter:width=4", "fusion", "lora:dora=true"]
TEXTS = ["my card was stolen on the train", "how do I repay the loan early?", "send me the statement for May"]
GROWTH = 100
"""MB by which either process may grow."""
DEADLINE = 5.0  # the server's; a client waits three times as long before it calls that a hang


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=100_000, help="all requests, those of schemathesis included")
    parser.add_argument("--generated", type=int, default=10_000, help="how many of them schemathesis makes, about")
    parser.add_argument("--base", default="tiny")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as where:
        facts = run(Path(where), options)
    print(json.dumps({name: value for name, value in facts.items() if name != "wrong"}, indent=1))
    for each in facts["wrong"]:
        print(each[:1500])
    if options.json:
        options.json.write_text(json.dumps({"machine": machine(), **facts}, indent=1))
    sys.exit(bool(facts["wrong"]))


def run(where: Path, options: argparse.Namespace) -> dict[str, Any]:
    root = where / "outside" / "adapters"
    root.mkdir(parents=True)
    base = str(make_tiny_base(where / "base")) if options.base == "tiny" else options.base
    names = fill(root, base, METHODS, seed=options.seed)
    with Running(root, "--base", base, "--deadline", str(DEADLINE), log=where / "log") as server:
        known = known_answers(server, names, TEXTS)
        asyncio.run(send_all(server.port, cases(options.seed + 1, known), 2000, 3 * DEADLINE))  # memory has settled
        before, started = state(server), time.monotonic()
        schema = schemathesis(server, options.generated, options.seed, where)
        generated, seconds = requests(server) - before["requests"], time.monotonic() - started
        for name in names:  # schemathesis has found them in the list, and withdrawn them
            server.ask("POST", f"/v1/adapters/{name}", token=TOKEN)
        started = time.monotonic()
        verdict = asyncio.run(
            send_all(server.port, cases(options.seed, known), max(0, options.requests - generated), 3 * DEADLINE)
        )
        own_seconds = time.monotonic() - started
        wrong = [*schema, *verdict.wrong, *aftermath(server, where, root, names)]
        again = [server.ask("POST", f"/v1/adapters/{name}", token=TOKEN).status for name in names]
        now = known_answers(server, names, TEXTS)
        wrong += [] if set(again) == {200} else [f"reloading gave {again}"]
        wrong += [f"{one.adapter} answers otherwise" for one, two in zip(known, now, strict=True)
                  if not close(one.answer, two.answer)]  # fmt: skip
        after = state(server)
        most = [round(peak(pid) / 1024, 1) for pid in (server.process.pid, server.model)]
        grown = [after["rss MB"][i] - before["rss MB"][i] for i in (0, 1)]
        wrong += [f"memory grew by {grown} MB"] if max(grown) > GROWTH else []
        ended = asyncio.run(end_under_load(server, known))
        wrong += ended.pop("wrong")
        tracebacks = server.output.count("Traceback")
        wrong += [f"{tracebacks} tracebacks in the log: {server.output[-3000:]}"] if tracebacks else []
    return {
        "schemathesis": {"requests": generated, "seconds": round(seconds), "failures": len(schema)},
        "own": {"requests": verdict.kinds.total(), "seconds": round(own_seconds),
                "statuses": dict(sorted(verdict.statuses.items(), key=str)),
                "kinds": dict(verdict.kinds.most_common())},
        "statuses by the server's own count": after["statuses"],
        "before": {name: before[name] for name in ("rss MB", "files", "threads")},
        "after": {name: after[name] for name in ("rss MB", "files", "threads")},
        "most": {"rss MB": most},
        "end": ended,
        "wrong": wrong,
    }  # fmt: skip


def schemathesis(server: Running, count: int, seed: int, where: Path) -> list[str]:
    """Right and wrong requests after the server's own description; what its checks object to."""
    per_route = max(1, count // 4)  # four routes have anything to vary
    command = [
        sys.executable, "-m", "schemathesis.cli", "run", f"http://127.0.0.1:{server.port}/openapi.json",
        "--header", f"Authorization: Bearer {TOKEN}", "--mode", "all", "--max-examples", str(per_route),
        "--seed", str(seed), "--continue-on-failure", "--request-timeout", str(3 * DEADLINE),
        "--phases", "examples,coverage,fuzzing", "--suppress-health-check", "all", "--warnings", "off",
        "--checks", CHECKS, "--no-color", "--no-shrink",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=where, capture_output=True, text=True)
    return [f"schemathesis: {done.stdout[-3000:]}{done.stderr[-500:]}"] if done.returncode else []


CHECKS = (
    "not_a_server_error,status_code_conformance,content_type_conformance,response_headers_conformance,"
    "response_schema_conformance,negative_data_rejection"
)


def requests(server: Running) -> int:
    return sum(counted(server).values())


def counted(server: Running) -> Counter:
    """Requests by status, as the server counts them."""
    statuses: Counter = Counter()
    for line in server.ask("GET", "/metrics").body.decode().splitlines():
        if line.startswith("infuse_requests_total{"):
            statuses[line.split('status="')[1].split('"')[0]] += int(float(line.rsplit(" ", 1)[1]))
    return statuses


def state(server: Running) -> dict[str, Any]:
    both = [Path(f"/proc/{pid}") for pid in (server.process.pid, server.model)]
    lines = [dict(line.split(":", 1) for line in (p / "status").read_text().splitlines()) for p in both]
    return {
        "rss MB": [round(int(each["VmRSS"].split()[0]) / 1024, 1) for each in lines],  # the server's, the model's
        "files": sum(len(list((process / "fd").iterdir())) for process in both),
        "threads": sum(int(each["Threads"]) for each in lines),
        "requests": requests(server),
        "statuses": dict(sorted(counted(server).items())),
    }


def peak(pid: int) -> int:
    """The most kB that a process has had in memory."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))


def aftermath(server: Running, where: Path, root: Path, names: list[str]) -> list[str]:
    """What must hold once all clients have gone."""
    wrong = []
    end = time.monotonic() + 2 * DEADLINE
    while (held := server.metric("infuse_queue_rows")) and time.monotonic() < end:
        time.sleep(0.1)
    wrong += [f"{held} rows are still in the queue"] if held else []
    extra = {path.name for path in (root / "..").iterdir()} - {"adapters"}
    extra |= {path.name for path in root.iterdir()} - set(names)
    wrong += [f"files appeared: {sorted(extra)}"] if extra else []
    server_errors = [status for status in counted(server) if status.startswith("5")]
    wrong += [f"the server counts answers {server_errors}"] if server_errors else []
    return wrong + ([] if server.process.poll() is None else ["the server has ended"])


async def end_under_load(server: Running, known: list[Any]) -> dict[str, Any]:
    """SIGTERM while 16 clients ask: each request is answered, refused, or its connection never begins."""
    outcomes: Counter = Counter()
    wrong: list[str] = []
    going = True

    async def client(one: Any) -> None:
        while going:
            try:
                reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
            except OSError:
                outcomes["no connection"] += 1
                return
            try:
                writer.write(request("POST", "/v1/classify", {"adapter": one.adapter, "texts": one.texts, "top_k": 3}))
                raw = await asyncio.wait_for(reader.read(-1), 3 * DEADLINE)
                outcomes[raw[9:12].decode() or "closed"] += 1
            except ConnectionError:
                outcomes["reset"] += 1
            except TimeoutError:
                wrong.append("a request was left without an answer at the end")
            finally:
                writer.close()

    clients = [asyncio.create_task(client(known[i % len(known)])) for i in range(16)]
    await asyncio.sleep(1)
    started = time.monotonic()
    server.process.terminate()
    code = await asyncio.to_thread(server.process.wait, 60)
    seconds, going = time.monotonic() - started, False
    await asyncio.gather(*clients)
    wrong += [f"exit code {code}"] if code else []
    return {"exit code": code, "seconds": round(seconds, 2), "outcomes": dict(outcomes), "wrong": wrong}


if __name__ == "__main__":
    main()

"""Whether ``infuse serve`` answers as offline prediction does while many clients mix adapters and adapters change.

    python bench/serve_mix.py [--precision fp32 bf16] [--seconds 60] [--json OUT]

A server in a process of its own holds adapters of every method, presets, a fusion and a stack among them, with heads of
several numbers of labels. Each has two versions. Clients send random texts for random adapters; meanwhile adapters are
swapped by replacing their file (seen by the watch on the folder, or reloaded by POST), by POST with a body, withdrawn
and brought back, moved out of the folder and back, and evicted, as fewer are resident than there are.

Every answer names its version. It must be one that was in force while the request was under way, and equal what
``infuse predict`` gives with that version: the same label, and confidences within the bound. Where two labels are
within the bound of each other, either may be on top; such ties are counted. 404 is right only while an adapter is away.
"""

import argparse
import asyncio
import json
import random
import shutil
import tempfile
import time
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mixed_batch import names_of
from timing import machine, table, write
from traffic import Connection, counters, run, serving, texts

import infuse
from infuse.bases import BaseModel, load_base
from infuse.checkpoint import header
from infuse.formats.bundle import CONFIG, WEIGHTS, write_folder
from infuse.heads import answer, head_of
from infuse.serving import files
from infuse.training.predictor import Predictor, open_run

from serving import write as write_adapter  # isort: skip  # traffic has put it on the path

BOUNDS = {"fp32": 1e-4, "bf16": 0.02}
"""How far a confidence may be from the offline one. Rows of a batch are padded and grouped otherwise than offline, so
that sums are taken in another order; in bf16 that was seen to make up to 0.013."""
AWAY = "away"


@dataclass(frozen=True)
class Version:
    """One version of an adapter: its folder, and what offline prediction gives for every text of the pool."""

    name: str
    folder: Path
    head: Any
    probabilities: np.ndarray


@dataclass
class Subject:
    """An adapter under test: its versions by number, and when each was in force."""

    name: str
    method: str
    versions: dict[str, Version]
    spans: list[list[Any]] = field(default_factory=list)

    @property
    def now(self) -> str:
        return self.spans[-1][0]

    def begin(self, version: str) -> None:
        """From now on an answer may be of this version, too."""
        self.spans.append([version, time.perf_counter(), float("inf")])

    def settle(self) -> None:
        """The latest version is in force: requests that are sent from now on see no other."""
        for span in self.spans[:-1]:
            span[2] = min(span[2], time.perf_counter())

    def legal(self, version: str, sent: float) -> bool:
        """Whether this version was in force at some time since then."""
        return any(name == version and end >= sent for name, _, end in self.spans)


@dataclass
class Tally:
    """What was seen, by method."""

    bound: float
    counts: dict[str, Counter] = field(default_factory=lambda: defaultdict(Counter))
    largest: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    examples: list[str] = field(default_factory=list)

    def note(self, method: str, what: str, example: Any = None) -> None:
        self.counts[method][what] += 1
        if example is not None and len(self.examples) < 20:
            self.examples.append(f"{method}: {what}: {example}")

    def total(self, what: str) -> int:
        return sum(count[what] for count in self.counts.values())

    def check(self, subject: Subject, version: Version, row: int, got: dict[str, Any], top_k: int) -> None:
        """Compare one answer with the offline one."""
        expected = answer(version.head, version.probabilities[row], top_k)
        offline = dict(zip(version.head.labels, version.probabilities[row].tolist(), strict=True))
        told = {each["label"]: each["confidence"] for each in got["top"]}
        far = max(abs(offline.get(label, np.inf) - confidence) for label, confidence in told.items())
        far = max(far, abs(expected.confidence - got["confidence"]))
        self.largest[subject.method] = max(self.largest[subject.method], far)
        same = (got["label"], got["labels"]) == (
            expected.label,
            None if expected.labels is None else list(expected.labels),
        ) and len(told) == len(expected.top)
        if far > self.bound or not (same or self._tied(version, offline, expected)):
            self.note(subject.method, "wrong", f"{subject.name} off by {far:.2e}: {got} for {expected}")
        elif not same:
            self.note(subject.method, "ties")
        self.note(subject.method, "answers")

    def _tied(self, version: Version, offline: dict[str, float], expected: Any) -> bool:
        """Whether what decides the answer is too close to call: two labels, or a label and its threshold."""
        best = sorted(offline.values(), reverse=True)
        if version.head.multi:
            return min(abs(p - 0.5) for p in best) <= self.bound
        return best[0] - best[1] <= 2 * self.bound or abs(best[0] - version.head.threshold) <= self.bound


def every_method() -> list[str]:
    """All methods and presets, fusion, a stack and a bare head."""
    return [*names_of("all"), "compacter:train_norms=true", "stack", "head"]


def prepare(folder: Path, base: BaseModel, methods: list[str], pool: list[str], precision: str) -> list[Subject]:
    """Two versions of random adapters of these methods, and the offline answers of each."""
    generator = torch.Generator().manual_seed(0)
    subjects = []
    plain = load_base(base.name)
    for i, method in enumerate(methods):
        name = f"{i:03}-{method.split(':')[0].replace('+', 'p')}"
        versions = {}
        for letter in "AB":
            own = folder / letter / name
            settings = {"multi": i % 7 == 3, "threshold": 0.4 * (i % 5 == 1), "temperature": 1.0 + (i % 3)}
            write_adapter(plain, own, method, generator, 2 + i % 6, precision, **settings)
            if letter == "B" and (own / "members").exists():  # one file is replaced at once, several are not
                shutil.rmtree(own / "members")
                shutil.copytree(folder / "A" / name / "members", own / "members")
            version = offline(base, own, letter, pool)
            versions[files.read(own).version] = version
        subjects.append(Subject(name, method, versions))
    return subjects


def offline(base: BaseModel, folder: Path, name: str, pool: list[str]) -> Version:
    """As ``infuse predict`` answers (:mod:`infuse.training.predictor`), but over a base that is loaded once."""
    infuse.load(base.model, folder, "offline")
    head = head_of(base.model, "offline")
    length = int(header(folder)["info"]["run"]["max_length"])
    found = Predictor(base, "offline", head.labels, head.multi, length).probabilities(pool)
    infuse.detach(base.model)
    return Version(name, folder, head, found)


class Changes:
    """Swaps, withdraws and moves adapters, and keeps the record of what is in force."""

    def __init__(self, port: int, root: Path, seed: int, tally: Tally):
        self.connection, self.root, self.random, self.tally = Connection(port), root, random.Random(seed), tally
        self.actions = [self.replace, self.reload, self.send, self.withdraw, self.move]

    async def one(self, subject: Subject) -> None:
        """A random change, done when the server has confirmed it."""
        mixes = bool(header(next(iter(subject.versions.values())).folder)["members"])
        action = self.random.choice([a for a in self.actions if not (mixes and a == self.send)])
        await action(subject)
        self.tally.note("all", action.__name__)

    async def replace(self, subject: Subject) -> None:
        """Another file in its place; the server sees it by itself."""
        await self._put(subject)
        until = time.perf_counter() + 60
        while (await self._status(subject))["version"] != subject.now:
            if time.perf_counter() > until:
                self.tally.note(subject.method, "stale", f"{subject.name}: its new file is not seen")
                return
            await asyncio.sleep(0.05)
        subject.settle()

    async def reload(self, subject: Subject) -> None:
        await self._put(subject)
        await self._post(subject)

    async def send(self, subject: Subject) -> None:
        version = self._other(subject)
        subject.begin(version)
        await self._post(subject, (subject.versions[version].folder / WEIGHTS).read_bytes())

    async def withdraw(self, subject: Subject) -> None:
        version = self._other(subject)
        subject.begin(AWAY)
        await self.connection.json("DELETE", f"/v1/adapters/{subject.name}")
        subject.settle()
        await asyncio.sleep(self.random.random() / 2)
        await self._put(subject, version)
        await self._post(subject)

    async def move(self, subject: Subject) -> None:
        """Out of the folder and, the other version, back into it."""
        version = self._other(subject)
        subject.begin(AWAY)
        aside = self.root / f".{subject.name}"
        (self.root / subject.name).rename(aside)
        await asyncio.sleep(2 * self.random.random())
        await asyncio.to_thread(self._write, aside, subject, version)
        subject.begin(version)
        aside.rename(self.root / subject.name)
        await self._post(subject)

    def _other(self, subject: Subject) -> str:
        return next(v for v in subject.versions if v != subject.now)

    async def _put(self, subject: Subject, version: str | None = None) -> None:
        version = version or self._other(subject)
        subject.begin(version)
        await asyncio.to_thread(self._write, self.root / subject.name, subject, version)

    @staticmethod
    def _write(folder: Path, subject: Subject, version: str) -> None:
        """As ``infuse.save`` writes."""
        source = subject.versions[version].folder
        write_folder(folder, {name: (source / name).read_bytes() for name in (CONFIG, WEIGHTS)})

    async def _post(self, subject: Subject, body: bytes = b"") -> None:
        path = f"/v1/adapters/{subject.name}"
        status, _, content = await self.connection.request("POST", path, body, "application/octet-stream")
        if status != 200:
            self.tally.note(subject.method, "refused", f"POST {path}: {status} {content[:300]!r}")
        elif json.loads(content)["version"] != subject.now:
            self.tally.note(subject.method, "stale", f"POST {path}: {content[:300]!r}, not version {subject.now}")
        else:
            subject.settle()

    async def _status(self, subject: Subject) -> dict[str, Any]:
        return await self.connection.json("GET", f"/v1/adapters/{subject.name}")


async def client(port: int, subjects: list[Subject], pool: list[str], until: float, seed: int, tally: Tally) -> None:
    """Requests one after the other: one item or several, of one or several texts."""
    chance, connection = random.Random(seed), Connection(port)
    while time.perf_counter() < until:
        items = []
        for subject in chance.choices(subjects, k=chance.choice((1, 1, 1, 3))):
            rows = chance.choices(range(len(pool)), k=chance.choice((1, 1, 1, 4)))
            items.append((subject, rows, chance.choice((1, 2, 10))))
        body = [{"adapter": s.name, "texts": [pool[r] for r in rows], "top_k": k} for s, rows, k in items]
        sent = time.perf_counter()
        try:
            async with asyncio.timeout(60):
                status, headers, content = await connection.request(
                    "POST", "/v1/classify", json.dumps(body if len(body) > 1 else body[0]).encode()
                )
        except (OSError, EOFError, TimeoutError) as error:
            tally.note("all", "lost", repr(error))
            continue
        if status == 429:
            tally.note("all", "429")
            await asyncio.sleep(int(headers["retry-after"]))
        elif status == 404 and any(s.legal(AWAY, sent) for s, _, _ in items):
            tally.note("all", "404")
        elif status != 200:
            tally.note(items[0][0].method, "refused", f"{[s.name for s, _, _ in items]} {status} {content[:300]!r}")
        else:
            told = json.loads(content)
            for (subject, rows, top_k), got in zip(items, told if len(items) > 1 else [told], strict=True):
                check(subject, rows, got, top_k, sent, pool, tally)
    connection.close()


def check(
    subject: Subject, rows: list[int], got: dict[str, Any], top_k: int, sent: float, pool: list[str], tally: Tally
) -> None:
    if got["adapter"] != subject.name or len(got["answers"]) != len(rows):
        tally.note(subject.method, "wrong", f"{subject.name}, {len(rows)} texts: {got}")
    elif not subject.legal(got["version"], sent):
        tally.note(subject.method, "stale", f"{subject.name} {got['version']}, in force are {subject.spans[-3:]}")
    else:
        for row, each in zip(rows, got["answers"], strict=True):
            tally.check(subject, subject.versions[got["version"]], row, each, top_k)


async def drive(
    port: int, root: Path, subjects: list[Subject], pool: list[str], options: argparse.Namespace, tally: Tally
) -> dict[str, float]:
    """Clients and changes side by side, for as long as they may; what the server has counted."""

    async def change(seed: int) -> None:
        changes = Changes(port, root, seed, tally)
        own = subjects[seed :: options.changers]
        while time.perf_counter() < until and own:
            await changes.one(changes.random.choice(own))
        changes.connection.close()

    until = time.perf_counter() + options.seconds
    clients = (client(port, subjects, pool, until, seed, tally) for seed in range(options.clients))
    await asyncio.gather(*clients, *(change(seed) for seed in range(options.changers)))
    watch = Connection(port)
    found = await counters(watch)
    watch.close()
    return found


def mix(folder: Path, options: argparse.Namespace, precision: str) -> dict[str, Any]:
    """The whole test in one precision; its counts."""
    pool = texts(options.texts, random.Random(0))
    base = load_base(options.base, precision=precision)
    methods = [options.methods[i % len(options.methods)] for i in range(options.adapters)]
    subjects = prepare(folder, base, methods, pool, precision)
    first = next(iter(subjects[0].versions.values()))
    again = open_run(first.folder, options.base, precision).probabilities(pool)
    assert np.array_equal(again, first.probabilities), "a base that is used again must not matter"
    root = folder / "served"
    for subject in subjects:
        shutil.copytree(folder / "A" / subject.name, root / subject.name)
        subject.begin(next(iter(subject.versions)))
    tally = Tally(BOUNDS[precision])
    flags = ["--precision", precision, "--resident", str(options.resident), "--watch", "0.5"]
    with serving(
        root, options.base, *flags, "--threads", str(options.threads), "--workers", str(options.workers)
    ) as port:
        found = run(drive(port, root, subjects, pool, options, tally))
    passes = max(1.0, found["infuse_batch_rows_count"])
    result = {
        "bound": tally.bound,
        **{what: tally.total(what) for what in ("answers", "wrong", "stale", "refused", "lost", "ties", "404", "429")},
        "largest difference": max(tally.largest.values(), default=0.0),
        "changes": {a.__name__: tally.total(a.__name__) for a in Changes(0, root, 0, tally).actions},
        "rows of a pass": found["infuse_batch_rows_sum"] / passes,
        "adapters of a pass": found["infuse_batch_adapters_sum"] / passes,
        "examples": tally.examples,
    }
    result["methods"] = {
        method: {**{w: tally.counts[method][w] for w in ("answers", "wrong", "stale", "refused", "ties")},
                 "largest difference": tally.largest[method], "told apart": told_apart(own, tally.bound)}
        for method in dict.fromkeys(s.method for s in subjects)
        if (own := [s for s in subjects if s.method == method])
    }  # fmt: skip
    return result


def told_apart(subjects: list[Subject], bound: float) -> float:
    """Share of (adapter, text) where the wrong version would be noticed by its confidences alone."""
    pairs = [[version.probabilities for version in subject.versions.values()] for subject in subjects]
    return float(np.mean([(np.abs(a - b) > 2 * bound).any(1).mean() for a, b in pairs]))


def sound(result: dict[str, Any]) -> bool:
    """Whether nothing was wrong, stale, refused or lost, and something was tested."""
    return result["answers"] > 0 and not any(result[what] for what in ("wrong", "stale", "refused", "lost"))


def settings(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", default="minilm")
    parser.add_argument("--precision", nargs="+", default=["fp32", "bf16"], choices=list(BOUNDS))
    parser.add_argument("--methods", nargs="+", default=every_method())
    parser.add_argument("--adapters", type=int, default=50)
    parser.add_argument("--resident", type=int, default=20)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--changers", type=int, default=8, help="changes at one time, of different adapters")
    parser.add_argument("--texts", type=int, default=200, help="different texts")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--workers", type=int, default=1, help="processes of the server with a model each")
    parser.add_argument("--threads", type=int, default=0, help="of the server's forward passes; 0: torch's choice")
    parser.add_argument("--json")
    return parser.parse_args(arguments)


def main() -> None:
    options = settings()
    if options.threads:
        torch.set_num_threads(options.threads)
    here, results = machine(), {}
    for precision in options.precision:
        with tempfile.TemporaryDirectory() as folder:
            result = results[precision] = mix(Path(folder), options, precision)
        what = f"{options.clients} clients, {options.adapters} adapters, {options.resident} resident"
        table(
            f"{precision}, {options.seconds:g} s, {what} ({here['processor']}, {here['cores']} cores)",
            result["methods"],
        )
        shown = {k: v for k, v in result.items() if k not in ("methods", "examples")}
        print("\n" + "\n".join(f"{name}: {value}" for name, value in shown.items()))
        print("\n".join(result["examples"]))
    write(options.json, {"options": vars(options), **results})
    raise SystemExit(not all(map(sound, results.values())))


if __name__ == "__main__":
    main()

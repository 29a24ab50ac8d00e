"""A fault at every file operation of every command that writes: what is on disk then, and after the same command again.

    python bench/faults.py [--commands train merge …] [--faults kill full …] [--every 7] [--jobs 2]

``kill``: the process dies before the operation; ``torn``: in the middle of a write; ``full``: from then on the disk is
full; ``error``: the operation fails with EIO; ``short``: a write takes half. ``bench/faults.c``, preloaded, sees the
operations of all libraries below the case's folder, its temporary files included. A point is green if

- a process that isn't killed ends with exit code 0, or with 2 and one sentence;
- what a reader sees afterwards is what was there before, or all of the new;
- the same command again ends well, with the same weights, metrics and files as an undisturbed one, and nothing else.

Needs gcc and Linux. The exit code is 1 if a point isn't green.
"""

import argparse
import ctypes
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any

HERE = Path(__file__).resolve().parent
FAULTS = {"kill": 1, "torn": 2, "full": 3, "error": 4, "short": 5}
"""Names and numbers of the kinds of faults; 0 only counts."""
STEPS = {"kill": "-sw", "error": "-sw", "full": "sw", "torn": "w", "short": "w"}
"""Which operations a fault can hit: w writes, s others that take space, - the rest."""
SLOT = re.compile(rb"[^\s\"']*/slots/\d/root")
"""Where a case runs: several at a time, below paths of one length, which are parts of files."""
LONGEST = 180
"""Seconds after which a process is taken to hang."""
TIMES = {"seconds", "step_ms", "curve", "resumed", "costs"}
"""What differs from run to run in JSON."""
TOLD = {"config.yaml", "best.yaml", "train.yaml", "tune.yaml", "recommend.yaml", "per_class.csv", "curves.csv"}
"""Files whose text is the same each time."""


@dataclass(frozen=True)
class Case:
    """A command over what an earlier one has left.

    Attributes:
        run: the command; writes ``out`` below a folder.
        before: what makes the old content of ``out``, if there is any.
        seen: what a reader of ``out`` sees, as text.
    """

    run: Callable[[Path], Any]
    before: Callable[[Path], Any] | None = None
    seen: Callable[[Path], str] | None = None


def cases(place: Path) -> dict[str, Case]:
    """All commands, over the base and the rows in ``place``."""
    import infuse
    from infuse.cli import main
    from infuse.testing import tiny, wake
    from infuse.training.predictor import open_run

    base, rows = place / "base", place / "rows.csv"
    common = ("--base", base, "--data", rows, "--precision", "fp32")
    quick = (*common, "--epochs", "1", "--no-baseline", "--head", "linear", "--batch-size", "8")

    def command(*words: Any) -> Callable[[Path], Any]:
        return lambda root: main([str(root / word[1:]) if str(word).startswith("@") else str(word) for word in words])

    def adapter(root: Path) -> str:
        found = open_run(root / "out", str(base))
        state = found.base.model.infuse[found.adapter].state_dict()  # type: ignore[operator, index, union-attr]
        return digest({name: value.tolist() for name, value in state.items()}) + digest(found.head.settings())

    def report(root: Path) -> str:
        """The command that a report tells: its figures are times."""
        from infuse.storage import current

        told = json.loads((current(root / "out") / "report.json").read_text())
        return SLOT.sub(b"", json.dumps(told["commands"]).encode()).decode()

    def model() -> Any:
        fresh = tiny("bert")
        for name in ("a", "b"):
            infuse.attach(fresh, infuse.Bottleneck.pfeiffer(), name)
            wake(fresh, name)
        infuse.fuse(fresh, ["a", "b"], name="mix")
        infuse.attach(fresh, infuse.LoRA(rank=2), "lora")
        wake(fresh, "lora")
        return fresh

    def saved(name: str, form: str = "infuse") -> Callable[[Path], Any]:
        return lambda root: infuse.save(model(), name, root / "out", format=form)

    def loaded(root: Path) -> str:
        fresh = tiny("bert")
        own = infuse.load(fresh, root / "out")
        names = (own.name, *own.members)
        return digest({n: {k: v.tolist() for k, v in fresh.infuse[n].state_dict().items()} for n in names})  # type: ignore[operator, index, union-attr]

    def classifier(seed: int) -> Callable[[Path], Any]:
        def run(root: Path) -> None:
            from infuse.data import read

            own = read(str(rows))
            fitted = infuse.Classifier(str(base), "ia3", epochs=1, precision="fp32", seed=seed)
            fitted.fit(own.texts, own.labels).save(root / "out")

        return run

    train = ("train", *quick, "--out", "@out", "--method")
    ready = [place / name for name in ("one", "two")]
    compare = ("compare", *common, "--epochs", "1", "--seeds", "1", "--out", "@out", "--methods")
    recommend = ("recommend", "--base", base, "--labels", "3", "--time", "60s", "--out", "@out", "--methods")
    return {
        "train": Case(command(*train, "ia3", "--epochs", "2"), None, adapter),
        "train full": Case(command(*train, "full"), None, adapter),
        "train --overwrite": Case(command(*train, "ia3", "--overwrite"), command(*train, "lora"), adapter),
        "fuse": Case(command("fuse", *ready, *quick, "--out", "@out"), None, adapter),
        "average": Case(
            command("average", *ready, "--out", "@out"), command("average", *ready, ready[0], "--out", "@out"), adapter
        ),
        "calibrate": Case(command("calibrate", "@out", "--data", place / "more.csv"), command(*train, "ia3"), adapter),
        "merge": Case(command("merge", place / "lora", "@out"), None, adapter),
        "compare": Case(command(*compare, "head", "ia3")),
        "compare --overwrite": Case(command(*compare, "ia3", "--overwrite"), command(*compare, "head"), report),
        "tune": Case(
            command("tune", "--bases", base, "--data", rows, "--precision", "fp32", "--space", "epochs: 2", "--methods",
                    "ia3", "--trials", "2", "--grace", "2", "--out", "@out"), None, None,
        ),
        "recommend": Case(command(*recommend, "ia3", "lora"), command(*recommend, "lora"), report),
        "save": Case(saved("lora"), saved("a"), loaded),
        "save a fusion": Case(saved("mix"), saved("lora"), loaded),
        "save for AdapterHub": Case(saved("b", "adapterhub"), saved("a", "adapterhub"), loaded),
        "Classifier.save": Case(classifier(0), classifier(1), adapter),
    }  # fmt: skip


def digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:12]


def result(root: Path) -> dict[str, str]:
    """Every path below a folder, and what of its content is the same each time."""
    return {str(path.relative_to(root)): content(path) for path in sorted(root.rglob("*"))}


def content(path: Path) -> str:
    if path.is_dir():
        return "folder"
    if path.suffix == ".safetensors":
        return digest(SLOT.sub(b"", path.read_bytes()).hex())
    text = SLOT.sub(b"", path.read_bytes()).decode(errors="replace")
    if path.name in TOLD:
        return text
    if path.suffix == ".json" and path.name != "report.json":
        found = json.loads(text)
        return digest({k: v for k, v in found.items() if k not in TIMES} if isinstance(found, dict) else found)
    return "there" if path.stat().st_size else "empty"


class Stage:
    """Runs commands in forks of this process, which has imported everything and shares one small base.

    Args:
        place: a folder for the base, the rows and the cases.
        jobs: how many cases run at a time, at most ten.
        shim: the compiled ``faults.c``, which is preloaded.
    """

    def __init__(self, place: Path, jobs: int, shim: Path):
        self.place, self.shim = place, ctypes.CDLL(str(shim))
        self.shim.fault_arm.argtypes = (ctypes.c_char_p, ctypes.c_int, ctypes.c_long, ctypes.c_int)
        self.shim.fault_count.restype = ctypes.c_long
        self.cases = cases(place)
        self.made: dict[str, Path] = {}
        self.slots: SimpleQueue[str] = SimpleQueue()
        for slot in range(jobs):
            self.slots.put(str(slot))

    def forked(self, root: Path, job: Callable[[], Any], log: str = "log") -> int:
        """Do a job in a fork; its exit code, or minus the signal that ended it. What it prints goes into a file."""
        (root.parent / "logs").mkdir(exist_ok=True)
        child = os.fork()
        if child:
            return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        code = 70
        try:
            signal.alarm(LONGEST)
            out = os.open(root.parent / "logs" / log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            os.dup2(out, 1)
            os.dup2(out, 2)
            tempfile.tempdir = str(root / "tmp")
            code = self._ended(job)
            sys.stdout.flush()
        finally:
            os._exit(code)

    @staticmethod
    def _ended(job: Callable[[], Any]) -> int:
        from infuse.errors import InfuseError

        try:
            job()
        except SystemExit as ended:
            return int(ended.code or 0)
        except InfuseError as error:  # what infuse.cli does for its commands
            print(f"infuse: {error}")
            return 2
        except BaseException:
            traceback.print_exc(file=sys.stdout)
            return 70
        return 0

    def fresh(self, name: str, root: Path) -> None:
        """A case's folder as it is before the command."""
        shutil.rmtree(root.parent, ignore_errors=True)
        (root / "tmp").mkdir(parents=True)
        if (before := self.cases[name].before) is None:
            return
        if name not in self.made:
            self.made[name] = self.place / f"before {name}"
            code = self.forked(root, lambda: before(root))
            assert code == 0, (name, self.told(root))
            shutil.copytree(root / "out", self.made[name])
        else:
            shutil.copytree(self.made[name], root / "out")

    def told(self, root: Path, log: str = "log") -> str:
        return (root.parent / "logs" / log).read_text()

    def seen(self, name: str, root: Path) -> str:
        """What a reader sees: a digest, "refused" in a sentence, or what went wrong."""
        see = self.cases[name].seen
        if see is None:
            return "nothing to read"
        answer = root.parent / "seen"

        def look() -> None:
            from infuse.errors import InfuseError

            try:
                answer.write_text(digest(see(root)))
            except (InfuseError, FileNotFoundError):
                answer.write_text("refused")

        code = self.forked(root, look, "reader")
        return answer.read_text() if code == 0 else f"the reader failed: {self.told(root, 'reader')}"

    def armed(self, name: str, root: Path, kind: int, nth: int, log: int = -1) -> Callable[[], None]:
        def job() -> None:
            self.shim.fault_arm(str(root).encode(), kind, nth, log)
            self.cases[name].run(root)

        return job

    def reference(self, name: str) -> "Reference":
        """An undisturbed run, and how many points each fault has."""
        root = self.place / "slots" / "0" / "root"
        self.fresh(name, root)
        old = self.seen(name, root)
        steps = self.place / f"steps {name}"
        log = os.open(steps, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        code = self.forked(root, self.armed(name, root, 0, 0, log))
        os.close(log)
        assert code == 0, (name, self.told(root))
        lines = steps.read_text().splitlines()
        counts = {fault: sum(line[0] in those for line in lines) for fault, those in STEPS.items()}
        unseen = {Path(p).name for p in result(root) if (root / p).is_file()} - {Path(line).name for line in lines}
        unseen -= {path.name for path in self.made[name].rglob("*")} if name in self.made else set()
        assert not unseen, f"{name} wrote {unseen} unseen"
        return Reference(result(root), old, self.seen(name, root), counts, lines)

    def point(self, name: str, reference: "Reference", fault: str, nth: int) -> str | None:
        """Why a point isn't green, or None."""
        slot = self.slots.get()
        try:
            return self._point(self.place / "slots" / slot / "root", name, fault, nth, reference)
        finally:
            self.slots.put(slot)

    def _point(self, root: Path, name: str, fault: str, nth: int, reference: "Reference") -> str | None:
        self.fresh(name, root)
        code = self.forked(root, self.armed(name, root, FAULTS[fault], nth))
        told = self.told(root)
        if fault in ("kill", "torn"):
            if code not in (-signal.SIGKILL, 0):  # 0: not every run has as many operations
                return f"ended with {code}: {told[-600:]}"
        elif code not in (0, 2) or "Traceback" in told:
            return f"ended with {code}: {told[-600:]}"
        elif code == 2 and not told.strip().splitlines()[-1].startswith("infuse: "):
            return f"no sentence: {told[-600:]}"
        seen = self.seen(name, root)
        whole = code == 0
        if seen not in ({reference.new} if whole else {reference.old, reference.new}):
            return f"a reader sees {seen}, neither the old nor the new"
        if not whole:
            code = self.forked(root, lambda: self.cases[name].run(root), "again")
            if code:
                return f"the same again ended with {code}: {self.told(root, 'again')[-600:]}; before: {told[-300:]}"
        found, wanted = result(root), reference.files
        for path in sorted({*found, *wanted}):
            if found.get(path) != wanted.get(path):
                return f"{path}: {found.get(path)}, not {wanted.get(path)}"
        return None


@dataclass(frozen=True)
class Reference:
    """What a case is without faults: its files, what readers see before and after, points per fault, operations."""

    files: dict[str, str]
    old: str
    new: str
    counts: dict[str, int]
    steps: list[str]


def chosen(count: int, every: int, most: int, offset: int) -> Iterator[int]:
    """Points from 1 to ``count``, ``every`` so many and no more than about ``most``; the last one is among them."""
    every = max(every, count // most)
    yield from sorted({*range(1 + offset % every, count + 1, every), *([count] if count else [])})


def warm() -> None:
    """Import what commands import, once; pages get blank pictures, and what only measures costs gives none."""
    import torch
    from matplotlib.figure import Figure

    import infuse.calibrating.calibrate
    import infuse.classifier
    import infuse.comparing.compare
    import infuse.export
    import infuse.recommending.recommend
    import infuse.report.figures as figures
    import infuse.training.fusing
    import infuse.tuning.report
    import infuse.tuning.study  # noqa: F401
    from infuse.comparing import costs

    torch.set_num_threads(1)
    figures._draw = lambda figure: Figure(figsize=(1, 1))
    costs.peak_memory = lambda *_: 0  # in a process of its own, which writes nothing
    costs.capabilities = lambda *_: {"merge": None, "mix": None, "fuse": False, "latency": {}}


def prepared(place: Path, stage: Stage) -> None:
    """The base, the rows, and runs to fuse, average and merge."""
    root = place / "slots" / "0" / "root"
    (root / "tmp").mkdir(parents=True)

    def make() -> None:
        sys.path.insert(0, str(HERE.parent / "tests"))
        from conftest import LABELS, make_tiny_base, write_rows

        from infuse.cli import main

        make_tiny_base(place / "base")
        write_rows(place / "rows.csv", LABELS[:3], 8)
        write_rows(place / "more.csv", LABELS[:3], 20)
        for name, method in (("one", "pfeiffer"), ("two", "pfeiffer"), ("lora", "lora")):
            words = ["--base", place / "base", "--data", place / "rows.csv", "--method", method, "--epochs", "1"]
            words += ["--precision", "fp32", "--no-baseline", "--seed", len(name) if name != "two" else 9]
            main(["train", *map(str, words), "--out", str(place / name)])

    assert stage.forked(root, make) == 0, stage.told(root)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--commands", nargs="+", default=[], help="all by default")
    parser.add_argument("--faults", nargs="+", default=list(FAULTS), choices=FAULTS)
    parser.add_argument("--every", type=int, default=1, help="only every so manieth point")
    parser.add_argument("--most", type=int, default=10**6, help="about so many points per command and fault")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--steps", action="store_true", help="print the operations")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        place = Path(folder)
        if "INFUSE_FAULTS" not in os.environ:
            shim = place / "faults.so"
            subprocess.run(["gcc", "-O1", "-shared", "-fPIC", "-o", shim, HERE / "faults.c", "-ldl"], check=True)
            quiet = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
            preload = {"LD_PRELOAD": str(shim), "INFUSE_FAULTS": str(shim), "PYTHONWARNINGS": "ignore"}
            return subprocess.run([sys.executable, *sys.argv], env=os.environ | quiet | preload).returncode
        shim = Path(os.environ["INFUSE_FAULTS"])
        del os.environ["LD_PRELOAD"]  # not for processes of processes
        warm()
        stage = Stage(place, given.jobs, shim)
        prepared(place, stage)
        return measured(stage, given)


def measured(stage: Stage, given: argparse.Namespace) -> int:
    """Try the points, print the table, and give the exit code."""
    red, rows = 0, []
    for i, name in enumerate(given.commands or stage.cases):
        reference = stage.reference(name)
        if given.steps:
            print("\n".join(reference.steps))
        for j, fault in enumerate(given.faults):
            points = list(chosen(reference.counts[fault], given.every, given.most, i + j))
            with ThreadPoolExecutor(given.jobs) as pool:
                found = list(pool.map(partial(stage.point, name, reference, fault), points))
            for nth, why in zip(points, found, strict=True):
                if why is not None:
                    red += 1
                    steps = [step for step in reference.steps if step[0] in STEPS[fault]]
                    print(f"RED {name}, {fault} at {nth} ({steps[nth - 1]}): {why}", flush=True)
            rows.append((name, fault, len(points), sum(why is None for why in found)))
            print(f"{name}, {fault}: {rows[-1][3]} of {rows[-1][2]} green", flush=True)
    print("\n| command | fault | points | green |\n|---|---|---|---|")
    for row in rows:
        print("| " + " | ".join(map(str, row)) + " |")
    print(f"{sum(row[2] for row in rows)} points, {red} not green")
    return 1 if red else 0


if __name__ == "__main__":
    sys.exit(main())

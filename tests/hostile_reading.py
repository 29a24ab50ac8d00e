"""Reads the files of :mod:`hostile_files` in a process of its own; the test looks at what came of each.

Run as a script with a folder and a number n: every n-th of the large families is read, and all of the small ones.
"""

import json
import os
import resource
import shutil
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from hostile_files import FAMILIES, LARGE, good

import infuse
from infuse.checkpoint import header
from infuse.errors import printable
from infuse.serving import files
from infuse.testing import inputs, tiny
from infuse.testing.conformance import output
from infuse.training.predictor import open_run


def used() -> tuple[float, float]:
    """Seconds of a processor, and MiB at the peak, of this process up to now."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024


def read(folder: Path, base: torch.nn.Module, batch: dict[str, Any], run: bool) -> dict[str, Any]:
    """What each way of reading made of a folder: ``read``, or the sentence that refuses it; and what the worst took."""

    def load() -> None:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                infuse.load(base, folder, name="x")
            output(base, batch)
        finally:
            if hasattr(base, "infuse"):
                infuse.detach(base)

    def served() -> None:
        files.facts(files.read(folder), None)
        files.stamp(folder)

    ways = [
        load,
        lambda: header(folder),
        served,
        *([lambda: open_run(folder, base=str(folder / "no base"))] if run else []),
    ]
    case: dict[str, Any] = {"told": [], "seconds": 0.0, "MiB": 0.0}
    for way in ways:
        seconds, size = used()
        try:
            way()
            case["told"].append("read")
        except infuse.InfuseError as error:
            case["told"].append(str(error))
        except Exception as error:
            case["raised"] = printable(f"{type(error).__name__}: {error}")[:400]
        after = used()
        case |= {"seconds": max(case["seconds"], after[0] - seconds), "MiB": max(case["MiB"], after[1] - size)}
    return case


def main(root: Path, share: int) -> None:
    os.environ["CANARY"] = str(root / "canary")
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    forms = good(root / "good")
    base, results = tiny("bert"), []
    batch, state = inputs(base), {n: p.clone() for n, p in base.state_dict().items()}
    for family in FAMILIES:
        for number, (form, title, change) in enumerate(family(forms)):
            if family in LARGE and number % share:
                continue
            folder = root / "case"
            shutil.copytree(forms[form], folder)
            change(folder)
            case = {"family": family.__name__, "form": form, "title": title}
            (root / "last.json").write_text(
                json.dumps(case)
            )  # so that whoever ends a hanging process knows where it was
            case |= read(folder, base, batch, run=not number % 5)
            results.append(case)
            shutil.rmtree(folder)
            (root / "last.json").write_text(
                json.dumps(case)
            )  # so that whoever ends a hanging process knows where it was
    same = all(torch.equal(value, state[name]) for name, value in base.state_dict().items())
    facts = {"cases": results, "base unchanged": same, "canary": (root / "canary").exists()}
    (root / "results.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))

"""What a study costs and gains: its wall time over that of as many separate `infuse train` runs of the same settings,
and its best settings against the defaults over fresh seeds.

    python bench/tune_or_train.py --data train.csv --validation validation.csv --trials 30 --seeds 1 2 3
"""

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml

from infuse.training.config import TrainConfig
from infuse.training.settings import Settings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="sample")
    parser.add_argument("--validation")
    parser.add_argument("--base", default="minilm")
    parser.add_argument("--method", default="ia3")
    parser.add_argument("--trials", type=int, default=30)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seeds", type=int, nargs="*", default=[1, 2, 3])
    parser.add_argument("--skip-runs", action="store_true", help="do not time the separate runs")
    parser.add_argument("--keep", type=Path, help="a folder for the study and the runs; by default a temporary one")
    options = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": str(options.threads)}
    with tempfile.TemporaryDirectory() as temporary:
        measure(options, options.keep or Path(temporary))


def measure(options: argparse.Namespace, folder: Path) -> None:
    rows = ["--data", options.data, *(["--validation", options.validation] if options.validation else [])]
    study = ["--methods", options.method, "--bases", options.base, "--trials", str(options.trials)]
    whole = infuse("tune", *rows, *study, "--out", folder / "study")
    print(
        f"study of {options.trials} trials, its best run trained again and the plots included: {whole:.1f} s",
        flush=True,
    )

    if not options.skip_runs:
        separate = []
        with (folder / "study" / "trials.csv").open() as file:
            trials = list(csv.DictReader(file))
        for trial in trials:
            if not trial["reason"]:
                settings = folder / f"trial-{trial['trial']}.yaml"
                settings.write_text(yaml.safe_dump(as_run(trial, options)))
                separate.append(infuse("train", "--config", settings, "--out", folder / f"run-{trial['trial']}"))
        print(f"{len(separate)} separate runs of the same settings, without baseline: {sum(separate):.1f} s")
        print(f"ratio {whole / sum(separate):.3f}", flush=True)

    best = ["--config", folder / "study" / "best.yaml"]
    plain = [*rows, "--base", options.base, "--method", options.method]
    scores: dict[str, list[float]] = {}
    for name, given in (("defaults", plain), ("tuned", best)):
        for seed in options.seeds:
            out = folder / f"{name}-{seed}"
            infuse("train", *given, "--seed", str(seed), "--no-baseline", "--out", out)
            metrics = json.loads((out / "metrics.json").read_text())
            scores.setdefault(name, []).append(100 * metrics["validation"]["macro_f1"])
        if options.seeds:
            each = ", ".join(f"{score:.2f}" for score in scores[name])
            print(f"{name}: validation macro-F1 {statistics.mean(scores[name]):.2f} (seeds {each})", flush=True)


def as_run(trial: dict[str, str], options: argparse.Namespace) -> dict[str, Any]:
    """The configuration of a run from a row of ``trials.csv``."""
    settings = {f.name: yaml.safe_load(trial[f.name]) for f in fields(Settings)}
    settings |= {"method": trial["method"], "layers": trial["layers"], "base": trial["base"], "baseline": False}
    for name in ("learning_rate", "head_learning_rate"):
        settings[name] = float(trial[name])
    TrainConfig(**settings).check()
    return settings | {"data": options.data, "validation": options.validation}


def infuse(*arguments: object) -> float:
    """Run a command of infuse in a process of its own; the seconds that it took."""
    started = time.perf_counter()
    program = [sys.executable, "-m", "infuse"]
    done = subprocess.run([*program, *map(str, arguments)], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    return time.perf_counter() - started


if __name__ == "__main__":
    main()

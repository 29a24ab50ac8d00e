"""Accuracy of the fast path (bfloat16 trunk, lean backward) beside the plain one (float32, ordinary autograd).

    python bench/fast_path.py --data train.csv --validation validation.csv [--methods ia3 lora] [--json OUT]
    python bench/fast_path.py --data train.csv --validation validation.csv --methods fusion --members RUN RUN

Both train with the default settings, on the same batches, from the same seeds; the best epoch on the validation rows
counts. A difference between two runs of one seed is mostly the rounding of their courses, so look at the means.
"""

import argparse
import statistics
from contextlib import nullcontext
from pathlib import Path

import torch
from accuracy import measure
from timing import machine, table, write

from infuse.data import read
from infuse.lean import plain
from infuse.training.settings import Settings

PATHS = {"fast": ("bf16", nullcontext), "plain": ("fp32", plain)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--validation", required=True)
    parser.add_argument("--base", default="minilm")
    parser.add_argument("--methods", nargs="+", default=["ia3", "lora"])
    parser.add_argument(
        "--members", nargs="*", type=Path, default=[], help="run folders to fuse, for the method fusion"
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=Settings.epochs)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    train, validation = read(options.data), read(options.validation)
    rows, runs = {}, {}
    for method in options.methods:
        for name, (precision, context) in PATHS.items():
            own = runs[f"{method}, {name}"] = []
            for seed in range(options.seeds):
                settings = Settings(method=method, seed=seed, precision=precision, epochs=options.epochs)
                with context():
                    own.append(measure(options.base, train, validation, settings, options.members))
                print(f"{method}, {name}, seed {seed}: {own[-1]['accuracy']:.2f}", flush=True)
        accuracies = {name: [run["accuracy"] for run in runs[f"{method}, {name}"]] for name in PATHS}
        seconds = {name: statistics.mean(run["seconds"] for run in runs[f"{method}, {name}"]) for name in PATHS}
        rows[method] = {
            **{name: statistics.mean(values) for name, values in accuracies.items()},
            "difference": statistics.mean(accuracies["fast"]) - statistics.mean(accuracies["plain"]),
            **{f"{name} s": value for name, value in seconds.items()},
        }
    table(f"validation accuracy %, {options.seeds} seeds ({machine()['processor']}, {options.threads} threads)", rows)
    write(
        options.json,
        {"options": vars(options) | {"members": list(map(str, options.members))}, "rows": rows, "runs": runs},
    )


if __name__ == "__main__":
    main()

"""Accuracy of the methods at their defaults on a labelled data set, beside logistic regression on the frozen base.

    python bench/accuracy.py --data train.csv --validation validation.csv

Everything is as `infuse train` does it; the best epoch is chosen on the rows that are reported, as validation rows are.
"""

import argparse
import statistics
import time
from typing import Any

import torch
from timing import machine, table, write

from infuse.bases import load_base
from infuse.data import Rows, read
from infuse.method import make
from infuse.model import detach, summary
from infuse.training import Settings, fit
from infuse.training.baseline import logistic_regression


def measure(base: str, train: Rows, validation: Rows, settings: Settings) -> dict[str, float]:
    """Accuracy and macro-F1 of the best epoch in percent, seconds, and trained parameters in percent of the base."""
    count = len(train.label_set) if settings.head == "hf" else None
    precision = "fp32" if make(settings.method).unfreezes else settings.precision
    loaded = load_base(base, labels=count, precision=precision, seed=settings.seed)
    start = time.perf_counter()
    fitted = fit(loaded, train, validation, settings)
    seconds = time.perf_counter() - start
    counts = summary(loaded.model)
    best = max((h for h in fitted.history if "eval_macro_f1" in h), key=lambda h: h["eval_macro_f1"])
    trained = counts.base if fitted.adapter.method.unfreezes else counts.total("default")
    detach(loaded.model)
    return {
        "accuracy": 100 * best["eval_accuracy"],
        "macro_f1": 100 * best["eval_macro_f1"],
        "best_epoch": best["epoch"],
        "seconds": seconds,
        "percent_trained": 100 * trained / counts.base,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--validation", required=True)
    parser.add_argument("--base", default="minilm")
    parser.add_argument("--methods", nargs="+", default=["ia3", "lora"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--set", nargs="*", default=[], metavar="NAME=VALUE", help="training settings off their default"
    )
    parser.add_argument("--json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    train, validation = read(options.data), read(options.validation)
    changed = {name: _value(name, value) for name, _, value in (item.partition("=") for item in options.set)}
    baseline = logistic_regression(load_base(options.base), train, {"validation": validation})["validation"]
    rows: dict[str, dict[str, Any]] = {
        "logistic regression": {"accuracy": 100 * baseline["accuracy"], "macro_f1": 100 * baseline["macro_f1"]}
    }
    runs: dict[str, list[dict[str, float]]] = {}
    for method in options.methods:
        settings = [Settings(method=method, seed=seed, **changed) for seed in range(options.seeds)]
        runs[method] = [measure(options.base, train, validation, each) for each in settings]
        rows[method] = {key: _mean([run[key] for run in runs[method]]) for key in runs[method][0]}
        rows[method]["gain"] = (
            f"{statistics.mean(r['accuracy'] for r in runs[method]) - 100 * baseline['accuracy']:+.2f}"
        )
        print(method, [round(run["accuracy"], 2) for run in runs[method]], flush=True)
    title = (
        f"{options.base}, {len(train):,} rows to train on, {len(validation):,} to validate on, {options.seeds} seeds"
    )
    table(f"{title} ({machine()['processor']}, {options.threads} threads)", rows)
    write(options.json, {"options": vars(options), "rows": rows, "runs": runs})


def _mean(values: list[float]) -> str:
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{spread}"


def _value(name: str, text: str) -> Any:
    default = getattr(Settings, name)
    kind = float if default is None else type(default)
    return text == "true" if kind is bool else kind(text)


if __name__ == "__main__":
    main()

"""Accuracy of the methods at their defaults on a labelled data set, beside logistic regression on the frozen base.

    python bench/accuracy.py --data train.csv --validation validation.csv              # several seeds
    python bench/accuracy.py --data train.csv --validation validation.csv --folds 5    # all rows, each held out once
    python bench/accuracy.py --data train.csv --validation validation.csv --pairs 3000 # several labels a text

Everything is as `infuse train` does it; the best epoch is chosen on the rows that are reported, as validation rows are.
``gain`` is the accuracy above logistic regression on the same rows, with its standard deviation over the runs.
"""

import argparse
import random
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from sklearn.model_selection import StratifiedKFold
from timing import machine, table, write

from infuse.bases import load_base
from infuse.data import Rows, read
from infuse.method import make
from infuse.model import detach, summary
from infuse.training.baseline import logistic_regression
from infuse.training.fit import fit
from infuse.training.members import load_members
from infuse.training.settings import Settings


def measure(
    base: str, train: Rows, validation: Rows, settings: Settings, members: Sequence[Path] = ()
) -> dict[str, float]:
    """Accuracy and macro-F1 of the best epoch in percent, seconds, and trained parameters in percent of the base.

    Args:
        members: of a fusion, run folders.
    """
    count = len(train.label_set) if settings.head == "hf" else None
    precision = "fp32" if make(settings.method).unfreezes else settings.precision
    loaded = load_base(base, labels=count, precision=precision, seed=settings.seed)
    names = load_members(loaded.model, members)
    start = time.perf_counter()
    fitted = fit(loaded, train, validation, settings, members=names)
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


def splits(options: argparse.Namespace) -> list[tuple[Rows, Rows]]:
    """What each run trains on and is measured on: the same rows for every seed, or all rows, a fold a run."""
    train, validation = read(options.data), read(options.validation)
    if options.pairs:
        train, validation = joined(train, options.pairs), joined(validation, len(validation))
    if not options.folds:
        return [(train, validation)] * options.seeds
    rows = Rows(train.texts + validation.texts, (*train.labels, *validation.labels))  # type: ignore[misc]  # labelled
    folds = StratifiedKFold(options.folds, shuffle=True, random_state=0).split(rows.texts, rows.labels)
    return [(rows.take(rest.tolist()), rows.take(held_out.tolist())) for rest, held_out in folds]


def joined(rows: Rows, count: int) -> Rows:
    """Texts joined in pairs, drawn at random, that carry the labels of both."""
    draw = random.Random(0)
    pairs = [(draw.randrange(len(rows)), draw.randrange(len(rows))) for _ in range(count)]
    texts, labels = rows.texts, rows.labels
    return Rows(
        tuple(f"{texts[i]} {texts[j]}" for i, j in pairs),
        tuple(tuple(sorted({str(labels[i]), str(labels[j])})) for i, j in pairs),  # type: ignore[index]  # labelled
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--validation", required=True)
    parser.add_argument("--base", default="minilm")
    parser.add_argument("--methods", nargs="+", default=["ia3", "lora"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--folds", type=int, default=0, help="cross-validation over both files' rows, a seed a fold")
    parser.add_argument("--pairs", type=int, default=0, help="rows to train on, two texts joined with both labels")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--set", nargs="*", default=[], metavar="NAME=VALUE", help="training settings off their default"
    )
    parser.add_argument("--json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    changed = {name: _value(name, value) for name, _, value in (item.partition("=") for item in options.set)}
    pairs, base = splits(options), load_base(options.base)
    baseline = [
        {key: 100 * value for key, value in logistic_regression(base, train, {"held out": rows})["held out"].items()}
        for train, rows in (pairs if options.folds else pairs[:1])
    ]
    table_rows: dict[str, dict[str, Any]] = {"logistic regression": _over(baseline)}
    baseline = baseline if options.folds else baseline * len(pairs)
    runs: dict[str, list[dict[str, float]]] = {}
    for method in options.methods:
        runs[method] = []
        for seed, (train, rows) in enumerate(pairs):
            run = measure(options.base, train, rows, Settings(method=method, seed=seed, **changed))
            runs[method].append(run | {"gain": run["accuracy"] - baseline[seed]["accuracy"]})
            print(method, seed, {key: round(value, 2) for key, value in runs[method][-1].items()}, flush=True)
        table_rows[method] = _over(runs[method])
    how = f"{options.folds} folds" if options.folds else f"{options.seeds} seeds"
    title = f"{options.base}, {len(pairs[0][0]):,} rows to train on, {len(pairs[0][1]):,} held out, {how}"
    table(f"{title} ({machine()['processor']}, {options.threads} threads)", table_rows)
    write(options.json, {"options": vars(options), "rows": table_rows, "runs": runs, "baseline": baseline})


def _over(runs: list[dict[str, float]]) -> dict[str, str]:
    return {key: _mean([run[key] for run in runs]) for key in runs[0]}


def _mean(values: list[float]) -> str:
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{spread}"


def _value(name: str, text: str) -> Any:
    default = getattr(Settings, name)
    kind = float if default is None else type(default)
    return text == "true" if kind is bool else kind(text)


if __name__ == "__main__":
    main()

"""Adapting the last layers only, the frozen ones run once: seconds per epoch and accuracy.

    python bench/depth.py --data train.csv --validation validation.csv [--layers all last:2]

``first`` is everything before the first step (tokens, the head's start, the frozen layers); ``epoch`` is the mean over
the epochs, evaluation left out; ``ratio`` is an epoch's time over that of the first entry of ``--layers``.
"""

import argparse
import statistics
import time
from typing import Any

import torch
from timing import machine, table, write
from transformers import TrainerCallback

from infuse.bases import load_base
from infuse.data import Rows, read
from infuse.training.fit import fit
from infuse.training.settings import Settings


class Clock(TrainerCallback):
    """Seconds of every epoch, and the moment at which the first began."""

    def __init__(self) -> None:
        self.epochs: list[float] = []
        self.began = 0.0
        self.start = 0.0

    def on_epoch_begin(self, *args: Any, **kwargs: Any) -> None:
        self.start = time.perf_counter()
        self.began = self.began or self.start

    def on_epoch_end(self, *args: Any, **kwargs: Any) -> None:
        self.epochs.append(time.perf_counter() - self.start)


def measure(base: str, train: Rows, validation: Rows, settings: Settings) -> dict[str, float]:
    loaded = load_base(base, precision=settings.precision)
    clock, start = Clock(), time.perf_counter()
    fitted = fit(loaded, train, validation, settings, callbacks=[clock])
    best = max((h for h in fitted.history if "eval_macro_f1" in h), key=lambda h: h["eval_macro_f1"])
    return {
        "accuracy": 100 * best["eval_accuracy"],
        "first s": clock.began - start,
        "epoch s": statistics.mean(clock.epochs),
        "all s": time.perf_counter() - start,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--validation", required=True)
    parser.add_argument("--base", default="minilm")
    parser.add_argument("--methods", nargs="+", default=["ia3"])
    parser.add_argument("--layers", nargs="+", default=["all", "last:3", "last:2", "last:1"])
    parser.add_argument("--epochs", type=int, default=Settings.epochs)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    train, validation = read(options.data), read(options.validation)
    rows: dict[str, dict[str, float]] = {}
    for method in options.methods:
        for layers in options.layers:
            settings = Settings(method=method, layers=layers, epochs=options.epochs)
            own = rows[f"{method}, {layers}"] = measure(options.base, train, validation, settings)
            own["ratio"] = own["epoch s"] / rows[f"{method}, {options.layers[0]}"]["epoch s"]
            print(method, layers, own, flush=True)
    table(f"{options.epochs} epochs ({machine()['processor']}, {options.threads} threads)", rows)
    write(options.json, {"options": vars(options), "rows": rows})


if __name__ == "__main__":
    main()

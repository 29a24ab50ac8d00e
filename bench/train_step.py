"""Seconds per training step: Infuse, PEFT, AdapterHub's ``adapters`` and transformers, on the same rows.

    python bench/train_step.py --data train.csv [--methods ia3 lora] [--contenders ours peft] [--json OUT]
    python bench/train_step.py --random-llama --batch 8 --length 512    # a billion random parameters, for a GPU

Every contender is a process of its own (``adapters`` in a virtual environment that is made for it); they take turns,
a few steps each, and only one runs at a time. ``ours`` is what `infuse train` does, its Trainer included. ``Trainer``
is the other library as its users run it: float32, random batches padded to their longest row; ``tuned`` is it in a
plain loop over our length buckets under bfloat16 autocast. ``floor`` is the matrix products alone (bench/floor.py).

The main figure is ``faster``: mean seconds per step of the other over ours, all steps of all rounds. ``ratio`` is the
median over the rounds of the same quotient, with its quartiles. Batches differ in length: ``tokens`` and ``padded`` say
what a step held on average, without and with padding, and ``us/token`` is time per real token.
"""

import statistics
from contextlib import ExitStack
from typing import Any

from timing import machine, ratios, table, write
from workers import Worker, applicable, parser, prepared

NAMES = [
    *("ours", "peft, Trainer", "peft, tuned", "adapters, Trainer", "adapters, tuned"),
    *("transformers, Trainer", "transformers, tuned", "floor"),
]
LLAMA_NAMES = ["ours, plain loop", "peft, loop", "peft, tuned", "floor"]


def race(specs: dict[str, dict[str, Any]], rounds: int, steps: int, warmup: int) -> dict[str, list[dict[str, Any]]]:
    """The answers of each contender, round by round; who begins changes from round to round."""
    answers: dict[str, list[dict[str, Any]]] = {name: [] for name in specs}
    with ExitStack() as stack:
        workers = {}
        for name, spec in specs.items():  # one after the other, lest they slow each other down
            workers[name] = stack.enter_context(Worker(spec))
            workers[name].hear()
            workers[name].tell(warmup)
        names = list(workers)
        for turn in range(rounds):
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                answers[name].append(workers[name].tell(steps))
    return answers


def figures(answers: dict[str, list[dict[str, Any]]], reference: str) -> dict[str, dict[str, Any]]:
    """Milliseconds per step, and how many times as long as the reference each takes."""
    means = {name: [statistics.mean(a["seconds"]) for a in own] for name, own in answers.items()}
    by_round, rows = ratios(means, reference), {}
    for name, own in answers.items():
        seconds = [s for answer in own for s in answer["seconds"]]
        rows[name] = {
            "mean ms": 1e3 * statistics.mean(seconds),
            "median ms": 1e3 * statistics.median(seconds),
            "faster": statistics.mean(means[name]) / statistics.mean(means[reference]),
            **{key: by_round[name][key] for key in ("ratio", "low", "high")},
        }
        if tokens := [t for answer in own for t in answer["tokens"]]:
            real, padded = (sum(column) / len(seconds) for column in zip(*tokens, strict=True))
            per_token = 1e6 * statistics.mean(seconds) / real
            rows[name] |= {"tokens": round(real), "padded": round(padded), "us/token": per_token}
    return rows


def main() -> None:
    arguments = parser(__doc__.splitlines()[0])
    arguments.add_argument("--rounds", type=int, default=12)
    arguments.add_argument("--steps", type=int, default=5, help="steps of each contender in a round")
    arguments.add_argument("--warmup", type=int, default=30, help="steps before, in which kernels meet their shapes")
    options = arguments.parse_args()
    total = options.warmup + options.rounds * options.steps + 2
    results = {}
    with prepared(options, LLAMA_NAMES if options.random_llama else NAMES) as specs:
        for method in options.methods:
            own = {n: {**s, "method": method, "watch": "time", "steps": total} for n, s in specs.items()}
            own = {n: s for n, s in own.items() if applicable(s, method)}
            if options.random_llama and method not in ("ia3", "lora"):
                continue
            answers = race(own, options.rounds, options.steps, options.warmup)
            rows = figures(answers, next(iter(own)))
            seconds = {name: [a["seconds"] for a in each] for name, each in answers.items()}
            results[method] = {"rows": rows, "seconds": seconds}
            here = machine()
            what = f"{options.batch} rows a step, {options.rounds} rounds of {options.steps} steps"
            table(f"{method}: {what} ({here['gpu'] or here['processor']}, {options.threads} threads)", rows)
            write(options.json, {"options": vars(options), "methods": results})


if __name__ == "__main__":
    main()

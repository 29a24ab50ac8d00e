"""Memory of a training step: bytes saved for backward per token, the adapter's and the optimizer's bytes, the peak.

    python bench/memory.py --data train.csv [--methods ia3 lora] [--contenders ours peft] [--json OUT]
    python bench/memory.py --random-llama --batch 8 --length 512    # a billion random parameters, for a GPU

Every figure comes from a process of its own. All contenders see the same batches, which are bucketed by length.

- ``saved/token``: bytes of the unique storages that autograd saves between forward and backward, per real token;
  ``saved/padded`` counts padding as tokens. Parameters, buffers and whatever stays from one step to the next are left
  out; tensors that an autograd function written in Python keeps as attributes are counted.
- ``adapter``, ``optimizer``: bytes of the trained parameters and of the optimizer's state.
- ``peak MiB``: how far the process grows over the steps, from the state in which the bare base was loaded; on a GPU
  also the peak of allocated memory there, less the base.

``ours`` is what `infuse train` does; ``ours, plain loop`` is `infuse.attach` on a float32 transformers model in a
plain loop, as ``loop`` is for the other libraries; ``tuned`` adds bfloat16 autocast.
"""

import statistics
from typing import Any

from timing import machine, table, write
from workers import Worker, applicable, parser, prepared

NAMES = [
    *("ours", "ours, plain loop", "peft, loop", "peft, tuned", "adapters, loop", "adapters, tuned"),
    *("transformers, loop", "transformers, tuned"),
]
LLAMA_NAMES = ["ours, plain loop", "peft, loop", "peft, tuned"]
MIB = 2**20


def measure(spec: dict[str, Any], steps: int, repeats: int) -> dict[str, Any]:
    """One contender: what it saves, in one process, and the median of its peaks, in ``repeats`` others."""
    with Worker({**spec, "watch": "saved", "measured": steps, "steps": steps + 3}) as worker:
        saved = worker.hear()
    peaks = []
    for _ in range(repeats):
        with Worker({**spec, "watch": "peak", "measured": steps, "steps": steps + 2}) as worker:
            peaks.append(worker.hear())
    real, padded = (sum(column) for column in zip(*saved["tokens"], strict=True))
    row = {
        "saved/token": round(sum(saved["saved"]) / real),
        "saved/padded": round(sum(saved["saved"]) / padded),
        "adapter": saved["adapter"],
        "optimizer": saved["optimizer"],
        "peak MiB": statistics.median(p["rss"] for p in peaks) / MIB,
    }
    if "cuda" in peaks[0]:
        row["GPU peak MiB"] = statistics.median(p["cuda"] for p in peaks) / MIB
    return row | {"runs": {"saved": saved, "peaks": peaks}}


def main() -> None:
    arguments = parser(__doc__.splitlines()[0])
    arguments.add_argument("--steps", type=int, default=8)
    arguments.add_argument("--repeats", type=int, default=3, help="processes whose peak is measured, per contender")
    options = arguments.parse_args()
    results = {}
    with prepared(options, LLAMA_NAMES if options.random_llama else NAMES) as specs:
        for method in options.methods:
            own = {n: {**s, "method": method} for n, s in specs.items() if applicable(s, method)}
            if options.random_llama and method not in ("ia3", "lora"):
                continue
            rows = {name: measure(spec, options.steps, options.repeats) for name, spec in own.items()}
            runs = {name: row.pop("runs") for name, row in rows.items()}
            first = next(iter(rows.values()))["saved/token"]
            rows = {
                n: {"saved/token": r["saved/token"], "ratio": r["saved/token"] / first, **r} for n, r in rows.items()
            }
            results[method] = {"rows": rows, "runs": runs}
            here = machine()
            table(f"{method}: bytes, {options.batch} rows a step ({here['gpu'] or here['processor']})", rows)
            write(options.json, {"options": vars(options), "methods": results})


if __name__ == "__main__":
    main()

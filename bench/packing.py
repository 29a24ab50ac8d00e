"""Padded against packed batches at inference: every round other rows of a data set, both ways in turns.

    python bench/packing.py [--data sample] [--threads 2] [--json OUT]

Rows come at random, as requests do: a batch holds short and long texts. Once all rows use one adapter, once each uses
one of many adapters of several methods.
"""

import argparse
import random
import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch
from timing import machine, table, write

import infuse
from infuse.bases import load_base
from infuse.data import read
from infuse.heads import run
from infuse.testing import wake
from infuse.texts import Tokens, pad, tokenize


@torch.inference_mode()
def times(model: Any, batch: dict[str, torch.Tensor], names: Sequence[str]) -> dict[str, float]:
    """Milliseconds of a forward pass, padded and packed."""
    taken = {}
    for way, packs in (("padded", False), ("packed", True)):
        started = time.perf_counter()
        run(model, batch, names, packs)
        taken[way] = 1e3 * (time.perf_counter() - started)
    return taken


def measure(
    model: Any, tokens: Tokens, pad_id: int, names: Sequence[str], rows: int, rounds: int, seed: int = 0
) -> dict[str, Any]:
    """Medians over rounds, and of the ratio of both ways in each round."""
    generator, taken, waste = random.Random(seed), [], []
    for _ in range(rounds + rounds // 2):
        batch = pad(generator.choices(tokens, k=rows), pad_id)
        chosen = sorted(generator.choices(names, k=rows), key=names.index)
        taken.append(times(model, batch, chosen))
        waste.append(batch["attention_mask"].numel() / int(batch["attention_mask"].sum()))
    taken = taken[rounds // 2 :]  # the first ones meet shapes that the matrix library has not seen
    ratios = sorted(each["packed"] / each["padded"] for each in taken)
    return {
        **{f"{way} ms": statistics.median(each[way] for each in taken) for way in taken[0]},
        "packed/padded": statistics.median(ratios),
        "quartiles": f"{ratios[len(ratios) // 4]:.2f}–{ratios[3 * len(ratios) // 4]:.2f}",
        "padded/real tokens": statistics.mean(waste),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", default="minilm")
    parser.add_argument("--precision", default="auto", choices=["auto", "fp32", "bf16"])
    parser.add_argument("--data", default="sample")
    parser.add_argument("--methods", nargs="+", default=["ia3", "lora", "pfeiffer"])
    parser.add_argument("--adapters", type=int, default=50)
    parser.add_argument("--rows", nargs="+", type=int, default=[4, 8, 16, 32, 64])
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    base = load_base(options.base, precision=options.precision)
    names = [f"a{i}" for i in range(options.adapters)]
    for i, name in enumerate(names):
        infuse.attach(base.model, options.methods[i * len(options.methods) // len(names)], name)
        wake(base.model, name)
    tokens = tokenize(base.tokenizer, read(options.data).texts, 128)
    here = machine()
    result = {
        f"{rows} rows, {what}": measure(base.model, tokens, base.pad_id, chosen, rows, options.rounds)
        for rows in options.rows
        for what, chosen in (("one adapter", names[:1]), (f"{len(names)} adapters", names))
    }
    dtype = str(next(base.model.parameters()).dtype).removeprefix("torch.")
    where = f"{'+'.join(options.methods)}, {dtype} ({here['gpu'] or here['processor']}, {options.threads} threads)"
    table(f"packed against padded: {where}", result)
    write(options.json, {"options": vars(options), "machine": here, "rows": result})


if __name__ == "__main__":
    main()

"""Inference with a merged adapter against the bare base and against the same adapter unmerged.

    python bench/merged.py [--methods lora lora:dora=true ia3] [--batches 1 32] [--json OUT]

Three copies of one base take turns on the same rows. Ratios to the bare base are medians over rounds, with quartiles.
"""

import argparse
from functools import partial
from typing import Any

import torch
from timing import interleaved, machine, ratios, table, write
from torch import Tensor, nn

import infuse
from infuse.bases import load_base
from infuse.data import read
from infuse.testing import wake
from infuse.texts import pad, tokenize


@torch.inference_mode()
def forward(model: nn.Module, batch: dict[str, Tensor]) -> None:
    model(**batch)
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", default="minilm")
    parser.add_argument("--precision", default="auto", choices=["auto", "fp32", "bf16"])
    parser.add_argument("--data", default="sample", help="the batches are its first test rows")
    parser.add_argument("--methods", nargs="+", default=["lora", "lora:dora=true", "ia3"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 32])
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    bases = {name: load_base(options.base, precision=options.precision) for name in ("base", "unmerged", "merged")}
    models = {name: base.model.to(device) for name, base in bases.items()}
    tokenizer = bases["base"].tokenizer
    tokens = tokenize(tokenizer, read(options.data, split="test").texts[: max(options.batches)], 128)
    here, results = machine(), {}
    dtype = str(next(models["base"].parameters()).dtype).removeprefix("torch.")
    for size in options.batches:
        batch = pad(tokens[:size], int(tokenizer.pad_token_id or 0), device)  # type: ignore[arg-type]
        rows: dict[str, dict[str, Any]] = {}
        for method in options.methods:
            for name in ("unmerged", "merged"):
                torch.manual_seed(0)
                infuse.attach(models[name], method, "task")
                wake(models[name], "task")
            infuse.merge(models["merged"], "task")
            times = interleaved(
                {name: partial(forward, model, batch) for name, model in models.items()}, options.rounds
            )
            for name in ("unmerged", "merged"):
                infuse.detach(models[name])
            rows |= {f"{method} {name}": row for name, row in ratios(times, "base").items()}
        shape = f"{size} rows of up to {batch['input_ids'].shape[1]} tokens, {dtype}"
        table(f"{shape} ({here['gpu'] or here['processor']}, {options.threads} threads)", rows)
        results[str(size)] = rows
    write(options.json, {"options": vars(options), "batches": results})


if __name__ == "__main__":
    main()

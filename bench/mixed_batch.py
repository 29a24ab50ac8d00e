"""Many adapters in one batch, and many adapters resident: what they cost at inference.

    python bench/mixed_batch.py [--methods ia3 lora] [--json OUT]

First, for every method, preset and fusion: a batch of 64 rows under 1, 4, 16 or 64 different adapters against the same
batch under one adapter for all rows (``infuse.route`` with one name), all of them resident. PEFT's mixed batch
(``adapter_names``, LoRA only) runs the same rows beside it, in turns. Then 1, 10, 100 and 1,000 resident adapters: the
time to attach one, memory, and a forward pass under one of them and under 64 different ones.

Ratios are medians over rounds within one run, with quartiles.
"""

import argparse
import ctypes
import gc
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from timing import interleaved, machine, ratios, table, write
from torch import Tensor, nn

import infuse
from infuse.bases import BaseModel, load_base
from infuse.data import read
from infuse.testing import wake
from infuse.texts import pad, tokenize

DIFFERENT = [1, 4, 16, 64]
MEMBERS = 4
Batch = Mapping[str, Tensor]


def names_of(method: str) -> list[str]:
    """All methods and presets of the registry, and fusion."""
    every = [name for cls in infuse.registry().values() for name in (cls.name, *cls.presets)]
    return [*dict.fromkeys(every), "lora:dora=true", "fusion"] if method == "all" else [method]


def populate(model: nn.Module, method: str, count: int) -> list[str]:
    """Attach so many adapters, far from their start; mixers share their members."""
    names = [f"a{i}" for i in range(count)]
    if method != "fusion":
        for name in names:
            infuse.attach(model, method, name)
            wake(model, name)
        return names
    members = [f"member{i}" for i in range(MEMBERS)]
    for name in members:
        infuse.attach(model, "pfeiffer", name)
        wake(model, name)
    for name in names:
        infuse.fuse(model, members, name=name)
    return names


@torch.inference_mode()
def forward(model: nn.Module, batch: Batch, names: str | Sequence[str | None] | None) -> None:
    with infuse.route(model, names):
        model(**batch)
    _wait()


@torch.inference_mode()
def forward_peft(model: nn.Module, batch: Batch, names: Sequence[str]) -> None:
    model(**batch, adapter_names=list(names))
    _wait()


def mixed(base: BaseModel, batch: Batch, method: str, rounds: int) -> dict[str, Any]:
    """1, 4, 16 and 64 different adapters in the batch against one name for all rows."""
    rows = len(batch["input_ids"])
    names = populate(base.model, method, max(DIFFERENT))
    calls: dict[str, Callable[[], Any]] = {"one": partial(forward, base.model, batch, names[0])}
    calls["bare"] = partial(forward, base.model, batch, None)
    for count in DIFFERENT:
        calls[str(count)] = partial(forward, base.model, batch, [names[i % count] for i in range(rows)])
    times = interleaved(calls, rounds)
    infuse.detach(base.model)
    return summary(times)


def mixed_peft(base: BaseModel, again: BaseModel, batch: Batch, rounds: int) -> dict[str, dict[str, Any]]:
    """LoRA at PEFT's defaults for rank and places, ours and PEFT's in turns; ratios against our one adapter."""
    import peft

    rows = len(batch["input_ids"])
    names = populate(base.model, "lora", max(DIFFERENT))
    config = peft.LoraConfig(r=8, lora_alpha=16, init_lora_weights=False)
    theirs = peft.get_peft_model(again.model, config, adapter_name=names[0])
    for name in names[1:]:
        theirs.add_adapter(name, config)
    theirs.eval()
    calls: dict[str, Callable[[], Any]] = {"one": partial(forward, base.model, batch, names[0])}
    for count in DIFFERENT:
        chosen = [names[i % count] for i in range(rows)]
        calls[str(count)] = partial(forward, base.model, batch, chosen)
        calls[f"peft {count}"] = partial(forward_peft, theirs, batch, chosen)
    times = interleaved(calls, rounds)
    infuse.detach(base.model)
    return {
        f"{count} different": {
            "ours ms": ratios(times, "one")[str(count)]["ms"],
            "peft ms": ratios(times, "one")[f"peft {count}"]["ms"],
            **{f"peft/ours {k}": v for k, v in ratios(times, str(count))[f"peft {count}"].items() if k != "ms"},
        }
        for count in DIFFERENT
    }


def resident(base: BaseModel, batch: Batch, method: str, counts: Sequence[int], rounds: int) -> dict[str, Any]:
    """Attach more and more adapters; the bare base is the measure of the forward passes."""
    rows, model, result, attached, grown = len(batch["input_ids"]), base.model, {}, 0, 0
    for count in counts:
        before, start = _resident(), time.perf_counter()
        for i in range(attached, count):
            infuse.attach(model, method, f"a{i}")
        seconds = time.perf_counter() - start
        grown += _resident() - before
        different = [f"a{i * count // rows if count >= rows else i % count}" for i in range(rows)]
        calls: dict[str, Callable[[], Any]] = {
            "bare": partial(forward, model, batch, None),
            "one": partial(forward, model, batch, f"a{count - 1}"),
            "different": partial(forward, model, batch, different),
        }
        figures = ratios(interleaved(calls, rounds), "bare")
        result[f"{count:,}"] = {
            "attach ms each": 1e3 * seconds / (count - attached),
            "RSS KiB each": grown / 1024 / count,
            "parameters KiB each": sum(p.nbytes for p in model.infuse["a0"].parameters()) / 1024,  # type: ignore[index]
            "bare ms": figures["bare"]["ms"],
            "one ms": figures["one"]["ms"],
            "one/bare": figures["one"]["ratio"],
            "in the batch": len(set(different)),
            "mixed ms": figures["different"]["ms"],
            "mixed/bare": figures["different"]["ratio"],
        }
        attached = count
    infuse.detach(model)
    return result


def summary(times: Mapping[str, list[float]]) -> dict[str, Any]:
    """Milliseconds under one adapter, and the ratios to it with their quartiles."""
    rows = ratios(times, "one")
    row: dict[str, Any] = {"one ms": rows["one"]["ms"], "bare": rows["bare"]["ratio"]}
    for count in DIFFERENT:
        each = rows[str(count)]
        row |= {f"{count}×": each["ratio"], f"{count}× quartiles": f"{each['low']:.2f}–{each['high']:.2f}"}
    return row


def load(options: argparse.Namespace) -> BaseModel:
    base = load_base(options.base, precision=options.precision)
    base.model.to("cuda" if torch.cuda.is_available() else "cpu")
    return base


def _resident() -> int:
    """Bytes of this process in memory, less what is free to be given back; on a GPU, what is allocated there."""
    gc.collect()
    if torch.cuda.is_available():
        return torch.cuda.memory_allocated()
    ctypes.CDLL(None).malloc_trim(0)
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmRSS"))


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", default="minilm")
    parser.add_argument("--precision", default="auto", choices=["auto", "fp32", "bf16"])
    parser.add_argument("--data", default="sample", help="the batch is its first test rows")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--methods", nargs="+", default=["all"])
    parser.add_argument("--resident-methods", nargs="*", default=["ia3", "lora"])
    parser.add_argument("--resident", nargs="+", type=int, default=[1, 10, 100, 1000])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    base = load(options)
    texts = read(options.data, split="test").texts[: options.rows]
    device = next(base.model.parameters()).device
    batch = pad(tokenize(base.tokenizer, texts, 128), int(base.tokenizer.pad_token_id or 0), device)  # type: ignore[arg-type]
    here = machine()
    rows, longest = batch["input_ids"].shape
    dtype = str(next(base.model.parameters()).dtype).removeprefix("torch.")
    where = f"{rows} rows of up to {longest} tokens, {dtype}"
    where += f" ({here['gpu'] or here['processor']}, {options.threads} threads)"

    kept = {}
    for method in options.resident_methods:  # first, while the process is small
        kept[method] = resident(base, batch, method, options.resident, options.rounds)
        table(f"{method} resident: {where}", kept[method])
    different = {}
    for method in dict.fromkeys(n for m in options.methods for n in names_of(m)):
        different[method] = mixed(base, batch, method, options.rounds)
    table(f"different adapters against one: {where}", different)
    result = {"options": vars(options), "resident": kept, "mixed": different}
    if "lora" in different:
        result["peft"] = mixed_peft(base, load(options), batch, options.rounds)
        table(f"LoRA, mixed batch of PEFT: {where}", result["peft"])
    write(options.json, result)


if __name__ == "__main__":
    main()

"""What all benchmarks share: interleaved timings, a table, and JSON with the machine's name."""

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch


def interleaved(functions: Mapping[str, Callable[[], Any]], rounds: int, warmup: int = 3) -> dict[str, list[float]]:
    """Seconds of each call, the functions taking turns, so that a drift of the machine meets all of them."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(warmup + rounds):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            if turn >= warmup:
                times[name].append(time.perf_counter() - start)
    return times


def ratios(times: Mapping[str, list[float]], against: str) -> dict[str, dict[str, float]]:
    """Median milliseconds, and the median and quartiles of the ratio to one of them, round by round."""
    rows = {}
    for name, own in times.items():
        ratio = [a / b for a, b in zip(own, times[against], strict=True)]
        low, middle, high = statistics.quantiles(ratio, n=4) if len(ratio) > 1 else [ratio[0]] * 3
        rows[name] = {"ms": 1e3 * statistics.median(own), "ratio": middle, "low": low, "high": high}
    return rows


def machine() -> dict[str, Any]:
    """Processor, threads, versions: what a figure needs beside it."""
    model = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = lines[0] if lines else model
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "processor": model,
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "bf16": torch.ops.mkldnn._is_mkldnn_bf16_supported(),
        "gpu": device,
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }


def table(title: str, rows: Mapping[str, Mapping[str, Any]]) -> None:
    """Print rows of numbers under their column names."""
    columns = list(dict.fromkeys(c for row in rows.values() for c in row))
    cells = [["", *columns]] + [[name, *(_cell(row.get(c, "")) for c in columns)] for name, row in rows.items()]
    widths = [max(len(row[i]) for row in cells) for i in range(len(columns) + 1)]
    print(f"\n{title}")
    for row in cells:
        print(
            "  ".join(
                cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
            )
        )


def write(path: str | None, result: Mapping[str, Any]) -> None:
    """Write a benchmark's result, with the machine, as JSON."""
    if path:
        Path(path).write_text(json.dumps({"machine": machine(), **result}, indent=1) + "\n")


def _cell(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)

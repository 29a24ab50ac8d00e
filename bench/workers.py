"""What train_step.py and memory.py share: options, rows, virtual environments, and contenders as processes."""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

METHODS = ["ia3", "lora", "houlsby", "pfeiffer", "compacter", "fusion", "full"]
EPOCHS = 10
"""Passes over the rows for which the order of the batches is laid down."""
LLAMA = "2048,16,32,8,8192,32000"
CONTENDERS: dict[str, dict[str, Any]] = {
    "ours": {"library": "ours", "loop": "fit"},
    "ours, plain loop": {"library": "ours", "loop": "loop"},
    "peft, Trainer": {"library": "peft", "loop": "trainer", "bucketed": False},
    "peft, loop": {"library": "peft", "loop": "loop"},
    "peft, tuned": {"library": "peft", "loop": "loop", "autocast": True},
    "adapters, Trainer": {"library": "adapters", "loop": "trainer", "bucketed": False},
    "adapters, loop": {"library": "adapters", "loop": "loop"},
    "adapters, tuned": {"library": "adapters", "loop": "loop", "autocast": True},
    "transformers, Trainer": {"library": "transformers", "loop": "trainer", "bucketed": False},
    "transformers, loop": {"library": "transformers", "loop": "loop"},
    "transformers, tuned": {"library": "transformers", "loop": "loop", "autocast": True},
    "floor": {"library": "floor", "loop": "floor"},
}
"""``Trainer``: as users run it; ``loop``: a plain float32 loop over length buckets; ``tuned``: that under autocast."""
LIBRARIES = {"peft": METHODS[:2], "adapters": METHODS[:-1], "transformers": METHODS[-1:]}
"""Which methods a library has; transformers stands for full fine-tuning without any."""


def parser(description: str) -> argparse.ArgumentParser:
    """The options of both benchmarks."""
    options = argparse.ArgumentParser(description=description)
    options.add_argument("--data", help="a CSV file with the columns text and label")
    options.add_argument("--rows", type=int, default=0, help="so many of its rows, drawn at random; 0: all")
    options.add_argument("--base", default="minilm")
    options.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    options.add_argument("--contenders", nargs="+", help="ours, peft, adapters, transformers, floor; all by default")
    options.add_argument("--batch", type=int, default=32)
    options.add_argument("--threads", type=int, default=2)
    options.add_argument("--adapters-python", help="of an environment with adapters 1.3.0; by default one is made")
    options.add_argument(
        "--random-llama",
        nargs="?",
        const=LLAMA,
        metavar="WIDTH,LAYERS,HEADS,KV,FFN,VOCABULARY",
        help="random weights of a Llama in bfloat16 instead of the base, by default of a billion parameters",
    )
    options.add_argument("--length", type=int, default=512, help="tokens per row of --random-llama")
    options.add_argument("--json")
    return options


@contextmanager
def prepared(options: argparse.Namespace, names: Sequence[str]) -> Iterator[dict[str, dict[str, Any]]]:
    """The specification of each contender that is asked for, with rows on disk and an environment to run in."""
    torch.set_num_threads(options.threads)
    if options.data is None and not options.random_llama:
        raise SystemExit("give the rows by --data, or --random-llama")
    wanted = options.contenders or ["ours", *LIBRARIES, "floor"]
    chosen = {n: CONTENDERS[n] for n in names if n in wanted or CONTENDERS[n]["library"] in wanted}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        common = {
            "bucketed": True,
            "autocast": False,
            "python": sys.executable,
            "batch": options.batch,
            "threads": options.threads,
            "max_length": 128,
            **(_llama(options, folder) if options.random_llama else _labelled(options, folder)),
        }
        specs = {name: {**common, **each} for name, each in chosen.items()}
        if any(each["library"] == "adapters" for each in chosen.values()):
            python = options.adapters_python or _environment(folder / "adapters")
            for each in specs.values():
                each["python"] = python if each["library"] == "adapters" else each["python"]
        yield specs


def applicable(spec: dict[str, Any], method: str) -> bool:
    """Whether the contender has the method."""
    return method in LIBRARIES.get(spec["library"], METHODS)


class Worker:
    """A contender in a process of its own; it ends with the block."""

    def __init__(self, spec: dict[str, Any]):
        self.place = ExitStack()
        folder = Path(self.place.enter_context(tempfile.TemporaryDirectory()))
        (folder / "spec.json").write_text(json.dumps(spec))
        self.log = folder / "log"
        self.process = subprocess.Popen(
            [spec["python"], Path(__file__).with_name("worker.py"), folder / "spec.json"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log.open("w"),
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": str(spec["threads"]), "TMPDIR": str(folder)},
        )

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *args: Any) -> None:
        self.process.kill()
        self.process.wait()
        self.place.close()

    def tell(self, message: Any) -> Any:
        """Send a message and wait for the answer."""
        self.process.stdin.write(json.dumps(message) + "\n")  # type: ignore[union-attr]
        self.process.stdin.flush()  # type: ignore[union-attr]
        return self.hear()

    def hear(self) -> Any:
        line = self.process.stdout.readline()  # type: ignore[union-attr]
        if not line:
            self.process.wait()
            raise SystemExit(f"a contender ended early:\n{self.log.read_text()[-3000:]}")
        return json.loads(line)


def _labelled(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Rows of texts: as CSV for `infuse train`, and as tokens, classes and batches for the others."""
    import csv

    from infuse.bases import load_base, locate
    from infuse.data import read
    from infuse.texts import tokenize
    from infuse.training.batches import Buckets

    rows = read(options.data)
    if options.rows:
        rows = rows.take(random.Random(0).sample(range(len(rows)), options.rows))
    with (folder / "rows.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("text", "label"), *zip(rows.texts, rows.labels or (), strict=True)])
    tokenizer = load_base(options.base).tokenizer
    tokens = tokenize(tokenizer, rows.texts, 128)
    labels = rows.label_set
    order: list[list[int]] = []
    buckets = Buckets(tokens, options.batch, 0)
    for epoch in range(EPOCHS):
        buckets.set_epoch(epoch)
        once = list(buckets)
        order += [once[i : i + options.batch] for i in range(0, len(once), options.batch)]
    data = {
        "tokens": tokens,
        "labels": [labels.index(str(label)) for label in rows.labels or ()],
        "classes": len(labels),
        "pad_id": tokenizer.pad_token_id,
        "order": order,
    }
    torch.save(data, folder / "rows.pt")
    files = {"csv": str(folder / "rows.csv"), "rows": str(folder / "rows.pt")}
    return {"base": locate(options.base), "llama": None, **files}


def _llama(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Rows of random tokens, and the configuration of a Llama."""
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size")
    config = dict(zip((*names, "vocab_size"), map(int, options.random_llama.split(",")), strict=True))
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(3, config["vocab_size"], (8 * options.batch, options.length), generator=generator)
    order = torch.arange(len(rows)).view(8, options.batch).tolist()
    data = {"tokens": rows.tolist(), "labels": None, "classes": 0, "pad_id": 0, "order": order}
    torch.save(data, folder / "rows.pt")
    config |= {"max_position_embeddings": max(2048, options.length), "pad_token_id": 0}
    return {"base": None, "llama": config, "csv": None, "rows": str(folder / "rows.pt")}


def _environment(folder: Path) -> str:
    """A new virtual environment with ``adapters`` and what its trainer needs."""
    print("making a virtual environment with adapters 1.3.0", flush=True)
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    pip = [folder / "bin/python", "-m", "pip", "install", "--quiet"]
    subprocess.run([*pip, f"torch=={torch.__version__.split('+')[0]}"], check=True)
    subprocess.run([*pip, "adapters==1.3.0", "accelerate"], check=True)
    return str(folder / "bin/python")

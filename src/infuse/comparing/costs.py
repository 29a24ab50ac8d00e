"""What a method costs beside its accuracy: bytes, milliseconds, and what can be done with the adapter afterwards."""

import json
import statistics
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from transformers.utils import logging

from infuse import storage
from infuse.bases import BaseModel
from infuse.comparing.clock import now
from infuse.data import Rows
from infuse.errors import InfuseError
from infuse.heads import apply, head_of
from infuse.memory import bytes_saved
from infuse.merging import merge, unmerge
from infuse.model import activate, attach, detach, fusable_sites, route
from infuse.processes import module_command
from infuse.store import store_of
from infuse.texts import Tokens, pad
from infuse.training.batches import Buckets, Collate, encode
from infuse.training.engine import TextClassifier
from infuse.training.folders import ADAPTER
from infuse.training.prefix import prefix_of, remember
from infuse.training.run import write_model
from infuse.training.settings import Settings

BATCHES = (1, 32)
"""Rows of a call whose latency is measured."""
STEPS = 6
"""Steps over which the peak of memory is watched."""


def saved_per_token(base: BaseModel, train: Rows, settings: Settings, steps: int = 4) -> float:
    """Bytes saved for backward per real token, in the first batches of training."""
    adapter = store_of(base.model)[ADAPTER]
    encoded = encode(base, train, train.label_set, settings.max_length)
    prefix = prefix_of(base, adapter)
    if prefix is not None:
        encoded.remembered = remember(base, prefix, encoded.tokens)
    model = TextClassifier(base.model, ADAPTER, settings, None, prefix).train()
    device = next(base.model.parameters()).device
    order, collate = iter(Buckets(encoded.tokens, settings.batch_size, settings.seed)), Collate(base.pad_id)
    batches = []
    while len(batches) < 1 + steps and (rows := list(islice(order, settings.batch_size))):
        batches.append({n: v.to(device) for n, v in collate([encoded[i] for i in rows]).items()})
    batches = batches if len(batches) > 1 else 2 * batches  # the first step is not counted

    def step(batch: dict[str, Tensor]) -> None:
        model(**batch)["loss"].backward()
        model.zero_grad()

    counts = bytes_saved(model, [partial(step, batch) for batch in batches])
    model.eval()
    base.model.eval()
    return sum(counts) / sum(int(batch["attention_mask"].sum()) for batch in batches[1:])


def peak_memory(base: BaseModel, train: Rows, settings: Settings) -> int | None:
    """How far a fresh process grows over the loaded base while it trains on the longest rows; ``None`` if it dies.

    One process has one peak, and what an earlier method left behind would hide that of a later one. It trains twice,
    and the second time counts: a matrix library keeps kernels for every shape, some 10 MiB each on one processor, which
    would drown what the method itself needs.
    """
    rows = _longest(base, train, STEPS * settings.batch_size, settings.max_length)
    spec = {
        "base": base.name, "pooling": base.pooling, "settings": asdict(replace(settings, epochs=1)),
        "threads": torch.get_num_threads(), "texts": rows.texts, "labels": rows.labels,
    }  # fmt: skip
    command = module_command("infuse.comparing.peak")
    done = subprocess.run(command, input=json.dumps(spec), capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else None


def file_size(base: BaseModel) -> int:
    """Bytes of the files that hold what was trained: the adapter, or under full fine-tuning the whole model, too."""
    logging.disable_progress_bar()
    with storage.scratch() as folder:
        write_model(base, store_of(base.model)[ADAPTER].method.unfreezes, folder / "files")
        return sum(path.stat().st_size for path in (folder / "files").rglob("*") if path.is_file())


def latency(
    base: BaseModel, tokens: Tokens, adapter: str | None, seconds: float = 1.5, sizes: Sequence[int] = BATCHES
) -> dict[str, float]:
    """Median milliseconds of a call on real rows, per number of rows in the batch; ``None`` is the bare base."""
    device = next(base.model.parameters()).device
    return {str(size): 1e3 * _median(base, tokens, size, adapter, device, seconds) for size in sizes}


@torch.inference_mode()
def _median(
    base: BaseModel, tokens: Tokens, size: int, adapter: str | None, device: torch.device, seconds: float
) -> float:
    model: Any = base.model
    starts = range(0, max(1, len(tokens) - size + 1), size)
    times: list[float] = []
    begun = now()
    while len(times) < 8 or (now() - begun < seconds and len(times) < 60):
        first = starts[len(times) % len(starts)]
        batch = pad(tokens[first : first + size], base.pad_id, device)
        start = now()
        out = model(**batch)
        if adapter is not None:
            apply(head_of(model, adapter), out, batch["attention_mask"])
        times.append(now() - start)
    return statistics.median(times[3:])  # the first calls warm up


def capabilities(base: BaseModel, tokens: Tokens) -> dict[str, Any]:
    """What the trained adapter allows, each found by doing it, and the latencies with and without merging."""
    model = base.model
    activate(model, ADAPTER)
    facts: dict[str, Any] = {"latency": latency(base, tokens, ADAPTER), "merged": None}
    with twin(base) as two:
        facts["mixed"] = two and _mixes(base, tokens[:3])
        facts["fusable"] = two and possible(lambda: fusable_sites(model, [ADAPTER, "twin"]))
    activate(model, ADAPTER)
    facts["mergeable"] = possible(lambda: merge(model, ADAPTER))
    if facts["mergeable"]:
        facts["merged"] = latency(base, tokens, ADAPTER)
        unmerge(model)
    return facts


@contextmanager
def twin(base: BaseModel) -> Iterator[bool]:
    """A fresh adapter of the same method beside the trained one; gives whether the model takes it."""
    method = store_of(base.model)[ADAPTER].method
    taken = possible(lambda: attach(base.model, method, "twin", trained=()))
    try:
        yield taken
    finally:
        if taken:
            detach(base.model, "twin")


@torch.inference_mode()
def _mixes(base: BaseModel, tokens: Tokens) -> bool:
    """Whether a batch whose rows use different adapters gives what each gives alone, up to rounding."""
    model: Any = base.model
    batch = pad(tokens, base.pad_id, next(model.parameters()).device)
    names = [ADAPTER, "twin", None][: len(tokens)]

    def hidden(route_to: Sequence[str | None]) -> Tensor:
        with route(model, route_to):
            return model(**batch)["last_hidden_state"].float()

    mixed = hidden(names)
    alone = torch.stack([hidden([name] * len(names))[row] for row, name in enumerate(names)])
    off = (mixed - alone)[batch["attention_mask"].bool()].abs().max()
    bound = 1e-4 if next(model.parameters()).dtype == torch.float32 else 5e-2
    return bool(off <= bound * alone.abs().max())


def possible(action: Callable[[], Any]) -> bool:
    """Whether an action goes through; it is done, unless Infuse refuses it."""
    try:
        action()
    except InfuseError:
        return False
    return True


def _longest(base: BaseModel, train: Rows, count: int, max_length: int) -> Rows:
    """The longest rows, and at least the longest one of every label, so that the head keeps its size."""
    tokens = encode(base, train, train.label_set, max_length).tokens
    order = sorted(range(len(train)), key=lambda i: -len(tokens[i]))
    labels = train.label_sets()
    chosen: dict[int, None] = dict.fromkeys(order[:count])
    missing = set(train.label_set) - {label for i in chosen for label in labels[i]}
    for i in order:
        if missing & set(labels[i]):
            chosen[i] = None
            missing -= set(labels[i])
    return train.take(chosen)

"""One cell of a comparison: one base, one method, one seed, from the bare base to everything that is measured."""

import hashlib
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import TrainerCallback

from infuse.bases import BaseModel
from infuse.comparing import costs
from infuse.comparing.clock import Clock
from infuse.comparing.probe import probe_accuracy
from infuse.data import Rows, Splits, digest
from infuse.model import detach, summary
from infuse.texts import probabilities
from infuse.training.baseline import logistic_predictions
from infuse.training.batches import encode
from infuse.training.fit import fit
from infuse.training.folders import ADAPTER
from infuse.training.metrics import decide, overall
from infuse.training.settings import Settings

Cell = dict[str, Any]
"""What was measured, ready for JSON."""
LOGISTIC = "logistic regression"


@dataclass(frozen=True)
class Task:
    """The rows that every cell sees: to train, to choose the epoch by, to report on, and to measure forgetting on."""

    train: Rows
    validation: Rows
    reported: Rows
    probe: Rows

    @staticmethod
    def of(splits: Splits, report_on: str, probe: Rows) -> "Task":
        reported = splits.test if report_on == "test" else splits.validation
        assert reported is not None
        return Task(splits.train, splits.validation, reported, probe)

    def digest(self) -> str:
        """What identifies the rows."""
        return digest(self.train, self.validation, self.reported, self.probe)[:32]


def measure(
    base: BaseModel,
    task: Task,
    settings: Settings,
    *,
    limit: float | None = None,
    with_costs: bool = False,
    callbacks: Sequence[TrainerCallback] = (),
) -> Cell:
    """Train once and measure; the base is bare before and after.

    Args:
        base: a loaded base; one of its own for each run of full fine-tuning, which changes it.
        task: the rows.
        settings: how to train.
        limit: seconds of training after which to stop.
        with_costs: measure memory, latency and what the adapter allows, too, which do not depend on the seed.
        callbacks: for progress.
    """
    before = bits(base.model)
    bare = probe_accuracy(base, task.probe, settings.max_length)
    labels = task.train.label_set
    validation, reported = (encode(base, r, labels, settings.max_length) for r in (task.validation, task.reported))

    def predict(tokens: list[list[int]]) -> np.ndarray:
        return decide(probabilities(base.model, tokens, base.pad_id, ADAPTER), task.train.multi)

    clock = Clock(lambda: overall(validation.targets.numpy(), predict(validation.tokens)), limit)
    fit(base, task.train, task.validation, settings, name=ADAPTER, callbacks=[clock, *callbacks])
    predicted = predict(reported.tokens)
    counts = summary(base.model)
    cell: Cell = {
        **overall(reported.targets.numpy(), predicted),
        "parameters": {
            "trained": counts.total(ADAPTER),
            "head": counts.adapters[ADAPTER].get("head", 0),
            "base": counts.base,
        },
        "seconds": clock.seconds,
        "step_ms": 1e3 * statistics.median(clock.steps[2:] or clock.steps),
        "curve": clock.curve,
        "probe": {"bare": bare, "adapted": probe_accuracy(base, task.probe, settings.max_length, ADAPTER)},
        "predicted": predicted.tolist(),
    }
    if with_costs:
        cell["costs"] = {
            **costs.capabilities(base, reported.tokens),
            "file": costs.file_size(base),
            "saved_per_token": costs.saved_per_token(base, task.train, settings),
            "peak": costs.peak_memory(base, task.train, settings),
        }
    detach(base.model)
    return cell | {"restored": bits(base.model) == before}


def measure_logistic(base: BaseModel, task: Task, max_length: int) -> Cell:
    """The number to beat: logistic regression on the bare base's features."""
    begun = time.perf_counter()
    targets, predicted = logistic_predictions(base, task.train, {"reported": task.reported}, max_length)["reported"]
    seconds = time.perf_counter() - begun
    bare = probe_accuracy(base, task.probe, max_length)
    labels = task.train.label_set
    tokens = encode(base, task.reported, labels, max_length).tokens
    head = (base.width + 1) * len(labels)
    return {
        **overall(targets, predicted),
        "parameters": {"trained": head, "head": head, "base": sum(p.numel() for p in base.model.parameters())},
        "seconds": seconds,
        "probe": {"bare": bare, "adapted": bare},
        "predicted": predicted.tolist(),
        "costs": {"latency": costs.latency(base, tokens, None)},
        "restored": True,
    }


def epochs_within(base: BaseModel, train: Rows, settings: Settings, seconds: float) -> int:
    """How many whole epochs fit into so many seconds, by the median of a few steps; at least one."""
    every = max(1, len(train) // (12 * settings.batch_size))
    clock = Clock()
    fit(base, train.take(range(0, len(train), every)), None, replace(settings, epochs=1), callbacks=[clock])
    detach(base.model)
    step = statistics.median(clock.steps[2:] or clock.steps)
    return max(1, min(10_000, int(seconds / (step * -(-len(train) // settings.batch_size)))))


def bits(model: nn.Module) -> str:
    """A hash of every bit of every parameter and buffer, and of their names."""
    sha = hashlib.sha256()
    for name, value in (*model.named_parameters(), *model.named_buffers()):
        sha.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        sha.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()

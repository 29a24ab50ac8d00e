"""What a candidate takes, counted on the meta device: from the base's config alone, no weights loaded.

Bytes are exact, but for LayerNorms in bfloat16, whose statistics the meta device takes to be float32 (0.1 %).
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from infuse.bases import BaseModel
from infuse.comparing.costs import possible, twin
from infuse.heads import Head
from infuse.memory import Ledger, saved_for_backward
from infuse.merging import merge
from infuse.method import make
from infuse.model import attach, detach, fusable_sites, summary
from infuse.texts import TOKENS
from infuse.training.engine import TextClassifier
from infuse.training.folders import ADAPTER
from infuse.training.prefix import BUDGET, Prefix, prefix_of
from infuse.training.settings import Settings

FP32 = 4
"""Bytes of a trained parameter."""


@dataclass(frozen=True)
class Task:
    """What of the data costs memory."""

    labels: int
    length: int
    """Tokens of the longest text."""
    tokens: int = 0
    """Tokens of all texts to train and to validate on; 0 without data."""
    multi: bool = False


@dataclass(frozen=True)
class Cost:
    """Counts and bytes of one candidate."""

    adapter: int
    """Trained parameters in the transformer."""
    head: int
    base: int
    """Parameters of the base."""
    weights: int
    """Bytes of the base."""
    saved: int
    """Bytes that autograd saves for backward in the longest step (or part of one)."""
    per_token: float
    """The same per token of it."""
    max_tokens: int
    """Tokens that may run at once, for which the memory is counted."""
    training: int
    """Bytes at the peak of training: base, adapter, gradients, optimizer, remembered layers, and what a step holds."""
    serving: int
    """Bytes of serving all tasks at once: base, adapters, heads, and what a call holds."""
    abilities: frozenset[str]

    @property
    def trained(self) -> int:
        return self.adapter + self.head

    @property
    def percent(self) -> float:
        """The adapter's share of the base."""
        return 100 * self.adapter / self.base

    @property
    def file(self) -> int:
        """Bytes of what is saved, but for some kB of description."""
        return FP32 * self.trained

    @property
    def state(self) -> int:
        """Bytes of what is trained, its gradients, and AdamW's two moments."""
        return 4 * FP32 * self.trained


def cost(base: BaseModel, settings: Settings, task: Task, *, tasks: int = 1, limit: float | None = None) -> Cost:
    """Count a candidate on a base without weights (see :func:`infuse.bases.outline`), which is bare before and after.

    Args:
        base: the outline.
        settings: method, layers, and batches.
        task: what of the data costs memory.
        tasks: how many adapters are served at once.
        limit: bytes that training may take: a step that takes more is counted in ever smaller parts, which gives the
            same gradient and needs less memory, until it fits or runs row by row.
    """
    with torch.device("meta"):
        adapter = attach(base.model, make(settings.method), ADAPTER, layers=settings.layers, trained=())
        adapter.head = Head(settings.head, [str(i) for i in range(task.labels)], base.width, "mean", task.multi)
    try:
        counts = summary(base.model)
        whole = adapter.method.unfreezes
        inside = counts.deltas(ADAPTER)
        head = counts.adapters[ADAPTER].get("head", 0)
        weights = sum(p.numel() * p.element_size() for n, p in base.model.named_parameters() if "infuse." not in n)
        with Ledger(base.model):
            prefix = prefix_of(base, adapter)
        model = TextClassifier(base.model, ADAPTER, settings, None, prefix)
        element = next(base.model.parameters()).element_size()
        remembered = min(BUDGET, task.tokens * base.width * element) if prefix else 0
        # The base, what is trained and two moments of each; gradients are part of a step.
        fixed = weights + remembered + FP32 * (inside * (2 if whole else 3) + 3 * head)
        # Evaluation takes four times the rows of a step; a head alone sees features that were computed before.
        alone = not adapter.sites and not whole
        call = _call(model, -(-TOKENS // task.length) if alone else 4 * settings.batch_size, task)
        rows = most = max(1, min(settings.batch_size, settings.max_tokens // task.length))
        while True:
            saved, peak = _step(model, prefix, rows, task)
            if limit is None or fixed + max(peak, call) <= limit or rows == 1 or call >= peak:
                break
            rows = -(-rows // 2)
        able = frozenset() if whole else abilities(base)
        # Mixed batches keep adapters a second time, in the base's number format.
        served = weights if whole else (FP32 + (element if tasks > 1 else 0)) * inside
        return Cost(
            adapter=inside,
            head=head,
            base=counts.base,
            weights=weights,
            saved=saved,
            per_token=saved / (rows * task.length),
            max_tokens=settings.max_tokens if rows == most else rows * task.length,
            training=fixed + max(peak, call),
            serving=(0 if whole else weights) + tasks * (served + FP32 * head) + call,
            abilities=able,
        )
    finally:
        detach(base.model)


def abilities(base: BaseModel) -> frozenset[str]:
    """What the attached adapter allows, each found by doing it."""
    found = set()
    with torch.device("meta"), twin(base) as two:
        if two:
            found.add("mix")
            if possible(lambda: fusable_sites(base.model, [ADAPTER, "twin"])):
                found.add("fuse")
    with torch.device("meta"):
        if possible(lambda: merge(base.model, ADAPTER)):
            found.add("merge")
    return frozenset(found)


def _step(model: TextClassifier, prefix: Prefix | None, rows: int, task: Task) -> tuple[int, int]:
    """Bytes saved for backward, and the most that a step holds beside parameters."""
    model.train()
    batch = _batch(model, prefix, rows, task)

    own = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
    with Ledger(model) as ledger, saved_for_backward() as kept:
        model(**batch)["loss"].backward()
    model.zero_grad()
    model.eval()
    return sum(s.nbytes() for place, s in kept.items() if place not in own), ledger.peak + _held(batch)


def _call(model: TextClassifier, rows: int, task: Task) -> int:
    """The most that a call without gradients holds beside parameters, all layers run."""
    model.eval()
    batch = _batch(model, None, rows, task)
    with Ledger(model) as ledger, torch.no_grad():
        model(**batch)
    return ledger.peak + _held(batch)


def _batch(model: TextClassifier, prefix: Prefix | None, rows: int, task: Task) -> dict[str, Tensor]:
    base: Any = model.model
    ids = torch.zeros(rows, task.length, dtype=torch.long, device="meta")
    labels = ids.new_zeros(rows, task.labels, dtype=torch.float) if task.multi else ids[:, 0].clone()
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    if prefix is not None:
        width, dtype = model.head[0].width, next(base.parameters()).dtype
        batch["hidden"] = torch.empty(rows, task.length, width, dtype=dtype, device="meta")
    return batch


def _held(batch: dict[str, Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in batch.values())

"""Pooling and classifier heads: from hidden states to the logits of one adapter's labels."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from infuse.errors import InfuseError, listed
from infuse.model import route as routed
from infuse.model import store_of
from infuse.packing import pack, running
from infuse.routing import side_by_side

Hidden = Float[Tensor, "rows positions width"]
Mask = Int[Tensor, "rows positions"]
Pooled = Float[Tensor, "rows width"]


def _mean(hidden: Hidden, mask: Mask) -> Pooled:
    weights = mask.unsqueeze(-1).to(hidden.dtype)
    return (hidden * weights).sum(1) / weights.sum(1).clamp(min=1)


def _first(hidden: Hidden, mask: Mask) -> Pooled:
    return _at(hidden, mask.argmax(1))


def _last(hidden: Hidden, mask: Mask) -> Pooled:
    positions = torch.arange(mask.shape[1], device=mask.device)
    return _at(hidden, (mask * positions).argmax(1))


def _at(hidden: Hidden, index: Tensor) -> Pooled:
    return hidden[torch.arange(len(hidden), device=hidden.device), index]


POOLINGS: dict[str, Callable[[Hidden, Mask], Pooled]] = {"mean": _mean, "cls": _first, "last": _last}
"""Mean over real tokens; the first real token; the last real token (padding may be on either side)."""

HEADS = {"cosine": 3e-3, "linear": 1e-2, "hf": 3e-3}
"""``cosine``: scaled cosine to a learned vector per label; ``linear``: an affine map; ``hf``: the model's own head.

With the learning rate of each, chosen on validation rows (docs/decisions.md).
"""

TEMPERATURES = (1e-3, 1e3)
"""The range of a head's temperature; beyond it, exponentials of logits over- and underflow."""


def pool(hidden: Hidden, mask: Mask, how: str) -> Pooled:
    """One vector per text, in float32."""
    return POOLINGS[check_pooling(how)](hidden, mask).float()


def check_pooling(how: str) -> str:
    """The name of a pooling, or an error with those that there are."""
    if how not in POOLINGS:
        raise InfuseError(f"Unknown pooling {how!r}; choose from {listed(POOLINGS)}.")
    return how


class Head(nn.Module):
    """The classifier of one adapter over its own labels.

    - ``cosine``: ``logits = s · ŵ·x̂`` with unit vectors ``ŵ`` per label and ``x̂``, and a learned scale ``s``.
    - ``linear``: ``logits = W·x + b``, started at zero.
    - ``hf``: no parameters here; the logits are those of the transformers model's own classification head.

    Args:
        kind: one of :data:`HEADS`.
        labels: the label names, in the order of the logits.
        width: number of features of a pooled text (not needed for ``hf``).
        pooling: one of :data:`POOLINGS`.
        multi: whether a text may carry several labels (sigmoid instead of softmax).
        temperature: what logits are divided by on their way to probabilities (see :meth:`probabilities`).
        threshold: a text whose highest probability is below it is out of scope (see :func:`answer`); 0: none is.
    """

    SCALE, LENGTH = {False: 20.0, True: 40.0}, {False: 1.0, True: 0.03}
    """Where the scale and the vectors of a cosine head start, for one label a text and for several.

    The shorter a vector, the further a step turns it; those of several labels have further to go, because the
    centroid of a label's texts is blurred by their other labels.
    """

    def __init__(
        self,
        kind: str,
        labels: Sequence[str],
        width: int = 0,
        pooling: str = "mean",
        multi: bool = False,
        temperature: float = 1.0,
        threshold: float = 0.0,
    ):
        super().__init__()
        if kind not in HEADS:
            raise InfuseError(f"Unknown head {kind!r}; choose from {listed(HEADS)}.")
        self.kind, self.labels, self.width, self.multi = kind, tuple(labels), width, bool(multi)
        self.pooling = check_pooling(pooling)
        self.calibrate(temperature, threshold)
        if kind == "linear":
            self.weight = nn.Parameter(torch.zeros(len(labels), width))
            self.bias = nn.Parameter(torch.zeros(len(labels)))
        elif kind == "cosine":
            self.weight = nn.Parameter(torch.randn(len(labels), width) / math.sqrt(max(1, width)))
            self.log_scale = nn.Parameter(torch.tensor(math.log(self.SCALE[self.multi])))
            if multi:
                # Cosines to several labels are large at once: a learned threshold per label decides each.
                self.bias = nn.Parameter(torch.full((len(labels),), -0.5 * self.SCALE[True]))

    def calibrate(self, temperature: float, threshold: float) -> None:
        """Set both, or raise :class:`InfuseError` for values that no calibration gives (they may come from a file)."""
        low, high = TEMPERATURES
        if not _is_number(temperature) or not low <= temperature <= high:
            raise InfuseError(f"A head's temperature must lie between {low:g} and {high:g}, not {temperature!r}.")
        if not _is_number(threshold) or not 0 <= threshold < 1:
            raise InfuseError(f"A head's threshold must be at least 0 and below 1, not {threshold!r}.")
        self.temperature, self.threshold = float(temperature), float(threshold)

    def forward(self, x: Pooled) -> Float[Tensor, "rows labels"]:
        return self.score(features(self.kind, x))

    def score(self, x: Pooled) -> Float[Tensor, "rows labels"]:
        """Logits from :func:`features`, which heads of a kind may share."""
        if self.kind == "linear":
            return F.linear(x, self.weight, self.bias)
        logits = self.log_scale.exp() * F.linear(x, F.normalize(self.weight, dim=-1))
        return logits + self.bias if self.multi else logits

    @torch.no_grad()
    def start_at(self, pooled: Pooled, targets: Float[Tensor, "rows labels"]) -> None:
        """Start a cosine head's vectors at the centroids of the classes; ``targets`` is 0/1 per label."""
        if self.kind != "cosine":
            return
        centroids = targets.T.float() @ F.normalize(pooled.float(), dim=-1)
        known = targets.sum(0) > 0
        self.weight[known] = self.LENGTH[self.multi] * F.normalize(centroids, dim=-1)[known].to(self.weight)

    def loss(
        self,
        logits: Float[Tensor, "rows labels"],
        targets: Tensor,
        weights: Float[Tensor, " labels"] | None = None,
        smoothing: float = 0.0,
    ) -> Float[Tensor, ""]:
        """Cross-entropy over class indices, or binary cross-entropy over 0/1 targets for multi-label heads."""
        if not self.multi:
            return F.cross_entropy(logits.float(), targets, weights, label_smoothing=smoothing)
        smooth = targets.float() * (1 - smoothing) + smoothing / 2
        return F.binary_cross_entropy_with_logits(logits.float(), smooth, pos_weight=weights)

    def probabilities(self, logits: Float[Tensor, "rows labels"]) -> Float[Tensor, "rows labels"]:
        """``softmax(z/T)``, or ``sigmoid(z/T)`` for multi-label heads: logits z over the head's temperature T.

        T changes how sure an answer is, never which label is on top. Guo et al. 2017, "On calibration of modern
        neural networks", arXiv:1706.04599.

        In float64 on the CPU, where those of a text sum to one as closely as scikit-learn wants them to.
        """
        logits = logits.cpu().double() / self.temperature
        return logits.sigmoid() if self.multi else logits.softmax(-1)

    def settings(self) -> dict[str, Any]:
        """What :meth:`restore` needs beside the tensors, ready for JSON."""
        return {
            "kind": self.kind,
            "labels": list(self.labels),
            "width": self.width,
            "pooling": self.pooling,
            "multi": self.multi,
            "temperature": self.temperature,
            "threshold": self.threshold,
        }

    @classmethod
    def restore(cls, settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> "Head":
        """A head from its settings and tensors; an error if they do not fit each other."""
        with torch.device("meta"):
            head = cls(**settings)
        expected = head.state_dict()
        sound = expected.keys() == tensors.keys() and len(set(head.labels)) == len(head.labels)
        sound = sound and all(expected[n].shape == v.shape and v.is_floating_point() for n, v in tensors.items())
        if not sound or not all(isinstance(label, str) for label in head.labels):
            raise InfuseError("The head's tensors in the file do not fit its description; save the adapter again.")
        head.load_state_dict({n: v.detach().float().clone() for n, v in tensors.items()}, assign=True)
        return head


def check_finite(values: np.ndarray | Tensor) -> None:
    """Refuse logits or probabilities that are no numbers: finite weights may overflow, on some texts and not on all."""
    if not np.isfinite(np.asarray(values)).all():
        raise InfuseError("The adapter's values are too large to compute with; train it again.")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def features(kind: str, pooled: Pooled) -> Pooled:
    """What a head of this kind looks at: unit vectors for ``cosine``."""
    return F.normalize(pooled, dim=-1) if kind == "cosine" else pooled


class Ranked(NamedTuple):
    """A label and its probability."""

    label: str
    confidence: float


@dataclass(frozen=True)
class Answer:
    """What a head says about one text.

    Attributes:
        label: the most probable label; None if the text is out of scope, and always in multi-label mode.
        labels: in multi-label mode those at least half probable, maybe none; else None.
        confidence: the probability of the most probable label, whether it is given or not.
        top: the most probable labels, best first, also for a text out of scope.
    """

    label: str | None
    labels: tuple[str, ...] | None
    confidence: float
    top: tuple[Ranked, ...]

    @property
    def refused(self) -> bool:
        """Whether the text is out of scope."""
        return self.label is None and self.labels is None


def answer(head: Head, probabilities: Float[np.ndarray, " labels"], top_k: int = 3) -> Answer:
    """Decide an answer: the one place where a head's threshold counts.

    A text is out of scope where ``max p < threshold``: the maximum softmax probability of Hendrycks & Gimpel 2017, "A
    baseline for detecting misclassified and out-of-distribution examples", arXiv:1610.02136. Multi-label heads need no
    such rule: they can answer with no label at all.
    """
    order = np.argsort(-probabilities, kind="stable")[: max(1, top_k)]
    top = tuple(Ranked(head.labels[i], float(probabilities[i])) for i in order)
    label, confidence = top[0]
    if head.multi:
        return Answer(None, tuple(head.labels[i] for i in np.flatnonzero(probabilities >= 0.5)), confidence, top)
    return Answer(None if confidence < head.threshold else label, None, confidence, top)


def head_of(model: nn.Module, name: str) -> Head:
    """The head of an adapter, or an error if it has none."""
    head = store_of(model)[name].head
    if not isinstance(head, Head):
        raise InfuseError(
            f"Adapter {name!r} has no classification head; train it with infuse.Classifier or infuse train."
        )
    return head


def apply(head: Head, out: Mapping[str, Tensor], mask: Mask) -> Float[Tensor, "rows labels"]:
    """Logits of a head from a model's output."""
    if head.kind == "hf":
        return out["logits"]
    return head(pool(out["last_hidden_state"], mask, head.pooling))


def grouped(
    model: nn.Module, batch: Mapping[str, Tensor], names: Sequence[str]
) -> Iterator[tuple[Head, list[int], Float[Tensor, "own labels"]]]:
    """Per adapter of a mixed batch: its head, its rows, and their logits over its own labels."""
    heads = {name: head_of(model, name) for name in dict.fromkeys(names)}
    order = side_by_side({name: store_of(model)[name] for name in heads}, names)
    if order != sorted(order):
        batch = {key: value[order] for key, value in batch.items()}
    out = run(model, batch, [names[row] for row in order], all(h.kind != "hf" for h in heads.values()))
    rows: dict[str, list[int]] = {}
    for at, row in enumerate(order):
        rows.setdefault(names[row], []).append(at)
    mask = batch["attention_mask"]
    found: dict[tuple[str, str], Tensor] = {}
    for name, own in rows.items():
        head, at = heads[name], slice(own[0], own[-1] + 1)
        if head.kind == "hf":
            yield head, [order[i] for i in own], out["logits"][at]
            continue
        key = head.kind, head.pooling
        if key not in found:
            found[key] = features(head.kind, pool(out["last_hidden_state"], mask, head.pooling))
        yield head, [order[i] for i in own], head.score(found[key][at])


def run(
    model: nn.Module, batch: Mapping[str, Tensor], names: Sequence[str | None], packs: bool = True
) -> Mapping[str, Tensor]:
    """The output of a model for a batch with an adapter for every row; its hidden states alone where packing pays."""
    store = store_of(model)
    packs = packs and not any("pooler" in path for path in store.copied)  # it is spared where batches are packed
    packed = pack(model, store.arch, batch) if packs else None
    if packed is None:
        with routed(model, names):
            return model(**batch)
    with routed(model, packed.each(names)), running(model, packed):
        out = model(**packed.batch)
    return {"last_hidden_state": packed.padded(out["last_hidden_state"].squeeze(1))}


def classify(model: nn.Module, batch: Mapping[str, Tensor], names: Sequence[str]) -> list[Float[Tensor, " labels"]]:
    """Logits of every row of a mixed batch under the adapter that ``names`` gives it, each over its own labels."""
    logits: list[Any] = [None] * len(names)
    for _, rows, values in grouped(model, batch, names):
        for row, value in zip(rows, values, strict=True):
            logits[row] = value
    return logits

"""``infuse calibrate``: confidences that mean what they say, and a threshold below which a text is out of scope.

One number each, kept with the head. The temperature T minimises the negative log-likelihood of ``softmax(z/T)`` on
labelled rows that were not trained on (Guo et al. 2017, arXiv:1706.04599); below the threshold, the highest probability
means that no label fits (Hendrycks & Gimpel 2017, arXiv:1610.02136).
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.optimize import minimize_scalar
from torch import Tensor

from infuse import storage
from infuse.calibrating.settings import CalibrateConfig
from infuse.checkpoint import amend, header
from infuse.data import Rows, digest, read, splits_of
from infuse.data.check import check_texts
from infuse.data.folder import canonical
from infuse.data.read import has_splits
from infuse.errors import InfuseError
from infuse.heads import TEMPERATURES
from infuse.texts import logits, tokenize
from infuse.training.folders import data_of, owner, saved_adapter
from infuse.training.predictor import Predictor, open_run

FEWEST = 20
"""Rows below which nothing is fitted: one of them would be more than the twentieth that is refused by default."""
_KEEP = 0.95
_EASY = "Every row is answered rightly, which tells no temperature: it stays 1. Give more rows, or harder ones."
_STEPS = 10_000  # thresholds have four decimals: finer than any measured share, and short to write down


@dataclass(frozen=True)
class Calibration:
    """What was fitted, and what it does to the very rows that it was fitted to; pairs are before and after."""

    temperature: float
    threshold: float
    data: str
    rows: int
    accuracy: float
    nll: tuple[float, float]
    ece: tuple[float, float]
    kept: float | None = None
    """Share of the rows that the threshold keeps; ``None`` in multi-label mode."""
    out_of_scope: str | None = None
    out_of_scope_rows: int = 0
    refused: float | None = None
    """Share of the out-of-scope texts that the threshold refuses."""
    notes: tuple[str, ...] = ()


def calibrate(config: CalibrateConfig) -> Calibration:
    """Fit temperature and threshold, and write them into the adapter's file.

    Raises:
        InfuseError: rows that are too few, of one label, trained on, or of labels that the adapter does not know.
    """
    if config.keep is not None and not 0 < config.keep <= 1:
        raise InfuseError(f"--keep must be above 0 and at most 1, not {config.keep:g}.")
    if config.keep is not None and config.out_of_scope is not None:
        raise InfuseError("Give --keep or --out-of-scope, not both: either alone decides the threshold.")
    adapter = saved_adapter(config.run)
    with storage.writing(owner(adapter)):
        return _calibrated(config, adapter)


def _calibrated(config: CalibrateConfig, adapter: Path) -> Calibration:
    rows = _rows(config, adapter)
    outside = None
    if config.out_of_scope is not None:
        outside = read(config.out_of_scope, text=config.text, split=config.split, labelled=False).texts
        check_texts(outside, config.out_of_scope)
        _enough(len(outside), f"{config.out_of_scope} has", "texts")
    predictor = open_run(config.run, config.base)
    if predictor.multi and not (outside is None and config.keep is None):
        raise InfuseError("The run gives each text several labels, or none: it needs no --out-of-scope and no --keep.")
    found = _fit(predictor, rows, outside, config)
    told = {k: v for k, v in asdict(found).items() if k not in ("temperature", "threshold")}  # those: in the head
    amend(
        adapter,
        head={"temperature": found.temperature, "threshold": found.threshold},
        info={"calibration": told},
    )
    return found


def fit_temperature(z: Tensor, targets: Tensor, multi: bool = False) -> float:
    """The T > 0 that minimises the negative log-likelihood; 1 if none is better.

    The likelihood is log-concave in 1/T, hence one minimum over log T. Where no answer is wrong, the best T is 0, which
    says no more than that the rows are too easy to tell: it stays 1.
    """
    z = z.double()
    decided = (z >= 0).to(targets) if multi else z.argmax(-1)
    if torch.equal(decided, targets):
        return 1.0
    low, high = np.log(TEMPERATURES)
    best: Any = minimize_scalar(
        lambda u: log_loss(z / np.exp(u), targets, multi), bounds=(low, high), method="bounded", options={"xatol": 1e-6}
    )
    temperature = float(np.clip(np.exp(best.x), *TEMPERATURES))
    return temperature if best.fun < log_loss(z, targets, multi) else 1.0


def log_loss(z: Tensor, targets: Tensor, multi: bool = False) -> float:
    """Mean negative log-likelihood of the targets under logits z."""
    if multi:
        return float(torch.nn.functional.binary_cross_entropy_with_logits(z.double(), targets.double()))
    return float(torch.nn.functional.cross_entropy(z.double(), targets))


def calibration_error(confidence: np.ndarray, right: np.ndarray, bins: int = 15) -> float:
    """``Σ_b |b|/n · |accuracy(b) − mean confidence(b)|`` over bins of equal width (Guo et al. 2017, equation 3)."""
    at = np.minimum((confidence * bins).astype(int), bins - 1)
    gap = np.bincount(at, weights=right - confidence, minlength=bins)
    return float(np.abs(gap).sum() / len(confidence))


def choose_threshold(inside: np.ndarray, outside: np.ndarray | None = None, keep: float = _KEEP) -> float:
    """A threshold for the confidences of texts in scope, with or without examples of texts that are not.

    Without: the largest that keeps the share ``keep`` of those in scope. With: the one that maximises the mean of the
    share kept and the share refused (Youden 1950); where several do, the middle of the lowest range of them.
    """
    thresholds = np.arange(_STEPS) / _STEPS
    kept = 1 - _below(inside, thresholds)
    if outside is None:
        return float(thresholds[np.flatnonzero(kept >= keep - 1e-12)[-1]])
    gain = kept + _below(outside, thresholds)
    best = np.flatnonzero(gain >= gain.max() - 1e-12)
    gaps = np.flatnonzero(np.diff(best) > 1)
    run = best[: gaps[0] + 1] if len(gaps) else best
    return float(thresholds[run[len(run) // 2]])


def _below(confidence: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
    """Share of the confidences below each threshold."""
    return np.searchsorted(np.sort(confidence), thresholds, side="left") / len(confidence)


def _fit(predictor: Predictor, rows: Rows, outside: Sequence[str] | None, config: CalibrateConfig) -> Calibration:
    encoded, head, multi = predictor.encoded(rows), predictor.head, predictor.multi

    def raw(tokens: list[list[int]]) -> Tensor:
        return logits(predictor.base.model, tokens, predictor.base.pad_id, predictor.adapter)

    z, targets = raw(encoded.tokens), encoded.targets
    temperature = fit_temperature(z, targets, multi)
    nll, ece, confidence, right = [], [], np.empty(0), np.empty(0)
    for each in (1.0, temperature):  # before is without any calibration, so that doing it again changes nothing
        head.calibrate(each, 0.0)
        confidence, right = _decisions(head.probabilities(z).numpy(), targets.numpy(), multi)
        nll.append(log_loss(z.double() / each, targets, multi))
        ece.append(calibration_error(confidence.ravel(), right.ravel()))
    found = Calibration(
        temperature=temperature,
        threshold=0.0,
        data=config.data or "the run's validation rows",
        rows=len(rows),
        accuracy=float(right.reshape(len(rows), -1).all(1).mean()),
        nll=(nll[0], nll[1]),
        ece=(ece[0], ece[1]),
        notes=(_EASY,) if right.all() else (),
    )
    if multi:
        return found
    beyond = None
    if outside is not None:
        beyond = head.probabilities(raw(tokenize(predictor.base.tokenizer, outside, predictor.max_length)))
        beyond = beyond.numpy().max(1)
    threshold = choose_threshold(confidence, beyond, _KEEP if config.keep is None else config.keep)
    found = replace(found, threshold=threshold, kept=float((confidence >= threshold).mean()))
    if beyond is None:
        return found
    refused = float((beyond < threshold).mean())
    return replace(found, out_of_scope=config.out_of_scope, out_of_scope_rows=len(beyond), refused=refused)


def _decisions(probabilities: np.ndarray, targets: np.ndarray, multi: bool) -> tuple[np.ndarray, np.ndarray]:
    """Confidence of every decision and whether it is right: one a row, or one a row and label."""
    if not multi:
        return probabilities.max(1), probabilities.argmax(1) == targets
    return np.maximum(probabilities, 1 - probabilities), (probabilities >= 0.5) == targets.astype(bool)


def _rows(config: CalibrateConfig, adapter: Path) -> Rows:
    trained = data_of(config.run)
    if config.data is None:
        if not trained:
            raise InfuseError(f"{config.run} has no whole config.yaml to find its validation rows by: give --data.")
        splits, _ = splits_of(trained)
        known = header(adapter)["info"].get("data_sha256")  # none if the adapter is not that of a run
        if known not in (None, digest(splits.train, splits.validation)):
            raise InfuseError(
                f"{trained['data']} has changed since the run was trained, so that its validation rows can't be told "
                "from those it was trained on: give --data with other rows."
            )
        rows = splits.validation
    else:
        same = bool(trained) and Path(config.data).resolve() == Path(trained["data"]).resolve()
        if same and (canonical(config.split) == "train" or not has_splits(config.data)):
            raise InfuseError(
                f"The run was trained on rows of {config.data}, where it looks surer than it is: leave out --data to "
                "use its validation rows, or give other rows."
            )
        rows = read(config.data, text=config.text, label=config.label, split=config.split, multi=config.multi)
    _enough(len(rows), "there are", "rows")
    if not rows.multi and len(rows.counts) < 2:
        raise InfuseError(f"The rows have only one label ({rows.label_set[0]}): give rows of several.")
    return rows


def _enough(count: int, whose: str, what: str) -> None:
    if count < FEWEST:
        raise InfuseError(f"Calibrating needs {FEWEST} {what} or more, but {whose} {count}.")

"""One run of ``infuse recommend``: arithmetic, then the weights and the race if there is data, then the answer."""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from infuse import storage
from infuse.bases import BaseModel, load_base, outline, tokenizer_of
from infuse.comparing.costs import latency
from infuse.data import Splits, splits_of
from infuse.errors import InfuseError
from infuse.heads import Head
from infuse.memory import resident
from infuse.merging import merge
from infuse.model import attach, detach
from infuse.precision import dtype_of, name_of
from infuse.recommending.answer import Findings, Verdict, decide, train_config
from infuse.recommending.arithmetic import Cost, Task, cost
from infuse.recommending.candidates import Candidate, candidates
from infuse.recommending.limits import misses
from infuse.recommending.page import report
from infuse.recommending.race import race
from infuse.recommending.settings import RecommendConfig
from infuse.report import Report, put
from infuse.sites import find_sites
from infuse.texts import Tokens, tokenize
from infuse.training.config import TrainConfig
from infuse.training.folders import ADAPTER, as_yaml, check_folder
from infuse.training.settings import Settings

CONFIG, TRAIN = "recommend.yaml", "train.yaml"
RESERVE = 4.0
"""Seconds kept for the report and for ending the process, beside a share of the time."""
Say = Callable[[str], None]


@dataclass
class Recommendation:
    """The answer: how to train, or ``None`` if nothing meets the constraints, and the report in the folder."""

    folder: Path
    train: TrainConfig | None
    report: Report
    costs: dict[str, Cost]
    """What each candidate takes, by its name."""
    verdict: Verdict | None


def recommend(config: RecommendConfig, *, say: Say = lambda _: None, spent: float = 0.0) -> Recommendation:
    """Find a method and its settings for constraints, and write the report.

    Args:
        config: the constraints, and the data if there is any.
        say: gets a line about what goes on, and warnings.
        spent: seconds of the time budget that are over already (the command line's start).
    Raises:
        InfuseError: data, base or settings that cannot work, before anything is written. Constraints that nothing meets
            are an answer, not an error.
    """
    began, runtime = time.perf_counter() - spent, resident()
    config.check()
    end = began + config.seconds
    folder = config.folder()
    _check_folder(folder)  # before it is made
    with storage.writing(folder):
        _check_folder(folder)
        return _recommended(config, runtime, end, say)


def _check_folder(folder: Path) -> None:
    check_folder(folder, (storage.current(folder) / CONFIG).exists())


def _recommended(config: RecommendConfig, runtime: int, end: float, say: Say) -> Recommendation:
    folder = config.folder()
    splits, task, tokens, remarks = _read(config)
    for remark in remarks:
        say(f"warning: {remark}")
    found = _count(config, task, runtime, end)
    found.remarks = [f"About the data: {remark}" for remark in remarks]
    say(f"{len(found.costs)} candidates counted, {len(found.able)} of them meet the constraints")
    if splits is not None and found.able:
        _race(config, found, splits, tokens, end, say)
    verdict = decide(found)
    answer = report(found, verdict)
    train = train_config(found, verdict.chosen) if verdict else None
    with storage.replacing(folder, (TRAIN,)) as new:
        put(answer, new)
        storage.write(new / CONFIG, as_yaml(config))
        if train:
            storage.write(new / TRAIN, as_yaml(train))
    return Recommendation(folder, train, answer, {c.name: each for c, each in found.costs.items()}, verdict)


def _read(config: RecommendConfig) -> tuple[Splits | None, Task, Tokens, list[str]]:
    """The rows, what of them costs memory, the tokens of validation, and warnings."""
    if config.data is None:
        return None, Task(config.labels, config.max_length, multi=config.multi), [], []
    splits, warnings = splits_of(vars(config))
    splits = replace(splits, test=None)
    tokenizer = tokenizer_of(config.base)
    train, validation = (tokenize(tokenizer, r.texts, config.max_length) for r in (splits.train, splits.validation))
    lengths = [len(ids) for ids in (*train, *validation)]
    task = Task(len(splits.train.label_set), max(lengths), sum(lengths), splits.train.multi)
    return splits, task, validation, warnings


def _count(config: RecommendConfig, task: Task, runtime: int, end: float) -> Findings:
    precision = name_of(dtype_of(config.precision))
    base = outline(config.base, precision)
    task = replace(task, length=min(task.length, _positions(base)))
    fitting, unfit = candidates(find_sites(base.model), config.methods)
    if not fitting:
        raise InfuseError(next(iter(unfit.values())))
    costs: dict[Candidate, Cost] = {}
    now = time.perf_counter()
    until = now + (end - RESERVE - now) * (0.4 if config.data else 0.9)  # the race needs its share
    for candidate in fitting:
        if costs and time.perf_counter() > until:
            break
        whole = candidate.method.unfreezes
        own = outline(config.base, "fp32") if whole and precision != "fp32" else base
        costs[candidate] = cost(own, _settings(config, candidate), task, tasks=config.tasks, limit=config.memory)
    broken = {candidate: misses(config, each) for candidate, each in costs.items()}
    return Findings(config, costs, unfit, fitting[len(costs) :], broken, {}, runtime)


def _positions(base: BaseModel) -> int:
    """The longest text that a base takes; some count positions from behind the padding's."""
    settings: Any = base.model.config
    known = getattr(settings, "max_position_embeddings", None) or getattr(settings, "n_positions", None)
    return known - (settings.pad_token_id or 0) - 1 if known else 10**9


def _race(config: RecommendConfig, found: Findings, splits: Splits, tokens: Tokens, end: float, say: Say) -> None:
    """Load the weights, measure latency if it is limited, and race those that are left."""
    base = load_base(config.base, precision=config.precision)
    base.model.to("cuda" if torch.cuda.is_available() else "cpu")
    if config.latency is not None:
        _measure_latency(config, found, base, tokens, end)
        say(f"{len(found.able)} candidates answer within {config.max_latency}")

    def settings(candidate: Candidate) -> Settings:
        return replace(_settings(config, candidate), max_tokens=found.costs[candidate].max_tokens)

    deadline = end - RESERVE - 0.04 * config.seconds
    found.race = race(base, splits, found.able, settings, deadline, say)


def _measure_latency(config: RecommendConfig, found: Findings, base: BaseModel, tokens: Tokens, end: float) -> None:
    able = found.able
    each = min(0.4, 0.2 * max(0.0, end - time.perf_counter()) / max(1, len(able)))
    for candidate in able:
        adapter = attach(base.model, candidate.method, ADAPTER, layers=candidate.layers)
        adapter.head = Head("cosine", ("a", "b"), base.width, base.pooling).to(next(base.model.parameters()).device)
        if "merge" in found.costs[candidate].abilities and "mix" not in config.must:
            merge(base.model, ADAPTER)
        found.latency[candidate] = latency(base, tokens, ADAPTER, each, sizes=(1,))["1"]
        detach(base.model)
        found.broken[candidate] = misses(config, found.costs[candidate], found.latency[candidate])


def _settings(config: RecommendConfig, candidate: Candidate) -> Settings:
    return config.settings(method=candidate.spec, layers=candidate.layers)

"""From the cells of a comparison to its report."""

import os
import platform
import statistics
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

import infuse
from infuse.comparing.cell import LOGISTIC, Cell, Task
from infuse.comparing.probe import BUNDLED, NEIGHBOURS
from infuse.comparing.settings import CompareConfig
from infuse.comparing.statistics import LEVEL, holm, measured, paired_p, seconds_to
from infuse.report import Column, Lines, Measured, Point, Report, Scatter, Series, Table
from infuse.settings import command
from infuse.training.config import TrainConfig

MARK = "*"
MIB = 2**20


@dataclass(frozen=True)
class Entry:
    """All seeds of one method on one base."""

    base: str
    method: str
    name: str
    cells: Sequence[Cell]
    right: np.ndarray
    """For every row, the share of seeds that got it right."""

    def values(self, get: Callable[[Cell], Any]) -> list[Any]:
        return [get(cell) for cell in self.cells]

    @property
    def accuracy(self) -> float:
        return statistics.fmean(self.values(lambda c: c["accuracy"]))

    @property
    def costs(self) -> Mapping[str, Any]:
        return next((cell["costs"] for cell in self.cells if cell.get("costs")), {})


def report_on(config: CompareConfig, task: Task, cells: Sequence[Cell], remarks: Sequence[str] = ()) -> Report:
    """The report of what has been measured so far; ``remarks`` join its notes."""
    labels = task.train.label_set
    targets = _targets(task, labels)
    entries = sorted(_entries(cells, targets), key=lambda entry: -entry.accuracy)
    below = _significant(entries)
    data, rows = Path(config.data).stem, task.reported
    budget = f"{config.epochs} epochs" if config.time is None else f"{config.time:g} s of training"
    tables = [_main_table(entries, below, len(config.base) > 1)]
    if entries and not task.train.multi and (confusions := _confusions(entries, task, labels)):
        tables.append(confusions)
    failed = [f"{c['method']} on {c['base']}, seed {c['seed']}, failed: {c['error']}" for c in cells if "error" in c]
    return Report(
        title=f"Methods compared on {data}",
        subtitle=f"{len(rows):,} {config.report_on} rows, {len(task.train):,} to train on, {len(labels)} labels; "
        f"{budget} a run, {config.seeds} {'seed' if config.seeds == 1 else 'seeds'}; base {', '.join(config.base)}",
        tables=tables,
        figures=_figures(entries),
        notes=[*_notes(config, task, entries, budget), *remarks, *failed],
        commands=_commands(config, entries),
    )


def _targets(task: Task, labels: Sequence[str]) -> list[Any]:
    rows = task.reported.label_sets()
    if task.train.multi:
        return [[int(label in row) for label in labels] for row in rows]
    return [labels.index(label) for (label,) in rows]


def _entries(cells: Sequence[Cell], targets: list[Any]) -> list[Entry]:
    groups: dict[tuple[str, str], list[Cell]] = {}
    for cell in cells:
        if "error" not in cell:
            groups.setdefault((cell["base"], cell["method"]), []).append(cell)
    several = len({base for base, _ in groups}) > 1
    entries = []
    for (base, method), own in groups.items():
        right = np.mean([[p == t for p, t in zip(c["predicted"], targets, strict=True)] for c in own], axis=0)
        name = f"{method}, {Path(base).name}" if several else method
        entries.append(Entry(base, method, name, own, right))
    return entries


def _significant(entries: Sequence[Entry]) -> set[str]:
    """Names of those that are worse than the best by more than chance explains."""
    if not entries:
        return set()
    p = {entry.name: paired_p(entries[0].right, entry.right) for entry in entries[1:]}
    return {name for name, value in holm(p).items() if value < LEVEL}


COLUMNS = (
    Column("accuracy %", ".2f", "mean ± standard deviation over seeds"),
    Column("macro-F1 %", ".2f", "mean ± standard deviation over seeds"),
    Column("trained parameters", ",d", "head included"),
    Column("% of base", ".3f", "trained parameters, head included, against those of the base"),
    Column("file kB", ",.0f", "all files that hold what was trained; the whole model for full"),
    Column("saved kB/token", ",.1f", "bytes kept between forward and backward, per real token of a batch"),
    Column("peak MiB", ",.0f", "growth of a fresh process over the loaded base, training on the longest rows"),
    Column("step ms", ",.1f", "median over the steps of a run, then the mean over seeds"),
    Column("training s", ",.1f", "without evaluations and checkpoints"),
    Column("s to 99 %", ",.1f", "seconds of training until 99 % of its own best accuracy on validation"),
    Column("latency 1, ms", ",.2f", "median of a call with one row, adapter unmerged"),
    Column("latency 32, ms", ",.1f", "median of a call with 32 rows, adapter unmerged"),
    Column("merged 1, ms", ",.2f", "the same with the adapter folded into the base"),
    Column("merged 32, ms", ",.1f", "the same with the adapter folded into the base"),
    Column("mixed batch", "", "whether rows of one batch can use different adapters, tried"),
    Column("mergeable", "", "whether the adapter folds into the base's weights, tried"),
    Column("fusable", "", "whether AdapterFusion can mix it, tried"),
    Column("forgetting", "+.1f", "points of probe accuracy lost while the adapter is active"),
    Column("base restored", "", "whether the base is bit for bit as before once the adapter is detached"),
)


def _main_table(entries: Sequence[Entry], below: set[str], several: bool) -> Table:
    base = [Column("base")] if several else []
    rows = [[e.method, *([e.base] if several else []), *_row(e, e.name in below)] for e in entries]
    caption = (
        f"{MARK} worse than the best by more than chance explains: paired sign-flip test over the rows, p < {LEVEL} "
        "after Holm's correction; those without the mark can't be told from the best on these rows. ± is the standard "
        "deviation over seeds. Forgetting: points of probe accuracy lost, so that a negative number is a gain. – means "
        "that there is nothing to measure."
    )
    return Table("Results", [Column("method"), *base, *COLUMNS], rows, caption)


def _row(entry: Entry, below: bool) -> list[Any]:
    costs, latency = entry.costs, entry.costs.get("latency", {})
    merged = costs.get("merged") or {}
    parameters = entry.cells[0]["parameters"]
    trains = "curve" in entry.cells[0]

    def over_seeds(get: Callable[[Cell], float], mark: str = "") -> Measured:
        return measured(entry.values(get), mark)

    def scaled(name: str, unit: float) -> float | None:
        return None if costs.get(name) is None else costs[name] / unit

    return [
        over_seeds(lambda c: 100 * c["accuracy"], MARK if below else ""),
        over_seeds(lambda c: 100 * c["macro_f1"]),
        parameters["trained"],
        100 * parameters["trained"] / parameters["base"],
        scaled("file", 1e3),
        scaled("saved_per_token", 1e3),
        scaled("peak", MIB),
        over_seeds(lambda c: c["step_ms"]) if trains else None,
        over_seeds(lambda c: c["seconds"]),
        over_seeds(lambda c: seconds_to(c["curve"])) if trains else None,
        latency.get("1"),
        latency.get("32"),
        merged.get("1"),
        merged.get("32"),
        costs.get("mixed"),
        costs.get("mergeable"),
        costs.get("fusable"),
        over_seeds(lambda c: 100 * (c["probe"]["bare"] - c["probe"]["adapted"])),
        all(entry.values(lambda c: c["restored"])),
    ]


def _figures(entries: Sequence[Entry]) -> list[Scatter | Lines]:
    trained = [entry for entry in entries if entry.method != LOGISTIC]
    if not trained:
        return []
    levels = {entry.name: 100 * entry.accuracy for entry in entries if entry.method == LOGISTIC}
    y = "accuracy, %"

    def scatter(title: str, x: str, get: Callable[[Entry], list[float]], log: bool) -> Scatter:
        points = []
        for entry in trained:
            if given := get(entry):
                at, up = measured(given), measured(entry.values(lambda c: 100 * c["accuracy"]))
                points.append(Point(entry.name, at.value, up.value, at.sd or 0.0, up.sd or 0.0))
        return Scatter(title, x, y, points, log, levels)

    def curve(title: str, x: str, key: str) -> Lines:
        return Lines(title, x, "validation accuracy, %", [_course(entry, key) for entry in trained])

    return [
        scatter(
            "Accuracy and trained parameters", "trained parameters",
            lambda e: [e.cells[0]["parameters"]["trained"]], True,
        ),
        scatter(
            "Accuracy and memory", "peak of training over the loaded base, MiB",
            lambda e: [e.costs["peak"] / MIB] if e.costs.get("peak") else [], True,
        ),
        scatter("Accuracy and time", "training, s", lambda e: e.values(lambda c: c["seconds"]), True),
        curve("Learning curves over epochs", "epoch", "epoch"),
        curve("Learning curves over time", "training, s", "seconds"),
    ]  # fmt: skip


def _course(entry: Entry, key: str) -> Series:
    """The mean course of all seeds, as far as the shortest goes."""
    points = list(zip(*entry.values(lambda c: c["curve"]), strict=False))
    x = [statistics.fmean(each[key] for each in group) for group in points]
    return Series(entry.name, x, [statistics.fmean(100 * each["accuracy"] for each in group) for group in points])


def _confusions(entries: Sequence[Entry], task: Task, labels: Sequence[str], most: int = 15) -> Table | None:
    """The pairs of labels that all runs together confuse most, with the texts that most of them get wrong."""
    runs = [(entry, cell) for entry in entries for cell in entry.cells]
    pairs: Counter[tuple[int, int]] = Counter()
    best: Counter[tuple[int, int]] = Counter()
    texts: dict[tuple[int, int], Counter[str]] = {}
    targets = _targets(task, labels)
    for entry, cell in runs:
        for target, predicted, text in zip(targets, cell["predicted"], task.reported.texts, strict=True):
            if target != predicted:
                pair = (target, predicted)
                pairs[pair] += 1
                best[pair] += entry is entries[0]
                texts.setdefault(pair, Counter())[text] += 1
    if not pairs:
        return None
    columns = [
        Column("true label"),
        Column("taken for"),
        Column("errors a run", ".1f", "mean over all methods and seeds"),
        Column("of the best", ".1f", "mean over the seeds of the best method"),
        Column("texts", "", "those that most runs get wrong, and how many of them"),
    ]
    rows = []
    for pair, count in pairs.most_common(most):
        shown = tuple(f"{text} ({n} of {len(runs)})" for text, n in texts[pair].most_common(3))
        rows.append(
            [labels[pair[0]], labels[pair[1]], count / len(runs), best[pair] / len(entries[0].cells), shown]
        )  # fmt: skip
    return Table(
        "Confused pairs", columns, rows,
        f"The {len(rows)} pairs with the most errors of {len(pairs)}; the best method is {entries[0].name}. A text "
        "that every run gets wrong may well carry the wrong label.",
    )  # fmt: skip


def _notes(config: CompareConfig, task: Task, entries: Sequence[Entry], budget: str) -> list[str]:
    notes = [
        f"Every run trains for {budget} at the method's own default learning rate, without early stopping; the epoch "
        "with the best macro-F1 on validation is kept."
    ]
    if config.report_on == "validation":
        notes.append(
            "The rows reported on are those that the epoch was chosen by: all figures are a little too good. "
            "--report-on test shows rows that nothing was chosen by."
        )
    if config.time is not None:
        notes.append(
            "The number of epochs is the largest that fits by the median of a few steps, and at least one; a run that "
            "still needs longer ends when its time is up."
        )
    bare = {entry.base: entry.cells[0]["probe"]["bare"] for entry in reversed(entries)}
    source = "bundled sentences on everyday topics" if config.probe == BUNDLED else f"rows of {Path(config.probe).name}"
    notes.append(
        f"Forgetting: {len(task.probe)} {source} in {len(task.probe.label_set)} groups, which no run trains on; each "
        f"row is given the label that its {NEIGHBOURS} nearest neighbours vote for. The bare base gets "
        + ", ".join(f"{100 * value:.1f} % ({Path(base).name})" for base, value in bare.items())
        + f"; one row is {100 / len(task.probe):.1f} points."
    )
    runs = [(entry, cell) for entry in entries if entry.method != LOGISTIC for cell in entry.cells]
    kept = [entry.name for entry, cell in runs if cell["restored"]]
    if kept:
        notes.append(
            f"After detaching, the base was bit for bit what it was before in {len(kept)} of {len(runs)} runs"
            + (" (all)." if len(kept) == len(runs) else f"; not with {_others(runs)}, which changes the base itself.")
        )
    notes += [
        "Logistic regression stands on the bare base's features; its latency is that of the bare base, its training "
        "time the one fit and the features that were not computed before.",
        "Peak memory comes from a fresh process per method; times depend on what else the machine does, and are "
        "comparable within this report only.",
        _machine(),
    ]
    return notes


def _others(runs: Sequence[tuple[Entry, Cell]]) -> str:
    return ", ".join(dict.fromkeys(entry.name for entry, cell in runs if not cell["restored"]))


def _commands(config: CompareConfig, entries: Sequence[Entry]) -> list[str]:
    """The command of the comparison, and one per method that repeats its first run."""
    same = (
        "data", "validation", "test", "text", "label", "multi", "validation_fraction", "layers", "head", "pooling",
        "batch_size", "max_length", "class_weights", "precision",
    )  # fmt: skip
    own = {name: getattr(config, name) for name in same}
    commands = [command("compare", config)]
    for entry in entries:
        if entry.method != LOGISTIC:
            first = entry.cells[0]
            run = TrainConfig(
                **own, base=entry.base, method=entry.method, seed=first["seed"], epochs=first["epochs"], patience=0
            )
            commands.append(command("train", run))
    return commands


def _machine() -> str:
    processor, cpuinfo = platform.processor() or platform.machine(), Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        processor = names[0] if names else processor
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else processor
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return (
        f"Measured on {device} (cores: {cores}, threads: {torch.get_num_threads()}); torch {torch.__version__}, "
        f"transformers {transformers.__version__}, Infuse {infuse.__version__}; report of {time.strftime('%Y-%m-%d')}."
    )

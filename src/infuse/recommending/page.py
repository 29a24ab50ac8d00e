"""The report of a recommendation: the answer above the table of all candidates."""

import statistics
from pathlib import Path

from infuse.comparing.cell import LOGISTIC
from infuse.comparing.statistics import paired_p
from infuse.recommending.answer import Findings, Verdict, train_config, words
from infuse.recommending.candidates import Candidate
from infuse.recommending.race import FINALISTS, Race, Score
from infuse.report import Column, Point, Report, Scatter, Table
from infuse.report.model import Cell
from infuse.settings import command


def report(found: Findings, verdict: Verdict | None) -> Report:
    """Answer, table of all candidates, figure, notes and commands."""
    config, rounds = found.config, found.race.rounds if found.race else []
    columns = [
        Column("candidate"),
        Column("parameters", ",d", "trained in the transformer, without the head"),
        Column("% of base", ".3f", "the same against the base"),
        Column("head", ",d", "parameters of the head"),
        Column("file kB", ",.0f", "weights of adapter and head in float32; a description adds some kB"),
        Column("saved kB/token", ",.1f", "kept between forward and backward, per token of a step of the longest rows"),
        Column("training MB", ",.0f", "tensors at the peak of training, base included"),
        Column("serving MB", ",.0f", f"tensors in serving {config.tasks:,} of them, base included"),
        *([Column("latency ms", ".1f", "a call with one row")] if found.latency else []),
        Column("allows", "", "merge into the base, mix in one batch, fuse"),
        *(
            Column(f"round {i + 1}", ".2f", f"macro-F1 % on validation after training on {r.rows:,} rows")
            for i, r in enumerate(rounds)
        ),
        Column("verdict"),
    ]
    ordered = sorted([*found.costs, *found.uncounted, *found.unfit], key=lambda c: _place(found, verdict, c))
    rows: list[list[Cell]] = []
    for candidate in ordered:
        cost = found.costs.get(candidate)
        counts: list[Cell] = [None] * 8
        if cost is not None:
            counts = [
                cost.adapter, 100 * cost.adapter / cost.base, cost.head, cost.file / 1e3, cost.per_token / 1e3,
                cost.training / 1e6, cost.serving / 1e6, " ".join(sorted(cost.abilities)) or None,
            ]  # fmt: skip
        latency = [found.latency.get(candidate)] if found.latency else []
        scores = [_score(each.scores.get(candidate)) for each in rounds]
        rows.append([candidate.name, *counts[:7], *latency, counts[7], *scores, _verdict(found, verdict, candidate)])
    if any(each.logistic for each in rounds):
        empty: list[Cell] = [None] * (len(columns) - 2 - len(rounds))
        rows.append([LOGISTIC, *empty, *(_score(each.logistic) for each in rounds), "the number to beat"])
    where = f"{Path(config.data).stem} and {config.base}" if config.data else f"{config.base}, by arithmetic alone"
    limits = {"max_params", "max_memory", "max_latency", "must", "tasks"}
    asked = [part for part in command("", config).split(" --")[1:] if part.split()[0].replace("-", "_") in limits]
    return Report(
        title=f"A method for {where}",
        subtitle=f"Constraints: {', '.join(asked) or 'none'}; within {config.time}",
        answer=words(found, verdict),
        tables=[Table("Candidates", columns, rows)],
        figures=_figures(found),
        notes=_notes(found),
        commands=[
            command("recommend", config),
            *([command("train", train_config(found, verdict.chosen))] if verdict else []),
        ],
    )


def _place(found: Findings, verdict: Verdict | None, candidate: Candidate) -> tuple:
    """The chosen one, then by how far it came and its score there, then what fits, then what is ruled out."""
    scores = [
        each.scores[candidate].macro_f1
        for each in (found.race.rounds if found.race else [])
        if candidate in each.scores
    ]
    return (
        verdict is None or candidate != verdict.chosen,
        -len(scores),
        -scores[-1] if scores else 0.0,
        candidate not in found.able,
        candidate not in found.costs,
        max((m.ratio for m in found.broken.get(candidate, [])), default=0.0),
        candidate.tier,
    )


def _verdict(found: Findings, verdict: Verdict | None, candidate: Candidate) -> str:
    race = found.race
    if verdict and candidate == verdict.chosen:
        return "recommended"
    if candidate in found.unfit:
        return f"ruled out: {found.unfit[candidate]}"
    if candidate in found.uncounted:
        return "not counted: no time"
    if candidate.method.unfreezes:
        return "for contrast: it trains the base itself, and is no adapter"
    if broken := found.broken[candidate]:
        return f"ruled out: {'; '.join(miss.why for miss in broken)}"
    if race is None or not race.rounds:
        return "fits"
    if candidate in race.failed:
        return f"failed: {race.failed[candidate]}"
    rounds = [i for i, each in enumerate(race.rounds) if candidate in each.scores]
    if not rounds:
        return "fits; no time to try it"
    if verdict and candidate in verdict.p:
        p = verdict.p[candidate]
        return "the best score" if p == 1.0 and _leads(race, candidate) else f"in the final (p = {p:.2g})"
    reached = race.rounds[rounds[-1]]
    p = paired_p(reached.scores[reached.ranked[0]].right, reached.scores[candidate].right)
    return f"left behind in round {rounds[-1] + 1} (p = {p:.2g})"


def _leads(race: Race, candidate: Candidate) -> bool:
    rounds = race.decisive
    mean = {c: statistics.fmean(r.scores[c].macro_f1 for r in rounds) for c in rounds[-1].scores}
    return max(mean, key=lambda c: mean[c]) == candidate


def _figures(found: Findings) -> list[Scatter]:
    if not found.race or not found.race.rounds:
        return []
    first = found.race.rounds[0]  # all of them have a score there
    points = [Point(c.name, found.costs[c].adapter, 100 * s.macro_f1) for c, s in first.scores.items()]
    lines = {LOGISTIC: 100 * first.logistic.macro_f1} if first.logistic else {}
    log = all(point.x > 0 for point in points)
    title = f"Macro-F1 in round 1, on {first.rows:,} rows, and parameters"
    return [Scatter(title, "parameters in the transformer", "macro-F1 on validation, %", points, log, lines)]


def _notes(found: Findings) -> list[str]:
    notes = [
        "Parameters and bytes are counted on the base's outline, from its configuration alone. Memory is that of all "
        "tensors at the peak of a training step on the longest rows (or of an evaluation), with base, adapter, "
        "gradients, AdamW's two moments and remembered layers, as operations on a CPU make them. It does not count "
        f"Python and its libraries ({found.runtime / 1e6:,.0f} MB in this process before data and weights), nor the "
        "kernels and buffers that a matrix library keeps for every shape of batch.",
    ]
    if not found.config.data:
        notes.append(
            f"Without data, every text is taken to have {found.config.max_length} tokens and the head "
            f"{found.config.labels} labels (--max-length, --labels)."
        )
    if found.race and found.race.rounds:
        notes.append(
            f"The race: every candidate trains anew in each round, for {found.config.epochs} epochs at its own "
            "learning rate, on rows with every label in them; the better half by macro-F1 on "
            f"{found.race.validated:,} validation rows goes on to twice the rows, and of {FINALISTS} or fewer all are "
            "run again while time is left. p is that of a paired sign-flip test over rows against the best of the "
            "round, in the final after Holm's correction."
        )
    return [*notes, *found.remarks]


def _score(score: Score | None) -> float | None:
    return None if score is None else 100 * score.macro_f1

"""From what was counted and raced to the answer: the choice, its reasons in plain words, and how sure that is."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from infuse.comparing.statistics import LEVEL, holm, paired_p
from infuse.recommending.arithmetic import Cost
from infuse.recommending.candidates import Candidate
from infuse.recommending.limits import Miss, nearest
from infuse.recommending.race import FINALISTS, Race
from infuse.recommending.settings import RecommendConfig
from infuse.training.config import TrainConfig
from infuse.training.settings import Settings


@dataclass
class Findings:
    """Everything that is known of the candidates when the answer is written."""

    config: RecommendConfig
    costs: dict[Candidate, Cost]
    unfit: Mapping[Candidate, str]
    uncounted: Sequence[Candidate]
    """Candidates that there was no time to count."""
    broken: dict[Candidate, list[Miss]]
    latency: dict[Candidate, float]
    runtime: int
    """Bytes of the process before data and weights."""
    race: Race | None = None
    remarks: list[str] = field(default_factory=list)

    @property
    def able(self) -> list[Candidate]:
        """Those that meet all constraints, in the order in which they are tried: the methods' own settings first, of
        equals those that need least memory, and a head alone after other methods.
        """
        able = [c for c in self.costs if not self.broken[c] and not c.method.unfreezes]
        return sorted(able, key=lambda c: (c.tier, not self.costs[c].adapter, self.costs[c].training))


@dataclass(frozen=True)
class Verdict:
    """The choice, why it, and how sure that is."""

    chosen: Candidate
    why: str
    sure: str
    p: Mapping[Candidate, float] = field(default_factory=dict)
    """Finalist → p of its distance to the best one."""


def decide(found: Findings) -> Verdict | None:
    """The recommendation; ``None`` if nothing meets the constraints."""
    if not found.able:
        return None
    if found.race is None or not found.race.decisive:
        return _by_arithmetic(found)
    race, rounds = found.race, found.race.decisive
    last = rounds[-1]
    leaders = last.ranked[:FINALISTS]
    f1 = {c: statistics.fmean(r.scores[c].macro_f1 for r in rounds) for c in leaders}
    right = {c: np.mean([r.scores[c].right for r in rounds], axis=0) for c in leaders}
    best = max(f1, key=lambda c: f1[c])
    p = holm({c.name: paired_p(right[best], right[c]) for c in leaders if c != best})
    by_candidate = {c: p.get(c.name, 1.0) for c in leaders}
    equals = [c for c in leaders if by_candidate[c] >= LEVEL]
    chosen = min(equals, key=lambda c: (found.costs[c].adapter, found.costs[c].training))
    where = f"on {last.rows:,} rows, {len(rounds)} {'seeds' if len(rounds) > 1 else 'seed'}"
    if len(equals) == 1:
        why = f"It was the best of the race, with {_percent(f1[best])} macro-F1 on validation ({where})."
    elif chosen == best:
        why = (
            f"It had the best macro-F1 of the race, {_percent(f1[best])} ({where}), and is the cheapest of those near."
        )
    else:
        why = (
            f"{best.name} had the best macro-F1 of the race, {_percent(f1[best])} ({where}). {chosen.name} has "
            f"{_percent(f1[chosen])}, a difference that chance explains (p = {by_candidate[chosen]:.2f}), and trains "
            f"fewer parameters: {found.costs[chosen].adapter:,} instead of {found.costs[best].adapter:,}."
        )
    sure = [_distance(best, [c for c in leaders if c != best], by_candidate, race.validated), _course(race)]
    return Verdict(chosen, why, " ".join([*sure, *_to_beat(race, chosen)]), by_candidate)


def _by_arithmetic(found: Findings) -> Verdict:
    # A head alone adapts nothing: it is the answer only where there is no other.
    chosen = min(found.able, key=lambda c: (not found.costs[c].adapter, c.tier, found.costs[c].training))
    of = len(found.able)
    why = (
        f"Of {of} candidates that meet the constraints it is the one that "
        + ("keeps its method's own settings and " if not chosen.tier else "")
        + "needs the least memory to train."
        if of > 1
        else "It is the only candidate that meets the constraints."
    )
    told = (
        "The time was up before anything could be trained: which one is the most accurate is not known."
        if found.config.data
        else "This is arithmetic alone: no text was read and nothing trained, so that which candidate is the most "
        "accurate on your task is not known. With --data, a race on your rows decides."
    )
    return Verdict(chosen, why, told)


def _distance(best: Candidate, others: Sequence[Candidate], p: Mapping[Candidate, float], rows: int) -> str:
    if not others:
        return f"There was no other to compare {best.name} with."
    told = "; ".join(f"{c.name}: p = {p[c]:.2g}" for c in others)
    near = [c for c in others if p[c] >= LEVEL]
    verdict = (
        "the difference is more than chance explains"
        if not near
        else "they can't be told apart"
        if len(near) == len(others)
        else "some can't be told from it"
    )
    return f"Compared with {best.name} row by row on {rows:,} validation rows, {verdict} ({told})."


def _course(race: Race) -> str:
    last, parts = race.decisive[-1], []
    if len(last.entered) > FINALISTS or not race.rounds[-1].complete:
        parts.append("The time was up before the race was over")
    if race.left_out:
        parts.append(f"{len(race.left_out)} candidates that fit were not tried for want of time")
    if last.share < 1:
        parts.append(
            f"it trained on {100 * last.share:.0f} % of the rows at most, and on all of them the order may change"
        )
    close = sum(
        paired_p(r.scores[r.ranked[0]].right, r.scores[c].right) >= LEVEL
        for r, after in zip(race.rounds, race.rounds[1:], strict=False)
        for c in r.scores
        if c not in after.entered
    )
    if close:
        parts.append(f"{close} of those left behind were so near the best of their round that chance explains it")
    told = "; ".join(parts) or "the race came to its end on all rows"
    return f"{told[0].upper()}{told[1:]}."


def _to_beat(race: Race, chosen: Candidate) -> list[str]:
    pairs = [(r.scores[chosen], r.logistic) for r in race.decisive if r.logistic]
    if not pairs:
        return []
    own, other = (np.mean([each[i].right for each in pairs], axis=0) for i in (0, 1))
    p = paired_p(own, other)
    low = statistics.fmean(each.macro_f1 for _, each in pairs)
    verdict = "can't be told from" if p >= LEVEL else "beats" if own.mean() > other.mean() else "does not reach"
    return [
        f"It {verdict} the number to beat, logistic regression on the frozen base, which has {_percent(low)} macro-F1 "
        f"on the same rows (p = {p:.2g})."
    ]


def train_config(found: Findings, chosen: Candidate) -> TrainConfig:
    """What ``infuse train`` is to run."""
    limit = found.costs[chosen].max_tokens
    return found.config.to_train(method=chosen.spec, layers=chosen.layers, max_tokens=limit)


def words(found: Findings, verdict: Verdict | None) -> list[str]:
    """The answer in sentences."""
    config = found.config
    if verdict is None:
        return ["Nothing meets these constraints.", *nearest(found.broken, found.costs)]
    chosen, cost = verdict.chosen, found.costs[verdict.chosen]
    lines = [
        f"Train {chosen.name}: {cost.adapter:,} parameters in the transformer ({cost.percent:.3g} % of the base) and "
        f"{cost.head:,} in the head.",
        verdict.why,
    ]
    if cost.max_tokens != Settings.max_tokens:
        lines.append(
            f"Steps run in parts of {cost.max_tokens:,} tokens at once: the same gradient in less memory, but slower."
        )
    if config.max_params:
        limit = config.parameters(cost.base)
        lines.append(
            f"--max-params {config.max_params}: {cost.adapter:,} of at most {limit:,.0f}, the head not counted."
        )
    if config.max_memory:
        lines.append(
            f"--max-memory {config.max_memory}: tensors take {cost.training / 1e6:,.0f} MB in training (weights "
            f"{cost.weights / 1e6:,.0f}, saved for backward {cost.saved / 1e6:,.0f}) and {cost.serving / 1e6:,.0f} MB "
            f"in serving. Python and its libraries come on top: {found.runtime / 1e6:,.0f} MB here, and in training "
            "the kernels and buffers that the matrix library keeps."
        )
    if config.latency is not None:
        lines.append(f"--max-latency {config.max_latency}: a call with one row took {found.latency[chosen]:.1f} ms.")
    if config.must:
        lines.append(f"--must {' '.join(config.must)}: tried on the base's outline, and possible.")
    if config.tasks > 1:
        lines.append(
            f"{config.tasks:,} tasks are {config.tasks:,} files of {cost.file / 1e3:,.0f} kB ("
            f"{config.tasks * cost.file / 1e6:,.1f} MB), and one process that serves them all holds "
            f"{cost.serving / 1e6:,.0f} MB of tensors; {config.tasks:,} fully fine-tuned models would be "
            f"{config.tasks * cost.base * 4 / 1e6:,.0f} MB."
        )
        if "mix" in config.must and "merge" in cost.abilities:
            lines.append("While tasks share batches, its adapters must stay unmerged.")
    return [*lines, f"How sure: {verdict.sure}"]


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"

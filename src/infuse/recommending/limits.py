"""Which constraints a candidate breaks, by how much, and what would let one through."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil, inf

from infuse.recommending.arithmetic import Cost
from infuse.recommending.candidates import Candidate
from infuse.recommending.settings import RecommendConfig


@dataclass(frozen=True)
class Miss:
    """A constraint that is broken: the flag, why in words, and value over limit."""

    flag: str
    why: str
    value: float = inf
    limit: float = 1.0

    @property
    def ratio(self) -> float:
        return self.value / self.limit


BROKEN = {
    "merge": "it can't be merged: what it does depends on the input",
    "mix": "its tasks can't share a batch",
    "fuse": "it can't be fused: it is not added to the activation",
}


def misses(config: RecommendConfig, cost: Cost, latency: float | None = None) -> list[Miss]:
    """All constraints that a candidate breaks; latency counts once it is measured."""
    found = [Miss(f"--must {each}", BROKEN[each]) for each in config.must if each not in cost.abilities]
    values: list[tuple[str, float | None, float | None, Callable[[float], str], str]] = [
        ("--max-params", config.parameters(cost.base), cost.adapter, _count, ""),
        ("--max-memory", config.memory, cost.training, _bytes, " to train"),
        ("--max-memory", config.memory, cost.serving, _bytes, f" to serve {_tasks(config.tasks)}"),
        ("--max-latency", config.latency, latency, _ms, " a call"),
    ]
    for flag, limit, value, spell, what in values:
        if limit is not None and value is not None and value > limit:
            found.append(Miss(flag, f"{spell(value)}{what}, over {spell(limit)}", value, limit))
    return found


def nearest(broken: Mapping[Candidate, Sequence[Miss]], costs: Mapping[Candidate, Cost]) -> list[str]:
    """For constraints that nothing meets: the nearest miss, and what to change, in sentences."""
    open_ones = {c: list(m) for c, m in broken.items() if c in costs and not c.method.unfreezes}
    if not open_ones:
        return []
    closest = min(open_ones, key=lambda c: (max(m.ratio for m in open_ones[c]), len(open_ones[c]), c.tier))
    lines = [f"The nearest miss is {closest.name}: {'; '.join(m.why for m in open_ones[closest])}."]
    changes = []
    for flag in dict.fromkeys(m.flag for own in open_ones.values() for m in own):
        alone = {c: max(m.value for m in own) for c, own in open_ones.items() if {m.flag for m in own} == {flag}}
        if not alone:
            continue
        best = min(alone, key=lambda c: (alone[c], c.tier))
        if alone[best] == inf:
            changes.append(f"leave out {flag} ({best.name} then fits)")
        else:
            changes.append(f"raise {flag} to {_flag(flag, alone[best])} ({best.name} then fits)")
    if changes:
        lines.append(f"To get an answer, {', or '.join(changes)}.")
    else:
        flags = ", ".join(dict.fromkeys(m.flag for m in open_ones[closest]))
        lines.append(f"No change of one constraint is enough; for {closest.name}, relax {flags}.")
    return lines


def _flag(flag: str, value: float) -> str:
    """A value as the flag takes it, rounded up."""
    if flag == "--max-memory":
        return f"{ceil(value / 1e6)}MB"
    return f"{ceil(value)}ms" if flag == "--max-latency" else str(ceil(value))


def _tasks(count: int) -> str:
    return f"{count:,} tasks" if count > 1 else "it"


def _count(value: float) -> str:
    return f"{value:,.0f} parameters"


def _bytes(value: float) -> str:
    return f"{value / 1e6:,.0f} MB"


def _ms(value: float) -> str:
    return f"{value:.1f} ms"

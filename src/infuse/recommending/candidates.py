"""What there is to choose from: every method and preset, in the sizes that its own search space names."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch

from infuse.adapter import build
from infuse.comparing.settings import every_method
from infuse.errors import InfuseError
from infuse.method import Method, make
from infuse.sites import Site, select
from infuse.spaces import Choice
from infuse.training.settings import SPACE


@dataclass(frozen=True)
class Candidate:
    """A method with its settings, and the layers that it adapts.

    ``tier`` says how far it is from what the method's authors use: 0 its defaults, 1 another size, 2 fewer layers.
    """

    spec: str
    layers: str = "all"
    tier: int = 0

    @property
    def method(self) -> Method:
        return make(self.spec)

    @property
    def name(self) -> str:
        return self.spec if self.layers == "all" else f"{self.spec}, {self.layers}"


def candidates(sites: Sequence[Site], chosen: Sequence[str] = ()) -> tuple[list[Candidate], dict[Candidate, str]]:
    """All candidates for a model, defaults first; and of those that do not fit it, why.

    A setting makes a candidate if it changes the number of parameters: the rest is for ``infuse tune``.
    """
    fitting: list[Candidate] = []
    unfit: dict[Candidate, str] = {}
    seen: set[tuple[Method, str]] = set()
    counts: dict[str, int] = {}
    """Parameters of the methods as they were named."""
    for candidate, named in sorted(_named(chosen or every_method()), key=lambda each: each[0].tier):
        if (key := (candidate.method, candidate.layers)) in seen:
            continue
        seen.add(key)
        try:
            count = _count(candidate, sites)
        except InfuseError as error:
            if not candidate.tier:  # the other sizes of a method that does not fit would only repeat it
                unfit[candidate] = str(error)
            continue
        if candidate.tier != 1 or count != counts.get(named):
            fitting.append(candidate)
        counts.setdefault(named, count)
    return fitting, unfit


def _named(specs: Iterable[str]) -> Iterator[tuple[Candidate, str]]:
    """Candidates, each with the name that it was derived from."""
    layers = SPACE["layers"]
    assert isinstance(layers, Choice)
    for spec in specs:
        method, given = make(spec), spec.partition(":")[2]
        yield Candidate(spec), spec
        if not method.roles:
            continue  # nothing to size
        for key, search in method.space.items():
            if isinstance(search, Choice) and hasattr(method, key) and f"{key}=" not in given:
                for value in search.options:
                    yield Candidate(f"{spec}{',' if given else ':'}{key}={_plain(value)}", tier=1), spec
        for value in layers.options:
            yield Candidate(spec, str(value), 0 if value == "all" else 2), spec


def _count(candidate: Candidate, sites: Sequence[Site]) -> int:
    chosen = select(sites, candidate.method.roles, candidate.layers)
    if candidate.layers != "all" and len(chosen) == len(select(sites, candidate.method.roles)):
        raise InfuseError("The model has no more layers.")
    with torch.device("meta"):
        adapter = build("counted", candidate.method, chosen)
    return sum(p.numel() for p in adapter.parameters())


def _plain(value: object) -> object:
    return int(value) if isinstance(value, float) and value.is_integer() else value

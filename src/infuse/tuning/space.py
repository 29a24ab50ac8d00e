"""What a study searches: the ranges that methods and settings declare, what the user holds or changes, and a draw."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Protocol

from infuse.errors import InfuseError, listed
from infuse.heads import HEADS
from infuse.method import Method, make, settings, spelled
from infuse.sites import check_roles
from infuse.spaces import Choice, Log, Scalar, Search, Space, contains, ends, parse
from infuse.training.settings import SPACE, Settings

_RESERVED = ("method", "precision", "max_length", "seed")
_WIDTH = 5.0
"""A method that declares no range for its learning rate gets this factor around it, on both sides."""


class Draws(Protocol):
    """What draws values: an Optuna trial."""

    def suggest_categorical(self, name: str, choices: Sequence[Any], /) -> Any: ...
    def suggest_float(self, name: str, low: float, high: float, /, *, log: bool = ...) -> float: ...


@dataclass(frozen=True)
class Candidates:
    """Base models and methods to choose from, with the ranges of each method and those that all share."""

    bases: tuple[str, ...]
    methods: Mapping[str, Method]
    spaces: Mapping[str, Space]
    held: Settings

    def draw(self, trial: Draws) -> tuple[str, Settings]:
        """A base and how to train on it. What is no choice is not asked for; a method's own settings bear its name."""
        base = self.bases[0] if len(self.bases) == 1 else trial.suggest_categorical("base", self.bases)
        names = list(self.methods)
        name = names[0] if len(names) == 1 else trial.suggest_categorical("method", names)
        values = {key: _draw(trial, self._called(name, key), search) for key, search in self.spaces[name].items()}
        return str(base), _settings(self.methods[name], values, self.held)

    def defaults(self) -> list[tuple[dict[str, Scalar], bool]]:
        """The draws that give every method's defaults on every base, and whether the ranges hold all of them."""
        found: list[tuple[dict[str, Scalar], bool]] = []
        for base in self.bases:
            for name, method in self.methods.items():
                draw: dict[str, Scalar] = {}
                if len(self.bases) > 1:
                    draw["base"] = base
                if len(self.methods) > 1:
                    draw["method"] = name
                open_ones = {key: search for key, search in self.spaces[name].items() if len(ends(search)) > 1}
                values = {key: self._default(method, key) for key in open_ones}
                draw |= {self._called(name, k): v for k, v in values.items() if contains(open_ones[k], v)}
                found.append((draw, all(contains(open_ones[key], value) for key, value in values.items())))
        return found

    def start(self, name: str) -> Method | None:
        """A method at its defaults and what is held; ``None`` if the ranges leave one of its defaults out."""
        method = self.methods[name]
        own = {key: search for key, search in self.spaces[name].items() if hasattr(method, key)}
        held = {key: ends(search)[0] for key, search in own.items() if len(ends(search)) == 1}
        if any(key not in held and not contains(search, self._default(method, key)) for key, search in own.items()):
            return None
        return make(_settings(method, held, self.held).method)

    def described(self) -> dict[str, Any]:
        """All of it in plain values, to compare with another worker's."""
        spaces = {n: {k: [type(s).__name__, *ends(s)] for k, s in space.items()} for n, space in self.spaces.items()}
        held = {key: value for key, value in asdict(self.held).items() if key != "precision"}  # a machine's own
        methods = {name: spelled(method) for name, method in self.methods.items()}
        return {"bases": list(self.bases), "methods": methods, "spaces": spaces, "held": held}

    def _default(self, method: Method, key: str) -> Scalar:
        if key == "learning_rate":
            return method.rate
        if key == "head_learning_rate":
            return HEADS[self.held.head]
        value = getattr(method, key) if key in {f.name for f in fields(method)} else getattr(Settings, key)
        return "+".join(value) if isinstance(value, tuple) else value

    def _called(self, method: str, key: str) -> str:
        return key if self._shared(key) else f"{method}.{key}"

    def _shared(self, key: str) -> bool:
        """Whether a setting of training has one range under all methods, so that they learn from each other."""
        ranges = [space[key] for space in self.spaces.values() if key in space]
        return key != "learning_rate" and hasattr(Settings, key) and all(search == ranges[0] for search in ranges)


def candidates(bases: Sequence[str], specs: Sequence[str], ranges: Mapping[str, Any], held: Settings) -> Candidates:
    """Merge what methods and settings declare with the user's ranges, which win.

    ``ranges`` maps a setting of training or of any of the methods to its range, or a method to such a mapping.

    Raises:
        InfuseError: an unknown method, setting or range, a value that can't work, or a method that can't be tuned.
    """
    short = [spec.partition(":")[0] for spec in specs]
    names = {one if short.count(one) == 1 else spec: spec for one, spec in zip(short, specs, strict=True)}
    methods = {name: make(spec) for name, spec in names.items()}
    for name, method in methods.items():
        if method.unfreezes:
            raise InfuseError("full changes the base that all trials share: tune other methods, and train it apart.")
        if method.maker:
            raise InfuseError(f"{method.name} is made of trained adapters by infuse.{method.maker}: it can't be tuned.")
        own = {f.name for f in fields(method)}
        if both := own & {f.name for f in fields(Settings)}:
            raise InfuseError(f"{name} calls a setting like one of training ({listed(sorted(both))}): rename it.")
    _refuse_unknown(methods, ranges)
    spaces = {name: _space(name, spec, methods[name], ranges) for name, spec in names.items()}
    for name, method in methods.items():
        for key, search in spaces[name].items():
            for value in ends(search):  # a mistake should end the command, not every trial
                changed = _settings(method, {key: value}, held)
                changed.check()
                check_roles(make(changed.method).roles)
            if key == "head" and "hf" in ends(search):
                raise InfuseError("The head hf belongs to the base that all trials share: tune with cosine or linear.")
    return Candidates(tuple(bases), methods, spaces, held)


def _space(name: str, spec: str, method: Method, ranges: Mapping[str, Any]) -> dict[str, Search]:
    given = {item.partition("=")[0].strip() for item in spec.partition(":")[2].split(",")}
    rate: Space = {"learning_rate": Log(method.rate / _WIDTH, method.rate * _WIDTH)}
    space = {**SPACE, **rate, **{key: s for key, s in method.space.items() if key not in given}}
    known = _known(method)
    if method.roles == ():  # no site, so that there is no layer to choose
        space = {key: s for key, s in space.items() if key not in ("layers", "learning_rate")}
    wanted = {key: value for key, value in ranges.items() if key in known}
    for called in dict.fromkeys((method.name, name)):
        own = ranges.get(called, {})
        if odd := [key for key in own if key not in known]:
            raise InfuseError(f"{called} has no setting {listed(odd)} to tune; it has {listed(known, 40)}.")
        wanted |= own
    return space | {key: parse(key, value) for key, value in wanted.items()}


def _known(method: Method) -> list[str]:
    own = [f.name for f in fields(method)]
    return own + [f.name for f in fields(Settings) if f.name not in _RESERVED]


def _refuse_unknown(methods: Mapping[str, Method], ranges: Mapping[str, Any]) -> None:
    known = dict.fromkeys(key for method in methods.values() for key in _known(method))
    names = {each for name, method in methods.items() for each in (method.name, name)}
    for key, value in ranges.items():
        if key in names and not isinstance(value, dict):
            raise InfuseError(f"Under {key} in the space, write a mapping of its settings, e.g. {key}: {{epochs: 4}}.")
        if key in _RESERVED:
            raise InfuseError(f"{key} can't be searched: give it to the command itself.")
        if key not in names and key not in known:
            raise InfuseError(f"The space has no setting {key!r}; it has {listed(known, 40)}.")


def _draw(trial: Draws, name: str, search: Search) -> Scalar:
    if isinstance(search, Choice):
        return search.options[0] if len(search.options) == 1 else trial.suggest_categorical(name, search.options)
    return trial.suggest_float(name, search.low, search.high, log=isinstance(search, Log))


def _settings(method: Method, values: Mapping[str, Scalar], held: Settings) -> Settings:
    own = {f.name for f in fields(method)}
    changed = make({**settings(method), **{k: v for k, v in values.items() if k in own}})
    training = {key: value for key, value in values.items() if key not in own}
    return Settings(**{**asdict(held), "method": spelled(changed), **training})

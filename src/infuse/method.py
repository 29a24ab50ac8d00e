"""The contract of a method, and the registry of methods.

A method is a frozen dataclass: its fields are its settings, and its functions are pure. For one adapter at one site it
says which parameters there are, what the activation becomes, and (if it can) what the base weight becomes on merging.
Everything else (dtype, device, freezing, routing of mixed batches, files, training) is written once, elsewhere.
"""

import inspect
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from numbers import Integral, Real
from typing import Any, ClassVar, Literal, TypeVar

import torch
from torch import Tensor, nn

from infuse.errors import InfuseError, listed
from infuse.plain_yaml import read_yaml
from infuse.sites import Site
from infuse.spaces import Space

Params = Mapping[str, Tensor]


def _keywords(function: Any) -> frozenset[str]:
    """Names of the arguments after ``self`` and ``p``."""
    names = list(inspect.signature(function).parameters.values())[2:]
    kinds = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    return frozenset(p.name for p in names if p.kind not in kinds)


@dataclass(frozen=True)
class Method(ABC):
    """Abstract base of all methods; a concrete one is a frozen dataclass under :func:`register`.

    A method defines one of three: ``update``, what is added to the activation; ``factor``, what it is multiplied by; or
    ``forward``, what takes its place. They and ``prepare`` receive, by the names of their arguments, only what they ask
    for:

    - ``h``: the activation at the site, (..., width).
    - ``x``: the input of the site's module, (..., in_features).
    - ``residual``: at a sublayer's output, what the model adds to it, (..., width).
    - ``normed``: at a sublayer's output, ``LN(h + residual)`` with the pretrained LayerNorm that follows in post-norm
      layers, and ``h + residual`` in pre-norm ones, (..., width).
    - ``weight``, ``bias``: the frozen weight (out, in) and bias (out,) behind the activation.
    - ``training``: whether the model trains (for dropout).
    """

    name: ClassVar[str]
    """Key in the registry, in files and on the command line."""
    learning_rate: ClassVar[float]
    """Peak learning rate that training uses unless told otherwise; see :attr:`rate`."""
    sides: ClassVar[tuple[Literal["input", "output"], ...]] = ("output",)
    """The sides of a module at which the method is defined."""
    acts: ClassVar[str] = "forward"
    """Which of ``update``, ``factor`` and ``forward`` the class defines (filled in); only updates can be fused."""
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    """Names of known variants, and their settings."""
    space: ClassVar[Space] = {}
    """Where `infuse tune` searches the settings and the learning rate; the defaults lie in it."""
    mergeable: ClassVar[bool] = False
    """Whether :meth:`merge` folds the delta into the base weight."""

    peft_type: ClassVar[str | None] = None
    """The method's name in PEFT's files, if PEFT has it; then the functions named after PEFT below are defined."""
    peft_keys: ClassVar[Mapping[str, str]] = {}
    """Parameter → the end of its key in PEFT's files."""
    unfreezes: ClassVar[bool] = False
    """Whether the base itself is trained (full fine-tuning, the contrast to every adapter)."""
    maker: ClassVar[str] = ""
    """The function that makes such an adapter of others; empty for methods that are trained on their own."""
    stackable: ClassVar[bool] = False
    """Whether that function also takes parameters with a row per text, matrices (rows, a, b) and vectors
    (rows, 1, n), for activations (rows, positions, width), each position by itself. Others run under ``vmap`` in mixed
    batches, at more cost."""
    undecayed: ClassVar[tuple[str, ...]] = ()
    """Parameters that weight decay leaves alone though they are matrices."""
    asks: ClassVar[Mapping[str, frozenset[str]]] = {}
    """Function → names of the tensors that it asks for; filled from the signatures."""

    roles: tuple[str, ...]
    """The roles that are adapted."""

    def __post_init__(self) -> None:
        """Give settings their own types, and raise :class:`InfuseError` for one that can't work; a method with checks
        of its own calls this first."""
        for field in fields(self):
            name, value = field.name, _coerce(type(self), field, getattr(self, field.name))
            object.__setattr__(self, name, value)  # the dataclass is frozen
            if isinstance(value, float) and not abs(value) <= torch.finfo(torch.float32).max:  # nor is NaN
                raise InfuseError(f"{type(self).__name__}'s {name} must be a finite number (in float32), not {value}.")
            if name == "dropout" and not 0 <= value < 1:
                raise InfuseError(f"{type(self).__name__}'s dropout must lie in [0, 1), not {value}.")

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.acts = next((n for n in ("update", "factor") if getattr(cls, n) is not getattr(Method, n)), "forward")
        cls.asks = {name: _keywords(getattr(cls, name)) for name in ("update", "factor", "forward", "prepare")}

    @abstractmethod
    def init(self, site: Site) -> dict[str, Tensor]:
        """Fresh parameters of one delta at ``site``, in float32, drawn from torch's global generator."""

    def update(self, p: Params, *args: Any, **kwargs: Any) -> Tensor:
        """What is added to the activation, (..., width), for one adapter with parameters ``p``."""
        raise NotImplementedError(self.name)

    def factor(self, p: Params, *args: Any, **kwargs: Any) -> Tensor:
        """What the activation is multiplied by, (..., width) or (width,), for one adapter with parameters ``p``."""
        raise NotImplementedError(self.name)

    def forward(self, p: Params, *args: Any, **kwargs: Any) -> Tensor:
        """The new activation, (..., width), for one adapter with parameters ``p``."""
        raise NotImplementedError(self.name)

    @property
    def starts_at_identity(self) -> bool:
        """Whether a fresh delta changes nothing; otherwise it starts near that."""
        return True

    @property
    def overlaps(self) -> bool:
        """Whether two deltas may act on one feature (a fused projection and its query): not if one takes the frozen
        weight to be all that lies behind its activation, or if files can't tell the two."""
        return True

    @property
    def rate(self) -> float:
        """The peak learning rate under these settings."""
        return self.learning_rate

    def wants(self, function: str) -> frozenset[str]:
        """Names of the tensors that a function asks for under these settings."""
        return self.asks[function]

    def trains(self, sites: Sequence[Site]) -> list[nn.Module]:
        """Modules of the base of which every adapter trains its own copy (LayerNorms, say)."""
        return []

    def shared(self, sites: Sequence[Site]) -> dict[str, Tensor]:
        """Fresh parameters that all deltas of one adapter share; they are in every ``p`` too."""
        return {}

    def prepare(self, p: Params, *args: Any, **kwargs: Any) -> Params:
        """What depends on the parameters (and the frozen weight) alone: computed once per adapter and call, not once
        per row; in mixed batches without gradients, where it runs under ``vmap``, once until one of them changes."""
        return p

    def condense(self, p: Params) -> Params:
        """Prepared parameters in the form in which mixed batches without gradients keep them, if there is a quicker
        one; the functions that use parameters take both."""
        return p

    def merge(self, p: Params, weight: Tensor, bias: Tensor | None, side: str) -> tuple[Tensor, Tensor | None]:
        """The (weight, bias) that give the adapted activation without the delta; only if ``mergeable``."""
        raise InfuseError(
            f"{type(self).__name__} depends on its input in a way that no weight holds: it can't be merged."
        )

    def to_peft(self, made: "Mapping[str, Method]", sites: Mapping[str, list[Site]]) -> dict[str, Any]:
        """The method's entries of PEFT's config; module path → the method there, and module path → its sites."""
        raise NotImplementedError(self.name)

    @classmethod
    def from_peft(cls, config: Mapping[str, Any], path: str) -> "Method":
        """The method that a PEFT config describes for the module at ``path``; refuses options that it lacks."""
        raise NotImplementedError(cls.name)

    def to_peft_tensors(self, p: Params, side: str) -> dict[str, Tensor]:
        """Parameters of one module in PEFT's names and shapes."""
        return {self.peft_keys[name]: value for name, value in p.items()}

    def peft_side(self, tensors: Params) -> str:
        """The side of its module that a delta in a PEFT file acts on."""
        return "output"

    def fused(self, slices: int) -> "Method":
        """The settings of the delta that :meth:`fuse` makes of so many slices."""
        return self

    def fuse(self, slices: "Sequence[tuple[Site, Params]]") -> "tuple[Method, Params]":
        """The one delta on a whole module that equals these deltas on slices of its output."""
        raise NotImplementedError(self.name)

    def split(self, fused: Params, sites: Sequence[Site]) -> list[Params]:
        """The inverse of :meth:`fuse`."""
        raise NotImplementedError(self.name)

    def add(self, params: "Sequence[Params]", weights: "Sequence[float]") -> Params:
        """Parameters of the weighted sum of several deltas at one site; by default the sum of the parameters."""
        return {n: sum(w * p[n] for p, w in zip(params, weights, strict=True)) for n in params[0]}  # type: ignore[misc]  # sum begins with the integer 0

    def summed(self, terms: int) -> "Method":
        """The settings of the delta that :meth:`add` makes of so many terms."""
        return self

    def check(self, site: Site) -> None:
        """Raise :class:`InfuseError` if the method is not defined at ``site``."""
        if site.side not in self.sides:
            hint = "use ffn_output or ffn_up" if site.side == "input" else "use ffn_hidden"
            raise InfuseError(f"{type(self).__name__} is not defined at {site.role}, an {site.side}: {hint}.")


class Mixer(Method):
    """Abstract base of what mixes the updates of several trained adapters of one model, its members.

    ``init`` gives the mixer's own parameters at a site. The query is what the last member reads there.
    """

    maker = "fuse"

    def mixed(self, members: "tuple[Method, ...]") -> "tuple[Method, ...]":
        """The members' settings at a site under which their updates are mixed; by default their own."""
        return members

    def adds_query(self, members: "tuple[Method, ...]") -> bool:
        """Whether the query is added to the activation, too."""
        return False

    @abstractmethod
    def weigh(self, p: Params, query: Tensor, updates: Tensor, training: bool) -> Tensor:
        """Weights (..., members) of the members' updates (..., members, width)."""

    @abstractmethod
    def mix(self, p: Params, weights: Tensor, updates: Tensor) -> Tensor:
        """What is added to the activation, (..., width)."""

    @abstractmethod
    def penalty(self, p: Params) -> Tensor:
        """What the parameters of one site add to the loss."""


M = TypeVar("M", bound=type[Method])
METHODS: dict[str, type[Method]] = {}
BASELINES: dict[str, type[Method]] = {}
MIXERS: dict[str, type[Method]] = {}


def register(cls: M) -> M:
    """Class decorator that enters a method into the registry under its ``name``."""
    METHODS[cls.name] = cls
    return cls


def register_baseline(cls: M) -> M:
    """Class decorator for ways to train that are no adapters; they can be made by name but are not in the registry."""
    BASELINES[cls.name] = cls
    return cls


def register_mixer(cls: M) -> M:
    """Class decorator that enters a :class:`Mixer` under its ``name``."""
    MIXERS[cls.name] = cls
    return cls


def registry() -> dict[str, type[Method]]:
    """Name → class of every method."""
    import infuse.methods  # noqa: F401  # fills the registry; at the top it would be a cycle

    return METHODS


def default_mixer() -> Method:
    """The first mixer of the registry, with its own settings."""
    registry()
    return make(next(iter(MIXERS)))


def make(spec: "Method | str | Mapping[str, Any]") -> Method:
    """A method from ``"lora"``, ``"lora:rank=4,roles=query+value"`` or ``{"name": "lora", "rank": 4}``.

    Raises:
        InfuseError: unknown method or setting, or a value of the wrong type.
    """
    if isinstance(spec, Method):
        return spec
    if isinstance(spec, str):
        name, _, rest = spec.partition(":")
        settings = dict(_setting(item) for item in rest.split(",") if item)
    elif not isinstance(spec, Mapping):
        what = f"{spec.__name__} itself" if isinstance(spec, type) else "None" if spec is None else type(spec).__name__
        raise InfuseError(f"Give a method as IA3(), 'lora:rank=4' or {{'name': 'lora', 'rank': 4}}, not {what}.")
    else:
        settings = dict(spec)
        name = str(settings.pop("name", ""))
    cls, preset = variants().get(_key(name), (None, {}))
    if cls is None:
        raise InfuseError(f"Unknown method {name!r}; the methods are {listed(names(), 20)}.")
    known = [f.name for f in fields(cls)]
    if unknown := [setting for setting in settings if setting not in known]:
        raise InfuseError(f"{cls.__name__} has no setting {unknown[0]!r}; it has {listed(known)}.")
    return cls(**{**preset, **settings})


def names() -> list[str]:
    """Every name that :func:`make` knows, methods and presets, as people write them."""
    return list(dict.fromkeys(n for c in (registry() | BASELINES | MIXERS).values() for n in (c.name, *c.presets)))


def variants() -> dict[str, tuple[type[Method], Mapping[str, Any]]]:
    """Every name that :func:`make` knows, methods and presets, without punctuation → class and settings."""
    known: dict[str, tuple[type[Method], Mapping[str, Any]]] = {}
    for cls in (registry() | BASELINES | MIXERS).values():
        known[_key(cls.name)] = (cls, {})
        known |= {_key(name): (cls, preset) for name, preset in cls.presets.items()}
    return known


def settings(method: Method) -> dict[str, Any]:
    """The inverse of :func:`make`: ``{"name": ..., **fields}``, ready for JSON and YAML."""
    return {"name": method.name, **{k: list(v) if isinstance(v, tuple) else v for k, v in asdict(method).items()}}


def spelled(method: Method) -> str:
    """The shortest string that :func:`make` turns into ``method``: only settings off their default."""
    changed = {f.name: getattr(method, f.name) for f in fields(method) if getattr(method, f.name) != f.default}
    items = [f"{k}={'+'.join(map(str, v)) if isinstance(v, tuple) else v}" for k, v in changed.items()]
    return method.name + (":" + ",".join(items) if items else "")


def _key(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower().replace("+", "plus"))


def _setting(item: str) -> tuple[str, Any]:
    name, equals, value = item.partition("=")
    if not equals:
        raise InfuseError(f"{item!r} is not a setting: write name=value, e.g. rank=4.")
    try:
        return name.strip(), read_yaml(value)
    except ValueError:
        raise InfuseError(
            f"The value in {item!r} can't be read: write a number, a word or words joined by +."
        ) from None


def _coerce(cls: type, field: Any, value: Any) -> Any:
    default = field.default if field.default is not MISSING else None
    if isinstance(default, tuple):
        items = value.split("+") if isinstance(value, str) else value
        if not isinstance(items, Sequence) or not all(isinstance(item, str) for item in items):
            raise InfuseError(f"{cls.__name__}'s {field.name} are words joined by + or in a list, not {value!r}.")
        return tuple(items)
    if isinstance(value, Real) and not isinstance(value, bool):  # numpy's too, which no file could hold
        value = int(value) if isinstance(value, Integral) else float(value)
        if isinstance(default, float):
            return float(value) if abs(value) < 10**300 else float("inf")  # which is refused
    if default is not None and type(value) is not type(default):
        raise InfuseError(f"{cls.__name__}'s {field.name} is a {type(default).__name__}, not {value!r}.")
    return value

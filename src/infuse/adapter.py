"""Deltas and adapters: the modules that hold everything Infuse trains."""

import copy
import inspect
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from infuse.arch import Arch
from infuse.errors import InfuseError, listed
from infuse.method import Method, Params, settings
from infuse.sites import Site


class Delta(nn.Module):
    """What a method puts at one site: its parameters, and the method whose functions read them."""

    registered = 0
    """How many parameters all deltas have been given: a list of parameters made before a change may be outdated."""

    def __init__(self, method: Method, params: Mapping[str, Tensor]):
        super().__init__()
        self.method = method
        self.names = tuple(params)
        for name, value in params.items():
            self.register_parameter(name, nn.Parameter(value))

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        Delta.registered += 1
        super().register_parameter(name, param)

    @property
    def params(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in self.names}


class Adapter(nn.Module):
    """A named set of deltas (and a head) that are trained together: what is saved, loaded and shared.

    Attributes:
        method: the settings under which the deltas were made.
        sites: site name → site.
        deltas: a :class:`Delta` per site.
        shared: parameters common to all deltas.
        copies: trained copies of modules of the base (a classification head of the model, say), by their path; they
            stand in for the originals, which stay as they are.
        head: pooling and classifier of this adapter, if it has one (see :mod:`infuse.heads`).
        members: names of the adapters that a mixer mixes.
        kinds: site name → :class:`infuse.recipe.Kind` of those that run as one there.
        info: facts that travel with the adapter in its file (metrics, data, …), as JSON.
        resting: of an adapter that is not to be trained now, which of its parameters get gradients otherwise.
    """

    def __init__(
        self,
        name: str,
        method: Method,
        sites: Iterable[Site],
        deltas: Mapping[str, Delta],
        shared: Mapping[str, Tensor],
    ):
        super().__init__()
        self.name = name
        self.method = method
        self.sites = {site.name: site for site in sites}
        self.deltas = nn.ModuleDict({key(site): delta for site, delta in deltas.items()})
        self.shared = nn.ParameterDict(dict(shared))
        self.copies = nn.ModuleDict()
        self.head: nn.Module | None = None
        self.info: dict = {}
        self.members: tuple[str, ...] = ()
        self.kinds: dict[str, Any] = {}
        self.resting: dict[str, bool] | None = None
        self._tensors: list[Tensor] = []
        self._seen: tuple[int, list[int]] = (-1, [])
        self._version = 0

    def delta(self, site: Site) -> Delta | None:
        name = key(site.name)
        delta: Any = self.deltas[name] if name in self.deltas else None  # noqa: SIM401  # ModuleDict has no get
        return delta

    def method_at(self, site: Site) -> Method:
        """The settings of the delta at ``site``, which may differ from the adapter's."""
        delta = self.delta(site)
        return self.method if delta is None else delta.method

    def params(self, site: Site) -> Params:
        """Own and shared parameters of the delta at ``site``."""
        delta = self.delta(site)
        if delta is None:
            raise KeyError(site.name)
        return {**dict(self.shared.items()), **delta.params}

    @property
    def signature(self) -> frozenset[tuple[str, Any]]:
        """Equal for adapters that run as one at every site."""
        return frozenset(self.kinds.items())

    @property
    def places(self) -> set[Any]:
        """Where this adapter acts, and how: hooks there are needed as long as any adapter has the place."""
        return {*self.kinds.items(), *self.copies}

    def version(self) -> int:
        """A number that grows when a parameter of the deltas was written to or replaced since the last call."""
        if self._seen[0] != Delta.registered:
            self._tensors = [p for p in self.deltas.parameters() if not p.is_inference()]  # those can't be written to
        tensors = [*self._tensors, *(p for p in self.shared.values() if not p.is_inference())]
        now = [t._version for t in tensors] + [t.data_ptr() for t in tensors]
        if self._seen != (Delta.registered, now):
            self._version += now != self._seen[1]
            self._seen = Delta.registered, now
        return self._version

    def rest(self, resting: bool) -> None:
        """Take the parameters' gradients away, or give them back as they were."""
        if resting and self.resting is None:
            self.resting = {name: p.requires_grad for name, p in self.named_parameters()}
            self.requires_grad_(False)
        elif not resting and self.resting is not None:
            for name, parameter in self.named_parameters():
                parameter.requires_grad_(self.resting.get(name, parameter.requires_grad))
            self.resting = None

    def facts(self) -> dict[str, Any]:
        """What a file says about this adapter beside its tensors and its base, ready for JSON."""
        methods = {site: self.method_at(s) for site, s in self.sites.items()}
        return {
            "name": self.name,
            "method": settings(self.method),
            "sites": list(self.sites),
            "settings": {site: settings(method) for site, method in methods.items() if method != self.method},
            "members": list(self.members),
            "copies": [dotted(path) for path in self.copies],
            "head": getattr(self.head, "settings", lambda: None)(),  # of a Head
            "info": self.info,
        }

    def copy_of(self, path: str) -> nn.Module | None:
        name = key(path)
        return self.copies[name] if name in self.copies else None  # noqa: SIM401  # ModuleDict has no get

    def copies_within(self, sites: Iterable[Site]) -> list[str]:
        """Paths of the copies within the sites' layers, not on top of them."""
        layers = tuple({f"{site.prefix}{site.layer_path}." for site in sites})
        return [path for path in map(dotted, self.copies) if path.startswith(layers)]

    def extra_repr(self) -> str:
        return f"{self.name!r}, {self.method}"


@contextmanager
def fresh() -> Iterator[None]:
    """New tensors within the block are ordinary ones: in float32, on the CPU, and fit to be trained.

    A default dtype, a device context or ``inference_mode`` around the block does not reach them.
    """
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.inference_mode(False), torch.device("cpu"):
            yield
    finally:
        torch.set_default_dtype(dtype)


@fresh()
def build(name: str, method: Method, sites: list[Site]) -> Adapter:
    """A fresh adapter of ``method`` at ``sites``, on the devices of their modules, in float32."""
    for site in sites:
        method.check(site)
    device = next(iter(sites)).weight.device if sites else torch.device("cpu")
    deltas = {s.name: Delta(method, _on(method.init(s), s.weight.device)) for s in sites}
    return Adapter(name, method, sites, deltas, _on(method.shared(sites), device))


@fresh()
def copies(model: nn.Module, paths: Iterable[str]) -> dict[str, nn.Module]:
    """Path → trainable copy of a module of the base."""
    made = {}
    for path in paths:
        try:
            module = _copy(model.get_submodule(path))
        except AttributeError:
            names = [n for n, _ in model.named_children() if n != "infuse"]
            raise InfuseError(
                f"{type(model).__name__}, where the adapters are, has no module {path!r} to train a copy of; "
                f"it has {listed(names)}. Pass trained=() for none."
            ) from None
        module.requires_grad_(True)
        made[key(path)] = module.float()
    return made


def check_copies(model: nn.Module, paths: Iterable[str], arch: Arch) -> None:
    """Refuse copies that can't stand in for their modules: hooks call a copy after the original, with its arguments."""
    for path in paths:
        module = model.get_submodule(path)
        if type(module).forward is nn.Module.forward:
            why = f"a {type(module).__name__} is never called; name the modules in it"
        elif any(f".{path}".endswith(f".{each}") for each in arch.uncalled):
            why = "the model reads its weight and never calls it; train an adapter without that copy"
        elif _caches(module):
            why = "the original's call fills the key-value cache before the copy's; name the modules in it"
        else:
            continue
        raise InfuseError(f"An adapter can't have its own copy of {path}: {why}.")


def _caches(module: nn.Module) -> bool:
    """Whether a call may write to a key-value cache that it was given; the attention of encoders says it does not."""
    takers = [m for m in module.modules() if "past_key_values" in inspect.signature(type(m).forward).parameters]
    decoding = [m.is_decoder for m in takers if hasattr(m, "is_decoder")]
    return module in takers and (any(decoding) or not decoding)


def _copy(module: nn.Module) -> nn.Module:
    """A deep copy without hooks: through those of a tap it would copy all adapters, and act for them."""
    hooks = (value for each in module.modules() for name, value in vars(each).items() if "_hooks" in name)
    return copy.deepcopy(module, {id(each): OrderedDict() for each in hooks if isinstance(each, dict)})


def classification_head(model: nn.Module) -> list[str]:
    """Paths of the children that a transformers class of :data:`HEADED` puts on top of its transformer."""
    if not type(model).__name__.endswith(HEADED):
        return []
    from transformers import PreTrainedModel  # there by now, if the model is one of its classes

    body = getattr(model, "base_model", None)  # in T5ForQuestionAnswering it is the model itself
    children = [(n, m) for n, m in model.named_children() if n != "infuse" and m is not body]
    own = [(n, m) for n, m in children if not isinstance(m, PreTrainedModel | nn.Embedding)]
    return [n for n, m in own if any(True for _ in m.parameters())]


HEADED = ("ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering", "ForMultipleChoice")
"""Ends of the names of classes whose head starts at random: no checkpoint of a language model has it."""


def key(name: str) -> str:
    """A dotted name as a key of ``ModuleDict``, which allows no dots."""
    return name.replace(".", "/")


def dotted(name: str) -> str:
    """The inverse of :func:`key`."""
    return name.replace("/", ".")


def _on(params: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    return {name: value.to(device) for name, value in params.items()}

"""Roles and sites: which modules of one model carry the named activations of its layers."""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear as _Uncalled  # nn.MultiheadAttention's out_proj

from infuse.arch import ARCHS, ROLES, Arch, Part, Stack
from infuse.errors import InfuseError, listed


@dataclass(frozen=True, eq=False)
class Site:
    """One role in one layer of one model, resolved to its module.

    Attributes:
        name: ``[stack.]layer.role``, unique in the model, e.g. ``decoder.3.cross_key``.
        role: a name of :data:`infuse.arch.ROLES`, or ``module`` for a linear module outside the table.
        stack: name of its stack of layers; empty where there is only one.
        layer: index of the layer in its stack.
        path: the module's path below ``prefix``.
        prefix: path of the transformer inside the given model (``"bert."``, or empty).
        module: the linear module itself.
        side: whether the activation is the module's input or its output.
        start, stop: the activation's span within the module's output features.
        width: number of features of the activation.
        in_features, out_features: widths of the module's input and output.
        layer_path: path of the site's layer below ``prefix``.
        source: full path of the module whose input is added to the activation, at a sublayer's output.
        norm: the LayerNorm that follows that addition, in post-norm layers.
    """

    name: str
    role: str
    stack: str
    layer: int
    path: str
    prefix: str
    module: nn.Module
    side: Literal["input", "output"]
    start: int
    stop: int
    in_features: int
    out_features: int
    layer_path: str = ""
    source: str | None = None
    norm: nn.Module | None = None

    @property
    def width(self) -> int:
        return self.in_features if self.side == "input" else self.stop - self.start

    @property
    def whole(self) -> bool:
        """Whether the activation is all of the module's input or output."""
        return self.side == "input" or (self.start == 0 and self.stop == self.out_features)

    @property
    def transposed(self) -> bool:
        """Whether the module keeps its weight as (in, out), as GPT-2's ``Conv1D`` does."""
        return type(self.module).__name__ == "Conv1D"

    @property
    def weight(self) -> Float[Tensor, "out in"]:
        """The weight that computes the activation (output side) or consumes it (input side): a view."""
        weight: Any = _tensor(self.module.weight)
        weight = weight.T if self.transposed else weight
        return weight if self.side == "input" else weight[self.start : self.stop]

    @property
    def bias(self) -> Float[Tensor, " out"] | None:
        bias: Any = _tensor(getattr(self.module, "bias", None))
        return bias if bias is None or self.side == "input" else bias[self.start : self.stop]


def _tensor(value: Any) -> Any:
    """A parameter; modules of ``torch.ao.quantization`` have methods in their place."""
    value = value() if callable(value) and not isinstance(value, Tensor) else value
    return value.dequantize() if isinstance(value, Tensor) and value.is_quantized else value


def find_sites(model: nn.Module, arch: Arch | None = None) -> list[Site]:
    """Every site of ``model``, in the order of its layers.

    Args:
        model: a transformers model, or any module that contains one.
        arch: the row to use; by default the table's row for the model's ``config.model_type``.
    Raises:
        InfuseError: the architecture is unknown, its layers are not there, or its paths fit two places.
    """
    arch = arch or arch_of(model)
    found = [stack for stack in arch.stacks if stack_layers(model, stack)]
    if not found:
        raise InfuseError(
            f"The row for {listed(arch.types)} looks for layers at {listed(s.layers for s in arch.stacks)}, "
            f"but {type(model).__name__} has its layers at {listed(_layer_lists(model))}. "
            f"Pass arch={_suggest(model)}"
        )
    sites = [site for stack in found for site in _stack_sites(model, stack)]
    if not sites:
        raise InfuseError(
            f"None of the paths in the row for {listed(arch.types)} exists in {type(model).__name__}. "
            f"Pass arch={_suggest(model)}"
        )
    return sites


def select(sites: Iterable[Site], roles: Iterable[str], layers: "str | Iterable[int] | None" = None) -> list[Site]:
    """The sites that a method adapts.

    A role also selects its cross-attention twin (``key`` takes ``cross_key`` too); ``layers`` is ``None`` or ``"all"``,
    ``"last:k"``, ``"first:k"``, or indices within each stack.
    """
    sites, roles = list(sites), list(roles)
    present = {s.role for s in sites}
    check_roles(roles)
    for role in roles:
        if role not in present and f"cross_{role}" not in present:
            raise InfuseError(f"This model has no role {role!r}; it has {listed(r for r in ROLES if r in present)}.")
    if not roles:
        return []
    wanted = set(roles) | {f"cross_{r}" for r in roles}
    return within([s for s in sites if s.role in wanted], layers, sites)


def within(chosen: Sequence[Site], layers: "str | Iterable[int] | None", sites: Sequence[Site]) -> list[Site]:
    """Those of the chosen sites that lie in the layers asked for, of a model with ``sites``; see :func:`select`."""
    if layers is None or (isinstance(layers, str) and layers == "all"):
        return list(chosen)
    if isinstance(layers, Iterable) and not isinstance(layers, str):
        layers = list(layers)  # each stack asks for them
    asked = {stack: _layer_indices(sites, stack, layers) for stack in {s.stack for s in sites}}
    every = set().union(*asked.values())
    if not every or every - {s.layer for s in sites}:
        raise InfuseError(f"layers={layers!r} does not fit; this model has layers 0 to {max(s.layer for s in sites)}.")
    found = [s for s in chosen if s.layer in asked.get(s.stack, ())]
    if not found:
        there = listed(sorted({s.layer for s in chosen}), 20)
        raise InfuseError(f"layers={layers!r} holds nothing to adapt; what there is lies in layers {there}.")
    return found


def overlap(sites: Iterable[Site]) -> list[str]:
    """Names of two sites that share features of one module's output; empty if none do."""
    last: dict[nn.Module, Site] = {}
    for site in sorted((s for s in sites if s.side == "output"), key=lambda s: s.start):
        before = last.setdefault(site.module, site)
        if before is not site and site.start < before.stop:
            return [before.name, site.name]
        last[site.module] = site
    return []


def tied(model: Iterable[tuple[str, nn.Module]], modules: Iterable[nn.Module]) -> list[str]:
    """Paths of one of ``modules`` and of another module of ``model`` with the same parameter; empty if all have theirs.

    A module that runs in several places, as ALBERT's layers do, is one module.
    """
    users: dict[nn.Parameter, dict[nn.Module, str]] = {}
    for path, module in model:
        for parameter in module.parameters(recurse=False):
            users.setdefault(parameter, {})[module] = path
    for module in modules:
        own = set(module.modules())
        for parameter in module.parameters():
            if others := [path for user, path in users[parameter].items() if user not in own]:
                return [next(path for user, path in users[parameter].items() if user in own), others[0]]
    return []


def check_roles(roles: Iterable[str]) -> None:
    """Raise :class:`InfuseError` for a role that no architecture has."""
    for role in roles:
        if role not in ROLES:
            raise InfuseError(f"Unknown role {role!r}; the roles are {listed(ROLES, 20)}.")


class Paths:
    """Dotted paths, among which others are found that carry more or less prefix."""

    def __init__(self, paths: Iterable[str]):
        self.paths = dict.fromkeys(paths)
        self.ends: dict[str, list[str]] = {}
        for path in self.paths:
            for end in _ends(path):
                self.ends.setdefault(end, []).append(path)

    def match(self, path: str) -> str | None:
        """The one that equals ``path`` up to a prefix on either side; the closest one wins.

        Raises:
            InfuseError: two are equally close.
        """
        fits: dict[int, list[str]] = {}
        for each in (*self.ends.get(path, ()), *(end for end in _ends(path) if end != path and end in self.paths)):
            fits.setdefault(abs(each.count(".") - path.count(".")), []).append(each)
        closest = fits[min(fits)] if fits else [None]
        if len(closest) > 1:
            raise InfuseError(
                f"{path!r} fits several modules of the model alike: {listed(closest)}; write out its path."
            )
        return closest[0]


def _ends(path: str) -> Iterator[str]:
    """A dotted path, and what is left of it without its first part, its first two, and so on."""
    yield path
    while "." in path:
        path = path.partition(".")[2]
        yield path


class Linears:
    """The linear modules of a model as sites, in the table or not, found by paths with more or less prefix.

    Args:
        model: the model; the adapters in it aren't looked at.
        sites: its sites in the table.
    """

    def __init__(self, model: nn.Module, sites: Iterable[Site] = ()):
        self.model = model
        self.known = {s.prefix + s.path: s for s in sites if s.side == "output" and s.whole}

    @cached_property
    def paths(self) -> Paths:
        return Paths(name for name, module in own_modules(self.model) if linear_features(module))

    def site(self, path: str) -> Site | None:
        """The site that stands for the whole output of the linear module at ``path``; ``None`` if none fits."""
        name = self.paths.match(path)
        if name is None:
            return None
        return self.known.get(name) or _site(self.model.get_submodule(name), name, "module", "", 0, name, "")


def site_at(model: nn.Module, path: str, sites: Iterable[Site] = ()) -> Site | None:
    """:meth:`Linears.site` of one path."""
    return Linears(model, sites).site(path)


def own_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The model's own modules; those of the adapters, of which there may be thousands, aren't even walked."""
    return model.named_modules(memo={getattr(model, "infuse", None)})  # type: ignore[arg-type]  # None is no module


def arch_of(model: nn.Module) -> Arch:
    """The table's row for a model, by its ``config.model_type``; an error with the row to write if there is none."""
    kinds = [t for t in (model_type(m) for m in model.modules()) if t]
    for arch in ARCHS:
        if any(kind in arch.types for kind in kinds):
            return arch
    kind = kinds[0] if kinds else type(model).__name__
    raise InfuseError(f"No row for the architecture {kind!r} in infuse.arch; pass arch={_suggest(model, kind)}")


def model_type(module: nn.Module) -> str:
    """``config.model_type`` of a transformers model, or an empty string."""
    return getattr(getattr(module, "config", None), "model_type", "") or ""


def base_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The model's own modules by path; those of adapters, of which there may be thousands, aren't even walked."""
    return model.named_modules(memo={store for m in (model, *model.children()) if (store := m._modules.get("infuse"))})


def transformer_in(model: nn.Module) -> nn.Module:
    """The outermost module that is a transformers model; the module itself if there is none."""
    return next((m for m in model.modules() if model_type(m)), model)


def stack_layers(model: nn.Module, stack: Stack) -> dict[str, nn.Module]:
    """Path → module of the layers of a stack, in order; empty if the model has no such stack."""
    pattern = re.compile(r"(?:(.*)\.)?" + re.escape(stack.layers).replace(r"\*", r"\d+") + r"\.\d+")
    found: dict[str, dict[str, nn.Module]] = {}
    for name, module in model.named_modules():
        if not name.startswith("infuse.") and (match := pattern.fullmatch(name)):
            found.setdefault(match[1] or "", {})[name] = module
    if len(found) > 1:
        places = listed(repr(p or "the model itself") for p in found)
        raise InfuseError(f"{stack.layers!r} fits {len(found)} places: {places}. Attach to one of these submodules.")
    return next(iter(found.values()), {})


def _stack_sites(model: nn.Module, stack: Stack) -> list[Site]:
    layers = stack_layers(model, stack)
    root = re.escape(stack.layers).replace(r"\*", r"\d+")
    prefix = re.sub(root + r"\.\d+$", "", next(iter(layers)))
    config = _config(model)
    sites = []
    for index, (layer_path, layer) in enumerate(layers.items()):
        for role, spec in stack.roles.items():
            paths = (spec.path if isinstance(spec, Part) else spec).split("|")
            path = next((p for p in paths if _has(layer, p)), None)
            if path is None:
                continue
            full = f"{layer_path}.{path}"
            name = f"{stack.name}.{index}".lstrip(".")
            site = _site(layer.get_submodule(path), full.removeprefix(prefix), role, stack.name, index, name, prefix)
            site = replace(site, layer_path=layer_path.removeprefix(prefix))
            if role in stack.residuals:
                residual = stack.residuals[role]
                norm = layer.get_submodule(residual.norm) if residual.norm else None
                site = replace(site, source=f"{layer_path}.{residual.source}", norm=norm)
            if isinstance(spec, Part):
                site = replace(site, **_span(spec, config, site.out_features))
            if role == "ffn_output":
                hidden = replace(
                    site, name=f"{name}.ffn_hidden", role="ffn_hidden", side="input", source=None, norm=None
                )
                sites.append(hidden)
            sites.append(site)
    return sites


def _site(module: nn.Module, path: str, role: str, stack: str, layer: int, name: str, prefix: str) -> Site:
    features = linear_features(module)
    if not features:
        raise InfuseError(f"{path!r} is a {type(module).__name__}; a role must name a linear module.")
    if isinstance(module, _Uncalled):
        raise InfuseError(
            f"nn.MultiheadAttention reads the weight of {path!r} without calling it, so that an adapter there would "
            "change nothing; leave it out, and adapt ffn_up or ffn_output."
        )
    label = name if role == "module" else f"{name}.{role}"
    return Site(label, role, stack, layer, path, prefix, module, "output", 0, features[1], *features)


def linear_features(module: nn.Module) -> tuple[int, int] | None:
    """(in, out) of a linear module or GPT-2's ``Conv1D``, else ``None``."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if type(module).__name__ == "Conv1D":
        return module.nx, module.nf  # type: ignore[return-value]  # ints that nn.Module's stubs widen
    return None


def _span(part: Part, config: Any, width: int) -> dict[str, int]:
    def units(unit: int | str) -> int:
        if isinstance(unit, int):
            return unit
        return getattr(config, unit, None) or config.num_attention_heads

    sizes = [units(u) for u in part.of]
    if width % sum(sizes):
        raise InfuseError(f"The fused projection {part.path!r} is {width} wide, which {part.of} does not divide.")
    scale = width // sum(sizes)
    start = scale * sum(sizes[: part.index])
    return {"start": start, "stop": start + scale * sizes[part.index]}


def _layer_indices(sites: Sequence[Site], stack: str, layers: "str | Iterable[int]") -> set[int]:
    depth = 1 + max(s.layer for s in sites if s.stack == stack)
    if not isinstance(layers, list):
        match = re.fullmatch(r"(first|last):(\d+)|(\d+(?:,\d+)*)", layers) if isinstance(layers, str) else None
        if not match:
            raise InfuseError(
                f"layers={layers!r} is not understood: write 'all', 'last:2', 'first:2', '0,3' or [0, 3]."
            )
        if match[3]:
            return {int(i) for i in match[3].split(",")}
        count = int(match[2])
        return set(range(max(0, depth - count), depth) if match[1] == "last" else range(min(count, depth)))
    return set(layers)


def _has(module: nn.Module, path: str) -> bool:
    try:
        return module.get_submodule(path) is not None
    except AttributeError:
        return False


def _config(model: nn.Module) -> Any:
    return next((m.config for m in model.modules() if hasattr(m, "config")), None)


def _layer_lists(model: nn.Module) -> list[str]:
    return [n for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) and _linears(m[0])]


def _linears(layer: nn.Module) -> dict[str, nn.Module]:
    return {n: m for n, m in layer.named_modules() if linear_features(m) and not isinstance(m, _Uncalled)}


# Names that published models give to the linear modules of a role, for the suggestion in an error.
_USUAL = {
    "query": r"(q|query|q_proj|q_lin|wq|query_proj)",
    "key": r"(k|key|k_proj|k_lin|wk|key_proj)",
    "value": r"(v|value|v_proj|v_lin|wv|value_proj)",
    "qkv": r"(qkv|qkv_proj|Wqkv|c_attn|query_key_value|in_proj)",
    "attention_output": r"(o|o_proj|out_proj|out_lin|wo|Wo)|.*(attn|attention).*",
    "ffn_gate": r"(gate_proj|wi_0|w1|gate)",
    "ffn_up": r"(up_proj|wi|wi_1|w3|fc1|lin1|c_fc|dense_h_to_4h|linear1)|.*intermediate.*",
    "ffn_output": r"(down_proj|w2|fc2|lin2|wo|c_proj|dense_4h_to_h|linear2)|.*output.*",
}


def _suggest(model: nn.Module, kind: str | None = None) -> str:
    """An ``Arch(...)`` line for a model outside the table, guessed from its longest list of alike layers."""
    kind = kind or model_type(model) or type(model).__name__
    lists = _layer_lists(model)
    if not lists:
        return f'Arch(("{kind}",), (Stack("PATH.TO.LAYERS", {{"query": "PATH.BELOW.A.LAYER", …}}),)).'
    path = max(lists, key=lambda n: len(model.get_submodule(n)))  # type: ignore[arg-type]  # a ModuleList
    linears = _linears(model.get_submodule(path)[0])  # type: ignore[index]  # a ModuleList
    roles: dict[str, str] = {}
    for role, usual in _USUAL.items():
        taken = set(roles.values())
        fits = [n for n in linears if n not in taken and re.fullmatch(usual, n.rsplit(".", 1)[-1])]
        fits = fits or [n for n in linears if n not in taken and re.fullmatch(usual, n)]
        if fits:
            roles[role] = fits[0]
    rest = [n for n in linears if n not in roles.values()]
    table = ", ".join(f'"{role}": "{name}"' for role, name in roles.items())
    extra = f" (its other linear modules: {listed(rest)})" if rest else ""
    return f'Arch(("{kind}",), (Stack("{path}", {{{table}}}),)){extra}.'

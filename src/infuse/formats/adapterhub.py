"""Files of AdapterHub (the ``adapters`` library): bottlenecks, Compacter, LoRA, (IA)³ and fusions, read and written.

What a file computes follows from its config; what can't be expressed here is refused by name, never approximated.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from infuse.adapter import Adapter, classification_head, dotted
from infuse.errors import InfuseError, listed
from infuse.formats import hub_config as config_of
from infuse.formats.bundle import UNNAMED, Bundle, fitted, roles_of
from infuse.formats.content import is_file
from infuse.formats.peft import by_module, heads
from infuse.method import Method, Params
from infuse.methods.bottleneck import Bottleneck
from infuse.methods.compacter import Compacter
from infuse.methods.fusion import Fusion
from infuse.methods.ia3 import IA3
from infuse.methods.lora import LoRA
from infuse.sites import Linears, Paths, Site, model_type, transformer_in

_LEGACY = re.compile(r"\.(attention|layer)_text_(task|lang)_adapters\.")
_KINDS = re.compile(r"(?:^|\.)(adapters|loras|shared_parameters|adapter_fusion_layer)\.")
_CONTAINERS = {
    "attention_output": "attention_adapters",
    "cross_attention_output": "cross_attention_adapters",
    "ffn_output": "output_adapters",
}
_FUSION_OPTIONS = {
    "key": True,
    "query": True,
    "value": True,
    "value_before_softmax": True,
    "query_before_ln": False,
    "residual_before": False,
    "temperature": False,
}
_FUSION = {"Q": "query.weight", "q": "query.bias", "K": "key.weight", "k": "key.bias", "V": "value.weight"}


def container(model: nn.Module, site: Site) -> str:
    """The path under which the library hangs the adapters of a sublayer's output."""
    kind = model_type(transformer_in(model))
    if kind in ("bert", "roberta", "xlm-roberta", "electra", "deberta-v2"):
        return site.path.removesuffix(".dense")
    if kind in ("t5", "mt5"):
        return re.sub(r"(\.layer\.\d+)\..*", r"\1", site.path)
    where = f"{site.layer_path}.attention" if kind == "albert" and "attention" in site.role else site.layer_path
    return f"{where}.{_CONTAINERS[site.role]}"


def containers(model: nn.Module, sites: Sequence[Site]) -> dict[str, Site]:
    """Container path → site, for all outputs of sublayers."""
    return {container(model, s): s for s in sites if s.role in _CONTAINERS and s.side == "output" and s.whole}


def read(model: nn.Module, sites: Sequence[Site], tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> Bundle:
    """An adapter folder's tensors as deltas of ``model``.

    Raises:
        InfuseError: an option or method that Infuse lacks, keys that fit nothing, wrong shapes, a lost shared rule.
    """
    name = str(config.get("name") or "default")
    parts = grouped(tensors, name)
    settings = config_of.resolved(config)
    kind = _kind(model, config)
    config_of.check_base(kind, sites)
    base = {
        "name": str(config.get("model_name") or UNNAMED),
        "type": str(config.get("model_type") or ""),
        "digest": "",
    }
    if settings.get("architecture") == "lora":
        deltas = _lora(model, sites, parts.get("loras", {}), config, settings)
        return _bundle(deltas, name, base)
    if settings.get("architecture") is not None:
        raise InfuseError(
            f"The file holds an adapter of type {settings['architecture']!r}, which Infuse does not have."
        )
    method = config_of.bottleneck(settings, kind)
    places = containers(model, sites)
    paths = Paths(places)
    deltas: list[tuple[Site, Method, Params]] = []
    for path, found in parts.get("adapters", {}).items():
        place = paths.match(path)
        if place is None:
            raise InfuseError(f"The file adapts {path!r}, which {type(model).__name__} does not have.")
        site = places[place]
        _check_new(site, deltas)
        own = config_of.at(method, settings, site, kind, found)
        deltas.append((site, own, _params(own, site, found)))
    shared = {}
    if "rule" in method.shared(()):
        rule = next(iter(parts.get("shared_parameters", {}).values()), {}).get("phm_rule")
        if rule is None:
            raise InfuseError(
                "The file lacks Compacter's shared rule, which the library loses when it saves from a model without a "
                "head; save it again from a model with one."
            )
        shared = {"rule": fitted("phm_rule", rule, method.shared(())["rule"].shape)}
    bundle = _bundle(deltas, name, base)
    bundle.shared = shared
    return bundle


def read_head(model: nn.Module, sites: Sequence[Site], tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The head of a transformers class (``classifier.weight``, …) as trained copies; others have no place here.

    The library leaves the transformer out of such a file, but not T5's where it has a prefix.
    """
    if any(k.startswith("heads.") for k in tensors) and classification_head(model):
        raise InfuseError(
            "The file's head is one of the library's AdapterModel classes: the untrained head of "
            f"{type(model).__name__} would answer instead. Load the adapter onto AutoModel, or remove the head's files."
        )
    inner: Any = transformer_in(model)
    others = ("heads.", f"{getattr(inner, 'base_model_prefix', '')}.")
    tops = [name for name, _ in model.named_children()]
    copies = heads(model, {k: v for k, v in tensors.items() if not k.startswith(others)}, tops)
    for path in copies:
        if any((site.prefix + site.path).startswith(path + ".") for site in sites):
            raise InfuseError(f"The file's head holds {path!r}, of which {type(model).__name__}'s transformer is made.")
    return copies


def read_fusion(
    model: nn.Module, sites: Sequence[Site], tensors: Mapping[str, Tensor], config: Mapping[str, Any]
) -> Bundle:
    """A fusion folder's tensors; its members are attached already, or are loaded beside it."""
    settings = config.get("config")
    settings = {"value": settings != "static"} if isinstance(settings, str | None) else dict(settings)
    for option, only in _FUSION_OPTIONS.items():
        if settings.get(option, only) != only:
            raise InfuseError(f"The fusion file uses {option}={settings[option]}, which Infuse's Fusion does not have.")
    name = str(config["name"])
    members = [str(m) for m in config.get("adapter_names") or name.split(",")]
    kind = _kind(model, config)
    places, deltas = containers(model, sites), []
    paths = Paths(places)
    for path, found in grouped(tensors, name).get("adapter_fusion_layer", {}).items():
        place = paths.match(path)
        if place is None:
            raise InfuseError(f"The file fuses at {path!r}, which {type(model).__name__} does not have.")
        _check_new(places[place], deltas)
        method = config_of.fusion(places[place], kind)
        with torch.device("meta"):
            expected = method.init(places[place])
        params = {
            n: fitted(f"{path}.{_FUSION[n]}", _take(found, path, _FUSION[n]), v.shape) for n, v in expected.items()
        }
        deltas.append((places[place], method, params))
    base = {"name": str(config.get("model_name") or UNNAMED), "type": "", "digest": ""}
    bundle = _bundle(deltas, name, base)
    bundle.members = members
    return bundle


def write(
    model: nn.Module, sites: Sequence[Site], adapter: Adapter, version: str = "1.3.0"
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors under the library's names, and the content of ``adapter_config.json``.

    Raises:
        InfuseError: the library has no such method, or not these settings, or would make deltas that the adapter lacks.
    """
    facts = _facts(model, adapter, version)
    config_of.check_base(facts["model_type"], sites)
    config = config_of.written(adapter, sites, facts["model_type"])
    return gathered(model, adapter), {"config": config, **facts}


def write_fusion(
    model: nn.Module, adapter: Adapter, members: Sequence[Adapter], version: str = "1.3.0"
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors of a fusion under the library's names, and the content of ``adapter_fusion_config.json``."""
    if not isinstance(adapter.method, Fusion):
        raise InfuseError(f"AdapterHub's files have fusions, but no {adapter.method.name}.")
    for member in members:
        if not isinstance(member.method, Bottleneck | Compacter) or set(member.sites) != set(adapter.sites):
            raise InfuseError(
                f"AdapterHub fuses bottlenecks and Compacter, all at the same modules; {member.name!r} is not such."
            )
    facts = _facts(model, adapter, version)
    own: Any
    for site in adapter.sites.values():
        own, theirs = adapter.method_at(site), config_of.fusion(site, facts["model_type"])
        mixed = tuple(member.method_at(site) for member in members)
        if own.mixed(mixed) != theirs.mixed(mixed) or own.adds_query(mixed) != theirs.adds_query(mixed):
            reads = listed(sorted({getattr(member, "reads", "") for member in mixed}))
            raise InfuseError(
                "AdapterHub's fusions have all members read what the last one does, and add the residual twice if that "
                f"is parallel: members that read {reads} can't be written."
            )
    settings = {
        "dropout_prob": None, "key": True, "query": True, "query_before_ln": False, "regularization": True,
        "residual_before": False, "temperature": False, "value": True, "value_before_softmax": True,
        "value_initialized": True,
    }  # fmt: skip
    return gathered(model, adapter), {"adapter_names": list(adapter.members), "config": settings, **facts}


def write_head(model: nn.Module, adapter: Adapter, version: str = "1.3.0") -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors of the adapter's copy of the model's own head, and the content of ``head_config.json``."""
    own = classification_head(model)
    if other := [path for path in map(dotted, adapter.copies) if path.split(".")[0] not in own]:
        raise InfuseError(
            f"AdapterHub's files have a place for a classification head, none for a trained copy of {listed(other)}."
        )
    config: Any = model.config
    facts = {"label2id": config.label2id, "num_labels": config.num_labels, "config": None}
    tensors = {
        f"{dotted(path)}.{name}": value.detach()
        for path, module in adapter.copies.items()
        for name, value in module.state_dict().items()
    }
    return tensors, {**_facts(model, adapter, version), **facts, "name": None}


def _facts(model: nn.Module, adapter: Adapter, version: str) -> dict[str, Any]:
    inner: Any = transformer_in(model)
    if model_type(inner) not in config_of.KINDS:
        raise InfuseError(f"AdapterHub's library does not support the model type {model_type(inner)!r}.")
    return {
        "hidden_size": getattr(inner.config, "hidden_size", None) or getattr(inner.config, "d_model", None),
        "model_class": type(model).__name__,
        "model_name": getattr(inner, "name_or_path", ""),
        "model_type": model_type(inner),
        "name": adapter.name,
        "version": f"adapters.{version}",
    }


def gathered(model: nn.Module, adapter: Adapter, value: Callable[[Tensor], Any] = Tensor.detach) -> dict[str, Tensor]:
    """``value`` of every parameter (itself, or its gradient) under the library's names and in its shapes."""
    tensors: dict[str, Tensor] = {}
    if isinstance(adapter.method, LoRA | IA3):
        for path, on in by_module(adapter.sites.values()).items():
            params = [{n: value(t) for n, t in adapter.params(s).items()} for s in on]
            for key in params[0]:
                joined = torch.cat([p[key] for p in params])
                name = config_of.LORA_KEYS[key]
                tensors[f"{path}.loras.{adapter.name}.{name}"] = joined[:, None] if joined.dim() == 1 else joined
        return tensors
    kind = "adapter_fusion_layer" if isinstance(adapter.method, Fusion) else "adapters"
    for site in adapter.sites.values():
        keys = _FUSION if kind == "adapter_fusion_layer" else config_of.keys(adapter.method_at(site))
        prefix = f"{site.prefix}{container(model, site)}.{kind}.{adapter.name}"
        for name, parameter in adapter.params(site).items():
            if name in keys:
                tensors[f"{prefix}.{keys[name]}"] = value(parameter)
    if "rule" in adapter.shared:
        prefix = next(iter(adapter.sites.values())).prefix
        tensors[f"{prefix}shared_parameters.{adapter.name}.phm_rule"] = value(adapter.shared["rule"])
    return tensors


def grouped(tensors: Mapping[str, Tensor], name: str) -> dict[str, dict[str, dict[str, Tensor]]]:
    """Kind (``adapters``, ``loras``, …) → place → rest of the key → tensor; the adapter's name stands between them."""
    found: dict[str, dict[str, dict[str, Tensor]]] = {}
    for key, tensor in tensors.items():
        plain = _LEGACY.sub(".adapters.", key)
        match = _KINDS.search(plain)
        if match is None or not plain[match.end() :].startswith(name + "."):
            what = re.search(r"invertible|prefix|prompt|reft|vera", plain)
            raise InfuseError(
                f"The file holds {key!r}, {'which Infuse does not have' if what else 'which fits no adapter'}."
            )
        rest = plain[match.end() + len(name) + 1 :]
        found.setdefault(match[1], {}).setdefault(plain[: match.start()], {})[rest] = tensor
    return found


def tensors_path(folder: Path, names: Sequence[str]) -> Path:
    return next((folder / n for n in names if is_file(folder / n)), folder / names[0])


def _kind(model: nn.Module, config: Mapping[str, Any]) -> str:
    """The model's type, which has to be that of the file: layers of other architectures may carry the same names."""
    kind = model_type(transformer_in(model))
    made_for = config.get("model_type")
    if kind and made_for and kind != made_for:
        raise InfuseError(
            f"The file was made for a {made_for!r} model, but this is a {kind!r}; load it onto its own base."
        )
    return kind


def _bundle(deltas: list[tuple[Site, Method, Params]], name: str, base: dict[str, str]) -> Bundle:
    if not deltas:
        raise InfuseError(f"None of the file's tensors belongs to the adapter {name!r} that its config names.")
    roles = roles_of(s for s, _, _ in deltas)
    deltas = [(s, replace(m, roles=roles), p) for s, m, p in deltas]
    return Bundle(deltas[0][1], deltas, base=base, name=name)


def _check_new(site: Site, deltas: list[tuple[Site, Method, Params]]) -> None:
    if any(other.name == site.name for other, _, _ in deltas):  # at once: a file may name a place in any number of ways
        raise InfuseError("The file has two deltas for one place in this model: it was made for another architecture.")


def _params(method: Method, site: Site, found: Mapping[str, Tensor]) -> dict[str, Tensor]:
    method.check(site)  # before init: settings that can't work here may ask for much work
    with torch.device("meta"):
        expected = method.init(site)
    keys = config_of.keys(method)
    if extra := set(found) - {keys[n] for n in expected}:
        raise InfuseError(f"The file holds {listed(sorted(extra), 3)} at {site.path}, which Infuse can't express.")
    return {n: fitted(f"{site.path}.{keys[n]}", _take(found, site.path, keys[n]), v.shape) for n, v in expected.items()}


def _take(found: Mapping[str, Tensor], place: str, key: str) -> Tensor:
    if key not in found:
        raise InfuseError(f"The file lacks {key} at {place}; save or download it again.")
    return found[key]


def _lora(
    model: nn.Module,
    sites: Sequence[Site],
    places: Mapping[str, Mapping[str, Tensor]],
    config: Mapping[str, Any],
    settings: Mapping[str, Any],
) -> list[tuple[Site, Method, Params]]:
    method = config_of.lora(settings, config)
    chosen = [r for r in ("query", "key", "value") if r[0] in settings.get("attn_matrices", ["q", "v"])]
    deltas: list[tuple[Site, Method, Params]] = []
    linears = Linears(model, sites)
    for path, found in places.items():
        whole = linears.site(path)
        if whole is None:
            raise InfuseError(f"The file adapts {path!r}, which {type(model).__name__} does not have.")
        slices = [s for s in sites if s.module is whole.module and not s.whole and s.role in chosen]
        on = slices if whole.role == "qkv" else [whole]
        if isinstance(method, IA3):
            on = [config_of.ia3_site(s, sites) for s in on]
        for site in on:
            _check_new(site, deltas)
        with torch.device("meta"):
            expected = [method.init(site) for site in on]
        for key in expected[0]:
            name = config_of.LORA_KEYS[key]
            sizes = [int(e[key].shape[0]) for e in expected]
            joined = torch.Size((sum(sizes), *expected[0][key].shape[1:]))
            split = fitted(f"{path}.{name}", _take(found, path, name), joined).split(sizes)
            for each, part in zip(expected, split, strict=True):
                each[key] = part
        deltas += [(site, method, each) for site, each in zip(on, expected, strict=True)]
    return deltas

"""Files of PEFT (``adapter_config.json`` with a ``peft_type``): read them, and write ours so that PEFT reads them.

PEFT adapts whole modules. Slices of a fused projection are written as the one delta on the whole module that equals
them, and cut apart again on reading our own files.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from infuse.adapter import Adapter, dotted
from infuse.errors import InfuseError, listed
from infuse.foreign import Patterns
from infuse.formats.bundle import UNNAMED, Bundle, fitted, roles_of
from infuse.formats.content import check_names
from infuse.formats.vocabulary import check_vocabulary, with_twins
from infuse.method import Method, Params, registry
from infuse.sites import Linears, Paths, Site, own_modules

PREFIX = "base_model.model."
_TASKS: dict[str, tuple[str, tuple[str, ...]]] = {
    "ForSequenceClassification": ("SEQ_CLS", ("classifier", "score")),
    "ForTokenClassification": ("TOKEN_CLS", ("classifier", "score")),
    "ForQuestionAnswering": ("QUESTION_ANS", ("qa_outputs",)),
    "ForCausalLM": ("CAUSAL_LM", ()),
    "ForConditionalGeneration": ("SEQ_2_SEQ_LM", ()),
}
"""End of a model class's name → PEFT's name of the task, and the ends of the modules that it then demands of a file."""
_PATTERNS = ("rank_pattern", "alpha_pattern")


def expressible(adapter: Adapter) -> bool:
    """Whether PEFT has the adapter's method and a module for each of its deltas."""
    if adapter.method.peft_type is None:
        return False
    return all(len({s.side for s in sites}) == 1 for sites in by_module(adapter.sites.values()).values())


def by_module(sites: Any) -> dict[str, list[Site]]:
    """Full path of a module → the sites on it, in the order of their slices."""
    groups: dict[str, list[Site]] = {}
    for site in sorted(sites, key=lambda s: (not s.whole, s.start)):
        groups.setdefault(site.prefix + site.path, []).append(site)
    return groups


def write(model: nn.Module, adapter: Adapter) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors under PEFT's names, and the content of ``adapter_config.json``."""
    tensors: dict[str, Tensor] = {}
    made: dict[str, Method] = {}
    for path, sites in by_module(adapter.sites.values()).items():
        method, params = _fused(adapter, sites)
        made[path] = method
        for name, value in method.to_peft_tensors(params, sites[0].side).items():
            tensors[f"{PREFIX}{path}.{name}"] = value.detach().contiguous()
    for path, module in adapter.copies.items():
        for name, value in module.state_dict().items():
            tensors[f"{PREFIX}{dotted(path)}.{name}"] = value.detach().contiguous()
    usual = Counter(made.values()).most_common(1)[0][0]
    config = {
        "peft_type": adapter.method.peft_type,
        "task_type": _task(model, adapter),
        "base_model_name_or_path": getattr(model, "name_or_path", "") or None,
        "inference_mode": True,
        "target_modules": sorted(made),
        "modules_to_save": sorted(map(dotted, adapter.copies)) or None,
        "fan_in_fan_out": any(site.transposed for site in adapter.sites.values()),
        **usual.to_peft(made, by_module(adapter.sites.values())),
    }
    return tensors, config


def _task(model: nn.Module, adapter: Adapter) -> str | None:
    """PEFT's name of the model's task, unless that would make it ask for a head which is not in the file."""
    end = next((end for end in _TASKS if type(model).__name__.endswith(end)), None)
    task, demanded = _TASKS[end] if end else (None, ())
    there = [name for name, _ in own_modules(model) if name.endswith(demanded)] if demanded else []
    return task if set(there) <= set(map(dotted, adapter.copies)) else None


def read(model: nn.Module, sites: Sequence[Site], tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> Bundle:
    """A PEFT file as deltas on whole modules of ``model``.

    Raises:
        InfuseError: a PEFT method or option that Infuse does not have, keys that fit nothing, wrong shapes.
    """
    kind = config.get("peft_type")
    cls = next((m for m in registry().values() if m.peft_type == kind), None)
    if cls is None:
        have = listed(m.peft_type for m in registry().values() if m.peft_type)
        raise InfuseError(f"The file holds a PEFT adapter of type {kind!r}; Infuse reads {have}.")
    saved = config.get("modules_to_save") or []
    if not isinstance(saved, list):
        raise InfuseError(f"The file's modules_to_save is no list of names but {saved!r}.")
    check_names(saved, Path("modules_to_save"))
    grouped, rest, origins = modules(model, cls, tensors)
    copies = heads(model, rest, saved)  # first: if the vocabulary is another one, that is what to say
    if not grouped:
        raise InfuseError(
            f"None of the file's tensors fits {type(model).__name__} (the first is {next(iter(tensors), '')!r}); "
            "use the architecture that it was made for."
        )
    named_so = {path: name for path, _ in own_modules(model) for name in saved if f".{path}".endswith(f".{name}")}
    check_saved(model, copies, named_so)
    patterns = {key: Patterns(value) for key in _PATTERNS if (value := config.get(key))}
    linears, deltas = Linears(model, sites), []
    for path, found in grouped.items():
        method = cls.from_peft({**config, **patterns}, origins[path])
        site = linears.site(path)
        assert site is not None
        if method.peft_side(found) == "input":
            site = next((s for s in sites if s.side == "input" and s.module is site.module), None) or replace(
                site, name=f"{site.name}:input", side="input"
            )
        deltas.append((site, method, named(method, site, found)))
    base = {"name": str(config.get("base_model_name_or_path") or UNNAMED), "type": "", "digest": ""}
    method = replace(deltas[0][1], roles=roles_of(s for s, _, _ in deltas))
    common = Counter(replace(m, roles=method.roles) for _, m, _ in deltas).most_common(1)[0][0]
    return Bundle(
        common,
        [(s, replace(m, roles=common.roles), p) for s, m, p in deltas],
        copies=copies,
        base=base,
    )


def modules(
    model: nn.Module, cls: type[Method], tensors: Mapping[str, Tensor]
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor], dict[str, str]]:
    """Group a file's tensors by module of the model, whatever prefix either carries.

    Returns:
        the tensors of each module by their suffix, those that belong to no delta, and each module's path in the file.
    """
    grouped: dict[str, dict[str, Tensor]] = {}
    origins: dict[str, str] = {}
    rest, lost = {}, []
    linear = Linears(model).paths
    for key, value in tensors.items():
        bare = key.removeprefix(PREFIX).removesuffix(".weight") if "magnitude" in key else key.removeprefix(PREFIX)
        suffix = next((s for s in cls.peft_keys.values() if bare.endswith("." + s)), None)
        if suffix is None and ("lora_" in bare or "ia3_" in bare):
            why = "Infuse adapts linear modules only" if "embedding" in bare else "Infuse has no place for it"
            raise InfuseError(f"The file holds an adapter's tensor {bare!r}: {why}.")
        if suffix is None:
            rest[bare] = value
            continue
        origin = bare.removesuffix("." + suffix)
        path = linear.match(origin)
        if path is None:
            lost.append(key)
            continue
        if origins.setdefault(path, origin) != origin:
            raise InfuseError(
                f"Both {origins[path]} and {origin} of the file fit {path} of {type(model).__name__}; "
                "use the architecture that it was made for."
            )
        grouped.setdefault(path, {})[suffix] = value
    if lost and grouped:
        raise InfuseError(f"The file adapts modules that {type(model).__name__} does not have: {listed(lost, 3)}.")
    return grouped, rest, origins


def heads(model: nn.Module, rest: Mapping[str, Tensor], saved: Sequence[str]) -> dict[str, dict[str, Tensor]]:
    """Tensors of trained copies, by module of the model; a head that this model has no module for is left out.

    PEFT strips ``modules_to_save.<adapter>.`` from the keys, so that ``classifier.weight`` remains; ``saved`` is the
    config's list of such modules' names. It saves embeddings unasked where a vocabulary was resized, and those of the
    base: where modules share them, all of them have what the file brings.
    """
    paths = Paths(n for n, _ in own_modules(model) if n)
    names = tuple(saved)
    copies: dict[str, dict[str, Tensor]] = {}
    unasked: set[str] = set()
    for key, value in rest.items():
        parts = key.split(".")
        if "original_module" in parts:
            continue
        if "modules_to_save" in parts:
            at = parts.index("modules_to_save")
            parts = parts[:at] + (parts[at + 2 :] or parts[at + 1 :])
        if "base_layer" in parts:  # the base's own weight under a delta, which PEFT saves of embeddings and their twins
            path = paths.match(".".join(parts[: parts.index("base_layer")]))
            base = None if path is None else getattr(model.get_submodule(path), parts[-1], None)
            if base is not None:
                check_vocabulary(model, str(path), value.shape, base.shape)
            if base is None or base.shape != value.shape or not torch.equal(base, value.to(base)):
                raise InfuseError(f"The file brings a base weight of its own at {key!r}; load it onto that base.")
            continue
        # PEFT matches these names as plain suffixes: its "classifier" takes "pre_classifier" too.
        ends = [end for end in range(1, len(parts)) if ".".join(parts[:end]).endswith(names)]
        for end in [*ends, len(parts) - 1]:
            path = paths.match(".".join(parts[:end]))
            if path is not None:
                copies.setdefault(path, {})[".".join(parts[end:])] = value
                unasked |= set() if ends else {path}
                break
    return with_twins(model, copies, unasked)


def check_saved(model: nn.Module, copies: Mapping[str, Any], trained: Mapping[str, str]) -> None:
    """Refuse a file without the tensors of a module that it names as trained, and that the model has.

    The module would answer as it is in the model, which for a head is at random.

    Args:
        trained: path of a module of the model → its name in the file.
    """
    within = tuple(f"{path}." for path in copies)
    for path, name in trained.items():
        if not f"{path}.".startswith(within) and next(model.get_submodule(path).parameters(), None) is not None:
            raise InfuseError(
                f"The file names {name!r} as trained (modules_to_save) but holds no tensors for {path}; save it again "
                "with them, or take the name out of its config."
            )


def named(method: Method, site: Site, found: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """PEFT's tensors of one module under the method's own names, in the shapes that the site needs."""
    with torch.device("meta"):
        expected = method.init(site)
    params = {}
    for name, value in expected.items():
        suffix = method.peft_keys[name]
        if suffix not in found:
            raise InfuseError(f"The file lacks {suffix} for {site.path}; save or download it again.")
        params[name] = fitted(f"{site.path}.{suffix}", found[suffix], value.shape)
    if extra := found.keys() - {method.peft_keys[name] for name in expected}:
        raise InfuseError(f"The file holds {listed(sorted(extra))} for {site.path}, of which its config says nothing.")
    return params


def _fused(adapter: Adapter, sites: list[Site]) -> tuple[Method, Params]:
    delta = adapter.delta(sites[0])
    assert delta is not None
    if len(sites) == 1 and sites[0].whole:
        return delta.method, adapter.params(sites[0])
    return delta.method.fuse([(site, adapter.params(site)) for site in sites])

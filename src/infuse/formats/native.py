"""Infuse's own files: what their header says, checked word by word, and the adapter that it describes."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from infuse.adapter import Adapter, Delta, dotted, key
from infuse.errors import InfuseError, listed
from infuse.formats import peft
from infuse.formats.bundle import Bundle, as_json, fitted
from infuse.formats.content import NAMES, TEXT_LENGTH, check_names, parse_json, sound
from infuse.formats.tensors import parse_metadata
from infuse.heads import Head
from infuse.method import Method, make
from infuse.model import check_name
from infuse.sites import Linears, Paths, Site, own_modules

HEADER = "infuse"
VERSION = 1
"""Of the header's form; files of a later one are refused."""
HEAD = "infuse.head."
_MEMBERS = 500
_LISTS = ("sites", "members", "copies")


def facts_of(content: bytes, where: Path) -> dict[str, Any]:
    """The facts in the header of a file's content; its tensors aren't looked at."""
    metadata = parse_metadata(content, where)
    if HEADER not in metadata:
        raise InfuseError(f"{where} was not written by Infuse; load it onto a model to see what it holds.")
    return parse_facts(metadata[HEADER], where)


def parse_facts(text: str, where: Path) -> dict[str, Any]:
    """The facts in a header, each of its own type; what they ask for is not made yet."""
    # Facts that a user gave an adapter may hold NaN, which is nobody's harm.
    facts = parse_json(text, where, "has a damaged description", numbers=False)
    return sound(lambda: _checked(facts, where), where)


def _checked(facts: dict[str, Any], where: Path) -> dict[str, Any]:
    if type(facts["version"]) is not int or facts["version"] < 1:
        raise TypeError(f"the form {facts['version']!r}")
    if facts["version"] > VERSION:
        raise InfuseError(
            f"The adapter was saved by a newer Infuse (its file has form {facts['version']}, and this one reads up to "
            f"{VERSION}); update Infuse."
        )
    facts["base"] = {k: facts["base"][k] for k in ("name", "type", "digest")}
    if odd := [w for w in (facts["name"], *facts["base"].values()) if not isinstance(w, str) or len(w) > TEXT_LENGTH]:
        raise TypeError(f"the name {str(odd[0])[:80]!r}")
    facts["info"] = dict(facts["info"])
    if facts["layout"] not in ("peft", "native"):
        raise ValueError(f"the layout {facts['layout']!r}")
    lists = {name: facts.get(name) or [] for name in _LISTS}
    types = [(value, list) for value in lists.values()] + [(facts["method"], dict)]
    types += [(value, dict) for value in (facts.get("settings") or {}).values()]
    if wrong := next((value for value, kind in types if not isinstance(value, kind)), None):
        raise TypeError(f"a {type(wrong).__name__} in an odd place")
    for name, words in lists.items():
        check_names(words, where)
        if len(set(words)) < len(words):
            raise ValueError(f"its {name} name one twice")
    facts |= lists
    if len(facts["members"]) > _MEMBERS:
        raise ValueError(f"{len(facts['members']):,} members")
    for member in facts["members"]:
        check_name(member)
    if facts["head"] is not None:
        facts["head"] = _head(facts["head"])
    return facts


def _head(settings: Mapping[str, Any]) -> dict[str, Any]:
    labels, multi = settings["labels"], settings.get("multi", False)
    if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels) or type(multi) is not bool:
        raise TypeError("the head's labels are no list of names")
    if not 0 < len(set(labels)) == len(labels) <= NAMES:
        raise ValueError("the head has no label, too many, or one twice")
    "".join(labels).encode()  # half a character can't be shown to anybody
    with torch.device("meta"):
        return Head(**settings).settings()


def read(model: nn.Module, sites: list[Site], tensors: dict[str, Tensor], facts: Mapping[str, Any]) -> Bundle:
    """The adapter that a file holds, matched to a model's sites.

    Raises:
        InfuseError: it needs sites that the model lacks, tensors that the file lacks, or settings that can't work.
    """
    method = make(facts["method"])
    if bool(method.maker) != bool(facts["members"]):
        raise InfuseError(f"The file's {method.name} and its members ({listed(facts['members'], 3)}) don't fit.")
    own = {name: make(value) for name, value in facts["settings"].items()}
    if strange := [name for name, at in own.items() if name not in facts["sites"] or type(at) is not type(method)]:
        raise InfuseError(f"The file has settings at {listed(strange, 3)}, where its {method.name} has no delta.")
    chosen = _chosen(model, sites, facts)
    own = {chosen[name].name: at for name, at in own.items()}
    bundle = Bundle(method, [], base=facts["base"], info=facts["info"], name=facts["name"], members=facts["members"])
    plain = {n: v for n, v in tensors.items() if not n.startswith(HEAD)}
    if facts["layout"] == "peft":
        _read_modules(model, bundle, list(chosen.values()), own, plain, facts["copies"])
    else:
        _fill(bundle, list(chosen.values()), own, plain)
    paths = Paths(path for path, _ in own_modules(model))
    trained = {path: name for name in facts["copies"] if (path := paths.match(name))}
    peft.check_saved(model, bundle.copies, trained)
    if facts["head"] is not None:
        parts = {n.removeprefix(HEAD): v for n, v in tensors.items() if n.startswith(HEAD)}
        bundle.head = Head.restore(facts["head"], parts)
    order = {site.name: i for i, site in enumerate(chosen.values())}
    bundle.deltas.sort(key=lambda delta: order[delta[0].name])
    return bundle


def _chosen(model: nn.Module, sites: list[Site], facts: Mapping[str, Any]) -> dict[str, Site]:
    """Name in the file → the site of the model, a different one for each."""
    known, linears = {s.name: s for s in sites}, Linears(model, sites)
    chosen: dict[str, Site] = {}
    taken: set[tuple] = set()
    for name in facts["sites"]:
        stem = name.removesuffix(":input")
        site = known.get(name) or known.get(stem) or linears.site(stem)
        if site is None:
            raise InfuseError(
                f"The adapter has a delta at {name!r}, which {type(model).__name__} does not have: "
                f"it was made for {facts['base']['name']!r} ({facts['base']['type']})."
            )
        site = replace(site, name=name, side="input") if name.endswith(":input") else site
        place = (site.module, site.side, site.start, site.stop)
        if place in taken:
            raise InfuseError(f"The file has two deltas for one place in {type(model).__name__}, {name!r} and another.")
        taken.add(place)
        chosen[name] = site
    return chosen


def _read_modules(
    model: nn.Module, bundle: Bundle, sites: list[Site], own: Mapping[str, Method], tensors: Mapping[str, Tensor],
    copies: list[str],
) -> None:  # fmt: skip
    """Fill a bundle from tensors under PEFT's names: one delta for all slices of a module."""
    grouped, rest, _ = peft.modules(model, type(bundle.method), tensors)
    for path, on in peft.by_module(sites).items():
        method = own.get(on[0].name, bundle.method)
        found = grouped.pop(path, {})
        bundle.deltas += [(s, method, p) for s, p in zip(on, _unfused(method, on, found), strict=True)]
    if grouped:
        raise InfuseError(f"The file holds tensors that its description lacks: those for {listed(grouped, 3)}.")
    bundle.copies = peft.heads(model, rest, [path.rsplit(".", 1)[-1] for path in copies])


def _unfused(method: Any, on: list[Site], found: Mapping[str, Tensor]) -> list[Any]:
    if len(on) == 1 and on[0].whole:
        return [peft.named(method, on[0], found)]
    whole = replace(on[0], start=0, stop=on[0].out_features)
    return method.split(peft.named(method.fused(len(on)), whole, found), on)


def _fill(bundle: Bundle, sites: list[Site], own: Mapping[str, Any], tensors: dict[str, Tensor]) -> None:
    """Fill a bundle from tensors under Infuse's own names."""

    def take(name: str, like: Tensor) -> Tensor:
        if name not in tensors:
            raise InfuseError(f"The file lacks the tensor {name!r}; save or download it again.")
        return fitted(name, tensors.pop(name), like.shape)

    with torch.device("meta"):
        shared = bundle.method.shared(sites)
    bundle.shared = {n: take(f"shared.{n}", v) for n, v in shared.items()}
    for site in sites:
        method = own.get(site.name, bundle.method)
        method.check(site)  # before init, and site by site: settings that no tensors go with may ask for much work
        with torch.device("meta"):
            fresh = method.init(site)
        bundle.deltas.append((site, method, {n: take(f"deltas.{site.name}.{n}", v) for n, v in fresh.items()}))
    for name, value in tensors.items():
        if not name.startswith("copies."):
            raise InfuseError(f"The file holds a tensor that its description lacks: {name!r}.")
        path, _, rest = name.removeprefix("copies.").partition("/")
        bundle.copies.setdefault(path, {})[rest] = value


def written(adapter: Adapter) -> dict[str, Tensor]:
    """The tensors of an adapter that PEFT's layout can't hold, under Infuse's own names."""
    tensors = {f"shared.{n}": v for n, v in adapter.shared.items()}
    for name in adapter.sites:
        delta: Any = adapter.deltas[key(name)]
        assert isinstance(delta, Delta)
        tensors |= {f"deltas.{name}.{n}": v for n, v in delta.params.items()}
    for path, module in adapter.copies.items():
        tensors |= {f"copies.{dotted(path)}/{n}": v for n, v in module.state_dict().items()}
    return tensors


def dumped(facts: Mapping[str, Any]) -> str:
    """Facts as a header holds them, which reading takes back.

    Raises:
        InfuseError: an adapter's info, say, holds what JSON has no form for.
    """
    try:
        text = as_json(facts)
    except (TypeError, ValueError, RecursionError) as error:
        raise InfuseError(f"The adapter's facts can't be written as JSON ({error}); mend its info.") from None
    parse_facts(text, Path("the adapter"))
    return text

"""Save and load one adapter: Infuse's own files, and those of other libraries, recognised.

A folder holds ``adapter_model.safetensors`` and ``adapter_config.json``. The first is all that Infuse itself needs: its
header carries the method, the sites, the head and the fingerprint of the base, so that replacing that one file replaces
the adapter at once. The second is for other tools: where PEFT has the method, it is PEFT's config, and PEFT loads the
folder as its own.
"""

import json
import re
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from infuse import storage
from infuse.adapter import Adapter, Delta, copies, dotted, key
from infuse.arch import Arch
from infuse.errors import InfuseError, listed
from infuse.fingerprint import Base
from infuse.formats import adapterhub, peft
from infuse.formats.bundle import (
    CONFIG,
    HUB_FUSION,
    HUB_FUSION_WEIGHTS,
    HUB_HEAD,
    HUB_HEAD_WEIGHTS,
    HUB_WEIGHTS,
    PICKLED,
    WEIGHTS,
    Bundle,
    as_json,
    fitted,
    parse_metadata,
    parse_tensors,
    read_bytes,
    read_json,
    read_tensors,
    to_bytes,
    write_folder,
)  # fmt: skip
from infuse.heads import Head
from infuse.method import make, settings
from infuse.model import attach_at, attach_mixer, check_name, detach, owner_of, store_in, store_of
from infuse.sites import Site, arch_of, find_sites, site_at

HEADER = "infuse"
VERSION = 1
"""Of the header's form; files of a later one are refused."""
_HEAD = "infuse.head."


def save(model: nn.Module, name: str, path: str | Path, *, format: str = "infuse") -> Path:
    """Write one adapter, head included, into a folder; readers see the old or the new one, whole.

    A mixer's members go into ``members/NAME`` below it. AdapterHub's files have no place for a head of Infuse: with
    ``adapterhub`` it is left out, with a warning.

    Args:
        model: the adapted model.
        name: the adapter.
        path: the folder; made if need be.
        format: ``infuse`` (which PEFT reads where it has the method) or ``adapterhub``.
    """
    write_folder(Path(path), files_of(model, name, format=format))
    return Path(path)


def files_of(model: nn.Module, name: str, *, format: str = "infuse") -> dict[str, bytes]:
    """The files that :func:`save` writes: path in the folder → content; of equal adapters, the same bytes."""
    adapter = store_of(model)[name]
    if format not in ("infuse", "adapterhub"):
        raise InfuseError(f"Unknown format {format!r}; choose infuse or adapterhub.")
    files = {}
    for member in adapter.members:
        own = files_of(model, member, format=format)
        files |= {f"members/{member}/{path}": content for path, content in own.items()}
    return files | (_files if format == "infuse" else _adapterhub_files)(model, adapter)


def _files(model: nn.Module, adapter: Adapter) -> dict[str, bytes]:
    store, model = store_of(model), owner_of(model)
    # Full fine-tuning has made another base: the head belongs to that one.
    base = Base.of(model, store.arch) if adapter.method.unfreezes else store.base
    tensors, config = _written(model, adapter, base)
    header = {
        "version": VERSION,
        "layout": "peft" if "peft_type" in config else "native",
        "name": adapter.name,
        "method": settings(adapter.method),
        "sites": list(adapter.sites),
        "settings": {
            site: settings(d.method) for site in adapter.sites if (d := _delta(adapter, site)).method != adapter.method
        },
        "members": list(adapter.members),
        "copies": [dotted(path) for path in adapter.copies],
        "base": asdict(base),
        "head": None,
        "info": adapter.info,
    }
    if isinstance(adapter.head, Head):
        header["head"] = adapter.head.settings()
        tensors |= {_HEAD + n: v.detach().contiguous() for n, v in adapter.head.state_dict().items()}
    weights = to_bytes(tensors, {"format": "pt", HEADER: as_json(header)})
    return {CONFIG: json.dumps(config, indent=1).encode() + b"\n", WEIGHTS: weights}


def load(
    model: nn.Module,
    path: str | Path,
    name: str | None = None,
    *,
    arch: Arch | None = None,
    any_base: bool = False,
) -> Adapter:
    """Attach an adapter from a folder that Infuse or PEFT wrote, and make it the active one.

    Args:
        model: the base model, bare or with a head, adapted already or not; file and model may carry different prefixes.
        path: the folder.
        name: the name to give it; by default the one under which it was saved.
        arch: the row to use for an architecture that the table does not have.
        any_base: accept a base whose weights are not those that the adapter was trained on.
    Raises:
        InfuseError: a file is missing, truncated, corrupt or hostile; shapes do not fit; the base is another one. The
            model is as it was.
    """
    store = store_in(model)
    have, active = (set(store.adapters), store.active) if store else (set(), None)
    tree = storage.reading(Path(path), lambda folder: _read_tree(model, folder, have, arch, any_base))
    try:
        return _attach_tree(model, tree, name, have, arch)
    except BaseException:
        new = [each for each in store_of(model).adapters if each not in have] if store_in(model) else []
        for each in reversed(new):  # a mixer before its members
            detach(model, each)
        if store:
            store.active = active
        raise


@dataclass(frozen=True)
class _Tree:
    """An adapter and, of a mixer, the members that its folder holds."""

    bundle: Bundle
    members: dict[str, "_Tree"]


def _read_tree(model: nn.Module, folder: Path, have: set[str], arch: Arch | None, any_base: bool) -> _Tree:
    bundle = read(model, folder, arch=arch, any_base=any_base)
    folders = {member: folder / "members" / check_name(member) for member in bundle.members}
    wanted = {member: at for member, at in folders.items() if member not in have or at.is_dir()}
    return _Tree(bundle, {m: _read_tree(model, at, have, arch, any_base) for m, at in wanted.items()})


def _attach_tree(model: nn.Module, tree: _Tree, name: str | None, have: set[str], arch: Arch | None) -> Adapter:
    for member, own in tree.members.items():
        if member in have:
            _check_member(model, member, own.bundle)
        else:
            _attach_tree(model, own, member, have, arch)
    return attach_bundle(model, tree.bundle, name, arch=arch)


def read(model: nn.Module, path: str | Path, *, arch: Arch | None = None, any_base: bool = False) -> Bundle:
    """What a folder holds, matched to a model's sites; the model is not touched."""
    model, folder = owner_of(model), storage.current(Path(path))
    if (folder / HUB_FUSION).is_file() or adapterhub.tensors_path(folder, HUB_WEIGHTS).is_file():
        return _read_adapterhub(model, folder, _sites(model, arch))
    if not folder.is_dir():
        raise InfuseError(f"There is no folder {folder}; give the folder that holds {CONFIG} and {WEIGHTS}.")
    weights = folder / WEIGHTS
    if not weights.exists() and (folder / PICKLED).exists():
        weights = folder / PICKLED
    tensors, metadata = read_tensors(weights)
    if HEADER in metadata:
        return _matched(model, tensors, metadata, weights, arch, any_base)
    sites = _sites(model, arch)
    config = read_json(folder / CONFIG)
    if "peft_type" not in config:
        raise InfuseError(f"{folder / CONFIG} has no peft_type: neither Infuse nor PEFT wrote it.")
    return _sound(lambda: peft.read(model, sites, tensors, config), folder / CONFIG)


def read_content(model: nn.Module, content: bytes, where: Path) -> Bundle:
    """What the content of an Infuse file holds, matched to a model's sites; ``where`` names it in errors."""
    facts_of(content, where)
    return _matched(owner_of(model), *parse_tensors(content, where), where)


def _matched(
    model: nn.Module, tensors: dict[str, Tensor], metadata: Mapping[str, str], where: Path,
    arch: Arch | None = None, any_base: bool = False,
) -> Bundle:  # fmt: skip
    facts = _sound(lambda: _facts(metadata[HEADER]), where)
    if not any_base:
        _check_base(model, facts["base"], arch)
    sites = _sites(model, arch)
    return _sound(lambda: _read_native(model, sites, tensors, facts), where)


def attach_bundle(model: nn.Module, bundle: Bundle, name: str | None = None, *, arch: Arch | None = None) -> Adapter:
    """Attach what :func:`read` gave."""
    if bundle.members:
        bundle = replace(bundle, deltas=_mixable(model, bundle))
    adapter = _built(model, bundle, name or bundle.name)
    if bundle.members:
        return attach_mixer(model, adapter, bundle.members)
    return attach_at(model, adapter, arch=arch, trained=())


def _built(model: nn.Module, bundle: Bundle, name: str) -> Adapter:
    deltas = {site.name: Delta(method, params) for site, method, params in bundle.deltas}
    adapter = Adapter(name, bundle.method, [s for s, _, _ in bundle.deltas], deltas, bundle.shared)
    for site, method, _ in bundle.deltas:
        method.check(site)
        adapter.deltas[key(site.name)].to(site.weight.device)
    device = next((s.weight.device for s, _, _ in bundle.deltas), torch.device("cpu"))
    adapter.shared.to(device)
    adapter.info = bundle.info
    if bundle.head is not None:
        adapter.head = bundle.head.to(device)
    adapter.copies.update(copies(owner_of(model), bundle.copies))
    for path, state in bundle.copies.items():
        own = adapter.copies[key(path)]
        expected = own.state_dict()
        if missing := expected.keys() - state.keys():
            raise InfuseError(f"The file's copy of {path} lacks {listed(missing)}.")
        # The deltas fit, so that the base is the right one.
        why = "the adapter's head has another number of labels; load the base with its num_labels"
        own.load_state_dict({n: fitted(f"{path}.{n}", state[n], v.shape, why) for n, v in expected.items()})
    return adapter


def _check_member(model: nn.Module, name: str, bundle: Bundle) -> None:
    """Refuse a member in a file whose name another adapter of the model has; what is equal serves for both."""
    have, saved = store_of(model)[name], _built(model, bundle, name)
    methods = [{site: replace(a.method_at(s), roles=()) for site, s in a.sites.items()} for a in (have, saved)]
    own, new = ({n: v for n, v in a.state_dict().items() if not n.startswith("head.")} for a in (have, saved))
    same = methods[0] == methods[1] and own.keys() == new.keys()
    if not same or not all(torch.equal(new[n].to(v), v) for n, v in own.items()):
        raise InfuseError(
            f"The model's adapter {name!r} is not the file's member {name!r}; save it, detach it, and load it again "
            "under another name."
        )


def _mixable(model: nn.Module, bundle: Bundle) -> list[Any]:
    """A mixer's deltas where a member has one: AdapterHub's files hold some at every sublayer, used or not."""
    store = store_of(model)
    used = {site for member in bundle.members for site in store[member].sites}
    return [delta for delta in bundle.deltas if delta[0].name in used] or bundle.deltas


def header(path: str | Path) -> dict[str, Any]:
    """The facts in an Infuse file, without a model: method, head, base, info."""
    weights = Path(path) / WEIGHTS
    return facts_of(storage.reading(Path(path), lambda folder: read_bytes(folder / WEIGHTS)), weights)


def facts_of(content: bytes, where: Path) -> dict[str, Any]:
    """:func:`header` of a file's content; its tensors aren't looked at."""
    metadata = parse_metadata(content, where)
    if HEADER not in metadata:
        raise InfuseError(f"{where} was not written by Infuse; load it onto a model to see what it holds.")
    return _sound(lambda: _facts(metadata[HEADER]), where)


@dataclass(frozen=True)
class Setup:
    """How texts reached an adapter in training: by which base, cut at how many tokens, in which number format."""

    base: str
    max_length: int = 128
    precision: str = "fp32"


def setup_of(facts: Mapping[str, Any], where: Path) -> Setup:
    """The setup that the facts in a file tell; what else its info holds is free.

    Raises:
        InfuseError: they are no facts of a training.
    """

    def build() -> Setup:
        told = {"base": facts["base"]["name"], **facts["info"].get("run", {})}
        setup = Setup(**{f.name: told[f.name] for f in fields(Setup) if f.name in told})
        if wrong := [f.name for f in fields(Setup) if type(getattr(setup, f.name)) is not f.type]:
            raise TypeError(f"of the run's {listed(wrong)}")
        return setup

    setup = _sound(build, where)
    if setup.max_length < 4:  # no room for a word between the special tokens
        raise InfuseError(f"{where} cuts texts at {setup.max_length} tokens; train it with max_length 4 or more.")
    return setup


def amend(path: str | Path, *, head: Mapping[str, Any], info: Mapping[str, Any]) -> None:
    """Replace facts about the head, and add to the info, in an Infuse file; its tensors stay bit for bit.

    No model is needed, so that nothing in the file can depend on the base or the precision it was loaded with. Readers
    see the old or the new file, whole. For whoever holds the lock of the folder (:func:`infuse.storage.writing`).
    """
    folder, weights = Path(path), Path(path) / WEIGHTS
    content = read_bytes(weights)  # once: the file may be replaced meanwhile
    facts = facts_of(content, weights)
    if facts["head"] is None:
        raise InfuseError(f"The adapter in {folder} has no classification head.")
    facts["head"] |= head
    facts["info"] |= info
    tensors, metadata = parse_tensors(content, weights)
    storage.write(weights, to_bytes(tensors, metadata | {HEADER: as_json(facts)}))


def _facts(text: str) -> dict[str, Any]:
    facts = dict(json.loads(text))
    if facts["version"] > VERSION:
        raise InfuseError(
            f"The adapter was saved by a newer Infuse (its file has form {facts['version']}, and this one reads up to "
            f"{VERSION}); update Infuse."
        )
    facts["base"] = {k: str(facts["base"][k]) for k in ("name", "type", "digest")}
    facts["info"] = dict(facts["info"])
    if facts["head"] is not None:
        with torch.device("meta"):
            facts["head"] = Head(**facts["head"]).settings()
    return facts


def _read_native(model: nn.Module, sites: list[Site], tensors: dict[str, Tensor], head: dict[str, Any]) -> Bundle:
    method = make(head["method"])
    known = {s.name: s for s in sites}
    chosen = []
    for name in head["sites"]:
        stem = name.removesuffix(":input")
        site = known.get(name) or known.get(stem) or site_at(model, stem, sites)
        if site is None:
            raise InfuseError(
                f"The adapter has a delta at {name!r}, which {type(model).__name__} does not have: "
                f"it was made for {head['base']['name']!r} ({head['base']['type']})."
            )
        chosen.append(replace(site, name=name, side="input") if name.endswith(":input") else site)
    own = {name: make(value) for name, value in head["settings"].items()}
    bundle = Bundle(method, [], base=head["base"], info=head["info"], name=str(head["name"]))
    bundle.members = [str(m) for m in head.get("members", [])]
    plain = {n: v for n, v in tensors.items() if not n.startswith(_HEAD)}
    if head["layout"] == "peft":
        grouped, rest, _ = peft.modules(model, type(method), plain)
        for path, on in peft.by_module(chosen).items():
            at = own.get(on[0].name, method)
            found = grouped.pop(path, {})
            bundle.deltas += [(s, at, p) for s, p in zip(on, _unfused(at, on, found), strict=True)]
        if grouped:
            raise InfuseError(f"The file holds tensors that its description lacks: those for {listed(grouped, 3)}.")
        bundle.copies = peft.heads(model, rest, [path.rsplit(".", 1)[-1] for path in head["copies"]])
    else:
        _fill(bundle, chosen, own, plain)
    if head["head"] is not None:
        parts = {n.removeprefix(_HEAD): v for n, v in tensors.items() if n.startswith(_HEAD)}
        bundle.head = Head.restore(head["head"], parts)
    order = {name: i for i, name in enumerate(head["sites"])}
    bundle.deltas.sort(key=lambda delta: order[delta[0].name])
    return bundle


def _unfused(method: Any, on: list[Site], found: Mapping[str, Tensor]) -> list[Any]:
    if len(on) == 1 and on[0].whole:
        return [peft.named(method, on[0], found)]
    whole = replace(on[0], start=0, stop=on[0].out_features)
    return method.split(peft.named(method.fused(len(on)), whole, found), on)


def _fill(bundle: Bundle, sites: list[Site], own: Mapping[str, Any], tensors: dict[str, Tensor]) -> None:
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


def _read_adapterhub(model: nn.Module, folder: Path, sites: list[Site]) -> Bundle:
    def parse() -> Bundle:
        if (folder / HUB_FUSION).is_file():
            config = read_json(folder / HUB_FUSION)
            tensors, _ = read_tensors(adapterhub.tensors_path(folder, HUB_FUSION_WEIGHTS))
            return adapterhub.read_fusion(model, sites, tensors, config)
        tensors, _ = read_tensors(adapterhub.tensors_path(folder, HUB_WEIGHTS))
        bundle = adapterhub.read(model, sites, tensors, read_json(folder / CONFIG))
        head = adapterhub.tensors_path(folder, HUB_HEAD_WEIGHTS)
        if head.is_file():
            bundle.copies = adapterhub.read_head(model, sites, read_tensors(head)[0])
        return bundle

    return _sound(parse, folder)


def config_of(model: nn.Module, name: str) -> dict[str, Any]:
    """What :func:`save` writes about an adapter for other tools."""
    return _written(owner_of(model), store_of(model)[name], store_of(model).base)[1]


def _written(model: nn.Module, adapter: Adapter, base: Base) -> tuple[dict[str, Tensor], dict[str, Any]]:
    if peft.expressible(adapter):
        return peft.write(model, adapter)
    tensors = {name: value.detach().contiguous() for name, value in _native(adapter).items()}
    return tensors, {"library": "infuse", "method": settings(adapter.method), "base_model_name_or_path": base.name}


def _adapterhub_files(model: nn.Module, adapter: Adapter) -> dict[str, bytes]:
    try:
        parts = _adapterhub_parts(model, adapter)
    except InfuseError as error:
        reason = str(error).removesuffix(".")
        raise InfuseError(f"{reason}; save it in Infuse's own format, without format='adapterhub'.") from None
    if adapter.head is not None:
        message = f"AdapterHub's files have no place for Infuse's head of {adapter.name!r}; it is left out."
        warnings.warn(message, stacklevel=4)
    files: dict[str, bytes] = {}
    for (config, weights), (tensors, facts) in parts.items():
        files[config] = json.dumps(facts, indent=1).encode() + b"\n"
        files[weights] = to_bytes(tensors)
    return files


def _adapterhub_parts(model: nn.Module, adapter: Adapter) -> dict[tuple[str, str], tuple[dict[str, Tensor], Any]]:
    """Names of a config and its weights → what they hold."""
    store, model = store_of(model), owner_of(model)
    if adapter.members:
        members = [store[name] for name in adapter.members]
        parts = {(HUB_FUSION, HUB_FUSION_WEIGHTS[0]): adapterhub.write_fusion(model, adapter, members)}
    else:
        parts = {(CONFIG, HUB_WEIGHTS[0]): adapterhub.write(model, store.sites, adapter)}
    if adapter.copies:
        parts |= {(HUB_HEAD, HUB_HEAD_WEIGHTS[0]): adapterhub.write_head(model, adapter)}
    return parts


def _native(adapter: Adapter) -> dict[str, Tensor]:
    tensors = {f"shared.{n}": v for n, v in adapter.shared.items()}
    for name in adapter.sites:
        tensors |= {f"deltas.{name}.{n}": v for n, v in _delta(adapter, name).params.items()}
    for path, module in adapter.copies.items():
        tensors |= {f"copies.{dotted(path)}/{n}": v for n, v in module.state_dict().items()}
    return tensors


def _delta(adapter: Adapter, site: str) -> Delta:
    return adapter.deltas[key(site)]  # type: ignore[return-value]  # a Delta: nothing else is put there


def _sites(model: nn.Module, arch: Arch | None) -> list[Site]:
    store = store_in(model)
    return store.sites if store else find_sites(model, arch)


def _check_base(model: nn.Module, base: Mapping[str, str], arch: Arch | None) -> None:
    store = store_in(model)
    have = store.base if store else Base.of(model, arch or arch_of(model))
    if have.digest != base["digest"]:
        raise InfuseError(
            f"The adapter was trained on {base['name']!r} ({base['type']}), but this model is "
            f"{have.name!r} ({have.type}) with other weights; load that base "
            "(or, from Python, pass any_base=True if they fit)."
        )


def _sound(parse: Any, where: Path) -> Any:
    """Run a parser over a file's header; whatever is not as it should be becomes one sentence."""
    try:
        return parse()
    except InfuseError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError, re.error) as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:120]
        raise InfuseError(f"The description in {where} is damaged ({reason}).") from None

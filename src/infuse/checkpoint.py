"""Save and load one adapter: Infuse's own files, and those of other libraries, recognised.

A folder holds ``adapter_model.safetensors`` and ``adapter_config.json``. The first is all that Infuse itself needs: its
header carries the method, the sites, the head and the fingerprint of the base, so that replacing that one file replaces
the adapter at once. The second is for other tools: where PEFT has the method, it is PEFT's config, and PEFT loads the
folder as its own.
"""

import json
import os
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from infuse import storage
from infuse.adapter import Adapter, Delta, copies, fresh, key
from infuse.arch import Arch
from infuse.checks import check_model
from infuse.errors import InfuseError, listed, printable
from infuse.fingerprint import Base
from infuse.formats import adapterhub, native, peft
from infuse.formats.bundle import (
    CONFIG,
    FILES,
    HUB_FUSION,
    HUB_FUSION_WEIGHTS,
    HUB_HEAD,
    HUB_HEAD_WEIGHTS,
    HUB_WEIGHTS,
    PICKLED,
    UNNAMED,
    WEIGHTS,
    Bundle,
    fitted,
    to_bytes,
    write_folder,
)
from infuse.formats.content import is_file, read_json, sound
from infuse.formats.native import HEAD, HEADER, VERSION, facts_of, parse_facts
from infuse.formats.state import is_state, read_state
from infuse.formats.tensors import parse_tensors, read_safetensors, read_tensors
from infuse.formats.vocabulary import check_vocabulary
from infuse.heads import Head
from infuse.method import settings
from infuse.model import attach_at, attach_mixer, check_name, detach, host_of
from infuse.sites import Site, arch_of, find_sites, transformer_in
from infuse.store import owner_of, store_in, store_of


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
        **adapter.facts(),
        "base": asdict(base),
    }
    if isinstance(adapter.head, Head):
        tensors |= {HEAD + n: v.detach().contiguous() for n, v in adapter.head.state_dict().items()}
    weights = to_bytes(tensors, {"format": "pt", HEADER: native.dumped(header)})
    return {CONFIG: json.dumps(config, indent=1).encode() + b"\n", WEIGHTS: weights}


@fresh()
def load(
    model: nn.Module,
    path: str | Path,
    name: str | None = None,
    *,
    arch: Arch | None = None,
    any_base: bool = False,
) -> Adapter:
    """Attach an adapter from a folder that Infuse, PEFT or AdapterHub wrote, and make it the active one.

    Args:
        model: the base model, bare or with a head, adapted already or not; file and model may carry different prefixes.
        path: the folder; also a checkpoint of an adapted model that ``Trainer`` or ``save_pretrained`` wrote, of which
            the adapter ``name`` is taken, or else the only one or the active one.
        name: the name to give it; by default the one under which it was saved.
        arch: the row to use for an architecture that the table does not have.
        any_base: accept a base whose weights are not those that the adapter was trained on.
    Raises:
        InfuseError: a file is missing, truncated, corrupt or hostile; shapes do not fit; the base is another one. The
            model is as it was.
    """
    store = store_in(model)
    have, before = (set(store.adapters), store.choice()) if store else (set(), None)
    tree = storage.reading(Path(path), lambda folder: _read_tree(model, folder, name, have, arch, any_base))
    try:
        return _attach_tree(model, tree, name, have, arch)
    except BaseException:
        new = [each for each in store_of(model).adapters if each not in have] if store_in(model) else []
        for each in reversed(new):  # a mixer before its members
            detach(model, each)
        if store and before:
            store.choose(before)
        raise


@dataclass(frozen=True)
class _Tree:
    """An adapter and, of a mixer, the members that its folder holds."""

    bundle: Bundle
    members: dict[str, "_Tree"]


def _read_tree(
    model: nn.Module, folder: Path, name: str | None, have: set[str], arch: Arch | None, any_base: bool,
    member: bool = False,
) -> _Tree:  # fmt: skip
    bundle = read(model, folder, name, arch=arch, any_base=any_base)
    if member and bundle.members:  # which may well be itself, without end
        raise InfuseError(f"The file in {folder} mixes adapters and is a member of a mixture; members mix nothing.")
    if not any_base:
        _warn_of_base(model, bundle)
    folders = {m: folder if _is_checkpoint(folder) else folder / "members" / check_name(m) for m in bundle.members}
    wanted = {m: at for m, at in folders.items() if m not in have or os.path.isdir(at)}
    return _Tree(bundle, {m: _read_tree(model, at, m, have, arch, any_base, True) for m, at in wanted.items()})


def _attach_tree(model: nn.Module, tree: _Tree, name: str | None, have: set[str], arch: Arch | None) -> Adapter:
    for member, own in tree.members.items():
        if member in have:
            _check_member(model, member, own.bundle)
        else:
            _attach_tree(model, own, member, have, arch)
    return attach_bundle(model, tree.bundle, name, arch=arch)


@fresh()
def read(
    model: nn.Module,
    path: str | Path,
    name: str | None = None,
    *,
    arch: Arch | None = None,
    any_base: bool = False,
) -> Bundle:
    """What a folder holds, matched to a model's sites; the model is not touched.

    ``name`` chooses among the adapters of a checkpoint of a whole model.
    """
    model, folder = host_of(model, arch), storage.current(Path(path))
    check_model(model)
    if is_file(folder / HUB_FUSION) or is_file(adapterhub.tensors_path(folder, HUB_WEIGHTS)):
        return _read_adapterhub(model, folder, _sites(model, arch))
    if not os.path.isdir(folder):
        raise InfuseError(f"There is no folder {folder}; give the folder that holds {CONFIG} and {WEIGHTS}.")
    weights = folder / WEIGHTS
    if not os.path.exists(weights) and os.path.exists(folder / PICKLED):
        weights = folder / PICKLED
    if _is_checkpoint(folder):
        return _matched(model, *read_state(folder, name), folder, arch, any_base)
    tensors, metadata = read_tensors(weights)
    if HEADER in metadata:
        return _matched(model, tensors, parse_facts(metadata[HEADER], weights), weights, arch, any_base)
    sites = _sites(model, arch)
    config = read_json(folder / CONFIG)
    if "peft_type" not in config:
        raise InfuseError(f"{folder / CONFIG} has no peft_type: neither Infuse nor PEFT wrote it.")
    return sound(lambda: peft.read(model, sites, tensors, config), folder / CONFIG)


def _is_checkpoint(folder: Path) -> bool:
    """Whether a folder holds a whole model; beside an adapter's files, it is that adapter's base."""
    return is_state(folder) and not any(os.path.exists(folder / name) for name in FILES)


@fresh()
def read_content(model: nn.Module, content: bytes, where: Path) -> Bundle:
    """What the content of an Infuse file holds, matched to a model's sites; ``where`` names it in errors."""
    facts = facts_of(content, where)
    return _matched(host_of(model), parse_tensors(content, where)[0], facts, where)


def _matched(
    model: nn.Module, tensors: dict[str, Tensor], facts: Mapping[str, Any], where: Path,
    arch: Arch | None = None, any_base: bool = False,
) -> Bundle:  # fmt: skip
    if not any_base:
        _check_base(model, facts["base"], arch)
    sites = _sites(model, arch)
    return sound(lambda: native.read(model, sites, tensors, facts), where)


@fresh()
def attach_bundle(model: nn.Module, bundle: Bundle, name: str | None = None, *, arch: Arch | None = None) -> Adapter:
    """Attach what :func:`read` gave."""
    if bundle.members:
        bundle = replace(bundle, deltas=_mixable(model, bundle))
    adapter = _built(model, bundle, name or bundle.name)
    if bundle.members:
        return attach_mixer(model, adapter, bundle.members, trained=())
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
    adapter.copies.update(copies(host_of(model), bundle.copies))
    for path, state in bundle.copies.items():
        own = adapter.copies[key(path)]
        expected = own.state_dict()
        if missing := expected.keys() - state.keys():
            raise InfuseError(f"The file's copy of {path} lacks {listed(sorted(missing))}.")
        if extra := state.keys() - expected.keys() - dict(own.named_buffers()).keys():
            raise InfuseError(f"The file's copy of {path} has {listed(sorted(extra))}, which this model's lacks.")
        for n, v in expected.items():
            check_vocabulary(owner_of(model), path, state[n].shape, v.shape)
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
    return facts_of(storage.reading(Path(path), lambda folder: read_safetensors(folder / WEIGHTS)), weights)


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

    setup = sound(build, where)
    if not 4 <= setup.max_length <= 10**7:  # no room for a word between the special tokens; more than any text has
        raise InfuseError(f"{where} cuts texts at {setup.max_length} tokens; train it with max_length 4 or more.")
    return setup


def amend(path: str | Path, *, head: Mapping[str, Any], info: Mapping[str, Any]) -> None:
    """Replace facts about the head, and add to the info, in an Infuse file; its tensors stay bit for bit.

    No model is needed, so that nothing in the file can depend on the base or the precision it was loaded with. Readers
    see the old or the new file, whole. For whoever holds the lock of the folder (:func:`infuse.storage.writing`).
    """
    folder, weights = Path(path), Path(path) / WEIGHTS
    content = read_safetensors(weights)  # once: the file may be replaced meanwhile
    facts = facts_of(content, weights)
    if facts["head"] is None:
        raise InfuseError(f"The adapter in {folder} has no classification head.")
    facts["head"] |= head
    facts["info"] |= info
    tensors, metadata = parse_tensors(content, weights)
    storage.write(weights, to_bytes(tensors, metadata | {HEADER: native.dumped(facts)}))


def _read_adapterhub(model: nn.Module, folder: Path, sites: list[Site]) -> Bundle:
    def parse() -> Bundle:
        if is_file(folder / HUB_FUSION):
            tensors, _ = read_tensors(adapterhub.tensors_path(folder, HUB_FUSION_WEIGHTS))
            bundle = adapterhub.read_fusion(model, sites, tensors, read_json(folder / HUB_FUSION))
        else:
            tensors, _ = read_tensors(adapterhub.tensors_path(folder, HUB_WEIGHTS))
            bundle = adapterhub.read(model, sites, tensors, read_json(folder / CONFIG))
        head = adapterhub.tensors_path(folder, HUB_HEAD_WEIGHTS)
        if is_file(head):
            bundle.copies = adapterhub.read_head(model, sites, read_tensors(head)[0])
        return bundle

    return sound(parse, folder)


def config_of(model: nn.Module, name: str) -> dict[str, Any]:
    """What :func:`save` writes about an adapter for other tools."""
    return _written(owner_of(model), store_of(model)[name], store_of(model).base)[1]


def _written(model: nn.Module, adapter: Adapter, base: Base) -> tuple[dict[str, Tensor], dict[str, Any]]:
    if peft.expressible(adapter):
        return peft.write(model, adapter)
    tensors = {name: value.detach().contiguous() for name, value in native.written(adapter).items()}
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


def _warn_of_base(model: nn.Module, bundle: Bundle) -> None:
    """Say so where a file of another library names another base; it has no fingerprint that could settle it."""
    if bundle.base is None or bundle.base["digest"]:
        return
    made, have = bundle.base["name"], getattr(transformer_in(owner_of(model)), "name_or_path", "")
    names = [_short_name(each) for each in (made, have)]
    if all(names) and names[0] != names[1]:
        warnings.warn(
            printable(
                f"The adapter was made for {made!r}, but this model is {have!r}: unless the two are one, its answers "
                "are wrong. Load it onto its own base, or pass any_base=True."
            ),
            stacklevel=4,
        )


def _short_name(name: str) -> str:
    """What is left of a model's name without its owner, its folder or its revision; empty if that tells nothing."""
    parts = [part for part in name.replace("\\", "/").split("/") if part.strip(".")]
    cached = [part.split("--")[-1] for part in parts if part.startswith("models--")]
    short = (cached or parts or [""])[-1].partition("@")[0].lower()
    return "" if name == UNNAMED else short

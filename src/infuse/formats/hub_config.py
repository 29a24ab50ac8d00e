"""Configurations of AdapterHub: presets, options, and what they mean as a method of Infuse."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

import yaml
from torch import Tensor

from infuse.adapter import Adapter
from infuse.errors import InfuseError, listed
from infuse.foreign import flag, number, refuse_options
from infuse.method import Method
from infuse.methods.bottleneck import Bottleneck, width_at
from infuse.methods.compacter import Compacter
from infuse.methods.fusion import Fusion
from infuse.methods.ia3 import IA3
from infuse.methods.lora import LoRA
from infuse.sites import Site

KINDS = {
    "bert", "roberta", "xlm-roberta", "electra", "deberta-v2", "distilbert", "albert", "modernbert", "t5", "mt5",
    "bart", "gpt2", "llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text",
}  # fmt: skip
"""The model types of Infuse's table that ``adapters`` 1.3.0 supports."""

LORA_KEYS = {"A": "lora_A", "B": "lora_B", "l": "lora_B"}

_DEFAULTS: dict[str, Any] = {
    "original_ln_before": False, "original_ln_after": True, "ln_before": False, "ln_after": False,
    "init_weights": "bert", "is_parallel": False, "scaling": 1.0, "use_gating": False, "residual_before_ln": True,
    "adapter_residual_before_ln": False, "inv_adapter": None, "inv_adapter_reduction_factor": None,
    "cross_adapter": False, "leave_out": [], "dropout": 0.0, "phm_layer": False, "phm_dim": 4,
    "factorized_phm_W": True, "shared_W_phm": False, "shared_phm_rule": True, "factorized_phm_rule": False,
    "phm_c_init": "normal", "phm_init_range": 0.0001, "learn_phm": True,
    "hypercomplex_nonlinearity": "glorot-uniform", "phm_rank": 1, "phm_bias": True, "stochastic_depth": 0.0,
    "init_weights_seed": None,
}  # fmt: skip

_SEQ = {"mh_adapter": False, "output_adapter": True, "reduction_factor": 16, "non_linearity": "relu",
        "original_ln_before": True}  # fmt: skip
_DOUBLE = {"mh_adapter": True, "output_adapter": True, "reduction_factor": 16, "non_linearity": "swish"}
_PARALLEL = {"mh_adapter": False, "output_adapter": True, "reduction_factor": 2, "non_linearity": "relu",
             "is_parallel": True, "scaling": 4.0, "init_weights": "mam_adapter"}  # fmt: skip
_PHM = {"phm_layer": True, "reduction_factor": 32, "non_linearity": "gelu"}
_LORA = {"architecture": "lora", "attn_matrices": ["q", "v"], "r": 8, "alpha": 8, "composition_mode": "add"}
PRESETS: dict[str, dict[str, Any]] = {
    "seq_bn": _SEQ, "pfeiffer": _SEQ, "double_seq_bn": _DOUBLE, "houlsby": _DOUBLE, "par_bn": _PARALLEL,
    "parallel": _PARALLEL, "scaled_par_bn": _PARALLEL | {"scaling": "learned"},
    "scaled_parallel": _PARALLEL | {"scaling": "learned"},
    "compacter": _DOUBLE | _PHM, "compacter++": _SEQ | _PHM, "lora": _LORA,
    "ia3": _LORA | {"attn_matrices": ["k", "v"], "r": 1, "alpha": 1, "composition_mode": "scale"},
}  # fmt: skip
_OLD = {"gelu": "gelu_new", "gelu_orig": "gelu"}
_STARTS = {"bert": "normal", "mam_adapter": "zero", "houlsby": "truncated"}


def resolved(config: Mapping[str, Any]) -> dict[str, Any]:
    """The full settings of an adapter's config: a dict, a preset, or ``preset[key=value, …]``."""
    given = config.get("config")
    if given is None:
        given = dict(_SEQ)
    elif isinstance(given, str):
        given = _preset(given)
    elif "version" not in config:  # its first version had other names; a preset means what it means today
        given = {**given, "non_linearity": _OLD.get(given.get("non_linearity"), given.get("non_linearity", "relu"))}
    settings = {**_DEFAULTS, **given}
    settings["non_linearity"] = str(settings.get("non_linearity", "relu")).lower()
    for option in [name for name, usual in _DEFAULTS.items() if isinstance(usual, bool)]:
        flag(settings, option)
    return settings


def _preset(text: str) -> dict[str, Any]:
    match = re.fullmatch(r"([^\[\]|]+)(?:\[(.*)\])?", text.strip()) if len(text) < 1000 else None
    try:
        pairs = yaml.safe_load("{" + re.sub(r"(\w+)\s*=", r"\1: ", match[2] or "") + "}") if match else {}
        return PRESETS[match[1] if match else ""] | pairs
    except (KeyError, yaml.YAMLError):
        raise InfuseError(f"The file's configuration {text!r} is none that Infuse has.") from None


def check_base(kind: str, sites: Sequence[Site]) -> None:
    """Refuse a base that the library changes at random, whatever the adapter: no file tells what it computed."""
    if kind == "modernbert" and any(site.role == "qkv" and site.module.bias is None for site in sites):
        raise InfuseError("AdapterHub's ModernBERT draws a random bias that its files lack; they can't be reproduced.")


def bottleneck(settings: Mapping[str, Any], kind: str) -> Bottleneck | Compacter:
    """The method of a bottleneck's or a Compacter's settings, on a model of type ``kind``."""
    cls = Compacter if settings["phm_layer"] else Bottleneck
    reads = "residual" if settings["is_parallel"] else "normed" if settings["original_ln_before"] else "output"
    refused: dict[str, tuple] = dict.fromkeys(("ln_before", "ln_after", "use_gating", "stochastic_depth"), ())
    needed = ["original_ln_after"]
    if cls is Compacter:
        refused |= {"factorized_phm_rule": (), "shared_W_phm": ()}
        needed.append("phm_bias")
    if reads == "normed":
        needed.append("residual_before_ln")
    refuse_options(settings, refused | {"residual_before_ln": (True,)}, cls.__name__)
    for option in needed:
        if not settings[option]:
            raise InfuseError(
                f"The file uses {option}={settings[option]}, which Infuse's {cls.__name__} does not have."
            )
    if reads == "normed" and kind in ("gemma2", "gemma3_text"):
        raise InfuseError(
            "AdapterHub's Gemma reads the last layer's LayerNorm in every layer; Infuse does not do that."
        )
    if reads != "output" and kind == "modernbert":
        raise InfuseError("AdapterHub's ModernBERT hands on another residual and norm than its sublayers have.")
    common: dict[str, Any] = {
        "roles": ("attention_output", "ffn_output"),
        "activation": {"leakyrelu": "leaky_relu"}.get(settings["non_linearity"], settings["non_linearity"]),
        "reads": reads,
        "dropout": float(settings["dropout"]),
    }
    factor = settings.get("reduction_factor", 16)
    if not isinstance(factor, Mapping):
        common["reduction"] = float(factor)
    scaling = settings["scaling"]
    if isinstance(scaling, str) and (cls is Compacter or scaling != "learned"):
        raise InfuseError(f"The file uses scaling={scaling!r}, which Infuse's {cls.__name__} does not have.")
    common["scale"] = 1.0 if scaling == "learned" else number(scaling, "scaling")
    if cls is Compacter:
        rank = int(settings["phm_rank"]) if settings["factorized_phm_W"] else 0
        return Compacter(n=int(settings["phm_dim"]), rank=rank, shared_rule=bool(settings["shared_phm_rule"]), **common)
    return Bottleneck(
        learned_scale=scaling == "learned",
        start=_STARTS.get(settings["init_weights"], "normal"),
        **common,
    )


def at(
    method: Bottleneck | Compacter, settings: Mapping[str, Any], site: Site, kind: str, found: Mapping[str, Tensor]
) -> Any:
    """The method at one site: its width from the tensors, and ALBERT's exchange of output and residual."""
    down = next((found[k] for k in ("adapter_down.0.bias", "adapter_down.0.b") if k in found), None)
    if down is not None and len(down) != width_at(method, site):
        method = replace(method, width=len(down))
    return _exchange(method, kind, site)


def fusion(site: Site, kind: str) -> Fusion:
    """A fusion at one site: there the library adds what parallel members read."""
    return Fusion(adds="output" if _exchanged(kind, site) else "residual")


def _exchanged(kind: str, site: Site) -> bool:
    return kind == "albert" and site.role == "attention_output"


def _exchange(method: Any, kind: str, site: Site) -> Any:
    """A method as the other library calls it: what it reads has the other's name where that exchanges the two."""
    if not _exchanged(kind, site):
        return method
    return replace(method, reads={"output": "residual", "residual": "output"}.get(method.reads, method.reads))


def keys(method: Method) -> dict[str, str]:
    """Parameter of a bottleneck or Compacter → the end of its key."""
    if isinstance(method, Bottleneck):
        return {
            "D": "adapter_down.0.weight", "b": "adapter_down.0.bias", "U": "adapter_up.weight", "c": "adapter_up.bias",
            "s": "scaling",
        }  # fmt: skip
    ends = {"left": "W_left", "right": "W_right", "whole": "W", "rule": "phm_rule"}
    sides = {"down": "adapter_down.0", "up": "adapter_up"}
    table = {f"{side}_{part}": f"{path}.{end}" for side, path in sides.items() for part, end in ends.items()}
    return {"b": "adapter_down.0.b", "c": "adapter_up.b", **table}


def lora(settings: Mapping[str, Any], config: Mapping[str, Any]) -> LoRA | IA3:
    """LoRA or (IA)³ from the library's LoRA settings."""
    refuse_options(settings, {"use_gating": (), "use_dora": (), "vera_d": (), "vera_b": ()}, "LoRA")
    rank, alpha = int(settings.get("r", 8)), number(settings.get("alpha", 8), "alpha")
    if re.match(r"adapters\.(0\.|1\.0(\.|$)|1\.1\.0\.?(dev|a|b|rc))", str(config.get("version", ""))):
        alpha = float(rank)  # these versions ignored alpha, and the library still loads their files so
    mode = settings.get("composition_mode", "add")
    if mode not in ("add", "scale"):
        raise InfuseError(f"The file uses composition_mode={mode!r}, which Infuse's LoRA does not have.")
    if mode == "scale":
        if rank != 1 or alpha != 1:
            raise InfuseError("The file's (IA)³ has a rank or alpha other than 1, which Infuse's IA3 does not have.")
        return IA3()
    return LoRA(rank=rank, alpha=alpha, dropout=float(settings.get("dropout") or 0.0))


# Gated blocks whose scaled linear is the branch without non-linearity: there its output's scale is the hidden's scale.
_UNGATED = {"wi_1", "up_proj"}


def ia3_site(site: Site, sites: Any) -> Site:
    """Where the library's (IA)³ at a linear's output belongs; it scales feed-forward blocks before the activation."""
    if site.role in ("query", "key", "value", "cross_query", "cross_key", "cross_value", "ffn_output"):
        return site
    hidden = next((s for s in sites if s.role == "ffn_hidden" and (s.stack, s.layer) == (site.stack, site.layer)), None)
    gated = any(s.role == "ffn_gate" and (s.stack, s.layer) == (site.stack, site.layer) for s in sites)
    if gated and hidden and site.path.rsplit(".", 1)[-1] in _UNGATED:
        return hidden
    raise InfuseError(
        "AdapterHub's (IA)³ scales the feed-forward block before its non-linearity, T-Few's and Infuse's after it: "
        f"at {site.path} the two differ, so that this file can't be converted."
    )


def written(adapter: Adapter, sites: Sequence[Site], kind: str) -> dict[str, Any]:
    """The library's full config of an adapter on a model with these sites, of type ``kind``."""
    method = adapter.method
    if isinstance(method, LoRA):
        return _written_lora(adapter, sites, kind)
    if not isinstance(method, Bottleneck | Compacter):
        raise InfuseError(f"AdapterHub's files can't express {type(method).__name__} as Infuse has it.")
    if method.train_norms:
        raise InfuseError("AdapterHub's bottlenecks have no trained norms.")
    places, left_out = _placed(adapter, sites, lambda site: _PLACES.get(site.role))
    methods = [_exchange(adapter.method_at(site), kind, site) for site in adapter.sites.values()]
    if len({each.reads for each in methods}) > 1 and any(_exchanged(kind, site) for site in adapter.sites.values()):
        raise InfuseError(
            "AdapterHub exchanges output and residual at ALBERT's attention, and has one setting for both sublayers; "
            "this adapter can't be written so."
        )
    method = _common(methods, width=0, reduction=1.0)
    settings = {
        **_DEFAULTS,
        **{place: place in places for place in _PLACES.values()},
        "leave_out": left_out,
        "reduction_factor": _reduction(adapter, sites),
        "non_linearity": method.activation,
        "is_parallel": method.reads == "residual",
        "original_ln_before": method.reads == "normed",
        "dropout": method.dropout,
    }
    if isinstance(method, Bottleneck):
        starts = {ours: theirs for theirs, ours in _STARTS.items()}
        scaling = "learned" if method.learned_scale else float(method.scale)
        settings |= {"scaling": scaling, "init_weights": starts[method.start]}
    else:
        settings |= {
            "scaling": float(method.scale), "phm_layer": True, "phm_dim": method.n, "phm_rank": method.rank or 1,
            "factorized_phm_W": bool(method.rank), "shared_phm_rule": method.shared_rule,
        }  # fmt: skip
    bottleneck(settings, kind)  # what can't be read on this base is not written either
    return settings


def _written_lora(adapter: Adapter, sites: Sequence[Site], kind: str) -> dict[str, Any]:
    method = _common([adapter.method_at(site) for site in adapter.sites.values()])
    if method.dora:
        raise InfuseError("AdapterHub's LoRA does not have PEFT's DoRA.")
    alpha = method.alpha * (math.sqrt(method.rank) if method.rslora else 1)  # the library divides it by the rank
    places, left_out = _placed(adapter, sites, lambda site: _lora_place(site, kind))
    matrices = [m for m in "qkv" if m in places]
    return {
        **_LORA, "r": method.rank, "alpha": alpha, "dropout": method.dropout, "init_weights": "lora",
        "leave_out": left_out, "attn_matrices": matrices, "selfattn_lora": bool(matrices),
        "intermediate_lora": "intermediate_lora" in places, "output_lora": "output_lora" in places,
        "use_gating": False, "dtype": None, "use_dora": False, "vera_d": None, "vera_b": None,
    }  # fmt: skip


# Role → the switch in the config that puts a bottleneck there, and the switch or letter that puts LoRA there.
_PLACES = {"attention_output": "mh_adapter", "cross_attention_output": "cross_adapter", "ffn_output": "output_adapter"}
_LORA_PLACES = {
    "query": "q", "key": "k", "value": "v", "ffn_up": "intermediate_lora", "gate_up": "intermediate_lora",
    "ffn_output": "output_lora",
}  # fmt: skip


def _lora_place(site: Site, kind: str) -> str | None:
    place = _LORA_PLACES.get(site.role.removeprefix("cross_"))
    if place in ("q", "k", "v"):
        return place
    if kind in ("llama", "mistral"):  # the library has exchanged the two there
        place = {"intermediate_lora": "output_lora", "output_lora": "intermediate_lora"}.get(place or "")
    return place if site.whole else None


def _placed(
    adapter: Adapter, sites: Sequence[Site], place: Callable[[Site], str | None]
) -> tuple[set[str | None], list[int]]:
    """The places that an adapter takes, and the layers to leave out: in all others the library fills these places."""
    own = adapter.sites.values()
    places, kept = {place(site) for site in own}, {(site.stack, site.layer) for site in own}
    if None in places:
        lacking = dict.fromkeys(site.role for site in own if place(site) is None)
        raise InfuseError(f"AdapterHub's {type(adapter.method).__name__} has no place at {listed(lacking)}.")
    made = [s.name for s in sites if place(s) in places and (s.stack, s.layer) in kept]
    if lost := [name for name in made if name not in adapter.sites]:
        raise InfuseError(
            f"AdapterHub's files adapt the same modules in each of their layers; this adapter lacks {listed(lost, 3)}."
        )
    return places, [number for layer, number in _numbers(sites).items() if layer not in kept]


def _numbers(sites: Sequence[Site]) -> dict[tuple[str, int], int]:
    """Layer → its number in the library, which counts a decoder's layers after the encoder's."""
    return {layer: i for i, layer in enumerate(dict.fromkeys((site.stack, site.layer) for site in sites))}


def _common(methods: Sequence[Method], **free: Any) -> Any:
    """The method of all deltas, ``free`` settings set aside: the library's config has one value of all others."""
    methods = [replace(each, roles=(), **free) for each in methods]
    names = [f.name for f in fields(methods[0]) if len({getattr(method, f.name) for method in methods}) > 1]
    if names:
        raise InfuseError(
            f"AdapterHub's files hold one value of each setting, but this adapter has several of {listed(names)}."
        )
    return methods[0]


def _reduction(adapter: Adapter, sites: Sequence[Site]) -> float | dict[str, float]:
    """``reduction_factor``: one number, or one per layer."""
    numbers = _numbers(sites)
    factors: dict[str, float] = {}
    for site in adapter.sites.values():
        factor = _factor(adapter.method_at(site), site)
        if factors.setdefault(str(numbers[site.stack, site.layer]), factor) != factor:
            raise InfuseError(
                f"AdapterHub's bottlenecks in one layer are equally wide, which those in layer {site.layer} are not."
            )
    return factors if len(set(factors.values())) > 1 else next(iter(factors.values()))


def _factor(method: Any, site: Site) -> float:
    """What the library divides by, and rounds down, to get the method's width."""
    if not method.width:
        return method.reduction
    exact = site.width / method.width
    return exact if int(site.width // exact) == method.width else site.width / (method.width + 0.5)

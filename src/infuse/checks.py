"""What a model must be like before something is attached to it or merged into it."""

import warnings
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from infuse.adapter import Adapter
from infuse.errors import InfuseError, listed
from infuse.method import Method, Mixer, spelled
from infuse.recompute import STORES
from infuse.sites import Site, base_modules, transformer_in

_SORTS = {"SentenceTransformer": "encode", "SparseEncoder": "encode", "CrossEncoder": "predict"}
"""Classes of sentence-transformers, and their methods that sort texts by length before the model gets them."""


def sorting(module: object) -> str | None:
    """The name of a model's method that sorts its rows, if it has one."""
    kinds = [kind for kind in type(module).__mro__ if kind.__module__.partition(".")[0] == "sentence_transformers"]
    return next((_SORTS[kind.__name__] for kind in kinds if kind.__name__ in _SORTS), None)


def check_present(adapter: Adapter) -> None:
    """Refuse to run an adapter whose parameters were moved away with those of its base.

    Raises:
        InfuseError: they are offloaded.
    """
    delta = next(iter(adapter.deltas._modules.values()), None)
    if delta is not None and getattr(getattr(delta, "_hf_hook", None), "offload", False):
        raise InfuseError(
            f"The parameters of adapter {adapter.name!r} were offloaded together with the model's, where no call finds "
            "them: load the model whole, or merge the adapter before you offload the model."
        )


def check_whole(model: nn.Module) -> None:
    """Refuse a model of which weights are elsewhere now; one without any weights at all can still be counted.

    Raises:
        InfuseError: parameters are offloaded, or on the meta device.
    """
    modules = dict(base_modules(model))
    parameters = {f"{path}.{n}": p for path, m in modules.items() for n, p in m.named_parameters(recurse=False)}
    absent = [name for name, p in parameters.items() if p.is_meta]
    offloaded = [path for path, m in modules.items() if getattr(getattr(m, "_hf_hook", None), "offload", False)]
    if offloaded or (absent and len(absent) < len(parameters)):
        raise InfuseError(
            f"Weights of this model are offloaded or not loaded ({listed([*absent, *offloaded], 2)}), so that no "
            "adapter can be made for them: load the model whole, without device_map='auto', cpu_offload or "
            "disk_offload, or in a smaller dtype."
        )


def check_model(model: nn.Module) -> None:
    """All that a model must be like, whatever is attached to it; see :func:`check_whole` and :func:`check_alone`."""
    check_alone(model)
    check_whole(model)


def check_alone(model: nn.Module) -> None:
    """Refuse a part of a model that has adapters as a whole: each would act without knowing of the others.

    Raises:
        InfuseError: the part belongs to such a model.
    """
    for store in list(STORES):
        owner = store.owner
        if owner is None or owner is model or getattr(owner, "infuse", None) is not store:
            continue
        if path := next((name for name, module in base_modules(owner) if module is model), None):
            raise InfuseError(
                f"This module is {path} of a {type(owner).__name__} that has adapters already: attach to that "
                f"{type(owner).__name__}, or detach its adapters first."
            )


def check_weights(sites: Iterable[Site], why: str, written: bool = False) -> None:
    """Refuse weights that can't be computed with: quantised ones, and those that are packed or split up.

    Args:
        sites: where the weights are.
        why: what needs them.
        written: whether they are changed, which makes no difference to a weight that is computed from others.
    Raises:
        InfuseError: with the first of them.
    """
    for site in sites:
        weight: Any = getattr(site.module, "weight", None)
        if not written and not isinstance(weight, Tensor) and callable(weight):
            continue  # of torch.ao.quantization, whose methods give it back as numbers
        if written and site.module._parameters.get("weight") is not weight:
            raise InfuseError(
                f"{why} needs the weight of {site.prefix}{site.path}, which is computed from others in each call "
                "(parametrised, normalised or pruned): make it a plain one before (remove_parametrizations, "
                "remove_weight_norm, prune.remove)."
            )
        shape = (site.in_features, site.out_features) if site.transposed else (site.out_features, site.in_features)
        if not (isinstance(weight, Tensor) and weight.shape == shape and plain(weight)):
            kind = type(weight if isinstance(weight, Tensor) else site.module).__name__
            raise InfuseError(
                f"{why} needs the weight of {site.prefix}{site.path}, which is quantised, packed or split up "
                f"({kind}): load the base unquantised and whole for that."
            )


def warn_of_frozen(model: nn.Module) -> None:
    """Tell whoever attaches to a module of their own that what they put around the transformer is frozen, too."""
    inner = transformer_in(model)
    if inner is model:
        return
    within = {id(p) for p in inner.parameters()}
    outside = {name.rpartition(".")[0]: p for name, p in model.named_parameters() if id(p) not in within}
    frozen = [path or type(model).__name__ for path, p in outside.items() if p.requires_grad]
    if frozen:
        warnings.warn(
            f"{listed(frozen)} of {type(model).__name__} are frozen with the base: pass trained=[…] to train copies of "
            "them, or trained=() to say that this is meant.",
            RuntimeWarning,
            stacklevel=4,
        )


def plain(tensor: Tensor) -> bool:
    """Whether a tensor holds floating-point numbers as they are (8 bits are codes, to which a scale belongs)."""
    whole = tensor.is_floating_point() and tensor.itemsize > 1 and not tensor.is_sparse
    return type(tensor) in (Tensor, nn.Parameter) and whole


def check_method(method: Method, sites: Iterable[Site]) -> None:
    """Refuse sites whose weight the method looks at and can't read."""
    if not isinstance(method, Mixer) and "weight" in {*method.wants("prepare"), *method.wants(method.acts)}:
        check_weights(sites, f"The method {spelled(method)}")


def check_trainable(modules: Mapping[str, nn.Module]) -> None:
    """Refuse to train modules, or copies of them, whose weights are quantised.

    Raises:
        InfuseError: with the first of them.
    """
    for path, module in modules.items():
        own = [p for _, m in base_modules(module) for p in m.parameters(recurse=False)]
        if not all(map(plain, own)):
            raise InfuseError(
                f"{path} has quantised or split weights, which can't be trained: load the base unquantised, or leave "
                "it frozen (trained=(), and another method than full)."
            )

"""Embeddings that a file brings along: whose vocabulary they have, and which modules share them."""

from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor, nn

from infuse.errors import InfuseError
from infuse.sites import own_modules


def check_vocabulary(model: nn.Module, path: str, brought: Sequence[int], expected: Sequence[int]) -> None:
    """Refuse values for an embedding of tokens, or of the logits over them, with another number of tokens.

    Args:
        path: of the module.
        brought, expected: shapes of a parameter of it, in the file and in the model.
    """
    if list(brought[1:]) != list(expected[1:]) or brought[:1] == expected[:1]:
        return
    if model.get_submodule(path) in _embeddings(model):
        raise InfuseError(
            f"The file's vocabulary has {brought[0]:,} tokens at {path}, and this model's has {expected[0]:,}: call "
            f"model.resize_token_embeddings({brought[0]}) before you load the adapter."
        )


def with_twins(
    model: nn.Module, copies: Mapping[str, dict[str, Tensor]], unasked: Iterable[str]
) -> dict[str, dict[str, Tensor]]:
    """Copies, and the same values for those modules that share a weight with one of ``unasked``.

    A file holds the base's embeddings under the name of one module, while others may read the same parameter: an output
    layer that is tied to it, the encoder's and the decoder's embeddings.
    """
    made = dict(copies)
    embeddings = _embeddings(model)
    for path in unasked:
        module = model.get_submodule(path)
        weight = getattr(module, "weight", None)
        if module not in embeddings or "weight" not in copies[path] or weight is None:
            continue
        for other, twin in own_modules(model):
            if other not in made and getattr(twin, "weight", None) is weight:
                state = {name: value.detach().float().clone() for name, value in twin.state_dict().items()}
                made[other] = state | {"weight": copies[path]["weight"]}
    return made


def _embeddings(model: nn.Module) -> set[nn.Module]:
    """The modules that transformers resizes with the vocabulary."""
    found: set[nn.Module] = set()
    for _, module in own_modules(model):
        for getter in ("get_input_embeddings", "get_output_embeddings"):
            try:
                found.add(getattr(module, getter)())
            except (AttributeError, NotImplementedError):
                continue
    return {module for module in found if isinstance(module, nn.Module)}

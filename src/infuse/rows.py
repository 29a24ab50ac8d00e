"""Which modules get a row for each text: found out by trying, as sizes alone may coincide.

A role of the table of architectures has rows by its declaration there. Of any other module that adapters act at (the
target of another library's file, a module with trained copies) nobody has said it: position embeddings and relative
biases have none, and an expert gets as many tokens as chance gives it.
"""

import inspect
import threading
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

TRIES = ((2, 5), (3, 5), (4, 7))
"""Texts and tokens of the batches that are tried."""


def with_rows(model: nn.Module, paths: Iterable[str]) -> set[str]:
    """Those of the modules at ``paths`` whose output has as many rows as a batch has texts, for every number tried.

    Runs the model on small batches of token ids, without gradients, in eval mode, and without adapters: the caller sees
    to that. A module that no try reaches is not among them.
    """
    modules = {path: model.get_submodule(path) for path in paths}
    if not modules:
        return set()
    seen: dict[str, list[int]] = {}
    thread = threading.get_ident()

    def note(path: str, out: Any) -> None:
        first = out if isinstance(out, Tensor) else next((o for o in out if isinstance(o, Tensor)), None)
        if threading.get_ident() == thread and first is not None:
            seen.setdefault(path, []).append(len(first) if first.ndim else 0)

    handles = [m.register_forward_hook(lambda _, __, out, path=path: note(path, out)) for path, m in modules.items()]
    training = [module for module in model.modules() if module.training]
    right = set(modules)
    try:
        model.eval()
        for rows, tokens in TRIES:
            seen.clear()
            with suppress(Exception), torch.no_grad(), torch.random.fork_rng(devices=()):
                model(**_batch(model, rows, tokens))
            right &= {path for path, sizes in seen.items() if set(sizes) == {rows}}
    finally:
        for handle in handles:
            handle.remove()
        for module in training:
            module.training = True
    return right


def _batch(model: nn.Module, rows: int, tokens: int) -> dict[str, Tensor]:
    device = next(model.parameters()).device
    ids = (torch.arange(rows * tokens, device=device) % 3 + 3).view(rows, tokens)
    taken = inspect.signature(model.forward).parameters
    return {name: ids for name in ("input_ids", "decoder_input_ids") if name in taken}

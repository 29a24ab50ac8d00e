"""From texts to tokens, features, and probabilities: inference with adapted models, in length-sorted batches."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from infuse.bases import BaseModel
from infuse.data.check import is_unicode
from infuse.errors import InfuseError, listed
from infuse.heads import apply, check_finite, head_of, pool
from infuse.model import route
from infuse.sites import model_type

Tokens = list[list[int]]
TOKENS = 4096
"""Tokens of a batch without gradients, padding included."""


def tokenize(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], max_length: int) -> Tokens:
    """Token ids of every text, special tokens included, cut at ``max_length``; an error for a text that is blank."""
    if not texts:
        return []
    if blank := [number for number, text in enumerate(texts, 1) if not text.strip()]:
        what = f"Text {blank[0]} of {len(texts)} is" if len(blank) == 1 else f"Texts {listed(blank)} are"
        raise InfuseError(f"{what} blank: fill or leave {'it' if len(blank) == 1 else 'them'} out.")
    for number, text in enumerate(texts, 1):
        if not is_unicode(text):
            raise InfuseError(f"Text {number} ({text[:40]!r}) is not valid Unicode: give it as UTF-8, or leave it out.")
    limit = min(max_length, tokenizer.model_max_length)
    encoded: Any = tokenizer(list(texts), truncation=True, max_length=limit, verbose=False)
    return encoded["input_ids"]


def pad(tokens: Sequence[list[int]], pad_id: int, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """A batch padded at the end to its longest row: ``input_ids`` and ``attention_mask``."""
    longest = max(1, max(len(ids) for ids in tokens))
    ids = torch.full((len(tokens), longest), pad_id)
    mask = torch.zeros((len(tokens), longest), dtype=torch.long)
    for row, each in enumerate(tokens):
        ids[row, : len(each)] = torch.tensor(each, dtype=torch.long)
        mask[row, : len(each)] = 1
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}


def batches(tokens: Tokens, budget: int = TOKENS) -> Iterator[list[int]]:
    """Indices of rows of similar length, longest first; a padded batch holds at most ``budget`` tokens."""
    order = sorted(range(len(tokens)), key=lambda i: -len(tokens[i]))
    start = 0
    while start < len(order):
        size = max(1, budget // max(1, len(tokens[order[start]])))
        yield order[start : start + size]
        start += size


@torch.inference_mode()
def features(
    model: nn.Module, tokens: Tokens, pad_id: int, pooling: str, adapter: str | None = None
) -> Float[Tensor, "texts width"]:
    """Pooled hidden states of every text, from the bare base or through an adapter."""
    rows: list[Tensor] = [torch.empty(0)] * len(tokens)
    device = next(model.parameters()).device
    base = trunk(model)
    for index in batches(tokens):
        batch = pad([tokens[i] for i in index], pad_id, device)
        if hasattr(model, "infuse"):
            with route(model, adapter):
                out = base(**batch)
        else:
            out = base(**batch)
        for i, row in zip(index, pool(out["last_hidden_state"], batch["attention_mask"], pooling), strict=True):
            rows[i] = row.cpu()
    return torch.stack(rows)


def bare_features(base: BaseModel, tokens: Tokens) -> Float[Tensor, "texts width"]:
    """:func:`features` of the bare base, run once for the same texts."""
    return base.recall(
        f"features {base.pooling}", tokens, lambda: features(base.model, tokens, base.pad_id, base.pooling)
    )


def trunk(model: nn.Module) -> Any:
    """The part of a model that gives hidden states of a text: below its head, and of T5 the encoder."""
    base: Any = getattr(model, "base_model", model)
    return base.get_encoder() if model_type(base) in ("t5", "mt5") and hasattr(base, "decoder") else base


def probabilities(model: nn.Module, tokens: Tokens, pad_id: int, adapter: str) -> np.ndarray:
    """Probability of each of the adapter's labels for every text, (texts, labels)."""
    return head_of(model, adapter).probabilities(logits(model, tokens, pad_id, adapter)).numpy()


@torch.inference_mode()
def logits(model: nn.Module, tokens: Tokens, pad_id: int, adapter: str) -> Float[Tensor, "texts labels"]:
    """Logits of the adapter's labels for every text, in float32 on the CPU; an error if some are no numbers."""
    head = head_of(model, adapter)
    result = torch.zeros(len(tokens), len(head.labels))
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    for index in batches(tokens):
        batch = pad([tokens[i] for i in index], pad_id, device)
        with route(model, adapter):
            out = model(**batch)
        result[index] = apply(head, out, batch["attention_mask"]).float().cpu()
    model.train(training)
    check_finite(result)
    return result

"""Packed batches: every token is a row of its own, so that nothing is computed for padding.

All of an encoder but its attention treats tokens one by one. Given as rows of one token each, with their positions,
texts of all lengths pass it without padding, and deltas act on them as on any rows. Only attention must know which
tokens make a text: it puts them together, and takes them apart again.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from threading import local
from typing import Any, TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from infuse.arch import Arch

SPARED = 64
"""Padding from which on packing is faster, if it is also a tenth of the batch (docs/decisions.md)."""
WIDTHS = tuple(16 * n for n in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 1024, 4096))
"""Positions of a block: multiples of 16, beside which torch's kernel takes what is left one by one."""
ATTENTION = "infuse"
"""The attention of transformers' registry that understands packed batches."""

T = TypeVar("T")


class Packed:
    """The texts of a padded batch as rows of one token.

    Attributes:
        batch: what the model gets: ids, positions (and all else that has a value per token), each (rows, 1).
        owners: the text of every row. Rows that fill up are a token of the last text, and nothing looks at them.
        blocks: texts of similar length, which attention takes together: where each block holds tokens.
    """

    def __init__(self, batch: Mapping[str, Tensor], positions: Int[Tensor, "texts longest"]):
        self.real: Bool[Tensor, "texts longest"] = batch["attention_mask"].bool()
        at = self.real.flatten().nonzero()[:, 0]
        at = torch.cat([at, at[-1:].expand(-len(at) % step(len(at)))])
        given = {**batch, "position_ids": positions}
        self.batch = {name: value.flatten()[at].unsqueeze(1) for name, value in given.items()}
        # A mask of four dimensions passes transformers as it is; attention makes one that fits.
        self.batch["attention_mask"] = self.real.new_zeros(1, 1, 1, 1)
        self.owners: Int[Tensor, " rows"] = at // self.real.shape[1]
        self._masks: dict[torch.dtype, list[Tensor]] = {}
        self._blocks()

    def _blocks(self) -> None:
        lengths = self.real.sum(1)
        first = lengths.cumsum(0) - lengths
        width = torch.tensor(WIDTHS)[torch.bucketize(lengths.cpu(), torch.tensor(WIDTHS))].to(lengths.device)
        self.blocks: list[Bool[Tensor, "texts width"]] = []
        tokens, start = [], torch.zeros_like(first)
        for each in width.unique().tolist():
            own = (width == each).nonzero()
            offset = torch.arange(each, device=own.device)
            real = offset < lengths[own]
            start[own[:, 0]] = sum(t.numel() for t in tokens) + each * torch.arange(len(own), device=own.device)
            tokens.append((first[own] + offset * real).flatten())
            self.blocks.append(real)
        self.tokens: Int[Tensor, " places"] = torch.cat(tokens)
        rows = torch.arange(len(self.owners), device=first.device)
        offset = torch.minimum(rows - first[self.owners], lengths[self.owners] - 1)
        self.places: Int[Tensor, " rows"] = start[self.owners] + offset

    def masks(self, dtype: torch.dtype) -> list[Float[Tensor, "texts 1 width width"]]:
        """What is added to the scores of every block: nothing, and the lowest number where there is no token."""
        if dtype not in self._masks:
            lowest = torch.finfo(dtype).min
            lacking = [(~real).to(dtype).mul_(lowest)[:, None, None] for real in self.blocks]
            self._masks[dtype] = [mask.expand(-1, -1, mask.shape[-1], -1) for mask in lacking]
        return self._masks[dtype]

    def each(self, values: Sequence[T]) -> list[T]:
        """The value of its text for every row."""
        return [values[text] for text in self.owners.tolist()]

    def together(self, x: Float[Tensor, "rows *rest"]) -> list[Float[Tensor, "texts width *rest"]]:
        """The rows of every block, with any in place of padding."""
        parts = x.index_select(0, self.tokens).split([real.numel() for real in self.blocks])
        return [part.view(*real.shape, *x.shape[1:]) for part, real in zip(parts, self.blocks, strict=True)]

    def apart(self, blocks: Sequence[Float[Tensor, "texts width *rest"]]) -> Float[Tensor, "rows *rest"]:
        """The rows again."""
        parts = [block.flatten(0, 1) for block in blocks]
        return (torch.cat(parts) if len(parts) > 1 else parts[0]).index_select(0, self.places)

    def padded(self, x: Float[Tensor, "rows *rest"]) -> Float[Tensor, "texts longest *rest"]:
        """The rows as the padded batch has them, with any in place of padding."""
        tokens = (self.real.flatten().cumsum(0) - 1).clamp(min=0)
        return x.index_select(0, tokens).view(*self.real.shape, *x.shape[1:])


def step(rows: int) -> int:
    """So many rows are filled up to a multiple of this: the matrix library prepares for every number that it meets."""
    return max(32, 2 ** (rows.bit_length() - 1) // 16)


class _Current(local):
    packed: Packed | None = None


_CURRENT = _Current()


def current() -> Packed | None:
    """The packed batch that passes a model in this thread."""
    return _CURRENT.packed


def pack(model: nn.Module, arch: Arch, batch: Mapping[str, Tensor]) -> Packed | None:
    """A padded batch packed, or ``None`` where that is not possible, or is not worth it.

    Args:
        model: a trunk of ``arch``.
        batch: ``input_ids`` and ``attention_mask``, (texts, longest) each; others of that shape are taken along.
    """
    ids, mask = batch["input_ids"], batch["attention_mask"]
    if ids.shape[1] > WIDTHS[-1]:
        return None
    config: Any = getattr(model, "config", None)
    if not arch.packs or getattr(config, "_attn_implementation", None) != ATTENTION:
        return None
    if getattr(config, "is_decoder", False) or getattr(config, "position_embedding_type", "absolute") != "absolute":
        return None
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or any(v.shape != ids.shape for v in batch.values()):
        return None
    spared = mask.numel() - int(mask.sum())
    if spared < max(SPARED, mask.numel() / 10) or not mask.any(1).all():
        return None
    embedding = next((m for n, m in model.named_modules() if n.endswith("position_embeddings")), None)
    if not isinstance(embedding, nn.Embedding):
        return None
    if embedding.padding_idx is None:
        return Packed(batch, torch.arange(ids.shape[1], device=ids.device).expand_as(ids))
    count = ids.ne(embedding.padding_idx)  # RoBERTa's rule: positions follow that of padding, which others keep
    return Packed(batch, count.cumsum(1) * count + embedding.padding_idx)


@contextmanager
def running(model: nn.Module, packed: Packed) -> Iterator[None]:
    """Calls of ``model`` in this thread within the block are of a packed batch."""
    outer, _CURRENT.packed = _CURRENT.packed, packed
    pooler = getattr(model, "pooler", None)
    # A pooler looks at the first token of every row; of these rows nobody wants to know what it says.
    spared = pooler.register_forward_pre_hook(lambda _, args: (args[0][:1], *args[1:])) if pooler else None
    try:
        yield
    finally:
        _CURRENT.packed = outer
        if spared is not None:
            spared.remove()

"""Labelled rows as tokens and targets, and in batches."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset, Sampler

from infuse.bases import BaseModel
from infuse.data import Rows
from infuse.data.alike import respelled
from infuse.errors import InfuseError, listed
from infuse.texts import Tokens, pad, tokenize
from infuse.training.prefix import Remembered


class Encoded(Dataset):
    """Tokenised rows with their targets: class indices, or 0/1 vectors for multi-label data.

    ``remembered`` gives the hidden states of a row's frozen layers, if there are any to skip.
    """

    def __init__(self, tokens: Tokens, targets: Tensor):
        self.tokens = tokens
        self.targets = targets
        self.remembered: Remembered | None = None

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> tuple[list[int], Tensor, Tensor | None]:
        hidden = None if self.remembered is None else self.remembered[index]
        return self.tokens[index], self.targets[index], hidden

    def sorted(self) -> "Encoded":
        """The same rows, longest first, so that batches in order are nearly free of padding."""
        order = sorted(range(len(self)), key=lambda i: -len(self.tokens[i]))
        return Encoded([self.tokens[i] for i in order], self.targets[order])


class Collate:
    """Rows to a padded batch."""

    def __init__(self, pad_id: int):
        self.pad_id = pad_id

    def __call__(self, rows: Sequence[tuple[list[int], Tensor, Tensor | None]]) -> dict[str, Tensor]:
        tokens, targets, hidden = zip(*rows, strict=True)
        batch = pad(tokens, self.pad_id) | {"labels": torch.stack(targets)}
        return batch if hidden[0] is None else batch | {"hidden": pad_sequence(list(hidden), batch_first=True)}


class Buckets(Sampler[int]):
    """Shuffled rows in batches of similar length: sorted within buckets of 100 batches, the batches shuffled again.

    The order is a function of the seed and the epoch alone, so that a resumed run sees the same batches.
    """

    def __init__(self, tokens: Tokens, batch_size: int, seed: int, batches: int = 100):
        self.lengths = [len(ids) for ids in tokens]
        self.batch_size = batch_size
        self.bucket = batches * batch_size
        self.seed = seed
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.lengths)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 100_003 + self.epoch)
        order = torch.randperm(len(self), generator=generator).tolist()
        batches = []
        for start in range(0, len(order), self.bucket):
            bucket = sorted(order[start : start + self.bucket], key=self.lengths.__getitem__)
            batches += [bucket[i : i + self.batch_size] for i in range(0, len(bucket), self.batch_size)]
        full = [b for b in batches if len(b) == self.batch_size]
        rest = [b for b in batches if len(b) < self.batch_size]  # a short batch in the middle would shift all others
        for i in torch.randperm(len(full), generator=generator).tolist():
            yield from full[i]
        for batch in rest:
            yield from batch


def encode(base: BaseModel, rows: Rows, labels: Sequence[str], max_length: int) -> Encoded:
    """Tokens and targets of labelled rows; an error for labels that are not among ``labels``."""
    index = {label: i for i, label in enumerate(labels)}
    unseen = sorted({label for row in rows.label_sets() for label in row} - index.keys())
    if unseen:
        raise InfuseError(
            f"The labels {listed(unseen)} do not occur in the training rows; {respelled(unseen, labels)}add rows or "
            "drop them."
        )
    if rows.multi:
        targets = torch.zeros(len(rows), len(labels))
        for i, row in enumerate(rows.label_sets()):
            targets[i, [index[label] for label in row]] = 1
    else:
        targets = torch.tensor([index[row[0]] for row in rows.label_sets()])
    return Encoded(tokenize(base.tokenizer, rows.texts, max_length), targets)


def one_hot(targets: Tensor, count: int) -> Tensor:
    """0/1 per label, from class indices or from what is 0/1 already."""
    return targets if targets.dim() == 2 else torch.nn.functional.one_hot(targets, count).float()

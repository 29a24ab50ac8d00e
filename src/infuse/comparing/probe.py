"""Forgetting: what an adapted encoder still knows of a domain that it was not trained on."""

from importlib.resources import files

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from infuse.bases import BaseModel
from infuse.data import Rows, read
from infuse.data.check import check_rows
from infuse.errors import InfuseError
from infuse.texts import bare_features, features, tokenize

BUNDLED = "probe"
NEIGHBOURS = 5


def read_probe(source: str) -> Rows:
    """The probe's rows: the bundled ones under the name ``probe``, or those of a file."""
    rows = read(str(files("infuse.data") / "probe" / "probe.csv") if source == BUNDLED else source)
    check_rows(rows, "the probe")
    few = [label for label, count in rows.counts.items() if count < 2]
    if rows.multi or len(rows.label_set) < 2 or few:
        raise InfuseError("The probe needs one label a row, two labels or more, and two rows or more of each.")
    return rows


def probe_accuracy(base: BaseModel, rows: Rows, max_length: int, adapter: str | None = None) -> float:
    """How many rows have the label that their nearest neighbours among the other rows vote for.

    The features are those of the bare base, or of the base as ``adapter`` changes it. Nothing is trained on the probe,
    so that a loss shows what happened to the encoder, not how well a new head makes up for it.
    """
    tokens = tokenize(base.tokenizer, rows.texts, max_length)
    if adapter is None:
        found = bare_features(base, tokens)
    else:
        found = features(base.model, tokens, base.pad_id, base.pooling, adapter)
    labels = rows.label_set
    targets = torch.tensor([labels.index(label) for (label,) in rows.label_sets()])
    return float((nearest(found, targets, len(labels)) == targets).double().mean())


def nearest(found: Float[Tensor, "rows width"], targets: Tensor, count: int) -> Tensor:
    """For every row, the label that its nearest other rows (by cosine) vote for, weighed by similarity."""
    unit = F.normalize(found.float(), dim=-1)
    alike = (unit @ unit.T).fill_diagonal_(-2.0)  # a row is no neighbour of itself
    close, index = alike.topk(min(NEIGHBOURS, len(found) - 1), dim=-1)
    votes = torch.zeros(len(found), count)
    return votes.scatter_add_(1, targets[index], 1 + close).argmax(-1)

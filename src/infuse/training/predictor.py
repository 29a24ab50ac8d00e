"""A saved run, ready to answer."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from infuse import storage
from infuse.bases import BaseModel, load_base
from infuse.checkpoint import header, load, setup_of
from infuse.data import Rows
from infuse.data.check import check_rows
from infuse.errors import InfuseError
from infuse.heads import Answer, Head, answer, head_of
from infuse.texts import probabilities, tokenize
from infuse.training.batches import Encoded, encode
from infuse.training.folders import ADAPTER, MODEL, saved_adapter


@dataclass
class Predictor:
    """A trained adapter over its base, ready to answer."""

    base: BaseModel
    adapter: str
    labels: tuple[str, ...]
    multi: bool
    max_length: int

    def probabilities(self, texts: Sequence[str]) -> np.ndarray:
        """(texts, labels)"""
        tokens = tokenize(self.base.tokenizer, texts, self.max_length)
        return probabilities(self.base.model, tokens, self.base.pad_id, self.adapter)

    @property
    def head(self) -> Head:
        return head_of(self.base.model, self.adapter)

    def answers(self, texts: Sequence[str], top_k: int = 3) -> list[Answer]:
        """An answer per text; its label is ``None`` where the text is out of scope."""
        head = self.head
        return [answer(head, row, top_k) for row in self.probabilities(texts)]

    def encoded(self, rows: Rows) -> Encoded:
        """Labelled rows as tokens and targets; an error for rows that the adapter can't be measured on."""
        check_rows(rows, "the data")
        if rows.multi != self.multi:
            have, mend = ("several labels", "pass") if self.multi else ("one label", "leave out")
            raise InfuseError(f"The run gives each text {have}, unlike the data: {mend} --multi, or use other data.")
        return encode(self.base, rows, self.labels, self.max_length)


def open_run(path: str | Path, base: str | None = None, precision: str | None = None) -> Predictor:
    """The adapter of a run folder (or an adapter's own folder), loaded onto its base.

    Args:
        path: a folder that ``infuse train`` or :meth:`Classifier.save` wrote.
        base: the base to use, if it is not found under the name that was used in training.
        precision: of the trunk; by default the one in which the adapter was trained and measured.
    """
    folder, adapter = storage.current(Path(path)), saved_adapter(path)
    facts = header(adapter)
    if facts["head"] is None:
        raise InfuseError(f"The adapter in {adapter} has no classification head; it can't label texts.")
    setup = setup_of(facts, adapter)
    own = folder / MODEL
    name = base or (str(own) if own.is_dir() else setup.base)
    head = facts["head"]
    loaded = load_base(
        name,
        labels=len(head["labels"]) if head["kind"] == "hf" else None,
        pooling=head["pooling"],
        precision=precision or setup.precision,
    )
    load(loaded.model, adapter, name=ADAPTER)
    return Predictor(loaded, ADAPTER, tuple(head["labels"]), head["multi"], setup.max_length)

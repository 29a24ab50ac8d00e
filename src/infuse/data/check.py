"""Look at the data before any training: what cannot work is an error, what may mislead is a warning."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

from infuse.data.alike import alike, respelled, spelled_out
from infuse.data.rows import Rows, Splits
from infuse.errors import InfuseError, listed

IMBALANCE = 20
"""Largest label over smallest label (in rows) from which the check recommends class weights."""


def check(splits: Splits) -> list[str]:
    """Warnings about ``splits`` in plain words, each one sentence; an empty list if all is well.

    Raises:
        InfuseError: training cannot work or its score would mean nothing: a part without rows or labels,
            empty texts or labels, fewer than two classes, labels that train never shows, or single labels
            in one part and lists in another.
    """
    parts = {"train": splits.train, "validation": splits.validation}
    if splits.test is not None:
        parts["test"] = splits.test
    for name, rows in parts.items():
        check_rows(rows, name)
    _check_classes(splits.train)
    held_out = {name: rows for name, rows in parts.items() if name != "train"}
    for name, rows in held_out.items():
        _check_fit(splits.train, rows, name)
    found = [_leak(splits.train, rows, name) for name, rows in held_out.items()]
    found += [_look_alikes(parts.values())]
    found += [_contradictions(splits.train), _single_rows(splits.train), _imbalance(splits.train)]
    return [warning for warning in found if warning]


def check_rows(rows: Rows, name: str) -> None:
    """Raise InfuseError if ``rows``, called ``name`` in the message, lack rows, texts or labels, or aren't Unicode.

    Row numbers count from 1 and leave out a header.
    """
    if not len(rows):
        raise InfuseError(f"{name} has no rows: give it at least one text with its label.")
    if rows.labels is None:
        raise InfuseError(f"{name} has no labels: give one for every text.")
    check_texts(rows.texts, name)
    _refuse("label", (all(labels) for labels in rows.label_sets()), "empty", "fill", name)
    broken = (all(map(is_unicode, labels)) for labels in rows.label_sets())
    _refuse("label", broken, "not valid Unicode", "correct", name)


def check_texts(texts: Sequence[str], name: str) -> None:
    """Raise InfuseError if texts, called ``name`` in the message, are blank or aren't Unicode."""
    _refuse("text", (isinstance(text, str) and bool(text.strip()) for text in texts), "empty", "fill", name)
    _refuse("text", map(is_unicode, texts), "not valid Unicode", "correct", name)


def _refuse(what: str, good: Iterable[bool], how: str, mend: str, name: str) -> None:
    where = [i for i, fine in enumerate(good, 1) if not fine]
    if where:
        raise InfuseError(
            f"{_count(len(where), what)} in {name} {_are(where)} {how} "
            f"({'row' if len(where) == 1 else 'rows'} {listed(where, 10)}): remove or {mend} "
            f"{'it' if len(where) == 1 else 'them'}."
        )


def is_unicode(text: str) -> bool:
    """Whether UTF-8 can write a text: a lone surrogate is half a character, or a byte of another encoding."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _check_classes(train: Rows) -> None:
    names = train.label_set
    if train.multi and not names:
        raise InfuseError("no row of train has a label: give at least some rows a label.")
    if not train.multi and len(names) < 2:
        raise InfuseError(f"train has only one class ({names[0]}): a classifier needs rows of at least two.")


def _check_fit(train: Rows, rows: Rows, name: str) -> None:
    if rows.multi != train.multi:
        kinds = {True: "lists of labels", False: "single labels"}
        raise InfuseError(f"train has {kinds[train.multi]} but {name} has {kinds[rows.multi]}: use one kind in both.")
    unseen = [label for label in rows.label_set if label not in train.counts]
    if unseen:
        raise InfuseError(
            f"{_count(len(unseen), 'label')} of {name} {'does' if len(unseen) == 1 else 'do'} not occur in train "
            f"({listed(unseen)}): {respelled(unseen, train.counts)}add rows to train or remove them from {name}."
        )


def _leak(train: Rows, rows: Rows, name: str) -> str | None:
    seen = {_fold(text) for text in train.texts}
    both = [text for text in rows.texts if _fold(text) in seen]
    if not both:
        return None
    return (
        f"{_count(len(both), 'text')} of {name} {_are(both)} also in train (for example {_quoted(both[0])}): "
        f"remove {'it' if len(both) == 1 else 'them'} from one side, or the score will look better than it is."
    )


def _look_alikes(parts: Iterable[Rows]) -> str | None:
    groups = alike(label for rows in parts for label in rows.counts)
    if not groups:
        return None
    shown = listed([" and ".join(spelled_out(group)) for group in groups], 5)
    return (
        f"{_count(len(groups), 'label')} {'has' if len(groups) == 1 else 'have'} several spellings that look alike "
        f"({shown}): each counts as a label of its own, so write them alike if they mean the same."
    )


def _contradictions(train: Rows) -> str | None:
    labels: defaultdict[str, set[tuple[str, ...]]] = defaultdict(set)
    first: dict[str, str] = {}
    for text, row in zip(train.texts, train.label_sets(), strict=True):
        labels[_fold(text)].add(tuple(sorted(row)))
        first.setdefault(_fold(text), text)
    torn = [key for key, answers in labels.items() if len(answers) > 1]
    if not torn:
        return None
    answers = " and ".join(sorted(", ".join(row) or "no label" for row in labels[torn[0]]))
    return (
        f"{_count(len(torn), 'text')} of train {'occurs' if len(torn) == 1 else 'occur'} with different labels "
        f"(for example {_quoted(first[torn[0]])} as {answers}): decide on one, since the model cannot learn both."
    )


def _single_rows(train: Rows) -> str | None:
    single = [label for label in train.label_set if train.counts[label] == 1]
    if not single:
        return None
    return (
        f"{_count(len(single), 'label')} {'has' if len(single) == 1 else 'have'} only one row in train "
        f"({listed(single)}): add rows, or merge {'it' if len(single) == 1 else 'them'} with another label."
    )


def _imbalance(train: Rows) -> str | None:
    ordered = train.counts.most_common()
    (most, high), (least, low) = ordered[0], ordered[-1]
    if high <= IMBALANCE * low:
        return None
    return (
        f"labels are uneven in train ({most} has {_count(high, 'row')}, {least} has {_count(low, 'row')}): "
        "train with class weights, or the small ones will be overlooked."
    )


def _fold(text: str) -> str:
    return " ".join(text.casefold().split())


def _quoted(text: str) -> str:
    flat = " ".join(text.split())
    return f'"{flat if len(flat) <= 60 else flat[:59] + "…"}"'


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _are(things: list) -> str:
    return "is" if len(things) == 1 else "are"

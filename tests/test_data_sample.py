"""The bundled sample keeps what its README promises."""

from __future__ import annotations

import re
import sys
from collections import Counter
from itertools import combinations, pairwise
from pathlib import Path

import pytest

from infuse.data import Splits, load_splits


@pytest.fixture(scope="module")
def sample() -> Splits:
    splits, warnings = load_splits("sample")
    assert warnings == []
    return splits


def test_sample_counts(sample):
    assert sample.test is not None
    parts = {22: sample.train, 5: sample.validation}
    for rows, per_label in ((sample.train, 22), (sample.validation, 5), (sample.test, 5)):
        assert set(rows.counts.values()) == {per_label}
        assert rows.label_set == sample.train.label_set
    total = sum((rows.counts for rows in (*parts.values(), sample.test)), Counter())
    assert len(total) >= 40 and min(total.values()) >= 25


def test_sample_rows_are_shuffled(sample):
    labels = sample.train.labels
    assert labels is not None
    assert sum(one == two for one, two in pairwise(labels)) < len(labels) / 10


def test_sample_texts_differ(sample):
    assert sample.test is not None
    texts = [*sample.train.texts, *sample.validation.texts, *sample.test.texts]
    assert all(text == text.strip() and text for text in texts)
    bags = [frozenset(re.findall(r"\w+", text.casefold().replace("'", ""))) for text in texts]
    alike = [
        (texts[i], texts[j])
        for i, j in combinations(range(len(texts)), 2)
        if 10 * len(bags[i] & bags[j]) >= 9 * len(bags[i] | bags[j])
    ]
    assert alike == []


def test_sample_has_its_own_intents(sample):
    readme = (Path(sys.modules["infuse.data"].__path__[0]) / "sample" / "README.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| `(\w+)` \|", readme, re.MULTILINE) == sample.train.label_set

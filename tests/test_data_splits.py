"""Checking and splitting rows."""

from __future__ import annotations

from typing import Any

import pytest
from data_helpers import fails
from hypothesis import given
from hypothesis import strategies as st

from infuse.data import Rows, Splits, check, few_shot, stratified

# Checking


def single(*pairs: tuple[Any, str]) -> Rows:
    return Rows(tuple(text for text, _ in pairs), tuple(label for _, label in pairs))


TRAIN = single(("one", "a"), ("two", "a"), ("three", "b"), ("four", "b"))
GOOD = single(("five", "a"), ("six", "b"))


def test_good_data_has_no_warnings():
    assert check(Splits(TRAIN, GOOD, GOOD)) == []
    several = Rows(("one", "two", "three"), (("a",), ("a",), ()))
    assert check(Splits(several, Rows(("four",), ((),)))) == []


@pytest.mark.parametrize(
    ("splits", "parts"),
    [
        (Splits(Rows((), ()), GOOD), ["train has no rows"]),
        (Splits(TRAIN, GOOD, Rows((), ())), ["test has no rows"]),
        (Splits(TRAIN, Rows(("x",))), ["validation has no labels"]),
        (Splits(single(("x", "a"), ("y", "a")), GOOD), ["only one class (a)"]),
        (Splits(Rows(("x",), ((),)), Rows(("y",), ((),))), ["no row of train has a label"]),
        (
            Splits(single(("x", "a"), ("", "a"), (" \n", "b"), ("y", "b"), (None, "b")), GOOD),
            ["3 texts in train are empty (rows 2, 3, 5): remove or fill them."],
        ),
        (Splits(single(("x", "a"), ("\u00a0", "b")), GOOD), ["1 text in train is empty (row 2): remove or fill it."]),
        (Splits(single(*[("", "a")] * 15), GOOD), ["15 texts", "(15 in all)"]),
        (Splits(single(("x", "a"), ("\ud83d", "b")), GOOD), ["1 text in train is not valid Unicode (row 2)"]),
        (Splits(TRAIN, single(("x", "a\udcff"))), ["1 label in validation is not valid Unicode (row 1)"]),
        (Splits(TRAIN, single(("x", ""))), ["1 label in validation is empty (row 1)"]),
        (Splits(Rows(("x", "y"), (("a",), ("",))), GOOD), ["1 label in train is empty (row 2)"]),
        (Splits(TRAIN, single(("x", "c"), ("y", "d"))), ["2 labels of validation do not occur in train (c, d)"]),
        (Splits(TRAIN, GOOD, single(("x", "c"))), ["1 label of test does not occur in train (c)"]),
        (Splits(TRAIN, Rows(("x",), (("a",),))), ["train has single labels but validation has lists of labels"]),
    ],
)
def test_data_that_cannot_work(splits, parts):
    with fails(*parts):
        check(splits)


def test_warns_of_texts_on_both_sides():
    held_out = single(("  ONE\n", "a"), ("two", "b"), ("new", "b"))
    (warning,) = check(Splits(TRAIN, held_out))
    assert '2 texts of validation are also in train (for example "ONE")' in warning
    (warning,) = check(Splits(TRAIN, GOOD, single(("One", "a"))))
    assert "1 text of test is also in train" in warning


def test_warns_of_contradictions():
    train = single(("same text", "a"), ("Same  Text", "b"), ("two", "a"), ("three", "b"), ("two", "a"))
    (warning,) = check(Splits(train, GOOD))
    assert '1 text of train occurs with different labels (for example "same text" as a and b)' in warning
    order = Rows(("x", "x", "y"), (("a", "b"), ("b", "a"), ("a", "b")))
    assert check(Splits(order, Rows(("z",), (("a",),)))) == []
    torn = Rows(("x" * 80, "x" * 80, "y"), (("a", "b"), (), ("a", "b")))
    (warning,) = [line for line in check(Splits(torn, Rows(("z",), (("a",),)))) if "different" in line]
    assert "a, b and no label" in warning and "x…" in warning


def test_warns_of_labels_with_one_row():
    (warning,) = check(Splits(single(("one", "a"), ("two", "a"), ("three", "b")), GOOD))
    assert "1 label has only one row in train (b)" in warning


def test_warns_of_imbalance():
    def train(high: int) -> Rows:
        return single(*[(f"a{i}", "a") for i in range(high)], ("b1", "b"), ("b2", "b"))

    assert check(Splits(train(40), GOOD)) == []
    (warning,) = check(Splits(train(41), GOOD))
    assert "a has 41 rows, b has 2 rows" in warning and "class weights" in warning


# Splitting

FRACTIONS = st.floats(0.01, 0.99)
SEEDS = st.integers(0, 2**32)
LABELS = st.lists(st.sampled_from("abcdefg"), max_size=60)
SEVERAL = st.lists(st.lists(st.sampled_from("abcd"), max_size=3, unique=True).map(tuple), min_size=1, max_size=40)


def numbered(labels: list[Any]) -> Rows:
    return Rows(tuple(map(str, range(len(labels)))), tuple(labels))


@given(LABELS | SEVERAL, FRACTIONS, SEEDS)
def test_a_split_is_a_partition_that_repeats(labels, fraction, seed):
    rows = numbered(labels)
    rest, out = stratified(rows, fraction, seed)
    assert sorted(rest.texts + out.texts, key=int) == list(rows.texts)
    assert rest == rows.take(map(int, rest.texts)) and out == rows.take(map(int, out.texts))
    assert list(rest.texts) == sorted(rest.texts, key=int)
    assert (rest, out) == stratified(rows, fraction, seed)
    assert rest.label_set == rows.label_set


@given(st.lists(st.sampled_from("abcdefg"), min_size=1, max_size=60), FRACTIONS, SEEDS)
def test_a_split_is_stratified(labels, fraction, seed):
    rows = numbered(labels)
    _, out = stratified(rows, fraction, seed)
    can = sum(count - 1 for count in rows.counts.values())
    assert len(out) == min(max(1, round(fraction * len(rows))), can)
    for label, count in rows.counts.items():
        if len(out) < can:
            assert out.counts[label] >= min(int(fraction * count), count - 1)
        assert out.counts[label] <= count - 1


def test_large_classes_are_held_out_evenly():
    rows = numbered(["a"] * 100 + ["b"] * 50 + ["c"])
    _, out = stratified(rows, 0.1, 0)
    assert out.counts == {"a": 10, "b": 5}


def test_another_seed_is_another_split():
    rows = numbered(["a", "b"] * 50)
    assert len({stratified(rows, 0.2, seed)[1].texts for seed in range(5)}) == 5


@given(st.lists(st.sampled_from("abcde"), min_size=1, max_size=60), st.integers(1, 9), SEEDS)
def test_few_shot(labels, per_label, seed):
    rows = numbered(labels)
    few = few_shot(rows, per_label, seed)
    assert few.counts == {label: min(count, per_label) for label, count in rows.counts.items()}
    assert few == few_shot(rows, per_label, seed) == rows.take(map(int, few.texts))


@given(SEVERAL, st.integers(1, 5), SEEDS)
def test_few_shot_of_several_labels(labels, per_label, seed):
    rows = numbered(labels)
    few = few_shot(rows, per_label, seed)
    assert all(few.counts[label] >= min(count, per_label) for label, count in rows.counts.items())
    assert len(few) <= per_label * len(rows.label_set)


def test_splitter_arguments():
    for fraction in (0, 1, -0.1, 1.5):
        with fails("between 0 and 1"):
            stratified(TRAIN, fraction, 0)
    with fails("choose at least 1"):
        few_shot(TRAIN, 0, 0)
    for work in (lambda rows: stratified(rows, 0.1, 0), lambda rows: few_shot(rows, 1, 0)):
        with fails("give labels"):
            work(Rows(("x",)))

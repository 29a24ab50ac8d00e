"""What makes steps cheap: frozen layers that run once, batches in parts, compilation."""

import importlib
import shutil
from dataclasses import replace

import pytest
import torch

import infuse
from infuse import InfuseError
from infuse.bases import BaseModel, load_base
from infuse.data import read, stratified
from infuse.model import store_of
from infuse.testing import TINY
from infuse.testing.conformance import close, output, wake
from infuse.testing.tiny import tiny
from infuse.texts import pad
from infuse.training import prefix
from infuse.training.engine import parts
from infuse.training.fit import fit
from infuse.training.prefix import prefix_of, remember
from infuse.training.settings import Settings

TOKENS = [[5, 6, 7, 8, 9], [3, 4, 5], [1, 2]]
WITHOUT = {"albert", "t5", "mt5", "bart"}
"""Architectures whose layers can't be skipped: shared, or handing on more than hidden states, or in two stacks."""
LAST = Settings(method="lora:rank=4", layers="last:1", epochs=2, batch_size=16, learning_rate=0.01)


@pytest.fixture(scope="module")
def rows(toy):
    return stratified(read(toy), 0.25)


def trained(base, rows, settings):
    loaded = load_base(str(base))
    result = fit(loaded, *rows, settings)
    return {name: value.clone() for name, value in result.adapter.state_dict().items()}, result


@pytest.mark.parametrize("kind", TINY)
def test_skipping_the_frozen_layers_changes_nothing(kind):
    model = tiny(kind).eval()
    base = BaseModel(kind, model, type("Tokenizer", (), {"pad_token_id": 0})(), "mean", 32)
    wake(model, infuse.attach(model, "lora", "a", layers="last:1").name)
    found = prefix_of(base, store_of(model)["a"])
    assert (found is None) == (kind in WITHOUT)
    if found is None:
        return
    kept = remember(base, found, TOKENS)
    batch = pad(TOKENS, 0)
    hidden = torch.nn.utils.rnn.pad_sequence([kept[i] for i in range(3)], batch_first=True)
    before = output(model, batch)
    with found.replaced(hidden):
        skipped = output(model, batch)
    for row, ids in enumerate(TOKENS):
        close(skipped[row, : len(ids)], before[row, : len(ids)])
    assert torch.equal(output(model, batch), before)


def test_an_adapter_at_the_first_layer_has_no_prefix():
    base = BaseModel("bert", tiny("bert"), None, "mean", 32)  # type: ignore[arg-type]  # no tokenizer is needed
    assert prefix_of(base, infuse.attach(base.model, "ia3", "a")) is None


def test_training_with_a_prefix_equals_training_without(tiny_base, rows, monkeypatch):
    with_prefix, result = trained(tiny_base, rows, LAST)
    monkeypatch.setattr(importlib.import_module("infuse.training.fit"), "prefix_of", lambda *_: None)
    without, other = trained(tiny_base, rows, LAST)
    for name, value in without.items():
        close(with_prefix[name], value, 1e-4)
    assert [h.get("eval_accuracy") for h in result.history] == [h.get("eval_accuracy") for h in other.history]


def test_frozen_layers_run_once_and_never_on_other_rows(tiny_base, rows):
    base = load_base(str(tiny_base))
    calls = []
    base.model.encoder.layer[0].intermediate.register_forward_hook(lambda *_: calls.append(1))
    fit(base, *rows, replace(LAST, epochs=1))
    first = len(calls)
    infuse.detach(base.model)
    calls.clear()
    fit(base, *rows, replace(LAST, epochs=6, method="ia3"))
    assert len(calls) <= 1, "only to see that layers can be skipped"
    infuse.detach(base.model)
    calls.clear()
    fit(base, rows[0].take(range(40)), None, replace(LAST, epochs=1))
    assert first > len(calls) > 1


def test_beyond_the_budget_hidden_states_lie_in_a_file(tiny_base, rows, monkeypatch):
    in_memory, _ = trained(tiny_base, rows, LAST)
    monkeypatch.setattr(prefix, "BUDGET", 100)
    mapped, _ = trained(tiny_base, rows, LAST)
    assert all(torch.equal(value, mapped[name]) for name, value in in_memory.items())


def test_parts_of_a_batch_have_its_gradient(tiny_base, rows):
    for changes in ({"layers": "all"}, {"class_weights": True}):
        settings = replace(LAST, epochs=1, **changes)
        whole, _ = trained(tiny_base, rows, settings)
        cut, _ = trained(tiny_base, rows, replace(settings, max_tokens=64))
        for name, value in whole.items():
            close(cut[name], value, 1e-4)


def test_parts_hold_at_most_so_many_tokens():
    batch = pad([[1] * n for n in (9, 7, 3, 2)], 0) | {"labels": torch.arange(4)}
    cut = parts(batch, 20)
    assert [tuple(part["input_ids"].shape) for part, _ in cut] == [(2, 9), (2, 3)]
    assert sum(share for _, share in cut) == pytest.approx(1)
    assert len(parts(batch, 36)) == 1
    assert len(parts(batch, 1)) == 4


@pytest.mark.skipif(not shutil.which("g++"), reason="compiling needs g++")
def test_compiled_training_learns_the_same(tiny_base, rows):
    plain, _ = trained(tiny_base, rows, replace(LAST, epochs=1, layers="all"))
    compiled, _ = trained(tiny_base, rows, replace(LAST, epochs=1, layers="all", compile=True))
    for name, value in plain.items():
        close(compiled[name], value, 1e-3)


def test_compiling_without_a_compiler_says_so(tiny_base, rows, monkeypatch):
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", ("no-such-compiler",))
    with pytest.raises(InfuseError, match=r"C\+\+ compiler"):
        trained(tiny_base, rows, replace(LAST, epochs=1, compile=True))

"""Stacked parameters kept for mixed batches: never stale, never another adapter's."""

import random
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import infuse
from infuse import mixing
from infuse.banks import Bank
from infuse.method import registry
from infuse.model import store_of
from infuse.routing import side_by_side
from infuse.testing.conformance import close, output, wake
from infuse.testing.tiny import inputs, tiny

NAMES = ["a", "b", "c", "d"]


@pytest.fixture
def model():
    model = tiny("bert").eval()
    for seed, name in enumerate(NAMES):
        infuse.attach(model, "lora", name)
        wake(model, name, seed)
    return model


def check(model, names) -> None:
    batch = inputs(model, rows=len(names))
    with torch.inference_mode():
        mixed = output(model, batch, names)
        for row, name in enumerate(names):
            close(mixed[row], output(model, batch, name)[row])


@pytest.mark.parametrize("method", [*registry(), "lora:dora=true", "parallel:learned_scale=true"])
@pytest.mark.parametrize("arch", ["bert", "gpt2"])
def test_methods_that_take_stacked_parameters_agree_with_vmap(method, arch, monkeypatch):
    model = tiny(arch).eval()
    method = "compacter++:width=4" if method == "compacter" else method
    for seed, name in enumerate(NAMES):
        infuse.attach(model, method, name)
        wake(model, name, seed)
    cls = type(store_of(model)["a"].method)
    assert cls.stackable
    batch, rows = inputs(model, rows=7), ["b", None, "a", "c", "c", "d", "a"]
    stacked = output(model, batch, rows)
    monkeypatch.setattr(cls, "stackable", False)
    close(output(model, batch, rows), stacked)
    with torch.no_grad():
        close(output(model, batch, rows), stacked)


@pytest.mark.parametrize(
    "method", [*(n for n, cls in registry().items() if cls.acts != "factor"), "lora:dora=true", "fusion"]
)
def test_rows_of_one_adapter_as_one_long_row(method, monkeypatch):
    """What pays for large adapters gives the same for small ones."""
    model = tiny("bert").eval()
    if method == "fusion":
        for seed, member in enumerate(["m1", "m2"]):
            infuse.attach(model, "pfeiffer", member)
            wake(model, member, seed)
    for seed, name in enumerate(NAMES):
        if method == "fusion":
            infuse.fuse(model, ["m1", "m2"], name=name)
        else:
            infuse.attach(model, "compacter:width=4" if method == "compacter" else method, name)
        wake(model, name, seed)
    way, calls = mixing._by_adapter, []
    monkeypatch.setattr(mixing, "_by_adapter", lambda *given: calls.append(given) or way(*given))
    monkeypatch.setattr(mixing, "_pays", lambda group, *_: len(group.adapters) < len(group.which))
    check(model, ["a", "b", None, "a", "c", "c", "c"])
    check(model, ["d", "d", "a", "b"])
    assert calls


def test_large_adapters_are_not_copied_for_every_row(monkeypatch):
    model = tiny("bert").eval()
    for seed, name in enumerate(NAMES):
        infuse.attach(model, "parallel:width=512", name)
        wake(model, name, seed)
    way, calls = mixing._by_adapter, []
    monkeypatch.setattr(mixing, "_by_adapter", lambda *given: calls.append(given) or way(*given))
    check(model, NAMES)
    assert not calls  # a row each: nothing is copied anyway
    check(model, [*NAMES, *NAMES, "a"])
    assert calls


def test_rows_of_several_methods_side_by_side_or_not(model):
    names = [*NAMES]
    for seed, method in enumerate(["ia3", "pfeiffer", "compacter:width=4", "lora:rank=4,roles=query+key"]):
        for copy in "xy":
            names.append(f"{seed} {copy}")
            infuse.attach(model, method, names[-1])
            wake(model, names[-1], seed)
    check(model, names)
    generator = random.Random(0)
    for _ in range(5):
        mixed = [generator.choice([*names, None]) for _ in range(12)]
        check(model, mixed)
        own = [name for name in mixed if name is not None]
        order = side_by_side({name: store_of(model)[name] for name in own}, own)
        assert sorted(order) == list(range(len(own)))
        check(model, [own[i] for i in order])


def test_a_new_adapter_of_an_old_name_gets_its_own_answers(model):
    check(model, NAMES)
    infuse.detach(model, "b")
    infuse.attach(model, "lora", "b")
    wake(model, "b", 77)
    check(model, NAMES)


@pytest.mark.parametrize("change", ["in place", "load", "data"])
def test_changed_parameters_are_seen(model, change):
    check(model, NAMES)
    adapter = store_of(model)["c"]
    if change == "in place":
        wake(model, "c", 5)
    elif change == "load":
        adapter.load_state_dict({name: value + 0.5 for name, value in adapter.state_dict().items()})
    else:
        for parameter in adapter.parameters():
            parameter.data = parameter.data + 0.5
    check(model, NAMES)


def test_a_changed_base_is_seen():
    """DoRA's magnitudes are divided by norms that the frozen weight has a part in."""
    model = tiny("bert").eval()
    for seed, name in enumerate(NAMES):
        infuse.attach(model, "lora:dora=true", name)
        wake(model, name, seed)
    for names in (NAMES, ["a"] * 3):
        check(model, names)
    with torch.no_grad():
        for layer in model.encoder.layer:
            layer.attention.self.query.weight.mul_(1.5)
    for names in (NAMES, ["a"] * 3):
        check(model, names)


def test_slots_are_used_again(model):
    check(model, NAMES)
    bank: Bank = next(iter(store_of(model).banks.banks.values()))
    capacity = bank.capacity
    for seed in range(3 * capacity):
        infuse.detach(model, "a")
        infuse.attach(model, "lora", "a")
        wake(model, "a", seed)
        check(model, NAMES)
    assert bank.capacity == capacity
    assert len(bank.slots) == len(NAMES)


def test_a_bank_grows(model):
    names = [f"n{i}" for i in range(40)]
    for seed, name in enumerate(names):
        infuse.attach(model, "lora", name)
        wake(model, name, seed)
        if seed % 7 == 6:
            check(model, [*names[: seed + 1], "a", None])
    check(model, names[::-1])


def test_threads_do_not_mix_their_rows(model):
    for turn in range(4):
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda shift: check(model, NAMES[shift:] + NAMES[:shift]), range(4)))
        wake(model, NAMES[turn], 50 + turn)


def test_replaced_parameters_are_seen(model):
    check(model, NAMES)
    adapter = store_of(model)["d"]
    adapter.load_state_dict({name: value.clone() * 2 for name, value in adapter.state_dict().items()}, assign=True)
    check(model, NAMES)
    delta = next(iter(adapter.deltas.values()))
    delta.B = torch.nn.Parameter(delta.B.detach() + 1)
    check(model, NAMES)


def test_a_replaced_shared_parameter_is_seen():
    model = tiny("bert").eval()
    for seed, name in enumerate(NAMES):
        infuse.attach(model, "compacter:width=4", name)
        wake(model, name, seed)
    check(model, NAMES)
    shared = store_of(model)["a"].shared
    shared["rule"] = torch.nn.Parameter(shared["rule"].detach() * 3)
    check(model, NAMES)

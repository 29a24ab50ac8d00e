"""Adapted models under torch.compile: one graph, and the answers of the model as it is at each call."""

import threading

import pytest
import torch

import infuse
from infuse.model import fuse
from infuse.testing import inputs, tiny, wake
from infuse.testing.conformance import close, output


@pytest.fixture
def model():
    """A BERT with adapters that do something, ``a`` and ``c`` alike."""
    torch.compiler.reset()
    model = tiny("bert")
    for seed, (name, method) in enumerate({"a": "ia3", "b": "lora:rank=2", "c": "ia3"}.items()):
        infuse.attach(model, method, name)
        wake(model, name, seed)
    return model


def in_a_thread(act):
    """Run where no route has been in force before."""
    thread = threading.Thread(target=act)
    thread.start()
    thread.join()


@pytest.mark.parametrize("route", ["a", ["a", None, "b"], ["a", "c", "b"], ["c", "a", "a"]], ids=str)
def test_a_route_makes_one_graph(model, route):
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with infuse.route(model, route):
        close(output(compiled, inputs(model)), output(model, inputs(model)))


def test_routes_that_come_after_the_first_call_are_seen(model):
    compiled, batch, found = torch.compile(model, backend="eager"), inputs(model), []

    def run():
        output(compiled, batch)
        found.extend(output(compiled, batch, route) for route in ROUTES)

    in_a_thread(run)
    for route, own in zip(ROUTES, found, strict=True):
        close(own, output(model, batch, route))


ROUTES = ("a", None, ["a", None, "b"], ["c", "a", "b"])


def test_weights_that_are_asked_for_later_are_noted():
    torch.compiler.reset()
    model, found = tiny("bert"), []
    for name in "ab":
        infuse.attach(model, "pfeiffer", name)
    fuse(model, ["a", "b"])
    compiled = torch.compile(model, backend="eager")

    def run():
        output(compiled, inputs(model))
        with infuse.mixing_weights() as weights:
            output(compiled, inputs(model))
        found.extend(weights)

    in_a_thread(run)
    assert found == list(model.infuse["a"].sites)

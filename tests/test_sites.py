"""Which sites an adapter takes: layers, roles and paths."""

import re
from dataclasses import replace

import pytest
import torch
from torch import nn

import infuse
from infuse import IA3, Arch, InfuseError, LoRA, Stack
from infuse.sites import Paths, site_at
from infuse.testing import inputs, tiny, wake
from infuse.testing.conformance import close, output

SMALL = {"compacter": "compacter:width=8"}


@pytest.mark.parametrize(
    "layers, chosen",
    [("all", {0, 1, 2}), (None, {0, 1, 2}), ("last:1", {2}), ("first:1", {0}), ("last:9", {0, 1, 2}),
     ("0,2", {0, 2}), ("1", {1}), ([0, 1], {0, 1})],
)  # fmt: skip
def test_layers(layers, chosen):
    model = tiny("bert", num_hidden_layers=3)
    adapter = infuse.attach(model, IA3(), layers=layers)
    assert {site.layer for site in adapter.sites.values()} == chosen
    assert len(adapter.sites) == 3 * len(chosen)


@pytest.mark.parametrize("layers", ["last", "last:", "last:0", "some", "", "-1", "0-1", "0,", "7", "0,7", [0, 7], [-1]])
def test_bad_layers(layers):
    model = tiny("bert")
    with pytest.raises(InfuseError, match="layer"):
        infuse.attach(model, IA3(), layers=layers)
    assert not hasattr(model, "infuse") and all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("layers", [3, 1.5, {"a": 1}.get])
def test_layers_of_another_type_are_not_understood(layers):
    with pytest.raises(InfuseError, match=r"layers=.* is not understood: .*'last:2'"):
        infuse.attach(tiny("bert"), IA3(), layers=layers)


def test_layers_from_a_generator_serve_every_stack():
    model = tiny("t5")
    once, again = (infuse.attach(model, IA3(), n, layers=layers) for n, layers in (("a", iter([0])), ("b", [0])))
    assert list(once.sites) == list(again.sites) and {s.stack for s in once.sites.values()} == {"encoder", "decoder"}


@pytest.mark.parametrize("cls", infuse.registry().values())
def test_a_method_without_roles_is_refused(cls):
    model = tiny("bert")
    with pytest.raises(InfuseError, match=f"{cls.__name__} needs a role"):
        infuse.attach(model, cls(roles=()))
    assert not hasattr(model, "infuse")


def test_a_path_that_fits_two_places_alike_is_refused():
    q = "block.0.layer.0.SelfAttention.q"
    linear = [n for n, m in tiny("t5").named_modules() if isinstance(m, nn.Linear)]
    with pytest.raises(InfuseError, match=f"fits several.*encoder.{q}, decoder.{q}"):
        Paths(linear).match(q)
    for path in (f"encoder.{q}", f"transformer.encoder.{q}"):
        assert Paths(linear).match(path) == f"encoder.{q}"


@pytest.mark.parametrize("kind", ["gpt2", "phi3", "modernbert"])
@pytest.mark.parametrize("name", [*infuse.registry(), "lora:dora=true"])
def test_roles_that_overlap_are_exact_or_refused(name, kind, tmp_path):
    """A fused projection and its queries: merged, saved and loaded they do the same, or they are refused."""
    model = tiny(kind)
    method = replace(infuse.make(SMALL.get(name, name)), roles=("qkv", "query"))
    try:
        infuse.attach(model, method, "a")
    except InfuseError as error:
        assert not method.overlaps and re.search(r"0\.query, 0\.qkv twice", str(error)) and not hasattr(model, "infuse")
        return
    wake(model, "a")
    batch = inputs(model)
    expected = output(model, batch)
    infuse.save(model, "a", tmp_path / "a")
    infuse.load(model, tmp_path / "a", "b")
    assert torch.equal(output(model, batch), expected)
    if method.mergeable:
        infuse.merge(model, "a")
        close(output(model, batch), expected)


def test_roles_must_exist():
    with pytest.raises(InfuseError, match="Unknown role 'keys'; the roles are query, key"):
        infuse.attach(tiny("bert"), IA3(roles=("keys",)))
    with pytest.raises(InfuseError, match="no role 'ffn_gate'; it has query"):
        infuse.attach(tiny("bert"), IA3(roles=("key", "ffn_gate")))
    with pytest.raises(InfuseError, match="LoRA is not defined at ffn_hidden"):
        infuse.attach(tiny("bert"), LoRA(roles=("ffn_hidden",)))


def test_a_module_that_is_read_and_never_called_is_refused_and_not_proposed():
    layer = nn.TransformerEncoderLayer(16, 2, 24, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval()
    with pytest.raises(InfuseError, match=r"linear1.*linear2") as proposed:
        infuse.attach(model, IA3())
    assert "out_proj" not in str(proposed.value)
    ffn = {"ffn_up": "linear1", "ffn_output": "linear2"}
    every = Arch(("TransformerEncoder",), (Stack("layers", ffn | {"attention_output": "self_attn.out_proj"}),))
    with pytest.raises(InfuseError, match=r"reads the weight of 'layers.0.self_attn.out_proj' without calling it"):
        infuse.attach(model, LoRA(roles=("attention_output",)), arch=every)
    with pytest.raises(InfuseError, match="without calling it"):
        site_at(model, "layers.1.self_attn.out_proj")
    x = torch.randn(2, 3, 16)
    with torch.no_grad():  # torch's fused path, which calls no module
        before = model(x)
        infuse.attach(model, LoRA(roles=tuple(ffn)), "a", arch=Arch(every.types, (Stack("layers", ffn),)))
        wake(model, "a")
        assert not torch.allclose(model(x), before)

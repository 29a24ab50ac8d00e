"""What is attached to is looked at first: it works, or one sentence says why not, and nothing has changed."""

import copy

import pytest
import torch
from torch import nn

import infuse
from infuse import InfuseError
from infuse.checkpoint import load
from infuse.store import owner_of, store_in, store_of
from infuse.testing import inputs, tiny, wake
from infuse.testing.conformance import close, output

KINDS = ["bert", "gpt2", "t5", "llama"]
METHODS = ["lora:rank=2", "lora:rank=2,dora=true", "ia3", "houlsby:width=4", "compacter:width=8"]


def state_of(model):
    return {n: (id(p), p.requires_grad) for n, p in model.named_parameters()}, [n for n, _ in model.named_modules()]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", METHODS)
def test_offloaded_models_are_refused(method, kind, tmp_path):
    from accelerate import cpu_offload

    whole = tiny(kind)
    infuse.attach(whole, method, "a")
    infuse.save(whole, "a", tmp_path)
    model = tiny(kind)
    cpu_offload(model, execution_device=torch.device("cpu"))
    before = state_of(model)
    for attach in (lambda: infuse.attach(model, method), lambda: load(model, tmp_path, any_base=True),
                   lambda: load(model, tmp_path)):  # fmt: skip
        with pytest.raises(InfuseError, match=r"offloaded or not loaded.*load the model whole"):
            attach()
        assert state_of(model) == before
    cpu_offload(whole, execution_device=torch.device("cpu"))
    with pytest.raises(InfuseError, match="adapter 'a' were offloaded"):
        output(whole, inputs(whole))
    if infuse.make(method).mergeable:
        with pytest.raises(InfuseError, match="offloaded or not loaded"):
            infuse.merge(whole, "a")


class EightBit(nn.Linear):
    """A linear module with codes and a scale per output, as those of bitsandbytes."""

    def __init__(self, linear):
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None)
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.scale, self.bias = scale, linear.bias
        self.weight = nn.Parameter((linear.weight / scale).round().to(torch.int8), requires_grad=False)

    def forward(self, x):
        return nn.functional.linear(x, self.weight * self.scale, self.bias)


def eight_bit(model):
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear:
            model.set_submodule(name, EightBit(module))
    return model


@pytest.mark.parametrize("kind", ["bert", "t5", "llama", "modernbert"])
@pytest.mark.parametrize("method", METHODS)
def test_quantised_weights_are_adapted_and_refused_where_they_would_be_read(method, kind):
    model = eight_bit(tiny(kind)).eval()
    bare, before = output(model, inputs(model)), state_of(model)
    if "dora" in method:
        with pytest.raises(InfuseError, match=r"needs the weight of .* quantised"):
            infuse.attach(model, method, "a")
        assert state_of(model) == before
        return
    infuse.attach(model, method, "a")
    wake(model, "a")
    adapted = output(model, inputs(model))
    assert not torch.equal(adapted, bare)
    if infuse.make(method).mergeable:
        with pytest.raises(InfuseError, match=r"A merge needs the weight of .* quantised"):
            infuse.merge(model, "a")
    assert torch.equal(output(model, inputs(model)), adapted)
    infuse.detach(model)
    assert torch.equal(output(model, inputs(model)), bare)


def test_quantised_modules_are_not_trained():
    model = eight_bit(tiny("bert"))
    for give in ({"method": "full"}, {"method": "ia3", "trained": ["pooler.dense"]}):
        with pytest.raises(InfuseError, match="quantised or split weights, which can't be trained"):
            infuse.attach(model, **give)
        assert store_in(model) is None


@pytest.mark.parametrize("kind", KINDS)
def test_containers_run_only_their_own_children(kind):
    alone = tiny(kind).eval()
    model = nn.Sequential(tiny(kind).eval())
    for each in (alone, model):
        torch.manual_seed(0)
        infuse.attach(each, "lora:rank=2", "a")
        wake(each, "a")
    assert owner_of(model) is model[0] and [name for name, _ in model.named_children()] == ["0"]
    assert torch.equal(output(model[0], inputs(alone)), output(alone, inputs(alone)))
    infuse.detach(model)
    assert store_in(model) is None


def test_a_module_that_runs_all_its_children_is_told_what_to_do():
    class All(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = tiny("bert")

        def forward(self, **batch):
            return [child(**batch) for child in self.children()]

    model = All()
    infuse.attach(model, "ia3")
    with pytest.raises(InfuseError, match="attach to the transformer inside"):
        model(**inputs(model.encoder))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_second_store_above_or_below_is_refused(kind, method):
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.query, self.text = tiny(kind), tiny(kind)

    whole = nn.ModuleDict({"model": tiny(kind)})
    owner = infuse.attach(whole, method, "a") and owner_of(whole)
    part = next(m for n, m in owner.named_modules() if n.endswith(("layer.0", "layers.0", "h.0", "block.0")))
    with pytest.raises(InfuseError, match="that has adapters already: attach to that"):
        infuse.attach(part, method, "b", arch=store_of(whole).arch)
    infuse.attach(whole, method, "b")  # through whatever is around it
    assert list(store_of(owner).adapters) == ["a", "b"]
    infuse.detach(whole)
    pair = Pair()
    for tower in (pair.query, pair.text):
        infuse.attach(tower, method, "a")
    with pytest.raises(InfuseError, match="Several parts of this Pair have adapters: query, text"):
        infuse.attach(pair, method, "b")
    assert [list(store_of(tower).adapters) for tower in (pair.query, pair.text)] == [["a"], ["a"]]


@pytest.mark.parametrize("method", [*METHODS, "pfeiffer:width=4"])
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_around_the_call_leaks_into_fresh_adapters(kind, method, tmp_path):
    torch.manual_seed(0)
    plain = tiny(kind)
    infuse.attach(plain, method, "a")
    infuse.save(plain, "a", tmp_path)
    expected = plain.infuse["a"].state_dict()

    def half():
        torch.set_default_dtype(torch.float16)

    for enter in (half, torch.inference_mode, lambda: torch.device("meta"), torch.no_grad):
        model = tiny(kind)
        for attach in (lambda m: infuse.attach(m, method, "a"), lambda m: infuse.load(m, tmp_path, "b")):
            torch.manual_seed(0)
            try:
                with enter() or torch.no_grad():
                    adapter = attach(model)
            finally:
                torch.set_default_dtype(torch.float32)
            if adapter.name == "b":
                torch.testing.assert_close(adapter.state_dict(), expected, rtol=0, atol=0)
            for parameter in adapter.parameters():
                assert parameter.dtype == torch.float32 and not parameter.is_meta and not parameter.is_inference()
        output(model.train(), inputs(model)).square().mean().backward()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["bert", "t5", "llama", "deberta-v2"])
def test_adapters_follow_modules_that_are_swapped(kind, method):
    model = tiny(kind).eval()
    for name in "ab":
        infuse.attach(model, method, name)
        wake(model, name, seed=ord(name), size=0.3)
    adapted, bare = output(model, inputs(model), "a"), output(model, inputs(model), None)
    swapped = copy.deepcopy(model)
    for path, module in list(swapped.named_modules()):
        if type(module) is nn.Linear and not path.startswith("infuse."):
            swapped.set_submodule(path, _again(module))
    close(output(swapped, inputs(model), "a"), adapted)
    close(output(swapped, inputs(model), None), bare)
    quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    moved = (output(quantised, inputs(model), "a") - adapted).abs().max()
    assert moved < 0.5 * (adapted - bare).abs().max()
    infuse.detach(quantised)
    assert not any(m._forward_hooks for m in quantised.modules())


def _again(linear):
    """The same weights in a new module, without hooks."""
    new = nn.Linear(linear.in_features, linear.out_features, linear.bias is not None)
    new.load_state_dict(linear.state_dict())
    return new


def test_modules_that_are_gone_are_told():
    model = tiny("bert")
    infuse.attach(model, "lora:rank=2")
    model.encoder.layer[0].attention.self.query = nn.Linear(32, 16)
    with pytest.raises(InfuseError, match="has become a Linear of other widths"):
        model(**inputs(model))
    del model.encoder.layer[0].attention.self.query
    model.encoder.layer[0].attention.self.query = None
    with pytest.raises(InfuseError, match=r"has no .*query any more"):
        model(**inputs(model))


@pytest.mark.parametrize("kind", ["bert", "t5", "llama", "deberta-v2"])
def test_a_merge_into_a_computed_weight_is_refused(kind):
    model = tiny(kind)
    module = next(m for m in model.modules() if type(m).__name__ in ("Linear", "Conv1D"))
    nn.utils.parametrizations.weight_norm(module)
    infuse.attach(model, "lora:rank=2", "a")
    wake(model, "a")
    adapted = output(model, inputs(model))
    with pytest.raises(InfuseError, match=r"computed from others .*remove_parametrizations"):
        infuse.merge(model, "a")
    assert torch.equal(output(model, inputs(model)), adapted)


def test_copies_of_parts_go_without_adapters():
    model = tiny("bert").eval()
    bare = output(model, inputs(model))
    infuse.attach(model, "lora:rank=2", "a")
    wake(model, "a", size=0.3)
    adapted = output(model, inputs(model))
    part = copy.deepcopy(model.encoder.layer[1])
    model.encoder.layer[1] = part
    close(output(model, inputs(model)), adapted)
    close(output(model, inputs(model), None), bare)
    infuse.detach(model)
    assert torch.equal(output(model, inputs(model)), bare)


def test_dora_reads_the_weight_that_is_there():
    model = tiny("bert").eval()
    infuse.attach(model, "ia3", "i")
    model.encoder.layer[0].attention.self.query = nn.Linear(32, 32)
    infuse.activate(model, None)
    bare = output(model, inputs(model))
    infuse.attach(model, "lora:rank=2,dora=true", "d")
    close(output(model, inputs(model)), bare)
    model.encoder.layer[0].attention.self.query = EightBit(model.encoder.layer[0].attention.self.query)
    with pytest.raises(InfuseError, match="quantised"):
        output(model, inputs(model))


def test_what_stays_frozen_around_a_transformer_is_told():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = tiny("bert"), nn.Linear(32, 3)

    with pytest.warns(RuntimeWarning, match=r"head of Own are frozen .* trained=\["):
        infuse.attach(Own(), "ia3")
    model = Own()
    assert list(infuse.attach(model, "ia3", trained=["head"]).copies) == ["head"]

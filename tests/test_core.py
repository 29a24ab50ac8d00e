"""What attach, activate, route, merge and detach promise beyond the conformance suite."""

import copy
import re
import threading
from collections import Counter
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForSequenceClassification

import infuse
import infuse.methods
from infuse import IA3, InfuseError, LoRA, Method
from infuse.calls import residuals
from infuse.method import MIXERS
from infuse.model import store_of
from infuse.sites import find_sites
from infuse.testing import TINY, inputs, tiny, wake
from infuse.testing.conformance import close, output

ROWS = ["a", None, "b"]


@pytest.fixture
def model():
    """A BERT with two adapters that do something, ``b`` active."""
    model = tiny("bert")
    for seed, (name, method) in enumerate({"a": IA3(), "b": LoRA(rank=2)}.items()):
        infuse.attach(model, method, name)
        wake(model, name, seed)
    return model


def hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_adapters_live_side_by_side_and_leave_no_hooks(model):
    batch, both = inputs(model), hooks(model)
    outputs = {name: output(model, batch, name) for name in ("a", "b", None)}
    bare = output(tiny("bert"), batch)
    assert torch.equal(outputs[None], bare)
    assert not torch.equal(outputs["a"], bare) and not torch.equal(outputs["a"], outputs["b"])
    assert torch.equal(output(model, batch), outputs["b"])
    for name in ("a", None, "b"):
        infuse.activate(model, name)
        assert torch.equal(output(model, batch), outputs[name])
    infuse.detach(model, "a")
    assert torch.equal(output(model, batch), outputs["b"]) and 0 < hooks(model) < both
    infuse.detach(model, "b")
    assert torch.equal(output(model, batch), bare) and hooks(model) == 0 and not hasattr(model, "infuse")


def test_routes_nest(model):
    batch = inputs(model)
    alone = {name: output(model, batch, name) for name in ("a", "b", None)}
    with infuse.route(model, "a"):
        with infuse.route(model, ROWS):
            for row, name in enumerate(ROWS):
                close(output(model, batch)[row], alone[name][row])
            with infuse.route(model, None):
                assert torch.equal(output(model, batch), alone[None])
        assert torch.equal(output(model, batch), alone["a"])
        with pytest.raises(ZeroDivisionError), infuse.route(model, "b"):
            raise ZeroDivisionError
        assert torch.equal(output(model, batch), alone["a"])
    assert torch.equal(output(model, batch), alone["b"])


def test_a_route_belongs_to_its_thread(model):
    """Threads that route one model differently at the same time each get their own answers."""
    batch = inputs(model)
    routes = ["a", "b", None, ROWS]
    expected = [output(model, batch, route) for route in routes]
    together, wrong = threading.Barrier(len(routes)), []

    def work(route, answer):
        for _ in range(20):
            with infuse.route(model, route):
                together.wait(timeout=60)
                if not torch.allclose(output(model, batch), answer, rtol=0, atol=1e-5):
                    wrong.append(route)

    threads = [threading.Thread(target=work, args=pair) for pair in zip(routes, expected, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not together.broken and wrong == []


def test_a_route_is_one_models(model):
    other = tiny("bert")
    infuse.attach(other, IA3(), "a")
    with infuse.route(model, "a"):
        assert torch.equal(output(other, inputs(other)), output(tiny("bert"), inputs(other)))


@pytest.mark.parametrize("names", [["a"], ["a", "b", None, None], [None]])
def test_routes_need_a_name_per_row(model, names):
    with pytest.raises(InfuseError, match="3 rows"):
        output(model, inputs(model), names)


def test_unknown_adapters_are_named(model):
    for act in (
        lambda: output(model, inputs(model), "c"),
        lambda: output(model, inputs(model), ["a", "c", None]),
        lambda: infuse.activate(model, "c"),
        lambda: infuse.merge(model, "c"),
        lambda: infuse.detach(model, "c"),
        lambda: infuse.save(model, "c", "nowhere"),
    ):
        with pytest.raises(InfuseError, match=r"'c'.*a, b"):
            act()
    with pytest.raises(InfuseError, match="attach"):
        infuse.activate(tiny("bert"), "a")


@pytest.mark.parametrize("name", ["", "a.b", "a/b", "../a", "keys", "a\n"])
def test_bad_names_change_nothing(name):
    model = tiny("bert")
    with pytest.raises(InfuseError, match="can't name an adapter"):
        infuse.attach(model, IA3(), name)
    assert not hasattr(model, "infuse") and hooks(model) == 0


@pytest.mark.parametrize("name", ["a", "a b", "A-1_b+c", "größe"])
def test_good_names(name):
    model = tiny("bert")
    infuse.attach(model, IA3(), name)
    output(model, inputs(model), name)


def test_a_name_is_taken_once(model):
    before = hooks(model)
    with pytest.raises(InfuseError, match="already has an adapter 'a'"):
        infuse.attach(model, LoRA(), "a")
    assert store_of(model)["a"].method == IA3() and hooks(model) == before


def test_a_merged_model_answers_for_that_adapter_alone(model):
    batch = inputs(model)
    expected = output(model, batch, "a")
    infuse.merge(model, "a")
    close(output(model, batch), expected)
    close(output(model, batch, "a"), expected)
    for route in ("b", None, ROWS):
        with pytest.raises(InfuseError, match="unmerge"):
            output(model, batch, route)
    for act in (lambda: infuse.merge(model, "b"), lambda: infuse.attach(model, IA3(), "c")):
        with pytest.raises(InfuseError, match="merged"):
            act()
    infuse.unmerge(model)
    assert torch.equal(output(model, batch, "a"), expected)


@pytest.mark.parametrize("name", ["a", None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.double])
def test_detaching_while_merged_restores_every_bit(model, name, dtype):
    infuse.merge(model, "a")
    infuse.detach(model.to(dtype), name)
    if name:
        assert torch.equal(output(model, inputs(model), None), output(tiny("bert").to(dtype), inputs(model)))
        infuse.detach(model)
    fresh = tiny("bert").to(dtype).state_dict()
    assert model.state_dict().keys() == fresh.keys()
    assert all(torch.equal(value, fresh[key]) for key, value in model.state_dict().items())


class Layer(nn.Module):
    """A pre-norm block of a home-made transformer with one head."""

    def __init__(self, width):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.fc1, self.fc2 = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x):
        x = x + self.o(F.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x)))
        return x + self.fc2(torch.relu(self.fc1(x)))


class Homemade(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.blocks = nn.ModuleList(Layer(width) for _ in range(3))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


def test_the_suggested_row_for_an_unknown_architecture_works(tmp_path):
    torch.manual_seed(0)
    model, x = Homemade(), torch.randn(3, 5, 8)
    with pytest.raises(InfuseError, match=r"'Homemade'.*Arch\(\(") as caught:
        infuse.attach(model, IA3())
    assert not hasattr(model, "infuse")
    line = re.search(r"Arch\(\(.*\),\)\)", str(caught.value))
    arch = eval(line[0], {"Arch": infuse.Arch, "Stack": infuse.Stack})
    bare, fresh = model(x), copy.deepcopy(model)
    adapter = infuse.attach(model, IA3(roles=("key", "value", "ffn_hidden", "ffn_up", "query")), "a", arch=arch)
    assert sorted({s.path.split(".")[-1] for s in adapter.sites.values()}) == ["fc1", "fc2", "k", "q", "v"]
    assert len(adapter.sites) == 15
    assert torch.equal(model(x), bare)
    wake(model, "a")
    adapted = model(x)
    assert not torch.equal(adapted, bare)
    with infuse.route(model, ["a", None, "a"]):
        close(model(x), torch.stack([adapted[0], bare[1], adapted[2]]))
    infuse.save(model, "a", tmp_path / "a")
    infuse.load(fresh, tmp_path / "a", arch=arch)
    assert torch.equal(fresh(x), adapted)


def test_a_row_that_fits_nothing_says_what_is_there():
    model = Homemade()
    for row in (infuse.Stack("layers", {"query": "q"}), infuse.Stack("blocks", {"query": "query"})):
        with pytest.raises(InfuseError, match=r"Homemade.*Arch\(\(.*blocks"):
            infuse.attach(model, IA3(), arch=infuse.Arch(("mine",), (row,)))
    with pytest.raises(InfuseError, match=r"Arch\(\("):
        infuse.attach(nn.Linear(2, 2), IA3())


def test_two_trunks_in_one_module_are_ambiguous():
    pair = nn.ModuleDict({"left": tiny("bert"), "right": tiny("bert")})
    with pytest.raises(InfuseError, match=r"fits 2 places: 'left\.?', 'right\.?'"):
        infuse.attach(pair, IA3())
    infuse.attach(pair["left"], IA3())
    assert not hasattr(pair["right"], "infuse")


def classifier():
    return tiny("bert", AutoModelForSequenceClassification, num_labels=3)


class Wrapper(nn.Module):
    """As DistributedDataParallel does it."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, **batch):
        return self.module(**batch)


@pytest.mark.parametrize("method", ["lora", "pfeiffer"])
def test_a_wrapped_model_has_the_adapters_of_the_one_inside(method, tmp_path):
    model = tiny("bert")
    batch, wrapped = inputs(model), Wrapper(model)
    infuse.attach(model, method, "a")
    wake(model, "a")
    infuse.save(wrapped, "a", tmp_path / "a")
    infuse.load(wrapped, tmp_path / "a", "b")
    infuse.attach(wrapped, method, "c")
    assert list(model.infuse.adapters) == ["a", "b", "c"] and not hasattr(wrapped, "infuse")
    assert torch.equal(output(wrapped, batch, "b"), output(model, batch, "a"))
    assert torch.equal(output(wrapped, batch, None), output(tiny("bert"), batch))
    infuse.detach(wrapped)
    assert not hooks(wrapped) and not hasattr(model, "infuse")


def test_adapters_below_a_head_cannot_train_it():
    model = classifier()
    infuse.attach(model.bert, IA3(), "a")
    with pytest.raises(InfuseError, match=r"BertModel.*no module 'classifier'.*trained=\(\)"):
        infuse.attach(model, IA3(), "b")
    infuse.attach(model, IA3(), "b", trained=())
    assert list(store_of(model).adapters) == ["a", "b"]
    wrapped = Wrapper(classifier())
    infuse.attach(wrapped.module, IA3(), "a")
    assert list(infuse.attach(wrapped, IA3(), "b").copies) == ["classifier"]


@pytest.mark.parametrize(("method", "why"), [("head", "it has no delta"), ("full", "it trained the base itself")])
def test_a_method_without_deltas_says_that_there_is_nothing_to_merge(method, why):
    infuse.attach(model := classifier(), method, "probe")
    with pytest.raises(InfuseError, match=f"{method} can't be merged: {why}"):
        infuse.merge(model, "probe")


def test_summary_counts_what_is_trained():
    model = classifier()
    infuse.attach(model, IA3(), "a")
    infuse.attach(model, LoRA(rank=4), "b", layers="last:1", trained=())
    counts, plain = infuse.summary(model), sum(p.numel() for p in classifier().parameters())
    assert counts.base == plain
    assert counts.adapters["a"] == {"key": 64, "value": 64, "ffn_hidden": 96, "head": 3 * 32 + 3}
    assert counts.adapters["b"] == {"query": 4 * 64, "value": 4 * 64}
    assert (counts.deltas("a"), counts.total("a"), counts.total("b")) == (224, 323, 512)
    assert f"a: 224 parameters in the transformer ({100 * 224 / plain:.3f} % of base)" in str(counts)
    assert f"base model: {plain:,} parameters, frozen" in str(counts)
    infuse.detach(model)
    infuse.attach(model, "full", "whole", trained=())
    assert infuse.summary(model).deltas("whole") == plain and "frozen" not in str(infuse.summary(model))


def test_a_head_alone_leaves_the_base_bare():
    model = classifier()
    adapter = infuse.attach(model, "head", "probe")
    assert not adapter.sites and not any(p.requires_grad for n, p in model.named_parameters() if "infuse" not in n)
    assert [n for n, p in model.named_parameters() if p.requires_grad] == [
        "infuse.adapters.probe.copies.classifier.weight", "infuse.adapters.probe.copies.classifier.bias"
    ]  # fmt: skip
    assert torch.equal(output(model, inputs(model)), output(classifier(), inputs(model)))


def test_full_fine_tuning_trains_the_base_and_stands_alone():
    """Other adapters rest on the base that full fine-tuning changes, so that neither joins the other."""
    model = tiny("bert")
    infuse.attach(model, "full", "whole")
    assert all(p.requires_grad for p in model.parameters())
    for first, second in (("full", "ia3"), ("ia3", "full")):
        model = tiny("bert")
        infuse.attach(model, first, "a")
        flags = [p.requires_grad for p in model.parameters()]
        with pytest.raises(InfuseError, match="full"):
            infuse.attach(model, second, "b")
        assert [p.requires_grad for p in model.parameters()] == flags


def width(kind, role):
    """Features of a role in a tiny model: heads of 8, 32 hidden and 48 inner features."""
    keys = 8 * TINY[kind].get("num_key_value_heads", 4)
    wide = {"key": keys, "value": keys, "qkv": 32 + 2 * keys, "gate_up": 96, "ffn_up": 48, "ffn_gate": 48}
    return (wide | {"ffn_hidden": 48}).get(role.removeprefix("cross_"), 32)


def watch(site, seen):
    """Record a site's tensor before and after Infuse's hook."""
    on = site.module.register_forward_pre_hook if site.side == "input" else site.module.register_forward_hook
    return [on(lambda module, args, *out: seen.append((*out, *args)[0]), prepend=first) for first in (True, False)]


@pytest.mark.parametrize("kind", TINY)
def test_a_role_is_its_slice_and_no_more(kind):
    """Doubling a role doubles its features of its module and leaves the others bit for bit; one site per layer."""
    model = tiny(kind)
    sites = find_sites(model)
    for (stack, role), count in Counter((s.stack, s.role) for s in sites).items():
        assert count == 2 and (stack == "decoder" or not role.startswith("cross_")), (stack, role, count)
    for site in sites:
        assert site.width == width(kind, site.role)
        adapter = infuse.attach(model, IA3(roles=(site.role,)), layers=[site.layer])
        nn.init.constant_(adapter.delta(site).l, 2)
        seen = []
        handles = watch(site, seen)
        output(model, inputs(model))
        for before, after in zip(seen[::2], seen[1::2], strict=True):
            before[..., slice(None) if site.whole else slice(site.start, site.stop)] *= 2
            assert torch.equal(before, after) and before.any(), site.name
        assert seen
        for handle in handles:
            handle.remove()
        infuse.detach(model)


@pytest.mark.parametrize("kind", TINY)
def test_roles_are_what_they_are_called(kind):
    """Twice the queries are as twice the keys, twice the values as twice the output: without biases, exactly so."""
    model = tiny(kind)
    roles = {s.role for s in find_sites(model)}

    def doubled(role):
        for delta in infuse.attach(model, IA3(roles=(role,))).deltas.values():
            nn.init.constant_(delta.l, 2)
        out = output(model, inputs(model))
        infuse.detach(model)
        return out

    close(doubled("query"), doubled("key"), 1e-4)
    close(doubled("value"), doubled("attention_output"), 1e-4)
    close(doubled("ffn_hidden"), doubled("ffn_output"), 1e-4)
    if "ffn_gate" in roles:
        close(doubled("ffn_up"), doubled("ffn_hidden"), 1e-4)


@dataclass(frozen=True)
class Poke(Method):
    """Moves the activation of the second token alone."""

    roles: tuple[str, ...] = ("query",)
    name, learning_rate = "poke", 1e-3

    def init(self, site):
        return {}

    def forward(self, p, h):
        return torch.cat([h[..., :1, :], 2 * h[..., 1:2, :] + 1, h[..., 2:, :]], dim=-2)


@pytest.mark.parametrize("kind", [kind for kind in TINY if kind != "deberta-v2"])  # also projects its positions
def test_a_query_serves_its_token_and_a_key_the_others(kind):
    """In the last layer the second token's query moves that token alone, its key and value the later ones too."""
    model = tiny(kind, **({"num_hidden_layers": 2} if kind == "albert" else {}))
    batch = inputs(model, rows=1, length=5)

    def hidden():
        out = model(**batch)
        return out.get("encoder_last_hidden_state", out.last_hidden_state)[0]

    bare = hidden()
    for role, last in {"query": 1, "key": 4, "value": 4}.items():
        infuse.attach(model, Poke((role,)), layers="last:1")
        moved = (hidden() - bare).abs().amax(-1).gt(1e-6).nonzero().flatten().tolist()
        assert 1 in moved and max(moved) == last and (role != "query" or moved == [1]), (role, moved)
        infuse.detach(model)


def test_a_method_is_a_file_of_at_most_150_lines():
    for path in Path(infuse.methods.__file__).parent.glob("*.py"):
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 150, path.name


NUMBERS = [(cls, f.name) for cls in (infuse.registry() | MIXERS).values() for f in fields(cls) if f.type is float]


@pytest.mark.parametrize(("cls", "setting"), NUMBERS, ids=lambda value: getattr(value, "__name__", value))
def test_numbers_that_cannot_work_are_refused(cls, setting):
    """They come from files and command lines, too: JSON and YAML know NaN and infinity."""
    for value in (float("nan"), float("inf"), 1e39, 10**400, *((-0.1, 1) if setting == "dropout" else ())):
        with pytest.raises(InfuseError, match=f"{cls.__name__}'s {setting} must"):
            infuse.make({"name": cls.name, setting: value})


def test_settings_given_in_python_have_the_types_of_those_in_files(model, tmp_path):
    method = LoRA(roles=["query"], rank=np.int64(2), alpha=np.float32(8))
    assert method == infuse.make("lora:roles=query,rank=2,alpha=8") and hash(method)
    infuse.attach(model, method, "c")
    infuse.save(model, "c", tmp_path)
    assert infuse.load(model, tmp_path, "d").method == method
    for wrong in ({"rank": "4"}, {"rank": 2.5}, {"rank": True}, {"alpha": "16"}, {"roles": None}, {"dora": 1}):
        with pytest.raises(InfuseError, match=f"LoRA's {next(iter(wrong))} "):
            LoRA(**wrong)


def test_trained_norms_run_in_a_bfloat16_trunk():
    model = tiny("bert").eval().bfloat16()
    batch = inputs(model)
    for name in ("a", "b"):
        infuse.attach(model, "compacter:width=4,train_norms=true", name)
        wake(model, name)
    with torch.inference_mode():
        for names in ("a", ["a"] * len(batch["input_ids"])):
            with infuse.route(model, names):
                assert model(**batch).last_hidden_state.dtype == torch.bfloat16


def test_a_forward_pass_that_fails_leaves_no_activations():
    model = tiny("bert")
    infuse.attach(model, "pfeiffer")
    blow = model.encoder.layer[1].output.dense.register_forward_pre_hook(lambda module, args: args[0].missing)
    with pytest.raises(AttributeError):
        output(model, inputs(model))
    assert not residuals(store_of(model))
    blow.remove()
    output(model, inputs(model))


def test_copies_of_tapped_modules_have_no_hooks():
    model = tiny("bert").eval()
    method = "compacter:width=4,train_norms=true"
    for name in ("a", "b"):
        infuse.attach(model, method, name)
        wake(model, name)
    copies = [m for name in ("a", "b") for m in store_of(model)[name].copies.values()]
    assert copies and not any(m._forward_hooks or m._forward_pre_hooks for m in copies)
    batch = inputs(model)
    alone = tiny("bert").eval()
    infuse.attach(alone, method, "b")
    store_of(alone)["b"].load_state_dict(store_of(model)["b"].state_dict())
    with torch.inference_mode():
        close(output(model, batch, "b"), output(alone, batch, "b"))


@pytest.mark.parametrize("roles", [("query", "value"), ("value", "query")])
def test_adapters_alike_but_elsewhere_do_not_run_as_one(roles):
    model = tiny("bert")
    batch = inputs(model, rows=3)
    first, second = (LoRA(rank=2, roles=(role,), alpha=2.0 + i) for i, role in enumerate(roles))
    for name, method in (("a", first), ("b", second), ("c", LoRA(rank=2, roles=("query",), alpha=9.0))):
        infuse.attach(model, method, name)
        wake(model, name)
    names = ["a", "b", "c"]
    alone = []
    for row, name in enumerate(names):
        infuse.activate(model, name)
        alone.append(output(model, batch)[row])
    with torch.no_grad(), infuse.route(model, names):
        close(output(model, batch), torch.stack(alone))

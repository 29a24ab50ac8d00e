"""Fusion, averages, sums and stacks of adapters."""

import shutil

import pytest
import torch
from transformers import AutoModelForSequenceClassification

import infuse
from infuse import IA3, Bottleneck, Compacter, LoRA
from infuse.adapter import Delta, key
from infuse.heads import Head
from infuse.model import store_of
from infuse.testing import TINY, inputs, tiny, wake
from infuse.testing.conformance import close, output
from infuse.training.engine import TextClassifier, parameter_groups
from infuse.training.settings import Settings

MEMBERS = ["houlsby", "pfeiffer", "parallel", "compacter:width=8", "lora"]


def trained(kind, spec, names="abc", rows=3):
    model = tiny(kind)
    torch.manual_seed(0)
    for seed, name in enumerate(names):
        infuse.attach(model, spec, name)
        wake(model, name, seed)
    return model, inputs(model, rows=rows)


@pytest.mark.parametrize("kind", TINY)
@pytest.mark.parametrize("spec", MEMBERS)
def test_fusion_in_mixed_batch_saved_and_loaded(spec, kind, tmp_path):
    model, batch = trained(kind, spec, rows=4)
    infuse.fuse(model, ["a", "b", "c"], name="fused")
    infuse.fuse(model, ["c", "a", "b"], name="other")
    for seed, name in enumerate(("fused", "other")):
        wake(model, name, seed)
    rows = ["fused", "a", "other", None]
    mixed = output(model, batch, rows)
    for row, name in enumerate(rows):
        close(mixed[row], output(model, batch, name)[row])
    infuse.save(model, "fused", tmp_path / "fused")
    fresh = tiny(kind)
    infuse.load(fresh, tmp_path / "fused")
    assert torch.equal(output(fresh, batch), output(model, batch, "fused"))
    assert set(fresh.infuse.adapters) == {"a", "b", "c", "fused"}


@pytest.fixture
def fused(tmp_path):
    model, _ = trained("bert", "pfeiffer", "pq")
    infuse.fuse(model, ["p", "q"], name="f")
    infuse.save(model, "f", tmp_path / "f")
    return tmp_path / "f"


def test_a_fusion_shares_members_that_are_equal(fused):
    model, batch = trained("bert", "pfeiffer", "q")
    infuse.load(model, fused / "members" / "p")
    infuse.detach(model, "q")
    infuse.load(model, fused / "members" / "q", "q")
    infuse.load(model, fused)
    infuse.load(model, fused, "g")
    assert list(model.infuse.adapters) == ["p", "q", "f", "g"]
    assert torch.equal(output(model, batch, "f"), output(model, batch, "g"))


@pytest.mark.parametrize("other", ["ia3", "pfeiffer", "pfeiffer:roles=attention_output"])
@pytest.mark.parametrize("taken", ["q", "f"])
def test_a_fusion_that_does_not_load_leaves_the_model_as_it_was(fused, other, taken):
    model, batch = trained("bert", other, [taken, "mine"])
    before = output(model, batch), {n: p.requires_grad for n, p in model.named_parameters()}
    with pytest.raises(infuse.InfuseError, match=f"'{taken}'"):
        infuse.load(model, fused)
    assert list(model.infuse.adapters) == [taken, "mine"] and model.infuse.active == "mine"
    assert torch.equal(output(model, batch), before[0])
    assert {n: p.requires_grad for n, p in model.named_parameters()} == before[1]


def test_a_fusion_without_its_members_files_needs_fitting_ones(fused):
    shutil.rmtree(fused / "members")
    model, _ = trained("bert", "pfeiffer:roles=attention_output", "pq")
    with pytest.raises(infuse.InfuseError, match=r"'p' can't be mixed: it adds nothing at 0\.ffn_output"):
        infuse.load(model, fused)
    assert list(model.infuse.adapters) == ["p", "q"]


@pytest.mark.parametrize("last", ["pfeiffer", "parallel"])
def test_fusions_that_let_the_last_member_decide(last, tmp_path):
    """As AdapterHub's files have them: ``reads`` of the others has no say, and what parallel members read is added."""
    model, batch = trained("bert", last, "c", rows=4)
    for name, reads in {"a": "output", "b": model.infuse["c"].method.reads}.items():
        infuse.attach(model, Bottleneck(roles=("ffn_output",), reads=reads), name)
    wake(model, "a")
    model.infuse["b"].load_state_dict(model.infuse["a"].state_dict())
    for name, members in {"fused": "ac", "own": "bc", "plain": "bc"}.items():
        infuse.fuse(model, list(members), "fusion" if name == "plain" else "fusion:adds=residual", name)
        model.infuse[name].load_state_dict(model.infuse["fused"].state_dict())
    close(output(model, batch, "fused"), output(model, batch, "own"))
    assert torch.allclose(output(model, batch, "own"), output(model, batch, "plain"), atol=1e-4) == (last == "pfeiffer")
    mixed = output(model, batch, ["fused", "a", "plain", None])
    for row, name in enumerate(["fused", "a", "plain", None]):
        close(mixed[row], output(model, batch, name)[row])
    infuse.save(model, "fused", tmp_path / "fused")
    fresh = tiny("bert")
    infuse.load(fresh, tmp_path / "fused")
    assert torch.equal(output(fresh, batch), output(model, batch, "fused"))


def test_only_the_fusion_learns():
    model, batch = trained("bert", "pfeiffer")
    infuse.fuse(model, ["a", "b"])
    (output(model, batch).square().mean() + infuse.model.penalty(model, "a,b")).backward()
    learning = {n.split(".")[2] for n, p in model.named_parameters() if p.grad is not None}
    assert learning == {"a,b"}


def test_penalty_is_zero_only_for_the_identity():
    model, _ = trained("bert", "pfeiffer")
    fused = infuse.fuse(model, ["a", "b"], "fusion:regulariser=0.5")
    eye = torch.eye(len(next(iter(fused.deltas.values())).V))
    assert infuse.model.penalty(model, "a,b") < 1e-6
    for delta in fused.deltas.values():
        delta.V.data += 0.1
    expected = 0.5 * sum((d.V - eye).square().sum() for d in fused.deltas.values())
    torch.testing.assert_close(infuse.model.penalty(model, "a,b"), expected)
    assert infuse.model.penalty(model, "a") == 0


def test_training_keeps_the_values_of_a_fusion_near_the_identity():
    """The penalty is a part of the loss, and weight decay, which would pull them to zero, leaves them alone."""
    model, batch = trained("bert", "pfeiffer")
    fused = infuse.fuse(model, ["a", "b"], "fusion:regulariser=0.5", name="f")
    fused.head = Head("linear", "xyz", model.config.hidden_size)
    for delta in fused.deltas.values():
        delta.V.data += 0.1
    settings, labels = Settings(weight_decay=0.1), torch.arange(3)
    classifier = TextClassifier(model, "f", settings)
    with infuse.route(model, "f"):
        given = classifier(batch["input_ids"], batch["attention_mask"], labels)
    penalty = infuse.model.penalty(model, "f")
    torch.testing.assert_close(given["loss"], fused.head.loss(given["logits"], labels) + penalty)
    assert penalty > 1
    decay = {id(p): g["weight_decay"] for g in parameter_groups(classifier, settings) for p in g["params"]}
    for delta in fused.deltas.values():
        assert {n: decay[id(p)] for n, p in delta.params.items()} == {"Q": 0.1, "q": 0, "K": 0.1, "k": 0, "V": 0}


def test_weights_can_be_read_and_sum_to_one():
    model, batch = trained("bert", "houlsby")
    fused = infuse.fuse(model, ["a", "b", "c"])
    with infuse.mixing_weights() as seen:
        output(model, batch)
        output(model, batch)
    output(model, batch)  # nobody listens
    assert set(seen) == set(fused.sites)
    for weights, again in seen.values():
        assert weights.shape == (3, 7, 3) and not weights.requires_grad
        torch.testing.assert_close(weights.sum(-1), torch.ones(3, 7))
        assert torch.equal(weights, again)


def test_weights_tell_the_members_in_their_order():
    """Where only the first member's update differs, so does its weight alone."""
    model, batch = trained("bert", "houlsby")
    fused = infuse.fuse(model, ["a", "b", "c"])
    (site, delta), *_ = fused.deltas.items()
    with torch.no_grad():
        for member in fused.members[1:]:
            for parameter in model.infuse[member].deltas[site].parameters():
                parameter.zero_()
        delta.Q.zero_(), delta.q.copy_(torch.ones_like(delta.q)), delta.K.fill_(1e4)
        with infuse.mixing_weights() as seen:
            output(model, batch)
    (weights,) = seen[next(iter(fused.sites))]
    assert weights[..., 1].equal(weights[..., 2]) and not weights[..., 0].allclose(weights[..., 1])


def test_what_cannot_be_fused_says_so():
    model, _ = trained("bert", "ia3")
    with pytest.raises(infuse.InfuseError, match="can't be fused"):
        infuse.fuse(model, ["a", "b"])
    with pytest.raises(infuse.InfuseError, match="two or more"):
        infuse.fuse(model, ["a"])
    with pytest.raises(infuse.InfuseError, match="LoRA does not mix adapters; use Fusion"):
        infuse.fuse(model, ["a", "b"], "lora")
    model, _ = trained("bert", "pfeiffer")
    infuse.attach(model, Bottleneck(roles=("attention_output",)), "elsewhere")
    with pytest.raises(infuse.InfuseError, match="no site in common"):
        infuse.fuse(model, ["a", "elsewhere"])
    infuse.fuse(model, ["a", "b"])
    with pytest.raises(infuse.InfuseError, match="detach it first"):
        infuse.detach(model, "a")
    infuse.detach(model)
    assert not hasattr(model, "infuse")


@pytest.mark.parametrize(
    ("layers", "chosen"), [("last:1", {2}), ([0, 2], {0, 2}), ("all", {0, 1, 2}), (None, {0, 1, 2})]
)
def test_fusions_take_the_layers_asked_for(layers, chosen, tmp_path):
    model = tiny("bert", num_hidden_layers=3)
    for seed, name in enumerate("ab"):
        infuse.attach(model, "pfeiffer", name)
        wake(model, name, seed)
    fused = infuse.fuse(model, ["a", "b"], name="f", layers=layers)
    assert {site.layer for site in fused.sites.values()} == chosen
    infuse.save(model, "f", tmp_path / "f")
    fresh = tiny("bert", num_hidden_layers=3)
    infuse.load(fresh, tmp_path / "f")
    batch = inputs(model)
    assert torch.equal(output(fresh, batch), output(model, batch))


@pytest.mark.parametrize(
    ("layers", "message"), [("some", "not understood"), ("9", "layers 0 to 1"), ("last:1", "in layers 0")]
)
def test_fusions_refuse_layers_that_are_not_there(layers, message):
    model = tiny("bert")
    for name in "ab":
        infuse.attach(model, "pfeiffer", name, layers=[0])
    with pytest.raises(infuse.InfuseError, match=message):
        infuse.fuse(model, ["a", "b"], layers=layers)
    assert list(model.infuse.adapters) == ["a", "b"]


@pytest.mark.parametrize("spec", ["ia3", "houlsby", "lora", "compacter:width=8"])
def test_average(spec):
    model, _ = trained("bert", spec)
    soup = infuse.average(model, ["a", "b"], "soup", weights=[3, 1])
    a, b = model.infuse["a"].state_dict(), model.infuse["b"].state_dict()
    for name, value in soup.state_dict().items():
        torch.testing.assert_close(value, 0.75 * a[name] + 0.25 * b[name])
    alone = infuse.average(model, ["a"], "alone")
    assert all(torch.equal(v, a[n]) for n, v in alone.state_dict().items())


@pytest.mark.parametrize("weights", [[float("nan"), 1], [float("inf"), 1], [1e308, 1e308]])
def test_weights_that_are_no_finite_numbers_are_refused(weights):
    model, _ = trained("bert", "ia3")
    with pytest.raises(infuse.InfuseError, match="finite"):
        infuse.average(model, ["a", "b"], "soup", weights=weights)
    with pytest.raises(infuse.InfuseError, match="finite"):
        infuse.add(model, {"a": float("nan"), "b": 1}, "sum")
    assert "soup" not in store_of(model).adapters and "sum" not in store_of(model).adapters


def test_an_average_counts_an_adapter_that_is_named_twice_twice():
    model, _ = trained("bert", "ia3")
    a, b = model.infuse["a"].state_dict(), model.infuse["b"].state_dict()
    for n, value in infuse.average(model, ["a", "a", "b"]).state_dict().items():
        torch.testing.assert_close(value, (2 * a[n] + b[n]) / 3)


@pytest.mark.parametrize(("terms", "message"), [
    ({}, "one or more"),
    ({"a": "x"}, "finite numbers"),
    ({"a": None}, "finite numbers"),
    ({"fused": 1.0, "a": 1.0}, "not fused, made of"),
    ({"a": 1.0, "fused": 1.0}, "not fused, made of"),
    ({"stacked": -1.0}, "not stacked, made of"),
])  # fmt: skip
def test_what_cannot_be_added_says_so(terms, message):
    model, _ = trained("bert", "pfeiffer", "ab")
    infuse.fuse(model, ["a", "b"], name="fused")
    infuse.stack(model, ["a", "b"], "stacked")
    names, weights = list(terms), list(terms.values())
    for combine in (lambda: infuse.add(model, terms), lambda: infuse.average(model, names, weights=weights)):
        with pytest.raises(infuse.InfuseError, match=message if terms else "as many weights|one or more"):
            combine()
    assert list(model.infuse.adapters) == ["a", "b", "fused", "stacked"]


@pytest.fixture
def norms():
    """Two adapters with their own LayerNorms and heads, and one without."""
    model = tiny("bert", AutoModelForSequenceClassification, num_labels=3)
    for seed, name in enumerate("ab"):
        infuse.attach(model, Bottleneck(train_norms=True), name)
        wake(model, name, seed)
    infuse.attach(model, Bottleneck(), "c", trained=())
    wake(model, "c", 2)
    return model, inputs(model)


def test_combined_adapters_keep_their_own_modules(norms):
    model, batch = norms
    alone = output(model, batch, "a")
    for name, make in {
        "mean": infuse.average,
        "sum": lambda *given: infuse.add(given[0], {"a": 1.0}, given[2]),
    }.items():
        make(model, ["a"], name)
        assert torch.equal(output(model, batch, name), alone)
    infuse.average(model, ["a", "b"], "soup", weights=[3, 1])
    infuse.add(model, {"a": 1.0, "b": 0.5}, "both")
    a, b = (model.infuse[n].copies.state_dict() for n in "ab")
    base = {n: model.get_parameter(n.replace("/", ".")) for n in a}
    for n, value in model.infuse["soup"].copies.state_dict().items():
        torch.testing.assert_close(value, 0.75 * a[n] + 0.25 * b[n])
    for n, value in model.infuse["both"].copies.state_dict().items():
        torch.testing.assert_close(value, base[n] + (a[n] - base[n]) + 0.5 * (b[n] - base[n]))


def test_stacks_use_the_one_own_module_or_are_refused(norms, tmp_path):
    model, batch = norms
    infuse.stack(model, ["a"], "alone")
    assert torch.equal(output(model, batch, "alone"), output(model, batch, "a"))
    infuse.stack(model, ["c", "a"], "both")
    mixed = output(model, batch, ["both", "c", None])
    for row, name in enumerate(["both", "c", None]):
        close(mixed[row], output(model, batch, name)[row])
    infuse.save(model, "both", tmp_path / "both")
    fresh = tiny("bert", AutoModelForSequenceClassification, num_labels=3)
    infuse.load(fresh, tmp_path / "both")
    assert torch.equal(output(fresh, batch), output(model, batch, "both"))
    with pytest.raises(infuse.InfuseError, match=r"more than one.*LayerNorm.*train all but one"):
        infuse.stack(model, ["a", "b"])


def test_members_of_a_fusion_have_no_own_norms(norms):
    """A fusion runs the base's norms, with which such members were not trained; heads on top are its own anyway."""
    model, _ = norms
    infuse.attach(model, Bottleneck(), "headed")
    infuse.fuse(model, ["c", "headed"])
    with pytest.raises(infuse.InfuseError, match=r"'a' can't be fused.*copy of bert\.encoder.*no train_norms"):
        infuse.fuse(model, ["c", "a"])
    assert "c,a" not in store_of(model).adapters
    bare = tiny("bert")
    infuse.attach(bare, Bottleneck(train_norms=True), "a")
    infuse.attach(bare, Bottleneck(), "b")
    with pytest.raises(infuse.InfuseError, match=r"own copy of encoder\.layer\.0"):
        infuse.fuse(bare, ["a", "b"])


def test_own_modules_of_some_do_not_average(norms):
    model, _ = norms
    infuse.attach(model, Bottleneck(train_norms=True), "d", trained=())
    with pytest.raises(infuse.InfuseError, match=r"only some.*copy of classifier;"):
        infuse.average(model, ["a", "d"])


def test_sums_of_lora_add_the_updates_exactly():
    model, _ = trained("bert", LoRA(rank=3, roles=("query", "value")))
    total = infuse.add(model, {"a": 1.0, "b": -0.5}, "total")
    for site in total.sites.values():

        def update(name, site=site):
            p, method = model.infuse[name].params(site), model.infuse[name].method_at(site)
            return method.scale * p["B"] @ p["A"]

        torch.testing.assert_close(update("total"), update("a") - 0.5 * update("b"))


def test_a_task_plus_its_negation_is_the_base():
    model, batch = trained("bert", IA3())
    infuse.add(model, {"a": 1.0, "b": 0.0}, "same")
    close(output(model, batch, "same"), output(model, batch, "a"))
    twin, batch = trained("bert", LoRA())
    infuse.average(twin, ["a"], "copy")
    infuse.add(twin, {"a": 1.0, "copy": -1.0}, "nothing")
    close(output(twin, batch, "nothing"), output(twin, batch, None))


def test_stacked_scales_multiply_and_mix(tmp_path):
    model, batch = trained("bert", IA3())
    infuse.stack(model, ["a", "b"], "both")
    product = infuse.attach(model, IA3(), "product")
    with torch.no_grad():
        for site in product.sites.values():
            product.delta(site).l.copy_(model.infuse["a"].params(site)["l"] * model.infuse["b"].params(site)["l"])
    close(output(model, batch, "both"), output(model, batch, "product"))
    mixed = output(model, batch, ["both", None, "a"])
    for row, name in enumerate(["both", None, "a"]):
        close(mixed[row], output(model, batch, name)[row])
    infuse.save(model, "both", tmp_path / "both")
    fresh = tiny("bert")
    infuse.load(fresh, tmp_path / "both")
    assert torch.equal(output(fresh, batch), output(model, batch, "both"))


def test_adapters_whose_files_list_the_sites_in_another_order_combine():
    model, batch = trained("bert", "houlsby", "ab")
    straight = output(model, batch, infuse.average(model, ["a", "b"]).name)
    other = model.infuse["b"]
    other.sites = dict(reversed(other.sites.items()))
    close(output(model, batch, infuse.average(model, ["a", "b"], "reversed").name), straight)


def test_adapters_with_other_settings_in_a_layer_do_not_combine():
    model, _ = trained("bert", "houlsby", "ab")
    site = next(iter(model.infuse["b"].sites.values()))
    method = Bottleneck.houlsby(width=5)
    model.infuse["b"].deltas[key(site.name)] = Delta(method, method.init(site))
    for combine in (lambda: infuse.average(model, ["a", "b"]), lambda: infuse.add(model, {"a": 1.0, "b": 1.0})):
        with pytest.raises(infuse.InfuseError, match="one method"):
            combine()


def test_different_methods_do_not_combine():
    model, _ = trained("bert", Compacter(width=8), "a")
    infuse.attach(model, "lora", "b")
    with pytest.raises(infuse.InfuseError, match="one method"):
        infuse.average(model, ["a", "b"])
    with pytest.raises(infuse.InfuseError, match="magnitudes"):
        infuse.attach(model, LoRA(dora=True), "d")
        infuse.add(model, {"d": 1.0})


def test_norms_can_be_trained_as_copies():
    model = tiny("bert")
    batch = inputs(model)
    before = output(model, batch)
    adapter = infuse.attach(model, Bottleneck.houlsby(train_norms=True), "a")
    assert {n.rsplit("/", 1)[-1] for n in adapter.copies} == {"LayerNorm"}
    assert len(adapter.copies) == 4
    wake(model, "a")
    assert not torch.allclose(output(model, batch), before)
    infuse.activate(model, None)
    assert torch.equal(output(model, batch), before)


def test_widths_that_do_not_divide_name_one_that_does():
    with pytest.raises(infuse.InfuseError, match="width=4"):
        infuse.attach(tiny("bert"), Compacter(width=5), "a")
    with pytest.raises(infuse.InfuseError, match="n=8"):
        infuse.attach(tiny("bert"), Compacter(n=3, width=8), "a")


@pytest.mark.parametrize("method", ["fusion", "stack"])
def test_what_is_made_of_adapters_is_not_attached_alone(method, tiny_base):
    """It would act nowhere, and its head alone would be trained."""
    model = tiny("bert")
    with pytest.raises(infuse.InfuseError, match=f"{method} builds on trained adapters: call infuse"):
        infuse.attach(model, method)
    assert not hasattr(model, "infuse")
    with pytest.raises(infuse.InfuseError, match="builds on trained adapters"):
        infuse.Classifier(base=str(tiny_base), method=method).fit(["a", "b", "c"] * 9, ["x", "y", "z"] * 9)

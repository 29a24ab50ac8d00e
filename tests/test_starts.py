"""How methods and heads start: the statistics of fresh parameters that the papers give, and learning rates."""

import pytest
import torch
from transformers import AutoModelForSequenceClassification

import infuse
from infuse.heads import HEADS, Head
from infuse.testing import tiny
from infuse.training.engine import head_rate

WIDE = {"hidden_size": 128, "intermediate_size": 256}


@pytest.fixture
def fresh():
    """The parameters of a fresh adapter at its first site, by their names."""

    def start(method):
        torch.manual_seed(0)
        model = tiny("bert", **WIDE)
        adapter = infuse.attach(model, method, "a")
        return adapter.params(next(iter(adapter.sites.values())))

    return start


def normal(value, deviation):
    """Whether numbers look drawn from N(0, σ): the spread within a tenth, the mean near zero, tails beyond 2σ."""
    assert value.std().item() == pytest.approx(deviation, rel=0.1)
    assert abs(value.mean()) < 0.1 * deviation
    beyond = (value.abs() > 2 * deviation).float().mean().item()
    assert beyond == pytest.approx(0.0455, rel=0.4)


def test_fusion():
    model = tiny("bert", **WIDE)
    torch.manual_seed(0)
    for name in "ab":
        infuse.attach(model, "pfeiffer", name)
    for delta in infuse.fuse(model, ["a", "b"]).deltas.values():
        for name in ("Q", "K"):
            normal(getattr(delta, name), 0.02)
        assert not torch.equal(delta.Q, delta.K) and not delta.q.any() and not delta.k.any()
        beside = torch.full_like(delta.V, 1e-6)
        torch.testing.assert_close(delta.V, beside.fill_diagonal_(1.0), rtol=1e-6, atol=0)


def test_truncated_starts_are_cut_at_two_deviations(fresh):
    p = fresh("houlsby:reduction=2")
    for name in ("D", "U"):
        assert 0.0195 < p[name].abs().max() <= 0.02
        assert p[name].std().item() == pytest.approx(0.0088, rel=0.05)  # of N(0, 0.01) cut at 2σ
    assert not p["b"].any() and not p["c"].any()


def test_normal_and_zero_starts(fresh):
    p = fresh("pfeiffer:reduction=2")
    normal(p["D"], 0.02), normal(p["U"], 0.02)
    p = fresh("parallel")
    assert not p["U"].any()
    bound = 128**-0.5  # Kaiming-uniform with a = √5: ±1/√in
    assert 0.98 * bound < p["D"].abs().max() <= bound
    assert p["D"].std().item() == pytest.approx(bound / 3**0.5, rel=0.05)


def test_compacter(fresh):
    p = fresh("compacter:n=16,reduction=4")
    normal(p["rule"], 1e-4)
    for side, fan_in, fan_out in (("down", 8, 2), ("up", 2, 8)):
        for part, around in ((f"{side}_left", fan_in + 1), (f"{side}_right", fan_out + 1)):
            spread = 2 / around**0.5  # Xavier's, times √2
            assert p[part].std().item() == pytest.approx(spread, rel=0.2)
            assert p[part].abs().max() <= 3**0.5 * spread  # uniform
    p = fresh("phm:n=16,reduction=4")
    normal(p["down_rule"], 0.01), normal(p["up_rule"], 0.01)


def test_lora_and_ia3(fresh):
    p = fresh("lora:rank=16")
    assert not p["B"].any() and p["A"].std().item() == pytest.approx((3 * 128) ** -0.5, rel=0.05)
    assert all((value == 1).all() for value in fresh("ia3").values())


def test_learning_rates():
    rates = [infuse.make(name).rate for name in ("houlsby", "pfeiffer", "parallel")]
    assert rates == [1e-3, 1e-3, 2e-3]


@pytest.mark.parametrize(
    ("kind", "rate"), [("bert", "linear"), ("roberta", "hf"), ("distilbert", "hf"), ("gpt2", "linear")]
)
def test_a_models_own_head_of_one_layer_learns_as_a_linear_head(kind, rate):
    adapter = infuse.attach(tiny(kind, AutoModelForSequenceClassification, num_labels=3), "ia3", "a")
    adapter.head = Head("hf", "abc")
    assert head_rate(adapter) == HEADS[rate]


@pytest.mark.parametrize(("several", "length", "scale"), [(False, 1, 20), (True, 0.03, 40)])
def test_cosine_heads_start_at_centroids(several, length, scale):
    pooled = 5 * torch.nn.functional.normalize(torch.randn(6, 4), dim=-1)
    targets = torch.tensor([[1, 0], [1, 1], [0, 1]] if several else [[1, 0], [1, 0], [0, 1]]).repeat(2, 1)
    head = Head("cosine", "ab", 4, multi=several)
    head.start_at(pooled, targets)
    centroid = pooled[targets[:, 0] == 1].sum(0)
    assert torch.allclose(head.weight[0], length * centroid / centroid.norm(), atol=1e-6)
    assert head.log_scale.exp().item() == pytest.approx(scale)
    assert not several or head.bias.tolist() == [-scale / 2, -scale / 2]

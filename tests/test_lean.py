"""Autograd functions that keep little: exact against ordinary autograd, and lean."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import infuse
from infuse import lean
from infuse.attention import NAME, _plain, _ShortRows, attention
from infuse.ops import activation
from infuse.testing import TINY
from infuse.testing.conformance import close, output, wake
from infuse.testing.tiny import inputs, tiny

BEFORE = {
    "nothing": lambda u: u,
    "linear": lambda u: u @ torch.eye(u.shape[-1], dtype=u.dtype),
    "gelu": F.gelu,
    "gelu_tanh": lambda u: F.gelu(u, approximate="tanh"),
    "silu": F.silu,
    "relu": F.relu,
    "tanh": torch.tanh,
    "gated": lambda u: F.silu(u) * (u + 1),
}


def leaf(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.double, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def saved(function) -> int:
    """Bytes in unique storages that a function's graph keeps."""
    storages = {}

    def pack(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        kept.append(tensor)
        return tensor

    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = function()
    assert out.requires_grad
    return sum(storages.values())


def projected(out: torch.Tensor) -> torch.Tensor:
    """A loss that no normalisation makes constant."""
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(3))
    return (out * weights.to(out)).sum()


@pytest.mark.parametrize("before", BEFORE)
@pytest.mark.parametrize("zeros", [0, 2])
def test_scale(before, zeros):
    u, vector = leaf(3, 4, 6), leaf(6, seed=1)
    with torch.no_grad():
        vector[:zeros] = 0
    function = BEFORE[before]
    assert torch.autograd.gradcheck(lambda u, v: lean.scale(function(u), v), (u, vector))
    torch.testing.assert_close(lean.scale(function(u), vector), function(u) * vector, rtol=0, atol=0)


@pytest.mark.parametrize("before", ["gelu", "silu", "relu", "gated"])
def test_scale_after_an_activation_keeps_nothing_more(before):
    u, vector = leaf(64, 32), leaf(32, seed=1)
    function = BEFORE[before]
    alone = saved(lambda: function(u))
    with lean.plain():
        plain = saved(lambda: function(u) * vector)
    assert saved(lambda: lean.scale(function(u), vector)) <= alone + vector.numel() * 8
    assert plain >= alone + (0 if before == "relu" else 64 * 32 * 8)


def test_scale_looks_at_nothing_that_was_moved_away():
    u, vector = leaf(5, 6), leaf(6, seed=1)
    with torch.autograd.graph.save_on_cpu():
        lean.scale(F.gelu(u), vector).sum().backward()
    moved = u.grad, vector.grad
    u.grad = vector.grad = None
    with lean.plain():
        lean.scale(F.gelu(u), vector).sum().backward()
    torch.testing.assert_close(moved, (u.grad, vector.grad))


@pytest.mark.parametrize("frozen", [(), (0,), (1,), (2,), (1, 2)])
def test_low_rank(frozen):
    args = [leaf(3, 4, 6), leaf(2, 6, seed=1), leaf(5, 2, seed=2)]
    for i in frozen:
        args[i].requires_grad_(False)
    assert torch.autograd.gradcheck(lambda *a: lean.low_rank(*a, 1.5), args)
    torch.testing.assert_close(lean.low_rank(*args, 1.5), F.linear(F.linear(args[0], args[1]), args[2]) * 1.5)


@pytest.mark.parametrize("name", ["relu", "gelu", "swish", "tanh"])
@pytest.mark.parametrize("frozen", [(), (0,), (1, 2, 3, 4)])
def test_bottleneck(name, frozen):
    args = [leaf(2, 3, 6), leaf(2, 6, seed=1), leaf(2, seed=2), leaf(6, 2, seed=3), leaf(6, seed=4)]
    for i in frozen:
        args[i].requires_grad_(False)
    assert torch.autograd.gradcheck(lambda *a: lean.bottleneck(*a, activation(name)), args)
    with lean.plain():
        plain = lean.bottleneck(*args, activation(name))
    torch.testing.assert_close(lean.bottleneck(*args, activation(name)), plain)


@given(
    rows=st.integers(1, 3), groups=st.integers(1, 3), keys=st.integers(1, 2), length=st.integers(1, 18),
    seed=st.integers(0, 9),
)  # fmt: skip
def test_attention_equals_plain_autograd(rows, groups, keys, length, seed):
    q = leaf(rows, keys * groups, length, 4, seed=seed)
    k, v = leaf(rows, keys, length, 4, seed=seed + 1), leaf(rows, keys, length, 4, seed=seed + 2)
    mask = torch.zeros(rows, 1, length, length, dtype=torch.double)
    mask[0, :, :, length // 2 + 1 :] = torch.finfo(torch.double).min
    for each in (None, mask, leaf(rows, keys * groups, length, length, seed=5).detach()):
        ours = _ShortRows.apply(q, k, v, each, 0.7)
        plain = _plain(q, k, v, each, 0.7, 0.0)
        torch.testing.assert_close(ours, plain)
        weights = torch.randn(plain.shape, dtype=torch.double, generator=torch.Generator().manual_seed(seed))
        torch.testing.assert_close(
            torch.autograd.grad(ours, (q, k, v), weights), torch.autograd.grad(plain, (q, k, v), weights)
        )


@pytest.mark.parametrize("length", range(1, 49))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_without_gradients_at_every_length(length, dtype):
    q = leaf(2, 6, length, 8, seed=length).detach()
    k, v = leaf(2, 3, length, 8, seed=1).detach(), leaf(2, 3, length, 8, seed=2).detach()
    mask = torch.zeros(2, 1, length, length, dtype=torch.double)
    mask[0, :, :, length // 2 + 1 :] = torch.finfo(torch.double).min
    module = SimpleNamespace(num_key_value_groups=2)
    for each in (None, mask, torch.zeros(2, 1, length, length, dtype=torch.bool).logical_not()):
        floats = each is not None and each.is_floating_point()
        own = each.to(dtype).clamp(min=torch.finfo(dtype).min) if floats else each
        with torch.inference_mode():
            ours = attention(module, q.to(dtype), k.to(dtype), v.to(dtype), own, scaling=0.7, is_causal=False)[0]
        plain = _plain(q, k, v, each if floats else None, 0.7, 0.0)
        torch.testing.assert_close(ours.double(), plain, rtol=0, atol=1e-5 if dtype == torch.float32 else 0.03)


@pytest.mark.parametrize("kind", TINY)
def test_models_with_our_attention_equal_eager_ones(kind):
    if not tiny(kind)._supports_sdpa:
        pytest.skip(f"{kind} computes attention in its own way")
    gradients = []
    for implementation in ("eager", NAME):
        model = tiny(kind).double().eval()
        model.set_attn_implementation(implementation)
        batch = inputs(model)
        batch["attention_mask"][0, -3:] = 0
        torch.manual_seed(0)
        infuse.attach(model, "lora:roles=query+key+value", "a")
        wake(model, "a")
        projected(output(model, batch)).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.infuse["a"].parameters()]))
    close(gradients[1] / gradients[0].abs().max(), gradients[0] / gradients[0].abs().max(), 1e-6)


@pytest.mark.parametrize("method", ["ia3", "lora", "houlsby", "pfeiffer", "parallel"])
@pytest.mark.parametrize("kind", ["bert", "llama", "gpt2", "t5", "modernbert"])
def test_gradients_equal_plain_autograd(kind, method):
    gradients = []
    for context in (lean.plain, torch.enable_grad):
        model = tiny(kind).double().eval()
        torch.manual_seed(0)
        infuse.attach(model, method, "a")
        wake(model, "a")
        with context():
            projected(output(model, inputs(model))).backward()
        gradients.append([p.grad for p in model.infuse["a"].parameters()])
    torch.testing.assert_close(gradients[1], gradients[0])


@pytest.mark.parametrize("method", ["ia3", "lora", "lora:dora=true", "pfeiffer", "parallel"])
@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_autocast(kind, method):
    gradients = []
    for context in (lean.plain, torch.enable_grad):
        model = tiny(kind).eval()
        torch.manual_seed(0)
        infuse.attach(model, method, "a")
        wake(model, "a")
        with context(), torch.autocast("cpu", torch.bfloat16):
            out = output(model, inputs(model))
        projected(out.float()).backward()  # after autocast, as in Trainer and Accelerate
        gradients.append(torch.cat([p.grad.flatten() for p in model.infuse["a"].parameters()]))
    assert gradients[1].dtype == torch.float32
    close(gradients[1] / gradients[0].norm(), gradients[0] / gradients[0].norm(), 0.02)


def test_ia3_keeps_less_than_lora_and_than_plain_autograd():
    def kept(method: str, context) -> int:
        model: nn.Module = tiny("bert", hidden_size=64, intermediate_size=256).to(torch.bfloat16).eval()
        model.set_attn_implementation(NAME)
        batch = inputs(model, rows=16, length=12)
        infuse.attach(model, method, "a")
        with context():
            return saved(lambda: output(model, batch).float().square().mean())

    ia3, lora = kept("ia3", torch.enable_grad), kept("lora", torch.enable_grad)
    assert ia3 < lora
    assert ia3 < 0.75 * kept("ia3", lean.plain)

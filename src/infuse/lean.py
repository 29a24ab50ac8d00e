"""Autograd functions that keep for backward no more than they must.

Each has a plain twin in ordinary torch operations, which is the reference in the tests and the path taken where these
functions have no business: for parameters with a row per text, under ``vmap`` and ``torch.compile`` (whose partitioner
decides what to keep), and inside :func:`plain`.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from threading import local
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

Rows = Float[Tensor, "*batch width"]


_internals: Any = torch._C
_is_wrapped = _internals._functorch.is_functorch_wrapped_tensor
_saved_tensors_hooks = _internals._autograd._top_saved_tensors_default_hooks


class _State(local):
    plain = False


_STATE = _State()


@contextmanager
def plain() -> Iterator[None]:
    """Within the block, this thread computes by ordinary autograd only."""
    outer, _STATE.plain = _STATE.plain, True
    try:
        yield
    finally:
        _STATE.plain = outer


def applies(*tensors: Tensor) -> bool:
    """Whether a function of this module should stand in for its plain twin."""
    if _STATE.plain or not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    if any(_is_wrapped(t) for t in tensors):
        return False
    return any(t.requires_grad for t in tensors)


def linear(x: Rows, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x·Wᵀ + b`` with one weight (out, in) and bias (out,), or one a row: (rows, out, in) and (rows, 1, out)."""
    if weight.ndim == 2:
        return F.linear(x, weight, bias)
    return torch.bmm(x, weight.mT) if bias is None else torch.baddbmm(bias, x, weight.mT)


def scale(h: Rows, vector: Float[Tensor, " width"]) -> Rows:
    """``vector ⊙ h``, keeping for the gradient of ``vector`` what others keep anyway.

    If ``h`` comes out of an activation or a product, backward computes it anew from what that operation keeps.
    Otherwise it divides the result, which attention keeps (keys, values), by ``vector``; where an entry is nearly
    zero, ``h`` itself is kept.
    """
    if vector.ndim > 1 or not applies(h, vector):
        return h * vector
    if not vector.requires_grad:
        return _Scale.apply(h, vector, _itself)  # type: ignore[return-value]  # as forward gives it
    recompute, kept = _made(h) or (None, ())
    if recompute is None and (vector.detach().abs() < SMALLEST).any():
        recompute, kept = _itself, (h,)
    return _Scale.apply(h, vector, recompute, *kept)  # type: ignore[return-value]  # as forward gives it


SMALLEST = 1e-3
"""Entries of a scale below this are taken for zero: dividing by them would lose digits."""


class _Scale(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Rows, vector: Tensor, recompute: Callable[..., Tensor] | None, *kept: Tensor) -> Rows:
        out = h * vector
        ctx.recompute = recompute
        ctx.save_for_backward(vector, *((out,) if recompute is None else kept))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Rows) -> tuple[Tensor | None, ...]:  # type: ignore[override]  # fixed arguments, not *grads
        vector, *kept = ctx.saved_tensors
        grad_h = g * vector if ctx.needs_input_grad[0] else None
        grad_vector = None
        if ctx.needs_input_grad[1]:
            recompute = ctx.recompute
            sums = (g * (recompute(*kept) if recompute else kept[0])).flatten(0, -2).sum(0)
            grad_vector = sums if recompute else sums / vector
        return grad_h, grad_vector, None, *(None for _ in ctx.needs_input_grad[3:])


def _itself(h: Rows) -> Rows:
    return h


def _made(h: Tensor) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]] | None:
    """How ``h`` is had again from the tensors that the operation behind it keeps for its own backward."""
    node = h.grad_fn
    rule = _RULES.get(type(node).__name__)
    if rule is None or _moved():
        return None
    recompute, kept = rule(node)
    if any(t is None or t.shape != h.shape or t.dtype != h.dtype for t in kept):
        return None
    return recompute, kept


def _moved() -> bool:
    """Whether checkpointing or offloading take saved tensors elsewhere: a look would bring them back."""
    hooks = _saved_tensors_hooks(False)
    return bool(hooks) and hooks[0].__module__ in ("torch.utils.checkpoint", "torch.autograd.graph")


def _gelu(node: Any) -> tuple[Callable[..., Tensor], tuple[Any, ...]]:
    approximate = node._saved_approximate
    return lambda u: F.gelu(u, approximate=approximate), (node._saved_self,)


_RULES: dict[str, Callable[[Any], tuple[Callable[..., Tensor], tuple[Any, ...]]]] = {
    "GeluBackward0": _gelu,
    "SiluBackward0": lambda node: (F.silu, (node._saved_self,)),
    "ReluBackward0": lambda node: (_itself, (node._saved_result,)),
    "TanhBackward0": lambda node: (_itself, (node._saved_result,)),
    "MulBackward0": lambda node: (torch.mul, (node._saved_self, node._saved_other)),
}
"""Type of an autograd node → how to have its result again, and from what."""


def _like(g: Tensor, saved: Iterable[Tensor | None]) -> list[Any]:
    """Saved tensors in the dtype of the gradient: autocast may end before backward."""
    return [None if t is None else t.to(g.dtype) for t in saved]


def low_rank(x: Float[Tensor, "*batch in"], a: Float[Tensor, "r in"], b: Float[Tensor, "out r"], s: float) -> Rows:
    """``s·B·A·x``; backward keeps x alone."""
    if a.ndim > 2:
        return linear(linear(x, a) * s, b)
    if not applies(x, a, b):
        return F.linear(F.linear(x, a), b) * s
    return _LowRank.apply(x, a, b, s)  # type: ignore[return-value]  # as forward gives it


class _LowRank(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, b: Tensor, s: float) -> Tensor:
        ctx.save_for_backward(x, a, b)
        ctx.s = s
        return F.linear(F.linear(x, a), b * s)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]  # fixed arguments, not *grads
        x, a, b = _like(g, ctx.saved_tensors)
        flat, g = x.flatten(0, -2), g.flatten(0, -2)
        inner = g @ (b * ctx.s)
        grad_x = (inner @ a).view(x.shape) if ctx.needs_input_grad[0] else None
        grad_a = inner.T @ flat if ctx.needs_input_grad[1] else None
        grad_b = g.T @ (F.linear(flat, a) * ctx.s) if ctx.needs_input_grad[2] else None
        return grad_x, grad_a, grad_b, None


def bottleneck(
    z: Float[Tensor, "*batch in"],
    down: Float[Tensor, "r in"],
    b: Float[Tensor, " r"],
    up: Float[Tensor, "out r"],
    c: Float[Tensor, " out"],
    activation: Callable[[Tensor], Tensor],
) -> Float[Tensor, "*batch out"]:
    """``U·f(D·z + b) + c``; backward keeps z and the r values before f."""
    if down.ndim > 2 or not applies(z, down, b, up, c):
        return linear(activation(linear(z, down, b)), up, c)
    return _Bottleneck.apply(z, down, b, up, c, activation)  # type: ignore[return-value]  # as forward gives it


class _Bottleneck(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, z: Tensor, down: Tensor, b: Tensor, up: Tensor, c: Tensor, activation: Callable[[Tensor], Tensor]
    ) -> Tensor:
        inner = F.linear(z, down, b)
        needs = ctx.needs_input_grad
        ctx.activation = activation
        ctx.save_for_backward(z if needs[1] else None, inner, down, up)
        return F.linear(activation(inner), up, c)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]  # fixed arguments, not *grads
        z, inner, down, up = _like(g, ctx.saved_tensors)
        needs = ctx.needs_input_grad
        flat = g.flatten(0, -2)
        with torch.enable_grad():
            inner = inner.flatten(0, -2).detach().requires_grad_()
            active = ctx.activation(inner)
        (grad_inner,) = torch.autograd.grad(active, inner, flat @ up)
        return (
            (grad_inner @ down).view(*g.shape[:-1], -1) if needs[0] else None,
            grad_inner.T @ z.flatten(0, -2) if needs[1] else None,
            grad_inner.sum(0) if needs[2] else None,
            flat.T @ active.detach() if needs[3] else None,
            flat.sum(0) if needs[4] else None,
            None,
        )

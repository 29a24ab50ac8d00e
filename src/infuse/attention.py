"""Attention for short rows on CPUs: a few whole-batch operations, and a lean backward."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask

from infuse.lean import applies
from infuse.packing import ATTENTION as NAME
from infuse.packing import Packed, current

SHORT = 256
"""Rows up to this many positions take the path for short rows (docs/decisions.md)."""

LANES = 16
"""Numbers of float32 that a vector register holds; torch's kernel takes the rest of a row one by one."""

_softmax_backward = torch.ops.aten._softmax_backward_data
_kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu

Query = Float[Tensor, "rows heads positions width"]
Keys = Float[Tensor, "rows key_heads keys width"]
Mixed = Float[Tensor, "rows positions heads width"]


class _ShortRows(torch.autograd.Function):
    """``softmax(s·q·kᵀ + mask)·v``, the softmax in float32.

    Backward keeps q, k and v as they came (views of what the projections gave) and the probabilities, nothing else.
    Heads that share keys (grouped queries) are taken as more positions of one head, so that no key is repeated.
    Where keys fill more than half of a vector register but not all of it, masked ones are added inside (:func:`_full`).
    """

    @staticmethod
    def forward(ctx: Any, q: Query, k: Keys, v: Keys, mask: Tensor | None, scaling: float) -> Mixed:
        scores = torch.bmm(_flat(q, k), _full(k).transpose(1, 2)).to(_wide(q, k)).mul_(scaling)
        keys = k.shape[2]
        if mask is not None:
            rows, heads, positions, _ = q.shape
            by_head = scores.view(rows, k.shape[1], heads // k.shape[1], positions, -1)[..., :keys]
            if mask.shape[1] == 1:
                by_head += mask.unsqueeze(2)
            else:
                by_head += mask.expand(rows, heads, positions, -1).reshape(by_head.shape)
        if scores.shape[-1] > keys:
            scores[..., keys:] = -torch.inf
        p = scores.softmax(-1).to(q.dtype)
        ctx.save_for_backward(q, k, v, p)
        ctx.scaling = scaling
        return torch.bmm(p, _full(v)).view(*q.shape[:3], v.shape[-1]).transpose(1, 2).contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Mixed) -> tuple[Tensor | None, ...]:  # type: ignore[override]  # fixed arguments, not *grads
        q, k, v, p = ctx.saved_tensors
        g = _flat(g.transpose(1, 2), k)
        wants_q, wants_k, wants_v = ctx.needs_input_grad[:3]
        grad_q = grad_k = grad_v = None
        if wants_v:
            grad_v = _cut(torch.bmm(p.transpose(1, 2), g), v)
        if wants_q or wants_k:
            dtype = _wide(q, k)
            inner = torch.bmm(g, _full(v).transpose(1, 2)).to(dtype)
            inner = _softmax_backward(inner, p.to(dtype), -1, dtype).mul_(ctx.scaling).to(q.dtype)
            if wants_q:
                grad_q = torch.bmm(inner, _full(k)).view(q.shape)
            if wants_k:
                grad_k = _cut(torch.bmm(inner.transpose(1, 2), _flat(q, k)), k)
        return grad_q, grad_k, grad_v, None, None


def _wide(q: Query, k: Keys) -> torch.dtype:
    """The dtype of the scores: torch's softmax in bfloat16 is slow unless 32 divides the number of keys."""
    return torch.float32 if q.dtype == torch.bfloat16 and k.shape[2] % 32 else q.dtype


def _flat(x: Tensor, k: Keys) -> Float[Tensor, "rows_and_key_heads positions width"]:
    return x.reshape(k.shape[0] * k.shape[1], -1, x.shape[-1])


def _full(x: Keys) -> Float[Tensor, "rows_and_key_heads keys_or_more width"]:
    """Keys or values; from 8 to 15 of them are filled up with zeros to 16, which torch's softmax takes at once."""
    more = LANES - x.shape[2]
    return _flat(F.pad(x, (0, 0, 0, more)) if 0 < more <= LANES // 2 else x, x)


def _cut(x: Float[Tensor, "rows_and_key_heads keys_or_more width"], like: Keys) -> Keys:
    return x.view(*like.shape[:2], -1, like.shape[-1])[:, :, : like.shape[2]]


def attention(
    module: nn.Module,
    query: Query,
    key: Keys,
    value: Keys,
    attention_mask: Float[Tensor, "rows heads positions keys"] | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Mixed, None]:
    """Attention as transformers asks for it.

    Training on short rows takes the leanest way on CPUs; torch's own kernel, slow there in backward, does the rest.
    Scores that the model caps (Gemma 2) take plain operations: torch's kernel would leave them as they are.
    """
    if (packed := current()) is not None:
        return _packed(packed, module, query, key, value, scaling), None
    factor = query.shape[-1] ** -0.5 if scaling is None else scaling
    if (softcap := kwargs.get("softcap")) is not None:
        return _plain(query, key, value, attention_mask, factor, dropout, softcap), None
    trains = torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value))
    bias = kwargs.get("position_bias")
    fixed = bias is None or not bias.requires_grad
    if (
        query.device.type not in ("cpu", "meta")
        or key.shape[2] > SHORT
        or not (trains and fixed)
        or kwargs.get("cache") is not None
    ):
        plain = not (torch.is_grad_enabled() or torch.compiler.is_compiling())
        if plain and query.device.type in ("cpu", "meta") and attention_mask is not None and bias is None:
            key, value, attention_mask = _aligned(key, value, attention_mask)
        if query.is_meta:
            return _shapes(query, key, value, attention_mask), None
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    mask = attention_mask if bias is None else bias if attention_mask is None else attention_mask + bias
    if dropout or not applies(query, key, value):
        return _plain(query, key, value, mask, factor, dropout), None
    return _ShortRows.apply(query, key, value, mask, factor), None  # type: ignore[return-value]  # as forward gives it


def _packed(
    packed: Packed, module: nn.Module, q: Query, k: Keys, v: Keys, scaling: float | None
) -> Float[Tensor, "rows 1 heads width"]:
    """Attention between the tokens of each text, where rows are tokens."""
    mixed = []
    blocks = zip(*(packed.together(x.squeeze(2)) for x in (q, k, v)), packed.masks(q.dtype), strict=True)
    for *given, mask in blocks:
        q, k, v = (x.transpose(1, 2) for x in given)
        mixed.append(sdpa_attention_forward(module, q, k, v, mask, scaling=scaling)[0])
    return packed.apart(mixed).unsqueeze(1)


def _plain(
    q: Query, k: Keys, v: Keys, mask: Tensor | None, scaling: float, dropout: float, softcap: float | None = None
) -> Mixed:
    groups = q.shape[1] // k.shape[1]
    if groups > 1:
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = torch.matmul(q, k.transpose(2, 3)) * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    p = (scores if mask is None else scores + mask).softmax(-1)
    return torch.matmul(F.dropout(p, dropout), v).transpose(1, 2).contiguous()


def _aligned(k: Keys, v: Keys, mask: Tensor) -> tuple[Keys, Keys, Tensor]:
    """Masked keys up to a multiple of 16 where more than half of them are there: on a rest torch's kernel is slow."""
    more = -k.shape[2] % LANES
    plain = mask.is_floating_point() and mask.shape[-1] == k.shape[2] <= SHORT
    if not plain or not 0 < more <= LANES // 2:
        return k, v, mask
    lowest = torch.finfo(mask.dtype).min
    return F.pad(k, (0, 0, 0, more)), F.pad(v, (0, 0, 0, more)), F.pad(mask, (0, more), value=lowest)


def _shapes(q: Query, k: Keys, v: Keys, mask: Tensor | None) -> Mixed:
    """torch's kernel on the meta device, where ``scaled_dot_product_attention`` would keep all scores."""
    groups = q.shape[1] // k.shape[1]
    if groups > 1:
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    return _kernel(q, k, v, attn_mask=mask)[0].transpose(1, 2).contiguous()


def choose(model: PreTrainedModel) -> None:
    """Let a model on the CPU (or on none) use :func:`attention` if it can, and plain operations if not."""
    if next(model.parameters()).device.type in ("cpu", "meta"):
        model.set_attn_implementation(NAME if model._supports_sdpa else "eager")


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, eager_mask)

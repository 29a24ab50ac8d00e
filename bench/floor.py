"""The floor under a training step: the matrix products that no implementation can leave out, and nothing else.

Forward: every linear layer of the frozen trunk, and attention's two products per layer. Backward: the gradient for the
input of every such layer above the first adapted place, and attention's four products; for full fine-tuning the
gradients of the weights, too. Left out: the adapter's own products, the head of a classifier, softmax, norms,
activations, embeddings, the optimizer. The products run in the trunk's dtype, on weights of their own per layer.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

FIRST: dict[str, tuple[tuple[str, ...], int]] = {
    "ia3": (("o", "gate", "up", "down"), 3),
    "lora": (("o", "gate", "up", "down"), 3),
    "houlsby": (("gate", "up", "down"), 0),
    "compacter": (("gate", "up", "down"), 0),
    "pfeiffer": ((), 0),
    "fusion": ((), 0),
    "full": (("q", "k", "v", "o", "gate", "up", "down"), 4),
}
"""Method → in the first layer, the linear layers whose inputs get gradients, and how many products of attention do."""


def products(spec: dict[str, Any], longest: int, device: torch.device) -> Callable[[int, int], None]:
    """A function of a batch's rows and padded length that runs one step's products."""
    shape = _shape(spec)
    whole, (linears, attended) = spec["method"] == "full", FIRST[spec["method"]]
    kind: Any = {"device": device, "dtype": torch.float32 if whole else _dtype(spec)}
    heads, head_dim = shape["heads"], shape["head_dim"]

    def weights(sizes: dict[str, tuple[int, int]]) -> dict[str, Tensor]:
        return {name: torch.randn(out, width, **kind) for name, (width, out) in sizes.items()}

    layers = [weights(shape["linears"]) for _ in range(shape["layers"])]
    last = weights(shape["last"])
    most = spec["batch"] * longest
    widths = {n for w in (*layers, last) for weight in w.values() for n in weight.shape}
    inputs = {width: torch.randn(most, width, **kind) for width in widths}
    values = torch.randn(most * heads * max(head_dim, longest), **kind)

    @torch.inference_mode()
    def run(rows: int, length: int) -> None:
        some = {width: x[: rows * length] for width, x in inputs.items()}
        head = values[: rows * heads * length * head_dim].view(rows * heads, length, head_dim)
        scores = values[: rows * heads * length * length].view(rows * heads, length, length)
        for each in (*layers, last):
            for weight in each.values():
                F.linear(some[weight.shape[1]], weight)
            if each is not last:
                torch.bmm(head, head.mT)
                torch.bmm(scores, head)
        for index, each in reversed(list(enumerate((*layers, last)))):
            for name, weight in each.items():
                if index or name in linears:
                    torch.mm(some[weight.shape[0]], weight)
                if whole:
                    torch.mm(some[weight.shape[0]].T, some[weight.shape[1]])
            for which in range(0 if each is last else 4 if index else attended):
                torch.bmm(head, head.mT) if which == 0 else torch.bmm(scores, head)

    return run


def _shape(spec: dict[str, Any]) -> dict[str, Any]:
    from transformers import AutoConfig, LlamaConfig

    config: Any = (
        LlamaConfig(**spec["llama"])
        if spec["llama"]
        else AutoConfig.from_pretrained(spec["base"], trust_remote_code=False)
    )
    width, ffn, heads = config.hidden_size, config.intermediate_size, config.num_attention_heads
    narrow = width // heads * (getattr(config, "num_key_value_heads", None) or heads)
    linears = {"q": (width, width), "k": (width, narrow), "v": (width, narrow), "o": (width, width)}
    linears |= {"gate": (width, ffn)} if spec["llama"] else {}
    linears |= {"up": (width, ffn), "down": (ffn, width)}
    return {
        "linears": linears,
        "last": {"lm_head": (width, config.vocab_size)} if spec["llama"] else {},
        "layers": config.num_hidden_layers,
        "heads": heads,
        "head_dim": width // heads,
    }


def _dtype(spec: dict[str, Any]) -> torch.dtype:
    from infuse.precision import dtype_of

    return torch.bfloat16 if spec["llama"] else dtype_of("auto")

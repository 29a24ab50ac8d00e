"""The table of architectures: where each role of a layer lives in a model of transformers.

One row per family, role → path below a layer. A path names a linear module; the role is that module's output,
except ``ffn_hidden``, which is always the *input* of the module that ``ffn_output`` names (the activation between
the two halves of the feed-forward block, after the non-linearity and, in gated blocks, after the gate).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

ROLES = {
    "query": "queries of an attention block",
    "key": "keys of an attention block",
    "value": "values of an attention block",
    "qkv": "queries, keys and values of a fused projection, as one activation",
    "attention_output": "output projection of an attention block",
    "cross_query": "queries of a decoder's attention over the encoder",
    "cross_key": "keys of a decoder's attention over the encoder",
    "cross_value": "values of a decoder's attention over the encoder",
    "cross_attention_output": "output projection of a decoder's attention over the encoder",
    "ffn_gate": "the half of a gated feed-forward block that goes through the non-linearity",
    "ffn_up": "up projection of a feed-forward block, before any non-linearity",
    "gate_up": "gate and up projection of a fused module, as one activation",
    "ffn_hidden": "input of the down projection, after the non-linearity",
    "ffn_output": "down projection of a feed-forward block",
}


@dataclass(frozen=True)
class Part:
    """One slice of a fused projection's output.

    ``of`` gives the relative widths of the slices, in order: numbers, or names of config attributes
    (``num_key_value_heads`` falls back to ``num_attention_heads``); ``index`` picks the slice.
    """

    path: str
    index: int
    of: tuple[int | str, ...]


@dataclass(frozen=True)
class Residual:
    """What is added to a sublayer's output: the input of the module at ``source`` (a path below the layer).

    ``norm`` is the path of the LayerNorm that follows the addition in post-norm layers; ``None`` in pre-norm ones.
    """

    source: str
    norm: str | None = None


@dataclass(frozen=True)
class Stack:
    """A list of alike layers: ``layers`` is its path (``*`` stands for an index), ``roles`` the paths below a layer.

    ``residuals`` says for the outputs of sublayers what is added to them.

    ``shared_inputs`` names the modules that also feed a tensor without batch dimension through a role's projection,
    with those of their arguments that do have one; under a mixed route such a module runs once per adapter.
    """

    layers: str
    roles: Mapping[str, str | Part]
    name: str = ""
    residuals: Mapping[str, Residual] = field(default_factory=dict)
    shared_inputs: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Arch:
    """A row of the table: the ``model_type`` values that it serves, its stacks, and how to pool a text from it.

    Attributes:
        packs: whether rows without padding give the same hidden states (see :mod:`infuse.packing`): all tokens of a
            text see each other, positions are absolute, and nothing but attention looks at other tokens.
        uncalled: paths of modules whose weights the model reads without calling them.
    """

    types: tuple[str, ...]
    stacks: tuple[Stack, ...]
    pooling: str = "mean"
    packs: bool = False
    uncalled: tuple[str, ...] = ()


def _bert(query="query", key="key", value="value") -> dict[str, str]:
    return {
        "query": f"attention.self.{query}",
        "key": f"attention.self.{key}",
        "value": f"attention.self.{value}",
        "attention_output": "attention.output.dense",
        "ffn_up": "intermediate.dense",
        "ffn_output": "output.dense",
    }


def _residuals(attention: Residual, ffn: Residual, cross: Residual | None = None) -> dict[str, Residual]:
    rows = {"attention_output": attention, "ffn_output": ffn}
    return rows | ({"cross_attention_output": cross} if cross else {})


_BERT_RESIDUALS = _residuals(
    Residual("attention", "attention.output.LayerNorm"), Residual("intermediate", "output.LayerNorm")
)


def _t5_attention(path: str, cross: str = "") -> dict[str, str]:
    return {
        f"{cross}query": f"{path}.q",
        f"{cross}key": f"{path}.k",
        f"{cross}value": f"{path}.v",
        f"{cross}attention_output": f"{path}.o",
    }


def _t5_ffn(layer: int) -> dict[str, str]:
    # `wi` exists in plain blocks, `wi_0` and `wi_1` in gated ones: a path that a model lacks is no site of it.
    ffn = f"layer.{layer}.DenseReluDense"
    return {"ffn_up": f"{ffn}.wi|{ffn}.wi_1", "ffn_gate": f"{ffn}.wi_0", "ffn_output": f"{ffn}.wo"}


def _bart_attention(path: str, cross: str = "") -> dict[str, str]:
    return {
        f"{cross}query": f"{path}.q_proj",
        f"{cross}key": f"{path}.k_proj",
        f"{cross}value": f"{path}.v_proj",
        f"{cross}attention_output": f"{path}.out_proj",
    }


_BART_FFN = {"ffn_up": "fc1", "ffn_output": "fc2"}
_BART_SELF = Residual("self_attn.q_proj", "self_attn_layer_norm")
_BART_OUT = Residual("fc1", "final_layer_norm")
_LLAMA = {
    "query": "self_attn.q_proj",
    "key": "self_attn.k_proj",
    "value": "self_attn.v_proj",
    "attention_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_output": "mlp.down_proj",
}
_PRE_NORM = _residuals(Residual("input_layernorm"), Residual("post_attention_layernorm"))
_THIRDS = (1, 1, 1)
_GROUPED_HEADS = ("num_attention_heads", "num_key_value_heads", "num_key_value_heads")


def _fused(path: str, of: tuple[int | str, ...], *roles: str) -> dict[str, Part]:
    return {role: Part(path, i, of) for i, role in enumerate(roles)}


ARCHS = [
    Arch(
        ("bert", "roberta", "xlm-roberta", "electra"),
        (Stack("encoder.layer", _bert(), residuals=_BERT_RESIDUALS),),
        packs=True,
    ),
    Arch(
        ("deberta-v2",),
        (
            Stack(
                "encoder.layer",
                _bert("query_proj", "key_proj", "value_proj"),
                residuals=_BERT_RESIDUALS,
                # The relative position embeddings pass the query and key projections as a batch of one.
                shared_inputs={"attention.self": ("hidden_states", "attention_mask", "query_states")},
            ),
        ),
        uncalled=("encoder.rel_embeddings",),
    ),
    Arch(
        ("distilbert",),
        (
            Stack(
                "transformer.layer",
                {
                    "query": "attention.q_lin",
                    "key": "attention.k_lin",
                    "value": "attention.v_lin",
                    "attention_output": "attention.out_lin",
                    "ffn_up": "ffn.lin1",
                    "ffn_output": "ffn.lin2",
                },
                residuals=_residuals(
                    Residual("attention.q_lin", "sa_layer_norm"), Residual("ffn.lin1", "output_layer_norm")
                ),
            ),
        ),
        packs=True,
    ),
    Arch(
        ("mpnet",),
        (
            Stack(
                "encoder.layer",
                {
                    "query": "attention.attn.q",
                    "key": "attention.attn.k",
                    "value": "attention.attn.v",
                    "attention_output": "attention.attn.o",
                    "ffn_up": "intermediate.dense",
                    "ffn_output": "output.dense",
                },
                residuals=_residuals(
                    Residual("attention", "attention.LayerNorm"), Residual("intermediate", "output.LayerNorm")
                ),
            ),
        ),
    ),
    Arch(
        # All depths run the same layers: one site serves them all, and so does one delta.
        ("albert",),
        (
            Stack(
                "encoder.albert_layer_groups.*.albert_layers",
                {
                    "query": "attention.query",
                    "key": "attention.key",
                    "value": "attention.value",
                    "attention_output": "attention.dense",
                    "ffn_up": "ffn",
                    "ffn_output": "ffn_output",
                },
                residuals=_residuals(
                    Residual("attention", "attention.LayerNorm"), Residual("ffn", "full_layer_layer_norm")
                ),
            ),
        ),
        packs=True,
    ),
    Arch(
        ("modernbert",),
        (
            Stack(
                "layers",
                {
                    **_fused("attn.Wqkv", _THIRDS, "query", "key", "value"),
                    "qkv": "attn.Wqkv",
                    "attention_output": "attn.Wo",
                    **_fused("mlp.Wi", (1, 1), "ffn_gate", "ffn_up"),
                    "gate_up": "mlp.Wi",
                    "ffn_output": "mlp.Wo",
                },
                residuals=_residuals(Residual("attn_norm"), Residual("mlp_norm")),
            ),
        ),
    ),
    Arch(
        ("t5", "mt5"),
        (
            Stack(
                "encoder.block",
                {**_t5_attention("layer.0.SelfAttention"), **_t5_ffn(1)},
                "encoder",
                residuals=_residuals(Residual("layer.0.layer_norm"), Residual("layer.1.layer_norm")),
            ),
            Stack(
                "decoder.block",
                {
                    **_t5_attention("layer.0.SelfAttention"),
                    **_t5_attention("layer.1.EncDecAttention", "cross_"),
                    **_t5_ffn(2),
                },
                "decoder",
                residuals=_residuals(
                    Residual("layer.0.layer_norm"), Residual("layer.2.layer_norm"), Residual("layer.1.layer_norm")
                ),
            ),
        ),
    ),
    Arch(
        ("bart",),
        (
            Stack(
                "encoder.layers",
                {**_bart_attention("self_attn"), **_BART_FFN},
                "encoder",
                residuals=_residuals(_BART_SELF, _BART_OUT),
            ),
            Stack(
                "decoder.layers",
                {**_bart_attention("self_attn"), **_bart_attention("encoder_attn", "cross_"), **_BART_FFN},
                "decoder",
                residuals=_residuals(_BART_SELF, _BART_OUT, Residual("encoder_attn.q_proj", "encoder_attn_layer_norm")),
            ),
        ),
        pooling="last",
    ),
    Arch(
        ("gpt2",),
        (
            Stack(
                "h",
                {
                    **_fused("attn.c_attn", _THIRDS, "query", "key", "value"),
                    "qkv": "attn.c_attn",
                    "attention_output": "attn.c_proj",
                    "ffn_up": "mlp.c_fc",
                    "ffn_output": "mlp.c_proj",
                },
                residuals=_residuals(Residual("ln_1"), Residual("ln_2")),
            ),
        ),
        pooling="last",
    ),
    Arch(("llama", "mistral", "qwen2", "qwen3"), (Stack("layers", _LLAMA, residuals=_PRE_NORM),), pooling="last"),
    Arch(
        # Norms before and after each sublayer: what is added to the stream is the normed output.
        ("gemma2", "gemma3_text"),
        (
            Stack(
                "layers",
                _LLAMA,
                residuals=_residuals(Residual("input_layernorm"), Residual("pre_feedforward_layernorm")),
            ),
        ),
        pooling="last",
    ),
    Arch(
        ("phi3",),
        (
            Stack(
                "layers",
                {
                    **_fused("self_attn.qkv_proj", _GROUPED_HEADS, "query", "key", "value"),
                    "qkv": "self_attn.qkv_proj",
                    "attention_output": "self_attn.o_proj",
                    **_fused("mlp.gate_up_proj", (1, 1), "ffn_gate", "ffn_up"),
                    "gate_up": "mlp.gate_up_proj",
                    "ffn_output": "mlp.down_proj",
                },
                residuals=_PRE_NORM,
            ),
        ),
        pooling="last",
    ),
]


def architectures() -> list[str]:
    """The ``model_type`` of every architecture in the table."""
    return [t for arch in ARCHS for t in arch.types]

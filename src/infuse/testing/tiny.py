"""Tiny random models of every architecture in the table."""

from typing import Any

import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModel, PreTrainedModel

VOCABULARY = 96
_ENCODER = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "vocab_size": VOCABULARY,
    "pad_token_id": 0,
}
_DECODER = _ENCODER | {"num_key_value_heads": 2, "head_dim": 8, "bos_token_id": 1, "eos_token_id": 2}
_T5 = {"d_model": 32, "d_ff": 48, "d_kv": 8, "num_heads": 4, "num_layers": 2, "vocab_size": VOCABULARY}

TINY: dict[str, dict[str, Any]] = {
    "bert": _ENCODER,
    "roberta": _ENCODER | {"pad_token_id": 1},
    "xlm-roberta": _ENCODER | {"pad_token_id": 1},
    "electra": _ENCODER | {"embedding_size": 16},
    "deberta-v2": _ENCODER
    | {
        "relative_attention": True,
        "pos_att_type": ["c2p", "p2c"],
        "share_att_key": True,
        "position_buckets": 8,
        "norm_rel_ebd": "layer_norm",
        "type_vocab_size": 0,
        "position_biased_input": False,
    },
    "distilbert": {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48, "vocab_size": VOCABULARY},
    "mpnet": _ENCODER | {"pad_token_id": 1},
    "albert": _ENCODER | {"embedding_size": 16, "num_hidden_layers": 4, "num_hidden_groups": 2, "inner_group_num": 1},
    "modernbert": _ENCODER
    | {"bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2, "local_attention": 8},
    "t5": _T5 | {"feed_forward_proj": "relu"},
    "mt5": _T5 | {"feed_forward_proj": "gated-gelu"},
    "bart": {
        "d_model": 32,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 48,
        "decoder_ffn_dim": 48,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 64,
    },
    "gpt2": {
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "n_inner": 48,
        "vocab_size": VOCABULARY,
        "n_positions": 64,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    },
    "llama": _DECODER,
    "mistral": _DECODER,
    "qwen2": _DECODER,
    "qwen3": _DECODER,
    "gemma2": _DECODER,
    "gemma3_text": _DECODER,
    "phi3": _DECODER | {"num_key_value_heads": 2},
}
"""Architecture → settings of a model with two layers, 32 features and four heads."""


def tiny(kind: str, auto: Any = AutoModel, seed: int = 0, **settings: Any) -> PreTrainedModel:
    """A tiny random model of an architecture, in eval mode, with weights large enough that every part matters.

    Args:
        kind: a key of :data:`TINY`.
        auto: the auto class, e.g. ``AutoModelForSequenceClassification``.
        seed: of the random weights; torch's global generator is left as it was.
        settings: more settings of the configuration (``num_labels=3``).
    """
    config = CONFIG_MAPPING[kind](**TINY[kind] | settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = auto.from_config(config, attn_implementation="eager", trust_remote_code=False)
        for parameter in model.parameters():
            # The usual σ of 0.02 at this width leaves attention so flat that scaled keys change nothing measurable.
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def inputs(model: PreTrainedModel, rows: int = 3, length: int = 7, seed: int = 0) -> dict[str, Tensor]:
    """A random batch for a tiny model, padded at the end of all rows but the first."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(1, rows):
        mask[row, length - 1 - row % 3 :] = 0
    ids = ids.masked_fill(mask == 0, model.config.pad_token_id or 0)
    batch = {"input_ids": ids, "attention_mask": mask}
    if model.config.model_type in ("t5", "mt5") and hasattr(model, "decoder"):
        batch["decoder_input_ids"] = torch.randint(3, VOCABULARY, (rows, length), generator=generator)
    return batch

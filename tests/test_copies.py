"""Trained copies of the base's modules, and weights that modules share."""

import re

import pytest
import torch
from transformers import AutoModelForCausalLM

import infuse
from infuse import InfuseError, LoRA
from infuse.adapter import build
from infuse.model import attach_at
from infuse.sites import find_sites, site_at
from infuse.testing import inputs, tiny, wake
from infuse.testing.conformance import close, output


def language_model(trained=(), **settings):
    """A LLaMA with copies of some modules, or with a delta at ``lm_head``."""
    model = tiny("llama", AutoModelForCausalLM, **settings)
    sites = find_sites(model)[:1] if trained else [site_at(model, "lm_head")]
    attach_at(model, build("a", LoRA(rank=2), sites), trained=trained)
    wake(model, "a")
    return model


@pytest.mark.parametrize(
    "trained, pair",
    [((), ("lm_head", "model.embed_tokens")), (["lm_head"], ("lm_head", "model.embed_tokens")),
     (["model.embed_tokens"], ("model.embed_tokens", "lm_head"))],
)  # fmt: skip
def test_an_adapter_at_a_tied_weight_is_not_merged(trained, pair):
    model = language_model(trained, tie_word_embeddings=True)
    batch, before = inputs(model), {n: p.clone() for n, p in model.named_parameters()}
    expected = output(model, batch)
    with pytest.raises(InfuseError, match=f"'a' can't be merged: {pair[0]} shares its weight with {pair[1]},"):
        infuse.merge(model, "a")
    assert torch.equal(output(model, batch), expected)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    untied = language_model(trained, tie_word_embeddings=False)
    expected = output(untied, batch)
    infuse.merge(untied, "a")
    close(output(untied, batch), expected)


def test_a_weight_tied_outside_the_adapted_module_is_not_merged():
    model = tiny("llama", AutoModelForCausalLM, tie_word_embeddings=True)
    infuse.attach(model.model, LoRA(rank=2), "a", trained=["embed_tokens"])
    with pytest.raises(InfuseError, match=re.escape("model.embed_tokens shares its weight with lm_head")):
        infuse.merge(model, "a")


def test_a_copy_of_a_module_that_runs_several_times_is_merged():
    model = tiny("albert")
    infuse.attach(model, LoRA(rank=2), "a", trained=["encoder.albert_layer_groups.0.albert_layers.0.ffn_output"])
    wake(model, "a")
    expected = output(model, inputs(model))
    infuse.merge(model, "a")
    close(output(model, inputs(model)), expected)

"""Trained copies of the base's modules, and weights that modules share."""

import copy
import re

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForMultipleChoice, AutoModelForQuestionAnswering, Cache

import infuse
from infuse import InfuseError, LoRA
from infuse.adapter import build, key
from infuse.model import attach_at
from infuse.sites import find_sites, site_at
from infuse.testing import TINY, inputs, tiny, wake
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


def called(model):
    """Paths of the modules that a forward pass calls, and of those that it gives a key-value cache."""
    seen, cached, handles = set(), set(), []
    for path, module in model.named_modules():

        def note(module, args, kwargs, path=path):
            seen.add(path)
            if any(isinstance(value, Cache) for value in (*args, *kwargs.values())):
                cached.add(path)

        handles.append(module.register_forward_pre_hook(note, with_kwargs=True))
    output(model, inputs(model))
    for handle in handles:
        handle.remove()
    return seen, cached


@pytest.mark.parametrize("kind", TINY)
def test_a_copy_stands_in_for_its_module_or_is_refused(kind):
    model, other = tiny(kind), tiny(kind)
    batch = inputs(model)
    seen, cached = called(other)
    bare = output(model, batch)
    for path, module in list(other.named_modules()):
        if not path or re.search(r"\.[1-9]\.", path) or not list(module.parameters()):
            continue
        try:
            adapter = infuse.attach(model, "head", "a", trained=[path])
        except InfuseError as error:
            assert f"its own copy of {path}: " in str(error) and not hasattr(model, "infuse")
            # A decoder makes the cache that it is not given: such a copy is right outside of generation.
            assert path not in seen - cached or path == "decoder", path
            continue
        wake(model, "a")
        other.set_submodule(path, copy.deepcopy(adapter.copies[key(path)]).eval())
        close(output(model, batch), output(other, batch))
        other.set_submodule(path, module)
        infuse.detach(model)
    assert torch.equal(output(model, batch), bare)


@torch.no_grad()
@pytest.mark.parametrize("tokens", [7, 3], ids=["more tokens than texts", "as many"])
@pytest.mark.parametrize("kind", TINY)
def test_a_copy_shares_a_batch_or_is_refused(kind, tokens):
    """Modules whose output has no row for each text (relative positions, tuples) can't be put together by rows."""
    model = tiny(kind)
    batch, names = {name: value[:, :tokens] for name, value in inputs(model).items()}, ["a", None, "a"]
    mixed = set()
    for path, module in list(model.named_modules()):
        if not path or re.search(r"\.[1-9]\.", path) or not list(module.parameters()):
            continue
        try:
            infuse.attach(model, "head", "a", trained=[path])
        except InfuseError:
            continue
        wake(model, "a")
        try:
            together = output(model, batch, names)
        except InfuseError as error:
            assert "can't share a batch" in str(error) and path in str(error)
        else:
            mixed.add(path)
            close(together, torch.stack([output(model, batch, name)[row] for row, name in enumerate(names)]))
        infuse.detach(model)
    assert len(mixed) > 5


@pytest.mark.parametrize(
    "kind, target, saved, message",
    [("deberta-v2", "query_proj", "rel_embeddings", "encoder.rel_embeddings: the model reads its weight"),
     ("bart", "fc1", "encoder_attn", "encoder_attn: the original's call fills the key-value cache"),
     ("t5", "wo", "EncDecAttention", "EncDecAttention: the original's call fills the key-value cache"),
     ("llama", "down_proj", "self_attn", "self_attn: the original's call fills the key-value cache")],
)  # fmt: skip
def test_a_file_with_a_copy_that_can_not_act_is_refused(kind, target, saved, message, tmp_path):
    config = LoraConfig(target_modules=[target], modules_to_save=[saved])
    get_peft_model(tiny(kind), config).save_pretrained(tmp_path)
    model = tiny(kind)
    with pytest.raises(InfuseError, match=message):
        infuse.load(model, tmp_path, name="a")
    assert not hasattr(model, "infuse") and all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    "auto, kind, head",
    [(AutoModelForQuestionAnswering, "bert", ["qa_outputs"]), (AutoModelForQuestionAnswering, "t5", ["qa_outputs"]),
     (AutoModelForQuestionAnswering, "modernbert", ["head", "classifier"]),
     (AutoModelForMultipleChoice, "deberta-v2", ["pooler", "classifier"])],
)  # fmt: skip
def test_heads_that_start_at_random_are_trained(auto, kind, head):
    assert list(infuse.attach(tiny(kind, auto), LoRA(), "a").copies) == head


def test_a_list_of_modules_has_no_copy():
    model = tiny("bert")
    infuse.attach(model, "lora", "a")
    with pytest.raises(InfuseError, match=re.escape("copy of encoder.layer: a ModuleList is never called; name the")):
        infuse.attach(model, "lora", "b", trained=["encoder.layer"])
    assert list(model.infuse.adapters) == ["a"]

"""Embeddings that a PEFT file brings along, because tokens were added: right, or refused by the vocabulary's sizes."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from test_files import CONFIG, WEIGHTS, rewrite, untouched
from test_peft import moved, targets
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
)

import infuse
from infuse import InfuseError
from infuse.testing import TINY, inputs, tiny
from infuse.testing.conformance import close

TOKENS = 101
CAUSAL, SEQ2SEQ = (AutoModelForCausalLM, {}), (AutoModelForSeq2SeqLM, {})
HEADS = {
    "t5": SEQ2SEQ, "mt5": SEQ2SEQ, "bart": SEQ2SEQ, "gpt2": CAUSAL, "llama": CAUSAL,
    "bert": (AutoModelForMaskedLM, {}), "roberta": (AutoModelForMaskedLM, {}), "albert": (AutoModelForMaskedLM, {}),
    "modernbert": (AutoModelForSequenceClassification, {"num_labels": 3}),
}  # fmt: skip
"""Classes with an output layer over the vocabulary, where a kind has one; else the bare model."""


def make(kind, resized=None, **settings):
    """A model whose vocabulary has grown, with new rows that depend on ``resized``."""
    auto, more = HEADS.get(kind, (AutoModel, {}))
    model = tiny(kind, auto, **more, **settings)
    if resized is not None:
        torch.manual_seed(resized)
        model.resize_token_embeddings(TOKENS, mean_resizing=False)
    return model.eval()


def batch_of(model):
    batch = inputs(model)
    batch["input_ids"][:, 1] = TOKENS - 2  # a new token
    return batch


def result(out):
    return out["logits"] if "logits" in out else out["last_hidden_state"]


def peft_file(folder, kind, modules=None, **settings):
    """A file with the embeddings in it, and what PEFT's model answers."""
    model = make(kind, 1, **settings)
    batch = batch_of(model)
    names = [targets_of(kind)] if modules is None else modules
    theirs = moved(get_peft_model(model, LoraConfig(r=2, target_modules=names)))
    theirs.save_pretrained(folder, save_embedding_layers=True)
    with torch.no_grad():
        return batch, result(theirs(**batch))


def targets_of(kind):
    return targets(kind)[0]


@torch.no_grad()
def answers(model, batch, names="a"):
    with infuse.route(model, names):
        return result(model(**batch))


CASES = [*((kind, {}) for kind in TINY), ("llama", {"tie_word_embeddings": True})]


@pytest.mark.parametrize("kind, settings", CASES, ids=str)
@pytest.mark.filterwarnings("ignore:.*fan_in_fan_out")
def test_a_resized_vocabulary(kind, settings, tmp_path):
    batch, expected = peft_file(tmp_path / "theirs", kind, **settings)
    ours = make(kind, 2, **settings)
    before = {name: value.clone() for name, value in ours.state_dict().items()}
    bare = answers_of_base(ours, batch)
    infuse.load(ours, tmp_path / "theirs", name="a")
    close(answers(ours, batch), expected)
    assert all(torch.equal(value, before[n]) for n, value in ours.state_dict().items() if not n.startswith("infuse."))

    mixed = answers(ours, batch, ["a", None, "a"])
    close(mixed, torch.stack([expected[0], bare[1], expected[2]]))

    infuse.save(ours, "a", tmp_path / "ours")
    again = make(kind, 3, **settings)
    infuse.load(again, tmp_path / "ours", name="a")
    assert torch.equal(answers(again, batch), answers(ours, batch))
    if HEADS.get(kind) is not SEQ2SEQ:  # there PEFT's own copy of what both stacks share is one that neither calls
        theirs = PeftModel.from_pretrained(make(kind, 3, **settings), tmp_path / "ours").eval()
        with torch.no_grad():
            close(result(theirs(**batch)), expected)

    try:
        infuse.merge(ours, "a")
    except InfuseError as error:
        assert "shares its weight" in str(error)
    else:
        close(answers(ours, batch), expected)
        infuse.unmerge(ours)
    infuse.detach(ours)
    assert torch.equal(answers_of_base(ours, batch), bare)

    smaller = make(kind, **settings)
    for folder in ("theirs", "ours"):
        message = (
            rf"vocabulary has {TOKENS} tokens at .*, and this model's has 96: .*resize_token_embeddings\({TOKENS}\)"
        )
        with untouched(smaller), pytest.raises(InfuseError, match=message):
            infuse.load(smaller, tmp_path / folder, name="a")


@torch.no_grad()
def answers_of_base(model, batch):
    return result(model(**batch))


def test_embeddings_under_one_name_reach_all_that_share_them(tmp_path):
    """A file that lacks the output layer, which PEFT fills by its tie."""
    batch, expected = peft_file(tmp_path, "llama", tie_word_embeddings=True)

    tensors = {name: t for name, t in load_file(tmp_path / WEIGHTS).items() if "lm_head" not in name}
    save_file(tensors, tmp_path / WEIGHTS)
    ours = make("llama", 2, tie_word_embeddings=True)
    adapter = infuse.load(ours, tmp_path, name="a")
    assert set(adapter.copies) == {"model/embed_tokens", "lm_head"}
    close(answers(ours, batch), expected)
    untied = make("llama", 2, tie_word_embeddings=False)
    assert set(infuse.load(untied, tmp_path, name="a").copies) == {"model/embed_tokens"}


@pytest.mark.parametrize("tied", [True, False])
def test_an_adapter_at_the_output_layer_of_a_resized_vocabulary(tied, tmp_path):
    """The base's output layer lies under its delta, so that no copy can take its place."""
    batch, expected = peft_file(tmp_path, "llama", ["q_proj", "lm_head"], tie_word_embeddings=tied)
    same, other, small = (make("llama", seed, tie_word_embeddings=tied) for seed in (1, 2, None))
    infuse.load(same, tmp_path, name="a")
    close(answers(same, batch), expected)
    with untouched(other), pytest.raises(InfuseError, match="brings a base weight of its own"):
        infuse.load(other, tmp_path, name="a")
    with untouched(small), pytest.raises(InfuseError, match=r"resize_token_embeddings\(101\)"):
        infuse.load(small, tmp_path, name="a")


@pytest.mark.parametrize("tied", [True, False])
def test_embeddings_that_were_trained_are_those_of_the_modules_that_were_named(tied, tmp_path):
    """PEFT trains its own copy of one of the two, and leaves the other as it is in the base."""
    model = make("llama", 1, tie_word_embeddings=tied)
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens"])
    theirs = moved(get_peft_model(model, config))
    batch = batch_of(model)
    theirs.save_pretrained(tmp_path, save_embedding_layers=False)
    ours = make("llama", 1, tie_word_embeddings=tied)
    assert list(infuse.load(ours, tmp_path, name="a").copies) == ["model/embed_tokens"]
    with torch.no_grad():
        close(answers(ours, batch), result(theirs(**batch)))


# Modules that a file names as trained


def classifier(kind="bert", auto=AutoModelForSequenceClassification, **settings):
    return tiny(kind, auto, **settings)


@pytest.mark.parametrize("kind", ["bert", "roberta", "distilbert", "modernbert", "llama"])
def test_a_module_named_as_trained_without_tensors_is_refused(kind, tmp_path):
    """Its head would answer at random."""
    theirs = moved(
        get_peft_model(classifier(kind, num_labels=3), LoraConfig("SEQ_CLS", target_modules=[targets(kind)[0]]))
    )
    theirs.save_pretrained(tmp_path)
    ours = classifier(kind, num_labels=3)
    infuse.load(ours, tmp_path, name="a")
    infuse.detach(ours)
    tensors = load_file(tmp_path / WEIGHTS)

    heads = ("classifier", "score")
    save_file({n: t for n, t in tensors.items() if not any(head in n for head in heads)}, tmp_path / WEIGHTS)
    with untouched(ours), pytest.raises(InfuseError, match=r"names '(classifier|score)' as trained .*no tensors for"):
        infuse.load(ours, tmp_path, name="a")
    bare = tiny(kind)
    assert not infuse.load(bare, tmp_path, name="a").copies  # it has no such module, and needs none


def test_modules_to_save_by_path_and_by_the_end_of_a_name(tmp_path):
    folder = infuse.save(*attached(["pooler"]), tmp_path / "x")
    about = json.loads((folder / CONFIG).read_text())
    assert about["modules_to_save"] == ["pooler"]

    rewrite(folder, lambda tensors: {n: t for n, t in tensors.items() if "pooler" not in n})
    with pytest.raises(InfuseError, match="names 'pooler' as trained"):
        infuse.load(tiny("bert"), folder, name="b")


def attached(trained):
    model = tiny("bert")
    infuse.attach(model, "lora:rank=2", "a", trained=trained)
    return model, "a"


def test_tensors_of_a_trained_module_that_the_models_lacks_are_refused(tmp_path):

    folder = infuse.save(*attached(["pooler"]), tmp_path / "x")
    rewrite(folder, lambda tensors: tensors | {"base_model.model.pooler.dense.scale": torch.ones(2)})
    with pytest.raises(InfuseError, match=r"copy of pooler has dense\.scale, which"):
        infuse.load(tiny("bert"), folder, name="b")


# The base that a file names


@pytest.mark.parametrize(
    "made, have, warns",
    [("org/one", "org/two", True), ("org/one", "one", False), ("org/one", "/models/One/", False),
     ("/home/x/one", "other/one", False), ("one@main", "org/one", False), (None, "org/two", False),
     ("org/one", "", False),
     ("org/one", "/hub/models--org--one/snapshots/0123abcd", False), ("C:\\models\\one", "one", False),
     ("x\x1b[2J", "org/two", True), (".", "org/two", False)],
)  # fmt: skip
@pytest.mark.parametrize("form", ["peft", "adapterhub"])
def test_another_base_by_name_is_a_warning(form, made, have, warns, tmp_path, recwarn):
    folder = infuse.save(*attached([]), tmp_path / "x", format="infuse" if form == "peft" else form)
    if form == "peft":
        save_file(load_file(folder / WEIGHTS), folder / WEIGHTS)
    about = json.loads((folder / CONFIG).read_text())
    about["base_model_name_or_path" if form == "peft" else "model_name"] = made
    (folder / CONFIG).write_text(json.dumps(about))
    model = tiny("bert")
    model.name_or_path = have
    recwarn.clear()
    infuse.load(model, folder, name="b")
    told = [str(w.message) for w in recwarn if "made for" in str(w.message)]
    assert len(told) == warns and all(text.isprintable() and repr(have) in text for text in told)
    recwarn.clear()
    infuse.load(model, folder, name="c", any_base=True)
    assert not [w for w in recwarn if "made for" in str(w.message)]

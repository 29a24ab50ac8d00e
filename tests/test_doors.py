"""Doors of others: Trainer, save_pretrained, optimizers, DistributedDataParallel, SentenceTransformer."""

import copy
import warnings

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForSequenceClassification, Trainer, TrainingArguments

import infuse
from infuse import InfuseError
from infuse.store import store_of
from infuse.testing import inputs, tiny, wake
from infuse.testing.conformance import close, output

KINDS = ["bert", "gpt2", "llama", "deberta-v2"]
METHODS = ["lora:rank=2", "lora:rank=2,dora=true", "ia3", "pfeiffer:width=4", "compacter:width=8", "head"]


def classifier(kind):
    torch.manual_seed(1)
    return tiny(kind, AutoModelForSequenceClassification, num_labels=3).eval()


def adapted(kind, method, name="a"):
    model = classifier(kind)
    infuse.attach(model, method, name)
    wake(model, name, size=0.3)
    return model


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", METHODS)
def test_checkpoints_of_whole_models_are_loaded(kind, method, tmp_path):
    model = adapted(kind, method)
    infuse.attach(model, "ia3", "other")
    wake(model, "other", 1)
    infuse.activate(model, "a")
    expected = output(model, inputs(model))
    model.save_pretrained(tmp_path / "whole")
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    for folder in ("whole", "shards"):
        for name in (None, "a", "new"):
            loaded = classifier(kind)
            infuse.load(loaded, tmp_path / folder, name)
            close(output(loaded, inputs(model)), expected)
        other = classifier(kind)
        infuse.load(other, tmp_path / folder, "other")
        close(output(other, inputs(model)), output(model, inputs(model), "other"))
    again = adapted(kind, method)
    infuse.attach(again, "ia3", "other")
    again.load_state_dict(model.state_dict())
    close(output(again, inputs(model), "a"), expected)


def test_fusions_in_checkpoints_bring_their_members(tmp_path):
    model = adapted("bert", "pfeiffer:width=4")
    infuse.attach(model, "pfeiffer:width=4", "b")
    wake(model, "b", 2, 0.3)
    infuse.fuse(model, ["a", "b"], name="f")
    wake(model, "f", 3, 0.1)
    model.save_pretrained(tmp_path)
    loaded = classifier("bert")
    infuse.load(loaded, tmp_path)
    assert list(store_of(loaded).adapters) == ["a", "b", "f"]
    close(output(loaded, inputs(model)), output(model, inputs(model)))


def test_checkpoints_that_do_not_fit_are_told(tmp_path):
    model = adapted("bert", "lora:rank=2")
    model.save_pretrained(tmp_path / "a")
    classifier("bert").save_pretrained(tmp_path / "plain")
    with pytest.raises(InfuseError, match="holds a model without adapters"):
        infuse.load(classifier("bert"), tmp_path / "plain")
    other = adapted("bert", "lora:rank=2,alpha=4")
    with pytest.raises(InfuseError, match="has another method of the adapter 'a'"):
        other.load_state_dict(load_file(tmp_path / "a" / "model.safetensors"))
    (tmp_path / "a" / "model.safetensors").write_bytes((tmp_path / "a" / "model.safetensors").read_bytes()[:-100])
    with pytest.raises(InfuseError, match="truncated"):
        infuse.load(classifier("bert"), tmp_path / "a")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", [method for method in METHODS if infuse.make(method).mergeable])
def test_a_merged_model_is_saved_as_a_plain_one(kind, method, tmp_path):
    model = adapted(kind, method)
    expected = output(model, inputs(model))
    infuse.merge(model, "a")
    assert not [name for name in model.state_dict() if "infuse" in name]
    model.load_state_dict(model.state_dict())
    model.save_pretrained(tmp_path)
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    close(output(plain, inputs(model)), expected, 1e-4)
    before = copy.deepcopy(model.infuse["a"].state_dict())
    with torch.no_grad():
        for name, parameter in model.named_parameters():  # as if somebody trained the merged model further
            if not name.startswith("infuse."):
                parameter.zero_()
    assert all(torch.equal(value, before[name]) for name, value in model.infuse["a"].state_dict().items())


def test_a_merge_into_weights_that_are_replaced_is_not_undone():
    model = adapted("bert", "lora:rank=2")
    infuse.merge(model, "a")
    plain = classifier("bert")
    plain.load_state_dict(model.state_dict())
    quantised, expected = (
        torch.ao.quantization.quantize_dynamic(each, {nn.Linear}, dtype=torch.qint8) for each in (model, plain)
    )
    assert torch.equal(output(quantised, inputs(model)), output(expected, inputs(model)))
    with pytest.raises(InfuseError, match="the merge can't be undone"):
        infuse.unmerge(quantised)


def flags(model):
    return {name: any(p.requires_grad for p in model.infuse[name].parameters()) for name in model.infuse.adapters}


def test_only_what_is_trained_gets_gradients():
    model = adapted("bert", "pfeiffer:width=4")
    infuse.attach(model, "pfeiffer:width=4", "b")
    assert flags(model) == {"a": False, "b": True}
    infuse.activate(model, "a")
    assert flags(model) == {"a": True, "b": False}
    infuse.activate(model, "a", trainable=["a", "b"])
    assert flags(model) == {"a": True, "b": True}
    infuse.activate(model, None)
    assert flags(model) == {"a": False, "b": False}
    with infuse.route(model, ["a", "b", None]):
        output(model, inputs(model)).square().mean().backward()
    assert flags(model) == {"a": True, "b": True}
    assert all(p.grad is not None for name in "ab" for p in model.infuse[name].deltas.parameters())
    with pytest.raises(InfuseError, match="Unknown adapter 'c'"):
        infuse.activate(model, "a", trainable=["c"])


def test_members_are_free_again_when_their_fusion_is_gone():
    model = adapted("bert", "pfeiffer:width=4")
    infuse.attach(model, "pfeiffer:width=4", "b")
    infuse.fuse(model, ["a", "b"], name="f")
    assert flags(model) == {"a": False, "b": False, "f": True}
    infuse.activate(model, "a")
    assert flags(model) == {"a": False, "b": False, "f": False}
    infuse.detach(model, "f")
    infuse.activate(model, "a")
    assert flags(model) == {"a": True, "b": False}
    frozen = model.infuse["a"]
    frozen.requires_grad_(False)  # by hand: it stays so
    infuse.activate(model, "b")
    infuse.activate(model, "a")
    assert flags(model) == {"a": False, "b": False}


def test_a_fusion_on_a_classifier_trains_a_head():
    model = classifier("bert")
    for name in "ab":
        infuse.attach(model, "pfeiffer:width=4", name, trained=())
    base = copy.deepcopy(model.classifier.state_dict())
    fused = infuse.fuse(model, ["a", "b"], name="f")
    assert list(fused.copies) == ["classifier"]
    batch, labels = inputs(model, rows=12), torch.arange(12) % 3
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 0.02)
    losses = []
    for _ in range(60):
        losses.append(nn.functional.cross_entropy(model(**batch).logits, labels))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.1 < losses[0]
    assert all(torch.equal(value, base[name]) for name, value in model.classifier.state_dict().items())
    assert not infuse.fuse(model, ["a", "b"], name="g", trained=()).copies


def test_one_trainer_trains_one_adapter_after_the_other(tmp_path):
    model = classifier("bert")
    infuse.attach(model, "lora:rank=2", "a")
    infuse.attach(model, "houlsby:width=4", "b")
    batch = inputs(model, rows=8)
    rows = [{**{k: v[i] for k, v in batch.items()}, "labels": torch.tensor(i % 3)} for i in range(8)]
    arguments = TrainingArguments(
        str(tmp_path), num_train_epochs=2, per_device_train_batch_size=4, learning_rate=0.05, weight_decay=0.1,
        save_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True, logging_strategy="no",
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=rows)
    for name, other in ("ab", "ba"):
        infuse.activate(model, name)
        before = copy.deepcopy({each: model.infuse[each].state_dict() for each in "ab"})
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            trainer.train()
        same = {e: all(torch.equal(v, before[e][n]) for n, v in model.infuse[e].state_dict().items()) for e in "ab"}
        assert same == {name: False, other: True}
        assert any("b joins it" in str(each.message) for each in said) == (name == "b")


@pytest.fixture(scope="module")
def encoder():
    from sentence_transformers import SentenceTransformer

    from infuse.bases import locate

    model = SentenceTransformer(locate("minilm"), device="cpu")
    for seed, name in enumerate("ab"):
        infuse.attach(model, "lora:rank=2", name)
        wake(model, name, seed)
    return model


TEXTS = [
    "short",
    "a text of a middling length, with some words",
    "the longest text of all has many more words than both",
]


def test_sentence_transformers_encode_in_the_order_of_the_route(encoder):
    alone = {}
    for name in ("a", "b", None):
        with infuse.route(encoder, name):
            alone[name] = encoder.encode(TEXTS)
    assert not np.allclose(alone["a"], alone["b"], atol=1e-3)
    for names in (["a", "b", None], [None, "a", "a"], ["b", "b", "b"]):
        expected = np.stack([alone[name][row] for row, name in enumerate(names)])
        with infuse.route(encoder, names):
            np.testing.assert_allclose(encoder.encode(TEXTS), expected, atol=1e-5)
            tensors = encoder.encode(TEXTS, convert_to_tensor=True, batch_size=2)
        np.testing.assert_allclose(tensors.numpy(), expected, atol=1e-5)
        np.testing.assert_allclose(encoder.encode(TEXTS, route=names), expected, atol=1e-5)
    with infuse.route(encoder, ["a", "b"]), pytest.raises(InfuseError, match="2 entries, but encode got 3 texts"):
        encoder.encode(TEXTS)


def test_a_model_inside_a_sentence_transformer_is_followed_or_refused(encoder):
    from sentence_transformers import SentenceTransformer

    from infuse.bases import locate

    other = SentenceTransformer(locate("minilm"), device="cpu")
    inner = store_of(encoder).owner
    part = next(m for m in other.modules() if type(m) is type(inner))
    infuse.attach(part, "lora:rank=2", "a")
    wake(part, "a", size=0.3)
    with infuse.route(part, ["a", None, None]), pytest.raises(InfuseError, match=r"infuse\.route the SentenceTransf"):
        other.encode(TEXTS)
    with infuse.route(other, "a"):
        alone = other.encode(TEXTS)
    with infuse.route(other, ["a", None, None]):
        np.testing.assert_allclose(other.encode(TEXTS)[0], alone[0], atol=1e-5)


def test_a_sentence_transformer_is_trained_and_saved(encoder, tmp_path):
    from sentence_transformers import SentenceTransformer

    from infuse.bases import locate

    infuse.activate(encoder, "a")
    encoder.train()
    optimizer = torch.optim.AdamW([p for p in encoder.parameters() if p.requires_grad], 1e-3)
    out = encoder(encoder.tokenize(TEXTS))["sentence_embedding"]
    out.square()[:, 0].sum().backward()
    optimizer.step()
    encoder.eval()
    expected = encoder.encode(TEXTS)
    infuse.save(encoder, "a", tmp_path / "adapter")
    encoder.save_pretrained(str(tmp_path / "whole"))
    for folder in ("adapter", "whole"):
        loaded = SentenceTransformer(locate("minilm"), device="cpu")
        infuse.load(loaded, tmp_path / folder, "a")
        np.testing.assert_allclose(loaded.encode(TEXTS), expected, atol=1e-5)
    infuse.merge(encoder, "a")
    encoder.save_pretrained(str(tmp_path / "merged"))
    plain = SentenceTransformer(str(tmp_path / "merged"), device="cpu")
    np.testing.assert_allclose(plain.encode(TEXTS), expected, atol=1e-4)
    infuse.unmerge(encoder)

"""Packed batches: tokens as rows, put together for attention and taken apart again."""

import pickle
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForSequenceClassification

import infuse
from infuse import heads, packing
from infuse.attention import choose
from infuse.heads import Head
from infuse.model import store_of
from infuse.packing import Packed, pack
from infuse.sites import arch_of
from infuse.testing import inputs, tiny
from infuse.testing.conformance import close, output, wake


def mask_of(lengths: list[int], left: bool = False) -> torch.Tensor:
    at = torch.arange(max(lengths))
    mask = (at < torch.tensor(lengths)[:, None]).long()
    return mask.flip(1) if left else mask


def batch_of(model, lengths: list[int], left: bool = False) -> dict[str, torch.Tensor]:
    mask = mask_of(lengths, left)
    batch = inputs(model, rows=len(lengths), length=mask.shape[1])
    ids = batch["input_ids"].masked_fill(mask == 0, model.config.pad_token_id)
    return {"input_ids": ids, "attention_mask": mask}


@settings(max_examples=60, deadline=None)
@given(lengths=st.lists(st.integers(1, 150), min_size=1, max_size=12), left=st.booleans())
def test_rows_go_together_and_apart(lengths, left):
    mask = mask_of(lengths, left)
    numbers = torch.arange(mask.numel()).view_as(mask)
    packed = Packed({"input_ids": numbers, "attention_mask": mask}, numbers)
    rows = packed.batch["input_ids"][:, 0]
    count = sum(lengths)
    assert len(rows) % 32 == 0 and len(rows) - count < max(32, count / 16)
    assert len({n + -n % packing.step(n) for n in range(1, 4097)}) == 64
    assert torch.equal(rows[:count], numbers[mask.bool()])
    assert packed.owners[:count].tolist() == [text for text, n in enumerate(lengths) for _ in range(n)]
    together = packed.together(rows)
    for block, real in zip(together, packed.blocks, strict=True):
        assert block.shape[1] % 16 == 0
        for text, its in zip(block, real, strict=True):
            own = text[its].tolist()
            assert own == numbers[own[0] // mask.shape[1]][mask[own[0] // mask.shape[1]].bool()].tolist()
    assert torch.equal(packed.apart(together)[:count], rows[:count])
    assert torch.equal(packed.padded(rows)[mask.bool()], numbers[mask.bool()])


@pytest.fixture
def model():
    return adapted(torch.float32)


def adapted(dtype):
    model = tiny("roberta", max_position_embeddings=80).to(dtype)
    choose(model)
    for seed, name in enumerate("ab"):
        infuse.attach(model, "lora", name).head = Head("linear", ["x", "y", "z"], 32, "mean")
        wake(model, name, seed)
    return model


@torch.no_grad()
@pytest.mark.parametrize("left", [False, True])
def test_positions_are_those_of_the_padded_batch(model, left):
    batch = batch_of(model, [40, 5, 9, 20], left)
    batch["input_ids"][0, 20] = model.config.pad_token_id  # a text may hold the padding token: it gets no position
    packed, padded = (heads.run(model, batch, ["a", "b", None, "a"], packs) for packs in (True, False))
    real = batch["attention_mask"].bool()
    close(packed["last_hidden_state"][real], padded["last_hidden_state"][real])


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mixed_batches_are_packed_where_it_spares_padding(dtype, monkeypatch):
    model, calls = adapted(dtype), []
    monkeypatch.setattr(heads, "pack", lambda *given: calls.append(pack(*given)) or calls[-1])
    batch = batch_of(model, [40, 5, 9, 3])
    together = heads.classify(model, batch, list("abba"))
    assert isinstance(calls[-1], Packed)
    for row, name in enumerate("abba"):
        length = int(batch["attention_mask"][row].sum())
        (alone,) = heads.classify(model, {k: v[row : row + 1, :length] for k, v in batch.items()}, [name])
        assert calls[-1] is None
        close(together[row], alone, 1e-5 if dtype is torch.float32 else 0.03)


def test_what_is_not_packed(model):
    arch, batch = arch_of(model), batch_of(model, [40, 5, 9, 3])
    with torch.no_grad():
        assert pack(model, arch, batch) is not None
        assert pack(model, arch, batch_of(model, [40, 39, 39, 40])) is None, "little padding"
        assert pack(model, arch, batch_of(model, [9, 1, 2])) is None, "a small batch"
        assert pack(model, arch, {**batch, "attention_mask": batch["attention_mask"] * 0}) is None, "an empty text"
        embeds = torch.zeros(4, 40, 32)
        assert pack(model, arch, {**batch, "inputs_embeds": embeds}) is None, "other shapes"
        model.config.is_decoder = True
        assert pack(model, arch, batch) is None, "a decoder"
        model.config.is_decoder = False
        model.set_attn_implementation("eager")
        assert pack(model, arch, batch) is None, "an attention that knows nothing of packing"
    choose(model)
    assert pack(model, arch, batch) is None, "a pass with gradients"


def test_more_values_per_token_are_packed_too():
    model = tiny("bert")
    choose(model)
    infuse.attach(model, "ia3", "a")
    batch = batch_of(model, [40, 5, 9, 20])
    batch["token_type_ids"] = (torch.arange(40) > 3).long().expand(4, 40).contiguous()
    with torch.no_grad():
        packed, padded = (heads.run(model, batch, ["a"] * 4, packs)["last_hidden_state"] for packs in (True, False))
    real = batch["attention_mask"].bool()
    close(packed[real], padded[real])


@torch.no_grad()
def test_the_models_own_head_sees_padded_rows():
    model = tiny("bert", AutoModelForSequenceClassification, num_labels=3)
    choose(model)
    infuse.attach(model, "lora", "a").head = Head("hf", ["x", "y", "z"], 32, "cls")
    wake(model, "a")
    batch = batch_of(model, [40, 5, 9, 20])
    for row, logits in enumerate(heads.classify(model, batch, ["a"] * 4)):
        close(logits, output(model, batch, "a")[row])


@torch.no_grad()
def test_trained_norms_and_poolers_keep_their_adapters():
    model = tiny("bert")
    choose(model)
    infuse.attach(model, "pfeiffer:train_norms=true", "norms").head = Head("linear", ["x", "y"], 32, "mean")
    infuse.attach(model, "lora", "a").head = Head("linear", ["x", "y"], 32, "cls")
    infuse.attach(model, "ia3", "pooler", trained=["pooler"]).head = Head("linear", ["x", "y"], 32, "mean")
    for seed, name in enumerate(["norms", "a", "pooler"]):
        wake(model, name, seed)
    batch = batch_of(model, [40, 5, 9, 20])
    for names in (["norms", "a", "a", "norms"], ["norms", "a", "pooler", "pooler"]):
        for row, logits in enumerate(heads.classify(model, batch, names)):
            length = int(batch["attention_mask"][row].sum())
            (alone,) = heads.classify(model, {k: v[row : row + 1, :length] for k, v in batch.items()}, [names[row]])
            close(logits, alone)


@torch.no_grad()
def test_activations_written_in_place_leave_the_base_and_other_rows_alone(model):
    batch = batch_of(model, [7, 7, 7])
    infuse.activate(model, None)
    seen = []
    model.encoder.layer[0].register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
    before = output(model, batch, None)
    mixed = output(model, batch, ["a", None, "b"])
    assert torch.equal(mixed[1], before[1]) and not torch.equal(mixed[0], before[0])
    assert torch.equal(seen[0], seen[1])
    assert torch.equal(output(model, batch, None), before)


def test_kinds_survive_pickling_into_another_process(tmp_path):
    """Numbers of kinds would mean something else there."""
    model = tiny("bert")
    infuse.attach(model, "ia3", "a")
    infuse.attach(model, "lora", "b")
    for seed, name in enumerate("ab"):
        wake(model, name, seed)
    batch = inputs(model)
    with torch.no_grad():
        expected = output(model, batch, ["a", "b", "a"])
    (tmp_path / "model").write_bytes(pickle.dumps((model, batch, expected)))
    script = """
import pickle, sys, torch, infuse
from infuse.testing import tiny
from infuse.testing.conformance import close, output, wake
infuse.attach(tiny("bert"), "houlsby", "other")
model, batch, expected = pickle.loads(open(sys.argv[1], "rb").read())
infuse.attach(model, "lora", "c")
infuse.attach(model, "ia3", "d")
with torch.no_grad():
    close(output(model, batch, ["a", "b", "a"]), expected)
    close(output(model, batch, ["a", "b", "d"])[:2], expected[:2])
kinds = [model.infuse[name].kinds for name in "abcd"]
assert kinds[0] == kinds[3] and kinds[1] == kinds[2] and kinds[0] != kinds[1]
"""
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "model")], check=True, timeout=120)
    assert store_of(model)["a"].kinds

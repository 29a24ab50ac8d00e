"""Adapter files: what goes in comes out, and what is broken or hostile is one sentence and changes nothing."""

import copy
import json
import os
import pickle
import random
import threading
from contextlib import contextmanager
from functools import cache

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load, load_file, save_file
from torch import nn
from transformers import AutoModelForSequenceClassification

import infuse
from infuse import IA3, InfuseError, LoRA
from infuse.adapter import Adapter
from infuse.checkpoint import HEADER, VERSION, amend, header
from infuse.formats.tensors import read_safetensors
from infuse.heads import Head, classify
from infuse.model import store_of
from infuse.testing import inputs, tiny, wake
from infuse.testing.conformance import output

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
LABELS = ("no", "yes", "maybe so")


def adapted(method=LoRA(rank=2), kind="bert", **settings):  # noqa: B008  # frozen
    model = tiny(kind, **settings)
    torch.manual_seed(0)
    infuse.attach(model, method, "a")
    wake(model, "a")
    return model


@pytest.fixture
def folder(tmp_path):
    """An adapter with a head, as saved."""
    model = adapted()
    store_of(model)["a"].head = Head("cosine", LABELS, 32)
    return infuse.save(model, "a", tmp_path / "adapter")


@pytest.fixture
def plain(tmp_path):
    """An adapter as PEFT keeps it: tensors without Infuse's header, and a config."""
    folder = infuse.save(adapted(), "a", tmp_path / "plain")
    save_file(load_file(folder / WEIGHTS), folder / WEIGHTS)
    return folder


@contextmanager
def untouched(model):
    """Whatever happens inside leaves the model's tensors, flags, modules, hooks and active adapter as they were."""

    def facts():
        flags = [(n, p.requires_grad) for n, p in model.named_parameters()]
        modules = [n for n, _ in model.named_modules()]
        hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
        return flags, modules, hooks, hasattr(model, "infuse") and model.infuse.active

    before, state = facts(), copy.deepcopy(model.state_dict())
    yield
    assert facts() == before
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@cache
def targets(kind):
    """A bare model and an adapted one, with what they answer."""
    return [(model, output(model, inputs(model))) for model in (tiny(kind), adapted(IA3(), kind))]


def refused(folder, *parts, kind="bert", name="new", **options):
    """Loading fails with one sentence that holds ``parts``, on a bare model and beside another adapter."""
    for model, before in targets(kind):
        with untouched(model), pytest.raises(InfuseError) as caught:
            infuse.load(model, folder, name, **options)
        message = str(caught.value)
        assert "\n" not in message and len(message) < 600 and all(part in message for part in parts), message
        assert torch.equal(output(model, inputs(model)), before)


def rewrite(folder, tensors=None, **changes):
    """Change an Infuse file's tensors (by a function) and entries of its header."""
    with safe_open(folder / WEIGHTS, "pt") as file:
        facts = json.loads(file.metadata()[HEADER])
    held = load_file(folder / WEIGHTS)
    save_file((tensors or (lambda t: t))(held), folder / WEIGHTS, {HEADER: json.dumps(facts | changes)})


# Round trips


@pytest.mark.parametrize("kind, multi", [("cosine", False), ("linear", False), ("cosine", True), ("linear", True)])
@pytest.mark.parametrize("method", [LoRA(rank=2), IA3()], ids=["lora", "ia3"])
def test_heads_and_facts_round_trip(tmp_path, method, kind, multi):
    model = adapted(method)
    adapter = store_of(model)["a"]
    adapter.head = Head(kind, LABELS, 32, "cls", multi)
    adapter.info = {"run": {"epochs": 3}, "größe": [1.5, None, "ß"]}
    wake(model, "a", 1)
    infuse.save(model, "a", tmp_path / "x")
    fresh = tiny("bert")
    loaded = infuse.load(fresh, tmp_path / "x")
    assert (loaded.name, loaded.method, loaded.info) == ("a", method, adapter.info)
    assert loaded.head.settings() == adapter.head.settings()
    batch = inputs(model)
    for one, two in zip(classify(model, batch, ["a"] * 3), classify(fresh, batch, ["a"] * 3), strict=True):
        assert torch.equal(one, two) and len(one) == 3


def test_a_models_own_head_travels_as_a_copy(tmp_path):
    model = tiny("bert", AutoModelForSequenceClassification, num_labels=3)
    infuse.attach(model, IA3(), "a").head = Head("hf", LABELS)
    wake(model, "a")
    infuse.save(model, "a", tmp_path / "x")
    fresh = tiny("bert", AutoModelForSequenceClassification, num_labels=3)
    loaded = infuse.load(fresh, tmp_path / "x")
    assert torch.equal(output(fresh, inputs(model)), output(model, inputs(model)))
    assert loaded.head.labels == LABELS and list(loaded.copies) == ["classifier"]
    wider = tiny("bert", AutoModelForSequenceClassification, num_labels=4)
    with untouched(wider), pytest.raises(InfuseError, match=r"\(3, 32\).*\(4, 32\)"):
        infuse.load(wider, tmp_path / "x", any_base=True)


def test_the_header_tells_without_a_model(folder, plain):
    facts = header(folder)
    assert facts["method"] == {"name": "lora", "roles": ["query", "value"], "rank": 2, "alpha": 16.0,
                               "rslora": False, "dora": False, "dropout": 0.0}  # fmt: skip
    assert facts["head"]["labels"] == list(LABELS) and facts["base"]["type"] == "bert" and facts["name"] == "a"
    with pytest.raises(InfuseError, match="not written by Infuse"):
        header(plain)


def test_the_header_is_read_without_the_tensors(folder, monkeypatch):
    facts = header(folder)
    monkeypatch.setattr("infuse.formats.tensors.from_safetensors", None)
    assert header(folder) == facts


def test_amending_takes_facts_and_tensors_of_one_file(folder, monkeypatch):
    """Even if the adapter is replaced meanwhile."""
    before, real = load((folder / WEIGHTS).read_bytes()), read_safetensors  # no view of a file that changes

    def read(path):
        content = real(path)
        rewrite(folder, lambda tensors: {name: value + 1 for name, value in tensors.items()}, name="another")
        return content

    with monkeypatch.context() as patched:
        patched.setattr("infuse.checkpoint.read_safetensors", read)
        amend(folder, head={"temperature": 2.0}, info={"why": "so"})
    facts, after = header(folder), load_file(folder / WEIGHTS)
    assert (facts["name"], facts["head"]["temperature"], facts["info"]) == ("a", 2.0, {"why": "so"})
    assert all(torch.equal(value, before[name]) for name, value in after.items())


def test_files_cross_from_bare_models_to_models_with_heads_and_back(tmp_path):
    model = adapted()
    batch = inputs(model)
    infuse.save(model, "a", tmp_path / "bare")
    headed = tiny("bert", AutoModelForSequenceClassification)
    headed.bert.load_state_dict(tiny("bert").state_dict(), strict=False)
    infuse.load(headed, tmp_path / "bare", name="b")
    expected = output(model, batch)
    assert torch.equal(headed.bert(**batch).last_hidden_state, expected)
    infuse.save(headed, "b", tmp_path / "headed")
    fresh = tiny("bert")
    infuse.load(fresh, tmp_path / "headed")
    assert torch.equal(output(fresh, batch), expected)


def test_a_trunk_in_bfloat16_is_the_same_base_and_keeps_adapters_in_float32(tmp_path):
    model = adapted()
    infuse.save(model, "a", tmp_path / "a")
    half = tiny("bert").bfloat16()
    adapter = infuse.load(half, tmp_path / "a")
    out = output(half, inputs(model))
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), output(model, inputs(model)), rtol=0, atol=0.15)
    out.float().square().mean().backward()
    assert {p.dtype for p in adapter.parameters()} == {p.grad.dtype for p in adapter.parameters()} == {torch.float32}


def test_another_base_is_refused_by_both_names_unless_it_is_meant(tmp_path):
    model = tiny("bert")
    model.name_or_path = "the/first"
    infuse.attach(model, IA3(), "a")
    infuse.save(model, "a", tmp_path / "a")
    other = tiny("bert", seed=1)
    other.name_or_path = "the/second"
    with untouched(other), pytest.raises(InfuseError, match=r"'the/first' \(bert\).*'the/second' \(bert\).*any_base"):
        infuse.load(other, tmp_path / "a")
    infuse.load(other, tmp_path / "a", any_base=True)
    refused(tmp_path / "a", "'the/first' (bert)", "(gpt2)", kind="gpt2")
    refused(tmp_path / "a", kind="gpt2", any_base=True)


# Writing


def test_readers_see_the_old_or_the_new_file_whole(tmp_path):
    """While one thread overwrites an adapter, another loads it all the time, and never a broken or mixed one."""
    model = adapted()
    adapter = store_of(model)["a"]
    parameters = [p for d in adapter.deltas.values() for p in d.parameters()]
    infuse.save(model, "a", tmp_path / "x")
    done, seen, wrong = threading.Event(), set(), []

    def read():
        while not done.is_set():
            try:
                loaded = infuse.load(reader, tmp_path / "x", name="r")
                values = {v for d in loaded.deltas.values() for p in d.parameters() for v in p.unique().tolist()}
                infuse.detach(reader)
                seen.update(values)
                if len(values) > 1 and not first.issuperset(values):
                    wrong.append(values)
            except Exception as error:
                wrong.append(error)

    reader, first = tiny("bert"), {v for p in parameters for v in p.unique().tolist()}
    thread = threading.Thread(target=read)
    thread.start()
    for value in range(1, 2000):
        if len(seen - first) > 5:
            break
        with torch.no_grad():
            for parameter in parameters:
                parameter.fill_(value)
        infuse.save(model, "a", tmp_path / "x")
    done.set()
    thread.join()
    assert wrong == [] and len(seen - first) > 5
    assert sorted(os.listdir(tmp_path)) == ["x"]


@pytest.mark.parametrize("survives", [0, 1])
def test_a_crash_while_overwriting_keeps_the_old_adapter(folder, monkeypatch, survives):
    before, replace, calls = load_file(folder / WEIGHTS), os.replace, []

    def crash(*paths):
        calls.append(paths)
        if len(calls) > survives:
            raise OSError("no space left")
        replace(*paths)

    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(InfuseError, match=rf"^{folder}\S* can't be written \(no space left\); check the path"):
        infuse.save(adapted(IA3()), "a", folder)
    assert infuse.load(tiny("bert"), folder).method == LoRA(rank=2)
    assert all(torch.equal(value, before[name]) for name, value in load_file(folder / WEIGHTS).items())
    assert os.listdir(folder.parent) == [folder.name] and sorted(os.listdir(folder)) == [CONFIG, WEIGHTS]


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "x").write_text("mine")
    with pytest.raises(InfuseError, match="is a file"):
        infuse.save(adapted(), "a", tmp_path / "x")
    refused(tmp_path / "x", "no folder")
    refused(tmp_path, WEIGHTS)
    assert (tmp_path / "x").read_text() == "mine" and os.listdir(tmp_path) == ["x"]


# Broken and hostile files


def test_truncated_files_are_refused(folder):
    content = (folder / WEIGHTS).read_bytes()
    for size in [*range(0, 20, 2), *range(20, len(content), len(content) // 30), len(content) - 1]:
        (folder / WEIGHTS).write_bytes(content[:size])
        refused(folder, "truncated")


def test_flipped_bits_of_the_header_load_as_something_sound_or_not_at_all(folder):
    content = (folder / WEIGHTS).read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    draw, bare, failed = random.Random(0), tiny("bert"), 0
    for _ in range(400):
        at = draw.randrange(end)
        flipped = content[:at] + bytes([content[at] ^ (1 << draw.randrange(8))]) + content[at + 1 :]
        (folder / WEIGHTS).write_bytes(flipped)
        with untouched(bare):
            try:
                infuse.load(bare, folder, name="x")
                assert torch.isfinite(output(bare, inputs(bare))).all()
                infuse.detach(bare)
            except InfuseError:
                failed += 1
    assert failed > 200


@pytest.mark.parametrize("content", [b"", b"\0" * 100, random.Random(1).randbytes(5000), b"PK\x03\x04", b"{}"])
def test_other_bytes_are_refused(folder, content):
    (folder / WEIGHTS).write_bytes(content)
    refused(folder, WEIGHTS)
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")
    refused(folder, "adapter_model.bin")


@pytest.mark.parametrize(
    "text",
    ["[]", "3", "null", "", "{", "[" * 100_000, '{"a":' * 100_000, "{}", '{"peft_type": null}', '{"peft_type": []}',
     '{"peft_type": "LORA", "r": NaN}', '{"peft_type": "LORA", "r": 1e999}', '{"peft_type": "LORA", "r": -1}',
     '{"peft_type": "LORA", "r": 1000000000000}', '{"peft_type": "LORA", "r": "two"}', '{"peft_type": "LORA", "r": []}',
     '{"peft_type": "LORA", "r": 2, "lora_alpha": NaN}', '{"peft_type": "LORA", "r": 2, "lora_alpha": Infinity}',
     '{"peft_type": "LORA", "r": 2, "rank_pattern": {"(": 2}}', '{"peft_type": "LORA", "r": 2, "rank_pattern": [1]}',
     '{"peft_type": "LORA", "r": 2, "lora_dropout": 2}', '{"peft_type": "IA3"}', "\ud800"],
)  # fmt: skip
def test_bad_configs_are_refused(plain, text):
    (plain / CONFIG).write_bytes(text.encode("utf-8", "surrogatepass"))
    refused(plain)


@pytest.mark.parametrize(
    "option",
    [{"bias": "all"}, {"use_qalora": True}, {"init_lora_weights": "pissa"}, {"layer_replication": [[0, 2]]},
     {"peft_type": "PREFIX_TUNING"}, {"trainable_token_indices": [1]}, {"lora_bias": True},
     {"target_parameters": ["x"]}],
    ids=str,
)  # fmt: skip
def test_options_that_infuse_lacks_are_refused(plain, option):
    config = json.loads((plain / CONFIG).read_text())
    (plain / CONFIG).write_text(json.dumps(config | option))
    refused(plain, str(next(iter(option.values()))))


def test_adapted_embeddings_are_refused(plain):
    tensors = load_file(plain / WEIGHTS)
    extra = {"base_model.model.embeddings.word_embeddings.lora_embedding_A": torch.ones(2, 96)}
    save_file(tensors | extra, plain / WEIGHTS)
    refused(plain, "lora_embedding_A")


@pytest.mark.parametrize(
    "changes",
    [{"version": None}, {"version": "1"},
     {"name": "../../x"}, {"method": {"name": "../../x"}}, {"method": {"name": "lora", "depth": 3}}, {"method": []},
     {"method": {"name": "lora", "rank": 10**12}}, {"method": {"name": "lora", "rank": 10**40}},
     {"method": {"name": "lora", "rank": -1}}, {"method": {"name": "lora", "rank": 2, "alpha": float("nan")}},
     {"method": {"name": "ia3"}}, {"sites": ["0.query", "../../x"]}, {"sites": ["0.query", 3]}, {"sites": None},
     {"sites": ["0.query", "0.value", "1.query", "1.ffn_hidden"]}, {"settings": {"0.query": {"name": "x"}}},
     {"settings": []}, {"layout": "native"}, {"copies": 3}, {"base": []}, {"base": {"digest": "x"}}, {"info": 3},
     {"head": {"kind": "cosine"}}, {"head": 3}, {"head": {"kind": "cosine", "labels": 3, "width": 32}},
     {"head": {"kind": "magic", "labels": LABELS}}, {"head": {"kind": "cosine", "labels": LABELS, "width": 10**13}},
     {"head": {"kind": "cosine", "labels": LABELS, "width": 32, "pooling": "max"}},
     {"head": {"kind": "cosine", "labels": LABELS[:2], "width": 32}},
     {"head": {"kind": "cosine", "labels": [1, 2, 3], "width": 32}}],
    ids=str,
)  # fmt: skip
def test_bad_headers_are_refused(folder, changes):
    rewrite(folder, **changes)
    refused(folder, name=None if "name" in changes else "new")


def test_a_method_is_loaded_only_where_it_is_defined(tmp_path):
    """LoRA's tensors may fit an input of the same width, where LoRA has no meaning."""
    model = adapted(LoRA(rank=2, roles=("ffn_output",)), intermediate_size=32)
    folder = infuse.save(model, "a", tmp_path / "a")
    rewrite(folder, sites=["0.ffn_hidden", "1.ffn_hidden"])
    bare = tiny("bert", intermediate_size=32)
    with untouched(bare), pytest.raises(InfuseError, match="not defined at ffn_hidden"):
        infuse.load(bare, folder)


def test_a_newer_form_is_refused_before_anything_else_is_read(folder):
    rewrite(folder, version=VERSION + 1, base="somewhere else")
    refused(folder, "newer Infuse", "update")
    with pytest.raises(InfuseError, match="update Infuse"):
        header(folder)


@pytest.mark.parametrize("n, sites", [(4000, 0), (32, 1)])
def test_a_small_file_is_not_much_work(tmp_path, monkeypatch, n, sites):
    """Parameters are made only where the settings can work, and only as long as there are tensors for them."""
    folder = infuse.save(adapted(infuse.make("phm:width=4")), "a", tmp_path / "a")
    rewrite(folder, method=infuse.method.settings(infuse.make(f"phm:n={n},width=32")))
    made, init = [], infuse.Compacter.init
    monkeypatch.setattr(infuse.Compacter, "init", lambda self, site: made.append(site) or init(self, site))
    with pytest.raises(InfuseError):
        infuse.load(tiny("bert"), folder)
    assert len(made) == sites


def bend(change):
    """A function of a file's tensors that changes the first delta and the head's weights."""
    return lambda tensors: {
        name: change(value) if "0.attention.self.query.lora_A" in name or name == "infuse.head.weight" else value
        for name, value in tensors.items()
    }


@pytest.mark.parametrize("form", ["folder", "plain"])
@pytest.mark.parametrize(
    "tensors",
    [bend(lambda v: v[:, :-1].contiguous()), bend(lambda v: v.T.contiguous()), bend(lambda v: torch.zeros(())),
     bend(lambda v: v.to(torch.int64)), bend(lambda v: v > 0), bend(lambda v: v.to(torch.complex64)),
     bend(lambda v: v * float("nan")), bend(lambda v: v / 0),
     bend(lambda v: torch.full(v.shape, 1e300, dtype=torch.double)),
     bend(lambda v: torch.full(v.shape, 127, dtype=torch.uint8).view(torch.float8_e4m3fn)),
     lambda tensors: dict(list(tensors.items())[1:]),
     lambda tensors: {"x": torch.ones(2)}, lambda tensors: {},
     lambda tensors: tensors | {"base_model.model.encoder.layer.7.output.dense.lora_A.weight": torch.ones(2, 48)},
     lambda tensors: tensors | {"base_model.model.encoder.layer.0.output.dense.lora_A.weight": torch.ones(2, 48)}],
    ids=["narrow", "transposed", "scalar", "int", "bool", "complex", "nan", "inf", "beyond float32", "nan in float8",
         "missing", "other", "none", "layer", "half"],
)  # fmt: skip
def test_bad_tensors_are_refused(request, form, tensors):
    folder = request.getfixturevalue(form)
    if form == "folder":
        rewrite(folder, tensors)
    else:
        save_file(tensors(load_file(folder / WEIGHTS)), folder / WEIGHTS)
    refused(folder)


def test_numbers_in_any_format_are_read(folder):
    """In eight bits, too, which torch hardly computes in."""
    rewrite(folder, lambda tensors: {name: value.to(torch.float8_e4m3fn) for name, value in tensors.items()})
    model = tiny("bert")
    assert {p.dtype for p in infuse.load(model, folder).parameters()} == {torch.float32}
    assert torch.isfinite(output(model, inputs(model))).all()


class Hostile:
    """Unpickled, it makes a folder."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("write", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value, 2))])
def test_nothing_is_unpickled(plain, tmp_path, write):
    (plain / WEIGHTS).unlink()
    for value in ({"x": Hostile(tmp_path / "owned")}, Hostile(tmp_path / "owned"), [torch.ones(2)], nn.Linear(2, 2)):
        write(value, plain / "adapter_model.bin")
        refused(plain, "adapter_model.bin")
    assert not (tmp_path / "owned").exists()


def test_plain_state_dicts_are_read(plain):
    expected = output(adapted(), inputs(tiny("bert")))
    torch.save(load_file(plain / WEIGHTS), plain / "adapter_model.bin")
    (plain / WEIGHTS).unlink()
    model = tiny("bert")
    infuse.load(model, plain)
    assert torch.equal(output(model, inputs(model)), expected)


@pytest.mark.parametrize("method", ["lora", "ia3", "pfeiffer"])
def test_loading_walks_no_other_adapter(tmp_path, monkeypatch, method):
    model = tiny("bert")
    infuse.attach(model, method, "a")
    infuse.save(model, "a", tmp_path / "a")
    infuse.attach(model, method, "c")
    walk = Adapter.named_modules

    def named_modules(self, *args, **kwargs):
        assert self.name != "a", "with a thousand adapters attached, loading one more would take long"
        return walk(self, *args, **kwargs)

    monkeypatch.setattr(Adapter, "named_modules", named_modules)
    infuse.load(model, tmp_path / "a", "b")
    infuse.detach(model, "b")
    assert list(store_of(model).adapters) == ["a", "c"]

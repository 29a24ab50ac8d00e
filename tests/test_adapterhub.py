"""AdapterHub's files beyond the golden cases: writing, legacy names, heads, and what is refused."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification

import infuse
from infuse import IA3, Bottleneck, Compacter, LoRA
from infuse.testing import inputs, tiny, wake
from infuse.testing.conformance import close, output

KINDS = [
    "bert",
    "roberta",
    "electra",
    "deberta-v2",
    "distilbert",
    "albert",
    "t5",
    "mt5",
    "bart",
    "gpt2",
    "llama",
    "qwen3",
]
METHODS = [
    Bottleneck.houlsby(), Bottleneck.pfeiffer(reduction=4.0), Bottleneck.parallel(), Compacter(width=8),
    infuse.make("compacter++:width=8,scale=2.0"), infuse.make("phm:width=8"), LoRA(rank=3, roles=("query", "value")),
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", METHODS, ids=lambda m: infuse.method.spelled(m)[:30])
def test_written_files_are_read_back(method, kind, tmp_path):
    model = tiny(kind)
    batch = inputs(model)
    infuse.attach(model, method, "task")
    wake(model, "task")
    if kind == "albert" and "attention_output" in method.roles:
        with pytest.raises(infuse.InfuseError, match="exchanges"):
            infuse.save(model, "task", tmp_path / "hub", format="adapterhub")
        return
    infuse.save(model, "task", tmp_path / "hub", format="adapterhub")
    assert {p.name for p in (tmp_path / "hub").iterdir()} == {"adapter.safetensors", "adapter_config.json"}
    fresh = tiny(kind)
    infuse.load(fresh, tmp_path / "hub", name="again")
    close(output(fresh, batch), output(model, batch))


def test_fusions_are_written_and_read_back(tmp_path):
    model = tiny("bert")
    batch = inputs(model)
    for seed, name in enumerate("ab"):
        infuse.attach(model, Bottleneck.pfeiffer(), name)
        wake(model, name, seed)
    infuse.fuse(model, ["a", "b"])
    wake(model, "a,b")
    infuse.save(model, "a,b", tmp_path / "fused", format="adapterhub")
    fresh = tiny("bert")
    infuse.load(fresh, tmp_path / "fused")
    close(output(fresh, batch), output(model, batch))


@pytest.mark.parametrize("layers", [("last:1", "last:1"), ("all", "last:1")], ids=["both", "one"])
def test_fusions_of_members_that_leave_layers_out(layers, tmp_path):
    """The library's file has a fusion at every layer, used or not."""
    model = tiny("bert")
    batch = inputs(model)
    for name, own in zip("ab", layers, strict=True):
        infuse.attach(model, Bottleneck.pfeiffer(), name, layers=own)
        wake(model, name)
    infuse.fuse(model, ["a", "b"])
    infuse.save(model, "a,b", tmp_path / "hub", format="adapterhub")
    path = tmp_path / "hub" / "model_adapter_fusion.safetensors"
    tensors = load_file(path)
    save_file(tensors | {key.replace("layer.1.", "layer.0."): value.clone() for key, value in tensors.items()}, path)
    fresh = tiny("bert")
    if layers[0] == layers[1]:
        assert set(infuse.load(fresh, tmp_path / "hub").sites) == {"1.ffn_output"}
        close(output(fresh, batch), output(model, batch))
        return
    with pytest.raises(infuse.InfuseError, match="where only a has"):
        infuse.load(fresh, tmp_path / "hub")
    assert not hasattr(fresh, "infuse")


def written(tmp_path, method, change=lambda config: None, rename=lambda key: key):
    model = tiny("bert", AutoModelForSequenceClassification)
    infuse.attach(model, method, "task", trained=())
    wake(model, "task")
    infuse.save(model, "task", tmp_path / "hub", format="adapterhub")
    path = tmp_path / "hub" / "adapter_config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))
    tensors = load_file(tmp_path / "hub" / "adapter.safetensors")
    save_file({rename(k): v for k, v in tensors.items()}, tmp_path / "hub" / "adapter.safetensors")
    return model, tmp_path / "hub"


def test_legacy_key_names_and_preset_configs(tmp_path):
    def old(config):
        config["config"] = "houlsby"

    def rename(key):
        kind = "attention_text_task_adapters" if "attention" in key else "layer_text_task_adapters"
        return key.replace(".adapters.", f".{kind}.")

    model, folder = written(tmp_path, Bottleneck.houlsby(), old, rename)
    bare = tiny("bert", AutoModelForSequenceClassification).bert
    infuse.load(bare, folder)
    batch = inputs(bare)
    with infuse.route(model, "task"):
        close(output(bare, batch), model.bert(**batch).last_hidden_state)


def test_plain_tensors_in_bin_files_are_read(tmp_path):
    model, folder = written(tmp_path, Bottleneck.houlsby())
    torch.save(load_file(folder / "adapter.safetensors"), folder / "pytorch_adapter.bin")
    (folder / "adapter.safetensors").unlink()
    fresh = tiny("bert", AutoModelForSequenceClassification)
    infuse.load(fresh, folder)
    batch = inputs(fresh)
    with infuse.route(model, "task"):
        close(fresh(**batch).logits, model(**batch).logits)


def test_heads_of_transformers_classes_come_along(tmp_path):
    _, folder = written(tmp_path, Bottleneck.houlsby())
    head = {"classifier.weight": torch.ones(2, 32), "classifier.bias": torch.zeros(2)}
    save_file(head, folder / "model_head.safetensors")
    fresh = tiny("bert", AutoModelForSequenceClassification)
    adapter = infuse.load(fresh, folder)
    assert torch.equal(adapter.copy_of("classifier").weight, torch.ones(2, 32))
    assert not torch.equal(fresh.classifier.weight, torch.ones(2, 32))


def test_a_head_of_another_number_of_labels_is_refused_as_that(tmp_path):
    _, folder = written(tmp_path, Bottleneck.houlsby())
    save_file(
        {"classifier.weight": torch.ones(5, 32), "classifier.bias": torch.zeros(5)}, folder / "model_head.safetensors"
    )
    with pytest.raises(infuse.InfuseError, match="another number of labels"):
        infuse.load(tiny("bert", AutoModelForSequenceClassification), folder)


def test_heads_of_adapter_model_classes_are_not_replaced_by_untrained_ones(tmp_path):
    _, folder = written(tmp_path, Bottleneck.houlsby())
    save_file({"heads.task.1.weight": torch.ones(2, 32)}, folder / "model_head.safetensors")
    with pytest.raises(infuse.InfuseError, match="AdapterModel classes"):
        infuse.load(tiny("bert", AutoModelForSequenceClassification), folder)
    assert not infuse.load(tiny("bert"), folder).copies


def test_a_head_file_that_holds_the_transformer_too(tmp_path):
    """The library leaves T5's out only where its class gives it no prefix."""
    model, fresh = (tiny("t5", AutoModelForSequenceClassification, decoder_start_token_id=0) for _ in range(2))
    batch = {"input_ids": inputs(model)["input_ids"].index_fill(1, torch.tensor([6]), model.config.eos_token_id)}
    infuse.attach(model, Bottleneck.houlsby(), "task", trained=())
    wake(model, "task")
    infuse.save(model, "task", tmp_path / "hub", format="adapterhub")
    whole = {k: v.clone() for k, v in model.state_dict().items() if not k.startswith("infuse.")}
    loras = {"transformer.encoder.block.0.layer.0.SelfAttention.q.loras.task.lora_A": torch.ones(2, 32)}
    save_file(whole | loras, tmp_path / "hub" / "model_head.safetensors")
    assert list(infuse.load(fresh, tmp_path / "hub").copies) == ["classification_head"]
    close(output(fresh, batch), output(model, batch))
    assert not infuse.load(tiny("t5"), tmp_path / "hub").copies
    bare = {k.removeprefix("transformer."): v for k, v in whole.items()}
    save_file(bare, tmp_path / "hub" / "model_head.safetensors")
    with pytest.raises(infuse.InfuseError, match="transformer is made"):
        infuse.load(tiny("t5"), tmp_path / "hub")


@pytest.mark.parametrize("method", [Bottleneck.houlsby(), Compacter(width=8)], ids=["bottleneck", "compacter"])
def test_constant_scales_are_read(method, tmp_path):
    def doubled(config):
        config["config"]["scaling"] = 2.0

    model, folder = written(tmp_path, method, doubled)
    adapter = infuse.load(model, folder, "doubled")
    assert adapter.method.scale == 2.0
    for name, value in model.infuse["task"].named_parameters():
        if name.endswith((".U", ".c", ".up_left")):
            value.data *= 2
    batch = inputs(model)
    close(output(model, batch, "doubled"), output(model, batch, "task"))


def test_files_of_other_architectures_are_refused(tmp_path):
    """Without a type in the file (those of old versions), too: encoder and decoder would meet in Llama's layers."""
    model = tiny("bart")
    infuse.attach(model, Bottleneck.pfeiffer(), "task")
    infuse.save(model, "task", tmp_path / "hub", format="adapterhub")
    with pytest.raises(infuse.InfuseError, match="'bart' model, but this is a 'llama'"):
        infuse.load(tiny("llama"), tmp_path / "hub")
    path = tmp_path / "hub" / "adapter_config.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "model_type"}))
    with pytest.raises(infuse.InfuseError, match="two deltas for one place"):
        infuse.load(tiny("llama"), tmp_path / "hub")


def test_versions_that_ignored_alpha(tmp_path):
    def old(config):
        config["version"] = "adapters.1.0.1"

    model, folder = written(tmp_path, LoRA(rank=4, alpha=16.0), old)
    adapter = infuse.load(tiny("bert"), folder)
    assert adapter.method.scale == 1.0
    assert model.infuse["task"].method.scale == 4.0


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("ln_before", True, "ln_before"),
        ("use_gating", True, "use_gating"),
        ("original_ln_after", False, "original_ln_after"),
        ("scaling", "channel", "channel"),
        ("architecture", "prefix_tuning", "prefix_tuning"),
    ],
)
def test_what_cannot_be_expressed_is_refused_by_name(option, value, message, tmp_path):
    def change(config):
        config["config"][option] = value

    _, folder = written(tmp_path, Bottleneck.houlsby(), change)
    model = tiny("bert")
    with pytest.raises(infuse.InfuseError, match=message):
        infuse.load(model, folder)
    assert not hasattr(model, "infuse")


def test_invertible_adapters_and_lost_rules_are_refused(tmp_path):
    _, folder = written(tmp_path, Compacter(width=8))
    tensors = load_file(folder / "adapter.safetensors")
    save_file({k: v for k, v in tensors.items() if "shared" not in k}, folder / "adapter.safetensors")
    with pytest.raises(infuse.InfuseError, match="shared rule"):
        infuse.load(tiny("bert"), folder)
    save_file(tensors | {"bert.invertible_adapters.task.F.0.weight": torch.ones(2)}, folder / "adapter.safetensors")
    with pytest.raises(infuse.InfuseError, match="invertible"):
        infuse.load(tiny("bert"), folder)


def hub_ia3(tmp_path, kind, roles):
    """A model, and the folder of a file that scales by its (IA)³ what ``roles`` name."""
    model = tiny(kind)
    infuse.attach(model, LoRA(rank=1, alpha=1.0, roles=roles), "task")
    wake(model, "task")
    infuse.save(model, "task", tmp_path / "hub", format="adapterhub")
    path = tmp_path / "hub" / "adapter_config.json"
    config = json.loads(path.read_text())
    config["config"]["composition_mode"] = "scale"
    path.write_text(json.dumps(config))
    tensors = load_file(tmp_path / "hub" / "adapter.safetensors")
    save_file({k: v + 1 for k, v in tensors.items() if k.endswith("lora_B")}, tmp_path / "hub" / "adapter.safetensors")
    return model, tmp_path / "hub"


@pytest.mark.parametrize("kind", ["bert", "llama", "t5"])
def test_ia3_at_outputs_is_converted(kind, tmp_path):
    model, folder = hub_ia3(tmp_path, kind, ("key", "value", "ffn_output"))
    adapter = infuse.load(model, folder, "ia3")
    assert isinstance(adapter.method, IA3)
    assert {s.role.removeprefix("cross_") for s in adapter.sites.values()} == {"key", "value", "ffn_output"}


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_ia3_at_the_ungated_half_scales_the_hidden_values(kind, tmp_path):
    model, folder = hub_ia3(tmp_path, kind, ("ffn_up",))
    adapter = infuse.load(model, folder, "ia3")
    assert {s.role for s in adapter.sites.values()} == {"ffn_hidden"}


def test_ia3_before_the_activation_is_refused(tmp_path):
    model, folder = hub_ia3(tmp_path, "bert", ("key", "value", "ffn_up"))
    with pytest.raises(infuse.InfuseError, match="before its non-linearity"):
        infuse.load(model, folder, "ia3")

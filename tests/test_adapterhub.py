"""AdapterHub's files beyond the golden cases: writing, legacy names, heads, and what is refused."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification

import infuse
from infuse import IA3, Bottleneck, Compacter, LoRA
from infuse.adapter import Delta, key
from infuse.heads import Head
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
    LoRA(rank=3, rslora=True),
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


@pytest.mark.parametrize("reads", ["output", "residual"])
def test_alberts_attention_is_written_with_what_it_reads_exchanged(reads, tmp_path):
    """One setting serves both sublayers there: what a file of both gives is written again, and one sublayer alone."""
    model = tiny("albert")
    batch = inputs(model)
    infuse.attach(model, Bottleneck.houlsby(roles=("attention_output",), reads=reads), "alone")
    wake(model, "alone")
    assert saved(model, tmp_path / "alone", "alone")["is_parallel"] is (reads == "output")
    infuse.attach(model, Bottleneck.houlsby(roles=("ffn_output",), reads=reads), "other")
    wake(model, "other", 1)
    saved(model, tmp_path / "both", "other")
    both = load_file(tmp_path / "both" / "adapter.safetensors")
    tensors = load_file(tmp_path / "alone" / "adapter.safetensors")
    tensors = {k.replace(".alone.", ".other."): v for k, v in tensors.items()}
    save_file(both | tensors, tmp_path / "both" / "adapter.safetensors")
    adapter = infuse.load(model, tmp_path / "both", "both")
    assert {adapter.method_at(site).reads for site in adapter.sites.values()} == {"output", "residual"}
    assert saved(model, tmp_path / "again", "both")["is_parallel"] is (reads == "residual")
    for name in ("alone", "both"):
        fresh = tiny("albert")
        infuse.load(fresh, tmp_path / {"alone": "alone", "both": "again"}[name])
        close(output(fresh, batch), output(model, batch, name))


def saved(model, folder, name="task"):
    """The settings in the config of an adapter's file."""
    infuse.save(model, name, folder, format="adapterhub")
    return json.loads((folder / "adapter_config.json").read_text())["config"]


def refused(model, folder, name, message):
    with pytest.raises(infuse.InfuseError, match=message):
        infuse.save(model, name, folder / "hub", format="adapterhub")
    assert not list(folder.iterdir())


@pytest.mark.parametrize(
    ("kind", "layers", "left_out"),
    [
        ("bert", "last:1", [0]),
        ("gpt2", "first:1", [1]),
        ("t5", "last:1", [0, 2]),
        ("bart", [0], [1, 3]),
        ("albert", [1], [0]),
    ],
)
@pytest.mark.parametrize("method", [Bottleneck.pfeiffer(), LoRA(rank=2)], ids=lambda m: m.name)
def test_layers_without_deltas_are_left_out(method, kind, layers, left_out, tmp_path):
    """The library makes deltas, at random, in all other layers; it counts a decoder's after the encoder's."""
    model = tiny(kind)
    adapter = infuse.attach(model, method, "task", layers=layers)
    assert saved(model, tmp_path / "hub")["leave_out"] == left_out
    assert infuse.load(tiny(kind), tmp_path / "hub").sites.keys() == adapter.sites.keys()


@pytest.mark.parametrize(("kind", "exchanged"), [("llama", True), ("mistral", True), ("qwen3", False), ("bert", False)])
@pytest.mark.parametrize("role", ["ffn_up", "ffn_output"])
def test_the_switch_that_the_library_has_for_a_linear(role, kind, exchanged, tmp_path):
    """Its Llama and Mistral have the switches of the two feed-forward linears exchanged."""
    model = tiny(kind)
    infuse.attach(model, LoRA(rank=2, roles=(role,)), "task")
    config = saved(model, tmp_path / "hub")
    assert config["intermediate_lora"] is ((role == "ffn_up") is not exchanged)
    assert config["output_lora"] is not config["intermediate_lora"]


@pytest.mark.parametrize(
    ("kind", "method", "message"),
    [
        ("bert", Bottleneck.houlsby(roles=("query",)), "no place at query"),
        ("t5", Bottleneck.houlsby(roles=("ffn_up",)), "no place at ffn_up"),
        ("gpt2", Bottleneck.houlsby(roles=("ffn_up", "ffn_output")), "no place at ffn_up"),
        ("bert", Bottleneck.houlsby(train_norms=True), "no trained norms"),
        ("t5", LoRA(rank=2, roles=("cross_query",)), "lacks decoder.0.query"),
        ("bert", LoRA(rank=2, roles=("attention_output",)), "no place at attention_output"),
        ("modernbert", LoRA(rank=2), "random bias"),
        ("modernbert", Bottleneck.pfeiffer(), "random bias"),
        ("gemma2", Bottleneck.pfeiffer(), "Gemma"),
        ("gemma3_text", infuse.make("compacter++:width=8"), "Gemma"),
        ("bert", LoRA(rank=2, dora=True), "DoRA"),
        ("mpnet", Bottleneck.houlsby(), "does not support .*mpnet"),
        ("phi3", LoRA(rank=2), "does not support .*phi3"),
        ("bert", IA3(), "can't express IA3"),
    ],
    ids=lambda value: infuse.method.spelled(value) if isinstance(value, infuse.Method) else None,
)
def test_what_the_library_has_no_place_for_is_not_written(kind, method, message, tmp_path):
    model = tiny(kind)
    infuse.attach(model, method, "task")
    refused(model, tmp_path, "task", f"{message}.*; save it in Infuse's own format")


def replaced(adapter, layer, **settings):
    """Give an adapter fresh deltas with other settings in one layer, as files with settings per module have them."""
    for site in adapter.sites.values():
        if site.layer == layer:
            method = replace(adapter.method, **settings)
            adapter.deltas[key(site.name)] = Delta(method, method.init(site))


@pytest.mark.parametrize("method", [Bottleneck.houlsby(), Compacter(width=4)], ids=lambda m: m.name)
def test_widths_per_layer_are_written_as_a_map(method, tmp_path):
    model = tiny("bert")
    replaced(infuse.attach(model, method, "task"), 1, width=8)
    wake(model, "task")
    factors = saved(model, tmp_path / "hub")["reduction_factor"]
    assert {layer: int(32 // factor) for layer, factor in factors.items()} == {"0": method.width or 2, "1": 8}
    fresh, batch = tiny("bert"), inputs(model)
    infuse.load(fresh, tmp_path / "hub")
    close(output(fresh, batch), output(model, batch))


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        (LoRA(rank=2), {"alpha": 30.0}, "several of alpha"),
        (LoRA(rank=2), {"rank": 3}, "several of rank"),
        (Bottleneck.houlsby(), {"scale": 2.0, "activation": "relu"}, "several of activation, scale"),
    ],
)
def test_other_settings_that_differ_between_modules_are_refused(method, settings, message, tmp_path):
    model = tiny("bert")
    replaced(infuse.attach(model, method, "task"), 1, **settings)
    refused(model, tmp_path, "task", message)


def test_the_library_takes_the_width_and_the_scale_from_what_is_written(tmp_path):
    """It divides the model's width by ``reduction_factor``, rounding down, and knows a float only as a scale."""
    for width in range(1, 33):
        model = tiny("bert")
        infuse.attach(model, Bottleneck.parallel(width=width, scale=4), "task")
        config = saved(model, tmp_path / "hub")
        assert int(32 // config["reduction_factor"]) == width
        assert isinstance(config["scaling"], float)


PARALLEL = Bottleneck.parallel()


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ((LoRA(rank=2, roles=("ffn_output",)), Bottleneck.pfeiffer()), "'a' is not such"),
        ((Bottleneck.houlsby(), Bottleneck.pfeiffer()), "'a' is not such"),
        ((PARALLEL, PARALLEL), "members that read residual"),
        ((Bottleneck.houlsby(reads="normed"), Bottleneck.houlsby()), "members that read normed, output"),
    ],
)
def test_fusions_that_the_library_computes_otherwise_are_refused(members, message, tmp_path):
    model = tiny("bert")
    for name, method in zip("ab", members, strict=True):
        infuse.attach(model, method, name)
    infuse.fuse(model, ["a", "b"])
    refused(model, tmp_path, "a,b", message)


@pytest.mark.parametrize(
    ("members", "adds"),
    [
        ((PARALLEL, PARALLEL), "residual"),
        ((Bottleneck.pfeiffer(), PARALLEL), "residual"),
        ((PARALLEL, Bottleneck.pfeiffer()), "residual"),
        ((Bottleneck.pfeiffer(), Bottleneck.pfeiffer()), "output"),
    ],
)
def test_fusions_as_the_library_computes_them_are_written(members, adds, tmp_path):
    """As its files give them: all members read what the last one does, and parallel ones add it once more."""
    model = tiny("bert")
    batch = inputs(model)
    for name, method in zip("ab", members, strict=True):
        infuse.attach(model, method, name)
        wake(model, name)
    infuse.fuse(model, ["a", "b"], infuse.Fusion(adds=adds))
    wake(model, "a,b")
    infuse.save(model, "a,b", tmp_path, format="adapterhub")
    fresh = tiny("bert")
    infuse.load(fresh, tmp_path)
    close(output(fresh, batch), output(model, batch))


def test_stacks_are_refused(tmp_path):
    model = tiny("bert")
    for name in "ab":
        infuse.attach(model, Bottleneck.houlsby(), name)
    infuse.stack(model, ["a", "b"])
    refused(model, tmp_path, "a+b", "no stack")


def test_a_models_own_head_is_written(tmp_path):
    model = tiny("bert", AutoModelForSequenceClassification, num_labels=3)
    adapter = infuse.attach(model, Bottleneck.houlsby(), "task")
    wake(model, "task")
    torch.nn.init.normal_(adapter.copy_of("classifier").weight)
    infuse.save(model, "task", tmp_path / "hub", format="adapterhub")
    facts = json.loads((tmp_path / "hub" / "head_config.json").read_text())
    assert (facts["model_class"], facts["num_labels"]) == ("BertForSequenceClassification", 3)
    fresh, batch = tiny("bert", AutoModelForSequenceClassification, num_labels=3), inputs(model)
    infuse.load(fresh, tmp_path / "hub")
    close(fresh(**batch).logits, model(**batch).logits)


def test_other_copies_are_refused_and_heads_of_infuse_are_left_out_aloud(tmp_path):
    model = tiny("bert")
    infuse.attach(model, Bottleneck.houlsby(), "task", trained=["pooler"])
    refused(model, tmp_path, "task", "trained copy of pooler")
    infuse.attach(model, Bottleneck.houlsby(), "headed").head = Head("cosine", ["x", "y"], 32)
    with pytest.warns(UserWarning, match="no place for Infuse's head of 'headed'"):
        infuse.save(model, "headed", tmp_path / "hub", format="adapterhub")


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


@pytest.mark.parametrize("lacking", ["ab", "b"])
def test_fusions_of_members_that_leave_layers_out(lacking, tmp_path):
    """The library's file has a fusion at every layer, used or not."""
    model = tiny("bert")
    batch = inputs(model)
    for name in "ab":
        infuse.attach(model, Bottleneck.pfeiffer(), name, layers="last:1")
        wake(model, name)
    infuse.fuse(model, ["a", "b"])
    infuse.save(model, "a,b", tmp_path, format="adapterhub")
    paths = [tmp_path / "model_adapter_fusion.safetensors"]
    paths += [tmp_path / "members" / name / "adapter.safetensors" for name in "ab" if name not in lacking]
    for path in paths:
        tensors = load_file(path)
        save_file({k.replace("layer.1.", "layer.0."): v.clone() for k, v in tensors.items()} | tensors, path)
    fresh = tiny("bert")
    if lacking == "ab":
        assert set(infuse.load(fresh, tmp_path).sites) == {"1.ffn_output"}
        close(output(fresh, batch), output(model, batch))
        return
    with pytest.raises(infuse.InfuseError, match="'b' can't be mixed: it adds nothing at 0"):
        infuse.load(fresh, tmp_path)
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


@pytest.mark.parametrize(
    ("version", "scale"), [("0.2.2", 1), ("1.0.1", 1), ("1.1.0.dev0", 1), ("1.1.0", 4), ("1.10.0", 4)]
)
def test_versions_that_ignored_alpha(version, scale, tmp_path):
    model, folder = written(tmp_path, LoRA(rank=4, alpha=16.0), lambda c: c.update(version=f"adapters.{version}"))
    assert infuse.load(tiny("bert"), folder).method.scale == scale
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

"""What the configs in AdapterHub's files mean: presets, names of the first version, options that change nothing."""

import json

import pytest

import infuse
from infuse import Bottleneck, Compacter, LoRA
from infuse.testing import inputs, tiny, wake
from infuse.testing.conformance import close, output


def read_with(folder, method, change, kind="bert", **settings):
    """The adapter of a file whose facts were changed, and both adapters' outputs: as read, and as it was."""
    model = tiny(kind, **settings)
    infuse.attach(model, method, "task")
    wake(model, "task")
    infuse.save(model, "task", folder, format="adapterhub")
    path = folder / "adapter_config.json"
    facts = json.loads(path.read_text())
    change(facts)
    path.write_text(json.dumps(facts))
    adapter = infuse.load(model, folder, "again")
    return adapter, output(model, inputs(model), "again"), output(model, inputs(model), "task")


@pytest.mark.parametrize(
    ("config", "activation"),
    [
        (None, "gelu_new"),  # as it stands in the file
        ("compacter", "gelu"),
        ("compacter[reduction_factor=4]", "gelu"),
        ("compacter[reduction_factor={'0': 4, 'default': 4}, leave_out=[5, 6], non_linearity='gelu']", "gelu"),
    ],
)
def test_old_names_of_activations_are_those_of_settings_not_of_presets(config, activation, tmp_path):
    """Only where the file has no version, as the first version's."""

    def old(facts):
        del facts["version"]
        facts["config"] = config or facts["config"]

    adapter, ours, before = read_with(tmp_path, Compacter(width=8), old)
    assert adapter.method.activation == activation
    if activation == "gelu":
        close(ours, before)


@pytest.mark.parametrize(
    "config", ["seq_bn[reduction_factor=2", "seq_bn[leave_out=[0]", "seq_bn[=", "seq_bn[a: b: c]", "seq_bn|lora", "no"]
)
def test_texts_that_name_no_configuration_are_told(config, tmp_path):
    with pytest.raises(infuse.InfuseError, match="is none that Infuse has"):
        read_with(tmp_path, Bottleneck.houlsby(), lambda facts: facts.update(config=config))


@pytest.mark.parametrize(
    "method", [Bottleneck.houlsby(), Bottleneck.parallel(), Compacter(width=8)], ids=lambda method: method.name
)
@pytest.mark.parametrize("value", [False, None])
def test_options_that_change_nothing_here_are_read(method, value, tmp_path):
    """Where the residual is taken matters to adapters that read the normed sum, PHM options to PHM layers."""

    def idle(facts):
        facts["config"]["residual_before_ln"] = value
        if isinstance(method, Bottleneck):
            facts["config"] |= {"phm_bias": value, "shared_W_phm": True, "factorized_phm_rule": True}

    _, ours, before = read_with(tmp_path, method, idle)
    close(ours, before)


@pytest.mark.parametrize("value", [False, None])
@pytest.mark.parametrize(
    ("method", "option"),
    [
        (Bottleneck.pfeiffer(), "residual_before_ln"),
        (Bottleneck.houlsby(), "original_ln_after"),
        (Compacter(width=8), "phm_bias"),
    ],
    ids=["residual", "norm", "bias"],
)
def test_options_that_change_something_are_refused_however_they_are_off(method, option, value, tmp_path):
    with pytest.raises(infuse.InfuseError, match=f"{option}={value}, which Infuse's {type(method).__name__}"):
        read_with(tmp_path, method, lambda facts: facts["config"].update({option: value}))


@pytest.mark.parametrize("method", [LoRA(rank=2), Bottleneck.houlsby()], ids=lambda method: method.name)
def test_modernbert_is_exchanged_where_its_base_has_biases(method, tmp_path):
    """The library gives the fused projection a bias, at random where the base has none, with any adapter."""
    _, ours, before = read_with(tmp_path / "own", method, lambda facts: None, "modernbert", attention_bias=True)
    close(ours, before)
    without = tiny("modernbert")
    with pytest.raises(infuse.InfuseError, match="random bias"):
        infuse.load(without, tmp_path / "own")
    assert not hasattr(without, "infuse")


@pytest.mark.parametrize("method", [Bottleneck.pfeiffer(), Bottleneck.parallel()], ids=lambda method: method.reads)
def test_modernberts_residuals_are_others_in_the_library(method, tmp_path):
    with pytest.raises(infuse.InfuseError, match="another residual"):
        read_with(tmp_path, method, lambda facts: None, "modernbert", attention_bias=True)

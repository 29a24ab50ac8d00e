"""Files exchanged with the installed PEFT, in both directions, on every architecture of the table."""

import warnings

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from transformers import AutoModel, AutoModelForSequenceClassification

import infuse
from infuse import IA3, LoRA
from infuse.testing import TINY, inputs, tiny, wake
from infuse.testing.conformance import close, output

# Their classifiers need an end-of-text token in every row; the bare models are compared by hidden states.
BARE = {"t5", "mt5", "bart"}
METHODS = [
    IA3(),
    LoRA(rank=3),
    LoRA(rank=4, alpha=5.0, rslora=True, roles=("query", "key", "ffn_up", "ffn_output")),
    LoRA(rank=2, dora=True, roles=("query", "value", "attention_output")),
]


def make(kind, seed=0):
    if kind in BARE:
        return tiny(kind, AutoModel, seed)
    return tiny(kind, AutoModelForSequenceClassification, seed, num_labels=5)


@pytest.mark.parametrize("kind", TINY)
@pytest.mark.parametrize("method", METHODS, ids=lambda m: infuse.method.spelled(m))
def test_peft_loads_ours(method, kind, tmp_path):
    model = make(kind)
    batch = inputs(model)
    infuse.attach(model, method, "task")
    wake(model, "task")
    expected = output(model, batch)
    infuse.save(model, "task", tmp_path / "adapter")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # PEFT warns so of keys and options that it misses
        theirs = PeftModel.from_pretrained(make(kind), tmp_path / "adapter").eval()
    close(output(theirs.base_model.model, batch), expected)
    again = make(kind, seed=0)
    infuse.load(again, tmp_path / "adapter", name="again")
    assert torch.equal(output(again, batch), expected)


@pytest.mark.parametrize("kind", TINY)
@pytest.mark.parametrize("which", ["lora", "rslora+dora", "ia3", "patterns"])
def test_we_load_theirs(which, kind, tmp_path):
    model = make(kind)
    batch = inputs(model)
    task = None if kind in BARE else "SEQ_CLS"
    query, ffn = targets(kind)
    config = {
        "lora": LoraConfig(task_type=task, r=4, lora_alpha=6, target_modules=[query, ffn]),
        "rslora+dora": LoraConfig(task_type=task, r=4, use_rslora=True, use_dora=True, target_modules=[query]),
        "ia3": IA3Config(task_type=task, target_modules=[query, ffn], feedforward_modules=[ffn]),
        "patterns": LoraConfig(
            task_type=task, r=4, target_modules=[query, ffn], rank_pattern={query: 2}, alpha_pattern={ffn: 3}
        ),
    }[which]
    theirs = get_peft_model(model, config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    expected = output(theirs.base_model.model, batch)
    theirs.save_pretrained(tmp_path / "adapter")
    ours = make(kind)
    infuse.load(ours, tmp_path / "adapter", name="task")
    close(output(ours, batch), expected)
    infuse.save(ours, "task", tmp_path / "again")
    back = PeftModel.from_pretrained(make(kind), tmp_path / "again").eval()
    close(output(back.base_model.model, batch), expected)


def targets(kind):
    """Names of the modules that give queries (or all three) and consume the feed-forward activation."""
    sites = infuse.sites.find_sites(make(kind))
    whole = {s.role: s.path.rsplit(".", 1)[-1] for s in sites if s.whole}
    query = whole.get("query") or whole["qkv"]
    ffn = next(s.path for s in sites if s.role == "ffn_output")
    return query, ".".join(ffn.rsplit(".", 2)[-2:]) if "." in ffn else ffn

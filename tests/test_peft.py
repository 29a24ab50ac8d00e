"""Files exchanged with the installed PEFT, in both directions, on every architecture of the table."""

import warnings

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
)

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
    theirs = moved(get_peft_model(model, config))
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


def test_dropout_of_a_loaded_adapter_follows_the_model(tmp_path):
    theirs = moved(get_peft_model(make("bert"), LoraConfig(target_modules=["query"], lora_dropout=0.5)))
    theirs.save_pretrained(tmp_path)
    ours = make("bert")
    infuse.load(ours, tmp_path, name="task")
    batch = inputs(ours)
    assert not ours.training and torch.equal(output(ours, batch), output(ours, batch))
    ours.train()
    assert not torch.equal(output(ours, batch), output(ours, batch))


def test_a_files_adapter_is_the_same_at_every_loading_and_combines_with_others(tmp_path):
    """safetensors gives a file's tensors in another order each time."""
    moved(get_peft_model(make("bert"), LoraConfig(target_modules=["query", "value"]))).save_pretrained(tmp_path)
    ours = make("bert")
    orders = {tuple(infuse.load(ours, tmp_path, name=f"task{i}").sites) for i in range(8)}
    assert len(orders) == 1
    infuse.attach(ours, LoRA(alpha=8.0), "fresh", trained=())
    infuse.average(ours, ["task0", "fresh"], weights=[1, 0])
    batch = inputs(ours)
    close(output(ours, batch, "average"), output(ours, batch, "task0"))


@pytest.mark.parametrize("saved", ["bert.pooler", "output.LayerNorm", "word_embeddings", "classifier"])
@pytest.mark.parametrize("embeddings", [False, True])
def test_every_module_that_peft_trained_is_loaded(saved, embeddings, tmp_path):
    config = LoraConfig(task_type="SEQ_CLS", target_modules=["query"], modules_to_save=[saved])
    theirs = moved(get_peft_model(make("bert"), config))
    if embeddings:
        with torch.no_grad():
            theirs.get_input_embeddings().weight.add_(0.1)
    theirs.save_pretrained(tmp_path, save_embedding_layers=embeddings)
    ours = make("bert")
    infuse.load(ours, tmp_path, name="task")
    close(output(ours, inputs(ours)), output(theirs.base_model.model, inputs(ours)))


@pytest.mark.parametrize("pattern", ["bert.encoder.layer.1.attention.self.query", r"bert\..*query", "query"])
def test_patterns_by_path_hold_on_a_model_without_the_head(pattern, tmp_path):
    config = LoraConfig(
        task_type="SEQ_CLS", r=4, target_modules=["query"], alpha_pattern={pattern: 32}, rank_pattern={pattern: 2}
    )
    theirs = moved(get_peft_model(make("bert"), config))
    theirs.save_pretrained(tmp_path)
    bare = tiny("bert", AutoModel)
    bare.load_state_dict(make("bert").bert.state_dict())
    infuse.load(bare, tmp_path, name="task")
    batch = inputs(bare)
    close(output(bare, batch), theirs.base_model.model.bert(**batch).last_hidden_state)


@pytest.mark.parametrize("kind", ["bert", "roberta", "deberta-v2"])
def test_scales_at_any_feed_forward_module_are_read_again(kind, tmp_path):
    moved(get_peft_model(make(kind), IA3Config(task_type="SEQ_CLS"))).save_pretrained(tmp_path / "theirs")
    ours, again = make(kind), make(kind)
    infuse.load(ours, tmp_path / "theirs", name="task")
    infuse.save(ours, "task", tmp_path / "ours")
    infuse.load(again, tmp_path / "ours", name="task")
    assert torch.equal(output(again, inputs(ours)), output(ours, inputs(ours)))


@pytest.mark.parametrize("head", [AutoModelForSequenceClassification, AutoModelForQuestionAnswering])
def test_peft_loads_a_file_without_the_head(head, tmp_path):
    ours = tiny("bert", head)
    infuse.attach(ours, LoRA(), "task", trained=())
    wake(ours, "task")
    infuse.save(ours, "task", tmp_path)
    theirs = PeftModel.from_pretrained(tiny("bert", head), tmp_path).eval()
    batch = inputs(ours)
    close(theirs.base_model.model(**batch)[0], ours(**batch)[0])


def test_magnitudes_that_the_config_does_not_mention_are_not_dropped(tmp_path):
    moved(get_peft_model(make("bert"), LoraConfig(target_modules=["query"], use_dora=True))).save_pretrained(tmp_path)
    config = tmp_path / "adapter_config.json"
    config.write_text(config.read_text().replace('"use_dora": true', '"use_dora": false'))
    with pytest.raises(infuse.InfuseError, match=r"lora_magnitude_vector for .*config says nothing"):
        infuse.load(make("bert"), tmp_path)


@pytest.mark.parametrize("targets", [["word_embeddings"], ["word_embeddings", "query"]])
def test_adapted_embeddings_are_refused_as_such(targets, tmp_path):
    moved(get_peft_model(make("bert"), LoraConfig(target_modules=targets))).save_pretrained(tmp_path)
    with pytest.raises(infuse.InfuseError, match=r"word_embeddings.*linear modules only"):
        infuse.load(make("bert"), tmp_path)


@pytest.mark.parametrize("feedforward", [[], ["score"]])
def test_scales_of_a_module_with_one_output(feedforward, tmp_path):
    def base():
        return tiny("llama", AutoModelForSequenceClassification, num_labels=1)

    config = IA3Config(target_modules=["q_proj", "score"], feedforward_modules=feedforward)
    theirs, ours = moved(get_peft_model(base(), config)), base()
    theirs.save_pretrained(tmp_path)
    infuse.load(ours, tmp_path)
    batch = inputs(ours)
    close(ours(**batch).logits, theirs.base_model.model(**batch).logits)


def test_two_modules_of_a_file_do_not_fall_on_one(tmp_path):
    moved(get_peft_model(make("bart"), LoraConfig(target_modules=r".*self_attn\.q_proj"))).save_pretrained(tmp_path)
    with pytest.raises(infuse.InfuseError, match="of the file fit"):
        infuse.load(tiny("llama", AutoModel), tmp_path, name="task")


def test_the_base_under_an_adapted_output_embedding_is_no_copy(tmp_path):
    model = tiny("llama", AutoModelForCausalLM)
    theirs = moved(get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "lm_head"])))
    theirs.save_pretrained(tmp_path)
    ours, other = tiny("llama", AutoModelForCausalLM), tiny("llama", AutoModelForCausalLM, seed=1)
    infuse.load(ours, tmp_path, name="task")
    batch = inputs(ours)
    close(ours(**batch).logits, theirs(**batch).logits)
    with pytest.raises(infuse.InfuseError, match="base"):
        infuse.load(other, tmp_path, name="task")


def moved(theirs):
    """PEFT's model with trained parameters that are not where they start."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return theirs.eval()

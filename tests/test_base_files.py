"""Bases come from anywhere: none runs code of its own, takes all memory, or ends in a traceback."""

import ast
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import infuse
from infuse import InfuseError
from infuse.bases import load_base, outline, skeleton, tokenizer_of

ROOT = Path(__file__).parent.parent
CODE = """
import pathlib
pathlib.Path({canary!r}).touch()
from transformers import BertConfig, BertModel, BertTokenizerFast
class OwnConfig(BertConfig):
    model_type = "own"
class OwnModel(BertModel):
    config_class = OwnConfig
class OwnTokenizer(BertTokenizerFast):
    pass
"""
MAPS = {
    "config": ("config.json", {"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig"}}),
    "model": ("config.json", {"model_type": "own", "auto_map": {
        "AutoConfig": "own.OwnConfig", "AutoModel": "own.OwnModel",
        "AutoModelForSequenceClassification": "own.OwnModel"}}),
    "model of a known type": ("config.json", {"auto_map": {
        "AutoConfig": "own.OwnConfig", "AutoModel": "own.OwnModel"}}),
    "another repository": ("config.json", {"model_type": "own", "auto_map": {
        "AutoConfig": "some/where--own.OwnConfig"}}),
    "tokenizer": ("tokenizer_config.json", {"tokenizer_class": "OwnTokenizer", "auto_map": {
        "AutoTokenizer": ["own.OwnTokenizer", "own.OwnTokenizer"]}}),
    "old tokenizer": ("tokenizer_config.json", {"tokenizer_class": "OwnTokenizer", "auto_map": [
        "own.OwnTokenizer", "own.OwnTokenizer"]}),
}  # fmt: skip


@pytest.fixture
def base(tiny_base, tmp_path):
    """A copy of a base to spoil."""
    return Path(shutil.copytree(tiny_base, tmp_path / "base"))


def change(path, changes):
    known = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(known | changes))


def refused(action, *parts):
    with pytest.raises(InfuseError) as caught:
        action()
    told = str(caught.value)
    assert "\n" not in told and all(part in told for part in parts), told
    return told


def test_code_of_a_base_is_never_run_and_nobody_is_asked(tiny_base, tmp_path):
    """In a process of its own, with a yes to every question."""
    for kind, (name, changes) in MAPS.items():
        folder = Path(shutil.copytree(tiny_base, tmp_path / kind))
        change(folder / name, changes)
        (folder / "own.py").write_text(CODE.format(canary=str(tmp_path / "canary")))
    code = """
import sys
from infuse.bases import load_base, outline, skeleton, tokenizer_of
for base in sys.argv[1:]:
    for action in (load_base, lambda name: load_base(name, labels=3), tokenizer_of, skeleton, outline):
        try:
            action(base)
            print("loaded")
        except ValueError as error:
            print(type(error).__name__, error)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, *(str(tmp_path / kind) for kind in MAPS)],
        input=100 * "y\n", capture_output=True, text=True, env=os.environ | {"HF_HOME": str(tmp_path / "hub")},
    )  # fmt: skip
    assert not (tmp_path / "canary").exists() and "Do you wish" not in done.stdout + done.stderr
    lines = iter(done.stdout.splitlines())
    assert done.returncode == 0 and "trust_remote_code" not in done.stdout, done.stdout + done.stderr
    for kind in MAPS:
        told = [next(lines) for _ in range(5)]
        said = [line for line in told if "code of its own" in line and line.startswith("InfuseError The base")]
        # transformers has the known type; without a tokenizer nothing is wrong with the tokenizer's base
        assert len(said) == (0 if "known" in kind else 3 if "tokenizer" in kind else 5), told
        assert told.count("loaded") == 5 - len(said), told


@pytest.mark.parametrize("key", ["_attn_implementation", "attn_implementation", "_attn_implementation_internal",
                                 "experts_implementation"])  # fmt: skip
@pytest.mark.parametrize("value", ["owner/kernel", "owner/kernel:fn", "owner/kernel@rev:fn", {"": "owner/kernel"}])
@pytest.mark.parametrize("where", ["config.json", "generation_config.json", "below"])
def test_kernels_of_the_hub_are_refused(base, key, value, where):
    inner = {"text_config": {key: value}} if where == "below" else {key: value}
    change(base / (where if where != "below" else "config.json"), inner)
    for action in (load_base, skeleton, outline, tokenizer_of):
        refused(lambda action=action: action(str(base)), "code of the hub", key)


def test_every_load_says_that_no_code_is_run():
    """In the package and in the benchmarks, wherever an automatic class of transformers is asked."""
    silent = []
    for path in [*ROOT.joinpath("src").rglob("*.py"), *ROOT.joinpath("bench").rglob("*.py")]:
        texts = [path.read_text()]
        texts += [
            node.value
            for node in ast.walk(ast.parse(texts[0]))  # programs for processes of their own
            if isinstance(node, ast.Constant) and "from_pretrained(" in str(node.value) and "import" in str(node.value)
        ]
        for node in (node for text in texts for node in ast.walk(ast.parse(text))):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                continue
            given = {word.arg: word.value for word in node.keywords}
            flag = given.get("trust_remote_code")
            if node.func.attr in ("from_pretrained", "from_config") and not (
                isinstance(flag, ast.Constant) and flag.value is False
            ):
                silent.append(f"{path.name}:{node.lineno}")
    assert not silent


def text(content):
    return lambda path: path.write_text(content)


def with_(**changes):
    return lambda path: change(path, changes)


HUGE = 10**9
CONFIGS = {
    "a list": (text("[]"), "no JSON object"),
    "a text": (text('"bert"'), "no JSON object"),
    "nothing": (text(""), "can't be loaded"),
    "null": (text("null"), "no JSON object"),
    "no JSON": (text("{"), "can't be loaded"),
    "no Unicode": (lambda path: path.write_bytes(b'{"a": "\xff"}'), "can't be loaded"),
    "deep": (text("[" * 100_000), "can't be loaded"),
    "deep in a setting": (text('{"model_type": "bert", "a": ' + "[" * 5000 + "]" * 5000 + "}"), "can't be loaded"),
    "an endless number": (text('{"model_type": "bert", "hidden_size": ' + "9" * 5000 + "}"), "can't be loaded"),
    "no type": (text("{}"), "can't be loaded"),
    "another type": (with_(model_type="nothing"), "can't be loaded"),
    "a type that is a list": (with_(model_type=["bert"]), "can't be loaded"),
    "a type that is a number": (with_(model_type=3), "can't be loaded"),
    "a model of no texts": (with_(model_type="resnet"), "lacks weights"),
    "not a number": (with_(layer_norm_eps=float("nan")), "layer_norm_eps is not a number"),
    "text for a size": (with_(hidden_size="wide"), "can't be loaded"),
    "list for a size": (with_(hidden_size=[32]), "can't be loaded"),
    "fraction for a size": (with_(hidden_size=32.5), "can't be loaded"),
    "null for a size": (with_(hidden_size=None), "can't be loaded"),
    "negative size": (with_(hidden_size=-32), "base"),
    "size of nothing": (with_(hidden_size=0), "base"),
    "negative vocabulary": (with_(vocab_size=-5), "base"),
    "no heads": (with_(num_attention_heads=0), "base"),
    "odd heads": (with_(num_attention_heads=5), "can't be loaded"),
    "unknown function": (with_(hidden_act="boom"), "can't be loaded"),
    "huge size": (with_(hidden_size=HUGE), "no base has more"),
    "large size": (with_(hidden_size=2**20, num_attention_heads=4), "parameters"),
    "huge vocabulary": (with_(vocab_size=2**26, hidden_size=64), "parameters"),
    "huge positions": (with_(max_position_embeddings=2**26), "parameters"),
    "huge depth": (with_(num_hidden_layers=HUGE), "no base has more"),
    "huge labels": (with_(num_labels=HUGE), "no base has more"),
    "beyond all integers": (with_(hidden_size=10**30), "no base has more"),
    "odd labels": (with_(id2label=[1, 2]), "can't be loaded"),
    "odd dtype": (with_(dtype="complex"), "can't be loaded"),
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_configs_that_make_no_sense(base, kind):
    spoil, message = CONFIGS[kind]
    spoil(base / "config.json")
    refused(lambda: load_base(str(base)), message)


@pytest.mark.parametrize("kind", CONFIGS)
def test_counting_needs_a_config_that_makes_sense_or_gives_numbers(base, kind):
    CONFIGS[kind][0](base / "config.json")
    for action in (skeleton, outline):
        try:
            found = action(str(base))
        except InfuseError as error:
            assert "\n" not in str(error)
        else:
            assert found is not None


TOKENIZERS = {
    "tokenizer.json": [text("[]"), text("{}"), text("null"), text("{"), text("[" * 100_000), text('{"version": "1.0"}'),
                       with_(model={"type": "BPE", "vocab": 3}), with_(model={"type": "none"}),
                       with_(pre_tokenizer={"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated"}),
                       with_(added_tokens=[{"id": -1}]), lambda path: path.write_bytes(b"\xff\0")],
    "tokenizer_config.json": [text("[]"), text("3"), text("{"), text("[" * 100_000), with_(tokenizer_class=3),
                              with_(auto_map=3), with_(auto_map={"AutoTokenizer": 3}), with_(pad_token=[1]),
                              with_(added_tokens_decoder={"x": 3}), with_(extra_special_tokens=3)],
    "1_Pooling/config.json": [text("[]"), text("{"), text("[" * 100_000)],
}  # fmt: skip


@pytest.mark.parametrize("name, spoil", [(name, spoil) for name, each in TOKENIZERS.items() for spoil in each])
def test_other_files_that_make_no_sense(base, name, spoil):
    (base / name).parent.mkdir(exist_ok=True)
    spoil(base / name)
    refused(lambda: load_base(str(base)), str(base), "base")


def test_weights_are_never_unpickled(base, tmp_path):
    class Run:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "canary"),)

    (base / "model.safetensors").unlink()
    torch.save({"embeddings.word_embeddings.weight": Run()}, base / "pytorch_model.bin")
    refused(lambda: load_base(str(base)), "can't be loaded")
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("name", ["/etc", "/", "/proc", "", " ", ".", "..", "a" * 5000, "a\0b", "a/b/c", "../x", "~x",
                                  "a\nb", "\x1b[2J", "-", "a" * 300 + "/b", "é/ü", "\ud800", "http://x/y"])  # fmt: skip
def test_names_that_are_no_base(name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for action in (load_base, skeleton, outline, tokenizer_of):
        refused(lambda action=action: action(name))


def test_an_adapter_that_names_a_base_with_code(tiny_base, base, tmp_path):
    """An adapter's header may name any folder; predicting with it asks nothing and runs nothing."""
    model = load_base(str(tiny_base)).model
    infuse.attach(model, "ia3", "a")
    infuse.save(model, "a", tmp_path / "adapter")
    change(base / "config.json", MAPS["model"][1])
    (base / "own.py").write_text(CODE.format(canary=str(tmp_path / "canary")))
    done = subprocess.run(
        [sys.executable, "-m", "infuse", "predict", str(tmp_path / "adapter"), "a text", "--base", str(base)],
        input=100 * "yes\n", capture_output=True, text=True, env=os.environ | {"HF_HOME": str(tmp_path / "hub")},
    )  # fmt: skip
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "Traceback" not in done.stderr, done.stderr
    assert not (tmp_path / "canary").exists() and done.stdout == ""

"""Bases that are not whole: nothing is drawn at random, and no word unknown, in silence."""

import json
import os
import shutil

import pytest
from safetensors.torch import load_file, save_file

from infuse import InfuseError
from infuse.bases import load_base, tokenizer_of
from infuse.testing import TINY, tiny


def cut(size):
    return lambda folder: os.truncate(folder / "model.safetensors", size)


def without(part):
    def lose(folder):
        weights = load_file(folder / "model.safetensors")
        kept = {name: value for name, value in weights.items() if part not in name}
        save_file(kept, folder / "model.safetensors", {"format": "pt"})

    return lose


def wider(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 64}))


def untokenized(folder):
    for path in folder.glob("tokenizer*"):
        path.unlink()


@pytest.mark.parametrize("labels", [None, 6])
@pytest.mark.parametrize(
    "damage, message",
    [
        (cut(0), "header"),
        (cut(1000), "header"),
        (without("layer.1"), "lacks weights"),
        (without("word_embeddings"), "lacks weights.*word_embeddings"),
        (wider, r"other sizes than its config.json says, of .*intermediate"),
        (untokenized, "has no tokenizer"),
        (lambda folder: os.truncate(folder / "tokenizer.json", 500), "can't be loaded: Unterminated string"),
        (lambda folder: (folder / "model.safetensors").unlink(), "can't be loaded: Error no file named"),
    ],
)
def test_a_base_that_is_not_whole(tiny_base, tmp_path, damage, message, labels):
    shutil.copytree(tiny_base, tmp_path / "base")
    damage(tmp_path / "base")
    with pytest.raises(InfuseError, match=message) as caught:
        load_base(str(tmp_path / "base"), labels=labels)
    told = str(caught.value)
    assert "\n" not in told and "hub" not in told and told.count("tmp") == told.count(str(tmp_path)) and "base" in told


@pytest.mark.parametrize("kind", TINY)
def test_every_architecture_is_loaded_from_what_it_saves(tiny_base, tmp_path, kind):
    tiny(kind).save_pretrained(tmp_path)
    with pytest.raises(InfuseError, match="tokenizer"):
        tokenizer_of(str(tmp_path))
    for path in tiny_base.glob("tokenizer*"):
        shutil.copy(path, tmp_path)
    assert load_base(str(tmp_path)).model.config.model_type == tiny(kind).config.model_type


def test_a_head_for_other_labels_is_drawn_anew(tiny_base, tmp_path):
    base = load_base(str(tiny_base), labels=6)
    base.model.save_pretrained(tmp_path)
    base.tokenizer.save_pretrained(tmp_path)
    assert load_base(str(tmp_path), labels=7).model.classifier.out_features == 7

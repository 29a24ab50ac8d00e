"""Saving where another adapter was saved: the folder then holds the new one alone, and what is nobody's of ours."""

import itertools
import os

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification

import infuse
from infuse import Bottleneck, LoRA
from infuse.testing import inputs, tiny, wake
from infuse.testing.conformance import close, output

FORMS = ("infuse", "peft", "headed", "plain", "fusion", "pickled")
OTHERS = {"README.md": "mine", "model.safetensors": "a base", "notes": "mine"}


def adapted():
    """A model with two bottlenecks that have a copy of its head, one without, a LoRA, and a fusion."""
    model = tiny("bert", AutoModelForSequenceClassification)
    for name in ("a", "b"):
        infuse.attach(model, Bottleneck.pfeiffer(), name)
        wake(model, name)
    infuse.attach(model, Bottleneck.pfeiffer(), "bare", trained=())
    infuse.attach(model, LoRA(rank=2), "lora")
    infuse.fuse(model, ["a", "b"])
    for name in ("bare", "lora", "a,b"):
        wake(model, name)
    torch.nn.init.normal_(model.infuse["a"].copy_of("classifier").weight)
    return model


def save(model, form, folder):
    name = {"infuse": "bare", "peft": "lora", "headed": "a", "plain": "bare", "fusion": "a,b", "pickled": "bare"}[form]
    infuse.save(model, name, folder, format="infuse" if form in ("infuse", "peft") else "adapterhub")
    if form == "peft":  # as that library writes it, without the header
        save_file(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.safetensors")
    if form == "pickled":
        torch.save(load_file(folder / "adapter.safetensors"), folder / "pytorch_adapter.bin")
        (folder / "adapter.safetensors").unlink()
    return name


def files(folder):
    return {path.name for path in folder.iterdir() if path.is_file()}


@pytest.mark.parametrize(("old", "new"), [pair for pair in itertools.permutations(FORMS, 2) if pair[1] != "pickled"])
def test_what_is_read_is_what_was_saved_last(old, new, tmp_path):
    model = adapted()
    batch = inputs(model)
    save(model, new, tmp_path / "clean")
    save(model, old, tmp_path / "both")
    for name, text in OTHERS.items():
        (tmp_path / "both" / name).write_text(text)
    name = save(model, new, tmp_path / "both")
    assert files(tmp_path / "both") - OTHERS.keys() == files(tmp_path / "clean")
    assert all((tmp_path / "both" / each).read_text() == text for each, text in OTHERS.items())
    fresh = tiny("bert", AutoModelForSequenceClassification)
    infuse.load(fresh, tmp_path / "both")
    close(output(fresh, batch), output(model, batch, name))


@pytest.mark.parametrize(("old", "new"), [("headed", "infuse"), ("infuse", "headed"), ("fusion", "infuse")])
def test_a_reader_never_meets_files_of_two_adapters(tmp_path, monkeypatch, old, new):
    """Before every step of the writing a folder is read as the old adapter or as the new one, whole."""
    model, folder, seen = adapted(), tmp_path / "both", []
    batch = inputs(model)
    names = {"headed": "a", "infuse": "bare", "fusion": "a,b"}
    answers = [output(model, batch, names[form]) for form in (old, new)]

    def read():
        fresh = tiny("bert", AutoModelForSequenceClassification)
        infuse.load(fresh, folder)
        (which,) = (i for i, answer in enumerate(answers) if torch.allclose(output(fresh, batch), answer, atol=1e-5))
        return which

    def watched(step):
        real = getattr(os, step)

        def stepped(*arguments, **options):
            seen.append(read())
            return real(*arguments, **options)

        return stepped

    save(model, old, folder)
    with monkeypatch.context() as patched:
        for step in ("replace", "rename", "unlink", "link", "mkdir", "rmdir"):
            patched.setattr(os, step, watched(step))
        infuse.save(model, names[new], folder, format="adapterhub" if new == "headed" else "infuse")
    seen.append(read())
    assert seen == sorted(seen) and {*seen} == {0, 1} and len(seen) > 10

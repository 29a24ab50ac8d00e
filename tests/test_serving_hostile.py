"""Hostile files in a server's folder: each is listed as broken, and nobody else waits."""

import json
import os
import shutil
import sys

import pytest
import torch
from running import TOKEN
from safetensors.torch import load, save
from test_files import WEIGHTS, rewrite
from test_serving_store import base, becomes, folder, put, server, shelf, state  # noqa: F401  # fixtures

from infuse.cli import main
from infuse.model import store_of
from infuse.training.predictor import open_run


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: path.symlink_to("/dev/zero")])
@pytest.mark.parametrize("member", ["one", "two"])
def test_a_member_that_is_no_file(server, folder, shelf, make, member):  # noqa: F811  # fixtures
    """The look at the folder goes on, and the server ends when it is told to (by the fixture)."""
    before = server.classify("ada", "hello").json
    shutil.copytree(shelf / "mix", folder / ".mix")
    weights = folder / ".mix" / "members" / member / WEIGHTS
    weights.unlink()
    make(weights)
    os.rename(folder / ".mix", folder / "mix")
    assert "not a regular file" in becomes(server, "mix", "broken")["error"]
    put(shelf / "other bob", folder / "late")
    becomes(server, "late", "ready")
    assert server.classify("mix", "hello").status == 409
    assert server.classify("ada", "hello").json == before
    weights = folder / "mix" / "members" / member / WEIGHTS
    weights.rmdir() if weights.is_dir() and not weights.is_symlink() else weights.unlink()
    put(shelf / "mix" / "members" / member, weights.parent)
    becomes(server, "mix", "ready")


NAMES = {
    "dots": "." * 200_000, "parts": "x." * 30_000 + "lora_A.weight", "length": "x" * 400_000,
    "saved": "modules_to_save." * 20_000, "layers": "base_layer." * 30_000,
}  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_a_name_without_end_costs_the_model_no_time(server, folder, name, monkeypatch):  # noqa: F811  # fixtures
    """It is refused before the model's thread has heard of it."""
    attached, real = [], server.engine.model.attach
    monkeypatch.setattr(server.engine.model, "attach", lambda file, inner: attached.append(inner) or real(file, inner))
    content = (folder / "ada" / WEIGHTS).read_bytes()
    metadata = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]
    bad = save(load(content) | {NAMES[name]: torch.ones(1)}, metadata)
    put(bad, folder / "long")
    assert "are no paths of modules" in becomes(server, "long", "broken")["error"]
    assert server.classify("long", "hello").status == 409
    sent = server.ask("POST", "/v1/adapters/sent", bad, TOKEN)
    assert sent.status == 422 and "are no paths of modules" in sent.error and len(sent.error) < 1000
    assert not attached and server.classify("ada", "hello").status == 200


@pytest.mark.parametrize(
    "changes",
    [{"sites": ["0.query", "0.query"]}, {"copies": ["x", "x"]}, {"version": True}, {"layout": "x"},
     {"members": ["a", "a"]}, {"settings": {"9.query": {"name": "lora"}}}],
    ids=str,
)  # fmt: skip
def test_a_header_that_contradicts_itself_is_no_fault_of_the_server(server, folder, shelf, changes):  # noqa: F811
    shutil.copytree(shelf / "ada", folder / ".odd")
    rewrite(folder / ".odd", **changes)
    os.rename(folder / ".odd", folder / "odd")
    becomes(server, "odd", "broken") if "settings" not in changes else becomes(server, "odd", "ready")
    assert server.classify("odd", "hello").status == 409
    assert becomes(server, "odd", "broken")["error"]
    assert server.ask("POST", "/v1/adapters/odd", (folder / "odd" / WEIGHTS).read_bytes(), TOKEN).status == 422


def test_one_place_says_that_values_are_too_large(shelf, base, capsys):  # noqa: F811  # fixtures
    """The command line too, which would print NaN in its JSON."""
    huge = shelf.parent / "huge"
    shutil.copytree(shelf / "ada", huge, dirs_exist_ok=True)
    rewrite(huge, lambda tensors: {name: torch.full_like(value, 3e38) for name, value in tensors.items()})
    for form in ("json", "csv", "table"):
        with pytest.raises(SystemExit) as ended:
            main(["predict", str(huge), "hello", "--format", form])
        shown = capsys.readouterr()
        assert ended.value.code == 2 and not shown.out
        assert "values are too large to compute with" in shown.err and shown.err.count("\n") == 1


@pytest.mark.parametrize("form", ["json", "csv", "table"])
def test_labels_are_data_and_reach_a_terminal_escaped(shelf, form, capsys, monkeypatch):  # noqa: F811  # fixtures
    odd = shelf.parent / f"odd {form}"
    shutil.copytree(shelf / "ada", odd)
    facts = json.loads(json.loads(_head(odd))["__metadata__"]["infuse"])
    labels = ["a\x1b]0;owned\x07", "b\u202ec", "d\x9b2J"]
    rewrite(odd, head=facts["head"] | {"labels": labels})
    assert list(store_of(open_run(odd).base.model)["adapter"].head.labels) == labels
    for terminal in (True, False):
        monkeypatch.setattr(sys.stdout, "isatty", lambda terminal=terminal: terminal, raising=False)
        main(["predict", str(odd), "hello", "--format", form])
        shown = capsys.readouterr().out
        if terminal or form == "table":
            assert all(c.isprintable() or c == "\n" for c in shown) and "\\x9b2J" in shown
        elif form == "csv":
            assert all(label in shown for label in labels)
        else:
            assert {p["label"] for p in json.loads(shown)["predictions"]} == set(labels)


def _head(path):
    content = (path / WEIGHTS).read_bytes()
    return content[8 : 8 + int.from_bytes(content[:8], "little")]

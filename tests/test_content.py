"""What is read of files, and which words of them are run or shown: limits, patterns, names for the eye."""

import json
import os
import random
import re
import threading
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save
from test_files import CONFIG, WEIGHTS, plain, rewrite  # noqa: F401  # plain is a fixture

import infuse
from infuse import InfuseError
from infuse.errors import printable
from infuse.foreign import Patterns
from infuse.formats import content
from infuse.formats.content import parse_json, read_bytes
from infuse.formats.tensors import read_safetensors
from infuse.serving import files
from infuse.testing import inputs, tiny
from infuse.testing.conformance import output

PATHS = [
    f"model.layers.{i}.{name}"
    for i in range(12)
    for name in ("self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj", "mlp.experts.3.down_proj")
] + ["bert.pooler.dense"]
USED = [
    "q_proj", "q.proj", ".*q_proj", r"model\.layers\.\d+\.self_attn\.q_proj", "layers.(0|1|2|10).mlp.up_proj", "dense",
    r".*\.(q|k)_proj", "^model.layers.0.self_attn.k_proj", r"layers\.[0-5]\..*proj", "layers.1.self_attn.q_proj",
    "model.layers.1*.self_attn.q_proj", "nothing", r"(self_attn\.)?q_proj", r"layers.\d{2}.*", "down_proj|up_proj",
    "el.layers.0.self_attn.q_proj", r"(?:.*)_proj$", "layers.(0|1).(self_attn|mlp).(q_proj|up_proj)", "[a-z]+_proj",
]  # fmt: skip
"""Patterns as people write them."""
ENDLESS = [
    "(a+)+$", "(.*)*x", "(a|a)*b", "(a|b){30}", "(?=x)y", "a**", r"(a)\1", "(?i)x", ".*?x", "(" * 1500 + ")" * 1500,
    "(a|aa)" * 30, ".?" * 40 + "x", "[", "(", ")", "a" * 3000 + "+", "(?P<n>x)", "(?>a+)", "a++b", "x{1,99}" * 20,
]  # fmt: skip


def test_patterns_fit_as_in_peft():
    """``get_pattern_key`` of PEFT takes the first that ``re.match(rf"(.*\\.)?({key})$", path)`` finds."""
    draw = random.Random(0)
    for _ in range(500):
        some = {pattern: i for i, pattern in enumerate(draw.sample(USED, draw.randint(1, 5)))}
        known = Patterns(some)
        for path in PATHS:
            expected = next((v for key, v in some.items() if re.match(rf"(.*\.)?({key})$", path)), None)
            assert known.value(path, None) == expected, (some, path)


@pytest.mark.parametrize("pattern", ENDLESS, ids=lambda pattern: pattern[:12])
def test_patterns_that_may_take_for_ever_are_not_run(pattern):
    with pytest.raises(InfuseError, match="write the modules' paths out"):
        Patterns({"q_proj": 1, pattern: 2})


@pytest.mark.parametrize("pattern", [".*.*.*.*x", ".*a.*a.*x", "(q|k|v)" * 7 + ".*x"])
def test_patterns_have_so_much_work_in_all(pattern):
    known = Patterns({f"{pattern}{i}": i for i in range(50)})
    with pytest.raises(InfuseError, match="ask for too much work"):
        for i in range(5000):
            known.value("a." * 60 + str(i), None)


def test_many_paths_are_found_at_once():
    names = [f"layers.{i}.experts.{j}.up_proj" for i in range(48) for j in range(128)]
    known = Patterns({name: number for number, name in enumerate(names)})
    assert [known.value(f"model.{name}", None) for name in names] == list(range(len(names)))
    assert known.work < 200_000_000 / 10


@pytest.mark.parametrize("key", ["rank_pattern", "alpha_pattern"])
def test_a_file_with_an_endless_pattern(plain, key):  # noqa: F811  # the fixture
    about = json.loads((plain / CONFIG).read_text())
    (plain / CONFIG).write_text(json.dumps(about | {key: {"(a|a?)+$": 2}}))
    with pytest.raises(InfuseError, match=re.escape("pattern '(a|a?)+$' for modules")):
        infuse.load(tiny("bert"), plain)


# Files that are none


@pytest.mark.parametrize(
    "make, what",
    [(os.mkfifo, "a named pipe"), (os.mkdir, "a folder"), (lambda path: path.symlink_to("/dev/zero"), "a device"),
     (lambda path: path.symlink_to("away"), "There is no file x"), (lambda path: None, "There is no file x"),
     (lambda path: path.symlink_to(path.name), "can't be read")],
)  # fmt: skip
def test_what_is_no_regular_file_is_not_read(make, what, tmp_path):
    make(tmp_path / "x")
    with pytest.raises(InfuseError, match=what):
        read_bytes(tmp_path / "x")


def test_a_file_that_becomes_a_pipe_after_the_look_at_it(tmp_path, monkeypatch):
    path, real = tmp_path / "x", os.stat
    path.write_bytes(b"x")

    def stat(which, *args, **more):
        about = real(which, *args, **more)
        if which == path:
            path.unlink()
            os.mkfifo(path)
        return about

    monkeypatch.setattr(content.os, "stat", stat)
    with pytest.raises(InfuseError, match="a named pipe"):
        read_bytes(path)


def test_files_of_holes_and_of_too_many_bytes(tmp_path):
    with open(tmp_path / "x", "wb") as file:
        file.write(b"x" * 4096)
        file.truncate(1 << 40)
    with pytest.raises(InfuseError, match="mostly a hole"):
        read_bytes(tmp_path / "x")
    (tmp_path / "y").write_bytes(bytes(20 << 20))  # zeros that are there
    assert len(read_bytes(tmp_path / "y")) == 20 << 20
    with pytest.raises(InfuseError, match="at most 1,000 are read"):
        read_bytes(tmp_path / "y", 1000)
    with pytest.raises(InfuseError, match="no name of a file"):
        read_bytes(Path("a\0b"))


@pytest.mark.parametrize("end", [0, 4, -4])
def test_a_large_file_is_read_if_its_header_fits_it(tmp_path, monkeypatch, end):
    large = save({"x": torch.ones(5 << 20), "y": torch.ones(3)})
    (tmp_path / WEIGHTS).write_bytes(large[: len(large) + end] + bytes(max(0, end)))
    if end == 0:
        assert read_safetensors(tmp_path / WEIGHTS) == large
        return
    with pytest.raises(InfuseError, match="do not end where it does"):
        read_safetensors(tmp_path / WEIGHTS)


@pytest.mark.parametrize(
    "text, what",
    [('{"a": 1, "a": 2}', "'a' comes twice"), ('{"x": {"a": 1, "a": 2}}', "'a' comes twice"), ("\ud800", "JSON"),
     ('{"a": NaN}', "NaN is no"), ('{"a": -Infinity}', "no number"), ('{"a": ' + "9" * 5000 + "}", "5,000 digits"),
     ('{"a": 0.' + "1" * 99 + "}", "digits"), ('{"a": ' + "[" * 70 + "]" * 70 + "}", "60 deep"), ("[1]", "not a list"),
     ('{"a": 1', "delimiter")],
)  # fmt: skip
def test_json_within_limits(text, what):
    with pytest.raises(InfuseError, match=what):
        parse_json(text.encode("utf-8", "surrogatepass"), Path("x"))


def test_json_as_others_write_it():
    value = {"a": [1, 2.5, -1e-300, True, None, "ü\U0001f600"], "b": {"c": [[[{}]]]}, "9" * 60: 10**40}
    assert parse_json(json.dumps(value), Path("x")) == value


# Files of torch.save


@pytest.fixture
def pickled(plain):  # noqa: F811  # the fixture
    """A function that writes tensors as torch does, in the place of a good adapter's, whose first name it is given."""
    tensors = load_file(plain / WEIGHTS)
    (plain / WEIGHTS).unlink()

    def write(change=lambda tensors, name: tensors, **how):
        torch.save(change(dict(tensors), min(tensors)), plain / "adapter_model.bin", **how)
        return plain

    return write


@pytest.mark.parametrize("new", [True, False], ids=["zip", "before torch 1.6"])
@pytest.mark.parametrize("kind", [lambda t: t, torch.nn.Parameter, lambda t: t.half(), lambda t: t.double().bfloat16()])
def test_plain_tensors_of_either_form_are_read(pickled, new, kind):
    folder = pickled(lambda tensors, _: {n: kind(t) for n, t in tensors.items()}, _use_new_zipfile_serialization=new)
    model = tiny("bert")
    infuse.load(model, folder, name="x")
    assert torch.isfinite(output(model, inputs(model))).all()


def test_tied_tensors_of_a_file_are_read(pickled):
    """They share what they store."""
    folder = pickled(lambda tensors, name: tensors | {"pooler.dense.weight": torch.ones(32, 32), "pooler.dense.bias":
                                                      torch.ones(32), "x.y": next(iter(tensors.values()))})  # fmt: skip
    assert list(infuse.load(tiny("bert"), folder, name="x").copies) == ["pooler/dense"]


@pytest.mark.parametrize("new", [True, False], ids=["zip", "before torch 1.6"])
@pytest.mark.parametrize(
    "tensor",
    [torch.ones(1).expand(10**6, 10**6), torch.ones(100).as_strided((90, 90), (1, 0)), torch.ones(1, 2).expand(2, 2)],
    ids=["vast", "overlapping", "small"],
)
def test_tensors_larger_than_what_they_store_are_refused(pickled, tensor, new):
    folder = pickled(lambda tensors, name: tensors | {name: tensor}, _use_new_zipfile_serialization=new)
    with pytest.raises(InfuseError, match=r"larger than what is stored of them.*lora_A\.weight"):
        infuse.load(tiny("bert"), folder)


@pytest.mark.parametrize(
    "change, what",
    [(lambda tensors, name: tensors | {name: torch.ones(2, 2).to_sparse()}, "names 'torch._utils _rebuild_sparse"),
     (lambda tensors, name: tensors | {name: torch.ones(2, device="meta")}, "names 'torch._utils _rebuild_meta"),
     (lambda tensors, name: tensors | {f"{i}": tensors[name] for i in range(300)}, "the same values to many"),
     (lambda tensors, name: tensors | {"x": tensors}, "other than named tensors"),
     (lambda tensors, name: [tensors[name]], "other than named tensors"),
     (lambda tensors, name: tensors | {"x." * 60: tensors[name]}, "no paths of modules"),
     (lambda tensors, name: tensors | {3: tensors[name]}, "no paths of modules"),
     (lambda tensors, name: tensors | {name: torch.ones([1] * 9)}, "of a kind that no adapter has")],
)  # fmt: skip
def test_other_tensors_are_refused(pickled, change, what):
    with pytest.raises(InfuseError, match=re.escape(what)):
        infuse.load(tiny("bert"), pickled(change))


def test_a_compressed_archive_is_refused_before_it_is_unpacked(pickled, monkeypatch):
    folder = pickled()
    with zipfile.ZipFile(folder / "adapter_model.bin") as old:
        parts = {entry.filename: old.read(entry) for entry in old.infolist()}
    with zipfile.ZipFile(folder / "adapter_model.bin", "w", zipfile.ZIP_DEFLATED) as new:
        for name, part in parts.items():
            new.writestr(name, part)
    monkeypatch.setattr(torch, "load", None)
    with pytest.raises(InfuseError, match="is compressed, which torch's files are not"):
        infuse.load(tiny("bert"), folder)


# Names for the eye


@pytest.mark.parametrize(
    "text, shown",
    [("plain", "plain"), ("größer 日本 🏳️‍🌈 می‌خواهم", "größer 日本 🏳️‍🌈 می‌خواهم"), ("a\x1b[2Jb", "a\\x1b[2Jb"),
     ("a\nb\r\tc\x07", "a\\nb\\r\\tc\\x07"), ("a\u202eb\u2066", "a\\u202eb\\u2066"), ("\x9b2J\x7f", "\\x9b2J\\x7f"),
     ("\ud800", "\\ud800"), ("\u2028\u200b\ufeff", "\\u2028\\u200b\\ufeff"), ("\u00a0\\n", "\u00a0\\n")],
)  # fmt: skip
def test_what_moves_the_cursor_is_escaped(text, shown):
    assert printable(text) == shown == printable(shown)
    assert str(InfuseError(text)) == shown


def test_control_characters_may_be_kept_and_messages_have_an_end():
    assert printable("a\n\tb\x1b", keep="\n\t") == "a\n\tb\\x1b"
    long = str(InfuseError("x" * 10_000 + " the fix."))
    assert len(long) == 2000 and long.endswith(" the fix.")


def test_a_name_in_a_file_reaches_no_terminal_as_it_is(tmp_path):
    model = tiny("bert")
    infuse.attach(model, "lora", "a")
    folder = infuse.save(model, "a", tmp_path / "x")

    for changes in ({"sites": ["\x1b]0;x\x07"]}, {"base": {"name": "\x1b[2J", "type": "\n", "digest": "\u202e"}},
                    {"method": {"name": "\x1b[2J"}}, {"name": "\x1b[2J"}):  # fmt: skip
        rewrite(folder, **changes)
        with pytest.raises(InfuseError) as caught:
            infuse.load(tiny("bert"), folder)
        assert str(caught.value).isprintable() and "\\x1b" in str(caught.value)
        infuse.save(model, "a", folder)


def test_reading_leaves_no_thread_waiting(tmp_path):
    """A pipe in the place of a fusion's member, which used to stop whoever looked at the folder, for good."""

    model = tiny("bert")
    for name in ("one", "two"):
        infuse.attach(model, "pfeiffer", name)
    infuse.fuse(model, ["one", "two"], name="mix")
    folder = infuse.save(model, "mix", tmp_path / "mix")
    weights = folder / "members" / "two" / WEIGHTS
    weights.unlink()
    os.mkfifo(weights)
    told = []

    def look():
        for way in (files.read, lambda path: infuse.load(tiny("bert"), path)):
            try:
                way(folder)
            except InfuseError as error:
                told.append(str(error))

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    thread.join(60)
    if thread.is_alive():
        with open(weights, "wb"):  # lets it go
            pass
    assert len(told) == 2 and all("a named pipe" in text for text in told)

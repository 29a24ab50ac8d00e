"""YAML from anywhere: plain values of sizes that people write, or one sentence."""

import pytest
import yaml

from infuse.cli import main
from infuse.plain_yaml import read_yaml

LAUGHS = "a: &a0 [lol]\n" + "".join(f"b{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12))
MERGES = "a0: &a0 {k: 1}\n" + "".join(f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}]}}\n" for i in range(1, 12))
BAD = {
    "aliases in aliases": (LAUGHS, "aliases written out"),
    "merges in merges": (MERGES, "aliases written out"),
    "an alias of itself": ("data: &a [*a]", "part of"),
    "a mapping of itself": ("data: &a {b: *a}", "part of"),
    "many values": (f"members: [{'a, ' * 20_000}]", "more than 10,000"),
    "deep": ("data: " + "[" * 5000 + "]" * 5000, "deeply"),
    "deep without an end": ("{" * 100_000, "deeply"),
    "an object": ("data: !!python/object/apply:os.system ['true']", "asks for an object"),
    "a name": ("data: !!python/name:os.system", "!!python/name:os.system"),
    "another tag": ("data: !mine 3", "asks for an object"),
    "an object as a key": ("!!python/tuple [1]: 3", "asks for an object"),
    "an endless number": (f"epochs: {'9' * 5000}", "5,000 characters"),
    "an endless hexadecimal": (f"epochs: 0x{'f' * 5000}", "characters"),
    "an endless fraction": (f"epochs: 1.{'0' * 5000}", "characters"),
    "endless minutes": (f"epochs: {'1:' * 500}1", "characters"),
    "a key twice": ("epochs: 3\nepochs: 4", "'epochs' 2 times"),
    "a list as a key": ("? [a]\n: 3", "can't be read"),
    "a number without digits": ("epochs: !!int ''", "can't be read"),
    "a number of letters": ("epochs: !!float abc", "can't be read"),
    "neither true nor false": ("multi: !!bool maybe", "can't be read"),
    "no day": ("data: !!timestamp never", "can't be read"),
    "an odd day": ("data: 2001-99-99", "can't be read"),
    "odd bytes": ("data: !!binary 'a'", "can't be read"),
    "two documents": ("data: a\n---\ndata: b", "can't be read"),
    "a zero byte": ("data: 'a\0b'", "can't be read"),
    "an unknown alias": ("data: *a", "can't be read"),
    "no syntax": ("data: [", "can't be read"),
}


@pytest.mark.parametrize("kind", BAD)
def test_what_is_not_plain_is_one_sentence(kind, tmp_path, capsys):
    text, message = BAD[kind]
    path = tmp_path / "settings.yaml"
    path.write_text(text)
    with pytest.raises(SystemExit) as ended:
        main(["train", "--config", str(path)])
    told = capsys.readouterr().err
    assert ended.value.code == 2 and told.count("\n") == 1 and message in told and len(told) < 1000, told


PLAIN = ["", "null", "3", "[]", "{a: [1, 2.5, true, null, x], b: {c: 1e-3}}", "2001-01-02", "!!set {a, b}",
         "a: &a [1]\nb: *a\nc: *a", "{a: &a {x: 1}, b: {<<: *a, y: 2}}"]  # fmt: skip


@pytest.mark.parametrize("text", PLAIN)
def test_what_is_plain_is_read_as_ever(text):
    assert read_yaml(text) == yaml.safe_load(text)


@pytest.mark.parametrize("arguments", [
    ["train", "--data", "sample", "--method", f"lora:rank={'9' * 5000}"],
    ["train", "--data", "sample", "--method", "lora:rank=!!python/name:os.system"],
    ["train", "--data", "sample", "--method", f"lora:rank={'[' * 5000}"],
    ["tune", "--data", "sample", "--space", "rank: !!python/object/apply:os.system [true]"],
    ["tune", "--data", "sample", "--space", LAUGHS],
])  # fmt: skip
def test_yaml_on_the_command_line(arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    told = capsys.readouterr().err
    assert ended.value.code == 2 and told.startswith("infuse: ") and "Traceback" not in told


def test_a_value_of_the_wrong_kind_is_cut_short(tmp_path, capsys):
    path = tmp_path / "settings.yaml"
    path.write_text(f"epochs: [{'abcdefgh, ' * 5000}]")
    with pytest.raises(SystemExit):
        main(["train", "--config", str(path)])
    assert len(capsys.readouterr().err) < 500

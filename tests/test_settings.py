"""Every command takes its settings from a YAML file too."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from infuse.cli import COMMANDS, _parse, main
from infuse.settings import check_kinds

REQUIRED = {
    "evaluate": {"run": "runs/a", "data": "rows.csv"},
    "predict": {"run": "runs/a"},
    "calibrate": {"run": "runs/a"},
    "merge": {"run": "runs/a", "out": "merged"},
    "average": {"runs": ["runs/a", "runs/b"]},
    "serve": {"folder": "."},
}
OTHERS = {
    "evaluate": ({"multi": True, "format": "json"}, ["--multi", "--format", "json"]),
    "predict": ({"texts": ["one", "two"], "top_k": 1}, ["one", "two", "--top-k", "1"]),
    "calibrate": ({"keep": "9e-1"}, ["--keep", "0.9"]),
    "average": ({"weights": [1, 2.5], "out": "soup"}, ["--weights", "1", "2.5", "--out", "soup"]),
    "serve": ({"port": 0, "window": 3, "base": "minilm"}, ["--port", "0", "--window", "3", "--base", "minilm"]),
    "summary": ({"target": "b", "methods": [{"name": "lora", "rank": 4}]}, ["b", "--methods", "lora:rank=4"]),
    "sites": ({"base": "b"}, ["b"]),
    "fuse": ({"runs": ["a", "b"], "learning-rate": 1}, ["a", "b", "--learning-rate", "1"]),
}


def given(name: str) -> list[str]:
    """The required settings of a command as arguments."""
    values = dict(REQUIRED.get(name, {}))
    data = ["--data", values.pop("data")] if "data" in values else []
    return [word for value in values.values() for word in (value if isinstance(value, list) else [value])] + data


@pytest.mark.parametrize("name", COMMANDS)
def test_a_file_says_what_flags_say(name, tmp_path):
    path = tmp_path / "settings.yaml"
    settings, flags = OTHERS.get(name, ({}, []))
    path.write_text(yaml.safe_dump(REQUIRED.get(name, {}) | settings))
    read = _parse([name, "--config", str(path)])
    check_kinds(read)
    assert read.config == path
    assert replace(read, config=None) == _parse([name, *given(name), *flags])


@pytest.mark.parametrize("name", REQUIRED)
def test_the_command_line_fills_what_a_file_leaves_open(name, tmp_path):
    path = tmp_path / "settings.yaml"
    settings, flags = OTHERS.get(name, ({}, []))
    path.write_text(yaml.safe_dump(settings))
    read = _parse([name, f"--config={path}", *given(name)])
    check_kinds(read)
    assert replace(read, config=None) == _parse([name, *given(name), *flags])


def test_paths_in_a_file_may_begin_at_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    path = tmp_path / "settings.yaml"
    path.write_text("{out: ~/runs/a, members: [~/b, ~nobody-here/c]}")
    read = _parse(["train", "--config", str(path)])
    assert (read.out, read.members) == (tmp_path / "runs/a", (tmp_path / "b", Path("~nobody-here/c")))


def test_the_command_line_goes_before_a_file(tmp_path):
    path = tmp_path / "settings.yaml"
    path.write_text("{run: old, texts: [one], top_k: 2, format: csv}")
    read = _parse(["predict", "new", "two", "--config", str(path), "--top-k", "5"])
    assert (read.run, read.texts, read.top_k, read.format) == ("new", ("two",), 5, "csv")


@pytest.mark.parametrize("name, text, flags, used", [
    ("train", "epochs: 0", "--epochs 3", {"epochs": 3}),
    ("recommend", "max_latency: 20ms", "--data sample", {"max_latency": "20ms", "data": "sample"}),
    ("serve", "folder: nowhere", ".", {"folder": Path(".")}),
])  # fmt: skip
def test_a_value_that_the_command_line_mends_is_no_mistake(name, text, flags, used, tmp_path):
    path = tmp_path / "settings.yaml"
    path.write_text(text)
    read = _parse([name, "--config", str(path), *flags.split()])
    read.check()
    assert {each: getattr(read, each) for each in used} == used


def test_commands_run_from_a_file(tiny_base, toy, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    files = {
        "train": {"data": str(toy), "base": str(tiny_base), "epochs": 1, "baseline": False, "out": "run"},
        "evaluate": {"run": "run", "data": str(toy), "format": "json"},
        "predict": {"run": "run", "texts": ["my card is gone"], "format": "json"},
        "merge": {"run": "run", "out": "merged"},
        "sites": {"base": str(tiny_base)},
        "summary": {"target": str(tiny_base), "methods": [{"name": "lora", "rank": 4}]},
    }
    shown = {}
    for name, settings in files.items():
        Path(f"{name}.yaml").write_text(yaml.safe_dump(settings))
        main([name, "--config", f"{name}.yaml"])
        shown[name] = capsys.readouterr().out
    assert json.loads(shown["evaluate"])["rows"] == 120 and "my card is gone" in shown["predict"]
    assert Path("merged/model/model.safetensors").exists() and "lora:rank=4" in shown["summary"]
    assert "sites of" in shown["sites"] and "ffn" in shown["sites"]


@pytest.mark.parametrize("arguments, text, message", [
    ("evaluate", "run: a", "infuse evaluate needs --data"), ("predict", "top_k: 2", "infuse predict needs"),
    ("predict", "top_k: many", "In settings.yaml, top_k must be of the kind int, not 'many'"),
    ("predict", "format: xml", "In settings.yaml, format must be of the kind table, json, csv, not 'xml'"),
    ("merge", "run: 3", "In settings.yaml, run must be of the kind Path, not 3"),
    ("average", "weights: [1, x]", "In settings.yaml, weights should be a number, not 'x'"),
    ("serve", "window: soon", "In settings.yaml, window should be a number, not 'soon'"),
    ("serve", "fodler: a", "unknown settings (fodler); the settings are folder, base"),
    ("recommend", "must: [mix, sing]", "must must be of the kind list of merge, mix, fuse, not ['mix', 'sing']"),
    ("tune", "methods: ia3", "methods must be of the kind list of str, not 'ia3'"),
    ("train", "clip: 1" + "0" * 400, "clip should be a number, not 10000"),
    ("train", "config: other.yaml", "unknown settings (config); the settings are method"),
    ("train --config other.yaml", "epochs: 2", "Give one --config, not 2"),
    ("train --config=", "epochs: 2", "Give one --config, not 2"),
])  # fmt: skip
def test_mistakes(arguments, text, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("settings.yaml").write_text(text)
    with pytest.raises(SystemExit) as ended:
        main([*arguments.split(), "--config", "settings.yaml"])
    said = capsys.readouterr().err
    assert ended.value.code == 2 and message in said and said.count("\n") == 1, said
    assert [path.name for path in tmp_path.iterdir()] == ["settings.yaml"]

"""``infuse fuse`` and ``infuse average`` end to end on the tiny base."""

import csv
import shutil

import numpy as np
import pytest
import torch
import yaml
from conftest import LABELS, write_rows
from safetensors.torch import load_file

from infuse.checkpoint import header
from infuse.cli import main
from infuse.model import check_name
from infuse.training.members import member_names
from infuse.training.predictor import open_run

QUICK = ["--epochs", "2", "--batch-size", "16", "--validation-fraction", "0.25", "--no-baseline"]


@pytest.fixture(scope="module")
def runs(tiny_base, tmp_path_factory):
    """Two Pfeiffer runs on different labels, and a fusion of them for a third task."""
    folder = tmp_path_factory.mktemp("fuse")
    left = write_rows(folder / "left.csv", LABELS[:3])
    right = write_rows(folder / "right.csv", LABELS[3:])
    target = write_rows(folder / "target.csv", LABELS, 8)
    main(["train", "--data", str(left), "--base", str(tiny_base), "--method", "pfeiffer:reduction=4",
          "--out", str(folder / "left"), *QUICK])  # fmt: skip
    main(["fuse", str(folder / "left"), "--member-data", str(right), "--member-method", "pfeiffer:reduction=4",
          "--data", str(target), "--base", str(tiny_base), "--out", str(folder / "fused"), *QUICK])  # fmt: skip
    return folder


def test_a_fusion_run_holds_its_members_and_heat_maps(runs):
    fused = runs / "fused"
    assert {p.name for p in (fused / "adapter" / "members").iterdir()} == {"left", "fused-right"}
    for name in ("fusion_layers", "fusion_classes"):
        assert (fused / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        with open(fused / f"{name}.csv", newline="") as file:
            rows = list(csv.DictReader(file))
        weights = np.array([[float(row["left"]), float(row["fused-right"])] for row in rows])
        np.testing.assert_allclose(weights.sum(1), 1, atol=1e-2)
    assert len(rows) == len(LABELS)
    page = (fused / "report.html").read_text()
    titles = ("Learning curves", "Confusion", "What the fusion attends to, by layer", "What it attends to, by label")
    for shown in titles:
        assert f"<figcaption>{shown}</figcaption><svg" in page
    assert all(f">{word}</text>" in page for word in ("left", "fused-right", "0.ffn_output", *LABELS))
    assert "infuse train --method fusion" in page and f"--members {runs / 'left'}" in page
    assert open_run(fused).labels == tuple(sorted(LABELS))


def test_a_fusion_is_repeated_by_its_own_config(runs, tmp_path):
    main(["fuse", "--config", str(runs / "fused" / "config.yaml"), "--out", str(tmp_path / "again")])
    one, two = (load_file(p / "adapter" / "adapter_model.safetensors") for p in (runs / "fused", tmp_path / "again"))
    assert one.keys() == two.keys() and all(torch.equal(value, two[name]) for name, value in one.items())


def test_a_fusion_takes_the_layers_asked_for(runs, tiny_base, tmp_path, capsys):
    words = ["fuse", str(runs / "left"), str(runs / "fused-right"), "--data", str(runs / "target.csv"),
             "--base", str(tiny_base), *QUICK]  # fmt: skip
    main([*words, "--layers", "last:1", "--out", str(tmp_path / "one")])
    assert {site.split(".")[0] for site in header(tmp_path / "one" / "adapter")["sites"]} == {"1"}
    with pytest.raises(SystemExit):
        main([*words, "--layers", "nonsense", "--out", str(tmp_path / "none")])
    assert "not understood" in capsys.readouterr().err and not (tmp_path / "none").exists()


def test_members_keep_their_answers(runs):
    texts = ["my card is gone", "how do I get a statement"]
    before = open_run(runs / "left").probabilities(texts)
    member = open_run(runs / "fused" / "adapter" / "members" / "left", str(open_run(runs / "left").base.name))
    np.testing.assert_array_equal(member.probabilities(texts), before)
    own = load_file(runs / "left" / "adapter" / "adapter_model.safetensors")
    kept = load_file(runs / "fused" / "adapter" / "members" / "left" / "adapter_model.safetensors")
    assert all(torch.equal(own[name], kept[name]) for name in own)


def test_members_that_are_trained_already_are_kept_if_nothing_has_changed(runs, tiny_base, tmp_path, capsys):
    data, out = tmp_path / "right.csv", tmp_path / "fused"
    shutil.copy(runs / "right.csv", data)
    shutil.copytree(runs / "left", tmp_path / "left")

    def fuse(*more):
        main(["fuse", str(tmp_path / "left"), "--member-data", str(data), "--data", str(data), "--base", str(tiny_base),
              "--member-method", "pfeiffer:reduction=4", "--out", str(out), *QUICK, *more])  # fmt: skip
        return (tmp_path / "fused-right" / "metrics.json").stat().st_mtime_ns, capsys.readouterr().err

    first, _ = fuse()
    shutil.rmtree(out)  # as if interrupted before the fusion began
    second, said = fuse()
    assert second == first and "kept" in said and (out / "metrics.json").exists()
    for more, message in (("--seed", "1"), "finished run"), ((), "data has changed"):
        if not more:
            write_rows(data, LABELS[2:])
        shutil.rmtree(out, ignore_errors=True)
        with pytest.raises(SystemExit):
            fuse(*more)
        assert message in " ".join(capsys.readouterr().err.split()) and not out.exists()


def test_members_are_trained_under_the_settings_given(tiny_base, tmp_path):
    for name, labels in {"left": LABELS[:3], "right": LABELS[2:]}.items():
        rows = write_rows(tmp_path / f"{name}.csv", labels).read_text()
        (tmp_path / f"{name}.csv").write_text(rows.replace("text,label", "body,tag", 1))
    left, right = (str(tmp_path / f"{name}.csv") for name in ("left", "right"))
    main(["fuse", "--member-data", left, right, "--data", left, "--validation", left, "--test", left, "--text", "body",
          "--label", "tag", "--epochs", "1", "--precision", "fp32", "--max-length", "16", "--layers", "last:1",
          "--learning-rate", "2e-3", "--head", "hf", "--base", str(tiny_base),
          "--out", str(tmp_path / "out")])  # fmt: skip
    given = {"text": "body", "label": "tag", "epochs": 1, "precision": "fp32", "max_length": 16, "layers": "last:1"}
    alone = {"method": "pfeiffer", "learning_rate": None, "validation": None, "test": None, "members": [],
             "head": "cosine"}  # fmt: skip
    for name, source in {"left": left, "right": right}.items():
        settings = yaml.safe_load((tmp_path / f"out-{name}" / "config.yaml").read_text())
        assert settings.items() >= (given | alone | {"data": source, "baseline": False}).items()


def test_a_mistake_is_told_before_members_are_trained(tiny_base, tmp_path, capsys):
    data = str(write_rows(tmp_path / "left.csv", LABELS[:3]))
    with pytest.raises(SystemExit):
        main(["fuse", "--member-data", data, "--data", data, "--learning-rate", "99", "--base", str(tiny_base),
              "--out", str(tmp_path / "out")])  # fmt: skip
    assert "learning_rate" in capsys.readouterr().err and [path.name for path in tmp_path.iterdir()] == ["left.csv"]


def test_overwriting_a_fusion_leaves_nothing_of_it(runs, tiny_base, tmp_path, capsys):
    shutil.copytree(runs / "fused", tmp_path / "fused")
    main(["train", "--data", str(runs / "left.csv"), "--base", str(tiny_base), "--out", str(tmp_path / "fused"),
          "--overwrite", *QUICK])  # fmt: skip
    assert {p.name for p in (tmp_path / "fused").rglob("*")} == {p.name for p in (runs / "left").rglob("*")}


@pytest.mark.parametrize("there", [False, True])
def test_members_that_do_not_fit_leave_nothing(runs, tiny_base, tmp_path, there, capsys):
    out = tmp_path / "fused"
    if there:
        out.mkdir()
    main(["train", "--data", str(runs / "left.csv"), "--base", str(tiny_base), "--out", str(tmp_path / "ia3"), *QUICK])
    with pytest.raises(SystemExit):
        main(["fuse", str(runs / "left"), str(tmp_path / "ia3"), "--data", str(runs / "left.csv"),
              "--base", str(tiny_base), "--out", str(out), *QUICK])  # fmt: skip
    assert "can't be fused" in " ".join(capsys.readouterr().err.split())
    assert out.exists() == there and not list(out.glob("*"))


def test_an_average_without_a_head_says_so(runs, tmp_path, capsys):
    main(["average", str(runs / "left"), str(runs / "fused-right"), "--out", str(tmp_path / "soup")])
    assert "no head" in capsys.readouterr().err and header(tmp_path / "soup")["head"] is None


def test_average_of_runs_predicts(runs, tiny_base, capsys):
    left = runs / "left"
    main(["train", "--data", str(runs / "left.csv"), "--base", str(tiny_base), "--method", "pfeiffer:reduction=4",
          "--seed", "1", "--out", str(runs / "again"), *QUICK])  # fmt: skip
    main(["average", str(left), str(runs / "again"), "--out", str(runs / "soup")])
    a, b, soup = (load_file(p / "adapter_model.safetensors") for p in
                  (left / "adapter", runs / "again" / "adapter", runs / "soup"))  # fmt: skip
    for name, value in soup.items():
        torch.testing.assert_close(value, (a[name] + b[name]) / 2)
    assert open_run(runs / "soup").labels == tuple(sorted(LABELS[:3]))
    told = header(left / "adapter")["info"], header(runs / "soup")["info"]  # nobody has measured the average yet
    assert set(told[0]) == {"run", "metrics", "data", "data_sha256"} and set(told[1]) == {"run", "average"}
    again = ["average", str(runs / "again"), str(left), "--out"]
    main([*again, str(runs / "soup")])  # an average may take the place of another one, but not of anything else
    for other in (left, left / "adapter"):
        before = {p: p.read_bytes() for p in other.rglob("*") if p.is_file()}
        with pytest.raises(SystemExit):
            main([*again, str(other)])
        assert {p: p.read_bytes() for p in other.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize(
    ("folders", "names"),
    [
        (["r/one", "r/two"], ["one", "two"]),
        (["r/one/adapter", "r/two"], ["one", "two"]),
        (["a/run", "b/run/adapter"], ["a-run", "b-run"]),
        (["r/double", "r/two words"], ["r-double", "r-two-words"]),
        (["r/adapter/adapter", "r/adapter-average"], ["r-adapter", "r-adapter-average"]),
        (["r/one", "r/one/adapter"], ["one-1", "one-2"]),
        (["a/b-c", "a-b/c", "r/train"], ["b-c-1", "c-2", "train-3"]),
    ],
)
def test_members_are_named_after_their_runs(folders, names, tmp_path):
    found = member_names([tmp_path / folder for folder in folders])
    assert found == names and len(set(map(check_name, found))) == len(found)


def test_runs_may_be_given_by_their_adapters_and_be_called_anything(runs, tiny_base, tmp_path, capsys):
    first, second = tmp_path / "double", tmp_path / "again" / "double"
    shutil.copytree(runs / "left", first)
    shutil.copytree(runs / "left", second)
    main(["average", str(first / "adapter"), str(second), "--out", str(tmp_path / "soup")])
    assert open_run(tmp_path / "soup").labels == tuple(sorted(LABELS[:3]))
    main(["fuse", str(first / "adapter"), str(second / "adapter"), "--data", str(runs / "left.csv"),
          "--base", str(tiny_base), "--out", str(tmp_path / "fused"), *QUICK])  # fmt: skip
    names = {f"{tmp_path.name}-double", "again-double"}
    assert {p.name for p in (tmp_path / "fused" / "adapter" / "members").iterdir()} == names


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["fuse", "LEFT", "--data", "TARGET"], "two or more members"),
        (["fuse", "LEFT", "nowhere", "--data", "TARGET"], "nowhere"),
        (["train", "--method", "fusion", "--data", "TARGET"], "infuse fuse"),
        (["fuse", "LEFT", "--member-data", "TARGET", "--method", "lora", "--data", "TARGET"], "mixes no adapters"),
        (["average", "LEFT"], "two or more"),
    ],
)
def test_mistakes_are_one_sentence(words, message, runs, tiny_base, tmp_path, capsys):
    places = {"LEFT": runs / "left", "TARGET": runs / "target.csv"}
    base = [] if words[0] == "average" else ["--base", str(tiny_base)]
    with pytest.raises(SystemExit) as exit_code:
        main([*(str(places.get(w, w)) for w in words), *base, "--out", str(tmp_path / "out")])
    assert exit_code.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not list(tmp_path.iterdir())

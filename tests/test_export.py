"""Models that need no Infuse: those of merged runs, and of full fine-tuning."""

import json

import pytest
from conftest import LABELS
from transformers import pipeline

from infuse.data import read
from infuse.export import merge_run
from infuse.training.config import TrainConfig
from infuse.training.predictor import open_run
from infuse.training.run import train


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("multi", [False, True])
def test_with_a_head_of_transformers_a_pipeline_gives_labels_and_probabilities(tiny_base, toy, tmp_path, method, multi):
    """The trained head, not the one that the base began with; the labels' names; a sigmoid for several labels."""
    rows = read(toy)
    data = tmp_path / "rows.jsonl"
    labels = [[label, "odd"] if i % 2 else [label] for i, label in enumerate(rows.labels)] if multi else rows.labels
    records = ({"text": text, "label": label} for text, label in zip(rows.texts, labels, strict=True))
    data.write_text("".join(json.dumps(record) + "\n" for record in records))
    folder = tmp_path / "run"
    settings = {"base": str(tiny_base), "method": method, "head": "hf", "epochs": 3, "learning_rate": 0.01}
    train(TrainConfig(data=str(data), out=folder, precision="fp32", baseline=False, **settings))
    if method != "full":
        folder = merge_run(folder, tmp_path / "merged")
    texts, ask = list(rows.texts[::20]), pipeline("text-classification", str(folder / "model"), top_k=None)
    for given, ours in zip(ask(texts), open_run(folder).answers(texts, top_k=9), strict=True):
        assert {each["label"]: each["score"] for each in given} == pytest.approx(dict(ours.top), abs=1e-4)
        assert {label for label, _ in ours.top} >= set(LABELS)

"""What tests share: no network, a tiny base model with a real tokenizer, and a small easy task."""

import os

os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"  # before the hub's client is imported

import csv
import gc
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import WordLevelTrainer
from transformers import PreTrainedTokenizerFast

from infuse.data import read
from infuse.testing import tiny

torch.set_num_threads(1)

LABELS = ("card_lost", "loan_repay_early", "pin_forgotten", "savings_rate", "statement_download", "travel_notice")
PICTURELESS = {"test_calibrate", "test_compare", "test_export", "test_overwriting", "test_training", "test_tune"}
SPECIAL = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}


def pytest_collection_modifyitems(items: list) -> None:
    """The README's commands, the longest tests, come first: at the end one worker would run them alone.

    Tests that look at no pictures get blank ones.
    """
    items.sort(key=lambda item: item.path.name != "test_docs.py")
    for item in items:
        if item.path.stem in PICTURELESS:
            item.add_marker(pytest.mark.usefixtures("no_pictures"))


def pytest_collection_finish() -> None:
    """What was imported is never garbage: each training collects twice, 0.1 s each time with a million objects."""
    gc.freeze()


@pytest.fixture
def no_pictures(monkeypatch) -> None:
    """Pages with blank pictures, for tests of something else: drawing takes two thirds of a tiny training."""
    monkeypatch.setattr("infuse.report.figures._draw", lambda figure: Figure(figsize=(1, 1)))


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory) -> Path:
    return make_tiny_base(tmp_path_factory.mktemp("bases") / "tiny")


def make_tiny_base(folder: Path) -> Path:
    """The folder of a tiny BERT: random layers over word vectors that know the topics of the bundled sample."""
    tokenizer = Tokenizer(WordLevel(unk_token="[UNK]"))
    tokenizer.normalizer = BertNormalizer()
    tokenizer.pre_tokenizer = BertPreTokenizer()
    tokenizer.train_from_iterator(read("sample").texts, WordLevelTrainer(special_tokens=list(SPECIAL.values())))
    ends = [(token, tokenizer.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    model = tiny("bert", vocab_size=tokenizer.get_vocab_size())
    with torch.no_grad():
        model.embeddings.word_embeddings.weight.copy_(torch.from_numpy(word_vectors(tokenizer, 32)))
    model.save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=64, **SPECIAL).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def toy(tmp_path_factory) -> Path:
    """A CSV file with 20 rows of each of six labels of the bundled sample."""
    return write_rows(tmp_path_factory.mktemp("data") / "toy.csv", LABELS)


@pytest.fixture(scope="session")
def browser():
    """A headless Chromium of the system; nothing is downloaded."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
    program, driver = next(filter(None, map(shutil.which, names)), None), shutil.which("chromedriver")
    if not program or not driver:
        pytest.skip("no Chromium with its chromedriver here: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = program
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    window = webdriver.Chrome(options=options, service=webdriver.ChromeService(executable_path=driver))
    yield window
    window.quit()


def write_rows(path: Path, labels, count: int = 20) -> Path:
    """The first ``count`` rows of some labels of the sample, as CSV."""
    sample = read("sample")
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        for name in labels:
            own = [text for text, label in zip(sample.texts, sample.labels, strict=True) if label == name]
            writer.writerows((text, name) for text in own[:count])
    return path


def word_vectors(tokenizer: Tokenizer, width: int) -> np.ndarray:
    """Principal directions of how often each word occurs under each label: (words, width), σ = 1."""
    sample = read("sample")
    counts = np.zeros((tokenizer.get_vocab_size(), len(sample.label_set)), np.float32)
    for text, label in zip(sample.texts, sample.labels, strict=True):
        counts[list(set(tokenizer.encode(text).ids)), sample.label_set.index(label)] += 1
    total = counts.sum(1, keepdims=True)
    left, sizes, _ = np.linalg.svd((counts / total.clip(1) - 1 / counts.shape[1]) * np.log1p(total), False)
    vectors = (left * sizes)[:, :width]
    return vectors / vectors.std()

"""The faces towards other libraries: scikit-learn's conventions, a plain PyTorch loop, transformers' Trainer."""

import copy
import pickle

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.sparse import csr_array
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.metrics import f1_score, log_loss
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, MultiLabelBinarizer
from test_files import rewrite
from transformers import AutoModelForSequenceClassification, Trainer, TrainingArguments

import infuse
from infuse import IA3, Classifier, InfuseError, LoRA
from infuse.data import read
from infuse.model import store_of
from infuse.testing import inputs, tiny
from infuse.testing.conformance import output


@pytest.fixture(scope="module")
def task(toy):
    """Texts and labels of the toy, shuffled."""
    rows = read(toy)
    order = np.random.default_rng(0).permutation(len(rows))
    return [rows.texts[i] for i in order], [rows.labels[i] for i in order]


@pytest.fixture(scope="module")
def quick(tiny_base):
    """An unfitted classifier that needs half a second."""
    return Classifier(str(tiny_base), "ia3", epochs=3, batch_size=16, learning_rate=0.02, validation_fraction=0.2)


@pytest.fixture(scope="module")
def model(quick, task):
    return clone(quick).fit(*task)


# scikit-learn


def test_it_learns_and_answers(model, task):
    texts, labels = task
    assert list(model.classes_) == sorted(set(labels))
    given = model.predict_proba(texts)
    assert given.shape == (120, 6) and np.allclose(given.sum(1), 1) and (given >= 0).all()
    assert (model.predict(texts) == model.classes_[given.argmax(1)]).all()
    assert model.score(texts, labels) == np.mean(model.predict(texts) == labels) > 0.8
    assert model.predict(texts[:1]).shape == (1,)
    assert any("eval_macro_f1" in entry for entry in model.history_)


@pytest.mark.parametrize("precision, bound", [("fp32", 1e-5), ("bf16", 2e-2)])
def test_answers_do_not_depend_on_the_company(quick, task, precision, bound):
    """In bfloat16 a row's last digits depend on the shape of its batch."""
    model = clone(quick).set_params(precision=precision).fit(*task)
    texts = [*task[0][:5], "word " * 200]
    together = model.predict_proba(texts)
    alone = np.concatenate([model.predict_proba([text]) for text in texts])
    assert np.allclose(together, alone, atol=bound)


def test_parameters_follow_the_conventions(quick):
    settings = quick.get_params()
    assert settings["epochs"] == 3 and settings["method"] == "ia3"
    assert Classifier(**settings).get_params() == clone(quick).get_params() == settings
    assert clone(quick).set_params(method=LoRA(rank=2), epochs=1).get_params()["method"] == LoRA(rank=2)
    with pytest.raises(ValueError, match="Invalid parameter 'epoch'"):
        clone(quick).set_params(epoch=1)
    assert "method='ia3'" in repr(quick).replace('"', "'") or "epochs=3" in repr(quick)


def test_fit_leaves_the_settings_alone(quick, task):
    settings = quick.get_params()
    copy = clone(quick)
    assert copy.fit(*task) is copy and copy.get_params() == settings
    first = copy.predict_proba(task[0])
    assert np.array_equal(copy.fit(*task).predict_proba(task[0]), first)


def test_cross_validation(quick, task):
    found = cross_val_score(quick, *map(np.array, task), cv=2)
    assert found.shape == (2,) and (found > 0.5).all()


def test_searches_go_over_methods(quick, task):
    search = GridSearchCV(quick, {"method": ["ia3", "lora:rank=2", "head"]}, cv=2, error_score="raise")
    search.fit(*task)
    assert search.best_params_["method"] in ("ia3", "lora:rank=2", "head")
    assert (search.cv_results_["mean_test_score"] > 0.5).all()
    assert set(search.predict(task[0])) <= set(task[1])


def test_it_works_in_a_pipeline(quick, task):
    pipeline = make_pipeline(FunctionTransformer(lambda texts: [text.lower() for text in texts]), clone(quick))
    assert pipeline.fit(*task).score(*task) > 0.8


@pytest.mark.parametrize(
    "kind",
    [int, np.int64, np.uint8, float, lambda n: np.float32(n / 10), lambda n: n > 5, lambda n: np.bool_(n > 5),
     lambda n: n * 10**30],
    ids=["int", "int64", "uint8", "float", "float32", "bool", "numpy's bool", "beyond 64 bits"],
)  # fmt: skip
def test_labels_come_back_as_given(quick, task, kind, tmp_path):
    """Numbers stay numbers, in numerical order, in which 2 comes before 10."""
    names = sorted(set(task[1]))
    labels = [kind(2 * names.index(label) + 2) for label in task[1]]
    model = clone(quick).fit(task[0], labels)
    assert model.classes_.tolist() == sorted(set(labels)) and model.classes_.dtype == np.array(labels).dtype
    assert model.predict(task[0]).dtype == np.array(labels).dtype
    assert model.score(task[0], labels) > 0.8
    if np.array(labels).dtype.kind not in "fO":  # fractions and what is beyond 64 bits are no classes to scikit-learn
        assert log_loss(labels, model.predict_proba(task[0])) < 1
    again = Classifier.load(model.save(tmp_path / "saved"))
    again = Classifier.load(pickle.loads(pickle.dumps(again)).save(tmp_path / "again"))
    assert again.classes_.dtype == model.classes_.dtype and again.classes_.tolist() == model.classes_.tolist()
    assert np.array_equal(again.predict_proba(task[0]), model.predict_proba(task[0]))
    assert again.score(task[0], labels) == model.score(task[0], labels)


def test_several_numbers_per_text_come_back_from_a_file(quick, task, tmp_path):
    names = sorted(set(task[1]))
    model = clone(quick).fit(task[0], [[names.index(label) + 5, 30] for label in task[1]])
    again = Classifier.load(model.save(tmp_path / "saved"))
    assert again.classes_.tolist() == model.classes_.tolist() == [5, 6, 7, 8, 9, 10, 30]
    assert again.predict(task[0]) == model.predict(task[0])


@pytest.mark.parametrize("label_type", [None, "later", ["int64"], "int64", "i8,i8", "bool", "int", 3], ids=repr)
def test_files_of_other_versions_have_labels_of_strings(model, task, tmp_path, label_type):
    """None: of an earlier version, which told no type; the others: of a later one, or damaged."""
    path = model.save(tmp_path / "saved")
    info = infuse.checkpoint.header(path)["info"]
    assert info.pop("label_type") == "str"
    rewrite(path, info=info if label_type is None else info | {"label_type": label_type})
    loaded = Classifier.load(path)
    assert loaded.classes_.tolist() == sorted(set(task[1]))
    assert np.array_equal(loaded.predict_proba(task[0]), model.predict_proba(task[0]))


def test_several_labels_per_text(quick, task):
    texts = [f"{one} {two}" for one, two in zip(task[0], task[0][1:], strict=False)]
    labels = [sorted({one, two}) for one, two in zip(task[1], task[1][1:], strict=False)]
    model = clone(quick).set_params(epochs=8, class_weights=True).fit(texts, labels)
    predicted = model.predict(texts)
    assert all(isinstance(row, list) and set(row) <= set(model.classes_) for row in predicted)
    right = [set(row) == set(label) for row, label in zip(predicted, labels, strict=True)]
    assert model.score(texts, labels) == np.mean(right) > 0.3
    overlap = [
        len(set(row) & set(label)) / len(set(row) | set(label)) for row, label in zip(predicted, labels, strict=True)
    ]
    assert np.mean(overlap) > 0.6


@pytest.fixture(scope="module")
def pairs(task):
    """Texts of two labels each, their labels, and those as an indicator matrix with a column that is never 1."""
    texts = [f"{one} {two}" for one, two in zip(task[0], task[0][1:], strict=False)]
    binarizer = MultiLabelBinarizer(classes=[*sorted(set(task[1])), "never"])
    return texts, binarizer.fit_transform(zip(task[1], task[1][1:], strict=False)), binarizer.classes_


@pytest.mark.parametrize("form", [np.array, lambda m: m.astype(bool), lambda m: m.astype(float), csr_array],
                         ids=["int", "bool", "float", "sparse"])  # fmt: skip
def test_an_indicator_matrix_gives_one_back(quick, pairs, form, tmp_path):
    texts, matrix, _ = pairs
    model = clone(quick).set_params(epochs=8).fit(texts, form(matrix))
    assert model.classes_.tolist() == list(range(matrix.shape[1]))
    predicted = model.predict(texts)
    assert predicted.shape == matrix.shape and set(np.unique(predicted)) == {0, 1}
    assert f1_score(matrix[:, :-1], predicted[:, :-1], average="micro") > 0.6 and not predicted[:, -1].any()
    assert model.score(texts, form(matrix)) == (predicted == matrix).all(1).mean() > 0.3
    again = Classifier.load(model.save(tmp_path / "saved"))
    assert again.classes_.dtype == model.classes_.dtype and again.classes_.tolist() == model.classes_.tolist()
    assert np.array_equal(again.predict_proba(texts), model.predict_proba(texts))
    assert np.array_equal(again.predict(texts), predicted)


def test_columns_of_a_frame_are_labels(quick, pairs):
    texts, matrix, names = pairs
    frame = pd.DataFrame(matrix, columns=names)
    model = clone(quick).fit(texts, frame)
    assert model.classes_.tolist() == list(names)
    assert model.score(texts, frame) == (model.predict(texts) == matrix).all(1).mean()
    for given in (matrix, frame[names[::-1]], frame[names[:-1]], list(map(list, matrix)), names[0]):
        with pytest.raises(InfuseError, match=f"columns of training: {names[0]}"):
            model.score(texts, given)


def test_cross_validation_with_several_labels(quick, pairs):
    texts, matrix, _ = pairs
    assert (cross_val_score(quick, texts, matrix, cv=2, scoring="f1_micro", error_score="raise") > 0.2).all()
    found = GridSearchCV(quick, {"method": ["ia3", "head"]}, cv=2, error_score="raise").fit(texts, matrix)
    assert found.predict(texts).shape == matrix.shape


def test_a_text_without_labels_is_scored(quick, task):
    model = clone(quick).fit(task[0], [[label] for label in task[1]])
    assert model.score(task[0][:1], [[]]) == (not model.predict(task[0][:1])[0])


def test_saved_classifiers_answer_the_same(model, task, tmp_path):
    loaded = Classifier.load(model.save(tmp_path / "saved"))
    assert np.array_equal(loaded.predict_proba(task[0]), model.predict_proba(task[0]))
    assert list(loaded.classes_) == list(model.classes_)
    assert (loaded.get_params()["base"], loaded.method, loaded.head) == (model.base, "ia3", "cosine")
    again = Classifier.load(loaded.save(tmp_path / "again"), base=model.base)
    assert np.array_equal(again.predict_proba(task[0]), model.predict_proba(task[0]))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))],
                         ids=["deepcopy", "pickle"])  # fmt: skip
def test_copies_of_a_fitted_classifier_answer_the_same(model, task, copied):
    again = copied(model)
    assert np.array_equal(again.predict_proba(task[0]), model.predict_proba(task[0]))


def test_what_is_not_fitted_says_so(quick, task, tmp_path):
    for act in (quick.predict, quick.predict_proba):
        with pytest.raises(NotFittedError):
            act(task[0])
    with pytest.raises(NotFittedError):
        quick.score(*task)
    with pytest.raises(NotFittedError):
        quick.save(tmp_path / "x")
    with pytest.raises(InfuseError, match="Full fine-tuning"):
        clone(quick).set_params(method="full", learning_rate=1e-4, epochs=1).fit(*task).save(tmp_path / "x")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    "texts, labels, message",
    [
        ("one text", ["a"], "list of texts, not one string"),
        (["a b", "c"], ["x"], "2 texts but 1 labels"),
        (["a b", "c"], ["x", None], "None or NaN"),
        (["a b", "c"], [1.0, float("nan")], "None or NaN"),
        (["a b", "c"], None, "list of labels"),
        (["a b", ""], ["x", "y"], "Text 1 is empty"),
        (["a b", "  "], ["x", "y"], "Text 1 is empty"),
        (["a b", None], ["x", "y"], "Text 1 is empty or no string"),
        (["a b", 3], ["x", "y"], "Text 1 is empty or no string"),
        (["a b", "c"], ["x", "x"], "two labels"),
        (["a b", "c"], [["x"], "yes"], "lists and others"),
        (["a b", "c"], [["x", None], ["y"]], "None or NaN"),
        (["a b", "c"], [[], []], "label"),
        ([], [], "two labels|text"),
        (["a b", "c"], "ab", "list of labels"),
        (["a b", "c"], np.ones((2, 1)), "list of labels"),
        (["a b", "c"], np.zeros((2, 2, 2)), "list of labels"),
        (["a b", "c"], np.array([[0, 2], [1, 0]]), "MultiLabelBinarizer"),
        (["a b", "c"], np.array([[0, np.nan], [1, 0]]), "MultiLabelBinarizer"),
        (["a b", "c"], np.array([["x", "y"], ["x", "z"]]), "MultiLabelBinarizer"),
        (["a b", "c"], np.zeros((2, 3)), "two labels"),
        (["a b", "c", "d"], np.eye(2), "3 texts but 2 labels"),
        (["a b", "c"], pd.DataFrame(np.eye(2), columns=["x", 1]), "use one kind"),
        (None, ["x", "y"], "list of texts, not None"),
        (5, ["x", "y"], "list of texts, not int"),
        ({"a b": 1, "c": 2}, ["x", "y"], "list of texts, not dict"),
        (np.array([["a b", "c"]]), ["x", "y"], "an array of 2 dimensions"),
        (np.array("a b"), ["x"], "an array of 0 dimensions"),
        (["a b", float("nan")], ["x", "y"], "Text 1 is empty or no string"),
        (["a b", np.eye(3)], ["x", "y"], "Text 1 is empty or no string"),
        (["a b", "\ud800"], ["x", "y"], "not valid Unicode"),
        (["a b", "c"], 5, "list of labels"),
        (["a b", "c"], {"x": 1, "y": 2}, "list of labels"),
        (["a b", "c"], ["x", ""], "label in the data is empty"),
        (["a b", "c"], ["x", object()], "of the type object"),
        (["a b", "c"], ["x", {}], "of the type dict"),
        (["a b", "c"], [1, "1"], "numbers and others are strings"),
        (["a b", "c"], [True, 1], "booleans and others are numbers"),
    ],
)
def test_mistakes_are_one_sentence(quick, texts, labels, message):
    with pytest.raises(InfuseError, match=message) as caught:
        clone(quick).fit(texts, labels)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("changes", [{"method": "magic"}, {"epochs": 0}, {"head": "big"}, {"pooling": "max"},
                                     {"layers": "7"}, {"validation_fraction": 2}, {"base": "no-such/model"},
                                     {"epochs": 1.5}, {"seed": -1}, {"learning_rate": "fast"}, {"method": 5},
                                     {"method": None}, {"method": IA3}, {"method": ["ia3"]}, {"layers": [0]},
                                     {"layers": None}, {"base": None}, {"base": ["a"]},
                                     {"validation_fraction": "some"}], ids=str)  # fmt: skip
def test_impossible_settings_are_one_sentence(quick, task, changes):
    with pytest.raises(InfuseError) as caught:
        clone(quick).set_params(**changes).fit(*task)
    assert "\n" not in str(caught.value)


def test_predicting_needs_texts(model):
    for texts in ("one text", [""], [None], None, 5, {"a": 1}, np.array([["a"]])):
        with pytest.raises(InfuseError):
            model.predict(texts)
    assert model.predict([]).shape == (0,)


def test_scoring_needs_labels_like_those_of_training(model, task):
    texts, labels = task
    for given in (None, 5, labels[:3], list(range(len(labels))), [[label] for label in labels], "a"):
        with pytest.raises(InfuseError) as caught:
            model.score(texts, given)
        assert "\n" not in str(caught.value)
    for weights in ([1], "a", np.zeros(len(labels))):
        with pytest.raises(InfuseError, match="sample_weight"):
            model.score(texts, labels, sample_weight=weights)
    right = model.predict(texts) == labels
    assert model.score(iter(texts), iter(labels)) == right.mean() and model.score(texts, labels, right) == 1


# PyTorch and transformers


def labelled(model, rows=6):
    return inputs(model, rows=rows) | {"labels": torch.arange(rows) % 3}


def assert_only_the_adapter_learnt(model):
    fresh = tiny("bert", AutoModelForSequenceClassification, num_labels=3).state_dict()
    assert all(torch.equal(value, fresh[key]) for key, value in model.state_dict().items() if key in fresh)
    adapter = store_of(model)["task"]
    assert not torch.equal(adapter.copies["classifier"].weight, model.classifier.weight)
    assert any((delta.l != 1).any() for delta in adapter.deltas.values())


def test_a_plain_loop_trains_the_adapter_and_its_copy_of_the_head():
    model = tiny("bert", AutoModelForSequenceClassification, num_labels=3)
    infuse.attach(model, IA3(), "task")
    batch, losses = labelled(model), []
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(30):
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]
    assert_only_the_adapter_learnt(model)
    assert torch.equal(
        output(model, inputs(model), None),
        output(tiny("bert", AutoModelForSequenceClassification, num_labels=3), inputs(model)),
    )


def test_transformers_trainer_trains_the_adapter(tmp_path):
    model = tiny("bert", AutoModelForSequenceClassification, num_labels=3)
    infuse.attach(model, IA3(), "task")
    rows = [dict(zip(labelled(model), row, strict=True)) for row in zip(*labelled(model).values(), strict=True)]
    arguments = TrainingArguments(
        str(tmp_path), max_steps=10, learning_rate=0.05, report_to=[], disable_tqdm=True, use_cpu=True,
        per_device_train_batch_size=6, logging_steps=1, save_strategy="no",
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=rows)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    assert_only_the_adapter_learnt(model)

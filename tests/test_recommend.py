"""Recommendations: the arithmetic is what training really takes, no limit is broken, and every answer says why."""

import json
import os
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from conftest import write_rows
from hypothesis import given
from hypothesis import strategies as st

import infuse
from infuse import InfuseError, RecommendConfig, units
from infuse.bases import load_base, outline
from infuse.cli import _parse, main
from infuse.comparing.cell import bits
from infuse.comparing.settings import every_method
from infuse.data import read, stratified
from infuse.data.rows import Splits
from infuse.heads import Head
from infuse.memory import Ledger, saved_for_backward
from infuse.method import make, registry
from infuse.model import attach, detach, summary
from infuse.recommending import answer, arithmetic
from infuse.recommending import race as racing
from infuse.recommending.arithmetic import Task, cost
from infuse.recommending.candidates import Candidate, candidates
from infuse.recommending.race import Race, Round, Score, _Track
from infuse.recommending.recommend import recommend
from infuse.sites import find_sites
from infuse.spaces import Choice
from infuse.training.engine import TextClassifier
from infuse.training.folders import ADAPTER
from infuse.training.prefix import prefix_of, remember
from infuse.training.run import write_model
from infuse.training.settings import Settings

TASK = Task(labels=3, length=9)
RATIOS = {"compacter": "compacter:reduction=8", "compacter++": "compacter++:reduction=8", "phm": "phm:reduction=8"}
"""Bottlenecks of the tiny base that Kronecker products divide."""
METHODS = [RATIOS.get(name, name) for name in every_method()]


@pytest.fixture(autouse=True)
def just_started(monkeypatch):
    """A command's time runs from the start of its process, which may have run tests for longer than that."""
    monkeypatch.setattr("infuse.console.seconds_since_start", lambda: 0.0)


@pytest.fixture(scope="module")
def hard(tmp_path_factory):
    """Sixteen labels with eight rows each: too few to get all right."""
    return write_rows(tmp_path_factory.mktemp("data") / "hard.csv", read("sample").label_set[:16], 8)


@pytest.fixture(scope="module")
def config(tiny_base, hard):
    return RecommendConfig(base=str(tiny_base), data=str(hard), validation_fraction=0.25, epochs=2, time="40s")


@pytest.fixture(scope="module")
def raced(config, tmp_path_factory):
    """A recommendation with a race of six candidates."""
    out, lines = tmp_path_factory.mktemp("raced") / "out", []
    return recommend(replace(config, methods=("ia3", "lora", "head"), out=out), say=lines.append), lines


def step_on(base, settings, task, rows):
    """Bytes saved and the peak of one real step on rows of equal length, and the peak of a call."""
    adapter = attach(base.model, settings.method, ADAPTER, layers=settings.layers, trained=())
    adapter.head = Head("cosine", [str(i) for i in range(task.labels)], base.width, "mean", task.multi)
    prefix = prefix_of(base, adapter)
    model = TextClassifier(base.model, ADAPTER, settings, None, prefix)

    def batch(count, hidden=prefix):
        ids = torch.full((count, task.length), 7)
        mask = torch.ones_like(ids)
        mask[0, -1] = 0  # as nearly every batch, with padding
        labels = torch.zeros(count, task.labels) if task.multi else torch.zeros(count, dtype=torch.long)
        found = {"input_ids": ids, "attention_mask": mask, "labels": labels}
        if hidden:
            kept = remember(base, hidden, [[7] * task.length] * count)
            found["hidden"] = torch.stack([kept[i] for i in range(count)])
        return found

    own = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
    step, call = batch(rows), batch(4 * settings.batch_size, None)
    with Ledger(model.train()) as ledger, saved_for_backward() as kept:
        model(**step)["loss"].backward()
    model.zero_grad()
    with Ledger(model.eval()) as calling, torch.no_grad():
        model(**call)
    detach(base.model)
    held = [sum(t.nbytes for t in each.values()) for each in (step, call)]
    return (
        sum(s.nbytes() for place, s in kept.items() if place not in own),
        ledger.peak + held[0],
        calling.peak + held[1],
    )


# Arithmetic


@pytest.mark.parametrize("layers", ["all", "last:1"])
@pytest.mark.parametrize("method", METHODS)
def test_what_is_counted_without_weights_is_what_training_takes(method, layers, tiny_base, monkeypatch):
    if layers == "last:1" and not make(method).roles:
        pytest.skip("no layers to choose")
    steps = []
    real = arithmetic._step
    monkeypatch.setattr(arithmetic, "_step", lambda *args: steps.append(real(*args)) or steps[-1])
    settings = Settings(method=method, layers=layers, batch_size=4)
    counted = cost(outline(str(tiny_base)), settings, TASK)
    base = load_base(str(tiny_base))
    saved, peak, call = step_on(base, settings, TASK, 4)
    assert (counted.saved, *steps) == (saved, (saved, peak))
    assert counted.weights == sum(p.nbytes for p in base.model.parameters())
    whole = make(method).unfreezes
    state = 4 * ((2 if whole else 3) * counted.adapter + 3 * counted.head)  # gradients are part of the step
    if counted.adapter:  # a head alone never calls its layers again
        assert counted.training == counted.weights + state + max(peak, call)
        assert whole or counted.serving == counted.weights + 4 * counted.trained + call
    assert counted.per_token == saved / 36


def test_every_method_of_the_registry_is_counted():
    assert {make(name).name for name in METHODS} >= registry().keys()


@pytest.mark.parametrize(("precision", "statistics"), [("fp32", 0), ("bf16", 2 * 12 * 2 * 4 * 20)])
def test_the_bundled_base_is_counted_exactly(precision, statistics):
    """But for the statistics of the 12 LayerNorms, which a meta device takes to be float32 in any precision."""
    settings, task = Settings(method="lora", batch_size=4), Task(5, 20)
    counted = cost(outline("minilm", precision), settings, task).saved
    assert counted == step_on(load_base("minilm", precision=precision), settings, task, 4)[0] + statistics


def test_parameters_and_files_are_those_of_a_saved_adapter(tiny_base, tmp_path):
    counted = cost(outline(str(tiny_base)), Settings(method="lora:rank=2"), TASK)
    base = load_base(str(tiny_base))
    attach(base.model, "lora:rank=2", ADAPTER).head = Head("cosine", ("a", "b", "c"), base.width)
    counts = summary(base.model)
    write_model(base, False, tmp_path)
    size = (tmp_path / ADAPTER / "adapter_model.safetensors").stat().st_size
    assert (counted.adapter, counted.trained, counted.base) == (
        counts.deltas(ADAPTER), counts.total(ADAPTER), counts.base,
    )  # fmt: skip
    assert counted.file < size < counted.file + 8000 and counted.percent == 100 * counted.adapter / counted.base


def test_abilities_are_those_that_can_be_done(tiny_base):
    base = outline(str(tiny_base))
    able = {m: cost(base, Settings(method=m), TASK).abilities for m in ("ia3", "lora", "houlsby", "full")}
    assert able == {
        "ia3": {"merge", "mix"}, "lora": {"merge", "mix", "fuse"}, "houlsby": {"mix", "fuse"}, "full": frozenset(),
    }  # fmt: skip
    assert not hasattr(base.model, "infuse")


def test_more_tasks_take_more_memory_by_their_adapters(tiny_base):
    base, settings = outline(str(tiny_base), "bf16"), Settings(method="lora")
    one, ten, eleven = (cost(base, settings, TASK, tasks=n) for n in (1, 10, 11))
    assert eleven.serving - ten.serving == 6 * one.adapter + 4 * one.head  # in float32, and for mixing in bfloat16
    assert one.training == ten.training


def test_a_tight_limit_of_memory_cuts_steps_into_parts(tiny_base, tmp_path):
    deep = json.loads((tiny_base / "config.json").read_text()) | {"num_hidden_layers": 16}
    (tmp_path / "config.json").write_text(json.dumps(deep))  # deep, lest evaluation take the most
    base, settings = outline(str(tmp_path)), Settings(method="houlsby", batch_size=32)
    task = Task(3, 40)
    free = cost(base, settings, task)
    assert free.max_tokens == Settings.max_tokens
    tight = cost(base, settings, task, limit=0.8 * free.training)
    assert tight.training <= 0.8 * free.training and tight.max_tokens < 32 * 40 and tight.max_tokens % 40 == 0
    assert tight.per_token == pytest.approx(free.per_token, rel=0.2)


def test_a_model_of_seven_billion_parameters_needs_no_weights(tmp_path):
    config = {
        "model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
        "num_attention_heads": 32, "vocab_size": 32000,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    base = outline(str(tmp_path), "bf16")
    counted = cost(base, Settings(method="parallel", max_length=128), Task(2, 128))
    assert counted.base > 6e9 and counted.training > 13e9 and counted.adapter == 32 * (2 * 4096 * 2048 + 4096 + 2048)


# Candidates


def test_candidates_are_presets_and_the_sizes_of_their_own_spaces(tiny_base):
    sites = find_sites(outline(str(tiny_base)).model)
    fitting, unfit = candidates(sites)
    names = [each.name for each in fitting]
    assert {"ia3", "lora", "houlsby", "pfeiffer", "parallel", "head", "full"} <= set(names)
    ranks = registry()["lora"].space["rank"]
    assert isinstance(ranks, Choice)
    assert {f"lora:rank={r}" for r in ranks.options} - {"lora:rank=8"} <= set(names)
    assert not any("dropout" in name or "alpha" in name for name in names)  # they cost nothing
    assert [each.tier for each in fitting] == sorted(each.tier for each in fitting)
    assert len({(each.method, each.layers) for each in fitting}) == len(fitting)
    assert {each.name for each in unfit} == {"compacter", "compacter++", "phm"}
    assert not any(each.layers == "last:2" for each in fitting)  # the base has no more
    chosen, _ = candidates(sites, ["lora:rank=2", "head"])
    assert {each.method.name for each in chosen} == {"lora", "head"} and all(
        "rank=2" in each.spec for each in chosen if each.method.roles
    )


# Units


@pytest.mark.parametrize(
    ("seconds", "spelled"), [(0.4, "0 s"), (59.6, "1 min 0 s"), (95, "1 min 35 s"), (3900, "1 h 5 min")]
)
def test_spans_of_time_are_spelled(seconds, spelled):
    assert units.duration(seconds) == spelled


@given(st.floats(0.01, 9999).map(lambda x: round(x, 2)), st.sampled_from(sorted(units.BYTES)))
def test_sizes(number, unit):
    wanted = number * units.BYTES[unit]
    assert units.size(f"{number:.2f}{unit}") == units.size(f" {number:,.2f} {unit.upper()} ") == pytest.approx(wanted)


@given(st.integers(1, 10**9), st.integers(1, 10**9), st.floats(0.001, 100).map(lambda x: round(x, 3)))
def test_counts_and_shares(number, whole, percent):
    assert units.count(str(number), whole) == units.count(f"{number:,}", whole) == number
    assert units.count(f"{percent:.3f}%", whole) == pytest.approx(percent / 100 * whole)


@given(st.integers(1, 10**5), st.sampled_from(["s", "m", "h"]))
def test_durations(number, unit):
    assert units.seconds(f"{number}{unit}") == number * {"s": 1, "m": 60, "h": 3600}[unit]


@given(
    st.text(max_size=12), st.sampled_from([units.seconds, units.size, units.milliseconds, lambda t: units.count(t, 9)])
)
def test_text_is_a_positive_number_or_a_mistake(text, parse):
    try:
        assert 0 < parse(text) < 1e25
    except InfuseError as error:
        assert "write" in str(error) and str(error).endswith(".")


# The race


def test_a_race_halves_and_its_rounds_share_rows(raced):
    found, lines = raced
    rounds = [c.title for c in found.report.tables[0].columns if c.title.startswith("round")]
    assert len(rounds) >= 2 and sum(line.startswith("round") for line in lines) == len(rounds)
    table = rows_of(found)
    entered = [
        sum(row[title] is not None for name, row in table.items() if name != "logistic regression") for title in rounds
    ]
    assert entered == sorted(entered, reverse=True) and entered[0] > entered[-1] >= 2
    assert table["logistic regression"]["verdict"] == "the number to beat"
    assert next(iter(table.values()))["verdict"] == "recommended"
    scores = [row[rounds[-1]] for row in table.values() if row[rounds[-1]] is not None]
    assert all(5 < score < 100 for score in scores)


def test_the_answer_is_a_command_that_trains(raced, tmp_path):
    found, _ = raced
    command = found.report.commands[-1].split()
    assert command[:2] == ["infuse", "train"] and _parse(command[1:]) == found.train
    assert replace(_parse(["train", "--config", str(found.folder / "train.yaml")]), config=None) == found.train
    assert found.train.method.split(":")[0] in ("ia3", "lora", "head")
    answer = " ".join(found.report.answer)
    assert "How sure" in answer and "validation rows" in answer and "logistic regression" in answer
    for name in ("report.html", "report.md"):
        assert found.report.answer[0] in (found.folder / name).read_text().replace("&#x27;", "'")
    assert json.loads((found.folder / "report.json").read_text())["answer"] == list(found.report.answer)


def test_the_base_is_bare_after_a_race_of_finalists(tiny_base, hard):
    base = load_base(str(tiny_base))
    before = bits(base.model)
    rows = stratified(read(hard), 0.25)
    entered = [Candidate("ia3"), Candidate("lora")]
    found = racing.race(
        base, Splits(*rows), entered, lambda c: Settings(method=c.spec, epochs=1), time.perf_counter() + 20
    )
    assert bits(base.model) == before and not hasattr(base.model, "infuse")
    assert [len(each.scores) for each in found.rounds] == [2] * racing.SEEDS and found.rounds[-1].complete
    assert len({each.rows for each in found.rounds}) == 1  # all rows, other seeds
    assert found.decisive == found.rounds


def test_a_method_that_fails_stops_no_other(tiny_base, hard):
    base, rows = load_base(str(tiny_base)), stratified(read(hard), 0.25)
    entered = [Candidate("ia3"), Candidate("compacter"), Candidate("lora")]  # n does not divide this base's width
    found = racing.race(
        base, Splits(*rows), entered, lambda c: Settings(method=c.spec, epochs=1), time.perf_counter() + 15
    )
    assert set(found.failed) == {entered[1]} and set(found.rounds[0].scores) == {entered[0], entered[2]}


def test_a_deadline_ends_a_run_within_a_step(tiny_base, hard):
    base, rows = load_base(str(tiny_base)), stratified(read(hard), 0.25)
    began = time.perf_counter()
    track = _Track(base, *rows, lambda c: Settings(method=c.spec, epochs=5000), began + 3)
    assert track.measure(Candidate("ia3"))
    assert track.train_on(rows[0], track.settings(Candidate("ia3")), [racing._Stop(began + 3)]) is None
    assert 3 <= time.perf_counter() - began < 6 and not hasattr(base.model, "infuse")


def test_a_plan_fits_its_time_and_drops_what_does_not():
    track = _Track.__new__(_Track)
    track.train = type("Rows", (), {"__len__": lambda _: 1000, "label_set": ["a"] * 10})()
    track.fixed, track.whole, track.logistic = 1.0, 20.0, 0.0
    for seconds in (1000, 300, 100, 40):
        track.deadline = time.perf_counter() + seconds
        count, share = track.plan(40)
        assert 0.064 <= share <= 1 and track.cost(count, share) <= seconds
        assert count == 40 or track.cost(count + 1, 0.064) > seconds
    assert count < 40
    track.deadline = time.perf_counter() + 1
    assert track.plan(40)[0] == 0 == track.plan(3)[0]


def finding(rounds, costs):
    """What :func:`answer.decide` looks at."""
    names = [Candidate(name) for name in costs]
    counts = {c: SimpleNamespace(adapter=n, training=n) for c, n in zip(names, costs.values(), strict=True)}
    return SimpleNamespace(able=names, costs=counts, race=Race(200, rounds), config=RecommendConfig(data="x"))


def score(right):
    right = np.array(right, float)
    return Score(float(right.mean()), float(right.mean()), right, 1.0)


@pytest.mark.parametrize("wins, chosen", [(3, "ia3"), (40, "lora")])
def test_of_equals_the_cheapest_is_chosen(wins, chosen):
    lora, ia3 = Candidate("lora"), Candidate("ia3")
    first = [1.0] * 150 + [0.0] * 50
    scores = {lora: score([1.0] * (150 + wins) + [0.0] * (50 - wins)), ia3: score(first)}
    final = Round(1.0, 100, [lora, ia3], scores, logistic=score([1.0] * 100 + [0.0] * 100), complete=True)
    verdict = answer.decide(finding([final], {"lora": 5000, "ia3": 100}))
    assert verdict.chosen.spec == chosen
    assert ("chance explains" in verdict.why) == (chosen == "ia3")
    assert "beats the number to beat" in verdict.sure


def test_a_round_that_was_cut_short_does_not_decide():
    one, two, three = (Candidate(f"lora:rank={r}") for r in (1, 2, 3))
    good, poor = score([1.0] * 90 + [0.0] * 10), score([1.0] * 40 + [0.0] * 60)
    first = Round(0.5, 50, [one, two, three], {one: good, two: poor, three: poor}, complete=True)
    cut = Round(1.0, 100, [one, two], {two: good})
    found = finding([first, cut], {f"lora:rank={r}": r for r in (1, 2, 3)})
    verdict = answer.decide(found)
    assert verdict.chosen == one and "time was up" in verdict.sure and "50 % of the rows" in verdict.sure


# Scenarios


def rows_of(found):
    table = found.report.tables[0]
    titles = [column.title for column in table.columns]
    return {row[0]: dict(zip(titles, row, strict=True)) for row in table.rows}


@pytest.fixture
def counting(config, tmp_path):
    """Without data: by arithmetic alone."""
    return replace(config, data=None, out=tmp_path / "out", methods=("ia3", "lora", "houlsby", "head"))


def test_at_most_so_many_parameters(counting, monkeypatch):
    monkeypatch.setattr("infuse.recommending.recommend.load_base", None)  # no weights without data
    found = recommend(replace(counting, max_params="8%"))
    base = next(iter(found.costs.values())).base
    for name, row in rows_of(found).items():
        assert row["verdict"].startswith("ruled out") == (found.costs[name].adapter > 0.08 * base), name
    chosen = found.costs[found.verdict.chosen.name]
    assert 0 < chosen.adapter <= 0.08 * base and "arithmetic alone" in found.report.answer[-1]
    assert found.train.data == "sample" and (found.folder / "train.yaml").exists()


def test_forty_tasks_that_share_batches(counting):
    found = recommend(replace(counting, must=("mix", "fuse"), tasks=40))
    assert "fuse" in found.costs[found.verdict.chosen.name].abilities
    assert all("fused" in row["verdict"] for name, row in rows_of(found).items() if name.startswith("ia3"))
    text = " ".join(found.report.answer)
    assert "40 files" in text and "one process" in text


def test_at_most_so_much_memory(counting):
    free = recommend(counting)
    limit = sorted(each.training for each in free.costs.values())[len(free.costs) // 2]
    found = recommend(replace(counting, max_memory=f"{limit / 1e6:.4f}MB"))
    chosen = found.costs[found.verdict.chosen.name]
    assert max(chosen.training, chosen.serving) <= limit and "come on top" in " ".join(found.report.answer)
    for name, row in rows_of(found).items():
        over = max(found.costs[name].training, found.costs[name].serving) > limit
        assert row["verdict"].startswith("ruled out") == over


def test_latency_is_measured_with_the_weights(config, tmp_path):
    config = replace(config, methods=("ia3",), out=tmp_path / "out")
    with pytest.raises(InfuseError, match="add --data"):
        recommend(replace(config, data=None, max_latency="20ms"))
    found = recommend(replace(config, max_latency="10s"))
    assert all(row["latency ms"] > 0 for name, row in rows_of(found).items() if name.startswith("ia3"))
    none = recommend(replace(config, max_latency="0.001ms"))
    assert none.train is None and "raise --max-latency to" in none.report.answer[-1]


def test_a_race_keeps_its_time(config, tmp_path):
    began = time.perf_counter()
    found = recommend(replace(config, time="12s", epochs=50, out=tmp_path / "out", methods=("ia3", "lora")))
    assert time.perf_counter() - began < 12 and found.train is not None


def test_nothing_fits(counting, capsys):
    with pytest.raises(SystemExit) as ended:
        main(
            f"recommend --base {counting.base} --out {counting.out} --methods lora houlsby --max-params 10 "
            "--must merge --must mix".split()
        )
    shown = capsys.readouterr()
    assert ended.value.code == 1 and "Nothing meets these constraints." in shown.out
    assert "nearest miss is lora:rank=4" in shown.out and "raise --max-params to 1024" in " ".join(shown.out.split())
    assert not (counting.out / "train.yaml").exists() and (counting.out / "report.html").exists()
    assert yaml.safe_load((counting.out / "recommend.yaml").read_text())["must"] == ["merge", "mix"]
    both = recommend(replace(counting, methods=("houlsby",), max_params="10", must=("merge",)))
    assert "relax --must merge, --max-params" in both.report.answer[-1]


def test_command_line_and_yaml(counting, tmp_path, capsys):
    (tmp_path / "s.yaml").write_text(
        yaml.safe_dump({"base": counting.base, "max_params": 200000, "methods": ["ia3", "lora"], "must": ["mix"]})
    )
    main(["recommend", "--config", str(tmp_path / "s.yaml"), "--tasks", "3", "--out", str(counting.out)])
    shown = capsys.readouterr()
    assert "infuse train --base" in shown.out and "candidates counted" in shown.err
    again = yaml.safe_load((counting.out / "recommend.yaml").read_text())
    assert again["tasks"] == 3 and again["max_params"] == "200000" and again["must"] == ["mix"]
    assert infuse.recommend is recommend
    fitting = recommend(replace(counting, methods=("compacter", "ia3"), max_params="200k"))
    assert "must divide" in rows_of(fitting)["compacter"]["verdict"]


@pytest.mark.parametrize("flags, message", {
    "--max-params lots": "write 50k",
    "--max-params 101%": "at most 100%",
    "--max-memory 600": "is not understood",
    "--max-memory 0MB": "is not understood",
    "--max-latency 5": "--data",
    "--time soon": "write 90s",
    "--tasks 0": "tasks must lie",
    "--labels 1": "labels must lie",
    "--epochs 0": "epochs",
    "--methods magic": "the methods are",
    "--methods full": "can't be recommended",
    "--methods fusion": "can't be recommended",
    "--base ./nowhere": "no folder",
    "--data nope.csv": "nope.csv",
    "--out full": "other files",
    "--out one.csv": "is a file",
}.items())  # fmt: skip
def test_mistakes(counting, flags, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "one.csv").write_text("text,label\na b,x\nc d,x\n")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    before = sorted(os.walk("."))
    with pytest.raises(SystemExit) as ended:
        main(f"recommend --base {counting.base} --methods ia3 --out new {flags}".split())
    shown = capsys.readouterr()
    assert ended.value.code == 2 and shown.out == "" and sorted(os.walk(".")) == before
    assert shown.err.startswith("infuse: ") and shown.err.count("\n") == 1 and message in shown.err, shown.err
    assert "Traceback" not in shown.err

"""The HTTP contract of a server: every route, every refusal, and answers that are each adapter's own."""

import json
import logging

import numpy as np
import pytest
import torch
from hostile import ESCAPES, percent
from running import TOKEN, Inside, request
from serving import fill, write

import infuse
from infuse import InfuseError
from infuse.bases import load_base
from infuse.heads import answer, head_of
from infuse.method import registry
from infuse.serving import app
from infuse.serving.server import serve
from infuse.serving.settings import ServeConfig
from infuse.texts import probabilities, tokenize

TEXTS = ["my card was stolen", "how do I repay the loan early?", "a", "Überweisung 中 🏳️‍🌈 " * 20]


@pytest.fixture(scope="module")
def shelf(tiny_base, tmp_path_factory):
    """A folder with an adapter of every method, one with several labels, and one with a threshold."""
    root = tmp_path_factory.mktemp("shelf") / "adapters"
    every = [f"{name}:width=4" if name == "compacter" else name for name in registry()]
    names = fill(root, str(tiny_base), [*every, "fusion"])
    base, draw = load_base(str(tiny_base)), torch.Generator().manual_seed(1)
    write(base, root / "many", "lora", draw, 4, multi=True, temperature=3.0)
    write(base, root / "strict", "ia3", draw, 5, temperature=2.0, threshold=0.999)
    return root, [*names, "many", "strict"]


@pytest.fixture(scope="module")
def server(shelf, tiny_base):
    with Inside(shelf[0], load_base(str(tiny_base)), watch=0) as server:
        yield server


@pytest.fixture(scope="module")
def alone(shelf, tiny_base):
    """What an adapter says of texts without a server."""
    base = load_base(str(tiny_base))

    def told(name, texts, top_k=3):
        folder = shelf[0] / name
        infuse.load(base.model, folder, "x")
        for member in folder.glob("members/*"):
            assert member.is_dir()
        rows = probabilities(base.model, tokenize(base.tokenizer, texts, 64), base.pad_id, "x")
        found = [answer(head_of(base.model, "x"), row, top_k) for row in rows]
        infuse.detach(base.model)
        return found

    return told


def same(told, found):
    """An answer over HTTP is the answer of the adapter alone."""
    assert told["label"] == found.label
    assert told["labels"] == (None if found.labels is None else list(found.labels))
    assert [each["label"] for each in told["top"]] == [label for label, _ in found.top]
    got = [told["confidence"], *(each["confidence"] for each in told["top"])]
    np.testing.assert_allclose(got, [found.confidence, *(p for _, p in found.top)], atol=1e-5)


def test_every_adapter_answers_as_it_does_alone(server, shelf, alone):
    for name in shelf[1]:
        told = server.classify(name, *TEXTS, top_k=3).json
        assert told["adapter"] == name and len(told["version"]) == 12 and len(told["answers"]) == len(TEXTS)
        for each, found in zip(told["answers"], alone(name, TEXTS), strict=True):
            same(each, found)


def test_a_list_of_items_is_answered_in_order(server, shelf, alone):
    items = [{"adapter": name, "texts": TEXTS[: 1 + i % 3], "top_k": 3} for i, name in enumerate(shelf[1] * 2)]
    told = server.ask("POST", "/v1/classify", items).json
    assert [each["adapter"] for each in told] == shelf[1] * 2
    for item, each in zip(items, told, strict=True):
        for one, found in zip(each["answers"], alone(item["adapter"], item["texts"]), strict=True):
            same(one, found)


def test_several_labels_and_thresholds(server):
    many = server.classify("many", *TEXTS).json["answers"]
    assert all(each["label"] is None and isinstance(each["labels"], list) for each in many)
    strict = server.classify("strict", "a", top_k=5).json["answers"][0]
    assert strict["label"] is None and strict["labels"] is None and 0.2 < strict["confidence"] < 0.999
    assert len(strict["top"]) == 5 and sum(each["confidence"] for each in strict["top"]) == pytest.approx(1)
    facts = server.ask("GET", "/v1/adapters/strict").json
    assert (facts["temperature"], facts["threshold"], facts["multi"]) == (2.0, 0.999, False)
    assert server.ask("GET", "/v1/adapters/many").json["multi"] is True


def test_the_same_texts_more_than_once_and_cut_ones(server):
    twice = server.classify("strict", *["hello"] * 3).json["answers"]
    assert twice[0] == twice[1] == twice[2]
    cut = server.classify("strict", "card " * 62, "card " * 4000).json["answers"]
    assert cut[0]["confidence"] == pytest.approx(cut[1]["confidence"], abs=1e-6)


ITEM = {"adapter": "strict", "texts": ["a"]}


@pytest.mark.parametrize(
    "body, status, part",
    [("{", 400, "no valid JSON"), ("", 422, "required"), ("[" * 100_000, 400, ""), (b"\xff\xfe\xfa", 400, ""),
     ("3", 422, ""), ("null", 422, ""), ([], 422, "at least 1"), ({}, 422, "required"), ([ITEM] * 1001, 422, "1000"),
     (ITEM | {"texts": []}, 422, "at least 1"), (ITEM | {"texts": [""]}, 422, "at least 1"),
     (ITEM | {"texts": [" \n"]}, 422, "blank"), (ITEM | {"texts": "a"}, 422, "list"), (ITEM | {"texts": [1]}, 422,
     "string"),
     (ITEM | {"texts": ["a"] * 257}, 422, "256 texts"), ([ITEM | {"texts": ["a"] * 130}] * 2, 422, "260"),
     (ITEM | {"texts": ["x" * 20_001]}, 422, "20,000 characters"), (ITEM | {"top_k": 0}, 422, "top_k"),
     (ITEM | {"top_k": 1001}, 422, "top_k"), (ITEM | {"top_k": "1"}, 422, "top_k"), (ITEM | {"top_k": True}, 422,
     "top_k"),
     (ITEM | {"more": 1}, 422, "more"), ([ITEM, ITEM | {"adapter": 3}], 422, "1.adapter"), (ITEM | {"adapter": 3},
     422, "adapter"), (ITEM | {"adapter": "nobody"}, 404, "'nobody'"),
     ([ITEM, ITEM | {"adapter": "nobody"}], 404, "'nobody'"), ('{"adapter": "a", "texts": ["\\ud800"]}', 422, "texts"),
     (ITEM | {"texts": ["x" * 2**20]}, 413, "1,048,576 bytes")],
)  # fmt: skip
def test_refusals(server, body, status, part):
    got = server.ask("POST", "/v1/classify", body)
    assert got.status == status and part in got.error, got
    assert "\n" not in got.error and len(got.error) < 300
    assert server.metric("infuse_queue_rows") == 0


def test_bodies_in_chunks_have_the_same_limit(server):
    head = b"POST /v1/classify HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Type: application/json\r\n"
    chunk = b"10000\r\n" + b" " * 2**16 + b"\r\n"
    (got,) = server.send(head + b"Transfer-Encoding: chunked\r\n\r\n" + chunk * 17 + b"0\r\n\r\n")
    assert got.status == 413
    (got,) = server.send(head + b"Content-Length: 999999999999\r\nExpect: 100-continue\r\n\r\n")
    assert got.status == 413  # before a byte of the body has been sent


@pytest.mark.parametrize("kind", ["text/plain", "", "application/octet-stream", "application/jsonx"])
def test_only_json_is_read(server, kind):
    assert server.ask("POST", "/v1/classify", ITEM, headers={"Content-Type": kind}).status == 415
    assert server.send(b"POST /v1/classify HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")[0].status == 415
    assert server.ask("POST", "/v1/classify", ITEM, headers={"Content-Type": "application/JSON; x=y"}).status == 200


@pytest.mark.parametrize("name", [*ESCAPES, "../adapters/strict", "strict/../strict", "./strict", "STRICT", "strict "])
def test_names_reach_nothing_but_adapters(server, shelf, name):
    before = sorted(path.name for path in shelf[0].parent.rglob("*"))
    assert server.classify(name, "a").status in (404, 422)
    for spelled in (percent(name, False), percent(name, True), percent(name, True).replace("%", "%25")):
        assert server.ask("GET", f"/v1/adapters/{spelled}").status == 404
        assert server.ask("POST", f"/v1/adapters/{spelled}", b"x", TOKEN).status in (404, 422)
        assert server.ask("DELETE", f"/v1/adapters/{spelled}", token=TOKEN).status == 404
    assert sorted(path.name for path in shelf[0].parent.rglob("*")) == before


def test_adapters_are_listed(server, shelf):
    server.classify("strict", "a")
    told = server.ask("GET", "/v1/adapters").json
    assert told["precision"] == "fp32" and told["base"] == server.base.name
    assert [each["name"] for each in told["adapters"]] == sorted(shelf[1])
    (mine,) = [each for each in told["adapters"] if each["name"] == "strict"]
    assert mine == server.ask("GET", "/v1/adapters/strict").json
    assert mine["status"] == "resident" and mine["method"] == "ia3" and mine["error"] is None and mine["bytes"] > 1000
    assert mine["labels"] == [f"strict {i}" for i in range(5)]
    assert mine["version"] == server.classify("strict", "a").json["version"]


def test_the_token_is_asked_for(server, monkeypatch):
    compared = []
    real = app.hmac.compare_digest
    monkeypatch.setattr(app.hmac, "compare_digest", lambda a, b: compared.append(a) or real(a, b))
    for method in ("POST", "DELETE"):
        for value in ("", TOKEN, "Basic " + TOKEN, "Bearer", "Bearer " + TOKEN[:-1], f"Bearer {TOKEN}x", "Bearer \xff"):
            got = server.ask(method, "/v1/adapters/strict", headers={"Authorization": value})
            assert got.status == 401 and got.headers["www-authenticate"] == "Bearer" and TOKEN not in got.error
    assert len(compared) == 2 * 3  # constant time, wherever there was a token at all
    assert server.classify("strict", "a").status == 200
    assert server.ask("DELETE", "/v1/adapters/strict", token=TOKEN).json["status"] == "withdrawn"
    assert server.classify("strict", "a").status == 404
    assert server.ask("POST", "/v1/adapters/strict", token=TOKEN).json["status"] == "resident"
    assert server.classify("strict", "a").status == 200


def test_without_a_token_nobody_is_the_admin(tiny_base, shelf):
    with Inside(shelf[0], load_base(str(tiny_base)), token=None, watch=0) as server:
        for token in (None, "", "None", TOKEN):
            assert server.ask("POST", "/v1/adapters/strict", token=token).status == 403
            assert server.ask("DELETE", "/v1/adapters/strict", token=token).status == 403


@pytest.mark.parametrize("token", ["tök", "\udcff", "to\tken"])
def test_a_token_that_no_header_can_carry_is_refused_at_the_start(shelf, monkeypatch, token):
    monkeypatch.setenv("INFUSE_ADMIN_TOKEN", token)
    monkeypatch.setattr("infuse.serving.engine.open_model", lambda config: pytest.fail("too late"))
    with pytest.raises(InfuseError, match="INFUSE_ADMIN_TOKEN may hold printable ASCII"):
        serve(ServeConfig(shelf[0]))


def test_small_routes(server):
    assert server.ask("GET", "/healthz").json == {"status": "alive"}
    assert server.ask("GET", "/readyz").json == {"status": "ready"}
    for method, path, status in (("GET", "/none", 404), ("PUT", "/v1/classify", 405), ("GET", "/v1/classify", 405),
                                 ("GET", "/v1/classify/", 404), ("GET", "/v1/adapters/a/b", 404)):  # fmt: skip
        got = server.ask(method, path)
        assert got.status == status and got.error
    described = server.ask("GET", "/openapi.json").json["paths"]
    assert set(described["/v1/classify"]["post"]["responses"]) == {
        "200", "400", "404", "408", "409", "413", "415", "422", "429", "503", "504"
    }  # fmt: skip


def test_the_page_runs_nothing_but_its_own(server):
    got = server.ask("GET", "/")
    policy = got.headers["content-security-policy"]
    assert got.status == 200 and got.headers["content-type"].startswith("text/html") and b"<script" in got.body
    assert "default-src 'none'" in policy and "unsafe" not in policy and "sha256-" in policy and "http" not in policy


def test_what_happens_is_counted(server):
    def value(*labels):
        return server.metric(f"infuse_requests_total{{{','.join(labels)}}}")

    fine = ('route="/v1/classify"', 'status="200"')
    texts, before = server.metric('infuse_texts_total{adapter="many"}'), value(*fine)
    wrong = value('route="/v1/classify"', 'status="422"')
    server.classify("many", "a", "b", "c")
    server.classify("many")
    assert value(*fine) == before + 1 and value('route="/v1/classify"', 'status="422"') == wrong + 1
    assert server.metric('infuse_texts_total{adapter="many"}') == texts + 3
    assert server.metric('infuse_adapters{status="resident"}') >= 1 and server.metric("infuse_batch_rows_count") > 0


@pytest.mark.parametrize("asked", [False, True])
def test_texts_are_logged_only_if_asked(tiny_base, shelf, caplog, asked):
    caplog.set_level(logging.DEBUG)
    with Inside(shelf[0], load_base(str(tiny_base)), watch=0, log_texts=asked) as server:
        assert server.classify("strict", "my secret\nline").status == 200
        server.classify("strict", "my secret", top_k="x")
        server.classify("nobody", "my secret")
        server.engine.batcher.forward = lambda *_: 1 / 0
        assert server.classify("strict", "my secret").status == 500
        server.send(request("POST", "/v1/classify", b'{"texts": "my secret"'))
    assert ("my secret" in caplog.text) == asked
    assert "secret\nline" not in caplog.text  # no line of the log is a client's


def test_what_is_not_installed_is_named(monkeypatch, shelf):
    monkeypatch.setattr("infuse.serving.server.find_spec", lambda name: None)
    with pytest.raises(InfuseError, match=r"needs fastapi.*pip install 'infuse\[serve\]'"):
        serve(ServeConfig(shelf[0]))


@pytest.mark.parametrize(
    "settings, part",
    [({"port": 70_000}, "port"), ({"port": -1}, "port"), ({"deadline": 0}, "deadline"), ({"resident": 0}, "resident"),
     ({"max_texts": 0}, "max_texts"), ({"deadline": float("nan")}, "deadline"), ({"window": float("inf")}, "window"),
     ({"queue": "x"}, "queue")],
)  # fmt: skip
def test_settings_that_cannot_work(tmp_path, settings, part):
    with pytest.raises(InfuseError, match=part):
        ServeConfig(tmp_path, **settings).check()
    with pytest.raises(InfuseError, match="no folder"):
        ServeConfig(tmp_path / "none").check()


def test_answers_are_utf8(tiny_base, tmp_path):
    base = load_base(str(tiny_base))
    write(base, tmp_path / "root" / "größe 中", "ia3", torch.Generator().manual_seed(0), 3)
    with Inside(tmp_path / "root", base, watch=0) as server:
        got = server.classify("größe 中", "ä")
        assert json.loads(got.body.decode("utf-8"))["answers"][0]["label"].startswith("größe 中")
        assert server.ask("GET", "/v1/adapters/" + percent("größe 中", True)).json["name"] == "größe 中"

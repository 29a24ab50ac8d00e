"""The client, plain and async: what it sends, reads, repeats and says; and ``infuse predict --url``."""

import ast
import asyncio
import builtins
import csv
import io
import json
import re
import socket
import sys
import time
from contextlib import contextmanager
from email.utils import formatdate
from pathlib import Path
from threading import Thread
from types import SimpleNamespace

import httpx
import pytest
from fake_server import TOKEN, FakeServer, described, serving

import infuse
from infuse import InfuseError, client
from infuse.cli import main
from infuse.client import ServerError

SCORES = {
    "banking": {"card_lost": 0.75, "pin_forgotten": 0.2, "travel_notice": 0.05},
    "out": {"yes": 0.375, "no": 0.25},
    "topics": {"money": 0.875, "cards": 0.5, "travel": 0.125},
    "a b/ü?#%": {"[bold]": 1.0},
}
URL = "http://server.test"


@pytest.fixture
def server():
    changes = {"out": {"threshold": 0.5}, "topics": {"multi": True}}
    adapters = {name: described(name, scores, **changes.get(name, {})) for name, scores in SCORES.items()}
    with serving(FakeServer(SCORES, adapters)) as running:
        yield running


def plainly(make, method, *arguments, **more):
    with infuse.Client(**make) as plain:
        return getattr(plain, method)(*arguments, **more)


def asynchronously(make, method, *arguments, **more):
    async def call():
        async with infuse.AsyncClient(**make) as waiting:
            return await getattr(waiting, method)(*arguments, **more)

    return asyncio.run(call())


@pytest.fixture(params=[plainly, asynchronously])
def call(request):
    """``call(dict(url=…), "method", …)``, by either of the two clients."""
    return request.param


@pytest.fixture
def clock(monkeypatch):
    """A clock that only waiting moves; ``clock.waits`` are the pauses that were made."""
    clock = SimpleNamespace(now=100.0, waits=[])

    def wait(seconds):
        if seconds:
            clock.waits.append(seconds)
        clock.now += seconds

    async def await_(seconds):
        wait(seconds)

    fake = SimpleNamespace(monotonic=lambda: clock.now, sleep=wait, time=time.time)
    monkeypatch.setattr(client, "time", fake)
    monkeypatch.setattr(client, "asyncio", SimpleNamespace(sleep=await_, timeout=asyncio.timeout))
    monkeypatch.setattr(client.random, "uniform", lambda low, high: high)
    return clock


def scripted(*replies):
    """A transport that gives these replies in turn (the last for ever), and the requests that it saw."""
    seen = []

    def handle(request):
        reply = replies[min(len(seen), len(replies) - 1)]
        seen.append(request)
        if isinstance(reply, Exception):
            raise reply
        return httpx.Response(reply.status_code, headers=reply.headers, content=reply.content)

    return httpx.MockTransport(handle), seen


READY = httpx.Response(200, json={"base": "b", "precision": "fp32", "adapters": []})


def failure(status, **headers):
    return httpx.Response(status, json={"error": f"Sentence {status}."}, headers=headers)


# What it sends and reads


def test_classify(call, server):
    found = call({"url": server.url}, "classify", "banking", ["a", "b"], top_k=2)
    assert (found.adapter, found.version) == ("banking", server.adapters["banking"]["version"])
    assert len(found.answers) == 2 and found.answers[0] == found.answers[1]
    answer = found.answers[0]
    assert (answer.label, answer.labels, answer.confidence, answer.refused) == ("card_lost", None, 0.75, False)
    assert answer.top == (("card_lost", 0.75), ("pin_forgotten", 0.2)) and answer.top[1].label == "pin_forgotten"
    assert server.asked == [
        ("POST", "/v1/classify", {"adapter": "banking", "texts": ["a", "b"], "top_k": 2}, None)
    ]  # fmt: skip


def test_several_adapters_are_one_request_in_order(call, server):
    found = call({"url": server.url}, "classify_many", [("out", ["x"]), client.Item("topics", ("x", "y"), 3)])
    assert [each.adapter for each in found] == ["out", "topics"] and len(server.asked) == 1
    assert found[0].answers[0].label is None and found[0].answers[0].refused
    assert found[1].answers[1].labels == ("money", "cards") and not found[1].answers[1].refused


def test_adapters_come_as_the_contract_describes_them(call, server):
    server.adapters["out"]["news"] = "of a later server"
    found = call({"url": server.url}, "adapters")
    assert [each.name for each in found] == list(SCORES)
    assert found[1] == call({"url": server.url}, "adapter", "out")
    assert (found[1].labels, found[1].threshold, found[1].status) == (("yes", "no"), 0.5, "ready")


def test_names_are_encoded_and_tokens_go_where_they_are_needed(call, server, tmp_path):
    make, name = {"url": server.url + "/", "token": TOKEN}, "a b/ü?#%"
    assert call(make, "adapter", name).name == name
    assert call(make, "load", name).status == "resident"
    assert call(make, "unload", name).status == "withdrawn"
    assert call(make, "classify", name, ["\ud800 日本"]).answers[0].label == "[bold]"
    path = "/v1/adapters/a%20b%2F%C3%BC%3F%23%25"
    assert [(method, at) for method, at, _, _ in server.asked[:3]] == [(m, path) for m in ("GET", "POST", "DELETE")]
    assert [token and token.split()[1] for *_, token in server.asked] == [None, TOKEN, TOKEN, None]
    assert server.asked[3][2]["texts"] == ["\ud800 日本"]

    (tmp_path / "adapter_model.safetensors").write_bytes(b"the file")
    for file in (tmp_path, str(tmp_path / "adapter_model.safetensors")):
        assert call(make, "load", "new", file).bytes == len("the file")
        assert server.asked[-1] == ("POST", "/v1/adapters/new", b"the file", f"Bearer {TOKEN}")
    with pytest.raises(ServerError, match="token") as refused:
        call({"url": server.url}, "unload", "new")
    assert refused.value.status == 401
    assert TOKEN not in repr(infuse.Client(server.url, TOKEN)) + repr(infuse.AsyncClient(server.url, TOKEN))


def test_ready_asks_once(call, clock):
    for reply, expected in (
        (httpx.Response(200, json={"status": "ready"}), True), (failure(503), False), (httpx.ConnectError("no"), False),
    ):  # fmt: skip
        transport, seen = scripted(reply)
        assert call({"url": URL, "transport": transport}, "ready") is expected and len(seen) == 1
    assert clock.waits == []


def test_threads_share_a_client(server):
    found = []
    with infuse.Client(server.url) as shared:
        threads = [Thread(target=lambda: found.append(shared.classify("out", ["x"]))) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(found) == 8 and len(set(found)) == 1


# What it repeats


@pytest.mark.parametrize(
    "broken", [failure(503), failure(429), failure(408), httpx.ConnectError("refused"), httpx.ReadError("reset")]
)
def test_passing_errors_are_tried_again_after_longer_and_longer_pauses(call, clock, broken):
    transport, seen = scripted(broken, broken, broken, READY)
    assert call({"url": URL, "transport": transport}, "adapters") == []
    assert len(seen) == 4 and clock.waits == pytest.approx([0.1, 0.2, 0.4])


def test_pauses_are_random(monkeypatch):
    drawn = {client._wait(3, None) for _ in range(50)}
    assert len(drawn) == 50 and min(drawn) >= 0 and max(drawn) <= 0.8 and client._wait(5000, None) <= 10


def test_retry_after_is_honoured_and_capped(call, clock):
    transport, _ = scripted(failure(429, **{"Retry-After": "2"}), failure(503, **{"Retry-After": "600"}), READY)
    call({"url": URL, "transport": transport}, "adapters")
    assert clock.waits == pytest.approx([2.1, 10.1])


@pytest.mark.parametrize(
    "told, seconds", [("1.5", 1.5), ("-3", 0), ("nan", 0), ("soon", 0), ("Thu, 01 Jan 1970 00:00:00 GMT", 0)]
)
def test_retry_after_may_be_anything(told, seconds):
    assert client._seconds(told) == seconds
    assert client._seconds(formatdate(time.time() + 60, usegmt=True)) == pytest.approx(60, abs=2)


def test_it_gives_up_rather_than_wait_beyond_its_time(call, clock):
    transport, seen = scripted(failure(429, **{"Retry-After": "4"}))
    with pytest.raises(ServerError, match="Sentence 429"):
        call({"url": URL, "transport": transport, "timeout": 10, "retries": 99}, "adapters")
    assert len(seen) == 3 and clock.now < 110


@pytest.mark.parametrize("status", [400, 401, 404, 409, 413, 422, 500, 504])
def test_other_errors_are_not_repeated(call, clock, status):
    transport, seen = scripted(failure(status))
    with pytest.raises(ServerError) as refused:
        call({"url": URL, "transport": transport}, "classify", "x", ["y"])
    assert (str(refused.value), refused.value.status, len(seen)) == (f"Sentence {status}.", status, 1)


def test_retries_may_be_none(call, clock):
    transport, seen = scripted(failure(503))
    with pytest.raises(ServerError):
        call({"url": URL, "transport": transport, "retries": 0}, "adapters")
    assert len(seen) == 1


@contextmanager
def raw(talk):
    """The address of a server that does ``talk(connection)`` with whoever connects."""

    def accept():
        try:
            while True:
                connection, _ = listening.accept()
                Thread(target=talk, args=(connection,), daemon=True).start()
        except OSError:
            pass

    with socket.create_server(("127.0.0.1", 0)) as listening:
        Thread(target=accept, daemon=True).start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"


def drip(connection):
    try:
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
        for _ in range(60):
            connection.sendall(b" ")
            time.sleep(0.05)
    except OSError:
        pass


@pytest.mark.parametrize("talk", [lambda connection: time.sleep(3), drip], ids=["silent", "dripping"])
def test_time_is_bounded_for_slow_servers(call, talk):
    with raw(talk) as url:
        started = time.monotonic()
        with pytest.raises(InfuseError, match=r"did not answer within 0\.3 s"):
            call({"url": url, "timeout": 0.3}, "adapters")
        assert time.monotonic() - started < 1


def test_a_lost_connection_is_replaced(call):
    lost = []

    def lose_the_first(connection):
        connection.recv(10_000)
        lost.append(connection)  # before the answer, after which nobody waits for this thread
        if len(lost) > 1:
            body = b'{"status": "ready", "base": "b", "precision": "fp32", "adapters": []}'
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
        connection.close()

    with raw(lose_the_first) as url:
        assert call({"url": url}, "adapters") == [] and len(lost) == 2


# What it says


def test_unreachable_servers_are_named(call):
    with socket.create_server(("127.0.0.1", 0)) as listening:
        url = f"http://127.0.0.1:{listening.getsockname()[1]}"
    with pytest.raises(InfuseError, match="No server can be reached") as failed:
        call({"url": url, "retries": 1}, "classify", "banking", ["x"])
    assert url in str(failed.value) and "infuse serve" in str(failed.value) and "\n" not in str(failed.value)
    assert not isinstance(failed.value, ServerError)


@pytest.mark.parametrize(
    "body", [b"<html>", b"[]", b"{}", b'{"adapters": [{"name": "x"}]}', b'{"adapters": 3}', b"\xff"]
)
def test_answers_of_other_servers_are_no_riddle(call, body):
    transport, _ = scripted(httpx.Response(200, content=body))
    with pytest.raises(InfuseError, match="does not answer like infuse serve"):
        call({"url": URL, "transport": transport}, "adapters")
    for status in (302, 502):
        transport, _ = scripted(httpx.Response(status, content=body, headers={"Location": "http://elsewhere.test"}))
        with pytest.raises(ServerError, match=f"answers {status}, and not like infuse serve"):
            call({"url": URL, "transport": transport}, "adapters")


@pytest.mark.parametrize("url", ["localhost:8000", "", "ftp://host", "http://", "http://[::1", "http://a:b"])
def test_addresses_are_checked(call, url):
    with pytest.raises(InfuseError, match="http://localhost:8000"):
        call({"url": url}, "ready")


@pytest.mark.parametrize("more", [{"timeout": 0}, {"retries": -1}, {"timeout": float("nan")}, {"token": "a\nb"}])
def test_settings_are_checked(call, more):
    with pytest.raises(InfuseError, match=r"timeout must|token may"):
        call({"url": URL, **more}, "ready")


def test_mistakes_in_arguments_are_seen_before_anything_is_sent(call, tmp_path):
    for arguments in (("classify", "a", "one text"), ("classify", "a", [1]), ("classify_many", [("a", "text")])):
        with pytest.raises(InfuseError, match="a list of texts"):
            call({"url": URL}, *arguments)
    for name in ("", ".", ".."):
        with pytest.raises(InfuseError, match="can't be an adapter's name"):
            call({"url": URL}, "adapter", name)
    with pytest.raises(InfuseError, match=r"can't be read: No such file"):
        call({"url": URL}, "load", "a", tmp_path / "nowhere")


def test_both_faces_have_the_same_methods():
    plain, waiting = (
        {name for name in vars(face) if not name.startswith("_")} for face in (infuse.Client, infuse.AsyncClient)
    )
    assert plain == waiting and {"classify", "classify_many", "load", "unload", "ready", "close"} <= plain


def test_httpx_is_asked_for_by_the_client_alone(monkeypatch):
    for path in Path(infuse.__file__).parent.rglob("*.py"):
        atop = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.Import | ast.ImportFrom)]
        assert not re.search(r"\bhttpx\b|infuse\.client|import client", "\n".join(map(ast.unparse, atop))), path
    real = builtins.__import__

    def without(name, *more):
        if name == "httpx":
            raise ImportError(name)
        return real(name, *more)

    monkeypatch.setattr(builtins, "__import__", without)
    monkeypatch.delitem(sys.modules, "infuse.client")
    monkeypatch.delattr(infuse, "client")
    monkeypatch.delitem(vars(infuse), "Client", raising=False)  # kept there since its first use
    with pytest.raises(InfuseError, match=r"needs httpx.*pip install 'infuse\[client\]'"):
        _ = infuse.Client
    with pytest.raises(AttributeError, match="Cliant"):
        _ = infuse.Cliant


# On the command line


def predict(capsys, *arguments):
    main(["predict", *arguments])
    return capsys.readouterr().out


def test_predict_by_a_server(server, capsys):
    shown = predict(capsys, "--url", server.url, "banking", "where is it", "I [b]lost[/b] it", "--top-k", "2")
    for part in ("where is it", "I [b]lost[/b] it", "card_lost", "75.0 %", "pin_forgotten", "20.0 %"):
        assert part in shown
    assert "travel_notice" not in shown and "out of scope" not in shown
    assert predict(capsys, "out", "hello", "--url", server.url).count("(out of scope)") == 1
    assert "[bold]" in predict(capsys, "a b/ü?#%", "hello", "--url", server.url)


def test_predict_by_a_server_as_json_and_csv(server, capsys):
    more = ("--url", server.url, "--top-k", "2", "--format")
    top = [{"label": "yes", "confidence": 0.375}, {"label": "no", "confidence": 0.25}]
    found = json.loads(predict(capsys, "out", "größe", *more, "json"))
    assert found == {"text": "größe", "label": None, "confidence": 0.375, "predictions": top}
    found = json.loads(predict(capsys, "topics", "x", *more, "json"))
    assert (found["label"], found["labels"]) == (None, ["money", "cards"])
    for name, label in (("out", ""), ("topics", "money|cards"), ("banking", "card_lost")):
        (row,) = csv.DictReader(io.StringIO(predict(capsys, name, "a,b", *more, "csv")))
        assert list(row) == ["text", "label_1", "confidence_1", "label_2", "confidence_2", "label"]
        assert (row["text"], row["label"], row["label_1"]) == ("a,b", label, next(iter(SCORES[name])))


def test_predict_sends_many_texts_in_parts(server, capsys, monkeypatch):
    texts = [f"text {i}" for i in range(150)]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(texts)))
    shown = predict(capsys, "banking", "--url", server.url, "--format", "json")
    assert [json.loads(line)["text"] for line in shown.splitlines()] == texts
    assert [len(body["texts"]) for _, _, body, _ in server.asked] == [64, 64, 22]
    assert [text for _, _, body, _ in server.asked for text in body["texts"]] == texts


def test_predict_sends_less_where_a_part_is_too_much(server, monkeypatch):
    def limited(item):
        size = len(json.dumps(item))
        return (413, {"error": "A body may hold 4,000 bytes."}) if size > 4000 else classify(item)

    classify = server.classify
    monkeypatch.setattr(server, "classify", limited)
    texts = ["short"] * 100 + ["漢字" * 50] * 100 + ["last"]
    assert len(client.predict(server.url, "out", texts)) == 201
    sent = [body["texts"] for _, _, body, _ in server.asked if len(json.dumps(body)) <= 4000]
    assert [text for part in sent for text in part] == texts
    with pytest.raises(ServerError, match=r"^Text 202 of 202: A body may hold 4,000 bytes\.$") as refused:
        client.predict(server.url, "out", [*texts, "long " * 1000])
    assert refused.value.status == 413


@pytest.mark.parametrize("blank", ["", " \t"])
def test_predict_names_a_blank_text_before_it_sends_any(server, blank):
    with pytest.raises(InfuseError, match=r"^Text 117 of 120 is blank"):
        client.predict(server.url, "out", ["text"] * 116 + [blank] * 2 + ["text"] * 2)
    assert server.asked == []


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["nobody", "x", "--url", "{}"], "no adapter 'nobody'"),
        (["banking", "x", "--url", "{}", "--base", "minilm"], "leave out --base"),
        (["banking", "x", "--url", "nowhere"], "no address of a server"),
    ],
)
def test_predict_by_a_server_fails_with_a_sentence(server, capsys, arguments, message):
    with pytest.raises(SystemExit) as ended:
        main(["predict", *(word.format(server.url) for word in arguments)])
    shown = capsys.readouterr()
    assert ended.value.code == 2 and shown.out == "" and shown.err.count("\n") == 1 and message in shown.err

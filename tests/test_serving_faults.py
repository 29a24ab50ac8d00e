"""A server under bad clients, full queues, failing passes and signals: answered or refused, never lost, never down."""

import asyncio
import json
import multiprocessing
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import replace
from itertools import count
from pathlib import Path

import numpy as np
import pytest
import torch
from fuzzing import known_answers, send_all
from hostile import Case, cases
from running import TOKEN, Inside, Running, read, request, until
from serving import fill, write

from infuse.bases import load_base, tokenizer_of
from infuse.cli import main
from infuse.errors import InfuseError
from infuse.serving import files
from infuse.serving.model import Apart, Here, Several

TEXTS = ["my card was stolen", "how do I repay the loan early?"]


@pytest.fixture(scope="module")
def base(tiny_base):
    return load_base(str(tiny_base))


@pytest.fixture(scope="module")
def shelf(tiny_base, tmp_path_factory):
    """A folder with a few adapters, and their names."""
    root = tmp_path_factory.mktemp("shelf") / "adapters"
    return root, fill(root, str(tiny_base), ["ia3", "lora", "pfeiffer", "fusion"])


@pytest.fixture(scope="module")
def running(shelf, tiny_base):
    """A process of its own, which the last test of this module ends."""
    with Running(shelf[0], "--base", str(tiny_base), "--deadline", "2", "--drain", "5") as server:
        yield server


# Real processes


def test_fuzz(running, shelf):
    """Hostile bytes, with right requests among them whose answers stay right."""
    known = known_answers(running, shelf[1], TEXTS)
    verdict = asyncio.run(send_all(running.port, cases(7, known), 600, 10))
    assert not verdict.wrong, "\n".join(verdict.wrong)
    assert len(verdict.kinds) > 25 and verdict.statuses[200] > 100 and verdict.statuses[400] > 20
    until(lambda: running.metric("infuse_queue_rows") == 0)
    assert known_answers(running, shelf[1], TEXTS) == known
    assert "Traceback" not in running.output, running.output[-3000:]


def test_schemathesis(running, shelf, tmp_path):
    """What the server's description promises, by requests that fit it and requests that do not."""
    checks = (
        "not_a_server_error,status_code_conformance,content_type_conformance,response_headers_conformance,"
        "response_schema_conformance,negative_data_rejection"
    )
    command = [
        sys.executable, "-m", "schemathesis.cli", "run", f"http://127.0.0.1:{running.port}/openapi.json",
        "--header", f"Authorization: Bearer {TOKEN}", "--max-examples", "40", "--seed", "1", "--phases",
        "coverage,fuzzing",
        "--checks", checks, "--suppress-health-check", "all", "--warnings", "off", "--no-color", "--no-shrink",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
    assert "Traceback" not in running.output
    for name in shelf[1]:  # it has found their names, and may have withdrawn them
        assert running.ask("POST", f"/v1/adapters/{name}", token=TOKEN).status == 200
        assert running.classify(name, "a").status == 200


def test_slow_clients(running):
    whole = request("POST", "/v1/classify", {"adapter": "x", "texts": ["a"]})
    end = whole.index(b"\r\n\r\n")
    parts = [whole[:-1], whole[: end + 4], whole[:end], whole[:1]]
    connections = [running.connect() for _ in parts]
    idle = running.connect()
    started = time.monotonic()
    for connection, part in zip(connections, parts, strict=True):
        connection.sendall(part)
    for connection in connections:
        (got,) = read(connection)
        assert got.status == 408 and "2 s" in got.error and got.headers["connection"] == "close"
    assert 1.5 < time.monotonic() - started < 10
    assert [each.status for each in read(idle)] == [408]  # its client never said a word


def test_a_taken_port_and_an_empty_folder(running, shelf, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    for part, *arguments in [
        (f"Can't listen on 127.0.0.1:{running.port} (", shelf[0], "--port", running.port),
        ("no adapter that can be served", tmp_path / "empty"), ("There is no folder", tmp_path / "none"),
        ("'/no/base'", shelf[0], "--base", "/no/base"), ("deadline must be at least", shelf[0], "--deadline", 0),
    ]:  # fmt: skip
        with pytest.raises(SystemExit) as ended:
            main(["serve", *map(str, arguments)])
        said = capsys.readouterr().err.strip().splitlines()
        assert ended.value.code == 2 and len(said) == 1 and part in said[0], said


def test_sigterm_under_load(running, shelf):
    """Whoever had sent a request is answered; the process ends by itself, with exit code 0."""
    body = {"adapter": shelf[1][0], "texts": TEXTS * 20}
    raw, outcomes, stop = request("POST", "/v1/classify", body, close=False), [], threading.Event()

    def ask():
        """Over one connection, one request after the other: each is answered, or the connection is over."""
        try:
            with running.connect() as connection, connection.makefile("rb") as file:
                while not stop.is_set():
                    connection.sendall(raw)
                    first = file.readline()
                    if not first:
                        outcomes.append("closed")
                        return
                    size = 0
                    while (line := file.readline().lower()).strip():
                        size = int(line.split(b":")[1]) if line.startswith(b"content-length") else size
                    assert len(json.loads(file.read(size))["answers"]) == 40
                    outcomes.append(first.split()[1].decode())
        except ConnectionError:
            outcomes.append("reset")

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    until(lambda: len(outcomes) > 40)
    in_flight = running.connect()
    in_flight.sendall(request("POST", "/v1/classify", body)[:-1])
    until(lambda: len(outcomes) > 60)
    started = time.monotonic()
    running.process.send_signal(signal.SIGTERM)
    in_flight.sendall(b"}")  # it was under way when the signal came
    assert [answer.status for answer in read(in_flight)] == [200]
    assert (
        running.process.wait(20) == 0 and time.monotonic() - started < 5 + 5
    )  # the time to drain, and python's own end
    stop.set()
    for thread in threads:
        thread.join(20)
    assert not any(thread.is_alive() for thread in threads)
    # Every client's last word is an answer that says so, or an end between two requests: none is left in the middle.
    assert set(outcomes) <= {"200", "closed", "reset"} and outcomes.count("reset") + outcomes.count("closed") <= 8
    assert "Traceback" not in running.output, running.output[-2000:]


def test_sigint_and_time_that_is_over(shelf, tiny_base, tmp_path):
    """A pass that hangs is not waited for: its clients are refused, and both processes end."""
    options = ["--base", str(tiny_base), "--drain", "1", "--watch", "0"]
    with Running(shelf[0], *options, log=tmp_path / "log") as server:
        assert server.classify(shelf[1][0], "a").status == 200
        model = server.model
        os.kill(model, signal.SIGSTOP)
        thread, got = ask_apart(server, shelf[1][0], "a")
        until(lambda: server.metric("infuse_queue_rows") == 1)
        assert server.stop(signal.SIGINT, 60) == 130
        thread.join(20)
        assert got[0].status == 503 and got[0].headers["retry-after"] and "stopping" in got[0].error
        until(lambda: not Path(f"/proc/{model}").exists())


def test_sigint_while_it_starts(tiny_base, monkeypatch):
    """Ctrl-C reaches both processes: that of the model, still at its imports, leaves the end to the server."""
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, [])

    def interrupted(name):
        (child,) = multiprocessing.active_children()
        os.kill(child.pid, signal.SIGINT)
        return tokenizer_of(name)

    monkeypatch.setattr("infuse.serving.model.tokenizer_of", interrupted)
    assert Apart(str(tiny_base), "fp32").close()
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == mask


def test_the_server_ends_when_its_model_has(shelf, tiny_base, tmp_path):
    """As if memory had run out: what is in flight is refused, and the exit code tells whoever starts it anew."""
    with Running(shelf[0], "--base", str(tiny_base), "--watch", "0", log=tmp_path / "log") as server:
        assert server.classify(shelf[1][0], "a").status == 200
        model = server.model
        os.kill(model, signal.SIGSTOP)
        asked = [ask_apart(server, shelf[1][i % 4], "a") for i in range(8)]
        until(lambda: server.metric("infuse_queue_rows") == 8)
        os.kill(model, signal.SIGKILL)
        for thread, _ in asked:
            thread.join(20)
        assert {got[0].status for _, got in asked} == {503}
        assert all("process of the model has ended with -9" in got[0].error for _, got in asked)
        assert server.process.wait(20) == 1
        assert "model has ended by itself" in server.output and "Traceback" not in server.output


def test_the_model_ends_when_its_server_is_killed(shelf, tiny_base, tmp_path):
    with Running(shelf[0], "--base", str(tiny_base), log=tmp_path / "log") as server:
        model = server.model
        server.process.kill()
        until(lambda: not Path(f"/proc/{model}").exists() or "Z" in Path(f"/proc/{model}/stat").read_text().split()[2])


def test_a_model_apart_answers_and_fails_as_one_here_does(shelf, base, tiny_base, tmp_path):
    file = files.read(shelf[0] / shelf[1][1])
    here, apart = Here(base), Apart(str(tiny_base), "fp32", threads=1)
    try:
        assert apart.about.base == here.about.base and apart.about.precision == "fp32"
        tokens, names = [[2, 7, 9, 3], [2, 8, 3]], ["x", "x"]
        for model in (here, apart):
            model.attach(file, "x")
        assert apart.config("x") == here.config("x")
        for a, b in zip(apart.forward(tokens, names), here.forward(tokens, names), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-6)
        with pytest.raises(InfuseError, match="truncated"):
            apart.attach(replace(file, content=file.content[:1000]), "y")
        with pytest.raises(RuntimeError, match=r"Traceback(?s:.)*IndexError"):
            apart.forward([[10**6]], ["x"])
        apart.remove("x")
        with pytest.raises(InfuseError, match="Nothing is attached"):
            apart.forward(tokens, names)
    finally:
        here.remove("x")
        assert apart.close()
    with pytest.raises(InfuseError, match="no folder"):
        Apart(str(tmp_path / "none"), "fp32")


def test_several_models_answer_and_fail_as_one_does(shelf, base, tiny_base, tmp_path):
    file = files.read(shelf[0] / shelf[1][1])
    here, several = Here(base), Several(2, str(tiny_base), "fp32")
    try:
        tokens, names = [[2, 7, 9, 3], [2, 8, 3]], ["x", "x"]
        for model in (here, several):
            model.attach(file, "x")
        assert several.config("x") == here.config("x")
        expected = here.forward(tokens, names)
        for _ in range(4):  # each of them in turn
            for a, b in zip(several.forward(tokens, names), expected, strict=True):
                np.testing.assert_allclose(a, b, atol=1e-6)
        several.models[1].attach(file, "y")  # taken there only: all or none get it
        with pytest.raises(InfuseError, match="already has an adapter"):
            several.attach(file, "y")
        with pytest.raises(InfuseError, match="Unknown adapter"):
            several.models[0].forward(tokens, ["y", "y"])
        several.remove("x")
        for _ in range(2):
            with pytest.raises(InfuseError):
                several.forward(tokens, names)
    finally:
        here.remove("x")
        assert several.close()
    with pytest.raises(InfuseError, match="no folder"):
        Several(2, str(tmp_path / "none"), "fp32")
    assert not multiprocessing.active_children()


def test_several_workers_serve_and_end_together(shelf, tiny_base, tmp_path):
    options = ("--base", str(tiny_base), "--watch", "0", "--workers", "2")
    with Running(shelf[0], *options, log=tmp_path / "log") as server:
        asked = [ask_apart(server, shelf[1][i % 4], "a") for i in range(16)]
        for thread, got in asked:
            thread.join(20)
            assert got[0].status == 200
        assert len(server.models) == 2
        os.kill(server.models[1], signal.SIGKILL)
        assert server.process.wait(20) == 1
        assert "model has ended by itself" in server.output and "Traceback" not in server.output


# Passes that hang or fail


@pytest.fixture
def held(shelf, base):
    """A server whose passes wait for ``server.gate``."""
    with Inside(shelf[0], base, watch=0, queue=8, deadline=3.0, window=0) as server:
        assert server.classify(shelf[1][0], "a").status == 200
        server.gate, forward = threading.Event(), server.engine.batcher.forward

        def wait(tokens, names):
            server.gate.wait(20)
            return forward(tokens, names)

        server.engine.batcher.forward = wait
        yield server
        server.gate.set()


def ask_apart(server, *texts):
    """Ask from a thread; the list that will hold the answer."""
    got = []
    thread = threading.Thread(target=lambda: got.append(server.classify(*texts)))
    thread.start()
    return thread, got


def test_a_full_queue_refuses_and_says_when_to_come_back(held, shelf):
    thread, got = ask_apart(held, shelf[1][0], *["a"] * 6)
    until(lambda: held.engine.batcher.reserved == 6)
    refused = held.classify(shelf[1][0], "a", "b", "c")
    assert refused.status == 429 and int(refused.headers["retry-after"]) >= 1 and "6 texts are waiting" in refused.error
    assert held.metric("infuse_queue_rows") == 6 and held.ask("GET", "/healthz").status == 200
    held.gate.set()
    thread.join(20)
    assert got[0].status == 200 and held.classify(shelf[1][0], "a", "b", "c").status == 200
    assert held.engine.batcher.reserved == 0


def test_a_deadline_that_passes(held, shelf):
    got = held.classify(shelf[1][0], "a")
    assert got.status == 504 and "3 s" in got.error
    assert held.engine.batcher.reserved == 0
    held.gate.set()
    until(lambda: held.classify(shelf[1][0], "a").status == 200)


def test_who_goes_away_gives_up_his_place(held, shelf):
    raw = request("POST", "/v1/classify", {"adapter": shelf[1][0], "texts": ["a"] * 5})
    for ending in ("close", "reset", "half"):
        connection = held.connect()
        connection.sendall(raw)
        until(lambda: held.engine.batcher.reserved == 5)
        if ending == "reset":
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.shutdown(socket.SHUT_WR) if ending == "half" else connection.close()
        until(lambda: held.engine.batcher.reserved == 0)
        connection.close()
    (served,) = [e.served for e in held.engine.store.entries.values() if e.served]
    assert served.users == 0
    held.gate.set()
    assert held.classify(shelf[1][0], "a").status == 200


def test_who_goes_away_while_sending_an_adapter_is_no_failure_of_the_server(held):
    raw = request("POST", "/v1/adapters/new", b"x" * 1000, {"Authorization": f"Bearer {TOKEN}"})
    with held.connect() as connection:
        connection.sendall(raw[:-500])
    series = 'infuse_requests_total{route="/v1/adapters/{name}",status="%d"}'
    until(lambda: held.metric(series % 499) == 1)
    assert held.metric(series % 500) == 0


def test_a_row_that_fails_fails_alone(held, shelf):
    forward, calls = held.engine.model.forward, count()

    def fail(tokens, names):
        held.gate.wait(20)
        next(calls)
        if any(len(ids) == 6 for ids in tokens):
            raise RuntimeError("this row can't be run")
        return forward(tokens, names)

    held.engine.batcher.forward = fail
    asked = [ask_apart(held, shelf[1][0], " ".join(["card"] * words)) for words in (1, 2, 3, 4, 5)]
    until(lambda: held.engine.batcher.reserved == 5)
    held.gate.set()
    for thread, _ in asked:
        thread.join(20)
    assert [got[0].status for _, got in asked] == [200, 200, 200, 500, 200]
    assert asked[3][1][0].error == "The server failed on this request; its log says why."
    alone = held.classify(shelf[1][0], "card card card card card").json["answers"][0]
    np.testing.assert_allclose(asked[4][1][0].json["answers"][0]["confidence"], alone["confidence"], atol=1e-5)
    assert held.engine.batcher.reserved == 0


def test_the_last_requests_are_answered_when_it_stops(shelf, base):
    """In the same process: the connection that is idle is closed, the one that waits is answered first."""
    with Inside(shelf[0], base, watch=0) as server:
        gate, forward = threading.Event(), server.engine.batcher.forward
        server.engine.batcher.forward = lambda *given: gate.wait(20) and forward(*given)
        idle = server.connect()
        idle.sendall(request("GET", "/healthz", close=False))
        assert idle.recv(100).startswith(b"HTTP/1.1 200")
        thread, got = ask_apart(server, shelf[1][0], "a")
        until(lambda: server.engine.batcher.reserved == 1)
        server.server.should_exit = True
        until(lambda: idle.recv(1000) == b"")
        with pytest.raises(OSError):
            server.connect(1)
        gate.set()
        thread.join(20)
        assert got[0].status == 200


def test_rubbish_after_a_request_does_not_take_its_answer(held, shelf):
    raw = request("POST", "/v1/classify", {"adapter": shelf[1][0], "texts": ["a"]}, close=False)
    connection = held.connect()
    connection.sendall(raw + b"\0rubbish")
    until(lambda: held.engine.batcher.reserved == 1)
    held.gate.set()
    assert [each.status for each in read(connection)] == [200, 400]


def test_heads_have_a_limit(held):
    for raw in (b"GET / HTTP/1.1\r\nX: " + b"x" * 2**20, b"GET /" + b"x" * 2**20, b"A: b\r\n" * 10):
        with held.connect() as connection:
            with suppress(ConnectionError):
                connection.sendall(raw)
            got = read(connection)
        assert not got or got[0].status in (400, 431)  # a client that goes on sending may not see it
    assert held.ask("GET", "/healthz").status == 200


def test_many_connections_that_say_nothing_hold_up_nobody(held, shelf):
    silent = [held.connect() for _ in range(200)]
    held.gate.set()
    assert held.classify(shelf[1][0], "a").status == 200
    for connection in silent:
        connection.settimeout(20)
        assert b"408" in connection.recv(100)
        connection.close()
    until(lambda: len(held.server.server_state.connections) == 0)


def test_a_fuzz_case_that_should_fail_does(held, shelf):
    """The judge of the fuzz tests sees a wrong status, a wrong answer, and a request without an answer."""
    held.gate.set()
    fine = request("GET", "/healthz")
    wrong = [
        Case("status", [fine], frozenset({404})), Case("told", [fine], told={"status": "dead"}),
        Case("due", [fine], due=2), Case("hang", [fine[:-2]], then="read"),
    ]  # fmt: skip
    verdict = asyncio.run(send_all(held.port, wrong, 4, 1))
    assert [line.split(":")[0] for line in sorted(verdict.wrong)] == ["due", "hang", "status", "told"]


def test_a_new_adapter_does_not_hold_up_answers(shelf, base, tmp_path):
    """Twenty loads wait; a request for an adapter in memory is answered between them."""
    root = tmp_path / "adapters"
    for i in range(20):
        write(base, root / f"{i:02}", "ia3", torch.Generator().manual_seed(i), 3)
    with Inside(root, base, watch=0) as server:
        server.classify("00", "a")
        threads = [ask_apart(server, f"{i:02}", "a") for i in range(1, 20)]
        assert server.classify("00", "a").status == 200
        for thread, got in threads:
            thread.join(20)
            assert got[0].status == 200

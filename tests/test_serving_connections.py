"""Connections over raw sockets: how a request is framed, what waits, what is never read, and how many there are."""

import json
import os
import socket
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest
from running import TOKEN, Inside, Running, parse, read, request, until
from serving import fill
from unsound import CHUNKED, HIDDEN, HOST, JSON, UNSOUND, UPGRADES, head

from infuse.bases import load_base
from infuse.serving.connection import HEAD, HEADERS

ANSWERED = 'infuse_requests_total{route="other",status="404"}'
"""Counts it."""


@pytest.fixture(scope="module")
def shelf(tiny_base, tmp_path_factory):
    root = tmp_path_factory.mktemp("shelf") / "adapters"
    return root, fill(root, str(tiny_base), ["ia3", "lora"])


@pytest.fixture(scope="module")
def server(shelf, tiny_base):
    with Inside(shelf[0], load_base(str(tiny_base)), watch=0) as server:
        yield server


@pytest.fixture(scope="module")
def running(shelf, tiny_base):
    """A process of its own, with uvloop, whose clients must read on within two seconds."""
    with Running(
        shelf[0], "--base", str(tiny_base), "--watch", "0", "--deadline", "2", "--connections", "60"
    ) as server:
        yield server


def right(shelf) -> bytes:
    return json.dumps({"adapter": shelf[1][0], "texts": ["hello"]}).encode()


# Upgrades: there is no other protocol


@pytest.mark.parametrize("lines", UPGRADES)
@pytest.mark.parametrize("apart", [False, True])
def test_an_upgrade_is_ignored_and_its_request_is_answered(server, shelf, lines, apart):
    """Whether its body comes with the head or after it; what follows is the next request."""
    body, before = right(shelf), server.metric(ANSWERED)
    first = head(HOST, JSON, f"Content-Length: {len(body)}", *lines)
    with server.connect() as connection:
        for piece in (first, body) if apart else (first + body,):
            connection.sendall(piece)
            until(lambda: not apart or any(c.url or not c.idle for c in server.server.server_state.connections))
        if not any("close" in line for line in lines):
            connection.sendall(request("GET", "/healthz"))
        answers = read(connection)
    assert [each.status for each in answers][:1] == [200] and answers[0].json["adapter"] == shelf[1][0]
    assert len(answers) == 2 - any("close" in line for line in lines) and server.metric(ANSWERED) == before


def test_the_body_of_an_upgrade_is_never_a_request(server):
    before = server.metric(ANSWERED)
    raw = head(HOST, JSON, "Connection: upgrade", "Upgrade: h2c", f"Content-Length: {len(HIDDEN)}") + HIDDEN
    assert [each.status for each in server.send(raw + request("GET", "/healthz"))] == [400, 200]
    chunk = b"%x\r\n%b\r\n0\r\n\r\n" % (len(HIDDEN), HIDDEN)
    raw = head(HOST, JSON, "Connection: upgrade", "Upgrade: websocket", CHUNKED) + chunk
    assert [each.status for each in server.send(raw + request("GET", "/healthz"))] == [400, 200]
    assert server.metric(ANSWERED) == before


# Framing: a request whose end is not certain ends its connection


@pytest.mark.parametrize("raw", UNSOUND)
def test_what_has_no_certain_end_is_refused_and_nothing_after_it_is_read(server, raw):
    before, right_ones = server.metric(ANSWERED), request("GET", "/healthz", close=False)
    for after in (b"", HIDDEN):
        answers = server.send(raw + after)
        assert [each.status for each in answers] == [400] and answers[0].headers["connection"] == "close"
        assert "HTTP/1.1" in answers[0].error
    assert [each.status for each in server.send(right_ones + raw + HIDDEN)] == [200, 400]
    assert server.metric(ANSWERED) == before


def test_right_framing_of_every_kind(server, shelf):
    body, after = right(shelf), request("GET", "/healthz")
    chunks = b"".join(b"%x;a=b\r\n%b\r\n" % (len(part), part) for part in (body[:7], body[7:])) + b"0\r\n"
    trailers = b"Host: evil.example\r\nExpect: 100-continue\r\nX-Y: z\r\n\r\n"
    chunked = head(HOST, JSON, "Transfer-Encoding: Chunked")
    for raw in (
        head(HOST, JSON, f"Content-Length: {len(body)}") + body,
        chunked + chunks + b"\r\n",
        chunked + chunks + trailers,
    ):
        assert [each.status for each in server.send(raw + after)] == [200, 200]
        with server.connect() as connection:  # a byte at a time
            for i in range(len(raw)):
                connection.sendall(raw[i : i + 1])
            connection.sendall(after)
            assert [each.status for each in read(connection)] == [200, 200]
    with_body = head(HOST, f"Content-Length: {len(HIDDEN)}", method="GET", path="/healthz") + HIDDEN
    assert [each.status for each in server.send(with_body + after)] == [200, 200]
    assert [each.status for each in server.send(b"\r\n\r\n" + after)] == [200]


def test_http_1_0(server, shelf):
    body = right(shelf)
    old = head(JSON, f"Content-Length: {len(body)}", "Connection: keep-alive", version="1.0") + body
    answers = server.send(old + HIDDEN)
    assert [each.status for each in answers] == [200] and answers[0].headers["connection"] == "close"
    raw = head(JSON, f"Content-Length: {len(body)}", "Expect: 100-continue", version="1.0") + body
    with server.connect() as connection:
        connection.sendall(raw)
        assert connection.recv(12) == b"HTTP/1.1 200"  # no interim answer, which it would not know


def test_who_expects_to_be_told_is_told(server, shelf):
    body = right(shelf)
    with server.connect() as connection:
        connection.sendall(
            head(HOST, JSON, f"Content-Length: {len(body)}", "Expect: 100-continue", "Connection: close")
        )
        assert connection.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
        connection.sendall(body)
        assert [each.status for each in read(connection)] == [200]
    before = server.metric(ANSWERED)
    refused = head(HOST, "Content-Type: text/plain", f"Content-Length: {len(HIDDEN)}", "Expect: 100-continue")
    answers = server.send(refused + HIDDEN)  # sent all the same, it is no request
    assert [each.status for each in answers] == [415] and answers[0].headers["connection"] == "close"
    assert server.metric(ANSWERED) == before


# Limits of a head


def test_heads_and_what_frames_a_body_are_limited(server):
    many = [f"X-{i}: x" for i in range(HEADERS)]
    assert (
        server.send(head(*many[: HEADERS - 2], HOST, "Connection: close", method="GET", path="/healthz"))[0].status
        == 200
    )
    for raw in (
        head(HOST, *many), head(HOST, "X: " + "x" * HEAD), head(HOST, path="/" + "x" * HEAD), b"GET /" + b"x" * HEAD,
        b"\r\n" * HEAD, head(HOST, JSON, CHUNKED) + b"1;" + b"x" * HEAD,
        head(HOST, JSON, CHUNKED) + b"0\r\nX: " + b"x" * HEAD,
        head(HOST, JSON, CHUNKED) + b"0\r\n" + b"a: b\r\n" * HEAD,
    ):  # fmt: skip
        with server.connect() as connection:
            with suppress(ConnectionError):
                connection.sendall(raw)
            got = read(connection)
        assert [each.status for each in got] in ([431], []), raw[:50]  # who goes on sending may not see it
    assert server.send(head(HOST, *many))[0].status == 431


# Pipelines, and clients that don't read


def test_a_pipeline_is_answered_in_order_one_after_the_other(server, shelf):
    paths = ["/healthz", "/none", "/readyz", "/v1/adapters"] * 50
    raw = b"".join(request("GET", path, close=False) for path in paths) + request("GET", "/healthz")
    answers = server.send(raw)
    assert [each.status for each in answers] == [200, 404, 200, 200] * 50 + [200]


def flood(connection: socket.socket, raw: bytes, limit: int) -> int:
    """Send without reading, until the server reads no more or ``limit`` bytes are sent."""
    connection.setblocking(False)
    sent, quiet = 0, time.monotonic()
    while sent < limit and time.monotonic() - quiet < 1:
        try:
            sent += connection.send(raw[sent % len(raw) :])
            quiet = time.monotonic()
        except BlockingIOError:
            time.sleep(0.01)
        except ConnectionError:
            break
    return sent


def memory(server: Running) -> int:
    """MB of the server's process alone."""
    lines = Path(f"/proc/{server.process.pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS:")) // 1024


@pytest.mark.parametrize("path", ["/healthz", "/openapi.json"])
def test_who_sends_without_reading_is_read_no_further_and_cut_off(running, path):
    """As many requests as the sockets take; others are answered meanwhile, and memory stays what it was."""
    raw = request("GET", path, close=False) * 2000
    until(lambda: running.ask("GET", "/healthz").status == 200)
    before = memory(running)
    connections = [running.connect() for _ in range(10)]
    try:
        sent = [flood(connection, raw, 2**27) for connection in connections]
        assert max(sent) < 2**27  # the server has stopped reading
        assert running.ask("GET", "/healthz").status == 200
        assert memory(running) - before < 80
    finally:
        for connection in connections:
            connection.close()
    assert running.ask("GET", "/healthz").status == 200


def test_answers_that_nobody_reads_are_given_up(running):
    connection = running.connect()
    try:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        flood(connection, request("GET", "/openapi.json", close=False) * 500, 2**27)
        until(lambda: open_sockets(running, connection) == 0, 60)  # twice the two seconds, and some more
    finally:
        connection.close()


def open_sockets(server: Running, connection: socket.socket) -> int:
    """How many ends of this connection the server still holds."""
    local, remote = (f"{port:04X}" for port in (server.port, connection.getsockname()[1]))
    lines = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    own = {os.readlink(each) for each in Path(f"/proc/{server.process.pid}/fd").iterdir() if each.is_symlink()}
    return sum(
        line[1].endswith(f":{local}") and line[2].endswith(f":{remote}") and f"socket:[{line[9]}]" in own
        for line in lines
    )


def test_a_server_inside_holds_no_more_than_a_read_or_two(server):
    with server.connect() as connection:
        flood(connection, request("GET", "/openapi.json", close=False) * 2000, 2**27)
        (one,) = [c for c in server.server.server_state.connections if c.flow.write_paused]
        assert not one.pipeline and len(one.held) < 2**20 and one.flow.read_paused
        assert one.transport.get_write_buffer_size() < 2**20
    until(lambda: not server.server.server_state.connections)


def test_who_reads_late_gets_every_answer(server):
    count = 3000
    raw = b"".join([request("GET", "/v1/adapters", close=False)] * count) + request("GET", "/healthz")
    with server.connect() as connection:
        sent = flood(connection, raw, len(raw))
        got = b""
        while sent < len(raw) or not got.endswith(b"}"):
            if sent < len(raw):
                connection.setblocking(False)
                with suppress(BlockingIOError):
                    sent += connection.send(raw[sent:])
            connection.settimeout(60)
            more = connection.recv(2**16)
            assert more, got[-200:]
            got += more
        while more := connection.recv(2**16):
            got += more
    assert [each.status for each in parse(got)[0]] == [200] * (count + 1)


# Many connections, slow ones, half ones


def test_a_full_server_gives_up_who_says_nothing(running):
    """Sixty connections are allowed; a hundred that are silent or slow keep nobody out."""
    silent = []
    try:
        for i in range(100):
            silent.append(running.connect())
            if i % 2:
                silent[-1].sendall(b"GET / HT")
            assert i % 20 or running.ask("GET", "/healthz").status == 200
        assert running.ask("GET", "/healthz").status == 200
        first = [read(connection) for connection in silent[:5]]
        assert {answer.status for answers in first for answer in answers} <= {503, 408}
    finally:
        for connection in silent:
            connection.close()
    until(lambda: running.ask("GET", "/healthz").status == 200)


def test_a_full_server_says_so(shelf, tiny_base):
    with Inside(shelf[0], load_base(str(tiny_base)), watch=0, connections=3) as server:
        gate = threading.Event()
        server.engine.batcher.call(lambda: gate.wait(30))
        waiting = [server.connect() for _ in range(3)]
        for connection in waiting:
            connection.sendall(request("POST", "/v1/classify", right(shelf)))
        until(
            lambda: (
                server.engine.batcher.reserved == 3
                or sum(not c.idle for c in server.server.server_state.connections) == 3
            )
        )
        with server.connect() as one_more:
            (told,) = read(one_more)
        assert told.status == 503 and told.headers["retry-after"] == "1" and "3 connections" in told.error
        gate.set()
        for connection in waiting:
            assert [each.status for each in read(connection)] == [200]
            connection.close()
        until(lambda: server.ask("GET", "/healthz").status == 200)


def test_half_closed_and_reset_connections_leave_nothing_behind(server, shelf):
    raw = request("POST", "/v1/classify", right(shelf), close=False)
    for part in (raw, raw[:-1], raw[:20], b"", raw * 30, b"\r\n"):
        with server.connect() as connection:
            connection.sendall(part)
            connection.shutdown(socket.SHUT_WR)
            assert all(each.status in (200, 400, 408) for each in read(connection))
    until(lambda: not server.server.server_state.connections and not server.engine.batcher.reserved)


def test_a_token_in_a_trailer_is_none(server):
    raw = head(HOST, CHUNKED, "Connection: close", path="/v1/adapters/x") + b"1\r\nx\r\n0\r\n"
    assert server.send(raw + f"Authorization: Bearer {TOKEN}\r\n\r\n".encode())[0].status == 401

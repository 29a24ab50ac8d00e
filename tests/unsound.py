"""Requests whose end or host is in doubt, that want another protocol, or that nobody reads the answers of."""

import json
import random

from hostile import BEARER, OK, Case, Known, classify, family, item
from running import request

HIDDEN = b"GET /hidden HTTP/1.1\r\nHost: localhost\r\n\r\n"
"""A body that would be a request, if it were read as one."""
HOST, JSON, CHUNKED = "Host: localhost", "Content-Type: application/json", "Transfer-Encoding: chunked"


def head(*lines: str, method: str = "POST", path: str = "/v1/classify", version: str = "1.1") -> bytes:
    """The head of a request with just these headers."""
    return "\r\n".join([f"{method} {path} HTTP/{version}", *lines]).encode("latin-1") + b"\r\n\r\n"


LENGTHS = ["4, 4", "-1", "+4", "0x4", "4 4", "", "1e3", str(2**64), "4;a", "4_0", "\xb2"]
CODINGS = ["gzip", "chunked, gzip", "gzip, chunked", "xchunked", "chunked;a=b", "\x0bchunked", "identity", ""]
UNSOUND = [
    *(head(HOST, JSON, f"Content-Length: {length}") for length in LENGTHS),
    *(head(HOST, JSON, f"Transfer-Encoding: {coding}") + b"0\r\n\r\n" for coding in CODINGS),
    *(head(HOST, JSON, *lines) + b"0\r\n\r\n" for lines in [
        ("Content-Length: 4", CHUNKED), (CHUNKED, "Content-Length: 4"), (CHUNKED, CHUNKED),
        ("Content-Length: 0", "Content-Length: 5"), ("Content-Length: 4", "Content-Length: 4"),
        ("Content-Length : 0",), ("Transfer-Encoding : chunked",), ("X: a\r\n Content-Length: 5",), ("X: a", " b: c"),
        ("Host: localhost",), ("X\x00: a",), ("X: \x00",), ("X y: a",), (": a",), ("no colon",), ("X: a\rY: b",),
    ]),
    *(head(HOST, JSON, CHUNKED) + chunk for chunk in [
        b"5\r\nabcdeXX", b"zz\r\n", b"-1\r\n", b"1" * 17 + b"\r\n", b"0x5\r\nabcde\r\n", b"5 \r\nabcde\r\n",
        b"1\r\na\r\n0\r\nContent-Length: 5\r\n\r\n", b"1\na\n0\n\n", b"\r\n\r\n",
    ]),
    *(head(HOST, "Content-Length: 0", version=version) for version in ("2.0", "1.2", "3.0", "1", "11.1", "1.1 x")),
    head(JSON, "Content-Length: 0"), head(HOST, JSON, CHUNKED, version="1.0") + b"0\r\n\r\n",
    head(HOST, method="CONNECT", path="localhost:80"), b"GET /healthz HTTP/1.1\nHost: localhost\n\n",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"\0" * 50,
]  # fmt: skip
"""Requests after which nothing may be read: each is answered with one 400."""
UPGRADES = [
    ("Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAMAAABk"),
    ("Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Version: 13", "Sec-WebSocket-Key: eA=="),
    ("Connection: upgrade",), ("Upgrade: h2c",), ("UPGRADE:h2c", "connection:UPGRADE"),
    ("Connection: upgrade, close", "Upgrade: foo/1"),
]  # fmt: skip
"""Headers that ask for another protocol; there is none, so that they change nothing."""


@family(20)
def framing(draw: random.Random, known: list[Known]) -> Case:
    before = draw.choice([b"", request("GET", "/healthz", close=False)])
    raw = before + draw.choice(UNSOUND) + draw.choice([b"", HIDDEN])
    return Case("framing", [raw], frozenset({200, 400}), due=1 + bool(before), most=1 + bool(before))


@family(20)
def upgrades(draw: random.Random, known: list[Known]) -> Case:
    one, lines = draw.choice(known), draw.choice(UPGRADES)
    body = json.dumps({"adapter": one.adapter, "texts": one.texts, "top_k": 3}).encode()
    # Who sends on after asking to close may have its connection reset, and lose the answer by that.
    after = [] if any("close" in line for line in lines) else [request("GET", "/healthz")]
    raw, count = [head(HOST, JSON, f"Content-Length: {len(body)}", *lines), body, *after], 1 + len(after)
    return Case("upgrade", raw, OK, due=count, most=count, told=one.answer, pause=draw.choice([0, 0.002]))


@family(10)
def hidden(draw: random.Random, known: list[Known]) -> Case:
    raw = head(HOST, JSON, f"Content-Length: {len(HIDDEN)}", *draw.choice(UPGRADES[:5])), HIDDEN
    return Case("hidden", [*raw, request("GET", "/healthz")], frozenset({200, 400}), due=2, most=2)


@family(20)
def hosts(draw: random.Random, known: list[Known]) -> Case:
    host = draw.choice(["evil.example", "localhost.evil.example", "10.0.0.1", "a b", "", "\xff", "[::1", "localhost:x"])
    method, path = draw.choice(
        [("GET", "/healthz"), ("GET", "/"), ("POST", "/v1/classify"), ("DELETE", "/v1/adapters/x")]
    )
    raw = request(method, path, item(known) if method == "POST" else b"", BEARER | {"Host": host})
    return Case("host", [raw], frozenset({400, 403}))


@family(10)
def origins(draw: random.Random, known: list[Known]) -> Case:
    origin = draw.choice(["https://evil.example", "null", "http://localhost:3000", "", "\xff", "file://"])
    return Case("origin", [classify(item(known), Origin=origin)], frozenset({403}))


@family(2)
def deaf(draw: random.Random, known: list[Known]) -> Case:
    """A long pipeline of which no answer is read."""
    path = draw.choice(["/healthz", "/openapi.json", "/v1/adapters", "/none", "/docs"])
    raw = draw.choice([request("GET", path, close=False), classify(item(known)).replace(b"Connection: close\r\n", b"")])
    return Case("deaf", [raw * 2000] * 20, due=0, then="deaf")

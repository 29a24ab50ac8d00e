"""Hostile and odd requests, as bytes on a socket: what a server must survive, and how each may be answered."""

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from running import TOKEN, request

OK, BAD = frozenset({200}), frozenset(range(400, 500))
ANY = OK | BAD
"""No fault of the client's is a fault of the server's: never 5xx."""

BEARER = {"Authorization": f"Bearer {TOKEN}"}


@dataclass(frozen=True)
class Known:
    """Texts of which the right answer is known."""

    adapter: str
    texts: list[str]
    answer: Any


@dataclass(frozen=True)
class Case:
    """Bytes to send and what may come back.

    Attributes:
        kind: its family.
        pieces: sent one after the other.
        statuses: of every answer.
        due: how many answers must come at least.
        most: how many may come at most.
        then: after sending, read the answers; shut the sending side first; or reset the connection; deaf ones never
            read, and reset it once the server takes no more.
        pause: seconds between pieces.
        told: the answer's JSON, where it is known.
    """

    kind: str
    pieces: list[bytes]
    statuses: frozenset[int] = ANY
    due: int = 1
    most: int = 10**6
    then: Literal["read", "shut", "reset", "deaf"] = "read"
    pause: float = 0.0
    told: Any = None


Maker = Callable[[random.Random, list[Known]], Case]
MAKERS: dict[str, tuple[Maker, int]] = {}
"""Family → what makes a case of it, and how often."""


def family(weight: int = 10) -> Callable[[Maker], Maker]:
    def add(maker: Maker) -> Maker:
        MAKERS[maker.__name__] = (maker, weight)
        return maker

    return add


def cases(seed: int, known: list[Known], rare: bool = True) -> Any:
    """Cases without end; without ``rare``, none that takes seconds."""
    draw = random.Random(seed)
    chosen = {name: pair for name, pair in MAKERS.items() if rare or pair[1] > 1}
    makers, weights = zip(*chosen.values(), strict=True)
    while True:
        yield draw.choices(makers, weights)[0](draw, known)


def classify(body: bytes | str | object, **headers: str) -> bytes:
    return request("POST", "/v1/classify", body, {name.replace("_", "-"): value for name, value in headers.items()})


def item(known: list[Known], **changes: Any) -> dict[str, Any]:
    return {"adapter": known[0].adapter, "texts": ["hello"], **changes}


# Right ones among them: the answer is always that adapter's own


@family(120)
def right(draw: random.Random, known: list[Known]) -> Case:
    one = draw.choice(known)
    body = {"adapter": one.adapter, "texts": one.texts, "top_k": 3}
    return Case("right", [classify(body)], OK, told=one.answer)


@family(40)
def right_lists(draw: random.Random, known: list[Known]) -> Case:
    chosen = draw.choices(known, k=draw.randint(1, 8))
    body = [{"adapter": one.adapter, "texts": one.texts, "top_k": 3} for one in chosen]
    return Case("right lists", [classify(body)], OK, told=[one.answer for one in chosen])


@family(20)
def right_chunks(draw: random.Random, known: list[Known]) -> Case:
    one = draw.choice(known)
    body = json.dumps({"adapter": one.adapter, "texts": one.texts, "top_k": 3}).encode()
    cuts = sorted(draw.sample(range(1, len(body)), 4))
    parts = [body[a:b] for a, b in zip([0, *cuts], [*cuts, len(body)], strict=True)]
    head = b"POST /v1/classify HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Type: application/json\r\n"
    chunks = [b"%x\r\n%s\r\n" % (len(part), part) for part in parts]
    return Case("chunks", [head + b"Transfer-Encoding: chunked\r\n\r\n", *chunks, b"0\r\n\r\n"], OK, told=one.answer)


@family(20)
def pipelines(draw: random.Random, known: list[Known]) -> Case:
    paths = draw.choices(["/healthz", "/v1/adapters", "/none", "/v1/adapters/%2e%2e"], k=draw.randint(1, 9))
    whole = [request("GET", path, close=False) for path in paths] + [classify(item(known))]
    raw = b"".join(whole)
    at = draw.randrange(1, len(raw))
    return Case("pipeline", [raw[:at], raw[at:]], ANY, due=len(whole))


# Bytes that are no HTTP


@family(20)
def noise(draw: random.Random, known: list[Known]) -> Case:
    return Case("noise", [draw.randbytes(draw.randint(1, 4096))], BAD, due=0, then="shut")


@family()
def first_lines(draw: random.Random, known: list[Known]) -> Case:
    target = "".join(chr(draw.choice([*range(33, 127), *range(160, 256)])) for _ in range(draw.randint(1, 60)))
    line = draw.choice(["GET {} HTTP/1.1", "GET /{} HTTP/1.1", "{} / HTTP/1.1", "GET / {}", "GET / HTTP/{}", "{}",
                        "GET http://{}/ HTTP/1.1", "GET /healthz?{} HTTP/1.1",
                        "GET  /healthz{} HTTP/0.9"]).format(target)  # fmt: skip
    return Case(
        "first line", [line.encode("latin-1") + b"\r\nHost: localhost\r\nConnection: close\r\n\r\n"], due=0, then="shut"
    )


@family()
def other_protocols(draw: random.Random, known: list[Known]) -> Case:
    raw = draw.choice(
        [b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + draw.randbytes(200),
         request("GET", "/", headers={"Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Key": "x"}),
         request("GET", "/", headers={"Connection": "Upgrade, HTTP2-Settings", "Upgrade": "h2c"}),
         b"CONNECT example.org:443 HTTP/1.1\r\nHost: localhost\r\n\r\n",
         b"OPTIONS * HTTP/1.1\r\nHost: localhost\r\n\r\n",
         b"GET http://example.org/healthz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n",
         b"\r\n" * 500, b"\0" * 500]
    )  # fmt: skip
    return Case("other protocol", [raw], due=0, then="shut")


# Sizes that lie


@family(20)
def cut_short(draw: random.Random, known: list[Known]) -> Case:
    raw = classify(item(known))
    then = draw.choice(["shut", "reset"])
    return Case("cut short", [raw[: draw.randrange(1, len(raw))]], due=0, then=then)


@family()
def lengths(draw: random.Random, known: list[Known]) -> Case:
    body = json.dumps(item(known))
    value = draw.choice(["-1", "1e3", "abc", str(2**64), str(2**63 - 1), "1, 1", "+5", "0x10", "", "9" * 5000, "5", "0",
                         str(len(body) + 1), str(10**9), f"{len(body)}\r\nContent-Length: 3"])  # fmt: skip
    return Case("content-length", [classify(body, Content_Length=value)], BAD, due=0, then="shut")


@family()
def chunk_rubbish(draw: random.Random, known: list[Known]) -> Case:
    body = json.dumps(item(known)).encode()
    good = b"%x\r\n%s\r\n" % (len(body), body)
    parts = [
        b"zz\r\nabc\r\n", b"-1\r\n", b"f" * 17 + b"\r\n", b"5\r\nabc", b"5\r\nabcdeXX", b"\r\n\r\n", good,
        good + b"0\r\n",
        b"1;" + b"x" * 5000 + b"\r\na\r\n0\r\n\r\n", good + b"0\r\nX: y\r\n\r\n",
        good + b"0\r\n" + b"T: t\r\n" * 5000 + b"\r\n",
        draw.randbytes(100),
    ]  # fmt: skip
    extra = draw.choice([b"", b"Content-Length: 5\r\n", b"Transfer-Encoding: gzip\r\n"])
    head = (
        b"POST /v1/classify HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Type: application/json\r\n"
        + extra
    )
    return Case("chunk rubbish", [head + b"Transfer-Encoding: chunked\r\n\r\n", draw.choice(parts)], due=0, then="shut")


@family(3)
def huge_headers(draw: random.Random, known: list[Known]) -> Case:
    size = draw.choice([10_000, 100_000, 1_000_000])
    raw = draw.choice(
        [request("GET", "/healthz", headers={"X": "x" * size}), request("GET", "/" + "x" * size),
         request("GET", "/healthz", headers={f"X-{i}": "x" for i in range(size // 10)}),
         request("GET", "/healthz", headers={"X" * size: "x"}), b"GET /healthz HTTP/1.1\r\n" + b"X" * size]
    )  # fmt: skip
    return Case("huge headers", [raw], due=0, then="shut")


@family(3)
def huge_bodies(draw: random.Random, known: list[Known]) -> Case:
    body = json.dumps(item(known, texts=["x" * 2**21])).encode()
    if draw.random() < 0.5:
        return Case("huge body", [classify(body)], frozenset({413}))
    head = b"POST /v1/classify HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Type: application/json\r\n"
    chunks = [b"%x\r\n%s\r\n" % (len(part), part) for part in (body[: 2**20], body[2**20 :])]
    return Case("huge body", [head + b"Transfer-Encoding: chunked\r\n\r\n", *chunks, b"0\r\n\r\n"], frozenset({413}))


# JSON that is not what it should be


@family(4)
def deep(draw: random.Random, known: list[Known]) -> Case:
    start, end = draw.choice([("[", "]"), ('{"a":', "}"), ('[{"texts":', "}]")])
    depth = draw.choice([10, 500, 1000, 50_000, 100_000])
    return Case("deep", [classify(start * depth + "1" + end * draw.choice([0, depth]))], BAD)


@family(20)
def numbers(draw: random.Random, known: list[Known]) -> Case:
    value = draw.choice(["NaN", "Infinity", "-Infinity", "1e999", "-0", "0", "-1", "1001", "1.5", "1.0", "true", "null",
                         "9" * 4000, "9" * 5000, "1" + "0" * 100_000, "1e-999", '"1"', "[1]", "{}", "01",
                         "+1"])  # fmt: skip
    body = '{"adapter": "%s", "texts": ["a"], "top_k": %s}' % (known[0].adapter, value)  # noqa: UP031  # braces of JSON
    return Case("numbers", [classify(body)], BAD)


@family(20)
def types(draw: random.Random, known: list[Known]) -> Case:
    def value(depth: int = 0) -> Any:
        leaves = [None, True, 0, -1, 3.5, "", "x", [], {}]
        if depth > 3 or draw.random() < 0.5:
            return draw.choice(leaves)
        if draw.random() < 0.5:
            return [value(depth + 1) for _ in range(draw.randint(0, 4))]
        return {draw.choice(["adapter", "texts", "top_k", "x"]): value(depth + 1) for _ in range(draw.randint(0, 4))}

    body = draw.choice([value(), item(known, **{draw.choice(["adapter", "texts", "top_k", "x"]): value()})])
    if isinstance(body, dict) and body == item(known):
        body = {}
    return Case("types", [classify(body if body != b"" else {})], ANY)


@family(20)
def broken_json(draw: random.Random, known: list[Known]) -> Case:
    good = json.dumps(item(known)).encode()
    at = draw.randrange(len(good))
    broken = draw.choice(
        [good[:at], good[:at] + draw.randbytes(1) + good[at + 1 :], good + good, b"", b" ", b"\xff", draw.randbytes(50),
         b"\xef\xbb\xbf" + good, good.decode().encode("utf-16"), good.decode().encode("utf-32"), good + b"\0",
         b'{"adapter": "a", "adapter": "b", "texts": ["a"]}', b'{"texts": ["a"], "texts": "b", "adapter": "a"}',
         good.replace(b'"hello"', b'"hello",'), good.replace(b'"', b"'"), b"// x\n" + good]
    )  # fmt: skip
    return Case("broken JSON", [classify(broken)], ANY)


@family(5)
def counts(draw: random.Random, known: list[Known]) -> Case:
    body = draw.choice(
        [[], [item(known)] * 1001, item(known, texts=["a"] * 257), item(known, texts=[]), item(known, texts=[""]),
         item(known, texts=[" \t\n\u2003"]), item(known, texts=["x" * 20_001]), [item(known, texts=["a"] * 130)] * 2,
         item(known, adapter=""), item(known, adapter="x" * 129), item(known, adapter="x" * 100_000)]
    )  # fmt: skip
    return Case("counts", [classify(body)], frozenset({422}))


@family(5)
def content_types(draw: random.Random, known: list[Known]) -> Case:
    kind = draw.choice(["text/plain", "", "application/xml", "multipart/form-data; boundary=x",
    "application/octet-stream",
                        "application/jsonx", "*/*", "\xff", "application/x-www-form-urlencoded"])  # fmt: skip
    return Case("content type", [classify(item(known), Content_Type=kind)], frozenset({415}))


# Unicode


@family(30)
def planes(draw: random.Random, known: list[Known]) -> Case:
    plane = draw.randrange(17)
    points = [draw.randrange(plane << 16, (plane + 1) << 16) for _ in range(draw.randint(1, 200))]
    text = "a" + "".join(chr(p) for p in points if not 0xD800 <= p < 0xE000)
    body = json.dumps(item(known, texts=[text]), ensure_ascii=draw.random() < 0.5)
    return Case("planes", [classify(body)], OK)


@family(20)
def marks(draw: random.Random, known: list[Known]) -> Case:
    odd = ["\0", "\u202e", "\u200f", "\u2066", "\ufeff", "\u200d", "\u0301", "\ufffe", "\uffff", "\x1b[2J", "\x7f",
    "\u2028",
           "🏳️‍🌈", "ﷺ", "Z͑ͫ̓ͪ̂ͫ", "[MASK]", "[SEP]", "<script>", "%s%n", "${x}", "'; --", "\\",
           "\r\n\r\n"]  # fmt: skip
    text = "a" + "".join(draw.choice(odd) * draw.choice([1, 1, 50]) for _ in range(10))
    return Case("marks", [classify(item(known, texts=[text, text[::-1]]))], OK)


@family()
def surrogates(draw: random.Random, known: list[Known]) -> Case:
    lone = draw.choice(["\\ud800", "\\udfff", "\\udc00\\ud800", "a\\udbff"])
    where = draw.choice(["adapter", "texts", "key"])
    if where == "key":
        body = '{"adapter": "a", "texts": ["a"], "%s": 1}'
    else:
        body = '{"adapter": "%s", "texts": ["a"]}' if where == "adapter" else '{"adapter": "a", "texts": ["%s"]}'
    raw = (body % lone).encode()
    if draw.random() < 0.3:  # as bytes that are no UTF-8
        raw = (body % lone.encode().decode("unicode_escape")).encode("utf-8", "surrogatepass")
    return Case("surrogates", [classify(raw)], BAD)


# Names, paths, methods, tokens

ESCAPES = [
    "../x", "..", ".", "./x", "/etc/passwd", "..\\x", "C:\\x", "~", "~root", "x/../../y", ".hidden", "x\0y",
    "x\ny", "//x",
    "....//", "\u2215etc", "．．/x", "con", "-", "..;/x", "x" * 300, "𝒳" * 100, "\u0130" * 128, "中" * 128,
    "a\u0300" * 64,
    "\u202ex", "x\r\nSet-Cookie: a=b", "{name}", "%00", "%2e%2e%2f", "x?y", "x#y", " ", "\u00a0",
    "adapter_model.safetensors",
]  # fmt: skip


@family(20)
def names(draw: random.Random, known: list[Known]) -> Case:
    return Case("names", [classify(item(known, adapter=draw.choice(ESCAPES)))], frozenset({404, 422}))


def percent(text: str, every: bool) -> str:
    return "".join(
        f"%{b:02{'x' if every else 'X'}}" if every or not (b < 128 and chr(b).isalnum()) else chr(b)
        for b in text.encode()
    )


@family(30)
def paths(draw: random.Random, known: list[Known]) -> Case:
    name = draw.choice(ESCAPES)
    once = percent(name, draw.random() < 0.5)
    spelled = draw.choice(
        [once, once.replace("%", "%25"), "%c0%ae%c0%ae%c0%af" + once, "%e0%80%ae" + once, "%ff", "%", "%zz", "%u002e",
         "".join(c if 33 <= ord(c) < 127 else "_" for c in name), "%ed%a0%80"]
    )  # fmt: skip
    headers = draw.choice([{}, BEARER])
    method = draw.choice(["GET", "DELETE", "GET", "POST"])
    # A name that is legal after all is unknown, and installing this body under it is refused.
    raw = request(method, "/v1/adapters/" + spelled, b"rubbish" if method == "POST" else b"", headers)
    # /v1/adapters/../adapters and the like may reach another route; / and /v1/adapters themselves are there.
    return Case("paths", [raw], ANY if method == "GET" else BAD, due=1)


@family(20)
def methods(draw: random.Random, known: list[Known]) -> Case:
    path = draw.choice(["/", "/v1/classify", "/v1/adapters", "/v1/adapters/x", "/healthz", "/readyz", "/metrics",
    "/none",
                        "/openapi.json", "/v1", "/v1/classify/", "/v1//classify", "//", "/docs", "/redoc"])  # fmt: skip
    method = draw.choice(["PUT", "PATCH", "OPTIONS", "TRACE", "FOO", "get", "DELETE", "PROPFIND", "PURGE"])
    return Case("methods", [request(method, path)], ANY, due=0, then="shut")


@family(10)
def tokens(draw: random.Random, known: list[Known]) -> Case:
    value = draw.choice(["Bearer x", "Bearer", "Bearer ", "Basic " + TOKEN, TOKEN, "bearer " + TOKEN[:-1],
    "\xff\xfe", "",
                         "Bearer " + TOKEN + "x", "Bearer " + "x" * 10_000, "Bearer \xe9\xe8",
                         "Bearer a b c"])  # fmt: skip
    method = draw.choice(["POST", "DELETE"])
    raw = request(method, f"/v1/adapters/{known[0].adapter}", headers={"Authorization": value})
    return Case("tokens", [raw], frozenset({401}))


@family(10)
def rubbish_adapters(draw: random.Random, known: list[Known]) -> Case:
    header = draw.choice(
        [b"{}", b"[]", b"[" * 50_000, b'{"__metadata__": []}', b'{"__metadata__": {"infuse": "[]"}}', b"\xff\xff",
         b'{"__metadata__": {"infuse": "{}"}}', b'{"__metadata__": {"infuse": "{\\"base\\": 3}"}}',
         json.dumps({"__metadata__": {"infuse": "[" * 50_000}}).encode(),
         json.dumps({"__metadata__": {"infuse": json.dumps({
             "version": 1, "base": {"name": "x", "type": "bert", "digest": "y"}, "info": {},
             "head": draw.choice([{}, None, {"kind": []}]),
             "members": draw.choice([[], 3, None, ["../../x"]]), **draw.choice([{}, {"method": 3},
             {"method": "ia3"}])})}}).encode()]
    )  # fmt: skip
    length = draw.choice([len(header), 2**63, 0, len(header) - 1])
    body = draw.choice([length.to_bytes(8, "little") + header, draw.randbytes(300), b"PK\x03\x04", b"\x80\x04."])
    return Case("rubbish adapter", [request("POST", "/v1/adapters/scratch", body, BEARER)], frozenset({422}))


@family(10)
def reads(draw: random.Random, known: list[Known]) -> Case:
    path = draw.choice(["/", "/v1/adapters", f"/v1/adapters/{known[0].adapter}", "/healthz", "/readyz", "/metrics",
                        "/openapi.json"])  # fmt: skip
    odd = {"Range": "bytes=5-1", "If-None-Match": "*", "Accept": "text/x", "Accept-Encoding": "gzip;q=x",
    "Cookie": "\xff",
           "X-Forwarded-For": "x", "Forwarded": "for=[",
           "Date": "x"}  # fmt: skip
    return Case(
        "reads", [request("GET", path + draw.choice(["", "?x", "?%ff=%", "?" + "a=b&" * 500]), headers=odd)], OK
    )


# Clients that are slow or go away


@family(10)
def leaving(draw: random.Random, known: list[Known]) -> Case:
    """In any phase: after the head, in the body, before the answer, in a pipeline."""
    raw = classify([item(known, texts=["hello"] * 8)] * draw.randint(1, 8)) * draw.randint(1, 3)
    at = draw.choice([len(raw), raw.index(b"\r\n\r\n") + 4, draw.randrange(1, len(raw))])
    return Case("leaving", [raw[:at]], due=0, then="reset", pause=draw.choice([0, 0, 0.002]))


@family(2)
def shut_after_sending(draw: random.Random, known: list[Known]) -> Case:
    return Case("shut after sending", [classify(item(known))], ANY, due=0, then="shut")


@family(1)
def slow(draw: random.Random, known: list[Known]) -> Case:
    """Byte by byte; done before the deadline, so it is answered."""
    one = draw.choice(known)
    raw = classify({"adapter": one.adapter, "texts": one.texts[:1], "top_k": 3})
    told = one.answer | {"answers": one.answer["answers"][:1]}
    return Case("slow", [raw[i : i + 1] for i in range(len(raw))], OK, told=told, pause=0.003)


@family(1)
def too_slow(draw: random.Random, known: list[Known]) -> Case:
    """The body never ends, or the head does not."""
    raw = classify(item(known))
    at = draw.choice([len(raw) - 1, raw.index(b"\r\n\r\n") + 4, raw.index(b"\r\n\r\n") - 3, 1])
    return Case("too slow", [raw[:at]], frozenset({408}))

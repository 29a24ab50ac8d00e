"""A server with the HTTP contract of ``infuse serve`` and answers made up beforehand."""

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import unquote

import infuse

PAGE = Path(infuse.__file__).parent / "serving" / "page.html"
TOKEN = "s3cret"


def described(name: str, labels, **changes: Any) -> dict[str, Any]:
    """An adapter as the contract describes it."""
    return {
        "name": name, "status": "ready", "version": hashlib.sha256(name.encode()).hexdigest()[:12], "method": "ia3",
        "base": "minilm", "labels": list(labels), "multi": False, "metrics": {}, "bytes": 1000, "threshold": 0.0,
        "temperature": 1.0, "error": None,
    } | changes  # fmt: skip


@dataclass
class FakeServer:
    """Each adapter gives the same probabilities to every text; ``failures`` are answered first, one per request."""

    scores: dict[str, dict[str, float]]
    adapters: dict[str, dict[str, Any]]
    failures: list[tuple[int, dict[str, str], bytes]] = field(default_factory=list)
    asked: list[tuple[str, str, Any, str | None]] = field(default_factory=list)
    """Method, path, body and Authorization of every request."""
    url: str = ""

    def answer(self, method: str, path: str, body: bytes, token: str | None) -> tuple[int, Any]:
        """Status and body of the answer to one request."""
        if (method, path) == ("POST", "/v1/classify"):
            given = json.loads(body)
            if isinstance(given, list):
                parts = [self.classify(item) for item in given]
                return max((status for status, _ in parts), default=200), _first_error(parts)
            return self.classify(given)
        if (method, path) == ("GET", "/v1/adapters"):
            return 200, {"base": "minilm", "precision": "fp32", "adapters": list(self.adapters.values())}
        if (method, path) == ("GET", "/readyz"):
            return 200, {"status": "ready"}
        if match := re.fullmatch("/v1/adapters/([^/]+)", path):
            return self.one(method, unquote(match[1]), body, token)
        return 404, {"error": f"There is nothing at {path}."}

    def classify(self, item: dict[str, Any]) -> tuple[int, Any]:
        name, adapter = item["adapter"], self.adapters.get(item["adapter"])
        if adapter is None:
            return 404, {"error": f"There is no adapter {name!r}."}
        if not 1 <= item["top_k"] <= 1000:
            return 422, {"error": "top_k must lie between 1 and 1000."}
        top = sorted(self.scores[name].items(), key=lambda each: -each[1])
        answer = {
            "label": None if adapter["multi"] or top[0][1] < adapter["threshold"] else top[0][0],
            "labels": [label for label, share in top if share >= 0.5] if adapter["multi"] else None,
            "confidence": top[0][1],
            "top": [{"label": label, "confidence": share} for label, share in top[: item["top_k"]]],
        }
        return 200, {"adapter": name, "version": adapter["version"], "answers": [answer for _ in item["texts"]]}

    def one(self, method: str, name: str, body: bytes, token: str | None) -> tuple[int, Any]:
        if method != "GET" and token != f"Bearer {TOKEN}":
            return 401, {"error": "This needs the server's token."}
        if method == "POST" and body:
            self.adapters[name] = described(name, ["a", "b"], bytes=len(body))
        if name not in self.adapters:
            return 404, {"error": f"There is no adapter {name!r}."}
        status = {"POST": "resident", "DELETE": "withdrawn"}.get(method, self.adapters[name]["status"])
        self.adapters[name]["status"] = status
        return 200, self.adapters[name]


def _first_error(parts: list[tuple[int, Any]]) -> Any:
    return next((body for status, body in parts if status != 200), [body for _, body in parts])


def page() -> tuple[bytes, str]:
    """The page, and a policy under which it may use nothing but itself and its server."""
    content = PAGE.read_bytes()
    hashes = {}
    for tag in ("script", "style"):
        (inside,) = re.findall(rb"<%s>(.*?)</%s>" % (tag.encode(), tag.encode()), content, re.S)
        hashes[tag] = base64.b64encode(hashlib.sha256(inside).digest()).decode()
    policy = (
        f"default-src 'none'; script-src 'sha256-{hashes['script']}'; style-src 'sha256-{hashes['style']}'; "
        "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return content, policy


@contextmanager
def serving(server: FakeServer) -> Iterator[FakeServer]:
    """Runs the server on a free port of this machine."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:  # the name that http.server calls
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            if self.path == "/":
                content, policy = page()
                return self.reply(200, {"Content-Type": "text/html", "Content-Security-Policy": policy}, content)
            json_body = self.headers.get("Content-Type") == "application/json" and body
            token = self.headers.get("Authorization")
            server.asked.append((self.command, self.path, json.loads(body) if json_body else body, token))
            if server.failures:
                return self.reply(*server.failures.pop(0))
            status, answer = server.answer(self.command, self.path, body, token)
            self.reply(status, {"Content-Type": "application/json"}, json.dumps(answer).encode())

        do_POST = do_DELETE = do_GET  # noqa: N815  # names that http.server calls

        def reply(self, status: int, headers: dict[str, str], body: bytes) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listening:
        Thread(target=listening.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        server.url = f"http://127.0.0.1:{listening.server_port}"
        yield server
        listening.shutdown()

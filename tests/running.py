"""A real ``infuse serve`` process, and clients that talk to it over raw sockets."""

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn

import infuse
from infuse.bases import BaseModel
from infuse.serving.app import create_app
from infuse.serving.engine import Engine
from infuse.serving.model import Here
from infuse.serving.server import uvicorn_config
from infuse.serving.settings import ServeConfig

TOKEN = "the-admins-token"


@dataclass(frozen=True)
class Answer:
    """A response as it came over the wire."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> str:
        """The one sentence of a refusal."""
        assert list(self.json) == ["error"], self
        return self.json["error"]


def request(
    method: str, path: str, body: bytes | str | object = b"", headers: dict[str, str] | None = None, close: bool = True
) -> bytes:
    """The bytes of a request; a body that is neither bytes nor text is sent as JSON."""
    if not isinstance(body, bytes | str):
        body = json.dumps(body)
    content = body.encode() if isinstance(body, str) else body
    fields = {"Host": "localhost"} | ({"Connection": "close"} if close else {})
    if content or method == "POST":
        fields |= {"Content-Type": "application/json", "Content-Length": str(len(content))}
    lines = [f"{method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in (fields | (headers or {})).items())]
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + content


def parse(raw: bytes, methods: tuple[str, ...] = ()) -> tuple[list[Answer], bytes]:
    """The whole responses in ``raw``, and what follows them; ``methods`` tells which answers have no body (HEAD)."""
    answers: list[Answer] = []
    while (end := raw.find(b"\r\n\r\n")) >= 0:
        first, *lines = raw[:end].decode("latin-1").split("\r\n")
        headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}
        status, size = int(first.split()[1]), int(headers.get("content-length", 0))
        if status == 100:
            raw = raw[end + 4 :]
            continue
        size = 0 if methods[len(answers) : len(answers) + 1] == ("HEAD",) else size
        if len(raw) < end + 4 + size:
            break
        answers.append(Answer(status, headers, raw[end + 4 : end + 4 + size]))
        raw = raw[end + 4 + size :]
    return answers, raw


class Client:
    """What asks a server at ``port``."""

    port: int

    def connect(self, timeout: float = 20) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout)

    def send(self, raw: bytes, timeout: float = 20) -> list[Answer]:
        """Every response to these bytes, up to the end of the connection."""
        with self.connect(timeout) as connection:
            connection.sendall(raw)
            return read(connection)

    def ask(
        self, method: str, path: str, body: Any = b"", token: str | None = None, headers: dict[str, str] | None = None
    ) -> Answer:
        """The response to one request."""
        extra = ({"Authorization": f"Bearer {token}"} if token else {}) | (headers or {})
        return self.send(request(method, path, body, extra))[0]

    def classify(self, adapter: str, *texts: str, **more: Any) -> Answer:
        return self.ask("POST", "/v1/classify", {"adapter": adapter, "texts": list(texts), **more})

    def metric(self, name: str) -> float:
        """The value of one series, or 0."""
        lines = self.ask("GET", "/metrics").body.decode().splitlines()
        return next((float(line.rsplit(" ", 1)[1]) for line in lines if line.rsplit(" ", 1)[0] == name), 0.0)


class Running(Client):
    """``infuse serve`` over a folder, in a process of its own.

    Args:
        folder: of adapters.
        options: of the command line.
        token: the admin's; ``None`` starts it without.
        log: the file of its output; by default beside the folder.
    """

    def __init__(self, folder: Path, *options: str, token: str | None = TOKEN, log: Path | None = None):
        self.log = log or folder.parent / f"{folder.name}.log"
        environment = {name: value for name, value in os.environ.items() if name != "INFUSE_ADMIN_TOKEN"}
        environment |= {"INFUSE_ADMIN_TOKEN": token} if token else {}
        command = [sys.executable, "-m", "infuse", "serve", str(folder)]
        with self.log.open("wb") as out:
            self.process = subprocess.Popen(
                [*command, "--port", "0", "--threads", "1", *options], stdout=out, stderr=out, env=environment
            )
        found = until(lambda: re.search(r"at http://\S+:(\d+)\s", self.output) or self.process.poll() is not None, 60)
        assert found is not True, f"the server ended at once: {self.output}"
        self.port = int(found[1])
        until(lambda: self.ask("GET", "/readyz").status == 200)

    @property
    def output(self) -> str:
        return self.log.read_text(errors="replace")

    @property
    def model(self) -> int:
        """The process of the model."""
        (found,) = self.models
        return found

    @property
    def models(self) -> list[int]:
        """The processes of the models."""
        tasks = Path(f"/proc/{self.process.pid}/task").iterdir()
        children = [c for task in tasks for c in (task / "children").read_text().split()]
        return [int(c) for c in children if b"spawn_main" in Path(f"/proc/{c}/cmdline").read_bytes()]

    def stop(self, how: int = signal.SIGTERM, timeout: float = 30) -> int:
        """The exit code after a signal."""
        if self.process.poll() is None:
            self.process.send_signal(how)
        try:
            return self.process.wait(timeout)
        finally:
            self.process.kill()

    def __enter__(self) -> "Running":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()


class Inside(Client):
    """A server in a thread of this process, over a base that is loaded already: quick to start, and open to tests.

    Args:
        folder: of adapters.
        base: the loaded base.
        token: the admin's.
        settings: of the server.
    """

    def __init__(self, folder: Path, base: BaseModel, token: str | None = TOKEN, **settings: Any):
        self.config = ServeConfig(folder, port=0, **settings)
        self.config.check()
        self.base, self.token = base, token
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.port = self.socket.getsockname()[1]
        self.started = threading.Event()
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()
        assert self.started.wait(20)
        until(lambda: self.ask("GET", "/readyz").status == 200)

    def _run(self) -> None:
        async def main() -> None:
            self.engine = Engine(self.config, Here(self.base))
            self.server = uvicorn.Server(uvicorn_config(self.config, create_app(self.engine, self.token)))
            self.started.set()
            await self.server.serve([self.socket])

        asyncio.run(main())

    def stop(self, timeout: float = 20) -> None:
        self.server.should_exit = True
        self.thread.join(timeout)
        assert not self.thread.is_alive()

    def __enter__(self) -> "Inside":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        infuse.detach(self.base.model) if hasattr(self.base.model, "infuse") else None


def read(connection: socket.socket) -> list[Answer]:
    """Every response up to the end of a connection; a reset is an end too."""
    raw = b""
    while True:
        try:
            more = connection.recv(65536)
        except ConnectionError:
            more = b""
        if not more:
            return parse(raw)[0]
        raw += more


def until(holds: Callable[[], Any], seconds: float = 20) -> Any:
    """What ``holds`` gives once it is true; an error if that takes longer."""
    end = time.monotonic() + seconds
    while not (value := holds()):
        assert time.monotonic() < end, f"not within {seconds} s"
        time.sleep(0.01)
    return value

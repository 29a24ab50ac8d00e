"""What every request passes first: limits of size and time on its body, and the counting of its answer."""

import asyncio
import time
from typing import Any

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from infuse.serving.metrics import Metrics
from infuse.serving.settings import ServeConfig


class Guard:
    """ASGI middleware: 415 for what is no JSON, 413 for a body that is too large, 408 for one that comes too slowly."""

    def __init__(self, app: ASGIApp, config: ServeConfig, metrics: Metrics):
        self.app, self.config, self.metrics = app, config, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started, status = time.perf_counter(), 500

        async def sent(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, self._bounded(scope, receive), sent)
        finally:
            route = getattr(scope.get("route"), "path", "other")
            self.metrics.requests.labels(route, status).inc()
            self.metrics.seconds.labels(route).observe(time.perf_counter() - started)

    def _bounded(self, scope: Scope, receive: Receive) -> Receive:
        headers: dict[bytes, bytes] = dict(scope["headers"])
        limit = self.config.max_file if scope["path"].startswith("/v1/adapters/") else self.config.max_body
        until = asyncio.get_running_loop().time() + self.config.deadline
        kind = headers.get(b"content-type", b"").split(b";")[0].strip().lower()
        received, complete = 0, False

        async def bounded() -> Any:
            nonlocal received, complete
            if complete:  # what follows is the client's going away
                return await receive()
            if scope["path"] == "/v1/classify" and kind != b"application/json":
                raise HTTPException(415, "Send JSON, with Content-Type: application/json.")
            declared = headers.get(b"content-length", b"0")
            try:
                async with asyncio.timeout_at(until):
                    message = await receive()
            except TimeoutError:
                raise HTTPException(408, f"The body did not come within {self.config.deadline:g} s.") from None
            received += len(message.get("body", b""))
            if received > limit or (declared.isdigit() and int(declared) > limit):
                raise HTTPException(413, f"A body may hold {limit:,} bytes; send less at once.")
            complete = not message.get("more_body", False)
            return message

        return bounded

"""What every request passes first: limits of size and time on its body, and the counting of its answer."""

import asyncio
import time
from contextlib import suppress

from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from infuse.serving.hosts import Hosts
from infuse.serving.metrics import Metrics
from infuse.serving.refusals import stopping
from infuse.serving.settings import ServeConfig

_DROPPED = 2**24
"""Bytes of a body that are read for no other reason than that its client sees the answer."""


class Guard:
    """ASGI middleware: 403 for a host that is not the server's, 415 for what is no JSON, 413 for a body that is too
    large, 408 for one that comes too slowly."""

    def __init__(self, app: ASGIApp, config: ServeConfig, metrics: Metrics):
        self.app, self.config, self.metrics = app, config, metrics
        self.hosts = Hosts(config.host, config.allowed_hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started, status = time.perf_counter(), 0
        body = Body(scope, receive, self.config)

        async def sent(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                await body.discard()
                if not body.complete:
                    message["headers"] = [*message.get("headers", []), (b"connection", b"close")]
            await send(message)

        alien = self.hosts.refusal(scope["method"], dict(scope["headers"]))
        try:
            if alien is not None:
                await JSONResponse({"error": str(alien)}, alien.status)(scope, body.receive, sent)
            else:
                await self.app(scope, body.receive, sent)
        except asyncio.CancelledError:
            if status:
                raise
            refusal = stopping()  # the time to answer what is in flight is over
            headers = {"Retry-After": str(refusal.retry_after), "Connection": "close"}
            status = refusal.status
            await JSONResponse({"error": str(refusal)}, status, headers)(scope, receive, send)
        finally:
            route = getattr(scope.get("route"), "path", "other")
            self.metrics.requests.labels(route, status or 500).inc()
            self.metrics.seconds.labels(route).observe(time.perf_counter() - started)


class Body:
    """The body of one request."""

    def __init__(self, scope: Scope, receive: Receive, config: ServeConfig):
        headers: dict[bytes, bytes] = dict(scope["headers"])
        self.raw, self.seconds = receive, config.deadline
        self.limit = config.max_file if scope["path"].startswith("/v1/adapters/") else config.max_body
        self.until = asyncio.get_running_loop().time() + config.deadline
        kind = headers.get(b"content-type", b"").split(b";")[0].strip().lower()
        self.alien = scope["path"] == "/v1/classify" and kind != b"application/json"
        declared = headers.get(b"content-length", b"0")
        self.received, self.declared = 0, int(declared) if declared.isdigit() else 0
        self.asks = b"expect" in headers  # the client sends its body only when it is told to
        self.complete = not self.declared and b"transfer-encoding" not in headers

    async def receive(self) -> Message:
        """The next message, within the limits.

        Raises:
            HTTPException: 408, 413 or 415.
        """
        if self.complete and not self.alien:  # what follows is the client's going away
            return await self.raw()
        if self.alien:
            raise HTTPException(415, "Send JSON, with Content-Type: application/json.")
        if self.declared > self.limit:
            raise self._too_large()
        message = await self._next()
        if self.received > self.limit:
            raise self._too_large()
        return message

    async def discard(self) -> None:
        """Read on to the end: a client that still sends when the connection is closed would not see the answer."""
        with suppress(HTTPException):
            limit = self.received + _DROPPED
            while not (self.complete or self.asks) and self.received < limit:
                await self._next()

    async def _next(self) -> Message:
        try:
            async with asyncio.timeout_at(self.until):
                message = await self.raw()
        except TimeoutError:
            self.complete = True
            late = f"The body did not come within {self.seconds:g} s."
            raise HTTPException(408, late, {"Connection": "close"}) from None
        self.received += len(message.get("body", b""))
        self.complete = not message.get("more_body", False)
        self.asks = False
        return message

    def _too_large(self) -> HTTPException:
        return HTTPException(413, f"A body may hold {self.limit:,} bytes; send less at once.")

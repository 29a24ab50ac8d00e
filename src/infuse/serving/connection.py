"""A connection: uvicorn's own, with limits on the head of a request, refusals in JSON, and an end without losses."""

import asyncio
import json
from typing import Any

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

HEAD = 2**16
"""Bytes of a request's first line and headers, beyond which it may be refused."""

_GRACE = 0.1  # seconds at the end in which requests that are on their way still arrive


class Connection(HttpToolsProtocol):
    """Refuses a head that is too large (431) or too slow (408); uvicorn itself would wait for ever."""

    patience = 30.0
    """Seconds in which a request's head must come."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.head = 0
        self.ending = False
        self.late: asyncio.TimerHandle | None = None

    @property
    def idle(self) -> bool:
        """Whether no request is being answered: the head of the next may be on its way."""
        return self.cycle is None or self.cycle.response_complete

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # narrower than BaseTransport
        super().connection_made(transport)
        self._expect_a_head()

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        before = self.cycle
        super().data_received(data)
        self.head = self.head + len(data) if self.idle and self.cycle is before else 0
        if self.transport.is_closing():
            return
        if self.head > HEAD:
            self.refuse(431, f"The head of a request may hold {HEAD:,} bytes; send less in headers and path.")
        elif self.idle:
            self._expect_a_head()
        else:
            self._stop_expecting()

    def on_headers_complete(self) -> None:
        super().on_headers_complete()
        if self.ending:
            self.cycle.keep_alive = False

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_expecting()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        if not (self.idle or self.cycle.more_body):
            self.cycle.keep_alive = False  # what came before the rubbish is answered
            return
        self.refuse(400, "This is no sound HTTP/1.1 request.")

    def shutdown(self) -> None:
        """Called when the server ends: what has been sent by now is answered, then the connection is closed."""
        self.ending = True
        if self.idle and not self.transport.is_closing():
            self.loop.call_later(_GRACE, super().shutdown)
        else:
            super().shutdown()

    def refuse(self, status: int, sentence: str) -> None:
        """Answer what never became a request, and close."""
        self._stop_expecting()
        content = json.dumps({"error": sentence}).encode()
        head = b"content-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n" % len(content)
        self.transport.write(STATUS_LINE[status] + head + content)
        self.transport.close()

    def _expect_a_head(self) -> None:
        if self.late is None:
            self.late = self.loop.call_later(self.patience, self._head_is_late)

    def _stop_expecting(self) -> None:
        if self.late is not None:
            self.late.cancel()
            self.late = None

    def _head_is_late(self) -> None:
        self.late = None
        if self.idle and not self.transport.is_closing():
            self.refuse(408, f"The request did not come within {self.patience:g} s.")


def patient(seconds: float) -> type[Connection]:
    """Connections that wait so many seconds for a request's head."""
    return type("PatientConnection", (Connection,), {"patience": seconds})

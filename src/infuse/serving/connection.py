"""A connection: uvicorn's own, one request after the other, with limits, sound framing and refusals in JSON."""

import asyncio
import json
from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

HEAD = 2**16
"""Bytes of a request's first line and headers, and of what lies between two parts of its body."""
HEADERS = 100
"""Headers of a request."""

_GRACE = 0.1  # seconds at the end in which requests that are on their way still arrive
_UNREAD = 2**16  # bytes of an answer that a client has to read while the connection is patient, or all of it


class Connection(HttpToolsProtocol):
    """Answers its requests one after the other, and reads no further meanwhile; uvicorn would queue them without end.

    What has arrived is given to the parser in pieces that end no later than the request does: a line each, or a body
    of a length that is known. Refused are heads that are too large (431) or too slow (408) and requests whose end is
    not certain (400), after which nothing more is read.
    """

    patience = 30.0
    """Seconds in which a request's head must come, and in which a client must go on reading its answers."""
    limit = 500
    """Connections of the server."""
    parser: httptools.HttpRequestParser

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.held = bytearray()  # has arrived and is not parsed yet
        self.url = b""
        self.first = self.heading = True  # the first line is not over; the head is not
        self.head = 0  # bytes of a request's head, or since the last bytes of its body
        self.left = 0  # bytes of a body that are still to come
        self.refusal = 400, "This is no sound HTTP/1.1 request."
        self.ending = False
        self.since = self.loop.time()
        self.late: asyncio.TimerHandle | None = None
        self.reading: asyncio.TimerHandle | None = None

    @property
    def idle(self) -> bool:
        """Whether no request is being answered: the head of the next may be on its way."""
        return self.cycle is None or self.cycle.response_complete

    @property
    def busy(self) -> bool:
        """Whether the next request must wait: for the answer to this one, or for a client that reads its answers."""
        return self.flow.write_paused or not (self.idle or self.cycle.more_body)

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # narrower than BaseTransport
        super().connection_made(transport)
        if len(self.connections) > self.limit:
            self._make_room()
        if not transport.is_closing():
            self._expect_a_head()

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        self._unset_keepalive_if_required()
        self.held += data
        self._go_on()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self.heading = True

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self.heading:  # of a trailer, which nobody asks for
            return
        if len(self.headers) == HEADERS:
            self.refusal = 431, f"A request may hold {HEADERS} headers; send fewer."
            raise ValueError(self.refusal)
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self.heading = False
        self._check_framing()
        super().on_headers_complete()
        self._stop_expecting()
        if self.ending:
            self.cycle.keep_alive = False

    def on_body(self, body: bytes) -> None:
        super().on_body(body)
        self.head = 0

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self.first, self.head, self.url = True, 0, b""

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self.since = self.loop.time()
        if not self.transport.is_closing() and self.cycle.more_body:
            self.transport.close()  # where its request ends, nobody has seen
        if self.transport.is_closing():
            self._watch_reading()
        elif self.held:
            self._unset_keepalive_if_required()
            self._go_on()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch_reading()

    def resume_writing(self) -> None:
        super().resume_writing()
        self.since = self.loop.time()
        if not self.transport.is_closing():
            self._go_on()
            if not self.busy:
                self.flow.resume_reading()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_expecting()
        if self.reading is not None:
            self.reading.cancel()
        self.held.clear()
        super().connection_lost(exc)

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        self._watch_reading()

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
        self.held.clear()
        if self.idle or not self.cycle.response_started:
            content = json.dumps({"error": sentence}).encode()
            again = b"retry-after: 1\r\n" if status == 503 else b""
            head = b"content-type: application/json\r\ncontent-length: %d\r\n%bconnection: close\r\n\r\n"
            self.transport.write(STATUS_LINE[status] + head % (len(content), again) + content)
        self.transport.close()
        self._watch_reading()

    def _go_on(self) -> None:
        """Parse what has arrived, up to the end of one request."""
        while self.held and not self.busy and (size := self._piece()):
            piece = bytes(self.held[:size])
            del self.held[:size]
            if not self._parse(piece):
                return
        if self.busy:
            self._stop_expecting()
            if len(self.held) > HEAD:
                self.flow.pause_reading()
        elif self.head + len(self.held) > HEAD:  # of a line that has not ended
            self.refuse(431, _TOO_LARGE)
        elif self.idle and (self.head or self.held):
            self._expect_a_head()

    def _piece(self) -> int:
        """How many bytes of ``held`` surely belong to the request that is being read."""
        if self.left:
            return min(self.left, len(self.held))
        line = self.held.find(b"\n") + 1
        return line if line or (self.heading and not self.first) else len(self.held)

    def _parse(self, piece: bytes) -> bool:
        """Whether the request is sound so far; else it is refused."""
        self.head += len(piece)
        if self.left:
            self.left -= len(piece)
        elif self.heading and not self.first:
            if piece[:1] in b" \t":  # once a header over several lines
                self.refuse(*self.refusal)
                return False
            if piece[:8].lower() == b"upgrade:":  # there is no other protocol, and the parser would drop the body
                return True
        try:
            self.parser.feed_data(piece)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):
            self.refuse(*self.refusal)
            return False
        if self.first and self.url and piece.endswith(b"\n"):
            self.first = False
        if self.head > HEAD:
            self.refuse(431, _TOO_LARGE)
            return False
        return not self.transport.is_closing()

    def _check_framing(self) -> None:
        """Raise ValueError unless there is one way to read where the request ends and whom it asks."""
        version, whom = self.parser.get_http_version(), [v for name, v in self.headers if name == b"host"]
        lengths = [value.strip() for name, value in self.headers if name == b"content-length"]
        codings = [value.strip().lower() for name, value in self.headers if name == b"transfer-encoding"]
        sound = (
            version in ("1.0", "1.1") and self.parser.get_method() != b"CONNECT"
            and len(whom) in ((1,) if version == "1.1" else (0, 1))
            and len(lengths) + len(codings) <= 1 and all(length.isdigit() for length in lengths)
            and codings in ([], [b"chunked"] if version == "1.1" else [])
        )  # fmt: skip
        if not sound:
            raise ValueError(self.refusal)
        self.left = int(lengths[0]) if lengths else 0
        if version == "1.0":
            self.expect_100_continue = False
        if not self.url.startswith(b"/"):
            target = httptools.parse_url(self.url)
            if target.host:  # then the header is not what names the host
                host = target.host + (b":%d" % target.port if target.port else b"")
                self.headers[:] = [each for each in self.headers if each[0] != b"host"] + [(b"host", host)]

    def _make_room(self) -> None:
        """Give up the connection that has waited longest for its client; if none does, this one."""
        every: list[Any] = [*self.connections]  # all are of this class
        there = [c for c in every if c.transport.get_write_buffer_size() or not c.transport.is_closing()]
        if len(there) <= self.limit:
            return
        waiting = [c for c in there if c is not self and (c.idle or c.flow.write_paused)]
        oldest = min(waiting, key=lambda c: c.since, default=self)
        if oldest.transport.get_write_buffer_size():
            oldest.transport.abort()
        else:
            oldest.refuse(503, f"The server has {self.limit} connections already; try again in 1 s.")

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

    def _watch_reading(self) -> None:
        """Cut off a client that leaves unread what it is sent."""
        unread = self.transport.get_write_buffer_size()
        if self.reading is None and unread:
            self.reading = self.loop.call_later(self.patience, self._look_at_reading, unread)

    def _look_at_reading(self, before: int) -> None:
        self.reading = None
        if self.transport.get_write_buffer_size() > max(0, before - _UNREAD):
            self.transport.abort()
        elif self.flow.write_paused or self.transport.is_closing():
            self._watch_reading()


_TOO_LARGE = f"The head of a request may hold {HEAD:,} bytes; send less in headers and path."


def connections(patience: float, limit: int) -> type[Connection]:
    """Connections that wait so many seconds for a client, and of which there are so many at most."""
    return type("LimitedConnection", (Connection,), {"patience": patience, "limit": limit})

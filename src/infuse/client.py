"""The client of ``infuse serve``, plain (:class:`Client`) and async (:class:`AsyncClient`), with the same methods.

One body of logic for both: a :class:`_Call` says what to send and how to read the answer, and :meth:`_Core.steps` when
to send, how long to wait before, and when to give up. It does none of it itself but yields steps; the two faces take
them.
"""

import asyncio
import email.utils
import json
import math
import random
import time
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Generic, NamedTuple, Self, TypeVar
from urllib.parse import quote, urlsplit

from infuse.errors import InfuseError
from infuse.formats.bundle import WEIGHTS
from infuse.heads import Answer, Ranked

try:
    import httpx
except ImportError:
    raise InfuseError("A client needs httpx, which is not installed: pip install 'infuse[client]'.") from None

T = TypeVar("T")
_AGAIN = (408, 429, 503)
"""Statuses that may be another the next time; every request of the contract may be repeated without harm."""
_FIRST_WAIT, _LONGEST_WAIT = 0.1, 10.0
_PART = 64
"""Texts in one request of :func:`predict`; fewer where the server says that they are too much."""


class ServerError(InfuseError):
    """The server refused: the sentence that it gave.

    Attributes:
        status: the HTTP status.
    """

    def __init__(self, sentence: str, status: int):
        super().__init__(sentence)
        self.status = status


@dataclass(frozen=True)
class Classified:
    """The answers of one adapter, one per text, and the version (a hash of its file) that gave them."""

    adapter: str
    version: str
    answers: tuple[Answer, ...]


@dataclass(frozen=True)
class ServedAdapter:
    """An adapter on a server.

    Attributes:
        status: ``resident`` (in memory), ``ready``, ``broken`` (then ``error`` says why) or ``withdrawn``.
        threshold: confidence below which a text is out of scope; 0 for none.
    """

    name: str
    status: str
    version: str | None
    method: str | None
    base: str | None
    labels: tuple[str, ...]
    multi: bool
    metrics: dict[str, Any]
    bytes: int
    threshold: float
    temperature: float
    error: str | None


class Item(NamedTuple):
    """One part of :meth:`Client.classify_many`; a plain tuple will do."""

    adapter: str
    texts: Sequence[str]
    top_k: int = 1


class Client:
    """Talks to a server of ``infuse serve``; threads may share one.

    Args:
        url: the server's address, as ``http://localhost:8000``.
        token: what :meth:`load` and :meth:`unload` need; it is sent with these alone.
        timeout: seconds for one call of a method, with all its repetitions and waiting.
        retries: how often a request is repeated after a lost connection, 408, 429 and 503 (as ``Retry-After`` says, or
            after random pauses of ever longer limits).
        transport: another way to the server than the network, as httpx knows them.

    Every refusal is a :class:`ServerError` with the server's own sentence, everything else an :class:`InfuseError`.
    """

    def __init__(
        self, url: str, token: str | None = None, timeout: float = 30.0, retries: int = 3,
        *, transport: httpx.BaseTransport | None = None,
    ):  # fmt: skip
        self._core = _Core(url, token, timeout, retries)
        self._http = httpx.Client(transport=transport)

    def classify(self, adapter: str, texts: Sequence[str], top_k: int = 1) -> Classified:
        """What ``adapter`` says about every text."""
        return self._run(_classify(adapter, texts, top_k))

    def classify_many(self, items: Iterable[tuple[Any, ...]]) -> list[Classified]:
        """Several adapters in one request: items are ``(adapter, texts)`` or ``(adapter, texts, top_k)``."""
        return self._run(_classify_many(items))

    def adapters(self) -> list[ServedAdapter]:
        """All adapters of the server."""
        return self._run(_adapters())

    def adapter(self, name: str) -> ServedAdapter:
        """One adapter of the server."""
        return self._run(_adapter("GET", name))

    def load(self, name: str, file: Path | str | None = None) -> ServedAdapter:
        """Load or reload an adapter from the server's folder, or send ``file`` (or the one in that folder) there."""
        return self._run(_adapter("POST", name, file))

    def unload(self, name: str) -> ServedAdapter:
        """Stop serving an adapter until it is loaded again; its file stays."""
        return self._run(_adapter("DELETE", name))

    def ready(self) -> bool:
        """Whether a server is there and takes requests; asked once, without waiting for it."""
        return self._run(_READY)

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *args: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._core.url!r})"

    def _run(self, call: "_Call[T]") -> T:
        steps = self._core.steps(call)
        try:
            step = next(steps)
            while True:
                time.sleep(step.wait)
                step = steps.send(self._send(step))
        except StopIteration as end:
            return end.value

    def _send(self, step: "_Step") -> "_Reply | httpx.RequestError":
        until, body = time.monotonic() + step.seconds, bytearray()
        try:
            with self._http.stream(**step.request, timeout=step.seconds) as response:
                for chunk in response.iter_bytes():  # httpx limits the time between two chunks, not that of them all
                    body += chunk
                    if time.monotonic() > until:
                        raise httpx.ReadTimeout("slow", request=response.request)
        except httpx.RequestError as error:
            return error
        return _Reply(response.status_code, response.headers, bytes(body))


class AsyncClient:
    """:class:`Client` for asyncio: every method is awaited."""

    def __init__(
        self, url: str, token: str | None = None, timeout: float = 30.0, retries: int = 3,
        *, transport: httpx.AsyncBaseTransport | None = None,
    ):  # fmt: skip
        self._core = _Core(url, token, timeout, retries)
        self._http = httpx.AsyncClient(transport=transport)

    async def classify(self, adapter: str, texts: Sequence[str], top_k: int = 1) -> Classified:
        """See :meth:`Client.classify`."""
        return await self._run(_classify(adapter, texts, top_k))

    async def classify_many(self, items: Iterable[tuple[Any, ...]]) -> list[Classified]:
        """See :meth:`Client.classify_many`."""
        return await self._run(_classify_many(items))

    async def adapters(self) -> list[ServedAdapter]:
        """See :meth:`Client.adapters`."""
        return await self._run(_adapters())

    async def adapter(self, name: str) -> ServedAdapter:
        """See :meth:`Client.adapter`."""
        return await self._run(_adapter("GET", name))

    async def load(self, name: str, file: Path | str | None = None) -> ServedAdapter:
        """See :meth:`Client.load`."""
        return await self._run(_adapter("POST", name, file))

    async def unload(self, name: str) -> ServedAdapter:
        """See :meth:`Client.unload`."""
        return await self._run(_adapter("DELETE", name))

    async def ready(self) -> bool:
        """See :meth:`Client.ready`."""
        return await self._run(_READY)

    async def close(self) -> None:
        """See :meth:`Client.close`."""
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *args: object) -> None:
        await self.close()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._core.url!r})"

    async def _run(self, call: "_Call[T]") -> T:
        steps = self._core.steps(call)
        try:
            step = next(steps)
            while True:
                await asyncio.sleep(step.wait)
                step = steps.send(await self._send(step))
        except StopIteration as end:
            return end.value

    async def _send(self, step: "_Step") -> "_Reply | httpx.RequestError":
        try:
            async with asyncio.timeout(step.seconds):
                response = await self._http.request(**step.request, timeout=None)
        except TimeoutError:
            return httpx.ReadTimeout("slow")
        except httpx.RequestError as error:
            return error
        return _Reply(response.status_code, response.headers, response.content)


def predict(url: str, adapter: str, texts: Sequence[str], top_k: int = 1) -> list[Answer]:
    """The answers of a served adapter for any number of texts, in as many requests as it takes.

    Raises:
        InfuseError: as of :class:`Client`; what is wrong with one text comes with its number, from 1.
    """
    given, answers, size = _item(adapter, texts)["texts"], [], _PART
    blank = next((i for i, text in enumerate(given, 1) if not text.strip()), None)
    if blank is not None:  # before anything is sent
        raise InfuseError(f"Text {blank} of {len(given)} is blank: fill or leave it out.")
    with Client(url) as client:
        while len(answers) < len(given):
            part = given[len(answers) : len(answers) + size]
            try:
                answers += client.classify(adapter, part, top_k).answers
            except ServerError as error:
                if error.status not in (413, 422) or len(given) == 1:
                    raise
                if len(part) == 1:
                    raise ServerError(f"Text {len(answers) + 1} of {len(given)}: {error}", error.status) from None
                size = len(part) // 2  # too much at once; or one of them can't be labelled, and will be alone
    return answers


# What to send, and how an answer is read


@dataclass(frozen=True)
class _Call(Generic[T]):
    method: str
    path: str
    read: Callable[[Any], T]
    content: bytes | None = None
    kind: str | None = None
    secret: bool = False
    """Whether the token goes with it."""
    otherwise: T | None = None
    """The answer instead of an error that may pass; then nothing is repeated."""


def _classify(adapter: str, texts: Sequence[str], top_k: int) -> _Call[Classified]:
    return _ask(_item(adapter, texts, top_k), _classified)


def _classify_many(items: Iterable[tuple[Any, ...]]) -> _Call[list[Classified]]:
    return _ask([_item(*item) for item in items], lambda body: [_classified(each) for each in body])


def _ask(body: Any, read: Callable[[Any], T]) -> _Call[T]:
    return _Call("POST", "/v1/classify", read, json.dumps(body).encode(), "application/json")


def _item(adapter: str, texts: Sequence[str], top_k: int = 1) -> dict[str, Any]:
    given = [] if isinstance(texts, str) else list(texts)
    if isinstance(texts, str) or not all(isinstance(text, str) for text in given):
        raise InfuseError("texts should be a list of texts, also for a single one.")
    return {"adapter": adapter, "texts": given, "top_k": top_k}


def _adapters() -> _Call[list[ServedAdapter]]:
    return _Call("GET", "/v1/adapters", lambda body: [_served(each) for each in body["adapters"]])


def _adapter(method: str, name: str, file: Path | str | None = None) -> _Call[ServedAdapter]:
    if name in ("", ".", ".."):
        raise InfuseError(f"{name!r} can't be an adapter's name.")
    path = "/v1/adapters/" + quote(name, safe="", errors="surrogatepass")
    if file is None:
        return _Call(method, path, _served, secret=method != "GET")
    file = Path(file)
    try:
        content = (file / WEIGHTS if file.is_dir() else file).read_bytes()
    except OSError as error:
        raise InfuseError(f"The adapter {file} can't be read: {error.strerror}.") from None
    return _Call(method, path, _served, content, "application/octet-stream", secret=True)


_READY = _Call("GET", "/readyz", lambda body: body["status"] == "ready", otherwise=False)


def _classified(body: Any) -> Classified:
    return Classified(body["adapter"], body["version"], tuple(_answer(each) for each in body["answers"]))


def _answer(body: Any) -> Answer:
    top = tuple(Ranked(each["label"], each["confidence"]) for each in body["top"])
    return Answer(body["label"], None if body["labels"] is None else tuple(body["labels"]), body["confidence"], top)


def _served(body: Any) -> ServedAdapter:
    known: dict[str, Any] = {field.name: body[field.name] for field in fields(ServedAdapter)}
    known["labels"] = tuple(known["labels"])
    return ServedAdapter(**known)


# When to send, to wait, and to give up


class _Step(NamedTuple):
    wait: float
    """Seconds to wait before sending."""
    request: dict[str, Any]
    seconds: float
    """How long the answer may take."""


class _Reply(NamedTuple):
    status: int
    headers: httpx.Headers
    body: bytes


class _Core:
    def __init__(self, url: str, token: str | None, timeout: float, retries: int):
        try:
            good = urlsplit(url).scheme in ("http", "https") and bool(httpx.URL(url).host)
        except (ValueError, httpx.InvalidURL):
            good = False
        if not good:
            raise InfuseError(f"{url!r} is no address of a server: write it as http://localhost:8000.")
        if token is not None and not (token.isascii() and token.isprintable()):
            raise InfuseError("The token may hold printable ASCII characters only.")
        if not 0 < timeout < math.inf or retries < 0:
            raise InfuseError(f"timeout must be above 0 s and retries at least 0, not {timeout} and {retries}.")
        self.url, self.token, self.timeout, self.retries = url.rstrip("/"), token, timeout, retries

    def steps(self, call: _Call[T]) -> Generator[_Step, "_Reply | httpx.RequestError", T]:
        """Yields what to do next, is given what came of it, and returns the answer."""
        until = time.monotonic() + self.timeout
        request, tried, wait = self._request(call), 0, 0.0
        while True:
            reply = yield _Step(wait, request, until - time.monotonic() - wait)
            if isinstance(reply, httpx.RequestError):
                error, told = self._unreachable(reply), None
            elif reply.status < 300:
                return self._read(call, reply)
            elif reply.status in _AGAIN:
                error, told = self._refusal(reply), reply.headers.get("Retry-After")
            else:
                raise self._refusal(reply)
            if call.otherwise is not None:
                return call.otherwise
            wait = _wait(tried, told)
            tried += 1
            if tried > self.retries or time.monotonic() + wait >= until:
                raise error

    def _request(self, call: _Call[Any]) -> dict[str, Any]:
        headers = {"Accept": "application/json"}
        if call.kind:
            headers["Content-Type"] = call.kind
        if call.secret and self.token:
            headers["Authorization"] = f"Bearer {self.token}"
        return {"method": call.method, "url": self.url + call.path, "headers": headers, "content": call.content}

    def _read(self, call: _Call[T], reply: _Reply) -> T:
        try:
            return call.read(json.loads(reply.body))
        except (ValueError, TypeError, LookupError):
            raise InfuseError(f"{self.url} does not answer like infuse serve; is it the right address?") from None

    def _refusal(self, reply: _Reply) -> ServerError:
        try:
            sentence = str(json.loads(reply.body)["error"])
        except (ValueError, TypeError, LookupError):
            sentence = f"{self.url} answers {reply.status}, and not like infuse serve; is it the right address?"
        return ServerError(sentence, reply.status)

    def _unreachable(self, error: httpx.RequestError) -> InfuseError:
        if isinstance(error, httpx.TimeoutException):
            return InfuseError(f"{self.url} did not answer within {self.timeout:g} s; try later, or allow more time.")
        reason = " ".join(str(error).split()) or type(error).__name__
        return InfuseError(f"No server can be reached at {self.url} ({reason}): is infuse serve running there?")


def _wait(tried: int, told: str | None) -> float:
    """Seconds until the next try: what the server said, or a random part of a limit that doubles from try to try."""
    spread = random.uniform(0, min(_LONGEST_WAIT, _FIRST_WAIT * 2 ** min(tried, 10)))
    return spread if told is None else min(_LONGEST_WAIT, _seconds(told)) + min(spread, _FIRST_WAIT)


def _seconds(told: str) -> float:
    """The value of ``Retry-After``, which may be a number or a date; 0 for anything else."""
    try:
        return max(0.0, float(told)) if math.isfinite(float(told)) else 0.0
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(told).timestamp() - time.time())
    except (ValueError, OverflowError):
        return 0.0

"""The HTTP face of an engine."""

import asyncio
import hmac
import logging
from collections.abc import AsyncIterator, Awaitable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from pydantic import Field
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

import infuse
from infuse.heads import answer
from infuse.serving import docs, files, schema
from infuse.serving.engine import Engine, Labelled
from infuse.serving.files import Facts, valid
from infuse.serving.guard import Guard
from infuse.serving.logs import event
from infuse.serving.look import apart
from infuse.serving.refusals import RefusedError, silent, stopping
from infuse.serving.settings import TOKEN, ServeConfig
from infuse.serving.store import Entry

log = logging.getLogger("infuse.serving")
_PAGE = (Path(__file__).parent / "page.html").read_text(encoding="utf-8")
_REFUSED: dict[int | str, dict[str, Any]] = {
    status: {"model": schema.Error, "description": why}
    for status, why in {
        400: "Malformed JSON.", 404: "Unknown adapter.", 408: "The body came too slowly.",
        409: "The adapter's file is broken, or for another base.", 413: "The body is too large.", 415: "No JSON.",
        422: "Wrong types, or beyond a limit.", 429: "Too many texts wait; see Retry-After.",
        503: "The server is stopping; see Retry-After.", 504: "The deadline has passed.",
    }.items()
}  # fmt: skip
_ADMIN: dict[int | str, dict[str, Any]] = {
    401: {"model": schema.Error, "description": "No token, or a wrong one."},
    403: {"model": schema.Error, "description": f"The server was started without {TOKEN}."},
    507: {"model": schema.Error, "description": "The file can't be written."},
    409: {"model": schema.Error, "description": "The adapter's file can't be used, or its run has not ended."},
    **{status: _REFUSED[status] for status in (404, 408, 413, 422, 503)},
}
Body = schema.Item | Annotated[list[schema.Item], Field(min_length=1, max_length=1000)]
_bearer = HTTPBearer(auto_error=False, description=f"The token that the server was given in {TOKEN}.")


def create_app(engine: Engine, token: str | None = None) -> FastAPI:
    """The ASGI application.

    Args:
        engine: what answers.
        token: what loading and unloading adapters asks for; without one, both are off.
    """
    config = engine.config

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        tidying = asyncio.create_task(apart(files.tidy, config.folder))  # nobody waits for a folder that hangs
        await engine.store.refresh()
        watching = asyncio.create_task(engine.watch())
        yield
        tidying.cancel()
        watching.cancel()
        # By now all requests are answered, or were refused when their time was over: nobody waits for what is left.
        if not await asyncio.to_thread(engine.batcher.drain, 1.0):
            log.error(event("late", error=f"a forward pass was still running after {config.drain:g} s"))

    def admin(
        name: str, request: Request, given: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)]
    ) -> None:
        with _noted("admin", request, name, done=False):
            if token is None:
                raise RefusedError(403, f"Loading and unloading are off; start the server with a token in {TOKEN}.")
            if given is None or not hmac.compare_digest(given.credentials.encode(), token.encode()):
                raise RefusedError(401, "This needs the admin's token, as Authorization: Bearer TOKEN.")

    app = FastAPI(
        title="Infuse", version=infuse.__version__, lifespan=lifespan, redirect_slashes=False,
        docs_url=None, redoc_url=None,
        description="Labels texts by adapters of every method over one frozen base, in mixed batches.",
    )  # fmt: skip
    app.add_middleware(Guard, config=config, metrics=engine.metrics)
    app.add_exception_handler(RefusedError, _refused)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(ClientDisconnect, _gone)
    app.add_exception_handler(Exception, _failed)

    @app.post("/v1/classify", response_model=schema.Answered | list[schema.Answered], responses=_REFUSED)
    async def classify(request: Request, body: Body) -> Response:
        """Label texts: one item, or a list of items for different adapters, answered in one batch."""
        items = body if isinstance(body, list) else [body]
        _check(items, config)
        answered = await _unless_gone(request, engine.classify([(i.adapter, i.texts) for i in items]))
        told = [_told(each, item.top_k) for each, item in zip(answered, items, strict=True)]
        if config.log_texts:
            for each, answers in zip(items, told, strict=True):
                log.info(event("classified", **_sent(request), adapter=each.adapter, texts=each.texts, answers=answers))
        return JSONResponse(told if isinstance(body, list) else told[0])

    @app.get("/v1/adapters", response_model=schema.Adapters)
    async def adapters() -> Response:
        """Every adapter of the folder: labels, method, base, metrics, size, and what is wrong with it, if anything."""
        about = engine.model.about
        listed = [_listed(entry) for _, entry in sorted(engine.store.entries.items())]
        return JSONResponse({"base": about.name, "precision": about.precision, "adapters": listed})

    @app.get("/v1/adapters/{name}", response_model=schema.Adapter, responses={404: _REFUSED[404]})
    async def adapter(name: str) -> Response:
        """One adapter."""
        return JSONResponse(_listed(engine.store.known(name)))

    @app.post(
        "/v1/adapters/{name}", response_model=schema.Adapter, responses=_ADMIN, dependencies=[Depends(admin)],
        openapi_extra={"requestBody": {"content": {"application/octet-stream": {"schema": {"type": "string"}}}}},
    )  # fmt: skip
    async def load(name: str, request: Request) -> Response:
        """Load or reload an adapter from the folder; with a body, an adapter_model.safetensors, install that first."""
        content = await request.body()
        with _noted("install" if content else "load", request, name, bytes=len(content)) as facts:
            if not valid(name):
                named = repr(name[:100])
                raise RefusedError(
                    422, f"{named} can't name an adapter: use letters, digits, spaces and _ - + , . in it."
                )
            entry = await (engine.store.install(name, content) if content else engine.store.load(name))
            facts["version"] = entry.facts and entry.facts.version
        return JSONResponse(_listed(entry))

    @app.delete("/v1/adapters/{name}", response_model=schema.Adapter, responses=_ADMIN, dependencies=[Depends(admin)])
    async def unload(name: str, request: Request) -> Response:
        """Unload an adapter and stop serving it until the next POST; its files stay."""
        with _noted("unload", request, name):
            entry = engine.store.withdraw(name)
        return JSONResponse(_listed(entry))

    @app.get("/healthz", response_model=schema.Status)
    async def healthz() -> Response:
        """Whether the process is alive."""
        return JSONResponse({"status": "alive"})

    @app.get("/readyz", response_model=schema.Status, responses={503: _REFUSED[503]})
    async def readyz() -> Response:
        """Whether requests are answered: the server does not stop, and its model has not been silent for too long."""
        if engine.batcher.stopping or engine.batcher.ended:
            raise stopping()
        if seconds := engine.silence():
            raise silent(seconds)
        return JSONResponse({"status": "ready"})

    @app.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        """Counters for Prometheus."""
        return Response(engine.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        return HTMLResponse(_PAGE, headers=docs.policy(_PAGE))

    described = docs.page(app.openapi())

    @app.get("/docs", include_in_schema=False)
    async def description() -> Response:
        return HTMLResponse(described, headers=docs.policy(described))

    return app


def _sent(request: Request) -> dict[str, Any]:
    return {"client": request.client and f"{request.client.host}:{request.client.port}"}


@contextmanager
def _noted(action: str, request: Request, name: str, done: bool = True, **facts: Any) -> Iterator[dict[str, Any]]:
    """Log what an admin does (if it gets ``done`` here), or why it is refused."""
    facts = {**_sent(request), "adapter": name[:200], **facts}
    try:
        yield facts
    except RefusedError as refusal:
        log.warning(event(action, **facts, method=request.method, status=refusal.status, error=str(refusal)))
        raise
    if done:
        log.info(event(action, **facts, status=200))


async def _unless_gone(request: Request, work: Awaitable[list[Labelled]]) -> list[Labelled]:
    """What ``work`` gives; if the client goes away first, the work is dropped."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    working, leaving = asyncio.ensure_future(work), asyncio.create_task(gone())
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise HTTPException(499, "The client has gone.")
        return working.result()
    finally:
        working.cancel()
        leaving.cancel()


def _check(items: list[schema.Item], config: ServeConfig) -> None:
    count = sum(len(item.texts) for item in items)
    if count > config.max_texts:
        raise RefusedError(422, f"A request may hold {config.max_texts} texts, not {count}; send several.")
    for text in (text for item in items for text in item.texts):
        if len(text) > config.max_characters:
            raise RefusedError(
                422, f"A text may hold {config.max_characters:,} characters, not {len(text):,}; shorten it."
            )
        if not text.strip():
            raise RefusedError(422, "A text is blank: fill or leave it out.")


def _told(labelled: Labelled, top_k: int) -> dict[str, Any]:
    served = labelled.served
    answers = []
    for row in labelled.probabilities:
        found = answer(served.head, row, top_k)
        top = [{"label": label, "confidence": confidence} for label, confidence in found.top]
        answers.append({"label": found.label, "labels": found.labels, "confidence": found.confidence, "top": top})
    return {"adapter": served.name, "version": served.facts.version, "answers": answers}


def _listed(entry: Entry) -> dict[str, Any]:
    facts: Facts | None = entry.served.facts if entry.served else entry.facts
    empty = {"version": None, "method": None, "base": None, "labels": [], "multi": False, "metrics": {}, "bytes": 0,
             "temperature": 1.0, "threshold": 0.0}  # fmt: skip
    told = {name: getattr(facts, name) for name in empty} if facts else empty
    return {"name": entry.name, "status": entry.status, **told, "labels": list(told["labels"]), "error": entry.error}


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, RefusedError)
    headers = {"Retry-After": str(error.retry_after)} if error.retry_after else {}
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse({"error": str(error)}, error.status, headers)


async def _invalid(request: Request, error: Exception) -> Response:
    """What is wrong and where, without the text that was sent."""
    assert isinstance(error, RequestValidationError)
    malformed = [each for each in error.errors() if each["type"] == "json_invalid"]
    if malformed:
        return JSONResponse({"error": f"The body is no valid JSON: {malformed[0]['ctx']['error']}."}, 400)
    listed = isinstance(error.body, list)  # a body that is no item is measured as a list too, and the other way round
    first = next((each for each in error.errors() if (each["loc"][1:2] != ("Item",)) == listed), error.errors()[0])
    where = ".".join(str(part) for part in first["loc"][2:])[:200]
    return JSONResponse({"error": f"{where.encode('ascii', 'replace').decode() or 'The body'}: {first['msg']}."}, 422)


async def _http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return JSONResponse({"error": str(error.detail)}, error.status_code, error.headers)


async def _gone(request: Request, error: Exception) -> Response:
    """For the count alone: nobody reads it."""
    return JSONResponse({"error": "The client has gone."}, 499)


async def _failed(request: Request, error: Exception) -> Response:
    return JSONResponse({"error": "The server failed on this request; its log says why."}, 500)

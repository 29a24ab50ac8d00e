"""The process: binds its address, serves until it is told to stop, and answers what is in flight."""

import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from infuse.errors import InfuseError
from infuse.serving import logs
from infuse.serving.settings import ServeConfig, admin_token

try:
    import resource
except ImportError:  # not on Windows
    resource = None
if TYPE_CHECKING:
    from infuse.serving.model import Several


log = logging.getLogger("infuse.serving")
_FILES = 256  # open files beside the connections
_SLACK = 15.0  # seconds of an end after those to answer what is in flight
_SWITCH = 3e-4  # seconds; by Python's own 5 ms, workers would wait for the parsing of requests several times a pass


def serve(config: ServeConfig, *, say: Callable[[str], None] = lambda _: None) -> None:
    """Serve until SIGTERM or Ctrl-C.

    Raises:
        InfuseError: settings or a token that can't work, an address that is taken, a base that can't be loaded.
    """
    missing = [name for name in ("fastapi", "uvicorn", "httptools", "prometheus_client") if find_spec(name) is None]
    if missing:
        raise InfuseError(f"infuse serve needs {missing[0]}, which is not installed: pip install 'infuse[serve]'.")
    from infuse.serving.engine import open_model

    sys.setswitchinterval(_SWITCH)
    _allow_files(config.connections)
    token = admin_token()
    with logs.written():
        model = open_model(config)
        try:
            _serve(config, model, token, say)
        finally:
            lived = model.close()
    if not lived:
        say("infuse: the process of the model has ended by itself; if memory ran out, serve with a smaller --resident.")
        sys.exit(1)


def _serve(config: ServeConfig, model: "Several", token: str | None, say: Callable[[str], None]) -> None:
    import uvicorn

    from infuse.serving.app import create_app
    from infuse.serving.engine import Engine
    from infuse.serving.model import spare_what_stays

    bound = _bind(config.host, config.port)
    host, port = bound.getsockname()[:2]
    engine, ended = Engine(config, model), threading.Event()
    server = uvicorn.Server(uvicorn_config(config, create_app(engine, token)))
    if threading.current_thread() is threading.main_thread():
        # uvicorn raises the signal again once all is answered: an end that was asked for is no failure.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
        # Shells start background jobs with this one ignored; uvicorn ends by it all the same, and then so must we.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if hasattr(signal, "SIGHUP"):  # by default it would end the process, with all that is in flight
            signal.signal(signal.SIGHUP, lambda *_: engine.look_soon())
        threading.Thread(target=_end_surely, args=(config, model, server, ended), daemon=True).start()
    spare_what_stays()
    say(f"{model.about.name} ({model.about.precision}) at http://{f'[{host}]' if ':' in host else host}:{port}")
    log.info(logs.event("serving", base=model.about.name, host=host, port=port, admin=token is not None))
    threading.Thread(target=_end_with, args=(model, server), daemon=True).start()
    try:
        server.run(sockets=[bound])
    finally:
        ended.set()
        log.info(logs.event("stopped"))


def _end_surely(config: ServeConfig, model: "Several", server: Any, ended: threading.Event) -> None:
    """Once the server is told to stop, see to it that it ends, whatever hangs."""
    while not server.should_exit:
        time.sleep(0.2)
    log.info(logs.event("stopping", drain=config.drain))
    if ended.wait(config.drain + _SLACK):
        return
    log.error(logs.event("killed", error=f"the server did not end within {config.drain + _SLACK:g} s"))
    for each in model.models:
        each.process.kill()
    os._exit(1)


def _allow_files(connections: int) -> None:
    """Raise the limit of open files to what so many connections may need.

    Raises:
        InfuseError: the system does not allow so many.
    """
    if resource is None:
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = connections + _FILES
    if soft == resource.RLIM_INFINITY or wanted <= soft:
        return
    if hard != resource.RLIM_INFINITY and wanted > hard:
        raise InfuseError(f"The system allows {hard} open files (ulimit -Hn), too few for {connections} connections.")
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _end_with(model: "Several", server: Any) -> None:
    """Stop serving when the model's process has ended: whoever watches this one starts it anew."""
    model.wait()
    server.should_exit = True


def uvicorn_config(config: ServeConfig, app: Any) -> Any:
    """How uvicorn runs the application."""
    import uvicorn

    from infuse.serving.connection import connections

    return uvicorn.Config(
        app, log_config=None, log_level="warning", access_log=False, server_header=False, ws="none",
        http=connections(config.deadline, config.connections),
        timeout_graceful_shutdown=max(1, round(config.drain)), timeout_keep_alive=30,
    )  # fmt: skip


def _bind(host: str, port: int) -> socket.socket:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise InfuseError(
            f"Can't listen on {host}:{port} ({error.strerror}); choose another --host or --port."
        ) from None

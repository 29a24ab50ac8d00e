"""The process: binds its address, serves until it is told to stop, and answers what is in flight."""

import logging
import os
import socket
from collections.abc import Callable
from importlib.util import find_spec

from infuse.errors import InfuseError
from infuse.serving.settings import TOKEN, ServeConfig


def serve(config: ServeConfig, *, say: Callable[[str], None] = lambda _: None) -> None:
    """Serve until SIGTERM or Ctrl-C.

    Raises:
        InfuseError: settings that can't work, an address that is taken, a base that can't be loaded.
    """
    missing = [name for name in ("fastapi", "uvicorn", "prometheus_client") if find_spec(name) is None]
    if missing:
        raise InfuseError(f"infuse serve needs {missing[0]}, which is not installed: pip install 'infuse[serve]'.")
    import uvicorn

    from infuse.serving.app import create_app
    from infuse.serving.engine import open_engine

    engine = open_engine(config)
    logging.getLogger("infuse.serving").setLevel(logging.INFO)
    bound = _bind(config.host, config.port)
    host, port = bound.getsockname()[:2]
    say(f"{engine.base.name} ({engine.precision}) at http://{f'[{host}]' if ':' in host else host}:{port}")
    settings = uvicorn.Config(
        create_app(engine, os.environ.get(TOKEN) or None), log_level="warning", access_log=False, server_header=False,
        timeout_graceful_shutdown=max(1, round(config.drain)), timeout_keep_alive=30, ws="none",
    )  # fmt: skip
    uvicorn.Server(settings).run(sockets=[bound])


def _bind(host: str, port: int) -> socket.socket:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise InfuseError(
            f"Can't listen on {host}:{port} ({error.strerror}); choose another --host or --port."
        ) from None

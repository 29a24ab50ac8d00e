"""The settings of a server."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from infuse.errors import InfuseError
from infuse.serving.hosts import parts
from infuse.settings import FromFile, check_kinds

TOKEN = "INFUSE_ADMIN_TOKEN"
"""The environment variable with the token that loading and unloading ask for."""


def admin_token() -> str | None:
    """The token in the environment, if there is one.

    Raises:
        InfuseError: no header could carry it, so that nobody would ever be the admin.
    """
    token = os.environ.get(TOKEN) or None
    if token is not None and not (token.isascii() and token.isprintable()):
        raise InfuseError(f"The token in {TOKEN} may hold printable ASCII characters only; choose another.")
    return token


@dataclass
class ServeConfig(FromFile):
    """Serve every adapter in a folder over one frozen base, rows of different tasks in one batch."""

    folder: Positional[Path]
    """A folder of run folders or adapter folders; the folders' names are the adapters' names."""
    base: str | None = None
    """The base model; by default the one that most adapters in the folder were trained on."""
    host: str = "127.0.0.1"
    """The address to listen on; 0.0.0.0 for all."""
    port: int = 8000
    """The port to listen on; 0 takes a free one."""
    allowed_hosts: tuple[str, ...] = ()
    """More names of the server, * for any; localhost, the address of --host and, with 0.0.0.0, any IP address work."""
    connections: int = 500
    """Connections at the same time; for one more, the one that is idle longest is closed."""
    precision: Literal["trained", "auto", "fp32", "bf16"] = "trained"
    """Number format of the trunk; trained: that of the adapters, or fp32 if they differ."""
    window: float = 2.0
    """Milliseconds that a row may wait for others to share its batch."""
    max_tokens: int = 4096
    """Tokens in one forward pass, padding included."""
    mixed: bool = True
    """Rows of different adapters in one batch; without it, one adapter at a time (to compare)."""
    queue: int = 4096
    """Texts that may wait; beyond them, requests are refused with 429 and Retry-After."""
    deadline: float = 30.0
    """Seconds after which a request that is not answered is given up, with 504."""
    resident: int = 1000
    """Adapters in memory; the least recently used one leaves for another."""
    watch: float = 2.0
    """Seconds between two looks at the folder for new, changed and removed adapters; 0: never after the start."""
    max_body: int = 2**20
    """Bytes of a request."""
    max_file: int = 2**30
    """Bytes of an adapter that is sent to the server."""
    max_texts: int = 256
    """Texts of a request."""
    max_characters: int = 20_000
    """Characters of a text (an adapter's own limit of tokens cuts it further)."""
    workers: int = 1
    """Processes with a model each, for passes at the same time; each takes the memory of the base and the adapters."""
    threads: int = 0
    """Threads of a forward pass; 0: one a core less one (for what parses requests), shared out among the workers."""
    drain: float = 30.0
    """Seconds to answer what is in flight when the server is told to stop."""
    log_texts: bool = False
    """Write texts and answers into the log, on standard error."""

    def check(self) -> None:
        """Raise :class:`InfuseError` for a value that cannot work."""
        check_kinds(self)
        for name, low in _AT_LEAST.items():
            if not low <= getattr(self, name) < 1e12:
                raise InfuseError(f"{name} must be at least {low}, not {getattr(self, name):g}.")
        if self.port > 65535:
            raise InfuseError(f"port must be at most 65535, not {self.port}.")
        for name in self.allowed_hosts:
            host = parts(name)
            if name != "*" and (host is None or host[1] is not None):
                raise InfuseError(f"allowed_hosts takes names without scheme and port, not {name!r}.")
        if not self.folder.is_dir():
            raise InfuseError(f"There is no folder {self.folder}; give the folder that holds the adapters.")


_AT_LEAST = {
    "port": 0, "connections": 1, "window": 0, "max_tokens": 1, "queue": 1, "deadline": 0.01, "resident": 1, "watch": 0,
    "max_body": 64,
    "max_file": 64, "max_texts": 1, "max_characters": 1, "workers": 1, "threads": 0, "drain": 0,
}  # fmt: skip

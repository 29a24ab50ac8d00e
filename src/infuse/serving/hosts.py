"""Which names a server answers to: another one is a page of somebody else's that was led here (DNS rebinding)."""

import ipaddress
import re
from collections.abc import Mapping

from infuse.serving.refusals import RefusedError

_HOST = re.compile(r"(\[[0-9a-f:.]+\]|[^:\[\]@/\s]+?)\.?(?::(\d{1,5}))?", re.IGNORECASE)


class Hosts:
    """The hosts that requests may name.

    They are the loopback names, the address that the server listens on and ``allowed``. A server that listens on all
    addresses can't know them: it also answers to any IP address, which no name server can lead astray.

    Args:
        bound: the address to listen on.
        allowed: more names; ``*`` for any.
    """

    def __init__(self, bound: str, allowed: tuple[str, ...] = ()):
        self.allowed = {host[0] for name in allowed if (host := parts(name)) is not None}
        self.names = {"localhost", bound.lower(), *self.allowed}
        self.anywhere = _address(bound) in (ipaddress.ip_address("0.0.0.0"), ipaddress.ip_address("::"))

    def refusal(self, method: str, headers: Mapping[bytes, bytes]) -> RefusedError | None:
        """Why a request with these headers is not answered, if it isn't."""
        given = headers.get(b"host")
        if given is None:  # a client of HTTP/1.0, and so no browser
            return None
        host = parts(given.decode("latin-1"))
        if host is None:
            return RefusedError(400, "The Host header holds no host; send the one of the server's address.")
        if not self._known(host[0]):
            return RefusedError(
                403, f"This server does not answer to the host {host[0][:100]!r}; start it with --allowed-hosts, or "
                "ask it by an address that it listens on.",
            )  # fmt: skip
        origin = headers.get(b"origin")
        if origin is None or method in ("GET", "HEAD", "OPTIONS"):
            return None
        scheme, _, rest = origin.decode("latin-1").partition("://")
        page = parts(rest)
        if page is not None and (page[0] in self.allowed or _at(page, scheme) == _at(host, scheme)):
            return None
        return RefusedError(403, "Pages of other sites may not send this; start the server with --allowed-hosts.")

    def _known(self, host: str) -> bool:
        address = _address(host)
        if "*" in self.allowed or host in self.names or (address is not None and address.is_loopback):
            return True
        return address is not None and (self.anywhere or str(address) in self.names)


def parts(text: str) -> tuple[str, str | None] | None:
    """Host and port as a ``Host`` header gives them, in small letters, without brackets and a last dot."""
    found = _HOST.fullmatch(text.strip())
    return None if found is None else (found[1].lower().strip("[]"), found[2])


def _at(host: tuple[str, str | None], scheme: str) -> tuple[str, str]:
    return host[0], host[1] or {"https": "443"}.get(scheme, "80")


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None

"""Why a request is not answered: one sentence and an HTTP status each."""

from infuse.errors import InfuseError


class RefusedError(InfuseError):
    """A request that is refused.

    Attributes:
        status: the HTTP status.
        retry_after: seconds after which to try again, where that helps.
    """

    def __init__(self, status: int, sentence: str, retry_after: int | None = None):
        super().__init__(sentence)
        self.status = status
        self.retry_after = retry_after


def unknown(name: str) -> RefusedError:
    return RefusedError(404, f"There is no adapter {name[:100]!r}; GET /v1/adapters lists those that are served.")


def unusable(name: str, reason: str) -> RefusedError:
    return RefusedError(409, f"Adapter {name!r} can't be used: {reason}")


def training(name: str) -> RefusedError:
    return RefusedError(409, f"{name!r} is a run that has not ended; send the adapter when it has, or by another name.")


def full(waiting: int, seconds: float) -> RefusedError:
    after = max(1, round(seconds))
    return RefusedError(429, f"{waiting} texts are waiting already; try again in {after} s.", after)


def stopping() -> RefusedError:
    return RefusedError(503, "The server is stopping; try again in 5 s.", 5)


def gone(code: int | None) -> RefusedError:
    return RefusedError(
        503, f"The process of the model has ended with {code} (-9: memory may have run out), and so will the server.", 5
    )


def silent(seconds: float) -> RefusedError:
    return RefusedError(503, f"The model has not answered for {seconds:.0f} s; try again in 5 s.", 5)


def failed(name: str) -> RefusedError:
    return RefusedError(500, f"Adapter {name!r} failed on this request; the server's log says why.")


def late(seconds: float) -> RefusedError:
    return RefusedError(
        504, f"The answer took longer than the deadline of {seconds:g} s; send fewer texts, or try later."
    )

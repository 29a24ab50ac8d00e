"""What a server counts, for Prometheus."""

from contextlib import suppress
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


class Metrics:
    """Counters of one server, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = own = CollectorRegistry()
        self.requests = Counter("infuse_requests", "Requests by route and status.", ["route", "status"], registry=own)
        self.seconds = Histogram(
            "infuse_request_seconds", "Seconds from a request to its answer.", ["route"], registry=own, buckets=_SECONDS
        )
        self.texts = Counter("infuse_texts", "Texts answered, by adapter.", ["adapter"], registry=own)
        self.rows = Histogram("infuse_batch_rows", "Rows of a forward pass.", registry=own, buckets=_ROWS)
        self.adapters = Histogram(
            "infuse_batch_adapters", "Different adapters in a forward pass.", registry=own, buckets=_ROWS
        )
        self.passes = Histogram("infuse_batch_seconds", "Seconds of a forward pass.", registry=own, buckets=_SECONDS)
        self.waiting = Gauge("infuse_queue_rows", "Texts that are admitted and not yet answered.", registry=own)
        self.known = Gauge("infuse_adapters", "Adapters by status.", ["status"], registry=own)

    def follow(self, batcher: Any, store: Any) -> None:
        """Read the gauges from where their values are kept."""
        self.waiting.set_function(lambda: batcher.reserved)
        for status in ("resident", "ready", "broken", "withdrawn"):
            self.known.labels(status).set_function(
                lambda status=status: sum(entry.status == status for entry in list(store.entries.values()))
            )

    def passed(self, rows: int, adapters: int, seconds: float) -> None:
        self.rows.observe(rows)
        self.adapters.observe(adapters)
        self.passes.observe(seconds)

    def forget(self, adapter: str) -> None:
        """Drop the series of an adapter that is gone."""
        with suppress(KeyError):  # it has never answered
            self.texts.remove(adapter)

    def text(self) -> bytes:
        return generate_latest(self.registry)

"""Prometheus series of the adapter store: what it holds, what was evicted, how long files take to fetch.

Labels are closed sets: nothing here grows with adapters or tenants. Gauges are as of the last sweep.
"""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.registry import REGISTRY

from soma_vllm.adapters.eviction_policy import Reason
from soma_vllm.sessions.state.events import EventKind
from soma_vllm.types import Event, SessionKey

FETCH_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)


class AdapterStoreMetrics:
    """A meter of the stock, and an observer of the events in `kinds`."""

    kinds = frozenset({EventKind.ADAPTER_PUBLISHED, EventKind.ADAPTER_RETIRED})

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        self._count = Gauge("soma_adapters_stored", "Adapters published.", registry=registry)
        self._bytes = Gauge("soma_adapters_stored_bytes", "Bytes of adapters published.", registry=registry)
        self._published = Counter("soma_adapters_published", "Adapters published.", registry=registry)
        self._retired = Counter(
            "soma_adapters_retired", "Adapters that left the engine and the store.", registry=registry
        )
        self._evicted = Counter(
            "soma_store_evictions",
            "Adapters that had to leave the store, by reason.",
            ["reason"],
            registry=registry,
        )
        self._fetch = Histogram(
            "soma_adapter_fetch_seconds",
            "Until an adapter's files were on this machine, and found to be those published.",
            buckets=FETCH_SECONDS,
            registry=registry,
        )
        for reason in Reason:
            self._evicted.labels(reason.value)

    def __call__(self, key: SessionKey, event: Event) -> None:
        """Count one event."""
        if event.kind == EventKind.ADAPTER_PUBLISHED:
            self._published.inc()
        elif event.kind == EventKind.ADAPTER_RETIRED:
            self._retired.inc()

    def kept(self, count: int, size_bytes: int) -> None:
        """Set how many adapters are stored, and their bytes."""
        self._count.set(count)
        self._bytes.set(size_bytes)

    def evicted(self, reason: Reason) -> None:
        """Count an eviction by its reason."""
        self._evicted.labels(reason.value).inc()

    def fetched(self, seconds: float) -> None:
        """Observe how long it took to fetch an adapter's files."""
        self._fetch.observe(seconds)

"""Prometheus series of the adapters: how many are loaded, what loading takes, leases and waiting requests.

Labels are closed sets: nothing here grows with sessions or adapters, and no adapter is ever named.
"""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.registry import REGISTRY

LOAD_SECONDS = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
WAIT_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class AdapterMetrics:
    """The meter of `AdapterLeases` and of `LoadedAdapters`."""

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        self._load = Histogram(
            "soma_adapter_load_seconds",
            "How long a use of an adapter waited for it to be in the engine; warm: it was there.",
            ["state"],
            buckets=LOAD_SECONDS,
            registry=registry,
        )
        self._evictions = Counter(
            "soma_adapter_evictions", "Adapters removed from the engine to make room.", registry=registry
        )
        self._rejections = Counter(
            "soma_adapter_rejections", "Adapters that were not served as trained.", registry=registry
        )
        self._wait = Histogram(
            "soma_slot_wait_seconds",
            "How long a request waited for an adapter slot, where it had to.",
            ["outcome"],
            buckets=WAIT_SECONDS,
            registry=registry,
        )
        self._overflow = Counter(
            "soma_slot_overflow",
            "Requests that got no adapter slot, answered by the original.",
            ["why"],
            registry=registry,
        )
        self._gauges = {
            "resident": Gauge("soma_adapters_resident", "Adapters in the engine's memory.", registry=registry),
            "leases": Gauge("soma_adapter_holds", "Uses of adapters under way.", registry=registry),
            "distinct": Gauge("soma_adapters_in_flight", "Adapters in use: slots taken.", registry=registry),
            "waiting": Gauge("soma_slot_queue_length", "Requests that wait for a slot.", registry=registry),
        }

    def watch(self, **gauges: Callable[[], int]) -> None:
        """Set where `resident`, `leases`, `distinct` and `waiting` are read from at each scrape."""
        for name, read in gauges.items():
            self._gauges[name].set_function(read)

    def loaded(self, seconds: float, warm: bool) -> None:
        """See `AdapterMeter`."""
        self._load.labels("warm" if warm else "cold").observe(seconds)

    def evicted(self) -> None:
        """See `AdapterMeter`."""
        self._evictions.inc()

    def rejected(self) -> None:
        """See `AdapterMeter`."""
        self._rejections.inc()

    def waited(self, seconds: float, outcome: str) -> None:
        """See `AdapterMeter`."""
        self._wait.labels(outcome).observe(seconds)

    def overflowed(self, why: str) -> None:
        """See `AdapterMeter`."""
        self._overflow.labels(why).inc()

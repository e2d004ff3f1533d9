"""Prometheus series of what is asked of the original: how requests end, how many are in flight, its circuit.

Labels are closed sets.
"""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge
from prometheus_client.registry import REGISTRY

from soma_vllm.engines.guarded_original import Outcome


class OriginalMetrics:
    """The meter of `GuardedOriginal`."""

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        self._ended = Counter(
            "soma_original_requests",
            "Requests for the original by how they ended; broken: in the middle of a stream.",
            ["outcome"],
            registry=registry,
        )
        for outcome in Outcome:
            self._ended.labels(outcome)
        self._retried = Counter(
            "soma_original_retries", "Requests sent again: no byte of an answer had come.", registry=registry
        )
        self._gauges = {
            "in_flight": Gauge("soma_original_in_flight", "Requests at the original.", registry=registry),
            "waiting": Gauge(
                "soma_original_queue_length",
                "Requests that wait for a place at the original.",
                registry=registry,
            ),
            "circuit": Gauge(
                "soma_original_circuit",
                "The original's circuit breaker: 0 closed, 1 half open, 2 open.",
                registry=registry,
            ),
        }

    def ended(self, outcome: Outcome) -> None:
        """See `OriginalMeter`."""
        self._ended.labels(outcome).inc()

    def retried(self) -> None:
        """See `OriginalMeter`."""
        self._retried.inc()

    def watch(self, **gauges: Callable[[], float]) -> None:
        """Set where `in_flight`, `waiting` and `circuit` are read from at each scrape."""
        for name, read in gauges.items():
            self._gauges[name].set_function(read)

"""Prometheus series of the server itself: its parts, what waits, and the tasks that keep it going."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Gauge
from prometheus_client.registry import REGISTRY


class ServerMetrics:
    """Gauges that are read at each scrape."""

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        self._parts = Gauge(
            "soma_part_down", "Whether a part of /ready is down (1) or not (0).", ["part"], registry=registry
        )
        self._deaths = Gauge(
            "soma_task_deaths", "Exceptions that ended a background task.", ["task"], registry=registry
        )
        self._gauges = {
            "writes_behind": Gauge(
                "soma_writes_behind", "Writes that the session store has not taken yet.", registry=registry
            ),
            "oldest_write_seconds": Gauge(
                "soma_oldest_write_seconds", "For how long the oldest of them has waited.", registry=registry
            ),
            "unwritten_characters": Gauge(
                "soma_unwritten_characters",
                "Conversation text that waits for the session store.",
                registry=registry,
            ),
            "sessions_live": Gauge("soma_sessions_live", "Sessions in memory.", registry=registry),
            "requests_in_flight": Gauge(
                "soma_requests_in_flight", "POST requests under way.", registry=registry
            ),
            "background_tasks": Gauge(
                "soma_background_tasks",
                "Adaptations, audits and removals of adapters under way.",
                registry=registry,
            ),
            "original_restarts": Gauge(
                "soma_original_restarts", "Restarts of the original's child server.", registry=registry
            ),
        }

    def watch(self, **gauges: Callable[[], float]) -> None:
        """Set where gauges are read from, by name without `soma_`."""
        for name, read in gauges.items():
            self._gauges[name].set_function(read)

    def watch_part(self, part: str, down: Callable[[], bool]) -> None:
        """Set where the state of a part is read from."""
        self._parts.labels(part).set_function(lambda: float(down()))

    def watch_task(self, task: str, deaths: Callable[[], int]) -> None:
        """Set where the deaths of a task are read from."""
        self._deaths.labels(task).set_function(deaths)

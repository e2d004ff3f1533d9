"""What is measured of adapters in an engine: loads, evictions, waits for a slot."""

from __future__ import annotations

from typing import Literal, Protocol

Outcome = Literal["granted", "full", "timed_out", "leaving"]
"""How a request for an adapter slot ended. A closed set: it is a metric's label."""


class AdapterMeter(Protocol):
    """Told by `AdapterLeases`, `LoadedAdapters` and the engine: `telemetry.adapter_metrics.AdapterMetrics`."""

    def waited(self, seconds: float, outcome: Outcome) -> None:
        """A user's wait in the queue ended."""
        ...

    def overflowed(self, why: Outcome) -> None:
        """A user got no slot; the original answers."""
        ...

    def loaded(self, seconds: float, warm: bool) -> None:
        """A use of an adapter waited this long for it; warm: it was there already."""
        ...

    def evicted(self) -> None:
        """An adapter was removed to make room."""
        ...

    def rejected(self) -> None:
        """An adapter is not served as it was trained."""
        ...


class Unmetered:
    """An `AdapterMeter` that measures nothing."""

    def waited(self, seconds: float, outcome: Outcome) -> None: ...
    def overflowed(self, why: Outcome) -> None: ...
    def loaded(self, seconds: float, warm: bool) -> None: ...
    def evicted(self) -> None: ...
    def rejected(self) -> None: ...

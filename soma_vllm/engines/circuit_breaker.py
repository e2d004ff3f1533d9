"""A circuit breaker: after failures in a row a dependency is left alone for a while, then tried by one request.

Pure but for its clock; for one event loop. Closed: everything passes. Open: nothing does, for `open_s` seconds.
Half open: one request passes, the probe, and its end closes the circuit or opens it again.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from enum import IntEnum


class Circuit(IntEnum):
    """A circuit's state; the value of its metric."""

    CLOSED = 0
    HALF_OPEN = 1
    OPEN = 2


class CircuitBreaker:
    """Counts failures in a row."""

    def __init__(self, failures: int, open_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        """`failures` in a row open the circuit; 0: nothing does."""
        self._most = failures
        self._open_s = open_s
        self._clock = clock
        self._failures = 0
        self._open_until: float | None = None
        self._probing = False
        self._probe_until = 0.0

    @property
    def state(self) -> Circuit:
        """The state now."""
        if self._open_until is None:
            return Circuit.CLOSED
        return Circuit.OPEN if self._clock() < self._open_until else Circuit.HALF_OPEN

    def wait(self) -> float:
        """Seconds for which requests are refused; 0.0 where one may pass now, and then it must `begin`."""
        if self.state is Circuit.CLOSED:
            return 0.0
        assert self._open_until is not None
        probed = self._probing and self._clock() < self._probe_until
        return max(self._open_until - self._clock(), 1.0 if probed else 0.0)

    def begin(self) -> bool:
        """Let a request pass; whether it is the probe. Tell its end: `succeeded`, `failed` or `gave_up`."""
        probe = self.state is Circuit.HALF_OPEN
        if probe:  # one that hangs holds up the next for no longer than an open circuit does
            self._probing, self._probe_until = True, self._clock() + self._open_s
        return probe

    def succeeded(self, probe: bool) -> None:
        """A request was answered. One that began before the circuit opened does not close it."""
        if probe or self.state is Circuit.CLOSED:
            self._failures, self._open_until = 0, None
        self._probing = self._probing and not probe

    def failed(self, probe: bool) -> None:
        """A request was not answered."""
        self._failures += 1
        if self._most and (probe or (self._failures >= self._most and self._open_until is None)):
            self._open_until = self._clock() + self._open_s
        self._probing = self._probing and not probe

    def gave_up(self, probe: bool) -> None:
        """A request ended without telling anything of the dependency: its client left."""
        self._probing = self._probing and not probe

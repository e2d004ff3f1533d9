"""A budget per minute: a token bucket that holds a minute's worth. Pure but for its clock."""

from __future__ import annotations

import time
from collections.abc import Callable


class TokenBucket:
    """Grants `per_minute` things a minute; after a pause up to a minute's worth at once, at least one.

    In any span of t minutes at most `max(1, per_minute) + t * per_minute` are granted.
    """

    def __init__(self, per_minute: float, clock: Callable[[], float] = time.monotonic) -> None:
        """`clock` returns seconds and never goes back."""
        self._rate = per_minute / 60.0
        self._most = max(1.0, per_minute)
        self._left = self._most
        self._clock = clock
        self._seen = clock()

    def take(self) -> bool:
        """Whether one more is granted now."""
        now = self._clock()
        self._left = min(self._most, self._left + (now - self._seen) * self._rate)
        self._seen = now
        if self._left < 1.0:
            return False
        self._left -= 1.0
        return True

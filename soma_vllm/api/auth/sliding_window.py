"""Usage per tenant in the last minute: arithmetic alone, without a clock, a lock or a thread.

Guarantees: a window drops an amount exactly `PERIOD_S` after it was added; the wait it names is exact; an
amount above the limit is counted in full; a tenant that was idle for a period takes no memory.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from dataclasses import dataclass, field

PERIOD_S = 60.0
MOST_TENANTS = 65_536
"""Tenants kept at once. Where any token makes a tenant, the longest idle one is dropped early."""


class SlidingWindow:
    """Amounts of the last `PERIOD_S` seconds. The caller gives times, in seconds, that never decrease."""

    def __init__(self) -> None:
        self._amounts: deque[tuple[float, int]] = deque()
        self._total = 0

    def add(self, now: float, amount: int) -> None:
        """Count an amount; it may be above any limit."""
        self._amounts.append((now, amount))
        self._total += amount

    def wait(self, now: float, limit: int) -> float:
        """Seconds until the sum is below `limit` (at least 1); 0.0 where it is below already."""
        while self._amounts and self._amounts[0][0] + PERIOD_S <= now:
            self._total -= self._amounts.popleft()[1]
        left = self._total
        if left < limit:
            return 0.0
        for at, amount in self._amounts:
            left -= amount
            if left < limit:
                return at + PERIOD_S - now
        raise AssertionError(f"limit: found {limit}; expected at least 1")


@dataclass
class TenantUsage:
    """One tenant's usage in the last minute."""

    used_at: float
    requests: SlidingWindow = field(default_factory=SlidingWindow)
    tokens: SlidingWindow = field(default_factory=SlidingWindow)


class UsageWindow:
    """The usage of every tenant that sent a request in the last minute."""

    def __init__(self, most_tenants: int = MOST_TENANTS) -> None:
        self._most_tenants = most_tenants
        self._tenants: OrderedDict[str, TenantUsage] = OrderedDict()
        """Least recently used first."""

    def __len__(self) -> int:
        return len(self._tenants)

    def tenant(self, name: str, now: float) -> TenantUsage:
        """The tenant's usage, to be read or added to before the next call."""
        found = self._tenants.get(name)
        if found is None:
            found = self._tenants[name] = TenantUsage(now)
        found.used_at = now
        self._tenants.move_to_end(name)
        while len(self._tenants) > self._most_tenants or self._oldest().used_at + PERIOD_S <= now:
            self._tenants.popitem(last=False)
        return found

    def _oldest(self) -> TenantUsage:
        return next(iter(self._tenants.values()))

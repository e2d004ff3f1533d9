"""What tenants spent in the last minute: arithmetic alone, without a clock, a lock or a thread.

Guarantees: a window forgets an amount exactly `PERIOD_S` after it was spent; the wait it names is exact, enough
and no longer; an amount above the limit is counted in full; a tenant idle for a period takes no memory.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from dataclasses import dataclass, field

PERIOD_S = 60.0
MOST_TENANTS = 65_536
"""Tenants remembered at once. Where any token makes a tenant, the longest idle one is forgotten early."""


class MovingWindow:
    """Amounts of the last `PERIOD_S` seconds. Times come from the caller, in seconds, and never go back."""

    def __init__(self) -> None:
        self._spent: deque[tuple[float, int]] = deque()
        self._total = 0

    def spend(self, now: float, amount: int) -> None:
        """Count an amount, however large."""
        self._spent.append((now, amount))
        self._total += amount

    def wait(self, now: float, limit: int) -> float:
        """Seconds until less than `limit` (at least 1) is spent; 0.0 when it is so already."""
        while self._spent and self._spent[0][0] + PERIOD_S <= now:
            self._total -= self._spent.popleft()[1]
        left = self._total
        if left < limit:
            return 0.0
        for at, amount in self._spent:
            left -= amount
            if left < limit:
                return at + PERIOD_S - now
        raise AssertionError(f"limit: found {limit}; expected at least 1")


@dataclass
class Spending:
    """One tenant's last minute."""

    used_at: float
    requests: MovingWindow = field(default_factory=MovingWindow)
    tokens: MovingWindow = field(default_factory=MovingWindow)


class UsageWindow:
    """The last minute of every tenant that asked in it."""

    def __init__(self, most_tenants: int = MOST_TENANTS) -> None:
        self._most_tenants = most_tenants
        self._spending: OrderedDict[str, Spending] = OrderedDict()
        """Longest unused first."""

    def __len__(self) -> int:
        return len(self._spending)

    def of(self, tenant: str, now: float) -> Spending:
        """The tenant's spending, to be read or added to at once."""
        found = self._spending.get(tenant)
        if found is None:
            found = self._spending[tenant] = Spending(now)
        found.used_at = now
        self._spending.move_to_end(tenant)
        while len(self._spending) > self._most_tenants or self._oldest().used_at + PERIOD_S <= now:
            self._spending.popitem(last=False)
        return found

    def _oldest(self) -> Spending:
        return next(iter(self._spending.values()))

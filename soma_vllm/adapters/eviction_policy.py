"""Which adapters have to go. Pure: from what is kept, when it was used, and what may be kept.

Guarantees: a spared adapter (pinned, or in the making) is never named; what is named is the least recently used
of what could be; nothing is named that the budgets do not ask for.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol


class Reason(StrEnum):
    """Why an adapter goes. A closed set: it is a metric's label."""

    TTL = "ttl"
    TENANT_COUNT = "tenant_count"
    TENANT_BYTES = "tenant_bytes"
    COUNT = "count"
    BYTES = "bytes"
    LOST = "lost"
    """Its files are missing or damaged."""
    ORPHANED = "orphaned"
    """It serves no session, and no adaptation under way made it."""
    ASKED = "asked"
    """An administrator said so."""


class Budgets(Protocol):
    """What may be kept: section `adapters` of the configuration. None is no limit."""

    @property
    def max_count(self) -> int | None: ...
    @property
    def max_bytes(self) -> int | None: ...
    @property
    def tenant_max_count(self) -> int | None: ...
    @property
    def tenant_max_bytes(self) -> int | None: ...
    @property
    def ttl_s(self) -> float | None: ...


@dataclass(frozen=True)
class StoredAdapter:
    """One adapter as the decision sees it."""

    name: str
    tenant: str
    size_bytes: int
    last_used: float
    """Unix time, seconds."""
    spared: bool = False


@dataclass(frozen=True)
class Eviction:
    """One adapter that has to go."""

    name: str
    reason: Reason


def to_evict(kept: Sequence[StoredAdapter], budgets: Budgets, now: float) -> tuple[Eviction, ...]:
    """What has to go, in the order in which it should: what is too old, then what is too much for its tenant,
    then what is too much in all; each time the least recently used first."""
    oldest_first = sorted(kept, key=lambda one: (one.last_used, one.name))
    going: dict[str, Reason] = {}
    if budgets.ttl_s is not None:
        expired = (one for one in oldest_first if one.last_used < now - budgets.ttl_s and not one.spared)
        going |= {one.name: Reason.TTL for one in expired}
    by_tenant = defaultdict(list)
    for one in oldest_first:
        by_tenant[one.tenant].append(one)
    for group in by_tenant.values():
        rest = [one for one in group if one.name not in going]
        going |= dict(_beyond(rest, budgets.tenant_max_count, None, Reason.TENANT_COUNT))
        rest = [one for one in group if one.name not in going]
        going |= dict(_beyond(rest, None, budgets.tenant_max_bytes, Reason.TENANT_BYTES))
    rest = [one for one in oldest_first if one.name not in going]
    going |= dict(_beyond(rest, budgets.max_count, None, Reason.COUNT))
    rest = [one for one in rest if one.name not in going]
    going |= dict(_beyond(rest, None, budgets.max_bytes, Reason.BYTES))
    return tuple(Eviction(name, reason) for name, reason in going.items())


def _beyond(
    oldest_first: Iterable[StoredAdapter], count: int | None, size: int | None, reason: Reason
) -> Iterator[tuple[str, Reason]]:
    """The least recently used that have to go, so that at most `count` of at most `size` bytes are left."""
    found = list(oldest_first)
    left, left_bytes = len(found), sum(one.size_bytes for one in found)
    for one in found:
        if (count is None or left <= count) and (size is None or left_bytes <= size):
            return
        if not one.spared:
            left, left_bytes = left - 1, left_bytes - one.size_bytes
            yield one.name, reason

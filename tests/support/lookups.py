"""What a session store finds, for tests that ask for one turn."""

from __future__ import annotations

from collections.abc import Sequence

from soma_vllm.sessions.sql.records import TurnLocation
from soma_vllm.sessions.sql.store import SessionStore


async def found(store: SessionStore, tenant: str, family: str, chains: Sequence[str]) -> TurnLocation | None:
    """The turn that a request goes on from: of a session that stands there, else the latest."""
    hits = await store.find(tenant, family, chains, 9)
    best = max(hits, key=lambda hit: (hit.stands, hit.found.seq), default=None)
    return None if best is None else best.found

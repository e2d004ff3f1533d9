"""What this room needs of others: a session store, observers, a meter. The wiring fits concrete classes in."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Sequence
from typing import TYPE_CHECKING, Protocol, TypeVar

from soma_vllm.errors import StoreUnavailable
from soma_vllm.sessions.sql.records import (
    AdapterRecord,
    Append,
    LengthCount,
    Summary,
    TurnHit,
    TurnLocation,
)
from soma_vllm.types import Event, SessionKey, Usage

if TYPE_CHECKING:  # they load SQLAlchemy
    from soma_vllm.sessions.sql.audit_trail import AuditTrail
    from soma_vllm.sessions.sql.stored_objects import StoredObjects

LOOKUP_S = 3.0
"""Longest wait for the store while a user waits."""

T = TypeVar("T")


class Store(Protocol):
    """Where sessions are on record: `sessions.sql.store.SessionStore`.

    Every verb raises StoreUnavailable where the store does not answer, and no other error of a database.
    """

    async def append_all(self, appends: Sequence[Append]) -> None: ...
    @property
    def objects(self) -> StoredObjects:
        """Responses and conversations."""
        ...

    @property
    def audit(self) -> AuditTrail:
        """Administrators' orders."""
        ...

    async def events(self, key: SessionKey) -> list[Event]: ...
    async def find(self, tenant: str, family: str, chains: Sequence[str], limit: int) -> list[TurnHit]: ...
    async def ending(self, tenant: str, family: str, endings: Sequence[str], limit: int) -> list[str]: ...
    async def of_response(self, tenant: str, response: str) -> TurnLocation | None: ...
    async def erase_text(self, key: SessionKey) -> int: ...
    async def erase_texts_before(self, at: float) -> int: ...
    async def delete(self, *keys: SessionKey) -> None: ...
    async def delete_unused_objects(self, at: float) -> None: ...
    async def users_of(self, adapter: str) -> list[SessionKey]: ...
    async def served(self) -> list[tuple[SessionKey, str]]: ...
    async def in_phase(self, phase: str) -> list[SessionKey]: ...
    async def idle_since(self, at: float, limit: int) -> list[SessionKey]: ...
    async def summaries(self, tenant: str | None, limit: int, after: float | None = None) -> list[Summary]: ...
    async def family(self, tenant: str, family: str) -> list[SessionKey]: ...
    async def live(self, tenant: str) -> int: ...
    async def lengths(self, over_before: float) -> list[LengthCount]: ...
    async def adapters(self, tenant: str | None = None, retired: bool = True) -> list[AdapterRecord]: ...
    async def adapters_used(self) -> dict[str, float]: ...
    async def adapter(self, name: str) -> AdapterRecord | None: ...
    async def index(self, adapters: Sequence[AdapterRecord]) -> None: ...
    async def retired(self, adapter: str) -> None: ...


async def in_time(answer: Awaitable[T]) -> T:
    """What the session store answers: without its record a session must not be served as if it were new.

    Raises:
        StoreUnavailable: it did not answer within `LOOKUP_S`.
    """
    try:
        async with asyncio.timeout(LOOKUP_S):
            return await answer
    except TimeoutError as error:
        raise StoreUnavailable(f"the session store did not answer within {LOOKUP_S:g} s") from error


class Observer(Protocol):
    """Something that is told of events: of the kinds in its attribute `kinds`, or of all where it has none."""

    def __call__(self, key: SessionKey, event: Event) -> None: ...


class Meter(Protocol):
    """What a tenant may still use: `api.auth.quotas.Quotas`."""

    def spent(self, tenant: str, usage: Usage) -> None:
        """Count the tokens of a reply."""
        ...

    def limits_tokens(self, tenant: str) -> bool:
        """Whether a tenant's tokens need counting."""
        ...

    def reserve(self, tenant: str, tokens: int) -> None:
        """Count tokens that a request may take until `unreserve`; raise TooManyRequests where none are left."""
        ...

    def unreserve(self, tenant: str, tokens: int) -> None:
        """Give them back: what was used in fact is `spent`."""
        ...

    def limits_sessions(self, tenant: str) -> bool:
        """Whether a tenant's sessions need counting."""
        ...

    def check_new_session(self, tenant: str, live: int) -> None:
        """Raise TooManyRequests where a tenant with `live` sessions may not open another."""
        ...

    def policies(self, tenant: str) -> Sequence[str]:
        """Policies that a tenant's requests may name although they train or start something."""
        ...

    def may_adapt(self, tenant: str, adapters: int) -> bool:
        """Whether a tenant that holds `adapters` may have one more."""
        ...

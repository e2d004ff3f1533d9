"""What an administrator may see and order of sessions."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from soma_vllm.adaptation.pipeline import Adaptation
from soma_vllm.adapters.lifecycle import AdapterLifecycle
from soma_vllm.errors import BadRequest, NotFound, TooManyRequests
from soma_vllm.maintenance.removal import SessionRemoval
from soma_vllm.sessions.background_tasks import BackgroundTasks
from soma_vllm.sessions.live_session import LiveSession
from soma_vllm.sessions.ports import Meter
from soma_vllm.sessions.registry import SessionRegistry
from soma_vllm.sessions.sql.records import Summary
from soma_vllm.sessions.state.events import EventKind
from soma_vllm.sessions.state.phases import Phase
from soma_vllm.sessions.state.session import Session
from soma_vllm.types import Role, SessionKey

ADAPTER_RETRY_S = 60.0
REMOVAL_S = 10.0
"""Longest wait of a client for the removal of its session, which may wait for a stream of it to end."""
ASKED = "asked by an administrator"


class SessionAdmin:
    """Shows sessions and carries out orders."""

    def __init__(
        self,
        registry: SessionRegistry,
        adaptation: Adaptation,
        background: BackgroundTasks,
        adapters: AdapterLifecycle,
        meter: Meter,
        removal: SessionRemoval,
    ) -> None:
        self._registry = registry
        self._adaptation = adaptation
        self._background = background
        self._adapters = adapters
        self._meter = meter
        self._removal = removal

    # -- looking ----------------------------------------------------------------------------------------

    async def entry(self, key: SessionKey) -> LiveSession:
        """A session with its events; raises NotFound, StoreUnavailable."""
        return await self._registry.entry(key)

    def idle(self, key: SessionKey) -> bool:
        """True when no background work is under way for this session."""
        return self._background.idle(key)

    async def summaries(self, tenant: str | None, limit: int, after: float | None) -> list[Summary]:
        """Sessions on record, the most recent first, from those last used before `after` on.

        Raises:
            StoreUnavailable: the session store does not answer.
        """
        return await self._registry.store.summaries(tenant, limit, after)

    # -- orders -----------------------------------------------------------------------------------------

    async def pin(self, key: SessionKey, engine: Role | None) -> Session:
        """Bind a session to an engine, or let it go again. Raises NotFound."""
        async with self._held(key):
            return self._registry.note(key, EventKind.PINNED, engine=engine)

    async def roll_back(self, key: SessionKey) -> Session:
        """Give a session back to the original.

        Raises:
            NotFound: there is no such session.
            BadRequest: the surrogate does not serve it.
        """
        async with self._held(key) as session:
            if session.phase is not Phase.SWITCHED:
                raise BadRequest(f"found the session in phase {session.phase}; expected {Phase.SWITCHED}")
            rolled_back = self._registry.note(key, EventKind.ROLLED_BACK, reason=ASKED)
            self._retire(key, session)
            return rolled_back

    async def readapt(self, key: SessionKey) -> Session:
        """Have a session adapted anew, from all its turns that can teach: at once where their text is in
        memory, else with its next turn.

        Raises:
            NotFound: there is no such session.
            BadRequest: it is being adapted, or removed.
            TooManyRequests: its tenant has as many adapters as its key allows.
        """
        async with self._held(key):
            held = await self._registry.adapters(key.tenant)
            session = self._registry.session(key)
            if session.phase in (Phase.ADAPTING, Phase.CLOSED):
                raise BadRequest(f"found the session in phase {session.phase}; expected another")
            if not self._meter.may_adapt(key.tenant, held - (session.adapter is not None)):
                raise TooManyRequests("limits.adapters: this key's are used up", ADAPTER_RETRY_S)
            self._registry.note(key, EventKind.RESTARTED, reason=ASKED)
            self._retire(key, session)
            self._adaptation.start_if_due(key, session.adapting)
            return self._registry.session(key)

    async def remove(self, key: SessionKey, wait_s: float = REMOVAL_S) -> bool:
        """Remove a session and all it has; see `SessionRemoval.remove_family`."""
        return await self._removal.remove_family(key, wait_s)

    @asynccontextmanager
    async def _held(self, key: SessionKey) -> AsyncIterator[Session]:
        """A session on record, leased. Raises NotFound, StoreUnavailable."""
        async with self._registry.lease(key) as session:
            if self._registry.is_new(key):
                raise NotFound(f"no session {key.session!r}")
            yield session

    def _retire(self, key: SessionKey, session: Session) -> None:
        if session.adapter is not None:
            self._background.spawn(key, self._adapters.retire(session.adapter, key))

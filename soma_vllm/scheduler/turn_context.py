"""One turn, from the arrival of its request to its record.

Guarantees: the session is held from `begin_turn` until the turn ends or fails, and so is whatever is put on
`TurnContext.resources`, such as the lease on an adapter; each is released exactly once, the latest first.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from soma_vllm.engines.engine import ChatCall
from soma_vllm.engines.logprob_capture import LogprobCapture
from soma_vllm.errors import BadRequest, StoreUnavailable
from soma_vllm.logs import bind
from soma_vllm.scheduler.policies.base import Policy, TurnQuery
from soma_vllm.sessions.lookup import SessionLookup
from soma_vllm.sessions.ports import Meter
from soma_vllm.sessions.state.identity import explicit_id, tenant_of
from soma_vllm.sessions.state.phases import Phase
from soma_vllm.sessions.state.session import Session
from soma_vllm.sessions.state.transcript import TranscriptDigest, read, text_of
from soma_vllm.sessions.state.truncated_history import Overlap
from soma_vllm.sessions.state.turn import Turn
from soma_vllm.types import Message, Role, Route, SessionKey

logger = logging.getLogger(__name__)

READ_AT_ONCE = 200_000
"""Characters of a request's messages from which they are read in a thread: others' streams go on meanwhile."""


MOST_REASON_CHARS = 200
"""Of a reason, which a policy of another package may have written."""


class SessionUnavailable(Exception):
    """A request cannot be dispatched within a session now; the message is a reason for `X-SOMA-Reason`."""


@dataclass(frozen=True)
class ChatRequest:
    """One request as the client sent it."""

    body: Mapping[str, Any]
    headers: Mapping[str, str]
    """Lower-case names."""
    http: Any = None
    session: str | None = None
    """The session's id, where something else than the request's own headers and body tells it."""
    response: str | None = None
    """Id under which the client may name the answer later."""
    started: float = field(default_factory=time.monotonic)
    """When it arrived, `time.monotonic`."""
    routed: dict[str, str] = field(default_factory=dict, compare=False)
    """Headers of its reply as far as they are known before an engine answers; filled by the dispatcher."""

    @property
    def tenant(self) -> str:
        """Whose request it is."""
        return tenant_of(self.headers.get("authorization"))

    @property
    def stored(self) -> bool:
        """Whether what is said may be kept, and learned from: not where `store` is false."""
        return self.body.get("store") is not False

    def messages(self) -> list[Message]:
        """The messages of a chat.

        Raises:
            BadRequest: there is none.
        """
        messages: list[Message] = self.body["messages"]
        if not messages:
            raise BadRequest("messages: found none; expected at least one", "messages")
        return messages


@dataclass(eq=False)
class TurnContext:
    """A turn under way. Its fields are filled in their order here."""

    request: ChatRequest
    policy: Policy
    digest: TranscriptDigest
    """Of the client's messages."""
    key: SessionKey
    """Its session; another one once the session has gone on without it (`settle`)."""
    lookup: SessionLookup
    resources: AsyncExitStack
    """What is released when the turn ends."""
    placed: tuple[Turn, ...]
    """The session's turns when the request was found to continue it."""
    query: TurnQuery = field(init=False)
    """What policies are asked about; set by `Routing.decide`, as the next two."""
    routed: Session = field(init=False)
    """The session as it was when the turn was routed: it may be removed before the turn ends."""
    route: Route = field(init=False)
    """Who answers; changed where an engine fails before its first token."""
    begun: Message | None = None
    """The beginning of the answer, where the client gives it."""
    began: bool = False
    """Its session is new."""
    history: str = ""
    """Whose history is answered, for `X-SOMA-History`; "" for the client's, whole."""
    capture: LogprobCapture | None = None
    """The original's log-probabilities, where they were asked for."""
    _compared: tuple[tuple[Turn, ...], Overlap] | None = None

    @property
    def session(self) -> Session:
        """The session as it is now."""
        return self.lookup.registry.session(self.key)

    @property
    def overlap(self) -> Overlap:
        """Where the client's history agrees with the record; compared again only where that has changed."""
        session = self.session
        if self._compared is None or self._compared[0] is not session.turns:
            self._compared = session.turns, session.overlap(self.digest)
        return self._compared[1]

    @property
    def asked(self) -> Mapping[str, Any]:
        """The request, with the record's history before it where that is answered."""
        if not self.history.startswith("server"):
            return self.request.body
        return {**self.request.body, "messages": list(self.digest.messages)}

    def call(self, added: Mapping[str, Any] | None = None) -> ChatCall:
        """What the routed engine is asked; `added` are fields of our own."""
        body = {**self.request.body, **(added or {})}
        if self.route.messages is not self.query.messages or self.history.startswith("server"):
            body["messages"] = [*self.route.messages, *([] if self.begun is None else [self.begun])]
        adapter = self.route.adapter if self.route.engine is Role.SURROGATE else None
        return ChatCall(body, adapter, self.key.tenant, self.request.http)

    def headers(self) -> dict[str, str]:
        """Who answers this turn, and why; why it began a branch; whose history is answered."""
        branched = self.routed.why if self.began else ""
        told = {"X-SOMA-Branch": branched, "X-SOMA-History": self.history}
        return {name: value for name, value in told.items() if value} | {
            "X-SOMA-Session": header_text(self.key.session),
            "X-SOMA-Engine": self.route.engine,
            "X-SOMA-Adapter": "" if self.route.adapter is None else self.route.adapter.name,
            "X-SOMA-Phase": self.routed.phase,
            "X-SOMA-Reason": header_text(self.route.reason)[:MOST_REASON_CHARS],
        }

    @property
    def takes_the_line(self) -> bool:
        """Whether this turn is the session's latest, of which the next request is expected to go on: not where
        it was gone on from since the request came, nor where the request is one of those aside."""
        session, turns = self.session, self.overlap.turns
        if [turn.chain for turn in session.turns] != [turn.chain for turn in self.placed]:
            return turns == len(session.turns) or session.asked_again_by(self.digest)
        return not session.is_aside(self.digest)

    @asynccontextmanager
    async def released_on_error(self) -> AsyncIterator[None]:
        """Ends the turn if the block fails. Log lines of the block name the session."""
        with bind(session=self.key.session, tenant=self.key.tenant):
            try:
                yield
            except BaseException:
                await self.resources.aclose()
                raise

    @asynccontextmanager
    async def released(self) -> AsyncIterator[None]:
        """Ends the turn with the block. Log lines of the block name the session."""
        with bind(session=self.key.session, tenant=self.key.tenant):
            async with self.resources:
                yield


async def begin_turn(lookup: SessionLookup, meter: Meter, request: ChatRequest, policy: Policy) -> TurnContext:
    """Find a request's session and hold it.

    Raises:
        BadRequest: the messages, or the session's id, are wrong.
        TooManyRequests: the tenant has too many sessions for a new one.
        SessionUnavailable: the session store does not answer, or the session is being removed.
    """
    tenant, registry = request.tenant, lookup.registry
    named = request.session or explicit_id(request.headers, request.body, registry.config.sessions)
    digest, begun = await _digested(request, registry.config.sessions.max_messages)
    history = ""
    async with AsyncExitStack() as resources, AsyncExitStack() as looking:
        try:
            if named is not None and request.session is None and not digest.marks:
                known = await looking.enter_async_context(registry.lease(SessionKey(tenant, named)))
                digest, history = lookup.with_history(known, digest)
            key = await resources.enter_async_context(lookup.begin(tenant, named, digest))
            registry.recall(key, digest)
            session = registry.session(key)
            if registry.is_new(key) and not session.is_branch and meter.limits_sessions(tenant):
                live = await registry.live(tenant)
                meter.check_new_session(tenant, live + registry.begun_beside(key))
                resources.enter_context(registry.begun(key))
        except StoreUnavailable as error:
            with bind(session=named, tenant=tenant):
                logger.warning("the original answers a turn that is not recorded: %s", error)
            raise SessionUnavailable("session store unavailable") from error
        if registry.session(key).phase is Phase.CLOSED:
            raise SessionUnavailable("session being removed")
        resources, turns = resources.pop_all(), session.turns
        new = registry.is_new(key)
        return TurnContext(request, policy, digest, key, lookup, resources, turns, begun, new, history)


async def _digested(request: ChatRequest, most: int) -> tuple[TranscriptDigest, Message | None]:
    """The digest of a request's messages, and the beginning of the answer where the client gives it."""
    listed: list[Message] = request.body["messages"]
    if len(listed) > most:
        raise BadRequest(f"messages: found {len(listed)}; expected at most {most} (sessions.max_messages)")

    def digested() -> tuple[TranscriptDigest, Message | None]:
        messages = request.messages()
        begins = bool(request.body.get("continue_final_message")) and messages[-1].get("role") == "assistant"
        begun = messages[-1] if begins else None
        return read(request.tenant, messages[:-1] if begins else messages), begun

    if sum(len(text_of(message)) for message in listed if isinstance(message, dict)) < READ_AT_ONCE:
        return digested()
    return await asyncio.to_thread(digested)


def header_text(text: str) -> str:
    """Text as a header can carry it: printable ASCII."""
    ascii_only = text.encode("ascii", "backslashreplace").decode()
    return "".join(char if char.isprintable() else " " for char in ascii_only)

"""The way of a request: identify, route, serve, record.

Guarantees:

* A turn is looked up, routed and recorded inside its tenant.
* The surrogate answers only where the route says so; if it fails before its first token, the original answers
  the same turn. An adapter is leased from before it is loaded to the last token.
* A turn is recorded after its last event was handed to the client; adaptation and audits follow in tasks that
  no request awaits.
* While the session store is away the original answers, and nothing is recorded.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from soma_vllm.adaptation.evidence import TurnEvidence
from soma_vllm.engines.call_guard import with_valid_calls
from soma_vllm.engines.engine import ChatCall, Engine, Engines, Events, Reply
from soma_vllm.engines.logprob_capture import LogprobCapture
from soma_vllm.engines.reply_parser import ParsedReply, observe
from soma_vllm.engines.token_counts import counted, counting_fields, estimate, wants_counts
from soma_vllm.errors import AdapterError, EngineError, EngineRefused, EngineUnavailable
from soma_vllm.scheduler.routing import DISPATCH_NAME, Routing, no_such_model
from soma_vllm.scheduler.turn_context import ChatRequest, SessionUnavailable, TurnContext, begin_turn
from soma_vllm.scheduler.turn_recorder import TurnRecorder
from soma_vllm.sessions.lookup import SessionLookup, StoredTranscript
from soma_vllm.sessions.ports import Meter
from soma_vllm.types import Message, Role

__all__ = ["DISPATCH_NAME", "Answer", "ChatRequest", "Dispatcher", "no_such_model"]

logger = logging.getLogger(__name__)

ABOUT_FIELDS = (400, 422)
"""Statuses of a refusal that may be about fields which we added. No other request is sent twice."""


@dataclass(frozen=True)
class Answer:
    """A reply and the headers that say who gave it and why."""

    reply: Reply
    headers: Mapping[str, str]
    model: str = DISPATCH_NAME
    """Name of the engine's model."""

    @property
    def body(self) -> Mapping[str, Any]:
        """The whole completion."""
        assert self.reply.body is not None, "a request without stream=true is answered whole"
        return self.reply.body

    @property
    def events(self) -> Events:
        """The stream."""
        assert self.reply.events is not None, "a request with stream=true is answered by events"
        return self.reply.events

    def streaming(self, events: Events) -> Answer:
        """The same answer with other events, made of its own."""
        return replace(self, reply=Reply(events=events))


class Dispatcher:
    """Serves dialogues from two engines."""

    def __init__(
        self,
        lookup: SessionLookup,
        meter: Meter,
        routing: Routing,
        engines: Engines,
        evidence: TurnEvidence,
        recorder: TurnRecorder,
    ) -> None:
        self._lookup = lookup
        self._meter = meter
        self._routing = routing
        self._engines = engines
        self._evidence = evidence
        self._recorder = recorder
        self._counts: bool | None = None
        """Whether the original takes a request for the counts of a stream; None until it was asked."""

    async def chat(self, request: ChatRequest) -> Answer:
        """Identify the session, route the turn, serve it, and have it recorded.

        Raises:
            BadRequest: the request cannot be dispatched.
            Forbidden: it names a policy that its tenant may not use.
            TooManyRequests: its tenant has too many sessions for a new one.
            EngineUnavailable: no engine can answer it now.
            EngineRefused: the engine found it wrong.
        """
        policy, named_engine = self._routing.resolve(request, self._meter.policies(request.tenant))
        if named_engine is not None:
            return await self._forward(request, named_engine, "bypass")
        try:
            turn = await begin_turn(self._lookup, self._meter, request, policy)
        except SessionUnavailable as reason:
            return await self._forward(request, self._engines.original, str(reason))
        async with turn.released_on_error():
            self._reserve(request, turn.resources, turn.asked)
            await self._routing.decide(turn)
            request.routed.update(turn.headers())
            reply = await self._serve(turn)
            if reply.events is not None:
                # Closed before the adapter is released: by then nothing is generated any more.
                turn.resources.push_async_callback(reply.events.aclose)
            headers = turn.headers()  # before the turn is recorded
            record = partial(self._recorder.record, turn)
            observed = await observe(
                reply, request.started, record, not wants_counts(request.body), self._recorder.heard
            )
            return Answer(observed, headers, self._engines.named(turn.route.engine))

    async def complete(self, request: ChatRequest) -> Answer:
        """Answer one text completion. It is no dialogue: the original answers, or the engine that is named.

        Raises:
            BadRequest, EngineUnavailable, EngineRefused: as in `chat`.
        """
        _, named_engine = self._routing.resolve(request, self._meter.policies(request.tenant))
        why = "a text completion has no session" if named_engine is None else "bypass"
        return await self._forward(request, named_engine or self._engines.original, why, text=True)

    async def said(self, tenant: str, response: str) -> StoredTranscript:
        """The transcript up to an answer; see `SessionLookup.said`."""
        return await self._lookup.said(tenant, response)

    async def conversation(self, tenant: str, session: str) -> tuple[Message, ...]:
        """A session's transcript; see `SessionLookup.conversation`."""
        return await self._lookup.conversation(tenant, session)

    async def _serve(self, turn: TurnContext) -> Reply:
        """The routed engine's reply, or the other one's where that fails before its first token."""
        if turn.route.engine is Role.SURROGATE:
            try:
                return await self._ask_surrogate(turn)
            except (EngineError, AdapterError) as error:
                logger.warning("the original answers instead of the surrogate: %s", error)
                turn.route = self._routing.without_surrogate(turn, error)
        try:
            return await self._ask_original(turn)
        except EngineUnavailable:
            fallback = self._routing.without_original(turn)
            if fallback is None:
                raise
            turn.route = fallback
            return await self._ask_surrogate(turn)

    async def _ask_surrogate(self, turn: TurnContext) -> Reply:
        """The surrogate's reply; its adapter stays leased until the turn ends.

        Raises:
            EngineError: the slots are full, the adapter does not load, the engine does not answer, or it calls
                a tool as the request does not allow.
            AdapterError: the engine does not serve the adapter as it was trained.
        """
        engines, adapter = self._engines, turn.route.adapter
        async with AsyncExitStack() as lease:
            if adapter is not None:
                lease.push_async_callback(engines.adapters.release, await engines.adapters.acquire(adapter))
            reply = await engines.surrogate.chat(turn.call(counting_fields(turn.request.body)))
            reply = await with_valid_calls(reply, turn.request.body)
            turn.resources.push_async_callback(lease.pop_all().aclose)
        return reply

    async def _ask_original(self, turn: TurnContext) -> Reply:
        """The original's reply; its log-probabilities are captured where they may teach."""
        learns = turn.begun is None and turn.request.stored
        rules = turn.policy.adapting if learns else None
        added = self._evidence.begin(turn.routed, turn.query, rules)
        original = self._engines.original
        reply, taken = await self._added_to(turn.request, added, lambda more: original.chat(turn.call(more)))
        if not (added and taken):
            return reply
        turn.capture = LogprobCapture()
        return turn.capture.take_off(reply)

    async def _added_to(
        self,
        request: ChatRequest,
        added: Mapping[str, Any],
        ask: Callable[[Mapping[str, Any]], Awaitable[Reply]],
    ) -> tuple[Reply, bool]:
        """(the original's reply to a request with fields of our own, whether it took them).

        Where it refuses the request, perhaps only for those, the client gets the answer to its own.
        """
        counts = {} if self._counts is False else counting_fields(request.body)
        if not (added or counts):
            return await ask({}), True
        try:
            reply = await ask({**counts, **added})
        except EngineRefused as error:
            if error.status not in ABOUT_FIELDS or (self._counts and not added):
                raise
            reply = await ask(counts if self._counts else {})
            if not added:
                self._counts = False
            return reply, False
        if counts:
            self._counts = True
        return reply, True

    async def _forward(self, request: ChatRequest, engine: Engine, why: str, text: bool = False) -> Answer:
        """An answer that belongs to no session."""
        tenant = request.tenant

        def ask(more: Mapping[str, Any]) -> Awaitable[Reply]:
            return engine.chat(ChatCall({**request.body, **more}, None, tenant, request.http, text=text))

        async with AsyncExitStack() as resources:
            self._reserve(request, resources)
            role = Role.SURROGATE if engine is self._engines.surrogate else Role.ORIGINAL
            headers = {"X-SOMA-Engine": role, "X-SOMA-Reason": why}
            request.routed.update(headers)
            if role is Role.SURROGATE:
                reply = await ask(counting_fields(request.body))
            else:
                reply, _ = await self._added_to(request, {}, ask)
            held = resources.pop_all()

        async def count(reply: ParsedReply) -> None:
            async with held:
                self._meter.spent(tenant, counted(reply, request.body))

        observed = await observe(
            reply, request.started, count, not wants_counts(request.body), self._recorder.heard
        )
        return Answer(observed, headers, engine.name)

    def _reserve(
        self, request: ChatRequest, resources: AsyncExitStack, asked: Mapping[str, Any] | None = None
    ) -> None:
        """Reserve the tokens that a request may take, until it is over; `asked` is it with its whole history.
        Raises TooManyRequests."""
        tenant = request.tenant
        if self._meter.limits_tokens(tenant):
            tokens = estimate(request.body if asked is None else asked)
            self._meter.reserve(tenant, tokens)
            resources.callback(self._meter.unreserve, tenant, tokens)

"""The way of a request: identify, route, serve, record.

Guarantees:

* A turn is looked up, routed and recorded inside its tenant; nothing crosses that line.
* The surrogate answers only where the policy says so; if it fails before its first token, the original answers
  the same turn. A hold on the adapter lasts from reservation to the last token.
* Recording happens after the last event has been handed to the client, adaptation and audits after that, in
  tasks that no request awaits.
* While the session store is away the original answers, and nothing is recorded.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from soma_vllm.adaptation.shadow_traffic import ShadowTraffic
from soma_vllm.adaptation.teacher_logprobs import TeacherLogprobs
from soma_vllm.adaptation.threaded_encoder import Encoder
from soma_vllm.adapters.leases import AdapterLeases
from soma_vllm.adapters.slots import SlotRequest
from soma_vllm.config import Config
from soma_vllm.engines.engine import AdapterEngine, ChatCall, Engine, Reply
from soma_vllm.engines.logprob_capture import LogprobCapture
from soma_vllm.engines.reply_parser import ParsedReply, observe
from soma_vllm.errors import (
    AdapterError,
    BadRequest,
    EngineError,
    EngineRefused,
    EngineUnavailable,
    NoSuchModel,
    StoreUnavailable,
)
from soma_vllm.scheduler.policies.base import Policies, Policy, TurnQuery, prepared
from soma_vllm.scheduler.turn_recorder import TurnRecorder
from soma_vllm.sessions.ports import Meter
from soma_vllm.sessions.registry import SessionRegistry, StoredTranscript
from soma_vllm.sessions.state.gate import gap
from soma_vllm.sessions.state.identity import explicit_id, tenant_of
from soma_vllm.sessions.state.phases import Phase
from soma_vllm.sessions.state.prefix import compress
from soma_vllm.sessions.state.session import Session
from soma_vllm.sessions.state.transcript import TranscriptDigest, read, text_of
from soma_vllm.types import Candidate, Message, Role, Route, SessionKey

logger = logging.getLogger(__name__)

DISPATCH_NAME = "soma"
"""The model name that asks for dispatch; `soma:<policy>` under another policy than the configured one. The
engines' own names bypass it."""

RESULTS = ("tool", "function")
"""Roles of messages that bring what a tool found."""


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

    @property
    def tenant(self) -> str:
        """Whose request it is."""
        return tenant_of(self.headers.get("authorization"))


@dataclass(frozen=True)
class Answer:
    """A reply and the headers that say who gave it and why."""

    reply: Reply
    headers: Mapping[str, str]


class Dispatcher:
    """Serves dialogues from two engines."""

    def __init__(
        self,
        config: Config,
        policies: Policies,
        registry: SessionRegistry,
        original: Engine,
        surrogate: AdapterEngine,
        encoder: Encoder,
        leases: AdapterLeases,
        recorder: TurnRecorder,
        teacher_logprobs: TeacherLogprobs,
        meter: Meter,
        shadow_traffic: ShadowTraffic,
    ) -> None:
        self._config = config
        self._policies = policies
        self._registry = registry
        self._original = original
        self._surrogate = surrogate
        self._encoder = encoder
        self._leases = leases
        self._recorder = recorder
        self._teacher_logprobs = teacher_logprobs
        self._meter = meter
        self._shadow_traffic = shadow_traffic

    async def chat(self, incoming: ChatRequest) -> Answer:
        """Answer one chat completion.

        Raises:
            BadRequest: the request cannot be dispatched.
            TooManyRequests: its tenant has too many sessions for a new one.
            EngineUnavailable: nobody can answer it now.
            EngineRefused: the engine found it wrong.
        """
        started = time.monotonic()
        policy = self._policy(incoming)
        if (engine := self._bypass(incoming)) is not None:
            return await self._past_sessions(engine, incoming, started, "bypass")
        reading = read(incoming.tenant, _messages(incoming))
        try:
            key = await self._enter(incoming, reading)
        except StoreUnavailable as error:
            logger.warning(
                "the session store did not answer; the original answers this turn, which is not recorded: %s",
                error,
            )
            return await self._past_sessions(self._original, incoming, started, "session store unavailable")
        if self._registry.session(key).phase is Phase.CLOSED:
            self._registry.release(key)
            return await self._past_sessions(self._original, incoming, started, "session being removed")
        self._prefetch(self._registry.session(key))
        try:
            asked = await self._read(key, reading, incoming)
            asked = await prepared(policy, self._registry.session(key), asked)
            session = self._registry.session(key)  # as it is now: all that took a while
            return await self._serve(key, session, asked, policy, incoming, started)
        except BaseException:
            self._registry.release(key)
            raise

    async def complete(self, incoming: ChatRequest) -> Answer:
        """Answer one text completion. It is no dialogue: the original answers, or the engine that is named.

        Raises:
            BadRequest, EngineUnavailable, EngineRefused: as in `chat`.
        """
        self._policy(incoming)
        engine = self._bypass(incoming)
        why = "a text completion has no session" if engine is None else "bypass"
        return await self._past_sessions(engine or self._original, incoming, time.monotonic(), why, text=True)

    async def said(self, tenant: str, response: str) -> StoredTranscript:
        """The transcript up to an answer; see `SessionRegistry.said`."""
        return await self._registry.said(tenant, response)

    async def conversation(self, tenant: str, session: str) -> tuple[Message, ...]:
        """A session's transcript; see `SessionRegistry.conversation`."""
        return await self._registry.conversation(tenant, session)

    # -- identify ---------------------------------------------------------------------------------------

    def _bypass(self, incoming: ChatRequest) -> Engine | None:
        """The engine a request asks for by name, or None for dispatch."""
        model = incoming.body.get("model")
        if model == self._original.name:
            return self._original
        if model == self._surrogate.name:
            return self._surrogate
        return self._original if incoming.headers.get("x-soma", "").lower() == "off" else None

    def _policy(self, incoming: ChatRequest) -> Policy:
        """The policy that a request asks for, or the configured one.

        Raises:
            BadRequest: there is no such model, or no such policy.
        """
        model = incoming.body.get("model")
        name = incoming.headers.get("x-soma-policy")
        served = (DISPATCH_NAME, self._original.name, self._surrogate.name)
        if model is None:
            raise BadRequest(f"model: found none; expected one of {', '.join(served)}", "model")
        if model not in served:
            prefix, colon, of_model = str(model).partition(":")
            if prefix != DISPATCH_NAME or not colon:
                raise no_such_model(str(model), served)
            name = of_model
        return self._policies.default if name is None else self._policies.named(name)

    async def _enter(self, incoming: ChatRequest, reading: TranscriptDigest) -> SessionKey:
        """The request's session, held."""
        tenant = incoming.tenant
        named = incoming.session or explicit_id(incoming.headers, incoming.body)
        key = await self._registry.place(tenant, named, reading)
        try:
            if self._registry.is_new(key) and self._meter.limits_sessions(tenant):
                self._meter.check_new_session(tenant, await self._registry.live(tenant))
        except BaseException:
            self._registry.release(key)
            raise
        return key

    def _prefetch(self, session: Session) -> None:
        """Have the adapter of a session that returns loaded while its request is read."""
        ref = session.adapter
        if ref is not None and session.phase is Phase.SWITCHED and self._leases.can_acquire(ref.name):
            self._surrogate.prefetch(ref)

    async def _read(self, key: SessionKey, reading: TranscriptDigest, incoming: ChatRequest) -> TurnQuery:
        """What of the request is new to the session, and how far its query is from the warm start."""
        self._registry.recall(key, reading)
        session = self._registry.session(key)
        builds_on, added = session.repeated(reading)
        center = session.centroid_vector()
        distance = None
        if session.phase is Phase.SWITCHED and center is not None:
            (vector,) = await self._encoder.encode([text_of(reading.messages[-1])])
            distance = gap(vector, center)
        return TurnQuery(reading, incoming.body, builds_on, added, distance)

    # -- serve ------------------------------------------------------------------------------------------

    def _route(self, session: Session, asked: TurnQuery, policy: Policy) -> Route:
        """To whoever called the tool whose result this is, else to the pinned engine, else by the policy."""
        if asked.added and asked.added[-1].get("role") in RESULTS and asked.builds_on:
            return self._to_caller(session, asked)
        if session.pinned is Role.ORIGINAL:
            return Route(Role.ORIGINAL, None, asked.messages, "pinned")
        if session.pinned is Role.SURROGATE:
            return Route(Role.SURROGATE, session.adapter, self._shown(asked), "pinned")
        if asked.unprepared is not None:
            return Route(Role.ORIGINAL, None, asked.messages, asked.unprepared)
        return policy.route(session, asked)

    def _to_caller(self, session: Session, asked: TurnQuery) -> Route:
        """A tool's result goes to the engine that called the tool, or to the original where that is unknown."""
        if any(message.get("role") == "assistant" for message in asked.added):
            return Route(Role.ORIGINAL, None, asked.messages, "tool result")  # the call is not on record
        caller = session.turns[asked.builds_on - 1]
        serving = None if session.adapter is None else session.adapter.name
        if caller.engine is Role.SURROGATE and session.phase is Phase.SWITCHED and caller.adapter == serving:
            return Route(Role.SURROGATE, session.adapter, self._shown(asked), "tool result to its caller")
        return Route(Role.ORIGINAL, None, asked.messages, "tool result")

    def _shown(self, asked: TurnQuery) -> tuple[Message, ...]:
        """What the surrogate sees of the history."""
        return compress(asked.messages, self._config.prefix, self._config.compressed_prefix_turns)

    async def _serve(
        self,
        key: SessionKey,
        session: Session,
        asked: TurnQuery,
        policy: Policy,
        incoming: ChatRequest,
        started: float,
    ) -> Answer:
        """Run the routed engine, the original if it cannot, and listen to what it says."""
        route = self._route(session, asked, policy)
        held = None
        reply = None
        lesson = None
        if route.engine is Role.SURROGATE:
            try:
                held, reply = await self._ask_surrogate(key, route, incoming)
            except (EngineError, AdapterError) as error:
                logger.warning("the surrogate failed; the original answers instead of the surrogate: %s", error)
                route = _instead(route, asked, f"surrogate failed: {error}")
        if reply is None:
            learns = policy.adapting is not None
            self._shadow_traffic.begin(session, asked, policy.adapting)
            more = self._teacher_logprobs.fields(session, incoming.body) if learns else {}
            shown = _showing(incoming, route, asked)
            route, reply, lesson = await self._ask_original(key, more, asked, route, shown)

        async def ended(heard: ParsedReply) -> None:
            if held is not None:
                await self._leases.release(held)
            self._meter.spent(key.tenant, heard.usage)
            self._recorder.record(
                key,
                session.phase,
                asked,
                route,
                heard,
                lesson=lesson,
                response=incoming.response,
                adapting=policy.adapting,
                forced=self._forced(incoming),
            )
            self._registry.release(key)

        headers = self._headers(key, session.phase, route)
        return Answer(await observe(reply, started, ended), headers)

    async def _ask_surrogate(
        self, key: SessionKey, route: Route, incoming: ChatRequest
    ) -> tuple[SlotRequest | None, Reply]:
        """(the hold on the adapter, the reply).

        Raises:
            EngineError: the slots are full, the adapter does not load, or the engine does not answer.
            AdapterError: the engine does not serve the adapter as it was trained.
        """
        ref = route.adapter
        held = None if ref is None else await self._leases.acquire(ref.name)
        try:
            if ref is not None:
                await self._surrogate.load(ref)
            body = {**incoming.body, "messages": list(route.messages)}
            reply = await self._surrogate.chat(ChatCall(body, ref, key.tenant, incoming.http))
        except BaseException:
            if held is not None:
                await self._leases.release(held)
            raise
        return held, reply

    async def _ask_original(
        self, key: SessionKey, more: Mapping[str, Any], asked: TurnQuery, route: Route, incoming: ChatRequest
    ) -> tuple[Route, Reply, LogprobCapture | None]:
        """(the route in the end, the reply, what it teaches beside its words)."""
        try:
            reply, lesson = await self._ask_for_more(key, incoming, more)
        except EngineUnavailable:
            if self._config.original.when_down != "surrogate":
                raise
            route = Route(Role.SURROGATE, None, asked.messages, "original unavailable")
            _, reply = await self._ask_surrogate(key, route, incoming)
            lesson = None
        return route, reply, lesson

    async def _ask_for_more(
        self, key: SessionKey, incoming: ChatRequest, more: Mapping[str, Any]
    ) -> tuple[Reply, LogprobCapture | None]:
        """The reply to the client's request; asked for `more` in it, also a lesson, taken off the reply."""
        own = ChatCall(incoming.body, None, key.tenant, incoming.http)
        if not more:
            return await self._original.chat(own), None
        try:
            reply = await self._original.chat(replace(own, body={**incoming.body, **more}))
        except EngineRefused:
            # Perhaps only for what we added: what the client hears is the answer to its own request.
            return await self._original.chat(own), None
        lesson = LogprobCapture()
        return lesson.take_off(reply), lesson

    async def _past_sessions(
        self, engine: Engine, incoming: ChatRequest, started: float, why: str, text: bool = False
    ) -> Answer:
        """An answer that belongs to no session."""
        tenant = incoming.tenant
        reply = await engine.chat(ChatCall(incoming.body, None, tenant, incoming.http, text=text))

        async def ended(heard: ParsedReply) -> None:
            self._meter.spent(tenant, heard.usage)

        role = Role.SURROGATE if engine is self._surrogate else Role.ORIGINAL
        headers = {"X-SOMA-Engine": role, "X-SOMA-Reason": why}
        return Answer(await observe(reply, started, ended), headers)

    def _headers(self, key: SessionKey, phase: Phase, route: Route) -> dict[str, str]:
        return {
            "X-SOMA-Session": _ascii(key.session),
            "X-SOMA-Engine": route.engine,
            "X-SOMA-Adapter": "" if route.adapter is None else route.adapter.name,
            "X-SOMA-Phase": phase,
            "X-SOMA-Reason": _ascii(route.reason),
        }

    def _forced(self, incoming: ChatRequest) -> Candidate | None:
        """The candidate that a study forces on this session, where the configuration lets it."""
        wish = incoming.headers.get("x-soma-force", "")
        allowed = self._config.adaptation.allow_force_header
        return Candidate(wish) if allowed and wish in (Candidate.PLAIN, Candidate.ADAPTER) else None


def no_such_model(model: str, served: Iterable[str]) -> NoSuchModel:
    """The refusal of a model's name."""
    return NoSuchModel(f"model: found {model[:200]!r}; expected one of {', '.join(served)}", "model")


def _ascii(text: str) -> str:
    """Text as a header can carry it."""
    return text.encode("ascii", "backslashreplace").decode()


def _instead(route: Route, asked: TurnQuery, why: str) -> Route:
    """The original's route for a turn that was meant for the surrogate."""
    return replace(route, engine=Role.ORIGINAL, adapter=None, messages=asked.messages, reason=why)


def _showing(incoming: ChatRequest, route: Route, asked: TurnQuery) -> ChatRequest:
    """The request as the routed engine is to see it."""
    if route.messages is asked.messages:
        return incoming
    return replace(incoming, body={**incoming.body, "messages": list(route.messages)})


def _messages(incoming: ChatRequest) -> list[Message]:
    messages: list[Message] = incoming.body["messages"]
    if not messages:
        raise BadRequest("messages: found none; expected at least one", "messages")
    try:
        json.dumps(messages, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        # No tokenizer reads it, and the encoder and the store would each fail in a way of their own.
        raise BadRequest("messages: found half a surrogate pair; expected Unicode text", "messages") from None
    return messages

"""The way of a request: identify, route, serve, record, adapt.

Guarantees:

* A turn is looked up, routed and recorded inside its tenant; nothing crosses that line.
* The surrogate answers only where the policy says so; if it fails before its first token, the original answers
  the same turn. A hold on the adapter lasts from reservation to the last token.
* Recording happens after the last event has been handed to the client, adaptation and audits after that, in
  tasks that no request awaits.
* A request that a client repeats or rewrites replaces the turns it no longer contains; it never adds a second.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Coroutine, Mapping
from dataclasses import dataclass, replace
from typing import Any

from soma_vllm.config import Config
from soma_vllm.engines.base import ChatCall, Engine, Reply
from soma_vllm.errors import BadRequest, EngineError, EngineRefused, EngineUnavailable
from soma_vllm.scheduler.adaptation import Adaptation
from soma_vllm.scheduler.book import SessionBook
from soma_vllm.scheduler.drift import DriftWatch
from soma_vllm.scheduler.holds import AdapterHolds
from soma_vllm.scheduler.policies.base import Asked, Policy
from soma_vllm.scheduler.ports import AdapterEngine, Encoder
from soma_vllm.scheduler.replies import Ended, Heard, Listened, heard_whole
from soma_vllm.scheduler.teaching import Lesson, Teachers, without_logprobs
from soma_vllm.session.gate import gap
from soma_vllm.session.identity import explicit_id, tenant_of
from soma_vllm.session.phases import Phase
from soma_vllm.session.prefix import compress
from soma_vllm.session.session import Session, Turn, turn_event
from soma_vllm.session.transcript import common_turns, says, text_of
from soma_vllm.types import Candidate, Role, Route, SessionKey

logger = logging.getLogger(__name__)

DISPATCH_NAME = "soma"
"""The model name that asks for dispatch; the engines' own names bypass it."""


@dataclass(frozen=True)
class Incoming:
    """One chat completion as the client sent it."""

    body: Mapping[str, Any]
    headers: Mapping[str, str]
    """Lower-case names."""
    http: Any = None


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
        policy: Policy,
        book: SessionBook,
        original: Engine,
        surrogate: AdapterEngine,
        encoder: Encoder,
        holds: AdapterHolds,
        adaptation: Adaptation,
        drift: DriftWatch,
        teachers: Teachers,
    ) -> None:
        self._config = config
        self._policy = policy
        self.book = book
        self._original = original
        self._surrogate = surrogate
        self._encoder = encoder
        self._holds = holds
        self._adaptation = adaptation
        self._drift = drift
        self._teachers = teachers
        self._background: dict[asyncio.Task[None], SessionKey] = {}

    async def chat(self, incoming: Incoming) -> Answer:
        """Answer one chat completion.

        Raises:
            BadRequest: the request cannot be dispatched.
            EngineUnavailable: nobody can answer it now.
            EngineRefused: the engine found it wrong.
        """
        if (engine := self._bypass(incoming)) is not None:
            return await self._pass_through(engine, incoming)
        started = time.monotonic()
        key = await self._identify(incoming)
        session = await self.book.open(key)
        self.book.hold(key)
        try:
            asked = await self._read(session, incoming)
            session = self.book.session(key)  # as it is now: reading took a while
            route = self._policy.route(session, asked)
            return await self._serve(key, session, asked, route, incoming, started)
        except BaseException:
            self.book.release(key)
            raise

    def idle(self, key: SessionKey) -> bool:
        """True when no background work is under way for this session."""
        return key not in self._background.values()

    async def stop(self) -> None:
        """End all background work. An unfinished adaptation starts again with the session's next turn."""
        tasks = list(self._background)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # -- identify ---------------------------------------------------------------------------------------

    def _bypass(self, incoming: Incoming) -> Engine | None:
        """The engine a request asks for by name, or None for dispatch."""
        model = incoming.body.get("model")
        if model == self._original.name:
            return self._original
        if model == self._surrogate.name:
            return self._surrogate
        if model not in (DISPATCH_NAME, None):
            served = f"{DISPATCH_NAME}, {self._original.name}, {self._surrogate.name}"
            raise BadRequest(f"model: found {model!r}; expected one of {served}", "model")
        return self._original if incoming.headers.get("x-soma", "").lower() == "off" else None

    async def _identify(self, incoming: Incoming) -> SessionKey:
        if not incoming.body["messages"]:
            raise BadRequest("messages: found none; expected at least one", "messages")
        tenant = tenant_of(incoming.headers.get("authorization"))
        session = explicit_id(incoming.headers, incoming.body)
        if session is not None:
            return SessionKey(tenant, session)
        return await self.book.recognise(tenant, incoming.body["messages"])

    async def _read(self, session: Session, incoming: Incoming) -> Asked:
        """What of the request is new to the session, and how far its query is from the warm start."""
        messages = tuple(incoming.body["messages"])
        builds_on, added = common_turns(session.turns, messages)
        center = session.centroid_vector()
        distance = None
        if session.phase is Phase.SWITCHED and center is not None:
            (vector,) = await self._encoder.encode([text_of(messages[-1])])
            distance = gap(vector, center)
        return Asked(messages, incoming.body, builds_on, added, distance)

    # -- serve ------------------------------------------------------------------------------------------

    async def _serve(
        self,
        key: SessionKey,
        session: Session,
        asked: Asked,
        route: Route,
        incoming: Incoming,
        started: float,
    ) -> Answer:
        """Run the routed engine, the original if it cannot, and listen to what it says."""
        held = None
        reply = None
        lesson = None
        if route.engine is Role.SURROGATE:
            try:
                held, reply = await self._ask_surrogate(key, route, incoming)
            except EngineError as error:
                logger.warning("the original answers instead of the surrogate: %s", error)
                route = _instead(route, asked, f"surrogate failed: {error}")
        if reply is None:
            route, reply, lesson = await self._ask_original(key, session, asked, route, incoming)

        async def ended(heard: Heard) -> None:
            if held is not None:
                await self._holds.release(held)
            self._record(key, session.phase, asked, route, heard, lesson, incoming)
            self.book.release(key)

        headers = self._headers(key, session.phase, route)
        return Answer(await _listened(reply, started, ended), headers)

    async def _ask_surrogate(
        self, key: SessionKey, route: Route, incoming: Incoming
    ) -> tuple[str | None, Reply]:
        """(the adapter held, the reply).

        Raises:
            EngineError: the slots are full, the adapter does not load, or the engine does not answer.
        """
        ref = route.adapter
        if ref is not None and not self._holds.try_hold(ref.name):
            raise EngineUnavailable("all adapter slots are in use")
        try:
            if ref is not None:
                await self._surrogate.load(ref)
            body = {**incoming.body, "messages": list(route.messages)}
            reply = await self._surrogate.chat(ChatCall(body, ref, key.tenant, incoming.http))
        except BaseException:
            if ref is not None:
                await self._holds.release(ref.name)
            raise
        return (None if ref is None else ref.name), reply

    async def _ask_original(
        self, key: SessionKey, session: Session, asked: Asked, route: Route, incoming: Incoming
    ) -> tuple[Route, Reply, Lesson | None]:
        """(the route in the end, the reply, what it teaches beside its words)."""
        more = self._teachers.fields(session, incoming.body) if self._policy.adapts else {}
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
        self, key: SessionKey, incoming: Incoming, more: Mapping[str, Any]
    ) -> tuple[Reply, Lesson | None]:
        """The reply to the client's request; asked for `more` in it, also a lesson, taken off the reply."""
        own = ChatCall(incoming.body, None, key.tenant, incoming.http)
        if not more:
            return await self._original.chat(own), None
        try:
            reply = await self._original.chat(replace(own, body={**incoming.body, **more}))
        except EngineRefused:
            # Perhaps only for what we added: what the client hears is the answer to its own request.
            return await self._original.chat(own), None
        lesson = Lesson()
        return without_logprobs(reply, lesson), lesson

    async def _pass_through(self, engine: Engine, incoming: Incoming) -> Answer:
        tenant = tenant_of(incoming.headers.get("authorization"))
        reply = await engine.chat(ChatCall(incoming.body, None, tenant, incoming.http))
        role = Role.SURROGATE if engine is self._surrogate else Role.ORIGINAL
        return Answer(reply, {"X-SOMA-Engine": role, "X-SOMA-Reason": "bypass"})

    def _headers(self, key: SessionKey, phase: Phase, route: Route) -> dict[str, str]:
        return {
            "X-SOMA-Session": _ascii(key.session),
            "X-SOMA-Engine": route.engine,
            "X-SOMA-Adapter": "" if route.adapter is None else route.adapter.name,
            "X-SOMA-Phase": phase,
            "X-SOMA-Reason": _ascii(route.reason),
        }

    # -- record, adapt ----------------------------------------------------------------------------------

    def _record(
        self,
        key: SessionKey,
        phase: Phase,
        asked: Asked,
        route: Route,
        heard: Heard,
        lesson: Lesson | None,
        incoming: Incoming,
    ) -> None:
        """Fold the turn into its session, then start what follows from it."""
        if not heard.complete and not heard.text:
            return  # the client left before anything was said: there is no turn
        session = self.book.session(key)
        builds_on, added = common_turns(session.turns, asked.messages)
        turn = Turn(
            number=builds_on + 1,
            messages=added,
            answer=heard.text,
            engine=route.engine,
            adapter=None if route.adapter is None else route.adapter.name,
            phase=phase,
            reason=route.reason,
            usage=heard.usage,
            ttft_s=heard.ttft_s,
            latency_s=heard.latency_s,
            complete=heard.complete,
        )
        if builds_on < session.learned and not _repeats(session, turn):
            self._rewind(key, session, builds_on)
        session = self.book.record(key, turn_event(turn, builds_on, time.time()))
        self._teachers.keep(key, turn.number, heard, lesson)
        if self._policy.adapts:
            if session.phase in (Phase.WARM_START, Phase.ROLLED_BACK) and (why := turn.unteachable()):
                self.book.note(key, "turn_skipped", turn=turn.number, why=why)
            self._follow_up(key, session, turn, asked, incoming)

    def _rewind(self, key: SessionKey, session: Session, builds_on: int) -> None:
        """Forget what was learned from turns that the client has rewritten."""
        adapter = session.adapter
        self.book.note(key, "rewound", to=builds_on)
        if adapter is not None:
            self._spawn(key, self._adaptation.retire(adapter))

    def _follow_up(
        self, key: SessionKey, session: Session, turn: Turn, asked: Asked, incoming: Incoming
    ) -> None:
        unfinished = session.phase is Phase.ADAPTING and self.idle(key)
        if session.wants_adaptation(self._config) or unfinished:
            if self.idle(key):
                self._spawn(key, self._adaptation.begin(key, self._forced(incoming)))
            return
        if self._drift.wants(turn):
            shown = compress(asked.messages, self._config.prefix, self._config.compressed_prefix_turns)
            if turn.engine is Role.ORIGINAL:
                self.book.note(key, "locality_miss", turn=turn.number, distance=asked.distance)
            self._spawn(key, self._drift.audit(key, turn, asked.messages, shown))

    def _forced(self, incoming: Incoming) -> Candidate | None:
        """The candidate that a study forces on this session, where the configuration lets it."""
        wish = incoming.headers.get("x-soma-force", "")
        allowed = self._config.adaptation.allow_force_header
        return Candidate(wish) if allowed and wish in (Candidate.PLAIN, Candidate.ADAPTER) else None

    def _spawn(self, key: SessionKey, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work, name=f"soma-background-{key.session}")
        self._background[task] = key
        self.book.hold(key)
        task.add_done_callback(self._finished)

    def _finished(self, task: asyncio.Task[None]) -> None:
        key = self._background.pop(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("background work of a session failed", exc_info=error)
            if self.book.session(key).phase is Phase.ADAPTING:
                self.book.note(key, "training_failed", error=type(error).__name__, message="unexpected")
        self.book.release(key)


async def _listened(reply: Reply, started: float, ended: Ended) -> Reply:
    """The reply, with `ended` awaited once it is over."""
    if reply.events is not None:
        return replace(reply, events=Listened(reply.events, started, ended))
    assert reply.body is not None
    await ended(heard_whole(reply.body, started))
    return reply


def _ascii(text: str) -> str:
    """Text as a header can carry it."""
    return text.encode("ascii", "backslashreplace").decode()


def _instead(route: Route, asked: Asked, why: str) -> Route:
    """The original's route for a turn that was meant for the surrogate."""
    return replace(route, engine=Role.ORIGINAL, adapter=None, messages=asked.messages, reason=why)


def _repeats(session: Session, turn: Turn) -> bool:
    """Whether a turn is the session's last one asked again, word for word."""
    if turn.number != len(session.turns):
        return False
    return [says(m) for m in session.turns[-1].messages] == [says(m) for m in turn.messages]

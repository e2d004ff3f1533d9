"""What follows an answer: its turn is recorded, then adaptation or an audit may begin. No user waits for it.

Guarantees: a request that was repeated replaces its own turn and adds none; an answer to a history that has
gone on meanwhile begins a branch; of several requests at once the first whose answer ends is recorded first.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

from soma_vllm.adaptation.drift import DriftWatch
from soma_vllm.adaptation.pipeline import Adaptation
from soma_vllm.adaptation.shadow_answers import most_tokens
from soma_vllm.adaptation.teacher_logprobs import TeacherLogprobs
from soma_vllm.config import Config
from soma_vllm.engines.logprob_capture import LogprobCapture
from soma_vllm.engines.reply_parser import Choice, ParsedReply
from soma_vllm.scheduler.policies.base import TurnQuery
from soma_vllm.sessions.background_tasks import BackgroundTasks
from soma_vllm.sessions.lookup import SessionLookup
from soma_vllm.sessions.registry import SessionRegistry
from soma_vllm.sessions.state.adaptation_rules import AdaptationRules
from soma_vllm.sessions.state.events import EventKind
from soma_vllm.sessions.state.phases import Phase
from soma_vllm.sessions.state.prefix import compress
from soma_vllm.sessions.state.session import Session
from soma_vllm.sessions.state.transcript import TranscriptDigest, read, spoken
from soma_vllm.sessions.state.turn import Turn, turn_event
from soma_vllm.types import Candidate, Event, Role, Route, SessionKey

SOMA = AdaptationRules()


class TurnRecorder:
    """Folds answered turns into their sessions."""

    def __init__(
        self,
        config: Config,
        registry: SessionRegistry,
        adaptation: Adaptation,
        drift: DriftWatch,
        teacher_logprobs: TeacherLogprobs,
        background: BackgroundTasks,
    ) -> None:
        self._config = config
        self._registry = registry
        self._lookup = SessionLookup(registry)
        self._adaptation = adaptation
        self._drift = drift
        self._teacher_logprobs = teacher_logprobs
        self._background = background

    def record(
        self,
        key: SessionKey,
        phase: Phase,
        asked: TurnQuery,
        route: Route,
        heard: ParsedReply,
        *,
        lesson: LogprobCapture | None = None,
        response: str | None = None,
        adapting: AdaptationRules | None = SOMA,
        forced: Candidate | None = None,
    ) -> None:
        """Fold one answered turn into its session, then start what follows from it.

        `phase` is the one in which it was routed; `adapting` says how its policy has sessions adapted.
        """
        if not heard.complete and heard.silent:
            return  # the client left before anything was said: there is no turn
        if not self._registry.is_live(key):
            return  # it was removed, and nothing is to be left of it
        key = self._lookup.settle(key, asked.reading)
        try:
            turn, builds_on = self._turn(self._registry.session(key), phase, asked, route, heard, response)
            session = self._registry.record(
                key, *_events(turn, builds_on, heard.choices[1:], key.tenant, asked)
            )
            self._teacher_logprobs.keep(key, turn.number, heard, lesson)
            if adapting is not None:
                may_teach = session.turns_to_adaptation(self._config) is not None
                if may_teach and (why := turn.unteachable()):
                    self._registry.note(key, EventKind.TURN_SKIPPED, turn=turn.number, why=why)
                self._follow_up(key, session, turn, asked, adapting, forced)
        finally:
            self._registry.release(key)

    def _turn(
        self,
        session: Session,
        phase: Phase,
        asked: TurnQuery,
        route: Route,
        heard: ParsedReply,
        response: str | None,
    ) -> tuple[Turn, int]:
        """(the turn, how many turns on record its history repeats)."""
        overlap = session.overlap(asked.reading)
        said = _said(session.key.tenant, asked, heard.choices[0])
        turn = Turn(
            number=overlap.turns + 1,
            messages=asked.messages[overlap.end :],
            answer=heard.text,
            engine=route.engine,
            adapter=None if route.adapter is None else route.adapter.name,
            phase=phase,
            reason=route.reason,
            usage=heard.usage,
            ttft_s=heard.ttft_s,
            latency_s=heard.latency_s,
            most_tokens=most_tokens(asked.body),
            complete=heard.complete,
            calls=heard.choices[0].calls,
            chain=said.asked,
            asked=asked.reading.asked,
            links=tuple(mark.link for mark in said.marks if mark.end > overlap.end),
            left_out=overlap.left_out,
            response=response,
        )
        return turn, overlap.turns

    def _follow_up(
        self,
        key: SessionKey,
        session: Session,
        turn: Turn,
        asked: TurnQuery,
        adapting: AdaptationRules,
        forced: Candidate | None,
    ) -> None:
        idle = self._background.idle(key)
        unfinished = session.phase is Phase.ADAPTING and session.kept() and idle
        if session.wants_adaptation(self._config) or unfinished:
            if idle:
                rules = session.adapting if unfinished else None
                self._adaptation.start(key, forced, rules or adapting)
            return
        if adapting.gate and self._drift.wants(turn):
            shown = compress(asked.messages, self._config.prefix, self._config.compressed_prefix_turns)
            if turn.engine is Role.ORIGINAL:
                self._registry.note(key, EventKind.LOCALITY_MISS, turn=turn.number, distance=asked.distance)
            self._background.spawn(key, self._drift.audit(key, turn, asked.messages, shown))


def _events(turn: Turn, builds_on: int, others: Sequence[Choice], tenant: str, asked: TurnQuery) -> list[Event]:
    """The turn, and what else was answered to the same request (`n`): a client may go on from any of them."""
    now = time.time()
    variants = []
    for other in others:
        said = _said(tenant, asked, other)
        links = (*turn.links[:-1], said.marks[-1].link)
        variants.append(replace(turn, answer=other.text, calls=other.calls, chain=said.asked, links=links))
    return [
        turn_event(turn, builds_on, now),
        *(turn_event(variant, builds_on, now, EventKind.VARIANT) for variant in variants),
    ]


def _said(tenant: str, asked: TurnQuery, choice: Choice) -> TranscriptDigest:
    """The transcript that ends with this answer."""
    return read(tenant, [*asked.messages, spoken(choice.text, choice.calls)])

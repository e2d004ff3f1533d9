"""Records answered turns in their sessions.

Guarantees: a request that was repeated replaces its own turn and adds none; an answer to a history that has
gone on since begins a branch; of several requests at once the first whose answer ends is recorded first;
whatever the turn held is released, however its recording ends.
"""

from __future__ import annotations

import time
from dataclasses import replace

from soma_vllm.adaptation.evidence import TurnEvidence
from soma_vllm.adaptation.shadow_answers import most_tokens
from soma_vllm.engines.reply_parser import Choice, ParsedReply
from soma_vllm.scheduler.follow_up import FollowUp
from soma_vllm.scheduler.turn_context import TurnContext
from soma_vllm.sessions.ports import Meter
from soma_vllm.sessions.registry import SessionRegistry
from soma_vllm.sessions.state.events import EventKind
from soma_vllm.sessions.state.transcript import TranscriptDigest, spoken
from soma_vllm.sessions.state.turn import Turn, prompt_fields, turn_event


class TurnRecorder:
    """Folds answered turns into their sessions."""

    def __init__(
        self, registry: SessionRegistry, meter: Meter, evidence: TurnEvidence, follow_up: FollowUp
    ) -> None:
        self._registry = registry
        self._meter = meter
        self._evidence = evidence
        self._follow_up = follow_up

    async def record(self, turn: TurnContext, reply: ParsedReply) -> None:
        """End a turn: fold it into its session, then start what follows from it."""
        async with turn.released():
            self._meter.spent(turn.key.tenant, reply.usage)
            if not reply.complete and reply.silent:
                return  # the client left before the first word: there is no turn
            if not self._registry.is_live(turn.key):
                return  # it was removed, and nothing of it may be recorded
            turn.settle()
            recorded, *variants = _recorded(turn, reply)
            now, builds_on = time.time(), turn.overlap.turns
            session = self._registry.record(
                turn.key,
                turn_event(_written(recorded), builds_on, now),
                *(turn_event(_written(variant), builds_on, now, EventKind.VARIANT) for variant in variants),
            )
            if recorded.stored:
                self._evidence.keep(turn.key, recorded.number, reply, turn.capture)
            self._follow_up.begin(turn, session, recorded)


def _recorded(turn: TurnContext, reply: ParsedReply) -> list[Turn]:
    """The turn, and one for each other answer to the same request (`n`): a client may continue any of them."""
    overlap, route = turn.overlap, turn.route
    first, *others = reply.choices
    answered = _answered(turn, first)
    recorded = Turn(
        number=overlap.turns + 1,
        messages=turn.digest.messages[overlap.end :],
        answer=first.text,
        engine=route.engine,
        adapter=None if route.adapter is None else route.adapter.name,
        phase=turn.routed.phase,
        reason=str(route.reason),
        usage=reply.usage,
        ttft_s=reply.ttft_s,
        latency_s=reply.latency_s,
        most_tokens=most_tokens(turn.request.body),
        complete=reply.complete,
        calls=first.calls,
        chain=answered.asked,
        asked=turn.digest.asked,
        links=tuple(mark.link for mark in answered.marks if mark.end > overlap.end),
        left_out=overlap.left_out,
        response=turn.request.response,
        stored=turn.request.stored,
        fields=prompt_fields(turn.request.body),
    )
    return [recorded, *(_variant(recorded, other, _answered(turn, other)) for other in others)]


def _written(turn: Turn) -> Turn:
    return turn if turn.stored else turn.silent()


def _variant(recorded: Turn, other: Choice, answered: TranscriptDigest) -> Turn:
    links = (*recorded.links[:-1], answered.marks[-1].link)
    return replace(recorded, answer=other.text, calls=other.calls, chain=answered.asked, links=links)


def _answered(turn: TurnContext, choice: Choice) -> TranscriptDigest:
    """The transcript that ends with this answer."""
    return turn.digest.followed_by(spoken(choice.text, choice.calls))

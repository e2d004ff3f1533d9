"""Records answered turns in their sessions.

Guarantees: a request that was repeated replaces its own turn and adds none; an answer to a history that has
gone on since stands beside the turn that counts, in the session that the reply named; of several requests at
once the first whose answer ends is recorded first; whatever the turn held is released, however its recording
ends.
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

from soma_vllm.adaptation.evidence import TurnEvidence
from soma_vllm.adaptation.shadow_answers import most_tokens
from soma_vllm.engines.reply_parser import Choice, HeardWords, ParsedReply
from soma_vllm.engines.token_counts import counted
from soma_vllm.scheduler.follow_up import FollowUp
from soma_vllm.scheduler.turn_context import TurnContext
from soma_vllm.sessions.ports import Meter
from soma_vllm.sessions.registry import SessionRegistry
from soma_vllm.sessions.state.events import EventKind
from soma_vllm.sessions.state.transcript import TranscriptDigest, spoken, text_of
from soma_vllm.sessions.state.turn import Turn, prompt_fields, turn_event
from soma_vllm.types import Event


class TurnRecorder:
    """Folds answered turns into their sessions."""

    def __init__(
        self, registry: SessionRegistry, meter: Meter, evidence: TurnEvidence, follow_up: FollowUp
    ) -> None:
        self._registry = registry
        self._meter = meter
        self._evidence = evidence
        self._follow_up = follow_up
        self.heard = HeardWords(registry.config.server.replies_mib)
        """What the replies under way have said so far."""

    async def record(self, turn: TurnContext, reply: ParsedReply) -> None:
        """End a turn: fold it into its session, then start what follows from it."""
        async with turn.released():
            self._meter.spent(turn.key.tenant, counted(reply, turn.asked))
            if not reply.complete and reply.silent:
                return  # the client left before the first word: there is no turn
            if not self._registry.is_live(turn.key):
                return  # it was removed, and nothing of it may be recorded
            leads = turn.takes_the_line
            recorded, *variants = _recorded(turn, reply)
            now, builds_on = time.time(), turn.overlap.turns
            kind = EventKind.TURN if leads else EventKind.VARIANT
            session = self._registry.record(
                turn.key,
                _with_wording(turn_event(_written(recorded), builds_on, now, kind), turn),
                *(
                    turn_event(_written(variant), builds_on, now, EventKind.VARIANT, leads)
                    for variant in variants
                ),
            )
            if leads and recorded.stored:
                self._evidence.keep(turn.key, recorded.number, reply, turn.capture)
            if leads:
                self._follow_up.begin(turn, session, recorded)


def _recorded(turn: TurnContext, reply: ParsedReply) -> list[Turn]:
    """The turn, and one for each other answer to the same request (`n`): a client may continue any of them."""
    overlap, route, digest = turn.overlap, turn.route, turn.digest
    first, *others = reply.choices
    answer, answered = _answered(turn, first)
    before = replace(turn.session, turns=turn.session.turns[: overlap.turns])
    recorded = Turn(
        number=overlap.turns + 1,
        messages=digest.messages[overlap.end :],
        answer=answer,
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
        asked=digest.asked,
        links=tuple(mark.link for mark in answered.marks if mark.end > overlap.end),
        left_out=overlap.left_out,
        response=turn.request.response,
        said=answered.marks[-1].answer,
        query=digest.query,
        guard=digest.guard,
        begun=turn.begun is not None,
        head=digest.preamble if before.turns and before.preamble() != digest.preamble else None,
        stored=turn.request.stored,
        fields=prompt_fields(turn.request.body),
    )
    return [recorded, *(_variant(recorded, *_answered(turn, other), other) for other in others)]


def _written(turn: Turn) -> Turn:
    return turn if turn.stored else turn.silent()


def _variant(recorded: Turn, answer: str, answered: TranscriptDigest, choice: Choice) -> Turn:
    last = answered.marks[-1]
    links = (*recorded.links[:-1], last.link)
    said = replace(recorded, answer=answer, calls=choice.calls, said=last.answer)
    return replace(said, chain=answered.asked, links=links)


def _answered(turn: TurnContext, choice: Choice) -> tuple[str, TranscriptDigest]:
    """(the answer as clients keep it: with the beginning that they gave; the transcript that ends with it)."""
    answer = choice.text
    if turn.begun is not None and not turn.request.body.get("echo"):
        answer = text_of(turn.begun) + answer
    return answer, turn.digest.followed_by(spoken(answer, choice.calls))


def _with_wording(event: Event, turn: TurnContext) -> Event:
    """The event of a turn, with how the client's history words the earlier turns that it has changed since."""
    marks, begin = turn.digest.marks, 0
    data: dict[str, Any] = {}
    said: dict[str, Any] = {}
    for index, at in turn.overlap.found:
        earlier, mark = turn.session.turns[index], marks[at]
        if earlier.links[-1:] != (mark.link,):
            data[str(earlier.number)] = {"chain": mark.chain, "link": mark.link}
            said[str(earlier.number)] = [dict(m) for m in turn.digest.messages[begin : mark.end - 1]]
        begin = mark.end
    if not data:
        return event
    text = None if event.text is None else {**event.text, "reworded": said}
    return replace(event, data={**event.data, "reworded": data}, text=text)

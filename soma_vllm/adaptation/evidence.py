"""What is gathered while the original answers a turn, for a later adaptation of the session."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from soma_vllm.adaptation.shadow_traffic import ShadowTraffic
from soma_vllm.adaptation.teacher_logprobs import TeacherLogprobs
from soma_vllm.engines.logprob_capture import LogprobCapture
from soma_vllm.engines.reply_parser import ParsedReply
from soma_vllm.sessions.state.adaptation_rules import AdaptationRules
from soma_vllm.sessions.state.session import Session
from soma_vllm.sessions.state.turn_query import TurnQuery
from soma_vllm.types import SessionKey


class TurnEvidence:
    """The original's log-probabilities, and the surrogate's answers to the same turns."""

    def __init__(self, teacher_logprobs: TeacherLogprobs, shadow_traffic: ShadowTraffic) -> None:
        self._teacher_logprobs = teacher_logprobs
        self._shadow_traffic = shadow_traffic

    def begin(self, session: Session, query: TurnQuery, rules: AdaptationRules | None) -> Mapping[str, Any]:
        """Start the turn's shadow answer, if a verdict is near.

        Returns fields to add to the original's request; none where its log-probabilities are not wanted.
        """
        if rules is None:
            return {}
        self._shadow_traffic.begin(session, query, rules)
        return self._teacher_logprobs.fields(session, query.body)

    def keep(self, key: SessionKey, turn: int, reply: ParsedReply, capture: LogprobCapture | None) -> None:
        """Keep what was captured with a recorded turn; see `TeacherLogprobs.keep`."""
        self._teacher_logprobs.keep(key, turn, reply, capture)

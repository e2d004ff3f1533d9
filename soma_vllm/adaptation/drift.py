"""Watching a switched session for drift: sampled audits, and the turns that left the locality.

* A sampled turn of the surrogate is shown to the original, in the background, in one of two ways: it answers
  too (a gap), or it only reads the surrogate's answer in one prefill (a surprise, nats per token). Calls of
  tools are always answered too, and compared as in the warm start: others than the original's are a gap of 1.
* A turn that went to the original because it left the locality, or because the surrogate's call of a tool was
  malformed, is asked of the surrogate too: the original's answer is there already, so this evidence costs no
  time of the original.

Enough breaches in a row, of either kind, roll the session back. No reply waits for an audit: the original is
asked within a budget, while it serves no user or after a long wait for that, one audit at a time. An audit that
is given up or fails is one event, `audit_dropped`, with its reason.
"""

from __future__ import annotations

import logging
import random
from dataclasses import asdict, dataclass

from soma_vllm.adaptation.background_lane import BackgroundLane, JobDropped, TokenBucket
from soma_vllm.adaptation.shadow_answers import ShadowAnswers, comparable, shadow_reply, shadow_tokens
from soma_vllm.adaptation.tool_check import as_asked, call_gap, tool_tokens
from soma_vllm.adapters.lifecycle import AdapterLifecycle
from soma_vllm.config import Config
from soma_vllm.engines.engine import ChatCall, ScoringEngine
from soma_vllm.engines.reply_parser import Choice
from soma_vllm.engines.tool_calls import Mismatch
from soma_vllm.errors import AdapterError, EngineError
from soma_vllm.sessions.registry import SessionRegistry
from soma_vllm.sessions.state.events import Audited, AuditKind, EventKind
from soma_vllm.sessions.state.phases import Phase
from soma_vllm.sessions.state.session import Session
from soma_vllm.sessions.state.turn import Turn
from soma_vllm.types import AdapterRef, Message, ReasonCode, Role, SessionKey, chat_body

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Finding:
    """What one audit measured."""

    kind: AuditKind
    value: float
    top1: float | None = None
    """Share of the answer's tokens that are the original's own first choice, where it read them."""
    mismatch: Mismatch | None = None
    """How the surrogate's calls of tools differ from the original's, where they do."""


class DriftWatch:
    """Audits turns and rolls sessions back."""

    def __init__(
        self,
        config: Config,
        registry: SessionRegistry,
        original: ScoringEngine,
        shadow_answers: ShadowAnswers,
        adapters: AdapterLifecycle,
        lane: BackgroundLane,
    ) -> None:
        """`lane` runs jobs while the original has no users."""
        self._config = config
        self._registry = registry
        self._original = original
        self._shadow_answers = shadow_answers
        self._adapters = adapters
        self._lane = lane
        self._sample = random.Random(config.training.seed)
        self._budget = TokenBucket(config.gate.audits_per_minute)

    def wants(self, turn: Turn, why: ReasonCode) -> bool:
        """Whether this turn is to be audited: all locality misses and malformed calls, a share of the others.

        `why` says why its engine answered it.
        """
        if turn.phase is not Phase.SWITCHED or not turn.complete or not (turn.answer or turn.calls):
            return False
        if turn.engine is Role.ORIGINAL:
            return why in (ReasonCode.LOCALITY, ReasonCode.MALFORMED_CALL)
        return self._sample.random() < self._config.gate.audit_rate

    async def audit(
        self, key: SessionKey, turn: Turn, asked: tuple[Message, ...], shown: tuple[Message, ...]
    ) -> None:
        """Measure one turn and act on it. `asked` is the client's history, `shown` the surrogate's."""
        session = self._registry.session(key)
        try:
            if turn.engine is Role.SURROGATE:
                self._require_budget()
                found = await self._lane.run(lambda: self._ask_original(key, turn, asked, session))
                # Judged outside of the lane: a user who comes now costs nothing that is paid already.
                finding = found if isinstance(found, Finding) else await self._gap(turn, found)
            else:
                finding = await self._ask_surrogate(key, turn, shown, session.adapter)
            self._require_same(key, session)
        except (EngineError, AdapterError, JobDropped) as error:
            logger.info(
                "the audit of turn %d was dropped; the drift window stays as it is: %s", turn.number, error
            )
            self._registry.note(key, EventKind.AUDIT_DROPPED, turn=turn.number, reason=str(error))
            return
        await self._observe(key, turn, finding)

    async def _ask_surrogate(
        self, key: SessionKey, turn: Turn, shown: tuple[Message, ...], adapter: AdapterRef | None
    ) -> Finding:
        """The gap of what the surrogate would have answered in place of the original."""
        asked = as_asked(shown, turn.fields)
        shadow = await self._shadow_answers.reply(key.tenant, asked, self._limit(turn), adapter)
        return await self._gap(turn, shadow)

    async def _ask_original(
        self, key: SessionKey, turn: Turn, asked: tuple[Message, ...], before: Session
    ) -> Finding | Choice:
        """What the original makes of the surrogate's turn, or its own answer; cancelled at any moment."""
        self._require_same(key, before)  # it may have waited long
        if self._config.gate.audit == "generate" or turn.calls:  # calls cannot be read as an answer is
            body, limit = as_asked(asked, turn.fields), self._limit(turn)
            return await shadow_reply(self._original, key.tenant, body, limit)
        call = ChatCall(chat_body(asked, turn.fields), None, key.tenant, background=True)
        agreement = await self._original.score(call, turn.answer)
        return Finding("surprise", agreement.nll, agreement.top1)

    async def _gap(self, turn: Turn, shadow: Choice) -> Finding:
        if turn.calls or shadow.calls:
            ours = turn.engine is Role.SURROGATE
            original, surrogate = (shadow.calls, turn.calls) if ours else (turn.calls, shadow.calls)
            tools = turn.fields.get("tools")
            value, mismatch = await call_gap(self._shadow_answers, original, surrogate, tools)
            if mismatch is Mismatch.UNVERIFIABLE:
                raise JobDropped("the schema of the request's tools cannot be applied")
            return Finding("gap", value, mismatch=mismatch)
        answer = comparable(turn.answer, turn.length, self._limit(turn))
        (value,) = await self._shadow_answers.gaps([answer], [shadow.text])
        return Finding("gap", value)

    def _limit(self, turn: Turn) -> int:
        most = self._config.max_new_tokens
        return tool_tokens(most, turn.length) if turn.calls else shadow_tokens(most, turn.length)

    def _require_budget(self) -> None:
        if not self._budget.take():
            raise JobDropped(f"more than {self._config.gate.audits_per_minute:g} audits a minute")

    def _require_same(self, key: SessionKey, before: Session) -> None:
        """Keep an audit out of a drift window that it was not taken for.

        Raises:
            JobDropped: since then the session was rolled back, restarted or closed.
        """
        session = self._registry.session(key)
        if session.phase is not Phase.SWITCHED or session.switches != before.switches:
            raise JobDropped(f"the session left the switch that was audited and is {session.phase}")

    async def _observe(self, key: SessionKey, turn: Turn, finding: Finding) -> None:
        """Put a finding into the drift window, and roll back where that demands it."""
        audited = Audited(
            turn=turn.number,
            kind=finding.kind,
            gap=round(finding.value, 4) if finding.kind == "gap" else None,
            surprise=round(finding.value, 4) if finding.kind == "surprise" else None,
            top1=None if finding.top1 is None else round(finding.top1, 4),
            served_by=turn.engine,
        )
        differs = {} if finding.mismatch is None else {"calls": finding.mismatch.value}
        session = self._registry.note(key, EventKind.AUDITED, **audited.to_data(), **differs)
        if not session.drift.demands_rollback(self._config.gate):
            return
        adapter = session.adapter
        self._registry.note(
            key,
            EventKind.ROLLED_BACK,
            moving=round(session.drift.moving(), 4),
            window=[asdict(audit) for audit in session.drift.window],
            breaches=session.drift.breaches,
            drift_threshold=self._config.gate.drift_threshold,
            surprise_threshold=self._config.gate.surprise_threshold,
        )
        if adapter is not None:
            await self._adapters.retire(adapter, key)

"""The payback decision of a running server: its own sessions' lengths, and what its turns and trainings took.

Guarantees: lengths come from the session store's record, so that a restart loses none of them; they are read
at most once in `REFRESH_S`, by grouped queries; while the store is away the last ones stand. What turns and
trainings took is learned from events, from the configuration's expectations on, anew after every start. A turn
takes what its engine is busy for, not what its user waits, which would count an engine's second once for each
turn in it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from soma_vllm.adaptation.survival import (
    NOBODY,
    BusyTime,
    Costs,
    Judgement,
    Lengths,
    Mean,
    Survival,
    judge_payback,
    pooled_lengths,
)
from soma_vllm.config import Config
from soma_vllm.errors import StoreUnavailable
from soma_vllm.sessions.ports import Store
from soma_vllm.sessions.sql.records import LengthCount
from soma_vllm.sessions.state.events import EventKind, Judged, Trained
from soma_vllm.sessions.state.session import Session
from soma_vllm.sessions.state.turn import turn_of
from soma_vllm.types import Candidate, Event, Role, SessionKey

logger = logging.getLogger(__name__)

REFRESH_S = 60.0


class CostModel:
    """Judges whether an adapter pays. An observer of the events in `kinds`."""

    def __init__(self, config: Config, store: Store, clock: Callable[[], float] = time.time) -> None:
        self._config = config
        self._store = store
        self._clock = clock
        self._costs = Costs.expected(config.payback)
        self._lengths: Mapping[str, Lengths] = {}
        self._read_at: float | None = None
        self._busy = {role: BusyTime() for role in Role}
        self._on: Mapping[str, Callable[[Event], Costs]] = {
            EventKind.TURN: self._turn,
            EventKind.TRAINED: self._trained,
            EventKind.JUDGED: self._judged,
        }
        self.kinds = frozenset(self._on)

    def __call__(self, key: SessionKey, event: Event) -> None:
        """Learn from one event what things take."""
        self._costs = self._on[event.kind](event)

    async def judge(self, session: Session) -> Judgement:
        """Whether an adapter of this session is expected to pay."""
        await self._refresh()
        everybody = pooled_lengths(self._lengths.values())
        tenant = self._lengths.get(session.key.tenant, NOBODY)
        gate = self._config.gate
        return judge_payback(
            Survival(everybody, tenant, self._config.payback).remaining(len(session.turns)),
            self._costs,
            self._config.prices,
            audit_rate=gate.audit_rate,
            audit_reads=gate.audit == "score",
            held_out=self._config.acceptance_min_turns,
        )

    async def _refresh(self) -> None:
        now = self._clock()
        if self._read_at is not None and now - self._read_at < REFRESH_S:
            return
        try:
            found = await self._store.lengths(now - self._config.payback.over_after_s)
        except StoreUnavailable as error:
            logger.warning(
                "the session store did not answer; adapters are judged by the session lengths read last: %s",
                error,
            )
            return
        self._lengths, self._read_at = by_tenant(found), now

    def _turn(self, event: Event) -> Costs:
        costs, turn = self._costs, turn_of(event.data, None)
        latency, ttft = turn.latency_s, turn.ttft_s
        took = self._busy[turn.engine].add(event.at - latency, event.at, turn.complete)
        if not turn.complete:
            return costs
        if turn.engine is Role.SURROGATE:
            return replace(costs, surrogate_turn_s=costs.surrogate_turn_s.with_one(took))
        prefill = None if ttft is None or not latency else took * ttft / latency
        return replace(
            costs,
            original_turn_s=costs.original_turn_s.with_one(took),
            original_prefill_s=_with(costs.original_prefill_s, prefill),
            original_prompt_tokens=_with(costs.original_prompt_tokens, turn.usage.prompt_tokens),
            original_completion_tokens=_with(costs.original_completion_tokens, turn.usage.completion_tokens),
        )

    def _trained(self, event: Event) -> Costs:
        took = sum(Trained.from_data(event.data).stages.values())
        return replace(self._costs, training_s=self._costs.training_s.with_one(took))

    def _judged(self, event: Event) -> Costs:
        """An adapter was trained where the gate has its numbers; what a study forced does not count."""
        found = Judged.from_data(event.data).numbers.get("candidates", {}).get(Candidate.ADAPTER)
        if found is None:
            return self._costs
        return replace(self._costs, admitted=self._costs.admitted.with_one(float(found["passes"])))


def by_tenant(found: Sequence[LengthCount]) -> dict[str, Lengths]:
    """Each tenant's sessions by length."""
    over: dict[str, dict[int, int]] = {}
    live: dict[str, dict[int, int]] = {}
    for count in found:
        into = (over if count.over else live).setdefault(count.tenant, {})
        into[count.turns] = into.get(count.turns, 0) + count.sessions
    return {tenant: Lengths(over.get(tenant, {}), live.get(tenant, {})) for tenant in {*over, *live}}


def _with(mean: Mean, observed: float | None) -> Mean:
    return mean if observed is None else mean.with_one(observed)

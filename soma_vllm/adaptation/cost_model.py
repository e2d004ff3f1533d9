"""Whether an adapter pays: the turns a session is expected to have left, what each saves, and what it costs.

* Expected turns: of all dialogues on record that have reached as many turns, whatever their tenant, the further
  turns seen per dialogue that ended; `payback.weight` dialogues that went on for `payback.remaining_turns` are
  added to them. A dialogue that may still go on adds the turns it is known to have gone on for, and no end.
* Costs: exponential moving averages of what turns and trainings took since this server started, each beginning
  at the configuration's expectation. A turn takes the time in which its engine is busy, not the time that its
  user waits, which would count an engine's second once for each turn in it.

The plain switch is not asked whether it pays: it needs no training, and the shadow answers of the warm start,
its only cost of its own, are mostly made before it can be judged.

Guarantees: lengths come from the session store, so that a restart loses none; they are read at most once in
`REFRESH_S`, by grouped queries; while the store is away the last ones are used.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from soma_vllm.config import Gate, Payback, Prices
from soma_vllm.errors import StoreUnavailable
from soma_vllm.sessions.ports import Store
from soma_vllm.sessions.sql.records import LengthCount
from soma_vllm.sessions.state.events import EventKind, Judged, Trained
from soma_vllm.sessions.state.session import Session
from soma_vllm.types import Candidate, Event, Role, SessionKey

logger = logging.getLogger(__name__)

REFRESH_S = 60.0
MEMORY = 200.0
"""Observations that the past of an average weighs at most."""
MAX_SPANS = 1024
"""Spans of an engine's busy time that are remembered; idle times lie between them."""


def expected_turns(lengths: Iterable[LengthCount], reached: int, prior: Payback) -> float:
    """Expected further turns of a dialogue that has `reached` turns."""
    longer = [count for count in lengths if count.turns >= reached]
    further = sum(count.sessions * (count.turns - reached) for count in longer)
    ended = sum(count.sessions for count in longer if count.over)
    return (prior.weight * prior.remaining_turns + further) / (prior.weight + ended)


@dataclass
class Average:
    """A mean that begins with an expectation and turns into an exponential moving average after `MEMORY`."""

    value: float
    weight: float
    """Observations that it rests on, the expectation's among them."""

    def add(self, observed: float | None) -> None:
        """Take in one observation; None is none."""
        if observed is not None:
            self.weight = min(self.weight, MEMORY) + 1.0
            self.value += (observed - self.value) / self.weight


class BusyTime:
    """How long one engine was busy, from the spans of its turns in the order in which they end."""

    def __init__(self) -> None:
        self._spans: deque[tuple[float, float]] = deque(maxlen=MAX_SPANS)
        self._owed = 0.0

    def add(self, begin: float, end: float, counts: bool = True) -> float:
        """The seconds of a turn in which no turn before it was answered; 0 for one that does not count, whose
        seconds are added to the next turn's.

        Of concurrent turns the first to end has all the seconds that it shares with others, so that only an
        average over turns says what one takes.
        """
        if self._spans and end < self._spans[-1][1]:
            self._spans.clear()  # the clock was put back
        added, first = end - begin, begin
        while self._spans and self._spans[-1][1] > begin:
            earlier, until = self._spans.pop()
            added -= until - max(earlier, begin)
            first = min(first, earlier)
        self._spans.append((first, end))
        self._owed += max(0.0, added)
        if not counts:
            return 0.0
        added, self._owed = self._owed, 0.0
        return added


class Costs:
    """What this server has seen things take, seconds and tokens; an engine's are those in which it was busy."""

    def __init__(self, expected: Payback) -> None:
        weight = expected.weight
        self.original_turn_s = Average(expected.original_turn_s, weight)
        self.original_prefill_s = Average(expected.original_turn_s, weight)
        """Until the first token: what an audit takes that only reads."""
        self.original_prompt_tokens = Average(0.0, 0.0)
        self.original_completion_tokens = Average(0.0, 0.0)
        self.surrogate_turn_s = Average(expected.surrogate_turn_s, weight)
        self.training_s = Average(expected.training_s, weight)
        """Mining, fine-tuning and scoring."""
        self.admitted = Average(expected.admitted, weight)
        """Share of trained adapters that the gate let serve."""
        self._busy = {role: BusyTime() for role in Role}

    def learn(self, event: Event) -> None:
        """Take in what an event says about a cost, if it says anything."""
        if event.kind == EventKind.TURN:
            self._learn_turn(event)
        elif event.kind == EventKind.TRAINED:
            self.training_s.add(sum(Trained.from_data(event.data).stages.values()))
        elif event.kind == EventKind.JUDGED:
            # A verdict that a study forced has no numbers of its own and does not count.
            found = Judged.from_data(event.data).numbers.get("candidates", {}).get(Candidate.ADAPTER)
            self.admitted.add(None if found is None else float(found["passes"]))

    def original_turn(self, prices: Prices) -> float:
        """What a turn of the original costs: by the token where it has such a price, else by the second."""
        prompt, completion = prices.original_prompt_thousand, prices.original_completion_thousand
        if prompt is None and completion is None:
            return self.original_turn_s.value * prices.original_second
        tokens = self.original_prompt_tokens.value * (prompt or 0.0)
        return (tokens + self.original_completion_tokens.value * (completion or 0.0)) / 1000.0

    def _learn_turn(self, event: Event) -> None:
        data, latency = event.data, event.data["latency_s"]
        role = Role(data["engine"])
        took = self._busy[role].add(event.at - latency, event.at, data["complete"])
        if not data["complete"]:
            return
        if role is Role.SURROGATE:
            self.surrogate_turn_s.add(took)
            return
        usage, ttft = data["usage"], data["ttft_s"]
        self.original_turn_s.add(took)
        self.original_prefill_s.add(None if ttft is None or not latency else took * ttft / latency)
        self.original_prompt_tokens.add(usage["prompt_tokens"])
        self.original_completion_tokens.add(usage["completion_tokens"])


@dataclass(frozen=True)
class Judgement:
    """Whether an adapter is expected to pay, and from which numbers. All costs in the currency of `prices`."""

    remaining_turns: float
    saving_per_turn: float
    """The original's turn less the surrogate's and its share of an audit."""
    admitted: float
    """Chance that the gate lets the adapter serve."""
    cost: float
    """Mining, training and acceptance."""

    def numbers(self) -> dict[str, Any]:
        """For the event log, with the gain that was held against the cost."""
        rounded = {name: round(value, 4) for name, value in asdict(self).items()}
        return {"pays": self.pays, "gain": round(self.gain, 4), **rounded}

    @property
    def gain(self) -> float:
        """What the adapter is expected to save."""
        return self.admitted * self.remaining_turns * self.saving_per_turn

    @property
    def pays(self) -> bool:
        """Whether the gain is more than the cost."""
        return self.gain > self.cost


def judge_payback(turns: float, costs: Costs, prices: Prices, gate: Gate, held_out: int) -> Judgement:
    """Whether the turns that are still expected save more than an adapter costs.

    `held_out` is how many turns the surrogate answers to be judged on. An audit costs the original a prefill
    where the gate audits by scoring, else a turn.
    """
    original = costs.original_turn(prices)
    surrogate = costs.surrogate_turn_s.value * prices.surrogate_second
    reading = costs.original_prefill_s.value * prices.original_second
    saving = original - surrogate - gate.audit_rate * (reading if gate.audit == "score" else original)
    cost = costs.training_s.value * prices.trainer_second + held_out * surrogate
    return Judgement(turns, saving, costs.admitted.value, cost)


class CostModel:
    """Judges whether an adapter pays. An observer of the events in `kinds`."""

    kinds = frozenset({EventKind.TURN, EventKind.TRAINED, EventKind.JUDGED})

    def __init__(
        self,
        payback: Payback,
        prices: Prices,
        gate: Gate,
        held_out: int,
        store: Store,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """`held_out`: turns that a new adapter is judged on; `clock`: Unix time, seconds."""
        self._payback = payback
        self._prices = prices
        self._gate = gate
        self._held_out = held_out
        self._store = store
        self._clock = clock
        self._costs = Costs(payback)
        self._lengths: Sequence[LengthCount] = ()
        self._read_at: float | None = None

    def __call__(self, key: SessionKey, event: Event) -> None:
        """Learn from one event what things take."""
        self._costs.learn(event)

    async def judge(self, session: Session) -> Judgement:
        """Whether an adapter of this session is expected to pay."""
        await self._refresh()
        turns = expected_turns(self._lengths, len(session.turns), self._payback)
        return judge_payback(turns, self._costs, self._prices, self._gate, self._held_out)

    async def _refresh(self) -> None:
        now = self._clock()
        if self._read_at is not None and now - self._read_at < REFRESH_S:
            return
        try:
            self._lengths = await self._store.lengths(now - self._payback.over_after_s)
        except StoreUnavailable as error:
            logger.warning(
                "the session store did not answer; adapters are judged by the session lengths read last: %s",
                error,
            )
        else:
            self._read_at = now

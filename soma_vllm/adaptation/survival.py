"""Does an adapter pay? How many turns a session still has, what each would save, and what the adapter costs.

Pure arithmetic over observed session lengths and costs; `judge_payback` returns the numbers and the verdict, so
that a logged decision can be replayed with other prices.

Remaining turns: a session's length is a discrete survival time. The hazard h_t is the chance that a session
that has t turns gets no further one. Each hazard has a Beta posterior whose prior is a coarser hazard: for one
tenant the same turn of all tenants, for all tenants their mean over all turns, for that mean the configuration.
A session that may still go on is censored: it tells of those turns alone after which a further one came or
would count as missing by now. A turn of a moment ago tells nothing: counting the sessions that went on at
once, but not yet those that did not, would have them all last for ever. Beyond the longest session the mean
hazard goes on for ever, a geometric tail.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from soma_vllm.config import Payback, Prices


@dataclass(frozen=True)
class Lengths:
    """Sessions by the number of their turns."""

    over: Mapping[int, int]
    """How many ended after so many turns."""
    live: Mapping[int, int]
    """How many may still go on, by the turns that they are known to have gone on to."""

    def longest(self) -> int:
        """Most turns that any of them has; 0 without sessions."""
        return max((*self.over, *self.live), default=0)

    def ended(self, turns: int) -> int:
        """Sessions that ended after exactly so many turns."""
        return self.over.get(turns, 0)

    def went_on(self, turns: int) -> int:
        """Sessions known to have gone on after so many turns."""
        return sum(
            count for lengths in (self.over, self.live) for length, count in lengths.items() if length > turns
        )


NOBODY = Lengths({}, {})

NEGLIGIBLE = 1.0e-6
"""A chance of going on below which nothing more is added up."""


def pooled_lengths(lengths: Iterable[Lengths]) -> Lengths:
    """All of them together."""
    over: dict[int, int] = {}
    live: dict[int, int] = {}
    for one in lengths:
        for into, counts in ((over, one.over), (live, one.live)):
            for turns, count in counts.items():
                into[turns] = into.get(turns, 0) + count
    return Lengths(over, live)


class Survival:
    """How long sessions of one tenant go on."""

    def __init__(self, everybody: Lengths, tenant: Lengths, prior: Payback) -> None:
        self._everybody = everybody
        self._tenant = tenant
        self._weight = prior.weight
        ended = sum(everybody.over.values())
        every = [*everybody.over.items(), *everybody.live.items()]
        went_on = sum(count * (turns - 1) for turns, count in every)
        # A geometric length with hazard h goes on for (1 - h) / h turns on average.
        self._mean = self._posterior(1.0 / (1.0 + prior.remaining_turns), ended, went_on)

    def hazard(self, turns: int) -> float:
        """Chance that a session of the tenant that has so many turns has no further one."""
        shared = self._posterior(self._mean, self._everybody.ended(turns), self._everybody.went_on(turns))
        return self._posterior(shared, self._tenant.ended(turns), self._tenant.went_on(turns))

    def remaining(self, turns: int) -> float:
        """Expected further turns of a session that has so many."""
        expected, alive = 0.0, 1.0
        for number in range(turns, max(turns, self._everybody.longest()) + 1):
            alive *= 1.0 - self.hazard(number)
            expected += alive
            if alive < NEGLIGIBLE:
                return expected
        return expected + alive * (1.0 - self._mean) / self._mean

    def _posterior(self, prior: float, ended: int, went_on: int) -> float:
        """Mean of a hazard's Beta posterior; the prior weighs as much as `weight` sessions."""
        return (self._weight * prior + ended) / (self._weight + ended + went_on)


@dataclass(frozen=True)
class Mean:
    """A running mean that begins with an expectation and forgets what is long past."""

    value: float
    weight: float
    """Observations that it rests on, the expectation's among them."""

    MEMORY = 200.0
    """Observations that the past weighs at most."""

    def with_one(self, observed: float) -> Mean:
        """The mean after one more observation."""
        weight = min(self.weight, self.MEMORY) + 1.0
        return Mean(self.value + (observed - self.value) / weight, weight)


class BusyTime:
    """How long one engine was busy, from the spans of its turns in the order in which they end."""

    def __init__(self) -> None:
        self._spans: deque[tuple[float, float]] = deque(maxlen=MOST_SPANS)
        self._owed = 0.0

    def add(self, begin: float, end: float, counts: bool = True) -> float:
        """What a turn adds: its seconds in which none of the turns before it was answered; with those of the
        turns before it that do not count, whose own result is 0.

        Of turns beside each other the first to end has all the seconds that it shares with others, so that only
        a mean over turns says what one takes.
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


MOST_SPANS = 1024
"""Spans of an engine's busy time that are remembered; idle times lie between them."""


@dataclass(frozen=True)
class Costs:
    """What this server has seen things take, each from the configuration's expectation on. Seconds and
    tokens; an engine's are those in which it was busy."""

    original_turn_s: Mean
    original_prompt_tokens: Mean
    original_completion_tokens: Mean
    original_prefill_s: Mean
    """Until the first token: what an audit takes that only reads."""
    surrogate_turn_s: Mean
    training_s: Mean
    """Mining, fine-tuning and scoring."""
    admitted: Mean
    """Share of trained adapters that the gate let serve."""

    @classmethod
    def expected(cls, prior: Payback) -> Costs:
        """Before anything was seen."""

        def mean(value: float) -> Mean:
            return Mean(value, prior.weight)

        return cls(
            mean(prior.original_turn_s),
            Mean(0.0, 0.0),
            Mean(0.0, 0.0),
            mean(prior.original_turn_s),
            mean(prior.surrogate_turn_s),
            mean(prior.training_s),
            mean(prior.admitted),
        )


@dataclass(frozen=True)
class Judgement:
    """Whether an adapter is expected to pay, and from which numbers. All costs in the currency of `prices`."""

    pays: bool
    remaining_turns: float
    saving_per_turn: float
    """The original's turn less the surrogate's and its share of an audit."""
    admitted: float
    """Chance that the gate lets the adapter serve."""
    cost: float
    """Mining, training and acceptance."""

    def numbers(self) -> dict[str, Any]:
        """For the event log, with the gain that was held against the cost."""
        rounded = {name: round(value, 4) for name, value in asdict(self).items() if name != "pays"}
        return {"pays": self.pays, "gain": round(self.gain, 4), **rounded}

    @property
    def gain(self) -> float:
        """What the adapter is expected to save."""
        return self.admitted * self.remaining_turns * self.saving_per_turn


def judge_payback(
    remaining_turns: float,
    costs: Costs,
    prices: Prices,
    *,
    audit_rate: float,
    audit_reads: bool,
    held_out: int,
) -> Judgement:
    """Whether the turns that are still expected save more than an adapter costs.

    `audit_rate` is the share of the surrogate's turns that the original audits, by reading them or by answering
    too; `held_out` is how many turns the surrogate answers to be judged on.
    """
    original = _original_turn(costs, prices)
    surrogate = costs.surrogate_turn_s.value * prices.surrogate_second
    audit = costs.original_prefill_s.value * prices.original_second if audit_reads else original
    saving = original - surrogate - audit_rate * audit
    cost = costs.training_s.value * prices.trainer_second + held_out * surrogate
    admitted = costs.admitted.value
    pays = admitted * remaining_turns * saving > cost
    return Judgement(pays, remaining_turns, saving, admitted, cost)


def _original_turn(costs: Costs, prices: Prices) -> float:
    """What a turn of the original costs: by the token where it has such a price, else by the second."""
    prompt, completion = prices.original_prompt_thousand, prices.original_completion_thousand
    if prompt is None and completion is None:
        return costs.original_turn_s.value * prices.original_second
    tokens = costs.original_prompt_tokens.value * (prompt or 0.0)
    return (tokens + costs.original_completion_tokens.value * (completion or 0.0)) / 1000.0

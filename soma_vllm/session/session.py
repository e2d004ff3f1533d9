"""A session, and how events fold into it.

Guarantees: a `Session` is a value, made only by folding events in order, so that the event log alone restores
it; an event that may not happen in the session's phase changes nothing; the adapter is set only while the
phase is SWITCHED.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from soma_vllm.config import Config
from soma_vllm.session.gate import AuditKind, Drift, Vector
from soma_vllm.session.phases import Phase, after, may_happen
from soma_vllm.session.prefix import compress
from soma_vllm.session.transcript import fingerprint
from soma_vllm.types import AdapterRef, Candidate, Event, Example, Message, Role, SessionKey, Usage


@dataclass(frozen=True)
class Turn:
    """One answered turn."""

    number: int
    """1-based."""
    messages: tuple[Message, ...]
    """What the client added since the last answer: the query, and on turn 1 whatever came before it."""
    answer: str
    engine: Role
    adapter: str | None
    phase: Phase
    """The phase in which it was routed."""
    reason: str
    usage: Usage
    ttft_s: float | None
    latency_s: float
    gap: float | None = None
    """Filled by the audit of this turn, where there was one that generated."""
    surprise: float | None = None
    """Filled by the audit of this turn, where there was one that only read: nats per token."""
    complete: bool = True
    """False when generation was cut off: such a turn is neither learned from nor judged on."""

    def teaches(self) -> bool:
        """Whether this is a whole answer of the original to a query of the user's."""
        return self.unteachable() is None

    def unteachable(self) -> str | None:
        """Why this turn cannot be learned from or judged on; None where it can."""
        if not self.messages or self.messages[-1].get("role") != "user":
            return "it does not answer a query of the user's"
        if self.engine is not Role.ORIGINAL:
            return "the original did not answer it"
        if not self.complete:
            return "its answer was cut off"
        return None if self.answer.strip() else "its answer is empty"


@dataclass(frozen=True)
class Session:
    """Everything the server knows of one dialogue."""

    key: SessionKey
    phase: Phase = Phase.WARM_START
    turns: tuple[Turn, ...] = ()
    serving: Candidate = Candidate.ORIGINAL
    """Who serves it in phase SWITCHED."""
    adapter: AdapterRef | None = None
    centroid: tuple[float, ...] | None = None
    """Mean embedding of the warm start's queries, filled by the switch."""
    drift: Drift = field(default_factory=Drift)
    warm_from: int = 0
    """Turns before the present warm start; 0 until the first rollback."""
    learned: int = 0
    """Turns, counted from the first, that the present adaptation rests on."""
    trainings: int = 0
    switches: int = 0
    rollbacks: int = 0
    forced: Candidate | None = None

    def transcript(self, turns: int | None = None) -> tuple[Message, ...]:
        """All messages of the first `turns` turns, answers included."""
        messages: list[Message] = []
        for turn in self.turns[:turns]:
            messages += [*turn.messages, {"role": "assistant", "content": turn.answer}]
        return tuple(messages)

    def chain(self) -> str:
        """Fingerprint of the transcript so far: by it the next request of this dialogue is recognised."""
        return fingerprint(self.transcript())

    def warm_turns(self) -> tuple[Turn, ...]:
        """Turns of the present warm start that can be learned from."""
        return tuple(turn for turn in self.turns[self.warm_from :] if turn.teaches())

    def wants_adaptation(self, config: Config) -> bool:
        """True once the warm start, or the cool-down after a rollback, is complete."""
        if self.phase is Phase.WARM_START:
            return len(self.warm_turns()) >= config.warm_window
        if self.phase is Phase.ROLLED_BACK:
            # Doubled every time, so that a session that comes and goes does it ever more rarely.
            cool_down = config.adaptation.cool_down_turns * 2 ** (self.rollbacks - 1)
            enough = max(cool_down, config.acceptance_min_turns + 1)
            return self.trainings < config.adaptation.max_trainings and len(self.warm_turns()) >= enough
        return False

    def examples(self, config: Config) -> tuple[tuple[Example, ...], tuple[Example, ...]]:
        """(to train on, held out to judge on): the last `acceptance_min_turns` warm turns are never trained on.

        Each example's messages are what the surrogate would have been shown under the configured prefix.
        """
        chosen = self.warm_turns()[-config.warm_window :]
        examples = tuple(
            Example(
                turn.number,
                compress(
                    (*self.transcript(turn.number - 1), *turn.messages),
                    config.prefix,
                    config.compressed_prefix_turns,
                ),
                turn.answer,
            )
            for turn in chosen
        )
        held_out = config.acceptance_min_turns
        return examples[:-held_out], examples[-held_out:]

    def centroid_vector(self) -> Vector | None:
        """The centroid as an array, shape (d,)."""
        return None if self.centroid is None else np.asarray(self.centroid, dtype=np.float32)


def restore(key: SessionKey, events: Iterable[Event], config: Config) -> Session:
    """The session that a log of events describes."""
    session = Session(key)
    for event in events:
        session = fold(session, event, config)
    return session


def fold(session: Session, event: Event, config: Config) -> Session:
    """The session after one event; unchanged when the event may not happen in its phase."""
    if not may_happen(session.phase, event.kind):
        return session
    moved = replace(session, phase=after(session.phase, event.kind))
    apply = _APPLY.get(event.kind)
    return moved if apply is None else apply(moved, event.data, config)


def turn_event(turn: Turn, builds_on: int, at: float) -> Event:
    """The event of an answered turn. `builds_on` is how many recorded turns the client's history repeated."""
    data = asdict(turn) | {"builds_on": builds_on}
    data["messages"] = [dict(message) for message in turn.messages]
    return Event("turn", at, data)


def _turn(session: Session, data: Mapping[str, Any], config: Config) -> Session:
    turn = Turn(
        number=data["builds_on"] + 1,
        messages=tuple(data["messages"]),
        answer=data["answer"],
        engine=Role(data["engine"]),
        adapter=data["adapter"],
        phase=Phase(data["phase"]),
        reason=data["reason"],
        usage=Usage(**data["usage"]),
        ttft_s=data["ttft_s"],
        latency_s=data["latency_s"],
        complete=data["complete"],
    )
    builds_on = data["builds_on"]
    kept = session.turns[:builds_on]
    return replace(session, turns=(*kept, turn), warm_from=min(session.warm_from, builds_on))


def _adaptation_started(session: Session, data: Mapping[str, Any], config: Config) -> Session:
    forced = data.get("forced")
    return replace(
        session, learned=len(session.turns), forced=None if forced is None else Candidate(forced), adapter=None
    )


def _training_submitted(session: Session, data: Mapping[str, Any], config: Config) -> Session:
    return replace(session, trainings=session.trainings + 1)


def _switched(session: Session, data: Mapping[str, Any], config: Config) -> Session:
    ref = data.get("adapter")
    return replace(
        session,
        serving=Candidate(data["candidate"]),
        adapter=None if ref is None else AdapterRef(**ref),
        centroid=tuple(data["centroid"]),
        drift=Drift(),
        switches=session.switches + 1,
    )


def _audited(session: Session, data: Mapping[str, Any], config: Config) -> Session:
    number = data["turn"]
    kind: AuditKind = "gap" if data.get("kind", "gap") == "gap" else "surprise"
    found = {kind: data[kind]}
    turns = tuple(replace(t, **found) if t.number == number else t for t in session.turns)
    session = replace(session, turns=turns)
    if session.phase is not Phase.SWITCHED:
        return session
    return replace(session, drift=session.drift.observe(kind, data[kind], config.gate))


def _rolled_back(session: Session, data: Mapping[str, Any], config: Config) -> Session:
    return replace(
        session,
        serving=Candidate.ORIGINAL,
        adapter=None,
        centroid=None,
        drift=Drift(),
        warm_from=len(session.turns),
        learned=0,
        rollbacks=session.rollbacks + 1,
    )


def _rewound(session: Session, data: Mapping[str, Any], config: Config) -> Session:
    fresh = Session(
        session.key, trainings=session.trainings, switches=session.switches, rollbacks=session.rollbacks
    )
    return replace(fresh, turns=session.turns[: data["to"]])


def _closed(session: Session, data: Mapping[str, Any], config: Config) -> Session:
    return replace(session, serving=Candidate.ORIGINAL, adapter=None)


_APPLY = {
    "turn": _turn,
    "adaptation_started": _adaptation_started,
    "training_submitted": _training_submitted,
    "switched": _switched,
    "audited": _audited,
    "rolled_back": _rolled_back,
    "rewound": _rewound,
    "closed": _closed,
}

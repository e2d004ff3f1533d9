"""How events fold into a session: one function for each kind, and the table of them.

Guarantees: the event log alone restores a session; an event that may not happen in the session's phase changes
nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, replace

from soma_vllm.config import Gate
from soma_vllm.sessions.state.adaptation_rules import adapting_of
from soma_vllm.sessions.state.events import Audited, EventKind, Switched
from soma_vllm.sessions.state.gate import Drift
from soma_vllm.sessions.state.phases import Phase, after, may_happen
from soma_vllm.sessions.state.session import Session, fresh
from soma_vllm.sessions.state.turn import Turn, turn_event, turn_of
from soma_vllm.types import Candidate, Event, Role, SessionKey


def restore(key: SessionKey, events: Iterable[Event], gate: Gate) -> Session:
    """The session that a log of events describes."""
    session = fresh(key)
    for event in events:
        session = fold(session, event, gate)
    return session


def fold(session: Session, event: Event, gate: Gate) -> Session:
    """The session after one event; unchanged when the event may not happen in its phase."""
    if not may_happen(session.phase, event.kind):
        return session
    moved = replace(session, phase=after(session.phase, event.kind))
    apply = _APPLY.get(event.kind)
    return moved if apply is None else apply(moved, event, gate)


MOST_TIPS = 64
"""Other answers beside the last turn's that are kept in a session, the latest ones."""
MOST_ASIDES = 32
"""Queries aside that are remembered, the latest ones."""


def branch_event(parent: Session, turns: Sequence[Turn], at: float, cause: str = "", why: str = "") -> Event:
    """The first event of a session that begins with some turns of another; `cause` is one of few words, `why` a
    sentence without conversation text."""
    events = [turn_event(turn, turn.number - 1, at) for turn in turns]
    data = {
        "of": parent.key.session,
        "family": parent.family,
        "rollbacks": parent.rollbacks,
        "refusals": parent.refusals,
        "cool_downs": parent.cool_downs,
        "learned": min(parent.learned, len(turns)),
        "turns": [event.data for event in events],
        "cause": cause,
        "why": why,
    }
    texts = [event.text for event in events]
    return Event(EventKind.BRANCHED, at, data, None if None in texts else {"turns": texts})


def inheritance(parent: Session, turns: Sequence[Turn], at: float) -> Event | None:
    """What a branch takes over from its parent: who serves it, if that was learned from common turns alone."""
    learned = parent.learned
    common = len(turns) >= learned > 0 and turns[learned - 1].chain == parent.turns[learned - 1].chain
    if parent.phase is not Phase.SWITCHED or not common:
        return None
    data = {
        "candidate": parent.serving,
        "reason": f"learned from the first {learned} turns, which both branches have",
        "adapter": None if parent.adapter is None else asdict(parent.adapter),
        "centroid": None if parent.centroid is None else list(parent.centroid),
        "tools": list(parent.tools),
        "learned": learned,
        "adapting": None if parent.adapting is None else asdict(parent.adapting),
    }
    return Event(EventKind.INHERITED, at, data)


def _turn(session: Session, event: Event, gate: Gate) -> Session:
    builds_on = event.data["builds_on"]
    turn = turn_of(event.data, event.text)
    kept, gone = _reworded(session.turns[:builds_on], event), session.turns[builds_on:]
    last = kept[-1] if kept else None
    beside = [tip for tip in session.tips if last is not None and tip.number == last.number]
    asides = [tip.query for tip in beside if last is not None and tip.query != last.query]
    asides += [other.query for other in gone[:1] if other.query != turn.query]
    tips = [tip for tip in (*session.tips, *gone) if tip.number <= turn.number and tip.chain != turn.chain]
    return replace(
        session,
        turns=(*kept, turn),
        tips=tuple(tips[-MOST_TIPS:]),
        asides=_latest((*session.asides, *asides)),
        warm_from=min(session.warm_from, builds_on),
    )


def _variant(session: Session, event: Event, gate: Gate) -> Session:
    turn = turn_of(event.data, event.text)
    if turn.number not in (len(session.turns), len(session.turns) + 1):
        return session
    if turn.kept and not turn.messages and turn.number == len(session.turns):
        turn = replace(turn, messages=session.turns[-1].messages, fields=session.turns[-1].fields)
    others = [tip for tip in session.tips if tip.chain != turn.chain]
    return replace(session, tips=(*others, turn)[-MOST_TIPS:])


def _resumed(session: Session, event: Event, gate: Gate) -> Session:
    (tip,) = [tip for tip in session.tips if tip.chain == event.data["chain"]][:1] or (None,)
    if tip is None:
        return session
    kept, gone = session.turns[: tip.number - 1], session.turns[tip.number - 1 :]
    asides = [other.query for other in gone if other.query != tip.query]
    return replace(
        session,
        turns=(*kept, tip),
        tips=tuple(other for other in (*session.tips, *gone) if other.chain != tip.chain)[-MOST_TIPS:],
        asides=_latest(query for query in (*session.asides, *asides) if query != tip.query),
        warm_from=min(session.warm_from, len(kept)),
    )


def _latest(queries: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(query for query in queries if query))[-MOST_ASIDES:]


def _reworded(turns: tuple[Turn, ...], event: Event) -> tuple[Turn, ...]:
    """Earlier turns as a later request's history has them."""
    new: Mapping[str, Mapping[str, str]] = event.data.get("reworded") or {}
    if not new:
        return turns
    said = (event.text or {}).get("reworded") or {}
    return tuple(
        turn
        if (found := new.get(str(turn.number))) is None
        else turn.reworded(found["chain"], found["link"], said.get(str(turn.number)))
        for turn in turns
    )


def _branched(session: Session, event: Event, gate: Gate) -> Session:
    data = event.data
    texts = (event.text or {}).get("turns") or [None] * len(data["turns"])
    turns = tuple(turn_of(turn, text) for turn, text in zip(data["turns"], texts, strict=True))
    inherited = {name: data.get(name, 0) for name in ("rollbacks", "refusals", "cool_downs", "learned")}
    return replace(session, family=data["family"], turns=turns, why=data.get("why", ""), **inherited)


def _inherited(session: Session, event: Event, gate: Gate) -> Session:
    switched = _switched(session, event, gate)
    return replace(switched, learned=event.data["learned"], adapting=adapting_of(event.data))


def _turn_skipped(session: Session, event: Event, gate: Gate) -> Session:
    return session.skipping(event.data["turn"], event.data["why"])


def _adaptation_started(session: Session, event: Event, gate: Gate) -> Session:
    forced = event.data.get("forced")
    return replace(
        session,
        learned=len(session.turns),
        adapting=adapting_of(event.data),
        attempts=session.attempts + 1,
        forced=None if forced is None else Candidate(forced),
        adapter=None,
    )


def _training_submitted(session: Session, event: Event, gate: Gate) -> Session:
    return replace(session, trainings=session.trainings + 1)


def _switched(session: Session, event: Event, gate: Gate) -> Session:
    found = Switched.from_data(event.data)
    return replace(
        session,
        serving=found.candidate,
        adapter=found.adapter,
        centroid=found.centroid,
        tools=found.tools,
        drift=Drift(),
        attempts=0,
        switches=session.switches + 1,
    )


def _audited(session: Session, event: Event, gate: Gate) -> Session:
    found = Audited.from_data(event.data)
    turns = tuple(t.audited(found) if t.number == found.turn else t for t in session.turns)
    session = replace(session, turns=turns)
    if session.phase is not Phase.SWITCHED:
        return session
    return replace(session, drift=session.drift.observe(found.kind, found.value, gate))


def _refused(session: Session, event: Event, gate: Gate) -> Session:
    wanting = bool(event.data.get("found_wanting"))
    refusals = session.refusals + wanting
    return replace(session, attempts=0, refusals=refusals, cool_downs=session.cool_downs + 1)


def _rolled_back(session: Session, event: Event, gate: Gate) -> Session:
    back = _adapter_evicted(session, event, gate)
    return replace(back, rollbacks=session.rollbacks + 1, cool_downs=session.cool_downs + 1)


def _adapter_evicted(session: Session, event: Event, gate: Gate) -> Session:
    # No rollback: nothing speaks against the surrogate, so its next candidate is judged as this one was.
    return replace(_unserved(session), drift=Drift(), warm_from=len(session.turns), learned=0)


def _restarted(session: Session, event: Event, gate: Gate) -> Session:
    return replace(_unserved(session), drift=Drift(), attempts=0, warm_from=0, learned=0, cool_downs=0)


def _pinned(session: Session, event: Event, gate: Gate) -> Session:
    engine = event.data["engine"]
    return replace(session, pinned=None if engine is None else Role(engine))


def _closed(session: Session, event: Event, gate: Gate) -> Session:
    return replace(session, serving=Candidate.ORIGINAL, adapter=None)


def _unserved(session: Session) -> Session:
    """The session without what a switch gave it."""
    return replace(session, serving=Candidate.ORIGINAL, adapter=None, centroid=None, tools=())


_APPLY: Mapping[str, Callable[[Session, Event, Gate], Session]] = {
    EventKind.TURN: _turn,
    EventKind.VARIANT: _variant,
    EventKind.RESUMED: _resumed,
    EventKind.TURN_SKIPPED: _turn_skipped,
    EventKind.ADAPTATION_STARTED: _adaptation_started,
    EventKind.TRAINING_SUBMITTED: _training_submitted,
    EventKind.SWITCHED: _switched,
    EventKind.AUDITED: _audited,
    EventKind.REFUSED: _refused,
    EventKind.TRAINING_FAILED: _refused,
    EventKind.ROLLED_BACK: _rolled_back,
    EventKind.ADAPTER_EVICTED: _adapter_evicted,
    EventKind.BRANCHED: _branched,
    EventKind.INHERITED: _inherited,
    EventKind.RESTARTED: _restarted,
    EventKind.PINNED: _pinned,
    EventKind.CLOSED: _closed,
}

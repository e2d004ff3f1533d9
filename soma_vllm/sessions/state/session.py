"""A session, and how events fold into it.

Guarantees: a `Session` is a value, made only by folding events in order, so that the event log alone restores
it; an event that may not happen in the session's phase changes nothing; the adapter is set only while the
phase is SWITCHED; what was said is needed to learn from, and for nothing else: a session whose text was
erased is recognised, served and rolled back as before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from soma_vllm.config import Config
from soma_vllm.sessions.state.adaptation_rules import AdaptationRules, adapting_of
from soma_vllm.sessions.state.events import EventKind
from soma_vllm.sessions.state.gate import AuditKind, Drift, Vector
from soma_vllm.sessions.state.phases import COOLING_DOWN, Phase, after, may_happen
from soma_vllm.sessions.state.prefix import compress
from soma_vllm.sessions.state.transcript import TranscriptDigest, preamble, spoken, text_of
from soma_vllm.sessions.state.truncated_history import Overlap, trimmed
from soma_vllm.types import AdapterRef, Candidate, Event, Example, Length, Message, Role, SessionKey, Usage


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
    most_tokens: int | None = None
    """The longest answer that the client wanted; None where it did not say."""
    complete: bool = True
    """False when generation was cut off: such a turn is neither learned from nor judged on."""
    calls: tuple[Mapping[str, Any], ...] = ()
    """Calls of tools in the answer, as OpenAI's `tool_calls`."""
    chain: str = ""
    """Digest of the transcript up to and including this answer (`sessions/state/transcript.py`)."""
    asked: str = ""
    """Digest of the request that it answered: a request of the same digest is the same one, repeated."""
    links: tuple[str, ...] = ()
    """Digests of the exchanges that it added, its own last: more than one where the client's history had some
    that are not on record."""
    left_out: tuple[int, int] | None = None
    """Earlier turns that the client's history lacked, as the bounds of a slice: it had dropped them."""
    response: str | None = None
    """Id under which a client may name it (OpenAI's Responses API)."""
    kept: bool = True
    """False where `messages`, `answer` and `calls` were erased, or never kept, and are empty."""
    skip: str | None = None
    """What `unteachable` said while the text was there; filled by the record."""

    @property
    def length(self) -> Length:
        """How long the answer is, and might have been."""
        return Length(self.usage.completion_tokens, self.most_tokens)

    def teaches(self) -> bool:
        """Whether this is a whole answer of the original to a query of the user's."""
        return self.unteachable() is None

    def unteachable(self) -> str | None:
        """Why this turn cannot be learned from or judged on; None where it can."""
        if not self.kept:
            return self.skip
        if not self.messages or self.messages[-1].get("role") != "user":
            return "it does not answer a query of the user's"
        if self.engine is not Role.ORIGINAL:
            return "the original did not answer it"
        if not self.complete:
            return "its answer was cut off"
        if self.calls:
            return "its answer calls a tool"
        return None if self.answer.strip() else "its answer is empty"

    def silent(self) -> Turn:
        """The same turn without its text."""
        return replace(self, messages=(), answer="", calls=(), kept=False, skip=self.unteachable())

    def voiced(self, messages: Sequence[Message]) -> Turn:
        """The same turn with its text as a client sent it back: the messages that were new, then the answer."""
        *added, said = messages
        calls = tuple(said.get("tool_calls") or ())
        return replace(self, messages=tuple(added), answer=text_of(said), calls=calls, kept=True)


@dataclass(frozen=True)
class Session:
    """Everything the server knows of one dialogue."""

    key: SessionKey
    family: str = ""
    """The id that a client gave, which all branches of its dialogue share; "" for one known by transcript."""
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
    refusals: int = 0
    """Verdicts that found every candidate wanting."""
    cool_downs: int = 0
    """How often it was left with the original for a while: rolled back, refused for whatever reason, or not
    trained because that failed. An administrator who asks for an adaptation has them forgotten."""
    adapting: AdaptationRules | None = None
    """By which rules the present or latest adaptation goes; None before the first."""
    forced: Candidate | None = None
    pinned: Role | None = None
    """The engine that an administrator bound it to."""

    def transcript(self, turns: int | None = None) -> tuple[Message, ...]:
        """All messages of the first `turns` turns, answers included."""
        messages: list[Message] = []
        for turn in self.turns[:turns]:
            messages += [*turn.messages, spoken(turn.answer, turn.calls)]
        return tuple(messages)

    def chain(self) -> str:
        """Digest of the transcript so far, "" before the first turn: by it the next request is recognised."""
        return self.turns[-1].chain if self.turns else ""

    def kept(self) -> bool:
        """Whether the whole transcript is at hand."""
        return all(turn.kept for turn in self.turns)

    def seen_before(self, turn: Turn) -> tuple[Message, ...]:
        """What of the transcript before a turn its client still had."""
        transcript, numbers = self.transcript, turn.number - 1
        if turn.left_out is None:
            return transcript(numbers)
        first, last = turn.left_out
        dropped = len(transcript(last))
        head = transcript(first) if first else tuple(preamble(self.turns[0].messages))
        return (*head, *transcript(numbers)[dropped:])

    def seen_last(self) -> tuple[Message, ...]:
        """The transcript so far as its client still has it."""
        if not self.turns:
            return ()
        last = self.turns[-1]
        return (*self.seen_before(last), *last.messages, spoken(last.answer, last.calls))

    def overlap(self, reading: TranscriptDigest) -> Overlap:
        """Where a request's history agrees with the record: whole, or with turns left out."""
        ends = {mark.chain: mark.end for mark in reading.marks}
        whole = Overlap(0, 0)
        for turn in reversed(self.turns):
            if (end := ends.get(turn.chain)) is not None:
                whole = Overlap(turn.number, end)
                break
        if not reading.marks or whole.turns == len(self.turns) or whole.end == reading.marks[-1].end:
            return whole
        partly = trimmed([turn.links for turn in self.turns], reading)
        return whole if partly is None or partly.turns <= whole.turns else partly

    def repeated(self, reading: TranscriptDigest) -> tuple[int, tuple[Message, ...]]:
        """How many recorded turns a request's history goes on from, and the messages that follow them."""
        overlap = self.overlap(reading)
        return overlap.turns, reading.messages[overlap.end :]

    def continued_by(self, reading: TranscriptDigest) -> bool:
        """Whether a request is this session's next turn, or its last one asked again; one that was cut off may
        be asked otherwise too, or gone on from with less of its answer than was recorded."""
        count = self.overlap(reading).turns
        cut_off = bool(self.turns) and not self.turns[-1].complete
        return (
            count == len(self.turns)
            or self.asked_again_by(reading)
            or (cut_off and count == len(self.turns) - 1)
        )

    def ended_by(self, reading: TranscriptDigest) -> bool:
        """Whether a request's history ends where this session does."""
        overlap = self.overlap(reading)
        return overlap.turns == len(self.turns) > 0 and overlap.end == reading.marks[-1].end

    def asked_again_by(self, reading: TranscriptDigest) -> bool:
        """Whether a request is the one that the last turn answered."""
        return bool(self.turns) and self.turns[-1].asked == reading.asked

    def without_text(self) -> Session:
        """The same session, silent."""
        return replace(self, turns=tuple(turn.silent() if turn.kept else turn for turn in self.turns))

    def with_text(self, reading: TranscriptDigest) -> Session:
        """The same session, where a request's history says what its turns said."""
        if self.kept():
            return self
        ends = {mark.chain: mark.end for mark in reading.marks}
        turns, begin = list(self.turns), 0
        for index, turn in enumerate(self.turns):
            end = ends.get(turn.chain)
            if end is None:
                break
            if not turn.kept:
                turns[index] = turn.voiced(reading.messages[begin:end])
            begin = end
        return replace(self, turns=tuple(turns))

    def warm_turns(self) -> tuple[Turn, ...]:
        """Turns of the present warm start that can be learned from."""
        return tuple(turn for turn in self.turns[self.warm_from :] if turn.teaches())

    @property
    def setbacks(self) -> int:
        """How often the surrogate was found wanting, before it served or while it did: for that, not for a
        trainer that broke down, must it be better the next time."""
        return self.rollbacks + self.refusals

    def wants_adaptation(self, config: Config) -> bool:
        """True once the warm start, or a cool-down, is complete, with text to learn from."""
        missing = self.turns_to_adaptation(config)
        return missing is not None and missing <= 0

    def turns_to_adaptation(self, config: Config) -> int | None:
        """Turns that teach, and that are missing until the session is to be adapted; None: it is not to be.

        After a rollback the surrogate is judged on what came since; after a refusal on the latest turns, once
        enough of them are new. Each cool-down is twice as long as the last, so that a session that comes and
        goes, or never passes, is tried ever more rarely; so are its branches.
        """
        if self.pinned is not None or not self.kept():
            return None
        warm = len(self.warm_turns())
        since = sum(turn.teaches() for turn in self.turns[max(self.warm_from, self.learned) :])
        cool_down: int = config.adaptation.cool_down_turns * 2 ** max(0, self.cool_downs - 1)
        if self.phase is Phase.WARM_START:
            return max(config.warm_window - warm, cool_down - since if self.cool_downs else 0)
        if self.phase not in COOLING_DOWN or self.trainings >= config.adaptation.max_trainings:
            return None
        return max(cool_down - since, config.acceptance_min_turns + 1 - warm)

    def warm_examples(self, config: Config) -> tuple[Example, ...]:
        """The latest warm turns, `warm_window` at most. Each one's messages are what the surrogate would have
        been shown under the configured prefix."""
        return tuple(
            Example(
                turn.number,
                compress(
                    (*self.seen_before(turn), *turn.messages),
                    config.prefix,
                    config.compressed_prefix_turns,
                ),
                turn.answer,
                length=turn.length,
            )
            for turn in self.warm_turns()[-config.warm_window :]
        )

    def examples(self, config: Config) -> tuple[tuple[Example, ...], tuple[Example, ...]]:
        """(to train on, held out to judge on): the last `acceptance_min_turns` warm turns are never trained on,
        where there is a gate to judge on them."""
        examples = self.warm_examples(config)
        if self.adapting is not None and not self.adapting.gate:
            return examples, ()
        held_out = config.acceptance_min_turns
        return examples[:-held_out], examples[-held_out:]

    def centroid_vector(self) -> Vector | None:
        """The centroid as an array, shape (d,)."""
        return None if self.centroid is None else np.asarray(self.centroid, dtype=np.float32)


RECOGNISED = "auto-"
"""Beginning of the ids of sessions that are known by their transcript."""


def fresh(key: SessionKey) -> Session:
    """A session without turns."""
    return Session(key, "" if key.session.startswith(RECOGNISED) else key.session)


def restore(key: SessionKey, events: Iterable[Event], config: Config) -> Session:
    """The session that a log of events describes."""
    session = fresh(key)
    for event in events:
        session = fold(session, event, config)
    return session


def fold(session: Session, event: Event, config: Config) -> Session:
    """The session after one event; unchanged when the event may not happen in its phase."""
    if not may_happen(session.phase, event.kind):
        return session
    moved = replace(session, phase=after(session.phase, event.kind))
    apply = _APPLY.get(event.kind)
    return moved if apply is None else apply(moved, event, config)


def turn_event(turn: Turn, builds_on: int, at: float, kind: str = EventKind.TURN) -> Event:
    """The event of an answered turn. `builds_on` is how many recorded turns the client's history repeated.

    Kind "variant" records an answer that was given too, beside the one that counts (OpenAI's `n`).
    """
    data = asdict(turn) | {"builds_on": builds_on, "skip": turn.unteachable()}
    text = {name: data.pop(name) for name in ("messages", "answer", "calls")}
    for later in ("gap", "surprise", "kept"):
        del data[later]
    text["messages"] = [dict(message) for message in turn.messages]
    text["calls"] = [dict(call) for call in turn.calls]
    return Event(kind, at, data, text if turn.kept else None)


def turn_of(event: Event) -> Turn:
    """The turn that an event records."""
    return _read_turn(event.data, event.text)


def _read_turn(data: Mapping[str, Any], text: Mapping[str, Any] | None) -> Turn:
    said = text or {"messages": (), "answer": "", "calls": ()}
    return Turn(
        number=data["number"],
        messages=tuple(said["messages"]),
        answer=said["answer"],
        engine=Role(data["engine"]),
        adapter=data["adapter"],
        phase=Phase(data["phase"]),
        reason=data["reason"],
        usage=Usage(**data["usage"]),
        ttft_s=data["ttft_s"],
        latency_s=data["latency_s"],
        most_tokens=data.get("most_tokens"),
        complete=data["complete"],
        calls=tuple(said["calls"]),
        chain=data["chain"],
        asked=data["asked"],
        links=tuple(data.get("links") or ()),
        left_out=None if data.get("left_out") is None else tuple(data["left_out"]),
        response=data["response"],
        kept=text is not None,
        skip=data["skip"],
    )


def branch_event(parent: Session, turns: Sequence[Turn], at: float) -> Event:
    """The first event of a session that begins with some turns of another."""
    events = [turn_event(turn, turn.number - 1, at) for turn in turns]
    data = {
        "of": parent.key.session,
        "family": parent.family,
        "rollbacks": parent.rollbacks,
        "refusals": parent.refusals,
        "cool_downs": parent.cool_downs,
        "learned": min(parent.learned, len(turns)),
        "turns": [event.data for event in events],
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
        "learned": learned,
        "adapting": None if parent.adapting is None else asdict(parent.adapting),
    }
    return Event(EventKind.INHERITED, at, data)


def _turn(session: Session, event: Event, config: Config) -> Session:
    builds_on = event.data["builds_on"]
    kept = session.turns[:builds_on]
    return replace(session, turns=(*kept, turn_of(event)), warm_from=min(session.warm_from, builds_on))


def _branched(session: Session, event: Event, config: Config) -> Session:
    data = event.data
    texts = (event.text or {}).get("turns") or [None] * len(data["turns"])
    turns = tuple(_read_turn(turn, text) for turn, text in zip(data["turns"], texts, strict=True))
    inherited = {name: data.get(name, 0) for name in ("rollbacks", "refusals", "cool_downs", "learned")}
    return replace(session, family=data["family"], turns=turns, **inherited)


def _inherited(session: Session, event: Event, config: Config) -> Session:
    switched = _switched(session, event, config)
    return replace(switched, learned=event.data["learned"], adapting=adapting_of(event.data))


def _adaptation_started(session: Session, event: Event, config: Config) -> Session:
    forced = event.data.get("forced")
    return replace(
        session,
        learned=len(session.turns),
        adapting=adapting_of(event.data),
        forced=None if forced is None else Candidate(forced),
        adapter=None,
    )


def _training_submitted(session: Session, event: Event, config: Config) -> Session:
    return replace(session, trainings=session.trainings + 1)


def _switched(session: Session, event: Event, config: Config) -> Session:
    data = event.data
    ref = data.get("adapter")
    return replace(
        session,
        serving=Candidate(data["candidate"]),
        adapter=None if ref is None else AdapterRef(**ref),
        centroid=None if data["centroid"] is None else tuple(data["centroid"]),
        drift=Drift(),
        switches=session.switches + 1,
    )


def _audited(session: Session, event: Event, config: Config) -> Session:
    data = event.data
    number = data["turn"]
    kind: AuditKind = "gap" if data.get("kind", "gap") == "gap" else "surprise"
    found = {kind: data[kind]}
    turns = tuple(replace(t, **found) if t.number == number else t for t in session.turns)
    session = replace(session, turns=turns)
    if session.phase is not Phase.SWITCHED:
        return session
    return replace(session, drift=session.drift.observe(kind, data[kind], config.gate))


def _refused(session: Session, event: Event, config: Config) -> Session:
    wanting = bool(event.data.get("found_wanting"))
    return replace(session, refusals=session.refusals + wanting, cool_downs=session.cool_downs + 1)


def _rolled_back(session: Session, event: Event, config: Config) -> Session:
    back = _adapter_evicted(session, event, config)
    return replace(back, rollbacks=session.rollbacks + 1, cool_downs=session.cool_downs + 1)


def _adapter_evicted(session: Session, event: Event, config: Config) -> Session:
    # No rollback: nothing speaks against the surrogate, so its next candidate is judged as this one was.
    return replace(
        session,
        serving=Candidate.ORIGINAL,
        adapter=None,
        centroid=None,
        drift=Drift(),
        warm_from=len(session.turns),
        learned=0,
    )


def _restarted(session: Session, event: Event, config: Config) -> Session:
    return replace(
        session,
        serving=Candidate.ORIGINAL,
        adapter=None,
        centroid=None,
        drift=Drift(),
        warm_from=0,
        learned=0,
        cool_downs=0,
    )


def _pinned(session: Session, event: Event, config: Config) -> Session:
    engine = event.data["engine"]
    return replace(session, pinned=None if engine is None else Role(engine))


def _closed(session: Session, event: Event, config: Config) -> Session:
    return replace(session, serving=Candidate.ORIGINAL, adapter=None)


_APPLY: Mapping[str, Callable[[Session, Event, Config], Session]] = {
    EventKind.TURN: _turn,
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

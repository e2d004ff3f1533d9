"""A session, as the events in its log describe it.

Guarantees: a `Session` is a value, made only by folding events in order (`sessions/state/fold.py`); the adapter
is set only while the phase is SWITCHED; text is needed to learn from, and for nothing else: a session whose
text was erased is recognised, served and rolled back as before.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np

from soma_vllm.config import Config
from soma_vllm.sessions.state.adaptation_rules import AdaptationRules
from soma_vllm.sessions.state.gate import Drift, Vector
from soma_vllm.sessions.state.phases import COOLING_DOWN, Phase
from soma_vllm.sessions.state.prefix import compress
from soma_vllm.sessions.state.transcript import TranscriptDigest, preamble, spoken
from soma_vllm.sessions.state.truncated_history import Overlap, trimmed
from soma_vllm.sessions.state.turn import Turn
from soma_vllm.types import AdapterRef, Candidate, Example, Message, Role, SessionKey


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
    attempts: int = 0
    """Beginnings of the present adaptation; more than one where servers ended during it."""
    forced: Candidate | None = None
    pinned: Role | None = None
    """The engine that an administrator bound it to."""

    def transcript(self, turns: int | None = None) -> tuple[Message, ...]:
        """All messages of the first `turns` turns, answers included."""
        messages: list[Message] = []
        for turn in self.turns[:turns]:
            messages += [*turn.messages, spoken(turn.answer, turn.calls)]
        return tuple(messages)

    def prefix_digest(self) -> str:
        """Digest of the transcript so far, "" before the first turn: by it the next request is recognised."""
        return self.turns[-1].chain if self.turns else ""

    def is_served_by(self, adapter: str) -> bool:
        """Whether this adapter serves it."""
        return self.adapter is not None and self.adapter.name == adapter

    def kept(self) -> bool:
        """Whether the text of every turn is in memory."""
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
            if not turn.kept and turn.stored:
                turns[index] = turn.voiced(reading.messages[begin:end])
            begin = end
        return replace(self, turns=tuple(turns))

    def skipping(self, number: int, why: str) -> Session:
        """The same session, where a turn does not teach."""
        turns = (replace(turn, skip=why) if turn.number == number else turn for turn in self.turns)
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
                fields=turn.fields,
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

"""What was said in a session, and where a request's history agrees with it.

Guarantees: a `Dialogue` is a value; text is needed for no more than to recognise a shortened answer or, without
an id of the client's, a question with something put around it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

from soma_vllm.sessions.state.answer_print import AnswerPrint, HeardAnswer
from soma_vllm.sessions.state.phases import Phase
from soma_vllm.sessions.state.question import asked_alike
from soma_vllm.sessions.state.transcript import LINK_HALF, TranscriptDigest, preamble, spoken
from soma_vllm.sessions.state.truncated_history import Overlap, reworded, trimmed
from soma_vllm.sessions.state.turn import Turn
from soma_vllm.types import Message, SessionKey

COMPARED_CLOSELY = 8
"""Other answers, the latest, that are compared with a history which holds none of them to the letter."""


@dataclass(frozen=True)
class Dialogue:
    """The turns of one dialogue, and the other answers that were given in it."""

    key: SessionKey
    family: str = ""
    """The id that a client gave, which all branches of its dialogue share; "" for one known by transcript."""
    phase: Phase = Phase.WARM_START
    turns: tuple[Turn, ...] = ()
    """The line that was gone on from last."""
    tips: tuple[Turn, ...] = ()
    """Other answers beside the last turn's, after it, or beside an earlier turn's: regenerated ones, other
    choices, those to requests aside such as for a title. The latest ones."""
    asides: tuple[str, ...] = ()
    """Digests of queries whose answers were not gone on from."""
    learned: int = 0
    """Turns, counted from the first, that the present adaptation rests on."""

    def transcript(self, turns: int | None = None) -> tuple[Message, ...]:
        """All messages of the first `turns` turns, answers included, as the client had them last."""
        return self._transcript(turns, turns)

    def _transcript(self, turns: int | None, under: int | None) -> tuple[Message, ...]:
        """The first `turns` turns under the system messages of turn number `under`."""
        messages: list[Message] = []
        for turn in self.turns[:turns]:
            asked = turn.messages if turn.later is None else turn.later
            messages += [*asked, spoken(turn.answer, turn.calls)]
        head = next((turn.head for turn in reversed(self.turns[:under]) if turn.head is not None), None)
        return tuple(messages) if head is None else (*head, *messages[len(preamble(messages)) :])

    def preamble(self) -> tuple[Message, ...]:
        """The system messages that the latest request began with, as far as they are kept."""
        return tuple(preamble(self._transcript(1, None)))

    def prefix_digest(self) -> str:
        """Digest of the transcript so far, "" before the first turn: by it the next request is recognised."""
        return self.turns[-1].chain if self.turns else ""

    def kept(self) -> bool:
        """Whether the text of every turn is in memory."""
        return all(turn.kept for turn in self.turns)

    def ending(self) -> str:
        """Digest of the last answer's words; "" before the first turn."""
        found = self._print(self.turns[-1]) if self.turns else None
        return "" if found is None else AnswerPrint.parse(found).words

    def seen_before(self, turn: Turn) -> tuple[Message, ...]:
        """What of the transcript before a turn its client still had."""
        before = self._transcript(turn.number - 1, turn.number)
        if turn.left_out is None:
            return before
        first, last = turn.left_out
        dropped = len(self._transcript(last, turn.number))
        head = self._transcript(first, turn.number) if first else preamble(before)
        return (*head, *before[dropped:])

    def seen_last(self) -> tuple[Message, ...]:
        """The transcript so far as its client still has it."""
        if not self.turns:
            return ()
        last = self.turns[-1]
        return (*self.seen_before(last), *last.messages, spoken(last.answer, last.calls))

    def overlap(self, reading: TranscriptDigest) -> Overlap:
        """Where a request's history agrees with the record: whole, with turns left out, or in its answers.

        Answers alone suffice where a client names the session; elsewhere each question has to be the recorded
        one, perhaps with something put around it.
        """
        strict = self.overlap_to_the_letter(reading)
        if not reading.marks or strict.turns == len(self.turns) or strict.end == reading.marks[-1].end:
            return strict
        loose = self._answers_in(reading)
        return strict if loose is None or loose.turns <= strict.turns else loose

    def overlap_to_the_letter(self, reading: TranscriptDigest) -> Overlap:
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

    def _answers_in(self, reading: TranscriptDigest) -> Overlap | None:
        answers = [self._print(turn) for turn in self.turns]
        heard: dict[int, HeardAnswer] = {}

        def changed(turn: int, mark: int) -> bool:
            answer = heard.setdefault(mark, reading.heard(reading.marks[mark]))
            stored = answers[turn]
            return (stored is not None and answer.is_same(AnswerPrint.parse(stored))) or (
                self.turns[turn].kept and answer.is_beginning(self.turns[turn].answer)
            )

        found = reworded(answers, reading, changed)
        if found is None:
            return None
        ends = [reading.head, *(mark.end for mark in reading.marks)]
        known, supplied = {mark for _, mark in found.found}, self._supplied()
        added = any(
            index not in known and mark.link[LINK_HALF:] not in supplied
            for index, mark in enumerate(reading.marks[: found.found[-1][1]])
        )

        def alike(turn: int, mark: int) -> bool:
            asked = reading.messages[ends[mark] : ends[mark + 1] - 1]
            recorded = self.turns[turn]
            return recorded.links[-1:] == (reading.marks[mark].link,) or asked_alike(recorded.messages, asked)

        if self.family and found.turns == len(self.turns):
            return None if added and found.left_out is not None else found
        return None if added or not all(alike(*pair) for pair in found.found) else found

    def _print(self, turn: Turn) -> str | None:
        """The print of a turn's answer; None where neither that nor the text was kept."""
        if turn.said or not turn.kept:
            return turn.said or None
        return str(HeardAnswer(self.key.tenant, spoken(turn.answer, turn.calls)).print)

    def _supplied(self) -> set[str]:
        """Digests of the answers that the client itself has put into the dialogue."""
        return {link[LINK_HALF:] for turn in (*self.turns, *self.tips) for link in turn.links[:-1]}

    def continued_by(self, reading: TranscriptDigest) -> bool:
        """Whether a request goes on from this session's last turn, or asks in its place: the same again, or
        something else, unless that turn was learned from. A turn that was cut off may be gone on from with less
        of its answer than was recorded."""
        overlap, last = self.overlap(reading), len(self.turns)
        if overlap.turns == last or self.asked_again_by(reading):
            return True
        if overlap.turns != last - 1:
            return False
        return not self.turns[-1].complete or (
            self.ends_at(overlap, reading)
            and (reading.query in self.asides or not self._learned_from(self.turns[-1], reading.query))
        )

    def ends_at(self, overlap: Overlap, reading: TranscriptDigest) -> bool:
        """Whether no answer that is new to the record follows an overlap."""
        supplied = self._supplied()
        return all(mark.link[LINK_HALF:] in supplied for mark in reading.marks if mark.end > overlap.end)

    def ended_by(self, reading: TranscriptDigest) -> bool:
        """Whether a request's history ends where this session does."""
        overlap = self.overlap(reading)
        return overlap.turns == len(self.turns) > 0 and self.ends_at(overlap, reading)

    def asked_again_by(self, reading: TranscriptDigest) -> bool:
        """Whether a request is the one that the last turn answered."""
        return bool(self.turns) and self.turns[-1].asked == reading.asked

    def alternative(self, reading: TranscriptDigest) -> Turn | None:
        """The other answer that a request goes on from; None where it is the last turn's, or where it may not
        take that one's place, because that was learned from."""
        tips = [tip for tip in reversed(self.tips) if tip.number >= len(self.turns)]
        if not tips or not reading.marks:
            return None
        chains = {mark.chain for mark in reading.marks}
        common = self.overlap_to_the_letter(reading).turns
        known = (tip for tip in tips if tip.chain in chains and tip.number > common)
        found = max(known, key=lambda tip: tip.number, default=None)
        if found is None and common < len(self.turns):
            # The same answer may have been given to several questions: then the question tells.
            last, latest = reading.marks[-1].link, tips[:COMPARED_CLOSELY]
            known = (
                tip for tip in latest if tip.links[-1:] == (last,) and self._through(tip).ended_by(reading)
            )
            found = next(known, None)
            if found is None and self.overlap(reading).turns < len(self.turns):
                found = next((tip for tip in latest if self._through(tip).ended_by(reading)), None)
        if found is None:
            return None
        replaced = self.turns[found.number - 1 :]
        return None if any(self._learned_from(turn, found.query) for turn in replaced) else found

    def line(self, reading: TranscriptDigest) -> tuple[Turn, ...]:
        """The turns that a request's history agrees with, the most that there are: the first ones of this
        session, perhaps with another answer at their end."""
        common = self.overlap(reading).turns
        latest = self.tips[-COMPARED_CLOSELY:]
        ways = ((self._through(tip).overlap(reading).turns, tip) for tip in latest if tip.number > common)
        found = next((tip for turns, tip in ways if turns == tip.number), None)
        return self.turns[:common] if found is None else (*self.turns[: found.number - 1], found)

    def _through(self, tip: Turn) -> Self:
        """The session as it would be, had this answer counted."""
        return replace(self, turns=(*self.turns[: tip.number - 1], tip), tips=())

    def _learned_from(self, turn: Turn, query: str) -> bool:
        """Whether an adaptation rests on a turn that answers another query."""
        rests = self.phase in (Phase.ADAPTING, Phase.SWITCHED) and turn.number <= self.learned
        return rests and turn.query != query

    def is_aside(self, reading: TranscriptDigest) -> bool:
        """Whether a request, for a next turn or in place of the last, is one aside, as for a title: its query
        was asked before, and the dialogue did not go on from the answer."""
        number = len(self.turns)
        if not number or reading.query == self.turns[-1].query:
            return False
        beside = (tip.query for tip in self.tips if tip.number == number)
        common = self.overlap(reading).turns
        known = reading.query in self.asides
        return common >= number - 1 and (known or (common == number and reading.query in beside))

    @property
    def is_branch(self) -> bool:
        """Whether it belongs to a dialogue that another session is the root of."""
        return self.root != self.key.session

    @property
    def root(self) -> str:
        """The id of the session that its dialogue began with."""
        return self.family or self.key.session.partition("~")[0]

    def without_text(self) -> Self:
        """The same session, silent."""
        turns, tips = (
            tuple(turn.silent() if turn.kept else turn for turn in some) for some in (self.turns, self.tips)
        )
        return replace(self, turns=turns, tips=tips)

    def with_text(self, reading: TranscriptDigest) -> Self:
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

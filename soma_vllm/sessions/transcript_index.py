"""Finding a live session by what its clients send: the transcript of one of its turns, or a response's id.

Guarantees: nothing is found outside its tenant and family; a lookup takes the same time however many dialogues
begin alike.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import TypeVar

from soma_vllm.sessions.sql.records import TurnHit, TurnLocation, TurnMark
from soma_vllm.sessions.state.answer_print import AnswerPrint
from soma_vllm.sessions.state.events import EventKind
from soma_vllm.sessions.state.session import Session
from soma_vllm.types import Event, SessionKey

T = TypeVar("T")

Place = tuple[str, str, str]
"""(tenant, family, digest); the digest of a transcript, of an answer, or of a request."""


class TranscriptIndex:
    """Turns of the sessions in memory."""

    def __init__(self) -> None:
        self._through: defaultdict[Place, dict[SessionKey, tuple[int, int]]] = defaultdict(dict)
        """Sessions with a turn of this transcript: (the event's number, the turn's)."""
        self._standing: defaultdict[Place, dict[SessionKey, None]] = defaultdict(dict)
        """Sessions that have not gone on from it, by transcript and by the last answer."""
        self._shared: set[Place] = set()
        """Transcripts of which a session was dropped while another one has it too."""
        self._responses: dict[tuple[str, str], tuple[SessionKey, int, int]] = {}
        self._asked: dict[Place, SessionKey] = {}
        self._asked_last: dict[SessionKey, Place] = {}
        self._places: defaultdict[SessionKey, list[Place]] = defaultdict(list)
        self._stands: dict[SessionKey, set[Place]] = {}
        self._named: defaultdict[SessionKey, set[tuple[str, str]]] = defaultdict(set)

    def observe(self, session: Session, first_seq: int, events: Sequence[Event]) -> tuple[TurnMark, ...]:
        """Make the turns findable that these events of a session record; their marks."""
        key, family = session.key, session.family
        marks = tuple(mark for seq, event in enumerate(events, first_seq) for mark in marks_of(seq, event))
        for mark in marks:
            place = (key.tenant, family, mark.chain)
            self._through[place][key] = (mark.seq, mark.number)
            self._places[key].append(place)
            if mark.response is not None:
                name = (key.tenant, mark.response)
                self._responses[name] = (key, mark.seq, mark.number)
                self._named[key].add(name)
        if session.turns:
            asked = (key.tenant, family, session.turns[-1].asked)
            self._forget_asked(key)
            self._asked[asked] = key
            self._asked_last[key] = asked
            self._stand(session)
        return marks

    def _stand(self, session: Session) -> None:
        """Note where a session stands: at its last turn, and at the other answers beside it."""
        key = session.key
        beside = (tip for tip in session.tips if tip.number >= len(session.turns))
        last = (*session.turns[-1:], *beside)
        ends = [turn.chain for turn in last]
        ends += [AnswerPrint.parse(turn.said).words for turn in last if turn.said] or [session.ending()]
        now = {(key.tenant, session.family, digest) for digest in ends}
        before = self._stands.get(key, set())
        for place in before - now:
            _take(self._standing, place, key)
        for place in now - before:
            self._standing[place][key] = None
        self._stands[key] = now

    def drop(self, key: SessionKey) -> None:
        """Forget a session."""
        self._forget_asked(key)
        for place in self._places.pop(key, ()):
            _take(self._through, place, key)
            if place in self._through:
                self._shared.add(place)
            else:
                self._shared.discard(place)
        for place in self._stands.pop(key, ()):
            _take(self._standing, place, key)
        for name in self._named.pop(key, ()):
            if self._responses.get(name, (None,))[0] == key:
                del self._responses[name]

    def _forget_asked(self, key: SessionKey) -> None:
        before = self._asked_last.pop(key, None)
        if before is not None and self._asked.get(before) == key:
            del self._asked[before]

    def find(self, tenant: str, family: str, chains: Iterable[str], limit: int) -> tuple[list[TurnHit], bool]:
        """Turns with the longest chain that there is, `chains` being longest first: at most `limit` of sessions
        that stand there, and as many of any; and whether memory alone can tell that these are all."""
        for chain in chains:
            place = (tenant, family, chain)
            through = self._through.get(place)
            if through:
                standing = list(islice(self._standing.get(place, ()), limit))
                keys = dict.fromkeys([*standing, *islice(reversed(through), limit)])
                hits = [
                    TurnHit(TurnLocation(key.session, *through[key]), chain, key in standing)
                    for key in keys
                    if key in through
                ]
                return hits, place not in self._shared
        return [], False

    def stands_at(self, key: SessionKey, family: str, chain: str) -> bool:
        """Whether a live session has not gone on from a transcript."""
        return (key.tenant, family, chain) in self._stands.get(key, ())

    def ending(self, tenant: str, family: str, endings: Iterable[str], limit: int) -> list[str]:
        """At most `limit` sessions of which the last answer, or one beside it, has one of these digests."""

        def found() -> Iterator[str]:
            for digest in endings:
                yield from (key.session for key in self._standing.get((tenant, family, digest), ()))

        return list(islice(dict.fromkeys(islice(found(), limit * 8)), limit))

    def asked_by(self, tenant: str, family: str, asked: str) -> SessionKey | None:
        """The session whose last turn may have answered this very request."""
        return self._asked.get((tenant, family, asked))

    def of_response(self, tenant: str, response: str) -> TurnLocation | None:
        """The turn that a client names by its response's id."""
        where = self._responses.get((tenant, response))
        return None if where is None else TurnLocation(where[0].session, where[1], where[2])


def marks_of(seq: int, event: Event) -> Iterator[TurnMark]:
    """The marks of the turns that an event records; `seq` is its place in the session's log."""
    if event.kind in (EventKind.TURN, EventKind.VARIANT):
        data = event.data
        yield TurnMark(seq, data["number"], data["chain"], data["response"])
        for number, found in (data.get("reworded") or {}).items():
            yield TurnMark(seq, int(number), found["chain"])


def _take(places: dict[Place, dict[SessionKey, T]], place: Place, key: SessionKey) -> None:
    """Take a session from a place, and the place away with its last one."""
    found = places.get(place)
    if found is not None:
        found.pop(key, None)
        if not found:
            del places[place]

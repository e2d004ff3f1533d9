"""Finding a live session by what its clients send: the transcript of one of its turns, or a response's id.

Guarantees: nothing is found outside its tenant and family; a session that stands exactly where the history ends
comes before one that has gone on from there.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from soma_vllm.sessions.sql.records import TurnLocation, TurnMark
from soma_vllm.sessions.state.events import EventKind
from soma_vllm.sessions.state.session import Session
from soma_vllm.types import Event, SessionKey

Place = tuple[str, str, str]
"""(tenant, family, digest); the digest of a transcript, of an exchange, or of a request."""


@dataclass(frozen=True)
class Hit:
    """A turn that was found."""

    found: TurnLocation
    exact: bool
    """Its session's transcript ends with it."""


class TranscriptIndex:
    """Turns of the sessions in memory."""

    def __init__(self, prefix_digest_of: Callable[[SessionKey], str]) -> None:
        """`prefix_digest_of` gives the digest of a live session's transcript so far."""
        self._prefix_digest_of = prefix_digest_of
        self._turns: defaultdict[Place, list[tuple[SessionKey, int, int]]] = defaultdict(list)
        self._responses: dict[tuple[str, str], tuple[SessionKey, int, int]] = {}
        self._asked: dict[Place, SessionKey] = {}
        self._places: defaultdict[SessionKey, set[Place]] = defaultdict(set)
        self._named: defaultdict[SessionKey, set[tuple[str, str]]] = defaultdict(set)

    def observe(self, session: Session, first_seq: int, events: Sequence[Event]) -> tuple[TurnMark, ...]:
        """Make the turns findable that these events of a session record; their marks."""
        marks = tuple(mark for seq, event in enumerate(events, first_seq) for mark in marks_of(seq, event))
        if marks:
            self.add(session.key, session.family, marks)
            self.ask(session.key, session.family, session.turns[-1].asked)
        return marks

    def add(self, key: SessionKey, family: str, marks: Iterable[TurnMark]) -> None:
        """Make turns findable."""
        for mark in marks:
            where = (key, mark.seq, mark.number)
            place = (key.tenant, family, mark.chain)
            self._turns[place].append(where)
            self._places[key].add(place)
            if mark.link is not None:
                self._turns[key.tenant, family, mark.link].append(where)
                self._places[key].add((key.tenant, family, mark.link))
            if mark.response is not None:
                name = (key.tenant, mark.response)
                self._responses[name] = where
                self._named[key].add(name)

    def ask(self, key: SessionKey, family: str, asked: str) -> None:
        """Remember the request that a session's last turn answered."""
        place = (key.tenant, family, asked)
        self._asked[place] = key
        self._places[key].add(place)

    def drop(self, key: SessionKey) -> None:
        """Forget a session."""
        for place in self._places.pop(key, ()):
            if self._asked.get(place) == key:
                del self._asked[place]
            if place in self._turns:
                left = [where for where in self._turns[place] if where[0] != key]
                if left:
                    self._turns[place] = left
                else:
                    del self._turns[place]
        for name in self._named.pop(key, ()):
            if self._responses.get(name, (None,))[0] == key:
                del self._responses[name]

    def find(self, tenant: str, family: str, chains: Sequence[str]) -> Hit | None:
        """The turn with the longest matching chain; `chains` come longest first."""
        for chain in chains:
            wheres = self._turns.get((tenant, family, chain))
            if wheres:
                exact = [where for where in wheres if self._prefix_digest_of(where[0]) == chain]
                key, seq, number = (exact or wheres)[-1]
                return Hit(TurnLocation(key.session, seq, number), bool(exact))
        return None

    def ending_with(self, tenant: str, family: str, link: str) -> set[str]:
        """Sessions that have a turn which ends with this exchange."""
        return {key.session for key, _, _ in self._turns.get((tenant, family, link), ())}

    def asked_by(self, tenant: str, family: str, asked: str) -> SessionKey | None:
        """The session whose last turn may have answered this very request."""
        return self._asked.get((tenant, family, asked))

    def of_response(self, tenant: str, response: str) -> TurnLocation | None:
        """The turn that a client names by its response's id."""
        where = self._responses.get((tenant, response))
        return None if where is None else TurnLocation(where[0].session, where[1], where[2])


def marks_of(seq: int, event: Event) -> tuple[TurnMark, ...]:
    """The marks of the turns that an event records; `seq` is its place in the session's log."""
    if event.kind not in (EventKind.TURN, EventKind.VARIANT):
        return ()
    data = event.data
    links = data.get("links") or (None,)
    return (TurnMark(seq, data["number"], data["chain"], data["response"], links[-1]),)

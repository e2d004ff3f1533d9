"""Which session a request continues: the one it names, one that its transcript tells, a branch, or a new one.

Guarantees: nothing is found outside its tenant; a request whose history diverges from the stored transcript
continues in a new branch, so that no request overwrites another one's turn; without an id a session is taken
for the one that a history is of only where no other could be.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace

from soma_vllm.errors import NotFound, StoreUnavailable, Unprocessable
from soma_vllm.sessions.ports import in_time
from soma_vllm.sessions.registry import SessionRegistry
from soma_vllm.sessions.sql.records import TurnHit, TurnLocation
from soma_vllm.sessions.state.adapter_states import AdapterState
from soma_vllm.sessions.state.events import EventKind
from soma_vllm.sessions.state.fold import branch_event, inheritance
from soma_vllm.sessions.state.phases import Phase
from soma_vllm.sessions.state.session import RECOGNISED, Session
from soma_vllm.sessions.state.transcript import TranscriptDigest, preamble, read
from soma_vllm.sessions.state.turn import Turn, turn_of
from soma_vllm.types import Event, Message, SessionKey

SURE_EXCHANGES = 2
"""Whole exchanges that must be left of a history without an id for its session to be recognised by them."""

MOST_ALIKE = 5
"""Sessions that end alike, above which none of them is recognised without an id."""

LAST_ANSWERS = 3
"""Answers from a history's end by which sessions are looked for: the client may have put its own there."""


@dataclass(frozen=True)
class StoredTranscript:
    """A transcript up to an answer that a client names."""

    session: str
    messages: tuple[Message, ...]


class SessionLookup:
    """Finds sessions among the live ones and those on record. Has no state of its own."""

    def __init__(self, registry: SessionRegistry) -> None:
        self.registry = registry
        self._store = registry.store
        self._index = registry.index

    @asynccontextmanager
    async def begin(
        self, tenant: str, named: str | None, reading: TranscriptDigest
    ) -> AsyncIterator[SessionKey]:
        """The session that a request continues, which stays in memory inside the block; else as `place`."""
        key = await self.place(tenant, named, reading)
        try:
            yield key
        finally:
            self.registry.release(key)

    async def place(self, tenant: str, named: str | None, reading: TranscriptDigest) -> SessionKey:
        """The session that a request continues, open and held: the one it names, a branch of it, the one whose
        transcript it repeats, or a new one.

        Raises:
            StoreUnavailable: the session store did not answer within 3 s.
        """
        self.registry.write_behind.require_room()
        async with AsyncExitStack() as leases:
            place = _Place(self.registry, leases, tenant, reading)
            session = await (self._recognised(place) if named is None else self._named(place, named))
            session = self.registry.session(session.key)  # as it is now
            other = session.alternative(reading)
            if other is not None and session.phase is not Phase.CLOSED:
                self.registry.note(session.key, EventKind.RESUMED, chain=other.chain)
            self.registry.hold(session.key)
        return session.key

    async def said(self, tenant: str, response: str) -> StoredTranscript:
        """The transcript up to the answer of this id.

        Raises:
            NotFound: this tenant has no such response.
            Unprocessable: its text was not kept.
            StoreUnavailable: the session store did not answer within 3 s.
        """
        found = self._index.of_response(tenant, response)
        if found is None:
            found = await in_time(self._store.of_response(tenant, response))
        if found is None:
            raise NotFound(f"no response {response!r}")
        async with self.registry.lease(SessionKey(tenant, found.session)) as session:
            at = replace(session, turns=self._turns_at(session, found))
            return StoredTranscript(found.session, _transcript(at, response))

    async def conversation(self, tenant: str, name: str) -> tuple[Message, ...]:
        """The transcript of a session so far; empty for a new one. Raises as `said` does."""
        async with self.registry.lease(SessionKey(tenant, name)) as session:
            return _transcript(session, name)

    def with_history(self, session: Session, reading: TranscriptDigest) -> tuple[TranscriptDigest, str]:
        """A request that names its session and holds no answer, with the recorded turns before it where
        `sessions.history` says so; and whose history that is, "" where there is none."""
        again = bool(session.turns) and session.turns[-1].query == reading.query
        before = replace(session, turns=session.turns[: len(session.turns) - again])
        count = len(before.turns)
        if not count or session.phase is Phase.CLOSED:
            return reading, ""
        if self.registry.config.sessions.history == "client":
            return reading, f"client; recorded turns that are not in the request: {count}"
        if not before.kept():
            return reading, f"client; recorded turns of which the text was not kept: {count}"
        said = before.transcript()
        own = len(preamble(said))
        whole = (*(reading.preamble or said[:own]), *said[own:], *reading.messages[reading.head :])
        return read(session.key.tenant, whole), f"server; recorded turns before the request: {count}"

    async def _named(self, place: _Place, name: str) -> Session:
        """Where a request goes that names a session: there, or to a branch of its dialogue."""
        reading, session = place.reading, await place.open(name)
        if _is_its_next(session, reading):
            return session
        again = self._index.asked_by(place.tenant, session.family, reading.asked) if reading.marks else None
        if again is not None and (asked := await place.open(again.session)).asked_again_by(reading):
            return asked
        hits = await self._hits(place, session, on_record=False)
        for hit in hits:
            branch = await place.open(hit.found.session)
            if hit.stands and hit.chain == reading.marks[-1].chain and _is_its_next(branch, reading):
                return branch
        if _leads_on(session, reading):
            return session
        if alike := await self._alike(place, session):
            return alike[0]
        if hits := await self._hits(place, session):
            branch = await place.open(hits[0].found.session)
            if _leads_on(branch, reading):
                return branch
            if hits[0].found.number >= session.overlap(reading).turns:
                return self._branch(place, branch, self._turns_at(branch, hits[0].found))
        return self._branch(place, session, session.line(reading))

    async def _recognised(self, place: _Place) -> Session:
        """Where a request goes that names no session: to the one that its history tells, if that is one."""
        reading, session = place.reading, Session(SessionKey(place.tenant, f"{RECOGNISED}{uuid.uuid4().hex}"))
        if not reading.marks:
            return place.begin(session.key)
        hits = await self._hits(place, session)
        if not hits or hits[0].chain != reading.marks[-1].chain:
            alike = await self._alike(place, session)
            if len(alike) == 1:
                return alike[0]
        if not hits:
            return place.begin(session.key)
        found = await self._only(place, hits)
        parent = await place.open((found or hits[0]).found.session)
        if found is not None and _leads_on(parent, reading):
            return parent
        again = self._index.asked_by(place.tenant, "", reading.asked)
        if again is not None and {hit.root for hit in hits} == {parent.root}:
            asked = await place.open(again.session)
            if asked.root == parent.root and asked.asked_again_by(reading):
                return asked
        return self._branch(
            place, parent, self._turns_at(parent, (found or hits[0]).found), shared=found is None
        )

    async def _only(self, place: _Place, hits: Sequence[TurnHit]) -> TurnHit | None:
        """The one session that a history may be of: the only one that has it, that stands there, or that stands
        there under the same system messages."""
        if len(hits) > 1:
            hits = [hit for hit in hits if hit.stands]
        if 1 < len(hits) <= MOST_ALIKE:
            sessions = [await place.open(hit.found.session) for hit in hits]
            guard = place.reading.guard
            hits = [hit for hit, one in zip(hits, sessions, strict=True) if one.turns[-1].guard == guard]
        return hits[0] if len(hits) == 1 else None

    async def _hits(self, place: _Place, session: Session, on_record: bool = True) -> list[TurnHit]:
        """Turns with which a request's history agrees furthest, each session once, those that stand there
        first; of a session that is known by its transcript and was named, its own and its branches' alone."""
        reading, chains = place.reading, place.reading.prefix_digests()
        if not chains:
            return []
        hits, sure = self._index.find(place.tenant, session.family, chains, MOST_ALIKE + 1)
        whole = bool(hits) and hits[0].chain == reading.marks[-1].chain
        enough = sure and whole and any(hit.stands for hit in hits)
        # Without an id it must be the only one, on record as well.
        if on_record and not (enough and session.family):
            try:
                found = await in_time(self._store.find(place.tenant, session.family, chains, MOST_ALIKE + 1))
            except StoreUnavailable:
                if not enough:
                    raise
                found = []
            hits = self._merged(place.tenant, session.family, [*hits, *found], chains)
        if session.turns and not session.family:
            hits = [hit for hit in hits if hit.root == session.root]
        return hits

    def _merged(
        self, tenant: str, family: str, hits: Sequence[TurnHit], chains: Sequence[str]
    ) -> list[TurnHit]:
        """Those of the longest chain, each session once. Memory knows better than the record which went on."""
        there = {hit.chain for hit in hits}
        longest = next((chain for chain in chains if chain in there), None)
        found: dict[str, TurnHit] = {}
        for hit in hits:
            key = SessionKey(tenant, hit.found.session)
            if hit.chain == longest and self.registry.is_live(key):
                hit = replace(hit, stands=self._index.stands_at(key, family, hit.chain))
            if hit.chain == longest:
                found.setdefault(hit.found.session, hit)
        return sorted(found.values(), key=lambda hit: not hit.stands)

    async def _alike(self, place: _Place, session: Session) -> list[Session]:
        """Sessions that end where a request's history ends, although its client has dropped or reworded some of
        it.

        Without a family, of a history that lacks turns two whole exchanges have to be left, and where many
        dialogues end alike there is none: short answers are given in many dialogues.
        """
        reading = place.reading
        endings = [digest for mark in reading.marks[-LAST_ANSWERS:] for digest in reading.heard(mark).endings()]
        if not endings:
            return []
        tenant, family, limit = place.tenant, session.family, MOST_ALIKE + 1
        live = self._index.ending(tenant, family, endings, limit)
        on_record = await in_time(self._store.ending(tenant, family, endings, limit))
        names = list(dict.fromkeys([*live, *on_record]))
        if len(names) > MOST_ALIKE and not family:
            return []
        sessions = [await place.open(name) for name in names[:MOST_ALIKE]]
        if session.turns and not family:
            sessions = [other for other in sessions if other.root == session.root]
        whole = len(reading.marks) - reading.cut
        return [
            other
            for other in sessions
            if other.alternative(reading) is not None
            or (
                other.ended_by(reading)
                and (other.family or whole >= SURE_EXCHANGES or other.overlap(reading).left_out is None)
            )
        ]

    def _branch(self, place: _Place, parent: Session, turns: Sequence[Turn], shared: bool = False) -> Session:
        """A session that begins with some turns of another, in memory until its own first turn. `shared`: other
        dialogues have these turns too, so that it is no branch of this one."""
        now = time.time()
        unique = uuid.uuid4().hex
        name = f"{RECOGNISED}{unique}" if shared else f"{parent.root}~{unique[:12]}"
        cause, why = _why(parent, turns, place.reading, shared)
        inherited = inheritance(parent, turns, now) if self._may_inherit(parent) else None
        first = branch_event(parent, turns, now, cause, why)
        pending = (first,) if inherited is None else (first, inherited)
        return place.begin(SessionKey(parent.key.tenant, name), pending)

    def _may_inherit(self, parent: Session) -> bool:
        """Whether what serves a session may serve another one as well: not while its adapter leaves."""
        state = None if parent.adapter is None else self.registry.adapter_state(parent.adapter.name)
        return state not in (AdapterState.DRAINING, AdapterState.RETIRED)

    def _turns_at(self, session: Session, found: TurnLocation) -> tuple[Turn, ...]:
        """The turns of a session, up to one of them, as one of its events left them."""
        past = self.registry.session_at(session.key, found.seq)
        last = self.registry.events(session.key)[found.seq]
        if last.kind != EventKind.VARIANT or last.data["number"] != found.number:
            return past.turns[: found.number]
        variant = turn_of(last.data, last.text)
        before, given = past.turns[: variant.number - 1], past.turns[variant.number - 1 : variant.number]
        messages = variant.messages or tuple(message for turn in given for message in turn.messages)
        fields = variant.fields if variant.messages or not given else given[0].fields
        return (*before, replace(variant, messages=messages, fields=fields))


@dataclass(frozen=True)
class _Place:
    """A request whose session is being looked for. What it opens stays in memory until that is found."""

    registry: SessionRegistry
    leases: AsyncExitStack
    tenant: str
    reading: TranscriptDigest

    async def open(self, name: str) -> Session:
        return await self.leases.enter_async_context(self.registry.lease(SessionKey(self.tenant, name)))

    def begin(self, key: SessionKey, pending: tuple[Event, ...] = ()) -> Session:
        return self.registry.begin(key, pending)


def _is_its_next(session: Session, reading: TranscriptDigest) -> bool:
    """Whether a session is being removed, or a request goes on from its end to the letter."""
    common = session.overlap_to_the_letter(reading).turns
    other = session.alternative(reading)
    return session.phase is Phase.CLOSED or common == len(session.turns) or other is not None


def _leads_on(session: Session, reading: TranscriptDigest) -> bool:
    return _is_its_next(session, reading) or session.continued_by(reading)


def _why(parent: Session, turns: Sequence[Turn], reading: TranscriptDigest, shared: bool) -> tuple[str, str]:
    """(cause, reason) of a branch."""
    number = len(turns) + 1
    if shared:
        return "shared", "several dialogues have this history"
    if not reading.marks and len(parent.turns) > 1:
        return "history", f"{len(parent.turns)} recorded turns are not in the request"
    overlap = parent.overlap(reading)
    if overlap.turns < len(turns):
        return "other", f"goes on from another answer {len(turns)}"
    if not parent.ends_at(overlap, reading):
        return "answer", f"answer {number} differs"
    if number == len(parent.turns):
        return "learned", f"question {number} differs, and was learned from"
    return "question", f"question {number} differs"


def _transcript(session: Session, name: str) -> tuple[Message, ...]:
    if not session.kept():
        raise Unprocessable(
            f"found {name!r}, but its text was not kept (retention.text); expected the messages in the request"
        )
    return session.transcript()

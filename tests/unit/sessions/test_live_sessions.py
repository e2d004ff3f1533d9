"""Live sessions within a bound on their bytes: packed, dropped, and found again as they were."""

from __future__ import annotations

import random
import time
from pathlib import Path

from support.services import Build, Services

from soma_vllm.sessions import live_session
from soma_vllm.sessions.live_session import LiveSession, LiveSessions
from soma_vllm.sessions.state.session import fresh
from soma_vllm.types import Event, SessionKey

NOBODY = frozenset[SessionKey]()


def key(number: int) -> SessionKey:
    return SessionKey("t", str(number))


def live(number: int, events: int = 20, at: float = 1.0) -> LiveSession:
    found = [Event("turn", at, {"number": n}, {"answer": f"word {n}"}) for n in range(events)]
    return LiveSession(fresh(key(number)), found)


def within(most_bytes: int, needed: frozenset[SessionKey] = NOBODY) -> tuple[LiveSessions, list[SessionKey]]:
    dropped: list[SessionKey] = []
    return LiveSessions(100, most_bytes, needed.__contains__, dropped.append), dropped


def filled(sessions: LiveSessions, count: int) -> LiveSessions:
    for number in range(count):
        sessions[key(number)] = live(number)
        sessions.account(key(number))
    return sessions


def test_packing_changes_nothing_that_is_seen_but_the_bytes() -> None:
    one, other = live(1), live(1)
    one.pack()
    assert one.is_packed
    assert one.size < other.size
    assert (one.adapter, one.root, one.is_new) == (other.adapter, other.root, other.is_new)
    assert one.has_text_before(2.0)
    assert one.is_packed, "none of this unpacks it"
    assert (one.session, one.events) == (other.session, other.events)
    assert not one.is_packed
    assert one.size == other.size


def test_beyond_the_bound_the_longest_idle_are_packed_first_and_then_dropped() -> None:
    sessions, dropped = within(5 * live(0).size + live(0).size // 2)
    filled(sessions, 8)
    sessions.make_room(key(7))
    assert [one.is_packed for one in sessions.values()] == [True] * 4 + [False] * 4
    assert dropped == []
    sessions._most_bytes = 0
    for _ in range(4):
        sessions.make_room(key(7))
    assert dropped == [key(number) for number in range(7)]
    assert sessions.bytes == sum(one.size for one in sessions.values())


def test_a_session_that_is_held_or_not_on_record_yet_stays() -> None:
    sessions, dropped = within(0, frozenset({key(1)}))
    filled(sessions, 4)
    sessions[key(0)].holds = 1
    for _ in range(4):
        sessions.make_room(key(3))
    assert list(sessions) == [key(0), key(1), key(3)]
    assert dropped == [key(2)]
    assert not sessions[key(0)].is_packed


def test_one_request_packs_a_few_sessions_at_most() -> None:
    sessions, _ = within(0)
    filled(sessions, 50)
    sessions.make_room(key(49))
    assert sum(one.is_packed for one in sessions.values()) <= live_session.PACKED_AT_ONCE


def test_sessions_that_became_objects_at_the_front_do_not_keep_others_from_being_dropped() -> None:
    sessions, dropped = within(10**9)
    filled(sessions, 12)
    for number in range(12):
        sessions[key(number)].pack()
        sessions.account(key(number))
    for number in range(4):  # as objects again, which is not counted yet
        assert sessions[key(number)].session is not None
    sessions._most_bytes = 0
    sessions.make_room(key(11))
    assert dropped == [key(number) for number in range(4, 8)]


def test_a_large_session_is_dropped_rather_than_packed_where_the_store_has_it() -> None:
    large, needed = (
        LiveSession(fresh(key(n)), [Event("turn", 1.0, {}, {"answer": "x" * 2**21})]) for n in (1, 2)
    )
    sessions, dropped = within(0, frozenset({key(2)}))
    for session in (large, needed):
        sessions[session.key] = session
        sessions.account(session.key)
    sessions.make_room(key(3))
    assert dropped == [key(1)]
    assert needed.is_packed


def test_the_sum_of_bytes_follows_every_change() -> None:
    sessions, _ = within(10**9)
    filled(sessions, 3)
    sessions[key(0)].pack()
    sessions.account(key(0))
    sessions.use(key(1)).add([Event("turn", 2.0, {}, {"answer": "x" * 1000})])
    sessions.account(key(1))
    sessions.drop(key(2))
    sessions.drop(key(2))
    assert sessions.bytes == sum(one.size for one in sessions.values())
    for number in (0, 1):
        sessions.drop(key(number))
    assert sessions.bytes == 0


async def test_a_packed_session_goes_on_where_it_was(services: Services) -> None:
    history: list[dict[str, object]] = []
    await services.say(history, "question 1")
    await services.settled()
    before = services.session()
    services.registry._entries[before.key].pack()
    await services.say(history, "question 2")
    await services.settled()
    assert services.session().turns[0] == before.turns[0]
    assert len(services.session().turns) == 2
    assert {one.holds for one in services.registry._entries.values()} == {0}


async def test_text_is_erased_from_packed_sessions_too(build: Build) -> None:
    services = build(retention={"text": "session"})
    await services.registry.start()
    await services.say([], "a secret question")
    await services.settled()
    found = services.session().key
    services.registry._entries[found].pack()
    services.registry.forget_before(time.time() + 1)
    assert not services.registry.session(found).kept()
    assert all(event.text is None for event in services.registry.events(found))


async def test_sessions_beyond_the_configured_memory_are_left_to_the_database(
    build: Build, tmp_path: Path
) -> None:
    services = build(sessions={"memory_mib": 1})
    await services.registry.start()
    long = random.Random(0).randbytes(50_000).hex()
    for number in range(40):
        await services.say([], f"{number} {long[number:]}", session=f"s{number}")
        await services.settled()
        await services.registry.written()
    assert services.registry._entries.bytes <= 2**20
    assert services.registry.size < 40
    history = [{"role": "user", "content": f"0 {long}"}, {"role": "assistant", "content": "same"}]
    await services.say(history, "and now", session="s0")
    assert len(services.session("s0").turns) == 2

"""The book of sessions, its writer, and what happens when their store fails."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest
from support.guard import GUARD_S

from soma_vllm.config import Config
from soma_vllm.errors import StoreRefused, StoreUnavailable
from soma_vllm.sessions.lookup import SessionLookup
from soma_vllm.sessions.registry import SessionRegistry
from soma_vllm.sessions.sql.records import Append
from soma_vllm.sessions.state.transcript import read
from soma_vllm.sessions.write_behind import Write, WriteBehindQueue
from soma_vllm.types import Event, SessionKey

KEY = SessionKey("t", "s")


class FailingStore:
    """A store that is away while `away` is set, and keeps what it was given."""

    def __init__(self) -> None:
        self.away = False
        self.contradicts = False
        self.kept: list[tuple[int, str]] = []

    async def append_all(self, appends: Sequence[Append]) -> None:
        if self.away:
            raise StoreUnavailable("the session store did not answer")
        if self.contradicts:
            raise StoreRefused("taken", duplicate=True)
        for append in appends:
            self.kept += [(append.first_seq + n, event.kind) for n, event in enumerate(append.events)]

    async def events(self, key: SessionKey) -> list[Event]:
        if self.away:
            raise StoreUnavailable("the session store did not answer")
        return []

    async def find(self, tenant: str, family: str, chains: Any, limit: int) -> list[Any]:
        return []

    async def ending(self, tenant: str, family: str, endings: Any, limit: int) -> list[str]:
        return []


def book_on(store: FailingStore, live_sessions: int = 10) -> SessionRegistry:
    return SessionRegistry(Config(), store, live_sessions=live_sessions)


async def test_what_is_recorded_while_the_store_is_away_is_written_when_it_is_back() -> None:
    store = FailingStore()
    registry = book_on(store)
    await registry.start()
    await registry.open(KEY)
    store.away = True
    for kind in ("one", "two"):
        registry.note(KEY, kind)
    await asyncio.sleep(0.15)
    assert store.kept == []
    store.away = False
    await asyncio.wait_for(registry.written(), GUARD_S)
    await registry.stop()
    assert store.kept == [(0, "one"), (1, "two")]


async def test_what_was_queued_is_waited_for_and_what_is_queued_meanwhile_is_not() -> None:
    journal = WriteBehindQueue(FailingStore(), 1)
    await journal.start()
    ended = asyncio.Event()

    async def one_more() -> None:
        await asyncio.sleep(0)
        if not ended.is_set():
            journal.put(Write(KEY, one_more))

    journal.put(Write(KEY, one_more))
    await asyncio.wait_for(journal.written(), GUARD_S)
    ended.set()
    await asyncio.wait_for(journal.stop(), GUARD_S)


async def test_after_a_contradicted_write_nothing_of_that_session_is_written() -> None:
    store = FailingStore()
    registry = book_on(store)
    await registry.start()
    await registry.open(KEY)
    registry.note(KEY, "one")
    await registry.written()
    store.contradicts = True
    registry.note(KEY, "two")
    await registry.written()
    store.contradicts = False
    registry.note(KEY, "three")
    await registry.open(SessionKey("t", "other"))
    registry.note(SessionKey("t", "other"), "four")
    await asyncio.wait_for(registry.stop(), GUARD_S)
    assert store.kept == [(0, "one"), (0, "four")]


async def test_a_write_whose_acknowledgement_was_lost_costs_its_session_nothing() -> None:
    attempts: list[str] = []

    async def taken_but_not_told() -> None:
        attempts.append("tried")
        raise StoreUnavailable("reset") if len(attempts) == 1 else StoreRefused("taken", duplicate=True)

    async def next_one() -> None:
        attempts.append("next")

    journal = WriteBehindQueue(FailingStore(), 1)
    await journal.start()
    journal.put(Write(KEY, taken_but_not_told))
    journal.put(Write(KEY, next_one))
    await asyncio.wait_for(journal.stop(), GUARD_S)
    assert attempts == ["tried", "tried", "next"]


async def test_a_removal_makes_good_what_was_missing_before_it() -> None:
    done: list[str] = []
    journal = WriteBehindQueue(FailingStore(), 1)
    await journal.start()

    async def contradicted() -> None:
        raise StoreRefused("taken", duplicate=True)

    async def do(what: str) -> None:
        done.append(what)

    journal.put(Write(KEY, contradicted))
    journal.put(Write(KEY, lambda: do("lost")))
    journal.put(Write(KEY, lambda: do("removed"), removes=True))
    journal.put(Write(KEY, lambda: do("begun anew")))
    await asyncio.wait_for(journal.stop(), GUARD_S)
    assert done == ["removed", "begun anew"]


async def test_stopping_while_the_store_is_away_does_not_hang_and_tells_what_is_lost(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def away() -> None:
        raise StoreUnavailable("the session store did not answer")

    journal = WriteBehindQueue(FailingStore(), 1, stop_limit_s=0.1)
    await journal.start()
    journal.put(Write(KEY, away))
    await asyncio.wait_for(journal.stop(), GUARD_S)
    assert "1 writes are lost" in caplog.text


async def test_without_its_record_a_session_is_not_begun_anew() -> None:
    store = FailingStore()
    store.away = True
    registry = book_on(store)
    with pytest.raises(StoreUnavailable, match="session store"):
        await registry.open(KEY)
    with pytest.raises(StoreUnavailable):
        await SessionLookup(registry).place("t", "s", read("t", [{"role": "user", "content": "hi"}]))
    store.away = False
    assert (await registry.open(KEY)).turns == ()


async def test_only_the_latest_sessions_stay_in_memory_and_those_in_use() -> None:
    registry = book_on(FailingStore(), live_sessions=2)
    keys = [SessionKey("t", str(number)) for number in range(4)]
    await registry.open(keys[0])
    registry.hold(keys[0])
    for key in keys[1:]:
        await registry.open(key)
    assert registry.session(keys[0])
    assert registry.session(keys[3])
    for key in keys[1:3]:
        with pytest.raises(KeyError):
            registry.session(key)


async def test_a_session_that_is_not_on_record_yet_is_not_forgotten() -> None:
    registry = book_on(FailingStore(), live_sessions=1)
    await registry.open(KEY)
    registry.note(KEY, "one")
    await registry.open(SessionKey("t", "other"))
    assert registry.session(KEY)
    await registry.start()
    await asyncio.wait_for(registry.stop(), GUARD_S)
    await registry.open(SessionKey("t", "third"))
    with pytest.raises(KeyError):
        registry.session(KEY)


class SlowStore(FailingStore):
    """A store that answers when it is let, and counts what it is asked."""

    def __init__(self) -> None:
        super().__init__()
        self.go = asyncio.Event()
        self.asked = 0

    async def events(self, key: SessionKey) -> list[Event]:
        self.asked += 1
        await self.go.wait()
        return await super().events(key)


async def test_of_many_that_open_a_session_at_once_one_loads_it_and_all_have_the_same() -> None:
    store = SlowStore()
    registry = book_on(store)

    async def held() -> int:
        async with registry.lease(KEY):
            await asyncio.sleep(0)
            return registry.holds(KEY)

    tasks = [asyncio.create_task(held()) for _ in range(5)]
    await asyncio.sleep(0)
    store.go.set()
    assert max(await asyncio.gather(*tasks)) == 5
    assert store.asked == 1
    assert (registry.holds(KEY), registry.is_live(KEY), registry._loading) == (0, False, {})


async def test_one_that_leaves_while_a_session_is_loaded_costs_the_others_nothing() -> None:
    store = SlowStore()
    registry = book_on(store)
    leaves, stays = (asyncio.create_task(registry.open(KEY)) for _ in range(2))
    await asyncio.sleep(0)
    leaves.cancel()
    await asyncio.sleep(0)
    store.go.set()
    assert (await asyncio.wait_for(stays, GUARD_S)).turns == ()


async def test_sessions_that_could_not_be_loaded_leave_nothing_behind() -> None:
    store = FailingStore()
    store.away = True
    registry = book_on(store)
    lookup = SessionLookup(registry)
    said = [{"role": role, "content": "hi"} for role in ("user", "assistant", "user")]
    for number in range(50):
        with pytest.raises(StoreUnavailable):
            await lookup.place("t", f"s{number}", read("t", said))
    assert (registry._loading, dict(registry._entries)) == ({}, {})

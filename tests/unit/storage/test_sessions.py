"""The session store on a real SQLite file."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from sqlalchemy.exc import IntegrityError

from soma_vllm.storage.sessions import SessionStore
from soma_vllm.types import Event, SessionKey

KEY = SessionKey("t", "s")


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[SessionStore]:
    store = SessionStore(f"sqlite+aiosqlite:///{tmp_path}/s.db")
    await store.open()
    yield store
    await store.close()


async def test_events_come_back_in_order(store: SessionStore) -> None:
    events = [Event("turn", float(n), {"n": n, "text": "höher"}) for n in range(5)]
    await store.append(KEY, 0, events[:2], "WARM_START", "c0")
    await store.append(KEY, 2, events[2:], "ADAPTING", "c1")
    assert await store.events(KEY) == events


async def test_two_writers_cannot_append_the_same_event(store: SessionStore) -> None:
    await store.append(KEY, 0, [Event("turn", 0.0)], "WARM_START", "c")
    with pytest.raises(IntegrityError):
        await store.append(KEY, 0, [Event("other", 0.0)], "CLOSED", "d")
    assert [e.kind for e in await store.events(KEY)] == ["turn"]
    assert (await store.sessions("t"))[0].phase == "WARM_START"


async def test_a_transcript_is_found_inside_its_tenant_only(store: SessionStore) -> None:
    await store.append(KEY, 0, [Event("turn", 0.0)], "WARM_START", "chain")
    assert await store.find("t", "chain") == "s"
    assert await store.find("other", "chain") is None


async def test_a_closed_session_is_not_recognised_again(store: SessionStore) -> None:
    await store.append(KEY, 0, [Event("closed", 0.0)], "CLOSED", "chain")
    assert await store.find("t", "chain") is None


async def test_sessions_survive_reopening(tmp_path: Path) -> None:
    url = f"sqlite+aiosqlite:///{tmp_path}/s.db"
    first = SessionStore(url)
    await first.open()
    await first.append(KEY, 0, [Event("turn", 1.0, {"a": 1})], "WARM_START", "c")
    await first.close()
    second = SessionStore(url)
    await second.open()
    assert await second.events(KEY) == [Event("turn", 1.0, {"a": 1})]
    assert await second.count() == 1
    await second.close()

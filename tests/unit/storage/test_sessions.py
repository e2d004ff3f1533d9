"""The session store on a real SQLite file."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from sqlalchemy.exc import IntegrityError

from soma_vllm.errors import ConfigError
from soma_vllm.storage.sessions import SessionStore, reading
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


async def test_sessions_are_listed_by_key_of_one_tenant_or_of_all(store: SessionStore) -> None:
    keys = [SessionKey("t", "a"), SessionKey("t", "b"), SessionKey("u", "a")]
    for key in reversed(keys):
        await store.append(key, 0, [Event("turn", 0.0)], "WARM_START", "c")
    assert await store.keys() == keys
    assert await store.keys("u") == keys[2:]


async def test_reading_creates_nothing(tmp_path: Path) -> None:
    file = tmp_path / "none.db"
    with pytest.raises(ConfigError, match=r"found no file .*none\.db; expected a session store"):
        async with reading(f"sqlite+aiosqlite:///{file}"):
            pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("url", "content", "told"),
    [
        ("no url", None, "expected an SQLAlchemy URL"),
        ("sqlite:///{folder}/x.db", b"", "found sqlite"),
        ("sqlite+aiosqlite:///{folder}/x.db", b"", "found no table events, sessions"),
        ("sqlite+aiosqlite:///{folder}/x.db", b"not a database" * 100, "cannot be read"),
        ("nosuch+driver://user:secret@host/db", None, "nosuch"),
    ],
)
async def test_a_database_that_is_no_session_store_is_told_as_such(
    tmp_path: Path, url: str, content: bytes | None, told: str
) -> None:
    if content is not None:
        (tmp_path / "x.db").write_bytes(content)
    with pytest.raises(ConfigError, match=told) as caught:
        async with reading(url.format(folder=tmp_path)):
            pass
    assert "secret" not in str(caught.value)


async def test_a_store_in_use_can_be_read(store: SessionStore, tmp_path: Path) -> None:
    await store.append(KEY, 0, [Event("turn", 0.0)], "WARM_START", "c")
    async with reading(f"sqlite+aiosqlite:///{tmp_path}/s.db") as other:
        assert [event.kind for event in await other.events(KEY)] == ["turn"]
    await store.append(KEY, 1, [Event("turn", 0.0)], "WARM_START", "c")

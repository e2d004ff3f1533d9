"""A database that goes away, comes back, or is full."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import event as sqlalchemy_event
from sqlalchemy import text
from sqlalchemy.exc import DataError, OperationalError
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import Pool
from support.lookups import found
from support.postgres import Postgres

from soma_vllm.config import Limits
from soma_vllm.errors import ConfigError, StoreRefused, StoreUnavailable
from soma_vllm.sessions.sql.api_keys import KeyStore
from soma_vllm.sessions.sql.records import AdapterRecord, Append, SessionSnapshot, TurnLocation, TurnMark
from soma_vllm.sessions.sql.store import SessionStore, reading
from soma_vllm.types import Event, SessionKey

KEY = SessionKey("t", "s")
STANDING = SessionSnapshot("", "WARM_START", "c", 1, None)
TURN = Event("turn", 1.0, {"number": 1}, {"answer": "hello"})


VERBS: dict[str, tuple[Any, ...]] = {
    "open": (),
    "append": (KEY, 0, [TURN], STANDING),
    "append_all": ([Append(KEY, 0, [TURN], STANDING)],),
    "retired": ("a",),
    "index": ([AdapterRecord(KEY, "a", 1, "/a", "ACTIVE")],),
    "adopt": (),
    "record_id": (),
    "adapter": ("a",),
    "erase_text": (KEY,),
    "erase_texts_before": (1.0,),
    "delete": (KEY,),
    "delete_unused_objects": (1.0,),
    "events": (KEY,),
    "find": ("t", "", ["c"], 5),
    "ending": ("t", "", ["e"], 5),
    "of_response": ("t", "r"),
    "users_of": ("a",),
    "served": (),
    "in_phase": ("CLOSED",),
    "family": ("t", "f"),
    "idle_since": (1.0, 5),
    "summaries": (None, 5),
    "lengths": (1.0,),
    "live": ("t",),
    "count": (),
    "keys": (),
    "adapters": (),
    "adapters_used": (),
    "missing_tables": (),
    "refuse_other_versions": (),
}
"""Every public coroutine of a session store but `close`, with something to ask it."""

KEY_VERBS: dict[str, tuple[Any, ...]] = {
    "open": (),
    "add": ("Ana", Limits()),
    "ls": (),
    "readable": (),
    "find": ("0123456789ab",),
    "revoke": ("0123456789ab",),
    "verify": ("sk-soma-0123456789ab-" + "s" * 32,),
}


def public_coroutines(store: type) -> set[str]:
    found = inspect.getmembers(store, inspect.iscoroutinefunction)
    return {name for name, _ in found if not name.startswith("_")} - {"close"}


def test_every_verb_of_the_stores_is_asked_below() -> None:
    assert public_coroutines(SessionStore) == VERBS.keys()
    assert public_coroutines(KeyStore) == KEY_VERBS.keys()


@pytest.mark.parametrize("verb", VERBS)
async def test_whatever_a_session_store_cannot_do_is_told_in_one_way(verb: str, tmp_path: Path) -> None:
    store = SessionStore(f"sqlite+aiosqlite:///{tmp_path}/none/sessions.db")
    with pytest.raises(StoreUnavailable, match=r"OperationalError|unable to open"):
        await getattr(store, verb)(*VERBS[verb])
    await store.close()


@pytest.mark.parametrize("verb", KEY_VERBS)
async def test_whatever_a_key_store_cannot_do_is_told_in_one_way(verb: str, tmp_path: Path) -> None:
    store = KeyStore.at(f"sqlite+aiosqlite:///{tmp_path}/none/sessions.db")
    with pytest.raises(StoreUnavailable, match="the key store did not answer"):
        await getattr(store, verb)(*KEY_VERBS[verb])
    await store.close()


@pytest.fixture
def database(postgres: Postgres) -> Iterator[str]:
    yield postgres.new_database()
    postgres.stop()
    postgres.start()


@pytest.fixture
async def remote(database: str) -> AsyncIterator[SessionStore]:
    store = SessionStore(database)
    await store.open()
    yield store
    await store.close()


async def test_a_server_that_went_away_and_came_back_is_used_again(
    postgres: Postgres, remote: SessionStore
) -> None:
    await asyncio.gather(*(remote.append(SessionKey("t", str(n)), 0, [TURN], STANDING) for n in range(5)))
    postgres.stop()
    for _ in range(3):
        with pytest.raises(StoreUnavailable):
            await remote.append(KEY, 0, [TURN], STANDING)
        with pytest.raises(StoreUnavailable):
            await remote.find("t", "", ["c"], 5)
    postgres.start()
    await remote.append(KEY, 0, [TURN], STANDING)
    assert await remote.events(KEY) == [TURN]
    assert await remote.count() == 6


async def test_a_server_that_was_restarted_in_between_is_not_noticed(
    postgres: Postgres, remote: SessionStore
) -> None:
    await asyncio.gather(*(remote.append(SessionKey("t", str(n)), 0, [TURN], STANDING) for n in range(5)))
    postgres.stop()
    postgres.start()
    assert await asyncio.gather(*(remote.live("t") for _ in range(5))) == [5] * 5


async def test_a_server_that_goes_away_during_an_append_leaves_nothing_half_done(
    postgres: Postgres, database: str, remote: SessionStore
) -> None:
    other = create_async_engine(database)
    async with other.connect() as connection:
        await connection.execute(text("LOCK TABLE turns IN ACCESS EXCLUSIVE MODE"))
        mark = TurnMark(0, 1, "c", None)
        append = asyncio.create_task(remote.append(KEY, 0, [TURN], STANDING, [mark]))
        waiting = text("SELECT count(*) FROM pg_locks WHERE NOT granted")
        while not await connection.scalar(waiting):
            await asyncio.sleep(0.01)
        postgres.stop()
        with pytest.raises(StoreUnavailable) as caught:
            await append
        await connection.invalidate()
    await other.dispose()
    assert not isinstance(caught.value, StoreRefused)
    postgres.start()
    assert await remote.events(KEY) == []
    await remote.append(KEY, 0, [TURN], STANDING, [mark])
    assert await found(remote, "t", "", ["c"]) == TurnLocation("s", 0, 1)


async def test_a_server_that_does_not_answer_is_an_outage_too(
    database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("soma_vllm.sessions.sql.connections.COMMAND_S", 0.3)
    store = SessionStore(database)
    await store.open()
    other = create_async_engine(database)
    async with other.connect() as connection:
        await connection.execute(text("LOCK TABLE turns IN ACCESS EXCLUSIVE MODE"))
        with pytest.raises(StoreUnavailable):
            await store.append(KEY, 0, [TURN], STANDING, [TurnMark(0, 1, "c", None)])
        await connection.rollback()
    await other.dispose()
    await store.append(KEY, 0, [TURN], STANDING, [TurnMark(0, 1, "c", None)])
    assert await store.events(KEY) == [TURN]
    await store.close()


async def test_a_server_that_is_away_at_first_is_used_when_it_is_there(
    postgres: Postgres, database: str
) -> None:
    postgres.stop()
    store = SessionStore(database)
    with pytest.raises(StoreUnavailable):
        await store.open()
    postgres.start()
    await store.open()
    assert await store.missing_tables() == []
    await store.close()


async def test_a_database_that_is_not_there_is_an_error_of_the_store(postgres: Postgres) -> None:
    store = SessionStore(postgres.url("none"))
    with pytest.raises(StoreUnavailable, match="does not exist"):
        await store.open()
    await store.close()
    with pytest.raises(ConfigError, match="cannot be read"):
        async with reading(postgres.url("none")):
            pass


async def test_a_value_that_postgresql_refuses_is_told_from_an_outage(remote: SessionStore) -> None:
    with pytest.raises(StoreRefused, match="DataError") as caught:
        await remote.append(SessionKey("t" * 65, "s"), 0, [TURN], STANDING)
    assert isinstance(caught.value.__cause__, DataError)
    assert not caught.value.duplicate
    assert "hello" not in f"{caught.value} {caught.value.__cause__}"


class Disk:
    """Room for an SQLite file, as every connection in use finds it."""

    pages = 2**30

    def limit(self, connection: Any, *_: object) -> None:
        cursor = connection.cursor()
        cursor.execute(f"PRAGMA max_page_count={self.pages}")  # never below what the file has already
        cursor.close()


@pytest.fixture
def disk() -> Iterator[Disk]:
    disk = Disk()
    sqlalchemy_event.listen(Pool, "checkout", disk.limit)
    yield disk
    sqlalchemy_event.remove(Pool, "checkout", disk.limit)


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[SessionStore]:
    """On SQLite alone: PostgreSQL's disk is not this test's to fill."""
    store = SessionStore(f"sqlite+aiosqlite:///{tmp_path}/sessions.db")
    await store.open()
    yield store
    await store.close()


async def test_a_full_disk_loses_nothing_and_is_written_to_when_there_is_room(
    store: SessionStore, disk: Disk
) -> None:
    await store.append(KEY, 0, [TURN], STANDING, [TurnMark(0, 1, "c", None)])
    disk.pages = 1
    long = Event("turn", 2.0, {"number": 2}, {"answer": "x" * 50_000})
    for _ in range(3):
        with pytest.raises(StoreUnavailable, match="OperationalError") as caught:
            await store.append(KEY, 1, [long], STANDING, [TurnMark(1, 2, "c2", None)])
        assert isinstance(caught.value.__cause__, OperationalError)
        assert "full" in str(caught.value.__cause__)
        assert "xxx" not in str(caught.value.__cause__)
    assert await store.events(KEY) == [TURN]
    assert await found(store, "t", "", ["c2", "c"]) == TurnLocation("s", 0, 1)
    disk.pages = 2**30
    await store.append(KEY, 1, [long], STANDING, [TurnMark(1, 2, "c2", None)])
    assert await store.events(KEY) == [TURN, long]


async def test_text_is_erased_on_a_full_disk_and_makes_room(store: SessionStore, disk: Disk) -> None:
    long = Event("turn", 1.0, {"number": 1}, {"answer": "x" * 50_000})
    await store.append(KEY, 0, [long], STANDING)
    disk.pages = 1
    assert await store.erase_text(KEY) == 1
    await store.append(SessionKey("t", "b"), 0, [long], STANDING)
    assert await store.events(SessionKey("t", "b")) == [long]

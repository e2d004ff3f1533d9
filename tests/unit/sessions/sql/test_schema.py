"""How a database comes to have the tables, and which databases are refused."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import Connection, text
from sqlalchemy.ext.asyncio import create_async_engine
from support.guard import GUARD_S
from support.lookups import found

import soma_vllm
from soma_vllm.config import Limits
from soma_vllm.errors import ConfigError
from soma_vllm.sessions.sql.api_keys import KeyStore
from soma_vllm.sessions.sql.records import AdapterRecord, SessionSnapshot, TurnLocation
from soma_vllm.sessions.sql.schema import _alembic, migrate
from soma_vllm.sessions.sql.store import SessionStore, reading
from soma_vllm.sessions.sql.tables import Base
from soma_vllm.types import Event, SessionKey

ROOT = Path(soma_vllm.__file__).parent.parent
OPENS = """
import asyncio, sys
from soma_vllm.sessions.sql.store import SessionStore

async def main(url):
    store = SessionStore(url)
    print("ready", flush=True)
    sys.stdin.readline()
    await store.open()
    print(await store.missing_tables(), flush=True)
    await store.close()

asyncio.run(main(sys.argv[1]))
"""


async def run(url: str, *statements: str) -> None:
    engine = create_async_engine(url)
    try:
        async with engine.begin() as connection:
            for statement in statements:
                await connection.execute(text(statement))
    finally:
        await engine.dispose()


async def opened(url: str) -> None:
    store = SessionStore(url)
    try:
        await store.open()
    finally:
        await store.close()


def differences(connection: Connection) -> list[object]:
    context = MigrationContext.configure(connection, opts={"compare_server_default": True})
    return compare_metadata(context, Base.metadata)


async def test_the_steps_give_exactly_the_tables(url: str) -> None:
    await opened(url)
    engine = create_async_engine(url)
    async with engine.connect() as connection:
        assert await connection.run_sync(differences) == []
    await engine.dispose()


async def test_a_difference_between_steps_and_tables_would_be_seen(url: str) -> None:
    await opened(url)
    await run(url, "DROP INDEX ix_turns_chain", "ALTER TABLE turns DROP COLUMN chain")
    engine = create_async_engine(url)
    async with engine.connect() as connection:
        assert len(await connection.run_sync(differences)) == 2
    await engine.dispose()


async def test_a_database_that_is_up_to_date_stays_as_it_is(url: str) -> None:
    key, event = SessionKey("t", "s"), Event("turn", 1.0, {}, {"answer": "hello"})
    for _ in range(2):
        await opened(url)
    store = SessionStore(url)
    await store.append(key, 0, [event], SessionSnapshot("", "WARM_START", "c", 1, None))
    await store.open()
    assert await store.events(key) == [event]
    await store.close()


async def test_a_database_of_the_first_version_is_brought_up_to_date_with_all_it_has(url: str) -> None:
    def first_version(connection: Connection) -> None:
        config = _alembic()
        config.attributes["connection"] = connection
        command.upgrade(config, "0001")

    engine = create_async_engine(url)
    async with engine.begin() as connection:
        await connection.run_sync(first_version)
    await engine.dispose()
    await run(
        url,
        "INSERT INTO sessions VALUES ('t', 's', '', 'WARM_START', 'c', 1, NULL, 1.0)",
        "INSERT INTO turns VALUES ('t', 's', 0, 1, '', 'c', NULL, 1.0)",
    )
    await opened(url)
    async with reading(url) as store:
        assert await found(store, "t", "", ["c"]) == TurnLocation("s", 0, 1)
        assert await store.ending("t", "", ["x"], 5) == []


async def test_a_record_has_an_id_of_its_own_that_stays_where_its_database_is_moved_to(tmp_path: Path) -> None:
    here, there = tmp_path / "sessions.db", tmp_path / "moved.db"
    ids = []
    for _ in ("one container", "another with the same path"):
        await opened(f"sqlite+aiosqlite:///{here}")
        here.rename(there)
        async with reading(f"sqlite+aiosqlite:///{there}") as store:
            ids.append(await store.record_id())
        async with reading(f"sqlite+aiosqlite:///{there}") as store:
            assert await store.record_id() == ids[-1]
    assert ids[0] != ids[1]


async def test_a_database_goes_back_to_an_older_revision_and_up_again_with_all_it_has(url: str) -> None:
    key, event = SessionKey("t", "s"), Event("turn", 1.0, {}, {"answer": "hello"})
    adapter = AdapterRecord(key, "a", 1, "/a", "ACTIVE", 1, "small", 8, 1024, 1.5)
    store = SessionStore(url)
    await store.open()
    await store.append(key, 0, [event], SessionSnapshot("", "SWITCHED", "c", 1, "a"), (), [adapter])
    for revision in ("0003", "0002", "0001"):
        assert (await migrate(store._engine, revision))[1] == revision
    assert await migrate(store._engine) == ("0001", "0006")
    assert await store.events(key) == [event]
    assert await store.adapters() == [AdapterRecord(key, "a", 1, "/a", "ACTIVE")]
    for revision in ("0007", "head", "-1"):
        with pytest.raises(ConfigError, match=r"expected one of 0001, 0002, 0003, 0004, 0005, 0006"):
            await migrate(store._engine, revision)
    await store.close()


async def test_a_key_that_may_choose_policies_is_read_by_the_version_before(url: str) -> None:
    keys = KeyStore.at(url)
    store = SessionStore(url)
    await store.open()
    key_id, _ = await keys.add("one", Limits(policies=("*",), live_sessions=3))
    await migrate(store._engine, "0005")
    async with store._engine.connect() as connection:
        (limits,) = (await connection.execute(text("SELECT limits FROM api_keys"))).one()
    assert (json.loads(limits) if isinstance(limits, str) else limits) == {"live_sessions": 3}
    await migrate(store._engine)
    assert [key.id for key in await keys.readable()] == [key_id]
    await keys.close()
    await store.close()


async def test_tables_of_others_may_be_beside_ours(url: str) -> None:
    await run(url, "CREATE TABLE invoices (id integer)")
    await opened(url)
    await opened(url)
    await run(url, "SELECT * FROM invoices")


async def test_tables_that_no_step_made_are_refused_and_left_alone(url: str) -> None:
    await run(url, "CREATE TABLE sessions (id integer)", "CREATE TABLE events (id integer)")
    with pytest.raises(
        ConfigError, match="found tables events, sessions without a revision; expected an empty"
    ):
        await opened(url)
    await run(url, "SELECT id FROM sessions", "SELECT id FROM events")
    with pytest.raises(Exception, match="texts"):
        await run(url, "SELECT * FROM texts")


async def test_a_newer_database_is_refused(url: str) -> None:
    await opened(url)
    await run(url, "UPDATE alembic_version SET version_num = '9999'")
    with pytest.raises(
        ConfigError,
        match=r"found revision 9999; expected 0006 or older: .* --downgrade 0006",
    ):
        await opened(url)
    with pytest.raises(ConfigError, match="found revision 9999; expected 0006"):
        async with reading(url):
            pass


async def test_a_refusal_shows_no_password(tmp_path: Path) -> None:
    url = f"postgresql+asyncpg://me:secret@/db?host={tmp_path}"
    with pytest.raises(ConfigError) as caught:
        async with reading(url):
            pass
    assert "me:***@" in str(caught.value)


async def test_two_stores_of_one_process_open_a_new_database_at_once(url: str) -> None:
    await asyncio.gather(*(opened(url) for _ in range(4)))
    async with reading(url) as store:
        assert await store.missing_tables() == []


async def test_one_process_opens_several_new_databases_at_once(tmp_path: Path) -> None:
    urls = [f"sqlite+aiosqlite:///{tmp_path}/{n}.db" for n in range(4)]
    await asyncio.gather(*map(opened, urls))
    for url in urls:
        async with reading(url) as store:
            assert await store.missing_tables() == []


async def test_two_processes_open_a_new_database_at_once(url: str) -> None:
    command = [sys.executable, "-c", OPENS, url]
    pipe = subprocess.PIPE
    processes = [
        subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, cwd=ROOT) for _ in range(2)
    ]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    told = [process.communicate(timeout=GUARD_S) for process in processes]
    assert [printed for printed, _ in told] == ["[]\n", "[]\n"], told

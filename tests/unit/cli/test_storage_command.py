"""`soma storage` on a real session store, beside a server and without one."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from soma_vllm.app import record
from soma_vllm.app.record import leased
from soma_vllm.cli.main import app
from soma_vllm.sessions.sql.records import AdapterRecord, SessionSnapshot
from soma_vllm.sessions.sql.store import SessionStore, reading
from soma_vllm.types import Event, SessionKey

KEY = SessionKey("t", "s")
SERVED = SessionSnapshot("", "SWITCHED", "c", 1, "a")


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite+aiosqlite:///{tmp_path}/sessions.db"


def soma(verb: str, url: str, *arguments: str) -> Result:
    return CliRunner().invoke(app, ["storage", verb, "--storage", url, *arguments])


def test_a_database_is_made_and_brought_back_for_an_older_version(url: str) -> None:
    assert soma("migrate", url).stdout == "migrated   from revision none to 0006\n"
    assert soma("migrate", url, "--downgrade", "0002").stdout == "migrated   from revision 0006 to 0002\n"
    refused = soma("adopt", url)
    assert refused.exit_code == 2
    assert "found revision 0002; expected 0006 (`soma storage migrate`" in refused.stderr
    assert soma("migrate", url).stdout == "migrated   from revision 0002 to 0006\n"


def test_what_is_not_there_is_neither_downgraded_nor_adopted(url: str, tmp_path: Path) -> None:
    for verb, *arguments in (("migrate", "--downgrade", "0002"), ("adopt",)):
        refused = soma(verb, url, *arguments)
        assert (refused.exit_code, "found no file" in refused.stderr) == (2, True)
    assert list(tmp_path.iterdir()) == []


def test_a_copy_becomes_a_record_of_its_own_that_has_the_sessions_and_no_adapter(url: str) -> None:
    async def fill() -> str:
        store = SessionStore(url)
        await store.open()
        adapter = AdapterRecord(KEY, "a", 1, "/a", "ACTIVE")
        await store.append(KEY, 0, [Event("turn", 1.0, {})], SERVED, (), [adapter])
        found = await store.record_id()
        await store.close()
        return found

    async def look() -> tuple[str, list[SessionKey], list[AdapterRecord]]:
        async with reading(url) as store:
            return await store.record_id(), await store.keys(), await store.adapters()

    before = asyncio.run(fill())
    told = soma("adopt", url).stdout
    now, keys, adapters = asyncio.run(look())
    assert told == f"adopted    as record {now}\n"
    assert (now != before, keys, adapters) == (True, [KEY], [])


def test_a_database_under_a_running_server_is_left_alone(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record, "GRACE_S", 0.0)
    assert soma("migrate", url).exit_code == 0

    async def serving() -> list[Result]:
        async with leased(url):
            orders = (("adopt",), ("migrate", "--downgrade", "0002"), ("migrate",))
            return [await asyncio.to_thread(soma, verb, url, *rest) for verb, *rest in orders]

    adopt, downgrade, upgrade = asyncio.run(serving())
    for refused in (adopt, downgrade):
        assert (refused.exit_code, "found another server on this record" in refused.stderr) == (1, True)
    assert upgrade.stdout == "migrated   from revision 0006 to 0006\n"

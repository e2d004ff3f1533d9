"""One server for one record, and for its part of the adapter root."""

from __future__ import annotations

import asyncio
import shutil
import signal
import subprocess
import sys
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
from support.guard import GUARD_S
from support.postgres import Postgres

from soma_vllm.adapters.store.opening import open_root
from soma_vllm.api.auth.quotas import Quotas
from soma_vllm.app import record
from soma_vllm.app.record import entered, leased
from soma_vllm.app.server import ModelPaths, SomaServer
from soma_vllm.config import parse_config
from soma_vllm.errors import InUse, StoreUnavailable
from soma_vllm.scheduler.policies.base import Policies
from soma_vllm.sessions.sql.store import SessionStore

SERVES = """
import asyncio, sys
from soma_vllm.app.record import leased

async def main():
    async with leased(sys.argv[1]):
        print("serving", flush=True)
        await asyncio.sleep(3600)

asyncio.run(main())
"""


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return f"sqlite+aiosqlite:///{tmp_path}/sessions.db"
    found: str = request.getfixturevalue("postgres").new_database()
    return found


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record, "GRACE_S", 0.2)
    monkeypatch.setattr(record, "LOOK_EVERY_S", 0.02)
    monkeypatch.setattr(record, "KEEP_EVERY_S", 0.05)


async def record_of(url: str) -> str:
    store = SessionStore(url)
    await store.open()
    found = await store.record_id()
    await store.close()
    return found


async def test_a_second_server_on_one_record_is_refused_until_the_first_ends(url: str) -> None:
    async with leased(url):
        with pytest.raises(InUse, match="found another server on this record; expected none"):
            async with leased(url):
                pass
    async with leased(url):
        pass


async def test_a_server_that_may_take_over_says_why_it_waits_once_and_goes_on(url: str) -> None:
    told: list[str] = []
    async with AsyncExitStack() as first:
        await first.enter_async_context(leased(url))
        second = AsyncExitStack()
        waits = asyncio.create_task(second.enter_async_context(leased(url, told.append)))
        async with asyncio.timeout(GUARD_S):
            while not told:
                await asyncio.sleep(0.02)
        await asyncio.sleep(0.1)
        assert not waits.done()
    async with second:
        await asyncio.wait_for(waits, GUARD_S)
    assert len(told) == 1
    assert "found another server on this record" in told[0]


async def test_another_path_to_the_same_file_is_the_same_record(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path, target_is_directory=True)
    async with leased(f"sqlite+aiosqlite:///{tmp_path}/s.db"):
        with pytest.raises(InUse):
            async with leased(f"sqlite+aiosqlite:///{tmp_path}/link/s.db"):
                pass
        async with leased(f"sqlite+aiosqlite:///{tmp_path}/another.db"):
            pass


async def test_the_lease_of_a_killed_server_is_free(url: str) -> None:
    command = [sys.executable, "-c", SERVES, url]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    assert server.stdout.readline() == "serving\n"
    with pytest.raises(InUse):
        async with leased(url):
            pass
    server.send_signal(signal.SIGKILL)
    server.communicate(timeout=GUARD_S)
    async with leased(url):
        pass


async def test_a_server_whose_record_was_taken_over_during_an_outage_is_told(postgres: Postgres) -> None:
    url = postgres.new_database()
    lost: list[bool] = []
    async with leased(url, lost=lambda: lost.append(True)):
        postgres.stop()
        with pytest.raises(StoreUnavailable):
            async with leased(url):
                pass
        postgres.start()
        await asyncio.sleep(0.3)
        assert lost == []
        with pytest.raises(InUse):
            async with leased(url):
                pass


async def test_after_an_outage_the_first_to_ask_has_the_record_and_the_other_ends(
    postgres: Postgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = postgres.new_database()
    lost = asyncio.Event()
    monkeypatch.setattr(record, "KEEP_EVERY_S", 1.0)
    async with leased(url, lost=lost.set):
        postgres.stop()
        postgres.start()
        async with leased(url):
            await asyncio.wait_for(lost.wait(), GUARD_S)


@pytest.mark.parametrize("kind", ["directory", "object store"])
async def test_a_copied_database_does_not_serve_beside_the_one_it_was_copied_from(
    kind: str, tmp_path: Path
) -> None:
    root = f"file://{tmp_path}/root" if kind == "object store" else str(tmp_path / "root")
    urls = [f"sqlite+aiosqlite:///{tmp_path}/{name}.db" for name in ("first", "copy")]
    await record_of(urls[0])
    shutil.copy(tmp_path / "first.db", tmp_path / "copy.db")
    first, copy = [open_root(root, tmp_path / "cache", owner=await record_of(url)) for url in urls]
    with first.in_service():
        async with AsyncExitStack() as held:
            with pytest.raises(InUse, match="soma storage adopt"):
                await entered(held, copy.in_service, None)
        store = SessionStore(urls[1])
        adopted = open_root(root, tmp_path / "cache", owner=await store.adopt())
        await store.close()
        with adopted.in_service():
            assert first.serves()
    assert not first.serves()


async def test_a_server_starts_nothing_before_the_record_is_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Quotas, "configured", lambda *_: None)  # its series would be registered twice
    document = {
        "storage": {"url": f"sqlite+aiosqlite:///{tmp_path}/s.db"},
        "adapters": {"root": str(tmp_path / "root")},
        "original": {"name": "large", "url": "http://127.0.0.1:9/v1"},
        "surrogate": {"name": "small"},
    }
    config = parse_config(document, "test")
    paths = ModelPaths(None, tmp_path, tmp_path, None)
    told: list[str] = []

    def server(**settings: bool) -> SomaServer:
        return SomaServer(config, paths, Policies(config), tmp_path, told.append, **settings)

    async with leased(config.storage.url):
        with pytest.raises(InUse, match="found another server on this record"):
            await server().run()
        assert told == []
        waits = asyncio.create_task(server(take_over=True).run())
        async with asyncio.timeout(GUARD_S):
            while not told:
                await asyncio.sleep(0.02)
        waits.cancel()
        await asyncio.gather(waits, return_exceptions=True)
    assert [line.split()[0] for line in told] == ["waiting"]

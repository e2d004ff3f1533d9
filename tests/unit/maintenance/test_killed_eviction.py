"""An eviction that is killed at any step: afterwards the session is served whole, or by the original."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from support.adapter_files import write_adapter
from support.crash import each_step
from support.services import SETTINGS, Services

from soma_vllm.adapters.store.opening import open_root
from soma_vllm.adapters.store.protocol import AdapterStore
from soma_vllm.config import parse_config
from soma_vllm.sessions.sql.store import SessionStore
from soma_vllm.sessions.state.phases import Phase
from soma_vllm.training.messages import TrainRequest, TrainResult


@pytest.fixture
def work() -> Iterator[Path]:
    """A folder in memory, where there is one."""
    memory = Path("/dev/shm")
    with TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        yield Path(folder)


class Server:
    """A server over a real adapter store and a real database in one folder."""

    def __init__(self, folder: Path, kind: str) -> None:
        root = f"file://{folder}/root" if kind == "remote" else str(folder / "root")
        self.adapter_store: AdapterStore = open_root(root, folder / "cache", owner="the record")
        if kind == "remote":
            self.adapter_store._patience_s = 0.0
        self._url = f"sqlite+aiosqlite:///{folder}/s.db"

    async def __aenter__(self) -> Services:
        self._store = SessionStore(self._url)
        await self._store.open()
        self._house = Services(parse_config(SETTINGS, "test"), self._store, adapter_store=self.adapter_store)
        train = self._house.trainer.train

        async def trained(request: TrainRequest) -> TrainResult:
            write_adapter(Path(request.out_dir))
            result: TrainResult = await train(request)
            return result

        self._house.trainer.train = trained
        await self._house.registry.start()
        return self._house

    async def __aexit__(self, *_: Any) -> None:
        await self._house.background.stop()
        await self._house.registry.stop()
        await self._store.close()


async def adapted(folder: Path, kind: str) -> str:
    async with Server(folder, kind) as services:
        services.surrogate.answers = ["different", "same"]
        history: list[dict[str, Any]] = []
        for number in (1, 2):
            await services.say(history, f"question {number}")
        await services.settled()
        ref = services.session().adapter
        assert ref is not None
        return ref.name


async def evicted(folder: Path, kind: str, name: str) -> None:
    async with Server(folder, kind) as services:
        await services.evictor.remove(name)


async def served_afterwards(folder: Path, kind: str, name: str) -> bool:
    """Whether the session is still served with its adapter, by a server that starts after the kill."""
    server = Server(folder, kind)
    async with server as services:
        await services.start()
        await services.evictor.sweep()
        await services.registry.written()
        (key,) = await services.store.keys()
        entry = await services.session_admin.entry(key)
        listed = [one.ref.name for one in server.adapter_store.list()]
        if entry.session.phase is Phase.SWITCHED:
            assert listed == [name]
            assert server.adapter_store.verify(name).ref == entry.session.adapter
        else:
            assert entry.session.phase is Phase.ROLLED_BACK
            assert listed == []
            assert [record.state for record in await services.store.adapters()] == ["RETIRED"]
        await services.stop()
        return entry.session.phase is Phase.SWITCHED


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["local", "remote"])
def test_an_eviction_killed_at_any_step_is_undone_or_brought_to_its_end(kind: str, work: Path) -> None:
    folder = work / "live"
    folder.mkdir()
    name = asyncio.run(adapted(folder, kind))
    shutil.copytree(folder, work / "before")

    def prepare() -> None:
        shutil.rmtree(folder)
        shutil.copytree(work / "before", folder)

    def evict(_: None) -> None:
        asyncio.run(evicted(folder, kind, name))

    outcomes = [asyncio.run(served_afterwards(folder, kind, name)) for _ in each_step(folder, prepare, evict)]
    assert outcomes[-1] is False, "not killed"

"""Fixtures of the routes' tests."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import uvloop
from support.api_services import (
    SurfaceHouse,
)
from support.fuzzing import Fuzzing
from support.guard import GUARD_S

from soma_vllm.maintenance import removal
from soma_vllm.sessions import ports
from soma_vllm.sessions.sql.store import SessionStore


@pytest.fixture(scope="module")
def fuzzing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fuzzing]:
    with (
        asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner,  # soma-serve's own loop
        pytest.MonkeyPatch.context() as patch,
    ):
        # On a machine with more to do than this the store is slow, and not away.
        patch.setattr(ports, "LOOKUP_S", GUARD_S)
        patch.setattr(removal, "WRITTEN_S", GUARD_S)
        services = runner.run(SurfaceHouse.built(tmp_path_factory.mktemp("fuzzing")))
        yield Fuzzing(runner, services)
        runner.run(services.close())


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[SessionStore]:
    store = SessionStore(f"sqlite+aiosqlite:///{tmp_path}/s.db")
    await store.open()
    yield store
    await store.close()

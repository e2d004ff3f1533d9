"""Fixtures of the routes' tests."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from support.fuzzing import Fuzzing, fuzzing_at

from soma_vllm.sessions.sql.api_keys import KeyStore
from soma_vllm.sessions.sql.store import SessionStore


@pytest.fixture(scope="module")
def fuzzing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fuzzing]:
    with fuzzing_at(tmp_path_factory.mktemp("fuzzing")) as opened:
        yield opened


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[SessionStore]:
    store = SessionStore(f"sqlite+aiosqlite:///{tmp_path}/s.db")
    await store.open()
    yield store
    await store.close()


@pytest.fixture
async def keys(tmp_path: Path) -> AsyncIterator[KeyStore]:
    store = KeyStore.at(f"sqlite+aiosqlite:///{tmp_path}/sessions.db")
    await store.open()
    yield store
    await store.close()

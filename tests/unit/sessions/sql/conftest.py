"""Databases for the session store: a test that asks for `url` or `store` runs on SQLite and on PostgreSQL."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from soma_vllm.sessions.sql.store import SessionStore


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty database."""
    if request.param == "sqlite":
        return f"sqlite+aiosqlite:///{tmp_path}/sessions.db"
    return request.getfixturevalue("postgres").new_database()


@pytest.fixture
async def store(url: str) -> AsyncIterator[SessionStore]:
    store = SessionStore(url)
    await store.open()
    yield store
    await store.close()

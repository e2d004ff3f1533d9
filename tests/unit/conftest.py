"""Dispatchers on fakes over one real database."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from support.fakes import FakeAdapterStore
from support.services import SETTINGS, Build, Later, Services

from soma_vllm.config import parse_config
from soma_vllm.sessions.sql.store import SessionStore


@pytest.fixture
async def build(tmp_path: Path) -> AsyncIterator[Build]:
    """Builds servers over one database and one adapter store; keyword arguments replace settings."""
    store = SessionStore(f"sqlite+aiosqlite:///{tmp_path}/s.db")
    await store.open()
    adapter_store = FakeAdapterStore()
    houses: list[Services] = []

    def make(**changes: Any) -> Services:
        settings = {
            name: {**value, **changes.get(name, {})} if isinstance(value, dict) else changes.get(name, value)
            for name, value in SETTINGS.items()
        }
        settings |= {name: value for name, value in changes.items() if name not in SETTINGS}
        services = Services(parse_config(settings, "test"), store, adapter_store=adapter_store)
        houses.append(services)
        return services

    yield make
    for services in houses:
        await services.background.stop()
        await services.registry.stop()
    await store.close()


@pytest.fixture
async def services(build: Build) -> Services:
    services = build()
    await services.registry.start()
    return services


@pytest.fixture
def later(monkeypatch: pytest.MonkeyPatch) -> Later:
    """What is old is so because the clock was moved on, not because a test has slept."""
    true, moved = time.time, [0.0]
    monkeypatch.setattr(time, "time", lambda: true() + sum(moved))
    return moved.append

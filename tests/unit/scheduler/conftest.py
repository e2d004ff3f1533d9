"""Dispatchers on fakes over one real database."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from scheduler_house import SETTINGS, Build, House, Later  # type: ignore[import-not-found]

from soma_vllm.config import parse_config
from soma_vllm.storage.sessions import SessionStore


@pytest.fixture
async def build(tmp_path: Path) -> AsyncIterator[Build]:
    """Builds houses over one database; keyword arguments replace settings."""
    store = SessionStore(f"sqlite+aiosqlite:///{tmp_path}/s.db")
    await store.open()
    houses: list[House] = []

    def make(**changes: Any) -> House:
        settings = {
            name: {**value, **changes.get(name, {})} if isinstance(value, dict) else changes.get(name, value)
            for name, value in SETTINGS.items()
        }
        settings |= {name: value for name, value in changes.items() if name not in SETTINGS}
        house = House(parse_config(settings, "test"), store)
        houses.append(house)
        return house

    yield make
    for house in houses:
        await house.background.stop()
        await house.book.stop()
    await store.close()


@pytest.fixture
async def house(build: Build) -> House:
    house = build()
    await house.book.start()
    return house


@pytest.fixture
def later(monkeypatch: pytest.MonkeyPatch) -> Later:
    """What is old is so because the clock was moved on, not because a test has slept."""
    true, moved = time.time, [0.0]
    monkeypatch.setattr(time, "time", lambda: true() + sum(moved))
    return moved.append

"""The sweeper outlives whatever goes wrong in a sweep; services end whole."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from support.guard import GUARD_S
from support.services import Build

from soma_vllm.errors import AdapterError, StoreUnavailable
from soma_vllm.maintenance.removal import LOADED_AT_ONCE
from soma_vllm.maintenance.sweep_trigger import SweepTrigger
from soma_vllm.maintenance.sweeper import Sweeper
from soma_vllm.types import Event, SessionKey


@pytest.mark.parametrize("error", [AdapterError("away"), StoreUnavailable("away"), OSError(116, "stale")])
async def test_a_sweep_that_fails_is_followed_by_another(error: Exception) -> None:
    swept = asyncio.Event()
    failures = [error]

    class Retention:
        async def sweep(self) -> int:
            if failures:
                raise failures.pop()
            swept.set()
            return 0

    class Evictor:
        async def sweep(self) -> int:
            return 0

    retention: Any = Retention()
    evictor: Any = Evictor()
    sweeper = Sweeper(retention, evictor, SweepTrigger(), every_s=0.001)
    sweeper.start()
    try:
        await asyncio.wait_for(swept.wait(), GUARD_S)
    finally:
        await sweeper.stop()


async def test_what_is_to_be_written_is_written_where_a_part_fails_to_end(
    build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    services = build()
    await services.start()
    await services.say([], "question")

    async def fails() -> None:
        raise RuntimeError("does not end")

    monkeypatch.setattr(services.built.background, "stop", fails)
    with pytest.raises(RuntimeError, match="does not end"):
        await services.stop()
    monkeypatch.undo()
    assert len(await services.store.events(services.session().key)) > 0


async def test_an_open_stream_of_a_session_that_is_removed_holds_up_no_sweep(
    build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("soma_vllm.maintenance.retention.REMOVAL_S", 0.05)
    services = build(retention={"session_ttl_s": 0.01})
    await services.start()
    await services.say([], "question", "open")
    await services.say([], "question", "idle")
    key = services.session("open").key
    services.registry.hold(key)
    assert await services.session_admin.remove(key, wait_s=0.05) is False
    await services.registry.written()
    await asyncio.sleep(0.05)
    async with asyncio.timeout(5):
        await services.retention.sweep()
    left = [summary.key.session for summary in await services.session_admin.summaries(None, 10, None)]
    assert left == ["open"]
    services.registry.release(key)
    assert await services.session_admin.remove(key) is True
    await services.stop()


async def test_retention_removes_more_sessions_in_one_sweep_than_it_takes_at_a_time(
    build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("soma_vllm.maintenance.retention.REMOVED_AT_ONCE", 4)
    services = build(retention={"session_ttl_s": 0.01})
    await services.start()
    for number in range(10):
        await services.say([], "question", f"s{number}")
    await services.registry.written()
    await asyncio.sleep(0.05)
    assert await services.retention.sweep() == 10
    assert await services.session_admin.summaries(None, 10, None) == []
    await services.stop()


async def test_sessions_that_take_longer_to_remove_do_not_end_the_sweep(
    build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("soma_vllm.maintenance.retention.REMOVED_AT_ONCE", 4)
    monkeypatch.setattr("soma_vllm.maintenance.retention.REMOVAL_S", 0.0)
    services = build(retention={"session_ttl_s": 0.01})
    await services.start()
    for number in range(10):
        await services.say([], "question", f"s{number}")
    await services.registry.written()
    for key in [services.session(f"s{number}").key for number in range(10)]:
        services.registry._entries.drop(key)
    await asyncio.sleep(0.05)
    assert await services.retention.sweep() == 10
    await services.stop()


async def test_few_sessions_are_read_at_a_time_to_be_removed(
    build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    services = build(retention={"session_ttl_s": 0.01})
    await services.start()
    for number in range(40):
        await services.say([], "question", f"s{number}")
    await services.registry.written()
    for key in list(services.registry._entries):
        services.registry._entries.drop(key)
    reading, most, real = 0, 0, services.store.events

    async def counted(key: SessionKey) -> list[Event]:
        nonlocal reading, most
        reading += 1
        most = max(most, reading)
        try:
            return await real(key)
        finally:
            reading -= 1

    monkeypatch.setattr(services.store, "events", counted)
    await asyncio.sleep(0.05)
    assert await services.retention.sweep() == 40
    assert most == LOADED_AT_ONCE
    await services.stop()

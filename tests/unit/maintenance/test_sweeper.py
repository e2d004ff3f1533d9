"""The sweeper outlives whatever goes wrong in a sweep; services end whole."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from support.guard import GUARD_S
from support.services import Build

from soma_vllm.errors import AdapterError, StoreUnavailable
from soma_vllm.maintenance.sweep_trigger import SweepTrigger
from soma_vllm.maintenance.sweeper import Sweeper


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

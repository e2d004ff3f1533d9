"""Holds on adapters in time: waiting, giving up, leaving."""

from __future__ import annotations

import asyncio

import pytest
from support.guard import GUARD_S

from soma_vllm.adapters.leases import AdapterLeases
from soma_vllm.adapters.meter import Outcome
from soma_vllm.adapters.slots import OVERTAKES
from soma_vllm.errors import EngineUnavailable


class Meter:
    def __init__(self) -> None:
        self.told: list[str] = []

    def waited(self, seconds: float, outcome: Outcome) -> None:
        assert seconds >= 0
        self.told.append(f"waited {outcome}")

    def overflowed(self, why: Outcome) -> None:
        self.told.append(f"overflowed {why}")


def queueing(slots: int = 1, wait_s: float = 10.0, meter: Meter | None = None) -> AdapterLeases:
    return AdapterLeases(slots, 100, wait_s, meter)


async def a_moment() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_without_a_queue_a_full_engine_refuses_at_once() -> None:
    meter = Meter()
    leases = AdapterLeases(1, meter=meter)
    held = await leases.acquire("a")
    with pytest.raises(EngineUnavailable, match="all adapter slots are in use"):
        await leases.acquire("b")
    assert await leases.acquire("a")
    await leases.release(held)
    assert (leases.in_use("a"), leases.count(), leases.distinct()) == (True, 1, 1)
    assert meter.told == ["overflowed full"]


async def test_a_request_waits_for_a_slot_and_gets_it() -> None:
    meter = Meter()
    leases = queueing(meter=meter)
    held = await leases.acquire("a")
    waiting = asyncio.create_task(leases.acquire("b"))
    await a_moment()
    assert (waiting.done(), leases.waiting()) == (False, 1)
    await leases.release(held)
    await leases.release(await waiting)
    assert (leases.count(), leases.waiting()) == (0, 0)
    assert meter.told == ["waited granted"]


async def test_after_the_longest_wait_the_original_answers() -> None:
    meter = Meter()
    leases = queueing(wait_s=0.01, meter=meter)
    held = await leases.acquire("a")
    with pytest.raises(EngineUnavailable, match="in use and stayed so"):
        await leases.acquire("b")
    assert leases.waiting() == 0
    assert meter.told == ["waited timed_out", "overflowed timed_out"]
    await leases.release(held)
    assert await leases.acquire("b")


async def test_a_cancelled_wait_leaves_nothing_behind() -> None:
    leases = queueing()
    held = await leases.acquire("a")
    waiting = [asyncio.create_task(leases.acquire(name)) for name in ("b", "c")]
    await a_moment()
    waiting[0].cancel()
    await a_moment()
    assert leases.waiting() == 1
    await leases.release(held)
    assert (await waiting[1]).name == "c"
    assert not leases.in_use("b")


async def test_who_is_cancelled_in_the_moment_of_getting_a_slot_gives_it_back() -> None:
    leases = queueing()
    held = await leases.acquire("a")
    lucky, next_one = (asyncio.create_task(leases.acquire(name)) for name in ("b", "c"))
    await a_moment()
    await leases.release(held)  # decides for b, which has not run yet
    assert leases.in_use("b")
    lucky.cancel()
    with pytest.raises(asyncio.CancelledError):
        await lucky
    assert (await next_one).name == "c"
    assert not leases.in_use("b")


async def test_a_cold_session_is_served_beside_hot_ones_that_never_pause() -> None:
    leases = queueing(slots=2)
    served: list[str] = []

    async def ask(name: str) -> None:
        held = await leases.acquire(name)
        try:
            served.append(name)
            await asyncio.sleep(0.001)
        finally:
            await leases.release(held)

    async def keep_asking(name: str) -> None:
        while True:
            await ask(name)

    # Several requests of each hot adapter overlap, so that it is always in use.
    hot = [asyncio.create_task(keep_asking(name)) for name in ("hot-1", "hot-2") for _ in range(6)]
    await asyncio.sleep(0.02)
    served.clear()
    await asyncio.wait_for(ask("cold"), GUARD_S)
    # Those let in already that have not run yet, and those that may overtake.
    assert served.index("cold") <= 12 + OVERTAKES
    for task in hot:
        task.cancel()
    await asyncio.gather(*hot, return_exceptions=True)
    assert (leases.count(), leases.waiting()) == (0, 0)


async def test_many_waiters_of_many_adapters_are_all_served() -> None:
    leases = queueing(slots=3)
    most = 0

    async def one(number: int) -> None:
        nonlocal most
        held = await leases.acquire(f"adapter-{number % 17}")
        most = max(most, leases.distinct())
        await asyncio.sleep(0)
        await leases.release(held)

    async with asyncio.timeout(GUARD_S):
        await asyncio.gather(*(one(number) for number in range(100)))
    assert most == 3
    assert (leases.count(), leases.waiting()) == (0, 0)


async def test_the_background_waits_for_users_and_keeps_an_adapter_from_leaving() -> None:
    leases = queueing()
    held = await leases.acquire("a")
    entered, go = asyncio.Event(), asyncio.Event()

    async def shadow() -> None:
        async with leases.background("b"):
            entered.set()
            await go.wait()

    shadowing = asyncio.create_task(shadow())
    await a_moment()
    assert not entered.is_set()
    await leases.release(held)
    await asyncio.wait_for(entered.wait(), GUARD_S)
    leaving = asyncio.create_task(leases.drain("b"))
    await a_moment()
    assert not leaving.done()
    go.set()
    await asyncio.wait_for(leaving, GUARD_S)
    await shadowing
    with pytest.raises(EngineUnavailable, match="adapter b is leaving"):
        await leases.acquire("b")


async def test_leaving_returns_when_the_last_hold_is_given_back() -> None:
    leases = AdapterLeases(1)
    first, second = await leases.acquire("a"), await leases.acquire("a")
    waiting = asyncio.create_task(leases.drain("a"))
    await leases.release(first)
    await a_moment()
    assert not waiting.done()
    await leases.release(second)
    await asyncio.wait_for(waiting, GUARD_S)
    assert not leases.can_acquire("a")
    leases.forget("a")
    assert leases.can_acquire("a")


async def test_who_waits_for_an_adapter_that_leaves_is_told() -> None:
    leases = queueing()
    held = await leases.acquire("a")
    waiting = asyncio.create_task(leases.acquire("b"))
    await a_moment()
    await leases.drain("b")
    with pytest.raises(EngineUnavailable, match="adapter b is leaving"):
        await waiting
    await leases.release(held)

"""Lanes: who asks next."""

from __future__ import annotations

import asyncio

from support.guard import GUARD_S

from soma_vllm.tools.replay.pace import Lanes


async def idle() -> None:
    """Let everything that can run do so."""
    for _ in range(10):
        await asyncio.sleep(0)


async def test_no_more_than_its_count_are_on_lanes_at_once() -> None:
    lanes, inside, most = Lanes(2), 0, 0

    async def one(rank: int) -> None:
        nonlocal inside, most
        async with lanes.lane(rank):
            inside += 1
            most = max(most, inside)
            await idle()
            inside -= 1

    await asyncio.gather(*(one(rank) for rank in range(5)))
    assert (inside, most) == (0, 2)


async def test_whoever_has_the_lowest_rank_is_next_however_late_he_comes() -> None:
    lanes, order = Lanes(1), list[int]()
    await lanes.enter(0)

    async def one(rank: int) -> None:
        async with lanes.lane(rank):
            order.append(rank)

    tasks = [asyncio.create_task(one(rank)) for rank in (3, 1, 2)]
    await idle()
    lanes.leave()
    await asyncio.gather(*tasks)
    assert order == [1, 2, 3]


async def test_one_who_stops_waiting_takes_no_lane_with_him() -> None:
    lanes = Lanes(1)
    await lanes.enter(0)
    waiting = asyncio.create_task(lanes.enter(1))
    await idle()
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    granted = asyncio.create_task(lanes.enter(2))
    await idle()
    lanes.leave()
    granted.cancel()  # granted already, and cancelled before it could run
    await asyncio.gather(granted, return_exceptions=True)
    async with asyncio.timeout(GUARD_S):
        await lanes.enter(3)

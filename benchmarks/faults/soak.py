"""Two thousand sessions that come, go and return: every answer its own, every turn on record, memory flat."""

from __future__ import annotations

import asyncio
import gc
from collections import deque
from collections.abc import Iterable

from faults.house import House, house
from faults.row import Row, resident_mib, timed
from faults.suite import Scene
from faults.talk import Talk

SESSIONS, QUICK = 2_000, 120
AT_ONCE = 16
ADAPTED = 4
"""Of so many sessions one is trained, and has four turns; the others have two."""
IN_MEMORY = 200
BUDGET = 100
"""Adapters on disk: of those that are trained some are evicted while others are used."""


def soak(scene: Scene) -> None:
    """The sessions, then a restart and some of them again."""
    row = scene.row("soak", "sessions come, go and return")
    with timed(row):
        asyncio.run(_soaked(scene, row, QUICK if scene.quick else SESSIONS))


async def _soaked(scene: Scene, row: Row, sessions: int) -> None:
    folder, budget = scene.new_folder(), {"max_count": BUDGET}
    async with house(folder, adapters=budget) as first:
        first.services.registry._live_sessions = IN_MEMORY
        talks = await come_and_go(first, row, sessions)
        await checked(first, row, talks)
    async with house(folder, adapters=budget) as again:
        back = talks[:: max(1, sessions // 100)]
        for talk in back:
            talk.http = again.http
            await talk.check_record()
            await talk.say("after the restart")
        await checked(again, row, back)


async def come_and_go(opened: House, row: Row, sessions: int) -> list[Talk]:
    """Play dialogues, several at once; an earlier one returns with each."""
    talks: list[Talk] = []
    over: deque[Talk] = deque()
    sizes: list[float] = []
    numbers = iter(range(1, sessions + 1))

    async def worker() -> None:
        for number in numbers:
            adapted = number % ADAPTED == 0
            talks.append(talk := opened.talk(row, number, adapted))
            await dialogue(opened, talk, 4 if adapted else 2)
            over.append(talk)
            await (returning := over.popleft()).say("back again")
            over.append(returning)
            if number % 50 == 0:
                opened.forget()
                gc.collect()
                sizes.append(resident_mib())

    await asyncio.gather(*(worker() for _ in range(AT_ONCE)))
    settled = sizes[len(sizes) // 3 :]
    row.memory_mib = max(0.0, settled[-1] - settled[0]) if settled else None
    return talks


async def dialogue(opened: House, talk: Talk, turns: int) -> None:
    """So many turns; a session that is adapted is waited for."""
    for number in range(1, turns + 1):
        await talk.say(f"question {number}", stream=number % 2 == 0)
        if number == 2:
            await opened.services.registry.written()
            await talk.until("SWITCHED", "ORIGINAL_ONLY", "WARM_START", "ADAPTING", "ROLLED_BACK")


async def checked(opened: House, row: Row, talks: Iterable[Talk]) -> None:
    """Count what is held though nothing is under way, and what is missing on record."""
    await opened.check_leaks(row)
    there = await opened.on_record()
    for talk in talks:
        talk.found_on_record(there.get(talk.name, 0))

"""The wall clock jumps, forwards and back, while dialogues go on."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager

from faults.house import house
from faults.row import Row, timed
from faults.soak import checked, dialogue
from faults.suite import Scene

JUMPS = (86_400.0, -2 * 86_400.0, 3_600.0, -1.0)
"""Seconds by which the clock is put forward, one after the other; retention removes nothing within days."""


def clocks(scene: Scene) -> None:
    """`time.time` is replaced in this process: the package has no clock of its own that could be set."""
    row = scene.row("clock", "jumps by a day and back")
    with timed(row), moving() as moved:
        asyncio.run(_played(scene, row, moved))


@contextmanager
def moving() -> Iterator[list[float]]:
    """The jumps so far, which the wall clock follows."""
    true, moved = time.time, [0.0]
    time.time = lambda: true() + sum(moved)
    try:
        yield moved
    finally:
        time.time = true


async def _played(scene: Scene, row: Row, moved: list[float]) -> None:
    async with house(scene.new_folder()) as opened:
        talks = [opened.talk(row, number, adapted=number % 2 == 0) for number in range(1, 9)]
        for talk in talks:
            await dialogue(opened, talk, 4)
        for jump in JUMPS:
            moved.append(jump)
            await asyncio.gather(*(talk.say("what time is it?", stream=jump > 0) for talk in talks))
            await opened.services.built.retention.sweep()
            await opened.services.evictor.sweep()
        await checked(opened, row, talks)

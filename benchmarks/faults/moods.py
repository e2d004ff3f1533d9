"""What dialogues meet while their original misbehaves: those that warm up, and those that were switched."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import httpx
from support.marker_original import MarkerOriginal

from faults.originals import Moody
from faults.real import Real, marker_server
from faults.row import Row, timed
from faults.suite import Scene
from faults.talk import Talk

MOODS = {
    "slow": "slow",
    "hangs": "hangs",
    "garbled": "sends malformed SSE",
    "half": "breaks off in the middle",
    "error": "sends an error with status 200",
    "empty": "sends no choices with status 200",
}
RECOVERS_S = 30.0


def moods(scene: Scene) -> None:
    """Each mood, streamed and whole; then an original that is not there, and back."""
    real = marker_server(scene)
    for mood, step in MOODS.items():
        row = scene.row("original", step)
        with timed(row):
            asyncio.run(_played(real, row, mood))
    row = scene.row("original", "dead, then back")
    with timed(row):
        asyncio.run(_dead(real, row))


async def _played(real: Real, row: Row, mood: str) -> None:
    async with real.http() as http:
        switched = await real.teach_two(http, row)
        warm = real.talk(http, row, f"warm, {mood}", "river")
        for stream in (True, False):
            asked = [
                warm.say(f"a question [{mood}]", stream=stream),
                *(talk.say("and you?") for talk in switched),
            ]
            await asyncio.gather(*asked)
        await _recovered(warm)
        await _after(real, http, row, [warm, *switched])


async def _dead(real: Real, row: Row) -> None:
    original = real.original
    assert original is not None
    async with real.http() as http:
        switched = await real.teach_two(http, row)
        warm = real.talk(http, row, "warm, dead", "river")
        await warm.say("a question")
        original.__exit__()
        for stream in (True, False):
            await asyncio.gather(*(talk.say("and now?", stream=stream) for talk in [warm, *switched]))
        back = MarkerOriginal(Moody, original.port)
        original.__dict__.update(back.__dict__)
        original.__enter__()
        await _recovered(warm)
        await _after(real, http, row, [warm, *switched])


async def _recovered(warm: Talk) -> None:
    """Return when the original answers again."""
    async with asyncio.timeout(RECOVERS_S):
        while not await warm.say("and now that it is well?"):
            await asyncio.sleep(1.5)


async def _after(real: Real, http: httpx.AsyncClient, row: Row, talks: Sequence[Talk]) -> None:
    await real.check_idle(http, row)
    await real.check_alive(http, row)
    for talk in talks:
        await talk.check_record()

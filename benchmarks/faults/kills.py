"""`kill -9` of each process, with one session at each step of its life: warm, training, switched, draining.

The steps of one kill are played together: while the process ends, one dialogue is in the middle of a warm
answer, one is being trained, one is answered under its adapter.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Callable, Mapping
from contextlib import suppress

import httpx
from support.server import kill

from faults.real import Real, marker_server, pair_server
from faults.row import Row, timed
from faults.suite import Scene
from faults.talk import SETTLED_S, Talk

STEPS = ("warm", "training", "switched")
End = Callable[[Real], None]


def _end_trainer(real: Real) -> None:
    os.kill(real.trainer(), signal.SIGKILL)


def _end_engine(real: Real) -> None:
    os.kill(real.engine_core(), signal.SIGKILL)
    real.ended()  # a server without its engine ends, to be started again


def _end_server(real: Real) -> None:
    kill(real.begun)


def _end_original(real: Real) -> None:
    os.kill(real.original_process(), signal.SIGKILL)


def of(process: str, end: End) -> Callable[[Scene], None]:
    """The kill of a process, while the server serves and while it drains."""

    def play(scene: Scene) -> None:
        real = pair_server(scene) if process == "original" else marker_server(scene)
        _kill(scene, real, process, end)
        _drain(scene, real, process, end)

    return play


trainer = of("trainer", _end_trainer)
surrogate = of("surrogate", _end_engine)
server = of("server", _end_server)
original = of("original", _end_original)
"""The pair's own, which its server starts again."""


# -- while it serves --------------------------------------------------------------------------------------


def _kill(scene: Scene, real: Real, process: str, end: End) -> None:
    rows = {step: scene.row(f"kill -9, {process}", step) for step in STEPS}
    with timed(*rows.values()):
        talks = asyncio.run(_killed(real, process, end, rows))
        asyncio.run(_afterwards(real, rows, *talks))


async def _killed(real: Real, process: str, end: End, rows: Mapping[str, Row]) -> tuple[dict[str, Talk], float]:
    """The dialogues of a kill, and when it was."""
    async with real.http() as http:
        switched = await real.teach_two(http, rows["switched"])
        warm = real.talk(http, rows["warm"], f"warm at the {process}'s end", "house")
        training = real.talk(http, rows["training"], f"training at the {process}'s end", "music", adapted=True)
        await warm.say("a first question")
        for number in (1, 2):
            await training.say(f"question {number}")
        await switched[0].say("and once more")
        await asyncio.sleep(SETTLED_S + 0.2)
        await training.say("question 3")
        await training.seen("training_submitted")
        under_way = [await warm.begin("a long answer [slow]"), await switched[1].begin("and at length")]
        killed_at = time.monotonic()
        await asyncio.to_thread(end, real)
        await asyncio.gather(*under_way)
        return {"warm": warm, "training": training}, killed_at


async def _afterwards(real: Real, rows: Mapping[str, Row], talks: Mapping[str, Talk], killed_at: float) -> None:
    """Everything that was answered is there, and each dialogue goes on with its own adapter or the original."""
    async with real.http() as http:
        for talk in [*talks.values(), *real.switched]:
            talk.http = http
            await talk.check_record(killed_at)
        await _answered(talks["warm"], "a long answer")
        await talks["training"].until("SWITCHED", "ORIGINAL_ONLY", "ROLLED_BACK")
        await _answered(talks["training"], "a question afterwards")
        for talk in real.switched:
            await _answered(talk, "are you still there?")
            if talk.engine != "surrogate":
                talk.row.noted["answered by the original afterwards"] += 1
        await real.check_idle(http, rows["switched"])
        await real.check_alive(http, rows["switched"])


async def _answered(talk: Talk, query: str, limit_s: float = 180.0) -> None:
    """Ask until there is an answer: an original that was killed takes its time."""
    async with asyncio.timeout(limit_s):
        while not await talk.say(query):
            await asyncio.sleep(1.0)


# -- while it drains --------------------------------------------------------------------------------------


def _drain(scene: Scene, real: Real, process: str, end: End) -> None:
    row = scene.row(f"kill -9, {process}", "draining")
    with timed(row):
        asyncio.run(_drained(real, row, process, end))
        real.stop()
        there = real.on_record()
        for talk in real.switched:
            talk.found_on_record(there.get(talk.name, 0))


async def _drained(real: Real, row: Row, process: str, end: End) -> None:
    async with real.http() as http:
        switched = await real.teach_two(http, row)
        warm = real.talk(http, row, f"warm, draining, {process}", "house")
        await warm.say("a first question")
        await switched[0].say("and once more")
        await asyncio.sleep(SETTLED_S)
        under_way = await warm.begin("a long answer [slow]")
        real.begun.process.send_signal(signal.SIGTERM)
        await _refused(http)
        await asyncio.to_thread(end, real)
        await under_way
        await asyncio.to_thread(real.ended)


async def _refused(http: httpx.AsyncClient) -> None:
    """Return once the server takes no new requests."""
    async with asyncio.timeout(60.0):
        with suppress(httpx.TransportError):
            while (await http.get("/ready")).status_code != 503:
                await asyncio.sleep(0.05)

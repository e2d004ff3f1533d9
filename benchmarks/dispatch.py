"""What dispatch takes by itself: real session store, engines that answer at once, no HTTP.

For 10, 100, 1,000 and 10,000 live sessions the same ten dialogues go on, the others being idle; populations
take turns within each round, so that a slow moment hits all alike. `dispatch` is the time from the request to
the engine's being asked, `turn` that to the recorded answer; requests a second are of ten at once, the record
included. Growth is the largest population's median over the smallest's, with a 95 % bootstrap interval over
rounds. The load has 500 streams under way; the pause is how much later than it should a task of the loop runs.

Each time stands beside the processor time that this process took for it, all threads together: what the time
would be at most on cores that nothing else uses, but for what a database server takes.

    python benchmarks/dispatch.py [--rounds N] [--sessions N,N,…] [--json FILE] [--write DOCUMENT] [--report]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import tempfile
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import ExitStack
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import numpy as np
import uvloop

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "tests"))  # the fakes that the tests use

from dispatch_tables import GROWS, markdown  # noqa: E402
from marked import replace_marked  # noqa: E402
from study.meter import machine  # noqa: E402
from support.fakes import FakeOriginal  # noqa: E402 - needs the path
from support.postgres import Postgres, binaries  # noqa: E402
from support.services import SETTINGS, Services  # noqa: E402

from soma_vllm.config import parse_config  # noqa: E402
from soma_vllm.engines.engine import ChatCall, Reply  # noqa: E402
from soma_vllm.scheduler.dispatcher import ChatRequest  # noqa: E402
from soma_vllm.sessions.sql.store import SessionStore  # noqa: E402
from soma_vllm.tools.command_line import write_json  # noqa: E402

ACTIVE = 10
AFRESH = 4
"""Rounds after which the active dialogues begin anew: none grows long."""
IN_FLIGHT, ANSWER_S, EVENTS, LOAD_S = 500, 6.0, 16, 20.0
TICK_S = 0.005
SYSTEM = {"role": "system", "content": "You are the assistant of a shop for bicycles. Be brief and friendly."}

asked_at: ContextVar[tuple[float, float]] = ContextVar("asked_at")


def now() -> tuple[float, float]:
    """(seconds on the wall, processor seconds of this process)."""
    return time.perf_counter(), time.process_time()


def since(then: tuple[float, float]) -> tuple[float, float]:
    wall, processor = now()
    return wall - then[0], processor - then[1]


class TimedOriginal(FakeOriginal):
    """Notes when it is asked; its streams take as long as those of a model."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[tuple[float, float]] = []
        """From a request to the call."""
        self.streams = False

    async def chat(self, call: ChatCall) -> Reply:
        self.waits.append(since(asked_at.get()))
        self.calls.clear()
        if self.streams:
            return Reply(events=self._slowly(call.body))
        reply: Reply = await super().chat(call)
        return reply

    async def _slowly(self, body: Mapping[str, Any]) -> AsyncGenerator[str, None]:
        pause = random.uniform(0.7, 1.3) * ANSWER_S / EVENTS
        async for event in self._stream(" ".join(["word"] * EVENTS), body, None):
            if event:
                yield event
                await asyncio.sleep(pause)


class Dialogue:
    """A client that keeps its history; half of them are known by their transcript alone."""

    def __init__(self, services: Services, number: int, generation: int = 0) -> None:
        self._services = services
        self._headers = {"authorization": "Bearer k"}
        if number % 2:
            self._headers["x-session-id"] = f"s{number}.{generation}"
        self._name = f"{number}.{generation}"
        self._messages: list[dict[str, Any]] = [SYSTEM]

    async def turn(self, stream: bool = False) -> tuple[float, float]:
        """One turn; what it took to the recorded answer."""
        query = f"Question {len(self._messages)} of customer {self._name}: which saddle suits a tall rider?"
        self._messages.append({"role": "user", "content": query})
        body = {"model": "soma", "messages": list(self._messages), "stream": stream, "max_tokens": 32}
        asked_at.set(began := now())
        answer = await self._services.dispatcher.chat(ChatRequest(body, self._headers))
        said = {"role": "assistant", "content": " ".join(["word"] * EVENTS)}
        if answer.reply.events is not None:
            async for _ in answer.reply.events:
                pass
        else:
            said = answer.reply.body["choices"][0]["message"]
        self._messages.append(said)
        return since(began)


class Population:
    """A dispatcher with so many live sessions, ten of which go on."""

    def __init__(self, services: Services, store: SessionStore, size: int) -> None:
        self.size = size
        self.services = services
        self.original = services.original
        self._store = store
        self.rounds: list[dict[str, float]] = []
        self.dispatches: list[tuple[float, float]] = []
        self._active: list[Dialogue] = []

    @classmethod
    async def made(cls, url: str, size: int) -> Population:
        store = SessionStore(url)
        await store.open()
        # No verdict within the run: what is measured is dispatch.
        config = parse_config({**SETTINGS, "warm_window": 64}, "benchmark")
        services = Services(config, store, original=TimedOriginal())
        await services.start()
        made = cls(services, store, size)
        for number in range(ACTIVE, size):
            await Dialogue(services, number).turn()
            if number % 500 == 0:
                await made.quiet()
        await made.begin_anew(0)
        return made

    async def begin_anew(self, generation: int) -> None:
        """Ten dialogues of three turns, instead of those that went on so far."""
        self._active = [Dialogue(self.services, number, generation) for number in range(ACTIVE)]
        for dialogue in self._active * 3:
            await dialogue.turn()
        await self.quiet()

    async def quiet(self) -> None:
        """Return when everything is written, and forget what the fakes keep."""
        await self.services.registry.written()
        self.services.events.clear()
        self.services.meter.spendings.clear()

    async def round(self) -> None:
        """One turn of each dialogue, one at a time; then two turns of all at once."""
        self.original.waits.clear()
        turns = [await dialogue.turn() for dialogue in self._active]
        waits = list(self.original.waits)
        await self.services.registry.written()
        began = time.perf_counter()
        for _ in range(2):
            await asyncio.gather(*(dialogue.turn() for dialogue in self._active))
        await self.services.registry.written()
        rate = 2 * ACTIVE / (time.perf_counter() - began)
        self.dispatches += waits
        medians = {"dispatch": np.median(waits, axis=0), "turn": np.median(turns, axis=0)}
        found = {name: float(both[0]) for name, both in medians.items()}
        found |= {f"{name}_processor": float(both[1]) for name, both in medians.items()}
        self.rounds.append({**found, "rate": rate})
        await self.quiet()

    async def close(self) -> None:
        await self.services.stop()
        await self._store.close()


async def growth(urls: Callable[[], str], sizes: Sequence[int], rounds: int) -> dict[str, Any]:
    """Every population's figures, and how they grow."""
    populations = [await Population.made(urls(), size) for size in sizes]
    order = random.Random(0)
    for number in range(rounds):
        if number and number % AFRESH == 0:
            for population in populations:
                await population.begin_anew(number)
        for population in order.sample(populations, len(populations)):
            await population.round()
    for population in populations:
        await population.close()
    first, *_, last = populations
    return {
        "populations": [_figures(population) for population in populations],
        "growth": {name: _growth(first, last, name) for name in GROWS},
    }


def _figures(population: Population) -> dict[str, Any]:
    return {
        "sessions": population.size,
        "requests_per_s": round(float(np.median([one["rate"] for one in population.rounds])), 1),
        "dispatch_ms": _percentiles(population.dispatches),
        "turn_ms": {
            name: _rounded(1000 * float(np.median([one[of] for one in population.rounds])))
            for name, of in (("median", "turn"), ("median_processor", "turn_processor"))
        },
    }


def _percentiles(taken: Sequence[tuple[float, float]]) -> dict[str, float]:
    """Milliseconds: the median, the processor's median, and both at 99 %."""
    both = np.asarray(taken) * 1000
    (wall, processor), (late, busy) = np.median(both, axis=0), np.percentile(both, 99, axis=0)
    names = ("median", "median_processor", "p99", "p99_processor")
    return {name: _rounded(value) for name, value in zip(names, (wall, processor, late, busy), strict=True)}


def _growth(first: Population, last: Population, name: str) -> dict[str, Any]:
    """The largest over the smallest, by medians of rounds; rounds are drawn in pairs."""
    small, large = (np.asarray([one[name] for one in p.rounds]) for p in (first, last))
    draws = np.random.default_rng(0).integers(len(small), size=(5000, len(small)))
    ratios = np.median(large[draws], axis=1) / np.median(small[draws], axis=1)
    low, high = np.percentile(ratios, [2.5, 97.5])
    return {"ratio": _rounded(np.median(large) / np.median(small)), "ci95": [_rounded(low), _rounded(high)]}


async def loaded(url: str) -> dict[str, Any]:
    """500 streams under way: pauses of the loop, and how long dispatch takes."""
    population = await Population.made(url, ACTIVE)
    population.original.streams = True
    over, pauses = asyncio.Event(), [(0.0, 0.0)]

    async def client(number: int) -> None:
        await asyncio.sleep(number * ANSWER_S / IN_FLIGHT)
        generation = 1
        while not over.is_set():
            dialogue = Dialogue(population.services, number, generation)
            for _ in range(3):
                await dialogue.turn(stream=True)
            generation += 1

    async def tick() -> None:
        while not over.is_set():
            began = now()
            await asyncio.sleep(TICK_S)
            wall, processor = since(began)
            pauses.append((wall - TICK_S, processor))

    clients = [asyncio.create_task(client(number)) for number in range(ACTIVE, ACTIVE + IN_FLIGHT)]
    await asyncio.sleep(ANSWER_S * 1.5)  # until all are under way
    population.original.waits.clear()
    ticking = asyncio.create_task(tick())
    await asyncio.sleep(LOAD_S)
    waits, in_flight = list(population.original.waits), population.services.built.original._in_flight
    over.set()
    await asyncio.gather(ticking, *clients)
    await population.close()
    return {
        "in_flight": in_flight,
        "requests_per_s": round(len(waits) / LOAD_S, 1),
        "dispatch_ms": _percentiles(waits),
        "pause_ms": _percentiles(pauses),
    }


def _rounded(value: float) -> float:
    return float(f"{value:.3g}")


def _urls(folder: Path, server: Postgres | None) -> Callable[[], str]:
    """Makes the URLs of new databases."""
    if server is not None:
        return server.new_database
    return lambda: f"sqlite+aiosqlite:///{tempfile.mkdtemp(dir=folder)}/s.db"


async def _measured(urls: Callable[[], str], sizes: Sequence[int], rounds: int) -> dict[str, Any]:
    return {**await growth(urls, sizes, rounds), "load": await loaded(urls())}


def main(arguments: Sequence[str]) -> None:
    """Measure, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=24)
    parser.add_argument("--sessions", type=lambda text: [int(n) for n in text.split(",")])
    parser.add_argument("--database", choices=("SQLite", "PostgreSQL"), action="append")
    parser.add_argument("--json", type=Path, help="write the figures here, beside those of other databases")
    parser.add_argument("--write", type=Path, help="document whose tables to replace by those of --json")
    parser.add_argument("--report", action="store_true", help="measure nothing; show what --json has")
    options = parser.parse_args(arguments)
    there = options.json is not None and options.json.exists()
    document: dict[str, Any] = json.loads(options.json.read_text()) if there else {"databases": {}}
    for database in () if options.report else options.database or ("SQLite", "PostgreSQL"):
        programs = binaries()
        if database == "PostgreSQL" and programs is None:
            print("PostgreSQL: found no server here; left out")
            continue
        document |= {
            "command": "make dispatch",
            "date": time.strftime("%Y-%m-%d", time.gmtime()),
            "machine": machine(),
        }
        with tempfile.TemporaryDirectory(prefix="soma-dispatch-") as folder, ExitStack() as held:
            server = held.enter_context(Postgres(programs)) if database == "PostgreSQL" and programs else None
            sizes = options.sessions or [10, 100, 1_000, 10_000]
            document["databases"][database] = uvloop.run(
                _measured(_urls(Path(folder), server), sizes, options.rounds)
            )
        if options.json is not None:
            write_json(options.json, document)
    print(markdown(document))
    if options.write is not None:
        replace_marked(options.write, "dispatch", markdown(document))


if __name__ == "__main__":
    main(sys.argv[1:])

"""What lies in the engine's memory: never too much, never what somebody uses taken away, nothing unfit."""

from __future__ import annotations

import asyncio
import random
import shutil
from collections import Counter
from pathlib import Path

import pytest
from support.guard import GUARD_S
from support.lora_files import files_of

from soma_vllm.adapters.loaded import LoadedAdapters, room_for
from soma_vllm.errors import EngineUnavailable
from soma_vllm.types import AdapterRef


class Engine:
    """Keeps adapters as vLLM does, and complains where vLLM would have to choose."""

    def __init__(self, places: int) -> None:
        self.places = places
        self.held: dict[str, AdapterRef] = {}
        self.log: list[str] = []
        self.go = asyncio.Event()
        self.go.set()
        self.failing = False

    async def add(self, ref: AdapterRef) -> None:
        await self.go.wait()
        self.log.append(f"add {ref.name}")
        if self.failing:
            raise EngineUnavailable("the engine could not load it")
        assert ref.name not in self.held
        self.held[ref.name] = ref
        assert len(self.held) <= self.places, "the engine would evict by itself"

    async def remove(self, ref: AdapterRef) -> None:
        await asyncio.sleep(0)
        self.log.append(f"remove {ref.name}")
        self.held.pop(ref.name, None)


class Meter:
    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def loaded(self, seconds: float, warm: bool) -> None:
        self.counts["warm" if warm else "cold"] += 1

    def evicted(self) -> None:
        self.counts["evicted"] += 1

    def rejected(self) -> None:
        self.counts["rejected"] += 1


@pytest.fixture
def refs(tmp_path: Path) -> list[AdapterRef]:
    return [files_of(tmp_path, f"adapter-{number}", number) for number in range(1, 9)]


def test_a_place_stays_free_where_there_are_more_places_than_slots() -> None:
    assert (room_for(4, 64), room_for(4, 4), room_for(4, 5)) == (63, 4, 4)


async def test_the_least_recently_used_adapter_makes_room(refs: list[AdapterRef]) -> None:
    engine, meter = Engine(3), Meter()
    loaded = LoadedAdapters(engine, 2, meter=meter)
    one, two, three = refs[:3]
    for ref in (one, two, one, three):
        await loaded.load(ref)
    assert engine.log == ["add adapter-1", "add adapter-2", "remove adapter-2", "add adapter-3"]
    assert loaded.resident() == (one, three)
    assert meter.counts == {"cold": 3, "warm": 1, "evicted": 1}


async def test_what_is_held_is_never_evicted_and_a_full_engine_says_so(refs: list[AdapterRef]) -> None:
    engine = Engine(2)
    held = {"adapter-1"}
    loaded = LoadedAdapters(engine, 2, in_use=held.__contains__)
    for ref in refs[:3]:
        await loaded.load(ref)
    assert "remove adapter-1" not in engine.log
    held.update(engine.held)
    with pytest.raises(EngineUnavailable, match="no room for adapter adapter-4: found 2 in use"):
        await loaded.load(refs[3])


async def test_loads_at_the_same_time_are_one_and_a_cancelled_caller_interrupts_none(
    refs: list[AdapterRef],
) -> None:
    engine = Engine(2)
    engine.go.clear()
    loaded = LoadedAdapters(engine, 2)
    first, second = (asyncio.create_task(loaded.load(refs[0])) for _ in range(2))
    await asyncio.sleep(0.05)
    first.cancel()
    engine.go.set()
    await asyncio.wait_for(second, GUARD_S)
    assert engine.log == ["add adapter-1"]
    assert loaded.has("adapter-1")


async def test_a_prefetched_adapter_is_there_when_it_is_loaded(refs: list[AdapterRef]) -> None:
    engine, meter = Engine(2), Meter()
    loaded = LoadedAdapters(engine, 2, meter=meter)
    loaded.prefetch(refs[0])
    loaded.prefetch(refs[0])
    async with asyncio.timeout(GUARD_S):
        while not loaded.has("adapter-1"):
            await asyncio.sleep(0.005)
    await loaded.load(refs[0])
    assert engine.log == ["add adapter-1"]
    assert meter.counts == {"warm": 1}


async def test_a_prefetch_that_fails_is_told_to_who_loads(refs: list[AdapterRef]) -> None:
    engine = Engine(2)
    loaded = LoadedAdapters(engine, 2)
    shutil.rmtree(refs[0].path)
    loaded.prefetch(refs[0])
    await asyncio.sleep(0.05)
    with pytest.raises(EngineUnavailable, match="not fit to be loaded"):
        await loaded.load(refs[0])
    assert engine.log == []


async def test_files_that_vanish_under_a_resident_adapter_are_not_missed_until_it_is_evicted(
    refs: list[AdapterRef],
) -> None:
    engine = Engine(2)
    loaded = LoadedAdapters(engine, 1)
    await loaded.load(refs[0])
    shutil.rmtree(refs[0].path)
    await loaded.load(refs[0])
    await loaded.load(refs[1])
    with pytest.raises(EngineUnavailable, match=r"not fit to be loaded: .*soma\.json is missing"):
        await loaded.load(refs[0])
    assert loaded.resident() == (refs[1],)


async def test_what_an_engine_took_half_way_is_removed(refs: list[AdapterRef]) -> None:
    engine = Engine(2)
    engine.failing = True
    loaded = LoadedAdapters(engine, 2)
    with pytest.raises(EngineUnavailable):
        await loaded.load(refs[0])
    assert engine.log == ["add adapter-1", "remove adapter-1"]
    engine.failing = False
    await loaded.load(refs[0])
    assert loaded.resident() == (refs[0],)


async def test_unloading_is_idempotent_and_waits_for_a_load_under_way(refs: list[AdapterRef]) -> None:
    engine = Engine(2)
    engine.go.clear()
    loaded = LoadedAdapters(engine, 2)
    loading = asyncio.create_task(loaded.load(refs[0]))
    await asyncio.sleep(0.05)
    unloading = asyncio.create_task(loaded.unload(refs[0]))
    await asyncio.sleep(0)
    engine.go.set()
    await asyncio.gather(loading, unloading)
    await loaded.unload(refs[0])
    assert engine.log == ["add adapter-1", "remove adapter-1"]
    assert loaded.resident() == ()


@pytest.mark.parametrize("seed", range(5))
async def test_in_any_order_the_engine_never_has_to_choose(refs: list[AdapterRef], seed: int) -> None:
    dice = random.Random(seed)
    engine = Engine(4)
    held: Counter[str] = Counter()
    loaded = LoadedAdapters(engine, 3, in_use=lambda name: held[name] > 0)

    async def use(ref: AdapterRef) -> None:
        for _ in range(10):
            if sum(count > 0 for count in held.values()) >= 2 and not held[ref.name]:
                await asyncio.sleep(0.001)
                continue
            held[ref.name] += 1
            try:
                await loaded.load(ref)
                for _ in range(3):
                    assert ref.name in engine.held
                    await asyncio.sleep(dice.random() * 0.002)
            finally:
                held[ref.name] -= 1
            if dice.random() < 0.3 and not held[ref.name]:
                await loaded.unload(ref)

    async with asyncio.timeout(GUARD_S):
        await asyncio.gather(*(use(ref) for ref in refs for _ in range(2)))
    assert set(engine.held) == {ref.name for ref in loaded.resident()}
    assert len(engine.held) <= 3

"""Rounds in which all engines do the same in turns, and loads beside another request."""

from __future__ import annotations

import asyncio
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from many_adapters.arms import Arm
from many_adapters.workload import (
    ADAPTERS,
    OVERFLOW_SLOTS,
    PROMPT,
    REQUESTS,
    Effort,
    drop_from_page_cache,
    prompts,
)

Figures = dict[str, list[float]]
"""Name of a figure -> its rounds."""


async def one_round(arm: Arm, effort: Effort, seed: int, figures: Figures) -> None:
    """Throughput over each number of adapters, prefill, first token, decode."""
    for count in effort.counts:
        if count > REQUESTS or (count > arm.slots and arm.name != "base"):
            continue
        if arm.name == "base" and count != effort.counts[0]:
            continue
        asked = prompts(seed, REQUESTS, PROMPT)
        began = time.perf_counter()
        await asyncio.gather(*(arm.ask(p, effort.tokens, i % count) for i, p in enumerate(asked)))
        name = "throughput" if arm.name == "base" else f"throughput_{count}"
        figures[name].append(REQUESTS * effort.tokens / (time.perf_counter() - began))
    (long,) = prompts(seed + 1, 1, 512)
    figures["prefill_512"].append(512 / (await arm.ask(long, 1, 0)).ttft)
    firsts = [(await arm.ask(p, 1, 0)).ttft for p in prompts(seed + 2, 4, 32)]
    figures["ttft"].append(statistics.median(firsts))
    (short,) = prompts(seed + 3, 1, PROMPT)
    pauses = [pause for _, pause in (await arm.ask(short, effort.tokens, 0)).pauses]
    figures["decode_1"].append(1 / statistics.median(pauses))


async def overflow(arm: Arm, effort: Effort, seed: int) -> float:
    """Longest wait of 16 requests of 16 adapters over fewer slots, over the fair share of waiting."""
    asked = prompts(seed, REQUESTS, PROMPT)
    began = time.perf_counter()
    heard = await asyncio.gather(*(arm.ask(p, effort.tokens, i) for i, p in enumerate(asked)))
    whole = max(h.came[-1] for h in heard) - began
    fair = whole * (1 - arm.slots / REQUESTS)
    return max(h.ttft for h in heard) / fair


async def load_stalls(arm: Arm, effort: Effort, adapters: Sequence[Path], seed: int) -> dict[str, Any]:
    """What loads do to another request, and how long they take."""
    fresh = range(ADAPTERS - effort.loads, ADAPTERS)
    for number in fresh:
        await arm.forget(number)
        drop_from_page_cache(adapters[number])
    quiet, busy = prompts(seed, 2, PROMPT)
    calm = [pause for _, pause in (await arm.ask(quiet, 60, 0)).pauses]
    usual = statistics.median(calm)
    stream = asyncio.create_task(arm.ask(busy, 60 + 12 * effort.loads, 0))
    await asyncio.sleep(10 * usual)
    windows = []
    for number in fresh:
        began = time.perf_counter()
        seconds = await arm.load(number)
        windows.append((began, began + seconds + 1.5 * usual, seconds))
        await asyncio.sleep(8 * usual)
    heard = await stream
    longest = [
        max((pause for end, pause in heard.pauses if a < end < b + pause), default=usual) for a, b, _ in windows
    ]
    return {
        "load_stall": statistics.median(longest) / usual,
        "load_stall_worst": max(longest) / usual,
        "pause_worst_without_loads": max(calm) / usual,
        "load_cold_s": statistics.median(seconds for *_, seconds in windows),
        "load_in_slot_s": await arm.load(fresh[-1]),
    }


async def load_cached(arm: Arm) -> float:
    """Seconds to put an adapter that the engine has in memory into a slot: the least recently used one."""
    return statistics.median([await arm.load(number) for number in range(arm.slots)])


async def measure(model: str, cores: str, effort: Effort, adapters: Sequence[Path]) -> dict[str, Any]:
    """Everything, by arm."""
    found: dict[str, Any] = {}
    for slots in effort.slots:
        arms = [Arm(name, slots, adapters) for name in ("base", "stock", "ours")]
        async with AsyncExitStack() as stack:
            for arm in arms:
                say(f"starting {arm.name} with {slots} slots")
                await stack.enter_async_context(arm.running(model, cores))
            rounds: dict[str, Figures] = {arm.name: defaultdict(list) for arm in arms}
            for arm in arms:
                if arm.name != "base":
                    for number in range(slots):
                        await arm.load(number)
            for turn in range(effort.rounds + 1):
                for arm in arms[turn % 3 :] + arms[: turn % 3]:
                    if turn == 0:
                        await one_round(arm, replace(effort, tokens=4), 0, defaultdict(list))  # warms up
                    else:
                        await one_round(arm, effort, 100 * turn, rounds[arm.name])
                say(f"round {turn} of {effort.rounds}, {slots} slots")
            loads = {}
            if slots == effort.slots[-1]:
                for arm in arms[1:]:
                    loads[arm.name] = await with_loads(arm, effort, adapters)
        found[str(slots)] = {"rounds": rounds, "loads": loads}
    found["overflow"] = await measure_overflow(model, cores, effort, adapters)
    return found


async def measure_ours(model: str, cores: str, effort: Effort, adapters: Sequence[Path]) -> dict[str, Figures]:
    """Rounds of the base engine and of ours alone, by arm: what stock's minutes a round would hold up."""
    slots = effort.slots[-1]
    arms = [Arm(name, slots, adapters) for name in ("base", "ours")]
    rounds: dict[str, Figures] = {arm.name: defaultdict(list) for arm in arms}
    async with AsyncExitStack() as stack:
        for arm in arms:
            say(f"starting {arm.name} with {slots} slots")
            await stack.enter_async_context(arm.running(model, cores))
        for number in range(slots):
            await arms[1].load(number)
        for turn in range(effort.rounds + 1):
            for arm in arms if turn % 2 else arms[::-1]:
                warming = replace(effort, tokens=4)
                figures: Figures = rounds[arm.name] if turn else defaultdict(list)
                await one_round(arm, effort if turn else warming, 100 * turn, figures)
            say(f"round {turn} of {effort.rounds}, {slots} slots")
    return rounds


async def with_loads(arm: Arm, effort: Effort, adapters: Sequence[Path]) -> dict[str, Any]:
    """Load latency, stalls and memory."""
    before = arm.memory()
    grown = range(arm.slots, ADAPTERS - effort.loads)
    for number in grown:
        await arm.load(number)
    per_adapter = (arm.memory() - before) / len(grown)
    cached = await load_cached(arm)
    return {
        **await load_stalls(arm, effort, adapters, 7000),
        "load_cached_s": cached,
        "bytes_per_adapter": per_adapter,
    }


async def measure_overflow(model: str, cores: str, effort: Effort, adapters: Sequence[Path]) -> dict[str, Any]:
    """The longest wait, by arm."""
    waits: dict[str, list[float]] = defaultdict(list)
    async with AsyncExitStack() as stack:
        arms = [Arm(name, OVERFLOW_SLOTS, adapters) for name in ("stock", "ours")]
        for arm in arms:
            say(f"starting {arm.name} with {OVERFLOW_SLOTS} slots")
            await stack.enter_async_context(arm.running(model, cores))
            for number in range(REQUESTS):
                await arm.load(number)
            await arm.ask(prompts(1, 1, PROMPT)[0], 4, 0)
        for turn in range(max(2, effort.rounds - 2)):
            for arm in arms:
                waits[arm.name].append(await overflow(arm, effort, 500 + turn))
    return dict(waits)


def say(line: str) -> None:
    """Progress, beside the table."""
    print(f"[multi_lora] {line}", file=sys.stderr, flush=True)

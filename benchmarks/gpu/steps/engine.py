"""vLLM's engine with the 0.5B shape: its start, decode and prefill with 0 to 32 adapters, and cold loads.

    engine.py --lora --graphs    CUDA graphs for decoding
    engine.py --graphs           the same without LoRA: what LoRA costs where no request uses it
    engine.py --lora             eager

Decoding is timed as the difference of a long and a short run of the same requests, so that prefill falls out.
With `--lora` the gaps of four streams are taken while adapters are loaded cold: by vLLM's own `add_lora`, and
by the project's worker extension, which reads them beside the engine's loop.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Awaitable, Callable
from typing import Any

import torch
from common import Step, percentiles
from tuned import FOLDER
from vllm_engine import Engine, started


async def warm(engine: Engine, lora: bool) -> None:
    """The first use, which compiles; then every adapter into its slot."""
    await engine.many(4, 4, 0, 32)
    last = engine.max_loras if lora else 0
    for first in range(1, last + 1, 4):
        numbers = range(first, min(first + 4, last + 1))
        await asyncio.gather(*(engine.one(engine.prompt(16), 2, number) for number in numbers))


async def decode(step: Step, engine: Engine, name: str, rows: int, adapters: int) -> None:
    """Milliseconds of a decode step."""
    short, long = (2, 6) if step.tiny else (8, 72)
    await engine.many(rows, 3, adapters, 32)
    times: dict[int, list[float]] = {short: [], long: []}
    for _ in range(1 if step.tiny else 2):
        for tokens in times:
            times[tokens].append(await engine.many(rows, tokens, adapters, 32))
    took = max(min(times[long]) - min(times[short]), 1e-6)
    step.record(
        "decode",
        engine=name,
        rows=rows,
        adapters=adapters,
        tokens_per_s=rows * (long - short) / took,
        step_ms=took / (long - short) * 1e3,
        spread=max(times[long]) / min(times[long]),
    )


async def prefill(step: Step, engine: Engine, name: str, adapters: int) -> None:
    """Tokens a second of several long prompts together, the second time they are asked."""
    tokens, rows = (64, 2) if step.tiny else (2048, 8)
    await engine.many(rows, 1, adapters, tokens)
    took = await engine.many(rows, 1, adapters, tokens)
    step.record("prefill", engine=name, adapters=adapters, tokens_per_s=rows * tokens / took, seconds=took)


async def throughput(step: Step, engine: Engine, lora: bool, name: str) -> None:
    """Decode and prefill, by rows and adapters, as far as the time goes."""
    counts = (0, 1, 2) if step.tiny else (0, 1, 4, 16, 32)
    for rows in (1, 4) if step.tiny else (8, 128, 32, 1):
        for adapters in counts if lora else (0,):
            if adapters > rows or step.left() < 6:
                continue
            with step.part("decode"):
                await decode(step, engine, name, rows, adapters)
    for adapters in (0, 1, 2) if step.tiny else (0, 1, 8):
        if (adapters and not lora) or step.left() < 5:
            continue
        with step.part("prefill"):
            await prefill(step, engine, name, adapters)


async def cold_loads(step: Step, engine: Engine, name: str) -> None:
    """What streams see while adapters are read: by none, by vLLM's own way, by the project's."""
    from soma_vllm.engines.vllm.internals import add_adapter

    streams, tokens, loads = (1, 60, 1) if step.tiny else (4, 2000, 12)
    first = engine.max_loras + 1

    async def none() -> list[float]:
        await asyncio.sleep(0.8)
        return []

    async def each(numbers: range, load: Callable[[Any], Awaitable[Any]]) -> list[float]:
        """Milliseconds of each load."""
        took = []
        for number in numbers:
            began = time.perf_counter()
            await load(engine.adapter(number))
            took.append(1e3 * (time.perf_counter() - began))
            await asyncio.sleep(0.03)
        return took

    ways: dict[str, Callable[[], Awaitable[list[float]]]] = {
        "no load": none,
        "add_lora": lambda: each(range(first, first + loads), engine.llm.add_lora),
        "read aside": lambda: each(
            range(first + loads, first + 2 * loads), lambda adapter: add_adapter(engine.llm, adapter)
        ),
    }
    for way, work in ways.items():
        with step.part(f"gaps, {way}"):
            found, took = await engine.gaps(streams, tokens, 1, work)
            figures = {"load_ms": percentiles(took)} if took else {}
            step.record(f"gaps, {way}", engine=name, gap_ms=percentiles(found), **figures)


async def run(step: Step) -> None:
    lora, graphs = step.options.lora, step.options.graphs
    name = f"{'lora' if lora else 'plain'} {'graphs' if graphs else 'eager'}"
    began = step.seconds()
    engine = started(step, lora, graphs)
    try:
        await engine.one(engine.prompt(16), 2)
        expand = "one stage" if FOLDER in os.environ else "default"
        step.record("start", engine=name, seconds=step.seconds() - began, lora_expand=expand)
        await warm(engine, lora)
        step.record("warm", engine=name, seconds=step.seconds() - began)
        if lora:
            with step.part("cold loads"):
                await cold_loads(step, engine, name)
        await throughput(step, engine, lora, name)
    finally:
        if step.device == "cuda":
            free, total = torch.cuda.mem_get_info()
            step.record("memory", engine=name, used_gib=(total - free) / 2**30)
        engine.llm.shutdown()


def main() -> None:
    step = Step("engine", lora=False, graphs=False)
    with step.part("engine"):
        asyncio.run(run(step))


if __name__ == "__main__":
    main()

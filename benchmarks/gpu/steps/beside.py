"""What streams feel while an adapter is trained on the same GPU.

The gaps of four streams of an engine with LoRA, alone and then beside a process that trains one adapter after
another.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from common import Step, percentiles
from vllm_engine import Engine, started


async def gaps(step: Step, engine: Engine) -> dict[str, float]:
    """Percentiles of the streams' gaps in ms, over some seconds."""
    streams, tokens, seconds = (2, 200, 2.0) if step.tiny else (4, 3000, 6.0)
    found, _ = await engine.gaps(streams, tokens, 2, lambda: asyncio.sleep(seconds))
    return percentiles(found)


async def trainer(step: Step) -> asyncio.subprocess.Process:
    """A process that trains adapters until the step's budget is over, and prints a line after each."""
    return await asyncio.create_subprocess_exec(
        sys.executable,
        str(Path(__file__).with_name("training.py")),
        *("--device", step.device, *(["--tiny"] if step.tiny else []), "--loop"),
        *("--models", str(step.models), "--out", str(step.options.out)),
        *("--budget", str(max(10.0, step.left()))),
        stdout=subprocess.PIPE,
        env=dict(os.environ),
    )


async def adapters(process: asyncio.subprocess.Process, seconds: list[float], at_most: int) -> None:
    """Collect what each adapter took, until there are `at_most` or the process ends."""
    assert process.stdout is not None
    while len(seconds) < at_most and (text := await process.stdout.readline()):
        if text.startswith(b"adapter"):
            seconds.append(float(text.split()[1]))


async def run(step: Step) -> None:
    began = step.seconds()
    engine = started(step, lora=True, graphs=step.device == "cuda")
    process = None
    try:
        await engine.many(4, 4, 2, 32)
        step.record("start", seconds=step.seconds() - began)
        step.record("alone", gap_ms=await gaps(step, engine))
        process = await trainer(step)
        # After its first adapter it has loaded everything, and only trains.
        await asyncio.wait_for(adapters(process, [], 1), max(10.0, step.left() - 12))
        trained: list[float] = []
        reading = asyncio.create_task(adapters(process, trained, sys.maxsize))
        beside: dict[str, Any] = await gaps(step, engine)
        reading.cancel()
        step.record("beside training", gap_ms=beside, adapters=len(trained), adapter_s=trained[:5])
    finally:
        if process is not None and process.returncode is None:
            process.kill()
            await process.wait()
        engine.llm.shutdown()


def main() -> None:
    step = Step("beside")
    with step.part("beside"):
        asyncio.run(run(step))


if __name__ == "__main__":
    main()

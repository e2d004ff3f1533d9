"""A `soma-serve` started for one replay, in a process group of its own.

Guarantees: a server started here is stopped here, whatever happens in between; its death ends what was
done with it; every line it prints is passed on.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path

from soma_vllm.errors import EngineUnavailable

HEALTH_POLL_S = 0.5
"""Seconds between two looks at a starting server."""
STOP_S = 60.0
"""Time a server gets to end after SIGTERM."""


def serve_command(config: Path, overrides: Sequence[str]) -> list[str]:
    """The command line of a `soma-serve` with the replay's own configuration and overrides."""
    command = [sys.executable, "-m", "soma_vllm.app.serve", "--config", str(config)]
    for override in overrides:
        command += ["--set", override]
    return command


@asynccontextmanager
async def started_server(
    command: Sequence[str], root: str, start_timeout_s: float, say: Callable[[str], None]
) -> AsyncIterator[asyncio.subprocess.Process]:
    """Run a server in a process group of its own while the block runs; ready when `root`/health answers 200.

    Raises:
        EngineUnavailable: another server holds the address; or this one ended, or was not healthy, within
            `start_timeout_s`.
    """
    if await _answers(root):
        raise EngineUnavailable(
            f"found a server at {root} already; expected a free address, or --url {root}/v1"
        )
    process = await asyncio.create_subprocess_exec(
        *command,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        start_new_session=True,
        limit=1 << 20,
    )
    printing = asyncio.create_task(_print_lines(process, say))
    try:
        await _healthy(process, root, start_timeout_s)
        yield process
    finally:
        await _stop(process)
        # A grandchild may outlive the server and hold the pipe open.
        await asyncio.wait({printing}, timeout=5.0)
        printing.cancel()


async def _print_lines(process: asyncio.subprocess.Process, say: Callable[[str], None]) -> None:
    assert process.stdout is not None
    async for line in process.stdout:
        say(line.decode(errors="replace").rstrip())


async def _healthy(process: asyncio.subprocess.Process, root: str, timeout_s: float) -> None:
    end = time.monotonic() + timeout_s
    while process.returncode is None:
        if await _answers(root):
            return
        if time.monotonic() > end:
            raise EngineUnavailable(f"soma-serve: not healthy after {timeout_s:.0f} s at {root}/health")
        await asyncio.sleep(HEALTH_POLL_S)
    raise EngineUnavailable(f"soma-serve ended with status {process.returncode} before it was ready")


async def _answers(root: str) -> bool:
    """True when `root`/health answers 200."""
    import httpx

    async with httpx.AsyncClient(trust_env=False, timeout=5.0) as http:
        try:
            return (await http.get(f"{root}/health")).status_code == 200
        except httpx.TransportError:
            return False


async def _stop(process: asyncio.subprocess.Process) -> None:
    """SIGTERM to the server alone, which stops its own children; SIGKILL to its group if that does not help."""
    if process.returncode is not None:
        return
    process.send_signal(signal.SIGTERM)
    try:
        with suppress(TimeoutError):
            await asyncio.wait_for(process.wait(), STOP_S)
    finally:
        # Also when a second Ctrl-C cuts the wait short.
        if process.returncode is None:
            os.killpg(process.pid, signal.SIGKILL)
            await process.wait()


async def while_alive(process: asyncio.subprocess.Process, work: Coroutine[None, None, None]) -> None:
    """Do `work` until its end, or until the server dies.

    Raises:
        EngineUnavailable: the server ended first.
    """
    working = asyncio.create_task(work)
    dying = asyncio.create_task(process.wait())
    try:
        await asyncio.wait({working, dying}, return_when=asyncio.FIRST_COMPLETED)
        if dying.done():
            raise EngineUnavailable(f"soma-serve ended with status {process.returncode} during the replay")
        await working
    finally:
        for task in (working, dying):
            task.cancel()
        await asyncio.gather(working, dying, return_exceptions=True)

"""A `soma-serve` started for one replay.

Guarantees: a server started here is stopped here, whatever happens in between, and dies with this process; its
death ends what was done with it; every line it prints is passed on, of its log the errors alone: the run folder
has all of it.
"""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import IO

from soma_vllm.app.log_writer import INDENT, LOGGED
from soma_vllm.engines.child_process import ChildProcess, is_healthy
from soma_vllm.errors import EngineUnavailable

_ERROR = re.compile(r"\b(ERROR|CRITICAL)\b")

POLL_S = 0.2
"""Seconds between two checks of a server."""
STOP_S = 60.0
"""Time a server gets to end after SIGTERM; it stops its own children."""


def serve_command(config: Path, overrides: Sequence[str]) -> list[str]:
    """The command line of a `soma-serve` with the replay's own configuration and overrides."""
    command = [sys.executable, "-m", "soma_vllm.app.serve", "--config", str(config)]
    for override in overrides:
        command += ["--set", override]
    return command


@asynccontextmanager
async def run_server(
    command: Sequence[str], root: str, start_timeout_s: float, say: Callable[[str], None]
) -> AsyncIterator[ChildProcess]:
    """Run a server while the block runs; ready when `root`/health answers 200.

    Raises:
        EngineUnavailable: another server holds the address; or this one ended, or was not healthy, within
            `start_timeout_s`.
    """
    if await is_healthy(root):
        raise EngineUnavailable(
            f"found a server at {root} already; expected a free address, or --url {root}/v1"
        )
    process = ChildProcess(command)
    output = process.start_with(subprocess.PIPE)
    assert output is not None
    passing_on = asyncio.create_task(_pass_on(output, say))
    try:
        deadline = time.monotonic() + start_timeout_s
        while process.alive() and not await is_healthy(root):
            if time.monotonic() > deadline:
                raise EngineUnavailable(
                    f"soma-serve: not healthy after {start_timeout_s:.0f} s at {root}/health"
                )
            await asyncio.sleep(POLL_S)
        if not process.alive():
            raise EngineUnavailable(f"soma-serve ended with status {process.exit_code()} before it was ready")
        yield process
    finally:
        await process.stop(STOP_S)
        # A process that left the group may still hold the pipe open.
        await asyncio.wait({passing_on}, timeout=5.0)
        passing_on.cancel()


async def _pass_on(output: IO[bytes], say: Callable[[str], None]) -> None:
    reader = asyncio.StreamReader(limit=1 << 20)
    loop = asyncio.get_running_loop()
    transport, _ = await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), output)
    hidden = False
    try:
        async for raw in reader:
            line = raw.decode(errors="replace").rstrip()
            if any(begins.match(line) for begins in LOGGED.values()):
                hidden = not _ERROR.search(line[:120])
            elif not line.startswith(INDENT):
                hidden = False
            if not hidden:
                say(line)
    finally:
        transport.close()


async def while_alive(process: ChildProcess, work: Coroutine[None, None, None]) -> None:
    """Do `work` until its end, or until the server dies.

    Raises:
        EngineUnavailable: the server ended first.
    """
    working = asyncio.create_task(work)
    try:
        while not working.done():
            if not process.alive():
                status = process.exit_code()
                raise EngineUnavailable(f"soma-serve ended with status {status} during the replay")
            await asyncio.wait({working}, timeout=POLL_S)
        await working
    finally:
        working.cancel()
        await asyncio.gather(working, return_exceptions=True)

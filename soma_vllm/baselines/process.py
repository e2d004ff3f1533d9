"""The server's side of a baseline's process: started at its first request, one request at a time.

Guarantees: nothing blocks the event loop; a process that died or hung past its time limit is replaced at the
next request; it ends with this process, however that ends, because its input does. Packages are imported there
alone, from this Python's own packages and `baselines.packages` before them.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from soma_vllm.errors import ModelError, PolicyUnavailable
from soma_vllm.private import OPENAI_KEY, secret

SCRIPT = Path(__file__).with_name("worker.py")
LINE_LIMIT = 64 * 1024 * 1024
"""Longest answer, bytes."""
NEEDS = {"routellm": (OPENAI_KEY,)}
"""Secrets that a package is given; no other is."""
END_S = 5.0
"""Longest wait for a process to end by itself."""


@dataclass(frozen=True)
class ProcessLimits:
    """What a process may take."""

    threads: int
    time_limit_s: float
    """Of one request."""
    load_limit_s: float


class BaselineProcess:
    """One package in a process of its own."""

    def __init__(
        self,
        name: str,
        settings: Callable[[], Mapping[str, Any]],
        packages: Path,
        limits: ProcessLimits,
        script: Path = SCRIPT,
    ) -> None:
        """`name` is one of `worker.LOADERS`, and `settings` what that wants; it may block, and raise
        ModelError."""
        self._name = name
        self._settings = settings
        self._packages = packages
        self._limits = limits
        self._script = script
        self._closed = False
        self._under_way: set[asyncio.Task[Any]] = set()
        self._process: asyncio.subprocess.Process | None = None
        self._turn = asyncio.Lock()

    async def start(self) -> None:
        """Start it, unless it runs; returns once the package is loaded.

        Raises:
            PolicyUnavailable: it does not start.
        """
        async with self._turn:
            await self._running()

    async def ask(self, request: Mapping[str, Any]) -> Any:
        """Its answer to one request.

        Raises:
            PolicyUnavailable: there is none.
        """
        task = asyncio.create_task(self._ask(request), name=f"soma-{self._name}")
        self._under_way.add(task)
        task.add_done_callback(self._over)
        # A client that leaves must not cost the others a process that takes long to load.
        return await asyncio.shield(task)

    async def _ask(self, request: Mapping[str, Any]) -> Any:
        async with self._turn:
            process = await self._running()
            return await self._exchange(process, request, self._limits.time_limit_s)

    def _over(self, task: asyncio.Task[Any]) -> None:
        self._under_way.discard(task)
        if not task.cancelled():
            task.exception()  # its caller may be gone: retrieve it, or asyncio logs it

    async def close(self) -> None:
        """End the process for good; requests that wait for it raise PolicyUnavailable."""
        self._closed = True
        await self._end()

    async def _running(self) -> asyncio.subprocess.Process:
        if self._process is not None and self._process.returncode is None:
            return self._process
        try:
            load = {"load": self._name, **await asyncio.to_thread(self._settings)}
        except ModelError as error:
            raise PolicyUnavailable(str(error)) from error
        if self._closed:
            raise PolicyUnavailable(f"{self._name} has been stopped")
        self._process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-P", str(self._script)),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            env=self._environment(),
            limit=LINE_LIMIT,
            start_new_session=True,  # Ctrl-C is the server's to handle
        )
        await self._exchange(self._process, load, self._limits.load_limit_s)
        return self._process

    async def _exchange(
        self, process: asyncio.subprocess.Process, request: Mapping[str, Any], limit_s: float
    ) -> Any:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            async with asyncio.timeout(limit_s):
                process.stdin.write(json.dumps(request).encode() + b"\n")
                await process.stdin.drain()
                line = await process.stdout.readline()
        except TimeoutError as error:
            await self._end()
            raise PolicyUnavailable(f"{self._name} has not answered within {limit_s:g} s") from error
        except (OSError, ValueError) as error:
            await self._end()
            raise PolicyUnavailable(f"{self._name} was lost ({type(error).__name__})") from error
        if not line:
            await self._end()
            raise PolicyUnavailable(f"{self._name} ended")
        said = json.loads(line)
        if "error" in said:
            detail = f": {said['message']}" if "message" in said else ""
            raise PolicyUnavailable(f"{self._name} failed with {said['error']}{detail}")
        return said["ok"]

    async def _end(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        if process.stdin is not None:
            process.stdin.close()
        try:
            async with asyncio.timeout(END_S):
                await process.wait()
        except TimeoutError:
            process.kill()
            await process.wait()

    def _environment(self) -> dict[str, str]:
        path = [str(self._packages), *filter(None, [os.environ.get("PYTHONPATH")])]
        needed = {name: secret(name) for name in NEEDS.get(self._name, ())}
        return {
            **os.environ,
            **{name: value for name, value in needed.items() if value is not None},
            "PYTHONPATH": os.pathsep.join(path),
            "OMP_NUM_THREADS": str(self._limits.threads),
            "TOKENIZERS_PARALLELISM": "false",
            "TRANSFORMERS_VERBOSITY": "error",
            "TQDM_DISABLE": "1",
            "HF_HUB_OFFLINE": "1",  # every model is a local folder by now
        }

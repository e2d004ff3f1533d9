"""Background work at an engine: one job at a time, while no user's request is running there.

Guarantees:

* A user's request is never held back: it is counted and sent; a job that is running is cancelled at that
  moment, which closes its connection and thereby stops its generation.
* A cancelled job is tried again when the engine is idle. A job waits at most `wait_s` for an idle engine and
  then runs for at most `wait_s`: the configured wait, or as long as users' requests take where that is longer.
* A user's request lasts from the call to the last token of its answer.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Coroutine
from dataclasses import replace
from statistics import median
from typing import Any, TypeVar

from soma_vllm.engines.engine import ChatCall, Engine, Reply
from soma_vllm.engines.stream_tap import StreamTap

T = TypeVar("T")

REQUESTS = 12
"""A wait is at least as long as this many of the latest requests took, one after the other."""


class JobDropped(Exception):
    """A background job was given up; the message says why."""


class BackgroundLane:
    """Users' requests at one engine, and the one background job there. Single event loop, no locks needed."""

    def __init__(self, yields: bool, wait_s: float) -> None:
        """`yields`: work runs only while no user is there. Without it, work only waits for other work."""
        self._yields = yields
        self._least_s = wait_s
        self._took: deque[float] = deque(maxlen=REQUESTS)
        self._users = 0
        self._working: asyncio.Task[Any] | None = None
        self._free = asyncio.Event()
        self._free.set()

    def watched(self, engine: Engine) -> Engine:
        """The same engine for users: their requests are counted while they last."""
        return _Watched(engine, self)

    def came(self) -> None:
        """A user's request goes to the engine; work there gives way."""
        self._users += 1
        self._settle()
        if self._yields and self._working is not None:
            self._working.cancel()

    def left(self, after_s: float | None = None) -> None:
        """A user's request is over, after so many seconds where it was answered."""
        assert self._users > 0, "found no request under way; expected one"
        self._users -= 1
        if after_s is not None:
            self._took.append(after_s)
        self._settle()

    @property
    def wait_s(self) -> float:
        """Longest wait for a turn, and longest turn, of what is begun now."""
        # By the median: one client that reads slowly is no slow engine.
        return max(self._least_s, len(self._took) * median(self._took) if self._took else 0.0)

    async def run(self, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """What `work` returns or raises, run in a quiet time; it may be begun several times.

        Raises:
            JobDropped: there was none within the wait, or the work took longer than that.
        """
        wait_s = self.wait_s
        deadline = asyncio.get_running_loop().time() + wait_s
        while True:
            await self._turn(deadline, wait_s)
            task: asyncio.Task[T] = asyncio.create_task(work(), name="soma-quiet-work")
            self._working = task
            self._settle()
            try:
                done, _ = await asyncio.wait([task], timeout=wait_s)
            finally:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
                self._working = None
                self._settle()
            if not done:
                raise JobDropped(f"not over after {wait_s:.3g} s")
            if not task.cancelled():
                return task.result()

    async def _turn(self, deadline: float, wait_s: float) -> None:
        """Return at a moment when work may begin; the caller begins before it awaits anything."""
        try:
            async with asyncio.timeout_at(deadline):
                while not self._free.is_set():
                    await self._free.wait()
        except TimeoutError:
            raise JobDropped(f"no quiet time within {wait_s:.3g} s") from None
        if asyncio.get_running_loop().time() > deadline:
            raise JobDropped(f"gave way until {wait_s:.3g} s were over")

    def _settle(self) -> None:
        if self._working is None and not (self._yields and self._users):
            self._free.set()
        else:
            self._free.clear()


class _Watched:
    """`Engine` that says when a user comes and leaves."""

    def __init__(self, engine: Engine, lane: BackgroundLane) -> None:
        self.name = engine.name
        self._engine = engine
        self._lane = lane

    async def chat(self, call: ChatCall) -> Reply:
        """Answer one chat completion; see `Engine.chat`."""
        self._lane.came()
        began = time.monotonic()
        try:
            reply = await self._engine.chat(call)
        except BaseException:
            self._lane.left()
            raise
        if reply.events is None:
            self._lane.left(time.monotonic() - began)
            return reply

        async def leave() -> None:
            self._lane.left(time.monotonic() - began if tap.exhausted else None)

        tap = StreamTap(reply.events, on_end=leave)
        return replace(reply, events=tap)

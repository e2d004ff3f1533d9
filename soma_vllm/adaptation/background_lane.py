"""Background work at an engine: how much of it is granted, and when it runs.

`BackgroundLane` guarantees:

* A user's request is never delayed: it is counted and sent, and a job that is running is cancelled at that
  moment, which closes its connection and thereby stops its generation.
* One job runs at a time, while no user's request is in the engine. A cancelled job is tried again in the next
  such time.
* A job is not put off for good: after `wait_s` it runs beside users, and no user cancels it. Without that, one
  request that hangs, or steady load, would end all audits.
* It runs for at most `wait_s`: the configured wait, or as long as users' requests take where that is longer, so
  that a slow engine does not drop every job.
* A user's request lasts from the call to the last token of its answer (`engines/guarded_original.py` tells).
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Coroutine
from statistics import median
from typing import Any, TypeVar

T = TypeVar("T")

REQUESTS = 12
"""A wait is at least as long as this many of the latest requests took, one after the other."""


class TokenBucket:
    """Grants `per_minute` things a minute; after a pause up to a minute's worth at once, at least one.

    In any span of t minutes at most `max(1, per_minute) + t * per_minute` are granted.
    """

    def __init__(self, per_minute: float, clock: Callable[[], float] = time.monotonic) -> None:
        """`clock` returns seconds and never goes back."""
        self._rate = per_minute / 60.0
        self._capacity = max(1.0, per_minute)
        self._left = self._capacity
        self._clock = clock
        self._updated = clock()

    def take(self) -> bool:
        """Whether one more is granted now."""
        now = self._clock()
        self._left = min(self._capacity, self._left + (now - self._updated) * self._rate)
        self._updated = now
        if self._left < 1.0:
            return False
        self._left -= 1.0
        return True


class JobDropped(Exception):
    """A background job was given up; the message says why."""


class BackgroundLane:
    """One background job at a time at an engine, while no user's request is there. For one event loop, without
    locks."""

    def __init__(self, yields: bool, wait_s: float) -> None:
        """`yields`: jobs run only while no user's request is there; False: they wait for other jobs alone.
        `wait_s`: shortest limit of a wait and of a run."""
        self._yields = yields
        self._min_wait_s = wait_s
        self._took: deque[float] = deque(maxlen=REQUESTS)
        self._users = 0
        self._running: asyncio.Task[Any] | None = None
        self._gives_way = True
        """The running job is cancelled when a user comes."""
        self._free = asyncio.Event()
        self._unused = asyncio.Event()
        """No job runs, whether users are there or not."""
        self._update_free()

    def came(self) -> None:
        """Count a user's request that goes to the engine, and cancel the job there."""
        self._users += 1
        self._update_free()
        if self._yields and self._gives_way and self._running is not None:
            self._running.cancel()

    def left(self, after_s: float | None = None) -> None:
        """Count a user's request that is over; `after_s`: seconds that its answer took, None without one."""
        assert self._users > 0, "no user's request is counted"
        self._users -= 1
        if after_s is not None:
            self._took.append(after_s)
        self._update_free()

    @property
    def wait_s(self) -> float:
        """Longest wait and longest run of a job that is submitted now, seconds."""
        # By the median: one client that reads slowly is no slow engine.
        return max(self._min_wait_s, len(self._took) * median(self._took) if self._took else 0.0)

    async def run(self, job: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Run a job when the engine has no users, or beside them once it has waited for `wait_s`, and return
        what it returns; it may be started several times.

        Raises:
            JobDropped: other jobs took the lane for as long again, or the job ran longer than `wait_s`.
        """
        wait_s = self.wait_s
        deadline = asyncio.get_running_loop().time() + wait_s
        while True:
            gives_way = await self._wait_until_free(deadline, wait_s)
            task: asyncio.Task[T] = asyncio.create_task(job(), name="soma-background-job")
            self._running, self._gives_way = task, gives_way
            self._update_free()
            try:
                done, _ = await asyncio.wait([task], timeout=wait_s)
            finally:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
                self._running = None
                self._update_free()
            if not done:
                raise JobDropped(f"not over after {wait_s:.3g} s")
            if not task.cancelled():
                return task.result()

    async def _wait_until_free(self, deadline: float, wait_s: float) -> bool:
        """Return when a job may start, and whether it gives way to users; the caller starts it before it awaits
        anything."""
        for free, until in ((self._free, deadline), (self._unused, deadline + wait_s)):
            try:
                async with asyncio.timeout_at(until):
                    while not free.is_set():
                        await free.wait()
            except TimeoutError:
                continue
            if asyncio.get_running_loop().time() <= until:
                return free is self._free
        raise JobDropped(f"no turn within {2 * wait_s:.3g} s")

    def _update_free(self) -> None:
        unused = self._running is None
        (self._unused.set if unused else self._unused.clear)()
        (self._free.set if unused and not (self._yields and self._users) else self._free.clear)()

"""Keeps one child server alive: started, watched, and restarted.

Guarantees: until the child has been ready once, its death is final (`FAILED`), because the way it is started is
wrong. Later deaths restart it after a delay that doubles; after too many quick deaths in a row it is `FAILED`
and tried again at long intervals only. Readiness for `stable` seconds resets their count.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

from soma_vllm.engines.child_process import ChildServer, tail
from soma_vllm.errors import EngineUnavailable

logger = logging.getLogger(__name__)


class State(StrEnum):
    """A child server's state."""

    STARTING = "starting"
    READY = "ready"
    DOWN = "down"
    """It died and will be restarted."""
    STOPPED = "stopped"
    """Not started yet, or stopped on purpose."""
    FAILED = "failed"
    """Given up: for good where it was never ready, else until the next try after `Patience.retry`."""


@dataclass(frozen=True)
class Patience:
    """How long to wait for a child and how often to restart it. In seconds, except the count."""

    start: float = 600.0
    """Until the first 200 from /health."""
    first_delay: float = 1.0
    longest_delay: float = 60.0
    quick_deaths: int = 5
    """Deaths in a row, each within `stable` of readiness, after which it is restarted at long intervals."""
    retry: float = 120.0
    """That interval."""
    stable: float = 60.0
    poll: float = 0.2
    """Between checks of the process, and of /health while starting."""
    health_every: float = 10.0
    """Between checks of /health once ready."""
    health_timeout: float = 5.0
    hang: float = 120.0
    """Time without a good /health after which a running child counts as dead."""
    stop: float = 15.0
    """From SIGTERM to SIGKILL."""


class Backoff:
    """Counts quick deaths, from how long the child was ready each time. Pure: has no clock."""

    def __init__(self, patience: Patience) -> None:
        self._patience = patience
        self._deaths = 0

    def died(self, ready_for: float) -> float:
        """Delay before the next start, seconds."""
        if ready_for >= self._patience.stable:
            self._deaths = 0
        self._deaths += 1
        if self.exhausted:
            return self._patience.retry
        return float(min(self._patience.longest_delay, self._patience.first_delay * 2 ** (self._deaths - 1)))

    @property
    def exhausted(self) -> bool:
        """Whether it died too often in a row for a quick restart."""
        return self._deaths >= self._patience.quick_deaths


class Supervisor:
    """Keeps one `ChildServer` alive. `state` is its state; listeners of `on_change` get every new one."""

    def __init__(
        self, child: ChildServer, name: str = "the original", patience: Patience | None = None
    ) -> None:
        self.child = child
        self.name = name
        self.restarts = 0
        self._patience = patience or Patience()
        self._state = State.STOPPED
        self._changed = asyncio.Event()
        self._listeners: list[Callable[[State], None]] = []
        self._task: asyncio.Task[None] | None = None
        self._why = "was not started"

    @property
    def state(self) -> State:
        """The child's state as last seen."""
        return self._state

    def on_change(self, listener: Callable[[State], None]) -> None:
        """Call `listener` with each new state, in the event loop."""
        self._listeners.append(listener)

    def start(self) -> None:
        """Start the child, or take over one that runs already, and watch it from now on.

        Call it in the thread of the running event loop.

        Raises:
            PreflightError: the socket's path is too long.
        """
        if self._task is not None:
            return
        if self.child.pid is None:
            self.child.start()
        self._set_state(State.STARTING)
        self._task = asyncio.create_task(self._watch(), name=f"watch {self.name}")

    async def wait_ready(self, timeout: float | None = None) -> None:
        """Return once the child is ready. A child that is merely slow is left running.

        Raises:
            EngineUnavailable: it failed, was stopped, or `timeout` seconds passed; with the end of its log.
        """
        why = None
        try:
            async with asyncio.timeout(timeout):
                while self._state not in (State.READY, State.FAILED, State.STOPPED):
                    await self._changed.wait()
        except TimeoutError:
            why = f"is not ready after {timeout:g} s"
        if self._state is not State.READY:
            log = f"the end of {self.child.log_path}:\n{tail(self.child.log_path, 40)}"
            raise EngineUnavailable(f"{self.name} {why or self._why}; {log}")

    async def stop(self) -> None:
        """Stop watching, then stop the child and all of its group. Idempotent."""
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.wait([task])
        await self.child.stop(self._patience.stop)
        if self._state is not State.FAILED:
            self._why = "was stopped"
            self._set_state(State.STOPPED)

    async def _watch(self) -> None:
        backoff = Backoff(self._patience)
        ever_ready = False
        while True:
            ready_for = await self._follow()
            ever_ready = ever_ready or ready_for is not None
            self._set_state(State.DOWN)
            code = await self.child.stop(self._patience.stop)
            self._why = f"ended with exit code {code}"
            delay = backoff.died(ready_for or 0.0)
            if backoff.exhausted or not ever_ready:
                self._set_state(State.FAILED)
            if not ever_ready:
                return
            while not await self._restarted(delay):
                delay = backoff.died(0.0)

    async def _restarted(self, delay: float) -> bool:
        """Start the child again; False where this machine has no process or memory for it now."""
        await asyncio.sleep(delay)
        self.restarts += 1
        try:
            self.child.start()
        except OSError as error:
            self._why = f"cannot be started: {error}"
            logger.error("%s %s", self.name, self._why)
            return False
        self._set_state(State.STARTING)
        return True

    async def _follow(self) -> float | None:
        """Follow the child from its start to its end: seconds it was ready, or None if it never was."""
        if not await self._becomes_ready():
            return None
        began = time.monotonic()
        self._set_state(State.READY)
        await self._wait_until_down()
        return time.monotonic() - began

    async def _becomes_ready(self) -> bool:
        """Wait for /health; False when the child ends first or takes too long."""
        deadline = time.monotonic() + self._patience.start
        while time.monotonic() < deadline:
            if not self.child.alive():
                return False
            if await self.child.healthy(self._patience.health_timeout):
                return True
            await asyncio.sleep(self._patience.poll)
        return False

    async def _wait_until_down(self) -> None:
        """Return when the child has ended, or has given no good /health for too long."""
        last_good = looked = time.monotonic()
        while self.child.alive():
            await asyncio.sleep(self._patience.poll)
            now = time.monotonic()
            if now - looked < self._patience.health_every:
                continue
            looked = now
            if await self.child.healthy(self._patience.health_timeout):
                last_good = now
            elif now - last_good > self._patience.hang:
                return

    def _set_state(self, state: State) -> None:
        if state is self._state:
            return
        self._state = state
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()
        for listener in self._listeners:
            listener(state)

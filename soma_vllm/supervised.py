"""Endless background tasks that are restarted when they fail.

Guarantees: an exception that escapes such a task is logged with its traceback and counted, and the task is
started again after a delay that doubles; after too many quick deaths in a row it is given up, which readiness
shows.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RestartPolicy:
    """When a failed task is started again. In seconds, except the count."""

    first_delay: float = 0.1
    longest_delay: float = 30.0
    stable: float = 60.0
    """A run of at least this length resets the count of deaths and the delay."""
    quick_deaths: int = 20
    """Deaths in a row, each after a shorter run, after which the task is given up."""


class SupervisedTask:
    """One endless task by name."""

    def __init__(
        self, name: str, run: Callable[[], Awaitable[None]], policy: RestartPolicy | None = None
    ) -> None:
        self.name = name
        self.deaths = 0
        """Exceptions that ended it so far."""
        self.given_up = False
        """Whether it was not started again after its last death."""
        self._run = run
        self._policy = policy or RestartPolicy()
        self._task: asyncio.Task[None] | None = None

    @property
    def alive(self) -> bool:
        """Whether it runs, or is about to be started again."""
        return self._task is not None and not self._task.done()

    def start(self) -> None:
        """Start the task; does nothing where it was started before."""
        if self._task is None:
            self._task = asyncio.create_task(self._keep_running(), name=f"soma-{self.name}")

    async def stop(self) -> None:
        """Cancel the task and wait until it has ended."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])

    async def _keep_running(self) -> None:
        policy, quick = self._policy, 0
        while not self.given_up:
            began = time.monotonic()
            try:
                await self._run()
                return
            except Exception:  # the task must survive every fault of what it calls
                self.deaths += 1
                quick = 1 if time.monotonic() - began >= policy.stable else quick + 1
                self.given_up = quick >= policy.quick_deaths
                delay = min(policy.longest_delay, policy.first_delay * 2 ** (quick - 1))
                logger.exception(
                    "the task %s failed; it is %s",
                    self.name,
                    "given up until a restart" if self.given_up else f"started again in {delay:g} s",
                )
            if not self.given_up:
                await asyncio.sleep(delay)

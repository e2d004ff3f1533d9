"""Work on a session that no request waits for: adaptation, audits, retiring an adapter.

Guarantees: a session with work under way stays in memory; work that fails unexpectedly says so in the log and
in the session, which the original keeps; its log lines carry the session's and the tenant's ids.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any

from soma_vllm.logs import bind_session
from soma_vllm.sessions.registry import SessionRegistry
from soma_vllm.sessions.state.events import EventKind
from soma_vllm.sessions.state.phases import Phase
from soma_vllm.types import SessionKey

logger = logging.getLogger(__name__)


class BackgroundTasks:
    """Tasks by session."""

    def __init__(self, registry: SessionRegistry) -> None:
        self._registry = registry
        self._tasks: dict[asyncio.Task[object], SessionKey] = {}

    def spawn(self, key: SessionKey, work: Coroutine[Any, Any, object]) -> None:
        """Begin work on a live session."""
        with bind_session(key):
            task = asyncio.create_task(work, name=f"soma-background-{key.session}")
            self._tasks[task] = key
            self._registry.hold(key)
            task.add_done_callback(self._finished)

    @property
    def count(self) -> int:
        """Tasks under way."""
        return len(self._tasks)

    def idle(self, key: SessionKey) -> bool:
        """True when no work is under way for this session."""
        return key not in self._tasks.values()

    async def cancel(self, key: SessionKey) -> None:
        """Cancel the work on a session; returns once it has cleaned up after itself."""
        await self._end([task for task, owner in self._tasks.items() if owner == key])

    async def stop(self) -> None:
        """Cancel all work. An unfinished adaptation is begun again at the next start."""
        await self._end(list(self._tasks))

    async def _end(self, tasks: list[asyncio.Task[object]]) -> None:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _finished(self, task: asyncio.Task[object]) -> None:
        key = self._tasks.pop(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error(
                "background work failed unexpectedly; the session stays as it is, and one that was adapting "
                "stays with the original",
                exc_info=error,
            )
            if self._registry.session(key).phase is Phase.ADAPTING:
                self._registry.note(
                    key, EventKind.TRAINING_FAILED, error=type(error).__name__, message="unexpected"
                )
        self._registry.release(key)

"""Responses that are made while no client waits (`background: true`).

Guarantees: such a response is queued, in progress, and then completed, incomplete, failed or cancelled, and can
be retrieved at any time in between; a client that leaves ends nothing; one that was under way when the server
ended is failed afterwards. How many may be under way is bounded.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections import OrderedDict
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from typing import Any

from soma_vllm.api.responses.convert import Frame
from soma_vllm.api.responses.stored import Items, ObjectRecord
from soma_vllm.api.responses.stream import ResponseEvents
from soma_vllm.engines.sse import data_of
from soma_vllm.errors import BadRequest, SomaError, TooManyRequests
from soma_vllm.types import SessionKey

MOST_RUNNING = 256
MOST_FINISHED = 256
"""Jobs that are remembered with their events; the responses of older ones are on record."""

RETRY_S = 5.0
UNDER_WAY = ("queued", "in_progress")

Open = Callable[[], Awaitable[ResponseEvents]]
"""Asks for the answer; raises SomaError."""


class Job:
    """One response in the background."""

    def __init__(self, frame: Frame, given: Items) -> None:
        self.frame = frame
        self.given = given
        self.response = frame.response("queued")
        self.events: list[str] = []
        """So far."""
        self.over = False
        self.kept = False
        """Whether its session has put it on record."""
        self.session: SessionKey | None = None
        """Its session, once it is over."""
        self.at: float | None = None
        """When it was over, Unix time, seconds."""
        self.task: asyncio.Task[None] | None = None
        self._changed = asyncio.Event()

    def tell(self, event: str) -> None:
        """Add an event, which may bring the response to another state."""
        self.events.append(event)
        said = json.loads(data_of(event) or "{}").get("response")
        if isinstance(said, dict):
            self.response = said
        self._wake()

    def end(self, response: Mapping[str, Any] | None = None) -> None:
        """No event follows."""
        self.response = dict(self.response if response is None else response)
        self.over = True
        self._wake()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def follow(self, after: int) -> AsyncGenerator[str, None]:
        """The events beyond a number, as they come."""
        place = max(0, after + 1)
        while True:
            while place < len(self.events):
                yield self.events[place]
                place += 1
            if self.over:
                return
            await self._changed.wait()


class BackgroundResponses:
    """The jobs of every tenant; a `TextCache` of what they said."""

    def __init__(self, record: ObjectRecord) -> None:
        self._record = record
        self._jobs: OrderedDict[tuple[str, str], Job] = OrderedDict()

    def start(self, tenant: str, frame: Frame, given: Items, ask: Open) -> Job:
        """Begin a response.

        Raises:
            BadRequest: no record would keep it.
            TooManyRequests: too many are under way.
        """
        if not self._record.keeps_all:
            raise BadRequest("background: found retention.text other than session; expected it", "background")
        if sum(not job.over for job in self._jobs.values()) >= MOST_RUNNING:
            raise TooManyRequests(f"background: found {MOST_RUNNING} responses under way", RETRY_S)
        job = self._jobs[tenant, frame.id] = Job(frame, given)
        self._record.keep_state(tenant, job.response)
        job.task = asyncio.create_task(self._run(tenant, job, ask), name="soma-background-response")
        over = [name for name, each in self._jobs.items() if each.over]
        for name in over[: max(0, len(over) - MOST_FINISHED)]:
            del self._jobs[name]
        return job

    def job(self, tenant: str, id: str) -> Job | None:
        """A job that is under way, or was lately."""
        return self._jobs.get((tenant, id))

    async def response(self, tenant: str, id: str) -> dict[str, Any]:
        """A response, wherever it stands. Raises NotFound, StoreUnavailable."""
        if (job := self.job(tenant, id)) is not None:
            if not (job.over and job.kept):
                return job.response
            await self._record.settled()
        found = await self._record.response(tenant, id)
        if found["status"] in UNDER_WAY:  # its last state may be on its way to the record
            await self._record.settled()
            found = await self._record.response(tenant, id)
        if found["status"] in UNDER_WAY:
            ended = {"code": "server_error", "message": "the server ended before the response was complete"}
            return {**found, "status": "failed", "error": ended}
        return found

    async def cancel(self, tenant: str, id: str) -> dict[str, Any]:
        """End a response that is under way; one that is over stays as it is.

        Raises:
            NotFound: there is none.
            BadRequest: it was not asked for in the background.
        """
        job = self.job(tenant, id)
        if job is not None and job.task is not None and not job.over:
            job.task.cancel()
            await asyncio.wait([job.task])
        found = await self.response(tenant, id)
        if not found.get("background"):
            raise BadRequest("found a response that was not made in the background; expected one that was")
        return found

    def forget(self, key: SessionKey) -> None:
        """Drop what was said in a session."""
        for name in [name for name, job in self._jobs.items() if job.session == key]:
            del self._jobs[name]

    def forget_before(self, at: float) -> None:
        """Drop what was said before a Unix time."""
        for name in [name for name, job in self._jobs.items() if job.at is not None and job.at < at]:
            del self._jobs[name]

    async def drop(self, tenant: str, id: str) -> None:
        """End and forget a job; harmless without one."""
        job = self._jobs.pop((tenant, id), None)
        if job is not None and job.task is not None:
            job.task.cancel()
            await asyncio.wait([job.task])

    async def _run(self, tenant: str, job: Job, ask: Open) -> None:
        events: ResponseEvents | None = None
        try:
            events = await ask()
            async for event in events:
                job.tell(event)
            job.end()
        except SomaError as error:
            job.end(job.frame.failed(str(error)))
        except asyncio.CancelledError:
            job.end(job.frame.response("cancelled"))
        finally:
            if events is not None:
                await events.aclose()
            if not job.over:
                job.end(job.frame.failed("the server could not make the response"))
            self._keep(tenant, job)

    def _keep(self, tenant: str, job: Job) -> None:
        """Put the last state on record, with its session's where a turn stands behind it."""
        if (tenant, job.frame.id) not in self._jobs:
            return  # it was deleted
        job.kept = self._record.keep(tenant, job.response, job.given, job.frame.request.conversation_id)
        job.at = time.time()
        if job.kept:
            job.session = self._record.session_of(tenant, job.frame.id)
        elif job.response["status"] == "completed":
            self._record.keep_state(
                tenant, job.frame.failed("the answer belongs to no session: it is not kept")
            )
        else:
            self._record.keep_state(tenant, job.response)

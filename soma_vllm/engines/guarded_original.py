"""The original as the server asks it: within time limits and a bound on requests in flight, behind a breaker.

Guarantees: nothing waits longer for the original than the configuration says, and what waits holds a place
that is given back exactly once, however the request ends; beyond `max_in_flight` requests wait in a bounded
queue; only a request of which no byte was answered is sent again; while the circuit is open requests fail at
once, with the time to wait, so that `original.when_down` decides. An original that is not ready, a client that
left and a refused request say nothing about its health.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from enum import StrEnum
from typing import Protocol, Self, TypeVar

from soma_vllm.config import Original
from soma_vllm.engines.circuit_breaker import Circuit, CircuitBreaker
from soma_vllm.engines.engine import ChatCall, Events, Reply, ScoringEngine
from soma_vllm.errors import ConnectionLost, EngineDenied, EngineError, EngineNotReady, EngineUnavailable
from soma_vllm.types import Agreement

T = TypeVar("T")


class Outcome(StrEnum):
    """How a request to the original ended; the label of its metric."""

    ANSWERED = "answered"
    REFUSED = "refused"
    """By the original, with an error of its own."""
    FAILED = "failed"
    TIMED_OUT = "timed_out"
    BROKEN = "broken"
    """In the middle of its stream."""
    LEFT = "left"
    """The client did not wait for the end."""
    NOT_READY = "not_ready"
    OVERLOADED = "overloaded"
    """Not asked: no place was free in time."""
    CIRCUIT_OPEN = "circuit_open"
    """Not asked: it failed too often in a row."""


class OriginalMeter(Protocol):
    """Counts what is asked of the original: `telemetry.original_metrics.OriginalMetrics`."""

    def ended(self, outcome: Outcome) -> None: ...
    def retried(self) -> None: ...
    def watch(self, **gauges: Callable[[], float]) -> None: ...


class Users(Protocol):
    """Hears of each user's request, from its call to its last token: `adaptation.background_lane`."""

    def came(self) -> None: ...
    def left(self, after_s: float | None = None) -> None: ...


class GuardedOriginal:
    """`ScoringEngine` around the original."""

    def __init__(
        self,
        engine: ScoringEngine,
        limits: Original,
        meter: OriginalMeter | None = None,
        clock: Callable[[], float] = time.monotonic,
        users: Users | None = None,
    ) -> None:
        """`users` does not hear of calls in the background."""
        self.name = engine.name
        self._engine = engine
        self._limits = limits
        self._meter = meter
        self._users = users
        self._breaker = CircuitBreaker(limits.breaker_failures, limits.breaker_open_s, clock)
        self._places = asyncio.Semaphore(limits.max_in_flight)
        self._in_flight = self._waiting = 0
        if meter is not None:
            meter.watch(
                in_flight=lambda: self._in_flight,
                waiting=lambda: self._waiting,
                circuit=lambda: self._breaker.state,
            )

    async def chat(self, call: ChatCall) -> Reply:
        """Answer one chat completion; see `Engine.chat`. A stream keeps its place until it is closed."""
        streams = bool(call.body.get("stream"))
        limit_s = self._limits.first_token_timeout_s if streams else self._limits.answer_timeout_s
        place = await self._enter(call)
        reply = await self._asked(place, lambda: self._engine.chat(call), limit_s)
        if reply.events is None:
            place.leave(Outcome.ANSWERED)
            return reply
        return replace(reply, events=_Timed(reply.events, place, self._limits.idle_timeout_s))

    async def score(self, call: ChatCall, answer: str) -> Agreement:
        """How likely the original finds an answer; see `ScoringEngine.score`."""
        place = await self._enter(call)
        found = await self._asked(
            place, lambda: self._engine.score(call, answer), self._limits.answer_timeout_s
        )
        place.leave(Outcome.ANSWERED)
        return found

    @property
    def circuit(self) -> Circuit:
        """The state of the circuit breaker."""
        return self._breaker.state

    async def _asked(self, place: _Place, ask: Callable[[], Awaitable[T]], limit_s: float) -> T:
        """What the engine answers; without an answer the place is given back."""
        retries = self._limits.retries
        try:
            async with asyncio.timeout(limit_s):
                while True:
                    try:
                        found = await ask()
                        place.answered()
                        return found
                    except ConnectionLost:
                        if not retries:
                            raise
                        retries -= 1
                        if self._meter is not None:
                            self._meter.retried()
        except TimeoutError:
            place.leave(Outcome.TIMED_OUT)
            raise EngineUnavailable(f"the original did not answer within {limit_s:g} s") from None
        except EngineNotReady:
            place.leave(Outcome.NOT_READY)
            raise
        except EngineDenied:
            place.leave(Outcome.REFUSED)
            raise
        except EngineUnavailable:
            place.leave(Outcome.FAILED)
            raise
        except EngineError:  # it answered, though not what was asked
            place.leave(Outcome.REFUSED)
            raise
        except BaseException:
            place.leave(Outcome.LEFT)
            raise

    async def _enter(self, call: ChatCall) -> _Place:
        """A place among the requests in flight. Raises as `_place` does."""
        users, began = self._users, time.monotonic()
        if users is None or call.background:
            return await self._place(self._left)

        def left(outcome: Outcome) -> None:
            self._left(outcome)
            users.left(time.monotonic() - began if outcome is Outcome.ANSWERED else None)

        users.came()
        try:
            return await self._place(left)
        except BaseException:
            users.left()
            raise

    async def _place(self, leave: Callable[[Outcome], None]) -> _Place:
        """A place, as soon as one is free; `leave` is called once it is given back.

        Raises:
            EngineUnavailable: the circuit is open, the queue is full, or no place was free in time.
        """
        self._require_closed()
        if self._places.locked() and self._waiting >= self._limits.queue_limit:
            raise self._overloaded()
        self._waiting += 1
        try:
            async with asyncio.timeout(self._limits.queue_wait_s):
                await self._places.acquire()
        except TimeoutError:
            raise self._overloaded() from None
        finally:
            self._waiting -= 1
        try:
            self._require_closed()  # it may have opened while this one waited
        except EngineUnavailable:
            self._places.release()
            raise
        self._in_flight += 1
        return _Place(self._breaker, leave)

    def _left(self, outcome: Outcome) -> None:
        self._in_flight -= 1
        self._places.release()
        self._count(outcome)

    def _require_closed(self) -> None:
        if (wait := self._breaker.wait()) > 0.0:
            self._count(Outcome.CIRCUIT_OPEN)
            failures = self._limits.breaker_failures
            raise EngineUnavailable(f"the original failed {failures} times in a row", retry_after=wait)

    def _overloaded(self) -> EngineUnavailable:
        self._count(Outcome.OVERLOADED)
        most = self._limits.max_in_flight
        return EngineUnavailable(
            f"the original has {most} requests in flight, and none ended in time; expected fewer than {most}"
        )

    def _count(self, outcome: Outcome) -> None:
        if self._meter is not None:
            self._meter.ended(outcome)


_HEALTHY = (Outcome.ANSWERED, Outcome.REFUSED)
_SICK = (Outcome.FAILED, Outcome.TIMED_OUT, Outcome.BROKEN)


class _Place:
    """One request in flight, until it leaves."""

    def __init__(self, breaker: CircuitBreaker, leave: Callable[[Outcome], None]) -> None:
        self._breaker = breaker
        self._leave = leave
        self._probe = breaker.begin()
        self._over = False

    def answered(self) -> None:
        """The first event of a stream, or the whole answer, is there: that shows that the original works."""
        self._breaker.succeeded(self._probe)
        self._probe = False

    def leave(self, outcome: Outcome) -> None:
        """Give the place back; harmless once it is."""
        if self._over:
            return
        self._over = True
        if outcome in _HEALTHY:
            self._breaker.succeeded(self._probe)
        elif outcome in _SICK:
            self._breaker.failed(self._probe)
        else:
            self._breaker.gave_up(self._probe)
        self._leave(outcome)


class _Timed:
    """`Events` with a limit on the wait for each."""

    def __init__(self, events: Events, place: _Place, limit_s: float) -> None:
        self._events = events
        self._place = place
        self._limit_s = limit_s

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> str:
        try:
            async with asyncio.timeout(self._limit_s):
                return await anext(self._events)
        except StopAsyncIteration:
            self._place.leave(Outcome.ANSWERED)
            raise
        except TimeoutError:
            await self._end(Outcome.TIMED_OUT)
            raise EngineUnavailable(
                f"the original sent nothing for {self._limit_s:g} s in the middle of an answer"
            ) from None
        except Exception:
            await self._end(Outcome.BROKEN)
            raise
        except BaseException:
            await self._end(Outcome.LEFT)
            raise

    async def aclose(self) -> None:
        """Stop the generation; harmless when it is over."""
        await self._end(Outcome.LEFT)

    async def _end(self, outcome: Outcome) -> None:
        try:
            await self._events.aclose()
        finally:
            self._place.leave(outcome)

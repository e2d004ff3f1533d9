"""What asking the original may cost: time limits, a bound on requests in flight, retries, a breaker."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from prometheus_client import CollectorRegistry
from support.fakes import FakeOriginal
from support.guard import GUARD_S

from soma_vllm.config import Original
from soma_vllm.engines.circuit_breaker import Circuit, CircuitBreaker
from soma_vllm.engines.engine import ChatCall, Events, Reply
from soma_vllm.engines.guarded_original import GuardedOriginal
from soma_vllm.errors import ConnectionLost, EngineNotReady, EngineRefused, EngineUnavailable
from soma_vllm.telemetry.original_metrics import OriginalMetrics

CALL = ChatCall({"messages": []})
STREAM = ChatCall({"messages": [], "stream": True})


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


class Guarded:
    """A guard around a fake, with its metrics."""

    def __init__(self, **limits: Any) -> None:
        self.fake = FakeOriginal()
        self.clock = Clock()
        self.registry = CollectorRegistry()
        self.engine = GuardedOriginal(self.fake, Original(**limits), OriginalMetrics(self.registry), self.clock)

    def value(self, name: str) -> float:
        return self.registry.get_sample_value(f"soma_original_{name}") or 0.0

    def outcomes(self) -> dict[str, float]:
        samples = next(m for m in self.registry.collect() if m.name == "soma_original_requests").samples
        return {s.labels["outcome"]: s.value for s in samples if s.name.endswith("_total") and s.value}

    async def fails(self, error: Exception, times: int = 1) -> None:
        self.fake.refusal = error  # type: ignore[assignment]
        for _ in range(times):
            with pytest.raises(type(error)):
                await self.engine.chat(CALL)
        self.fake.refusal = None


async def events_of(reply: Reply) -> Events:
    assert reply.events is not None
    return reply.events


@pytest.mark.parametrize(
    ("call", "limit"),
    [(CALL, "answer_timeout_s"), (STREAM, "first_token_timeout_s")],
    ids=["whole", "stream"],
)
async def test_an_original_that_says_nothing_is_given_up(call: ChatCall, limit: str) -> None:
    guarded = Guarded(**{limit: 0.01})
    guarded.fake.go.clear()
    with pytest.raises(EngineUnavailable, match=r"did not answer within 0\.01 s"):
        await asyncio.wait_for(guarded.engine.chat(call), GUARD_S)
    assert guarded.fake.closed_early.is_set()
    assert guarded.outcomes() == {"timed_out": 1}
    assert guarded.value("in_flight") == 0


async def test_a_stream_that_falls_silent_breaks_and_gives_its_place_back() -> None:
    class Silent(FakeOriginal):
        async def chat(self, call: ChatCall) -> Reply:
            async def events() -> Any:
                yield "data: {}\n\n"
                await asyncio.Event().wait()

            return Reply(events=events())

    registry = CollectorRegistry()
    engine = GuardedOriginal(Silent(), Original(idle_timeout_s=0.01), OriginalMetrics(registry))
    events = await events_of(await engine.chat(STREAM))
    assert await anext(events) == "data: {}\n\n"
    with pytest.raises(EngineUnavailable, match=r"sent nothing for 0\.01 s"):
        await asyncio.wait_for(anext(events), GUARD_S)
    assert registry.get_sample_value("soma_original_in_flight") == 0
    assert registry.get_sample_value("soma_original_requests_total", {"outcome": "timed_out"}) == 1


async def test_requests_beyond_the_bound_wait_and_are_then_refused() -> None:
    guarded = Guarded(max_in_flight=1, queue_limit=1, queue_wait_s=0.05)
    first = await events_of(await guarded.engine.chat(STREAM))
    waiting = asyncio.create_task(guarded.engine.chat(CALL))
    await asyncio.sleep(0)
    assert (guarded.value("in_flight"), guarded.value("queue_length")) == (1, 1)
    with pytest.raises(EngineUnavailable, match="1 requests in flight"):
        await guarded.engine.chat(CALL)  # the queue is full
    with pytest.raises(EngineUnavailable, match="1 requests in flight"):
        await asyncio.wait_for(waiting, GUARD_S)  # its time is over
    assert guarded.outcomes() == {"overloaded": 2}
    waiting = asyncio.create_task(guarded.engine.chat(CALL))
    await asyncio.sleep(0)
    await first.aclose()
    await first.aclose()
    assert (await asyncio.wait_for(waiting, GUARD_S)).body is not None
    assert guarded.value("in_flight") == 0
    assert len(guarded.fake.calls) == 2


async def test_a_request_of_which_no_byte_was_answered_is_sent_again() -> None:
    class Resets(FakeOriginal):
        resets = 1

        async def chat(self, call: ChatCall) -> Reply:
            self.resets -= 1
            if self.resets >= 0:
                self.calls.append(call)
                raise ConnectionLost("reset")
            return await super().chat(call)

    registry = CollectorRegistry()
    fake = Resets()
    engine = GuardedOriginal(fake, Original(), OriginalMetrics(registry))
    assert (await engine.chat(CALL)).body is not None
    assert len(fake.calls) == 2
    assert registry.get_sample_value("soma_original_retries_total") == 1
    fake.resets = 2
    with pytest.raises(ConnectionLost):
        await engine.chat(CALL)
    fake.resets = 1
    with pytest.raises(ConnectionLost):
        await GuardedOriginal(fake, Original(retries=0)).chat(CALL)


async def test_what_failed_otherwise_is_not_sent_again() -> None:
    guarded = Guarded()
    await guarded.fails(EngineUnavailable("status 500"))
    await guarded.fails(EngineRefused(429, {}))
    assert len(guarded.fake.calls) == 2
    assert guarded.outcomes() == {"failed": 1, "refused": 1}


async def test_failures_in_a_row_open_the_circuit_and_a_probe_closes_it() -> None:
    guarded = Guarded(breaker_failures=3, breaker_open_s=10.0)
    await guarded.fails(EngineUnavailable("status 500"), 2)
    await guarded.engine.chat(CALL)
    await guarded.fails(EngineUnavailable("status 500"), 3)
    asked = len(guarded.fake.calls)
    assert guarded.value("circuit") == Circuit.OPEN
    with pytest.raises(EngineUnavailable, match="failed 3 times in a row") as refused:
        await guarded.engine.chat(CALL)
    assert refused.value.retry_after == 10.0
    assert len(guarded.fake.calls) == asked
    guarded.clock.now += 10.0
    assert guarded.value("circuit") == Circuit.HALF_OPEN
    await guarded.fails(EngineUnavailable("status 500"))  # the probe
    assert guarded.value("circuit") == Circuit.OPEN
    guarded.clock.now += 10.0
    guarded.fake.called.clear()
    guarded.fake.go.clear()
    probe = asyncio.create_task(guarded.engine.chat(CALL))
    await guarded.fake.called.wait()
    with pytest.raises(EngineUnavailable):
        await guarded.engine.chat(CALL)  # one probe at a time
    guarded.fake.go.set()
    await probe
    assert guarded.value("circuit") == Circuit.CLOSED
    assert (await guarded.engine.chat(CALL)).body is not None


async def test_a_probe_whose_client_leaves_lets_the_next_one_try() -> None:
    guarded = Guarded(breaker_failures=1, breaker_open_s=10.0)
    await guarded.fails(EngineUnavailable("status 500"))
    guarded.clock.now += 10.0
    guarded.fake.called.clear()
    guarded.fake.go.clear()
    probe = asyncio.create_task(guarded.engine.chat(CALL))
    await guarded.fake.called.wait()
    probe.cancel()
    await asyncio.gather(probe, return_exceptions=True)
    guarded.fake.go.set()
    assert (await guarded.engine.chat(CALL)).body is not None
    assert guarded.value("circuit") == Circuit.CLOSED


@pytest.mark.parametrize(
    "error", [EngineNotReady("starting"), EngineRefused(400, {}), EngineRefused(429, {})], ids=str
)
async def test_what_says_nothing_of_the_originals_health_opens_no_circuit(error: Exception) -> None:
    guarded = Guarded(breaker_failures=1)
    await guarded.fails(error, 3)
    assert guarded.value("circuit") == Circuit.CLOSED


def test_a_breaker_may_be_switched_off() -> None:
    breaker = CircuitBreaker(0, 10.0, Clock())
    for _ in range(100):
        breaker.failed(breaker.begin())
    assert breaker.wait() == 0.0


async def closed_unread(events: Events) -> None:
    await events.aclose()


async def read(events: Events) -> None:
    async for _ in events:
        pass


async def broken(events: Events) -> None:
    with pytest.raises(EngineUnavailable):
        await read(events)


async def cancelled(events: Events) -> None:
    await anext(events)
    task = asyncio.create_task(read(events))
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


@pytest.mark.parametrize("end", [closed_unread, read, broken, cancelled], ids=lambda end: end.__name__)
async def test_a_place_is_given_back_once_however_its_stream_ends(end: Callable[[Events], Any]) -> None:
    guarded = Guarded(max_in_flight=1)
    guarded.fake.break_after = 1 if end is broken else None
    for _ in range(3):
        events = await events_of(await guarded.engine.chat(STREAM))
        await end(events)
        await events.aclose()
        assert guarded.value("in_flight") == 0
        assert guarded.engine._places._value == 1
    assert Counter(guarded.outcomes()).total() == 3

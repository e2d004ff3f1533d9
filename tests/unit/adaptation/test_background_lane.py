"""Background work at an engine: in quiet times only, one at a time, and never in a user's way."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import pytest
from support.fake_engine import FakeEngine

from soma_vllm.adaptation.background_lane import REQUESTS, BackgroundLane, JobDropped, TokenBucket
from soma_vllm.config import Original
from soma_vllm.engines.engine import ChatCall, Reply
from soma_vllm.engines.guarded_original import GuardedOriginal
from soma_vllm.errors import EngineUnavailable

CALL = ChatCall({"messages": []})
STREAM = ChatCall({"messages": [], "stream": True})


class Work:
    """Work that says when it runs, and goes on until it is let go."""

    def __init__(self) -> None:
        self.begun = 0
        self.cancelled = 0
        self.running = asyncio.Event()
        self.go = asyncio.Event()

    async def __call__(self) -> str:
        self.begun += 1
        self.running.set()
        try:
            await self.go.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.running.clear()
        return "done"


def watched_by(lane: BackgroundLane, engine: Any) -> GuardedOriginal:
    """The engine as users are served by it."""
    return GuardedOriginal(engine, Original(), users=lane)


async def idle() -> None:
    """Let everything that can run do so."""
    for _ in range(20):
        await asyncio.sleep(0)


async def test_work_runs_while_nobody_is_there() -> None:
    work = Work()
    work.go.set()
    assert await BackgroundLane(True, 5).run(work) == "done"


async def test_what_the_work_raises_comes_out() -> None:
    async def broken() -> None:
        raise EngineUnavailable("gone")

    lane = BackgroundLane(True, 5)
    with pytest.raises(EngineUnavailable, match="gone"):
        await lane.run(broken)
    work = Work()
    work.go.set()
    assert await lane.run(work) == "done"


async def test_one_piece_of_work_runs_at_a_time() -> None:
    lane = BackgroundLane(False, 5)
    first, second = Work(), Work()
    tasks = [asyncio.create_task(lane.run(work)) for work in (first, second)]
    await first.running.wait()
    await idle()
    assert second.begun == 0
    first.go.set()
    await second.running.wait()
    second.go.set()
    assert await asyncio.gather(*tasks) == ["done", "done"]


async def test_work_gives_way_to_a_user_and_is_tried_again_when_he_has_left() -> None:
    lane, work = BackgroundLane(True, 5), Work()
    task = asyncio.create_task(lane.run(work))
    await work.running.wait()
    lane.came()
    lane.came()
    await idle()
    assert (work.begun, work.cancelled) == (1, 1)
    lane.left()
    await idle()
    assert work.begun == 1
    lane.left()
    await work.running.wait()
    work.go.set()
    assert await task == "done"
    assert work.begun == 2


async def test_work_that_need_not_yield_runs_beside_users() -> None:
    lane, work = BackgroundLane(False, 5), Work()
    lane.came()
    task = asyncio.create_task(lane.run(work))
    await work.running.wait()
    lane.came()
    await idle()
    assert work.cancelled == 0
    work.go.set()
    assert await task == "done"


async def test_work_without_a_quiet_time_runs_beside_users_once_it_has_waited() -> None:
    lane, work = BackgroundLane(True, 0.01), Work()
    lane.came()  # and hangs
    task = asyncio.create_task(lane.run(work))
    await work.running.wait()
    lane.came()
    await idle()
    assert work.cancelled == 0
    work.go.set()
    assert await task == "done"


async def test_work_that_other_work_never_lets_in_is_dropped() -> None:
    lane, work = BackgroundLane(True, 0.01), Work()
    lane._running = asyncio.create_task(asyncio.Event().wait())
    lane._update_free()
    with pytest.raises(JobDropped, match=r"no turn within 0\.02 s"):
        await lane.run(work)
    assert work.begun == 0
    lane._running.cancel()


async def test_work_that_takes_too_long_is_stopped_and_dropped() -> None:
    lane, work = BackgroundLane(True, 0.01), Work()
    with pytest.raises(JobDropped, match=r"not over after 0\.01 s"):
        await lane.run(work)
    assert work.cancelled == 1


async def test_cancelling_ends_the_work_and_frees_its_place() -> None:
    lane, work, next_work = BackgroundLane(True, 5), Work(), Work()
    task = asyncio.create_task(lane.run(work))
    await work.running.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert work.cancelled == 1
    next_work.go.set()
    assert await lane.run(next_work) == "done"


async def read_all(reply: Reply) -> None:
    assert reply.events is not None
    async for _ in reply.events:
        pass


async def close_unread(reply: Reply) -> None:
    assert reply.events is not None
    await reply.events.aclose()
    await reply.events.aclose()


async def read_until_it_breaks(reply: Reply) -> None:
    with pytest.raises(EngineUnavailable):
        await read_all(reply)


@pytest.mark.parametrize("end", [read_all, close_unread, read_until_it_breaks], ids=lambda f: f.__name__)
async def test_a_user_is_there_until_his_stream_is_over_however_it_ends(end: object) -> None:
    engine, lane, work = FakeEngine(), BackgroundLane(True, 5), Work()
    engine.break_after = 1 if end is read_until_it_breaks else None
    reply = await watched_by(lane, engine).chat(STREAM)
    task = asyncio.create_task(lane.run(work))
    await idle()
    assert work.begun == 0
    await end(reply)
    await work.running.wait()
    work.go.set()
    assert await task == "done"


async def test_a_user_whose_request_fails_or_is_answered_whole_has_left() -> None:
    engine, lane, work = FakeEngine(), BackgroundLane(True, 5), Work()
    work.go.set()
    watched = watched_by(lane, engine)
    assert (await watched.chat(CALL)).body is not None
    engine.refusal = EngineUnavailable("down")
    with pytest.raises(EngineUnavailable):
        await watched.chat(CALL)
    assert await lane.run(work) == "done"


class OneAtATime:
    """The worst engine for a user: whoever has it keeps it to the end. Time is counted in turns of the loop."""

    name = "slow"

    def __init__(self, steps: int) -> None:
        self.busy = asyncio.Lock()
        self.steps = steps
        self.user_waits: list[int] = []
        self.users_waiting = 0
        self.audits_done = 0

    async def chat(self, call: ChatCall) -> Reply:
        if call.background:
            async with self.busy:
                await self._work()
            self.audits_done += 1
            return Reply(body={})
        waited = 0
        while self.busy.locked():
            await asyncio.sleep(0)
            waited += 1
        async with self.busy:
            self.user_waits.append(waited)
            await self._work()
        return Reply(body={})

    async def _work(self) -> None:
        for _ in range(self.steps):
            await asyncio.sleep(0)


async def longest_wait(seed: int, yields: bool) -> tuple[int, int]:
    """(loop turns that a user ever waited, audits done) of a random afternoon with one user and many audits."""
    dice = random.Random(seed)
    engine, lane = OneAtATime(steps=200), BackgroundLane(yields, 60)
    watched = watched_by(lane, engine)

    async def audit() -> Reply:
        return await engine.chat(ChatCall({}, background=True))

    audits = []
    for _ in range(30):
        if dice.random() < 0.6:
            audits.append(asyncio.create_task(lane.run(audit)))
        for _ in range(dice.randrange(400)):
            await asyncio.sleep(0)
        await watched.chat(CALL)
    await asyncio.gather(*audits)
    assert engine.audits_done == len(audits)
    return max(engine.user_waits), engine.audits_done


@pytest.mark.parametrize("seed", range(20))
async def test_a_user_is_never_queued_behind_an_audit(seed: int) -> None:
    waited, audits = await longest_wait(seed, yields=True)
    assert audits > 5
    assert waited <= 3  # the turns of the loop in which the audit's cancellation reaches its connection


async def test_without_yielding_a_user_would_be_queued_behind_an_audit() -> None:
    waited, _ = await longest_wait(0, yields=False)
    assert waited > 10


async def test_a_slow_engine_has_work_wait_as_long_as_its_latest_requests_took() -> None:
    lane = BackgroundLane(True, 5)
    assert lane.wait_s == 5
    for seconds in (1.0, 40.0, 45.0):
        lane.came()
        lane.left(seconds)
    assert lane.wait_s == 120.0  # three of their median
    for _ in range(REQUESTS):
        lane.came()
        lane.left(0.25)
    assert lane.wait_s == 5


async def test_one_client_that_reads_slowly_is_no_slow_engine() -> None:
    lane = BackgroundLane(True, 5)
    for seconds in (0.25, 3600.0, 0.25):
        lane.came()
        lane.left(seconds)
    assert lane.wait_s == 5


async def test_a_request_that_failed_says_nothing_about_the_engines_pace() -> None:
    lane = BackgroundLane(True, 5)
    lane.came()
    lane.left()
    assert lane.wait_s == 5


# -- how much is granted ---------------------------------------------------------------------------------------


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_a_minutes_worth_is_granted_at_once_and_then_the_rate() -> None:
    clock = Clock()
    budget = TokenBucket(6.0, clock)
    assert [budget.take() for _ in range(8)] == [True] * 6 + [False] * 2
    clock.now += 10.0
    assert [budget.take() for _ in range(2)] == [True, False]


def test_a_rate_below_one_a_minute_still_grants_one() -> None:
    clock = Clock()
    budget = TokenBucket(0.5, clock)
    assert [budget.take() for _ in range(2)] == [True, False]
    clock.now += 119.0
    assert not budget.take()
    clock.now += 1.0
    assert budget.take()


def test_a_long_pause_saves_up_a_minutes_worth_only() -> None:
    clock = Clock()
    budget = TokenBucket(3.0, clock)
    clock.now += 86_400.0
    assert sum(budget.take() for _ in range(100)) == 3


@pytest.mark.parametrize("seed", range(10))
def test_no_span_of_time_gets_more_than_the_bucket_and_its_rate(seed: int) -> None:
    dice = random.Random(seed)
    rate = dice.choice([0.3, 1.0, 7.0, 30.0])
    clock = Clock()
    budget = TokenBucket(rate, clock)
    granted = []
    for _ in range(400):
        clock.now += dice.expovariate(0.5)
        if budget.take():
            granted.append(clock.now)
    most = max(1.0, rate)
    for first in range(len(granted)):
        for last in range(first, len(granted)):
            span_min = (granted[last] - granted[first]) / 60.0
            assert last - first + 1 <= most + rate * span_min + 1e-6
    assert granted

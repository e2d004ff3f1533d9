"""The write-behind queue and the task that it runs in."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from typing import Any, cast

import pytest

from soma_vllm.errors import StoreRefused, StoreUnavailable
from soma_vllm.sessions.ports import Store
from soma_vllm.sessions.sql.records import Append, SessionSnapshot
from soma_vllm.sessions.write_behind import Write, WriteBehindQueue
from soma_vllm.supervised import RestartPolicy, SupervisedTask
from soma_vllm.types import Event, SessionKey

STANDING = SessionSnapshot("f", "WARM_START", "c", 1, None)


class Record:
    """Takes appends; refuses, fails or waits where it is told to."""

    def __init__(self) -> None:
        self.batches: list[list[str]] = []
        self.removals: list[list[str]] = []
        self.fail: dict[str, list[Exception]] = {}
        self.go = asyncio.Event()
        self.go.set()

    async def append_all(self, appends: Sequence[Append]) -> None:
        await self.go.wait()
        for append in appends:
            if self.fail.get(append.key.session):
                raise self.fail[append.key.session].pop(0)
        self.batches.append([append.key.session for append in appends])

    async def delete(self, *keys: SessionKey) -> None:
        await self.go.wait()
        for key in keys:
            if self.fail.get(key.session):
                raise self.fail[key.session].pop(0)
        self.removals.append([key.session for key in keys])


def append(session: str, text: str = "") -> Append:
    return Append(SessionKey("t", session), 0, [Event("turn", 0.0, {}, {"said": text})], STANDING)


@pytest.fixture
async def record() -> Record:
    return Record()


@pytest.fixture
async def queue(record: Record) -> AsyncIterator[WriteBehindQueue]:
    queue = WriteBehindQueue(cast(Store, record), most_mib=1)
    await queue.start()
    yield queue
    await queue.stop()


async def test_removals_that_wait_together_go_in_one_transaction_and_one_that_fails_costs_no_other(
    queue: WriteBehindQueue, record: Record
) -> None:
    def removal(session: str) -> Write:
        key = SessionKey("t", session)
        return Write(key, lambda: record.delete(key), removes=True)

    record.go.clear()
    queue.append(append("first"))
    for session in "abc":
        queue.put(removal(session))
    record.go.set()
    await queue.written()
    assert record.removals == [["a", "b", "c"]]
    record.go.clear()
    queue.append(append("first"))
    record.fail["e"] = [StoreRefused("contradicted"), StoreRefused("contradicted")]
    for session in "def":
        queue.put(removal(session))
    record.go.set()
    await queue.written()
    assert record.removals[1:] == [["d"], ["f"]]
    assert queue.has(SessionKey("t", "e"))
    assert not queue.has(SessionKey("t", "d"))


async def test_appends_that_wait_together_go_in_one_transaction(
    queue: WriteBehindQueue, record: Record
) -> None:
    record.go.clear()
    for session in "abcd":
        queue.append(append(session))
    record.go.set()
    await queue.written()
    assert record.batches == [["a", "b", "c", "d"]]
    assert (queue.behind, queue.age, queue.characters) == (0, 0.0, 0)


async def test_a_write_between_appends_keeps_its_place(queue: WriteBehindQueue, record: Record) -> None:
    async def erase() -> None:
        record.batches.append(["erased"])

    queue.append(append("a"))
    queue.put(Write(SessionKey("t", "a"), erase))
    queue.append(append("a"))
    await queue.written()
    assert record.batches == [["a"], ["erased"], ["a"]]


@pytest.mark.parametrize("fault", [StoreRefused("found another's"), RuntimeError("a bug")])
async def test_a_write_that_fails_for_good_costs_its_own_session_alone(
    queue: WriteBehindQueue, record: Record, fault: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    record.fail["b"] = [fault, fault]
    for session in "abc":
        queue.append(append(session))
    await queue.written()
    queue.append(append("b"))
    queue.append(append("c"))
    await queue.written()
    assert record.batches == [["a"], ["c"], ["c"]]
    assert queue.has(SessionKey("t", "b"))
    assert sum("in memory only" in line for line in caplog.messages) == 1
    assert queue.task.alive


async def test_a_batch_whose_acknowledgement_was_lost_is_not_held_against_its_sessions(
    queue: WriteBehindQueue, record: Record
) -> None:
    twice = StoreRefused("a duplicate", duplicate=True)
    record.fail["a"] = [StoreUnavailable("cut"), twice, twice]
    record.fail["b"] = [twice]
    queue.append(append("a"))
    queue.append(append("b"))
    await queue.written()
    assert not queue.has(SessionKey("t", "a"))
    assert not queue.has(SessionKey("t", "b"))


async def test_writes_wait_while_the_database_is_away_and_are_bounded_in_characters(
    queue: WriteBehindQueue, record: Record
) -> None:
    record.go.clear()
    queue.append(append("a", "x" * 600_000))
    await asyncio.sleep(0.05)
    assert queue.age >= 0.04
    queue.require_room()
    queue.append(append("b", "x" * 600_000))
    with pytest.raises(StoreUnavailable, match="2 writes wait"):
        queue.require_room()
    record.go.set()
    await queue.written()
    queue.require_room()


async def test_a_writer_that_ends_is_started_again_and_loses_nothing_behind_it(
    queue: WriteBehindQueue, record: Record, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    whole = WriteBehindQueue._write_batch

    async def broken(self: WriteBehindQueue, batch: Sequence[Append]) -> None:
        monkeypatch.setattr(WriteBehindQueue, "_write_batch", whole)
        raise RuntimeError("a bug of the writer itself")

    monkeypatch.setattr(WriteBehindQueue, "_write_batch", broken)
    queue.append(append("a"))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    queue.append(append("b"))
    queue.append(append("a"))
    await queue.written()
    assert record.batches == [["b"]]  # of "a" nothing follows what was lost
    assert queue.has(SessionKey("t", "a"))
    assert queue.task.deaths == 1
    assert any("session-writer" in line and "started again" in line for line in caplog.messages)


async def test_a_task_that_dies_at_once_again_and_again_is_given_up(caplog: pytest.LogCaptureFixture) -> None:
    async def dies() -> None:
        raise RuntimeError("at once")

    task = SupervisedTask("eternal", dies, RestartPolicy(first_delay=0.001, quick_deaths=3))
    task.start()
    async with asyncio.timeout(5):
        while task.alive:
            await asyncio.sleep(0.001)
    assert (task.deaths, task.given_up) == (3, True)
    assert [record.levelno for record in caplog.records] == [logging.ERROR] * 3


async def test_a_task_that_ran_for_long_starts_its_count_anew() -> None:
    runs: list[int] = []

    async def dies() -> None:
        runs.append(len(runs))
        await asyncio.sleep(0.002 if len(runs) < 6 else 60)
        raise RuntimeError("later")

    policy = RestartPolicy(first_delay=0.0, stable=0.001, quick_deaths=2)
    task = SupervisedTask("eternal", dies, policy)
    task.start()
    async with asyncio.timeout(5):
        while len(runs) < 6:
            await asyncio.sleep(0.001)
    assert (task.alive, task.given_up) == (True, False)
    await task.stop()


async def test_when_nothing_writes_any_more_waiters_are_told(
    record: Record, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue = WriteBehindQueue(cast(Store, record), most_mib=1)

    async def dies() -> Any:
        raise RuntimeError("at once")

    queue.task = SupervisedTask("session-writer", dies, RestartPolicy(0.0, 0.0, 60, 1))
    await queue.start()
    with pytest.raises(StoreUnavailable, match="has ended"):
        await queue.written()
    with pytest.raises(StoreUnavailable, match="has ended"):
        queue.require_room()

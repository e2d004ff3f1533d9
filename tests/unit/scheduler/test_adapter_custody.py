"""Adapters are kept within their budgets, and a session whose adapter goes is answered by the original."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from guard import GUARD_S  # type: ignore[import-not-found]
from scheduler_house import Build, House, Later  # type: ignore[import-not-found]

from soma_vllm.adapters.budgets import Reason
from soma_vllm.engines.base import ChatCall
from soma_vllm.errors import AdapterRejected, EngineUnavailable, NotFound, SomaError, StoreUnavailable
from soma_vllm.scheduler.adapter_notices import ShelfFiles
from soma_vllm.session.adapter_states import AdapterState
from soma_vllm.session.phases import Phase

History = list[dict[str, Any]]


async def started(build: Build, **changes: Any) -> House:
    house = build(**changes)
    await house.book.start()
    return house


def plain_fails_next(house: House) -> None:
    """The plain surrogate, which is judged first, will be found wanting; then the adapter passes."""
    house.surrogate.answers = [*["same"] * len(house.surrogate.calls), "different", "same"]


async def adapted(house: House, session: str) -> History:
    """A session that is served with an adapter of its own."""
    plain_fails_next(house)
    history: History = []
    for number in (1, 2):
        await house.say(history, f"question {number}", session)
    await house.settled()
    assert house.session(session).adapter is not None
    await house.book.written()
    return history


async def swept(house: House) -> int:
    count = await house.adapters.sweep()
    await house.settled()
    await house.book.written()
    return count


async def test_beyond_the_count_the_least_recently_used_adapter_goes(build: Build) -> None:
    house = await started(build, adapters={"max_count": 2})
    histories = {name: await adapted(house, name) for name in ("a", "b", "c")}
    await house.say(histories["a"], "question 3", "a")
    await house.book.written()
    assert await swept(house) == 1
    assert house.kinds("b")[-3:] == ["adapter_evicted", "adapter_draining", "adapter_retired"]
    assert {house.session(name).phase for name in ("a", "c")} == {Phase.SWITCHED}
    assert house.session("b").phase is Phase.ROLLED_BACK
    assert house.surrogate.log[-2:] == ["unload adapter-b-2", "delete adapter-b-2"]
    assert house.stock.evictions == [Reason.COUNT]
    assert house.stock.on_shelf == (3, 3 * 1024)
    assert await swept(house) == 0
    answer = await house.say(histories["b"], "question 3", "b")
    assert answer.headers["X-SOMA-Engine"] == "original"


async def test_a_session_whose_adapter_was_evicted_is_adapted_again_and_no_rollback_counts(
    build: Build,
) -> None:
    house = await started(build, adaptation={"cool_down_turns": 2})
    history = await adapted(house, "a")
    await house.adapters.remove("adapter-a-1")
    assert house.session("a").rollbacks == 0
    plain_fails_next(house)
    for number in (3, 4):
        answer = await house.say(history, f"question {number}", "a")
        assert answer.headers["X-SOMA-Engine"] == "original"
    await house.settled()
    session = house.session("a")
    assert session.phase is Phase.SWITCHED
    assert session.adapter is not None
    assert session.adapter.name == "adapter-a-2"


async def test_a_pinned_adapter_stays(build: Build) -> None:
    house = await started(build, adapters={"max_count": 1})
    for name in ("a", "b"):
        await adapted(house, name)
    house.shelf.pinned.add("adapter-a-1")
    assert await swept(house) == 1
    assert list(house.shelf.there) == ["adapter-a-1"]


async def test_an_adapter_unused_for_too_long_goes_also_after_a_restart(build: Build, later: Later) -> None:
    first = await started(build)
    await adapted(first, "a")
    await first.book.stop()
    second = await started(build, adapters={"ttl_s": 60.0})
    second.shelf.there = {
        name: replace(one, created=one.created - 100) for name, one in first.shelf.there.items()
    }
    assert await swept(second) == 0, "its session's last turn is on record, and recent"
    later(60.0)
    assert await swept(second) == 1
    assert second.stock.evictions == [Reason.TTL]
    assert (await second.custody.entry(second.session("a").key)).session.phase is Phase.ROLLED_BACK


async def test_every_branch_that_an_adapter_serves_goes_back_to_the_original(build: Build) -> None:
    house = await started(build)
    history = await adapted(house, "a")
    await house.say(history, "question 3", "a")
    branch = (await house.say(history[:4], "another question", "a")).headers["X-SOMA-Session"]
    assert house.session(branch).phase is Phase.SWITCHED
    await house.adapters.remove("adapter-a-1")
    assert {house.session(name).phase for name in ("a", branch)} == {Phase.ROLLED_BACK}
    assert house.surrogate.log.count("delete adapter-a-1") == 1


async def test_the_last_token_comes_before_the_files_go_and_nobody_new_gets_the_adapter(build: Build) -> None:
    house = await started(build)
    history = await adapted(house, "a")
    stream = await house.say(history, "question 3", "a", stream=True)
    removal = asyncio.create_task(house.adapters.remove("adapter-a-1"))
    await asyncio.sleep(0.05)
    assert house.book.adapter_state("adapter-a-1") is AdapterState.DRAINING
    assert "adapter-a-1" in house.shelf.there
    answer = await house.say(history[:4], "another question", "a")
    assert answer.headers["X-SOMA-Engine"] == "original"
    assert stream.reply.events is not None
    async for _ in stream.reply.events:
        pass
    await asyncio.wait_for(removal, GUARD_S)
    assert house.shelf.there == {}


async def test_an_adapter_in_the_making_is_left_to_its_adaptation(build: Build) -> None:
    house = await started(build, adapters={"max_count": 1, "ttl_s": 0.001})
    judging, go = asyncio.Event(), asyncio.Event()
    load = house.surrogate.load

    async def slow(ref: Any) -> None:
        judging.set()
        await go.wait()
        await load(ref)

    house.surrogate.load = slow  # type: ignore[method-assign]
    plain_fails_next(house)
    history: History = []
    for number in (1, 2):
        await house.say(history, f"question {number}", "a")
    await asyncio.wait_for(judging.wait(), GUARD_S)
    await house.book.written()
    await asyncio.sleep(0.01)
    assert await house.adapters.sweep() == 0
    go.set()
    await house.settled()
    assert house.session("a").phase is Phase.SWITCHED


async def test_publishing_rings_the_sweep(build: Build) -> None:
    house = await started(build, adapters={"max_count": 1})
    await house.custody.start()
    await adapted(house, "a")
    await adapted(house, "b")
    async with asyncio.timeout(GUARD_S):
        while "adapter-a-1" in house.shelf.there:
            await asyncio.sleep(0.02)
    assert house.session("b").phase is Phase.SWITCHED
    await house.custody.stop()


async def test_a_session_whose_adapter_lost_its_files_goes_back_to_the_original(build: Build) -> None:
    house = await started(build)
    histories = {name: await adapted(house, name) for name in ("a", "b")}
    del house.shelf.there["adapter-a-1"]
    assert await swept(house) == 1
    assert house.stock.evictions == [Reason.LOST]
    assert house.session("a").phase is Phase.ROLLED_BACK
    assert house.session("b").phase is Phase.SWITCHED
    answer = await house.say(histories["a"], "question 3", "a")
    assert answer.headers["X-SOMA-Engine"] == "original"
    assert await swept(house) == 0


async def test_damage_found_at_a_load_is_told_and_its_session_goes_back(build: Build) -> None:
    house = await started(build)
    await adapted(house, "a")
    ref = house.session("a").adapter
    assert ref is not None
    files = ShelfFiles(house.shelf, house.notices, house.stock)
    assert await files.at_hand(ref) == ref

    def damaged(name: str) -> Any:
        raise AdapterRejected(name, ["weights: cut off"])

    house.shelf.resolve = damaged  # type: ignore[method-assign]
    with pytest.raises(EngineUnavailable, match="cut off"):
        await files.at_hand(ref)
    await asyncio.wait_for(house.notices.wait(2 * GUARD_S), GUARD_S)
    assert await swept(house) == 1
    assert house.session("a").phase is Phase.ROLLED_BACK
    assert house.shelf.there == {}


async def test_an_adapter_of_ours_that_nobody_speaks_of_is_deleted_and_others_are_not(build: Build) -> None:
    house = await started(build)
    await adapted(house, "a")
    known = house.shelf.there["adapter-a-1"]
    for name, owner in (("mine", "us"), ("theirs", "them")):
        ref = replace(known.ref, name=name, number=len(name))
        house.shelf.there[name] = replace(known, ref=ref, owner=owner, created=time.time() - 1)
    assert await swept(house) == 1
    assert list(house.shelf.there) == ["adapter-a-1", "theirs"]
    assert house.stock.evictions == [Reason.ORPHANED]


async def test_an_adapter_that_cannot_leave_the_engine_keeps_its_files_and_is_tried_again(build: Build) -> None:
    house = await started(build)
    await adapted(house, "a")
    unload = house.surrogate.unload

    async def refuse(ref: Any) -> None:
        raise EngineUnavailable("gone")

    house.surrogate.unload = refuse  # type: ignore[method-assign]
    with pytest.raises(SomaError, match="could not be deleted yet"):
        await house.adapters.remove("adapter-a-1")
    await house.book.written()
    assert house.session("a").phase is Phase.ROLLED_BACK
    assert "adapter-a-1" in house.shelf.there
    house.surrogate.unload = unload  # type: ignore[method-assign]
    assert await swept(house) == 1
    assert house.shelf.there == {}
    records = await house.custody._store.adapters()
    assert [record.state for record in records] == ["RETIRED"]


async def test_while_the_session_store_is_away_nothing_is_evicted(
    build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    house = await started(build, adapters={"max_count": 1})
    for name in ("a", "b"):
        await adapted(house, name)

    async def away(*_: Any) -> Any:
        raise ConnectionRefusedError

    with monkeypatch.context() as patch:
        patch.setattr(house.custody._store, "adapters_used", away)
        with pytest.raises(StoreUnavailable):
            await house.adapters.sweep()
    assert len(house.shelf.there) == 2
    assert await swept(house) == 1


async def test_a_listing_shows_states_and_uses_and_a_tenant_sees_its_own(build: Build) -> None:
    house = await started(build)
    await adapted(house, "a")
    await adapted(house, "b")
    house.shelf.pinned.add("adapter-b-2")
    rows = await house.adapters.listed()
    assert [(row["name"], row["state"], row["pinned"]) for row in rows] == [
        ("adapter-b-2", "ACTIVE", True),
        ("adapter-a-1", "ACTIVE", False),
    ]
    assert "path" not in str(rows)
    assert await house.adapters.listed("stranger") == []
    tenant = house.session("a").key.tenant
    assert (await house.adapters.show(tenant, "adapter-a-1"))["serves"] == ["a"]
    for whose, name in (("stranger", "adapter-a-1"), (None, "adapter-x")):
        with pytest.raises(NotFound):
            await house.adapters.show(whose, name)
    with pytest.raises(NotFound):
        await house.adapters.remove("adapter-x")


async def test_a_call_for_an_evicted_adapter_never_reaches_the_engine(build: Build) -> None:
    house = await started(build)
    await adapted(house, "a")
    ref = house.session("a").adapter
    assert ref is not None
    await house.adapters.remove(ref.name)
    calls = len(house.surrogate.calls)
    await house.say([], "hello", "a")
    assert all(isinstance(call, ChatCall) and call.adapter is None for call in house.surrogate.calls[calls:])


async def test_a_folder_of_a_removed_session_is_forgotten(build: Build, tmp_path: Path) -> None:
    house = await started(build)
    await adapted(house, "a")
    forgotten: list[Any] = []
    house.shelf.forget = forgotten.append  # type: ignore[method-assign]
    key = house.session("a").key
    await house.custody.remove(key)
    assert forgotten == [key]

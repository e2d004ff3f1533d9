"""Adapters are kept within their budgets, and a session whose adapter goes is answered by the original."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.guard import GUARD_S
from support.services import Build, Later, Services

from soma_vllm.adapters.eviction_policy import Reason
from soma_vllm.adapters.file_provider import AdapterFileProvider
from soma_vllm.engines.engine import ChatCall
from soma_vllm.errors import AdapterRejected, EngineUnavailable, NotFound, SomaError, StoreUnavailable
from soma_vllm.sessions.state.adapter_states import AdapterState
from soma_vllm.sessions.state.phases import Phase

History = list[dict[str, Any]]


async def started(build: Build, **changes: Any) -> Services:
    services = build(**changes)
    await services.registry.start()
    return services


def plain_fails_next(services: Services) -> None:
    """The plain surrogate, which is judged first, will be found wanting; then the adapter passes."""
    services.surrogate.answers = [*["same"] * len(services.surrogate.calls), "different", "same"]


async def adapted(services: Services, session: str) -> History:
    """A session that is served with an adapter of its own."""
    plain_fails_next(services)
    history: History = []
    for number in (1, 2):
        await services.say(history, f"question {number}", session)
    await services.settled()
    assert services.session(session).adapter is not None
    await services.registry.written()
    return history


async def swept(services: Services) -> int:
    count = await services.evictor.sweep()
    await services.settled()
    await services.registry.written()
    return count


async def test_beyond_the_count_the_least_recently_used_adapter_goes(build: Build) -> None:
    services = await started(build, adapters={"max_count": 2})
    histories = {name: await adapted(services, name) for name in ("a", "b", "c")}
    await services.say(histories["a"], "question 3", "a")
    await services.registry.written()
    assert await swept(services) == 1
    assert services.kinds("b")[-3:] == ["adapter_evicted", "adapter_draining", "adapter_retired"]
    assert {services.session(name).phase for name in ("a", "c")} == {Phase.SWITCHED}
    assert services.session("b").phase is Phase.ROLLED_BACK
    assert services.surrogate.log[-2:] == ["unload adapter-b-2", "delete adapter-b-2"]
    assert services.stock.evictions == [Reason.COUNT]
    assert services.stock.stored == (3, 3 * 1024)
    assert await swept(services) == 0
    answer = await services.say(histories["b"], "question 3", "b")
    assert answer.headers["X-SOMA-Engine"] == "original"


async def test_a_session_whose_adapter_was_evicted_is_adapted_again_and_no_rollback_counts(
    build: Build,
) -> None:
    services = await started(build, adaptation={"cool_down_turns": 2})
    history = await adapted(services, "a")
    await services.evictor.remove("adapter-a-1")
    assert services.session("a").rollbacks == 0
    plain_fails_next(services)
    for number in (3, 4):
        answer = await services.say(history, f"question {number}", "a")
        assert answer.headers["X-SOMA-Engine"] == "original"
    await services.settled()
    session = services.session("a")
    assert session.phase is Phase.SWITCHED
    assert session.adapter is not None
    assert session.adapter.name == "adapter-a-2"


async def test_a_pinned_adapter_stays(build: Build) -> None:
    services = await started(build, adapters={"max_count": 1})
    for name in ("a", "b"):
        await adapted(services, name)
    services.adapter_store.pinned.add("adapter-a-1")
    assert await swept(services) == 1
    assert list(services.adapter_store.there) == ["adapter-a-1"]


async def test_an_adapter_unused_for_too_long_goes_also_after_a_restart(build: Build, later: Later) -> None:
    first = await started(build)
    await adapted(first, "a")
    await first.registry.stop()
    second = await started(build, adapters={"ttl_s": 60.0})
    (made,) = await second.store.adapters()
    assert made.created is not None
    await second.store.index([replace(made, created=made.created - 100)])
    assert await swept(second) == 0, "its session's last turn is on record, and recent"
    later(60.0)
    assert await swept(second) == 1
    assert second.stock.evictions == [Reason.TTL]
    assert (await second.session_admin.entry(second.session("a").key)).session.phase is Phase.ROLLED_BACK


async def test_every_branch_that_an_adapter_serves_goes_back_to_the_original(build: Build) -> None:
    services = await started(build)
    history = await adapted(services, "a")
    await services.say(history, "question 3", "a")
    branch = (await services.say(history[:4], "another question", "a")).headers["X-SOMA-Session"]
    assert services.session(branch).phase is Phase.SWITCHED
    await services.evictor.remove("adapter-a-1")
    assert {services.session(name).phase for name in ("a", branch)} == {Phase.ROLLED_BACK}
    assert services.surrogate.log.count("delete adapter-a-1") == 1


async def test_the_last_token_comes_before_the_files_go_and_nobody_new_gets_the_adapter(build: Build) -> None:
    services = await started(build)
    history = await adapted(services, "a")
    stream = await services.say(history, "question 3", "a", stream=True)
    removal = asyncio.create_task(services.evictor.remove("adapter-a-1"))
    await asyncio.sleep(0.05)
    assert services.registry.adapter_state("adapter-a-1") is AdapterState.DRAINING
    assert "adapter-a-1" in services.adapter_store.there
    answer = await services.say(history[:4], "another question", "a")
    assert answer.headers["X-SOMA-Engine"] == "original"
    assert stream.reply.events is not None
    async for _ in stream.reply.events:
        pass
    await asyncio.wait_for(removal, GUARD_S)
    assert services.adapter_store.there == {}


async def test_an_adapter_in_the_making_is_left_to_its_adaptation(build: Build) -> None:
    services = await started(build, adapters={"max_count": 1, "ttl_s": 0.001})
    judging, go = asyncio.Event(), asyncio.Event()
    load = services.surrogate.load

    async def slow(ref: Any) -> None:
        judging.set()
        await go.wait()
        await load(ref)

    services.surrogate.load = slow
    plain_fails_next(services)
    history: History = []
    for number in (1, 2):
        await services.say(history, f"question {number}", "a")
    await asyncio.wait_for(judging.wait(), GUARD_S)
    await services.registry.written()
    await asyncio.sleep(0.01)
    assert await services.evictor.sweep() == 0
    go.set()
    await services.settled()
    assert services.session("a").phase is Phase.SWITCHED


async def test_publishing_rings_the_sweep(build: Build) -> None:
    services = await started(build, adapters={"max_count": 1})
    await services.start()
    await adapted(services, "a")
    await adapted(services, "b")
    async with asyncio.timeout(GUARD_S):
        while "adapter-a-1" in services.adapter_store.there:
            await asyncio.sleep(0.02)
    assert services.session("b").phase is Phase.SWITCHED
    await services.stop()


async def test_a_session_whose_adapter_lost_its_files_goes_back_to_the_original(build: Build) -> None:
    services = await started(build)
    histories = {name: await adapted(services, name) for name in ("a", "b")}
    ref = services.session("a").adapter
    assert ref is not None
    del services.adapter_store.there["adapter-a-1"]
    files = AdapterFileProvider(services.adapter_store, services.sweep_trigger, services.stock)
    with pytest.raises(EngineUnavailable):
        await files.ensure_local(ref)
    assert await swept(services) == 1
    assert services.stock.evictions == [Reason.LOST]
    assert services.session("a").phase is Phase.ROLLED_BACK
    assert services.session("b").phase is Phase.SWITCHED
    answer = await services.say(histories["a"], "question 3", "a")
    assert answer.headers["X-SOMA-Engine"] == "original"
    assert await swept(services) == 0


async def test_damage_found_at_a_load_is_told_and_its_session_goes_back(build: Build) -> None:
    services = await started(build)
    await adapted(services, "a")
    ref = services.session("a").adapter
    assert ref is not None
    files = AdapterFileProvider(services.adapter_store, services.sweep_trigger, services.stock)
    assert (await files.ensure_local(ref)).ref == ref

    def damaged(name: str) -> Any:
        raise AdapterRejected(name, ["weights: cut off"])

    services.adapter_store.resolve = damaged
    with pytest.raises(EngineUnavailable, match="cut off"):
        await files.ensure_local(ref)
    await asyncio.wait_for(services.sweep_trigger.wait(2 * GUARD_S), GUARD_S)
    assert await swept(services) == 1
    assert services.session("a").phase is Phase.ROLLED_BACK
    assert services.adapter_store.there == {}


async def test_an_adapter_of_ours_that_nobody_speaks_of_is_deleted_and_others_are_not(build: Build) -> None:
    services = await started(build)
    await adapted(services, "a")
    known = services.adapter_store.there["adapter-a-1"]
    for name, owner in (("mine", services.adapter_store.owner), ("theirs", "them")):
        ref = replace(known.ref, name=name, number=len(name))
        services.adapter_store.there[name] = replace(known, ref=ref, owner=owner, created=time.time() - 1)
    services.adapter_store.list, lists = (lambda: pytest.fail("a sweep looked")), services.adapter_store.list
    assert await swept(services) == 0
    services.adapter_store.list = lists
    assert await services.evictor.collect() == 1
    assert list(services.adapter_store.there) == ["adapter-a-1", "theirs"]
    assert services.stock.evictions == [Reason.ORPHANED]


async def test_an_adapter_that_outlived_its_session_goes_with_the_next_sweep(build: Build) -> None:
    services = await started(build)
    await adapted(services, "a")
    key, unload = services.session("a").key, services.surrogate.unload

    async def refuse(ref: Any) -> None:
        raise EngineUnavailable("gone")

    services.surrogate.unload = refuse
    await services.session_admin.remove(key)
    assert [record.name for record in await services.store.adapters()] == ["adapter-a-1"]
    services.surrogate.unload = unload
    assert await swept(services) == 1
    assert (services.adapter_store.there, await services.store.adapters()) == ({}, [])


async def test_an_adapter_that_cannot_leave_the_engine_keeps_its_files_and_is_tried_again(build: Build) -> None:
    services = await started(build)
    await adapted(services, "a")
    unload = services.surrogate.unload

    async def refuse(ref: Any) -> None:
        raise EngineUnavailable("gone")

    services.surrogate.unload = refuse
    with pytest.raises(SomaError, match="could not be deleted yet"):
        await services.evictor.remove("adapter-a-1")
    await services.registry.written()
    assert services.session("a").phase is Phase.ROLLED_BACK
    assert "adapter-a-1" in services.adapter_store.there
    services.surrogate.unload = unload
    assert await swept(services) == 1
    assert services.adapter_store.there == {}
    records = await services.store.adapters()
    assert [record.state for record in records] == ["RETIRED"]


async def test_while_the_session_store_is_away_nothing_is_evicted(
    build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    services = await started(build, adapters={"max_count": 1})
    for name in ("a", "b"):
        await adapted(services, name)

    async def away(*_: Any) -> Any:
        raise StoreUnavailable("away")

    with monkeypatch.context() as patch:
        patch.setattr(services.store, "adapters_used", away)
        with pytest.raises(StoreUnavailable):
            await services.evictor.sweep()
    assert len(services.adapter_store.there) == 2
    assert await swept(services) == 1


async def test_a_listing_shows_states_and_uses_and_a_tenant_sees_its_own(build: Build) -> None:
    services = await started(build)
    await adapted(services, "a")
    await adapted(services, "b")
    services.adapter_store.pinned.add("adapter-b-2")
    rows = await services.evictor.listed()
    assert [(row["name"], row["state"], row["pinned"]) for row in rows] == [
        ("adapter-b-2", "ACTIVE", True),
        ("adapter-a-1", "ACTIVE", False),
    ]
    assert "path" not in str(rows)
    assert await services.evictor.listed("stranger") == []
    tenant = services.session("a").key.tenant
    assert (await services.evictor.show(tenant, "adapter-a-1"))["serves"] == ["a"]
    for whose, name in (("stranger", "adapter-a-1"), (None, "adapter-x")):
        with pytest.raises(NotFound):
            await services.evictor.show(whose, name)
    with pytest.raises(NotFound):
        await services.evictor.remove("adapter-x")


async def test_a_call_for_an_evicted_adapter_never_reaches_the_engine(build: Build) -> None:
    services = await started(build)
    await adapted(services, "a")
    ref = services.session("a").adapter
    assert ref is not None
    await services.evictor.remove(ref.name)
    calls = len(services.surrogate.calls)
    await services.say([], "hello", "a")
    assert all(isinstance(call, ChatCall) and call.adapter is None for call in services.surrogate.calls[calls:])


async def test_a_folder_of_a_removed_session_is_forgotten(build: Build, tmp_path: Path) -> None:
    services = await started(build)
    await adapted(services, "a")
    forgotten: list[Any] = []
    services.adapter_store.forget = forgotten.append
    key = services.session("a").key
    await services.session_admin.remove(key)
    assert forgotten == [key]

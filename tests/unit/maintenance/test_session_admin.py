"""Care for sessions outside any request."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import pytest
from support.guard import GUARD_S
from support.services import Build, Later, Services

from soma_vllm.errors import BadRequest, EngineUnavailable, NotFound, StoreUnavailable, Unprocessable
from soma_vllm.scheduler.dispatcher import ChatRequest
from soma_vllm.sessions.state.phases import Phase
from soma_vllm.types import Role, SessionKey

History = list[dict[str, Any]]
WORD = "pomegranate"


async def started(build: Build, **changes: Any) -> Services:
    services = build(**changes)
    await services.registry.start()
    return services


async def warmed(services: Services, session: str | None = "s") -> History:
    history: History = []
    for number in (1, 2):
        await services.say(history, f"{WORD} {number}", session)
    await services.settled()
    return history


def on_disk(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in folder.glob("s.db*"))


async def test_a_removed_session_leaves_nothing_behind(services: Services, tmp_path: Path) -> None:
    services.surrogate.answers = ["different", "same"]
    history = await warmed(services)
    await services.registry.written()
    key = services.session().key
    assert WORD.encode() in on_disk(tmp_path)
    salt = services.salts.of(key.tenant)
    await services.session_admin.remove(key)
    assert services.surrogate.log[-2:] == ["unload adapter-s-1", "delete adapter-s-1"]
    assert WORD.encode() not in on_disk(tmp_path)
    assert services.salts.of(key.tenant) != salt
    with pytest.raises(NotFound):
        await services.session_admin.entry(key)
    answer = await services.say(history, "question 3")
    assert answer.headers["X-SOMA-Phase"] == "WARM_START"


async def test_removing_a_dialogue_removes_its_branches_and_removing_a_branch_leaves_the_rest(
    services: Services, tmp_path: Path
) -> None:
    services.surrogate.answers = ["different", "same"]
    history = await warmed(services)
    await services.say(history, "question 3")
    branches = []
    for word in ("left", "right"):
        edited = [*history[:5], {"role": "assistant", "content": f"another answer, {word}"}]
        answer = await services.say(edited, f"{WORD} {word}")
        branches.append(answer.headers["X-SOMA-Session"])
    key = services.session().key
    await services.session_admin.remove(services.session(branches[0]).key)
    assert [k for k in services.registry._entries if k.session == branches[0]] == []
    assert services.session(branches[1]).adapter is not None
    await services.session_admin.remove(key)
    assert services.registry._entries == {}
    assert services.surrogate.log[-1] == "delete adapter-s-1"
    assert WORD.encode() not in on_disk(tmp_path)


async def test_a_session_that_two_remove_at_once_is_removed_once(services: Services) -> None:
    services.surrogate.answers = ["different", "same"]
    await warmed(services)
    key = services.session().key
    async with asyncio.timeout(GUARD_S):
        await asyncio.gather(services.session_admin.remove(key), services.session_admin.remove(key))
    assert services.surrogate.log.count("delete adapter-s-1") == 1
    assert services.registry._entries == {}


async def test_a_branch_whose_first_answer_is_not_over_goes_with_its_dialogue(services: Services) -> None:
    history = await warmed(services)
    await services.say(history, "question 3")
    edited = [*history[:5], {"role": "assistant", "content": "another answer"}]
    stream = await services.say(edited, "question 4", stream=True)
    assert stream.headers["X-SOMA-Session"] != "s"
    async with asyncio.timeout(GUARD_S):
        await services.session_admin.remove(services.session().key)
    assert stream.reply.events is not None
    async for _ in stream.reply.events:
        pass
    await services.registry.written()
    assert services.registry._entries == {}
    assert await services.session_admin.summaries(None, 10, None) == []


async def test_a_removal_that_was_cut_short_is_finished_by_the_next_sweep(services: Services) -> None:
    services.surrogate.answers = ["different", "same"]
    await warmed(services)
    services.registry.note(services.session().key, "closed")
    await services.registry.written()
    await services.retention.sweep()
    await services.registry.written()
    assert services.surrogate.log[-1] == "delete adapter-s-1"
    assert await services.session_admin.summaries(None, 10, None) == []


async def test_a_session_that_is_removed_in_the_middle_of_a_request_is_not_recorded_again(
    services: Services,
) -> None:
    history = await warmed(services)
    stream = await services.say(history, "question 3", stream=True)
    services.registry.remove(services.session().key)
    assert stream.reply.events is not None
    async for _ in stream.reply.events:
        pass
    assert services.registry._entries == {}


async def test_a_request_to_a_session_that_is_removed_gives_no_hold_back_twice(services: Services) -> None:
    history = await warmed(services)
    key = services.session().key
    services.registry.hold(key)
    services.registry.note(key, "closed")
    services.original.refusal = EngineUnavailable("down")
    with pytest.raises(EngineUnavailable):
        await services.say(history, "question 3")
    assert services.registry.holds(key) == 1


async def test_removing_a_session_ends_its_training(services: Services) -> None:
    services.surrogate.answers = ["different", "same"]
    services.trainer.go.clear()
    history: History = []
    for number in (1, 2):
        await services.say(history, f"question {number}")
    while not services.trainer.requests:
        await asyncio.sleep(0)
    async with asyncio.timeout(GUARD_S):
        await services.session_admin.remove(services.session().key)
    assert services.adapter_store.published == []
    assert not Path(services.trainer.requests[0].out_dir).exists()


async def test_a_request_under_way_ends_before_its_session_is_removed(services: Services) -> None:
    history = await warmed(services)
    key = services.session().key
    stream = await services.say(history, "question 3", stream=True)
    removing = asyncio.create_task(services.session_admin.remove(key))
    await asyncio.sleep(0.05)
    assert not removing.done()
    assert stream.reply.events is not None
    late = await services.say(history[:4], "question 3 b")
    assert late.headers["X-SOMA-Reason"] == "session being removed"
    async for _ in stream.reply.events:
        pass
    await asyncio.wait_for(removing, GUARD_S)
    assert services.registry._entries == {}


async def test_a_refused_session_whose_old_words_were_erased_has_them_from_its_client(build: Build) -> None:
    services = await started(build, adaptation={"candidates": ["plain"], "cool_down_turns": 2})
    services.surrogate.answers = ["different", "different", "same"]
    history: History = []
    for number in (1, 2):
        await services.say(history, f"question {number}")
    await services.settled()
    assert services.session().phase is Phase.ORIGINAL_ONLY
    services.registry.forget_before(4.0e9)
    assert not services.session().kept()
    for number in (3, 4):
        await services.say(history, f"question {number}")
    await services.settled()
    assert services.session().phase is Phase.SWITCHED


@pytest.mark.parametrize("keep", ["until_adapted", "never"])
async def test_text_is_kept_no_longer_than_configured(build: Build, tmp_path: Path, keep: str) -> None:
    services = await started(build, retention={"text": keep})
    history: History = []
    await services.say(history, f"{WORD} 1")
    await services.registry.written()
    assert (WORD.encode() in on_disk(tmp_path)) is (keep == "until_adapted")
    await services.say(history, f"{WORD} 2")
    await services.settled()
    await services.say(history, f"{WORD} 3")
    await services.settled()
    await services.registry.written()
    assert services.session().phase is Phase.SWITCHED
    assert not services.session().kept()
    assert WORD.encode() not in on_disk(tmp_path)
    assert WORD not in repr(services.registry._entries)


async def test_without_stored_text_a_restarted_server_learns_from_what_the_client_repeats(build: Build) -> None:
    first = await started(build, retention={"text": "never"})
    history: History = []
    await first.say(history, "question 1")
    await first.registry.stop()
    second = await started(build, retention={"text": "never"})
    await second.say(history, "question 2")
    await second.settled()
    assert second.session().phase is Phase.SWITCHED


async def test_text_that_is_too_old_is_erased_and_its_session_goes_on(build: Build, tmp_path: Path) -> None:
    services = await started(build, retention={"text_ttl_s": 0.01})
    history = await warmed(services)
    await services.registry.written()
    await asyncio.sleep(0.02)
    await services.retention.sweep()
    assert WORD.encode() not in on_disk(tmp_path)
    answer = await services.say(history, "question 3")
    assert answer.headers["X-SOMA-Engine"] == "surrogate"


async def test_sessions_unused_for_too_long_are_removed_and_others_stay(build: Build, later: Later) -> None:
    services = await started(build, retention={"session_ttl_s": 3600.0})
    await warmed(services, "old")
    await services.registry.written()
    later(3600.0)
    await warmed(services, "new")
    await services.registry.written()
    assert await services.retention.sweep() == 1
    await services.registry.written()
    found = await services.session_admin.summaries(None, 10, None)
    assert [summary.key.session for summary in found] == ["new"]


async def test_a_pinned_session_stays_with_its_engine(services: Services) -> None:
    history = await warmed(services)
    key = services.session().key
    for engine in (Role.ORIGINAL, Role.SURROGATE):
        await services.session_admin.pin(key, engine)
        answer = await services.say(history, "another question")
        assert answer.headers["X-SOMA-Engine"] == engine
        assert answer.headers["X-SOMA-Reason"] == "pinned"
    await services.session_admin.pin(key, None)
    answer = await services.say(history, "another question")
    assert answer.headers["X-SOMA-Reason"].startswith("switched")


async def test_an_administrators_roll_back_retires_the_adapter(services: Services) -> None:
    services.surrogate.answers = ["different", "same"]
    history = await warmed(services)
    key = services.session().key
    await services.session_admin.roll_back(key)
    await services.settled()
    assert services.surrogate.log[-1] == "delete adapter-s-1"
    answer = await services.say(history, "question 3")
    assert answer.headers["X-SOMA-Phase"] == "ROLLED_BACK"
    with pytest.raises(BadRequest, match="expected SWITCHED"):
        await services.session_admin.roll_back(key)


async def test_an_adaptation_that_is_asked_for_begins_at_once(services: Services) -> None:
    services.surrogate.answers = ["different"]
    await warmed(services)
    assert services.session().phase is Phase.ORIGINAL_ONLY
    services.surrogate.answers = ["same"]
    await services.session_admin.readapt(services.session().key)
    await services.settled()
    assert services.session().phase is Phase.SWITCHED


async def test_an_answer_is_found_by_its_id_with_all_that_was_said_before(services: Services) -> None:
    headers = {"authorization": "Bearer k", "x-session-id": "s"}
    messages: History = []
    for number in (1, 2):
        messages.append({"role": "user", "content": f"question {number}"})
        body = {"model": "soma", "messages": list(messages)}
        answer = await services.dispatcher.chat(ChatRequest(body, headers, response=f"resp_{number}"))
        assert answer.reply.body is not None
        messages.append(answer.reply.body["choices"][0]["message"])
    tenant = services.session().key.tenant
    said = await services.dispatcher.said(tenant, "resp_1")
    assert (said.session, [dict(m) for m in said.messages]) == ("s", messages[:2])
    with pytest.raises(NotFound):
        await services.dispatcher.said("another", "resp_1")


async def test_an_answer_whose_text_was_not_kept_cannot_be_gone_on_from(build: Build) -> None:
    services = await started(build, retention={"text": "never"})
    history = await warmed(services)
    body = {"model": "soma", "messages": [*history, {"role": "user", "content": "question 3"}]}
    headers = {"authorization": "Bearer k", "x-session-id": "s"}
    await services.dispatcher.chat(ChatRequest(body, headers, response="resp_3"))
    with pytest.raises(Unprocessable, match="retention"):
        await services.dispatcher.said(services.session().key.tenant, "resp_3")


async def test_while_the_store_is_away_the_original_answers_and_afterwards_the_session_goes_on(
    build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = await started(build)
    history = await warmed(first)
    await first.registry.written()
    services = await started(build)

    async def away(*_: Any) -> Any:
        raise StoreUnavailable("away")

    with monkeypatch.context() as patch:
        patch.setattr(services.store, "events", away)
        answer = await services.say(history, "question 3")
        with pytest.raises(StoreUnavailable):
            await services.session_admin.entry(first.session().key)
    assert answer.headers["X-SOMA-Reason"] == "session store unavailable"
    assert answer.headers["X-SOMA-Engine"] == "original"
    answer = await services.say(history, "question 4")
    assert answer.headers["X-SOMA-Session"] == "s"
    assert answer.headers["X-SOMA-Engine"] == "surrogate"
    assert len(services.session().turns) == 3


async def test_an_unknown_session_cannot_be_ordered_about(services: Services) -> None:
    key = SessionKey("t", "nobody")
    for order in (
        services.session_admin.remove,
        services.session_admin.roll_back,
        services.session_admin.readapt,
    ):
        with pytest.raises(NotFound):
            await order(key)


async def test_the_time_of_a_listing_goes_on_where_it_ended(services: Services) -> None:
    for name in ("a", "b", "c"):
        await services.say([], "question 1", name)
    await services.registry.written()
    first = await services.session_admin.summaries(None, 2, None)
    rest = await services.session_admin.summaries(None, 2, first[-1].updated_at)
    assert [s.key.session for s in (*first, *rest)] == ["c", "b", "a"]
    assert all(s.updated_at <= time.time() + 1 for s in first)


async def test_an_engine_that_fails_to_unload_keeps_the_files(services: Services) -> None:
    services.surrogate.answers = ["different", "same"]
    await warmed(services)

    async def refuse(ref: Any) -> None:
        raise EngineUnavailable("gone")

    services.surrogate.unload = refuse
    await services.session_admin.roll_back(services.session().key)
    await services.settled()
    assert "delete adapter-s-1" not in services.surrogate.log

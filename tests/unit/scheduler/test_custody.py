"""Care for sessions outside any request."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import pytest
from guard import GUARD_S  # type: ignore[import-not-found]
from scheduler_house import Build, House, Later  # type: ignore[import-not-found]

from soma_vllm.errors import BadRequest, EngineUnavailable, NotFound, StoreUnavailable, Unprocessable
from soma_vllm.scheduler.dispatcher import Incoming
from soma_vllm.session.phases import Phase
from soma_vllm.types import Role, SessionKey

History = list[dict[str, Any]]
WORD = "pomegranate"


async def started(build: Build, **changes: Any) -> House:
    house = build(**changes)
    await house.book.start()
    return house


async def warmed(house: House, session: str | None = "s") -> History:
    history: History = []
    for number in (1, 2):
        await house.say(history, f"{WORD} {number}", session)
    await house.settled()
    return history


def on_disk(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in folder.glob("s.db*"))


async def test_a_removed_session_leaves_nothing_behind(house: House, tmp_path: Path) -> None:
    house.surrogate.answers = ["different", "same"]
    history = await warmed(house)
    await house.book.written()
    key = house.session().key
    assert WORD.encode() in on_disk(tmp_path)
    salt = house.salts.of(key.tenant)
    await house.custody.remove(key)
    assert house.surrogate.log[-2:] == ["unload adapter-s-1", "delete adapter-s-1"]
    assert WORD.encode() not in on_disk(tmp_path)
    assert house.salts.of(key.tenant) != salt
    with pytest.raises(NotFound):
        await house.custody.entry(key)
    answer = await house.say(history, "question 3")
    assert answer.headers["X-SOMA-Phase"] == "WARM_START"


async def test_removing_a_dialogue_removes_its_branches_and_removing_a_branch_leaves_the_rest(
    house: House, tmp_path: Path
) -> None:
    house.surrogate.answers = ["different", "same"]
    history = await warmed(house)
    await house.say(history, "question 3")
    branches = []
    for word in ("left", "right"):
        answer = await house.say(history[:4], f"{WORD} {word}")
        branches.append(answer.headers["X-SOMA-Session"])
    key = house.session().key
    await house.custody.remove(house.session(branches[0]).key)
    assert [k for k in house.book._entries if k.session == branches[0]] == []
    assert house.session(branches[1]).adapter is not None
    await house.custody.remove(key)
    assert house.book._entries == {}
    assert house.surrogate.log[-1] == "delete adapter-s-1"
    assert WORD.encode() not in on_disk(tmp_path)


async def test_a_session_that_two_remove_at_once_is_removed_once(house: House) -> None:
    house.surrogate.answers = ["different", "same"]
    await warmed(house)
    key = house.session().key
    async with asyncio.timeout(GUARD_S):
        await asyncio.gather(house.custody.remove(key), house.custody.remove(key))
    assert house.surrogate.log.count("delete adapter-s-1") == 1
    assert house.book._entries == {}


async def test_a_branch_whose_first_answer_is_not_over_goes_with_its_dialogue(house: House) -> None:
    history = await warmed(house)
    await house.say(history, "question 3")
    stream = await house.say(history[:4], "another question 3", stream=True)
    assert stream.headers["X-SOMA-Session"] != "s"
    async with asyncio.timeout(GUARD_S):
        await house.custody.remove(house.session().key)
    assert stream.reply.events is not None
    async for _ in stream.reply.events:
        pass
    await house.book.written()
    assert house.book._entries == {}
    assert await house.custody.summaries(None, 10, None) == []


async def test_a_removal_that_was_cut_short_is_finished_by_the_next_sweep(house: House) -> None:
    house.surrogate.answers = ["different", "same"]
    await warmed(house)
    house.book.note(house.session().key, "closed")
    await house.book.written()
    await house.custody.sweep()
    await house.book.written()
    assert house.surrogate.log[-1] == "delete adapter-s-1"
    assert await house.custody.summaries(None, 10, None) == []


async def test_a_session_that_is_removed_in_the_middle_of_a_request_is_not_recorded_again(house: House) -> None:
    history = await warmed(house)
    stream = await house.say(history, "question 3", stream=True)
    house.book.remove(house.session().key)
    assert stream.reply.events is not None
    async for _ in stream.reply.events:
        pass
    assert house.book._entries == {}


async def test_a_request_to_a_session_that_is_removed_gives_no_hold_back_twice(house: House) -> None:
    history = await warmed(house)
    key = house.session().key
    house.book.hold(key)
    house.book.note(key, "closed")
    house.original.refusal = EngineUnavailable("down")
    with pytest.raises(EngineUnavailable):
        await house.say(history, "question 3")
    assert house.book.holds(key) == 1


async def test_removing_a_session_ends_its_training(house: House) -> None:
    house.surrogate.answers = ["different", "same"]
    house.trainer.go.clear()
    history: History = []
    for number in (1, 2):
        await house.say(history, f"question {number}")
    while not house.trainer.requests:
        await asyncio.sleep(0)
    async with asyncio.timeout(GUARD_S):
        await house.custody.remove(house.session().key)
    assert house.shelf.published == []
    assert not Path(house.trainer.requests[0].out_dir).exists()


async def test_a_request_under_way_ends_before_its_session_is_removed(house: House) -> None:
    history = await warmed(house)
    key = house.session().key
    stream = await house.say(history, "question 3", stream=True)
    removing = asyncio.create_task(house.custody.remove(key))
    await asyncio.sleep(0.05)
    assert not removing.done()
    assert stream.reply.events is not None
    late = await house.say(history[:4], "question 3 b")
    assert late.headers["X-SOMA-Reason"] == "session being removed"
    async for _ in stream.reply.events:
        pass
    await asyncio.wait_for(removing, GUARD_S)
    assert house.book._entries == {}


async def test_a_refused_session_whose_old_words_were_erased_has_them_from_its_client(build: Build) -> None:
    house = await started(build, adaptation={"candidates": ["plain"], "cool_down_turns": 2})
    house.surrogate.answers = ["different", "different", "same"]
    history: History = []
    for number in (1, 2):
        await house.say(history, f"question {number}")
    await house.settled()
    assert house.session().phase is Phase.ORIGINAL_ONLY
    house.book.forget_texts_before(4.0e9)
    assert not house.session().kept()
    for number in (3, 4):
        await house.say(history, f"question {number}")
    await house.settled()
    assert house.session().phase is Phase.SWITCHED


@pytest.mark.parametrize("keep", ["until_adapted", "never"])
async def test_text_is_kept_no_longer_than_configured(build: Build, tmp_path: Path, keep: str) -> None:
    house = await started(build, retention={"text": keep})
    history: History = []
    await house.say(history, f"{WORD} 1")
    await house.book.written()
    assert (WORD.encode() in on_disk(tmp_path)) is (keep == "until_adapted")
    await house.say(history, f"{WORD} 2")
    await house.settled()
    await house.say(history, f"{WORD} 3")
    await house.settled()
    await house.book.written()
    assert house.session().phase is Phase.SWITCHED
    assert not house.session().kept()
    assert WORD.encode() not in on_disk(tmp_path)
    assert WORD not in repr(house.book._entries)


async def test_without_stored_text_a_restarted_server_learns_from_what_the_client_repeats(build: Build) -> None:
    first = await started(build, retention={"text": "never"})
    history: History = []
    await first.say(history, "question 1")
    await first.book.stop()
    second = await started(build, retention={"text": "never"})
    await second.say(history, "question 2")
    await second.settled()
    assert second.session().phase is Phase.SWITCHED


async def test_text_that_is_too_old_is_erased_and_its_session_goes_on(build: Build, tmp_path: Path) -> None:
    house = await started(build, retention={"text_ttl_s": 0.01})
    history = await warmed(house)
    await house.book.written()
    await asyncio.sleep(0.02)
    await house.custody.sweep()
    assert WORD.encode() not in on_disk(tmp_path)
    answer = await house.say(history, "question 3")
    assert answer.headers["X-SOMA-Engine"] == "surrogate"


async def test_sessions_unused_for_too_long_are_removed_and_others_stay(build: Build, later: Later) -> None:
    house = await started(build, retention={"session_ttl_s": 3600.0})
    await warmed(house, "old")
    await house.book.written()
    later(3600.0)
    await warmed(house, "new")
    await house.book.written()
    assert await house.custody.sweep() == 1
    await house.book.written()
    found = await house.custody.summaries(None, 10, None)
    assert [summary.key.session for summary in found] == ["new"]


async def test_a_pinned_session_stays_with_its_engine(house: House) -> None:
    history = await warmed(house)
    key = house.session().key
    for engine in (Role.ORIGINAL, Role.SURROGATE):
        await house.custody.pin(key, engine)
        answer = await house.say(history, "another question")
        assert answer.headers["X-SOMA-Engine"] == engine
        assert answer.headers["X-SOMA-Reason"] == "pinned"
    await house.custody.pin(key, None)
    answer = await house.say(history, "another question")
    assert answer.headers["X-SOMA-Reason"].startswith("switched")


async def test_an_administrators_roll_back_retires_the_adapter(house: House) -> None:
    house.surrogate.answers = ["different", "same"]
    history = await warmed(house)
    key = house.session().key
    await house.custody.roll_back(key)
    await house.settled()
    assert house.surrogate.log[-1] == "delete adapter-s-1"
    answer = await house.say(history, "question 3")
    assert answer.headers["X-SOMA-Phase"] == "ROLLED_BACK"
    with pytest.raises(BadRequest, match="expected SWITCHED"):
        await house.custody.roll_back(key)


async def test_an_adaptation_that_is_asked_for_begins_at_once(house: House) -> None:
    house.surrogate.answers = ["different"]
    await warmed(house)
    assert house.session().phase is Phase.ORIGINAL_ONLY
    house.surrogate.answers = ["same"]
    await house.custody.readapt(house.session().key)
    await house.settled()
    assert house.session().phase is Phase.SWITCHED


async def test_an_answer_is_found_by_its_id_with_all_that_was_said_before(house: House) -> None:
    headers = {"authorization": "Bearer k", "x-session-id": "s"}
    messages: History = []
    for number in (1, 2):
        messages.append({"role": "user", "content": f"question {number}"})
        body = {"model": "soma", "messages": list(messages)}
        answer = await house.dispatcher.chat(Incoming(body, headers, response=f"resp_{number}"))
        assert answer.reply.body is not None
        messages.append(answer.reply.body["choices"][0]["message"])
    tenant = house.session().key.tenant
    said = await house.dispatcher.said(tenant, "resp_1")
    assert (said.session, [dict(m) for m in said.messages]) == ("s", messages[:2])
    with pytest.raises(NotFound):
        await house.dispatcher.said("another", "resp_1")


async def test_an_answer_whose_text_was_not_kept_cannot_be_gone_on_from(build: Build) -> None:
    house = await started(build, retention={"text": "never"})
    history = await warmed(house)
    body = {"model": "soma", "messages": [*history, {"role": "user", "content": "question 3"}]}
    headers = {"authorization": "Bearer k", "x-session-id": "s"}
    await house.dispatcher.chat(Incoming(body, headers, response="resp_3"))
    with pytest.raises(Unprocessable, match="retention"):
        await house.dispatcher.said(house.session().key.tenant, "resp_3")


async def test_while_the_store_is_away_the_original_answers_and_afterwards_the_session_goes_on(
    build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = await started(build)
    history = await warmed(first)
    await first.book.written()
    house = await started(build)

    async def away(*_: Any) -> Any:
        raise ConnectionRefusedError

    with monkeypatch.context() as patch:
        patch.setattr(house.custody._store, "events", away)
        answer = await house.say(history, "question 3")
        with pytest.raises(StoreUnavailable):
            await house.custody.entry(first.session().key)
    assert answer.headers["X-SOMA-Reason"] == "session store unavailable"
    assert answer.headers["X-SOMA-Engine"] == "original"
    answer = await house.say(history, "question 4")
    assert answer.headers["X-SOMA-Session"] == "s"
    assert answer.headers["X-SOMA-Engine"] == "surrogate"
    assert len(house.session().turns) == 3


async def test_an_unknown_session_cannot_be_ordered_about(house: House) -> None:
    key = SessionKey("t", "nobody")
    for order in (house.custody.remove, house.custody.roll_back, house.custody.readapt):
        with pytest.raises(NotFound):
            await order(key)


async def test_the_time_of_a_listing_goes_on_where_it_ended(house: House) -> None:
    for name in ("a", "b", "c"):
        await house.say([], "question 1", name)
    await house.book.written()
    first = await house.custody.summaries(None, 2, None)
    rest = await house.custody.summaries(None, 2, first[-1].updated_at)
    assert [s.key.session for s in (*first, *rest)] == ["c", "b", "a"]
    assert all(s.updated_at <= time.time() + 1 for s in first)


async def test_an_engine_that_fails_to_unload_keeps_the_files(house: House) -> None:
    house.surrogate.answers = ["different", "same"]
    await warmed(house)

    async def refuse(ref: Any) -> None:
        raise EngineUnavailable("gone")

    house.surrogate.unload = refuse  # type: ignore[method-assign]
    await house.custody.roll_back(house.session().key)
    await house.settled()
    assert "delete adapter-s-1" not in house.surrogate.log

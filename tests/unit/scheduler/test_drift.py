"""Audits: what they measure, what they may cost, and what becomes of a session that drifts."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from guard import GUARD_S  # type: ignore[import-not-found]
from scheduler_house import Build, House  # type: ignore[import-not-found]

from soma_vllm.engines.base import Reply
from soma_vllm.errors import EngineError, EngineUnavailable
from soma_vllm.session.phases import Phase
from soma_vllm.types import Agreement

History = list[dict[str, Any]]
SCORE = {"audit": "score", "audit_rate": 1.0, "surprise_threshold": 2.0}
AUDIT = {"audit_rate": 1.0}


async def started(build: Build, **changes: Any) -> House:
    house = build(**changes)
    await house.book.start()
    return house


async def switched(house: House, session: str = "s") -> History:
    """A session that the surrogate serves."""
    history: History = []
    for number in (1, 2):
        await house.say(history, f"question {number}", session)
    await house.settled()
    assert house.session(session).phase is Phase.SWITCHED
    return history


def told(house: House, kind: str, session: str = "s") -> list[dict[str, Any]]:
    """Data of all events of a kind."""
    return [dict(event.data) for key, event in house.events if key.session == session and event.kind == kind]


async def talking(house: House, session: str = "other") -> Reply:
    """A user who is in the middle of an answer of the original's."""
    answer = await house.say([], "a question", session, stream=True)
    assert answer.headers["X-SOMA-Engine"] == "original"
    assert answer.reply.events is not None
    await anext(answer.reply.events)
    return answer.reply


async def idle() -> None:
    """Let everything that can run do so."""
    for _ in range(50):
        await asyncio.sleep(0)


async def test_an_original_that_only_reads_can_roll_a_session_back(build: Build) -> None:
    house = await started(build, gate=SCORE)
    history = await switched(house)
    generated = len(house.original.calls)
    house.original.finds = Agreement(2.5, 0.25, 7)
    for number in (3, 4):
        await house.say(history, f"question {number}")
        await house.settled()
    assert house.session().phase is Phase.ROLLED_BACK
    expected = {"kind": "surprise", "surprise": 2.5, "gap": None, "top1": 0.25, "served_by": "surrogate"}
    assert told(house, "audited") == [{"turn": turn, **expected} for turn in (3, 4)]
    (back,) = told(house, "rolled_back")
    assert back["moving"] == 1.25
    assert back["window"] == [{"kind": "surprise", "value": 2.5, "relative": 1.25}]
    assert (back["surprise_threshold"], back["drift_threshold"]) == (2.0, 0.3)
    calls = house.original.read
    assert [answer for _, answer in calls] == ["same", "same"]
    assert [message["content"] for message in calls[0][0].body["messages"]][-1] == "question 3"
    assert all(call.background for call in house.original.calls[generated:])


async def test_a_calm_original_keeps_a_session_where_it_is(build: Build) -> None:
    house = await started(build, gate=SCORE)
    history = await switched(house)
    for number in range(3, 9):
        await house.say(history, f"question {number}")
        await house.settled()
    assert len(told(house, "audited")) == 6
    assert house.session().phase is Phase.SWITCHED


async def test_a_locality_miss_is_audited_by_gap_even_where_the_original_reads(build: Build) -> None:
    house = await started(build, gate={**SCORE, "locality_threshold": 0.0})
    history = await switched(house)
    house.surrogate.answers = ["far from it"]
    await house.say(history, "question 3")
    await house.settled()
    (audit,) = told(house, "audited")
    assert (audit["kind"], audit["gap"], audit["surprise"]) == ("gap", 1.0, None)
    assert house.original.read == []
    assert house.surrogate.calls[-1].background


async def test_no_more_audits_are_made_than_the_budget_allows(build: Build) -> None:
    house = await started(build, gate={**AUDIT, "audits_per_minute": 2.0})
    histories = {name: await switched(house, name) for name in ("a", "b")}
    asked = len(house.original.calls)
    for number in range(3, 6):
        for name, history in histories.items():
            await house.say(history, f"question {number}", name)
            await house.settled()
    assert len(house.original.calls) - asked == 2
    dropped = [*told(house, "audit_dropped", "a"), *told(house, "audit_dropped", "b")]
    assert [drop["reason"] for drop in dropped] == ["more than 2 audits a minute"] * 4


async def test_locality_misses_cost_nothing_of_the_budget(build: Build) -> None:
    house = await started(build, gate={"locality_threshold": 0.0, "audits_per_minute": 0.01})
    history = await switched(house)
    for number in range(3, 6):
        await house.say(history, f"question {number}")
        await house.settled()
    assert len(told(house, "audited")) == 3


async def test_an_audit_waits_until_no_user_is_at_the_original(build: Build) -> None:
    house = await started(build, gate=AUDIT)
    history = await switched(house)
    other = await talking(house)
    asked = len(house.original.calls)
    await house.say(history, "question 3")
    await idle()
    assert len(house.original.calls) == asked
    assert other.events is not None
    async for _ in other.events:
        pass
    await house.settled()
    assert len(house.original.calls) == asked + 1
    assert len(told(house, "audited")) == 1


async def test_an_audit_that_runs_gives_way_to_a_user_and_is_made_afterwards(build: Build) -> None:
    house = await started(build, gate=AUDIT)
    history = await switched(house)
    house.original.called.clear()
    house.original.go.clear()
    await house.say(history, "question 3")
    await house.original.called.wait()
    asked = len(house.original.calls)
    user = asyncio.create_task(house.say([], "a question", "other"))
    await house.original.closed_early.wait()
    assert [call.background for call in house.original.calls[asked - 1 :]] == [True, False]
    house.original.go.set()
    assert (await user).headers["X-SOMA-Engine"] == "original"
    await house.settled()
    assert [call.background for call in house.original.calls[asked:]] == [False, True]
    assert len(told(house, "audited")) == 1


async def test_a_request_that_bypasses_dispatch_is_a_users_too(build: Build) -> None:
    house = await started(build, gate=AUDIT)
    history = await switched(house)
    opted_out = await house.say([], "a question", "out", stream=True, headers={"x-soma": "off"})
    assert opted_out.headers["X-SOMA-Reason"] == "bypass"
    asked = len(house.original.calls)
    await house.say(history, "question 3")
    await idle()
    assert len(house.original.calls) == asked
    assert opted_out.reply.events is not None
    await opted_out.reply.events.aclose()
    await house.settled()
    assert len(house.original.calls) == asked + 1


async def test_an_audit_that_never_gets_its_turn_is_dropped_and_told(build: Build) -> None:
    house = await started(build, gate={**AUDIT, "audit_wait_s": 0.01})
    history = await switched(house)
    other = await talking(house)
    await house.say(history, "question 3")
    await house.settled()
    (dropped,) = told(house, "audit_dropped")
    assert dropped == {"turn": 3, "reason": "no quiet time within 0.01 s"}
    assert house.session().phase is Phase.SWITCHED
    assert other.events is not None
    await other.events.aclose()


async def test_an_audit_that_the_original_does_not_answer_is_dropped_and_told(build: Build) -> None:
    house = await started(build, gate=AUDIT)
    history = await switched(house)
    house.original.refusal = EngineUnavailable("down")
    await house.say(history, "question 3")
    await house.settled()
    assert told(house, "audit_dropped") == [{"turn": 3, "reason": "down"}]
    assert told(house, "audited") == []


async def test_an_answer_that_cannot_be_scored_drops_its_audit(build: Build) -> None:
    house = await started(build, gate=SCORE)
    history = await switched(house)
    house.original.refusal = EngineError("found another prompt")
    await house.say(history, "question 3")
    await house.settled()
    assert told(house, "audit_dropped") == [{"turn": 3, "reason": "found another prompt"}]


async def test_an_audit_of_a_switch_that_is_over_counts_for_no_later_one(build: Build) -> None:
    house = await started(build, gate=AUDIT)
    history = await switched(house)
    house.original.called.clear()
    house.original.go.clear()
    await house.say(history, "question 3")
    await house.original.called.wait()
    # An administrator has the session adapted anew while the audit is still to be made.
    await house.custody.readapt(house.session().key)
    house.original.go.set()
    await house.settled()
    (dropped,) = told(house, "audit_dropped")
    assert dropped["reason"].startswith("the session left the switch that was audited")
    assert house.session().switches == 2
    assert house.session().drift.window == ()


async def test_stopping_ends_an_audit_that_runs_and_one_that_waits(build: Build) -> None:
    house = await started(build, gate=AUDIT)
    histories = [await switched(house, name) for name in ("a", "b")]
    house.original.called.clear()
    house.original.go.clear()
    for name, history in zip(("a", "b"), histories, strict=True):
        await house.say(history, "question 3", name)
    await house.original.called.wait()
    async with asyncio.timeout(GUARD_S):
        await house.background.stop()
    assert house.original.closed_early.is_set()
    assert not [task for task in asyncio.all_tasks() if task.get_name() == "soma-quiet-work"]


async def test_a_session_that_was_rolled_back_returns_under_a_stricter_gate(build: Build) -> None:
    house = await started(build, gate={**AUDIT, "readmit_factor": 0.5})
    history = await switched(house)
    house.original.answers = ["another answer"]
    for number in (3, 4):
        await house.say(history, f"question {number}")
        await house.settled()
    assert house.session().phase is Phase.ROLLED_BACK
    house.original.answers = ["same"]
    for number in range(5, 8):
        assert house.session().phase is Phase.ROLLED_BACK
        await house.say(history, f"question {number}")
        await house.settled()
    assert house.session().phase is Phase.SWITCHED
    first, second = (judged["numbers"]["accept_threshold"] for judged in told(house, "judged"))
    assert (first, second) == pytest.approx((0.1, 0.05))

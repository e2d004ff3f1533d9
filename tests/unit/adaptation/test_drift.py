"""Audits: what they measure, what they may cost, and what becomes of a session that drifts."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from support.guard import GUARD_S
from support.services import Build, Services

from soma_vllm.engines.engine import Reply
from soma_vllm.errors import EngineError, EngineUnavailable
from soma_vllm.sessions.state.phases import Phase
from soma_vllm.types import Agreement

History = list[dict[str, Any]]
SCORE = {"audit": "score", "audit_rate": 1.0, "surprise_threshold": 2.0}
AUDIT = {"audit_rate": 1.0}


async def started(build: Build, **changes: Any) -> Services:
    services = build(**changes)
    await services.registry.start()
    return services


async def switched(services: Services, session: str = "s") -> History:
    """A session that the surrogate serves."""
    history: History = []
    for number in (1, 2):
        await services.say(history, f"question {number}", session)
    await services.settled()
    assert services.session(session).phase is Phase.SWITCHED
    return history


def told(services: Services, kind: str, session: str = "s") -> list[dict[str, Any]]:
    """Data of all events of a kind."""
    return [dict(event.data) for key, event in services.events if key.session == session and event.kind == kind]


async def talking(services: Services, session: str = "other") -> Reply:
    """A user who is in the middle of an answer of the original's."""
    answer = await services.say([], "a question", session, stream=True)
    assert answer.headers["X-SOMA-Engine"] == "original"
    assert answer.reply.events is not None
    await anext(answer.reply.events)
    return answer.reply


async def idle() -> None:
    """Let everything that can run do so."""
    for _ in range(50):
        await asyncio.sleep(0)


async def test_an_original_that_only_reads_can_roll_a_session_back(build: Build) -> None:
    services = await started(build, gate=SCORE)
    history = await switched(services)
    generated = len(services.original.calls)
    services.original.finds = Agreement(2.5, 0.25, 7)
    for number in (3, 4):
        await services.say(history, f"question {number}")
        await services.settled()
    assert services.session().phase is Phase.ROLLED_BACK
    expected = {"kind": "surprise", "surprise": 2.5, "gap": None, "top1": 0.25, "served_by": "surrogate"}
    assert told(services, "audited") == [{"turn": turn, **expected} for turn in (3, 4)]
    (back,) = told(services, "rolled_back")
    assert back["moving"] == 1.25
    assert back["window"] == [{"kind": "surprise", "value": 2.5, "relative": 1.25}]
    assert (back["surprise_threshold"], back["drift_threshold"]) == (2.0, 0.3)
    calls = services.original.read
    assert [answer for _, answer in calls] == ["same", "same"]
    assert [message["content"] for message in calls[0][0].body["messages"]][-1] == "question 3"
    assert all(call.background for call in services.original.calls[generated:])


async def test_a_calm_original_keeps_a_session_where_it_is(build: Build) -> None:
    services = await started(build, gate=SCORE)
    history = await switched(services)
    for number in range(3, 9):
        await services.say(history, f"question {number}")
        await services.settled()
    assert len(told(services, "audited")) == 6
    assert services.session().phase is Phase.SWITCHED


async def test_a_locality_miss_is_audited_by_gap_even_where_the_original_reads(build: Build) -> None:
    services = await started(build, gate={**SCORE, "locality_threshold": 0.0})
    history = await switched(services)
    services.surrogate.answers = ["far from it"]
    await services.say(history, "question 3")
    await services.settled()
    (audit,) = told(services, "audited")
    assert (audit["kind"], audit["gap"], audit["surprise"]) == ("gap", 1.0, None)
    assert services.original.read == []
    assert services.surrogate.calls[-1].background


async def test_no_more_audits_are_made_than_the_budget_allows(build: Build) -> None:
    services = await started(build, gate={**AUDIT, "audits_per_minute": 2.0})
    histories = {name: await switched(services, name) for name in ("a", "b")}
    asked = len(services.original.calls)
    for number in range(3, 6):
        for name, history in histories.items():
            await services.say(history, f"question {number}", name)
            await services.settled()
    assert len(services.original.calls) - asked == 2
    dropped = [*told(services, "audit_dropped", "a"), *told(services, "audit_dropped", "b")]
    assert [drop["reason"] for drop in dropped] == ["more than 2 audits a minute"] * 4


async def test_locality_misses_cost_nothing_of_the_budget(build: Build) -> None:
    services = await started(build, gate={"locality_threshold": 0.0, "audits_per_minute": 0.01})
    history = await switched(services)
    for number in range(3, 6):
        await services.say(history, f"question {number}")
        await services.settled()
    assert len(told(services, "audited")) == 3


async def test_an_audit_waits_until_no_user_is_at_the_original(build: Build) -> None:
    services = await started(build, gate=AUDIT)
    history = await switched(services)
    other = await talking(services)
    asked = len(services.original.calls)
    await services.say(history, "question 3")
    await idle()
    assert len(services.original.calls) == asked
    assert other.events is not None
    async for _ in other.events:
        pass
    await services.settled()
    assert len(services.original.calls) == asked + 1
    assert len(told(services, "audited")) == 1


async def test_an_audit_that_runs_gives_way_to_a_user_and_is_made_afterwards(build: Build) -> None:
    services = await started(build, gate=AUDIT)
    history = await switched(services)
    services.original.called.clear()
    services.original.go.clear()
    await services.say(history, "question 3")
    await services.original.called.wait()
    asked = len(services.original.calls)
    user = asyncio.create_task(services.say([], "a question", "other"))
    await services.original.closed_early.wait()
    assert [call.background for call in services.original.calls[asked - 1 :]] == [True, False]
    services.original.go.set()
    assert (await user).headers["X-SOMA-Engine"] == "original"
    await services.settled()
    assert [call.background for call in services.original.calls[asked:]] == [False, True]
    assert len(told(services, "audited")) == 1


async def test_a_request_that_bypasses_dispatch_is_a_users_too(build: Build) -> None:
    services = await started(build, gate=AUDIT)
    history = await switched(services)
    opted_out = await services.say([], "a question", "out", stream=True, headers={"x-soma": "off"})
    assert opted_out.headers["X-SOMA-Reason"] == "bypass"
    asked = len(services.original.calls)
    await services.say(history, "question 3")
    await idle()
    assert len(services.original.calls) == asked
    assert opted_out.reply.events is not None
    await opted_out.reply.events.aclose()
    await services.settled()
    assert len(services.original.calls) == asked + 1


async def test_a_request_that_hangs_does_not_end_the_audits(build: Build) -> None:
    services = await started(build, gate={**AUDIT, "audit_wait_s": 0.01})
    history = await switched(services)
    other = await talking(services)
    await services.say(history, "question 3")
    await services.settled()
    assert told(services, "audit_dropped") == []
    assert len(told(services, "audited")) == 1
    assert other.events is not None
    await other.events.aclose()


async def test_an_audit_that_the_original_does_not_answer_is_dropped_and_told(build: Build) -> None:
    services = await started(build, gate=AUDIT)
    history = await switched(services)
    services.original.refusal = EngineUnavailable("down")
    await services.say(history, "question 3")
    await services.settled()
    assert told(services, "audit_dropped") == [{"turn": 3, "reason": "down"}]
    assert told(services, "audited") == []


async def test_an_answer_that_cannot_be_scored_drops_its_audit(build: Build) -> None:
    services = await started(build, gate=SCORE)
    history = await switched(services)
    services.original.refusal = EngineError("found another prompt")
    await services.say(history, "question 3")
    await services.settled()
    assert told(services, "audit_dropped") == [{"turn": 3, "reason": "found another prompt"}]


async def test_an_audit_of_a_switch_that_is_over_counts_for_no_later_one(build: Build) -> None:
    services = await started(build, gate=AUDIT)
    history = await switched(services)
    services.original.called.clear()
    services.original.go.clear()
    await services.say(history, "question 3")
    await services.original.called.wait()
    # An administrator has the session adapted anew while the audit is still to be made.
    await services.session_admin.readapt(services.session().key)
    services.original.go.set()
    await services.settled()
    (dropped,) = told(services, "audit_dropped")
    assert dropped["reason"].startswith("the session left the switch that was audited")
    assert services.session().switches == 2
    assert services.session().drift.window == ()


async def test_stopping_ends_an_audit_that_runs_and_one_that_waits(build: Build) -> None:
    services = await started(build, gate=AUDIT)
    histories = [await switched(services, name) for name in ("a", "b")]
    services.original.called.clear()
    services.original.go.clear()
    for name, history in zip(("a", "b"), histories, strict=True):
        await services.say(history, "question 3", name)
    await services.original.called.wait()
    async with asyncio.timeout(GUARD_S):
        await services.background.stop()
    assert services.original.closed_early.is_set()
    assert not [task for task in asyncio.all_tasks() if task.get_name() == "soma-background-job"]


async def test_a_session_that_was_rolled_back_returns_under_a_stricter_gate(build: Build) -> None:
    services = await started(build, gate={**AUDIT, "readmit_factor": 0.5})
    history = await switched(services)
    services.original.answers = ["another answer"]
    for number in (3, 4):
        await services.say(history, f"question {number}")
        await services.settled()
    assert services.session().phase is Phase.ROLLED_BACK
    services.original.answers = ["same"]
    for number in range(5, 8):
        assert services.session().phase is Phase.ROLLED_BACK
        await services.say(history, f"question {number}")
        await services.settled()
    assert services.session().phase is Phase.SWITCHED
    first, second = (judged["numbers"]["accept_threshold"] for judged in told(services, "judged"))
    assert (first, second) == pytest.approx((0.1, 0.05))

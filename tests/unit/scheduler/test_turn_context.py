"""One turn's value: what it holds, and that it lets go of it."""

from __future__ import annotations

import asyncio
import copy
import json
import logging
from typing import Any

import pytest
from support.services import Services

from soma_vllm.errors import EngineUnavailable, TooManyRequests
from soma_vllm.logs import LogContext
from soma_vllm.scheduler.turn_context import ChatRequest, SessionUnavailable, TurnContext, begin_turn
from soma_vllm.sessions.lookup import SessionLookup
from soma_vllm.sessions.state.events import EventKind
from soma_vllm.types import Reason, ReasonCode, Role, Route

QUERY = [{"role": "user", "content": "question 1"}]


async def begun(services: Services, messages: list[dict[str, Any]] = QUERY) -> TurnContext:
    request = ChatRequest({"model": "soma", "messages": messages}, {"x-session-id": "s"})
    return await begin_turn(
        SessionLookup(services.registry), services.meter, request, services.policies.default
    )


def holds(services: Services) -> list[int]:
    return [entry.holds for entry in services.registry._entries.values()]


async def test_a_turn_holds_its_session_until_it_ends(services: Services) -> None:
    turn = await begun(services)
    assert holds(services) == [1]
    async with turn.released():
        assert holds(services) == [1]
    assert holds(services) == []


async def test_a_turn_that_fails_lets_go_of_everything_the_latest_first(services: Services) -> None:
    turn, log = await begun(services), []
    turn.resources.callback(log.append, "first")
    turn.resources.callback(log.append, "second")
    with pytest.raises(EngineUnavailable):
        async with turn.released_on_error():
            raise EngineUnavailable("gone")
    assert (log, holds(services)) == (["second", "first"], [])


async def test_a_turn_that_does_not_fail_is_not_let_go_of_before_its_end(services: Services) -> None:
    turn = await begun(services)
    async with turn.released_on_error():
        pass
    assert holds(services) == [1]


async def test_a_turn_that_is_refused_holds_nothing(services: Services) -> None:
    services.meter.sessions = 0
    with pytest.raises(TooManyRequests):
        await begun(services)
    assert holds(services) == []


async def test_a_session_that_is_being_removed_gets_no_turn(services: Services) -> None:
    turn = await begun(services)
    services.registry.note(turn.key, EventKind.CLOSED)
    with pytest.raises(SessionUnavailable, match="session being removed"):
        await begun(services)
    assert holds(services) == [1]


async def test_the_history_is_compared_again_only_where_the_session_has_changed(services: Services) -> None:
    turn = await begun(services)
    first = turn.overlap
    assert turn.overlap is first
    await services.dispatcher.chat(turn.request)
    assert turn.overlap is not first


async def test_a_turn_does_not_take_the_line_where_its_session_has_gone_on(services: Services) -> None:
    turn = await begun(services)
    assert turn.takes_the_line
    request = ChatRequest(
        {"model": "soma", "messages": [{"role": "user", "content": "sooner"}]}, {"x-session-id": "s"}
    )
    await services.dispatcher.chat(request)
    async with turn.released():
        assert not turn.takes_the_line
        assert (turn.key.session, turn.overlap.turns) == ("s", 0)
    assert holds(services) == [0]


async def test_log_lines_within_a_turn_name_its_session(
    services: Services, caplog: pytest.LogCaptureFixture
) -> None:
    history: list[dict[str, Any]] = []
    for number in (1, 2):
        await services.say(history, f"question {number}")
    await services.settled()
    services.surrogate.refusal = EngineUnavailable("gone")
    caplog.handler.addFilter(LogContext())
    with caplog.at_level(logging.WARNING, "soma_vllm"):
        await services.say(history, "question 3")
    (record,) = caplog.records
    assert "the original answers instead" in record.message
    assert f" session=s tenant={services.session().key.tenant}" in record.context


def test_a_reason_is_its_text_and_a_code() -> None:
    reason = Reason("locality 0.97 above 0.85", ReasonCode.LOCALITY)
    assert json.dumps(reason) == '"locality 0.97 above 0.85"'
    assert copy.deepcopy(reason).code is ReasonCode.LOCALITY
    assert Route(Role.ORIGINAL, None, (), reason).code is ReasonCode.LOCALITY


def test_a_reason_that_is_text_alone_has_the_code_of_others() -> None:
    assert Route(Role.ORIGINAL, None, (), "locality or so").code is ReasonCode.OTHER
    assert Reason("mine").code is ReasonCode.OTHER


async def test_a_session_that_is_removed_while_the_surrogate_fails_still_gets_the_originals_answer(
    services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fails(turn: TurnContext) -> Any:
        services.registry.discard(turn.key)
        raise EngineUnavailable("the adapter does not load")

    def to_surrogate(session: Any, query: Any) -> Route:
        return Route(Role.SURROGATE, None, query.messages, "test")

    monkeypatch.setattr(services.dispatcher, "_ask_surrogate", fails)
    monkeypatch.setattr(services.policies.default, "route", to_surrogate)
    answer = await services.say([], "question")
    assert answer.headers["X-SOMA-Engine"] == "original"
    assert holds(services) == []


@pytest.mark.parametrize("where", ["_ask_original", "_ask_surrogate"])
async def test_a_client_that_leaves_while_an_engine_is_asked_leaves_nothing_held(
    services: Services, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    asked = asyncio.Event()

    async def waits(turn: TurnContext) -> Any:
        asked.set()
        await asyncio.Event().wait()

    engine = Role.ORIGINAL if where == "_ask_original" else Role.SURROGATE
    monkeypatch.setattr(services.dispatcher, where, waits)
    monkeypatch.setattr(
        services.policies.default, "route", lambda session, query: Route(engine, None, query.messages, "test")
    )
    task = asyncio.create_task(services.say([], "question"))
    await asked.wait()
    assert holds(services) == [1]
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert holds(services) == []
    assert services.leases.count() == 0

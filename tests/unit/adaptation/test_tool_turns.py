"""Turns with tools: who has them after the switch, and what becomes of malformed calls."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pytest
from support.replies import read_events
from support.services import Build, Services

from soma_vllm.errors import MalformedCall
from soma_vllm.scheduler.dispatcher import Answer, ChatRequest
from soma_vllm.sessions.state.fold import restore
from soma_vllm.sessions.state.phases import Phase

History = list[dict[str, Any]]
PARAMETERS = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "note": {"type": "string"}},
    "required": ["city"],
}
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": PARAMETERS}}


def call(city: str, name: str = "weather", **more: Any) -> list[dict[str, Any]]:
    arguments = json.dumps({"city": city, **more})
    return [{"id": "1", "type": "function", "function": {"name": name, "arguments": arguments}}]


def weather_man(body: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Calls the tool for the last word of a question about the weather."""
    last = body["messages"][-1]
    asked = last["role"] == "user" and "weather" in last["content"] and body.get("tools")
    return call(last["content"].split()[-1]) if asked else []


async def ask(services: Services, history: History, message: str | dict[str, Any], **fields: Any) -> Answer:
    """One request with tools; `history` grows by it and its answer."""
    history.append({"role": "user", "content": message} if isinstance(message, str) else message)
    headers = {"authorization": "Bearer k", "x-session-id": "s"}
    body = {"model": "soma", "messages": [dict(m) for m in history], "tools": [WEATHER], **fields}
    answer = await services.dispatcher.chat(ChatRequest(body, headers))
    if answer.reply.body is not None:
        history.append(answer.reply.body["choices"][0]["message"])
    return answer


RESULT = {"role": "tool", "tool_call_id": "1", "content": "rain"}


async def started(build: Build, **changes: Any) -> Services:
    services = build(**changes)
    await services.registry.start()
    services.original.decides = services.surrogate.decides = weather_man
    return services


async def warmed(services: Services, cities: tuple[str, ...] = ("Oslo", "Rome"), **fields: Any) -> History:
    """A session that the surrogate serves, in whose warm start the original called a tool for each city."""
    history: History = []
    await ask(services, history, "hello", **fields)
    for city in cities:
        await ask(services, history, f"weather in {city}", **fields)
        await ask(services, history, RESULT, **fields)
    await ask(services, history, "thanks", **fields)
    await services.settled()
    assert services.session().phase is Phase.SWITCHED
    return history


def verdict(services: Services) -> Any:
    (judged,) = (event.data for _, event in services.events if event.kind == "judged")
    return judged["numbers"].get("tools")


def who(answer: Answer) -> tuple[str, str]:
    return answer.headers["X-SOMA-Engine"], answer.headers["X-SOMA-Reason"]


async def test_a_surrogate_that_called_as_the_original_did_may_have_turns_with_tools(build: Build) -> None:
    services = await started(build)
    history = await warmed(services)
    assert verdict(services) == {"turns": [1, 2, 3, 4, 5, 6], "called": 2, "differs": {}, "passes": True}
    engine, reason = who(await ask(services, history, "weather in Bern"))
    assert (engine, reason.split(",")[0]) == ("surrogate", "switched to plain")
    assert history[-1]["tool_calls"] == call("Bern")
    # and the result of its call comes back to it
    assert who(await ask(services, history, RESULT)) == ("surrogate", "tool result to its caller")


async def test_a_rehearsal_has_the_tools_and_the_choice_of_the_request(build: Build) -> None:
    services = await started(build)
    await warmed(services, tool_choice="auto", parallel_tool_calls=False, stream=False)
    rehearsed = [c.body for c in services.surrogate.calls if c.body.get("tool_choice") == "auto"]
    assert len(rehearsed) == 6
    for body in rehearsed:
        assert body["tools"] == [WEATHER]
        assert body["parallel_tool_calls"] is False
        assert "stream" not in body
    assert [message["role"] for message in rehearsed[2]["messages"]][-3:] == ["user", "assistant", "tool"]


@pytest.mark.parametrize(
    ("decides", "turn", "how"),
    [
        (lambda body: [], 2, "no_call"),
        (lambda body: weather_man(body) and call("Paris"), 2, "other_arguments"),
        (lambda body: weather_man(body) and call("Oslo", "wether"), 2, "unknown_function"),
        (lambda body: weather_man(body) and call("Oslo", note=3), 2, "invalid_arguments"),
        (lambda body: call("Oslo") if body.get("tool_choice") != "none" else [], 1, "called"),
        (lambda body: weather_man(body) and weather_man(body) * 2, 2, "other_functions"),
    ],
    ids=["words", "arguments", "function", "schema", "call", "twice"],
)
async def test_one_turn_that_differs_leaves_tools_with_the_original(
    build: Build, decides: Any, turn: int, how: str
) -> None:
    services = await started(build)
    services.surrogate.decides = decides
    history = await warmed(services)
    found = verdict(services)
    assert (found["differs"], found["passes"]) == ({str(turn): how}, False)
    assert who(await ask(services, history, "weather in Bern")) == ("original", "tools not checked")
    answer = await ask(services, history, "hello again", tools=None)
    assert answer.headers["X-SOMA-Engine"] == "surrogate"  # words it may have


async def test_other_words_after_a_tools_result_leave_tools_with_the_original(build: Build) -> None:
    services = await started(build)
    usual = services.surrogate._completion

    def other_weather(answer: str, body: Mapping[str, Any]) -> dict[str, Any]:
        return usual("sun" if body["messages"][-1]["role"] == "tool" else answer, body)

    services.surrogate._completion = other_weather  # type: ignore[method-assign]
    await warmed(services)
    assert verdict(services)["differs"] == {"3": "other_words"}


async def test_texts_in_arguments_are_compared_by_the_judge(build: Build) -> None:
    services = await started(build)
    services.original.decides = lambda body: weather_man(body) and call("Oslo", note="warm clothes")
    services.surrogate.decides = lambda body: weather_man(body) and call("Oslo", note="dress warmly")
    await warmed(services)
    assert verdict(services)["differs"] == {"2": "other_words"}


async def test_fewer_calls_than_configured_check_nothing(build: Build) -> None:
    services = await started(build)
    history = await warmed(services, ("Oslo",))
    assert verdict(services) == {"turns": [], "called": 1, "differs": {}, "passes": False}
    assert who(await ask(services, history, "weather in Bern")) == ("original", "tools not checked")


async def test_the_least_number_of_calls_is_configurable(build: Build) -> None:
    services = await started(build, gate={"min_tool_turns": 1})
    history = await warmed(services, ("Oslo",))
    assert who(await ask(services, history, "weather in Bern"))[0] == "surrogate"


async def test_other_tools_than_were_checked_stay_with_the_original(build: Build) -> None:
    services = await started(build)
    history = await warmed(services)
    other = {"type": "function", "function": {"name": "mail", "parameters": PARAMETERS}}
    answer = await ask(services, history, "weather in Bern", tools=[WEATHER, other])
    assert who(answer) == ("original", "other tools than were checked")
    described = {"type": "function", "function": {**WEATHER["function"], "description": "It is Monday."}}  # type: ignore[dict-item]
    assert who(await ask(services, history, "weather in Rome", tools=[described]))[0] == "surrogate"


async def test_tools_that_may_not_be_called_need_no_check(build: Build) -> None:
    services = await started(build)
    services.surrogate.decides = lambda body: []
    history = await warmed(services)
    assert who(await ask(services, history, "hello", tool_choice="none"))[0] == "surrogate"


@pytest.mark.parametrize(("tools", "engine"), [(True, "surrogate"), (False, "original")])
async def test_the_configuration_may_decide_without_a_check(build: Build, tools: bool, engine: str) -> None:
    services = await started(build, surrogate={"tools": tools})
    history = await warmed(services)
    assert verdict(services) is None
    assert who(await ask(services, history, "weather in Bern"))[0] == engine


async def test_what_was_checked_is_there_after_a_restart_and_in_branches(build: Build) -> None:
    services = await started(build)
    history = await warmed(services)
    key, tools = services.session().key, services.session().tools
    earlier = [*history]
    for question in ("and then", "and after that"):
        await ask(services, history, question)
    answer = await ask(services, earlier, "something else")
    assert answer.headers["X-SOMA-Session"].startswith("s~")
    assert answer.headers["X-SOMA-Engine"] == "surrogate"
    await services.stop()
    events = await services.store.events(key)
    (switched,) = (event.data for event in events if event.kind == "switched")
    assert switched["tools"] == list(tools)
    assert len(tools) == 1
    assert restore(key, events, services.config.gate).tools == tools


async def test_a_malformed_call_is_made_good_by_the_original(build: Build) -> None:
    services = await started(build)
    history = await warmed(services)
    services.surrogate.decides = lambda body: call("Bern", "wether")
    answer = await ask(services, history, "weather in Bern")
    assert who(answer) == ("original", "surrogate failed: malformed call of a tool")
    assert history[-1]["tool_calls"] == call("Bern")


async def test_malformed_calls_are_drift(build: Build) -> None:
    services = await started(build, gate={"drift_window": 2, "consecutive_to_rollback": 1})
    history = await warmed(services)
    services.surrogate.decides = lambda body: call("Bern", "wether")
    for _ in range(2):
        await ask(services, history, "weather in Bern")
        await services.settled()
        await ask(services, history, RESULT)
    audits = [event.data for _, event in services.events if event.kind == "audited"]
    assert [(audit["gap"], audit["calls"]) for audit in audits] == [(1.0, "unknown_function")] * len(audits)
    assert audits
    assert "rolled_back" in [event.kind for _, event in services.events]


async def heard(answer: Answer) -> Any:
    assert answer.reply.events is not None
    (choice,), _, complete = read_events([event async for event in answer.reply.events])
    return choice.text, [dict(c["function"]) for c in choice.calls], complete


async def test_a_streamed_call_comes_whole(build: Build) -> None:
    services = await started(build)
    history = await warmed(services)
    services.surrogate.says_first = "I look."
    answer = await ask(services, history, "weather in Bern", stream=True)
    assert answer.headers["X-SOMA-Engine"] == "surrogate"
    assert await heard(answer) == ("I look.", [call("Bern")[0]["function"]], True)


async def test_a_malformed_call_in_a_stream_is_made_good_by_the_original(build: Build) -> None:
    services = await started(build)
    history = await warmed(services)
    services.surrogate.decides = lambda body: call("Bern", "wether")
    answer = await ask(services, history, "weather in Bern", stream=True)
    assert who(answer) == ("original", "surrogate failed: malformed call of a tool")
    assert await heard(answer) == ("", [call("Bern")[0]["function"]], True)


async def test_a_malformed_call_after_words_ends_the_stream_with_an_error(build: Build) -> None:
    services = await started(build)
    history = await warmed(services)
    services.surrogate.decides = lambda body: call("Bern", "wether")
    services.surrogate.says_first = "I look."
    answer = await ask(services, history, "weather in Bern", stream=True)
    events: list[str] = []

    async def listen() -> None:
        assert answer.reply.events is not None
        async for event in answer.reply.events:
            events.append(event)  # noqa: PERF401

    with pytest.raises(MalformedCall):
        await listen()
    assert "I look." in "".join(events)
    assert "wether" not in "".join(events)
    assert not services.session().turns[-1].complete


async def test_words_of_a_stream_with_tools_pass_as_they_come(build: Build) -> None:
    services = await started(build)
    history = await warmed(services)
    answer = await ask(services, history, "hello", stream=True)
    assert answer.headers["X-SOMA-Engine"] == "surrogate"
    assert await heard(answer) == ("same", [], True)


async def test_a_stream_that_was_broken_off_by_its_client_stops_the_surrogate(build: Build) -> None:
    services = await started(build)
    history = await warmed(services)
    services.surrogate.answers = ["one two three"]
    answer = await ask(services, history, "hello", stream=True)
    assert answer.reply.events is not None
    await anext(answer.reply.events)
    await answer.reply.events.aclose()
    assert services.surrogate.closed_early.is_set()


@pytest.mark.parametrize("audit", ["generate", "score"])
async def test_audits_compare_calls_and_drift_counts_them(build: Build, audit: str) -> None:
    services = await started(build, gate={"audit_rate": 1.0, "audit": audit, "consecutive_to_rollback": 2})
    history = await warmed(services)
    await ask(services, history, "weather in Bern")
    await services.settled()
    services.original.decides = lambda body: call("Paris")
    for city in ("Rome", "Nice"):
        await ask(services, history, f"weather in {city}")
        await services.settled()
    found = [event.data for _, event in services.events if event.kind == "audited"]
    assert [(one["kind"], one["gap"], one.get("calls")) for one in found] == [
        ("gap", 0.0, None),
        ("gap", 1.0, "other_arguments"),
        ("gap", 1.0, "other_arguments"),
    ]
    assert services.session().phase is Phase.ROLLED_BACK
    assert services.session().tools == ()


async def test_an_audit_sees_that_the_original_would_have_called(build: Build) -> None:
    services = await started(build, gate={"audit_rate": 1.0})
    history = await warmed(services)
    services.surrogate.decides = lambda body: []
    await ask(services, history, "weather in Bern")
    await services.settled()
    (found,) = (event.data for _, event in services.events if event.kind == "audited")
    assert (found["gap"], found["calls"]) == (1.0, "no_call")

"""`/v1/responses` as OpenAI's own clients meet it."""

from __future__ import annotations

import json
import re
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from pydantic import BaseModel
from starlette.testclient import TestClient
from support.responses_services import (
    Script,
    Spoken,
    application,
    openai_client,
)

from soma_vllm.sessions.state.identity import tenant_of
from soma_vllm.sessions.state.transcript import read

WEATHER: Any = {
    "type": "function",
    "name": "weather",
    "description": "the weather",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    "strict": True,
}
CALL = Spoken((), [("call_1", "weather", ['{"city":', ' "Bonn"}'])], finish="tool_calls")


class City(BaseModel):
    name: str
    people: int


@pytest.fixture
def script() -> Script:
    return Script()


@pytest.fixture
def client(script: Script) -> AsyncOpenAI:
    return openai_client(script)


def sync_client(script: Script) -> OpenAI:
    http = TestClient(application(script), base_url="http://soma/v1")
    return OpenAI(api_key="k", base_url="http://soma/v1", http_client=http, max_retries=0)


# -- the official clients ---------------------------------------------------------------------------------


async def test_openais_client_gets_an_answer(script: Script, client: AsyncOpenAI) -> None:
    answer = await client.responses.create(model="soma", input="hello")
    assert answer.output_text == "An answer."
    assert re.fullmatch(r"resp_[0-9a-f]{32}", answer.id)
    assert script.body == {"model": "soma", "messages": [{"role": "user", "content": "hello"}]}
    assert script.asked[-1].response == answer.id
    assert script.asked[-1].session is None
    assert script.asked[-1].tenant == tenant_of("Bearer k")


def test_openais_synchronous_client_gets_an_answer(script: Script) -> None:
    answer = sync_client(script).responses.create(model="soma", input="hello")
    assert answer.output_text == "An answer."


async def test_openais_client_reads_a_stream(script: Script, client: AsyncOpenAI) -> None:
    words = []
    last = None
    async for event in await client.responses.create(model="soma", input="hello", stream=True):
        if event.type == "response.output_text.delta":
            words.append(event.delta)
        last = event
    assert words == ["An ", "answer."]
    assert last is not None
    assert last.type == "response.completed"
    assert last.response.output_text == "An answer."
    assert last.response.id == script.asked[-1].response
    assert script.body["stream"] is True
    assert script.body["stream_options"] == {"include_usage": True}


def test_openais_synchronous_client_puts_a_stream_together(script: Script) -> None:
    script.answers = [Spoken(("I look.",), CALL.calls, thoughts=("Hm.",))]
    with sync_client(script).responses.stream(model="soma", input="hello", tools=[WEATHER]) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_response()
    assert "response.function_call_arguments.delta" in kinds
    assert final.output_text == "I look."
    assert [item.type for item in final.output] == ["reasoning", "message", "function_call"]


@pytest.mark.parametrize("streamed", [False, True])
async def test_a_tool_is_called_and_its_result_goes_back(
    script: Script, client: AsyncOpenAI, streamed: bool
) -> None:
    script.answers = [CALL, Spoken(("Sun.",))]
    asked: list[Any] = [{"role": "user", "content": "weather in Bonn?"}]

    async def turn() -> Any:
        if not streamed:
            return await client.responses.create(model="soma", input=asked, tools=[WEATHER])
        async with client.responses.stream(model="soma", input=asked, tools=[WEATHER]) as stream:
            return await stream.get_final_response()

    first = await turn()
    (call,) = first.output
    assert json.loads(call.arguments) == {"city": "Bonn"}
    asked += [item.to_dict() for item in first.output]
    asked.append({"type": "function_call_output", "call_id": call.call_id, "output": "sun"})
    assert (await turn()).output_text == "Sun."
    assert script.body["messages"] == [
        {"role": "user", "content": "weather in Bonn?"},
        CALL.message(),
        {"role": "tool", "tool_call_id": "call_1", "content": "sun"},
    ]
    function = {name: value for name, value in WEATHER.items() if name != "type"}
    assert script.body["tools"] == [{"type": "function", "function": function}]


async def test_a_result_may_follow_its_call_by_the_response_alone(script: Script, client: AsyncOpenAI) -> None:
    script.answers = [CALL]
    first = await client.responses.create(model="soma", input="weather?", tools=[WEATHER])
    result: Any = {"type": "function_call_output", "call_id": "call_1", "output": "sun"}
    await client.responses.create(model="soma", input=[result], tools=[WEATHER], previous_response_id=first.id)
    assert script.body["messages"] == [
        {"role": "user", "content": "weather?"},
        CALL.message(),
        {"role": "tool", "tool_call_id": "call_1", "content": "sun"},
    ]


@pytest.mark.parametrize("streamed", [False, True])
async def test_openais_client_parses_a_structured_answer(
    script: Script, client: AsyncOpenAI, streamed: bool
) -> None:
    script.answers = [Spoken(('{"name": "Bonn",', ' "people": 330000}'))]
    if streamed:
        async with client.responses.stream(model="soma", input="a city", text_format=City) as stream:
            answer = await stream.get_final_response()
    else:
        answer = await client.responses.parse(model="soma", input="a city", text_format=City)
    assert answer.output_parsed == City(name="Bonn", people=330000)
    wanted = script.body["response_format"]
    assert wanted["type"] == "json_schema"
    assert wanted["json_schema"]["name"] == "City"
    assert wanted["json_schema"]["strict"] is True
    assert set(wanted["json_schema"]["schema"]["properties"]) == {"name", "people"}


def test_openais_synchronous_client_parses_a_structured_answer(script: Script) -> None:
    script.answers = [Spoken(('{"name": "Bonn", "people": 1}',))]
    answer = sync_client(script).responses.parse(model="soma", input="a city", text_format=City)
    assert answer.output_parsed == City(name="Bonn", people=1)


# -- going on ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("streamed", [False, True])
async def test_a_dialogue_goes_on_from_its_last_response(
    script: Script, client: AsyncOpenAI, streamed: bool
) -> None:
    if streamed:
        async with client.responses.stream(model="soma", input="one") as stream:
            first = (await stream.get_final_response()).id
    else:
        first = (await client.responses.create(model="soma", input="one")).id
    second = await client.responses.create(model="soma", input="two", previous_response_id=first)
    assert second.previous_response_id == first
    assert script.asked[-1].session == "s"
    assert script.body["messages"] == [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "An answer."},
        {"role": "user", "content": "two"},
    ]


async def test_instructions_are_those_of_their_request(script: Script, client: AsyncOpenAI) -> None:
    first = await client.responses.create(model="soma", input="one", instructions="be brief")
    again = await client.responses.create(
        model="soma", input="two", instructions="be brief", previous_response_id=first.id
    )
    one, two = (read("t", incoming.body["messages"]) for incoming in script.asked)
    assert two.messages[: len(one.messages)] == one.messages
    await client.responses.create(model="soma", input="three", previous_response_id=again.id)
    assert [message["role"] for message in script.body["messages"]] == ["user", "assistant"] * 2 + ["user"]


async def test_a_conversation_is_a_session_of_its_name(script: Script, client: AsyncOpenAI) -> None:
    for conversation in ("c1", {"id": "c1"}):
        answer = await client.responses.create(
            model="soma",
            input="x",
            conversation=conversation,
            extra_headers={"X-Session-ID": "other"},
        )
        assert answer.conversation is not None
        assert answer.conversation.id == "c1"
        assert script.asked[-1].session == "c1"
    assert [message["role"] for message in script.body["messages"]] == ["user", "assistant", "user"]


async def test_another_tenants_response_does_not_exist(script: Script, client: AsyncOpenAI) -> None:
    mine = await client.responses.create(model="soma", input="secret")
    stranger = openai_client(script, key="other")
    with pytest.raises(openai.NotFoundError) as caught:
        await stranger.responses.create(model="soma", input="x", previous_response_id=mine.id)
    assert caught.value.code == "previous_response_not_found"
    assert caught.value.param == "previous_response_id"
    assert len(script.asked) == 1


async def test_a_response_that_is_not_to_be_stored_cannot_be_gone_on_from(
    script: Script, client: AsyncOpenAI
) -> None:
    answer = await client.responses.create(model="soma", input="x", store=False)
    assert script.asked[-1].response is None
    assert answer.to_dict()["store"] is False
    with pytest.raises(openai.NotFoundError):
        await client.responses.create(model="soma", input="y", previous_response_id=answer.id)


async def test_a_response_says_whether_it_can_be_gone_on_from(script: Script, client: AsyncOpenAI) -> None:
    assert (await client.responses.create(model="soma", input="x")).to_dict()["store"] is True
    script.headers = {"X-SOMA-Engine": "original", "X-SOMA-Reason": "bypass"}
    assert (await client.responses.create(model="large", input="x")).to_dict()["store"] is False

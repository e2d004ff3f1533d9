"""The official client, both of its kinds, against both engines under dispatch: what OpenAI's API promises."""

from __future__ import annotations

import json
from typing import Any, Literal

import openai
import pytest
from pydantic import BaseModel
from support.openai_kinds import QUERY, Client
from support.server import Dialogue, Running, adapted

ENGINES = ("original", "surrogate")
KINDS = ("sync", "async")
PIXEL = "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="  # noqa: E501
COLOUR = {
    "type": "function",
    "function": {
        "name": "paint",
        "description": "Paint the wall.",
        "strict": True,
        "parameters": {
            "type": "object",
            "properties": {"colour": {"enum": ["red", "blue"]}},
            "required": ["colour"],
            "additionalProperties": False,
        },
    },
}


class Weather(BaseModel):
    """An answer of a given form."""

    sky: Literal["clear", "cloudy"]
    windy: bool


@pytest.fixture(params=KINDS)
async def client(request: pytest.FixtureRequest, tiny_server: Running) -> Any:
    built = Client(tiny_server, request.param, "client")
    yield built
    await built.close()


def to(engine: str, session: str | None = None) -> dict[str, Any]:
    """Dispatch under a policy that always chooses this engine."""
    named = {} if session is None else {"X-Session-ID": session}
    return {"extra_headers": {"X-SOMA-Policy": engine, **named}}


def text_of(chunks: list[Any], index: int = 0) -> str:
    choices = (choice for chunk in chunks for choice in chunk.choices if choice.index == index)
    return "".join(choice.delta.content or "" for choice in choices)


# -- chat -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ENGINES)
async def test_a_chat_is_answered_whole_and_streamed_alike(client: Client, engine: str) -> None:
    headers, whole = await client.chat(**to(engine))
    assert headers["X-SOMA-Engine"] == engine
    assert whole.object == "chat.completion"
    assert whole.choices[0].finish_reason == "length"
    assert whole.usage.completion_tokens == 8
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + 8
    plain = await client.chunks(**to(engine))
    counted = await client.chunks(**to(engine), stream_options={"include_usage": True})
    assert text_of(plain) == text_of(counted) == whole.choices[0].message.content
    assert not any(chunk.usage for chunk in plain)
    assert counted[-1].usage.model_dump(exclude_none=True) == whole.usage.model_dump(exclude_none=True)
    assert counted[-1].choices == []
    assert [c.choices[0].finish_reason for c in plain if c.choices][-1] == "length"


@pytest.mark.parametrize("engine", ENGINES)
async def test_several_choices_come_with_their_log_probabilities(client: Client, engine: str) -> None:
    asked = {"n": 3, "logprobs": True, "top_logprobs": 2, "temperature": 1.0, "seed": 7, **to(engine)}
    _, whole = await client.chat(**asked)
    assert [choice.index for choice in whole.choices] == [0, 1, 2]
    assert len({choice.message.content for choice in whole.choices}) > 1
    for choice in whole.choices:
        assert len(choice.logprobs.content) == 8
        for token in choice.logprobs.content:
            assert len(token.top_logprobs) == 2
            assert token.logprob <= 0
    chunks = await client.chunks(**asked)
    for index in range(3):
        assert text_of(chunks, index) == whole.choices[index].message.content
        mine = [c for chunk in chunks for c in chunk.choices if c.index == index and c.logprobs]
        assert sum(len(c.logprobs.content) for c in mine) == 8


@pytest.fixture(scope="module")
def switched(tiny_server: Running) -> Dialogue:
    """A dialogue that was moved to its adapter."""
    return adapted(tiny_server, "client-switched", key="client")


async def test_an_adapters_session_gives_several_choices_and_log_probabilities_too(
    client: Client, switched: Dialogue, tiny_server: Running
) -> None:
    headers, whole = await client.chat(
        messages=[*switched.messages, {"role": "user", "content": "and one more question"}],
        n=2,
        temperature=1.0,
        logprobs=True,
        top_logprobs=1,
        extra_headers={"X-Session-ID": "client-switched"},
    )
    assert headers["X-SOMA-Engine"] == "surrogate"
    adapter = tiny_server.session("client-switched", "client")["adapter"]
    assert headers["X-SOMA-Adapter"] == adapter != ""
    assert [len(choice.logprobs.content) for choice in whole.choices] == [8, 8]


@pytest.mark.parametrize("engine", ENGINES)
async def test_a_seed_repeats_an_answer(client: Client, engine: str) -> None:
    answers = [
        (await client.chat(temperature=1.0, seed=seed, **to(engine)))[1].choices[0].message.content
        for seed in (11, 11, 12)
    ]
    assert answers[0] == answers[1] != answers[2]


@pytest.mark.parametrize("engine", ENGINES)
async def test_an_answer_ends_before_a_stop_word(client: Client, engine: str) -> None:
    _, whole = await client.chat(**to(engine))
    said = whole.choices[0].message.content
    stop = said[len(said) // 2 :][:2]
    _, stopped = await client.chat(stop=[stop], **to(engine))
    assert stopped.choices[0].message.content == said[: said.index(stop)]
    assert stopped.choices[0].finish_reason == "stop"


@pytest.mark.parametrize("engine", ENGINES)
async def test_an_answer_has_the_form_that_was_asked_for(client: Client, engine: str) -> None:
    asked = {"model": "soma", "messages": QUERY, "max_tokens": 60, "temperature": 0, **to(engine)}
    found = await client.call("chat.completions.parse", response_format=Weather, **asked)
    assert isinstance(found.choices[0].message.parsed, Weather)
    chunks = await client.chunks(
        response_format={
            "type": "json_schema",
            "json_schema": {"name": "weather", "schema": Weather.model_json_schema()},
        },
        **{name: value for name, value in asked.items() if name not in ("model", "messages")},
    )
    assert Weather.model_validate_json(text_of(chunks)) == found.choices[0].message.parsed


async def test_a_tool_is_called_and_its_result_is_answered_in_the_same_session(
    client: Client, tiny_server: Running, request: pytest.FixtureRequest
) -> None:
    session = f"tools-{request.node.callspec.id}"
    asked: dict[str, Any] = {"tools": [COLOUR], "max_tokens": 200, "temperature": 1.0, "seed": 3}
    asked["extra_headers"] = {"X-Session-ID": session}
    # By its name: with "required" a random model calls it again and again.
    paint = {"type": "function", "function": {"name": "paint"}}
    headers, first = await client.chat(tool_choice=paint, **asked)
    assert headers["X-SOMA-Engine"] == "original"
    message = first.choices[0].message
    assert first.choices[0].finish_reason in ("stop", "tool_calls")
    (call,) = message.tool_calls
    assert call.function.name == "paint"
    assert json.loads(call.function.arguments)["colour"] in ("red", "blue")
    result = {"role": "tool", "tool_call_id": call.id, "content": "done"}
    history = [*QUERY, message.model_dump(exclude_none=True), result]
    headers, second = await client.chat(messages=history, tool_choice="none", **asked)
    assert headers["X-SOMA-Session"] == session
    assert second.choices[0].message.tool_calls is None
    assert len(tiny_server.session(session, "client")["turns"]) == 2


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_url", "image_url": {"url": PIXEL}},
        {"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}},
    ],
    ids=["image", "audio"],
)
async def test_what_a_text_model_cannot_read_is_a_400_and_no_turn(
    client: Client, tiny_server: Running, engine: str, part: dict[str, Any], request: pytest.FixtureRequest
) -> None:
    session = f"seen-{request.node.callspec.id}"
    content = [{"type": "text", "text": "what is this?"}, part]
    with pytest.raises(openai.BadRequestError, match="not a multimodal model"):
        await client.chat(messages=[{"role": "user", "content": content}], **to(engine, session))
    with pytest.raises(openai.NotFoundError):
        await client.call("get", path=f"{tiny_server.root}/soma/sessions/{session}", cast_to=object)


# -- the other routes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("model", "engine"), [("soma", "original"), ("tiny-surrogate", "surrogate")])
async def test_text_completions(client: Client, model: str, engine: str) -> None:
    asked = {"model": model, "prompt": ["one", "two"], "max_tokens": 4, "temperature": 1.0, "seed": 5}
    raw = await client.call("completions.with_raw_response.create", n=2, logprobs=2, **asked)
    assert raw.headers["X-SOMA-Engine"] == engine
    whole = raw.parse()
    assert [choice.index for choice in whole.choices] == [0, 1, 2, 3]
    assert all(len(choice.logprobs.tokens) == 4 for choice in whole.choices)
    chunks = await client.call("completions.create", stream=True, **asked)
    streamed = ["".join(c.text for chunk in chunks for c in chunk.choices if c.index == i) for i in (0, 1)]
    assert streamed == [whole.choices[0].text, whole.choices[2].text]


async def test_a_response_is_gone_on_from_whole_and_streamed(client: Client, tiny_server: Running) -> None:
    asked = {"model": "soma", "max_output_tokens": 8}
    first = await client.call("responses.create", input="hello", **asked)
    events = await client.call(
        "responses.create", input="and then", previous_response_id=first.id, stream=True, **asked
    )
    assert events[-1].type == "response.incomplete"
    last = events[-1].response
    assert last.output_text == "".join(e.delta for e in events if e.type == "response.output_text.delta")
    raw = await client.call(
        "responses.with_raw_response.create", input="and now", previous_response_id=last.id, **asked
    )
    assert len(tiny_server.session(raw.headers["X-SOMA-Session"], "client")["turns"]) == 3
    assert (await client.call("responses.retrieve", response_id=last.id)).output == last.output
    await client.call("responses.delete", response_id=first.id)
    with pytest.raises(openai.NotFoundError):
        await client.call("responses.retrieve", response_id=first.id)


async def test_the_served_models_can_be_listed_looked_up_and_asked_for_tokens(
    client: Client, tiny_server: Running
) -> None:
    listed = await client.call("models.list")
    names = [model.id for model in listed.data]
    assert names == ["soma", "tiny-original", "tiny-surrogate"]
    for model in listed.data:
        assert await client.call("models.retrieve", model=model.id) == model
        assert model.max_model_len == 2048
        asked = {"path": f"{tiny_server.root}/tokenize", "cast_to": object}
        counted = await client.call("post", **asked, body={"model": model.id, "messages": QUERY})
        assert counted["count"] == len(counted["tokens"])
    with pytest.raises(openai.NotFoundError, match="expected one of soma"):
        await client.call("models.retrieve", model="org/other")


# -- whose answer -----------------------------------------------------------------------------------------


async def test_a_request_that_opts_out_is_the_originals_and_no_turn(
    client: Client, tiny_server: Running, request: pytest.FixtureRequest
) -> None:
    session = f"off-{request.node.callspec.id}"
    headers, _ = await client.chat(extra_headers={"X-SOMA": "off", "X-Session-ID": session})
    assert headers["X-SOMA-Engine"] == "original"
    assert "X-SOMA-Session" not in headers
    with pytest.raises(openai.NotFoundError):
        await client.call("get", path=f"{tiny_server.root}/soma/sessions/{session}", cast_to=object)


@pytest.mark.parametrize("engine", ENGINES)
async def test_a_policy_is_chosen_by_header_or_by_model(client: Client, engine: str) -> None:
    by_header, _ = await client.chat(**to(engine))
    by_model, _ = await client.chat(model=f"soma:{engine}")
    assert by_header["X-SOMA-Engine"] == by_model["X-SOMA-Engine"] == engine
    assert by_header["X-SOMA-Phase"] == by_model["X-SOMA-Phase"] == "WARM_START"


# -- errors -----------------------------------------------------------------------------------------------

REFUSED = [
    ({"temperature": -1}, openai.BadRequestError, "temperature"),
    ({"top_logprobs": 2}, openai.BadRequestError, "logprobs"),
    ({"messages": []}, openai.BadRequestError, "messages"),
    ({"max_tokens": 10**9}, openai.BadRequestError, "max_tokens"),
    ({"messages": [{"role": "user", "content": "word " * 5000}]}, openai.BadRequestError, "2048"),
    ({"extra_headers": {"X-SOMA-Policy": "none"}}, openai.BadRequestError, "expected one of history_ft"),
    ({"extra_headers": {"X-Session-ID": "x" * 1000}}, openai.BadRequestError, "session id"),
    ({"extra_headers": {"Authorization": "Basic eDp5"}}, openai.AuthenticationError, "expected 'Bearer"),
    ({"model": "gpt-4"}, openai.NotFoundError, "expected one of soma"),
    ({"model": "soma:none"}, openai.BadRequestError, "expected one of history_ft"),
]


@pytest.mark.parametrize(("asked", "error", "said"), REFUSED, ids=lambda value: str(value)[:40])
async def test_what_is_wrong_is_told_by_the_right_error(
    client: Client, asked: dict[str, Any], error: type[openai.APIStatusError], said: str
) -> None:
    with pytest.raises(error, match=said) as told:
        await client.chat(**asked)
    assert {"message", "type", "param", "code"} <= told.value.body.keys()


@pytest.mark.parametrize("engine", ENGINES)
async def test_a_prompt_that_is_too_long_has_openais_code(client: Client, engine: str) -> None:
    with pytest.raises(openai.BadRequestError) as told:
        await client.chat(messages=[{"role": "user", "content": "word " * 5000}], **to(engine))
    assert told.value.code == "context_length_exceeded"


@pytest.mark.parametrize("engine", ENGINES)
async def test_a_schema_that_is_none_is_a_400(client: Client, engine: str) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nonsense"}}}
    with pytest.raises(openai.BadRequestError, match="nonsense"):
        await client.chat(response_format=form, **to(engine))


async def test_a_body_that_is_too_large_is_a_413(client: Client) -> None:
    with pytest.raises(openai.APIStatusError) as told:
        await client.chat(messages=[{"role": "user", "content": "x" * (17 << 20)}])
    assert told.value.status_code == 413


async def test_a_response_whose_text_cannot_be_told_is_not_found(client: Client) -> None:
    with pytest.raises(openai.NotFoundError, match="resp_none") as told:
        await client.call("responses.create", model="soma", input="x", previous_response_id="resp_none")
    assert told.value.code == "previous_response_not_found"

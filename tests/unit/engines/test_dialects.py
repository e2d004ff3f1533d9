"""Endpoints of every dialect, played by a server on loopback: what a client gets is OpenAI's shape."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from types import SimpleNamespace
from typing import Any

import pytest
from aiohttp import web
from support.replies import read_events

from soma_vllm.engines.engine import ChatCall
from soma_vllm.engines.original import OriginalEngine
from soma_vllm.engines.reply_parser import parse_body
from soma_vllm.engines.upstream_errors import retry_after
from soma_vllm.errors import EngineRefused, EngineUnavailable
from soma_vllm.logs import bind

CALL = ChatCall({"model": "soma", "messages": [{"role": "user", "content": "hi"}]})
STREAM = ChatCall({**CALL.body, "stream": True})
DONE = "data: [DONE]\n\n"


def chunk(delta: object, finish: str | None = None, **more: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": delta, "finish_reason": finish}], **more}


def data(found: object) -> str:
    return f"data: {json.dumps(found)}\n\n"


SAID = [chunk({"role": "assistant", "content": ""}), chunk({"content": "Hello"}), chunk({"content": " there"})]
EVENTS = [*SAID, chunk({}, "stop")]
PLAIN = "".join(map(data, EVENTS))


def whole(content: object = "Hello there", **message: Any) -> dict[str, Any]:
    said = {"role": "assistant", "content": content, **message}
    choices = [{"index": 0, "message": said, "finish_reason": "stop"}]
    return {"id": "c", "object": "chat.completion", "created": 1, "model": "up", "choices": choices}


class Endpoint:
    """Answers every request with the same bytes, cut into pieces of `cut` bytes."""

    def __init__(self) -> None:
        self.text = PLAIN + DONE
        self.status = 200
        self.headers: dict[str, str] = {}
        self.cut = 1 << 20
        self.asked: list[tuple[dict[str, Any], dict[str, str]]] = []
        self.url = ""

    async def answer(self, request: web.Request) -> web.StreamResponse:
        self.asked.append((await request.json(), {k.lower(): v for k, v in request.headers.items()}))
        response = web.StreamResponse(status=self.status, headers=self.headers)
        await response.prepare(request)
        content = self.text.encode()
        for start in range(0, len(content), self.cut):
            await response.write(content[start : start + self.cut])
            await asyncio.sleep(0)
        return response


@pytest.fixture
async def endpoint() -> AsyncIterator[Endpoint]:
    found = Endpoint()
    app = web.Application()
    app.router.add_post("/{path:.*}", found.answer)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    found.url = f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
    yield found
    await runner.cleanup()


@pytest.fixture
async def engine(endpoint: Endpoint) -> AsyncIterator[OriginalEngine]:
    found = OriginalEngine("big", endpoint.url)
    yield found
    await found.close()


async def streamed(engine: OriginalEngine) -> list[str]:
    reply = await engine.chat(STREAM)
    assert reply.events is not None
    return [event async for event in reply.events]


NAMED = "".join(f"id: {n}\nevent: message\nretry: 5\n{data(event)}" for n, event in enumerate(EVENTS))
MANY_LINES = "".join("data: " + json.dumps(e, indent=1).replace("\n", "\ndata: ") + "\n\n" for e in EVENTS)
STREAMS = {
    "plain": PLAIN + DONE,
    "without its end mark": PLAIN,
    "without the last blank line": PLAIN + "data: [DONE]",
    "without the last line end of all": PLAIN.rstrip("\n"),
    "with ids and types": NAMED + DONE,
    "with comments": "".join(f": alive\n{data(event)}" for event in EVENTS) + ": bye\n\n" + DONE,
    "with several data lines": MANY_LINES + DONE,
    "with carriage returns": (PLAIN + DONE).replace("\n", "\r"),
    "with both line ends": (PLAIN + DONE).replace("\n", "\r\n"),
    "with a byte order mark": "\ufeff" + PLAIN + DONE,
    "without the space": (PLAIN + DONE).replace("data: ", "data:"),
    "with data that is no JSON": data(SAID[0]) + "data: alive\n\ndata: 3\n\n" + PLAIN + DONE,
    "with null errors": "".join(data({**event, "error": None}) for event in EVENTS) + DONE,
    "with null choices": PLAIN + data({"choices": None, "usage": {"prompt_tokens": 1}}) + DONE,
    "with a ping": 'event: ping\ndata: {"type": "ping"}\n\n' + PLAIN + DONE,
    "after blank lines": "\n\n  \n" + PLAIN + DONE,
    "whole": json.dumps(whole()),
    "whole after blanks": "\n \n" + json.dumps(whole(), indent=2),
}


@pytest.mark.parametrize("cut", [1, 7, 1 << 20])
@pytest.mark.parametrize("name", STREAMS)
async def test_a_stream_of_any_dialect_comes_out_as_openais(
    engine: OriginalEngine, endpoint: Endpoint, name: str, cut: int
) -> None:
    endpoint.text, endpoint.cut = STREAMS[name], cut
    events = await streamed(engine)
    assert events[-1] == DONE
    chunks = [json.loads(event.removeprefix("data: ")) for event in events[:-1]]
    assert all(isinstance(found["choices"], list) for found in chunks)
    assert [c["finish_reason"] for found in chunks for c in found["choices"] if c["finish_reason"]] == ["stop"]
    (choice,), _, complete = read_events(events)
    assert (choice.text, complete) == ("Hello there", True)


async def test_events_of_openais_shape_go_out_as_the_same_text(
    engine: OriginalEngine, endpoint: Endpoint
) -> None:
    events = await streamed(engine)
    assert "".join(events) == endpoint.text


PARTS = [{"type": "thinking", "thinking": [{"type": "text", "text": "Hm."}]}, {"type": "text", "text": "Hello"}]


async def test_content_in_parts_becomes_its_text_and_its_thoughts(
    engine: OriginalEngine, endpoint: Endpoint
) -> None:
    endpoint.text = data(chunk({"role": "assistant", "content": PARTS})) + PLAIN
    first = json.loads((await streamed(engine))[0].removeprefix("data: "))
    said = {"role": "assistant", "content": "Hello", "reasoning_content": "Hm."}
    assert first["choices"][0]["delta"] == said
    endpoint.text = json.dumps(whole(PARTS))
    reply = await engine.chat(CALL)
    assert reply.body is not None
    assert reply.body["choices"][0]["message"] == said


async def test_arguments_as_an_object_become_text(engine: OriginalEngine, endpoint: Endpoint) -> None:
    call = {"index": 0, "id": "c", "type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
    meant = {"name": "f", "arguments": '{"a":1}'}
    endpoint.text = data(chunk({"tool_calls": [call]})) + data(chunk({}, "tool_calls"))
    (choice,), _, complete = read_events(await streamed(engine))
    assert (choice.calls[0]["function"], complete) == (meant, True)
    endpoint.text = json.dumps(whole(None, tool_calls=[call]))
    assert parse_body((await engine.chat(CALL)).body or {}, 0.0).choices[0].calls[0]["function"] == meant


async def test_counts_as_text_become_numbers(engine: OriginalEngine, endpoint: Endpoint) -> None:
    usage = {"prompt_tokens": "5", "completion_tokens": 2, "total_tokens": "7", "cost": "0.1"}
    endpoint.text = json.dumps({**whole(), "usage": usage})
    body = (await engine.chat(CALL)).body or {}
    assert body["usage"] == {"prompt_tokens": 5, "completion_tokens": 2, "total_tokens": 7, "cost": "0.1"}


@pytest.mark.parametrize("name", [name for name in STREAMS if not name.startswith("whole")])
async def test_a_stream_where_a_whole_answer_was_asked_for_becomes_one(
    engine: OriginalEngine, endpoint: Endpoint, name: str
) -> None:
    endpoint.text = STREAMS[name]
    body = (await engine.chat(CALL)).body or {}
    assert body["object"] == "chat.completion"
    (choice,) = body["choices"]
    assert choice["message"]["content"].endswith("Hello there")
    assert choice["finish_reason"] == "stop"


async def test_calls_are_put_together_from_a_stream(engine: OriginalEngine, endpoint: Endpoint) -> None:
    call = {"index": 0, "id": "c", "type": "function", "function": {"name": "f", "arguments": ""}}
    more = [{"index": 0, "function": {"arguments": text}} for text in ('{"a"', ": 1}")]
    chunks = [chunk({"tool_calls": [part]}) for part in (call, *more)]
    endpoint.text = "".join(map(data, [*chunks, chunk({}, "tool_calls")]))
    message = ((await engine.chat(CALL)).body or {})["choices"][0]["message"]
    assert message["tool_calls"] == [{**call, "function": {"name": "f", "arguments": '{"a": 1}'}}]


async def test_a_whole_text_completion_becomes_a_stream(engine: OriginalEngine, endpoint: Endpoint) -> None:
    choice = {"index": 0, "text": "Hello", "finish_reason": "length"}
    endpoint.text = json.dumps({"object": "text_completion", "choices": [choice]})
    reply = await engine.chat(ChatCall({"prompt": "x", "stream": True}, text=True))
    assert reply.events is not None
    chunks = [json.loads(e.removeprefix("data: ")) async for e in reply.events if e != DONE]
    assert [c["choices"][0]["text"] for c in chunks] == ["Hello", ""]
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"


async def test_several_choices_must_all_have_ended(engine: OriginalEngine, endpoint: Endpoint) -> None:
    endpoint.text = PLAIN
    reply = await engine.chat(ChatCall({**STREAM.body, "n": 2}))
    assert reply.events is not None
    with pytest.raises(EngineUnavailable, match="without a finish_reason"):
        [event async for event in reply.events]


FAILED = [
    {"error": {"message": "the provider failed", "code": 502}},
    {"error": "it failed"},
    {"object": "error", "message": "no", "code": 50001},
    {"choices": [], "error": {"message": "x", "type": "server_error"}},
    {"detail": "no"},
    [],
]


@pytest.mark.parametrize("found", FAILED, ids=str)
async def test_a_failure_inside_a_200_is_none_of_an_answer(
    engine: OriginalEngine, endpoint: Endpoint, found: object
) -> None:
    for endpoint.text in (json.dumps(found), data(found), f"event: error\n{data(found)}"):
        for call in (CALL, STREAM):
            with pytest.raises(EngineUnavailable):
                await engine.chat(call)


@pytest.mark.parametrize("call", [CALL, STREAM], ids=["whole", "stream"])
async def test_a_whole_answer_without_choices_is_a_failure(
    engine: OriginalEngine, endpoint: Endpoint, call: ChatCall
) -> None:
    endpoint.text = json.dumps({"object": "chat.completion", "choices": []})
    with pytest.raises(EngineUnavailable, match="without choices"):
        await engine.chat(call)


@pytest.mark.parametrize("call", [CALL, STREAM], ids=["whole", "stream"])
@pytest.mark.parametrize(
    "error",
    [
        {"code": 429},
        {"code": "429"},
        {"status": 429},
        {"type": "rate_limit_error"},
        {"code": "insufficient_quota"},
    ],
    ids=str,
)
async def test_a_refusal_inside_a_200_has_its_status(
    engine: OriginalEngine, endpoint: Endpoint, error: dict[str, Any], call: ChatCall
) -> None:
    for endpoint.text in (json.dumps({"error": {"message": "slow", **error}}), data({"error": error})):
        with pytest.raises(EngineRefused) as refused:
            await engine.chat(call)
        assert refused.value.status == 429


async def test_an_error_in_the_middle_breaks_the_stream(engine: OriginalEngine, endpoint: Endpoint) -> None:
    endpoint.text = data(SAID[1]) + data({"error": {"message": "overloaded at https://x.example/y"}}) + DONE
    reply = await engine.chat(STREAM)
    assert reply.events is not None
    assert await anext(reply.events) == data(SAID[1])
    with pytest.raises(EngineUnavailable, match="reported an error in its answer"):
        await anext(reply.events)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"detail": "wrong field"}', "wrong field"),
        ('{"detail": [{"loc": ["body", "top_k"], "msg": "too large"}]}', "body.top_k: too large"),
        ('{"error": "no such model"}', "no such model"),
        ('{"message": "no", "request_id": "req-1"}', "no"),
        ('{"errors": [{"message": "a"}, {"message": "b"}]}', "a; b"),
        ('[{"error": {"message": "listed"}}]', "listed"),
        ('{"error": {"message": "<html>x</html>"}}', "the original answered with status 422"),
        ("<html>oops</html>", "the original answered with status 422"),
        ("", "the original answered with status 422"),
        ("null", "the original answered with status 422"),
        ("[" * 100_000, "the original answered with status 422"),
        (
            '{"detail": "key sk-abcd1234 of org-Xy12345 at https://up.example.com/v1 10.0.0.7:80, me@x.org"}',
            "key [removed] of [removed] at [removed] [removed], [removed]",
        ),
    ],
)
@pytest.mark.parametrize("call", [CALL, STREAM], ids=["whole", "stream"])
async def test_an_error_of_any_shape_comes_out_in_openais(
    engine: OriginalEngine, endpoint: Endpoint, text: str, message: str, call: ChatCall
) -> None:
    endpoint.text, endpoint.status = text, 422
    with pytest.raises(EngineRefused) as refused:
        await engine.chat(call)
    assert refused.value.status == 422
    assert refused.value.body["error"].keys() == {"message", "type", "param", "code"}
    assert refused.value.body["error"]["message"] == message


async def test_the_wait_of_a_busy_endpoint_is_told(engine: OriginalEngine, endpoint: Endpoint) -> None:
    endpoint.status, endpoint.headers, endpoint.text = 429, {"Retry-After": "7"}, '{"error": {"code": "x"}}'
    with pytest.raises(EngineRefused) as refused:
        await engine.chat(CALL)
    assert (refused.value.retry_after, refused.value.body["error"]["code"]) == (7, "x")


def test_a_wait_is_a_finite_number_of_seconds() -> None:
    def told(text: str) -> float | None:
        return retry_after({"Retry-After": text})

    assert [told(text) for text in ("7", "1.5", "999999999")] == [7, 1.5, 86_400]
    assert [told(text) for text in ("", "soon", "-1", "9" * 400, "1e5", "Mon, 99 Foo 2026")] == [None] * 6
    later = told(format_datetime(datetime.now(UTC) + timedelta(seconds=60), usegmt=True))
    assert later is not None
    assert 50 < later <= 60
    assert told("Wed, 21 Oct 2015 07:28:00 GMT") == 0


async def test_what_is_meant_for_this_server_stays_here(engine: OriginalEngine, endpoint: Endpoint) -> None:
    metadata = {"session_id": "mine", "workload": "w"}
    await engine.chat(ChatCall({**CALL.body, "session_id": "s", "workload": "w", "metadata": metadata}))
    await engine.chat(ChatCall({**CALL.body, "metadata": {**metadata, "team": "a"}}))
    assert [body for body, _ in endpoint.asked] == [
        {**CALL.body, "model": "big"},
        {**CALL.body, "model": "big", "metadata": {"team": "a"}},
    ]


TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


async def test_the_ids_of_a_request_and_of_its_trace_go_on(engine: OriginalEngine, endpoint: Endpoint) -> None:
    http = SimpleNamespace(headers={"traceparent": TRACE, "cookie": "x"})
    with bind(request_id="req-7"):
        await engine.chat(ChatCall(CALL.body, http=http))
    await engine.chat(CALL)
    (_, sent), (_, bare) = endpoint.asked
    assert (sent["x-request-id"], sent["traceparent"]) == ("req-7", TRACE)
    assert "cookie" not in sent
    assert {"x-request-id", "traceparent"}.isdisjoint(bare)

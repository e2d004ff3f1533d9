"""A dispatcher that answers from a script and keeps what it was asked, for tests of the Responses API.

Its replies are written as vLLM writes them; its record of who said what is a list.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import httpx
from fastapi import FastAPI
from openai import AsyncOpenAI
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from soma_vllm.api.responses import conversations
from soma_vllm.api.responses.background import BackgroundResponses
from soma_vllm.api.responses.routes import router
from soma_vllm.api.responses.stored import ObjectRecord
from soma_vllm.config import Server, parse_config
from soma_vllm.engines.engine import Reply
from soma_vllm.engines.reply_parser import parse_body
from soma_vllm.errors import EngineUnavailable, NotFound, SomaError
from soma_vllm.scheduler.dispatcher import Answer, ChatRequest
from soma_vllm.sessions.lookup import StoredTranscript
from soma_vllm.sessions.sql.store import SessionStore
from soma_vllm.sessions.state.transcript import spoken
from soma_vllm.types import Message
from support.replies import read_events
from support.services import SETTINGS, Services

EVENT: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)

HEADERS = {
    "X-SOMA-Session": "s",
    "X-SOMA-Engine": "original",
    "X-SOMA-Adapter": "",
    "X-SOMA-Phase": "WARM_START",
    "X-SOMA-Reason": "warm start",
}

USAGE = {
    "prompt_tokens": 7,
    "completion_tokens": 5,
    "total_tokens": 12,
    "prompt_tokens_details": {"cached_tokens": 3},
    "completion_tokens_details": {"reasoning_tokens": 2},
}


@dataclass(frozen=True)
class Spoken:
    """What an engine answers."""

    pieces: Sequence[str] = ("An ", "answer.")
    calls: Sequence[tuple[str, str, Sequence[str]]] = ()
    """(id, name, pieces of the arguments)."""
    thoughts: Sequence[str] = ()
    finish: str = "stop"
    logprobs: bool = False
    thoughts_name: str = "reasoning"

    @property
    def text(self) -> str:
        return "".join(self.pieces)

    def tool_calls(self) -> list[dict[str, Any]]:
        return [
            {"id": id, "type": "function", "function": {"name": name, "arguments": "".join(pieces)}}
            for id, name, pieces in self.calls
        ]

    def message(self) -> Message:
        """The message a chat client would send back."""
        return spoken(self.text, self.tool_calls())

    def completion(self) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": self.text or None}
        if self.thoughts:
            message[self.thoughts_name] = "".join(self.thoughts)
        if self.calls:
            message["tool_calls"] = self.tool_calls()
        shown = {"content": [token(piece) for piece in self.pieces]} if self.logprobs else None
        choice = {"index": 0, "message": message, "logprobs": shown, "finish_reason": self.finish}
        return {
            "id": "chatcmpl-1",
            "object": "chat.completion",
            "created": 1,
            "model": "large",
            "choices": [choice],
            "usage": USAGE,
        }

    def events(self) -> list[str]:
        deltas: list[dict[str, Any]] = [{"role": "assistant", "content": ""}]
        deltas += [{self.thoughts_name: piece} for piece in self.thoughts]
        deltas += [{"content": piece} for piece in self.pieces]
        for index, (id, name, pieces) in enumerate(self.calls):
            first = {"name": name, "arguments": ""}
            deltas.append({"tool_calls": [{"index": index, "id": id, "type": "function", "function": first}]})
            deltas += [{"tool_calls": [{"index": index, "function": {"arguments": piece}}]} for piece in pieces]
        deltas.append({})
        last = len(deltas) - 1
        chunks = [
            choice_event(
                delta,
                self.finish if place == last else None,
                [token(delta["content"])] if self.logprobs and delta.get("content") else None,
            )
            for place, delta in enumerate(deltas)
        ]
        return [*chunks, event({"choices": [], "usage": USAGE}), "data: [DONE]\n\n"]


def token(text: str) -> dict[str, Any]:
    top = {"token": text, "logprob": -0.5, "bytes": list(text.encode())}
    return {**top, "top_logprobs": [top, {"token": "other", "logprob": -1.5, "bytes": None}]}


def event(fields: Mapping[str, Any]) -> str:
    head = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "large"}
    return f"data: {json.dumps({**head, **fields})}\n\n"


def choice_event(
    delta: Mapping[str, Any], finish: str | None = None, logprobs: list[dict[str, Any]] | None = None
) -> str:
    shown = None if logprobs is None else {"content": logprobs}
    return event({"choices": [{"index": 0, "delta": delta, "logprobs": shown, "finish_reason": finish}]})


class ChatEvents:
    """A chat stream that holds, breaks and is closed as a test wants it."""

    def __init__(self, events: Iterable[str], failure: BaseException | None = None) -> None:
        self._events = list(events)
        self._failure = failure
        self.go = asyncio.Event()
        """Clear it to hold the stream before its next event."""
        self.go.set()
        self.told = 0
        self.waiting = asyncio.Event()
        """Set when somebody waits for an event."""
        self.closed = asyncio.Event()
        self.over = False
        """It was read to its end."""

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> str:
        self.waiting.set()
        await self.go.wait()
        if self.told == len(self._events):
            self.over = True
            if self._failure is not None:
                raise self._failure
            raise StopAsyncIteration
        self.told += 1
        return self._events[self.told - 1]

    async def aclose(self) -> None:
        self.closed.set()


@dataclass
class Script:
    """A dispatcher: `chat`, `said` and `conversation`, as the Responses API uses them."""

    answers: list[Spoken | ChatEvents | SomaError] = field(default_factory=list)
    """Taken in turn; a plain answer when there are none left."""
    headers: Mapping[str, str] = field(default_factory=lambda: dict(HEADERS))
    asked: list[ChatRequest] = field(default_factory=list)
    responses: dict[tuple[str, str], StoredTranscript] = field(default_factory=dict)
    conversations: dict[tuple[str, str], tuple[Message, ...]] = field(default_factory=dict)
    unreadable: SomaError | None = None
    """Raised instead of a transcript."""

    @property
    def body(self) -> Mapping[str, Any]:
        """The chat completion asked for last."""
        return self.asked[-1].body

    async def chat(self, incoming: ChatRequest) -> Answer:
        self.asked.append(incoming)
        answer = self.answers.pop(0) if self.answers else Spoken()
        if isinstance(answer, SomaError):
            raise answer
        if isinstance(answer, ChatEvents):
            return Answer(Reply(events=answer), self.headers)
        if incoming.body.get("stream"):
            events = answer.events()
            self._record(incoming, read_events(events)[0][0])
            return Answer(Reply(events=ChatEvents(events)), self.headers)
        body = answer.completion()
        self._record(incoming, parse_body(body, 0.0).choices[0])
        return Answer(Reply(body=body), self.headers)

    def _record(self, incoming: ChatRequest, choice: Any) -> None:
        session = incoming.session or "s"
        transcript = (*incoming.body["messages"], spoken(choice.text, choice.calls))
        self.conversations[incoming.tenant, session] = transcript
        if incoming.response is not None:
            self.responses[incoming.tenant, incoming.response] = StoredTranscript(session, transcript)

    async def said(self, tenant: str, response: str) -> StoredTranscript:
        if self.unreadable is not None:
            raise self.unreadable
        if (tenant, response) not in self.responses:
            raise NotFound(f"no response {response!r}")
        return self.responses[tenant, response]

    async def conversation(self, tenant: str, session: str) -> tuple[Message, ...]:
        return self.conversations.get((tenant, session), ())


BROKEN = EngineUnavailable("the original broke off")


class NothingStored:
    """A record of objects that is always empty."""

    keeps_all = True

    def keep(self, *_: Any) -> bool:
        return False

    async def require_there(self, *_: Any) -> None:
        return

    async def resolved(self, _: str, given: Any) -> Any:
        return given

    async def history(self, *_: Any) -> None:
        return None


class Listening:
    """A host, as routes see it."""

    server = Server()


def application(dispatcher: Any, session_admin: Any = None) -> FastAPI:
    """The routes of responses before a dispatcher; before a whole one, those of conversations too."""
    app = FastAPI()
    app.include_router(router)
    app.include_router(conversations.router)
    app.state.soma = dispatcher
    app.state.soma_host = Listening()
    registry = None if isinstance(dispatcher, Script) else dispatcher._lookup.registry
    app.state.soma_objects = NothingStored() if registry is None else ObjectRecord(registry)
    app.state.soma_background = BackgroundResponses(app.state.soma_objects)
    if registry is not None:
        registry.erasure.watch(app.state.soma_background)
    app.state.soma_session_admin = session_admin
    return app


def http_client(dispatcher: Any, session_admin: Any = None) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(application(dispatcher, session_admin))
    return httpx.AsyncClient(transport=transport, base_url="http://soma/v1")


def openai_client(dispatcher: Any, key: str = "k", session_admin: Any = None) -> AsyncOpenAI:
    http = http_client(dispatcher, session_admin)
    return AsyncOpenAI(api_key=key, base_url="http://soma/v1", http_client=http, max_retries=0)


def checked(response: Mapping[str, Any]) -> Response:
    """A response as OpenAI's own types read it, strictly."""
    return Response.model_validate(response)


def told(lines: Iterable[str]) -> list[dict[str, Any]]:
    """Server-sent events, each checked: its two lines, its number, and OpenAI's own type of it."""
    found = []
    for number, line in enumerate(lines):
        head, data, *rest = line.split("\n")
        assert rest == ["", ""]
        fields = json.loads(data.removeprefix("data: "))
        assert head == f"event: {fields['type']}"
        assert fields["sequence_number"] == number
        parsed = EVENT.validate_python(fields)
        assert parsed.type == fields["type"]
        found.append(fields)
    return found


async def opened(store: SessionStore, **changes: Any) -> Services:
    """A dispatcher that answers "one", "two", ... and adapts nothing."""
    services = Services(parse_config({**SETTINGS, "warm_window": 9, **changes}, "test"), store)
    services.original.answers = ["one", "two", "three", "four", "five"]
    await services.registry.start()
    return services


async def closed(services: Services) -> None:
    await services.background.stop()
    await services.registry.stop()

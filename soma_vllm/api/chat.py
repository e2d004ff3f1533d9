"""OpenAI's chat completions, text completions and model list, dispatched."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from soma_vllm.api.error_responses import failed
from soma_vllm.engines.engine import Events
from soma_vllm.engines.vllm.internals import (
    ChatBody,
    CompletionBody,
    validate_json_request,
    with_cancellation,
)
from soma_vllm.errors import SomaError
from soma_vllm.scheduler.dispatcher import Answer, ChatRequest, Dispatcher, no_such_model

router = APIRouter()

NULLABLE = frozenset({"content", "refusal", "logprobs", "finish_reason"})
"""Fields of a completion that OpenAI's schema requires and allows to be null."""


class DialogueStream(StreamingResponse):
    """A stream that is closed when the response ends, also when the client left before it began."""

    def __init__(self, events: Events, headers: Mapping[str, str]) -> None:
        super().__init__(events, headers=dict(headers), media_type="text/event-stream")
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events, then close them."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._events.aclose()


@router.post("/v1/chat/completions", dependencies=[Depends(validate_json_request)])
@with_cancellation  # type: ignore[untyped-decorator]
async def create_chat_completion(request: ChatBody, raw_request: Request) -> Response:
    """OpenAI's chat completion, dispatched. `request` is here for vLLM's validation alone."""
    # The raw JSON is passed on: the original gets each field as the client sent it. `PrivateChat` validates
    # again for the surrogate: routing may have replaced the messages, and `/v1/responses` has no such object.
    return await _answered(dispatcher(raw_request).chat, raw_request)


@router.post("/v1/completions", dependencies=[Depends(validate_json_request)])
@with_cancellation  # type: ignore[untyped-decorator]
async def create_completion(request: CompletionBody, raw_request: Request) -> Response:
    """OpenAI's text completion: it has no session; the original answers, or the engine that is named."""
    return await _answered(dispatcher(raw_request).complete, raw_request)


@router.get("/v1/models")
async def list_models(raw_request: Request) -> JSONResponse:
    """The names that a request may ask for. Adapters are not among them."""
    names = raw_request.app.state.soma_host.models()
    return JSONResponse({"object": "list", "data": [_card(name) for name in names]})


@router.get("/v1/models/{model:path}")
async def show_model(model: str, raw_request: Request) -> JSONResponse:
    """One of these names."""
    names = raw_request.app.state.soma_host.models()
    if model not in names:
        return failed(no_such_model(model, names))
    return JSONResponse(_card(model))


def dispatcher(raw_request: Request) -> Dispatcher:
    """The dispatcher of the application."""
    found: Dispatcher = raw_request.app.state.soma
    return found


def _card(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "soma_vllm"}


async def _answered(answer: Callable[[ChatRequest], Awaitable[Answer]], raw_request: Request) -> Response:
    incoming = ChatRequest(await raw_request.json(), raw_request.headers, raw_request)
    try:
        found = await answer(incoming)
    except SomaError as error:
        return failed(error)
    if found.reply.events is not None:
        return DialogueStream(found.reply.events, found.headers)
    assert found.reply.body is not None
    # Generated text may hold half a surrogate pair, which UTF-8 cannot; JSON's escape can.
    content = json.dumps(without_nulls(found.reply.body), ensure_ascii=False, separators=(",", ":"))
    whole = content.encode("utf-8", "backslashreplace")
    return Response(whole, headers=dict(found.headers), media_type="application/json")


def without_nulls(completion: Mapping[str, Any]) -> dict[str, Any]:
    """A whole completion without the nulls that vLLM writes and OpenAI's schema does not allow."""
    found = _given(completion)
    if "usage" in found:
        found["usage"] = _given(found["usage"])
    found["choices"] = [_given(choice) for choice in found.get("choices") or ()]
    for choice in found["choices"]:
        if "message" in choice:
            choice["message"] = _given(choice["message"])
    return found


def _given(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None or name in NULLABLE}

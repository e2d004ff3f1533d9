"""`/v1/messages`: Anthropic's Messages API, read by vLLM's own conversion and answered by the dispatch of
chats.

Guarantees: a dialogue is one session whether it comes in this shape or in OpenAI's; errors have Anthropic's
shape.
"""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Mapping
from typing import Any, Self

from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse, Response

from soma_vllm.api.chat import dispatcher, silence_s
from soma_vllm.api.dialogue_stream import respond_streaming
from soma_vllm.api.error_responses import TranslatingRoute, failed
from soma_vllm.api.server_info import count_tokens
from soma_vllm.api.unicode_check import require_unicode
from soma_vllm.engines.engine import Events
from soma_vllm.engines.sse import serialize
from soma_vllm.engines.vllm.anthropic_shape import (
    CountBody,
    MessagesBody,
    chat_body,
    message_events,
    message_of,
)
from soma_vllm.engines.vllm.internals import validate_json_request, with_cancellation
from soma_vllm.errors import SomaError
from soma_vllm.scheduler.dispatcher import Answer, ChatRequest


class MessagesRoute(TranslatingRoute):
    """A route whose SomaError is its answer, in Anthropic's shape."""

    def failed(self, error: SomaError) -> Response:
        """The answer to a request that failed with `error`."""
        status, headers, shape = _shape(error)
        return JSONResponse(shape, status_code=status, headers=dict(headers))


router = APIRouter(route_class=MessagesRoute)

KINDS = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}
"""Anthropic's types of errors by status."""


@router.post("/v1/messages", dependencies=[Depends(validate_json_request)])
@with_cancellation  # type: ignore[untyped-decorator]
async def create_message(request: MessagesBody, raw_request: Request) -> Response:
    """One turn of a dialogue."""
    soma = dispatcher(raw_request)

    async def opened() -> Answer:
        answer = await soma.chat(incoming)
        return answer.streaming(MessageEvents(answer.events))

    require_unicode(await raw_request.json())
    incoming = ChatRequest(chat_body(request, raw_request.app.state), raw_request.headers, raw_request)
    if request.stream:
        return await respond_streaming(opened(), incoming.routed, silence_s(raw_request), _error_events)
    answer = await soma.chat(incoming)
    content = json.dumps(message_of(answer.body))
    return Response(content, headers=dict(answer.headers), media_type="application/json")


@router.post("/v1/messages/count_tokens", dependencies=[Depends(validate_json_request)])
@with_cancellation  # type: ignore[untyped-decorator]
async def count_message_tokens(request: CountBody, raw_request: Request) -> Response:
    """How long a dialogue's prompt is."""
    require_unicode(await raw_request.json())
    return JSONResponse(
        {"input_tokens": await count_tokens(chat_body(request, raw_request.app.state), raw_request)}
    )


class MessageEvents:
    """`Events` of a message, made of a chat completion's; closing them closes those."""

    def __init__(self, events: Events) -> None:
        self._events = events
        self._made: AsyncGenerator[str, None] = message_events(events)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> str:
        return await anext(self._made)

    async def aclose(self) -> None:
        """Stop the generation; harmless when it is over."""
        await self._made.aclose()
        await self._events.aclose()


def _shape(error: SomaError) -> tuple[int, Mapping[str, str], dict[str, Any]]:
    answer = failed(error)
    told = json.loads(bytes(answer.body)).get("error") or {}
    kind = KINDS.get(answer.status_code, "api_error")
    kept = {name: value for name, value in answer.headers.items() if not name.startswith("content-")}
    shape = {"type": "error", "error": {"type": kind, "message": str(told.get("message"))}}
    return answer.status_code, kept, shape


def _error_events(error: SomaError) -> list[str]:
    return [serialize(json.dumps(_shape(error)[2]), "error")]

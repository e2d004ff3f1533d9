"""OpenAI's chat completions and text completions, dispatched."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from fastapi import APIRouter, Depends, Request
from fastapi.responses import Response
from pydantic import BaseModel

from soma_vllm.api.dialogue_stream import chat_errors, respond_streaming
from soma_vllm.api.error_responses import TranslatingRoute
from soma_vllm.api.unicode_check import require_unicode
from soma_vllm.config import Server
from soma_vllm.engines.vllm.internals import (
    ChatBody,
    CompletionBody,
    validate_json_request,
    with_cancellation,
)
from soma_vllm.scheduler.dispatcher import Answer, ChatRequest, Dispatcher

router = APIRouter(route_class=TranslatingRoute)

NULLABLE = frozenset({"content", "refusal", "logprobs", "finish_reason"})
"""Fields of a completion that OpenAI's schema requires and allows to be null."""


@router.post("/v1/chat/completions", dependencies=[Depends(validate_json_request)])
@with_cancellation  # type: ignore[untyped-decorator]
async def create_chat_completion(request: ChatBody, raw_request: Request) -> Response:
    """OpenAI's chat completion, dispatched. `request` is here for vLLM's validation."""
    # The raw JSON is passed on: the original gets each field as the client sent it. `PrivateChat` validates
    # again for the surrogate: routing may have replaced the messages, and `/v1/responses` has no such object.
    return await _answered(dispatcher(raw_request).chat, request, raw_request)


@router.post("/v1/completions", dependencies=[Depends(validate_json_request)])
@with_cancellation  # type: ignore[untyped-decorator]
async def create_completion(request: CompletionBody, raw_request: Request) -> Response:
    """OpenAI's text completion: it has no session; the original answers, or the engine that is named."""
    return await _answered(dispatcher(raw_request).complete, request, raw_request)


def dispatcher(raw_request: Request) -> Dispatcher:
    """The dispatcher of the application."""
    found: Dispatcher = raw_request.app.state.soma
    return found


async def _answered(
    answer: Callable[[ChatRequest], Awaitable[Answer]],
    request: ChatBody | CompletionBody,
    raw_request: Request,
) -> Response:
    body = as_validated(await raw_request.json(), request)
    incoming = ChatRequest(body, raw_request.headers, raw_request)
    require_unicode(body)
    if request.stream:
        return await respond_streaming(answer(incoming), incoming.routed, silence_s(raw_request), chat_errors)
    found = await answer(incoming)
    # Generated text may hold half a surrogate pair, which UTF-8 cannot; JSON's escape can.
    content = json.dumps(without_nulls(found.body), ensure_ascii=False, separators=(",", ":"))
    whole = content.encode("utf-8", "backslashreplace")
    return Response(whole, headers=dict(found.headers), media_type="application/json")


def as_validated(body: Mapping[str, Any], request: BaseModel) -> dict[str, Any]:
    """A JSON body whose flags and numbers are what vLLM has read: `"stream": "false"` is no stream."""
    found, read = dict(body), vars(request)  # not by attribute: deprecated ones would warn
    for name in body.keys() & read.keys():
        given, meant = body[name], read[name]
        if isinstance(given, Mapping) and isinstance(meant, BaseModel):
            found[name] = as_validated(given, meant)
        elif isinstance(meant, int) or (isinstance(meant, float) and isinstance(given, str)):
            found[name] = meant
    return found


def silence_s(raw_request: Request) -> float:
    """Seconds of silence after which a stream sends a comment; 0: never."""
    server: Server = raw_request.app.state.soma_host.server
    return server.keep_alive_s


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

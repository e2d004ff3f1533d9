"""OpenAI's chat completions, text completions and model list, dispatched."""

from __future__ import annotations

import json
import logging
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Self

from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import BaseModel
from starlette.types import Receive, Scope, Send

from soma_vllm.api.error_responses import failed
from soma_vllm.engines.engine import Events
from soma_vllm.engines.sse import serialize
from soma_vllm.engines.vllm.internals import (
    ChatBody,
    CompletionBody,
    validate_json_request,
    with_cancellation,
)
from soma_vllm.errors import EngineError, SomaError
from soma_vllm.scheduler.dispatcher import Answer, ChatRequest, Dispatcher, no_such_model

logger = logging.getLogger(__name__)

router = APIRouter()

NULLABLE = frozenset({"content", "refusal", "logprobs", "finish_reason"})
"""Fields of a completion that OpenAI's schema requires and allows to be null."""


class DialogueStream(StreamingResponse):
    """A stream that is closed when the response ends, also when the client left before it began. One that
    breaks ends with an error in OpenAI's shape, and without its end mark."""

    def __init__(self, events: Events, headers: Mapping[str, str]) -> None:
        super().__init__(_WithError(events), headers=dict(headers), media_type="text/event-stream")
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events, then close them."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._events.aclose()


class _WithError:
    """Events that end with an error where those of the engine break."""

    def __init__(self, events: Events) -> None:
        self._events = events
        self._broken = False

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> str:
        if self._broken:
            raise StopAsyncIteration
        try:
            return await anext(self._events)
        except StopAsyncIteration:
            raise
        except Exception as error:  # the status was sent, so that nothing else could tell the client
            self._broken = True
            # Of others the type alone: a message may quote what was said.
            told = error if isinstance(error, SomaError) else EngineError(type(error).__name__)
            logger.warning("a stream broke off: %s", told)
            return serialize(bytes(failed(told).body).decode())


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


async def _answered(
    answer: Callable[[ChatRequest], Awaitable[Answer]], request: BaseModel, raw_request: Request
) -> Response:
    body = as_validated(await raw_request.json(), request)
    incoming = ChatRequest(body, raw_request.headers, raw_request)
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

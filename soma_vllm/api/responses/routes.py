"""`/v1/responses`: OpenAI's Responses API, answered by the dispatch of chats.

Guarantees: a dialogue is one session whether its history is sent as items, by the previous response or by a
conversation's id; a response is found in its own tenant alone; vLLM's own store of responses cannot be reached.
"""

from __future__ import annotations

import json
from http import HTTPStatus
from typing import Annotated, Any, NoReturn

from fastapi import APIRouter, Depends, Request
from fastapi.responses import Response

from soma_vllm.api.chat import DialogueStream, dispatcher
from soma_vllm.api.error_responses import failed, failure
from soma_vllm.api.responses.convert import Frame, chat_body, new_id
from soma_vllm.api.responses.input_items import messages_of, prompt
from soma_vllm.api.responses.request import ResponsesRequest, body_schema, parse
from soma_vllm.api.responses.stream import ResponseEvents, response_of
from soma_vllm.engines.vllm.internals import validate_json_request, with_cancellation
from soma_vllm.errors import BadRequest, NotFound, SomaError
from soma_vllm.scheduler.dispatcher import DISPATCH_NAME, ChatRequest, Dispatcher
from soma_vllm.sessions.state.identity import tenant_of
from soma_vllm.types import Message

router = APIRouter()


async def body_of(raw_request: Request) -> bytes:
    """The request's body, read before `with_cancellation` listens for a disconnect."""
    return await raw_request.body()


DESCRIBED = {"requestBody": {"required": True, "content": {"application/json": {"schema": body_schema()}}}}


@router.post("/v1/responses", dependencies=[Depends(validate_json_request)], openapi_extra=DESCRIBED)
@with_cancellation  # type: ignore[untyped-decorator]
async def create_response(body: Annotated[bytes, Depends(body_of)], raw_request: Request) -> Response:
    """One turn of a dialogue."""
    try:
        return await _answered(parse(_json(body)), raw_request)
    except SomaError as error:
        return failed(error)


@router.get("/v1/responses/{response_id}")
@router.delete("/v1/responses/{response_id}")
@router.get("/v1/responses/{response_id}/input_items")
@router.post("/v1/responses/{response_id}/cancel")
async def not_stored(response_id: str) -> Response:
    """Sessions are stored, response objects are not. These routes replace vLLM's, which would show responses
    across tenants. Not a 501: clients retry a request that fails with 5xx."""
    message = "Stored responses cannot be retrieved; continue from one with previous_response_id"
    return failure(HTTPStatus.NOT_FOUND, message)


@router.post("/v1/responses/compact")
@router.post("/v1/responses/input_tokens")
async def not_supported() -> Response:
    """OpenAI's further operations; without these routes their names would be read as a response's id."""
    return failure(HTTPStatus.NOT_FOUND, "Compaction and token counting are not supported")


async def _answered(request: ResponsesRequest, raw_request: Request) -> Response:
    soma = dispatcher(raw_request)
    added = messages_of(request.input)
    try:
        session, history = await _so_far(request, soma, tenant_of(raw_request.headers.get("authorization")))
    except NotFound as error:
        code = "previous_response_not_found"
        return failure(HTTPStatus.NOT_FOUND, str(error), "previous_response_id", code=code)
    name = new_id("resp")
    answer = await soma.chat(
        ChatRequest(
            chat_body(request, prompt(request.instructions, history, added)),
            raw_request.headers,
            raw_request,
            session=session,
            response=name if request.store else None,
        )
    )
    # An answer of an engine that was asked by its name belongs to no session and is not recorded.
    stored = request.store and "X-SOMA-Session" in answer.headers
    frame = Frame(request, name, request.model or DISPATCH_NAME, stored)
    if answer.reply.events is not None:
        return DialogueStream(ResponseEvents(answer.reply.events, frame), answer.headers)
    assert answer.reply.body is not None
    content = json.dumps(response_of(frame, answer.reply.body))
    return Response(content, headers=dict(answer.headers), media_type="application/json")


async def _so_far(
    request: ResponsesRequest, soma: Dispatcher, tenant: str
) -> tuple[str | None, tuple[Message, ...]]:
    """(the session that the request names, its messages so far)."""
    if request.previous_response_id is not None:
        said = await soma.said(tenant, request.previous_response_id)
        return said.session, said.messages
    if request.conversation_id is not None:
        return request.conversation_id, await soma.conversation(tenant, request.conversation_id)
    return None, ()


def _json(body: bytes) -> Any:
    try:
        return json.loads(body, parse_constant=_no_number)
    except (ValueError, RecursionError):
        raise BadRequest("body: found no valid JSON; expected a JSON object") from None


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")

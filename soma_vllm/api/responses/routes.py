"""`/v1/responses`: OpenAI's Responses API, answered by the dispatch of chats.

Guarantees: a dialogue is one session whether its history is sent as items, by the previous response or by a
conversation's id; a response is found in its own tenant alone; vLLM's own store of responses cannot be reached.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from http import HTTPStatus
from typing import Annotated, Any, Literal, NoReturn

from fastapi import APIRouter, Depends, Query, Request
from fastapi.responses import Response

from soma_vllm.api.chat import dispatcher, silence_s
from soma_vllm.api.dialogue_stream import DialogueStream, respond_streaming
from soma_vllm.api.error_responses import TranslatingRoute, failure
from soma_vllm.api.responses.asking import Asking
from soma_vllm.api.responses.background import BackgroundResponses
from soma_vllm.api.responses.request import ResponsesRequest, body_schema, parse
from soma_vllm.api.responses.stored import ObjectRecord, page
from soma_vllm.api.unicode_check import require_unicode
from soma_vllm.engines.vllm.internals import validate_json_request, with_cancellation
from soma_vllm.errors import BadRequest, NotFound
from soma_vllm.sessions.state.identity import tenant_of

router = APIRouter(route_class=TranslatingRoute)

Order = Literal["asc", "desc"]
Limit = Annotated[int, Query(ge=1, le=100)]


async def body_of(raw_request: Request) -> bytes:
    """The request's body, read before `with_cancellation` listens for a disconnect."""
    return await raw_request.body()


DESCRIBED = {"requestBody": {"required": True, "content": {"application/json": {"schema": body_schema()}}}}


@router.post("/v1/responses", dependencies=[Depends(validate_json_request)], openapi_extra=DESCRIBED)
@with_cancellation  # type: ignore[untyped-decorator]
async def create_response(body: Annotated[bytes, Depends(body_of)], raw_request: Request) -> Response:
    """One turn of a dialogue."""
    found = parse_json(body)
    require_unicode(found)
    return await _answered(parse(found), raw_request)


@router.get("/v1/responses/{response_id}")
async def retrieve_response(
    response_id: str, raw_request: Request, stream: bool = False, starting_after: int = -1
) -> Response:
    """A response that was stored; of one in the background, its events too."""
    whose, jobs = tenant(raw_request), _jobs(raw_request)
    if stream:
        if (job := jobs.job(whose, response_id)) is None:
            raise BadRequest("stream: found no response of the background under this id lately", "stream")
        return DialogueStream(job.follow(starting_after), {}, silence_s(raw_request))
    return json_response(await jobs.response(whose, response_id))


@router.delete("/v1/responses/{response_id}")
async def delete_response(response_id: str, raw_request: Request) -> Response:
    """Delete a stored response. Its turn stays in its session."""
    whose = tenant(raw_request)
    await _jobs(raw_request).drop(whose, response_id)
    await record(raw_request).delete_response(whose, response_id)
    return json_response({"id": response_id, "object": "response", "deleted": True})


@router.get("/v1/responses/{response_id}/input_items")
async def list_input_items(
    response_id: str, raw_request: Request, order: Order = "desc", after: str | None = None, limit: Limit = 20
) -> Response:
    """What a stored response was asked."""
    items = await record(raw_request).input_items(tenant(raw_request), response_id)
    return json_response(page(items, order, after, limit))


@router.post("/v1/responses/{response_id}/cancel")
async def cancel_response(response_id: str, raw_request: Request) -> Response:
    """End a response in the background."""
    return json_response(await _jobs(raw_request).cancel(tenant(raw_request), response_id))


@router.post("/v1/responses/compact")
@router.post("/v1/responses/input_tokens")
async def not_supported() -> Response:
    """OpenAI's further operations; without these routes their names would be read as a response's id."""
    return failure(HTTPStatus.NOT_FOUND, "Compaction and token counting are not supported")


async def _answered(request: ResponsesRequest, raw_request: Request) -> Response:
    asking = Asking(request, raw_request, record(raw_request), dispatcher(raw_request))
    try:
        await asking.read()
    except NotFound as error:
        if asking.added is None:
            return failure(HTTPStatus.NOT_FOUND, str(error), "input")
        if request.previous_response_id is None:
            return failure(HTTPStatus.NOT_FOUND, str(error), "conversation")
        code = "previous_response_not_found"
        return failure(HTTPStatus.NOT_FOUND, str(error), "previous_response_id", code=code)
    if request.background:
        job = _jobs(raw_request).start(asking.tenant, asking.frame(), asking.shown, asking.events)
        if request.stream:
            return DialogueStream(job.follow(-1), {}, silence_s(raw_request))
        return json_response(job.response)
    if request.stream:
        return await respond_streaming(
            asking.opened(), asking.chat.routed, silence_s(raw_request), asking.failure
        )
    whole, headers = await asking.whole()
    return json_response(whole, headers)


def json_response(content: Mapping[str, Any], headers: Mapping[str, str] | None = None) -> Response:
    """An object as a reply."""
    # ASCII, as in events: half a surrogate pair can be sent so.
    return Response(json.dumps(content), headers=dict(headers or {}), media_type="application/json")


def tenant(raw_request: Request) -> str:
    """Whose request it is."""
    return tenant_of(raw_request.headers.get("authorization"))


def record(raw_request: Request) -> ObjectRecord:
    """The objects on record."""
    found: ObjectRecord = raw_request.app.state.soma_objects
    return found


def _jobs(raw_request: Request) -> BackgroundResponses:
    jobs: BackgroundResponses = raw_request.app.state.soma_background
    return jobs


def parse_json(body: bytes) -> dict[str, Any]:
    """The JSON object in a body. Raises BadRequest."""
    try:
        found = json.loads(body, parse_constant=_no_number)
    except (ValueError, RecursionError):
        raise BadRequest("body: found no valid JSON; expected a JSON object") from None
    if not isinstance(found, dict):
        raise BadRequest(f"body: found {type(found).__name__}; expected a JSON object")
    return found


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")

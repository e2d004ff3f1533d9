"""`/v1/conversations`: a conversation is a session of its id, with the items that its client put there.

Guarantees: a conversation is found in its own tenant alone; deleting it removes its session, with all branches.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from fastapi.responses import Response
from pydantic import TypeAdapter, ValidationError

from soma_vllm.api.error_responses import TranslatingRoute
from soma_vllm.api.responses.input_items import messages_of
from soma_vllm.api.responses.request import mistake
from soma_vllm.api.responses.routes import Limit, Order, body_of, json_response, parse_json, record, tenant
from soma_vllm.api.responses.stored import listed, page
from soma_vllm.api.unicode_check import require_unicode
from soma_vllm.errors import BadRequest, NotFound
from soma_vllm.types import SessionKey

router = APIRouter(prefix="/v1/conversations", route_class=TranslatingRoute)

MOST_ITEMS = 20
"""At a time, as OpenAI's."""

Body = Annotated[bytes, Depends(body_of)]

METADATA: TypeAdapter[dict[str, str]] = TypeAdapter(dict[str, str])


@router.post("")
async def create_conversation(body: Body, raw_request: Request) -> Response:
    """A new conversation, with its first items."""
    given = _read(body, "items", "metadata") if body else {}
    items, metadata = _items(given.get("items") or []), _metadata(given)
    return json_response(await record(raw_request).create(tenant(raw_request), metadata, items))


@router.get("/{conversation}")
async def retrieve_conversation(conversation: str, raw_request: Request) -> Response:
    """A conversation, without its items."""
    return json_response(await record(raw_request).conversation(tenant(raw_request), conversation))


@router.post("/{conversation}")
async def update_conversation(conversation: str, body: Body, raw_request: Request) -> Response:
    """Other metadata."""
    metadata = _metadata(_read(body, "metadata"))
    return json_response(await record(raw_request).update(tenant(raw_request), conversation, metadata))


@router.delete("/{conversation}")
async def delete_conversation(conversation: str, raw_request: Request) -> Response:
    """Remove a conversation, its items, and its session with its text and adapter."""
    await record(raw_request).delete(tenant(raw_request), conversation)
    with suppress(NotFound):
        key = SessionKey(tenant(raw_request), conversation)
        await raw_request.app.state.soma_session_admin.remove(key)
    return json_response({"id": conversation, "object": "conversation.deleted", "deleted": True})


@router.get("/{conversation}/items")
async def list_items(
    conversation: str, raw_request: Request, order: Order = "desc", after: str | None = None, limit: Limit = 20
) -> Response:
    """A page of its items."""
    items = await record(raw_request).items(tenant(raw_request), conversation)
    return json_response(page(items, order, after, limit))


@router.post("/{conversation}/items")
async def create_items(conversation: str, body: Body, raw_request: Request) -> Response:
    """Add items."""
    items = _items(_read(body, "items").get("items"))
    await record(raw_request).add_items(tenant(raw_request), conversation, items)
    return json_response(page(items, "asc", None, MOST_ITEMS))


@router.get("/{conversation}/items/{item}")
async def retrieve_item(conversation: str, item: str, raw_request: Request) -> Response:
    """One of its items."""
    return json_response(await record(raw_request).item(tenant(raw_request), conversation, item))


@router.delete("/{conversation}/items/{item}")
async def delete_item(conversation: str, item: str, raw_request: Request) -> Response:
    """The conversation without one of its items: what follows goes on in a branch of its session."""
    return json_response(await record(raw_request).delete_item(tenant(raw_request), conversation, item))


def _read(body: bytes, *names: str) -> dict[str, Any]:
    found = parse_json(body)
    require_unicode(found)
    for name in found:
        if name not in names:
            raise BadRequest(f"{name[:100]}: found an unknown parameter; expected {' and '.join(names)}", name)
    return found


def _items(given: object) -> list[dict[str, Any]]:
    """Items as they are stored. Raises BadRequest."""
    if not isinstance(given, Sequence) or not all(isinstance(item, Mapping) for item in given):
        raise mistake("items", "something else", "a list of objects")
    if len(given) > MOST_ITEMS:
        raise mistake("items", f"{len(given)} items", f"at most {MOST_ITEMS} at a time")
    if given:
        messages_of(given, "items")
    return listed(given)


def _metadata(given: Mapping[str, Any]) -> dict[str, str]:
    try:
        return METADATA.validate_python(given.get("metadata") or {}, strict=True)
    except ValidationError:
        raise mistake("metadata", "something else", "an object of texts") from None

"""Responses and conversations as clients retrieve them: put on record behind the answers, found by their ids.

Guarantees: an object belongs to the session of its turn, and goes with it; nothing is kept of a turn that is
not recorded, nor where `retention.text` keeps no text of its session; what was queued is there for the next
read.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from soma_vllm.api.responses.convert import new_id
from soma_vllm.errors import NotFound, StoreUnavailable
from soma_vllm.sessions.ports import in_time
from soma_vllm.sessions.registry import SessionRegistry
from soma_vllm.sessions.sql.stored_objects import CONVERSATION, DELETED, RESPONSE, StoredItem, StoredObject
from soma_vllm.types import SessionKey

Items = Sequence[Mapping[str, Any]]

OWN_NAME = re.compile("conv_[0-9a-f]{32}")
"""Conversations' ids of our own making: one of them that is not on record is no session's name."""


class ObjectRecord:
    """The stored objects of every tenant."""

    def __init__(self, registry: SessionRegistry) -> None:
        self._registry = registry
        self._objects = registry.store.objects

    @property
    def keeps_all(self) -> bool:
        """Whether every response is kept as long as its session."""
        return self._registry.erasure.policy == "session"

    # -- responses --------------------------------------------------------------------------------------

    def keep(self, tenant: str, response: Mapping[str, Any], given: Items, conversation: str | None) -> bool:
        """Queue a response and its input for the record; False where its turn is not on record, or without its
        text."""
        found = self._registry.index.of_response(tenant, response["id"])
        key = SessionKey(tenant, "" if found is None else found.session)
        if found is None or not self._registry.is_live(key):
            return False
        if not self._registry.erasure.on_record(self._registry.session(key).phase):
            return False
        self._put(key, response, given)
        if conversation is not None:
            added = [StoredItem(item["id"], "item", item) for item in (*given, *response["output"])]
            append = partial(self._objects.append, tenant, conversation, added)
            self._registry.keep(key, append, _size(added))
        return True

    def session_of(self, tenant: str, response: str) -> SessionKey | None:
        """The session in memory that a response belongs to."""
        found = self._registry.index.of_response(tenant, response)
        return None if found is None else SessionKey(tenant, found.session)

    def keep_state(self, tenant: str, response: Mapping[str, Any]) -> None:
        """Queue the state of a response that no turn stands behind, or no turn yet: without any text."""
        self._put(SessionKey(tenant, ""), {**response, "output": [], "instructions": None}, ())

    async def settled(self) -> None:
        """Return when what was queued is on record. Raises StoreUnavailable."""
        await in_time(self._registry.written())

    def _put(self, key: SessionKey, response: Mapping[str, Any], given: Items) -> None:
        stored = StoredObject(response["id"], RESPONSE, key.session, response, time.time())
        items = [StoredItem(item["id"], "input", item) for item in given]
        items += [StoredItem(item["id"], "output", item) for item in response["output"]]
        self._registry.keep(key, partial(self._objects.put, key.tenant, stored, items), _size(items))

    async def response(self, tenant: str, id: str) -> dict[str, Any]:
        """A response on record. Raises NotFound, StoreUnavailable."""
        return dict((await self._found(tenant, id, RESPONSE)).data)

    async def input_items(self, tenant: str, id: str) -> list[Mapping[str, Any]]:
        """What a response was asked. Raises NotFound, StoreUnavailable."""
        await self._found(tenant, id, RESPONSE)
        items = await in_time(self._objects.items(tenant, id))
        return [item.data for item in items if item.part == "input"]

    async def delete_response(self, tenant: str, id: str) -> None:
        """Delete a response; no request goes on from it any more. Raises NotFound, StoreUnavailable."""
        await self.settled()  # a queued state would bring it back
        found = await self._found(tenant, id, RESPONSE)
        grave = StoredObject(id, DELETED, found.session, {})
        await in_time(self._objects.put(tenant, grave))

    async def require_there(self, tenant: str, id: str) -> None:
        """Check that a response was not deleted. Raises NotFound."""
        try:
            found = await in_time(self._objects.find(tenant, id))
        except StoreUnavailable:
            return  # what is in memory can be gone on from
        if found is not None and found.kind == DELETED:
            raise NotFound(f"no response {id!r}")

    async def resolved(self, tenant: str, given: str | Items) -> str | Items:
        """The input with the items that its references name.

        Raises:
            NotFound: one of them is not on record.
            StoreUnavailable: the store did not answer.
        """
        if isinstance(given, str):
            return given
        ids = [str(item.get("id")) for item in given if is_reference(item)]
        if not ids:
            return given
        await self.settled()
        found = await in_time(self._objects.items_named(tenant, ids))
        for index, item in enumerate(given):
            if is_reference(item) and str(item.get("id")) not in found:
                raise NotFound(f"input[{index}].id: found no item {str(item.get('id'))[:100]!r} on record")
        return [found[str(item["id"])].data if is_reference(item) else item for item in given]

    # -- conversations ----------------------------------------------------------------------------------

    async def create(self, tenant: str, metadata: Mapping[str, str], items: Items) -> dict[str, Any]:
        """A new conversation. Raises StoreUnavailable."""
        id = new_id("conv")
        data = {
            "id": id,
            "object": "conversation",
            "created_at": int(time.time()),
            "metadata": dict(metadata),
        }
        added = [StoredItem(item["id"], "item", item) for item in items]
        await in_time(self._objects.put(tenant, StoredObject(id, CONVERSATION, id, data), added))
        return data

    async def conversation(self, tenant: str, id: str) -> dict[str, Any]:
        """A conversation. Raises NotFound, StoreUnavailable."""
        return dict((await self._found(tenant, id, CONVERSATION)).data)

    async def update(self, tenant: str, id: str, metadata: Mapping[str, str]) -> dict[str, Any]:
        """A conversation with other metadata. Raises NotFound, StoreUnavailable."""
        found = await self._found(tenant, id, CONVERSATION)
        data = {**found.data, "metadata": dict(metadata)}
        await in_time(self._objects.change(tenant, id, data))
        return data

    async def delete(self, tenant: str, id: str) -> None:
        """Delete a conversation and its items. Raises NotFound, StoreUnavailable."""
        await self._found(tenant, id, CONVERSATION)
        await in_time(self._objects.remove(tenant, id))

    async def items(self, tenant: str, id: str) -> list[Mapping[str, Any]]:
        """A conversation's items. Raises NotFound, StoreUnavailable."""
        await self._found(tenant, id, CONVERSATION)
        return [item.data for item in await in_time(self._objects.items(tenant, id))]

    async def history(self, tenant: str, id: str) -> list[Mapping[str, Any]] | None:
        """The items of a conversation; None where the name is a session's alone.

        Raises:
            NotFound: the name is of our own making, and there is no such conversation.
            StoreUnavailable: the store did not answer.
        """
        try:
            return await self.items(tenant, id)
        except NotFound:
            if OWN_NAME.fullmatch(id):
                raise
            return None

    async def add_items(self, tenant: str, id: str, items: Items) -> None:
        """Add to a conversation. Raises NotFound, StoreUnavailable."""
        await self._found(tenant, id, CONVERSATION)
        added = [StoredItem(item["id"], "item", item) for item in items]
        await in_time(self._objects.append(tenant, id, added))

    async def item(self, tenant: str, id: str, item: str) -> Mapping[str, Any]:
        """One item of a conversation. Raises NotFound, StoreUnavailable."""
        found = next((each for each in await self.items(tenant, id) if each["id"] == item), None)
        if found is None:
            raise NotFound(f"no item {item!r} in this conversation")
        return found

    async def delete_item(self, tenant: str, id: str, item: str) -> dict[str, Any]:
        """The conversation without one of its items. Raises NotFound, StoreUnavailable."""
        await self.item(tenant, id, item)
        await in_time(self._objects.remove_item(tenant, id, item))
        return await self.conversation(tenant, id)

    async def _found(self, tenant: str, id: str, kind: str) -> StoredObject:
        found = await in_time(self._objects.find(tenant, id))
        if found is None or found.kind == CONVERSATION:
            await self.settled()  # it, or its latest items, may still be queued
            found = await in_time(self._objects.find(tenant, id))
        if found is None or found.kind != kind:
            raise NotFound(f"no {kind} {id[:200]!r}")
        return found


def is_reference(item: Mapping[str, Any]) -> bool:
    """Whether an item of an input stands for one that is on record."""
    kind = item.get("type")
    return kind == "item_reference" or (kind is None and "role" not in item and "id" in item)


def listed(given: str | Items) -> list[dict[str, Any]]:
    """An input's items as they are shown: with ids, and with their text in parts."""
    items: Items = [{"role": "user", "content": given}] if isinstance(given, str) else given
    return [_shown(item) for item in items]


_PREFIXES = {"function_call": "fc", "function_call_output": "fco", "reasoning": "rs"}


def _shown(item: Mapping[str, Any]) -> dict[str, Any]:
    kind = str(item.get("type") or "message")
    id = item.get("id")
    named = id if isinstance(id, str) and 0 < len(id) <= 100 else new_id(_PREFIXES.get(kind, "msg"))
    shown = {**item, "id": named, "type": kind}
    if kind == "reasoning":
        return shown
    shown["status"] = item.get("status") or "completed"
    if kind == "message" and isinstance(item.get("content"), str):
        answer = item.get("role") == "assistant"
        part = {"type": "output_text" if answer else "input_text", "text": item["content"]}
        shown["content"] = [{**part, "annotations": [], "logprobs": []} if answer else part]
    return shown


def page(items: Items, order: str, after: str | None, limit: int) -> dict[str, Any]:
    """A page of a list of items, as OpenAI's clients turn them.

    Raises:
        NotFound: there is no item `after`.
    """
    ordered = list(items) if order == "asc" else list(reversed(items))
    if after is not None:
        place = next((place for place, item in enumerate(ordered) if item["id"] == after), None)
        if place is None:
            raise NotFound(f"after: found no item {after[:100]!r} in this list")
        ordered = ordered[place + 1 :]
    shown = ordered[:limit]
    ends = (
        {"first_id": shown[0]["id"], "last_id": shown[-1]["id"]} if shown else {"first_id": "", "last_id": ""}
    )
    return {"object": "list", "data": shown, **ends, "has_more": len(ordered) > limit}


def _size(items: Sequence[StoredItem]) -> int:
    """About how many characters are to be kept."""
    return sum(len(json.dumps(item.data)) for item in items)

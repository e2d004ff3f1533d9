"""Responses and conversations as openai-python retrieves them, on a real record."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI
from support.guard import GUARD_S
from support.responses_services import closed, openai_client, opened
from support.services import Services

from soma_vllm.scheduler.dispatcher import ChatRequest
from soma_vllm.sessions.sql.store import SessionStore
from soma_vllm.sessions.state.identity import tenant_of
from soma_vllm.types import SessionKey

TENANT = tenant_of("Bearer k")


@pytest.fixture
async def services(store: SessionStore) -> AsyncIterator[Services]:
    services = await opened(store)
    yield services
    await closed(services)


@pytest.fixture
def client(services: Services) -> AsyncOpenAI:
    return openai_client(services.dispatcher, "k", services.session_admin)


def heard(services: Services) -> list[Any]:
    return [message["content"] for message in services.original.calls[-1].body["messages"]]


async def streamed(client: AsyncOpenAI, **asked: Any) -> Any:
    async for event in await client.responses.create(model="soma", stream=True, **asked):
        last = event
    return last.response  # type: ignore[union-attr]


# -- responses --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
async def test_a_stored_response_is_retrieved_as_it_was_given(client: AsyncOpenAI, stream: bool) -> None:
    asked: dict[str, Any] = {"input": [{"role": "user", "content": "hello"}], "instructions": "be brief"}
    given = await streamed(client, **asked) if stream else await client.responses.create(model="soma", **asked)
    found = await client.responses.retrieve(given.id)
    assert found.to_dict() == given.to_dict()
    items = await client.responses.input_items.list(given.id)
    assert [item.content[0].text for item in items.data] == ["hello"]  # type: ignore[union-attr]


async def test_it_survives_a_restart_and_no_other_tenant_sees_it(
    store: SessionStore, services: Services, client: AsyncOpenAI
) -> None:
    given = await client.responses.create(model="soma", input="hello")
    await services.registry.written()
    again = await opened(store)
    try:
        found = await openai_client(again.dispatcher, "k").responses.retrieve(given.id)
        assert found.output_text == "one"
        other = openai_client(again.dispatcher, "other")
        for ask in (other.responses.retrieve, other.responses.delete, other.responses.input_items.list):
            with pytest.raises(openai.NotFoundError):
                await ask(given.id)  # type: ignore[operator]
    finally:
        await again.registry.stop()


async def test_a_deleted_response_is_gone_and_nothing_goes_on_from_it(client: AsyncOpenAI) -> None:
    given = await client.responses.create(model="soma", input="hello")
    await client.responses.delete(given.id)
    with pytest.raises(openai.NotFoundError):
        await client.responses.retrieve(given.id)
    with pytest.raises(openai.NotFoundError) as caught:
        await client.responses.create(model="soma", input="more", previous_response_id=given.id)
    assert caught.value.code == "previous_response_not_found"


async def test_a_response_goes_with_its_session(services: Services, client: AsyncOpenAI) -> None:
    raw = await client.responses.with_raw_response.create(model="soma", input="hello")
    await services.session_admin.remove(SessionKey(TENANT, raw.headers["x-soma-session"]))
    with pytest.raises(openai.NotFoundError):
        await client.responses.retrieve(raw.parse().id)


async def test_input_items_are_turned_page_by_page(client: AsyncOpenAI) -> None:
    items: list[Any] = [{"role": "user", "content": f"q{number}"} for number in range(5)]
    given = await client.responses.create(model="soma", input=items)
    pages = await client.responses.input_items.list(given.id, limit=2, order="asc")
    found = [item.content[0].text async for item in pages]  # type: ignore[union-attr]
    assert found == [f"q{number}" for number in range(5)]
    with pytest.raises(openai.APIStatusError):
        await client.responses.input_items.list(given.id, limit=0)


async def test_a_reference_stands_for_the_item_that_it_names(services: Services, client: AsyncOpenAI) -> None:
    first = await client.responses.create(model="soma", input="hello")
    reference: Any = {"type": "item_reference", "id": first.output[0].id}
    for named in (reference, {"id": first.output[0].id}):
        history: list[Any] = [{"role": "user", "content": "hello"}, named, {"role": "user", "content": "more"}]
        await client.responses.create(model="soma", input=history)
        assert heard(services) == ["hello", "one", "more"]
    with pytest.raises(openai.NotFoundError):
        await client.responses.create(model="soma", input=[{"type": "item_reference", "id": "msg_none"}])
    other = openai_client(services.dispatcher, "other")
    with pytest.raises(openai.NotFoundError):
        await other.responses.create(model="soma", input=[reference])


@pytest.mark.parametrize("text", ["never", "until_adapted"])
async def test_retention_keeps_responses_as_it_keeps_text(store: SessionStore, text: str) -> None:
    services = await opened(store, retention={"text": text})
    client = openai_client(services.dispatcher, "k")
    try:
        given = await client.responses.create(model="soma", input="hello")
        if text == "never":
            with pytest.raises(openai.NotFoundError):
                await client.responses.retrieve(given.id)
        else:
            assert (await client.responses.retrieve(given.id)).output_text == "one"
        with pytest.raises(openai.BadRequestError, match=r"retention\.text"):
            await client.responses.create(model="soma", input="hello", background=True)
    finally:
        await services.registry.stop()


async def test_old_text_and_unused_objects_are_swept(store: SessionStore) -> None:
    services = await opened(store, retention={"text_ttl_s": 1e-3, "session_ttl_s": 1e-3})
    client = openai_client(services.dispatcher, "k")
    try:
        conversation = await client.conversations.create()
        given = await client.responses.create(model="soma", input="hello")
        await services.registry.written()
        await asyncio.sleep(0.01)
        await services.retention.sweep()
        with pytest.raises(openai.NotFoundError):
            await client.responses.retrieve(given.id)
        with pytest.raises(openai.NotFoundError):
            await client.conversations.retrieve(conversation.id)
    finally:
        await services.registry.stop()


# -- store: false -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("route", ["responses", "chat"])
async def test_what_is_not_to_be_stored_is_kept_nowhere_and_never_teaches(
    store: SessionStore, route: str
) -> None:
    services = await opened(store, warm_window=2)
    client = openai_client(services.dispatcher, "k")
    history: list[Any] = []
    try:
        for turn in range(4):
            history.append({"role": "user", "content": f"secret {turn}"})
            if route == "chat":
                body = {"model": "soma", "messages": history, "store": False}
                answer = await services.dispatcher.chat(ChatRequest(body, {"authorization": "Bearer k"}))
                assert answer.reply.body is not None
                said = answer.reply.body["choices"][0]["message"]["content"]
                session = answer.headers["X-SOMA-Session"]
            else:
                raw = await client.responses.with_raw_response.create(model="soma", input=history, store=False)
                said, session = raw.parse().output_text, raw.headers["x-soma-session"]
                with pytest.raises(openai.NotFoundError):
                    await client.responses.retrieve(raw.parse().id)
            history.append({"role": "assistant", "content": said})
        await services.settled()
        await services.registry.written()
        key = SessionKey(TENANT, session)
        events = await store.events(key)
        assert [event.text for event in events] == [None] * len(events)
        assert "secret" not in str(events) + str(services.registry.events(key))
        assert {turn.unteachable() for turn in services.registry.session(key).turns} == {
            "its request says store: false"
        }
        assert "adaptation_started" not in [event.kind for event in events]
        assert len(services.registry.session(key).turns) == 4
    finally:
        await services.background.stop()
        await services.registry.stop()


# -- background -------------------------------------------------------------------------------------------


async def status(client: AsyncOpenAI, id: str, *wanted: str) -> Any:
    async with asyncio.timeout(GUARD_S):
        while (found := await client.responses.retrieve(id)).status not in wanted:
            await asyncio.sleep(0)
    return found


async def test_a_response_in_the_background_is_queued_then_made(
    services: Services, client: AsyncOpenAI
) -> None:
    services.original.go.clear()
    given = await client.responses.create(model="soma", input="hello", background=True)
    assert (given.status, given.background) == ("queued", True)
    assert (await client.responses.retrieve(given.id)).status == "queued"
    services.original.go.set()
    found = await status(client, given.id, "completed")
    assert found.output_text == "one"
    await client.responses.create(model="soma", input="more", previous_response_id=given.id)
    assert heard(services) == ["hello", "one", "more"]
    assert (await client.responses.cancel(given.id)).status == "completed"


async def test_it_can_be_cancelled_and_deleted_on_the_way(services: Services, client: AsyncOpenAI) -> None:
    services.original.go.clear()
    given = await client.responses.create(model="soma", input="hello", background=True)
    await asyncio.wait_for(services.original.called.wait(), GUARD_S)
    assert (await client.responses.cancel(given.id)).status == "cancelled"
    assert (await client.responses.retrieve(given.id)).status == "cancelled"
    assert services.original.closed_early.is_set()
    other = await client.responses.create(model="soma", input="hello", background=True)
    await client.responses.delete(other.id)
    with pytest.raises(openai.NotFoundError):
        await client.responses.retrieve(other.id)
    services.original.go.set()
    plain = await client.responses.create(model="soma", input="hello")
    with pytest.raises(openai.BadRequestError):
        await client.responses.cancel(plain.id)


async def test_its_events_can_be_followed_from_any_number_on(services: Services, client: AsyncOpenAI) -> None:
    numbers: list[int] = []
    async for event in await client.responses.create(model="soma", input="x", background=True, stream=True):
        numbers.append(event.sequence_number)
        if event.type == "response.created":
            id = event.response.id
    assert numbers == list(range(len(numbers)))
    rest = [
        event.sequence_number
        async for event in await client.responses.retrieve(id, stream=True, starting_after=1)
    ]
    assert rest == numbers[2:]
    key = next(key for key, event in services.events if event.kind == "turn")
    await services.session_admin.remove(key)
    with pytest.raises(openai.BadRequestError, match="found no response of the background"):
        await client.responses.retrieve(id, stream=True)


async def test_a_failure_in_the_background_is_told_and_a_restart_is_one(
    store: SessionStore, services: Services, client: AsyncOpenAI
) -> None:
    given = await client.responses.create(model="none", input="x", background=True)
    found = await status(client, given.id, "failed")
    assert "expected one of soma" in found.error.message
    services.original.go.clear()
    under_way = await client.responses.create(model="soma", input="x", background=True)
    await services.registry.written()
    again = await opened(store)
    try:
        left = await openai_client(again.dispatcher, "k").responses.retrieve(under_way.id)
        assert left.status == "failed"
    finally:
        await again.registry.stop()
        services.original.go.set()
        await status(client, under_way.id, "completed")


# -- conversations ----------------------------------------------------------------------------------------


async def test_a_conversation_holds_items_and_is_one_session(services: Services, client: AsyncOpenAI) -> None:
    first: Any = {"type": "message", "role": "user", "content": "my name is Ana"}
    made = await client.conversations.create(metadata={"topic": "names"}, items=[first])
    for turn in range(2):
        raw = await client.responses.with_raw_response.create(
            model="soma", input=f"q{turn}", conversation=made.id
        )
        assert raw.headers["x-soma-session"] == made.id
    assert heard(services) == ["my name is Ana", "q0", "one", "q1"]
    assert len(services.registry.session(SessionKey(TENANT, made.id)).turns) == 2
    pages = await client.conversations.items.list(made.id, order="asc", limit=2)
    texts = [item.content[0].text async for item in pages]  # type: ignore[union-attr]
    assert texts == ["my name is Ana", "q0", "one", "q1", "two"]
    assert (await client.conversations.retrieve(made.id)).metadata == {"topic": "names"}
    assert (await client.conversations.update(made.id, metadata={"a": "b"})).metadata == {"a": "b"}
    assert len([item async for item in await client.conversations.items.list(made.id)]) == 5


async def test_items_are_added_shown_and_deleted_one_by_one(services: Services, client: AsyncOpenAI) -> None:
    made = await client.conversations.create()
    said: list[Any] = [
        {"type": "message", "role": "user", "content": "hello"},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "hi"}]},
    ]
    added = await client.conversations.items.create(made.id, items=said)
    assert [item.role for item in added.data] == ["user", "assistant"]  # type: ignore[union-attr]
    shown = await client.conversations.items.retrieve(added.data[1].id, conversation_id=made.id)  # type: ignore[arg-type]
    assert shown.content[0].text == "hi"  # type: ignore[union-attr]
    await client.responses.create(model="soma", input="more", conversation=made.id)
    assert heard(services) == ["hello", "hi", "more"]
    await client.conversations.items.delete(added.data[1].id, conversation_id=made.id)  # type: ignore[arg-type]
    await client.responses.create(model="soma", input="again", conversation=made.id)
    assert heard(services) == ["hello", "more", "one", "again"]
    with pytest.raises(openai.NotFoundError):
        await client.conversations.items.retrieve("msg_none", conversation_id=made.id)
    with pytest.raises(openai.BadRequestError):
        await client.conversations.items.create(made.id, items=[{"type": "message", "role": "user"}] * 21)  # type: ignore[typeddict-item]


async def test_a_deleted_conversation_takes_its_session_along(services: Services, client: AsyncOpenAI) -> None:
    made = await client.conversations.create()
    await client.responses.create(model="soma", input="q0", conversation=made.id)
    assert (await client.conversations.delete(made.id)).deleted
    assert not await services.registry.store.events(SessionKey(TENANT, made.id))
    for ask in (client.conversations.retrieve, client.conversations.delete, client.conversations.items.list):
        with pytest.raises(openai.NotFoundError):
            await ask(made.id)  # type: ignore[operator]
    with pytest.raises(openai.NotFoundError):
        await client.responses.create(model="soma", input="q1", conversation=made.id)


async def test_another_tenants_conversation_is_not_found(services: Services, client: AsyncOpenAI) -> None:
    made = await client.conversations.create()
    other = openai_client(services.dispatcher, "other")
    with pytest.raises(openai.NotFoundError):
        await other.conversations.items.list(made.id)
    with pytest.raises(openai.NotFoundError):
        await other.responses.create(model="soma", input="q", conversation=made.id)


async def test_a_conversation_keeps_what_is_said_in_it(client: AsyncOpenAI) -> None:
    made = await client.conversations.create()
    with pytest.raises(openai.BadRequestError) as caught:
        await client.responses.create(model="soma", input="q", conversation=made.id, store=False)
    assert caught.value.param == "store"

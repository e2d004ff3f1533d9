"""The Responses API over the real dispatcher: whichever way its history comes, a dialogue is one session."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI
from support.responses_services import closed, openai_client, opened
from support.services import Services

from soma_vllm.sessions.sql.store import SessionStore
from soma_vllm.sessions.state.identity import tenant_of
from soma_vllm.sessions.state.session import Session
from soma_vllm.types import SessionKey


@pytest.fixture
async def services(store: SessionStore) -> AsyncIterator[Services]:
    services = await opened(store)
    yield services
    await closed(services)


class Client:
    """An OpenAI client that notes which session answered."""

    def __init__(self, services: Services, key: str = "k") -> None:
        self._house = services
        self._tenant = tenant_of(f"Bearer {key}")
        self.openai: AsyncOpenAI = openai_client(services.dispatcher, key)
        self.sessions: list[str] = []

    async def say(self, given: Any, streamed: bool = False, **more: Any) -> Any:
        if streamed:
            raw = await self.openai.responses.with_raw_response.create(
                model="soma", input=given, stream=True, **more
            )
            async for event in raw.parse():
                last = event
            answer: Any = last.response
        else:
            raw = await self.openai.responses.with_raw_response.create(model="soma", input=given, **more)
            answer = raw.parse()
        self.sessions.append(raw.headers["x-soma-session"])
        return answer

    def session(self, name: str | None = None) -> Session:
        found: Session = self._house.registry.session(SessionKey(self._tenant, name or self.sessions[-1]))
        return found

    def prompt(self) -> list[Any]:
        """What the original was asked last."""
        asked: list[Any] = self._house.original.calls[-1].body["messages"]
        return asked


@pytest.fixture
def client(services: Services) -> Client:
    return Client(services)


@pytest.mark.parametrize("streamed", [False, True])
async def test_previous_responses_make_one_session(client: Client, streamed: bool) -> None:
    previous = None
    for turn in range(3):
        more = {} if previous is None else {"previous_response_id": previous}
        previous = (await client.say(f"q{turn}", streamed, **more)).id
    assert len(set(client.sessions)) == 1
    assert [turn.answer for turn in client.session().turns] == ["one", "two", "three"]
    assert [message["content"] for message in client.prompt()] == ["q0", "one", "q1", "two", "q2"]


async def test_a_history_sent_as_items_is_the_same_session(client: Client) -> None:
    items: list[Any] = [{"role": "user", "content": "q0"}]
    for turn in range(3):
        answer = await client.say(items)
        items += [*(item.to_dict() for item in answer.output), {"role": "user", "content": f"q{turn + 1}"}]
    assert len(set(client.sessions)) == 1
    assert len(client.session().turns) == 3


async def test_a_client_may_change_from_items_to_the_previous_response_and_back(client: Client) -> None:
    first = await client.say("q0")
    second = await client.say("q1", previous_response_id=first.id)
    history: list[Any] = [
        {"role": "user", "content": "q0"},
        *(item.to_dict() for item in first.output),
        {"role": "user", "content": "q1"},
        *(item.to_dict() for item in second.output),
        {"role": "user", "content": "q2"},
    ]
    await client.say(history)
    assert len(set(client.sessions)) == 1
    assert len(client.session().turns) == 3


async def test_a_conversation_is_a_session_of_its_name(client: Client) -> None:
    for turn in range(3):
        await client.say(f"q{turn}", conversation="c1")
    assert client.sessions == ["c1"] * 3
    assert len(client.session().turns) == 3
    assert [message["content"] for message in client.prompt()] == ["q0", "one", "q1", "two", "q2"]


async def test_metadata_names_a_session(client: Client) -> None:
    first = await client.say("q0", metadata={"session_id": "m1"})
    await client.say("q1", previous_response_id=first.id)
    assert client.sessions == ["m1", "m1"]
    assert len(client.session().turns) == 2


@pytest.mark.parametrize("way", ["previous", "conversation"])
async def test_the_same_instructions_on_every_turn_are_one_session(client: Client, way: str) -> None:
    more: dict[str, Any] = {"conversation": "c1"} if way == "conversation" else {}
    for turn in range(3):
        answer = await client.say(f"q{turn}", instructions="be brief", **more)
        more = more if way == "conversation" else {"previous_response_id": answer.id}
    assert len(set(client.sessions)) == 1
    assert len(client.session().turns) == 3
    assert [message["role"] for message in client.prompt()].count("system") == 1


@pytest.mark.parametrize("way", ["previous", "conversation"])
async def test_other_instructions_go_on_in_the_session_and_the_old_ones_are_gone(
    client: Client, way: str
) -> None:
    more: dict[str, Any] = {"conversation": "c1"} if way == "conversation" else {}
    first = await client.say("q0", instructions="be brief", **more)
    more = more or {"previous_response_id": first.id}
    await client.say("q1", instructions="be rich", **more)
    assert client.sessions[0] == client.sessions[1]
    head, *rest = client.prompt()
    assert head["content"] == [{"type": "text", "text": "be rich"}]
    assert [message["content"] for message in rest] == ["q0", "one", "q1"]
    assert len(client.session().turns) == 2


async def test_without_instructions_the_former_ones_are_gone(client: Client) -> None:
    first = await client.say("q0", instructions="be brief")
    second = await client.say("q1", previous_response_id=first.id)
    assert [message["role"] for message in client.prompt()] == ["user", "assistant", "user"]
    await client.say("q2", previous_response_id=second.id)
    assert [message["role"] for message in client.prompt()].count("system") == 0
    assert len(set(client.sessions)) == 1


async def test_a_developers_message_stays_in_the_dialogue(client: Client) -> None:
    items: list[Any] = [{"role": "developer", "content": "be brief"}, {"role": "user", "content": "q0"}]
    first = await client.say(items)
    await client.say("q1", previous_response_id=first.id)
    assert [message["role"] for message in client.prompt()] == ["system", "user", "assistant", "user"]
    assert len(set(client.sessions)) == 1


async def test_of_two_answers_to_one_response_either_may_be_gone_on_from(client: Client) -> None:
    first = await client.say("q0")
    left, _ = [await client.say(query, previous_response_id=first.id) for query in ("left", "right")]
    assert len(set(client.sessions)) == 1
    assert [turn.answer for turn in client.session().turns] == ["one", "three"]
    assert [message["content"] for message in client.prompt()] == ["q0", "one", "right"]
    await client.say("on", previous_response_id=left.id)
    assert [message["content"] for message in client.prompt()] == ["q0", "one", "left", "two", "on"]
    assert [turn.answer for turn in client.session().turns] == ["one", "two", "four"]
    assert len(set(client.sessions)) == 1


async def test_a_response_is_found_after_a_restart(store: SessionStore) -> None:
    before = await opened(store)
    first = await Client(before).say("q0", instructions="be brief")
    await closed(before)
    after = await opened(store)
    client = Client(after)
    await client.say("q1", instructions="be brief", previous_response_id=first.id)
    assert len(client.session().turns) == 2
    await closed(after)


async def test_another_tenants_response_is_not_found(services: Services, client: Client) -> None:
    mine = await client.say("secret")
    with pytest.raises(openai.NotFoundError):
        await Client(services, key="other").say("x", previous_response_id=mine.id)
    stranger = Client(services, key="other")
    await client.say("secret", conversation="c1")
    await stranger.say("q", conversation="c1")
    assert [message["content"] for message in stranger.prompt()] == ["q"]


async def test_a_text_that_was_not_kept_is_said_to_be_missing(store: SessionStore) -> None:
    before = await opened(store, retention={"text": "never"})
    first = await Client(before).say("q0")
    await closed(before)
    after = await opened(store, retention={"text": "never"})
    with pytest.raises(openai.UnprocessableEntityError, match="not kept"):
        await Client(after).say("q1", previous_response_id=first.id)
    await closed(after)


async def test_a_plain_turn_teaches_as_that_of_a_chat_would(store: SessionStore) -> None:
    services = await opened(store, original={"api": "vllm"}, lora={"objective": "kd"})
    await Client(services).say("q0", instructions="be brief", metadata={"a": "b"}, user="u")
    assert "logprobs" in services.original.calls[-1].body
    await closed(services)

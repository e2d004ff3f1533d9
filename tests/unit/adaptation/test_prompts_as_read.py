"""What is judged and trained on is what the surrogate's engine reads; what it cannot read does not teach."""

from __future__ import annotations

from typing import Any

from support.services import Build, Services

from soma_vllm.sessions.state.phases import Phase

TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]


async def talk(services: Services, queries: list[str], **fields: Any) -> None:
    history: list[dict[str, Any]] = []
    for query in queries:
        await services.say(history, query, headers={"x-soma-force": "adapter"}, **fields)
    await services.settled()


def of_kind(services: Services, kind: str) -> list[dict[str, Any]]:
    return [dict(event.data) for _, event in services.events if event.kind == kind]


async def test_examples_bring_the_prompt_that_the_engine_reads(build: Build) -> None:
    services = build()
    await services.registry.start()
    await talk(services, ["one", "two"])
    (request,) = services.trainer.requests
    for example in (*request.examples, *request.held_out):
        assert example.prompt is not None
        assert len(example.prompt) == len(str(example.body["messages"]).split())


async def test_what_a_request_has_beside_its_messages_is_shown_judged_and_trained_on(build: Build) -> None:
    services = build()
    await services.registry.start()
    fields = {"tools": TOOLS, "chat_template_kwargs": {"enable_thinking": False}}
    await talk(services, ["one", "two"], **fields)
    (request,) = services.trainer.requests
    for example in (*request.examples, *request.held_out):
        assert example.fields == fields
    shadows = [call.body for call in services.surrogate.calls]
    assert shadows
    for body in shadows:
        assert {name: body[name] for name in fields} == fields
        assert body["tool_choice"] == "none"  # an answer in words, whatever parser the engine has


async def test_a_turn_that_the_surrogate_cannot_read_does_not_teach_and_others_do(build: Build) -> None:
    services = build(warm_window=3)
    await services.registry.start()
    services.surrogate.unreadable = "picture"
    history: list[dict[str, Any]] = []
    for query in ("one", "two", "a picture"):
        await services.say(history, query, headers={"x-soma-force": "adapter"})
    await services.settled()
    (skipped,) = of_kind(services, "turn_skipped")
    assert skipped["turn"] == 3
    assert skipped["why"] == "the surrogate cannot read it: chat_template_refused"
    assert [turn.teaches() for turn in services.session().turns] == [True, True, False]
    (request,) = services.trainer.requests
    assert [e.turn for e in (*request.examples, *request.held_out)] == [1, 2]
    assert services.session().phase is Phase.SWITCHED


async def test_a_session_whose_every_turn_the_surrogate_refuses_stays_with_the_original(build: Build) -> None:
    services = build()
    await services.registry.start()
    services.surrogate.unreadable = "one"  # the first question stands in every prompt
    await talk(services, ["one", "two"])
    assert of_kind(services, "training_failed") == []
    (refused,) = of_kind(services, "refused")
    assert not refused["found_wanting"]
    why = "turn 2: the surrogate cannot read it: chat_template_refused"
    assert refused["reason"] == f"found 0 turns that teach; expected at least 2; {why}"
    assert services.session().phase is Phase.ORIGINAL_ONLY


async def test_a_prompt_that_leaves_no_room_for_its_answer_does_not_teach(build: Build) -> None:
    services = build(surrogate={"max_model_len": 12, "max_loras": 1})
    await services.registry.start()
    await talk(services, ["one", "two " * 20])
    (skipped,) = of_kind(services, "turn_skipped")
    assert (skipped["turn"], skipped["why"]) == (2, "the surrogate cannot read it: context_length_exceeded")


async def test_fields_and_skipped_turns_are_there_after_a_restart(build: Build) -> None:
    services = build(warm_window=3)
    await services.registry.start()
    services.surrogate.unreadable = "picture"
    history: list[dict[str, Any]] = []
    for query in ("one", "two", "a picture"):
        await services.say(history, query, tools=TOOLS)
    await services.settled()
    key = services.session().key
    await services.stop()
    from soma_vllm.sessions.state.fold import restore

    events = await services.store.events(key)
    turns = restore(key, events, services.config.gate).turns
    assert [turn.fields for turn in turns] == [{"tools": TOOLS}] * 3
    assert turns[2].unteachable() == "the surrogate cannot read it: chat_template_refused"

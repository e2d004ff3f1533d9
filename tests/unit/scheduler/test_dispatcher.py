"""The way of a request, with engines whose timing the test controls."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from support.guard import GUARD_S
from support.services import Build, Services

from soma_vllm.errors import (
    AdapterRejected,
    BadRequest,
    EngineRefused,
    EngineUnavailable,
    NotFound,
    TooManyRequests,
    TrainingError,
)
from soma_vllm.scheduler.dispatcher import ChatRequest
from soma_vllm.sessions.state.phases import Phase
from soma_vllm.types import Agreement, Candidate

History = list[dict[str, Any]]
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]


async def warmed(services: Services, session: str = "s", key: str = "k") -> History:
    history: History = []
    for number in (1, 2):
        await services.say(history, f"question {number}", session, key=key)
    await services.settled()
    return history


async def test_the_original_answers_the_warm_start_and_the_surrogate_what_follows(services: Services) -> None:
    history = await warmed(services)
    answer = await services.say(history, "question 3")
    assert answer.headers["X-SOMA-Engine"] == "surrogate"
    assert answer.headers["X-SOMA-Phase"] == "SWITCHED"
    assert [t.engine for t in services.session().turns] == ["original", "original", "surrogate"]


async def test_a_plain_surrogate_that_passes_costs_no_training(services: Services) -> None:
    await warmed(services)
    assert services.session().serving is Candidate.PLAIN
    assert services.trainer.requests == []


async def test_an_adapter_is_trained_where_the_plain_surrogate_fails(services: Services) -> None:
    services.surrogate.answers = ["different", "same"]
    history = await warmed(services)
    assert services.session().serving is Candidate.ADAPTER
    answer = await services.say(history, "question 3")
    assert answer.headers["X-SOMA-Adapter"] == "adapter-s-1"
    order = ["training_submitted", "trained", "adapter_published", "adapter_loaded", "judged", "switched"]
    assert [kind for kind in services.kinds() if kind in order] == order


async def test_candidates_are_judged_on_turns_that_were_not_trained_on(services: Services) -> None:
    services.surrogate.answers = ["different"]
    await warmed(services)
    (request,) = services.trainer.requests
    trained, held_out = {e.turn for e in request.examples}, {e.turn for e in request.held_out}
    assert trained
    assert held_out
    assert not trained & held_out


async def test_a_refused_adapter_leaves_the_engine_before_its_files_are_deleted(services: Services) -> None:
    services.surrogate.answers = ["different"]
    await warmed(services)
    assert services.session().phase is Phase.ORIGINAL_ONLY
    assert services.surrogate.log == ["load adapter-s-1", "unload adapter-s-1", "delete adapter-s-1"]


async def test_an_adapter_that_scores_worse_than_the_plain_surrogate_never_serves(services: Services) -> None:
    services.surrogate.answers = ["different", "same"]
    services.trainer.adapted = Agreement(2.0, 0.9, 10)
    await warmed(services)
    assert services.session().phase is Phase.ORIGINAL_ONLY


async def test_nobody_waits_for_training(services: Services) -> None:
    services.surrogate.answers = ["different", "same"]
    services.trainer.go.clear()
    history: History = []
    async with asyncio.timeout(GUARD_S):
        for number in range(1, 5):
            answer = await services.say(history, f"question {number}")
            assert answer.headers["X-SOMA-Engine"] == "original"
    assert services.session().phase is Phase.ADAPTING
    services.trainer.go.set()
    await services.settled()
    assert services.session().phase is Phase.SWITCHED


async def test_a_failed_training_leaves_the_session_to_the_original(services: Services) -> None:
    services.surrogate.answers = ["different"]
    services.trainer.failure = TrainingError("the loss was not a number")
    history = await warmed(services)
    assert services.session().phase is Phase.ORIGINAL_ONLY
    answer = await services.say(history, "question 3")
    assert answer.headers["X-SOMA-Engine"] == "original"


async def test_a_surrogate_that_fails_before_its_first_token_is_made_good_by_the_original(
    services: Services,
) -> None:
    history = await warmed(services)
    services.surrogate.refusal = EngineUnavailable("gone")
    answer = await services.say(history, "question 3")
    assert answer.headers["X-SOMA-Engine"] == "original"
    assert answer.headers["X-SOMA-Reason"] == "surrogate failed: unavailable"
    assert answer.headers["X-SOMA-Adapter"] == ""


async def test_the_hold_on_an_adapter_lasts_until_the_last_token(services: Services) -> None:
    services.surrogate.answers = ["different", "same"]
    history = await warmed(services)
    services.surrogate.answers = ["one two three"]
    answer = await services.say(history, "question 3", stream=True)
    events = answer.reply.events
    assert events is not None
    await anext(events)
    assert services.leases.in_use("adapter-s-1")
    async for _ in events:
        pass
    assert services.leases.count() == 0
    assert services.session().turns[-1].answer == "one two three"


async def test_a_stream_that_nobody_reads_gives_its_hold_back_when_closed(services: Services) -> None:
    services.surrogate.answers = ["different", "same"]
    history = await warmed(services)
    answer = await services.say(history, "question 3", stream=True)
    assert answer.reply.events is not None
    await answer.reply.events.aclose()
    assert services.leases.count() == 0
    assert len(services.session().turns) == 2


async def test_a_client_that_leaves_in_the_middle_stops_the_generation_and_is_recorded_as_cut_off(
    services: Services,
) -> None:
    history: History = []
    services.original.answers = ["one two three four"]
    answer = await services.say(history, "question 1", stream=True)
    events = answer.reply.events
    assert events is not None
    for _ in range(3):
        await anext(events)
    await events.aclose()
    assert services.original.closed_early.is_set()
    (turn,) = services.session().turns
    assert not turn.complete
    assert turn.answer.startswith("one")
    assert services.session().warm_turns() == ()


async def test_full_slots_send_a_turn_to_the_original_instead_of_queueing_it(services: Services) -> None:
    services.surrogate.answers = ["different", "same"]
    first = await warmed(services, "a")
    services.surrogate.answers = ["different"] * len(services.surrogate.calls) + ["different", "same"]
    second = await warmed(services, "b")
    open_stream = await services.say(first, "question 3", "a", stream=True)
    answer = await services.say(second, "question 3", "b")
    assert answer.headers["X-SOMA-Engine"] == "original"
    assert open_stream.reply.events is not None
    await open_stream.reply.events.aclose()


async def test_audits_that_breach_in_a_row_roll_the_session_back(build: Build) -> None:
    services = build(gate={"audit_rate": 1.0})
    await services.registry.start()
    history = await warmed(services)
    services.original.answers = ["another answer"]
    for number in (3, 4):
        await services.say(history, f"question {number}")
        await services.settled()
    assert services.kinds().count("audited") == 2
    assert services.session().phase is Phase.ROLLED_BACK
    answer = await services.say(history, "question 5")
    assert answer.headers["X-SOMA-Engine"] == "original"


async def test_a_query_outside_the_locality_goes_to_the_original_and_the_phase_stays(build: Build) -> None:
    services = build(gate={"locality_threshold": 0.9, "audit_rate": 0.0})
    await services.registry.start()
    history: History = []
    for _ in range(2):
        await services.say(history, "the same question")
    await services.settled()
    answer = await services.say(history, "the same question")
    assert answer.headers["X-SOMA-Engine"] == "surrogate"
    answer = await services.say(history, "something else")
    assert answer.headers["X-SOMA-Engine"] == "original"
    assert answer.headers["X-SOMA-Reason"].startswith("locality 1.00 above 0.9")
    await services.settled()
    assert services.session().phase is Phase.SWITCHED
    assert "locality_miss" in services.kinds()


async def test_locality_misses_are_audited_against_the_surrogate_without_asking_the_original_again(
    build: Build,
) -> None:
    services = build(gate={"locality_threshold": 0.0, "audit_rate": 0.0})
    await services.registry.start()
    history = await warmed(services)
    services.surrogate.answers = ["far from it"]
    for number in (3, 4):
        await services.say(history, f"question {number}")
        await services.settled()
    assert len(services.original.calls) == 4
    assert services.session().phase is Phase.ROLLED_BACK


async def test_two_keys_with_one_session_id_are_two_sessions(services: Services) -> None:
    await warmed(services, key="one")
    await services.say([], "question 1", key="two")
    assert len(services.session(key="one").turns) == 2
    assert len(services.session(key="two").turns) == 1


async def test_a_dialogue_without_an_id_is_recognised_by_its_transcript(services: Services) -> None:
    history: History = []
    ids = set()
    for number in (1, 2, 3):
        services.original.answers = [f"answer {number}"]
        answer = await services.say(history, f"question {number}", None)
        await services.settled()
        ids.add(answer.headers["X-SOMA-Session"])
    assert len(ids) == 1


async def test_another_key_does_not_find_a_transcript(services: Services) -> None:
    history: History = []
    first = await services.say(history, "question 1", None, key="one")
    second = await services.say(history, "question 2", None, key="two")
    assert first.headers["X-SOMA-Session"] != second.headers["X-SOMA-Session"]


async def test_a_retry_does_not_advance_a_session_twice(services: Services) -> None:
    history: History = []
    await services.say(history, "question 1")
    await services.say(history[:-2], "question 1")
    assert len(services.session().turns) == 1


async def test_a_branch_before_what_was_learned_begins_anew_and_leaves_the_session_as_it_is(
    services: Services,
) -> None:
    services.surrogate.answers = ["different", "same"]
    history = await warmed(services)
    answer = await services.say([], "another question 1")
    await services.settled()
    branch = answer.headers["X-SOMA-Session"]
    assert branch.startswith("s~")
    assert answer.headers["X-SOMA-Engine"] == "original"
    assert services.session(branch).phase is Phase.WARM_START
    answer = await services.say(history, "question 3")
    assert answer.headers["X-SOMA-Session"] == "s"
    assert answer.headers["X-SOMA-Adapter"] == "adapter-s-1"


async def test_a_branch_after_what_was_learned_is_served_by_the_same_adapter_until_neither_needs_it(
    services: Services,
) -> None:
    services.surrogate.answers = ["different", "same"]
    history = await warmed(services)
    await services.say(history, "question 3")
    await services.say(history, "question 4")
    answer = await services.say(history[:4], "question 3 c")
    branch = answer.headers["X-SOMA-Session"]
    assert branch != "s"
    assert answer.headers["X-SOMA-Adapter"] == "adapter-s-1"
    await services.session_admin.roll_back(services.session().key)
    await services.settled()
    assert "delete adapter-s-1" not in services.surrogate.log
    for name in [branch, *{key.session for key, _ in services.events} - {"s", branch}]:
        await services.session_admin.roll_back(services.session(name).key)
    await services.settled()
    assert services.surrogate.log[-1] == "delete adapter-s-1"


async def test_a_branch_is_found_again_by_its_transcript(services: Services) -> None:
    services.original.answers = ["one", "two", "other", "three", "more"]
    history: History = []
    await services.say(history, "question 1")
    await services.say(history, "question 2")
    other = history[:2]
    first = await services.say(other, "another question 2")
    second = await services.say(other, "question 3")
    assert first.headers["X-SOMA-Session"] == second.headers["X-SOMA-Session"] != "s"
    assert len(services.session(first.headers["X-SOMA-Session"]).turns) == 3
    assert len(services.session().turns) == 2


async def test_two_dialogues_that_begin_alike_go_on_apart(services: Services) -> None:
    services.original.answers = ["hello", "hello", "to one", "to the other", "again"]
    one: History = []
    other: History = []
    await services.say(one, "hi", None)
    await services.say(other, "hi", None)
    first = await services.say(one, "mine", None)
    second = await services.say(other, "yours", None)
    assert first.headers["X-SOMA-Session"] != second.headers["X-SOMA-Session"]
    third = await services.say(one, "and then", None)
    assert third.headers["X-SOMA-Session"] == first.headers["X-SOMA-Session"]


async def test_parallel_requests_of_one_session_are_both_served_and_both_on_record(services: Services) -> None:
    history: History = []
    await services.say(history, "question 1")
    services.original.go.clear()
    asked = [asyncio.create_task(services.say(history[:], query)) for query in ("left", "right")]
    await asyncio.sleep(0.01)
    services.original.go.set()
    await asyncio.gather(*asked)
    answered = [event for _, event in services.events if event.kind in ("turn", "variant")]
    recorded = [(event.kind, event.data["number"]) for event in answered]
    assert recorded == [("turn", 1), ("turn", 2), ("variant", 2)]
    assert {key.session for key, _ in services.events} == {"s"}


async def test_a_request_that_is_sent_twice_at_once_is_one_turn(services: Services) -> None:
    history: History = []
    await services.say(history, "question 1")
    services.original.go.clear()
    asked = [asyncio.create_task(services.say(history[:], "question 2")) for _ in range(2)]
    await asyncio.sleep(0.01)
    services.original.go.set()
    await asyncio.gather(*asked)
    assert len(services.session().turns) == 2
    assert {key.session for key, _ in services.events} == {"s"}


async def test_a_tools_result_goes_back_to_whoever_called_the_tool(build: Build) -> None:
    services = build(surrogate={"max_loras": 1, "tools": True})
    await services.registry.start()
    history = await warmed(services)
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    services.surrogate.calls_tools = [call]
    answer = await services.say(history, "question 3", tools=TOOLS)
    assert answer.headers["X-SOMA-Engine"] == "surrogate"
    services.surrogate.calls_tools = []
    history.append({"role": "tool", "tool_call_id": "1", "content": "found"})
    body = {"model": "soma", "messages": history, "tools": TOOLS}
    headers = {"authorization": "Bearer k", "x-session-id": "s"}
    answer = await services.dispatcher.chat(ChatRequest(body, headers))
    assert answer.headers["X-SOMA-Reason"] == "tool result to its caller"
    assert len(services.session().turns) == 4


async def test_a_tools_result_whose_call_is_not_on_record_goes_to_the_original(build: Build) -> None:
    services = build(surrogate={"max_loras": 1, "tools": True})
    await services.registry.start()
    history = await warmed(services)
    await services.say(history, "question 3")
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    lost = [{"role": "user", "content": "question 4"}, {"role": "assistant", "tool_calls": [call]}]
    result = {"role": "tool", "tool_call_id": "1", "content": "found"}
    headers = {"authorization": "Bearer k", "x-session-id": "s"}
    body = {"model": "soma", "messages": [*history, *lost, result]}
    answer = await services.dispatcher.chat(ChatRequest(body, headers))
    assert (answer.headers["X-SOMA-Session"], answer.headers["X-SOMA-Engine"]) == ("s", "original")


async def test_a_session_does_not_switch_in_the_middle_of_a_tool_loop(services: Services) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    services.trainer.go.clear()
    history: History = []
    await services.say(history, "question 1")
    services.original.calls_tools = []
    await services.say(history, "question 2")
    services.original.calls_tools = [call]
    await services.say(history, "question 3")
    services.original.calls_tools = []
    services.trainer.go.set()
    await services.settled()
    assert services.session().phase is Phase.SWITCHED
    history.append({"role": "tool", "tool_call_id": "1", "content": "found"})
    headers = {"authorization": "Bearer k", "x-session-id": "s"}
    answer = await services.dispatcher.chat(ChatRequest({"model": "soma", "messages": history}, headers))
    assert answer.headers["X-SOMA-Engine"] == "original"
    assert answer.headers["X-SOMA-Reason"] == "tool result"


async def test_a_client_may_go_on_from_any_of_several_choices(services: Services) -> None:
    history: History = []
    answer = await services.say(history, "question 1", n=2)
    assert answer.reply.body is not None
    other = [history[0], answer.reply.body["choices"][1]["message"]]
    answer = await services.say(other, "question 2")
    assert services.session(answer.headers["X-SOMA-Session"]).turns[0].answer == "same, or 1"
    assert len(services.session(answer.headers["X-SOMA-Session"]).turns) == 2


async def test_a_policy_can_be_asked_for_by_header_and_by_model(services: Services) -> None:
    by_header = await services.say([], "question 1", headers={"x-soma-policy": "surrogate"})
    by_model = await services.say([], "question 1", "t", model="soma:surrogate")
    assert by_header.headers["X-SOMA-Engine"] == by_model.headers["X-SOMA-Engine"] == "surrogate"
    with pytest.raises(BadRequest, match=r"policy: found 'none'; expected one of .*soma, speculative"):
        await services.say([], "question 1", "u", model="soma:none")


async def test_a_tenant_with_its_share_of_sessions_opens_no_further_one_but_goes_on_in_those(
    services: Services,
) -> None:
    services.meter.sessions = 1
    history: History = []
    await services.say(history, "question 1")
    with pytest.raises(TooManyRequests):
        await services.say([], "question 1", "t")
    await services.say([], "question 1", "t", key="another")
    await services.say(history, "question 2")
    assert len(services.session().turns) == 2
    assert len(services.registry._entries) == 2


async def test_of_many_new_sessions_at_once_only_as_many_begin_as_the_key_allows(services: Services) -> None:
    services.meter.sessions = 2
    services.original.go.clear()
    asked = [asyncio.create_task(services.say([], "question", f"s{number}")) for number in range(20)]
    await asyncio.sleep(0.1)
    services.original.go.set()
    found = await asyncio.gather(*asked, return_exceptions=True)
    assert sum(isinstance(one, TooManyRequests) for one in found) == 18
    assert services.registry._begun == set()
    services.meter.sessions = 3
    await services.say([], "question", "another")


async def test_of_many_adaptations_at_once_only_as_many_train_as_the_key_allows(services: Services) -> None:
    services.surrogate.answers = ["different"]
    services.meter.adapters = 1
    services.trainer.go.clear()
    histories: list[History] = [[] for _ in range(4)]
    for turn in range(2):
        for number, history in enumerate(histories):
            await services.say(history, f"question {turn}", f"s{number}")
    await asyncio.sleep(0.1)
    services.trainer.go.set()
    await services.settled()
    assert len(services.trainer.requests) == 1


async def test_the_tokens_of_every_reply_are_counted_for_its_tenant(services: Services) -> None:
    await services.say([], "question 1")
    await services.dispatcher.chat(
        ChatRequest({"model": "small", "messages": [{"role": "user", "content": "hi"}]}, {})
    )
    tenants = [tenant for tenant, _ in services.meter.spendings]
    assert tenants == [services.session().key.tenant, "public"]


async def test_a_tenant_with_its_share_of_adapters_gets_no_further_one(services: Services) -> None:
    services.surrogate.answers = ["different"]
    services.meter.adapters = 0
    await warmed(services)
    assert services.trainer.requests == []
    assert services.session().phase is Phase.ORIGINAL_ONLY


async def test_sessions_go_on_after_a_restart(build: Build) -> None:
    first = build()
    await first.registry.start()
    first.surrogate.answers = ["different", "same"]
    history = await warmed(first)
    await first.registry.stop()
    second = build()
    await second.registry.start()
    answer = await second.say(history, "question 3")
    assert answer.headers["X-SOMA-Adapter"] == "adapter-s-1"
    assert second.surrogate.log == ["load adapter-s-1"]


async def test_an_adaptation_that_a_restart_interrupted_is_taken_up_with_the_next_turn(build: Build) -> None:
    first = build()
    await first.registry.start()
    first.surrogate.answers = ["different", "same"]
    first.trainer.go.clear()
    history: History = []
    for number in (1, 2):
        await first.say(history, f"question {number}")
    await first.background.stop()
    await first.registry.stop()
    second = build()
    await second.registry.start()
    await second.say(history, "question 3")
    await second.settled()
    assert second.session().phase is Phase.SWITCHED


async def test_the_engines_own_names_bypass_dispatch(services: Services) -> None:
    body = {"model": "small", "messages": [{"role": "user", "content": "hi"}]}
    answer = await services.dispatcher.chat(ChatRequest(body, {}))
    assert answer.headers["X-SOMA-Engine"] == "surrogate"
    assert services.events == []


async def test_a_request_can_opt_out(services: Services) -> None:
    body = {"model": "soma", "messages": [{"role": "user", "content": "hi"}]}
    answer = await services.dispatcher.chat(ChatRequest(body, {"x-soma": "off"}))
    assert answer.headers["X-SOMA-Engine"] == "original"
    assert services.events == []


async def test_an_adapters_name_is_not_a_model(services: Services) -> None:
    services.surrogate.answers = ["different", "same"]
    await warmed(services)
    body = {"model": "adapter-s-1", "messages": [{"role": "user", "content": "hi"}]}
    with pytest.raises(BadRequest, match="expected one of soma, large, small"):
        await services.dispatcher.chat(ChatRequest(body, {}))


async def test_tools_stay_with_the_original(services: Services) -> None:
    history = await warmed(services)
    answer = await services.say(history, "question 3", tools=[{"type": "function"}])
    assert answer.headers["X-SOMA-Engine"] == "original"


async def test_while_the_original_is_down_requests_are_refused_or_served_as_configured(build: Build) -> None:
    refusing, serving = build(), build(original={"when_down": "surrogate"})
    for services in (refusing, serving):
        await services.registry.start()
        services.original.refusal = EngineUnavailable("down")
    with pytest.raises(EngineUnavailable):
        await refusing.say([], "question 1", "x")
    answer = await serving.say([], "question 1", "y")
    assert answer.headers["X-SOMA-Engine"] == "surrogate"
    assert answer.headers["X-SOMA-Reason"] == "original unavailable"


async def test_the_originals_own_errors_reach_the_client_and_record_nothing(services: Services) -> None:
    services.original.refusal = EngineRefused(400, {"error": {"message": "too long"}})
    with pytest.raises(EngineRefused):
        await services.say([], "question 1")
    assert services.events == []


async def test_forcing_works_only_where_the_configuration_lets_it(build: Build) -> None:
    free = build()
    bound = build(adaptation={"allow_force_header": False})
    for name, services in (("free", free), ("bound", bound)):
        await services.registry.start()
        history: History = []
        for number in (1, 2):
            await services.say(history, f"question {number}", name, headers={"x-soma-force": "adapter"})
        await services.settled()
    assert free.session("free").serving is Candidate.ADAPTER
    assert bound.session("bound").serving is Candidate.PLAIN


async def test_a_request_too_long_for_the_surrogate_is_answered_by_the_original(services: Services) -> None:
    history = await warmed(services)
    services.surrogate.refusal = EngineRefused(400, {"error": {"message": "longer than the context"}})
    answer = await services.say(history, "question 3")
    assert answer.headers["X-SOMA-Engine"] == "original"


async def test_an_adapter_stays_in_the_engine_while_an_audit_runs_under_it(build: Build) -> None:
    services = build(gate={"locality_threshold": 0.0, "audit_rate": 0.0})
    await services.registry.start()
    services.surrogate.answers = ["different", "same"]
    history = await warmed(services)
    services.surrogate.go.clear()
    services.surrogate.called.clear()
    await services.say(history, "question 3")
    await services.surrogate.called.wait()
    removing = asyncio.create_task(services.session_admin.roll_back(services.session().key))
    await removing
    assert "unload adapter-s-1" not in services.surrogate.log
    services.surrogate.go.set()
    await services.settled()
    assert services.surrogate.log[-2:] == ["unload adapter-s-1", "delete adapter-s-1"]


async def test_an_adapter_that_cannot_be_judged_is_retired(services: Services) -> None:
    services.surrogate.answers = ["different"]
    services.trainer.go.clear()
    history: History = []
    for number in (1, 2):
        await services.say(history, f"question {number}")
    while not services.trainer.requests:
        await asyncio.sleep(0)
    services.surrogate.refusal = EngineUnavailable("gone")
    services.trainer.go.set()
    await services.settled()
    assert services.session().phase is Phase.ORIGINAL_ONLY
    assert services.surrogate.log[-1] == "delete adapter-s-1"


async def test_looking_at_a_session_during_its_first_turn_does_not_disturb_it(services: Services) -> None:
    services.original.go.clear()
    asking = asyncio.create_task(services.say([], "question 1"))
    await services.original.called.wait()
    (key,) = services.registry._entries
    with pytest.raises(NotFound):
        await services.registry.entry(key)
    services.original.go.set()
    await asking
    assert len(services.session().turns) == 1


async def test_a_dialogue_without_an_id_is_recognised_when_it_asks_again(services: Services) -> None:
    history: History = []
    services.original.answers = ["one", "two", "two again", "three"]
    first = await services.say(history, "question 1", None)
    await services.say(history, "question 2", None)
    again = await services.say(history[:2], "question 2", None)
    assert again.headers["X-SOMA-Session"] == first.headers["X-SOMA-Session"]
    assert len(services.session(first.headers["X-SOMA-Session"]).turns) == 2


async def test_a_history_that_ends_with_an_answer_teaches_nothing_and_breaks_nothing(
    services: Services,
) -> None:
    history: History = []
    await services.say(history, "question 1")
    body = {"model": "soma", "messages": history}
    headers = {"authorization": "Bearer k", "x-session-id": "s"}
    await services.dispatcher.chat(ChatRequest(body, headers))
    assert services.session().phase is Phase.WARM_START


async def test_a_request_without_messages_is_refused(services: Services) -> None:
    with pytest.raises(BadRequest, match="messages: found none"):
        await services.dispatcher.chat(ChatRequest({"model": "soma", "messages": []}, {}))


async def test_nothing_holds_a_session_once_all_is_done(services: Services) -> None:
    history = await warmed(services)
    stream = await services.say(history, "question 3", stream=True)
    assert stream.reply.events is not None
    await stream.reply.events.aclose()
    services.original.refusal = services.surrogate.refusal = EngineUnavailable("down")
    with pytest.raises(EngineUnavailable):
        await services.say(history, "question 4")
    await services.settled()
    assert [entry.holds for entry in services.registry._entries.values()] == [0]


async def test_the_adapter_of_a_session_that_returns_is_fetched_while_its_request_is_read(
    services: Services,
) -> None:
    services.surrogate.answers = ["different", "same"]
    history = await warmed(services)
    assert services.surrogate.prefetched == []
    encoded = asyncio.Event()
    encode = services.encoder.encode

    async def slow(texts: list[str]) -> Any:
        await encoded.wait()
        return await encode(texts)

    services.encoder.encode = slow
    asking = asyncio.create_task(services.say(history, "question 3"))
    async with asyncio.timeout(GUARD_S):
        while not services.surrogate.prefetched:
            await asyncio.sleep(0.005)
    assert not asking.done()
    encoded.set()
    assert (await asking).headers["X-SOMA-Engine"] == "surrogate"
    assert services.surrogate.prefetched == ["adapter-s-1"]


async def test_a_turn_waits_for_a_slot_where_the_configuration_says_so(build: Build) -> None:
    services = build(surrogate={"max_loras": 1, "overflow": "wait", "queue_wait_s": 10.0})
    await services.registry.start()
    services.surrogate.answers = ["different", "same"]
    history = await warmed(services)
    other = await services.leases.acquire("another")
    asking = asyncio.create_task(services.say(history, "question 3"))
    async with asyncio.timeout(GUARD_S):
        while not services.leases.waiting():
            await asyncio.sleep(0.005)
    await services.leases.release(other)
    assert (await asking).headers["X-SOMA-Engine"] == "surrogate"


async def test_after_waiting_in_vain_the_original_answers(build: Build) -> None:
    services = build(surrogate={"max_loras": 1, "overflow": "wait", "queue_wait_s": 0.05})
    await services.registry.start()
    services.surrogate.answers = ["different", "same"]
    history = await warmed(services)
    await services.leases.acquire("another")
    answer = await services.say(history, "question 3")
    assert answer.headers["X-SOMA-Engine"] == "original"
    assert answer.headers["X-SOMA-Reason"] == "surrogate failed: no adapter slot"


async def test_an_adapter_that_is_not_served_as_trained_never_serves(services: Services) -> None:
    services.surrogate.answers = ["different", "same"]
    services.surrogate.rejection = AdapterRejected("adapter-s-1", ["found trained_shift 1, served_shift 0"])
    history = await warmed(services)
    assert services.session().phase is Phase.ORIGINAL_ONLY
    assert [k for k in services.kinds() if k.startswith(("adapter", "training_f"))] == [
        "adapter_published",
        "adapter_rejected",
        "training_failed",
        "adapter_draining",
        "adapter_retired",
    ]
    (rejected,) = (event for _, event in services.events if event.kind == "adapter_rejected")
    assert rejected.data["problems"] == ["found trained_shift 1, served_shift 0"]
    assert (await services.say(history, "question 3")).headers["X-SOMA-Engine"] == "original"


async def test_an_adapter_that_turns_out_wrong_after_a_restart_leaves_the_turn_to_the_original(
    services: Services,
) -> None:
    services.surrogate.answers = ["different", "same"]
    history = await warmed(services)
    services.surrogate.rejection = AdapterRejected("adapter-s-1", ["another model"])
    answer = await services.say(history, "question 3")
    assert answer.headers["X-SOMA-Engine"] == "original"
    assert answer.headers["X-SOMA-Reason"] == "surrogate failed: adapter"
    assert services.leases.count() == 0

"""Clients that drop their oldest turns to fit a context window keep their session."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from support.services import Build, Services

from soma_vllm.sessions.state.phases import Phase

History = list[dict[str, Any]]
SYSTEM = {"role": "system", "content": "You are terse."}


def last_exchanges(history: History) -> History:
    return [*history[:1], *history[1:][-4:]]


def last_messages(history: History) -> History:
    return [*history[:1], *history[1:][-5:]]


def first_and_last(history: History) -> History:
    return history if len(history) < 9 else [*history[:3], *history[-4:]]


async def talk(
    services: Services, turns: int, trim: Callable[[History], History], session: str | None
) -> list[str]:
    """A dialogue of a client that trims; the sessions that its turns were told to be of."""
    history, sessions = [SYSTEM], []
    for number in range(1, turns + 1):
        # The same to the first two: the surrogate is asked about both at once.
        services.original.answers = services.surrogate.answers = [f"answer {max(number, 2)}"]
        answer = await services.say(history, f"question {number}", session)
        await services.settled()
        sessions.append(answer.headers["X-SOMA-Session"])
        history = trim(history)
    return sessions


@pytest.mark.parametrize("trim", [last_exchanges, last_messages, first_and_last])
@pytest.mark.parametrize("session", ["s", None])
async def test_a_client_that_trims_its_history_keeps_its_session(
    services: Services, trim: Callable[[History], History], session: str | None
) -> None:
    services.surrogate.answers = ["same"]
    sessions = await talk(services, 8, trim, session)
    assert len(set(sessions)) == 1
    found = services.session(sessions[0])
    assert [turn.number for turn in found.turns] == list(range(1, 9))
    assert len(found.transcript()) == 17
    assert found.turns[-1].left_out is not None


async def test_a_session_that_was_trimmed_is_found_again_after_a_restart(build: Build) -> None:
    first, second = build(), build()
    await first.registry.start()
    sessions = await talk(first, 5, last_exchanges, None)
    await first.registry.written()
    await second.registry.start()
    history = [
        SYSTEM,
        *({"role": role, "content": f"{word} {n}"} for n in (4, 5) for role, word in WORDS),
    ]
    answer = await second.say(history, "question 6", None)
    assert answer.headers["X-SOMA-Session"] == sessions[0]


WORDS = (("user", "question"), ("assistant", "answer"))


def left_of(*numbers: int | str) -> History:
    """What a client has left of exchanges."""
    return [SYSTEM, *({"role": role, "content": f"{word} {n}"} for n in numbers for role, word in WORDS)]


async def test_without_an_id_two_dialogues_that_end_alike_are_not_taken_for_one_another(
    services: Services,
) -> None:
    for opening in ("one", "other"):
        history = [SYSTEM]
        for query, answer in ((opening, opening), ("question 2", "answer 2"), ("question 3", "answer 3")):
            services.original.answers = services.surrogate.answers = [answer]
            await services.say(history, query, None)
            await services.settled()
    before = {key for key, _ in services.events}
    answer = await services.say(left_of(2, 3), "question 4", None)
    assert answer.headers["X-SOMA-Session"] not in {key.session for key in before}
    assert answer.headers["X-SOMA-Engine"] == "original"


async def test_without_an_id_one_exchange_is_too_little_to_be_recognised_by(services: Services) -> None:
    sessions = await talk(services, 4, last_exchanges, None)
    answer = await services.say(left_of(4), "question 5", None)
    assert answer.headers["X-SOMA-Session"] not in sessions
    named = await talk(services, 4, last_exchanges, "s")
    answer = await services.say(left_of(4), "question 5", "s")
    assert [answer.headers["X-SOMA-Session"]] == list(set(named))


async def test_another_tenant_is_not_found_by_what_is_left(services: Services) -> None:
    sessions = await talk(services, 4, last_exchanges, None)
    answer = await services.say(left_of(3, 4), "question 5", None, key="another")
    assert answer.headers["X-SOMA-Session"] not in sessions


@pytest.mark.parametrize("left", [("3*", 4), (4, 3), ("forged", "forged too")])
async def test_what_contradicts_the_record_is_no_part_of_the_session_and_the_original_answers(
    services: Services, left: tuple[int | str, ...]
) -> None:
    services.trainer.adapted = services.trainer.plain
    await talk(services, 4, last_exchanges, "s")
    assert services.session().phase is Phase.SWITCHED
    before = services.session()
    answer = await services.say(left_of(*left), "question 5")
    assert answer.headers["X-SOMA-Session"] != "s"
    assert answer.headers["X-SOMA-Engine"] == "original"
    assert services.session() == before


async def test_an_edited_last_answer_branches_after_the_turns_that_are_common(services: Services) -> None:
    await talk(services, 5, last_exchanges, "s")
    answer = await services.say(left_of(3, 4, "5*"), "question 6")
    branch = services.session(answer.headers["X-SOMA-Session"])
    assert branch.key.session != "s"
    assert [turn.number for turn in branch.turns] == [1, 2, 3, 4, 5]


async def test_under_another_system_message_a_trimmed_history_is_recognised(services: Services) -> None:
    await talk(services, 4, last_exchanges, "s")
    history = [{"role": "system", "content": "You are verbose."}, *left_of(3, 4)[1:]]
    answer = await services.say(history, "question 5")
    assert answer.headers["X-SOMA-Session"] == "s"
    assert [message["content"] for message in services.session().preamble()] == ["You are verbose."]
    services.original.answers = ["answer 6"]
    later = await services.say([history[0], *history[-4:]], "question 6")
    assert later.headers["X-SOMA-Session"] == "s"


async def test_two_trimmed_requests_at_once_are_both_on_record_and_go_on_apart(services: Services) -> None:
    await talk(services, 4, last_exchanges, "s")
    services.original.answers = ["fork"]
    services.original.go.clear()
    services.surrogate.go.clear()
    left, right = left_of(3, 4), left_of(3, 4)
    asked = [
        asyncio.create_task(services.say(history, query))
        for history, query in ((left, "left"), (right, "right"))
    ]
    await asyncio.sleep(0.01)
    services.original.go.set()
    services.surrogate.go.set()
    await asyncio.gather(*asked)
    services.original.answers = services.surrogate.answers = ["later"]
    sessions = [
        (await services.say(last_exchanges(history), "go on")).headers["X-SOMA-Session"]
        for history in (left, right)
    ]
    assert len(set(sessions)) == 2
    assert [len(services.session(name).turns) for name in sessions] == [6, 6]


async def test_a_trimmed_request_that_is_repeated_replaces_its_turn(services: Services) -> None:
    await talk(services, 4, last_exchanges, "s")
    for _ in range(2):
        answer = await services.say(left_of(3, 4), "question 5")
        assert answer.headers["X-SOMA-Session"] == "s"
    assert len(services.session().turns) == 5


async def test_a_turn_that_a_killed_server_did_not_record_is_accepted_from_a_trimmed_history(
    services: Services,
) -> None:
    await talk(services, 4, last_exchanges, "s")
    answer = await services.say(left_of(3, 4, "lost"), "question 6")
    assert answer.headers["X-SOMA-Session"] == "s"
    turn = services.session().turns[-1]
    assert (turn.number, len(turn.messages), len(turn.links)) == (5, 3, 2)


async def test_what_is_learned_from_is_what_the_client_still_had(build: Build) -> None:
    services = build(warm_window=4, prefix={"mode": "full"})
    await services.registry.start()
    await talk(services, 4, last_exchanges, "s")
    trained, held_out = services.session().examples(services.config)
    prompts = [[message["content"] for message in example.messages] for example in (*trained, *held_out)]
    assert prompts[3] == [
        SYSTEM["content"],
        *(f"{word} {n}" for n in (2, 3) for _, word in WORDS),
        "question 4",
    ]
    assert len(prompts[2]) == 6

"""Clients that do not send back exactly what they sent and got: each of their dialogues stays one session."""

from __future__ import annotations

import asyncio
import copy
import hashlib
import logging
from collections.abc import Callable
from typing import Any

import pytest
from support.services import Build, Services

from soma_vllm.errors import BadRequest
from soma_vllm.scheduler.dispatcher import Answer, ChatRequest
from soma_vllm.sessions.state.phases import Phase
from soma_vllm.telemetry.event_log import EventLog
from soma_vllm.types import SessionKey

History = list[dict[str, Any]]
Shape = Callable[[History, str, int], History]
"""(the history that the client keeps, the query, its number) -> the messages of its request."""
Keep = Callable[[str], str]
"""What the client keeps of an answer."""
REQUEST_FILES = "I have added these files to the chat, so you can edit them."


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def said(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def system(text: str, role: str = "system") -> dict[str, Any]:
    return {"role": role, "content": text}


def plain(history: History, query: str, number: int) -> History:
    return [*history, user(query)]


def clock(history: History, query: str, number: int) -> History:
    return [system(f"You are a helper. It is 10:0{number}."), *history, user(query)]


def developer_clock(history: History, query: str, number: int) -> History:
    return [system(f"It is 10:0{number} on Friday.", "developer"), *history, user(query)]


def dynamic_instructions(history: History, query: str, number: int) -> History:
    return [system("You are terse."), system(f"The user is in room {number}."), *history, user(query)]


def profile(history: History, query: str, number: int) -> History:
    return [system(f"What is known of the user: {'likes boats ' * number}"), *history, user(query)]


def passages(history: History, query: str, number: int) -> History:
    return [*history, user(f"Use these passages: [{number}] ferries sail at {number}.\n\n{query}")]


def tagged_passages(history: History, query: str, number: int) -> History:
    return [*history, user(f"<context>{number}</context>\n<user_query>{query}</user_query>")]


def reminder_after(history: History, query: str, number: int) -> History:
    return [*history, user(f"{query}\n\n<reminder>It is 10:0{number}.</reminder>")]


def note_before(history: History, query: str, number: int) -> History:
    return [*history, system("Stay in character."), user(query)]


def note_after(history: History, query: str, number: int) -> History:
    return [*history, user(query), system("Stay in character.")]


def moving_files(history: History, query: str, number: int) -> History:
    files = [user(f"{REQUEST_FILES}\n\nmain.py\n```\nx = {number}\n```"), said("Ok, I will edit those files.")]
    return [system("Act as an expert."), *history, *files, user(query), system("Reply in blocks.")]


def everything(history: History, query: str, number: int) -> History:
    return clock(history, f"[{number}] a passage\n\n{query}", number)


def with_source(answer: str) -> str:
    return f"{answer}\n\n[1] source"


def without_thoughts(answer: str) -> str:
    return answer.split("</think>")[-1].strip()


def cleaned(answer: str) -> str:
    return answer.replace("**", "").replace("* ", "- ")


def cited(answer: str) -> str:
    return f"{answer} [1]"


def shortened(answer: str) -> str:
    return answer[:-4]


def unchanged(answer: str) -> str:
    return answer


SHAPES: list[Shape] = [
    clock,
    developer_clock,
    dynamic_instructions,
    profile,
    passages,
    tagged_passages,
    reminder_after,
    note_before,
    note_after,
    moving_files,
    everything,
]
KEEPS: list[Keep] = [with_source, without_thoughts, cleaned, cited, str.strip]


async def ask(services: Services, messages: History, session: str | None = None, **extra: Any) -> Answer:
    headers = {"authorization": f"Bearer {extra.pop('key', 'k')}", **extra.pop("headers", {})}
    if session is not None:
        headers["x-session-id"] = session
    body = {"model": "soma", "messages": copy.deepcopy(messages), **extra}
    answer = await services.dispatcher.chat(ChatRequest(body, headers))
    await services.settled()
    return answer


def text(answer: Answer) -> str:
    assert answer.reply.body is not None
    return str(answer.reply.body["choices"][0]["message"]["content"])


async def play(
    services: Services, shape: Shape, keep: Keep = unchanged, session: str | None = None, turns: int = 5
) -> list[Answer]:
    """A dialogue of a client that keeps its history so, and sends it so."""
    history: History = []
    answers = []
    for number in range(1, turns + 1):
        reply = f"<think>hm {number}</think>\n\n**Ferry** {max(number, 2)} sails.\n\n* daily, they say"
        services.original.answers = services.surrogate.answers = [reply]
        query = f"Question {number} about ferries?"
        answers.append(await ask(services, shape(history, query, number), session))
        history += [user(query), said(keep(text(answers[-1])))]
    return answers


def sessions(answers: list[Answer]) -> set[str]:
    return {answer.headers["X-SOMA-Session"] for answer in answers}


@pytest.mark.parametrize("session", ["s", None])
@pytest.mark.parametrize("shape", SHAPES)
async def test_whatever_a_client_puts_around_its_questions_a_dialogue_is_one_session(
    services: Services, shape: Shape, session: str | None
) -> None:
    answers = await play(services, shape, session=session)
    (name,) = sessions(answers)
    assert [turn.number for turn in services.session(name).turns] == [1, 2, 3, 4, 5]
    assert not any("X-SOMA-Branch" in answer.headers for answer in answers)
    if shape is not profile:
        assert "surrogate" in {answer.headers["X-SOMA-Engine"] for answer in answers}


@pytest.mark.parametrize("session", ["s", None])
@pytest.mark.parametrize("keep", KEEPS)
@pytest.mark.parametrize("shape", [plain, everything])
async def test_however_a_client_keeps_the_answers_a_dialogue_is_one_session(
    services: Services, keep: Keep, shape: Shape, session: str | None
) -> None:
    answers = await play(services, shape, keep, session)
    assert len(sessions(answers)) == 1
    assert "surrogate" in {answer.headers["X-SOMA-Engine"] for answer in answers}


async def test_an_answer_that_its_user_stopped_late_is_recognised_by_its_beginning(services: Services) -> None:
    assert sessions(await play(services, plain, shortened, "s")) == {"s"}


async def test_the_engine_gets_each_requests_own_messages(services: Services) -> None:
    await play(services, clock, turns=2, session="s")
    assert [call.body["messages"][0]["content"] for call in services.original.calls] == [
        "You are a helper. It is 10:01.",
        "You are a helper. It is 10:02.",
    ]


async def test_what_is_learned_from_has_the_words_of_its_time(build: Build) -> None:
    services = build(warm_window=3, prefix={"mode": "full"})
    await services.registry.start()
    services.trainer.go.clear()
    await services.registry.written()
    history: History = []
    for number in (1, 2):
        services.original.answers = [f"answer {number}"]
        wrapped = everything(history, f"question {number}", number)
        history += [user(f"question {number}"), said(text(await ask(services, wrapped, "s")))]
    last = services.session().warm_examples(services.config)[-1]
    assert [message["content"] for message in last.messages] == [
        "You are a helper. It is 10:02.",
        "question 1",
        "answer 1",
        "[2] a passage\n\nquestion 2",
    ]


@pytest.mark.parametrize("session", ["s", None])
@pytest.mark.parametrize("beside", [True, False])
async def test_a_title_asked_for_on_the_same_history_leaves_the_line_where_it_is(
    build: Build, session: str | None, beside: bool
) -> None:
    services = build(warm_window=3)
    await services.registry.start()
    history: History = []
    named = set()
    title = user("Write a title of five words.")
    for number in range(1, 7):
        services.original.answers = services.surrogate.answers = [f"answer {number}"]
        asked = [ask(services, [*history, user(f"question {number}")], session)]
        if beside and history:
            asked.append(ask(services, [*history, title], session))
        answer, *_ = await asyncio.gather(*asked)
        named.add(answer.headers["X-SOMA-Session"])
        history += [user(f"question {number}"), said(text(answer))]
        if not beside:
            await ask(services, [*history, title], session)
    assert len(named) == 1
    assert len({key for key, _ in services.events}) == 1
    queries = [turn.messages[-1]["content"] for turn in services.session(named.pop()).turns]
    assert queries[:5] == [f"question {number}" for number in range(1, 6)]


async def test_regenerating_an_answer_counts_no_turn_and_the_first_answer_may_be_gone_on_from(
    build: Build,
) -> None:
    services = build(warm_window=4)
    await services.registry.start()
    await ask(services, [user("q0")], "s")
    history = [user("q0"), said("same"), user("q1")]
    reasons, texts = [], []
    for number in range(3):
        services.original.answers = [f"try {number}"]
        answer = await ask(services, history, "s")
        reasons.append(answer.headers["X-SOMA-Reason"])
        texts.append(text(answer))
    assert len(set(reasons)) == 1
    services.original.answers = services.surrogate.answers = ["next"]
    answer = await ask(services, [*history, said(texts[0]), user("q2")], "s")
    assert answer.headers["X-SOMA-Session"] == "s"
    assert [turn.answer for turn in services.session().turns] == ["same", "try 0", "next"]


async def test_a_client_that_sends_its_newest_message_alone_stays_in_its_session_and_is_told(
    services: Services,
) -> None:
    answers = [await ask(services, [user(f"question {number}")], "s") for number in (1, 2, 3)]
    assert sessions(answers) == {"s"}
    assert "X-SOMA-History" not in answers[0].headers
    assert answers[1].headers["X-SOMA-History"].startswith("client")


async def test_a_client_that_sends_its_newest_message_alone_may_be_given_its_history(build: Build) -> None:
    services = build(sessions={"history": "server"}, warm_window=6)
    await services.registry.start()
    for number in (1, 2, 2, 3):
        services.original.answers = [f"answer {number}"]
        answer = await ask(services, [system(f"It is {number}."), user(f"question {number}")], "s")
    assert answer.headers["X-SOMA-History"].startswith("server")
    assert [message["content"] for message in services.original.calls[-1].body["messages"]] == [
        "It is 3.",
        "question 1",
        "answer 1",
        "question 2",
        "answer 2",
        "question 3",
    ]
    assert len(services.session().turns) == 3


PREFILL = {"add_generation_prompt": False, "continue_final_message": True}


@pytest.mark.parametrize("session", ["s", None])
async def test_a_beginning_that_the_client_gave_is_part_of_the_answer(
    services: Services, session: str | None
) -> None:
    history: History = []
    answers = []
    for number in (1, 2, 3):
        services.original.answers = [f"are red, {number}"]
        asked = [*history, user(f"Write line {number}"), said("Roses ")]
        answers.append(await ask(services, asked, session, **PREFILL))
        history = [*asked[:-1], said(f"Roses {text(answers[-1])}")]
    (name,) = sessions(answers)
    assert [turn.answer for turn in services.session(name).turns] == [f"Roses are red, {n}" for n in (1, 2, 3)]
    assert not any(turn.teaches() for turn in services.session(name).turns)


async def test_an_answer_that_is_continued_is_one_answer(services: Services) -> None:
    services.original.answers = ["one two"]
    await ask(services, [user("count")], "s")
    services.original.answers = [" three"]
    await ask(services, [user("count"), said("one two")], "s", **PREFILL)
    answer = await ask(services, [user("count"), said("one two three"), user("on")], "s")
    assert answer.headers["X-SOMA-Session"] == "s"
    assert services.session().turns[0].answer == "one two three"


async def test_a_name_that_is_added_later_is_no_difference(services: Services) -> None:
    first = await ask(services, [user("q1")])
    second = await ask(services, [{**user("q1"), "name": "Ana"}, said(text(first)), user("q2")])
    assert len(sessions([first, second])) == 1


async def test_a_reply_that_begins_a_branch_says_why(
    services: Services,
) -> None:
    history: History = []
    for number in (1, 2, 3):
        services.original.answers = services.surrogate.answers = [f"answer {number}"]
        history.append(user(f"question {number}"))
        history.append(said(text(await ask(services, history, "s"))))
    edited = [*history[:3], said("never said"), user("go on")]
    requests = (edited, [*history[:2], user("another")], [user("alone")])
    whys = [(await ask(services, messages, "s")).headers.get("X-SOMA-Branch") for messages in requests]
    assert whys == ["answer 2 differs", "question 2 differs", "3 recorded turns are not in the request"]
    answer = await ask(services, [*edited, said("answer 3"), user("and")], "s")
    assert answer.headers["X-SOMA-Session"].startswith("s~")
    assert "X-SOMA-Branch" not in answer.headers
    causes = [event.data["cause"] for _, event in services.events if event.kind == "branched"]
    assert causes[:3] == ["answer", "question", "history"]


async def test_two_users_behind_one_key_who_begin_alike_never_swap_sessions(services: Services) -> None:
    services.original.answers = ["Hello!", "Hello!", "a2", "b2", "a3", "b3"]
    services.surrogate.answers = ["Hello!"]
    firsts = [(await ask(services, [user("hi")])).headers["X-SOMA-Session"] for _ in "ab"]
    begun = [user("hi"), said("Hello!")]
    seconds = {}
    for name in "ab":
        answer = await ask(services, [*begun, user(f"I am {name}")])
        seconds[name] = (answer.headers["X-SOMA-Session"], text(answer))
    assert len({*firsts, seconds["a"][0], seconds["b"][0]}) == 4
    for name in "ba":
        session, reply = seconds[name]
        answer = await ask(services, [*begun, user(f"I am {name}"), said(reply), user("go on")])
        assert answer.headers["X-SOMA-Session"] == session
        queries = [turn.messages[-1]["content"] for turn in services.session(session).turns]
        assert queries == ["hi", f"I am {name}", "go on"]
    await services.session_admin.remove(services.session(firsts[0]).key)
    assert services.session(seconds["a"][0]).turns
    assert services.session(seconds["b"][0]).turns


async def test_two_users_behind_one_key_are_told_apart_by_their_system_messages(services: Services) -> None:
    firsts = {
        name: (await ask(services, [system(f"The user is {name}."), user("hi")])).headers["X-SOMA-Session"]
        for name in ("Ana", "Ben")
    }
    for name in ("Ben", "Ana"):
        answer = await ask(services, [system(f"The user is {name}."), user("hi"), said("same"), user("go on")])
        assert answer.headers["X-SOMA-Session"] == firsts[name]


async def test_another_tenant_is_never_found_by_its_answers(services: Services) -> None:
    answers = await play(services, everything, with_source)
    other = [user("Question 1 about ferries?"), said(with_source("Ferry 2 sails.")), user("next")]
    assert (await ask(services, other, key="another")).headers["X-SOMA-Session"] not in sessions(answers)


async def test_branches_do_not_count_as_live_sessions_and_go_with_their_root(services: Services) -> None:
    services.meter.sessions = 1
    root = "auto-insurance-17"
    history: History = []
    for number in (1, 2, 3):
        services.original.answers = services.surrogate.answers = [f"answer {number}"]
        history.append(user(f"question {number}"))
        history.append(said(text(await ask(services, history, root))))
    branches = sessions([await ask(services, [*history[:2], user(query)], root) for query in ("a", "b")])
    assert all(name.startswith(f"{root}~") for name in branches)
    tenant = hashlib.sha256(b"k").hexdigest()[:16]
    assert await services.registry.live(tenant) == 1
    await services.session_admin.remove(SessionKey(tenant, root))
    assert not any(services.registry.is_live(SessionKey(tenant, name)) for name in (root, *branches))


@pytest.mark.parametrize(
    "header", ["X-Session-ID", "X-OpenWebUI-Chat-Id", "X-LiteLLM-Session-Id", "session_id", "X-Conversation-Id"]
)
async def test_the_ids_that_other_tools_send_name_a_session(services: Services, header: str) -> None:
    answer = await ask(services, [user("hi")], headers={header.lower(): "chat-77"})
    assert answer.headers["X-SOMA-Session"] == "chat-77"


async def test_other_headers_and_fields_can_be_configured_to_name_a_session(build: Build) -> None:
    services = build(sessions={"headers": ["X-Room"], "body_fields": ["extra.thread", "prompt_cache_key"]})
    await services.registry.start()
    named = [
        await ask(services, [user("hi")], headers={"x-room": "a"}),
        await ask(services, [user("hi")], extra={"thread": "b"}),
        await ask(services, [user("hi")], prompt_cache_key="c"),
    ]
    assert [answer.headers["X-SOMA-Session"] for answer in named] == ["a", "b", "c"]
    unnamed = await ask(services, [user("hi")], "d")
    assert unnamed.headers["X-SOMA-Session"].startswith("auto-")


async def test_a_request_of_too_many_messages_is_refused_by_number(build: Build) -> None:
    services = build(sessions={"max_messages": 3})
    await services.registry.start()
    with pytest.raises(BadRequest, match=r"messages: found 4; expected at most 3 \(sessions.max_messages\)"):
        await ask(services, [user("x")] * 4)


async def test_a_fork_never_counts_past_its_warm_start(services: Services) -> None:
    services.trainer.adapted = services.trainer.plain
    services.surrogate.answers = ["different"]
    history: History = []
    for number in range(1, 7):
        services.original.answers = [f"answer {number}"]
        history.append(user(f"question {number}"))
        history.append(said(text(await ask(services, history, "s"))))
    answer = await ask(services, [*history[:9], said("never said"), user("go on")], "s")
    assert answer.headers["X-SOMA-Phase"] == Phase.WARM_START
    assert answer.headers["X-SOMA-Reason"] == "warm start 2 of 2"


async def test_a_dialogue_that_branches_again_and_again_is_warned_of(
    services: Services, caplog: pytest.LogCaptureFixture
) -> None:
    log = EventLog()
    history: History = []
    for number in (1, 2, 3):
        history.append(user(f"question {number}"))
        history.append(said(text(await ask(services, history, "s"))))
    with caplog.at_level(logging.WARNING, "soma_vllm"):
        for number in range(3):
            await ask(services, [*history[:2], user(f"secret words {number}")], "s")
        for key, event in services.events:
            log(key, event)
    (record,) = [record for record in caplog.records if "branched 3 times" in record.getMessage()]
    assert "question 2 differs" in record.getMessage()
    assert "secret" not in record.getMessage()

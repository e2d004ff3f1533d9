"""Answers as clients keep them are recognised, and others are not."""

from __future__ import annotations

import pytest

from soma_vllm.sessions.state.answer_print import AnswerPrint, HeardAnswer
from soma_vllm.sessions.state.question import asked_alike

RECORDED = "<think>It asks for boats.</think>\n\n**Ferries** sail at 9.\n\n* daily\n* on time"


def heard(text: str | None, **more: object) -> HeardAnswer:
    return HeardAnswer("t", {"role": "assistant", "content": text, **more})


def calling(arguments: str) -> list[dict[str, object]]:
    return [{"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}}]


@pytest.mark.parametrize(
    "kept",
    [
        RECORDED,
        "**Ferries** sail at 9.\n\n* daily\n* on time",
        "  Ferries sail at 9. \n- daily\n- on time\n",
        "It asks for boats.</think>Ferries sail at 9.\ndaily\non time",
        '<details type="reasoning" done="true">boats</details>\nFerries sail at 9.\n* daily\n* on time',
        "Ferries sail at 9 [1].\n\n* daily [2](https://example.org)\n* on time【4:0†source】",
        "**Ferries** sail at 9.\n\n* daily\n* on time\n\n[1] source",
        "**Ferries** sail at 9.\n\n* daily\n* on time\nSources: a timetable",
        "**Ferries** sail at 9.\n\n* daily\n* on time (see the timetable)",
    ],
)
def test_an_answer_is_recognised_as_clients_keep_it(kept: str) -> None:
    recorded = heard(RECORDED).print
    assert AnswerPrint.parse(str(recorded)) == recorded
    assert heard(kept).is_same(recorded)


@pytest.mark.parametrize(
    "other", ["", "Ferries sail at 10.\n* daily\n* on time", "Ferries sail at 9.\n* daily\n* on time, mostly"]
)
def test_another_answer_is_told_from_it(other: str) -> None:
    assert not heard(other).is_same(heard(RECORDED).print)


def test_an_answer_that_was_left_early_is_a_beginning() -> None:
    assert heard("Ferries sail").is_beginning(RECORDED)
    assert not heard("").is_beginning(RECORDED)
    assert not heard("Ferries stay").is_beginning(RECORDED)


def test_calls_count_and_the_text_beside_them_may_be_left_out() -> None:
    recorded = heard("Let me see.", tool_calls=calling('{"a": 1}')).print
    assert heard(None, tool_calls=calling('{"a":1}')).is_same(recorded)
    assert not heard("Let me see.", tool_calls=calling('{"a": 2}')).is_same(recorded)
    assert not heard("Let me see.").is_same(recorded)


def test_thoughts_that_were_cut_off_are_no_answer_and_a_block_of_details_is_one() -> None:
    assert heard("<think>and so on").print.size == 0
    assert heard("<details><summary>More</summary>text</details>").print.size > 0


def test_an_answer_is_found_by_its_end_without_what_was_put_behind_it() -> None:
    assert heard("Yes.").print.words in heard("Yes.\n\n[1] source\n[2] another\n\nmore").endings()


def test_answers_of_two_tenants_have_two_digests() -> None:
    assert heard("Yes.").print != HeardAnswer("u", {"role": "assistant", "content": "Yes."}).print


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


@pytest.mark.parametrize(
    "wrapped",
    [
        "Use these passages: [1] ferries.\n\nWhere to?",
        "Where to?\n\n(It is 10:03.)",
        "<context>x</context>\n<query>Where to?</query>",
        "Question: Where to?",
    ],
)
def test_a_question_is_recognised_with_something_around_it(wrapped: str) -> None:
    assert asked_alike(user(wrapped), user("Where to?"))
    assert asked_alike(user("Where to?"), user(wrapped))


@pytest.mark.parametrize("edited", ["Where to? And when?", "So Where to?", "Where from?", ""])
def test_an_edited_question_is_another_one(edited: str) -> None:
    assert not asked_alike(user("Where to?"), user(edited))


def test_reminders_and_files_beside_a_question_do_not_make_it_another_one() -> None:
    files = [*user("file.py:\nx = 1"), {"role": "assistant", "content": "Ok."}]
    reminder = {"role": "system", "content": "Stay in character."}
    assert asked_alike([*files, *user("Where to?"), reminder], user("Where to?"))

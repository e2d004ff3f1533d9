"""Recognising a dialogue by what was said."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from soma_vllm.errors import BadRequest
from soma_vllm.sessions.state.identity import MAX_ID_LENGTH, explicit_id, tenant_of
from soma_vllm.sessions.state.phases import Phase
from soma_vllm.sessions.state.session import Session, fresh
from soma_vllm.sessions.state.transcript import read
from soma_vllm.sessions.state.turn import Turn
from soma_vllm.types import Role, SessionKey, Usage

Messages = list[dict[str, Any]]


def dialogue(turns: int, system: str | None = "You are terse.") -> Messages:
    """`turns` finished turns and one open query."""
    messages: Messages = [] if system is None else [{"role": "system", "content": system}]
    for number in range(1, turns + 1):
        messages += [{"role": "user", "content": f"q{number}"}, {"role": "assistant", "content": f"a{number}"}]
    return [*messages, {"role": "user", "content": f"q{turns + 1}"}]


def recorded(*pairs: tuple[Messages, str]) -> Session:
    """A session whose turns had these new messages and these answers."""
    session, history = fresh(KEY), []
    for number, (messages, answer) in enumerate(pairs, 1):
        history += messages
        asked = read("t", history).asked
        history.append({"role": "assistant", "content": answer})
        turn = Turn(
            number, tuple(messages), answer, Role.ORIGINAL, None, Phase.WARM_START, "", Usage(), None, 0.0
        )
        answered = read("t", history)
        turn = replace(turn, chain=answered.asked, asked=asked, links=(answered.marks[-1].link,))
        session = replace(session, turns=(*session.turns, turn))
    return session


KEY = SessionKey("t", "s")
RECORD = recorded((dialogue(0), "a1"), ([{"role": "user", "content": "q2"}], "a2"))


def repeated(messages: Messages) -> tuple[int, Any]:
    overlap = RECORD.overlap(read("t", messages))
    return overlap.turns, tuple(messages[overlap.end :])


def test_a_history_that_repeats_the_record_leaves_only_the_new_query() -> None:
    assert repeated(dialogue(2)) == (2, ({"role": "user", "content": "q3"},))


def test_white_space_and_content_parts_do_not_make_a_history_another_one() -> None:
    messages = dialogue(2)
    messages[2] = {"role": "assistant", "content": [{"type": "text", "text": " a1\n"}]}
    assert repeated(messages)[0] == 2
    assert read("t", messages).asked == read("t", dialogue(2)).asked


def test_an_edited_answer_ends_the_common_part() -> None:
    messages = dialogue(2)
    messages[4] = {"role": "assistant", "content": "something else"}
    count, rest = repeated(messages)
    assert count == 1
    assert rest[0]["content"] == "q2"


def test_a_retry_is_told_from_another_query() -> None:
    retry, other = dialogue(1), [*dialogue(1)[:-1], {"role": "user", "content": "something else"}]
    assert repeated(retry) == (1, ({"role": "user", "content": "q2"},))
    assert RECORD.asked_again_by(read("t", retry))
    assert not RECORD.asked_again_by(read("t", other))


def test_the_same_words_of_two_tenants_have_two_digests() -> None:
    assert read("t", dialogue(1)).marks[0].chain != read("u", dialogue(1)).marks[0].chain


def test_images_and_tool_results_count_as_said() -> None:
    plain = [{"role": "user", "content": "x"}]
    image = [{"role": "user", "content": [{"type": "text", "text": "x"}, {"type": "image_url"}]}]
    one, other = ([{"role": "tool", "content": "x", "tool_call_id": n}] for n in ("1", "2"))
    assert len({read("t", m).asked for m in (plain, image, one, other)}) == 4


def test_a_call_of_a_tool_is_recognised_by_its_name_and_what_its_arguments_mean() -> None:
    def call(name: str, arguments: str) -> str:
        function = {"name": name, "arguments": arguments}
        made = [{"id": "1", "type": "function", "function": function}]
        return read("t", [{"role": "assistant", "content": None, "tool_calls": made}]).asked

    assert call("f", '{"a": 1}') == call("f", '{"a":1}')
    assert len({call("f", '{"a": 1}'), call("f", '{"a": 2}'), call("g", '{"a": 1}'), call("f", "{")}) == 4


def test_an_erased_session_takes_its_words_from_a_request_that_repeats_them() -> None:
    silent = RECORD.without_text()
    assert not silent.kept()
    assert [turn.answer for turn in silent.turns] == ["", ""]
    assert silent.with_text(read("t", dialogue(2))) == RECORD


WORD = st.text(max_size=6)
SAID = st.one_of(
    st.builds(lambda text: {"role": "user", "content": text}, WORD),
    st.builds(lambda text: {"role": "assistant", "content": text}, st.none() | WORD),
    st.builds(lambda text: {"role": "user", "content": [{"type": "text", "text": text}]}, WORD),
    st.builds(lambda text: {"role": "tool", "content": text, "tool_call_id": "1"}, WORD),
)

SYSTEM = st.builds(lambda text: {"role": "system", "content": text}, WORD)


@given(st.lists(SAID, max_size=8), st.lists(SAID, max_size=3))
def test_a_history_and_its_continuation_share_every_mark_of_the_history(past: Messages, more: Messages) -> None:
    marks = read("t", past).marks
    assert read("t", [*past, *more]).marks[: len(marks)] == marks
    assert [past[mark.end - 1]["role"] for mark in marks] == ["assistant"] * len(marks)


@given(st.lists(SAID | SYSTEM, max_size=6), st.lists(SAID | SYSTEM, max_size=4))
def test_a_digest_that_is_continued_is_the_digest_of_the_whole(past: Messages, more: Messages) -> None:
    begun = read("t", past)
    assert begun.followed_by(*more) == read("t", [*past, *more])
    assert begun == read("t", past)
    assert begun.followed_by(*more[:1]).followed_by(*more[1:]) == read("t", [*past, *more])


def test_an_explicit_id_comes_from_the_header_before_the_metadata() -> None:
    body = {"metadata": {"session_id": "from-body"}}
    assert explicit_id({"x-session-id": "from-header"}, body) == "from-header"
    assert explicit_id({}, body) == "from-body"
    assert explicit_id({}, {}) is None


@pytest.mark.parametrize("bad", ["x" * (MAX_ID_LENGTH + 1), "a\x00b", "a\nb", " ", 7])
def test_an_id_that_cannot_be_one_is_refused(bad: Any) -> None:
    with pytest.raises(BadRequest):
        explicit_id({}, {"metadata": {"session_id": bad}})


def test_tenants_are_digests_of_their_keys() -> None:
    assert tenant_of(None) == tenant_of("Basic x") == "public"
    assert tenant_of("Bearer one") != tenant_of("Bearer two")
    assert "one" not in tenant_of("Bearer one")

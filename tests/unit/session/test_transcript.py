"""Recognising a dialogue by what was said."""

from __future__ import annotations

from typing import Any

import pytest

from soma_vllm.errors import BadRequest
from soma_vllm.session.identity import MAX_ID_LENGTH, explicit_id, tenant_of
from soma_vllm.session.phases import Phase
from soma_vllm.session.session import Turn
from soma_vllm.session.transcript import answered, common_turns, fingerprint
from soma_vllm.types import Role, Usage

Messages = list[dict[str, Any]]


def dialogue(turns: int, system: str | None = "You are terse.") -> Messages:
    """`turns` finished turns and one open query."""
    messages: Messages = [] if system is None else [{"role": "system", "content": system}]
    for number in range(1, turns + 1):
        messages += [{"role": "user", "content": f"q{number}"}, {"role": "assistant", "content": f"a{number}"}]
    return [*messages, {"role": "user", "content": f"q{turns + 1}"}]


def served(*pairs: tuple[Messages, str]) -> tuple[Turn, ...]:
    return tuple(
        Turn(n, tuple(m), a, Role.ORIGINAL, None, Phase.WARM_START, "", Usage(), None, 0.0)
        for n, (m, a) in enumerate(pairs, 1)
    )


RECORD = served((dialogue(0), "a1"), ([{"role": "user", "content": "q2"}], "a2"))


def test_a_history_that_repeats_the_record_leaves_only_the_new_query() -> None:
    assert common_turns(RECORD, dialogue(2)) == (2, ({"role": "user", "content": "q3"},))


def test_white_space_and_content_parts_do_not_make_a_history_another_one() -> None:
    messages = dialogue(2)
    messages[2] = {"role": "assistant", "content": [{"type": "text", "text": " a1\n"}]}
    assert common_turns(RECORD, messages)[0] == 2
    assert fingerprint(messages) == fingerprint(dialogue(2))


def test_an_edited_answer_ends_the_common_part() -> None:
    messages = dialogue(2)
    messages[4] = {"role": "assistant", "content": "something else"}
    count, rest = common_turns(RECORD, messages)
    assert count == 1
    assert rest[0]["content"] == "q2"


def test_a_retry_shares_all_but_its_own_turn() -> None:
    assert common_turns(RECORD, dialogue(1)) == (1, ({"role": "user", "content": "q2"},))


def test_the_answered_part_ends_with_the_last_answer() -> None:
    assert answered(dialogue(0)) == ()
    assert answered(dialogue(2))[-1]["content"] == "a2"


def test_images_and_tool_results_count_as_said() -> None:
    plain = [{"role": "user", "content": "x"}]
    image = [{"role": "user", "content": [{"type": "text", "text": "x"}, {"type": "image_url"}]}]
    one, other = ([{"role": "tool", "content": "x", "tool_call_id": n}] for n in ("1", "2"))
    assert len({fingerprint(m) for m in (plain, image, one, other)}) == 4


def test_an_answer_that_called_a_tool_is_recognised_by_its_text() -> None:
    call = [{"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}]
    assert fingerprint(call) == fingerprint([{"role": "assistant", "content": ""}])


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

"""What the surrogate is shown of a long dialogue, and how still the prompt's head is."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from soma_vllm.config import Prefix
from soma_vllm.sessions.state.prefix import SUMMARY_TURNS, compress, factual, split_turns, words_in
from soma_vllm.types import Message

Messages = list[dict[str, Any]]
TABLE = "| town | Jan |\n| Arbel | 82 |\n| Brask | 40 |\nWhich is wetter?"


def user(text: Any) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def dialogue(turns: int, pasted: dict[int, str] | None = None) -> Messages:
    """`turns` finished turns and one open query; some queries are something pasted."""
    messages: Messages = [{"role": "system", "content": "You are terse."}]
    for number in range(1, turns + 1):
        messages += [user((pasted or {}).get(number, f"q{number}")), assistant(f"a{number}")]
    return [*messages, user(f"q{turns + 1}")]


def anchored(**keys: Any) -> Prefix:
    return Prefix.model_validate({"mode": "anchored", "window_step": 1, **keys})


def said(shown: tuple[Message, ...], role: str) -> list[Any]:
    return [message["content"] for message in shown if message["role"] == role]


@given(
    st.integers(0, 12), st.sampled_from(["full", "anchored", "sliding"]), st.integers(0, 4), st.integers(1, 3)
)
def test_the_query_is_always_the_last_message_and_never_changed_without_need(
    turns: int, mode: str, keep: int, step: int
) -> None:
    shown = compress(dialogue(turns), Prefix.model_validate({"mode": mode, "window_step": step}), keep)
    assert shown[0]["content"] == "You are terse."
    assert str(shown[-1]["content"]).endswith(f"q{turns + 1}")
    assert len(split_turns(shown)[1]) <= turns + 1


def test_a_full_prefix_is_the_history_itself() -> None:
    assert compress(dialogue(9), Prefix(), 1) == tuple(dialogue(9))


def test_the_sliding_prefix_drops_turn_one_and_every_pasted_fact() -> None:
    shown = compress(dialogue(6, {2: TABLE}), Prefix(mode="sliding"), 2)
    assert said(shown, "assistant") == ["a5", "a6"]
    assert "q1; | town | Jan | | Arbel | 82 | | Brask…; q3; q4" in shown[1]["content"]


def test_the_anchored_prefix_keeps_turn_one_verbatim() -> None:
    shown = compress(dialogue(8), anchored(window_step=2), 2)
    assert [m["content"] for m in shown[:3]] == ["You are terse.", "q1", "a1"]


def test_k_turns_stay_and_at_most_a_step_less_one_more() -> None:
    for keep, step in itertools.product((0, 1, 2), (1, 2, 3)):
        kept = [
            len(split_turns(compress(dialogue(turns), anchored(window_step=step), keep))[1]) - 2
            for turns in range(8, 16)
        ]
        assert (min(kept), max(kept)) == (keep, keep + step - 1)


def test_a_turn_that_brings_facts_stays_verbatim_in_the_anchor() -> None:
    shown = compress(dialogue(8, {4: TABLE}), anchored(), 1)
    assert said(shown, "user")[:2] == ["q1", TABLE]
    assert said(shown, "assistant") == ["a1", "a4", "a8"]
    assert "q2; q3; q5; q6; q7]" in said(shown, "user")[2]


def test_an_anchor_of_the_first_turn_alone_summarises_facts_too() -> None:
    shown = compress(dialogue(8, {4: TABLE}), anchored(anchor="first"), 1)
    assert said(shown, "assistant") == ["a1", "a8"]


def test_the_anchor_takes_the_oldest_facts_while_its_words_last() -> None:
    pasted = {n: f"passage {n} " + "word " * 50 for n in (2, 4, 6)}
    shown = compress(dialogue(9, pasted), anchored(anchor_words=110), 1)
    assert said(shown, "assistant") == ["a1", "a2", "a4", "a9"]


def test_a_summary_of_no_words_leaves_the_middle_out() -> None:
    shown = compress(dialogue(8), anchored(summary_words=0), 1)
    assert said(shown, "user") == ["q1", "q8", "q9"]


def test_a_summary_names_the_latest_turns_only() -> None:
    line = compress(dialogue(40), anchored(), 1)[3]["content"]
    assert line.count(";") == SUMMARY_TURNS - 1
    assert "q39]" in line
    assert "q27;" not in line


def test_a_summary_cuts_text_without_spaces() -> None:
    line = compress(dialogue(5, {2: "雨" * 450}), anchored(anchor_words=10, summary_words=4), 1)[3]["content"]
    assert line.count("雨") == 48


@pytest.mark.parametrize(
    "text",
    [
        TABLE,
        "Look:\n```python\nx = 1\n```",
        '{"sensor": "a", "value": 3}',
        "CREATE TABLE loans (id INTEGER)",
        "We need\n- eggs\n- flour\n- milk",
        "The bus leaves at 08:15, 09:15, 10:45, 12:00, 14:30 and 17:05.",
        "word " * 40,
        "雨" * 500,
        [{"type": "text", "text": "What is this?"}, {"type": "image_url", "image_url": {"url": "x"}}],
    ],
)
def test_what_is_pasted_counts_as_facts(text: Any) -> None:
    assert factual(user(text))


@pytest.mark.parametrize(
    "text",
    [
        "And in July?",
        "Now with the book's title.",
        "Forget the labels and write a tiny poem about a glacier that dreams of the sea.",
        "Edit: An e-mail to 8 users went out on May 2, 2026!",
        [{"type": "text", "text": "Thanks, that helps."}],
    ],
)
def test_small_talk_and_short_questions_do_not(text: Any) -> None:
    assert not factual(user(text))


def test_a_tool_result_makes_its_turn_a_fact() -> None:
    messages: Messages = dialogue(6)
    messages.insert(4, {"role": "tool", "content": "17 degrees", "tool_call_id": "1"})
    shown = compress(messages, anchored(), 1)
    assert said(shown, "tool") == ["17 degrees"]


def test_only_the_pasted_turns_of_the_shipped_dialogues_are_facts() -> None:
    folder = Path(__file__).parents[3] / "dialogues"
    found = {
        (name, number)
        for path in folder.glob("*.json")
        for name, turns in json.loads(path.read_text(encoding="utf-8")).items()
        for number, text in enumerate(turns[1:], 2)
        if factual(user(text))
    }
    assert found == {("harbour-log", 4), ("recipe-card", 5)}


def test_long_words_count_as_several() -> None:
    assert words_in("three short words") == 3
    assert words_in("x" * 25) == 3


def test_between_moves_each_prompt_begins_with_all_of_the_prompt_before_it() -> None:
    """Seeded dialogues that grow turn by turn; a move is a prompt that does not extend the one before."""
    draw = random.Random(3)
    for _ in range(60):
        pasted = {n: draw.choice([TABLE, "word " * 45]) for n in range(2, 24) if draw.random() < 0.15}
        prefix = anchored(
            anchor=draw.choice(["first", "facts"]),
            window_step=draw.randint(1, 4),
            summary_words=draw.choice([0, 5, 12]),
            anchor_words=draw.choice([30, 100, 400]),
            anchor_role=draw.choice(["user", "system"]),
        )
        keep = draw.randint(0, 3)
        whole = dialogue(24, pasted)
        prompts = [compress(whole[: 2 + 2 * n], prefix, keep) for n in range(24)]
        moves = [n for n in range(1, 24) if prompts[n][: len(prompts[n - 1])] != prompts[n - 1]]
        assert len(moves) <= 24 // prefix.window_step
        assert all(b - a >= prefix.window_step for a, b in itertools.pairwise(moves))
        assert all("q1" in prompt[0]["content"] + prompt[1]["content"] for prompt in prompts)


def test_what_is_in_the_anchor_stays_there_when_the_window_moves() -> None:
    draw = random.Random(4)
    for _ in range(40):
        pasted = {n: f"{n}: " + "word " * draw.randint(40, 90) for n in range(2, 24) if draw.random() < 0.3}
        prefix = anchored(window_step=2, summary_words=0, anchor_words=draw.choice([60, 200, 400]))
        anchors = []
        for turns in range(2, 24):
            shown = compress(dialogue(turns, pasted), prefix, 1)
            window = (turns - 2) % 2 + 1
            anchors.append(shown[: len(shown) - 1 - 2 * window])
        assert all(b[: len(a)] == a for a, b in itertools.pairwise(anchors))


def test_an_anchor_in_the_system_message_holds_its_queries_without_their_answers() -> None:
    shown = compress(dialogue(8, {4: TABLE}), anchored(anchor_role="system", summary_words=0), 2)
    assert shown[0] == {"role": "system", "content": f"You are terse.\n\nq1\n\n{TABLE}"}
    assert [m["content"] for m in shown[1:]] == ["q7", "a7", "q8", "a8", "q9"]


def test_an_anchor_makes_a_system_message_where_the_client_sent_none() -> None:
    shown = compress(dialogue(4)[1:], anchored(anchor_role="system", summary_words=0), 0)
    assert shown == ({"role": "system", "content": "q1"}, user("q5"))


def test_an_attachment_of_the_anchor_stays_a_turn() -> None:
    messages = dialogue(4)
    messages[1] = user([{"type": "text", "text": "Look"}, {"type": "image_url", "image_url": {"url": "x"}}])
    shown = compress(messages, anchored(anchor_role="system", summary_words=0), 0)
    assert shown == (*messages[:3], messages[-1])


def test_a_greeting_before_turn_one_follows_the_system_anchor() -> None:
    messages = [dialogue(0)[0], assistant("Hello."), *dialogue(3)[1:]]
    shown = compress(messages, anchored(anchor_role="system", summary_words=0), 0)
    assert [m["content"] for m in shown] == ["You are terse.\n\nq1", "Hello.", "q4"]


def test_a_system_anchor_has_one_more_move_where_it_begins_and_is_as_still_after_it() -> None:
    prefix = anchored(anchor_role="system", window_step=3, summary_words=0)
    whole = dialogue(24, {9: TABLE})
    prompts = [compress(whole[: 2 + 2 * turns], prefix, 1) for turns in range(24)]
    moves = [n for n in range(1, 24) if prompts[n][: len(prompts[n - 1])] != prompts[n - 1]]
    assert moves == list(range(5, 24, 3))
    assert len({prompt[0]["content"] for prompt in prompts[5:]}) == 2


def test_a_sliding_head_changes_every_turn() -> None:
    heads = [compress(dialogue(turns), Prefix(mode="sliding"), 2)[:2] for turns in range(6, 12)]
    assert sum(a != b for a, b in itertools.pairwise(heads)) == 5


def test_a_short_dialogue_is_not_compressed() -> None:
    for mode in ("anchored", "sliding"):
        assert compress(dialogue(2), Prefix.model_validate({"mode": mode}), 2) == tuple(dialogue(2))

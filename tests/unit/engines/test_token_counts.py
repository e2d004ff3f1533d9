"""Estimates of tokens that an engine has not counted."""

from __future__ import annotations

from soma_vllm.engines.token_counts import estimate, prompt_estimate


def test_a_prompt_is_estimated_by_its_words_and_not_by_what_is_attached_to_it() -> None:
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 2_000_000}}
    text = {"type": "text", "text": "What is this? " * 20}
    plain = prompt_estimate({"messages": [{"role": "user", "content": [text]}]})
    assert 50 < plain < 200
    assert prompt_estimate({"messages": [{"role": "user", "content": [text, image]}]}) == plain
    assert prompt_estimate({"prompt": "x" * 4_000}) >= 1_000


def test_tools_and_every_choice_of_an_answer_count() -> None:
    asked = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 10}
    assert estimate({**asked, "n": 3}) - estimate(asked) == 20
    tools = [{"type": "function", "function": {"name": "f", "description": "long " * 100}}]
    assert prompt_estimate({**asked, "tools": tools}) > prompt_estimate(asked) + 100

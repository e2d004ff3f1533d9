"""From turns to token ids, through the chat template."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from support.method_models import ask
from transformers import PreTrainedTokenizerFast

from soma_vllm.errors import TrainingError
from soma_vllm.method.rendering import Rendered, end_of_turn, prompt_ids, render
from soma_vllm.types import Example, Teacher


def test_a_turn_is_the_chat_template_then_the_answer_then_the_end_of_turn(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    messages = ({"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi?"})
    rendered = render(tokenizer, [Example(turn=2, messages=messages, answer="Hello.")])[0]
    assert tokenizer.decode(rendered.prompt) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert tokenizer.decode(rendered.answer) == "Hello.<|im_end|>"
    assert rendered.inputs == rendered.prompt + rendered.answer[:-1]


def test_the_end_of_turn_is_the_templates_and_not_the_end_of_text(tokenizer: PreTrainedTokenizerFast) -> None:
    assert end_of_turn(tokenizer) == tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert end_of_turn(tokenizer) != tokenizer.eos_token_id


def test_parts_of_text_are_joined_as_the_engine_joins_them_and_others_refused(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    parts = [{"type": "text", "text": "Hi"}, {"type": "text", "text": "?"}]
    split = Example(turn=1, messages=({"role": "user", "content": parts},), answer="Yes.")
    assert render(tokenizer, [split]) == render(tokenizer, [ask(1, "Hi\n?", "Yes.")])
    picture = Example(turn=5, messages=({"role": "user", "content": [{"type": "image_url"}]},), answer="Yes.")
    with pytest.raises(TrainingError, match=r"turn 5: vLLM refuses the prompt"):
        render(tokenizer, [picture])


def test_a_prompt_that_the_engine_read_is_taken_as_it_is(tokenizer: PreTrainedTokenizerFast) -> None:
    (turn,) = render(tokenizer, [replace(ask(1, "Hi?", "Yes."), prompt=(7, 8, 9))])
    assert turn.prompt == (7, 8, 9)


def test_empty_answers_are_refused_by_turn(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(TrainingError, match=r"turns 2, 3: found an empty answer"):
        render(tokenizer, [ask(1, "a", "b"), ask(2, "a", ""), ask(3, "a", " \n")])


def test_no_examples_are_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(TrainingError, match="no examples"):
        render(tokenizer, [])


@pytest.mark.parametrize(
    ("length", "prompt", "answer"),
    [
        (100, range(20), range(100, 110)),
        (25, range(5, 20), range(100, 110)),
        (12, range(17, 20), range(100, 109)),
        (1, range(19, 20), range(100, 101)),
    ],
)
def test_a_long_prompt_keeps_its_end_and_an_answer_is_never_cut_to_nothing(
    length: int, prompt: range, answer: range
) -> None:
    turn = Rendered(1, tuple(range(20)), tuple(range(100, 110))).within(length)
    assert turn.prompt == tuple(prompt)
    assert turn.answer == tuple(answer)


def teacher(tokenizer: PreTrainedTokenizerFast, answer: str, ended: bool = True) -> Teacher:
    """An original that said `answer`, a byte at a time, with two tokens of its distribution at each."""
    tokens = tokenizer(answer, add_special_tokens=False)["input_ids"]
    tokens = (*tokens, tokenizer.convert_tokens_to_ids("<|im_end|>")) if ended else tuple(tokens)
    top = np.array([[token, 7] for token in tokens], dtype=np.int32)
    return Teacher(tokens, top, np.full(top.shape, -0.7, dtype=np.float32))


@pytest.mark.parametrize("ended", [True, False], ids=["ended", "cut short"])
def test_an_answer_known_token_by_token_is_those_tokens_with_what_the_original_thought_of_them(
    tokenizer: PreTrainedTokenizerFast, ended: bool
) -> None:
    shown = teacher(tokenizer, "A cat.", ended)
    (turn,) = render(tokenizer, [replace(ask(3, "And?", "A cat."), teacher=shown)])
    assert turn.answer == shown.tokens
    assert turn.teacher is not None
    assert np.array_equal(turn.teacher[0], shown.top)
    assert np.array_equal(turn.teacher[1], shown.logprobs)
    assert turn.prompt == prompt_ids(tokenizer, ({"role": "user", "content": "And?"},))


def test_tokens_are_taken_as_they_were_chosen_and_not_as_the_tokenizer_would_cut_the_text(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    # What the client saw is stripped; what the original chose is kept.
    shown = teacher(tokenizer, " A cat , I 'm sure.\n")
    (turn,) = render(tokenizer, [replace(ask(3, "And?", "A cat , I 'm sure."), teacher=shown)])
    assert turn.answer == shown.tokens


@pytest.mark.parametrize("wrong", ["other words", "one token less", "an id that no text has", "nothing"])
def test_an_original_with_another_vocabulary_is_refused(tokenizer: PreTrainedTokenizerFast, wrong: str) -> None:
    right = teacher(tokenizer, "A cat.")
    tokens = {
        "other words": teacher(tokenizer, "A dog.").tokens,
        "one token less": right.tokens[1:],
        "an id that no text has": (*right.tokens[:-1], 265),
        "nothing": (),
    }[wrong]
    example = replace(ask(5, "And?", "A cat."), teacher=replace(right, tokens=tokens))
    with pytest.raises(TrainingError, match=r"turn 5: the original's tokens do not spell .* same tokenizer"):
        render(tokenizer, [ask(1, "a", "b"), example])


def test_likely_tokens_beyond_the_vocabulary_count_as_padding(tokenizer: PreTrainedTokenizerFast) -> None:
    shown = teacher(tokenizer, "Yes")
    shown.top[1, 1] = 151_990
    shown.top[2, 1], shown.logprobs[2, 1] = -1, -np.inf
    (turn,) = render(tokenizer, [replace(ask(3, "And?", "Yes"), teacher=shown)])
    assert turn.teacher is not None
    top, logprobs = turn.teacher
    assert top[:, 1].tolist() == [7, -1, -1, 7]
    assert logprobs[:, 1].tolist() == pytest.approx([-0.7, -np.inf, -np.inf, -0.7])
    assert (top.dtype, logprobs.dtype) == (np.int32, np.float32)
    assert shown.top[1, 1] == 151_990


@pytest.mark.parametrize("length", [100, 12, 1])
def test_a_shortened_answer_keeps_its_own_rows_of_the_teacher(length: int) -> None:
    rows = np.arange(20, dtype=np.int32).reshape(10, 2)
    whole = Rendered(1, tuple(range(20)), tuple(range(100, 110)), (rows, -rows.astype(np.float32)))
    turn = whole.within(length)
    assert turn.teacher is not None
    kept = len(turn.answer)
    assert np.array_equal(turn.teacher[0], rows[:kept])
    assert np.array_equal(turn.teacher[1], -rows[:kept])


def test_messages_the_template_refuses_are_named_by_turn(tokenizer: PreTrainedTokenizerFast) -> None:
    refusing: Any = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, eos_token="<|endoftext|>"
    )
    refusing.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system role') }}"
        "{% endif %}{{ m['content'] }}{% endfor %}"
    )
    system = Example(4, ({"role": "system", "content": "Be brief."},), "Yes.")
    with pytest.raises(TrainingError, match=r"turn 4: vLLM refuses the prompt: .*no system role"):
        render(refusing, [system])
    # Its template ends a turn with nothing, so the end of the text ends the answer.
    (turn,) = render(refusing, [ask(1, "Hi?", "Yes.")])
    assert turn.answer[-1] == refusing.eos_token_id

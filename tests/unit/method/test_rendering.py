"""From turns to token ids, through the chat template."""

from __future__ import annotations

import pytest
import torch
from method_models import ask
from transformers import PreTrainedTokenizerFast

from soma_vllm.errors import TrainingError
from soma_vllm.method.recipe import Surrogate
from soma_vllm.method.rendering import Rendered, answer_logits, end_of_turn, render
from soma_vllm.types import Example


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


def test_content_parts_of_text_are_joined_and_others_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    parts = [{"type": "text", "text": "Hi"}, {"type": "text", "text": "?"}]
    split = Example(turn=1, messages=({"role": "user", "content": parts},), answer="Yes.")
    assert render(tokenizer, [split]) == render(tokenizer, [ask(1, "Hi?", "Yes.")])
    picture = Example(turn=5, messages=({"role": "user", "content": [{"type": "image_url"}]},), answer="Yes.")
    with pytest.raises(TrainingError, match=r"turn 5: .*image_url"):
        render(tokenizer, [picture])


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


def test_answer_logits_are_the_whole_models_logits_at_the_answers_positions(surrogate: Surrogate) -> None:
    turn = render(surrogate.tokenizer, [ask(1, "Hi?", "Hello.")])[0]
    with torch.no_grad():
        whole = surrogate.model(torch.tensor([turn.prompt + turn.answer])).logits[0]
        found = answer_logits(surrogate.model, turn)
    start = len(turn.prompt)
    assert torch.allclose(found, whole[start - 1 : start - 1 + len(turn.answer)], atol=1e-5)


def test_a_soft_prompt_stands_before_the_whole_prompt(surrogate: Surrogate) -> None:
    turn = render(surrogate.tokenizer, [ask(1, "Hi?", "Hello.")])[0]
    words = surrogate.model.get_input_embeddings().weight
    with torch.no_grad():
        soft = answer_logits(surrogate.model, turn, soft_prompt=words[[65, 66]])
        hard = answer_logits(surrogate.model, Rendered(1, (65, 66, *turn.prompt), turn.answer))
    assert torch.allclose(soft, hard, atol=1e-5)

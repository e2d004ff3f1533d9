"""Greedy answers, against one forward pass per token."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.method_models import ask, tiny_model
from transformers import GenerationConfig, PreTrainedTokenizerFast

from soma_vllm.errors import TrainingError
from soma_vllm.method import generation
from soma_vllm.method.decoder import Decoder
from soma_vllm.method.generation import generate
from soma_vllm.method.recipe import Surrogate
from soma_vllm.method.rendering import end_of_turn, prompt_ids

PROMPTS: list[tuple[dict[str, Any], ...]] = [
    ({"role": "user", "content": "What is a crane, and what would one lift?"},),
    ({"role": "user", "content": "Hi"},),
    (
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "And a bat?"},
        {"role": "assistant", "content": "A club."},
        {"role": "user", "content": "Go on"},
    ),
    ({"role": "user", "content": "And a seal?"},),
]


@torch.no_grad()
def step_by_step(surrogate: Surrogate, prompt: tuple[dict[str, Any], ...], most: int) -> str:
    seen = list(prompt_ids(surrogate.tokenizer, prompt))
    start = len(seen)
    while len(seen) < start + most:
        token = int(surrogate.model(torch.tensor([seen]), use_cache=False).logits[0, -1].argmax())
        if token == end_of_turn(surrogate.tokenizer):
            break
        seen.append(token)
    text: str = surrogate.tokenizer.decode(seen[start:], skip_special_tokens=True)
    return text.strip()


def test_ragged_prompts_are_answered_by_the_first_choice_at_every_step(
    surrogate: Surrogate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generation, "_ROWS", 3)  # more than one batch
    expected = [step_by_step(surrogate, prompt, 12) for prompt in PROMPTS]
    assert len(set(expected)) == len(PROMPTS)
    assert generate(surrogate.decoder, surrogate.tokenizer, PROMPTS, 12) == expected


def test_an_answer_ends_where_the_model_ends_it(tokenizer: PreTrainedTokenizerFast) -> None:
    model = tiny_model("llama")
    surrogate = Surrogate(Decoder(model), tokenizer)
    ids = list(prompt_ids(tokenizer, PROMPTS[1]))
    said: list[int] = []
    with torch.no_grad():
        for _ in range(8):
            said.append(int(model(torch.tensor([ids + said])).logits[0, -1].argmax()))
        place = next(i for i in range(2, 8) if said[i] not in said[:i])
        # The end of turn now wins wherever this token did.
        model.lm_head.weight[end_of_turn(tokenizer)] = 1.01 * model.lm_head.weight[said[place]]
    answers = generate(surrogate.decoder, tokenizer, [PROMPTS[0], PROMPTS[1]], 12)
    assert answers[1] == tokenizer.decode(said[:place], skip_special_tokens=True).strip()
    assert answers == [step_by_step(surrogate, prompt, 12) for prompt in PROMPTS[:2]]


def test_what_the_models_folder_recommends_changes_nothing(qwen: Surrogate) -> None:
    plain = generate(qwen.decoder, qwen.tokenizer, PROMPTS, 12)
    recommended = GenerationConfig(
        do_sample=True, temperature=3.0, top_k=3, repetition_penalty=9.0, no_repeat_ngram_size=1, num_beams=3
    )
    qwen.model.generation_config = recommended
    assert generate(qwen.decoder, qwen.tokenizer, PROMPTS, 12) == plain
    assert qwen.model.generation_config is recommended


def test_no_prompts_have_no_answers_and_a_picture_is_refused(qwen: Surrogate) -> None:
    assert generate(qwen.decoder, qwen.tokenizer, [], 4) == []
    picture = ({"role": "user", "content": [{"type": "image_url"}]},)
    with pytest.raises(TrainingError, match="image_url"):
        generate(qwen.decoder, qwen.tokenizer, [ask(1, "a", "b").messages, picture], 4)

"""Teacher-forced agreement, against one token at a time."""

from __future__ import annotations

import pytest
import torch

from soma_vllm.errors import TrainingError
from soma_vllm.method.recipe import Surrogate
from soma_vllm.method.rendering import render
from soma_vllm.method.scoring import score, score_rendered
from soma_vllm.types import Example


def test_agreement_is_that_of_reading_the_answer_token_by_token(
    surrogate: Surrogate, examples: tuple[Example, ...]
) -> None:
    total, hits, tokens = 0.0, 0, 0
    for turn in render(surrogate.tokenizer, examples):
        seen = list(turn.prompt)
        for token in turn.answer:
            with torch.no_grad():
                row = torch.log_softmax(surrogate.model(torch.tensor([seen])).logits[0, -1], dim=0)
            total -= float(row[token])
            hits += int(row.argmax()) == token
            tokens += 1
            seen.append(token)
    found = score(surrogate.model, surrogate.tokenizer, examples)
    assert found.nll == pytest.approx(total / tokens, rel=1e-5)
    assert found.top1 == pytest.approx(hits / tokens)
    assert found.tokens == tokens


def test_a_models_own_greedy_answer_agrees_everywhere(qwen: Surrogate, examples: tuple[Example, ...]) -> None:
    turn = render(qwen.tokenizer, examples)[0]
    answer: list[int] = []
    for _ in range(8):
        with torch.no_grad():
            logits = qwen.model(torch.tensor([[*turn.prompt, *answer]])).logits
        answer.append(int(logits[0, -1].argmax()))
    agreement, probe = score_rendered(qwen.model, [type(turn)(1, turn.prompt, tuple(answer))])
    assert agreement.top1 == 1.0
    assert -sum(probe.logprobs) / 8 == pytest.approx(agreement.nll)


def test_scoring_ignores_dropout_and_restores_the_models_mode(
    qwen: Surrogate, examples: tuple[Example, ...]
) -> None:
    calm = score(qwen.model, qwen.tokenizer, examples)
    for layer in qwen.model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    qwen.model.train()
    assert score(qwen.model, qwen.tokenizer, examples) == calm
    assert qwen.model.training


def test_nothing_to_score_is_refused(qwen: Surrogate) -> None:
    with pytest.raises(TrainingError, match="no examples"):
        score(qwen.model, qwen.tokenizer, ())


def test_a_score_that_is_not_finite_is_refused(qwen: Surrogate, examples: tuple[Example, ...]) -> None:
    qwen.model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(TrainingError, match="found an NLL of nan"):
        score(qwen.model, qwen.tokenizer, examples)

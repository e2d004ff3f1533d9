"""Teacher-forced agreement, against one token at a time."""

from __future__ import annotations

import math

import pytest
import torch
from support.method_models import dialogue, read_alone, with_teachers

from soma_vllm.errors import TrainingError
from soma_vllm.method.activation_cache import Trunk
from soma_vllm.method.recipe import Surrogate
from soma_vllm.method.rendering import Rendered, render
from soma_vllm.method.scoring import pooled, score_trunk, score_turns
from soma_vllm.types import Agreement, Example


def agreement(surrogate: Surrogate, examples: tuple[Example, ...]) -> Agreement:
    return pooled(score_turns(surrogate.decoder, render(surrogate.tokenizer, examples)))


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
    found = agreement(surrogate, examples)
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
    (score,) = score_turns(qwen.decoder, [Rendered(1, turn.prompt, tuple(answer))])
    assert pooled([score]).top1 == 1.0
    assert (score.hits, score.tokens) == (8, 8)
    assert -sum(score.probe.logprobs) == pytest.approx(score.nll)
    assert (score.probe.prompt, score.probe.answer) == (turn.prompt, tuple(answer))


def test_scoring_ignores_dropout_and_restores_the_models_mode(
    qwen: Surrogate, examples: tuple[Example, ...]
) -> None:
    calm = agreement(qwen, examples)
    for layer in qwen.model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    qwen.model.train()
    assert agreement(qwen, examples) == calm
    assert qwen.model.training


def test_each_turn_is_scored_in_the_order_asked_for_whatever_strand_it_is_in(surrogate: Surrogate) -> None:
    told = dialogue(("Hi?", "Yes."), ("And a bat, or a crane?", "A club."), ("So?", "Perhaps."))
    turns = render(surrogate.tokenizer, told)
    mixed = [with_teachers(turns)[2], turns[0], turns[1]]
    scores = score_turns(surrogate.decoder, mixed)
    assert [score.turn for score in scores] == [3, 1, 2]
    for turn, score in zip(mixed, scores, strict=True):
        with torch.no_grad():
            shares = torch.softmax(read_alone(surrogate.model, turn), dim=1)
        logprobs = [math.log(float(shares[place, token])) for place, token in enumerate(turn.answer)]
        assert score.probe.logprobs == pytest.approx(logprobs, rel=1e-4)
        assert score.nll == pytest.approx(-sum(logprobs), rel=1e-5)
        hits = sum(int(shares[place].argmax()) == token for place, token in enumerate(turn.answer))
        assert (score.hits, score.tokens) == (hits, len(turn.answer))
    assert scores[1].kl is None
    assert scores[0].kl == pytest.approx(slow_kl(surrogate, mixed[0]), rel=1e-4)


def slow_kl(surrogate: Surrogate, turn: Rendered) -> float:
    assert turn.teacher is not None
    with torch.no_grad():
        shares = torch.softmax(read_alone(surrogate.model, turn).double(), dim=1)
    total = 0.0
    for row, ids, logprobs in zip(shares, *turn.teacher, strict=True):
        pairs = [
            (math.exp(p), float(row[token])) for token, p in zip(ids.tolist(), logprobs.tolist(), strict=True)
        ]
        pairs.append((1 - sum(p for p, _ in pairs), 1 - sum(q for _, q in pairs)))
        total += sum(p * math.log(p / q) for p, q in pairs)
    return total


@pytest.mark.parametrize("cut", [0, 1])
def test_scores_above_a_trunk_are_those_of_the_whole_model(
    surrogate: Surrogate, examples: tuple[Example, ...], cut: int
) -> None:
    turns = render(surrogate.tokenizer, examples)
    trunk = Trunk.grow(surrogate.decoder, turns, cut)
    assert score_trunk(trunk, turns) == score_turns(surrogate.decoder, turns)


def test_pooling_counts_every_token_once(qwen: Surrogate, examples: tuple[Example, ...]) -> None:
    scores = score_turns(qwen.decoder, render(qwen.tokenizer, examples))
    found = pooled(scores)
    assert found.tokens == sum(score.tokens for score in scores)
    assert found.nll * found.tokens == pytest.approx(sum(score.nll for score in scores))
    assert found.top1 * found.tokens == pytest.approx(sum(score.hits for score in scores))


def test_nothing_to_score_is_refused(qwen: Surrogate) -> None:
    with pytest.raises(TrainingError, match="no turns to score"):
        score_turns(qwen.decoder, ())


def test_a_score_that_is_not_finite_is_refused(qwen: Surrogate, examples: tuple[Example, ...]) -> None:
    qwen.model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(TrainingError, match=r"found NLL by turn .*1: nan.*expected finite"):
        agreement(qwen, examples)

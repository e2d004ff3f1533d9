"""Soft-prompt mining on tiny real models."""

from __future__ import annotations

import pytest
import torch
from method_models import ask
from torch.nn import functional

from soma_vllm.config import Lora, Mining
from soma_vllm.errors import TrainingError
from soma_vllm.method.finetune import attached, train
from soma_vllm.method.mining import mine
from soma_vllm.method.recipe import Surrogate
from soma_vllm.method.rendering import answer_logits, render
from soma_vllm.types import Example

SMALL = Mining(soft_len=4, n_candidates=2, iters=4, lr=0.02, neighborhood_k=8, teacher_topm=20)


def test_mining_lowers_the_objective_and_leaves_the_surrogate_alone(
    surrogate: Surrogate, examples: tuple[Example, ...]
) -> None:
    turns = render(surrogate.tokenizer, examples)
    before = {name: tensor.clone() for name, tensor in surrogate.model.state_dict().items()}
    short = mine(surrogate.model, surrogate.tokenizer, turns, SMALL.model_copy(update={"iters": 1}), seed=0)
    long = mine(surrogate.model, surrogate.tokenizer, turns, SMALL.model_copy(update={"iters": 20}), seed=0)
    assert all(a > b for a, b in zip(short.objectives, long.objectives, strict=True))
    assert all(torch.equal(before[name], tensor) for name, tensor in surrogate.model.state_dict().items())
    assert all(parameter.grad is None for parameter in surrogate.model.parameters())


def test_mining_returns_a_bounded_prompt_its_words_and_a_hardness_for_every_turn(
    surrogate: Surrogate, examples: tuple[Example, ...]
) -> None:
    result = mine(surrogate.model, surrogate.tokenizer, render(surrogate.tokenizer, examples), SMALL, seed=0)
    assert result.prompt.shape == (4, 32)
    assert float(result.prompt.abs().max()) < SMALL.scale
    assert len(result.objectives) == 2
    assert result.objectives[0] != result.objectives[1]
    assert set(result.hardness) == {1, 2, 3}
    assert all(value > 0 for value in result.hardness.values())
    assert len(result.verbalized) == 4
    assert all(0 <= token < len(surrogate.tokenizer) for token in result.verbalized)
    assert result.seconds > 0


def test_equal_seeds_mine_equal_prompts(qwen: Surrogate, examples: tuple[Example, ...]) -> None:
    turns = render(qwen.tokenizer, examples)
    first, again = (mine(qwen.model, qwen.tokenizer, turns, SMALL, seed=3) for _ in range(2))
    other = mine(qwen.model, qwen.tokenizer, turns, SMALL, seed=30)
    assert torch.equal(first.prompt, again.prompt)
    assert first.hardness == again.hardness
    assert not torch.equal(first.prompt, other.prompt)


def test_the_kept_prompt_is_the_one_of_least_objective(qwen: Surrogate, examples: tuple[Example, ...]) -> None:
    turns = render(qwen.tokenizer, examples)
    alone = [
        mine(qwen.model, qwen.tokenizer, turns, SMALL.model_copy(update={"n_candidates": 1}), seed=seed)
        for seed in (0, 1)
    ]
    both = mine(qwen.model, qwen.tokenizer, turns, SMALL, seed=0)
    best = min(alone, key=lambda result: result.objectives[0])
    assert both.objectives == (alone[0].objectives[0], alone[1].objectives[0])
    assert torch.equal(both.prompt, best.prompt)


def taught(surrogate: Surrogate, lesson: Example) -> Surrogate:
    """The surrogate with `lesson` learnt by heart, in its own weights."""
    lora = Lora(rank=8, alpha=32, dropout=0.0, steps=60, lr=0.02)
    with attached(surrogate.model, lora, seed=0) as adapted:
        train(adapted, render(surrogate.tokenizer, [lesson]), {lesson.turn: 1.0}, lora, seed=0)
        adapted.merge_adapter()
        learnt = {
            name.replace(".base_layer", ""): tensor.clone()
            for name, tensor in adapted.get_base_model().state_dict().items()
            if "lora_" not in name
        }
    surrogate.model.load_state_dict(learnt)
    return surrogate


def test_a_turn_answered_at_random_is_harder_than_one_the_surrogate_predicts(surrogate: Surrogate) -> None:
    """The published form ranks these two the other way round."""
    known, random = ask(1, "And a bat?", "A mammal, or a club."), ask(2, "And a crane?", "Xq7#zK~vW0@jR!p")
    model = taught(surrogate, known)
    turns = render(model.tokenizer, [known, random])
    settings = SMALL.model_copy(update={"lr": 1e-3})
    right = mine(model.model, model.tokenizer, turns, settings, seed=0)
    assert right.hardness[2] > 2 * right.hardness[1]
    inverted = settings.model_copy(update={"hardness": "reference"})
    published = mine(model.model, model.tokenizer, turns, inverted, seed=0)
    assert published.hardness[1] > published.hardness[2]


def test_hardness_is_the_nll_under_the_prompt_after_the_first_step(
    qwen: Surrogate, examples: tuple[Example, ...]
) -> None:
    turns = render(qwen.tokenizer, examples)
    one = mine(
        qwen.model, qwen.tokenizer, turns, SMALL.model_copy(update={"iters": 1, "n_candidates": 1}), seed=0
    )
    many = mine(
        qwen.model, qwen.tokenizer, turns, SMALL.model_copy(update={"iters": 6, "n_candidates": 1}), seed=0
    )
    assert many.hardness == one.hardness
    for turn in turns:
        with torch.no_grad():
            logits = answer_logits(qwen.model, turn, one.prompt)
        nll = functional.cross_entropy(logits, torch.tensor(turn.answer))
        assert one.hardness[turn.turn] == pytest.approx(float(nll), rel=1e-5)


def test_only_the_prompts_end_and_the_answers_beginning_are_mined(qwen: Surrogate) -> None:
    cut = SMALL.model_copy(update={"max_prompt_tokens": 12, "max_teacher_tokens": 5})
    long, other = ask(1, "Aaaaaaaa? So?", "Hello, dear"), ask(1, "Bbbbbbbb? So?", "Hellooooo!")
    results = [
        mine(qwen.model, qwen.tokenizer, render(qwen.tokenizer, [example]), cut, seed=0)
        for example in (long, other)
    ]
    assert results[0].hardness == results[1].hardness
    whole = mine(qwen.model, qwen.tokenizer, render(qwen.tokenizer, [long]), SMALL, seed=0)
    assert whole.hardness != results[0].hardness


@pytest.mark.parametrize(
    "change",
    [
        {"soft_len": 5},
        {"iters": 5},
        {"lr": 0.03},
        {"weight_decay": 5.0},
        {"grad_clip": 1e-12},
        {"neighborhood_k": 2},
        {"teacher_topm": 3},
        {"temperature": 0.1},
        {"lambda_exp": 0.0},
        {"beta_anti_degen": 1.0},
        {"lambda_P": 5.0},
        {"init_std": 0.5},
        {"scale": 1.0},
    ],
    ids=lambda change: next(iter(change)),
)
def test_every_key_of_mining_changes_what_is_mined(
    qwen: Surrogate, examples: tuple[Example, ...], change: dict[str, float]
) -> None:
    turns = render(qwen.tokenizer, examples)
    usual = mine(qwen.model, qwen.tokenizer, turns, SMALL, seed=0)
    changed = mine(qwen.model, qwen.tokenizer, turns, SMALL.model_copy(update=change), seed=0)
    assert changed.objectives != usual.objectives


def test_an_objective_that_is_not_finite_ends_mining(qwen: Surrogate, examples: tuple[Example, ...]) -> None:
    qwen.model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(TrainingError, match="found J"):
        mine(qwen.model, qwen.tokenizer, render(qwen.tokenizer, examples), SMALL, seed=0)

"""Soft-prompt mining on tiny real models."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support.method_models import ask, dialogue, in_float64
from torch.nn import functional

from soma_vllm.config import Lora, Mining
from soma_vllm.errors import TrainingError
from soma_vllm.method.activation_cache import Trunk
from soma_vllm.method.decoder import Decoder
from soma_vllm.method.divergence import TurnTerms, neighbourhoods, turn_terms
from soma_vllm.method.finetune import attached, train
from soma_vllm.method.mining import _read, mine
from soma_vllm.method.recipe import Surrogate
from soma_vllm.method.rendering import Rendered, render
from soma_vllm.method.soft_prompt import SoftPrompt
from soma_vllm.types import Example

SMALL = Mining(soft_len=4, n_candidates=2, iters=4, lr=0.02, neighborhood_k=8, teacher_topm=20)


def test_mining_lowers_the_objective_and_leaves_the_surrogate_alone(
    surrogate: Surrogate, examples: tuple[Example, ...]
) -> None:
    turns = render(surrogate.tokenizer, examples)
    before = {name: tensor.clone() for name, tensor in surrogate.model.state_dict().items()}
    short = mine(surrogate.decoder, surrogate.tokenizer, turns, SMALL.model_copy(update={"iters": 1}), seed=0)
    long = mine(surrogate.decoder, surrogate.tokenizer, turns, SMALL.model_copy(update={"iters": 20}), seed=0)
    assert all(a > b for a, b in zip(short.objectives, long.objectives, strict=True))
    assert all(torch.equal(before[name], tensor) for name, tensor in surrogate.model.state_dict().items())
    assert all(parameter.grad is None for parameter in surrogate.model.parameters())


def test_mining_returns_a_bounded_prompt_its_words_and_a_hardness_for_every_turn(
    surrogate: Surrogate, examples: tuple[Example, ...]
) -> None:
    result = mine(surrogate.decoder, surrogate.tokenizer, render(surrogate.tokenizer, examples), SMALL, seed=0)
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
    first, again = (mine(qwen.decoder, qwen.tokenizer, turns, SMALL, seed=3) for _ in range(2))
    other = mine(qwen.decoder, qwen.tokenizer, turns, SMALL, seed=30)
    assert torch.equal(first.prompt, again.prompt)
    assert first.hardness == again.hardness
    assert not torch.equal(first.prompt, other.prompt)


def sequence_logits(surrogate: Surrogate, turn: Rendered, prompt: torch.Tensor) -> torch.Tensor:
    """Logits of a whole turn behind a soft prompt (L, d), by the model's own forward pass."""
    words = surrogate.model.get_input_embeddings()(torch.tensor([turn.inputs]))
    states = torch.cat([prompt.to(words.dtype).unsqueeze(0), words], dim=1)
    logits: torch.Tensor = surrogate.model(inputs_embeds=states, use_cache=False).logits[0]
    return logits


def logits_under(surrogate: Surrogate, turn: Rendered, prompt: torch.Tensor) -> torch.Tensor:
    """Logits (n, V) of the answer alone."""
    return sequence_logits(surrogate, turn, prompt)[len(prompt) + len(turn.prompt) - 1 :]


def slow_terms(surrogate: Surrogate, turn: Rendered, prompt: torch.Tensor, mining: Mining) -> TurnTerms:
    """Eq. 2 and the tail entropy of one turn read alone, its neighbourhoods its own."""
    embedding = surrogate.model.get_input_embeddings().weight.detach()
    answer = torch.tensor(turn.answer)
    near = neighbourhoods(
        embedding[: len(surrogate.tokenizer)], [answer], mining.neighborhood_k, mining.temperature
    )
    terms = turn_terms(
        logits_under(surrogate, turn, prompt), answer, embedding, near, mining.teacher_topm, mining.lambda_exp
    )
    if mining.tail == "distribution":
        return terms
    rows = torch.softmax(sequence_logits(surrogate, turn, prompt)[-32:], dim=1)
    return replace(terms, tail_entropy=-(rows * rows.log()).sum(dim=1).mean())


def slow_objective(
    surrogate: Surrogate, turns: tuple[Rendered, ...], parameter: torch.Tensor, mining: Mining
) -> torch.Tensor:
    """J(P) of Eq. 3."""
    prompt = mining.scale * torch.tanh(parameter)
    terms = [slow_terms(surrogate, turn, prompt, mining) for turn in turns]
    divergence = sum(term.divergence for term in terms) / len(turns)
    entropy = sum(term.tail_entropy for term in terms) / len(turns)
    value: torch.Tensor = (
        divergence - mining.beta_anti_degen * entropy + mining.lambda_P * (parameter * parameter).sum()
    )
    return value


TOLD = {
    "one strand": dialogue(
        ("What is a crane?", "A bird, or a machine."), ("And a bat?", "A club."), ("So?", "Wax.")
    ),
    "padded strands": (
        ask(1, "What is a crane?", "A bird."),
        ask(2, "And a bat?", "A club."),
        ask(3, "Hm?", "Wax."),
    ),
}


@pytest.mark.parametrize("tail", ["distribution", "positions"])
@pytest.mark.parametrize("told", TOLD.values(), ids=TOLD.keys())
def test_the_gradient_by_every_prompt_is_that_of_its_own_objective(
    surrogate: Surrogate, told: tuple[Example, ...], tail: str
) -> None:
    mining = SMALL.model_copy(update={"tail": tail, "lambda_P": 0.1, "beta_anti_degen": 0.5, "n_candidates": 2})
    double = Surrogate(Decoder(in_float64(surrogate.model)), surrogate.tokenizer)
    turns = render(double.tokenizer, told)
    prompts = [SoftPrompt(3, 32, 0.5, mining.scale, seed).double() for seed in (0, 1)]
    embedding = double.decoder.embedding[: len(double.tokenizer)]
    answers = [torch.tensor(turn.answer) for turn in turns]
    near = neighbourhoods(embedding, answers, mining.neighborhood_k, mining.temperature)
    trunk = Trunk.grow(double.decoder, turns)
    reading = _read(trunk, turns, prompts, near, mining, learn=True)
    for prompt, found in zip(prompts, reading.objectives, strict=True):
        gradient = prompt.parameter.grad
        assert gradient is not None
        # The slow way, differentiated by itself: one turn at a time, one graph.
        value = slow_objective(double, turns, prompt.parameter, mining)
        assert found == pytest.approx(float(value.detach()), rel=1e-5)
        (slow,) = torch.autograd.grad(value, prompt.parameter)
        torch.testing.assert_close(gradient, slow, rtol=1e-9, atol=1e-12)
        # And by central differences, so small that no token enters or leaves the m likeliest.
        generator = torch.Generator().manual_seed(3)
        for way in (gradient, *torch.randn(4, *gradient.shape, generator=generator, dtype=torch.float64)):
            step = 1e-5 * way / way.norm()
            with torch.no_grad():
                up, down = (
                    slow_objective(double, turns, prompt.parameter + sign * step, mining) for sign in (1, -1)
                )
            along = float((gradient * way).sum() / way.norm())
            assert float(up - down) / 2e-5 == pytest.approx(along, rel=1e-5, abs=1e-8)


@pytest.mark.parametrize("told", TOLD.values(), ids=TOLD.keys())
@pytest.mark.parametrize("grad_clip", [1.0, 1e-7], ids=["not clipped", "clipped"])
def test_candidates_mined_together_are_those_mined_alone_and_the_least_objective_is_kept(
    surrogate: Surrogate, told: tuple[Example, ...], grad_clip: float
) -> None:
    turns = render(surrogate.tokenizer, told)
    # Clipped so hard that AdamW's own epsilon shows by how much.
    change = {"lr": 5e-3, "grad_clip": grad_clip}
    three, one = (SMALL.model_copy(update={**change, "n_candidates": count}) for count in (3, 1))
    alone = [mine(surrogate.decoder, surrogate.tokenizer, turns, one, seed=seed) for seed in (4, 5, 6)]
    together = mine(surrogate.decoder, surrogate.tokenizer, turns, three, seed=4)
    assert together.objectives == pytest.approx([result.objectives[0] for result in alone], rel=1e-4)
    best = min(alone, key=lambda result: result.objectives[0])
    torch.testing.assert_close(together.prompt, best.prompt, rtol=1e-3, atol=1e-5)
    assert together.verbalized == best.verbalized
    assert float(slow_objective_of(surrogate, turns, best.prompt)) == pytest.approx(
        best.objectives[0], rel=1e-4
    )


@torch.no_grad()
def slow_objective_of(surrogate: Surrogate, turns: tuple[Rendered, ...], prompt: torch.Tensor) -> torch.Tensor:
    return slow_objective(surrogate, turns, torch.atanh(prompt / SMALL.scale), SMALL)


@pytest.mark.parametrize("told", TOLD.values(), ids=TOLD.keys())
def test_hardness_is_the_mean_nll_over_candidates_or_in_the_published_form_the_largest_divergence(
    surrogate: Surrogate, told: tuple[Example, ...]
) -> None:
    turns = render(surrogate.tokenizer, told)

    def prompts(iters: int) -> list[torch.Tensor]:
        change = {"n_candidates": 1, "iters": iters}
        return [
            mine(surrogate.decoder, surrogate.tokenizer, turns, SMALL.model_copy(update=change), seed).prompt
            for seed in (0, 1)
        ]

    right = mine(surrogate.decoder, surrogate.tokenizer, turns, SMALL, seed=0).hardness
    inverted = SMALL.model_copy(update={"hardness": "reference"})
    published = mine(surrogate.decoder, surrogate.tokenizer, turns, inverted, seed=0).hardness
    early, late = prompts(1), prompts(SMALL.iters)
    for turn in turns:
        answer = torch.tensor(turn.answer)
        with torch.no_grad():
            nlls = [float(functional.cross_entropy(logits_under(surrogate, turn, p), answer)) for p in early]
            divergences = [float(slow_terms(surrogate, turn, p, SMALL).divergence) for p in late]
        assert right[turn.turn] == pytest.approx(sum(nlls) / 2, rel=1e-3)
        assert published[turn.turn] == pytest.approx(max(divergences), rel=1e-2)


def taught(surrogate: Surrogate, lesson: Example) -> Surrogate:
    """The surrogate with `lesson` learnt by heart, in its own weights."""
    lora = Lora(rank=8, alpha=32, dropout=0.0, steps=60, lr=0.02)
    with attached(surrogate.decoder, lora, seed=0) as adapted:
        train(surrogate.decoder, render(surrogate.tokenizer, [lesson]), (), {lesson.turn: 1.0}, lora, seed=0)
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
    right = mine(model.decoder, model.tokenizer, turns, settings, seed=0)
    assert right.hardness[2] > 2 * right.hardness[1]
    inverted = settings.model_copy(update={"hardness": "reference"})
    published = mine(model.decoder, model.tokenizer, turns, inverted, seed=0)
    assert published.hardness[1] > published.hardness[2]


def test_hardness_is_the_nll_under_the_prompt_after_the_first_step(
    qwen: Surrogate, examples: tuple[Example, ...]
) -> None:
    turns = render(qwen.tokenizer, examples)
    one = mine(
        qwen.decoder, qwen.tokenizer, turns, SMALL.model_copy(update={"iters": 1, "n_candidates": 1}), seed=0
    )
    many = mine(
        qwen.decoder, qwen.tokenizer, turns, SMALL.model_copy(update={"iters": 6, "n_candidates": 1}), seed=0
    )
    assert many.hardness == one.hardness
    for turn in turns:
        with torch.no_grad():
            logits = logits_under(qwen, turn, one.prompt)
        nll = functional.cross_entropy(logits, torch.tensor(turn.answer))
        assert one.hardness[turn.turn] == pytest.approx(float(nll), rel=1e-5)


def test_only_the_prompts_end_and_the_answers_beginning_are_mined(qwen: Surrogate) -> None:
    cut = SMALL.model_copy(update={"max_prompt_tokens": 12, "max_teacher_tokens": 5})
    long, other = ask(1, "Aaaaaaaa? So?", "Hello, dear"), ask(1, "Bbbbbbbb? So?", "Hellooooo!")
    results = [
        mine(qwen.decoder, qwen.tokenizer, render(qwen.tokenizer, [example]), cut, seed=0)
        for example in (long, other)
    ]
    assert results[0].hardness == results[1].hardness
    whole = mine(qwen.decoder, qwen.tokenizer, render(qwen.tokenizer, [long]), SMALL, seed=0)
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
        {"tail": "positions"},
        {"init_std": 0.5},
        {"scale": 1.0},
    ],
    ids=lambda change: next(iter(change)),
)
def test_every_key_of_mining_changes_what_is_mined(
    qwen: Surrogate, examples: tuple[Example, ...], change: dict[str, float | str]
) -> None:
    turns = render(qwen.tokenizer, examples)
    usual = mine(qwen.decoder, qwen.tokenizer, turns, SMALL, seed=0)
    changed = mine(qwen.decoder, qwen.tokenizer, turns, SMALL.model_copy(update=change), seed=0)
    assert changed.objectives != usual.objectives


def test_an_objective_that_is_not_finite_ends_mining(qwen: Surrogate, examples: tuple[Example, ...]) -> None:
    qwen.model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(TrainingError, match="found J"):
        mine(qwen.decoder, qwen.tokenizer, render(qwen.tokenizer, examples), SMALL, seed=0)

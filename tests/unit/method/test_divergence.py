"""Def. 3.1 and Eqs. 2 and 3 against slow re-derivations, one number at a time."""

from __future__ import annotations

import math

import pytest
import torch

from soma_vllm.method.divergence import (
    Neighbourhoods,
    TurnTerms,
    expectation_weight,
    neighbourhoods,
    objective,
    tail_entropy,
    token_divergence,
    turn_terms,
)

V, D, N, K, M, TAU = 19, 5, 6, 4, 7, 0.7


@pytest.fixture
def embedding() -> torch.Tensor:
    return torch.randn(V, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.fixture
def logits() -> torch.Tensor:
    return 2 * torch.randn(N, V, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


@pytest.fixture
def answer() -> torch.Tensor:
    return torch.tensor([3, 18, 3, 0, 11, 5])


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    dot = sum(float(x) * float(y) for x, y in zip(a, b, strict=True))
    return dot / math.sqrt(sum(float(x) ** 2 for x in a) * sum(float(y) ** 2 for y in b))


def slow_neighbourhood(embedding: torch.Tensor, u: int) -> dict[int, float]:
    others = sorted((v for v in range(V) if v != u), key=lambda v: -cosine(embedding[v], embedding[u]))
    raw = {v: math.exp(cosine(embedding[v], embedding[u]) / TAU) for v in [u, *others[:K]]}
    return {v: value / sum(raw.values()) for v, value in raw.items()}


def slow_probabilities(row: torch.Tensor) -> list[float]:
    raw = [math.exp(float(x)) for x in row]
    return [x / sum(raw) for x in raw]


def slow_divergence(row: torch.Tensor, u: int, embedding: torch.Tensor) -> float:
    pi = slow_probabilities(row)
    return -sum(s * math.log(1 - pi[v]) for v, s in slow_neighbourhood(embedding, u).items())


def slow_weight(row: torch.Tensor, u: int, embedding: torch.Tensor, lambda_exp: float) -> float:
    pi = slow_probabilities(row)
    head = sorted(range(V), key=lambda v: -pi[v])[:M]
    expected = sum((pi[v] * embedding[v] for v in head), torch.zeros(D, dtype=torch.float64))
    return 1 + lambda_exp * min(max(cosine(expected, embedding[u]), 0.0), 1.0)


def slow_tail_entropy(logits: torch.Tensor) -> float:
    rows = []
    for row in logits:
        tail = sorted(slow_probabilities(row))[: V - M]
        rows.append(-sum(p * math.log(p) for p in tail))
    return sum(rows) / len(rows)


def test_a_neighbourhood_is_the_token_and_its_nearest_others_weighted_by_cosine(
    embedding: torch.Tensor, answer: torch.Tensor
) -> None:
    near = neighbourhoods(embedding, [answer[:3], answer[3:]], K, TAU)
    assert near.tokens.tolist() == [0, 3, 5, 11, 18]
    members, weights = near.of(answer)
    for row, u in enumerate(answer.tolist()):
        slow = slow_neighbourhood(embedding, u)
        assert members[row].tolist() == list(slow)
        assert weights[row].tolist() == pytest.approx(list(slow.values()))


def test_a_neighbourhood_wider_than_the_vocabulary_is_the_whole_vocabulary(embedding: torch.Tensor) -> None:
    near = neighbourhoods(embedding, [torch.tensor([4])], 500, TAU)
    assert near.members[0, 0] == 4
    assert sorted(near.members[0].tolist()) == list(range(V))
    assert float(near.weights.sum()) == pytest.approx(1.0)


def test_a_twin_of_the_token_does_not_push_the_token_out(embedding: torch.Tensor) -> None:
    embedding[9] = embedding[4]
    near = neighbourhoods(embedding, [torch.tensor([4])], 1, TAU)
    assert near.members.tolist() == [[4, 9]]
    assert near.weights[0].tolist() == pytest.approx([0.5, 0.5])


def test_token_divergence_is_the_weighted_unlikelihood_of_the_neighbourhood(
    embedding: torch.Tensor, logits: torch.Tensor, answer: torch.Tensor
) -> None:
    members, weights = neighbourhoods(embedding, [answer], K, TAU).of(answer)
    div = token_divergence(torch.log_softmax(logits, dim=1), members, weights)
    slow = [slow_divergence(row, u, embedding) for row, u in zip(logits, answer.tolist(), strict=True)]
    assert div.tolist() == pytest.approx(slow)


def test_the_divergence_of_a_certain_surrogate_is_finite_and_at_its_ceiling() -> None:
    log_probs = torch.log_softmax(torch.tensor([[200.0, 0.0, 0.0]]), dim=1)
    div = token_divergence(log_probs, torch.tensor([[0]]), torch.tensor([[1.0]]))
    assert float(div) == pytest.approx(13.8, abs=0.1)


def test_the_divergence_of_a_tiny_probability_keeps_its_precision() -> None:
    log_probs = torch.log_softmax(torch.tensor([[-20.0, 0.0]]), dim=1)
    div = token_divergence(log_probs, torch.tensor([[0]]), torch.tensor([[1.0]]))
    assert float(div) == pytest.approx(math.exp(-20), rel=1e-3)


def test_the_divergence_grows_with_the_mass_on_the_teachers_neighbourhood(
    embedding: torch.Tensor, logits: torch.Tensor, answer: torch.Tensor
) -> None:
    members, weights = neighbourhoods(embedding, [answer], K, TAU).of(answer)
    surer = logits.clone()
    surer.scatter_add_(1, answer.unsqueeze(1), torch.full((N, 1), 3.0, dtype=torch.float64))
    before = token_divergence(torch.log_softmax(logits, dim=1), members, weights)
    after = token_divergence(torch.log_softmax(surer, dim=1), members, weights)
    assert bool((after > before).all())


@pytest.mark.parametrize("lambda_exp", [0.0, 0.5, 2.0])
def test_the_expectation_weight_is_the_clipped_cosine_of_the_heads_mean(
    embedding: torch.Tensor, logits: torch.Tensor, answer: torch.Tensor, lambda_exp: float
) -> None:
    mass, head = torch.softmax(logits, dim=1).topk(M, dim=1)
    weight = expectation_weight(mass, head, answer, embedding, lambda_exp)
    slow = [slow_weight(row, u, embedding, lambda_exp) for row, u in zip(logits, answer.tolist(), strict=True)]
    assert weight.tolist() == pytest.approx(slow)
    assert any(value > 1 for value in slow) == (lambda_exp > 0)


def test_the_tail_entropy_is_the_entropys_part_outside_the_head(logits: torch.Tensor) -> None:
    log_probs = torch.log_softmax(logits, dim=1)
    tail = tail_entropy(log_probs, log_probs.topk(M, dim=1).values)
    assert float(tail) == pytest.approx(slow_tail_entropy(logits))


def test_the_tail_entropy_falls_when_mass_collapses_onto_a_few_tokens(logits: torch.Tensor) -> None:
    def tail(x: torch.Tensor) -> float:
        log_probs = torch.log_softmax(x, dim=1)
        return float(tail_entropy(log_probs, log_probs.topk(M, dim=1).values))

    assert tail(logits) > tail(4 * logits) > tail(100 * logits)
    assert tail(100 * logits) == pytest.approx(0.0, abs=1e-6)


def test_the_terms_of_a_turn_are_equation_two_and_the_tail_entropy(
    embedding: torch.Tensor, logits: torch.Tensor, answer: torch.Tensor
) -> None:
    near = neighbourhoods(embedding, [answer], K, TAU)
    terms = turn_terms(logits, answer, embedding, near, M, 1.0)
    slow = [
        slow_weight(row, u, embedding, 1.0) * slow_divergence(row, u, embedding)
        for row, u in zip(logits, answer.tolist(), strict=True)
    ]
    assert float(terms.divergence) == pytest.approx(sum(slow) / N)
    assert float(terms.tail_entropy) == pytest.approx(slow_tail_entropy(logits))


def test_the_objective_rewards_entropy_and_charges_for_the_prompts_norm() -> None:
    prompt = torch.tensor([[1.0, 2.0], [0.0, 2.0]])
    terms = TurnTerms(torch.tensor(3.0), torch.tensor(5.0))
    assert float(objective(terms, prompt, beta=0.1, lambda_P=0.01)) == pytest.approx(3 - 0.5 + 0.09)


def test_the_objectives_gradient_is_right(
    embedding: torch.Tensor, logits: torch.Tensor, answer: torch.Tensor
) -> None:
    near = neighbourhoods(embedding, [answer], K, TAU)

    def value(x: torch.Tensor, prompt: torch.Tensor) -> torch.Tensor:
        return objective(turn_terms(x, answer, embedding, near, M, 1.0), prompt, 0.05, 1e-2)

    prompt = torch.randn(2, D, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    inputs = (logits.requires_grad_(), prompt.requires_grad_())
    assert torch.autograd.gradcheck(value, inputs)


def test_bfloat16_logits_give_float32_terms_and_finite_gradients(answer: torch.Tensor) -> None:
    logits = torch.tensor([[300.0] + [-300.0] * (V - 1)] * N, dtype=torch.bfloat16).requires_grad_()
    embedding = torch.randn(V, D, generator=torch.Generator().manual_seed(1)).bfloat16()
    near: Neighbourhoods = neighbourhoods(embedding, [answer], K, TAU)
    terms = turn_terms(logits, answer, embedding, near, M, 1.0)
    assert terms.divergence.dtype == torch.float32
    (terms.divergence - terms.tail_entropy).backward()
    assert bool(torch.isfinite(logits.grad).all())

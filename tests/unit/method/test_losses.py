"""Token losses against sums over classes, one number at a time."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from torch.nn import functional

from soma_vllm.method.losses import answer_kl, token_kl, token_nll
from soma_vllm.method.rendering import Rendered

N, V, K = 5, 12, 4


@pytest.fixture
def logits() -> torch.Tensor:
    return 2 * torch.randn(N, V, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.fixture
def teacher() -> torch.Tensor:
    """Log-probabilities (N, V) of an original."""
    raw = 2 * torch.randn(N, V, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return torch.log_softmax(raw, dim=1)


def naive_kl(row: torch.Tensor, head: list[int], logprobs: list[float]) -> float:
    """Sum of p log(p / q) over the head's tokens and one class for all others."""
    raw = [math.exp(float(x)) for x in row]
    q = [x / sum(raw) for x in raw]
    pairs = [(math.exp(logprob), q[token]) for token, logprob in zip(head, logprobs, strict=True)]
    pairs.append((1 - sum(p for p, _ in pairs), 1 - sum(own for _, own in pairs)))
    return sum(p * math.log(p / own) for p, own in pairs)


def test_the_nll_is_minus_the_log_of_the_tokens_share(logits: torch.Tensor) -> None:
    answer = torch.tensor([3, 0, 11, 3, 7])
    slow = []
    for row, token in zip(logits, answer.tolist(), strict=True):
        raw = [math.exp(float(x)) for x in row]
        slow.append(-math.log(raw[token] / sum(raw)))
    assert token_nll(logits, answer).tolist() == pytest.approx(slow)
    assert torch.autograd.gradcheck(lambda x: token_nll(x, answer), (logits.requires_grad_(),))


def test_the_kl_is_the_sum_over_the_heads_tokens_and_the_rest(
    logits: torch.Tensor, teacher: torch.Tensor
) -> None:
    logprobs, head = teacher.topk(K, dim=1)
    slow = [naive_kl(*row) for row in zip(logits, head.tolist(), logprobs.tolist(), strict=True)]
    assert token_kl(logits, head, logprobs).tolist() == pytest.approx(slow)


def test_with_the_whole_vocabulary_in_the_head_it_is_the_whole_kl(
    logits: torch.Tensor, teacher: torch.Tensor
) -> None:
    logprobs, head = teacher.topk(V, dim=1)
    whole = functional.kl_div(torch.log_softmax(logits, dim=1), teacher, reduction="none", log_target=True).sum(
        dim=1
    )
    torch.testing.assert_close(token_kl(logits, head, logprobs), whole, rtol=1e-6, atol=1e-6)


def test_a_longer_head_sees_more_of_the_kl_and_never_too_much(
    logits: torch.Tensor, teacher: torch.Tensor
) -> None:
    found = [token_kl(logits, *reversed(teacher.topk(k, dim=1))) for k in range(1, V + 1)]
    for shorter, longer in itertools.pairwise(found):
        assert bool((longer >= shorter - 1e-6).all())
    assert bool((found[0] >= 0).all())


def test_a_surrogate_that_is_the_original_has_no_kl(teacher: torch.Tensor) -> None:
    logprobs, head = teacher.topk(K, dim=1)
    shifted = teacher + 3.0  # logits are free up to a constant
    assert token_kl(shifted, head, logprobs).tolist() == pytest.approx([0.0] * N, abs=1e-9)


def test_padding_anywhere_is_as_if_it_were_not_there(logits: torch.Tensor, teacher: torch.Tensor) -> None:
    logprobs, head = teacher.topk(K, dim=1)
    padded_head = torch.cat([torch.full((N, 1), -1), head, torch.full((N, 2), -1)], dim=1)
    padding = torch.full((N, 2), -torch.inf, dtype=torch.float64)
    padded = torch.cat([padding[:, :1], logprobs, padding], dim=1)
    x, y = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    bare, found = token_kl(x, head, logprobs), token_kl(y, padded_head, padded)
    torch.testing.assert_close(found, bare)
    bare.sum().backward()
    found.sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(y.grad, x.grad)


def test_the_kls_gradient_is_right(logits: torch.Tensor, teacher: torch.Tensor) -> None:
    logprobs, head = teacher.topk(K, dim=1)
    head[2, 3], logprobs[2, 3] = -1, -torch.inf
    assert torch.autograd.gradcheck(lambda x: token_kl(x, head, logprobs), (logits.requires_grad_(),))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("surrogate_is", ["sure of the same", "sure of another", "unsure"])
def test_an_original_that_is_certain_gives_finite_losses_and_gradients(
    dtype: torch.dtype, surrogate_is: str
) -> None:
    row = {"sure of the same": [300.0, 0, 0], "sure of another": [0, 300.0, 0], "unsure": [0, 0, 0]}[
        surrogate_is
    ]
    logits = torch.tensor([row], dtype=dtype).requires_grad_()
    # As an engine reports certainty: 0 for the token, nothing or a floor for the others.
    for head, logprobs in (([0, -1], [0.0, -math.inf]), ([0, 1], [0.0, -9999.0]), ([0, 1], [1e-6, -30.0])):
        loss = token_kl(logits, torch.tensor([head]), torch.tensor([logprobs]))
        assert loss.dtype == torch.float32
        (gradient,) = torch.autograd.grad(loss.sum(), logits)
        assert bool(torch.isfinite(loss).all())
        assert bool(torch.isfinite(gradient).all())
        expected = {"sure of the same": 0.0, "sure of another": 300.0, "unsure": math.log(3)}[surrogate_is]
        assert float(loss.detach()) == pytest.approx(expected, abs=1e-3, rel=1e-2)


def test_a_turns_kl_is_towards_its_own_teacher(logits: torch.Tensor, teacher: torch.Tensor) -> None:
    logprobs, head = teacher.topk(K, dim=1)
    shown = head.numpy().astype(np.int32), logprobs.numpy().astype(np.float32)
    turn = Rendered(1, (1,), (2,) * N, shown)
    torch.testing.assert_close(answer_kl(logits, turn), token_kl(logits, head, logprobs), rtol=1e-5, atol=1e-6)

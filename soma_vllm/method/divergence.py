"""The objective of soft-prompt mining: Def. 3.1, Eq. 2 and Eq. 3 as functions of tensors.

Guarantees: nothing here knows a model or a tokenizer; arithmetic is float32 at least; log(1 - pi) is finite
for every distribution, also where the surrogate is certain.

Shapes: n answer tokens of one turn, V vocabulary rows, d embedding width, u distinct answer tokens, k
neighbours, m tokens of the head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional

from soma_vllm.method.soft_prompt import at_least_float32, nearest_tokens

TAIL_POSITIONS = 32
"""Positions at a sequence's end whose entropy the published code calls the tail's."""
_EPSILON = 1.0e-6
"""Probabilities above 1 - _EPSILON count as that, so one token adds at most -log(_EPSILON) = 13.8."""


@dataclass(frozen=True)
class Neighbourhoods:
    """N_k(u) and u itself with s_tau(v|u), for the distinct tokens of some answers (Def. 3.1)."""

    tokens: torch.Tensor
    """(u,) distinct token ids, ascending."""
    members: torch.Tensor
    """(u, k + 1) token ids: u first, then its neighbours, nearest first."""
    weights: torch.Tensor
    """(u, k + 1) s_tau: softmax of cos(e_v, e_u) / tau over the members."""

    def of(self, answer: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Members and weights, (n, k + 1) each, of the tokens of `answer` (n,), all of them in `tokens`."""
        rows = torch.searchsorted(self.tokens, answer)
        return self.members[rows], self.weights[rows]


@dataclass(frozen=True)
class TurnTerms:
    """The terms of one turn in J(P); scalars."""

    divergence: torch.Tensor
    """L_sem_exp (Eq. 2)."""
    tail_entropy: torch.Tensor
    """H_tail."""


@torch.no_grad()
def neighbourhoods(
    embedding: torch.Tensor, answers: Sequence[torch.Tensor], k: int, temperature: float
) -> Neighbourhoods:
    """N_k(u) and s_tau for every distinct token of `answers`, from `embedding` (V, d) (Def. 3.1)."""
    tokens = torch.unique(torch.cat(list(answers)))
    near, cosines = nearest_tokens(embedding[tokens], embedding, k, excluded=tokens)
    members = torch.cat([tokens.unsqueeze(1), near], dim=1)
    cosines = torch.cat([torch.ones_like(cosines[:, :1]), cosines], dim=1)
    return Neighbourhoods(tokens, members, torch.softmax(cosines / temperature, dim=1))


def token_divergence(log_probs: torch.Tensor, members: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """div_i = - sum_v s_tau(v|y_i) log(1 - pi_i(v)), (n,).

    Args: `log_probs` (n, V) of the surrogate; `members` and `weights` (n, k + 1) from `Neighbourhoods.of`.
    """
    mass = log_probs.gather(1, members).exp().clamp(max=1.0 - _EPSILON)
    return -(weights.to(mass.dtype) * torch.log1p(-mass)).sum(dim=1)


def expectation_weight(
    head_mass: torch.Tensor,
    head: torch.Tensor,
    answer: torch.Tensor,
    embedding: torch.Tensor,
    lambda_exp: float,
) -> torch.Tensor:
    """w_i = 1 + lambda_exp * clip(cos(ebar_i, e_{y_i}), 0, 1), (n,); ebar_i the head's expected embedding.

    Args: `head_mass` and `head` (n, m), probabilities and ids of the m likeliest tokens; `answer` (n,);
    `embedding` (V, d). The cosine is blind to the head's total mass, so it is not renormalised.
    """
    vectors = embedding[head].to(head_mass.dtype)
    expected = torch.einsum("nm,nmd->nd", head_mass, vectors)
    cosine = functional.cosine_similarity(expected, embedding[answer].to(head_mass.dtype), dim=1)
    return 1.0 + lambda_exp * cosine.clamp(0.0, 1.0)


def tail_entropy(log_probs: torch.Tensor, head_log_probs: torch.Tensor) -> torch.Tensor:
    """H_tail: the part of the entropy of pi_i that lies outside its m likeliest tokens, mean over i; scalar.

    H_tail = mean_i - sum over v outside the head of pi_i(v) log pi_i(v), in nats, computed as the whole
    entropy less the head's part. The tail is not renormalised: mass that collapses onto a few likely tokens
    leaves it, and H_tail falls towards 0 with it, which is the degeneration Eq. 3 guards against. A tail
    renormalised to 1 could look diverse with no mass left in it.

    Args: `log_probs` (n, V); `head_log_probs` (n, m) of the m likeliest tokens.
    """
    return (_entropy_terms(log_probs) - _entropy_terms(head_log_probs)).mean()


def whole_entropy(logits: torch.Tensor) -> torch.Tensor:
    """The whole entropy of each row of `logits` (n, V), mean over rows, nats; scalar.

    Over the last `TAIL_POSITIONS` of a sequence it is the published code's H_tail.
    """
    return _entropy_terms(torch.log_softmax(at_least_float32(logits), dim=1)).mean()


def turn_terms(
    logits: torch.Tensor,
    answer: torch.Tensor,
    embedding: torch.Tensor,
    near: Neighbourhoods,
    topm: int,
    lambda_exp: float,
) -> TurnTerms:
    """L_sem_exp (Eq. 2), the mean of w_i * div_i over the turn's answer tokens, and H_tail.

    Args: `logits` (n, V) at the answer's positions; `answer` (n,); `embedding` (at least V', d) where V'
    bounds every id met; `topm` is m, cut to V.
    """
    log_probs = torch.log_softmax(at_least_float32(logits), dim=1)
    head_log_probs, head = log_probs.topk(min(topm, log_probs.shape[1]), dim=1)
    members, weights = near.of(answer)
    div = token_divergence(log_probs, members, weights)
    weight = expectation_weight(head_log_probs.exp(), head, answer, embedding, lambda_exp)
    return TurnTerms((weight * div).mean(), tail_entropy(log_probs, head_log_probs))


def objective(terms: TurnTerms, prompt: torch.Tensor, beta: float, lambda_P: float) -> torch.Tensor:
    """One turn's L_sem_exp - beta * H_tail + lambda_P * ||P||^2; J(P) of Eq. 3 is its mean over turns; scalar.

    Turn by turn, so that only one turn's activations are alive at once. `prompt` (L, d) is the raw
    parameter, before the tanh, as in the published code.
    """
    return terms.divergence - beta * terms.tail_entropy + lambda_P * prompt.square().sum()


def _entropy_terms(log_probs: torch.Tensor) -> torch.Tensor:
    """- sum p log p over the last dimension; finite gradients where p underflows."""
    return -(log_probs.exp() * log_probs).sum(dim=-1)

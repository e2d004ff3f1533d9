"""What a training step minimises, token by token: Eq. 4's NLL, or the distance to the original's distribution.

Guarantees: float32 at least; finite for every pair of distributions, also where a model is certain.

Shapes: n answer tokens of one turn, V vocabulary rows, k tokens of the original's head.
"""

from __future__ import annotations

import torch
from torch.nn import functional

from soma_vllm.method.rendering import Rendered
from soma_vllm.method.soft_prompt import at_least_float32

_FLOOR = 1.0e-6
"""Least probability a distribution leaves outside the original's head."""


def token_nll(logits: torch.Tensor, answer: torch.Tensor) -> torch.Tensor:
    """- log pi(answer token), (n,), nats, of `logits` (n, V) and `answer` (n,) (Eq. 4)."""
    return functional.cross_entropy(at_least_float32(logits), answer, reduction="none")


def token_kl(logits: torch.Tensor, head: torch.Tensor, head_logprobs: torch.Tensor) -> torch.Tensor:
    """KL(original || surrogate) over the original's k likeliest tokens and one class for the rest, (n,), nats.

    A lower bound of the KL over the whole vocabulary, exact where the original's mass lies in its head
    (distillation after Hinton et al., arXiv 1503.02531, with the tail as one class).

    Args: `logits` (n, V); `head` (n, k) token ids, -1 for padding; `head_logprobs` (n, k), -inf at padding.
    """
    wide = at_least_float32(logits)
    head_logprobs = head_logprobs.to(wide.dtype)
    known = head >= 0
    log_q = wide.gather(1, head.clamp(min=0)) - wide.logsumexp(dim=1, keepdim=True)
    p = torch.where(known, head_logprobs.exp(), 0.0)
    q = torch.where(known, log_q.exp(), 0.0)
    inside = torch.where(known, p * (head_logprobs.nan_to_num(neginf=0.0) - log_q), 0.0).sum(dim=1)
    rest_p = (1.0 - p.sum(dim=1)).clamp(min=_FLOOR)
    rest_q = (1.0 - q.sum(dim=1)).clamp(min=_FLOOR)
    return inside + rest_p * (rest_p.log() - rest_q.log())


def answer_kl(logits: torch.Tensor, turn: Rendered) -> torch.Tensor:
    """`token_kl` of a turn whose teacher is known, (n,).

    Raises:
        AssertionError: the turn has no teacher.
    """
    assert turn.teacher is not None, f"turn {turn.turn} has no teacher"
    head, logprobs = turn.teacher
    device = logits.device
    return token_kl(
        logits, torch.as_tensor(head, device=device).long(), torch.as_tensor(logprobs, device=device)
    )

"""Teacher-forced agreement with the original's answers: one prefill a turn, no generation.

Guarantees: only answer positions meet the output head; every answer token counts once, the end of turn
included; the model is read, never changed. Plain and adapted surrogates are scored by the same code.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from soma_vllm.errors import TrainingError
from soma_vllm.method.rendering import Rendered, answer_ids, answer_logits, render
from soma_vllm.method.soft_prompt import at_least_float32
from soma_vllm.types import Agreement, Example


@dataclass(frozen=True)
class Probe:
    """One turn as the scored model saw it, to check an engine that serves the same weights.

    An engine given `prompt + answer` with prompt log-probabilities on must report about these `logprobs`
    at the answer's tokens, within the rounding of its dtype.
    """

    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    logprobs: tuple[float, ...]
    """log pi of each answer token, nats."""


def score(model: Any, tokenizer: Any, examples: Sequence[Example]) -> Agreement:
    """Mean NLL and top-1 agreement over the answer tokens of all `examples`.

    Raises:
        TrainingError: no examples, an empty answer, or a score that is not finite.
    """
    return score_rendered(model, render(tokenizer, examples))[0]


def score_rendered(model: Any, rendered: Sequence[Rendered]) -> tuple[Agreement, Probe]:
    """Like `score`, of rendered examples; the probe is the first of them.

    Raises:
        TrainingError: nothing to score, or a score that is not finite.
    """
    if not rendered:
        raise TrainingError("found no turns to score; expected at least one")
    probes, hits = [], 0
    for turn in rendered:
        logprobs, agreed = _read(model, turn)
        probes.append(Probe(turn.prompt, turn.answer, tuple(logprobs.tolist())))
        hits += agreed
    tokens = sum(len(probe.answer) for probe in probes)
    nll = -sum(sum(probe.logprobs) for probe in probes) / tokens
    if not nll < float("inf"):
        raise TrainingError(f"scoring: found an NLL of {nll}; expected a finite number")
    return Agreement(nll=nll, top1=hits / tokens, tokens=tokens), probes[0]


@torch.inference_mode()
def _read(model: Any, turn: Rendered) -> tuple[torch.Tensor, int]:
    """Log-probability of each answer token (n,), and how many are the model's first choice."""
    was_training = model.training
    model.eval()
    try:
        logits = at_least_float32(answer_logits(model, turn))
    finally:
        model.train(was_training)
    answer = answer_ids(model, turn)
    logprobs = torch.log_softmax(logits, dim=1).gather(1, answer.unsqueeze(1)).squeeze(1)
    return logprobs, int((logits.argmax(dim=1) == answer).sum())

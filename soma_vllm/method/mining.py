"""Stage 1: mine soft prompts on the frozen surrogate, and read off how hard each turn is.

Guarantees: the surrogate's weights receive no gradient and do not change; equal seeds give equal results on
one machine; a prompt's objective is that of the prompt returned, not of the step before it.

Hardness "divergence" is the surrogate's mean NLL of the original's answer under each candidate prompt after
`RANKING_STEPS` optimiser steps, averaged over candidates: harder means less agreed. It is read that early
because minimising J soon drives the NLL of *every* turn to the same ceiling, and the ranking is gone. It costs
nothing, as mining computes those logits anyway. Hardness "reference" is the published code's form, for
studies: the largest final L_sem_exp over candidates, which is high where the surrogate still *agrees*.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from soma_vllm.config import Mining
from soma_vllm.errors import TrainingError
from soma_vllm.method.divergence import Neighbourhoods, TurnTerms, neighbourhoods, objective, turn_terms
from soma_vllm.method.rendering import Rendered, answer_ids, answer_logits
from soma_vllm.method.soft_prompt import SoftPrompt, at_least_float32, verbalize

RANKING_STEPS = 1
"""Optimiser steps after which the "divergence" hardness is read."""


@dataclass(frozen=True)
class MiningResult:
    """The best of M mined prompts, and what mining learnt about the turns."""

    prompt: torch.Tensor
    """(L, d) float32, squashed, on the CPU."""
    objectives: tuple[float, ...]
    """Final J(P) of each candidate, in the order of their seeds; the least one's prompt is `prompt`."""
    hardness: dict[int, float]
    """r_t by turn, at least 0."""
    verbalized: tuple[int, ...]
    """V(P): L token ids of the surrogate's vocabulary."""
    seconds: float


@dataclass(frozen=True)
class _Reading:
    """One look at all turns under one prompt."""

    objective: float
    """J(P)."""
    divergence: tuple[float, ...]
    """L_sem_exp of each turn."""
    nll: tuple[float, ...]
    """Mean NLL of each turn's answer, nats per token."""


def mine(model: Any, tokenizer: Any, rendered: Sequence[Rendered], mining: Mining, seed: int) -> MiningResult:
    """Mine `mining.n_candidates` prompts and keep the one of least J(P) (Eqs. 2 and 3).

    Raises:
        TrainingError: J(P) is not finite.
    """
    began = time.perf_counter()
    turns = [turn.shortened(mining.max_prompt_tokens, mining.max_teacher_tokens) for turn in rendered]
    embedding = model.get_input_embeddings().weight.detach()
    # Rows beyond the tokenizer are padding: no text has them.
    vocabulary = embedding[: len(tokenizer)]
    answers = [answer_ids(model, turn) for turn in turns]
    near = neighbourhoods(vocabulary, answers, mining.neighborhood_k, mining.temperature)
    mined = [_mine_one(model, turns, near, mining, seed + number) for number in range(mining.n_candidates)]
    finals = [readings[-1] for _, readings in mined]
    objectives = tuple(final.objective for final in finals)
    best = mined[objectives.index(min(objectives))][0]
    if mining.hardness == "divergence":
        early = [readings[RANKING_STEPS].nll for _, readings in mined]
        hardness = [sum(values) / len(values) for values in zip(*early, strict=True)]
    else:
        hardness = [max(values) for values in zip(*(final.divergence for final in finals), strict=True)]
    return MiningResult(
        prompt=best.cpu(),
        objectives=objectives,
        hardness={turn.turn: value for turn, value in zip(turns, hardness, strict=True)},
        verbalized=tuple(verbalize(best, vocabulary).tolist()),
        seconds=time.perf_counter() - began,
    )


def _mine_one(
    model: Any, turns: Sequence[Rendered], near: Neighbourhoods, mining: Mining, seed: int
) -> tuple[torch.Tensor, list[_Reading]]:
    """One candidate: its prompt, and a reading before every step and after the last."""
    width = model.get_input_embeddings().weight.shape[1]
    prompt = SoftPrompt(mining.soft_len, width, mining.init_std, mining.scale, seed).to(model.device)
    optimizer = torch.optim.AdamW(prompt.parameters(), lr=mining.lr, weight_decay=mining.weight_decay)
    readings = []
    for _ in range(mining.iters):
        optimizer.zero_grad(set_to_none=True)
        readings.append(_read(model, turns, prompt, near, mining, learn=True))
        torch.nn.utils.clip_grad_norm_(prompt.parameters(), mining.grad_clip)
        optimizer.step()
    with torch.no_grad():
        readings.append(_read(model, turns, prompt, near, mining, learn=False))
        return prompt().detach(), readings


def _read(
    model: Any,
    turns: Sequence[Rendered],
    prompt: SoftPrompt,
    near: Neighbourhoods,
    mining: Mining,
    learn: bool,
) -> _Reading:
    """Objective, divergences and NLLs under `prompt`; with `learn`, its gradient is accumulated."""
    embedding = model.get_input_embeddings().weight.detach()
    objectives, divergences, nlls = [], [], []
    for turn in turns:
        squashed = prompt()
        logits = at_least_float32(answer_logits(model, turn, squashed))
        answer = answer_ids(model, turn)
        terms: TurnTerms = turn_terms(logits, answer, embedding, near, mining.teacher_topm, mining.lambda_exp)
        value = objective(terms, squashed, mining.beta_anti_degen, mining.lambda_P)
        if learn:
            (value / len(turns)).backward()  # type: ignore[no-untyped-call]
        objectives.append(float(value.detach()))
        divergences.append(float(terms.divergence.detach()))
        nlls.append(float(functional.cross_entropy(logits.detach(), answer)))
    mean = sum(objectives) / len(turns)
    if not math.isfinite(mean):
        raise TrainingError(f"mining: found J(P) = {mean}; expected a finite number")
    return _Reading(mean, tuple(divergences), tuple(nlls))

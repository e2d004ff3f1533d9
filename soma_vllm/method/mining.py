"""Stage 1: mine soft prompts on the frozen surrogate, and measure how hard each turn is.

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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from soma_vllm.config import Mining
from soma_vllm.errors import TrainingError
from soma_vllm.method.activation_cache import Trunk
from soma_vllm.method.decoder import Decoder
from soma_vllm.method.divergence import (
    TAIL_POSITIONS,
    Neighbourhoods,
    neighbourhoods,
    objective,
    turn_terms,
    whole_entropy,
)
from soma_vllm.method.losses import token_nll
from soma_vllm.method.packing import Batch
from soma_vllm.method.rendering import Rendered
from soma_vllm.method.soft_prompt import SoftPrompt, at_least_float32, verbalize

RANKING_STEPS = 1
"""Optimiser steps after which the "divergence" hardness is read."""


@dataclass(frozen=True)
class MiningResult:
    """The best of M mined prompts, and the hardness of each turn."""

    prompt: torch.Tensor
    """(L, d) float32, squashed, on the CPU."""
    objectives: tuple[float, ...]
    """Final J(P) of each candidate, in the order of their seeds; `prompt` is that of the least."""
    hardness: dict[int, float]
    """r_t by turn, at least 0."""
    verbalized: tuple[int, ...]
    """V(P): L token ids of the surrogate's vocabulary."""
    seconds: float


@dataclass(frozen=True)
class _Reading:
    """One evaluation of all n turns under all M prompts."""

    objectives: tuple[float, ...]
    """J(P) of each prompt."""
    divergence: torch.Tensor
    """(M, n) L_sem_exp of each turn."""
    nll: torch.Tensor
    """(M, n) mean NLL of each turn's answer, nats per token."""


def mine(
    decoder: Decoder, tokenizer: Any, rendered: Sequence[Rendered], mining: Mining, seed: int
) -> MiningResult:
    """Mine `mining.n_candidates` prompts and keep the one of least J(P) (Eqs. 2 and 3).

    All candidates and all turns go through the surrogate together; each candidate's gradient, clipping and
    optimiser see that candidate alone.

    Raises:
        TrainingError: J(P) is not finite.
    """
    began = time.perf_counter()
    turns = [turn.shortened(mining.max_prompt_tokens, mining.max_teacher_tokens) for turn in rendered]
    # Rows beyond the tokenizer are padding: no text has them.
    vocabulary = decoder.embedding[: len(tokenizer)]
    answers = [torch.tensor(turn.answer, device=decoder.device) for turn in turns]
    near = neighbourhoods(vocabulary, answers, mining.neighborhood_k, mining.temperature)
    width = vocabulary.shape[1]
    prompts = [
        SoftPrompt(mining.soft_len, width, mining.init_std, mining.scale, seed + number).to(decoder.device)
        for number in range(mining.n_candidates)
    ]
    readings = _descend(decoder, turns, prompts, near, mining)
    objectives = tuple(readings[-1].objectives)
    best = prompts[objectives.index(min(objectives))]().detach()
    if mining.hardness == "divergence":
        hardness = readings[RANKING_STEPS].nll.mean(dim=0)
    else:
        hardness = readings[-1].divergence.amax(dim=0)
    return MiningResult(
        prompt=best.cpu(),
        objectives=objectives,
        hardness={turn.turn: value for turn, value in zip(turns, hardness.tolist(), strict=True)},
        verbalized=tuple(verbalize(best, vocabulary).tolist()),
        seconds=time.perf_counter() - began,
    )


def _descend(
    decoder: Decoder,
    turns: Sequence[Rendered],
    prompts: Sequence[SoftPrompt],
    near: Neighbourhoods,
    mining: Mining,
) -> list[_Reading]:
    """Optimise the prompts in place; a reading before every step and one after the last."""
    parameters = [prompt.parameter for prompt in prompts]
    optimizer = torch.optim.AdamW(parameters, lr=mining.lr, weight_decay=mining.weight_decay)
    trunk = Trunk.grow(decoder, turns)  # word vectors only: the prompts enter below every layer
    readings = []
    for _ in range(mining.iters):
        optimizer.zero_grad(set_to_none=True)
        readings.append(_read(trunk, turns, prompts, near, mining, learn=True))
        for parameter in parameters:
            torch.nn.utils.clip_grad_norm_([parameter], mining.grad_clip)
        optimizer.step()
    with torch.no_grad():
        readings.append(_read(trunk, turns, prompts, near, mining, learn=False))
    return readings


def _read(
    trunk: Trunk,
    turns: Sequence[Rendered],
    prompts: Sequence[SoftPrompt],
    near: Neighbourhoods,
    mining: Mining,
    learn: bool,
) -> _Reading:
    """Objective, divergences and NLLs under every prompt; with `learn`, gradients are accumulated."""
    shape = (len(prompts), len(turns))
    objectives, divergence, nll = torch.zeros(shape), torch.zeros(shape), torch.zeros(shape)
    column = {turn.turn: index for index, turn in enumerate(turns)}
    for batch, words in trunk.batches:
        squashed = [prompt() for prompt in prompts]
        # Gradients are gathered at these loose ends turn by turn, so that only one turn's logits are alive.
        ends: list[tuple[torch.Tensor, torch.Tensor]] = []
        for candidate, turn, final in _under(
            trunk.decoder, batch, words, squashed, TAIL_POSITIONS if mining.tail == "positions" else 0
        ):
            ends.append((final, final.detach().requires_grad_(learn)))
            around = at_least_float32(trunk.decoder.logits(ends[-1][1]))
            answer = torch.tensor(turn.answer, device=around.device)
            logits = around[-len(answer) :]
            terms = turn_terms(
                logits, answer, trunk.decoder.embedding, near, mining.teacher_topm, mining.lambda_exp
            )
            if mining.tail == "positions":
                terms = replace(terms, tail_entropy=whole_entropy(around[-TAIL_POSITIONS:]))
            value = objective(terms, prompts[candidate].parameter, mining.beta_anti_degen, mining.lambda_P)
            if learn:
                (value / len(turns)).backward()  # type: ignore[no-untyped-call]
            place = candidate, column[turn.turn]
            objectives[place] = float(value.detach())
            divergence[place] = float(terms.divergence.detach())
            nll[place] = float(token_nll(logits.detach(), answer).mean())
        if learn:
            torch.autograd.backward([end for end, _ in ends], [leaf.grad for _, leaf in ends])
    means = objectives.mean(dim=1).tolist()
    if not all(math.isfinite(mean) for mean in means):
        raise TrainingError(f"mining: found J(P) = {means}; expected finite numbers")
    return _Reading(tuple(means), divergence, nll)


def _under(
    decoder: Decoder, batch: Batch, words: torch.Tensor, squashed: Sequence[torch.Tensor], least: int
) -> Iterator[tuple[int, Rendered, torch.Tensor]]:
    """(candidate, turn, final states): every strand of the batch behind every prompt, in one pass.

    States (n, d) are those that predict the answer's n tokens; where these are fewer than `least`, the ones
    before them are there too.
    """
    count, length = len(squashed), len(squashed[0])
    prompts = torch.stack(list(squashed)).to(words.dtype)
    states = torch.cat([prompts.repeat_interleave(len(words), dim=0), words.repeat(count, 1, 1)], dim=1)
    mask = batch.mask
    if mask is not None:
        mask = torch.cat([mask.new_ones(len(mask), length), mask], dim=1).repeat(count, 1)
    final = decoder.run(states, mask)
    for candidate in range(count):
        for turn, row, positions in batch.rows(shift=length):
            first = max(0, min(positions.start, positions.stop - least))
            yield candidate, turn, final[candidate * len(words) + row, first : positions.stop]

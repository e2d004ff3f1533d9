"""Teacher-forced agreement with the original's answers: no generation, a dialogue's turns in one pass.

Guarantees: the output head runs at answer positions alone; every answer token counts once, the end of turn
included; the model is read, never changed. Plain and adapted surrogates are scored by the same code.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from soma_vllm.errors import TrainingError
from soma_vllm.method.activation_cache import Trunk
from soma_vllm.method.decoder import Decoder
from soma_vllm.method.losses import answer_kl
from soma_vllm.method.rendering import Rendered
from soma_vllm.method.soft_prompt import at_least_float32
from soma_vllm.types import Agreement


@dataclass(frozen=True)
class TurnScore:
    """One turn's agreement; sums over its answer tokens."""

    turn: int
    tokens: int
    nll: float
    """- log pi of the answer's tokens, nats."""
    hits: int
    """Tokens that are the model's own first choice."""
    kl: float | None
    """KL to the original's head, nats; None where the original shows only its words."""
    probe: Probe


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


def score_turns(decoder: Decoder, rendered: Sequence[Rendered]) -> list[TurnScore]:
    """Each turn's agreement, in the order of `rendered`.

    Raises:
        TrainingError: nothing to score, or a score that is not finite.
    """
    return score_trunk(Trunk.grow(decoder, rendered), rendered)


@torch.inference_mode()
def score_trunk(trunk: Trunk, rendered: Sequence[Rendered]) -> list[TurnScore]:
    """Like `score_turns`, of turns whose lower layers are computed.

    Raises:
        TrainingError: nothing to score, or a score that is not finite.
    """
    if not rendered:
        raise TrainingError("found no turns to score; expected at least one")
    with evaluating(trunk.decoder):
        scores = {turn.turn: _score(turn, logits) for read in trunk.read() for turn, logits in read}
    assert len(scores) == len(rendered), f"found {len(rendered)} turns with {len(scores)} numbers"
    wrong = {number: score.nll for number, score in scores.items() if not score.nll < float("inf")}
    if wrong:
        raise TrainingError(f"scoring: found NLL by turn {wrong}; expected finite numbers")
    return [scores[turn.turn] for turn in rendered]


def pooled(scores: Sequence[TurnScore]) -> Agreement:
    """Mean NLL and top-1 agreement over the answer tokens of all turns; NaN over none."""
    tokens = sum(score.tokens for score in scores)
    if tokens == 0:
        return Agreement(math.nan, math.nan, 0)
    return Agreement(
        nll=sum(score.nll for score in scores) / tokens,
        top1=sum(score.hits for score in scores) / tokens,
        tokens=tokens,
    )


@contextmanager
def evaluating(decoder: Decoder) -> Iterator[None]:
    """No dropout for the block."""
    was_training = decoder.model.training
    decoder.model.eval()
    try:
        yield
    finally:
        decoder.model.train(was_training)


def _score(turn: Rendered, logits: torch.Tensor) -> TurnScore:
    wide = at_least_float32(logits)
    answer = torch.tensor(turn.answer, device=logits.device)
    logprobs = torch.log_softmax(wide, dim=1).gather(1, answer.unsqueeze(1)).squeeze(1)
    return TurnScore(
        turn=turn.turn,
        tokens=len(turn.answer),
        nll=-float(logprobs.sum()),
        hits=int((wide.argmax(dim=1) == answer).sum()),
        kl=None if turn.teacher is None else float(answer_kl(wide, turn).sum()),
        probe=Probe(turn.prompt, turn.answer, tuple(logprobs.tolist())),
    )

"""The evidence for a verdict: candidates on turns they were not trained on, against what the original answered.

Guarantees: each candidate is measured on the engine that would serve it; a shadow answer that was made during
the warm start is used only for the very prompt and length it was made for.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Sequence

from soma_vllm.adaptation.shadow_answers import ShadowAnswers, comparable, shadow_tokens
from soma_vllm.adaptation.shadow_traffic import ShadowTraffic
from soma_vllm.config import Config
from soma_vllm.engines.engine import ChatCall
from soma_vllm.errors import EngineError, TrainingError
from soma_vllm.sessions.state.gate import Verdict, judge
from soma_vllm.sessions.state.session import Session
from soma_vllm.training.messages import ScoreRequest, Trainer
from soma_vllm.types import AdapterRef, Agreement, Candidate, Evidence, Example, SessionKey

logger = logging.getLogger(__name__)


class Acceptance:
    """Measures candidates and asks the gate."""

    def __init__(
        self, config: Config, shadow_answers: ShadowAnswers, shadow_traffic: ShadowTraffic, trainer: Trainer
    ) -> None:
        self._config = config
        self.shadow_answers = shadow_answers
        self._shadow_traffic = shadow_traffic
        self._trainer = trainer

    async def gaps(
        self, key: SessionKey, examples: Sequence[Example], adapter: AdapterRef | None
    ) -> tuple[float, ...]:
        """The gap of one candidate on each example; None is the plain surrogate.

        Raises:
            EngineError, AdapterError: the surrogate did not answer.
        """
        tokens = [shadow_tokens(self._config.max_new_tokens, example.length) for example in examples]
        pairs = list(zip(examples, tokens, strict=True))
        answers = [await self._answer(key, example, adapter, limit) for example, limit in pairs]
        references = [comparable(example.answer, example.length, limit) for example, limit in pairs]
        return await self.shadow_answers.gaps(answers, references)

    async def plain_agreement(self, tenant: str, examples: Sequence[Example]) -> Agreement:
        """How likely the plain surrogate finds the original's answers.

        Its engine scores them, which takes a prefill and no place in the trainers' queue; a trainer does where
        the engine cannot tell an answer's tokens from its prompt's. Raises TrainingError.
        """
        surrogate = self.shadow_answers.surrogate
        calls = [ChatCall(e.body, None, tenant, background=True) for e in examples]
        scores = [surrogate.score(call, e.answer) for call, e in zip(calls, examples, strict=True)]
        try:
            return require_finite(pooled(await asyncio.gather(*scores)))
        except EngineError as error:
            logger.info("the engine could not score the plain surrogate; a trainer does: %s", error)
            return require_finite(await self._trainer.score(ScoreRequest(tuple(examples))))

    def judge(
        self,
        session: Session,
        evidence: list[Evidence],
        forced: Candidate | None,
        allowed: Sequence[Candidate] | None = None,
    ) -> Verdict:
        """The gate's verdict on what was measured."""
        return judge(
            evidence,
            self._config.gate,
            self._config.acceptance_min_turns,
            self._config.adaptation.candidates if allowed is None else allowed,
            forced,
            session.setbacks,
        )

    async def _answer(self, key: SessionKey, example: Example, adapter: AdapterRef | None, limit: int) -> str:
        """What one candidate answers to a turn, in `limit` tokens at most."""
        if adapter is None:
            made = await self._shadow_traffic.answer(key, example.body, limit)
            if made is not None:
                return made
        return await self.shadow_answers.answer(key.tenant, example.body, limit, adapter)


def evidence_of(
    candidate: Candidate, examples: Sequence[Example], gaps: tuple[float, ...], agreement: Agreement | None
) -> Evidence:
    """What was measured of one candidate."""
    return Evidence(candidate, gaps, tuple(example.turn for example in examples), agreement)


def pooled(agreements: Sequence[Agreement]) -> Agreement:
    """The agreement over all tokens of several answers."""
    tokens = sum(one.tokens for one in agreements)
    return Agreement(
        math.fsum(one.nll * one.tokens for one in agreements) / tokens,
        math.fsum(one.top1 * one.tokens for one in agreements) / tokens,
        tokens,
    )


def require_finite(agreement: Agreement) -> Agreement:
    """The same agreement.

    Raises:
        TrainingError: it is not a number.
    """
    if not math.isfinite(agreement.nll):
        raise TrainingError(f"found a held-out score of {agreement.nll}; expected a number")
    return agreement

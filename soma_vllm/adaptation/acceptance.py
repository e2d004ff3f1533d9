"""How a session is judged, on the server and offline: in what order, and on which evidence.

`choose` is the one order: the plain surrogate on the whole warm start, of which it learned nothing; an adapter
only if that failed and a training is expected to pay; then both on the held-out turns, where the adapter must
gain. The server's trial measures when it is asked (`adaptation/pipeline.py`); an evaluation has measured before
(`tools/evaluate/harness.py`).

`Acceptance` guarantees: each candidate is measured on the engine that would serve it; a shadow answer that was
made during the warm start is used only for the very prompt and length it was made for.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from soma_vllm.adaptation.shadow_answers import ShadowAnswers, comparable, shadow_tokens
from soma_vllm.adaptation.shadow_traffic import ShadowTraffic
from soma_vllm.adaptation.tool_check import ToolCheck
from soma_vllm.config import Config
from soma_vllm.engines.engine import ChatCall
from soma_vllm.errors import AdapterError, EngineError, TrainingError
from soma_vllm.sessions.state.gate import Verdict, judge
from soma_vllm.training.messages import ScoreRequest, Trainer
from soma_vllm.types import AdapterRef, Agreement, Candidate, Evidence, Example, SessionKey

logger = logging.getLogger(__name__)


class Trial(Protocol):
    """One session's candidates, to be measured."""

    async def plain(self) -> Evidence:
        """The plain surrogate on the whole warm start."""

    async def objection(self) -> str | None:
        """Why an adapter is not expected to pay; None where it is."""

    async def adapter(self) -> tuple[Evidence, Evidence]:
        """(plain, adapter) on the held-out turns; the adapter is trained for it."""


@dataclass(frozen=True)
class Terms:
    """What a session's candidates are held to."""

    config: Config
    allowed: tuple[Candidate, ...]
    """Candidates that may serve."""
    forced: Candidate | None = None
    """Overrules the verdict."""
    setbacks: int = 0
    """`Session.setbacks`."""

    def judge(self, evidence: Sequence[Evidence], allowed: Sequence[Candidate] | None = None) -> Verdict:
        """The gate's verdict on what was measured."""
        gate, least = self.config.gate, self.config.acceptance_min_turns
        return judge(evidence, gate, least, allowed or self.allowed, self.forced, self.setbacks)


async def choose(trial: Trial, terms: Terms) -> Verdict:
    """The cheapest candidate that passes, else the original.

    The plain surrogate's numbers on the whole warm start stay with a verdict about an adapter, under `warm`.

    Raises:
        AdapterError: an adapter is needed, and none is allowed.
    """
    plain = None
    if Candidate.PLAIN in terms.allowed and terms.forced is not Candidate.ADAPTER:
        plain = terms.judge([await trial.plain()])
        if plain.candidate is Candidate.PLAIN or Candidate.ADAPTER not in terms.allowed:
            return plain
    require_adapter(terms.allowed)
    if terms.forced is not Candidate.ADAPTER and (objection := await trial.objection()) is not None:
        plain = plain or terms.judge([])
        return replace(plain, reason=f"{plain.reason}; adapter: {objection}")
    evidence = await trial.adapter()
    if plain is None:
        return terms.judge(evidence)
    # What fell short on the whole warm start is not let through by a part of it.
    verdict = terms.judge(evidence, (Candidate.ADAPTER,))
    warm = plain.numbers["candidates"][Candidate.PLAIN.value]
    return replace(verdict, numbers={**verdict.numbers, "warm": warm})


def require_adapter(allowed: Sequence[Candidate]) -> None:
    """Raises AdapterError where no adapter may be made."""
    if Candidate.ADAPTER not in allowed:
        raise AdapterError("the tenant holds as many adapters as its key allows (limits.adapters)")


class Acceptance:
    """Measures candidates."""

    def __init__(
        self, config: Config, shadow_answers: ShadowAnswers, shadow_traffic: ShadowTraffic, trainer: Trainer
    ) -> None:
        self._config = config
        self.shadow_answers = shadow_answers
        self.tool_check = ToolCheck(config, shadow_answers)
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

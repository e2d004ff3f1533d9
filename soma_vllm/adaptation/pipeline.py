"""One session's adaptation, from a complete warm start or cool-down to the verdict. No user waits for it.

    judge the plain surrogate -> (worth it? train -> publish -> load -> judge the adapter) -> switch -> prefill

Under a policy without a gate it is: train -> publish -> load -> switch.

Guarantees:

* With a gate, candidates are judged on turns not trained on, against answers the original already gave: the
  plain surrogate on the whole warm start, and against an adapter both on what that was not trained on.
* The adapter that was judged is the adapter that serves: same files, same name, same engine.
* Every failure ends in one event, `refused` or `training_failed`, and the original keeps the session.
* A session that was closed, or rewritten by its client, gets no adapter: `adaptation_abandoned`.
* An adapter that will not serve is retired, also where the adaptation was cancelled; one that serves another
  branch of the dialogue stays.
"""

from __future__ import annotations

import asyncio
import logging
import random
from dataclasses import asdict

from soma_vllm.adaptation.acceptance import Acceptance, Terms, choose, evidence_of, require_adapter
from soma_vllm.adaptation.training_run import AdaptationAbandoned, NothingTeaches, TrainingBudget, TrainingRun
from soma_vllm.config import Adaptation as AdaptationSettings
from soma_vllm.config import Config
from soma_vllm.errors import AdapterError, EngineError, EngineRefused, SomaError, TrainingError
from soma_vllm.sessions.background_tasks import BackgroundTasks
from soma_vllm.sessions.registry import SessionRegistry
from soma_vllm.sessions.state.adaptation_rules import AdaptationRules
from soma_vllm.sessions.state.events import EventKind, Judged, Switched
from soma_vllm.sessions.state.gate import Verdict
from soma_vllm.sessions.state.phases import Phase
from soma_vllm.sessions.state.prefix import compress
from soma_vllm.sessions.state.session import Session
from soma_vllm.sessions.state.transcript import query_of, text_of
from soma_vllm.types import AdapterRef, Candidate, Evidence, Example, SessionKey, chat_body

logger = logging.getLogger(__name__)

_NEXT = {"role": "user", "content": "…"}
"""Stands for the next query when the cache is prefilled: everything before it will be the same."""


class Adaptation:
    """Judges, trains and switches sessions."""

    def __init__(
        self,
        config: Config,
        registry: SessionRegistry,
        background: BackgroundTasks,
        acceptance: Acceptance,
        budget: TrainingBudget,
        training: TrainingRun,
    ) -> None:
        self._config = config
        self._registry = registry
        self._background = background
        self._acceptance = acceptance
        self._budget = budget
        self._training = training
        self._concurrent = asyncio.Semaphore(config.adaptation.max_concurrent)

    def start(
        self,
        key: SessionKey,
        forced: Candidate | None = None,
        rules: AdaptationRules | None = None,
        within_s: float = 0.0,
    ) -> None:
        """Mark a session whose warm start is complete as adapting, now; a background task does the rest, after
        a random delay of at most `within_s` seconds.

        `rules` are its policy's; None takes the default policy's. An adaptation that was interrupted too often
        is refused instead.
        """
        limits, so_far = self._config.adaptation, self._registry.session(key)
        if so_far.phase is Phase.ADAPTING and (why := _worn_out(so_far, limits)) is not None:
            logger.warning("an interrupted adaptation is not begun again: %s", why)
            self._registry.note(key, EventKind.REFUSED, reason=why, found_wanting=False)
            return
        session = self._registry.note(
            key, EventKind.ADAPTATION_STARTED, forced=forced, adapting=asdict(rules or AdaptationRules())
        )
        self._background.spawn(key, self._run(key, session, forced, random.uniform(0, within_s)))

    def start_if_due(self, key: SessionKey, rules: AdaptationRules | None = None) -> None:
        """Start, if the session has enough turns and their text is in memory."""
        if self._registry.session(key).wants_adaptation(self._config):
            self.start(key, None, rules)

    async def _run(self, key: SessionKey, session: Session, forced: Candidate | None, delay_s: float) -> None:
        await asyncio.sleep(delay_s)
        async with self._concurrent:
            await self._adapt(key, session, forced)

    async def _adapt(self, key: SessionKey, session: Session, forced: Candidate | None) -> None:
        made: list[AdapterRef] = []
        try:
            examples, held_out = await self._training.examples(session)
            if session.adapting is not None and not session.adapting.gate:
                await self._switch_without_gate(key, session.adapting, examples, made)
                return
            allowed = await self._budget.allowed(key)
            terms = Terms(self._config, allowed, forced, session.setbacks)
            parts = self._acceptance, self._budget, self._training
            trial = _Trial(session, terms, (examples, held_out), made, parts)
            verdict = await choose(trial, terms)
            self._budget.ended(key)
            self._training.require_adapting(key)
            serving = made[0] if verdict.candidate is Candidate.ADAPTER else None
            tools = None
            if verdict.candidate is not Candidate.ORIGINAL:
                tools = await self._acceptance.tool_check.check(session, serving)
                self._training.require_adapting(key)
            numbers = verdict.numbers if tools is None else {**verdict.numbers, "tools": tools.numbers()}
            judged = Judged(verdict.candidate, verdict.reason, numbers)
            self._registry.note(key, EventKind.JUDGED, **judged.to_data())
            if verdict.candidate is Candidate.ORIGINAL:
                wanting = bool(verdict.numbers["candidates"])
                self._registry.note(key, EventKind.REFUSED, reason=verdict.reason, found_wanting=wanting)
            else:
                await self._switch(session, verdict, serving, () if tools is None else tools.tools)
        except (TrainingError, AdapterError, EngineError, AdaptationAbandoned, NothingTeaches) as error:
            self._record_failure(key, error)
        finally:
            self._budget.ended(key)
            for ref in made:
                await self._training.retire(ref, key)

    async def _switch_without_gate(
        self,
        key: SessionKey,
        rules: AdaptationRules,
        examples: tuple[Example, ...],
        made: list[AdapterRef],
    ) -> None:
        """Train on the whole warm start, and switch as soon as the adapter is loaded."""
        require_adapter(await self._budget.allowed(key))
        result = await self._training.train(key, examples, (), rules)
        ref = await self._training.publish(key, result, made)
        self._training.require_adapting(key)
        switched = Switched(Candidate.ADAPTER, f"loaded; policy {rules.policy} has no gate", ref)
        self._registry.note(key, EventKind.SWITCHED, **switched.to_data())

    async def _switch(
        self, session: Session, verdict: Verdict, ref: AdapterRef | None, tools: tuple[str, ...]
    ) -> None:
        """Let the surrogate take over, turns with these `tools` too, then prefill its cache with the session's
        history: the next turn then waits for one query, or for the rest of this prefill, and not for the whole
        dialogue's."""
        key = session.key
        centroid = await self._acceptance.shadow_answers.centroid(
            [text_of(query_of(turn.messages)) for turn in session.warm_turns()]
        )
        if (phase := self._registry.session(key).phase) is not Phase.ADAPTING:
            self._registry.note(key, EventKind.ADAPTATION_ABANDONED, phase=phase)
            return
        # Taken now: what was said may be erased with the switch.
        latest = self._registry.session(key)
        history, fields = [*latest.seen_last(), _NEXT], latest.turns[-1].fields
        switched = Switched(verdict.candidate, verdict.reason, ref, tuple(centroid), tools)
        self._registry.note(key, EventKind.SWITCHED, **switched.to_data())
        shown = compress(history, self._config.prefix, self._config.compressed_prefix_turns)
        try:
            asked = chat_body(shown, fields)
            await self._acceptance.shadow_answers.answer(key.tenant, asked, 1, ref)
        except (EngineError, AdapterError) as error:
            # A cold cache makes the next turn slower, not wrong (the history may be longer than the context).
            logger.info("the surrogate's cache was not prefilled; the next turn computes its prompt: %s", error)

    def _record_failure(self, key: SessionKey, error: SomaError) -> None:
        """Record once why an adaptation ended without a verdict."""
        phase = self._registry.session(key).phase
        if phase is not Phase.ADAPTING:
            self._registry.note(key, EventKind.ADAPTATION_ABANDONED, phase=phase)
        elif isinstance(error, NothingTeaches | EngineRefused):
            cause = f": {error.cause}" if isinstance(error, EngineRefused) else ""
            self._registry.note(key, EventKind.REFUSED, reason=f"{error}{cause}", found_wanting=False)
        else:
            logger.warning(
                "adaptation failed; the original keeps the session until its cool-down ends: %s", error
            )
            self._registry.note(key, EventKind.TRAINING_FAILED, error=type(error).__name__, message=str(error))


def _worn_out(session: Session, limits: AdaptationSettings) -> str | None:
    """Why an adaptation that was interrupted is not begun again; None where it is."""
    if session.attempts >= limits.max_attempts:
        return f"its adaptation was interrupted {session.attempts} times"
    if session.trainings >= limits.max_trainings:
        return f"it had {session.trainings} trainings"
    return None


class _Trial:
    """`Trial` of a session that is served: each candidate is measured when the gate asks for it."""

    def __init__(
        self,
        session: Session,
        terms: Terms,
        split: tuple[tuple[Example, ...], tuple[Example, ...]],
        made: list[AdapterRef],
        parts: tuple[Acceptance, TrainingBudget, TrainingRun],
    ) -> None:
        """`split`: turns to train on, and held out. An adapter is put into `made` as soon as there is one."""
        self._key = session.key
        self._rules = session.adapting
        self._terms = terms
        self._examples, self._held_out = split
        self._warm = (*self._examples, *self._held_out)
        self._made = made
        self._acceptance, self._budget, self._training = parts
        self._plain_gaps: tuple[float, ...] = ()

    async def plain(self) -> Evidence:
        """The plain surrogate on the whole warm start."""
        self._plain_gaps = await self._acceptance.gaps(self._key, self._warm, None)
        # A gate that asks for no agreement is not kept waiting for one.
        needed = self._terms.config.gate.min_agreement > 0
        agreement = await self._acceptance.plain_agreement(self._key.tenant, self._warm) if needed else None
        self._training.require_adapting(self._key)
        return evidence_of(Candidate.PLAIN, self._warm, self._plain_gaps, agreement)

    async def objection(self) -> str | None:
        """Why an adapter is not expected to pay; None where it is."""
        return await self._budget.objection(self._key)

    async def adapter(self) -> tuple[Evidence, Evidence]:
        """(plain, adapter) on the held-out turns.

        An adapter of 0 steps is the plain surrogate: where that is sure to be refused, nothing is published.
        """
        key, held_out = self._key, self._held_out
        plain_gaps = self._plain_gaps[-len(held_out) :] or await self._acceptance.gaps(key, held_out, None)
        result = await self._training.train(key, self._examples, held_out, self._rules)
        config = self._terms.config
        gains_nothing = not result.steps and config.lora.init_from is None and config.gate.min_gain > 0
        if gains_nothing and self._terms.forced is None:
            self._training.discard(result)
            gaps = plain_gaps
        else:
            ref = await self._training.publish(key, result, self._made)
            self._budget.ended(key)  # it counts as an adapter from here on
            gaps = await self._acceptance.gaps(key, held_out, ref)
        return (
            evidence_of(Candidate.PLAIN, held_out, plain_gaps, result.plain),
            evidence_of(Candidate.ADAPTER, held_out, gaps, result.adapted),
        )

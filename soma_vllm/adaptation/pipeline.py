"""One session's adaptation, from a complete warm start or cool-down to the verdict. No user waits for it.

    judge the plain surrogate -> (worth it? train -> publish -> load -> judge the adapter) -> switch -> prefill

Under a policy without a gate it is: train -> publish -> load -> switch.

Guarantees:

* With a gate, candidates are judged on turns not trained on, against answers the original already gave: the
  plain surrogate on the whole warm start, and beside an adapter both on what that was not trained on.
* The adapter that was judged is the adapter that serves: same files, same name, same engine.
* Whatever goes wrong ends in one event, `refused` or `training_failed`, and the original keeps the session.
* A session that was closed, or rewritten by its client, meanwhile gets no adapter: `adaptation_abandoned`.
* An adapter that will not serve leaves the engine before its files are deleted, also where the adaptation was
  cancelled; one that serves another branch of the dialogue stays.
"""

from __future__ import annotations

import asyncio
import logging
import math
import shutil
from collections.abc import Coroutine, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from soma_vllm.adaptation.cost_model import CostModel
from soma_vllm.adaptation.shadow_answers import adapted_answer, comparable, gaps_between, shadow_tokens
from soma_vllm.adaptation.shadow_traffic import ShadowTraffic
from soma_vllm.adaptation.teacher_logprobs import TeacherLogprobs
from soma_vllm.adaptation.threaded_encoder import Encoder
from soma_vllm.adapters.leases import AdapterLeases
from soma_vllm.adapters.store.protocol import Shelf
from soma_vllm.config import Config, Lora, Mining
from soma_vllm.engines.engine import AdapterEngine, ChatCall
from soma_vllm.errors import (
    AdapterError,
    AdapterRejected,
    EngineError,
    EngineRefused,
    NotFound,
    SomaError,
    StoreUnavailable,
    TrainingError,
)
from soma_vllm.sessions.ports import Meter
from soma_vllm.sessions.registry import SessionRegistry
from soma_vllm.sessions.state.adaptation_rules import AdaptationRules
from soma_vllm.sessions.state.adapter_states import AdapterState
from soma_vllm.sessions.state.events import EventKind
from soma_vllm.sessions.state.gate import Verdict, centroid, judge
from soma_vllm.sessions.state.phases import Phase
from soma_vllm.sessions.state.prefix import compress
from soma_vllm.sessions.state.session import Session
from soma_vllm.sessions.state.transcript import text_of
from soma_vllm.training.messages import ScoreRequest, Trainer, TrainRequest, TrainResult
from soma_vllm.training.pair import may_start_from, owner_of
from soma_vllm.types import AdapterRef, Agreement, Candidate, Evidence, Example, SessionKey

logger = logging.getLogger(__name__)

RECORD_S = 10.0
"""Longest wait for the record before an adapter's files are deleted; after it the next start deletes them."""


class TooMuch(EngineError):
    """The surrogate does not take a warm turn, and would take no longer one."""


class Abandoned(SomaError):
    """The session is not adapting any more."""


class Adaptation:
    """Trains, publishes, judges and switches sessions."""

    def __init__(
        self,
        config: Config,
        registry: SessionRegistry,
        surrogate: AdapterEngine,
        trainer: Trainer,
        adapter_store: Shelf,
        encoder: Encoder,
        leases: AdapterLeases,
        teacher_logprobs: TeacherLogprobs,
        meter: Meter,
        cost_model: CostModel,
        shadow_traffic: ShadowTraffic,
    ) -> None:
        self._config = config
        self._registry = registry
        self._surrogate = surrogate
        self._trainer = trainer
        self._adapter_store = adapter_store
        self._encoder = encoder
        self._leases = leases
        self._teacher_logprobs = teacher_logprobs
        self._meter = meter
        self._cost_model = cost_model
        self._shadow_traffic = shadow_traffic
        self._retiring: set[str] = set()

    def begin(
        self, key: SessionKey, forced: Candidate | None, adapting: AdaptationRules | None = None
    ) -> Coroutine[Any, Any, None]:
        """Mark a session whose warm start is complete as adapting, now; the coroutine does the rest.

        `adapting` are the rules of its policy; None takes the default policy's.
        """
        rules = asdict(adapting or AdaptationRules())
        return self._run(
            key, self._registry.note(key, EventKind.ADAPTATION_STARTED, forced=forced, adapting=rules), forced
        )

    async def _run(self, key: SessionKey, session: Session, forced: Candidate | None) -> None:
        examples, held_out = (
            self._teacher_logprobs.attach(key, part) for part in session.examples(self._config)
        )
        made: list[AdapterRef] = []
        try:
            if session.adapting is not None and not session.adapting.gate:
                await self._ungated(key, session, session.adapting, examples, made)
                return
            verdict = await self._choose(key, examples, held_out, forced, made)
            self._registry.note(
                key,
                EventKind.JUDGED,
                candidate=verdict.candidate,
                reason=verdict.reason,
                numbers=verdict.numbers,
            )
            if verdict.candidate is Candidate.ORIGINAL:
                wanting = bool(verdict.numbers["candidates"])
                self._registry.note(key, EventKind.REFUSED, reason=verdict.reason, found_wanting=wanting)
            else:
                serving = made[0] if verdict.candidate is Candidate.ADAPTER else None
                await self._switch(key, session, verdict, serving)
        except (TrainingError, AdapterError, EngineError, Abandoned) as error:
            self._give_up(key, error)
        finally:
            for ref in made:
                await self.retire(key, ref)

    async def _ungated(
        self,
        key: SessionKey,
        session: Session,
        adapting: AdaptationRules,
        examples: tuple[Example, ...],
        made: list[AdapterRef],
    ) -> None:
        """Train on the whole warm start, and switch as soon as the adapter is loaded."""
        self._require_adapter(await self._allowed(key.tenant))
        result = await self._train(key, examples, (), self._mining_of(adapting))
        ref = await self._publish(key, result, made)
        self._still_adapting(key)
        self._registry.note(
            key,
            EventKind.SWITCHED,
            candidate=Candidate.ADAPTER,
            reason=f"loaded; policy {adapting.policy} has no gate",
            adapter=asdict(ref),
            centroid=None,
        )

    def _mining_of(self, adapting: AdaptationRules | None) -> Mining:
        """The settings of stage 1 under some rules."""
        mining = self._config.mining
        return mining if adapting is None or adapting.mining else mining.model_copy(update={"enabled": False})

    def _require_adapter(self, allowed: Sequence[Candidate]) -> None:
        """Raises AdapterError where no adapter may be made."""
        if Candidate.ADAPTER not in allowed:
            raise AdapterError("the tenant holds as many adapters as its key allows (limits.adapters)")

    def _give_up(self, key: SessionKey, error: SomaError) -> None:
        """Say once why an adaptation came to nothing."""
        phase = self._registry.session(key).phase
        if phase is not Phase.ADAPTING:
            self._registry.note(key, EventKind.ADAPTATION_ABANDONED, phase=phase)
        elif isinstance(error, TooMuch):
            self._registry.note(key, EventKind.REFUSED, reason=str(error), found_wanting=False)
        else:
            logger.warning("adaptation failed: %s", error)
            self._registry.note(key, EventKind.TRAINING_FAILED, error=type(error).__name__, message=str(error))

    def _still_adapting(self, key: SessionKey) -> None:
        """Raises Abandoned where the session was closed or rewritten meanwhile."""
        phase = self._registry.session(key).phase
        if phase is not Phase.ADAPTING:
            raise Abandoned(f"found the session in phase {phase}; expected {Phase.ADAPTING}")

    async def retire(self, key: SessionKey, ref: AdapterRef) -> None:
        """Take an adapter that serves nobody out of the engine once its last token is out, and delete it."""
        gone = self._registry.adapter_state(ref.name) is AdapterState.RETIRED
        if gone or ref.name in self._retiring:
            return
        self._retiring.add(ref.name)
        try:
            if await self._on_record(ref) and not await self._registry.in_use(ref):
                self._registry.note(key, EventKind.ADAPTER_DRAINING, adapter=asdict(ref))
                if await self.withdraw(ref):
                    self._registry.note(key, EventKind.ADAPTER_RETIRED, adapter=asdict(ref))
        finally:
            self._retiring.discard(ref.name)

    async def withdraw(self, ref: AdapterRef) -> bool:
        """The same for an adapter that no live session speaks of; False where it has to be tried again."""
        await self._leases.leaving(ref.name)
        try:
            await self._surrogate.unload(ref)
            with suppress(NotFound):  # somebody deleted the files by hand
                await asyncio.to_thread(self._adapter_store.retire, ref.name)
        except (EngineError, AdapterError) as error:
            logger.warning("adapter %s could not be retired: %s", ref.name, error)
            return False
        self._leases.left(ref.name)
        return True

    async def _on_record(self, ref: AdapterRef) -> bool:
        """Whether the record has all that was decided so far. Only then may files go: a server that is killed
        in between would come back to a session whose adapter is gone, and one that asks who else is served
        by it would hear of sessions that were removed."""
        try:
            async with asyncio.timeout(RECORD_S):
                await self._registry.written()
        except TimeoutError:
            logger.warning("adapter %s stays until the next start: the session store is away", ref.name)
            return False
        return True

    async def _choose(
        self,
        key: SessionKey,
        examples: tuple[Example, ...],
        held_out: tuple[Example, ...],
        forced: Candidate | None,
        made: list[AdapterRef],
    ) -> Verdict:
        """Judge the candidates, cheapest first; train only if the plain surrogate will not do, and if it pays.

        An adapter is put into `made` as soon as there is one.
        """
        allowed = await self._allowed(key.tenant)
        warm = (*examples, *held_out)  # the plain surrogate learned from none of them
        plain_gaps = await self._gaps(key, warm, None)
        so_far = None
        if Candidate.PLAIN in allowed and forced is not Candidate.ADAPTER:
            # A gate that asks for no agreement is not kept waiting for one.
            asked = self._config.gate.min_agreement > 0
            agreement = await self._plain_agreement(key.tenant, warm) if asked else None
            evidence = [_evidence(Candidate.PLAIN, warm, plain_gaps, agreement)]
            so_far = self._judge(key, evidence, forced)
            self._still_adapting(key)
            if so_far.candidate is Candidate.PLAIN or Candidate.ADAPTER not in allowed:
                return so_far
        self._require_adapter(allowed)
        if forced is not Candidate.ADAPTER and (objection := await self._too_dear(key)) is not None:
            so_far = so_far or self._judge(key, [], forced)
            return replace(so_far, reason=f"{so_far.reason}; adapter: {objection}")
        mining = self._mining_of(self._registry.session(key).adapting)
        result = await self._train(key, examples, held_out, mining)
        ref = await self._publish(key, result, made)
        gaps = await self._gaps(key, held_out, ref)
        self._still_adapting(key)
        evidence = [
            _evidence(Candidate.PLAIN, held_out, plain_gaps[-len(held_out) :], result.plain),
            _evidence(Candidate.ADAPTER, held_out, gaps, result.adapted),
        ]
        # What fell short on the whole warm start is not let through by a part of it.
        left = allowed if so_far is None else (Candidate.ADAPTER,)
        return self._judge(key, evidence, forced, left)

    async def _plain_agreement(self, tenant: str, warm: tuple[Example, ...]) -> Agreement:
        """How likely the plain surrogate finds the original's answers.

        Its engine reads them, which takes a prefill and no place in the trainers' queue; a trainer does where
        the engine cannot tell an answer's tokens from its prompt's.
        """
        reading = []
        for example in warm:
            call = ChatCall({"messages": list(example.messages)}, None, tenant, background=True)
            reading.append(self._surrogate.score(call, example.answer))
        try:
            return _finite(pooled(await asyncio.gather(*reading)))
        except EngineError as error:
            logger.info("a trainer reads what the engine could not: %s", error)
            return _finite(await self._trainer.score(ScoreRequest(warm)))

    async def _too_dear(self, key: SessionKey) -> str | None:
        """Why an adapter of this session would not be worth its cost; None where it would."""
        mode = self._config.adaptation.payback
        if mode != "auto":
            return None if mode == "always" else "adaptation.payback is never"
        judgement = await self._cost_model.judge(self._registry.session(key))
        self._registry.note(key, EventKind.PAYBACK_JUDGED, **judgement.numbers())
        if judgement.pays:
            return None
        return f"an expected gain of {judgement.gain:.3g} does not cover its cost of {judgement.cost:.3g}"

    async def _allowed(self, tenant: str) -> tuple[Candidate, ...]:
        """The configured candidates, without an adapter where the tenant may have no further one."""
        candidates = self._config.adaptation.candidates
        if Candidate.ADAPTER not in candidates:
            return candidates
        try:
            held = await self._registry.adapters(tenant)
        except StoreUnavailable:
            return candidates
        if self._meter.may_adapt(tenant, held):
            return candidates
        return tuple(candidate for candidate in candidates if candidate is not Candidate.ADAPTER)

    def _judge(
        self,
        key: SessionKey,
        evidence: list[Evidence],
        forced: Candidate | None,
        allowed: Sequence[Candidate] | None = None,
    ) -> Verdict:
        return judge(
            evidence,
            self._config.gate,
            self._config.acceptance_min_turns,
            self._config.adaptation.candidates if allowed is None else allowed,
            forced,
            self._registry.session(key).setbacks,
        )

    async def _gaps(
        self, key: SessionKey, held_out: Sequence[Example], ref: AdapterRef | None
    ) -> tuple[float, ...]:
        """The gap of one candidate on each held-out turn, measured on the engine that would serve."""
        tokens = [shadow_tokens(self._config.max_new_tokens, example.length) for example in held_out]
        pairs = list(zip(held_out, tokens, strict=True))
        answers = [await self._answered(key, example, ref, limit) for example, limit in pairs]
        references = [comparable(example.answer, example.length, limit) for example, limit in pairs]
        return await gaps_between(self._encoder, answers, references)

    async def _answered(self, key: SessionKey, example: Example, ref: AdapterRef | None, limit: int) -> str:
        """What one candidate answers to a held-out turn, in `limit` tokens at most."""
        if ref is None:
            rehearsed = await self._shadow_traffic.answer(key, example.messages, limit)
            if rehearsed is not None:
                return rehearsed
        try:
            return await adapted_answer(self._surrogate, self._leases, key.tenant, example.messages, limit, ref)
        except EngineRefused as error:
            length = sum(len(text_of(message)) for message in example.messages)
            raise TooMuch(
                f"turn {example.turn}: the surrogate refused its prompt with status {error.status}; found "
                f"{length} characters and {limit} tokens of answer to come, expected what fits a context of "
                f"{self._config.surrogate.max_model_len} tokens"
            ) from error

    async def _train(
        self,
        key: SessionKey,
        examples: tuple[Example, ...],
        held_out: tuple[Example, ...],
        mining: Mining,
    ) -> TrainResult:
        turns = [example.turn for example in examples]
        lessons = self._teacher_logprobs.account(examples)
        session = self._registry.note(key, EventKind.TRAINING_SUBMITTED, turns=turns, **lessons)
        out_dir = self._adapter_store.workplace()
        request = TrainRequest(
            examples,
            held_out,
            mining,
            self._lora_of(key.tenant),
            self._config.training.seed + session.trainings,
            out_dir,
        )
        try:
            result = await self._trainer.train(request)
            if held_out:
                _finite(result.plain)
                _finite(result.adapted)
            self._registry.note(key, EventKind.TRAINED, **_costs(result))
            self._still_adapting(key)
        except BaseException:
            shutil.rmtree(out_dir, ignore_errors=True)
            raise
        return result

    def _lora_of(self, tenant: str) -> Lora:
        """The training's settings; nobody starts from what another tenant's sessions taught."""
        lora = self._config.lora
        if lora.init_from is None or may_start_from(owner_of(lora.init_from), tenant):
            return lora
        return lora.model_copy(update={"init_from": None})

    async def _publish(self, key: SessionKey, result: TrainResult, made: list[AdapterRef]) -> AdapterRef:
        """Publish the trained files, then load them into the engine, which must serve what was trained."""
        try:
            ref = await asyncio.to_thread(
                self._adapter_store.publish,
                key,
                Path(result.directory),
                base_model=self._surrogate.name,
                manifest=_costs(result) | _signature(result),
            )
        finally:
            shutil.rmtree(result.directory, ignore_errors=True)
        made.append(ref)
        self._registry.note(key, EventKind.ADAPTER_PUBLISHED, adapter=asdict(ref))
        self._still_adapting(key)
        try:
            async with self._leases.shadowing(ref.name):
                await self._surrogate.load(ref)
        except AdapterRejected as error:
            self._registry.note(
                key, EventKind.ADAPTER_REJECTED, adapter=asdict(ref), problems=list(error.problems)
            )
            raise
        self._registry.note(key, EventKind.ADAPTER_LOADED, adapter=asdict(ref))
        return ref

    async def _switch(
        self, key: SessionKey, session: Session, verdict: Verdict, ref: AdapterRef | None
    ) -> None:
        """Let the surrogate take over, then warm its cache with the session's history: a user who is quicker
        than that waits for the surrogate's prefill, and not for a whole answer of the original."""
        queries = [text_of(turn.messages[-1]) for turn in session.warm_turns()]
        vectors = await self._encoder.encode(queries)
        if (phase := self._registry.session(key).phase) is not Phase.ADAPTING:
            self._registry.note(key, EventKind.ADAPTATION_ABANDONED, phase=phase)
            return
        # Taken now: what was said may be erased with the switch.
        history = self._registry.session(key).seen_last()
        self._registry.note(
            key,
            EventKind.SWITCHED,
            candidate=verdict.candidate,
            reason=verdict.reason,
            adapter=None if ref is None else asdict(ref),
            centroid=[round(float(x), 6) for x in centroid(list(vectors))],
        )
        shown = compress([*history, _NEXT], self._config.prefix, self._config.compressed_prefix_turns)
        try:
            await adapted_answer(self._surrogate, self._leases, key.tenant, shown, 1, ref)
        except (EngineError, AdapterError) as error:
            # A cold cache makes the next turn slower, not wrong (the history may be longer than the context).
            logger.info("the surrogate's cache was not prefilled: %s", error)


_NEXT = {"role": "user", "content": "…"}
"""Stands for the next query when the cache is prefilled: everything before it will be the same."""


def _evidence(
    candidate: Candidate, held_out: Sequence[Example], gaps: tuple[float, ...], agreement: Agreement | None
) -> Evidence:
    return Evidence(candidate, gaps, tuple(example.turn for example in held_out), agreement)


def pooled(agreements: Sequence[Agreement]) -> Agreement:
    """The agreement over all tokens of several answers."""
    tokens = sum(one.tokens for one in agreements)
    return Agreement(
        math.fsum(one.nll * one.tokens for one in agreements) / tokens,
        math.fsum(one.top1 * one.tokens for one in agreements) / tokens,
        tokens,
    )


def _finite(agreement: Agreement) -> Agreement:
    """An agreement that is a number.

    Raises:
        TrainingError: it is not.
    """
    if not math.isfinite(agreement.nll):
        raise TrainingError(f"found a held-out score of {agreement.nll}; expected a number")
    return agreement


def _signature(result: TrainResult) -> dict[str, Any]:
    """What the manifest says of how the adapter must be served, JSON-compatible."""
    return {} if result.signature is None else {"signature": asdict(result.signature)}


def _costs(result: TrainResult) -> dict[str, Any]:
    """A training's statistics, JSON-compatible."""
    return {
        "mining_s": round(result.mining_s, 3),
        "finetune_s": round(result.finetune_s, 3),
        "scoring_s": round(result.scoring_s, 3),
        "steps": result.steps,
        "distilled": result.distilled,
        "flops": result.flops,
        "losses": [round(loss, 4) for loss in result.losses],
        "hardness": {str(turn): round(value, 4) for turn, value in result.hardness.items()},
        "checkpoints": [
            {"steps": steps, "nll": round(judged.nll, 4), "top1": round(judged.top1, 4)}
            for steps, judged in result.checkpoints
        ],
        "plain": asdict(result.plain) if result.plain.tokens else None,
        "adapted": asdict(result.adapted) if result.adapted.tokens else None,
    }

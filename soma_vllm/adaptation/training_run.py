"""One training of one session: whether it may and pays, the run itself, and the publication of its adapter.

Guarantees: a run that fails, is cancelled, or whose session left the adaptation leaves no files behind; no
training starts from an adapter that another tenant's sessions were trained into; a published adapter is
loaded and proven.
"""

from __future__ import annotations

import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from soma_vllm.adaptation.acceptance import require_finite
from soma_vllm.adaptation.cost_model import CostModel
from soma_vllm.adaptation.teacher_logprobs import TeacherLogprobs
from soma_vllm.adapters.lifecycle import AdapterLifecycle
from soma_vllm.config import Adaptation, Config, Lora
from soma_vllm.engines.engine import AdapterEngine, ChatCall
from soma_vllm.errors import EngineRefused, SomaError, StoreUnavailable
from soma_vllm.sessions.ports import Meter
from soma_vllm.sessions.registry import SessionRegistry
from soma_vllm.sessions.state.adaptation_rules import AdaptationRules
from soma_vllm.sessions.state.events import EventKind
from soma_vllm.sessions.state.phases import Phase
from soma_vllm.sessions.state.session import Session
from soma_vllm.training.messages import Trainer, TrainRequest, TrainResult
from soma_vllm.training.pair import may_start_from, owner_of
from soma_vllm.types import AdapterRef, Candidate, Example, SessionKey


class AdaptationAbandoned(SomaError):
    """The session is not adapting any more."""


class NothingTeaches(SomaError):
    """Too few of the session's turns can be read by the surrogate; the message says why the others cannot."""


class TrainingBudget:
    """Whether a session may have an adapter, and whether it pays."""

    def __init__(
        self, settings: Adaptation, registry: SessionRegistry, meter: Meter, cost_model: CostModel
    ) -> None:
        self._settings = settings
        self._registry = registry
        self._meter = meter
        self._cost_model = cost_model
        self._promised: set[SessionKey] = set()

    async def allowed(self, key: SessionKey) -> tuple[Candidate, ...]:
        """The configured candidates of a session, without an adapter where its tenant may have no further one,
        those that other adaptations may come to until `ended` counted."""
        candidates = self._settings.candidates
        if Candidate.ADAPTER not in candidates:
            return candidates
        try:
            count = await self._registry.adapters(key.tenant)
        except StoreUnavailable:
            return candidates
        others = sum(other.tenant == key.tenant for other in self._promised - {key})
        if self._meter.may_adapt(key.tenant, count + others):
            self._promised.add(key)
            return candidates
        return tuple(candidate for candidate in candidates if candidate is not Candidate.ADAPTER)

    def ended(self, key: SessionKey) -> None:
        """The adaptation of a session is over: its adapter is on record, or there is none."""
        self._promised.discard(key)

    async def objection(self, key: SessionKey) -> str | None:
        """Why an adapter of this session would not be worth its cost; None where it would."""
        mode = self._settings.payback
        if mode != "auto":
            return None if mode == "always" else "adaptation.payback is never"
        judgement = await self._cost_model.judge(self._registry.session(key))
        self._registry.note(key, EventKind.PAYBACK_JUDGED, **judgement.numbers())
        if judgement.pays:
            return None
        return f"an expected gain of {judgement.gain:.3g} does not cover its cost of {judgement.cost:.3g}"


class TrainingRun:
    """Trains and publishes."""

    def __init__(
        self,
        config: Config,
        registry: SessionRegistry,
        trainer: Trainer,
        adapters: AdapterLifecycle,
        teacher_logprobs: TeacherLogprobs,
        surrogate: AdapterEngine,
    ) -> None:
        self._config = config
        self._registry = registry
        self._trainer = trainer
        self._adapters = adapters
        self._teacher_logprobs = teacher_logprobs
        self._surrogate = surrogate

    async def examples(self, session: Session) -> tuple[tuple[Example, ...], tuple[Example, ...]]:
        """What to train on and what to judge on (`Session.examples`), with the original's log-probabilities
        where they were captured, and each prompt as the surrogate's engine reads it.

        A turn that the surrogate refuses is recorded as one that does not teach; an older one takes its place.

        Raises:
            NothingTeaches: too few turns are left.
            EngineError: the surrogate did not answer.
        """
        key, prompts, refused = session.key, dict[int, tuple[int, ...]](), ""
        while True:
            parts = session.examples(self._config)
            unread = [example for part in parts for example in part if example.turn not in prompts]
            if not unread:
                break
            for example in unread:
                try:
                    prompts[example.turn] = await self._read(key, example)
                except EngineRefused as error:
                    why = f"the surrogate cannot read it: {error.cause}"
                    self._registry.note(key, EventKind.TURN_SKIPPED, turn=example.turn, why=why)
                    session = session.skipping(example.turn, why)
                    refused = f"; turn {example.turn}: {why}"
        first, last = parts
        gated = session.adapting is None or session.adapting.gate
        wanted = 1 + (self._config.acceptance_min_turns if gated else 0)
        if not first or len(first) + len(last) < wanted:
            found = len(session.warm_turns())
            raise NothingTeaches(f"found {found} turns that teach; expected at least {wanted}{refused}")
        attach = self._teacher_logprobs.attach
        return attach(key, [replace(e, prompt=prompts[e.turn]) for e in first]), attach(
            key, [replace(e, prompt=prompts[e.turn]) for e in last]
        )

    async def _read(self, key: SessionKey, example: Example) -> tuple[int, ...]:
        """The prompt's token ids.

        Raises:
            EngineRefused: the engine refuses it, or its answer does not fit the context after it.
        """
        prompt = await self._surrogate.prompt(ChatCall(example.body, None, key.tenant, background=True))
        if len(prompt) + (example.length.tokens or 0) > self._config.surrogate.max_model_len:
            raise EngineRefused(400, {}, cause="context_length_exceeded")
        return prompt

    async def train(
        self,
        key: SessionKey,
        examples: tuple[Example, ...],
        held_out: tuple[Example, ...],
        rules: AdaptationRules | None,
    ) -> TrainResult:
        """Train an adapter on the examples and score it on the held-out turns.

        Raises:
            TrainingError: the training failed.
            AdaptationAbandoned: the session was closed or rewritten before it ended.
        """
        turns = [example.turn for example in examples]
        account = self._teacher_logprobs.account(examples)
        session = self._registry.note(key, EventKind.TRAINING_SUBMITTED, turns=turns, **account)
        mining = self._config.mining
        if rules is not None and not rules.mining:
            mining = mining.model_copy(update={"enabled": False})
        out_dir = self._adapters.workplace()
        seed = self._config.training.seed + session.trainings
        request = TrainRequest(examples, held_out, mining, self._lora_of(key.tenant), seed, out_dir)
        try:
            result = await self._trainer.train(request)
            if held_out:
                require_finite(result.plain)
                require_finite(result.adapted)
            self._registry.note(key, EventKind.TRAINED, **training_costs(result))
            self.require_adapting(key)
        except BaseException:
            shutil.rmtree(out_dir, ignore_errors=True)
            raise
        return result

    async def publish(self, key: SessionKey, result: TrainResult, made: list[AdapterRef]) -> AdapterRef:
        """Publish a trained adapter, then load it into the engine, which must serve what was trained.

        It is put into `made` as soon as it is published.

        Raises:
            AdapterError: it cannot be published, or is not served as it was trained.
            EngineError: the engine did not load it.
            AdaptationAbandoned: the session was closed or rewritten before it was published.
        """
        signature = {} if result.signature is None else {"signature": asdict(result.signature)}
        try:
            manifest = training_costs(result) | signature
            ref = await self._adapters.publish(key, Path(result.directory), manifest, made)
        finally:
            self.discard(result)
        self.require_adapting(key)
        await self._adapters.prove(key, ref)
        return ref

    def discard(self, result: TrainResult) -> None:
        """Delete a trained adapter that is not published."""
        shutil.rmtree(result.directory, ignore_errors=True)

    async def retire(self, ref: AdapterRef, key: SessionKey) -> None:
        """Retire an adapter, unless a session is served by it."""
        await self._adapters.retire(ref, key)

    def require_adapting(self, key: SessionKey) -> None:
        """Raises AdaptationAbandoned where the session was closed or rewritten."""
        phase = self._registry.session(key).phase
        if phase is not Phase.ADAPTING:
            raise AdaptationAbandoned(f"found the session in phase {phase}; expected {Phase.ADAPTING}")

    def _lora_of(self, tenant: str) -> Lora:
        """The training's settings for a tenant."""
        lora = self._config.lora
        if lora.init_from is None or may_start_from(owner_of(lora.init_from), tenant):
            return lora
        return lora.model_copy(update={"init_from": None})


def training_costs(result: TrainResult) -> dict[str, Any]:
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

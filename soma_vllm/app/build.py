"""The one wiring: how a server's services are put together, and the order in which they start and stop.

soma-serve gives it real engines, stores and trainers; tests give it fakes of those, and nothing else differs.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import cast

from soma_vllm.adaptation.acceptance import Acceptance
from soma_vllm.adaptation.background_lane import BackgroundLane
from soma_vllm.adaptation.cost_model import CostModel
from soma_vllm.adaptation.drift import DriftWatch
from soma_vllm.adaptation.evidence import TurnEvidence
from soma_vllm.adaptation.pipeline import Adaptation
from soma_vllm.adaptation.shadow_answers import ShadowAnswers
from soma_vllm.adaptation.shadow_traffic import ShadowTraffic
from soma_vllm.adaptation.teacher_logprobs import TeacherLogprobs
from soma_vllm.adaptation.threaded_encoder import Encoder
from soma_vllm.adaptation.threaded_judge import Judge
from soma_vllm.adaptation.training_run import TrainingBudget, TrainingRun
from soma_vllm.adapters.leases import AdapterLeases
from soma_vllm.adapters.lifecycle import AdapterLifecycle
from soma_vllm.adapters.store.protocol import AdapterStore, AdapterStoreMeter
from soma_vllm.config import Config
from soma_vllm.engines.engine import AdapterEngine, Engines, Salts, ScoringEngine
from soma_vllm.engines.guarded_original import GuardedOriginal, OriginalMeter
from soma_vllm.maintenance.adapter_eviction import AdapterEvictor
from soma_vllm.maintenance.recovery import Recovery
from soma_vllm.maintenance.removal import SessionRemoval
from soma_vllm.maintenance.retention import Retention
from soma_vllm.maintenance.session_admin import SessionAdmin
from soma_vllm.maintenance.sweep_trigger import SweepTrigger
from soma_vllm.maintenance.sweeper import Sweeper
from soma_vllm.scheduler.dispatcher import Dispatcher
from soma_vllm.scheduler.follow_up import FollowUp
from soma_vllm.scheduler.policies.base import Policies
from soma_vllm.scheduler.routing import Routing
from soma_vllm.scheduler.turn_recorder import TurnRecorder
from soma_vllm.sessions.background_tasks import BackgroundTasks
from soma_vllm.sessions.lookup import SessionLookup
from soma_vllm.sessions.patient_store import PatientStore
from soma_vllm.sessions.ports import Meter, Observer, Store
from soma_vllm.sessions.registry import SessionRegistry
from soma_vllm.training.messages import Trainer


@dataclass(frozen=True)
class Parts:
    """What the services are made of, open or loaded already; the caller closes them afterwards."""

    config: Config
    policies: Policies
    original: ScoringEngine
    surrogate: AdapterEngine
    encoder: Encoder
    judge: Judge
    trainer: Trainer
    store: Store
    adapter_store: AdapterStore
    leases: AdapterLeases
    teacher_logprobs: TeacherLogprobs
    meter: Meter
    stock: AdapterStoreMeter
    salts: Salts
    sweep_trigger: SweepTrigger
    observers: Sequence[Observer] = ()
    """Told of every event, before the services' own."""
    original_meter: OriginalMeter | None = None


@dataclass(frozen=True)
class SomaServices:
    """Everything that serves dialogues; `start` before the first request, `stop` after the last."""

    registry: SessionRegistry
    original: GuardedOriginal
    background: BackgroundTasks
    lane: BackgroundLane
    shadow_traffic: ShadowTraffic
    cost_model: CostModel
    adapters: AdapterLifecycle
    adaptation: Adaptation
    dispatcher: Dispatcher
    evictor: AdapterEvictor
    removal: SessionRemoval
    retention: Retention
    recovery: Recovery
    session_admin: SessionAdmin
    sweeper: Sweeper

    async def start(self) -> None:
        """Take up what a kill interrupted, then begin to sweep. Raises StoreUnavailable."""
        await self.registry.start()
        await self.recovery.run()
        self.sweeper.start()

    async def stop(self) -> None:
        """End all work, then write what is still to be written, also where a part fails to end."""
        async with AsyncExitStack() as stops:  # the last one first
            for stop in (
                self.registry.stop,
                self.shadow_traffic.stop,
                self.background.stop,
                self.evictor.stop,
                self.removal.stop,
                self.sweeper.stop,
            ):
                stops.push_async_callback(stop)


def build(parts: Parts) -> SomaServices:
    """Put the services together; nothing starts."""
    config, teacher_logprobs = parts.config, parts.teacher_logprobs
    cost_model = CostModel(config.payback, config.prices, config.gate, config.acceptance_min_turns, parts.store)
    shadow_traffic = ShadowTraffic(config, parts.surrogate)
    watching = (parts.sweep_trigger, teacher_logprobs, cost_model, shadow_traffic)
    registry = SessionRegistry(config, cast(Store, PatientStore(parts.store)), (*parts.observers, *watching))
    background = BackgroundTasks(registry)
    adapters = AdapterLifecycle(parts.adapter_store, parts.surrogate, parts.leases, registry)
    shadow_answers = ShadowAnswers(parts.surrogate, adapters, parts.encoder, parts.judge)
    adaptation = Adaptation(
        config,
        registry,
        background,
        Acceptance(config, shadow_answers, shadow_traffic, parts.trainer),
        TrainingBudget(config.adaptation, registry, parts.meter, cost_model),
        TrainingRun(config, registry, parts.trainer, adapters, teacher_logprobs, parts.surrogate),
    )
    lane = BackgroundLane(config.gate.audit_yields, config.gate.audit_wait_s)
    original = GuardedOriginal(parts.original, config.original, parts.original_meter, users=lane)
    drift = DriftWatch(config, registry, original, shadow_answers, adapters, lane)
    evidence = TurnEvidence(teacher_logprobs, shadow_traffic)
    follow_up = FollowUp(config, registry, background, adaptation, drift)
    engines = Engines(original, parts.surrogate, adapters)
    dispatcher = Dispatcher(
        SessionLookup(registry),
        parts.meter,
        Routing(config, parts.policies, engines, parts.encoder),
        engines,
        evidence,
        TurnRecorder(registry, parts.meter, evidence, follow_up),
    )
    removal = SessionRemoval(registry, background, adapters, parts.salts)
    retention = Retention(config.retention, registry, removal)
    evictor = AdapterEvictor(config.adapters, registry, adapters, parts.sweep_trigger, parts.stock)
    return SomaServices(
        registry=registry,
        original=original,
        background=background,
        lane=lane,
        shadow_traffic=shadow_traffic,
        cost_model=cost_model,
        adapters=adapters,
        adaptation=adaptation,
        dispatcher=dispatcher,
        evictor=evictor,
        removal=removal,
        retention=retention,
        recovery=Recovery(registry, adapters, adaptation, background, removal),
        session_admin=SessionAdmin(registry, adaptation, background, adapters, parts.meter, removal),
        sweeper=Sweeper(retention, evictor, parts.sweep_trigger),
    )

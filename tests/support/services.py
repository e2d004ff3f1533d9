"""A dispatcher on fakes whose timing a test controls, over a real session store."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable
from typing import Any

from soma_vllm.adaptation.teacher_logprobs import TeacherLogprobs, why_text
from soma_vllm.adapters.leases import AdapterLeases
from soma_vllm.app.build import Parts, build
from soma_vllm.config import Config
from soma_vllm.engines.engine import Salts
from soma_vllm.maintenance.sweep_trigger import SweepTrigger
from soma_vllm.scheduler.dispatcher import Answer, ChatRequest
from soma_vllm.scheduler.policies.base import Policies
from soma_vllm.sessions.sql.store import SessionStore
from soma_vllm.sessions.state.session import Session
from soma_vllm.types import Event, SessionKey
from support.fakes import (
    FakeAdapterStore,
    FakeOriginal,
    FakeSurrogate,
    FakeTrainer,
    HashEncoder,
    HashJudge,
    OpenMeter,
    Stock,
)

SETTINGS: dict[str, Any] = {
    "warm_window": 2,
    "acceptance_min_turns": 1,
    "gate": {
        "accept_threshold": 0.1,
        "locality_threshold": 2.0,
        "audit_rate": 0.0,
        "drift_window": 1,
        "drift_threshold": 0.3,
    },
    "adaptation": {"allow_force_header": True, "payback": "always"},
    "surrogate": {"max_loras": 1},
}


class Services:
    """Everything a test needs to talk to a dispatcher and look behind it."""

    def __init__(
        self,
        config: Config,
        store: SessionStore,
        *,
        adapter_store: Any = None,
        trainer: FakeTrainer | None = None,
        original: FakeOriginal | None = None,
        surrogate: FakeSurrogate | None = None,
    ) -> None:
        self.config = config
        self.store = store
        speaks_vllm = config.original.api == "vllm"
        self.teacher_logprobs = TeacherLogprobs(config, why_text(config, speaks_vllm, same_vocabulary=True))
        self.original = original or FakeOriginal()
        self.surrogate = surrogate or FakeSurrogate()
        self.trainer = trainer or FakeTrainer()
        self.adapter_store = adapter_store or FakeAdapterStore()
        if isinstance(self.adapter_store, FakeAdapterStore):
            self.adapter_store.log = self.surrogate.log
        self.sweep_trigger = SweepTrigger()
        self.stock = Stock()
        self.meter = OpenMeter()
        self.events: list[tuple[SessionKey, Event]] = []
        slots = config.surrogate
        limit = slots.queue_limit if slots.overflow == "wait" else 0
        self.leases = AdapterLeases(slots.max_loras, limit, slots.queue_wait_s)
        self.encoder = HashEncoder()
        self.policies = Policies(config)
        self.salts = Salts()
        built = build(
            Parts(
                config=config,
                policies=self.policies,
                original=self.original,
                surrogate=self.surrogate,
                encoder=self.encoder,
                judge=HashJudge(),
                trainer=self.trainer,
                store=store,
                adapter_store=self.adapter_store,
                leases=self.leases,
                teacher_logprobs=self.teacher_logprobs,
                meter=self.meter,
                stock=self.stock,
                salts=self.salts,
                sweep_trigger=self.sweep_trigger,
                observers=(lambda key, event: self.events.append((key, event)),),
            )
        )
        self.built = built
        self.registry = built.registry
        self.background = built.background
        self.lane = built.lane
        self.shadow_traffic = built.shadow_traffic
        self.cost_model = built.cost_model
        self.adapters = built.adapters
        self.adaptation = built.adaptation
        self.dispatcher = built.dispatcher
        self.evictor = built.evictor
        self.retention = built.retention
        self.recovery = built.recovery
        self.session_admin = built.session_admin
        # No adapter is too young to be an orphan: tests do not wait.
        self.evictor._orphan_after_s = 0.0

    async def start(self) -> None:
        """As a server starts."""
        await self.built.start()

    async def stop(self) -> None:
        """As a server stops."""
        await self.built.stop()

    async def say(
        self, history: list[dict[str, Any]], query: str, session: str | None = "s", **extra: Any
    ) -> Answer:
        """One turn of a client that keeps the history itself; `history` grows."""
        history.append({"role": "user", "content": query})
        headers = {"authorization": f"Bearer {extra.pop('key', 'k')}", **extra.pop("headers", {})}
        if session is not None:
            headers["x-session-id"] = session
        body = {"model": "soma", "messages": [dict(m) for m in history], **extra}
        answer = await self.dispatcher.chat(ChatRequest(body, headers))
        if answer.reply.body is not None:
            history.append(answer.reply.body["choices"][0]["message"])
        return answer

    def session(self, session: str = "s", key: str = "k") -> Session:
        tenant = hashlib.sha256(key.encode()).hexdigest()[:16]
        return self.registry.session(SessionKey(tenant, session))

    def kinds(self, session: str = "s") -> list[str]:
        return [event.kind for key, event in self.events if key.session == session]

    async def settled(self) -> None:
        """Return when no background work is left."""
        while tasks := list(self.background._tasks):
            await asyncio.wait(tasks, timeout=10)


Build = Callable[..., Services]

Later = Callable[[float], None]
"""Moves the clock on by so many seconds."""

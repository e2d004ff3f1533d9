"""A dispatcher on fakes whose timing a test controls, over a real session store."""

from __future__ import annotations

import asyncio
import hashlib
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from soma_vllm.adaptation.teacher_logprobs import TeacherLogprobs, why_text
from soma_vllm.adapters.eviction_policy import Reason
from soma_vllm.adapters.leases import AdapterLeases
from soma_vllm.adapters.store.manifest import LocalAdapter, PublishedAdapter
from soma_vllm.adapters.store.verify import AdapterFacts, FileFacts
from soma_vllm.app.build import Parts, build
from soma_vllm.config import Config
from soma_vllm.engines.engine import ChatCall, Salts
from soma_vllm.engines.fake import FakeEngine
from soma_vllm.errors import AdapterRejected, EngineError, NotFound, TooManyRequests, TrainingError
from soma_vllm.maintenance.sweep_trigger import SweepTrigger
from soma_vllm.scheduler.dispatcher import Answer, ChatRequest
from soma_vllm.scheduler.policies.base import Policies
from soma_vllm.sessions.sql.store import SessionStore
from soma_vllm.sessions.state.session import Session
from soma_vllm.training.messages import ScoreRequest, TrainRequest, TrainResult
from soma_vllm.types import AdapterRef, Agreement, Event, SessionKey, Usage

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


class Versatile(FakeEngine):
    """An engine that also calls tools, as it is told to."""

    def __init__(self, name: str, answers: Sequence[str]) -> None:
        super().__init__(name, answers)
        self.calls_tools: list[dict[str, Any]] = []

    def _completion(self, answer: str, body: Mapping[str, Any]) -> dict[str, Any]:
        found = super()._completion(answer, body)
        if self.calls_tools:
            found["choices"][0]["message"] = {
                "role": "assistant",
                "content": None,
                "tool_calls": self.calls_tools,
            }
        return found


class FakeOriginal(Versatile):
    """An engine that also reads answers, as it is told to find them."""

    def __init__(self) -> None:
        super().__init__("large", ["same"])
        self.finds = Agreement(0.5, 0.9, 10)
        self.read: list[tuple[ChatCall, str]] = []

    async def score(self, call: ChatCall, answer: str) -> Agreement:
        self.read.append((call, answer))
        await self.chat(call)
        return self.finds


class FakeSurrogate(Versatile):
    """An engine that counts adapters in and out."""

    def __init__(self) -> None:
        super().__init__("small", ["same"])
        self.loaded: dict[str, AdapterRef] = {}
        self.log: list[str] = []
        self.prefetched: list[str] = []
        self.finds: Agreement | None = None
        """How it finds every answer; None where it cannot read."""
        self.rejection: AdapterRejected | None = None

    async def score(self, call: ChatCall, answer: str) -> Agreement:
        if self.finds is None:
            raise EngineError("found another prompt")
        return self.finds

    def prefetch(self, ref: AdapterRef) -> None:
        self.prefetched.append(ref.name)

    async def load(self, ref: AdapterRef) -> None:
        if self.rejection is not None:
            raise self.rejection
        if ref.name not in self.loaded:
            self.loaded[ref.name] = ref
            self.log.append(f"load {ref.name}")

    async def unload(self, ref: AdapterRef) -> None:
        if self.loaded.pop(ref.name, None) is not None:
            self.log.append(f"unload {ref.name}")


class FakeTrainer:
    """Answers at once, or when told to."""

    def __init__(self) -> None:
        self.go = asyncio.Event()
        self.go.set()
        self.requests: list[TrainRequest] = []
        self.failure: TrainingError | None = None
        self.writes: Callable[[Path], object] = lambda directory: None
        """Makes the trained files in the directory of a request."""
        self.plain = Agreement(1.0, 0.5, 10)
        self.adapted = Agreement(0.5, 0.8, 10)

    async def score(self, request: ScoreRequest) -> Agreement:
        return self.plain

    async def train(self, request: TrainRequest) -> TrainResult:
        self.requests.append(request)
        await self.go.wait()
        if self.failure is not None:
            raise self.failure
        self.writes(Path(request.out_dir))
        return TrainResult(
            directory=request.out_dir,
            plain=self.plain,
            adapted=self.adapted,
            checkpoints=((0, self.plain), (4, self.adapted)),
            hardness={1: 1.0},
            steps=4,
            distilled=False,
            losses=(1.0, 0.5),
            flops=1.0,
            mining_s=0.1,
            finetune_s=0.2,
            scoring_s=0.3,
        )


class FakeAdapterStore:
    """An adapter store in memory. It outlives the servers that use it, as a disk does."""

    def __init__(self) -> None:
        self.owner = f"us-{uuid.uuid4().hex}"
        self.published: list[str] = []
        self.owners: dict[str, SessionKey] = {}
        self.there: dict[str, PublishedAdapter] = {}
        self.pinned: set[str] = set()
        self.log: list[str] = []
        """Where deletions are told: to the server that was started last."""
        self._manifests: dict[str, Mapping[str, Any]] = {}
        self._servers = 0

    def publish(
        self, key: SessionKey, trained: Path, *, base_model: str, manifest: Mapping[str, Any]
    ) -> PublishedAdapter:
        number = len(self.published) + 1
        name = f"adapter-{key.session}-{number}"
        self.published.append(name)
        self.owners[name] = key
        version = sum(one == key for one in self.owners.values())
        files = FileFacts("0", 1000), FileFacts("0", 24)
        ref = AdapterRef(name, number, str(trained))
        made = PublishedAdapter(ref, key, version, time.time(), base_model, 8, self.owner, *files)
        self.there[name] = made
        self._manifests[name] = {"name": name, "training": dict(manifest)}
        return made

    def retire(self, name: str) -> None:
        del self.there[self.get(name).ref.name]
        self.pinned.discard(name)
        self.log.append(f"delete {name}")

    def resolve(self, name: str) -> LocalAdapter:
        found = self.get(name)
        facts = AdapterFacts(found.rank, 8.0, ("q_proj",), found.base_model, found.weights, found.config)
        return LocalAdapter(found.ref, facts, None)

    def manifest(self, name: str) -> Mapping[str, Any]:
        return self._manifests[self.get(name).ref.name]

    def verify(self, name: str) -> PublishedAdapter:
        return self.get(name)

    def list(self, tenant: str | None = None) -> tuple[PublishedAdapter, ...]:
        return tuple(one for one in self.there.values() if tenant in (None, one.key.tenant))

    def pins(self) -> frozenset[str]:
        return frozenset(self.pinned)

    def pin(self, name: str, pinned: bool = True) -> None:
        self.get(name)
        (self.pinned.add if pinned else self.pinned.discard)(name)

    def forget(self, key: SessionKey) -> None:
        pass

    def collect_garbage(self) -> int:
        return 0

    @contextmanager
    def in_service(self) -> Iterator[None]:
        self._servers += 1
        yield
        self._servers -= 1

    def serves(self) -> bool:
        return self._servers > 0

    def get(self, name: str) -> PublishedAdapter:
        if name not in self.there:
            raise NotFound(f"adapter {name}")
        return self.there[name]


class OpenMeter:
    """Counts, and limits as it is told to."""

    def __init__(self) -> None:
        self.spendings: list[tuple[str, Usage]] = []
        self.sessions: int | None = None
        self.adapters: int | None = None

    def spent(self, tenant: str, usage: Usage) -> None:
        self.spendings.append((tenant, usage))

    def limits_sessions(self, tenant: str) -> bool:
        return self.sessions is not None

    def check_new_session(self, tenant: str, live: int) -> None:
        if self.sessions is not None and live >= self.sessions:
            raise TooManyRequests(f"found {live}", 60.0)

    def may_adapt(self, tenant: str, adapters: int) -> bool:
        return self.adapters is None or adapters < self.adapters


class Stock:
    """Remembers what was measured of adapters."""

    def __init__(self) -> None:
        self.stored = (0, 0)
        self.evictions: list[Reason] = []

    def kept(self, count: int, size_bytes: int) -> None:
        self.stored = (count, size_bytes)

    def evicted(self, reason: Reason) -> None:
        self.evictions.append(reason)

    def fetched(self, seconds: float) -> None:
        pass


class HashEncoder:
    """Equal texts are equal, different ones orthogonal or nearly so."""

    async def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        rows = np.zeros((len(texts), 257), dtype=np.float32)
        for row, text in zip(rows, texts, strict=True):
            row[int.from_bytes(hashlib.sha256(text.encode()).digest()[:2], "big") % 257] = 1.0
        return rows


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

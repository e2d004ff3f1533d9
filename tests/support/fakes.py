"""Fakes of what a server opens, whose timing a test controls: engines, trainer, stores, meters, encoder."""

from __future__ import annotations

import asyncio
import hashlib
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from soma_vllm.adapters.eviction_policy import Reason
from soma_vllm.adapters.store.manifest import LocalAdapter, PublishedAdapter
from soma_vllm.adapters.store.verify import AdapterFacts, FileFacts
from soma_vllm.engines.engine import ChatCall
from soma_vllm.errors import (
    AdapterRejected,
    EngineError,
    EngineRefused,
    NotFound,
    TooManyRequests,
    TrainingError,
)
from soma_vllm.sessions.state.gate import gap
from soma_vllm.training.messages import ScoreRequest, TrainRequest, TrainResult
from soma_vllm.types import AdapterRef, Agreement, Gap, SessionKey, Usage
from support.fake_engine import FakeEngine, token_of


class Versatile(FakeEngine):
    """An engine that also calls tools, as it is told to."""

    def __init__(self, name: str, answers: Sequence[str]) -> None:
        super().__init__(name, answers)
        self.calls_tools: list[dict[str, Any]] = []
        self.decides: Callable[[Mapping[str, Any]], list[dict[str, Any]]] = lambda body: self.calls_tools
        """Which tools it calls for a request; none: it answers in words."""
        self.says_first = ""
        """Words before the calls of a stream."""

    def _completion(self, answer: str, body: Mapping[str, Any]) -> dict[str, Any]:
        found = super()._completion(answer, body)
        if calls := self.decides(body):
            found["choices"][0]["message"] = {"role": "assistant", "content": None, "tool_calls": calls}
        return found

    def _stream(
        self, answer: str, body: Mapping[str, Any], break_after: int | None
    ) -> AsyncGenerator[str, None]:
        calls = self.decides(body)
        return self._calling(calls) if calls else super()._stream(answer, body, break_after)

    async def _calling(self, calls: list[dict[str, Any]]) -> AsyncGenerator[str, None]:
        yield ""
        deltas: list[dict[str, Any]] = [{"role": "assistant", "content": ""}]
        deltas += [{"content": self.says_first}] if self.says_first else []
        for index, call in enumerate(calls):
            text = call["function"]["arguments"]
            begun = {**call, "index": index, "function": {**call["function"], "arguments": text[:3]}}
            deltas.append({"tool_calls": [begun]})
            deltas.append({"tool_calls": [{"index": index, "function": {"arguments": text[3:]}}]})
        for delta in deltas:
            yield self._event([{"index": 0, "delta": delta, "finish_reason": None}])
        yield self._event([{"index": 0, "delta": {}, "finish_reason": "tool_calls"}])
        yield "data: [DONE]\n\n"


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
        self.unreadable: str | None = None
        """Prompts with this text are refused when they are read for training."""

    async def score(self, call: ChatCall, answer: str) -> Agreement:
        if self.finds is None:
            raise EngineError("found another prompt")
        return self.finds

    async def prompt(self, call: ChatCall) -> tuple[int, ...]:
        if isinstance(self.refusal, EngineRefused):
            raise self.refusal
        if self.unreadable is not None and self.unreadable in str(call.body["messages"]):
            raise EngineRefused(400, {}, cause="chat_template_refused")
        return tuple(token_of(word) for word in str(call.body["messages"]).split())

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
        self.steps = 4

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
            steps=self.steps,
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
        self.reservations: list[int] = []
        self.sessions: int | None = None
        self.adapters: int | None = None
        self.allowed: tuple[str, ...] = ("*",)

    def spent(self, tenant: str, usage: Usage) -> None:
        self.spendings.append((tenant, usage))

    def limits_tokens(self, tenant: str) -> bool:
        return True

    def reserve(self, tenant: str, tokens: int) -> None:
        self.reservations.append(tokens)

    def unreserve(self, tenant: str, tokens: int) -> None:
        self.reservations.remove(tokens)

    def limits_sessions(self, tenant: str) -> bool:
        return self.sessions is not None

    def check_new_session(self, tenant: str, live: int) -> None:
        if self.sessions is not None and live >= self.sessions:
            raise TooManyRequests(f"found {live}", 60.0)

    def policies(self, tenant: str) -> tuple[str, ...]:
        return self.allowed

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


class HashJudge:
    """Equal answers agree, different ones do not."""

    async def gaps(self, pairs: Sequence[tuple[str, str]]) -> list[Gap]:
        vectors = [await HashEncoder().encode(pair) for pair in pairs]
        return [Gap(gap(a, b)) for a, b in vectors]


class HashEncoder:
    """Equal texts are equal, different ones orthogonal or nearly so."""

    async def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        rows = np.zeros((len(texts), 257), dtype=np.float32)
        for row, text in zip(rows, texts, strict=True):
            row[int.from_bytes(hashlib.sha256(text.encode()).digest()[:2], "big") % 257] = 1.0
        return rows

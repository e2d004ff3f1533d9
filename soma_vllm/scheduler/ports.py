"""What the scheduler needs of the rooms beside it. The composition root fits concrete classes into these."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from soma_vllm.adapters.budgets import Reason
from soma_vllm.adapters.manifest import PublishedAdapter
from soma_vllm.engines.base import Engine
from soma_vllm.storage.records import AdapterRecord, Found, Standing, Summary, TurnMark
from soma_vllm.training.messages import ScoreRequest, TrainRequest, TrainResult
from soma_vllm.types import AdapterRef, Agreement, Event, SessionKey, Usage


class Encoder(Protocol):
    """A fixed sentence encoder, off the event loop."""

    async def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Unit vectors, shape (n, d); zeros for empty text."""
        ...


class Trainer(Protocol):
    """Something that trains and scores in the background. Both verbs raise TrainingError."""

    async def train(self, request: TrainRequest) -> TrainResult: ...
    async def score(self, request: ScoreRequest) -> Agreement: ...


class AdapterEngine(Engine, Protocol):
    """An engine that serves adapters."""

    async def load(self, ref: AdapterRef) -> None: ...
    async def unload(self, ref: AdapterRef) -> None: ...


class Shelf(Protocol):
    """Where adapters are published. Its verbs block, and raise AdapterError."""

    def publish(
        self, key: SessionKey, trained: Path, *, base_model: str, manifest: Mapping[str, Any]
    ) -> AdapterRef: ...
    def retire(self, name: str) -> None: ...
    def resolve(self, name: str) -> AdapterRef: ...
    def list(self, tenant: str | None = None) -> Sequence[PublishedAdapter]: ...
    def pins(self) -> frozenset[str]: ...
    def forget(self, key: SessionKey) -> None: ...
    def collect_garbage(self) -> int: ...

    @property
    def owner(self) -> str:
        """What is written into everything published by servers of this one's session store."""
        ...


class Store(Protocol):
    """Where sessions are on record: `storage.sessions.SessionStore`.

    Every verb may raise SQLAlchemyError or OSError.
    """

    async def append(
        self,
        key: SessionKey,
        first_seq: int,
        events: Sequence[Event],
        standing: Standing,
        marks: Sequence[TurnMark] = (),
        adapters: Sequence[AdapterRecord] = (),
    ) -> None: ...
    async def events(self, key: SessionKey) -> list[Event]: ...
    async def find(self, tenant: str, family: str, chains: Sequence[str]) -> Found | None: ...
    async def of_response(self, tenant: str, response: str) -> Found | None: ...
    async def erase_text(self, key: SessionKey) -> int: ...
    async def erase_texts_before(self, at: float) -> int: ...
    async def delete(self, key: SessionKey) -> None: ...
    async def users_of(self, adapter: str) -> list[SessionKey]: ...
    async def in_phase(self, phase: str) -> list[SessionKey]: ...
    async def idle_since(self, at: float, limit: int) -> list[SessionKey]: ...
    async def summaries(self, tenant: str | None, limit: int, after: float | None = None) -> list[Summary]: ...
    async def family(self, tenant: str, family: str) -> list[SessionKey]: ...
    async def live(self, tenant: str) -> int: ...
    async def adapters(self, tenant: str | None = None, retired: bool = True) -> list[AdapterRecord]: ...
    async def adapters_used(self) -> dict[str, float]: ...
    async def retired(self, adapter: str) -> None: ...


class Observer(Protocol):
    """Something that is told of every event: metrics, logs."""

    def __call__(self, key: SessionKey, event: Event) -> None: ...


class Meter(Protocol):
    """What a tenant may still use: `api.allowances.Allowances`."""

    def spent(self, tenant: str, usage: Usage) -> None:
        """Count the tokens of a reply."""
        ...

    def check_new_session(self, tenant: str, live: int) -> None:
        """Raise TooManyRequests where a tenant with `live` sessions may not open another."""
        ...

    def may_adapt(self, tenant: str, adapters: int) -> bool:
        """Whether a tenant that holds `adapters` may have one more."""
        ...


class StockMeter(Protocol):
    """What is measured of adapters: `telemetry.shelf.ShelfMetrics`."""

    def kept(self, count: int, size_bytes: int) -> None:
        """So much is on the shelf."""
        ...

    def evicted(self, reason: Reason) -> None:
        """An adapter had to go."""
        ...

    def fetched(self, seconds: float) -> None:
        """It took so long to have an adapter's files at hand."""
        ...

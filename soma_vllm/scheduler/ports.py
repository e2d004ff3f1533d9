"""What the scheduler needs of the rooms beside it. The composition root fits concrete classes into these."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from soma_vllm.engines.base import Engine
from soma_vllm.training.messages import ScoreRequest, TrainRequest, TrainResult
from soma_vllm.types import AdapterRef, Agreement, Event, SessionKey


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
    """Where adapters are published. Both verbs block, and raise AdapterError."""

    def publish(
        self, key: SessionKey, trained: Path, *, base_model: str, manifest: Mapping[str, Any]
    ) -> AdapterRef: ...
    def retire(self, name: str) -> None: ...


class EventLog(Protocol):
    """Where events are kept: `storage.sessions.SessionStore`."""

    async def append(
        self, key: SessionKey, first_seq: int, events: Sequence[Event], phase: str, chain: str
    ) -> None: ...
    async def events(self, key: SessionKey) -> list[Event]: ...
    async def find(self, tenant: str, chain: str) -> str | None: ...


class Observer(Protocol):
    """Something that is told of every event: metrics, logs."""

    def __call__(self, key: SessionKey, event: Event) -> None: ...

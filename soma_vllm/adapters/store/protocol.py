"""What the rest of the system needs of an adapter store, and of what measures one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from soma_vllm.adapters.eviction_policy import Reason
from soma_vllm.adapters.store.manifest import LocalAdapter, PublishedAdapter
from soma_vllm.types import AdapterRef, SessionKey


class Shelf(Protocol):
    """Where adapters are published: `facade.RecordShelf`. Its verbs block, and raise AdapterError."""

    def publish(
        self, key: SessionKey, trained: Path, *, base_model: str, manifest: Mapping[str, Any]
    ) -> AdapterRef: ...
    def retire(self, name: str) -> None: ...
    def workplace(self) -> str: ...
    def clear(self) -> None: ...
    def resolve(self, name: str) -> LocalAdapter: ...
    def list(self, tenant: str | None = None) -> Sequence[PublishedAdapter]: ...
    def pins(self) -> frozenset[str]: ...
    def forget(self, key: SessionKey) -> None: ...

    @property
    def owner(self) -> str:
        """What is written into everything published by servers of this one's session store."""
        ...


class StockMeter(Protocol):
    """What is measured of adapters: `telemetry.adapter_store_metrics.AdapterStoreMetrics`."""

    def kept(self, count: int, size_bytes: int) -> None:
        """So much is on the shelf."""
        ...

    def evicted(self, reason: Reason) -> None:
        """An adapter had to go."""
        ...

    def fetched(self, seconds: float) -> None:
        """It took so long to have an adapter's files at hand."""
        ...

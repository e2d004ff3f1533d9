"""What the rest of the system needs of an adapter store, and of what measures one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

from soma_vllm.adapters.eviction_policy import Reason
from soma_vllm.adapters.store.manifest import LocalAdapter, PublishedAdapter
from soma_vllm.types import SessionKey


class AdapterStore(Protocol):
    """Where adapters are published: a directory (`filesystem`) or an object store (`object_store`).

    Every verb blocks, may be called from any thread, and raises AdapterError while the store does not answer;
    those that take a name raise NotFound where no such adapter is published.
    """

    @property
    def owner(self) -> str:
        """Written into everything published here: the id of the record that speaks of it."""
        ...

    def publish(
        self, key: SessionKey, trained: Path, *, base_model: str, manifest: Mapping[str, Any]
    ) -> PublishedAdapter:
        """Verify a trainer's directory and publish what was verified. Raises AdapterRejected."""
        ...

    def list(self, tenant: str | None = None) -> Sequence[PublishedAdapter]:
        """What is published, by whatever record, oldest first. Looks at all of it: for starts and people."""
        ...

    def get(self, name: str) -> PublishedAdapter:
        """The adapter of that name; its files are not looked at."""
        ...

    def resolve(self, name: str) -> LocalAdapter:
        """The adapter on this machine, read once, byte by byte what was published. Raises AdapterRejected."""
        ...

    def manifest(self, name: str) -> Mapping[str, Any]:
        """soma.json of an adapter."""
        ...

    def verify(self, name: str) -> PublishedAdapter:
        """Check a published adapter in full. Raises AdapterRejected."""
        ...

    def retire(self, name: str) -> None:
        """Take an adapter out of the listing, then delete it. Its name and number stay spent."""
        ...

    def forget(self, key: SessionKey) -> None:
        """Remove what is left of a session, where none of its adapters is."""
        ...

    def collect_garbage(self) -> int:
        """Delete what killed publications and retirements left; how many of them."""
        ...

    def pins(self) -> frozenset[str]:
        """Names of the adapters that are never evicted."""
        ...

    def pin(self, name: str, pinned: bool = True) -> None:
        """Have an adapter never evicted, or let it go again."""
        ...

    def in_service(self) -> AbstractContextManager[None]:
        """Held by a server while it serves from this store; raises InUse where another of its record does."""
        ...

    def serves(self) -> bool:
        """Whether a living server of this machine does."""
        ...


class AdapterStoreMeter(Protocol):
    """What is measured of stored adapters: `telemetry.adapter_store_metrics.AdapterStoreMetrics`."""

    def kept(self, count: int, size_bytes: int) -> None:
        """So much is stored."""
        ...

    def evicted(self, reason: Reason) -> None:
        """An adapter had to go."""
        ...

    def fetched(self, seconds: float) -> None:
        """It took so long to have an adapter's files on this machine."""
        ...

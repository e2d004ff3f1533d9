"""The adapter store as the scheduler sees it: published for one session record, and cleared up for that alone.

Several servers, each with a record of its own, may keep adapters under one root. Each adapter says which record
it was published for (`owner`), so that clearing up after a crash never takes another server's adapters away.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from soma_vllm.adapters.store.manifest import LocalAdapter, PublishedAdapter
from soma_vllm.adapters.store.opening import AnyAdapterStore
from soma_vllm.errors import NotFound
from soma_vllm.types import AdapterRef, SessionKey


class RecordShelf:
    """Publishes, lists and deletes. Every verb blocks, and raises AdapterError while the disk refuses."""

    def __init__(self, store: AnyAdapterStore) -> None:
        """The store's `owner` names the session record, the same after every restart."""
        self._store = store
        self._trainings = f"soma-train-{hashlib.sha256(store.owner.encode()).hexdigest()[:12]}-"

    @property
    def owner(self) -> str:
        """Written into everything published here."""
        return self._store.owner

    def workplace(self) -> str:
        """A new empty directory to train in."""
        return tempfile.mkdtemp(prefix=self._trainings)

    def publish(
        self, key: SessionKey, trained: Path, *, base_model: str, manifest: Mapping[str, Any]
    ) -> AdapterRef:
        """Verify and publish."""
        return self._store.publish(key, trained, base_model=base_model, manifest=manifest).ref

    def retire(self, name: str) -> None:
        """Delete; harmless where it is gone."""
        with suppress(NotFound):
            self._store.retire(name)

    def resolve(self, name: str) -> LocalAdapter:
        """Have the files on this machine, whole. Raises NotFound, AdapterRejected."""
        return self._store.resolve(name)

    def list(self, tenant: str | None = None) -> Sequence[PublishedAdapter]:
        """What is published, for whatever record."""
        return self._store.list(tenant)

    def pins(self) -> frozenset[str]:
        """What is never evicted."""
        return self._store.pins()

    def forget(self, key: SessionKey) -> None:
        """Remove a session's empty folder."""
        self._store.forget(key)

    def clear(self) -> None:
        """Delete what killed publications, retirements and trainings left. No training may be under way."""
        for left in Path(tempfile.gettempdir()).glob(f"{self._trainings}*"):
            shutil.rmtree(left, ignore_errors=True)
        self._store.collect_garbage()

"""The adapter store as the scheduler sees it: the adapters of one session record, and no other's.

Several servers, each with a record of its own, may keep adapters under one root. Guarantee: what is listed here
was published for this record, so that clearing up after a crash never takes another server's adapters away.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from soma_vllm.adapters.store import MANIFEST, AdapterStore
from soma_vllm.errors import NotFound
from soma_vllm.types import AdapterRef, SessionKey

RECORD = "record"
"""Where a manifest says which session record its adapter is published for."""


class RecordShelf:
    """Publishes, lists and deletes. Every verb blocks, and raises AdapterError while the disk refuses."""

    def __init__(self, store: AdapterStore, record: str) -> None:
        """`record` names the session record, the same after every restart."""
        self._store = store
        self._record = record
        self._trainings = f"soma-train-{record[:12]}-"

    def workplace(self) -> str:
        """A new empty directory to train in."""
        return tempfile.mkdtemp(prefix=self._trainings)

    def publish(
        self, key: SessionKey, trained: Path, *, base_model: str, manifest: Mapping[str, Any]
    ) -> AdapterRef:
        """Verify and publish."""
        ours = {**manifest, RECORD: self._record}
        return self._store.publish(key, trained, base_model=base_model, manifest=ours).ref

    def retire(self, name: str) -> None:
        """Delete; harmless where it is gone."""
        try:
            self._store.retire(name)
        except NotFound:
            return

    def listed(self) -> Sequence[AdapterRef]:
        """Every adapter that is published for this record."""
        found = self._store.list()
        return [one.ref for one in found if one.manifest.get("training", {}).get(RECORD) == self._record]

    def clear(self) -> None:
        """Delete what killed publications, retirements and trainings left. No training may be under way."""
        for left in Path(tempfile.gettempdir()).glob(f"{self._trainings}*"):
            shutil.rmtree(left, ignore_errors=True)
        self._store.collect_garbage()

    def has(self, ref: AdapterRef) -> bool:
        """Whether the files of an adapter are where it says."""
        return Path(ref.path, MANIFEST).is_file()

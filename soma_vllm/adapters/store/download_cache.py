"""What this machine keeps of an object store's adapters, for its engine to read.

Guarantees: an entry appears by one rename, and is used only while it is, byte by byte, what its manifest says;
a fetch under way is known to all threads and processes that share the cache; a killed fetch leaves nothing that
is used, and what it leaves is collected.
"""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from soma_vllm.adapters.store.atomic_files import is_locked, locked, served_from
from soma_vllm.adapters.store.filesystem import disk_errors
from soma_vllm.adapters.store.manifest import LocalAdapter, local
from soma_vllm.adapters.store.naming import Place
from soma_vllm.adapters.store.staging import Staging
from soma_vllm.errors import AdapterRejected, NotFound

LOCKS = 64
"""Files whose locks keep fetches of one adapter apart."""


class AdapterCache:
    """Entries below a folder, in the object store's own layout."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.staging = Staging(folder, folder / ".lock")
        self._serving = folder / ".serving"

    def entry(self, place: Place) -> Path:
        """Where an adapter's entry lies, or belongs."""
        return self.folder / place.numbered_path

    def entries(self) -> list[Path]:
        """Every entry, whole or not."""
        return list(self.folder.glob("[!.]*/*/v*"))

    def whole(self, place: Place) -> LocalAdapter | None:
        """The adapter of an entry that is what it should be; reads all of it."""
        try:
            return local(place.name, self.entry(place))
        except (OSError, NotFound, AdapterRejected):
            return None

    @contextmanager
    def fetching(self, place: Place) -> Iterator[None]:
        """Held by the one who fetches an adapter; others wait."""
        locks = self.folder / ".locks"
        locks.mkdir(parents=True, exist_ok=True)
        with locked(locks / str(place.number % LOCKS)):
            yield

    def keep(self, staged: Path, place: Place) -> None:
        """Make a staged directory the entry, in place of what is there."""
        entry = self.entry(place)
        with locked(self.folder / ".lock"):
            entry.parent.mkdir(parents=True, exist_ok=True)
            if entry.exists():
                self._delete(entry)
            staged.rename(entry)

    def drop(self, entry: Path) -> None:
        """Delete an entry, if it is there.

        Raises:
            AdapterError: the disk refuses.
        """
        with disk_errors("a cached adapter not deleted"):
            if entry.is_dir():
                with locked(self.folder / ".lock"):
                    self._delete(entry)

    def _delete(self, entry: Path) -> None:
        gone = self.staging.take(entry, f"stale-{secrets.token_hex(8)}")
        shutil.rmtree(gone, ignore_errors=True)

    def in_service(self, owner: str) -> AbstractContextManager[None]:
        """Held by a server of this machine while it serves from here; raises InUse as `served_from`."""
        return served_from(self.folder, owner)

    def serves(self) -> bool:
        """Whether a living server of this machine does."""
        return self._serving.exists() and is_locked(self._serving)

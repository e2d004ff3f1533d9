"""What a local root holds, kept in memory and kept true by the times of its directories.

Guarantees: a listing shows what every store on this root published before it was asked for, and nothing that
one retired; what people do to the directories by hand shows after `TRUSTED_S` at the latest; a manifest is read
once in a process' life, since published files are never edited; the tree is the truth, and nothing is written.

While the root's stores say that nothing has changed, one small file is read. Else every directory's time is
looked at, and it is read again where that differs from the one it was last read at, or was younger than
`RACY_NS` then: file systems keep coarse times, and two changes in one tick look like one.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from soma_vllm.adapters.store.atomic_files import Changes
from soma_vllm.adapters.store.manifest import PublishedAdapter, read
from soma_vllm.adapters.store.naming import version_of
from soma_vllm.types import MANIFEST

logger = logging.getLogger(__name__)

TRUSTED_S = 30.0
"""Seconds after which the directories are looked at whatever the stores say."""

RACY_NS = 2_000_000_000
"""Age, nanoseconds, from which a directory's time is trusted, also across the clocks of a network."""


class _Folder:
    """One directory's names, as it was last read."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.names: tuple[str, ...] = ()
        self._changed_ns = -1
        self._read_ns = 0

    def reread(self) -> bool:
        """Read the directory if it may have changed; True where it was read. One that is gone is empty."""
        try:
            changed_ns = os.stat(self.path).st_mtime_ns  # noqa: PTH116 - thousands of times: Path costs more
            if changed_ns == self._changed_ns and changed_ns < self._read_ns - RACY_NS:
                return False
            now = time.time_ns()
            with os.scandir(self.path) as entries:
                self.names = tuple(sorted(entry.name for entry in entries if not entry.name.startswith(".")))
            self._changed_ns, self._read_ns = changed_ns, now
        except (FileNotFoundError, NotADirectoryError):
            self.names, self._changed_ns = (), -1
        return True


Identity = tuple[str, int, int]
"""Name, inode and modification time of a version's directory: the name may be another adapter's later."""


def _identity(path: str, name: str) -> Identity | None:
    try:
        found = os.stat(path)  # noqa: PTH116 - as above
    except FileNotFoundError:
        return None
    return name, found.st_ino, found.st_mtime_ns


class _Session:
    """One session's versions."""

    def __init__(self, path: str) -> None:
        self._folder = _Folder(path)
        self._read: dict[Identity, PublishedAdapter | None] = {}
        self.adapters: tuple[PublishedAdapter, ...] = ()

    def refresh(self) -> bool:
        """Look again; True where versions came or went."""
        if not self._folder.reread():
            return False
        before, self._read = self._read, {}
        for name in self._folder.names:
            path = f"{self._folder.path}/{name}"
            if version_of(name) is not None and (found := _identity(path, name)) is not None:
                self._read[found] = before[found] if found in before else read_at(path)
        self.adapters = tuple(adapter for adapter in self._read.values() if adapter is not None)
        return self._read.keys() != before.keys()


class _Tenant:
    """One tenant's sessions."""

    def __init__(self, path: str) -> None:
        self._folder = _Folder(path)
        self._sessions: dict[str, _Session] = {}

    def refresh(self) -> bool:
        """Look again; True where any session's versions came or went."""
        changed = False
        if self._folder.reread():
            before = self._sessions
            names = self._folder.names
            self._sessions = {n: before.get(n) or _Session(f"{self._folder.path}/{n}") for n in names}
            changed = any(session.adapters for name, session in before.items() if name not in self._sessions)
        return any([session.refresh() for session in self._sessions.values()]) or changed

    def adapters(self) -> Iterator[PublishedAdapter]:
        """All versions of all sessions."""
        for session in self._sessions.values():
            yield from session.adapters


class Listing:
    """The adapters below a root. May be asked from several threads."""

    def __init__(self, root: Path, changes: Changes) -> None:
        self._root = _Folder(str(root))
        self._changes = changes
        self._seen: dict[str | None, tuple[str | None, float]] = {}
        self._tenants: dict[str, _Tenant] = {}
        self._sorted: dict[str | None, tuple[PublishedAdapter, ...]] = {}
        self._lock = threading.Lock()

    def of(self, tenant: str | None = None) -> tuple[PublishedAdapter, ...]:
        """What is published, of one tenant or of all, in the order of numbers."""
        with self._lock:
            word = self._changes.word()  # first: what changes meanwhile shows the next time
            if not self._trusted(tenant, word):
                self._look(tenant)
                self._seen[tenant] = (word, time.monotonic())
            if tenant not in self._sorted:
                names = self._root.names if tenant is None else (tenant,)
                found = (adapter for name in names for adapter in self._tenant(name).adapters())
                self._sorted[tenant] = tuple(sorted(found, key=lambda one: one.ref.number))
            return self._sorted[tenant]

    def _trusted(self, tenant: str | None, word: str | None) -> bool:
        """Whether nothing has changed since somebody looked."""
        looks = (self._seen[whose] for whose in (tenant, None) if whose in self._seen)
        now = time.monotonic()
        return word is not None and any(seen == word and now < at + TRUSTED_S for seen, at in looks)

    def _look(self, tenant: str | None) -> None:
        """Bring one tenant, or all, up to date."""
        if tenant is None:
            self._root.reread()
            for gone in set(self._tenants) - set(self._root.names):
                del self._tenants[gone]
                self._seen.pop(gone, None)
                self._sorted.clear()
        names = self._root.names if tenant is None else (tenant,)
        if any([self._tenant(name).refresh() for name in names]):
            self._sorted.clear()

    def _tenant(self, name: str) -> _Tenant:
        return self._tenants.setdefault(name, _Tenant(f"{self._root.path}/{name}"))


def read_at(path: str) -> PublishedAdapter | None:
    """The adapter in a listed directory; None for one that is being retired, or is not ours."""
    try:
        with open(f"{path}/{MANIFEST}", "rb") as file:  # noqa: PTH123 - as above
            return read(file.read(), path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        logger.warning("%s/%s: %s; adapter left out", path, MANIFEST, error)
        return None

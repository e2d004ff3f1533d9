"""What a local root holds: a walk over its directories, and what of it is kept in memory.

Guarantees: a listing shows what every store on this root published before it was asked for, and nothing that
one retired; what people do to the directories by hand shows after `TRUSTED_S` at the latest; a manifest is read
once in a process' life, since published files are never edited; the tree is the truth, and nothing is written.

While the root's stores say that nothing has changed, one small file is read. Else the directories are walked:
thousands of them take some tenths of a second.
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
"""Seconds after which the directories are walked whatever the stores say."""

Identity = tuple[str, int, int]
"""Path, inode and modification time of a version's directory: the path may be another adapter's later."""


class Listing:
    """The adapters below a root, in the order of their numbers. May be asked from several threads."""

    def __init__(self, root: Path, changes: Changes) -> None:
        self._root = root
        self._changes = changes
        self._word: str | None = None
        self._walked = 0.0
        self._read: dict[Identity, PublishedAdapter | None] = {}
        self._sorted: tuple[PublishedAdapter, ...] = ()
        self._lock = threading.Lock()

    def of(self, tenant: str | None = None) -> tuple[PublishedAdapter, ...]:
        """What is published, of one tenant or of all."""
        with self._lock:
            word = self._changes.word()  # first: what changes during the walk shows the next time
            now = time.monotonic()
            if word is None or word != self._word or now >= self._walked + TRUSTED_S:
                self._walk()
                self._word, self._walked = word, now
            found = self._sorted
        return found if tenant is None else tuple(one for one in found if one.key.tenant == tenant)

    def _walk(self) -> None:
        before, self._read = self._read, {}
        for found in _versions(self._root):
            self._read[found] = before[found] if found in before else read_at(found[0])
        adapters = (adapter for adapter in self._read.values() if adapter is not None)
        self._sorted = tuple(sorted(adapters, key=lambda one: one.ref.number))


def _versions(root: Path) -> Iterator[Identity]:
    for tenant in _entries(str(root)):
        for session in _entries(tenant.path):
            for version in _entries(session.path):
                if version_of(version.name) is None:
                    continue
                try:
                    found = version.stat()
                except FileNotFoundError:  # retired during the walk
                    continue
                yield version.path, found.st_ino, found.st_mtime_ns


def _entries(path: str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(path) as entries:
            return [entry for entry in entries if not entry.name.startswith(".")]
    except (FileNotFoundError, NotADirectoryError):
        return []


def read_at(path: str) -> PublishedAdapter | None:
    """The adapter in a listed directory; None for one that is being retired, or is not ours."""
    try:
        with open(f"{path}/{MANIFEST}", "rb") as file:  # noqa: PTH123 - thousands of times: Path costs more
            return read(file.read(), path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        logger.warning(
            "%s/%s cannot be read; the adapter is not listed and cannot serve: %s", path, MANIFEST, error
        )
        return None

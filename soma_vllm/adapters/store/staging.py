"""A directory where adapters are assembled and taken apart; nothing in it is ever listed.

Guarantees: a staged directory is locked while it is worked in, so that what a dead process left is told
from what a living one makes; what a failure leaves is deleted at once, what a kill leaves by the next `sweep`.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

from soma_vllm.adapters.store.atomic_files import is_locked, locked, sync
from soma_vllm.private import PRIVATE_FOLDER

WriteFile = Callable[[Path, bytes], object]
"""Makes one file; replaced where a disk is to fail."""


class Staging:
    """Staged directories under a root. `lock` orders those who make and sweep them."""

    def __init__(self, root: Path, lock: Path) -> None:
        self._root = root
        self._folder = root / ".staging"
        self._lock = lock

    @contextmanager
    def made(self, name: str) -> Iterator[Path]:
        """An empty directory of this name; what is left of it at the end is deleted."""
        with ExitStack() as held:
            with self.ordered():
                path = self.locked(name, held)
            yield path

    @contextmanager
    def ordered(self) -> Iterator[None]:
        """Hold the lock, with what dead processes left swept away."""
        self._root.mkdir(PRIVATE_FOLDER, parents=True, exist_ok=True)
        with locked(self._lock):
            self._sweep()
            yield

    def locked(self, name: str, held: ExitStack) -> Path:
        """An empty directory, locked and deleted with `held`. The caller holds the lock of all."""
        path = self._folder / name
        path.mkdir(PRIVATE_FOLDER, parents=True)
        held.enter_context(locked(path))
        held.callback(shutil.rmtree, path, ignore_errors=True)
        return path

    def take(self, path: Path, name: str) -> Path:
        """Move a listed directory here, out of every listing, in one step. The caller holds the lock of all."""
        self._folder.mkdir(PRIVATE_FOLDER, exist_ok=True)
        gone = path.rename(self._folder / name)
        sync(path.parent)
        return gone

    def sweep(self) -> int:
        """Delete what dead processes left; how many directories."""
        self._root.mkdir(PRIVATE_FOLDER, parents=True, exist_ok=True)
        with locked(self._lock):
            return self._sweep()

    def _sweep(self) -> int:
        dead = [path for path in self._folder.glob("*") if not is_locked(path)]
        for path in dead:
            shutil.rmtree(path, ignore_errors=True)
        return len(dead)


def fill(staged: Path, contents: Mapping[str, bytes], write: WriteFile) -> None:
    """Write every file of an adapter, the very bytes that were verified, and wait until all are on the disk.

    Raises:
        OSError: the disk refuses.
    """
    for name, content in contents.items():
        write(staged / name, content)
    for path in (*staged.iterdir(), staged):
        sync(path)

"""Files that survive a crash, and locks that do not outlive their process.

Guarantees: what `write_atomically` wrote is there in full after a power cut, or not at all; a lock belongs to
an open file, so that threads and processes exclude each other alike, and the kernel frees it when its holder
dies; a `Counter` never gives the same number twice.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from soma_vllm.errors import AdapterError, InUse
from soma_vllm.private import PRIVATE_FILE, PRIVATE_FOLDER


def sync(path: Path) -> None:
    """Wait until a file, or a directory's list of names, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_atomically(path: Path, text: str) -> None:
    """Replace a file's content in one step. The caller holds a lock: there is one temporary name."""
    temporary = path.with_name(f"{path.name}.new")
    temporary.write_text(text, encoding="utf-8")
    sync(temporary)
    temporary.replace(path)
    sync(path.parent)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock on a file (made if need be) or an existing directory; waits for others."""
    with _held(path, fcntl.LOCK_EX):
        yield


@contextmanager
def locked_alone(path: Path, problem: str) -> Iterator[None]:
    """Hold the lock on a file or directory as `locked` does, but wait for no one.

    Raises:
        InUse: another thread or process holds it; the message is `problem`.
        AdapterError: the file cannot be made.
    """
    with ExitStack() as held:
        try:
            held.enter_context(_held(path, fcntl.LOCK_EX | fcntl.LOCK_NB))
        except BlockingIOError as error:
            raise InUse(problem) from error
        except OSError as error:
            raise AdapterError(f"{path}: {error.strerror}") from error
        yield


@contextmanager
def served_from(folder: Path, owner: str) -> Iterator[None]:
    """Held by a server while it serves from a folder, alone among the servers of one record.

    Raises:
        InUse: another server of this record does.
    """
    folder.mkdir(PRIVATE_FOLDER, parents=True, exist_ok=True)
    (folder / ".owners").mkdir(PRIVATE_FOLDER, exist_ok=True)
    with ExitStack() as held:
        if owner:
            copied = "a copied database becomes a record of its own by `soma storage adopt`"
            problem = f"{folder}: found another server of record {owner}; expected none ({copied})"
            held.enter_context(locked_alone(folder / ".owners" / owner, problem))
        held.enter_context(_held(folder / ".serving", fcntl.LOCK_SH))
        yield


@contextmanager
def _held(path: Path, how: int) -> Iterator[None]:
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR | os.O_CREAT, PRIVATE_FILE)
    try:
        fcntl.flock(handle, how)
        yield
    finally:
        os.close(handle)


def is_locked(path: Path) -> bool:
    """True while some living thread or process holds the lock on an existing file or directory."""
    handle = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(handle)
    return False


class Counter:
    """A number in a file that only grows. Callers hold the store's lock."""

    def __init__(self, path: Path) -> None:
        self._path = path

    @property
    def started(self) -> bool:
        """False before the first number, and where the file was lost."""
        return self._path.exists()

    def next(self, above: int = 0) -> int:
        """The next number, at least 1 and more than `above`; on the disk before it is returned.

        Raises:
            AdapterError: the file does not hold a number; going on could give one out twice.
        """
        number = max(self._last(), above) + 1
        write_atomically(self._path, f"{number}\n")
        return number

    def _last(self) -> int:
        if not self.started:
            return 0
        text = self._path.read_text(encoding="utf-8").strip()
        if not text.isascii() or not text.isdigit():
            raise AdapterError(f"{self._path}: found {text[:40]!r}; expected the last number given out")
        return int(text)

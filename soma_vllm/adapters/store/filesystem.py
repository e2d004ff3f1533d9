"""The adapter store on a file system: publish, never edit. Its format is described in adapters_store/README.md.

Guarantees:

* What is listed is whole: files are verified, copied aside, flushed to the disk, and appear by one rename.
* A failed publication leaves nothing of the adapter; what a killed one leaves is never listed and collected.
* A number or a name is never given out twice: across restarts, crashes and processes that share the root.
* A client's session id never becomes a path.
* `get` and `resolve` open the files of one adapter, however many there are.

Which adapters a server has is on its record; `list` walks the tree, and is for its start and for people.
Methods block on the disk and may be called from any thread. An object store, which has no rename, is
`object_store.py`.
"""

from __future__ import annotations

import errno
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from soma_vllm.adapters.store.atomic_files import Counter, is_locked, locked, served_from, sync
from soma_vllm.adapters.store.manifest import (
    LocalAdapter,
    PublishedAdapter,
    document,
    local,
    plain_json,
    read,
    spelt,
    whole,
)
from soma_vllm.adapters.store.naming import Place, checked, digest_of_session, home_of, place_of, version_of
from soma_vllm.adapters.store.staging import Staging, WriteFile, fill
from soma_vllm.adapters.store.verify import NOTHING, Demands, verify
from soma_vllm.errors import AdapterError, AdapterRejected, NotFound
from soma_vllm.private import PRIVATE_FOLDER
from soma_vllm.types import MANIFEST, SessionKey

logger = logging.getLogger(__name__)

LASTING = frozenset({errno.EIO, errno.EACCES, errno.EPERM})
"""Errors of a disk that trying again does not mend: a bad sector, another owner."""


class FilesystemAdapterStore:
    """Adapters under one root. Several processes may share a root.

    `demands` are made of every adapter. `owner` is written into each, and says which server's record speaks of
    it. `write` makes one file.
    """

    def __init__(
        self,
        root: str | Path,
        *,
        demands: Demands = NOTHING,
        owner: str = "",
        write: WriteFile = Path.write_bytes,
    ) -> None:
        self._root = Path(root).resolve()
        self.owner = owner
        self._lock = self._root / ".lock"
        self._pins = self._root / ".pins"
        self._serving = self._root / ".serving"
        self._staging = Staging(self._root, self._lock)
        self._numbers = Counter(self._root / ".number")
        self._demands = demands
        self._write = write

    # -- publishing -------------------------------------------------------------------------------------

    def publish(
        self, key: SessionKey, trained: Path, *, base_model: str, manifest: Mapping[str, Any]
    ) -> PublishedAdapter:
        """Verify a trainer's directory and publish a copy of it as the session's next version.

        `base_model` is recorded, and so is `manifest`: hardness, losses, parents, ... (JSON-compatible).

        Raises:
            AdapterRejected: the files are not fit to be loaded.
            AdapterError: the store cannot be written (a full disk, for one); nothing was published.
        """
        training = plain_json(manifest)
        with disk_errors(f"adapter not published to {self._root}"):
            facts, contents = verify(trained, self._demands)
            with self._staged(key) as (staged, place):
                content = spelt(document(key, place, facts, base_model, self.owner, training))
                fill(staged, {**contents, MANIFEST: content}, self._write)
                final = self._reveal(staged, place)
        return read(content, str(final))

    @contextmanager
    def _staged(self, key: SessionKey) -> Iterator[tuple[Path, Place]]:
        """An empty directory that is not listed, with the place allocated to it."""
        home = self._root / home_of(key)
        with ExitStack() as held:
            with self._staging.ordered():
                # A lost counter starts again above what is still published.
                published = () if self._numbers.started else self.list()
                number = self._numbers.next(above=max((one.ref.number for one in published), default=0))
                home.mkdir(PRIVATE_FOLDER, parents=True, exist_ok=True)
                version = Counter(home / ".version").next(above=_last_version(home))
                staged = self._staging.locked(str(number), held)
            yield staged, Place(key.tenant, digest_of_session(key), version, number)

    def _reveal(self, staged: Path, place: Place) -> Path:
        """List a filled directory, by renaming it into place."""
        final = self._root / place.path
        with locked(self._lock):
            final.parent.mkdir(PRIVATE_FOLDER, parents=True, exist_ok=True)
            staged.rename(final)
            with ExitStack() as undo:
                undo.callback(shutil.rmtree, final, ignore_errors=True)
                for folder in (final.parent, final.parent.parent, self._root):
                    sync(folder)
                undo.pop_all()
        return final

    # -- finding ----------------------------------------------------------------------------------------

    def list(self, tenant: str | None = None) -> tuple[PublishedAdapter, ...]:
        """What is published, of one tenant or of all, oldest first. Reads every manifest.

        Raises:
            AdapterError: the disk does not answer.
        """
        with disk_errors(f"{self._root} cannot be listed"):
            tenants = _folders(str(self._root)) if tenant is None else [f"{self._root}/{checked(tenant)}"]
            sessions = (session for one in tenants for session in _folders(one))
            versions = (
                path for one in sessions for path in _folders(one) if version_of(Path(path).name) is not None
            )
            found = [adapter for adapter in map(read_at, versions) if adapter is not None]
        return tuple(sorted(found, key=lambda one: one.ref.number))

    def get(self, name: str) -> PublishedAdapter:
        """The adapter of that name, by its manifest alone.

        Raises:
            NotFound: no such adapter is published.
        """
        adapter = read_at(str(self._root / place_of(name).path))
        if adapter is None or adapter.ref.name != name:
            raise NotFound(f"adapter {name}: not published under {self._root}")
        return adapter

    def resolve(self, name: str) -> LocalAdapter:
        """The adapter as an engine needs it, byte by byte what was published. Reads the files once.

        Raises:
            NotFound: no such adapter is published.
            AdapterRejected: its files are damaged, or on a disk that will not read them.
            AdapterError: they cannot be read now.
        """
        with disk_errors(f"adapter {name} cannot be read"):
            try:
                return local(name, self._root / place_of(name).path)
            except OSError as error:
                if error.errno not in LASTING:
                    raise
                raise AdapterRejected(name, [f"its files cannot be read: {error.strerror}"]) from error

    def manifest(self, name: str) -> Mapping[str, Any]:
        """soma.json of an adapter.

        Raises:
            NotFound: no such adapter is published.
        """
        with disk_errors(f"adapter {name} cannot be read"):
            return whole((Path(self.get(name).ref.path) / MANIFEST).read_bytes())

    def verify(self, name: str) -> PublishedAdapter:
        """Check a published adapter's files once more, and that they are the ones published.

        Raises:
            NotFound: no such adapter is published.
            AdapterRejected: the files are damaged or were edited.
        """
        adapter = self.get(name)
        with disk_errors(f"adapter {name} cannot be read"):
            verify(Path(adapter.ref.path), self._demands, adapter.files(), name=name)
        return adapter

    # -- ending -----------------------------------------------------------------------------------------

    def retire(self, name: str) -> None:
        """Take an adapter out of the listing, then delete its files. Its name and number stay spent.

        The caller's duty: no request holds the adapter, and the engine has dropped it. An engine that has
        to read a retired adapter's files dies, with everyone's requests.

        Raises:
            NotFound: no such adapter is published.
            AdapterError: the store cannot be written; the adapter is still published.
        """
        place = place_of(name)
        with disk_errors(f"adapter {name} not retired"), ExitStack() as held:
            with locked(self._lock):
                path = self._root / place.path
                found = read_at(str(path))
                # Without a manifest that can be read it goes all the same: it was damaged.
                if not path.is_dir() or (found is not None and found.ref.name != name):
                    raise NotFound(f"adapter {name}: not published under {self._root}")
                # Not locked: should this process be killed, the next one may sweep it up at once.
                gone = self._staging.take(path, f"retired-{place.number}")
            held.callback(self._unpinned, name)
        shutil.rmtree(gone, ignore_errors=True)  # what stays behind is garbage, collected later

    def forget(self, key: SessionKey) -> None:
        """Remove the folder of a session that is gone, where no version is left in it.

        Raises:
            AdapterError: the store cannot be written.
        """
        home = self._root / home_of(key)
        with disk_errors("a session's folder not removed"):
            if home.is_dir():
                with locked(self._lock):
                    if not any(home.glob("v*")):
                        shutil.rmtree(home)

    def collect_garbage(self) -> int:
        """Delete what killed publications and retirements left; how many of them. `publish` does so too.

        Raises:
            AdapterError: the store cannot be written.
        """
        with disk_errors(f"garbage of {self._root} not collected"):
            swept = self._staging.sweep()
            for name in self.pins():
                with suppress(AdapterError):
                    try:
                        self.get(name)
                    except NotFound:
                        self._unpinned(name)
            return swept

    # -- pins -------------------------------------------------------------------------------------------

    def pins(self) -> frozenset[str]:
        """Names of the adapters that are never evicted. Raises AdapterError: the disk does not answer."""
        with disk_errors(f"pins of {self._root} cannot be read"):
            return frozenset(path.name for path in self._pins.glob("*"))

    def pin(self, name: str, pinned: bool = True) -> None:
        """Have an adapter never evicted, or let it go again.

        Raises:
            NotFound: no such adapter is published.
            AdapterError: the store cannot be written.
        """
        self.get(name)
        with disk_errors(f"adapter {name} not pinned"):
            if not pinned:
                self._unpinned(name)
                return
            self._pins.mkdir(exist_ok=True)
            (self._pins / name).touch()
            sync(self._pins)

    def _unpinned(self, name: str) -> None:
        (self._pins / name).unlink(missing_ok=True)

    # -- who uses the root ------------------------------------------------------------------------------

    def in_service(self) -> AbstractContextManager[None]:
        """Held by a server while it serves from this root. Raises InUse: another of its record does."""
        return served_from(self._root, self.owner)

    def serves(self) -> bool:
        """Whether a living server serves from this root."""
        return self._serving.exists() and is_locked(self._serving)


def read_at(path: str) -> PublishedAdapter | None:
    """The adapter in a version's directory; None for one that is being retired, or is not ours."""
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


def _folders(path: str) -> list[str]:
    try:
        with os.scandir(path) as entries:
            return [entry.path for entry in entries if not entry.name.startswith(".")]
    except (FileNotFoundError, NotADirectoryError):
        return []


def _last_version(home: Path) -> int:
    return max((version_of(path.name) or 0 for path in home.glob("v*")), default=0)


@contextmanager
def disk_errors(what: str) -> Iterator[None]:
    """Tell of a disk's refusal (full, read-only, not permitted) as an AdapterError."""
    try:
        yield
    except OSError as error:
        raise AdapterError(f"{what}: {error.strerror or error}") from error

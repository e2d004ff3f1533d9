"""The adapter store: publish, never edit. Its format is described in adapters_store/README.md.

Guarantees:

* What is listed is whole: files are verified, copied aside, flushed to the disk, and appear by one rename.
* A failed publication leaves nothing of the adapter; what a killed one leaves is never listed and collected.
* A number or a name is never given out twice: across restarts, crashes and processes that share the root.
* A client's session id never becomes a path.

The directory tree is the truth; the index in memory only makes `get` quick. Methods block on the disk and may
be called from any thread.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from soma_vllm.adapters.durable import Counter, is_locked, locked, sync
from soma_vllm.adapters.verify import CONFIG, WEIGHTS, AdapterFacts, digest_of, verify_files
from soma_vllm.errors import AdapterError, AdapterRejected, NotFound
from soma_vllm.types import AdapterRef, SessionKey

logger = logging.getLogger(__name__)

FORMAT = 1
MANIFEST = "soma.json"

Copy = Callable[[Path, Path], object]

_TENANT = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,127}")


@dataclass(frozen=True)
class PublishedAdapter:
    """One version of one session's adapter."""

    ref: AdapterRef
    key: SessionKey
    version: int
    """Grows with every publication of the session, from 1."""
    digest: str
    """SHA-256 of the weights' file, hexadecimal."""
    size_bytes: int
    """Size of the weights' file."""
    manifest: Mapping[str, Any]
    """soma.json."""


class AdapterStore:
    """Adapters under one root. Several processes may share a root.

    `max_rank` and `base_model`, where given, are demanded of every adapter (see `verify_files`).
    `copy` brings one file from the trainer's directory into the store's.
    """

    def __init__(
        self,
        root: str | Path,
        *,
        max_rank: int | None = None,
        base_model: str | None = None,
        copy: Copy = shutil.copyfile,
    ) -> None:
        self._root = Path(root).resolve()
        self._staging = self._root / ".staging"
        self._lock = self._root / ".lock"
        self._numbers = Counter(self._root / ".number")
        self._max_rank = max_rank
        self._base_model = base_model
        self._copy = copy
        self._index: dict[str, PublishedAdapter] = {}

    def publish(
        self, key: SessionKey, trained: Path, *, base_model: str, manifest: Mapping[str, Any]
    ) -> PublishedAdapter:
        """Verify a trainer's directory and publish a copy of it as the session's next version.

        `base_model` is recorded, and so is `manifest`: hardness, losses, parents, ... (JSON-compatible).

        Raises:
            AdapterRejected: the files are not fit to be loaded.
            AdapterError: the store cannot be written (a full disk, for one); nothing was published.
        """
        try:
            training = json.loads(json.dumps(dict(manifest), allow_nan=False))
        except (TypeError, ValueError) as error:
            raise AdapterError(f"manifest cannot be written as JSON: {error}") from error
        with _disk_errors(f"adapter not published to {self._root}"):
            facts = self._verify(trained)
            with self._staged(key) as (staged, number, version):
                document = _document(key, number, version, facts, base_model, training)
                self._fill(staged, trained, facts, document)
                adapter = self._reveal(staged, self._home(key) / f"v{version:04d}", document)
        self._index[adapter.ref.name] = adapter
        return adapter

    def get(self, name: str) -> PublishedAdapter:
        """The adapter of that name.

        Raises:
            NotFound: no such adapter is published.
        """
        found = self._index.get(name)
        if found is None or not Path(found.ref.path).is_dir():
            self._index = {adapter.ref.name: adapter for adapter in self.list()}
            found = self._index.get(name)
        if found is None:
            raise NotFound(f"adapter {name}: not published under {self._root}")
        return found

    def list(self, tenant: str | None = None) -> tuple[PublishedAdapter, ...]:
        """What is published, of one tenant or of all, oldest first."""
        return self._read_all(f"{'[!.]*' if tenant is None else _checked(tenant)}/*/v*")

    def latest(self, key: SessionKey) -> PublishedAdapter | None:
        """The session's newest version, if it has any."""
        mine = self._of(key)
        return mine[-1] if mine else None

    def verify(self, name: str) -> PublishedAdapter:
        """Check a published adapter's files once more, and that they are the ones published.

        Raises:
            NotFound: no such adapter is published.
            AdapterRejected: the files are damaged or were edited.
        """
        adapter = self.get(name)
        with _disk_errors(f"adapter {name} cannot be read"):
            facts = self._verify(Path(adapter.ref.path))
        if facts.digest != adapter.digest:
            raise AdapterRejected(name, [f"weights: expected SHA-256 {adapter.digest}, found {facts.digest}"])
        return adapter

    def retire(self, name: str) -> None:
        """Take an adapter out of the listing, then delete its files. Its name and number stay spent.

        The caller's duty: no request holds the adapter, and the engine has dropped it. An engine that has
        to read a retired adapter's files dies, with everyone's requests.

        Raises:
            NotFound: no such adapter is published.
            AdapterError: the store cannot be written; the adapter is still published.
        """
        adapter = self.get(name)
        path = Path(adapter.ref.path)
        with _disk_errors(f"adapter {name} not retired"), locked(self._lock):
            if not path.is_dir():
                raise NotFound(f"adapter {name}: retired meanwhile")
            self._staging.mkdir(exist_ok=True)
            gone = path.rename(self._staging / f"retired-{adapter.ref.number}")
            sync(path.parent)
        self._index.pop(name, None)
        shutil.rmtree(gone, ignore_errors=True)  # what stays behind is garbage, collected later

    def remove_session(self, key: SessionKey) -> int:
        """Retire every version of a session; how many there were. The duties of `retire` hold.

        Raises:
            AdapterError: the store cannot be written.
        """
        mine = self._of(key)
        for adapter in mine:
            self.retire(adapter.ref.name)
        home = self._home(key)
        if home.is_dir():
            with _disk_errors("a session's folder not removed"), locked(self._lock):
                if not any(home.glob("v*")):
                    shutil.rmtree(home)
        return len(mine)

    def collect_garbage(self) -> int:
        """Delete what killed publications and retirements left; how many of them. `publish` does so too.

        Raises:
            AdapterError: the store cannot be written.
        """
        with _disk_errors(f"garbage of {self._root} not collected"):
            self._root.mkdir(parents=True, exist_ok=True)
            with locked(self._lock):
                return self._sweep()

    def _verify(self, directory: Path) -> AdapterFacts:
        return verify_files(directory, max_rank=self._max_rank, base_model=self._base_model)

    def _home(self, key: SessionKey) -> Path:
        return self._root / _checked(key.tenant) / _session_digest(key)

    @contextmanager
    def _staged(self, key: SessionKey) -> Iterator[tuple[Path, int, int]]:
        """An empty directory that nobody lists, with the number and version allocated to it.

        Its lock tells a living publication from a dead one. Whatever is left of it at the end is deleted.
        """
        home = self._home(key)
        self._root.mkdir(parents=True, exist_ok=True)
        with ExitStack() as held:
            with locked(self._lock):
                self._sweep()
                # A lost counter starts again above what is still published.
                published = () if self._numbers.started else self.list()
                number = self._numbers.next(above=max((one.ref.number for one in published), default=0))
                home.mkdir(parents=True, exist_ok=True)
                version = Counter(home / ".version").next(above=_last_version(home))
                staged = self._staging / str(number)
                staged.mkdir(parents=True)
                held.enter_context(locked(staged))
            held.callback(shutil.rmtree, staged, ignore_errors=True)
            yield staged, number, version

    def _fill(self, staged: Path, trained: Path, facts: AdapterFacts, document: Mapping[str, Any]) -> None:
        """Write every file of the adapter and wait until all of it is on the disk."""
        for name in (CONFIG, WEIGHTS):
            self._copy(trained / name, staged / name)
        copied = digest_of(staged / WEIGHTS)
        if copied != facts.digest:
            raise AdapterError(f"weights changed on the way: expected SHA-256 {facts.digest}, found {copied}")
        (staged / MANIFEST).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
        for path in (*staged.iterdir(), staged):
            sync(path)

    def _reveal(self, staged: Path, final: Path, document: Mapping[str, Any]) -> PublishedAdapter:
        """List a filled directory, by renaming it into place."""
        with locked(self._lock):
            final.parent.mkdir(parents=True, exist_ok=True)
            staged.rename(final)
            with ExitStack() as undo:
                undo.callback(shutil.rmtree, final, ignore_errors=True)
                for folder in (final.parent, final.parent.parent, self._root):
                    sync(folder)
                undo.pop_all()
        return _published(final, document)

    def _sweep(self) -> int:
        """Delete staged directories whose makers are gone. The caller holds the store's lock."""
        dead = [path for path in self._staging.glob("*") if not is_locked(path)]
        for path in dead:
            shutil.rmtree(path, ignore_errors=True)
        return len(dead)

    def _of(self, key: SessionKey) -> tuple[PublishedAdapter, ...]:
        home = self._home(key).relative_to(self._root)
        return tuple(adapter for adapter in self._read_all(f"{home}/v*") if adapter.key == key)

    def _read_all(self, pattern: str) -> tuple[PublishedAdapter, ...]:
        found = (_read(path) for path in self._root.glob(pattern))
        return tuple(sorted((one for one in found if one), key=lambda one: one.ref.number))


def _document(
    key: SessionKey,
    number: int,
    version: int,
    facts: AdapterFacts,
    base_model: str,
    training: Mapping[str, Any],
) -> dict[str, Any]:
    """soma.json."""
    return {
        "format": FORMAT,
        "name": f"soma-{_session_digest(key)}-v{version:04d}-{number}",
        "number": number,
        "version": version,
        "tenant": key.tenant,
        "session": key.session,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "base_model": base_model,
        "rank": facts.rank,
        "alpha": facts.alpha,
        "modules": list(facts.modules),
        "weights": {"sha256": facts.digest, "bytes": facts.size_bytes},
        "training": training,
    }


def _published(path: Path, document: Mapping[str, Any]) -> PublishedAdapter:
    return PublishedAdapter(
        ref=AdapterRef(document["name"], document["number"], str(path)),
        key=SessionKey(document["tenant"], document["session"]),
        version=document["version"],
        digest=document["weights"]["sha256"],
        size_bytes=document["weights"]["bytes"],
        manifest=document,
    )


def _read(path: Path) -> PublishedAdapter | None:
    """The adapter in a listed directory; None for one that is being retired, or is not ours."""
    try:
        return _published(path, json.loads((path / MANIFEST).read_text(encoding="utf-8")))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, KeyError, TypeError):
        logger.warning("%s: not a manifest of format %d; adapter left out", path / MANIFEST, FORMAT)
        return None


def _session_digest(key: SessionKey) -> str:
    return hashlib.sha256(key.session.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def _last_version(home: Path) -> int:
    names = (path.name[1:] for path in home.glob("v*"))
    return max((int(name) for name in names if name.isascii() and name.isdigit()), default=0)


def _checked(tenant: str) -> str:
    if not _TENANT.fullmatch(tenant):
        raise AdapterError(f"tenant: found {tenant!r}; expected letters, digits, '-' and '_'")
    return tenant


@contextmanager
def _disk_errors(what: str) -> Iterator[None]:
    """Tell of a disk's refusal (full, read-only, not permitted) as an AdapterError."""
    try:
        yield
    except OSError as error:
        raise AdapterError(f"{what}: {error.strerror or error}") from error

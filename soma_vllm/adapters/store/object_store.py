"""The adapter store on an object store (`s3://…`, `gs://…`, any fsspec URL), with a cache on this machine.

Guarantees:

* What is listed is whole: an object store has no rename, so a mark (the manifest once more, under `.listed/`)
  is uploaded last, and an adapter is published as long as, and only as long as, its mark is there. Retirement
  deletes the mark first.
* A number is given out once among all hosts: it is drawn at random from 31 bits and claimed by an object that
  is created where it did not exist, and never deleted. Object stores with conditional writes decide that
  themselves; on others two hosts would have to draw the same number in the same instant. The number is part of
  the path, so that no path ever means two adapters; hosts that publish for one session at the same moment may
  give two adapters the same version.
* What an engine reads lies in the cache, compared with the manifest's digests every time it is loaded. A
  damaged entry is fetched again, concurrent fetches of one adapter are one, and what is cached is served while
  the object store is away.
* A killed upload or retirement leaves a note under `.pending/`; what it names is finished or deleted by
  `collect_garbage` once the note is old enough.

Methods block on the network and may be called from any thread.
"""

from __future__ import annotations

import json
import secrets
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from soma_vllm.adapters.store.bucket import Bucket
from soma_vllm.adapters.store.download_cache import AdapterCache
from soma_vllm.adapters.store.filesystem import disk_errors
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
from soma_vllm.adapters.store.naming import (
    LARGEST,
    Place,
    checked,
    digest_of_session,
    home_of,
    place_of,
    version_of,
)
from soma_vllm.adapters.store.staging import WriteFile, fill
from soma_vllm.adapters.store.verify import NOTHING, Demands, verify
from soma_vllm.documents import parse_json
from soma_vllm.errors import AdapterError, AdapterRejected, NotFound
from soma_vllm.types import CONFIG, MANIFEST, WEIGHTS, SessionKey

PATIENCE_S = 3600.0
"""Age from which an upload or a retirement under way is taken for dead."""

DRAWS = 100
"""Numbers drawn before it is said that something is wrong."""


class ObjectStoreAdapterStore:
    """Adapters below a URL, for an engine that reads them from `cache`. Hosts and processes may share both."""

    def __init__(
        self,
        url: str,
        cache: str | Path,
        *,
        demands: Demands = NOTHING,
        owner: str = "",
        write: WriteFile = Path.write_bytes,
        patience_s: float = PATIENCE_S,
    ) -> None:
        """Raises AdapterError: no installed package opens this kind of URL."""
        self.owner = owner
        self._bucket = Bucket(url)
        self._cache = AdapterCache(Path(cache).resolve() / self._bucket.digest)
        self._demands = demands
        self._write = write
        self._patience_s = patience_s

    # -- publishing -------------------------------------------------------------------------------------

    def publish(
        self, key: SessionKey, trained: Path, *, base_model: str, manifest: Mapping[str, Any]
    ) -> PublishedAdapter:
        """Verify a trainer's directory and publish a copy of it; raises as the file system's does."""
        training = plain_json(manifest)
        with disk_errors(f"adapter not published to {self._bucket}"):
            facts, contents = verify(trained, self._demands)
            place = self._place(key)
            content = spelt(document(key, place, facts, base_model, self.owner, training))
            with self._cache.staging.made(str(place.number)) as staged:
                fill(staged, {**contents, MANIFEST: content}, self._write)
                self._upload(staged, place, content)
                with suppress(OSError):  # it is published; the first load will fetch it
                    self._cache.keep(staged, place)
        return read(content, str(self._cache.entry(place)))

    def _place(self, key: SessionKey) -> Place:
        """A number that was never given out, claimed, and the session's next version."""
        home = home_of(key)
        for _ in range(DRAWS):
            number = secrets.randbelow(LARGEST) + 1
            if self._bucket.claim(f".numbers/{number}", home.encode()):
                break
        else:
            raise AdapterError(f"{self._bucket}: {DRAWS} random numbers are taken; expected a free one")
        versions = (version_of(name.partition("-")[0]) or 0 for name in self._bucket.names(home))
        version = max(versions, default=0) + 1
        return Place(key.tenant, digest_of_session(key), version, number)

    def _upload(self, staged: Path, place: Place, manifest: bytes) -> None:
        """Upload the files, the mark last; what a failure leaves of them is deleted."""
        with self._pending(place, "upload"):
            try:
                for name in (CONFIG, WEIGHTS, MANIFEST):
                    self._bucket.put(staged / name, f"{place.numbered_path}/{name}")
                if not self._bucket.has(f".pending/{place.name}"):
                    raise AdapterError(f"adapter {place.name}: took longer than others wait for an upload")
                self._bucket.write(_mark(place), manifest)
            except BaseException:
                with suppress(AdapterError):
                    self._clear(place)
                    self._bucket.remove(f".pending/{place.name}")
                raise

    @contextmanager
    def _pending(self, place: Place, what: str) -> Iterator[None]:
        """Leave a note of what is under way, for the case that it is not brought to its end."""
        note = f".pending/{place.name}"
        self._bucket.write(note, json.dumps({"what": what, "at": time.time()}).encode())
        yield
        with suppress(AdapterError):  # it is done; the note goes with the garbage
            self._bucket.remove(note)

    # -- finding ----------------------------------------------------------------------------------------

    def list(self, tenant: str | None = None) -> tuple[PublishedAdapter, ...]:
        """What is published, of one tenant or of all, oldest first. Reads every mark.

        Raises:
            AdapterError: the object store does not answer.
        """
        marks = self._marks(tenant)
        found = []
        for path, content in self._bucket.read_all(list(marks)).items():
            # Not whole: cut off, on a file system that shows files while they are written.
            with suppress(ValueError, NotFound):
                found.append(read(content, str(self._cache.entry(place_of(marks[path])))))
        return tuple(sorted(found, key=lambda one: (one.created, one.ref.number)))

    def _marks(self, tenant: str | None = None) -> dict[str, str]:
        """Marks of published adapters: path -> name."""
        tenants = self._bucket.names(".listed") if tenant is None else [checked(tenant)]
        return {f".listed/{one}/{n}": n for one in tenants for n in self._bucket.names(f".listed/{one}")}

    def get(self, name: str) -> PublishedAdapter:
        """The adapter of that name, by its mark alone. Raises NotFound, AdapterError."""
        return self._marked(name)[0]

    def resolve(self, name: str) -> LocalAdapter:
        """The adapter as an engine needs it, in the cache, byte by byte what was published.

        Raises:
            NotFound: no such adapter is published.
            AdapterRejected: what the object store holds is damaged.
            AdapterError: it does not answer, or the cache cannot be written.
        """
        place = place_of(name)
        cached = self._cache.whole(place)
        if cached is not None:
            return cached
        with disk_errors(f"adapter {name} not fetched"), self._cache.fetching(place):
            cached = self._cache.whole(place)  # fetched by another thread or process while we waited
            return cached if cached is not None else self._fetch(place)

    def manifest(self, name: str) -> Mapping[str, Any]:
        """soma.json of an adapter. Raises NotFound, AdapterError."""
        return whole(self._marked(name)[1])

    def verify(self, name: str) -> PublishedAdapter:
        """Fetch a published adapter's files once more and check them; raises as the file system's does."""
        place = place_of(name)
        with disk_errors(f"adapter {name} cannot be read"), self._downloaded(place) as (staged, adapter):
            verify(staged, self._demands, adapter.files(), name=name)
        return adapter

    def _marked(self, name: str) -> tuple[PublishedAdapter, bytes]:
        """(an adapter, the manifest that its mark holds). Raises NotFound, AdapterError."""
        place = place_of(name)
        try:
            mark = self._bucket.read(_mark(place))
            adapter = read(mark, str(self._cache.entry(place)))
        except (NotFound, ValueError) as error:
            raise NotFound(f"adapter {name}: not published under {self._bucket}") from error
        if adapter.ref.name != name:
            raise NotFound(f"adapter {name}: not published under {self._bucket}")
        return adapter, mark

    # -- the cache --------------------------------------------------------------------------------------

    def _fetch(self, place: Place) -> LocalAdapter:
        """Bring an adapter into the cache, in place of what is there."""
        with self._downloaded(place) as (staged, adapter):
            fetched = local(place.name, staged)
            self._cache.keep(staged, place)
        return replace(fetched, ref=adapter.ref)

    @contextmanager
    def _downloaded(self, place: Place) -> Iterator[tuple[Path, PublishedAdapter]]:
        """A staged directory with what the object store holds; the mark says what that should be."""
        adapter, mark = self._marked(place.name)
        with self._cache.staging.made(f"{place.number}-{secrets.token_hex(4)}") as staged:
            (staged / MANIFEST).write_bytes(mark)
            for name in (CONFIG, WEIGHTS):
                try:
                    self._bucket.fetch(f"{place.numbered_path}/{name}", staged / name)
                except NotFound as error:
                    raise AdapterRejected(place.name, [f"{name} is missing in {self._bucket}"]) from error
            yield staged, adapter

    # -- ending -----------------------------------------------------------------------------------------

    def retire(self, name: str) -> None:
        """Take an adapter out of the listing, then delete its files; as the file system's."""
        place = place_of(name)
        if not self._bucket.has(_mark(place)):
            self._cache.drop(self._cache.entry(place))
            raise NotFound(f"adapter {name}: not published under {self._bucket}")
        with self._pending(place, "retire"):
            self._clear(place)
            self._bucket.remove(f".pins/{name}")
        self._cache.drop(self._cache.entry(place))

    def forget(self, key: SessionKey) -> None:
        """Remove what is left of a session that is gone, where none of its adapters is."""
        home = home_of(key)
        prefix = f"soma-{key.tenant}-{digest_of_session(key)}-"
        if not any(name.startswith(prefix) for name in self._marks(key.tenant).values()):
            self._bucket.remove_below(home)
            shutil.rmtree(self._cache.folder / home, ignore_errors=True)

    def collect_garbage(self) -> int:
        """Finish what killed uploads and retirements left, and drop what the cache need not hold; how many.

        To be called while no engine of this machine has an adapter loaded.

        Raises:
            AdapterError: the object store does not answer.
        """
        with disk_errors(f"garbage of {self._cache.folder} not collected"):
            swept = self._cache.staging.sweep()
            for name in self._bucket.names(".pending"):
                swept += self._settle(name)
            # In this order: what is cached, or pinned, was published before.
            cached, pins = self._cache.entries(), self.pins()
            names = set(self._marks().values())
            places = []
            for name in names:
                with suppress(NotFound):  # of the name: a file of another program
                    places.append(place_of(name))
            stale = set(cached) - set(map(self._cache.entry, places))
            for entry in stale:
                self._cache.drop(entry)
            for name in pins - names:
                self._bucket.remove(f".pins/{name}")
        return swept + len(stale)

    def _settle(self, name: str) -> int:
        """Bring to an end what a note speaks of, where it is old; 1 where it was."""
        note = f".pending/{name}"
        try:
            at = float(parse_json(self._bucket.read(note))["at"])
        except NotFound:
            return 0
        except (ValueError, KeyError, TypeError):
            at = 0.0
        if at > time.time() - self._patience_s:
            return 0
        with suppress(NotFound):  # of the name: a file of another program
            place = place_of(name)
            if not self._bucket.has(_mark(place)):
                self._clear(place)
        self._bucket.remove(note)
        return 1

    def _clear(self, place: Place) -> None:
        """Delete an adapter's objects, the mark first."""
        self._bucket.remove(_mark(place))
        self._bucket.remove_below(place.numbered_path)

    # -- pins and users ---------------------------------------------------------------------------------

    def pins(self) -> frozenset[str]:
        """Names of the adapters that are never evicted."""
        return frozenset(self._bucket.names(".pins"))

    def pin(self, name: str, pinned: bool = True) -> None:
        """Have an adapter never evicted, or let it go again. Raises NotFound, AdapterError."""
        self.get(name)
        if pinned:
            self._bucket.write(f".pins/{name}", b"")
        else:
            self._bucket.remove(f".pins/{name}")

    def in_service(self) -> AbstractContextManager[None]:
        """Held by a server while it serves from this root. Other machines do not see it. Raises InUse."""
        return self._cache.in_service(self.owner)

    def serves(self) -> bool:
        """Whether a living server of this machine serves from this root."""
        return self._cache.serves()


def _mark(place: Place) -> str:
    """The object that says that an adapter is published."""
    return f".listed/{place.tenant}/{place.name}"

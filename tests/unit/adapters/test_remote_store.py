"""The store on an object store: what is listed is whole, and what an engine reads is what was published."""

from __future__ import annotations

import multiprocessing
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from uuid import uuid4

import pytest
from fsspec.implementations.memory import MemoryFileSystem
from support.adapter_files import write_adapter
from support.guard import GUARD_S

from soma_vllm.adapters.store import object_store
from soma_vllm.adapters.store.bucket import Bucket
from soma_vllm.adapters.store.filesystem import FilesystemAdapterStore
from soma_vllm.adapters.store.manifest import PublishedAdapter
from soma_vllm.adapters.store.object_store import ObjectStoreAdapterStore
from soma_vllm.adapters.store.opening import open_root
from soma_vllm.adapters.store.protocol import AdapterStore
from soma_vllm.errors import AdapterError, AdapterRejected, NotFound
from soma_vllm.types import CONFIG, WEIGHTS, SessionKey

KEY = SessionKey("public", "dialogue-7")
FORK = multiprocessing.get_context("fork")
FILES = {"adapter_config.json", "adapter_model.safetensors", "soma.json"}


@pytest.fixture(params=["memory", "file"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """A root of its own on each kind of file system."""
    if request.param == "file":
        yield f"file://{tmp_path}/far"
        return
    yield f"memory://{uuid4().hex}/adapters"
    MemoryFileSystem.store.clear()


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    return write_adapter(tmp_path / "trained")


def publish(store: AdapterStore, trained: Path, key: SessionKey = KEY) -> PublishedAdapter:
    return store.publish(key, trained, base_model="small", manifest={"losses": [1.0]})


def test_what_one_machine_publishes_another_finds_and_fetches(url: str, trained: Path, tmp_path: Path) -> None:
    here, there = (
        ObjectStoreAdapterStore(url, tmp_path / "here"),
        ObjectStoreAdapterStore(url, tmp_path / "there"),
    )
    first, second = publish(here, trained), publish(here, trained)
    assert (first.version, second.version) == (1, 2)
    assert [one.ref.name for one in there.list()] == [first.ref.name, second.ref.name]
    assert there.list("nobody") == ()
    assert there.get(first.ref.name).key == KEY
    assert there.manifest(first.ref.name)["training"] == {"losses": [1.0]}
    ref = there.resolve(first.ref.name).ref
    assert Path(ref.path).is_relative_to(tmp_path / "there")
    assert {path.name for path in Path(ref.path).iterdir()} == FILES
    for name in FILES - {"soma.json"}:
        assert (Path(ref.path) / name).read_bytes() == (trained / name).read_bytes()
    assert there.verify(first.ref.name).weights == first.weights


def test_a_retired_adapter_is_gone_for_everybody(url: str, trained: Path, tmp_path: Path) -> None:
    here, there = (
        ObjectStoreAdapterStore(url, tmp_path / "here"),
        ObjectStoreAdapterStore(url, tmp_path / "there"),
    )
    adapter, kept = publish(here, trained), publish(here, trained)
    path = Path(here.resolve(adapter.ref.name).ref.path)
    there.pin(adapter.ref.name)
    assert here.pins() == {adapter.ref.name}
    there.retire(adapter.ref.name)
    assert [one.ref for one in here.list()] == [kept.ref]
    assert here.pins() == frozenset()
    for verb in (here.get, here.verify, here.manifest, here.pin, there.resolve, there.retire):
        with pytest.raises(NotFound):
            verb(adapter.ref.name)
    assert path.is_dir(), "the engine here may have it loaded"
    here.collect_garbage()
    assert not path.exists()
    assert here.verify(kept.ref.name).ref == kept.ref
    there.retire(kept.ref.name)
    there.forget(KEY)
    assert Bucket(url).names("public") == []


def test_one_fetch_serves_all_who_want_an_adapter_at_once(
    url: str, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = publish(ObjectStoreAdapterStore(url, tmp_path / "here"), trained).ref.name
    fetched: list[str] = []
    fetch = Bucket.fetch

    def counted(bucket: Bucket, path: str, file: Path) -> None:
        fetched.append(file.name)
        fetch(bucket, path, file)

    monkeypatch.setattr(Bucket, "fetch", counted)
    stores = [ObjectStoreAdapterStore(url, tmp_path / "there") for _ in range(4)]
    with ThreadPoolExecutor(8) as pool:
        paths = set(pool.map(lambda n: stores[n % 4].resolve(name).ref.path, range(16)))
    assert len(paths) == 1
    assert sorted(fetched) == [CONFIG, WEIGHTS], "the manifest is the mark"


@pytest.mark.parametrize("file", sorted(FILES))
@pytest.mark.parametrize("spoil", [Path.unlink, lambda path: path.write_bytes(b"{}")])
def test_a_damaged_cache_entry_is_fetched_again(
    file: str, spoil: Callable[[Path], object], url: str, trained: Path, tmp_path: Path
) -> None:
    store = ObjectStoreAdapterStore(url, tmp_path / "here")
    adapter = publish(store, trained)
    spoil(Path(adapter.ref.path) / file)
    found = store.resolve(adapter.ref.name).ref
    assert found == adapter.ref
    assert (Path(found.path) / "adapter_model.safetensors").read_bytes() == (
        trained / "adapter_model.safetensors"
    ).read_bytes()


def test_what_is_cached_is_served_while_the_object_store_is_away(
    url: str, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = ObjectStoreAdapterStore(url, tmp_path / "here")
    cached, other = publish(store, trained), publish(store, trained)
    shutil.rmtree(other.ref.path)

    class Away:
        def __getattr__(self, verb: str) -> None:
            raise ConnectionRefusedError("no route")

    monkeypatch.setattr(store._bucket, "_fs", Away())
    assert store.resolve(cached.ref.name).ref == cached.ref
    with pytest.raises(AdapterError, match="ConnectionRefusedError") as caught:
        store.resolve(other.ref.name)
    assert not isinstance(caught.value, AdapterRejected)
    for ask in (store.list, store.pins, store.collect_garbage):
        with pytest.raises(AdapterError, match="no route"):
            ask()


@pytest.mark.parametrize("file", ["adapter_config.json", "adapter_model.safetensors"])
def test_objects_that_were_deleted_or_changed_are_rejected(
    file: str, url: str, trained: Path, tmp_path: Path
) -> None:
    here, there = (
        ObjectStoreAdapterStore(url, tmp_path / "here"),
        ObjectStoreAdapterStore(url, tmp_path / "there"),
    )
    cut, gone = publish(here, trained), publish(here, trained)
    bucket = Bucket(url)
    bucket.write(f"{Path(cut.ref.path).relative_to(here._cache.folder)}/{file}", b"x")
    bucket.remove(f"{Path(gone.ref.path).relative_to(here._cache.folder)}/{file}")
    for adapter in (cut, gone):
        for verb in (there.resolve, there.verify):
            with pytest.raises(AdapterRejected, match=file):
                verb(adapter.ref.name)
        there.retire(adapter.ref.name)
    assert there.list() == ()


@pytest.mark.parametrize("at", ["adapter_config.json", "adapter_model.safetensors", "soma.json", "mark"])
def test_an_upload_that_fails_leaves_nothing(
    at: str, url: str, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = ObjectStoreAdapterStore(url, tmp_path / "here")
    put, write = Bucket.put, Bucket.write

    def full(bucket: Bucket, *arguments: object) -> None:
        path = next(str(a) for a in arguments if isinstance(a, str))
        if path.endswith(at) or (at == "mark" and path.startswith(".listed")):
            raise AdapterError("disk full")
        (put if isinstance(arguments[0], Path) else write)(bucket, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Bucket, "put", full)
        patch.setattr(Bucket, "write", full)
        with pytest.raises(AdapterError, match="disk full"):
            publish(store, trained)
    assert store.list() == ()
    assert Bucket(url).names(".pending") == []
    assert {
        file for home in Bucket(url).names("public") for file in Bucket(url).names(f"public/{home}")
    } == set()
    assert store._cache.entries() == []
    publish(store, trained)


def test_an_upload_that_others_gave_up_is_not_listed(
    url: str, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = ObjectStoreAdapterStore(url, tmp_path / "here")
    put = Bucket.put

    def slow(bucket: Bucket, file: Path, path: str) -> None:
        put(bucket, file, path)
        ObjectStoreAdapterStore(url, tmp_path / "there", patience_s=0.0).collect_garbage()

    monkeypatch.setattr(Bucket, "put", slow)
    with pytest.raises(AdapterError, match="took longer than others wait"):
        publish(store, trained)
    assert store.list() == ()


def test_garbage_of_an_upload_under_way_is_left_alone(
    url: str, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = ObjectStoreAdapterStore(url, tmp_path / "here")
    put = Bucket.put

    def slow(bucket: Bucket, file: Path, path: str) -> None:
        put(bucket, file, path)
        ObjectStoreAdapterStore(url, tmp_path / "there").collect_garbage()

    monkeypatch.setattr(Bucket, "put", slow)
    adapter = publish(store, trained)
    assert ObjectStoreAdapterStore(url, tmp_path / "there").verify(adapter.ref.name).key == KEY


def test_a_number_that_is_taken_is_drawn_again(
    url: str, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = ObjectStoreAdapterStore(url, tmp_path / "here")
    draws = iter([5, 5, 5, 8])
    monkeypatch.setattr(object_store.secrets, "randbelow", lambda most: next(draws))
    assert publish(store, trained).ref.number == 6
    store.retire(store.list()[0].ref.name)
    assert publish(store, trained).ref.number == 9, "6 stays spent"


def _publish_some(url: str, cache: Path, trained: Path) -> list[tuple[int, str]]:
    store = ObjectStoreAdapterStore(url, cache)
    return [(one.ref.number, one.ref.name) for one in (publish(store, trained) for _ in range(6))]


def test_two_processes_that_publish_for_one_session_at_once_share_no_number_or_name(
    trained: Path, tmp_path: Path
) -> None:
    url = f"file://{tmp_path}/far"
    with ProcessPoolExecutor(2, mp_context=FORK) as pool:
        jobs = [pool.submit(_publish_some, url, tmp_path / name, trained) for name in ("a", "b")]
        published = [row for job in jobs for row in job.result(timeout=GUARD_S)]
    assert [len(set(column)) for column in zip(*published, strict=True)] == [12, 12]
    assert {one.ref.name for one in ObjectStoreAdapterStore(url, tmp_path / "c").list()} == {
        name for _, name in published
    }


def test_of_two_claims_on_a_file_system_one_wins(tmp_path: Path) -> None:
    buckets = [Bucket(f"file://{tmp_path}/far") for _ in range(4)]
    for number in range(20):
        with ThreadPoolExecutor(4) as pool:
            won = list(pool.map(lambda bucket, number=number: bucket.claim(f"n/{number}", b"x"), buckets))
        assert sum(won) == 1


@pytest.mark.parametrize("session", ["../../etc", "a/b", "ä\n\0", "\ud800", "*"])
def test_a_session_id_never_becomes_a_path(session: str, url: str, trained: Path, tmp_path: Path) -> None:
    store = ObjectStoreAdapterStore(url, tmp_path / "here")
    key = SessionKey("public", session)
    adapter = publish(store, trained, key)
    assert store.list() == (adapter,)
    assert adapter.key == key
    assert Path(adapter.ref.path).is_relative_to(tmp_path / "here")
    for tenant in ("..", "a/b", ""):
        with pytest.raises(AdapterError, match="tenant: found"):
            publish(store, trained, SessionKey(tenant, session))


def test_a_root_is_opened_by_what_it_looks_like(tmp_path: Path) -> None:
    assert isinstance(open_root(str(tmp_path / "x"), tmp_path / "cache"), FilesystemAdapterStore)
    assert isinstance(open_root("memory://x", tmp_path / "cache"), ObjectStoreAdapterStore)
    assert open_root("memory://x", tmp_path, owner="a").owner == "a"
    with pytest.raises(AdapterError, match=r"adapters\.root: found 'nowhere://x'"):
        open_root("nowhere://x", tmp_path / "cache")


def test_a_root_in_service_is_known_on_its_machine(url: str, tmp_path: Path) -> None:
    store, other = (
        ObjectStoreAdapterStore(url, tmp_path / "here"),
        ObjectStoreAdapterStore(url, tmp_path / "here"),
    )
    assert not other.serves()
    with store.in_service():
        assert other.serves()
    assert not other.serves()

"""SIGKILL at every step: what is listed is whole, what is not leaves nothing, and no number comes back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from support.adapter_files import write_adapter
from support.crash import each_refusal, each_step

from soma_vllm.adapters.store.filesystem import FilesystemAdapterStore
from soma_vllm.adapters.store.manifest import PublishedAdapter
from soma_vllm.adapters.store.object_store import ObjectStoreAdapterStore
from soma_vllm.adapters.store.protocol import AdapterStore
from soma_vllm.errors import AdapterError, NotFound
from soma_vllm.types import SessionKey

KEY = SessionKey("public", "dialogue-7")
OWN = frozenset({".number", ".version", ".lock", ".number.new", ".version.new"})

Open = Callable[[Path], AdapterStore]


def local(folder: Path) -> AdapterStore:
    return FilesystemAdapterStore(folder / "root")


def remote(folder: Path) -> AdapterStore:
    return ObjectStoreAdapterStore(f"file://{folder}/root", folder / "cache", patience_s=0.0)


def publish(store: AdapterStore, trained: Path) -> PublishedAdapter:
    return store.publish(KEY, trained, base_model="small", manifest={})


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    return write_adapter(tmp_path / "trained")


@pytest.fixture
def work() -> Iterator[Path]:
    """A folder in memory, where there is one: hundreds of stores are made, and a kill loses no written page."""
    memory = Path("/dev/shm")
    with TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        yield Path(folder)


@pytest.fixture
def fresh(work: Path) -> Callable[[], Path]:
    """A new folder for a root and its cache, every time."""
    numbers = count(1)

    def make() -> Path:
        folder = work / str(next(numbers))
        folder.mkdir(parents=True)
        return folder

    return make


def left_in(folder: Path) -> list[Path]:
    """Files of adapters, whole or not: all but counters, locks and claims."""
    return [
        path
        for path in folder.rglob("*")
        if path.is_file()
        and path.name not in OWN
        and ".numbers" not in path.parts
        and ".locks" not in path.parts
    ]


def whole(store: AdapterStore) -> tuple[PublishedAdapter, ...]:
    """What is listed; every one of it verifies, and resolves."""
    listed = store.list()
    for adapter in listed:
        assert store.verify(adapter.ref.name) == adapter
        assert store.get(adapter.ref.name) == adapter
        assert store.resolve(adapter.ref.name).ref == adapter.ref
    return listed


@pytest.mark.parametrize("opened", [local, remote])
def test_a_publication_killed_at_any_step_is_there_whole_or_leaves_nothing(
    opened: Open, fresh: Callable[[], Path], trained: Path, work: Path
) -> None:
    def prepare() -> Path:
        folder = fresh()
        publish(opened(folder), trained)
        return folder

    outcomes = set()
    for folder in each_step(work, prepare, lambda folder: publish(opened(folder), trained)):
        store = opened(folder)
        listed = whole(store)
        outcomes.add(len(listed))
        store.collect_garbage()
        assert whole(store) == listed
        after = publish(store, trained)
        assert after.ref.name not in {one.ref.name for one in listed}
        assert after.ref.number not in {one.ref.number for one in listed}
        for adapter in store.list():
            store.retire(adapter.ref.name)
        store.collect_garbage()
        assert left_in(folder) == []
    assert outcomes == {1, 2}


@pytest.mark.parametrize("opened", [local, remote])
def test_a_disk_that_is_full_at_any_step_fails_a_publication_with_one_error_and_leaves_nothing(
    opened: Open, fresh: Callable[[], Path], trained: Path, work: Path, tmp_path: Path
) -> None:
    def publish_or_tell(folder: Path) -> None:
        try:
            publish(opened(folder), trained)
        except AdapterError:
            (tmp_path / folder.name).touch()

    outcomes = set()
    for folder in each_refusal(work, fresh, publish_or_tell):
        store = opened(folder)
        listed = whole(store)
        outcomes.add(len(listed))
        assert (tmp_path / folder.name).exists() is not bool(listed), "it says what it did"
        if not listed:
            # What a failed clean-up leaves (of a note that could not be written, for one) is garbage.
            store.collect_garbage()
            assert left_in(folder) == []
    assert outcomes == {0, 1}


@pytest.mark.parametrize("opened", [local, remote])
def test_a_retirement_killed_at_any_step_leaves_the_adapter_whole_or_nothing_of_it(
    opened: Open, fresh: Callable[[], Path], trained: Path, work: Path
) -> None:
    def prepare() -> tuple[Path, str, str]:
        folder = fresh()
        store = opened(folder)
        kept, going = publish(store, trained), publish(store, trained)
        store.pin(going.ref.name)
        return folder, kept.ref.name, going.ref.name

    outcomes = set()
    retire = lambda made: opened(made[0]).retire(made[2])  # noqa: E731
    for folder, kept, going in each_step(work, prepare, retire):
        store = opened(folder)
        store.collect_garbage()
        names = [one.ref.name for one in whole(store)]
        outcomes.add(going in names)
        assert kept in names
        if going not in names:
            with pytest.raises(NotFound):
                store.resolve(going)
            assert store.pins() == frozenset()
        else:
            store.retire(going)
        store.retire(kept)
        assert left_in(folder) == []
    assert outcomes == {True, False}


def test_a_download_killed_at_any_step_is_done_again(
    fresh: Callable[[], Path], trained: Path, work: Path
) -> None:
    url = f"file://{work}/far"
    name = publish(ObjectStoreAdapterStore(url, work / "publisher"), trained).ref.name
    for cache in each_step(work, fresh, lambda cache: ObjectStoreAdapterStore(url, cache).resolve(name)):
        store = ObjectStoreAdapterStore(url, cache)
        found = Path(store.resolve(name).ref.path)
        assert {path.name for path in found.iterdir()} == {
            "adapter_config.json",
            "adapter_model.safetensors",
            "soma.json",
        }
        store.collect_garbage()
        assert len(left_in(cache)) == 3


def test_a_pin_killed_at_any_step_is_a_pin_or_none(
    fresh: Callable[[], Path], trained: Path, work: Path
) -> None:
    def prepare() -> tuple[FilesystemAdapterStore, str]:
        store = FilesystemAdapterStore(fresh() / "root")
        return store, publish(store, trained).ref.name

    def pin(made: tuple[FilesystemAdapterStore, str]) -> None:
        store, name = made
        for pinned in (True, False, True):
            store.pin(name, pinned)

    for store, name in each_step(work, prepare, pin):
        assert store.pins() <= {name}
        assert [one.ref.name for one in whole(store)] == [name]

"""What every adapter store does, the one in memory that other tests use included."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from uuid import uuid4

import pytest
from fsspec.implementations.memory import MemoryFileSystem
from support.adapter_files import write_adapter
from support.fakes import FakeAdapterStore

from soma_vllm.adapters.store.filesystem import FilesystemAdapterStore
from soma_vllm.adapters.store.manifest import PublishedAdapter
from soma_vllm.adapters.store.object_store import ObjectStoreAdapterStore
from soma_vllm.adapters.store.protocol import AdapterStore
from soma_vllm.errors import NotFound
from soma_vllm.types import SessionKey

KEY, OTHER = SessionKey("alice", "dialogue"), SessionKey("bob", "dialogue")

Open = Callable[[], AdapterStore]


@pytest.fixture(params=["fake", "filesystem", "file", "memory"])
def opened(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Open]:
    """Opens one store again and again, as servers that are started one after another do."""
    kind, url = request.param, f"memory://{uuid4().hex}/adapters"
    if kind == "fake":
        fake = FakeAdapterStore()
        yield lambda: fake
    elif kind == "filesystem":
        yield lambda: FilesystemAdapterStore(tmp_path / "root", owner="us")
    else:
        url = url if kind == "memory" else f"file://{tmp_path}/far"
        yield lambda: ObjectStoreAdapterStore(url, tmp_path / "cache", owner="us")
    MemoryFileSystem.store.clear()


@pytest.fixture
def publish(opened: Open, tmp_path: Path) -> Callable[..., PublishedAdapter]:
    trained = write_adapter(tmp_path / "trained")

    def once(key: SessionKey = KEY) -> PublishedAdapter:
        return opened().publish(key, trained, base_model="small", manifest={"losses": [1.0]})

    return once


Publish = Callable[..., PublishedAdapter]


def test_what_is_published_is_listed_and_outlives_the_server(opened: Open, publish: Publish) -> None:
    assert list(opened().list()) == []
    made = [publish(KEY), publish(OTHER), publish(KEY)]
    assert list(opened().list()) == made
    assert list(opened().list("bob")) == made[1:2]
    assert list(opened().list("nobody")) == []
    assert [one.key for one in made] == [KEY, OTHER, KEY]
    assert [one.version for one in made] == [1, 1, 2]
    assert {(one.base_model, one.owner) for one in made} == {("small", opened().owner)}
    assert all(one.size_bytes > 0 and one.rank > 0 for one in made)


def test_an_adapter_is_found_by_its_name(opened: Open, publish: Publish) -> None:
    made = publish()
    found = opened().resolve(made.ref.name)
    assert (found.ref, found.facts.rank, found.signature) == (made.ref, made.rank, None)
    assert opened().verify(made.ref.name) == opened().get(made.ref.name) == made
    document = opened().manifest(made.ref.name)
    assert (document["name"], document["training"]) == (made.ref.name, {"losses": [1.0]})


def test_a_retired_adapter_is_gone_and_so_is_its_pin(opened: Open, publish: Publish) -> None:
    gone, kept = publish(), publish()
    opened().pin(gone.ref.name)
    opened().retire(gone.ref.name)
    assert list(opened().list()) == [kept]
    assert opened().pins() == frozenset()
    store = opened()
    for verb in (store.get, store.resolve, store.verify, store.manifest, store.pin, store.retire):
        with pytest.raises(NotFound):
            verb(gone.ref.name)


def test_no_name_or_number_comes_back(opened: Open, publish: Publish) -> None:
    made = []
    for _ in range(3):
        made.append(publish())
        opened().retire(made[-1].ref.name)
    assert len({one.ref.name for one in made}) == len({one.ref.number for one in made}) == 3


def test_a_pin_outlives_the_server_and_can_be_taken_back(opened: Open, publish: Publish) -> None:
    first, second = publish(), publish()
    for made in (first, second):
        opened().pin(made.ref.name)
    opened().pin(first.ref.name, pinned=False)
    assert opened().pins() == {second.ref.name}


@pytest.mark.parametrize("name", ["", "soma-x", "../../etc/passwd", "soma-public-0123456789abcdef-v0001-1"])
def test_a_name_that_was_never_given_out_is_not_found(name: str, opened: Open, publish: Publish) -> None:
    publish()
    store = opened()
    for verb in (store.get, store.resolve, store.verify, store.manifest, store.pin, store.retire):
        with pytest.raises(NotFound):
            verb(name)


def test_clearing_up_takes_nothing_that_is_published(opened: Open, publish: Publish) -> None:
    made = publish()
    opened().pin(made.ref.name)
    opened().forget(KEY)
    opened().forget(OTHER)
    assert opened().collect_garbage() == 0
    assert opened().resolve(made.ref.name).ref == made.ref
    assert opened().pins() == {made.ref.name}


def test_a_store_in_service_is_known_to_be(opened: Open) -> None:
    assert not opened().serves()
    with opened().in_service():
        assert opened().serves()
    assert not opened().serves()

"""Publish, never edit: what is listed is whole, and no name or number comes back."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import re
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import pytest
from support.adapter_files import KEY, OTHER, publish
from support.guard import GUARD_S

from soma_vllm.adapters.store.filesystem import FilesystemAdapterStore
from soma_vllm.errors import AdapterError, NotFound
from soma_vllm.types import SessionKey

FORK = multiprocessing.get_context("fork")


def test_a_published_adapter_is_listed_with_all_it_needs(root: Path, trained: Path) -> None:
    adapter = publish(FilesystemAdapterStore(root), trained)
    home = Path(adapter.ref.path)
    assert re.fullmatch(r"soma-public-[0-9a-f]{16}-v0001-1", adapter.ref.name)
    assert adapter.ref.number == 1
    assert home.relative_to(root).parts[::2] == ("public", "v0001")
    assert {path.name for path in home.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "soma.json",
    }
    document = FilesystemAdapterStore(root).manifest(adapter.ref.name)
    assert document == json.loads((home / "soma.json").read_text(encoding="utf-8"))
    assert document["modules"] == ["q_proj", "v_proj"]
    assert document["base_model"] == "tiny-surrogate"
    assert document["training"] == {"hardness": {"1": 0.5}}
    for file, facts in adapter.files().items():
        content = (home / file).read_bytes()
        assert (facts.sha256, facts.size) == (hashlib.sha256(content).hexdigest(), len(content))
    assert adapter.size_bytes == sum(facts.size for facts in adapter.files().values())


def test_a_reopened_store_finds_what_was_published(root: Path, trained: Path) -> None:
    store = FilesystemAdapterStore(root)
    first, other, second = publish(store, trained), publish(store, trained, OTHER), publish(store, trained)
    reopened = FilesystemAdapterStore(root)
    assert [one.ref for one in reopened.list()] == [first.ref, other.ref, second.ref]
    assert reopened.get(second.ref.name).key == KEY
    assert second.version == 2
    assert reopened.list("elsewhere") == ()
    assert len(reopened.list("public")) == 3


def test_an_empty_root_lists_nothing_and_is_not_created_by_looking(root: Path) -> None:
    store = FilesystemAdapterStore(root)
    assert store.list() == ()
    with pytest.raises(NotFound):
        store.get("soma-x")
    assert not root.exists()


def test_sessions_of_two_tenants_never_meet(root: Path, trained: Path) -> None:
    store = FilesystemAdapterStore(root)
    one = publish(store, trained, SessionKey("a" * 64, "same"))
    two = publish(store, trained, SessionKey("b" * 64, "same"))
    assert one.version == two.version == 1
    assert one.ref.name != two.ref.name
    assert [adapter.ref for adapter in store.list("a" * 64)] == [one.ref]


@pytest.mark.parametrize("session", ["../../etc", "/", "..", "", "a/b", "ä\n\0", "\ud800", "x" * 5000])
def test_a_session_id_never_becomes_a_path(session: str, root: Path, trained: Path) -> None:
    key = SessionKey("public", session)
    adapter = publish(FilesystemAdapterStore(root), trained, key)
    assert re.fullmatch(r"[0-9a-f]{16}", Path(adapter.ref.path).parent.name)
    assert Path(adapter.ref.path).is_relative_to(root.resolve())
    assert FilesystemAdapterStore(root).get(adapter.ref.name).key == key


@pytest.mark.parametrize("tenant", ["..", "", ".staging", "a/b", "*", "a\n", "ä", "a" * 129])
def test_a_tenant_that_is_not_a_plain_word_is_refused(tenant: str, root: Path, trained: Path) -> None:
    with pytest.raises(AdapterError, match="tenant: found"):
        publish(FilesystemAdapterStore(root), trained, SessionKey(tenant, "s"))
    with pytest.raises(AdapterError, match="tenant: found"):
        FilesystemAdapterStore(root).list(tenant)


def test_numbers_and_names_are_not_given_out_again_after_retirement_and_restart(
    root: Path, trained: Path
) -> None:
    seen = set()
    for expected in range(1, 5):
        store = FilesystemAdapterStore(root)
        adapter = publish(store, trained)
        assert adapter.ref.number == expected
        assert adapter.version == expected
        assert adapter.ref.name not in seen
        seen.add(adapter.ref.name)
        store.retire(adapter.ref.name)
    assert FilesystemAdapterStore(root).list() == ()


def test_a_lost_counter_starts_above_what_is_published(root: Path, trained: Path) -> None:
    store = FilesystemAdapterStore(root)
    for _ in range(3):
        publish(store, trained)
    (root / ".number").unlink()
    assert publish(FilesystemAdapterStore(root), trained).ref.number == 4


def test_a_damaged_counter_stops_publication_rather_than_reuse_a_number(root: Path, trained: Path) -> None:
    store = FilesystemAdapterStore(root)
    publish(store, trained)
    (root / ".number").write_text("", encoding="utf-8")
    with pytest.raises(AdapterError, match="expected the last number given out"):
        publish(store, trained)
    assert len(store.list()) == 1


def _publish_some(root: Path, trained: Path, count: int) -> list[tuple[int, int, str]]:
    store = FilesystemAdapterStore(root)
    done = [publish(store, trained) for _ in range(count)]
    return [(adapter.ref.number, adapter.version, adapter.ref.name) for adapter in done]


def test_two_processes_publishing_at_once_share_no_number_version_or_name(root: Path, trained: Path) -> None:
    with ProcessPoolExecutor(2, mp_context=FORK) as pool:
        jobs = [pool.submit(_publish_some, root, trained, 8) for _ in range(2)]
        published = [row for job in jobs for row in job.result(timeout=GUARD_S)]
    assert [len(set(column)) for column in zip(*published, strict=True)] == [16, 16, 16]
    assert len(FilesystemAdapterStore(root).list()) == 16


def test_threads_of_one_store_share_no_number(root: Path, trained: Path) -> None:
    store = FilesystemAdapterStore(root)
    with ThreadPoolExecutor(4) as pool:
        numbers = [one.ref.number for one in pool.map(lambda _: publish(store, trained), range(12))]
    assert sorted(numbers) == list(range(1, 13))


def test_one_process_sees_what_another_published_and_retired(root: Path, trained: Path) -> None:
    ours, theirs = FilesystemAdapterStore(root), FilesystemAdapterStore(root)
    name = publish(theirs, trained).ref.name
    assert ours.get(name).ref.name == name
    theirs.retire(name)
    with pytest.raises(NotFound):
        ours.get(name)
    with pytest.raises(NotFound):
        ours.retire(name)

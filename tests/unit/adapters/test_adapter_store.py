"""Publish, never edit: what is listed is whole, and no name or number comes back."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import json
import multiprocessing
import os
import re
import shutil
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from support.adapter_files import BASE_MODEL, write_adapter
from support.guard import GUARD_S

from soma_vllm.adapters.file_provider import AdapterFileProvider
from soma_vllm.adapters.store.filesystem import FilesystemAdapterStore
from soma_vllm.adapters.store.manifest import PublishedAdapter
from soma_vllm.adapters.store.verify import Demands
from soma_vllm.errors import AdapterError, AdapterRejected, InUse, NotFound
from soma_vllm.maintenance.sweep_trigger import SweepTrigger
from soma_vllm.types import CONFIG, WEIGHTS, SessionKey

KEY = SessionKey("public", "dialogue-7")
OTHER = SessionKey("public", "dialogue-8")
FORK = multiprocessing.get_context("fork")


def publish(store: FilesystemAdapterStore, trained: Path, key: SessionKey = KEY) -> PublishedAdapter:
    return store.publish(key, trained, base_model="tiny-surrogate", manifest={"hardness": {1: 0.5}})


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    return write_adapter(tmp_path / "trained")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "store"


def files_under(root: Path) -> list[str]:
    """Every file but the store's own counters and lock."""
    own = {".number", ".version", ".lock"}
    return sorted(str(p.relative_to(root)) for p in root.rglob("*") if p.is_file() and p.name not in own)


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


def full_disk_at(file: str) -> Callable[[Path, bytes], None]:
    def write(target: Path, content: bytes) -> None:
        if target.name == file:
            target.write_bytes(content[:10])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        target.write_bytes(content)

    return write


def manifest_blocked(target: Path, content: bytes) -> None:
    (target.parent / "soma.json").mkdir(exist_ok=True)
    target.write_bytes(content)


def bits_flipped_in(file: str) -> Callable[[Path, bytes], None]:
    def write(target: Path, content: bytes) -> None:
        target.write_bytes(content[:-1] + b"\x01" if target.name == file else content)

    return write


@pytest.mark.parametrize(
    ("write", "expected"),
    [
        (full_disk_at("adapter_config.json"), "No space left on device"),
        (full_disk_at("adapter_model.safetensors"), "No space left on device"),
        (manifest_blocked, "Is a directory"),
    ],
)
def test_a_failed_publication_leaves_nothing_behind(
    write: Callable[[Path, bytes], None], expected: str, root: Path, trained: Path
) -> None:
    with pytest.raises(AdapterError, match=expected):
        publish(FilesystemAdapterStore(root, write=write), trained)
    store = FilesystemAdapterStore(root)
    assert store.list() == ()
    assert files_under(root) == []
    assert publish(store, trained).ref.number == 2, "the failed publication's number stays spent"


@pytest.mark.parametrize("file", [WEIGHTS, CONFIG])
def test_bits_that_flip_on_their_way_to_the_disk_are_found_before_an_engine_reads_them(
    file: str, root: Path, trained: Path
) -> None:
    store = FilesystemAdapterStore(root, write=bits_flipped_in(file))
    adapter = publish(store, trained)
    with pytest.raises(AdapterRejected, match=f"{file}: expected SHA-256"):
        store.resolve(adapter.ref.name)


def test_what_is_published_is_what_was_verified_even_where_the_trainer_goes_on(
    root: Path, trained: Path
) -> None:
    def write(target: Path, content: bytes) -> None:
        (trained / WEIGHTS).write_bytes(b"another step")
        target.write_bytes(content)

    store = FilesystemAdapterStore(root, write=write)
    store.verify(publish(store, trained).ref.name)


def test_the_weights_are_read_and_hashed_once_when_published_and_once_for_each_load(
    root: Path, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = (trained / WEIGHTS).stat().st_size
    digests, reads, active = [0], [0], [True]
    digest = hashlib.sha256

    def counted(content: bytes = b"", **named: Any) -> Any:
        digests[0] += len(content) == size
        return digest(content, **named)

    def watch(event: str, arguments: tuple[object, ...]) -> None:
        if active and event == "open" and str(arguments[0]).endswith(WEIGHTS):
            reads[0] += arguments[1] in ("r", "rb")

    monkeypatch.setattr(hashlib, "sha256", counted)
    sys.addaudithook(watch)
    store = FilesystemAdapterStore(root)
    name = publish(store, trained).ref.name
    assert (digests, reads) == ([1], [1]), "the trainer's file"
    for loads in (1, 2):
        asyncio.run(AdapterFileProvider(store, SweepTrigger(), Meter()).ensure_local(store.get(name).ref))
        assert (digests, reads) == ([1 + loads], [1 + loads]), "the published one"
    active.clear()


class Meter:
    def fetched(self, seconds: float) -> None:
        assert seconds > 0


def test_a_place_already_taken_is_never_overwritten(root: Path, trained: Path) -> None:
    def take_the_place(target: Path, content: bytes) -> None:
        target.write_bytes(content)
        home = next(path for path in (root / "public").iterdir())
        (home / "v0001").mkdir(exist_ok=True)
        (home / "v0001" / "mine").touch()

    with pytest.raises(AdapterError, match="not empty"):
        publish(FilesystemAdapterStore(root, write=take_the_place), trained)
    assert [Path(path).name for path in files_under(root)] == ["mine"]


def test_an_unwritable_root_is_told_as_an_adapter_error(tmp_path: Path, trained: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(AdapterError, match="not published to"):
        publish(FilesystemAdapterStore(tmp_path / "file"), trained)


def test_a_publication_under_way_is_not_taken_for_garbage(root: Path, trained: Path) -> None:
    swept = []

    def write(target: Path, content: bytes) -> None:
        swept.append(FilesystemAdapterStore(root).collect_garbage())
        target.write_bytes(content)

    adapter = publish(FilesystemAdapterStore(root, write=write), trained)
    assert swept == [0, 0, 0]
    FilesystemAdapterStore(root).verify(adapter.ref.name)


def test_publishing_sweeps_up_an_interrupted_retirement(root: Path, trained: Path) -> None:
    store = FilesystemAdapterStore(root)
    gone = Path(publish(store, trained).ref.path)
    gone.rename(root / ".staging" / "retired-1")
    assert store.list() == ()
    adapter = publish(store, trained)
    assert len(files_under(root)) == 3
    assert [one.ref for one in store.list()] == [adapter.ref]


def test_unfit_files_are_refused_before_anything_is_allocated(root: Path, tmp_path: Path) -> None:
    store = FilesystemAdapterStore(root, demands=Demands(max_rank=2))
    with pytest.raises(AdapterRejected, match="expected at most 2"):
        publish(store, write_adapter(tmp_path / "big"))
    assert not root.exists()


def test_the_base_model_is_demanded_where_the_store_is_told_it(root: Path, trained: Path) -> None:
    publish(FilesystemAdapterStore(root, demands=Demands(base_model=BASE_MODEL)), trained)
    with pytest.raises(AdapterRejected, match="base_model_name_or_path"):
        publish(FilesystemAdapterStore(root, demands=Demands(base_model="another")), trained)


@pytest.mark.parametrize("manifest", [{"loss": float("nan")}, {"when": object()}])
def test_a_manifest_that_json_cannot_hold_is_refused(
    manifest: dict[str, object], root: Path, trained: Path
) -> None:
    with pytest.raises(AdapterError, match="manifest cannot be written"):
        FilesystemAdapterStore(root).publish(KEY, trained, base_model="m", manifest=manifest)
    assert not root.exists()


def spoilt(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1] + b"\x7f")


@pytest.mark.parametrize("file", ["adapter_config.json", "adapter_model.safetensors"])
@pytest.mark.parametrize(
    ("spoil", "problem"),
    [
        (Path.unlink, "is missing"),
        (lambda path: path.write_bytes(path.read_bytes()[:20]), "found 20 bytes; expected"),
        (spoilt, "expected SHA-256"),
    ],
)
def test_files_that_were_deleted_cut_off_or_changed_after_publication_are_rejected_and_can_be_retired(
    file: str, spoil: Callable[[Path], object], problem: str, root: Path, trained: Path
) -> None:
    store = FilesystemAdapterStore(root)
    adapter, other = publish(store, trained), publish(store, trained)
    spoil(Path(adapter.ref.path) / file)
    with pytest.raises(AdapterRejected, match=problem):
        store.resolve(adapter.ref.name)
    with pytest.raises(AdapterRejected):
        store.verify(adapter.ref.name)
    assert store.get(adapter.ref.name) == adapter, "the manifest is whole"
    store.retire(adapter.ref.name)
    assert store.list() == (other,)
    assert not Path(adapter.ref.path).exists()


@pytest.mark.parametrize("manifest", [b"", b"{}", b'{"format": 1}', b"\xff"])
def test_an_adapter_whose_manifest_is_spoilt_is_not_there_and_can_still_be_retired(
    manifest: bytes, root: Path, trained: Path
) -> None:
    store = FilesystemAdapterStore(root)
    adapter = publish(store, trained)
    (Path(adapter.ref.path) / "soma.json").write_bytes(manifest)
    for look in (store.get, store.resolve, store.verify, store.manifest, store.pin):
        with pytest.raises(NotFound):
            look(adapter.ref.name)
    store.retire(adapter.ref.name)
    assert files_under(root) == []


def test_links_that_a_trainer_left_are_refused(root: Path, trained: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret.safetensors"
    (trained / "adapter_model.safetensors").rename(secret)
    (trained / "adapter_model.safetensors").symlink_to(secret)
    with pytest.raises(AdapterRejected, match="is a link; expected a file of"):
        publish(FilesystemAdapterStore(root), trained)
    assert not root.exists()


@pytest.mark.parametrize(
    "name",
    [
        "",
        "soma-x",
        "../../etc/passwd",
        "soma-../..-0123456789abcdef-v0001-1",
        "soma-public-0123456789abcdef-v0001-1/..",
        "soma-public-0123456789abcdef-v1-1",
        "soma-public-0123456789abcdef-v0001-01",
        "soma-public-0123456789abcdef-v0001-\u0661",
        "soma-public-0123456789abcdef-v0001-1",
    ],
)
def test_a_name_that_was_never_given_out_names_no_place(name: str, root: Path, trained: Path) -> None:
    store = FilesystemAdapterStore(root)
    publish(store, trained)
    for verb in (store.get, store.resolve, store.retire, store.verify, store.pin):
        with pytest.raises(NotFound):
            verb(name)
    assert len(store.list()) == 1


def test_a_name_with_another_ones_number_is_not_found(root: Path, trained: Path) -> None:
    store = FilesystemAdapterStore(root)
    adapter = publish(store, trained)
    with pytest.raises(NotFound):
        store.retire(adapter.ref.name[:-1] + "7")
    assert store.list() == (adapter,)


def test_a_tenant_may_have_any_plain_word_for_a_name(root: Path, trained: Path) -> None:
    store = FilesystemAdapterStore(root)
    for tenant in ("v0001-17", "a-0123456789abcdef-v0001-1", "soma-x_y", "A" * 128):
        adapter = publish(store, trained, SessionKey(tenant, "s"))
        assert store.get(adapter.ref.name) == adapter


def test_a_pinned_adapter_stays_pinned_until_it_is_let_go_or_retired(root: Path, trained: Path) -> None:
    store = FilesystemAdapterStore(root)
    first, second = publish(store, trained), publish(store, trained)
    for adapter in (first, second):
        store.pin(adapter.ref.name)
    assert FilesystemAdapterStore(root).pins() == {first.ref.name, second.ref.name}
    store.pin(first.ref.name, pinned=False)
    store.retire(second.ref.name)
    assert store.pins() == frozenset()


def test_a_root_in_service_is_known_to_be_and_only_while_it_is(root: Path) -> None:
    store, other = FilesystemAdapterStore(root, owner="us"), FilesystemAdapterStore(root, owner="them")
    assert not other.serves()
    with store.in_service(), other.in_service():
        assert FilesystemAdapterStore(root).serves()
    assert not other.serves()


def test_a_root_is_served_from_by_one_server_of_each_record(root: Path) -> None:
    with (
        FilesystemAdapterStore(root, owner="us").in_service(),
        pytest.raises(InUse, match="found another server of record us; expected none"),
        FilesystemAdapterStore(root, owner="us").in_service(),
    ):
        pass


def test_one_of_many_is_found_published_and_retired_without_a_look_at_the_others(
    root: Path, trained: Path
) -> None:
    store = FilesystemAdapterStore(root)
    names = [publish(store, trained, SessionKey("public", str(n))).ref.name for n in range(30)]
    opened: list[str] = []
    listed: list[str] = []
    active = [True]

    def watch(event: str, arguments: tuple[object, ...]) -> None:
        if active and str(arguments[0] if arguments else "").startswith(str(root)):
            if event == "open":
                opened.append(str(arguments[0]))
            elif event in ("os.listdir", "os.scandir"):
                listed.append(str(arguments[0]))

    sys.addaudithook(watch)
    fresh = FilesystemAdapterStore(root)
    fresh.get(names[7])
    assert (len(opened), listed) == (1, []), "its manifest"
    fresh.resolve(names[8])
    assert (len(opened), listed) == (4, []), "its manifest, its configuration, its weights"
    opened.clear()
    assert len(fresh.list()) == 30
    assert len(opened) == 30, "every manifest, once"
    listed.clear()
    publish(store, trained, SessionKey("public", "7"))
    store.retire(names[0])
    store.forget(SessionKey("public", "0"))
    assert {str(root), str(root / "public")}.isdisjoint(listed), "no other session's folder is looked for"
    active.clear()


def test_a_listing_follows_what_others_publish_retire_and_forget(root: Path, trained: Path) -> None:
    ours, theirs = FilesystemAdapterStore(root), FilesystemAdapterStore(root)
    assert ours.list() == ()
    for _ in range(3):
        first = publish(theirs, trained)
        second = publish(theirs, trained, SessionKey("another", "s"))
        assert ours.list() == (first, second)
        assert ours.list("another") == (second,)
        theirs.retire(first.ref.name)
        assert ours.list() == (second,)
        theirs.forget(KEY)
        again = publish(theirs, trained)
        assert again.ref.path == first.ref.path
        assert ours.list() == (second, again)
        for adapter in (again, second):
            theirs.retire(adapter.ref.name)
        theirs.forget(KEY)
        shutil.rmtree(root / "another")
        assert ours.list() == ours.list("another") == ()


def test_what_people_delete_by_hand_is_missed(root: Path, trained: Path) -> None:
    store = FilesystemAdapterStore(root)
    by_hand, kept = publish(store, trained), publish(store, trained, OTHER)
    assert store.list() == (by_hand, kept)
    shutil.rmtree(by_hand.ref.path)
    with pytest.raises(NotFound):
        store.get(by_hand.ref.name)
    assert store.list() == (kept,)


def test_a_foreign_folder_or_a_spoiled_manifest_is_left_out_of_the_listing(
    root: Path, trained: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = FilesystemAdapterStore(root)
    spoiled, sound = publish(store, trained), publish(store, trained)
    (Path(spoiled.ref.path) / "soma.json").write_text("{}", encoding="utf-8")
    (Path(sound.ref.path).parent / "vacation").mkdir()
    assert [one.ref for one in FilesystemAdapterStore(root).list()] == [sound.ref]
    assert "not a manifest of format 2" in caplog.text


def test_retiring_deletes_the_files_and_only_those(root: Path, trained: Path) -> None:
    store = FilesystemAdapterStore(root)
    first, second = publish(store, trained), publish(store, trained)
    store.retire(first.ref.name)
    assert not Path(first.ref.path).exists()
    with pytest.raises(NotFound):
        store.get(first.ref.name)
    with pytest.raises(NotFound):
        store.retire(first.ref.name)
    assert store.verify(second.ref.name).ref == second.ref
    assert len(files_under(root)) == 3


def test_a_forgotten_session_leaves_no_trace_and_one_that_has_adapters_is_not_forgotten(
    root: Path, trained: Path
) -> None:
    store = FilesystemAdapterStore(root)
    mine, other = publish(store, trained), publish(store, trained, OTHER)
    store.forget(KEY)
    assert store.get(mine.ref.name) == mine
    store.retire(mine.ref.name)
    store.forget(KEY)
    store.forget(KEY)
    assert not Path(mine.ref.path).parent.exists()
    again = publish(store, trained)
    assert again.ref.path == mine.ref.path, "the place may come again, the name never does"
    assert again.ref.name != mine.ref.name
    assert store.list() == (other, again)

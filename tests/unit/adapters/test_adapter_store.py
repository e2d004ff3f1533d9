"""Publish, never edit: what is listed is whole, and no name or number comes back."""

from __future__ import annotations

import errno
import hashlib
import json
import multiprocessing
import os
import re
import shutil
import signal
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import pytest
from adapter_files import BASE_MODEL, tensors, write_adapter

from soma_vllm.adapters.manifest import PublishedAdapter
from soma_vllm.adapters.store import AdapterStore
from soma_vllm.adapters.verify import Demands
from soma_vllm.errors import AdapterError, AdapterRejected, NotFound
from soma_vllm.types import SessionKey

KEY = SessionKey("public", "dialogue-7")
OTHER = SessionKey("public", "dialogue-8")
SPAWN = multiprocessing.get_context("spawn")


def publish(store: AdapterStore, trained: Path, key: SessionKey = KEY) -> PublishedAdapter:
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
    adapter = publish(AdapterStore(root), trained)
    home = Path(adapter.ref.path)
    assert re.fullmatch(r"soma-public-[0-9a-f]{16}-v0001-1", adapter.ref.name)
    assert adapter.ref.number == 1
    assert home.relative_to(root).parts[::2] == ("public", "v0001")
    assert {path.name for path in home.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "soma.json",
    }
    document = AdapterStore(root).manifest(adapter.ref.name)
    assert document == json.loads((home / "soma.json").read_text(encoding="utf-8"))
    assert document["modules"] == ["q_proj", "v_proj"]
    assert document["base_model"] == "tiny-surrogate"
    assert document["training"] == {"hardness": {"1": 0.5}}
    for file, facts in adapter.files().items():
        content = (home / file).read_bytes()
        assert (facts.sha256, facts.size) == (hashlib.sha256(content).hexdigest(), len(content))
    assert adapter.size_bytes == sum(facts.size for facts in adapter.files().values())


def test_a_reopened_store_finds_what_was_published(root: Path, trained: Path) -> None:
    store = AdapterStore(root)
    first, other, second = publish(store, trained), publish(store, trained, OTHER), publish(store, trained)
    reopened = AdapterStore(root)
    assert [one.ref for one in reopened.list()] == [first.ref, other.ref, second.ref]
    assert reopened.get(second.ref.name).key == KEY
    assert second.version == 2
    latest = reopened.latest(KEY)
    assert latest is not None
    assert latest.ref == second.ref
    assert reopened.latest(SessionKey("public", "nobody")) is None
    assert reopened.list("elsewhere") == ()
    assert len(reopened.list("public")) == 3


def test_an_empty_root_lists_nothing_and_is_not_created_by_looking(root: Path) -> None:
    store = AdapterStore(root)
    assert store.list() == ()
    assert store.latest(KEY) is None
    with pytest.raises(NotFound):
        store.get("soma-x")
    assert not root.exists()


def test_sessions_of_two_tenants_never_meet(root: Path, trained: Path) -> None:
    store = AdapterStore(root)
    one = publish(store, trained, SessionKey("a" * 64, "same"))
    two = publish(store, trained, SessionKey("b" * 64, "same"))
    assert one.version == two.version == 1
    assert one.ref.name != two.ref.name
    assert [adapter.ref for adapter in store.list("a" * 64)] == [one.ref]


@pytest.mark.parametrize("session", ["../../etc", "/", "..", "", "a/b", "ä\n\0", "\ud800", "x" * 5000])
def test_a_session_id_never_becomes_a_path(session: str, root: Path, trained: Path) -> None:
    key = SessionKey("public", session)
    adapter = publish(AdapterStore(root), trained, key)
    assert re.fullmatch(r"[0-9a-f]{16}", Path(adapter.ref.path).parent.name)
    assert Path(adapter.ref.path).is_relative_to(root.resolve())
    latest = AdapterStore(root).latest(key)
    assert latest is not None
    assert latest.key == key


@pytest.mark.parametrize("tenant", ["..", "", ".staging", "a/b", "*", "a\n", "ä", "a" * 129])
def test_a_tenant_that_is_not_a_plain_word_is_refused(tenant: str, root: Path, trained: Path) -> None:
    with pytest.raises(AdapterError, match="tenant: found"):
        publish(AdapterStore(root), trained, SessionKey(tenant, "s"))
    with pytest.raises(AdapterError, match="tenant: found"):
        AdapterStore(root).list(tenant)


def test_numbers_and_names_are_not_given_out_again_after_retirement_and_restart(
    root: Path, trained: Path
) -> None:
    seen = set()
    for expected in range(1, 5):
        store = AdapterStore(root)
        adapter = publish(store, trained)
        assert adapter.ref.number == expected
        assert adapter.version == expected
        assert adapter.ref.name not in seen
        seen.add(adapter.ref.name)
        store.retire(adapter.ref.name)
    assert AdapterStore(root).list() == ()


def test_a_lost_counter_starts_above_what_is_published(root: Path, trained: Path) -> None:
    store = AdapterStore(root)
    for _ in range(3):
        publish(store, trained)
    (root / ".number").unlink()
    assert publish(AdapterStore(root), trained).ref.number == 4


def test_a_damaged_counter_stops_publication_rather_than_reuse_a_number(root: Path, trained: Path) -> None:
    store = AdapterStore(root)
    publish(store, trained)
    (root / ".number").write_text("", encoding="utf-8")
    with pytest.raises(AdapterError, match="expected the last number given out"):
        publish(store, trained)
    assert len(store.list()) == 1


def _publish_some(root: Path, trained: Path, count: int) -> list[tuple[int, int, str]]:
    store = AdapterStore(root)
    done = [publish(store, trained) for _ in range(count)]
    return [(adapter.ref.number, adapter.version, adapter.ref.name) for adapter in done]


def test_two_processes_publishing_at_once_share_no_number_version_or_name(root: Path, trained: Path) -> None:
    with ProcessPoolExecutor(2, mp_context=SPAWN) as pool:
        jobs = [pool.submit(_publish_some, root, trained, 8) for _ in range(2)]
        published = [row for job in jobs for row in job.result(timeout=120)]
    assert [len(set(column)) for column in zip(*published, strict=True)] == [16, 16, 16]
    assert len(AdapterStore(root).list()) == 16


def test_threads_of_one_store_share_no_number(root: Path, trained: Path) -> None:
    store = AdapterStore(root)
    with ThreadPoolExecutor(4) as pool:
        numbers = [one.ref.number for one in pool.map(lambda _: publish(store, trained), range(12))]
    assert sorted(numbers) == list(range(1, 13))


def test_one_process_sees_what_another_published_and_retired(root: Path, trained: Path) -> None:
    ours, theirs = AdapterStore(root), AdapterStore(root)
    name = publish(theirs, trained).ref.name
    assert ours.get(name).ref.name == name
    theirs.retire(name)
    with pytest.raises(NotFound):
        ours.get(name)
    with pytest.raises(NotFound):
        ours.retire(name)


def full_disk_at(file: str) -> Callable[[Path, Path], None]:
    def copy(source: Path, target: Path) -> None:
        if target.name == file:
            target.write_bytes(source.read_bytes()[:10])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        shutil.copyfile(source, target)

    return copy


def manifest_blocked(source: Path, target: Path) -> None:
    shutil.copyfile(source, target)
    (target.parent / "soma.json").mkdir(exist_ok=True)


def bits_flipped(source: Path, target: Path) -> None:
    target.write_bytes(source.read_bytes()[:-1] + b"\x01")


@pytest.mark.parametrize(
    ("copy", "expected"),
    [
        (full_disk_at("adapter_config.json"), "No space left on device"),
        (full_disk_at("adapter_model.safetensors"), "No space left on device"),
        (manifest_blocked, "Is a directory"),
        (bits_flipped, "weights changed on the way"),
    ],
)
def test_a_failed_publication_leaves_nothing_behind(
    copy: Callable[[Path, Path], None], expected: str, root: Path, trained: Path
) -> None:
    with pytest.raises(AdapterError, match=expected):
        publish(AdapterStore(root, copy=copy), trained)
    store = AdapterStore(root)
    assert store.list() == ()
    assert files_under(root) == []
    assert publish(store, trained).ref.number == 2, "the failed publication's number stays spent"


def test_a_place_already_taken_is_never_overwritten(root: Path, trained: Path) -> None:
    def take_the_place(source: Path, target: Path) -> None:
        shutil.copyfile(source, target)
        home = next(path for path in (root / "public").iterdir())
        (home / "v0001").mkdir(exist_ok=True)
        (home / "v0001" / "mine").touch()

    with pytest.raises(AdapterError, match="not empty"):
        publish(AdapterStore(root, copy=take_the_place), trained)
    assert [Path(path).name for path in files_under(root)] == ["mine"]


def test_an_unwritable_root_is_told_as_an_adapter_error(tmp_path: Path, trained: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(AdapterError, match="not published to"):
        publish(AdapterStore(tmp_path / "file"), trained)


def _publish_and_die(root: Path, trained: Path, at: str) -> None:
    def copy(source: Path, target: Path) -> None:
        shutil.copyfile(source, target)
        if target.name == at:
            os.kill(os.getpid(), signal.SIGKILL)

    publish(AdapterStore(root, copy=copy), trained)


@pytest.mark.parametrize("at", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_killed_publication_is_never_listed_and_is_swept_up(at: str, root: Path, trained: Path) -> None:
    process = SPAWN.Process(target=_publish_and_die, args=(root, trained, at))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    store = AdapterStore(root)
    assert files_under(root) != []
    assert store.list() == ()
    assert store.collect_garbage() == 1
    assert files_under(root) == []
    assert publish(store, trained).ref.number == 2


def test_a_publication_under_way_is_not_taken_for_garbage(root: Path, trained: Path) -> None:
    swept = []

    def copy(source: Path, target: Path) -> None:
        swept.append(AdapterStore(root).collect_garbage())
        shutil.copyfile(source, target)

    adapter = publish(AdapterStore(root, copy=copy), trained)
    assert swept == [0, 0]
    AdapterStore(root).verify(adapter.ref.name)


def test_publishing_sweeps_up_an_interrupted_retirement(root: Path, trained: Path) -> None:
    store = AdapterStore(root)
    gone = Path(publish(store, trained).ref.path)
    gone.rename(root / ".staging" / "retired-1")
    assert store.list() == ()
    adapter = publish(store, trained)
    assert len(files_under(root)) == 3
    assert [one.ref for one in store.list()] == [adapter.ref]


def test_unfit_files_are_refused_before_anything_is_allocated(root: Path, tmp_path: Path) -> None:
    store = AdapterStore(root, demands=Demands(max_rank=2))
    with pytest.raises(AdapterRejected, match="expected at most 2"):
        publish(store, write_adapter(tmp_path / "big"))
    assert not root.exists()


def test_the_base_model_is_demanded_where_the_store_is_told_it(root: Path, trained: Path) -> None:
    publish(AdapterStore(root, demands=Demands(base_model=BASE_MODEL)), trained)
    with pytest.raises(AdapterRejected, match="base_model_name_or_path"):
        publish(AdapterStore(root, demands=Demands(base_model="another")), trained)


@pytest.mark.parametrize("manifest", [{"loss": float("nan")}, {"when": object()}])
def test_a_manifest_that_json_cannot_hold_is_refused(
    manifest: dict[str, object], root: Path, trained: Path
) -> None:
    with pytest.raises(AdapterError, match="manifest cannot be written"):
        AdapterStore(root).publish(KEY, trained, base_model="m", manifest=manifest)
    assert not root.exists()


def test_an_edited_adapter_no_longer_verifies(root: Path, trained: Path) -> None:
    store = AdapterStore(root)
    adapter = publish(store, trained)
    assert store.verify(adapter.ref.name) == adapter
    write_adapter(Path(adapter.ref.path), tensors(fill=0.25))
    with pytest.raises(AdapterRejected, match=f"expected SHA-256 {adapter.weights.sha256}"):
        store.verify(adapter.ref.name)


def test_a_foreign_folder_or_a_spoiled_manifest_is_left_out_of_the_listing(
    root: Path, trained: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = AdapterStore(root)
    spoiled, sound = publish(store, trained), publish(store, trained)
    (Path(spoiled.ref.path) / "soma.json").write_text("{}", encoding="utf-8")
    (Path(sound.ref.path).parent / "vacation").mkdir()
    assert [one.ref for one in AdapterStore(root).list()] == [sound.ref]
    assert "not a manifest of format 2" in caplog.text


def test_retiring_deletes_the_files_and_only_those(root: Path, trained: Path) -> None:
    store = AdapterStore(root)
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
    store = AdapterStore(root)
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

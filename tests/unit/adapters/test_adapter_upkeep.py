"""What is published afterwards: damage, names, pins, servers of one root, listings, removal."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from support.adapter_files import KEY, OTHER, publish

from soma_vllm.adapters.store.filesystem import FilesystemAdapterStore
from soma_vllm.errors import AdapterRejected, InUse, NotFound
from soma_vllm.types import SessionKey


def files_under(root: Path) -> list[str]:
    """Every file but the store's own counters and lock."""
    own = {".number", ".version", ".lock"}
    return sorted(str(p.relative_to(root)) for p in root.rglob("*") if p.is_file() and p.name not in own)


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

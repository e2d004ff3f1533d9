"""A publication is whole, verified and hashed once, or leaves nothing behind."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.adapter_files import BASE_MODEL, KEY, publish, write_adapter

from soma_vllm.adapters.file_provider import AdapterFileProvider
from soma_vllm.adapters.store.filesystem import FilesystemAdapterStore
from soma_vllm.adapters.store.verify import Demands
from soma_vllm.errors import AdapterError, AdapterRejected
from soma_vllm.maintenance.sweep_trigger import SweepTrigger
from soma_vllm.types import CONFIG, WEIGHTS


def files_under(root: Path) -> list[str]:
    """Every file but the store's own counters and lock."""
    own = {".number", ".version", ".lock"}
    return sorted(str(p.relative_to(root)) for p in root.rglob("*") if p.is_file() and p.name not in own)


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

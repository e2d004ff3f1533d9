"""The adapters of one session record under a root that others share."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
from support.adapter_files import write_adapter

from soma_vllm.adapters.store.facade import RecordShelf
from soma_vllm.adapters.store.filesystem import AdapterStore
from soma_vllm.errors import ConfigError, NotFound
from soma_vllm.sessions.sql.connections import identity
from soma_vllm.types import SessionKey

KEY = SessionKey("public", "s")


def adapter_store(root: Path, record: str) -> RecordShelf:
    return RecordShelf(AdapterStore(root / "adapters", owner=record))


def test_every_adapter_says_for_which_record_it_was_published(tmp_path: Path) -> None:
    trained = write_adapter(tmp_path / "trained")
    made = {
        record: adapter_store(tmp_path, record).publish(KEY, trained, base_model="small", manifest={"steps": 4})
        for record in ("ours", "theirs", "")
    }
    owners = {one.ref.name: one.owner for one in adapter_store(tmp_path, "ours").list()}
    assert owners == {ref.name: record for record, ref in made.items()}


def test_an_adapter_that_was_deleted_is_not_there_and_may_be_deleted_again(tmp_path: Path) -> None:
    ours = adapter_store(tmp_path, "ours")
    ref = ours.publish(KEY, write_adapter(tmp_path / "trained"), base_model="small", manifest={})
    assert ours.resolve(ref.name).ref == ref
    for _ in range(2):
        ours.retire(ref.name)
    assert list(ours.list()) == []
    with pytest.raises(NotFound):
        ours.resolve(ref.name)


def test_what_a_killed_training_left_is_cleared_away_and_anothers_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    ours, theirs = adapter_store(tmp_path, "a" * 32), adapter_store(tmp_path, "b" * 32)
    left = [Path(one.workplace()) for one in (ours, theirs)]
    (left[0] / "adapter_model.safetensors").write_bytes(b"half")
    adapter_store(tmp_path, "a" * 32).clear()
    assert [path.exists() for path in left] == [False, True]


def test_a_record_is_the_same_one_from_wherever_it_is_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert identity("sqlite+aiosqlite:///s.db") == identity(f"sqlite+aiosqlite:///{tmp_path}/s.db")
    assert identity("sqlite+aiosqlite:///s.db") != identity("sqlite+aiosqlite:///t.db")
    passwords = [identity(f"postgresql+asyncpg://me:{word}@host/db") for word in ("old", "new")]
    assert passwords[0] == passwords[1] != identity("postgresql+asyncpg://me:old@host/other")
    with pytest.raises(ConfigError):
        identity("no url")

"""Where trainings work, and whose they are after a crash."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any, cast

import pytest

from soma_vllm.adapters.leases import AdapterLeases
from soma_vllm.adapters.lifecycle import AdapterLifecycle
from soma_vllm.adapters.store.filesystem import FilesystemAdapterStore
from soma_vllm.errors import ConfigError
from soma_vllm.sessions.sql.connections import identity


def lifecycle(root: Path, owner: str) -> AdapterLifecycle:
    nothing = cast(Any, None)
    store = FilesystemAdapterStore(root / "adapters", owner=owner)
    return AdapterLifecycle(store, nothing, AdapterLeases(1), nothing)


async def test_what_a_killed_training_left_is_cleared_away_and_anothers_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    ours, theirs = lifecycle(tmp_path, "a" * 32), lifecycle(tmp_path, "b" * 32)
    left = [Path(one.workplace()) for one in (ours, theirs)]
    (left[0] / "adapter_model.safetensors").write_bytes(b"half")
    await lifecycle(tmp_path, "a" * 32).collect_garbage()
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

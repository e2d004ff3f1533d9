"""Where trainings work, and whose they are after a crash."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any, cast

import pytest

from soma_vllm.adapters.leases import AdapterLeases
from soma_vllm.adapters.lifecycle import AdapterLifecycle
from soma_vllm.adapters.store.filesystem import FilesystemAdapterStore


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

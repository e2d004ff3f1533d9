"""An adapter as a trainer leaves it, and a place for a store."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.adapter_files import write_adapter


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    return write_adapter(tmp_path / "trained")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "store"

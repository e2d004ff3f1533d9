"""A real server behind an external original, one for the whole test session."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from support.marker_original import MarkerOriginal
from support.server import TINY, Running, marker_settings, serving


@pytest.fixture(scope="session")
def marker_server(tiny_models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A real surrogate and real trainers behind an external original that answers in markers."""
    folder = tmp_path_factory.mktemp("marker")
    with MarkerOriginal() as original, serving(folder, TINY, marker_settings(original.url)) as running:
        yield running

"""A real server behind an external original, one for the whole test session."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from support.marker_original import MarkerOriginal
from support.server import TINY, Running, serving


@pytest.fixture(scope="session")
def marker_server(tiny_models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A real surrogate and real trainers behind an external original that answers in markers."""
    with MarkerOriginal() as original:
        settings = {
            "original_model": None,
            "original": {"url": original.url, "name": "markers"},
            "mining": {"enabled": False},
            "lora": {"rank": 8, "alpha": 32, "steps": 60, "lr": 2.0e-2, "early_stop_patience": 60},
            "warm_window": 3,
            # Every slot is taken, the last one too: it is the one that vLLM's own kernels leak to base rows.
            # Two adapters stay in the engine's memory; others are read again when their sessions return.
            "surrogate": {"max_loras": 2, "max_cpu_loras": 3},
        }
        with serving(tmp_path_factory.mktemp("marker"), TINY, settings) as running:
            yield running

"""The real server on tiny models that tests of several folders share: one for the whole test session.

Loaded for every test (tests/conftest.py): what is heavy is imported where a fixture is made.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from soma_vllm.models.home import models_dir

if TYPE_CHECKING:
    from support.server import Running

BRIEF_JSON = ["--structured-outputs-config", '{"backend": "xgrammar", "disable_any_whitespace": true}']


@pytest.fixture(scope="session")
def tiny_models() -> Path:
    """The folder of the tiny models, made if they are not there."""
    from soma_vllm.models.tiny import make_tiny

    if not (models_dir() / "tiny-encoder" / "config.json").exists():
        make_tiny(models_dir())
    return models_dir()


@pytest.fixture(scope="session")
def tiny_compressor(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What LLMLingua-2 loads."""
    from support.tiny_baselines import make_compressor

    return Path(make_compressor(tmp_path_factory.mktemp("llmlingua2")))


@pytest.fixture(scope="session")
def tiny_router(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What RouteLLM loads."""
    from support.tiny_baselines import make_router

    return Path(make_router(tmp_path_factory.mktemp("routellm")))


@pytest.fixture(scope="session")
def tiny_server(
    tiny_models: Path, tiny_compressor: Path, tiny_router: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Running]:
    """Everything real: both engines, Ray, the store, on random models. Its original audits by reading."""
    from support.server import TINY, serving

    settings = {
        # Random models surprise each other beyond measure.
        "gate": {"audit": "score", "surprise_threshold": 1000.0},
        "limits": {"policies": ["*"]},
        # They would also rather write blanks for ever than a JSON object.
        "original": {"extra_args": BRIEF_JSON},
        "surrogate": {"extra_args": BRIEF_JSON},
        "baselines": {
            "llmlingua2": {"model": str(tiny_compressor)},
            "routellm": {"checkpoint": str(tiny_router), "threshold": 0.356},
        },
    }
    with serving(tmp_path_factory.mktemp("tiny"), TINY, settings) as running:
        yield running

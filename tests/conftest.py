"""What tests of several rooms share."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import hypothesis
import pytest
from support.postgres import PACKAGE, Postgres, binaries

pytest_plugins = ("support.tiny_server",)

# An example may take as long as a slow machine makes it.
SLOWNESS_IS_NO_FAULT = hypothesis.settings(
    deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.register_profile("suite", SLOWNESS_IS_NO_FAULT)
hypothesis.settings.load_profile("suite")


@pytest.fixture(autouse=True)
def _root_logger() -> None:
    """As Python has it: packages that one test loads raise its level, and another would hear no warning."""
    logging.getLogger().setLevel(logging.WARNING)


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """A private server, running; who stops it starts it again."""
    programs = binaries()
    if programs is None:
        pytest.skip(f"found no PostgreSQL server here; the package {PACKAGE} has one")
    with Postgres(programs) as server:
        yield server


@pytest.fixture(scope="session", autouse=True)
def a_busy_machine_is_no_outage() -> Iterator[None]:
    """A lookup may take as long as a slow disk makes it; after 3 s its turn would not be recorded."""
    with pytest.MonkeyPatch.context() as patch:
        for module in ("ports", "patient_store"):
            patch.setattr(f"soma_vllm.sessions.{module}.LOOKUP_S", 10.0)
        yield

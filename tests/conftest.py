"""What tests of several rooms share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from postgres import PACKAGE, Postgres, binaries  # type: ignore[import-not-found]


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """A private server, running; who stops it starts it again."""
    programs = binaries()
    if programs is None:
        pytest.skip(f"found no PostgreSQL server here; the package {PACKAGE} has one")
    with Postgres(programs) as server:
        yield server

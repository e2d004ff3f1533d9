"""What is drawn at random, before the application of `support.api_services`."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvloop
from hypothesis import HealthCheck, Phase, settings

from soma_vllm.maintenance import removal
from soma_vllm.sessions import ports
from support.api_services import (
    SurfaceHouse,
    heard,
    tenant_of,
)
from support.guard import GUARD_S


def fuzzed(examples: int) -> settings:
    """The same examples in every run."""
    return settings(
        max_examples=examples,
        derandomize=True,
        database=None,
        deadline=None,
        phases=(Phase.explicit, Phase.generate),
        suppress_health_check=tuple(HealthCheck),
    )


class Fuzzing:
    """The house, in an event loop of its own: hypothesis calls plain functions."""

    def __init__(self, runner: asyncio.Runner, services: SurfaceHouse) -> None:
        self.runner = runner
        self.services = services
        self.examples = 0

    def send(self, method: str, path: str, key: str | None = "k", **more: Any) -> httpx.Response:
        answer = self.runner.run(self.services.send(method, path, key, **more))
        assert answer.status_code < HTTPStatus.INTERNAL_SERVER_ERROR, (method, path, answer.text[:500])
        if answer.status_code >= HTTPStatus.BAD_REQUEST:
            assert "message" in answer.json()["error"], answer.text[:500]
        return answer

    def settle(self) -> None:
        """Let everything in the background come to its end."""
        self.runner.run(self.services.settled())

    def heard(self) -> None:
        """No engine was told another tenant's words, or lent another's adapter, since it was last looked."""
        inside = self.services.services
        for engine in (inside.original, inside.surrogate):
            for call in engine.calls:
                assert {tenant_of(name) for name in heard(call)} <= {call.tenant}
                if call.adapter is not None:
                    assert inside.adapter_store.owners[call.adapter.name].tenant == call.tenant
            engine.calls.clear()


@contextmanager
def fuzzing_at(folder: Path, kind: type[Fuzzing] = Fuzzing) -> Iterator[Fuzzing]:
    """The application over a database in a folder, in an event loop of its own."""
    with (
        asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner,  # soma-serve's own loop
        pytest.MonkeyPatch.context() as patch,
    ):
        # On a machine with more to do than this the store is slow, and not away.
        patch.setattr(ports, "LOOKUP_S", GUARD_S)
        patch.setattr(removal, "WRITTEN_S", GUARD_S)
        services = runner.run(SurfaceHouse.built(folder))
        yield kind(runner, services)
        runner.run(services.close())

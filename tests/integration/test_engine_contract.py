"""Both real engines keep the contract that the fake keeps (tests/contract/test_engines.py).

The original is asked over its socket, as soma-serve asks it. The surrogate lives in soma-serve's own process,
so it is asked under its own name, which bypasses dispatch.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from support.engine_contract import LONG, EngineContract
from support.guard import GUARD_S
from support.server import Running, engine_metric

from soma_vllm.engines.original import OriginalEngine

LIMIT = 0.8 * LONG["n"] * LONG["max_tokens"]
"""Tokens that a generation stopped early stays below."""


class RealSubject:
    """One of a running server's engines, and its own count of what it does."""

    def __init__(self, server: Running, role: str, engine: OriginalEngine) -> None:
        self.engine = engine
        self._server = server
        self._role = role
        self._before = 0.0

    def refuse_the_next_call(self) -> None:
        pass

    def hold_the_next_call(self) -> None:
        pass

    async def until_called(self) -> None:
        while await self._count("vllm:num_requests_running") == 0:
            await asyncio.sleep(0.02)

    async def require_stopped(self) -> None:
        async with asyncio.timeout(GUARD_S):
            while await self._count("vllm:num_requests_running") > 0:
                await asyncio.sleep(0.05)
        generated = await self._count("vllm:generation_tokens_total") - self._before
        assert generated < LIMIT, f"found {generated:g} tokens; expected fewer than {LIMIT:g}"

    async def mark(self) -> None:
        """Count from here on."""
        self._before = await self._count("vllm:generation_tokens_total")

    async def _count(self, name: str) -> float:
        return await asyncio.to_thread(engine_metric, self._server, self._role, name)


@pytest.fixture(params=["original", "surrogate"])
async def subject(request: pytest.FixtureRequest, tiny_server: Running) -> AsyncIterator[RealSubject]:
    if request.param == "original":
        socket = tiny_server.run_dir / "original.sock"
        engine = OriginalEngine("tiny-original", "http://original/v1", speaks_vllm=True, socket=socket)
    else:
        engine = OriginalEngine("tiny-surrogate", f"{tiny_server.root}/v1", speaks_vllm=True)
    found = RealSubject(tiny_server, request.param, engine)
    await found.mark()
    yield found
    await engine.close()


class TestRealEngines(EngineContract):
    """The cases, on each."""

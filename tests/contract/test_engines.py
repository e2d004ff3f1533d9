"""The fake engine keeps the contract of real ones, since other tests rest on it.

Real ones are held to the same cases in tests/integration/test_engine_contract.py.
"""

from __future__ import annotations

import asyncio

import pytest
from support.engine_contract import EngineContract
from support.fake_engine import FakeEngine
from support.guard import GUARD_S

from soma_vllm.errors import EngineRefused


class FakeSubject:
    """The fake, told to do what a real engine does by itself."""

    def __init__(self) -> None:
        self.engine = FakeEngine(answers=["one two three"])

    def refuse_the_next_call(self) -> None:
        error = {"message": "found temperature -1; expected at least 0", "code": 400}
        self.engine.refusal = EngineRefused(400, {"error": error})

    def hold_the_next_call(self) -> None:
        self.engine.go.clear()

    async def until_called(self) -> None:
        await self.engine.called.wait()

    async def require_stopped(self) -> None:
        await asyncio.wait_for(self.engine.closed_early.wait(), GUARD_S)


@pytest.fixture
def subject() -> FakeSubject:
    return FakeSubject()


class TestFakeEngine(EngineContract):
    """The cases, on the fake."""

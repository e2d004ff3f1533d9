"""What a client sends is bounded before work is done on it, and large requests are read off the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from support.services import Build, Services

from soma_vllm.errors import BadRequest
from soma_vllm.scheduler import turn_context


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was done in a thread."""
    done: list[str] = []
    real = asyncio.to_thread

    async def counted(work: Callable[..., Any], *arguments: Any) -> Any:
        done.append(work.__qualname__)
        return await real(work, *arguments)

    monkeypatch.setattr(turn_context.asyncio, "to_thread", counted)
    return done


async def test_a_large_request_is_read_in_a_thread_and_a_small_one_is_not(
    services: Services, threads: list[str]
) -> None:
    await services.say([], "short")
    assert not [name for name in threads if "digested" in name]
    await services.say([], "long " * turn_context.READ_AT_ONCE, session="long")
    assert len([name for name in threads if "digested" in name]) == 1


async def test_a_request_of_too_many_messages_is_refused_unread(build: Build, threads: list[str]) -> None:
    services = build(sessions={"max_messages": 10})
    await services.registry.start()
    history = [{"role": "user", "content": "x" * turn_context.READ_AT_ONCE}] * 10
    with pytest.raises(BadRequest, match="found 11; expected at most 10"):
        await services.say(history, "and this")
    assert threads == []
    assert services.original.calls == []

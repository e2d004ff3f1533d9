"""What is logged while sessions are served: their ids, and nothing that was said."""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from support.services import Services

from soma_vllm.errors import EngineUnavailable, StoreRefused
from soma_vllm.logs import LogContext, TextFormatter
from soma_vllm.telemetry.event_log import EventLog
from soma_vllm.types import SessionKey

TENANT = hashlib.sha256(b"k").hexdigest()[:16]
KEY = SessionKey(TENANT, "s")


@pytest.fixture
def logged(caplog: pytest.LogCaptureFixture) -> Iterator[Callable[[], str]]:
    """Everything that is logged, from DEBUG on, as it would be written."""
    # At DEBUG it shows SQL's parameters; a server logs what is not its own from WARNING on.
    caplog.set_level(logging.INFO, "aiosqlite")
    caplog.set_level(logging.DEBUG)
    ids = LogContext()
    caplog.handler.addFilter(ids)
    yield lambda: "\n".join(TextFormatter().format(record) for record in caplog.records)
    caplog.handler.removeFilter(ids)


async def test_nothing_that_was_said_is_logged_at_any_level(services: Services, logged: Any) -> None:
    services.registry.bus.subscribe(EventLog())
    services.original.answers = services.surrogate.answers = ["an answer about walruses"]
    history: list[dict[str, Any]] = []
    for number in range(4):
        await services.say(history, f"a question about narwhals {number}", headers={"x-soma-force": "adapter"})
        await services.settled()
    assert "SWITCHED" in services.session().phase
    text = logged()
    assert "switched candidate=adapter" in text
    assert "walruses" not in text
    assert "narwhals" not in text


async def test_every_line_of_background_work_has_its_sessions_ids(services: Services, logged: Any) -> None:
    history: list[dict[str, Any]] = []
    await services.say(history, "first")

    async def fails() -> None:
        logging.getLogger("soma_vllm.test").info("at work")
        await asyncio.sleep(0)
        raise RuntimeError("unexpected")

    services.background.spawn(KEY, fails())
    await services.settled()
    await asyncio.sleep(0)
    lines = logged().splitlines()
    for words in ("at work", "background work failed unexpectedly"):
        (line,) = (line for line in lines if words in line)
        assert line.endswith(f" session=s tenant={TENANT}")


async def test_a_removal_s_lines_have_the_ids_of_the_session_that_goes(services: Services, logged: Any) -> None:
    history: list[dict[str, Any]] = []
    for number in range(3):
        await services.say(history, f"question {number}", headers={"x-soma-force": "adapter"})
        await services.settled()

    async def stuck(ref: Any) -> None:
        raise EngineUnavailable("the engine did not answer")

    services.surrogate.unload = stuck  # type: ignore[method-assign]
    await services.session_admin.remove(KEY)
    (line,) = (line for line in logged().splitlines() if "is not retired" in line)
    assert line.endswith(f" session=s tenant={TENANT}")


async def test_a_refused_write_says_which_session_is_kept_in_memory_only(
    services: Services, logged: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def refuse(*arguments: Any, **more: Any) -> None:
        raise StoreRefused("found a contradiction")

    monkeypatch.setattr(services.store, "append_all", refuse)
    await services.say([], "first")
    await services.registry.written()
    (line,) = (line for line in logged().splitlines() if "continues in memory only" in line)
    assert " ERROR " in line
    assert line.endswith(f" session=s tenant={TENANT}")

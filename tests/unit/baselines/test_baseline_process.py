"""A baseline's process: asked in turn, replaced when it is lost, and gone with the server."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from support.guard import GUARD_S

from soma_vllm.baselines import process
from soma_vllm.baselines.process import BaselineProcess, ProcessLimits
from soma_vllm.errors import ModelError, PolicyUnavailable

SCRIPT = """
import json, os, sys, time
for number, line in enumerate(sys.stdin):
    request = json.loads(line)
    while "until" in request and not os.path.exists(request["until"]):
        time.sleep(0.01)
    if "exit" in request:
        sys.exit(1)
    said = {"error": request["raise"]} if "raise" in request else {"ok": {**request, "pid": os.getpid()}}
    print(json.dumps(said), flush=True)
"""


@pytest.fixture
async def echo(tmp_path: Path) -> AsyncIterator[BaselineProcess]:
    """A process that gives requests back, and waits for a file, fails or ends as they say."""
    script = tmp_path / "echo.py"
    script.write_text(SCRIPT)
    made = BaselineProcess("echo", dict, tmp_path, ProcessLimits(1, GUARD_S, GUARD_S), script)
    yield made
    await made.close()


async def test_requests_are_answered_in_turn_by_one_process(echo: BaselineProcess) -> None:
    found = await asyncio.gather(*(echo.ask({"number": number}) for number in range(5)))
    assert [answer["number"] for answer in found] == list(range(5))
    assert len({answer["pid"] for answer in found}) == 1


async def test_waiting_for_it_leaves_the_event_loop_free(echo: BaselineProcess, tmp_path: Path) -> None:
    await echo.start()
    asking = asyncio.create_task(echo.ask({"until": str(tmp_path / "go")}))
    for _ in range(10):
        await asyncio.sleep(0.01)
    assert not asking.done()
    (tmp_path / "go").touch()
    assert "pid" in await asking


async def test_a_process_that_ended_is_replaced_at_the_next_request(echo: BaselineProcess) -> None:
    first = await echo.ask({})
    with pytest.raises(PolicyUnavailable, match="echo ended"):
        await echo.ask({"exit": True})
    assert (await echo.ask({}))["pid"] != first["pid"]


async def test_a_process_that_hangs_is_replaced(tmp_path: Path, echo: BaselineProcess) -> None:
    impatient = BaselineProcess("echo", dict, tmp_path, ProcessLimits(1, 2.0, GUARD_S), tmp_path / "echo.py")
    first = await impatient.ask({})
    with pytest.raises(PolicyUnavailable, match="has not answered within 2 s"):
        await impatient.ask({"until": str(tmp_path / "never")})
    assert (await impatient.ask({}))["pid"] != first["pid"]
    await impatient.close()


async def test_a_client_that_leaves_costs_the_next_one_neither_the_process_nor_a_wrong_answer(
    echo: BaselineProcess, tmp_path: Path
) -> None:
    first = await echo.ask({})
    leaving = asyncio.create_task(echo.ask({"until": str(tmp_path / "go"), "who": "leaving"}))
    await asyncio.sleep(0.1)
    leaving.cancel()
    (tmp_path / "go").touch()
    answer = await echo.ask({"who": "next"})
    assert (answer["who"], answer["pid"]) == ("next", first["pid"])


async def test_a_failed_request_is_told_and_the_process_stays(echo: BaselineProcess) -> None:
    first = await echo.ask({})
    with pytest.raises(PolicyUnavailable, match="echo failed with ValueError"):
        await echo.ask({"raise": "ValueError"})
    assert (await echo.ask({}))["pid"] == first["pid"]


async def test_closing_ends_the_process(echo: BaselineProcess) -> None:
    pid = (await echo.ask({}))["pid"]
    await echo.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


async def test_closing_waits_for_nobody_and_whoever_waits_is_told(
    echo: BaselineProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "END_S", 0.1)
    await echo.start()
    never = str(tmp_path / "never")
    waiting = [asyncio.create_task(echo.ask({"until": never})) for _ in range(2)]
    await asyncio.sleep(0.1)
    await asyncio.wait_for(echo.close(), GUARD_S)
    found = await asyncio.gather(*waiting, return_exceptions=True)
    assert [type(answer) for answer in found] == [PolicyUnavailable] * 2


async def test_settings_that_name_no_model_are_told(tmp_path: Path) -> None:
    def settings() -> dict[str, Any]:
        raise ModelError("found no such directory")

    with pytest.raises(PolicyUnavailable, match="found no such directory"):
        await BaselineProcess("echo", settings, tmp_path, ProcessLimits(1, 5.0, 5.0)).start()


async def test_a_package_that_is_not_installed_is_told_with_its_name(tmp_path: Path) -> None:
    model = {"model": str(tmp_path), "device": "cpu"}
    process = BaselineProcess("llmlingua2", lambda: model, tmp_path, ProcessLimits(1, 5.0, 30.0))
    with pytest.raises(PolicyUnavailable, match=r"No module named 'llmlingua'.*make baselines"):
        await process.start()
    await process.close()

"""What a server that was killed finds, and makes good, when it starts again."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.guard import GUARD_S
from support.services import Build, Services

from soma_vllm.errors import AdapterError, StoreUnavailable
from soma_vllm.sessions.state.phases import Phase

History = list[dict[str, Any]]
PLAY = Path(__file__).parents[2] / "support" / "crash_play.py"
PROCESSES = 2


@pytest.mark.slow
def test_whatever_step_a_server_is_killed_at_nothing_that_was_written_is_lost_and_nothing_is_left_over(
    tmp_path: Path,
) -> None:
    commands = [
        [sys.executable, "-P", "-W", "error", str(PLAY), str(tmp_path), str(first), str(PROCESSES)]
        for first in range(1, PROCESSES + 1)
    ]
    pipe = subprocess.PIPE
    places = [str(PLAY.parents[2]), str(PLAY.parents[1])]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(places)}
    plays = [subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=env) for command in commands]
    told = [play.communicate(timeout=GUARD_S) for play in plays]
    assert [play.returncode for play in plays] == [0] * PROCESSES, told
    found = [json.loads(line) for printed, _ in told for line in printed.splitlines()]
    assert [one for one in found if one["problems"]] == [], told
    moments = {
        "commit",
        "training begins",
        "write_bytes",
        "fsync",
        "replace",
        "rename",
        "rename done",
        "rmtree",
    }
    assert moments <= {one["name"] for one in found}
    assert len(found) > 80


async def started(build: Build, **changes: Any) -> Services:
    services = build(**changes)
    await services.registry.start()
    return services


async def adapted(services: Services) -> History:
    services.surrogate.answers = ["different", "same"]
    history: History = []
    for number in (1, 2):
        await services.say(history, f"question {number}")
    await services.settled()
    await services.registry.written()
    return history


async def interrupted(build: Build) -> Services:
    """A server that is killed, as far as its record goes, while a session's adapter is trained."""
    services = await started(build)
    services.surrogate.answers = ["different", "same"]
    services.trainer.go.clear()
    history: History = []
    for number in (1, 2):
        await services.say(history, f"question {number}")
    await services.registry.written()
    return services


async def never(ref: Any) -> None:
    await asyncio.Event().wait()


async def test_an_interrupted_adaptation_is_taken_up_at_the_start(build: Build) -> None:
    first = await interrupted(build)
    second = await started(build)
    await second.start()
    await second.settled()
    assert second.session().phase is Phase.SWITCHED
    await second.stop()
    first.trainer.go.set()


async def test_an_adapter_that_a_crash_left_without_a_session_is_deleted_at_the_start(build: Build) -> None:
    first = await started(build)
    first.surrogate.answers = ["different"] * 2
    first.surrogate.load = never
    history: History = []
    for number in (1, 2):
        await first.say(history, f"question {number}")
    while not first.adapter_store.published:
        await asyncio.sleep(0.01)
    await first.registry.written()
    second = await started(build)
    await second.recovery.run()
    assert second.surrogate.log == ["delete adapter-s-1"]
    await second.recovery.run()
    assert second.surrogate.log == ["delete adapter-s-1"]


async def test_an_adapter_that_serves_nobody_and_cannot_be_deleted_is_tried_again_at_the_next_start(
    build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = await started(build)
    first.surrogate.answers = ["different"] * 2
    first.surrogate.load = never
    history: History = []
    for number in (1, 2):
        await first.say(history, f"question {number}")
    while not first.adapter_store.published:
        await asyncio.sleep(0.01)
    await first.registry.written()

    def refuse(name: str) -> None:
        raise AdapterError("read-only")

    second = await started(build)
    with monkeypatch.context() as patch:
        patch.setattr(second.adapter_store, "retire", refuse)
        await second.recovery.run()
    await second.recovery.run()
    assert second.surrogate.log == ["delete adapter-s-1"]


async def test_a_session_whose_adapters_files_are_gone_goes_back_to_the_original(build: Build) -> None:
    history = await adapted(await started(build))
    second = await started(build)
    second.adapter_store.there.clear()
    await second.recovery.run()
    answer = await second.say(history, "question 3")
    assert (answer.headers["X-SOMA-Phase"], answer.headers["X-SOMA-Engine"]) == ("ROLLED_BACK", "original")
    assert second.session().phase is Phase.ROLLED_BACK


async def test_an_adapter_goes_only_once_the_record_says_that_nobody_needs_it(
    build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    services = await started(build)
    await adapted(services)
    store = services.store
    append, go = store.append_all, asyncio.Event()

    async def slow(*arguments: Any) -> None:
        await go.wait()
        await append(*arguments)

    monkeypatch.setattr(store, "append_all", slow)
    await services.session_admin.roll_back(services.session().key)
    await asyncio.sleep(0.05)
    assert "delete adapter-s-1" not in services.surrogate.log
    go.set()
    await services.settled()
    assert services.surrogate.log[-1] == "delete adapter-s-1"


async def test_while_the_record_is_away_an_adapter_stays_and_the_next_start_deletes_it(
    build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    services = await started(build)
    await adapted(services)
    monkeypatch.setattr("soma_vllm.adapters.lifecycle.RECORD_S", 0.05)
    store = services.store

    async def away(*_: Any) -> None:
        raise StoreUnavailable("away")

    with monkeypatch.context() as patch:
        patch.setattr(store, "append_all", away)
        await services.session_admin.roll_back(services.session().key)
        await services.settled()
    await services.registry.written()
    assert "delete adapter-s-1" not in services.surrogate.log
    second = await started(build)
    await second.recovery.run()
    assert second.surrogate.log == ["delete adapter-s-1"]


async def test_an_adaptation_that_ends_its_server_again_and_again_is_given_up(build: Build) -> None:
    first = await interrupted(build)
    lives = [first]
    for _ in range(4):
        life = await started(build)
        life.surrogate.answers = ["different"]
        life.trainer.go.clear()
        await life.recovery.run()
        await asyncio.sleep(0.05)
        await life.registry.written()
        lives.append(life)
    begun = sum(life.kinds().count("adaptation_started") for life in lives)
    assert begun == first.config.adaptation.max_attempts
    session = await lives[-1].registry.open(first.session().key)
    assert (session.phase, session.attempts) == (Phase.ORIGINAL_ONLY, 0)
    for life in lives:
        life.trainer.go.set()
        await life.stop()


async def test_no_more_adaptations_run_at_a_time_than_configured(build: Build) -> None:
    services = await started(build, adaptation={"payback": "always", "max_concurrent": 2})
    services.surrogate.answers = ["different"]
    services.trainer.go.clear()
    for session in "abcd":
        history: History = []
        for number in (1, 2):
            await services.say(history, f"question {number}", session)
    await asyncio.sleep(0.2)
    assert len(services.trainer.requests) == 2
    services.trainer.go.set()
    await services.settled()
    assert len(services.trainer.requests) == 4

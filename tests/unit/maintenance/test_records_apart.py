"""What servers of two records do to each other's adapters on one root: nothing."""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.adapter_files import write_adapter
from support.services import SETTINGS, Later, Services

from soma_vllm.adapters.store.filesystem import FilesystemAdapterStore
from soma_vllm.config import parse_config
from soma_vllm.sessions.sql.records import FACTS
from soma_vllm.sessions.sql.store import SessionStore
from soma_vllm.sessions.state.phases import Phase
from soma_vllm.training.messages import TrainRequest, TrainResult

Start = Callable[..., Any]


@pytest.fixture
async def start(tmp_path: Path) -> AsyncIterator[Start]:
    """Starts servers on databases of a folder, over one root, which each knows as its record's."""
    stores: list[tuple[Services, SessionStore]] = []

    async def begin(database: str, **settings: Any) -> Services:
        store = SessionStore(f"sqlite+aiosqlite:///{tmp_path}/{database}.db")
        await store.open()
        root = FilesystemAdapterStore(tmp_path / "root", owner=await store.record_id())
        services = Services(parse_config({**SETTINGS, **settings}, "test"), store, adapter_store=root)
        train = services.trainer.train

        async def trained(request: TrainRequest) -> TrainResult:
            write_adapter(Path(request.out_dir))
            result: TrainResult = await train(request)
            return result

        services.trainer.train = trained
        await services.start()
        stores.append((services, store))
        return services

    yield begin
    for services, store in stores:
        await services.stop()
        await store.close()


async def adapted(services: Services, session: str = "s") -> None:
    services.surrogate.answers = [*["same"] * len(services.surrogate.calls), "different", "same"]
    history: list[dict[str, Any]] = []
    for number in (1, 2):
        await services.say(history, f"question {number}", session)
    await services.settled()
    await services.registry.written()
    assert services.session(session).phase is Phase.SWITCHED


def names(services: Services) -> list[str]:
    return [one.ref.name for one in services.adapter_store.list()]


async def test_a_server_with_the_same_path_and_another_database_starts_and_leaves_anothers_adapters(
    start: Start, tmp_path: Path
) -> None:
    first = await start("sessions")
    await adapted(first)
    made = names(first)
    for suffix in ("", "-wal", "-shm"):  # in the other container the path is the same, and the database new
        (tmp_path / f"sessions.db{suffix}").rename(tmp_path / f"moved.db{suffix}")
    second = await start("sessions")
    assert await second.evictor.collect() == 0
    assert names(first) == names(second) == made
    assert await second.evictor.listed() == []


async def test_budgets_and_time_to_live_leave_foreign_adapters_alone(start: Start, later: Later) -> None:
    first = await start("first")
    await adapted(first)
    kept = names(first)
    second = await start("second", adapters={"ttl_s": 60.0, "max_count": 1, "max_bytes": 1})
    later(100.0)
    assert await second.evictor.sweep() == 0
    assert second.stock.stored == (0, 0)
    await adapted(second, "another")
    later(100.0)
    await second.evictor.sweep()
    assert names(first) == kept
    assert second.session("another").phase is Phase.ROLLED_BACK


async def test_a_copied_database_that_was_adopted_leaves_the_adapters_to_the_first(
    start: Start, tmp_path: Path
) -> None:
    first = await start("first")
    await adapted(first)
    made = names(first)
    await first.store._scrub()
    shutil.copy(tmp_path / "first.db", tmp_path / "copy.db")
    copied = SessionStore(f"sqlite+aiosqlite:///{tmp_path}/copy.db")
    await copied.adopt()
    await copied.close()
    second = await start("copy")
    (key,) = await second.store.keys()
    assert (await second.registry.open(key)).phase is Phase.ROLLED_BACK
    await second.session_admin.remove(key)
    await second.evictor.collect()
    assert names(first) == made
    assert first.session().phase is Phase.SWITCHED


async def test_adapters_that_an_older_version_published_are_own_and_indexed_at_the_first_start(
    start: Start, tmp_path: Path
) -> None:
    first = await start("sessions")
    await adapted(first)
    (record,) = await first.store.adapters()
    await first.stop()
    async with first.store._transaction() as connection:  # what 0002 had, under the digest of the URL
        unknown = ", ".join(f"{fact} = NULL" for fact in FACTS)
        await connection.exec_driver_sql(f"UPDATE adapters SET {unknown}")
        await connection.exec_driver_sql("UPDATE record SET id = 'made by the upgrade'")
    second = await start("sessions")
    assert second.adapter_store.owner == "made by the upgrade"
    assert await second.store.adapters() == [record]
    (row,) = await second.evictor.listed()
    assert (row["bytes"], row["rank"], row["created"]) == (record.size_bytes, record.rank, record.created)
    await second.evictor.remove(record.name)
    assert names(second) == []


async def test_what_a_kill_left_unrecorded_is_collected_by_its_own_record_alone(
    start: Start, tmp_path: Path
) -> None:
    first, second = await start("first"), await start("second")
    await adapted(first)
    key = first.session().key
    trained = write_adapter(tmp_path / "trained")
    left = first.adapter_store.publish(replace(key, session="gone"), trained, base_model="small", manifest={})
    assert await second.evictor.collect() == 0
    assert await first.evictor.sweep() == 0, "a sweep does not look at the tree"
    assert await first.evictor.collect() == 1
    assert left.ref.name not in names(first)
    assert first.session().phase is Phase.SWITCHED

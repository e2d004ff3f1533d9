"""How many expired sessions retention removes in a second: over SQLite, and over a store that costs nothing.

`--sessions` sessions of `--turns` turns are put on record, a day old; then one sweep removes them all, as the
server's does every minute: each is loaded, closed, deleted with its text, and SQLite's write-ahead log emptied.
The adapters are stand-ins, so that it is the record that is measured.

    python benchmarks/retention.py [--sessions 2000] [--turns 20]
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
import time
from collections.abc import Sequence
from typing import Any, cast

from rich.console import Console
from rich.table import Table

from soma_vllm.adapters.lifecycle import AdapterLifecycle
from soma_vllm.config import parse_config
from soma_vllm.engines.engine import Salts
from soma_vllm.maintenance.removal import SessionRemoval
from soma_vllm.maintenance.retention import Retention
from soma_vllm.sessions.background_tasks import BackgroundTasks
from soma_vllm.sessions.ports import Store
from soma_vllm.sessions.registry import SessionRegistry
from soma_vllm.sessions.sql.records import Append, SessionSnapshot
from soma_vllm.sessions.sql.store import SessionStore
from soma_vllm.types import Event, SessionKey

DAY_S = 86_400.0


class NoAdapters:
    """Stands in for the adapters' life."""

    async def forget_session(self, key: SessionKey) -> None:
        """Nothing is there."""


class FreeStore:
    """A store that costs nothing."""

    def __init__(self) -> None:
        self._kept: dict[SessionKey, list[Event]] = {}

    async def append_all(self, appends: Sequence[Append]) -> None:
        """Keep them."""
        for one in appends:
            self._kept.setdefault(one.key, []).extend(one.events)

    async def events(self, key: SessionKey) -> list[Event]:
        """What is kept."""
        return self._kept.get(key, [])

    async def delete(self, *keys: SessionKey) -> None:
        """Keep them no longer."""
        for key in keys:
            self._kept.pop(key, None)

    async def in_phase(self, phase: str) -> list[SessionKey]:
        """None: a sweep begins."""
        return []

    async def idle_since(self, at: float, limit: int) -> list[SessionKey]:
        """The first ones that are left."""
        return list(self._kept)[:limit]

    async def delete_unused_objects(self, at: float) -> None:
        """There are none."""

    async def count(self) -> int:
        """Sessions that are left."""
        return len(self._kept)


async def removed_in_a_second(store: Any, count: int, turns: int) -> float:
    """Sessions that one sweep removes in a second."""
    standing = SessionSnapshot("", "WARM_START", "c", turns, None)
    said = {"messages": [{"role": "user", "content": "a question " * 10}], "answer": "an answer " * 10}
    log = [Event("judged", 1.0, {"number": number}, said) for number in range(turns)]
    appends = [Append(SessionKey("t", f"s{number}"), 0, log, standing) for number in range(count)]
    for first in range(0, count, 100):
        await store.append_all(appends[first : first + 100])
    config = parse_config({"retention": {"session_ttl_s": DAY_S}}, "benchmark")
    registry = SessionRegistry(config, cast(Store, store))
    await registry.start()
    adapters = cast(AdapterLifecycle, NoAdapters())
    removal = SessionRemoval(registry, BackgroundTasks(registry), adapters, Salts())
    real = time.time
    time.time = lambda: real() + 2 * DAY_S
    try:
        began = time.perf_counter()
        removed = await Retention(config.retention, registry, removal).sweep()
        taken = time.perf_counter() - began
    finally:
        time.time = real
    await registry.stop()
    assert (removed, await store.count()) == (count, 0), f"found {removed} removed; expected {count}"
    return count / taken


async def measured(count: int, turns: int) -> dict[str, float]:
    """Sessions removed in a second, by store."""
    with tempfile.TemporaryDirectory() as folder:
        sqlite = SessionStore(f"sqlite+aiosqlite:///{folder}/sessions.db")
        await sqlite.open()
        found = {"SQLite": await removed_in_a_second(sqlite, count, turns)}
        await sqlite.close()
    return found | {"free": await removed_in_a_second(FreeStore(), count, turns)}


def main() -> None:
    """Measure and show."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--sessions", type=int, default=2000)
    parser.add_argument("--turns", type=int, default=20)
    arguments = parser.parse_args()
    table = Table("store", "sessions removed in a second")
    for store, rate in asyncio.run(measured(arguments.sessions, arguments.turns)).items():
        table.add_row(store, f"{rate:.0f}")
    Console().print(table)


if __name__ == "__main__":
    main()

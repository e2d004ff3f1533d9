"""The database is locked, away, or its disk is full, while dialogues go on; then it is back."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import sqlite3
import subprocess
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

from support.postgres import PACKAGE, Postgres, binaries

from faults.house import House, house
from faults.row import Row, timed
from faults.soak import checked, dialogue
from faults.suite import Scene
from faults.talk import Talk

DISK = "4m"
SESSIONS = 12

Outage = Callable[[], contextlib.AbstractAsyncContextManager[None]]


def databases(scene: Scene) -> None:
    """Each outage under load."""
    _locked(scene)
    _away(scene)
    _full(scene)


def _locked(scene: Scene) -> None:
    row, folder = scene.row("database", "SQLite locked by another program"), scene.new_folder()

    @contextlib.asynccontextmanager
    async def outage() -> contextlib.AsyncIterator[None]:
        with contextlib.closing(sqlite3.connect(folder / "s.db", isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            yield
            await asyncio.sleep(0 if scene.quick else 6.0)  # longer than SQLite itself waits for a lock
            other.execute("ROLLBACK")

    with timed(row):
        asyncio.run(_through(row, folder, None, outage))


def _away(scene: Scene) -> None:
    row, programs = scene.row("database", "PostgreSQL away and back"), binaries()
    if programs is None:
        row.skipped = f"found no PostgreSQL server here; the package {PACKAGE} has one"
        return
    with timed(row), Postgres(programs) as server:

        @contextlib.asynccontextmanager
        async def outage() -> contextlib.AsyncIterator[None]:
            await asyncio.to_thread(server.stop, False)
            try:
                yield
            finally:
                await asyncio.to_thread(server.start)

        asyncio.run(_through(row, scene.new_folder(), server.new_database(), outage))


def _full(scene: Scene) -> None:
    row, folder = scene.row("disk", "full, then with room"), scene.new_folder()
    with timed(row), small_disk(folder) as refused:
        if refused:
            row.skipped = f"no tmpfs can be mounted here ({refused})"
            return

        @contextlib.asynccontextmanager
        async def outage() -> contextlib.AsyncIterator[None]:
            filler = folder / "filler"
            with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
                while True:
                    file.write(os.urandom(65536))
            with contextlib.suppress(OSError), (folder / "crumbs").open("wb", buffering=0) as file:
                while True:
                    file.write(b"x")
            yield
            filler.unlink()
            (folder / "crumbs").unlink()

        asyncio.run(_through(row, folder, None, outage))


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[str]:
    """A file system of some MiB at a folder; yields why there is none, or ""."""
    mount = shutil.which("mount")
    command = [mount or "mount", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False) if mount else None
    if done is None or done.returncode:
        yield "no mount" if done is None else " ".join(done.stderr.split())[:120] or "refused"
        return
    try:
        yield ""
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


async def _through(row: Row, folder: Path, url: str | None, outage: Outage) -> None:
    """Dialogues before, during and after an outage: all of what was answered in named sessions is on record."""
    async with house(folder, url=url) as opened:
        talks = [opened.talk(row, number, adapted=number % 3 == 0) for number in range(1, SESSIONS + 1)]
        await _all(talks, lambda talk: dialogue(opened, talk, 4))
        await opened.settled()
        async with outage():
            await _all(talks, lambda talk: talk.say("a question during the outage"))
            await _all(talks, lambda talk: talk.say("and another", stream=True))
        await _all(talks, lambda talk: talk.say("a question afterwards"))
        async with asyncio.timeout(120):
            await checked(opened, row, talks)
    async with house(folder, url=url) as again:
        await _goes_on(again, row, talks)


async def _goes_on(opened: House, row: Row, talks: list[Talk]) -> None:
    """The next server has it all."""
    for talk in talks:
        talk.http = opened.http
        await talk.check_record()
        await talk.say("after the restart")
    await checked(opened, row, talks)


async def _all(talks: list[Talk], do: Callable[[Talk], Awaitable[object]]) -> None:
    await asyncio.gather(*(do(talk) for talk in talks))

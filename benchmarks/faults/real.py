"""soma-serve on the tiny pair, started when it is needed and again after its end, over one folder.

Its original answers in markers, unless it is the pair's own; trainings are real, and so an adapter says the
marker of its session.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import sqlite3
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import httpx
from support.guard import GUARD_S
from support.marker_original import MarkerOriginal
from support.server import TINY, Running, descendants, marker_settings, serving

from faults.originals import Moody
from faults.row import Row, until
from faults.suite import Scene
from faults.talk import FORCED, Canaries, Talk
from soma_vllm.models.home import models_dir
from soma_vllm.models.tiny import make_tiny

WORDS = ("wind", "light", "house", "music", "river")
MARKERS = Canaries(re.compile("|".join(WORDS)), by_letters=True)
PATIENCE = {
    "first_token_timeout_s": 5.0,
    "idle_timeout_s": 5.0,
    "answer_timeout_s": 5.0,
    "breaker_open_s": 1.0,
}
"""Of the original: what hangs is given up soon."""
HELD = ("soma_adapter_holds", "soma_original_in_flight", "soma_background_tasks", "soma_requests_in_flight")


class Real:
    """The server of a run, and the dialogues that it has switched."""

    def __init__(self, folder: Path, settings: dict[str, Any], original: MarkerOriginal | None = None) -> None:
        self.original = original
        self.markers = MARKERS if original is not None else None
        """What is looked for in answers: the pair's own original says no markers."""
        self.switched: list[Talk] = []
        self._folder = folder
        self._settings = settings
        self._life = ExitStack()
        self._running: Running | None = None

    @property
    def running(self) -> Running:
        """The server, which is started where none runs."""
        if self._running is None or self._running.process.poll() is not None:
            self.stop()
            self._running = self._life.enter_context(serving(self._folder, TINY, self._settings))
        return self._running

    @property
    def begun(self) -> Running:
        """The server that was started last, which may have ended."""
        assert self._running is not None
        return self._running

    def stop(self) -> None:
        """End the server, if one runs."""
        self._life.close()
        self._life, self._running = ExitStack(), None

    @asynccontextmanager
    async def http(self) -> AsyncIterator[httpx.AsyncClient]:
        """A client of the server as it is now; dialogues that were switched go on with it."""
        running = await asyncio.to_thread(lambda: self.running)
        async with httpx.AsyncClient(base_url=running.root, timeout=GUARD_S) as client:
            for talk in self.switched:
                talk.http = client
            yield client

    def talk(self, http: httpx.AsyncClient, row: Row, name: str, marker: str, adapted: bool = False) -> Talk:
        """A new dialogue."""
        return Talk(http, row, name, marker, self.markers, **(FORCED if adapted else {}))

    async def taught(self, http: httpx.AsyncClient, row: Row, name: str, marker: str) -> Talk:
        """A dialogue that was switched to an adapter of its own."""
        talk = self.talk(http, row, name, marker, adapted=True)
        for number in range(1, 4):
            await talk.say(f"question {number}")
        await talk.until("SWITCHED")
        if not await talk.say("and once more") or row.wrong_adapter:
            raise AssertionError(f"{name}: the adapter has not learned its marker: {row.found}")
        return talk

    async def teach_two(self, http: httpx.AsyncClient, row: Row) -> list[Talk]:
        """The two dialogues that stay switched over all of a run."""
        for marker in WORDS[len(self.switched) : 2]:
            self.switched.append(await self.taught(http, row, f"switched {marker}", marker))
        for talk in self.switched:
            talk.row = row
        return self.switched

    # -- what the server says of itself -----------------------------------------------------------------

    async def held(self, http: httpx.AsyncClient) -> dict[str, float]:
        """What is in use or under way."""
        lines = (await http.get("/metrics", follow_redirects=True)).text.splitlines()
        found = dict.fromkeys(HELD, 0.0)
        for line in lines:
            if line.startswith(HELD):
                found[line.split("{")[0].split()[0]] += float(line.rsplit(" ", 1)[1])
        return found

    async def check_idle(self, http: httpx.AsyncClient, row: Row, limit_s: float = 60.0) -> None:
        """Count what is held although nothing is under way."""
        deadline = time.monotonic() + limit_s
        while any((held := await self.held(http)).values()) and time.monotonic() < deadline:
            await asyncio.sleep(0.2)
        for name, count in held.items():
            if count:
                row.count("leaks", name, int(count))

    async def check_alive(self, http: httpx.AsyncClient, row: Row) -> None:
        """Count an end of the server or of an engine that was not meant to end."""
        if self.begun.process.poll() is not None or (await http.get("/health")).status_code != 200:
            row.count("engine_deaths", "the server or its surrogate engine has ended")

    def engine_core(self) -> int:
        """Process id of the surrogate's engine."""
        return self._child(lambda command, parent: "EngineCore" in command and parent == self.begun.process.pid)

    def original_process(self) -> int:
        """Process id of the original's server."""
        return self._child(lambda command, _: "original.sock" in command)

    def trainer(self) -> int:
        """Process id of the trainer."""
        return self._child(lambda command, _: command.startswith("ray::AdapterTrainer"))

    def _child(self, wanted: Any) -> int:
        found = []
        for pid in sorted(descendants(self.begun.process.pid)):
            with contextlib.suppress(OSError, IndexError):
                command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
                parent = int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])
                if wanted(command, parent):
                    found.append(pid)
        if not found:
            raise LookupError("found no process of this kind below the server")
        return found[0]

    def ended(self) -> None:
        """Return when the server has ended by itself."""
        process = self.begun.process
        until("the server's end", lambda: process.poll() is not None)

    def on_record(self) -> dict[str, int]:
        """Turns of each session, from the database of a server that has ended."""
        with contextlib.closing(sqlite3.connect(self._folder / "run" / "sessions.db")) as connection:
            return dict(connection.execute("SELECT session, turns FROM sessions").fetchall())


def marker_server(scene: Scene) -> Real:
    """The server of this run behind the original that answers in markers."""
    if "markers" not in scene.shared:
        _tiny_models()
        original = scene.held.enter_context(reopened(MarkerOriginal(Moody)))
        settings = marker_settings(original.url)
        settings["original"] |= PATIENCE
        real = scene.shared["markers"] = Real(scene.new_folder(), settings, original)
        scene.held.callback(real.stop)
    real = scene.shared["markers"]
    assert isinstance(real, Real)
    return real


def pair_server(scene: Scene) -> Real:
    """A server of the tiny pair, whose original is its child."""
    _tiny_models()
    real = Real(scene.new_folder(), {"lora": {"steps": 60}})
    scene.held.callback(real.stop)
    return real


def _tiny_models() -> None:
    if not (models_dir() / "tiny-encoder" / "config.json").exists():
        make_tiny(models_dir())


@contextmanager
def reopened(original: MarkerOriginal) -> Iterator[MarkerOriginal]:
    """An original that a fault may close and open again at its port."""
    original.__enter__()
    yield original
    original.__exit__()

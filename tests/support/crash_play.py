"""A dialogue server that kills itself at its k-th durable step, and what a fresh one finds of it, for every k.

Everything is real but the engines and the trainer's arithmetic: dispatcher, recorder, adaptation, drift watch,
session removal, recovery, an SQLite session store and an adapter store. Steps are each commit to the first,
each file that the adapter store copies, synchronises, renames or deletes, and the beginning and end of a
training.

`python crash_play.py FOLDER FIRST STRIDE` forks a process for each kill and one for each look afterwards
(nothing is imported anew), and prints one JSON object a line: {"step", "name", "problems"}.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import sys
import tempfile
import threading
import traceback
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sqlalchemy import event as sqlalchemy_event

from soma_vllm.adapters.store.filesystem import FilesystemAdapterStore
from soma_vllm.adapters.store.verify import Demands
from soma_vllm.config import parse_config
from soma_vllm.sessions.sql.store import SessionStore
from soma_vllm.sessions.sql.tables import RETIRED
from soma_vllm.sessions.state.fold import restore
from soma_vllm.sessions.state.identity import tenant_of
from soma_vllm.sessions.state.phases import Phase
from soma_vllm.training.messages import TrainRequest, TrainResult
from soma_vllm.types import Event, SessionKey
from support.adapter_files import BASE_MODEL, write_adapter
from support.fakes import FakeTrainer
from support.services import SETTINGS, Services

CONFIG = parse_config(
    {
        **SETTINGS,
        "gate": {**SETTINGS["gate"], "audit_rate": 1.0},
        "adaptation": {**SETTINGS["adaptation"], "cool_down_turns": 2, "max_trainings": 3},
    },
    "killed play",
)
FORCED = {"x-soma-force": "adapter"}
TENANT = tenant_of("Bearer k")
LIMIT_S = 60.0
"""Longest one process may take, seconds."""

History = list[dict[str, Any]]


class Steps:
    """Counts durable steps and ends the process at one of them, as `kill -9` would."""

    def __init__(self, tell: Callable[..., None], kill_at: int | None) -> None:
        self.count = 0
        self._tell = tell
        self._kill_at = kill_at
        self._lock = threading.Lock()

    def step(self, name: str) -> None:
        with self._lock:
            self.count += 1
            if self.count == self._kill_at:
                self._tell(killed=name)
                os.kill(os.getpid(), signal.SIGKILL)

    def before(self, module: Any, verb: str, also_after: bool = False) -> None:
        """Make every call of a function a step."""
        function = getattr(module, verb)

        def stepped(*arguments: Any, **named: Any) -> Any:
            self.step(verb)
            try:
                return function(*arguments, **named)
            finally:
                if also_after:
                    self.step(f"{verb} done")

        setattr(module, verb, stepped)


class FileTrainer(FakeTrainer):
    """Writes a real adapter where it is asked to."""

    def __init__(self, steps: Steps | None) -> None:
        super().__init__()
        self._steps = steps

    async def train(self, request: TrainRequest) -> TrainResult:
        for name in ("training begins", "training ends"):
            if self._steps is not None:
                self._steps.step(name)
            await asyncio.sleep(0)
            write_adapter(Path(request.out_dir))
        return await super().train(request)


class Place:
    """The files of one play."""

    def __init__(self, folder: Path) -> None:
        self.url = f"sqlite+aiosqlite:///{folder}/sessions.db"
        self.adapters = FilesystemAdapterStore(
            folder / "adapters", demands=Demands(8, BASE_MODEL), owner="the play's record"
        )
        self.told = folder / "told"
        self.temporary = folder / "tmp"

    def services(self, store: SessionStore, steps: Steps | None = None) -> Services:
        tempfile.tempdir = str(self.temporary)
        adapter_store = self.adapters
        return Services(CONFIG, store, adapter_store=adapter_store, trainer=FileTrainer(steps))

    def tell(self, **what: Any) -> None:
        """One line that outlives the process."""
        handle = os.open(self.told, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.write(handle, f"{json.dumps(what)}\n".encode())
        os.close(handle)


# -- the play -------------------------------------------------------------------------------------------


async def play(place: Place, steps: Steps) -> None:
    """Two dialogues through warm start, adapter, audits, rollback, another adapter; one of them is removed."""
    store = SessionStore(place.url)
    await store.open()
    steps.before(shutil, "rmtree")
    steps.before(os, "fsync")
    steps.before(os, "rename", also_after=True)
    steps.before(os, "replace")
    steps.before(Path, "write_bytes")
    place.adapters._write = Path.write_bytes
    sqlalchemy_event.listen(store._engine.sync_engine, "commit", lambda _: steps.step("commit"))
    services = place.services(store, steps)
    services.registry.bus.subscribe(lambda k, e: place.tell(event=e.kind, session=k.session))
    await services.registry.start()
    services.surrogate.answers = ["different", "same"]
    main: History = []
    await _says(place, services, "main", main, 3)
    gone: History = []
    await _says(place, services, "gone", gone, 3)
    place.tell(removing="gone")
    await services.session_admin.remove(services.session("gone").key)
    place.tell(removed="gone")
    services.original.answers = ["unlike"]
    await _says(place, services, "main", main, 2)
    services.original.answers = ["same"]
    await _says(place, services, "main", main, 3)
    await services.registry.stop()
    await store.close()
    kinds = services.kinds("main")
    for kind, times in {"switched": 2, "rolled_back": 1, "adapter_retired": 1, "audited": 4}.items():
        assert kinds.count(kind) >= times, (kind, kinds)


async def _says(place: Place, services: Services, session: str, history: History, turns: int) -> None:
    for _ in range(turns):
        number = len(history) // 2 + 1
        await services.say(history, f"question {number} of {session}", session, headers=FORCED)
        place.tell(answered=session, history=history)
        await services.settled()
        await services.registry.written()
        place.tell(written=True)


# -- the look afterwards --------------------------------------------------------------------------------


class Told:
    """What the killed process had told."""

    def __init__(self, path: Path) -> None:
        self.events: defaultdict[str, list[str]] = defaultdict(list)
        self.written: dict[str, int] = {}
        self.histories: dict[str, History] = {}
        self.removing = self.removed = False
        self.killed = "not at all"
        for line in path.read_text().splitlines():
            self._read(json.loads(line))

    def _read(self, line: dict[str, Any]) -> None:
        if "event" in line:
            self.events[line["session"]].append(line["event"])
        self.removing |= "removing" in line
        self.removed |= "removed" in line
        self.killed = line.get("killed", self.killed)
        if "answered" in line:
            self.histories[line["answered"]] = line["history"]
        if "written" in line:
            self.written = {session: len(kinds) for session, kinds in self.events.items()}


async def look(place: Place) -> list[str]:
    """What a fresh process finds wrong."""
    told = Told(place.told)
    store = SessionStore(place.url)
    await store.open()
    problems = [f"record: {found}" for found in await _record(store, told)]
    was = {key.session for key in await store.in_phase(Phase.ADAPTING)}
    services = place.services(store)
    services.surrogate.answers = ["different", "same"]
    await services.start()
    problems += [f"at the start: {found}" for found in await _agreement(place, store, started=False)]
    await services.settled()
    await services.registry.written()
    begun = {key.session for key, event in services.events if event.kind == "adaptation_started"}
    if any(event.kind == "rolled_back" for _, event in services.events):
        problems.append("files went before the record said so")
    if begun != was:
        problems.append(f"adapting were {was}, begun again {begun}")
    problems += [f"after recovery: {found}" for found in await _agreement(place, store)]
    for session, history in told.histories.items():
        problems += [f"{session}: {found}" for found in await _goes_on(services, told, session, history)]
    await services.settled()
    await services.registry.written()
    problems += [f"later: {found}" for found in await _agreement(place, store)]
    await services.stop()
    await store.close()
    return problems


async def _record(store: SessionStore, told: Told) -> list[str]:
    """A record is a true beginning of what happened, and has all that was said to be written."""
    found: dict[str, list[Event]] = {key.session: await store.events(key) for key in await store.keys()}
    problems = []
    for session, kinds in told.events.items():
        on_record = [event.kind for event in found.pop(session, [])]
        if on_record != kinds[: len(on_record)]:
            problems.append(f"{session}: {on_record} is no beginning of {kinds}")
        gone = session == "gone" and told.removing
        if not gone and len(on_record) < told.written.get(session, 0):
            problems.append(f"{session}: {len(on_record)} of {told.written[session]} written events")
        if session == "gone" and told.removed and on_record:
            problems.append("it was removed")
    return problems + [f"{session}: nobody told of it" for session in found]


async def _agreement(place: Place, store: SessionStore, started: bool = True) -> list[str]:
    """Rows, events, adapters on record and adapters on the disk say the same."""
    problems, serving = [], set()
    for summary in await store.summaries(None, 100):
        session = restore(summary.key, await store.events(summary.key), CONFIG.gate)
        if session.phase != summary.phase:
            problems.append(
                f"{summary.key.session} is {session.phase} by its events, {summary.phase} by its row"
            )
        if session.phase is Phase.CLOSED or (started and session.phase is Phase.ADAPTING):
            problems.append(f"{summary.key.session} is {session.phase}")
        if session.adapter is not None:
            serving.add(session.adapter.name)
            place.adapters.verify(session.adapter.name)
    if not started:
        return problems
    listed = {adapter.ref.name for adapter in place.adapters.list()}
    on_record = {record.name for record in await store.adapters() if record.state != RETIRED}
    if not serving == listed == on_record:
        problems.append(f"adapters: {serving} serve, {listed} are on disk, {on_record} on record")
    staging = place.adapters._root / ".staging"
    left = [*(staging.iterdir() if staging.is_dir() else ()), *place.temporary.glob("*")]
    return problems + [f"left on disk: {path.name}" for path in left]


async def _goes_on(services: Services, told: Told, session: str, history: History) -> list[str]:
    """The client asks its next question, with the transcript as it has it."""
    was = await services.registry.open(SessionKey(TENANT, session))
    answer = await services.say(history, "one more question", session, headers=FORCED)
    problems = []
    if answer.headers["X-SOMA-Session"] != session:
        problems.append(f"goes on in {answer.headers['X-SOMA-Session']}")
    now = services.session(session)
    if len(now.turns) != len(was.turns) + 1:
        problems.append(f"had {len(was.turns)} turns, has {len(now.turns)}")
    if now.phase is Phase.SWITCHED and answer.headers["X-SOMA-Engine"] != "surrogate":
        problems.append(f"is switched, but: {answer.headers['X-SOMA-Reason']}")
    if len(now.transcript()) != len(history):
        problems.append(f"has {len(now.transcript())} messages on record, the client {len(history)}")
    return problems


# -- processes ------------------------------------------------------------------------------------------


def forked(work: Callable[[], int]) -> int:
    """The wait status of a process that does this and no more."""
    pid = os.fork()
    if pid == 0:
        code = 70
        try:
            signal.alarm(int(LIMIT_S))
            code = work()
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    return os.waitpid(pid, 0)[1]


def one(root: Path, kill_at: int | None) -> int:
    """Play, killed at a step; then look, and print what was found. Returns the play's wait status."""
    folder = root / f"at-{kill_at}"
    place = Place(folder)
    place.temporary.mkdir(parents=True)

    def plays() -> int:
        steps = Steps(place.tell, kill_at)
        asyncio.run(play(place, steps))
        return 0

    def looks() -> int:
        problems = asyncio.run(look(place))
        killed = Told(place.told).killed
        print(json.dumps({"step": kill_at, "name": killed, "problems": problems}), flush=True)
        return 0

    status = forked(plays)
    place.told.touch()
    if forked(looks):
        print(json.dumps({"step": kill_at, "name": "?", "problems": ["the look failed"]}), flush=True)
    elif kill_at is not None:
        shutil.rmtree(folder)
    return status


def main(root: Path, first: int, stride: int) -> None:
    """Every `stride`-th step from `first` on, until a play ends by itself."""
    kill_at = first
    while (status := one(root, kill_at)) == signal.SIGKILL:
        kill_at += stride
    if status:
        raise SystemExit(f"the play failed with status {status}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))

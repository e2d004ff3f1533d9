"""One child server: started, watched, restarted, and never left behind.

Guarantees:

* The child leads a session and process group of its own; `stop` ends every process of that group, and no
  process that was not started here: the leader stays unreaped until its group is gone, so that its id cannot
  pass to a stranger in between.
* The child dies with the thread that started it, even when that is killed outright. Start it from the
  thread of the event loop.
* Until the child has been ready once, its death is final (`FAILED`): the way it is started is wrong. Later
  deaths restart it after a delay that doubles; too many quick deaths in a row end in `FAILED`, and a stable
  while of readiness forgives them.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import aiohttp

from soma_vllm.errors import EngineUnavailable, PreflightError

# Runs before the server in the same process: an exec keeps the parent-death signal. A preexec_fn would run
# Python between fork and exec, which is unsafe beside the threads of a process that serves.
_DIE_WITH_PARENT = """
import ctypes, os, sys
ctypes.CDLL(None, use_errno=True).prctl(1, 9, 0, 0, 0)  # PR_SET_PDEATHSIG, SIGKILL
if os.getppid() != int(sys.argv[1]):
    sys.exit("the parent died before its child began")
os.execvp(sys.argv[2], sys.argv[2:])
"""

_SOCKET_PATH_BYTES = 107
_TAIL_BYTES = 16_384
_PARTING_SECONDS = 2.0
_KILL_SECONDS = 10.0


class State(StrEnum):
    """What can be said of a child server."""

    STARTING = "starting"
    READY = "ready"
    DOWN = "down"
    """It died and will be started again."""
    STOPPED = "stopped"
    """Not started yet, or stopped on purpose."""
    FAILED = "failed"
    """Given up."""


@dataclass(frozen=True)
class Patience:
    """How long to wait for a child and how often to start it again. All in seconds but the count."""

    start: float = 600.0
    """Until the first 200 from /health."""
    first_delay: float = 1.0
    longest_delay: float = 60.0
    quick_deaths: int = 5
    """Deaths in a row, each within `stable` of readiness, that end the trying."""
    stable: float = 60.0
    poll: float = 0.2
    """Between looks at a process, and at /health while starting."""
    health_every: float = 10.0
    """Between looks at /health once ready."""
    health_timeout: float = 5.0
    hang: float = 120.0
    """Without a good /health, after which a running child counts as dead."""
    stop: float = 15.0
    """From SIGTERM to SIGKILL."""


class Backoff:
    """Counts quick deaths. Pure: it is told how long each life was ready, and knows no clock."""

    def __init__(self, patience: Patience) -> None:
        self._patience = patience
        self._deaths = 0

    def died(self, ready_for: float) -> float | None:
        """Delay before the next start, or None to give up."""
        if ready_for >= self._patience.stable:
            self._deaths = 0
        self._deaths += 1
        if self._deaths >= self._patience.quick_deaths:
            return None
        return float(min(self._patience.longest_delay, self._patience.first_delay * 2 ** (self._deaths - 1)))


class ChildServer:
    """One server process that answers GET /health on a Unix socket. May be started again after its end.

    `env` is set on top of our own environment; stdout and stderr are appended to `log_path`.
    """

    def __init__(self, command: Sequence[str], env: Mapping[str, str], log_path: Path, socket: Path) -> None:
        self.command = tuple(command)
        self.env = dict(env)
        self.log_path = log_path
        self.socket = socket
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int | None:
        """Process id, which is also the id of the process group; None when nothing runs."""
        return self._process.pid if self._process else None

    def start(self) -> None:
        """Start the process.

        Raises:
            PreflightError: the socket's path is longer than the kernel takes.
        """
        assert self._process is None, "start follows stop"
        length = len(os.fsencode(self.socket))
        if length > _SOCKET_PATH_BYTES:
            raise PreflightError(
                f"server.run_dir: the socket {self.socket} has a path of {length} bytes; "
                f"expected at most {_SOCKET_PATH_BYTES}"
            )
        self.socket.unlink(missing_ok=True)
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        trampoline = [sys.executable, "-I", "-S", "-c", _DIE_WITH_PARENT, str(os.getpid())]
        with self.log_path.open("ab") as log:
            self._process = subprocess.Popen(
                [*trampoline, *self.command],
                env={**os.environ, **self.env},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def alive(self) -> bool:
        """True while the leading process runs. Does not reap it."""
        if self._process is None:
            return False
        flags = os.WEXITED | os.WNOHANG | os.WNOWAIT
        return os.waitid(os.P_PID, self._process.pid, flags) is None

    async def healthy(self, timeout: float = 5.0) -> bool:
        """True when GET /health answers 200 within `timeout` seconds."""
        limit = aiohttp.ClientTimeout(total=timeout)
        connector = aiohttp.UnixConnector(str(self.socket))
        try:
            async with (
                aiohttp.ClientSession(connector=connector, timeout=limit) as session,
                session.get("http://child/health") as response,
            ):
                return response.status == 200
        except (aiohttp.ClientError, TimeoutError, OSError):
            return False

    async def stop(self, grace: float = 15.0, poll: float = 0.1) -> int | None:
        """SIGTERM to the leader, SIGKILL to the group after `grace` seconds. Idempotent.

        Returns:
            The leader's exit code (negative for a signal), or None when nothing was running.
        """
        process = self._process
        if process is None:
            return None
        if self.alive():
            process.terminate()
            await _until(lambda: not self.alive(), grace, poll)
        # Workers outlive a leader that was killed. The group still bears the leader's unreaped id.
        if not self.alive():
            # multiprocessing's resource tracker ignores SIGTERM and ends once it has unlinked shared memory.
            _signal_group(process.pid, signal.SIGTERM)
            await _until(lambda: not _running(process.pid), _PARTING_SECONDS, poll)
        _signal_group(process.pid, signal.SIGKILL)
        await _until(lambda: not self.alive() and not _running(process.pid), _KILL_SECONDS, poll)
        self._process = None
        self.socket.unlink(missing_ok=True)
        return process.poll()

    def log_tail(self, lines: int = 40) -> str:
        """The last lines the child wrote."""
        try:
            with self.log_path.open("rb") as log:
                log.seek(max(0, log.seek(0, os.SEEK_END) - _TAIL_BYTES))
                text = log.read().decode(errors="replace")
        except FileNotFoundError:
            return ""
        return "\n".join(text.splitlines()[-lines:])


class Supervisor:
    """Keeps one `ChildServer` alive. `state` says how it is; `on_change` tells when that changes."""

    def __init__(
        self, child: ChildServer, name: str = "the original", patience: Patience | None = None
    ) -> None:
        self.child = child
        self.name = name
        self.restarts = 0
        self._patience = patience or Patience()
        self._state = State.STOPPED
        self._changed = asyncio.Event()
        self._listeners: list[Callable[[State], None]] = []
        self._task: asyncio.Task[None] | None = None
        self._why = "was not started"

    @property
    def state(self) -> State:
        """The child's state as last seen."""
        return self._state

    def on_change(self, listener: Callable[[State], None]) -> None:
        """Call `listener` with each new state, in the event loop."""
        self._listeners.append(listener)

    def start(self) -> None:
        """Start the child, or take over one that runs already, and watch it from now on.

        Call it in the thread of the running event loop.

        Raises:
            PreflightError: the socket's path is too long.
        """
        if self._task is not None:
            return
        if self.child.pid is None:
            self.child.start()
        self._become(State.STARTING)
        self._task = asyncio.create_task(self._watch(), name=f"watch {self.name}")

    async def wait_ready(self, timeout: float | None = None) -> None:
        """Return once the child is ready. A child that is merely slow is left running.

        Raises:
            EngineUnavailable: it failed, was stopped, or `timeout` seconds passed; with the end of its log.
        """
        why = None
        try:
            async with asyncio.timeout(timeout):
                while self._state not in (State.READY, State.FAILED, State.STOPPED):
                    await self._changed.wait()
        except TimeoutError:
            why = f"is not ready after {timeout:g} s"
        if self._state is not State.READY:
            log = f"the end of {self.child.log_path}:\n{self.child.log_tail()}"
            raise EngineUnavailable(f"{self.name} {why or self._why}; {log}")

    async def stop(self) -> None:
        """Stop watching, then stop the child and all of its group. Idempotent."""
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.wait([task])
        await self.child.stop(self._patience.stop)
        if self._state is not State.FAILED:
            self._why = "was stopped"
            self._become(State.STOPPED)

    async def _watch(self) -> None:
        backoff = Backoff(self._patience)
        ever_ready = False
        while True:
            ready_for = await self._one_life()
            ever_ready = ever_ready or ready_for is not None
            self._become(State.DOWN)
            code = await self.child.stop(self._patience.stop)
            delay = backoff.died(ready_for or 0.0)
            if not ever_ready or delay is None:
                self._why = f"ended with exit code {code}"
                self._become(State.FAILED)
                return
            await asyncio.sleep(delay)
            self.restarts += 1
            self.child.start()
            self._become(State.STARTING)

    async def _one_life(self) -> float | None:
        """Follow the child from its start to its end: seconds it was ready, or None if it never was."""
        if not await self._until_ready():
            return None
        began = time.monotonic()
        self._become(State.READY)
        await self._until_down()
        return time.monotonic() - began

    async def _until_ready(self) -> bool:
        """Wait for /health; False when the child ends first or takes too long."""
        deadline = time.monotonic() + self._patience.start
        while time.monotonic() < deadline:
            if not self.child.alive():
                return False
            if await self.child.healthy(self._patience.health_timeout):
                return True
            await asyncio.sleep(self._patience.poll)
        return False

    async def _until_down(self) -> None:
        """Return when the child has ended, or has given no good /health for too long."""
        last_good = looked = time.monotonic()
        while self.child.alive():
            await asyncio.sleep(self._patience.poll)
            now = time.monotonic()
            if now - looked < self._patience.health_every:
                continue
            looked = now
            if await self.child.healthy(self._patience.health_timeout):
                last_good = now
            elif now - last_good > self._patience.hang:
                return

    def _become(self, state: State) -> None:
        if state is self._state:
            return
        self._state = state
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()
        for listener in self._listeners:
            listener(state)


async def _until(condition: Callable[[], bool], timeout: float, poll: float) -> None:
    """Wait until `condition` holds, at most `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while not condition() and time.monotonic() < deadline:
        await asyncio.sleep(poll)


def _signal_group(group: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, number)


def _running(group: int) -> bool:
    """True while a process group has a member that is not a zombie (which only its parent can remove)."""
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            # Fields after the parenthesised name: state, parent, process group.
            state, _, member_of = (entry / "stat").read_text(errors="replace").rpartition(")")[2].split()[:3]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(member_of) == group and state not in "ZX":
            return True
    return False

"""Child processes that are never left behind: a process group, and a server in one that answers /health.

Guarantees:

* The child leads a session and process group of its own; `stop` ends every process of that group, and no
  process that was not started here: the leader stays unreaped until its group is gone, so that its id cannot
  pass to a stranger in between.
* The child dies with the thread that started it, even when that is killed outright. Start it from the
  thread of the event loop.
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
from pathlib import Path
from typing import IO

import aiohttp

from soma_vllm.errors import PreflightError

# Runs before the server in the same process: an exec keeps the parent-death signal. A preexec_fn would run
# Python between fork and exec, which is unsafe in a process with threads.
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


class ChildProcess:
    """A process and its group. May be started again after its end; `env` is set on top of our own."""

    def __init__(self, command: Sequence[str], env: Mapping[str, str] | None = None) -> None:
        self.command = tuple(command)
        self.env = dict(env or {})
        self.returncode: int | None = None
        """The exit code of its last life, negative for a signal; None until `stop`."""
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int | None:
        """Process id, which is also the id of the process group; None when nothing runs."""
        return self._process.pid if self._process else None

    def start_with(self, output: int | IO[bytes]) -> IO[bytes] | None:
        """Start the process with stdout and stderr going to `output`; for `subprocess.PIPE` returns its end."""
        assert self._process is None, "start follows stop"
        trampoline = [sys.executable, "-I", "-S", "-c", _DIE_WITH_PARENT, str(os.getpid())]
        self._process = subprocess.Popen(
            [*trampoline, *self.command],
            env={**os.environ, **self.env},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        return self._process.stdout

    def exit_code(self) -> int | None:
        """The leading process' exit code, negative for a signal; None while it runs. Does not reap it."""
        if self._process is None:
            return self.returncode
        ended = os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        if ended is None:
            return None
        return ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status

    def alive(self) -> bool:
        """True while the leading process runs."""
        return self._process is not None and self.exit_code() is None

    async def stop(self, grace: float = 15.0, poll: float = 0.1) -> int | None:
        """SIGTERM to the leader, SIGKILL to its group after `grace` seconds, or when cancelled. Idempotent.

        Returns:
            The leader's exit code (negative for a signal), or None when nothing was running.
        """
        process = self._process
        if process is None:
            return None
        try:
            if self.alive():
                process.terminate()
                await _until(lambda: not self.alive(), grace, poll)
            # Workers outlive a leader that was killed. The group still bears the leader's unreaped id.
            if not self.alive():
                # multiprocessing's resource tracker ignores SIGTERM: it ends after unlinking shared memory.
                _signal_group(process.pid, signal.SIGTERM)
                await _until(lambda: not _runs(process.pid), _PARTING_SECONDS, poll)
        finally:
            _signal_group(process.pid, signal.SIGKILL)
        await _until(lambda: not self.alive() and not _runs(process.pid), _KILL_SECONDS, poll)
        self._process = None
        self.returncode = process.poll()
        return self.returncode


class ChildServer(ChildProcess):
    """A server that answers GET /health on a Unix socket; its output is appended to `log_path`."""

    def __init__(self, command: Sequence[str], env: Mapping[str, str], log_path: Path, socket: Path) -> None:
        super().__init__(command, env)
        self.log_path = log_path
        self.socket = socket

    def start(self) -> None:
        """Start the process.

        Raises:
            PreflightError: the socket's path is longer than the kernel takes.
        """
        length = len(os.fsencode(self.socket))
        if length > _SOCKET_PATH_BYTES:
            raise PreflightError(
                f"server.run_dir: the socket {self.socket} has a path of {length} bytes; "
                f"expected at most {_SOCKET_PATH_BYTES}"
            )
        self.socket.unlink(missing_ok=True)
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        with self.log_path.open("ab") as log:
            self.start_with(log)

    async def stop(self, grace: float = 15.0, poll: float = 0.1) -> int | None:
        """As every child process; also removes the socket."""
        ran = self.pid is not None
        code = await super().stop(grace, poll)
        if ran:
            self.socket.unlink(missing_ok=True)
        return code

    async def healthy(self, timeout: float = 5.0) -> bool:
        """True when GET /health answers 200 within `timeout` seconds."""
        return await is_healthy("http://child", timeout, self.socket)


def tail(log: Path, lines: int) -> str:
    """The last lines of a log; empty when there is none."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
            return "\n".join(file.read().decode(errors="replace").splitlines()[-lines:])
    except FileNotFoundError:
        return ""


async def is_healthy(root: str, timeout: float = 5.0, socket: Path | None = None) -> bool:
    """True when GET `root`/health answers 200 within `timeout` seconds, over TCP or a Unix socket."""
    connector = None if socket is None else aiohttp.UnixConnector(str(socket))
    limit = aiohttp.ClientTimeout(total=timeout)
    try:
        async with (
            aiohttp.ClientSession(connector=connector, timeout=limit) as session,
            session.get(f"{root}/health") as response,
        ):
            return response.status == 200
    except (aiohttp.ClientError, TimeoutError, OSError):
        return False


async def _until(condition: Callable[[], bool], timeout: float, poll: float) -> None:
    """Wait until `condition` holds, at most `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while not condition() and time.monotonic() < deadline:
        await asyncio.sleep(poll)


def _signal_group(group: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, number)


def _runs(group: int) -> bool:
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

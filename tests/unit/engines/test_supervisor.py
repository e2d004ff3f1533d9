"""The supervisor with real processes: a small server that can be told to die, and its grandchild."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
from support.guard import GUARD_S, eventually

from soma_vllm.engines.child_process import ChildServer
from soma_vllm.engines.supervisor import Backoff, Patience, State, Supervisor
from soma_vllm.errors import EngineUnavailable, PreflightError

SERVER = """
import http.server, os, pathlib, signal, socketserver, subprocess, sys

socket, pids, mode = sys.argv[1:4]
print("the server begins", flush=True)
if mode == "doomed":
    sys.exit("out of luck")
if mode == "stubborn":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
grandchild = subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"])
temporary = pathlib.Path(pids + ".part")
temporary.write_text(f"{os.getpid()} {grandchild.pid}")
temporary.replace(pids)
if mode == "deaf":
    signal.pause()

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()
    def log_message(self, *args):
        pass

class Server(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    daemon_threads = True
    def get_request(self):
        request, _ = super().get_request()
        return request, ("child", 0)

Server(socket, Handler).serve_forever()
"""

QUICK = Patience(
    start=GUARD_S,
    first_delay=0.05,
    longest_delay=0.1,
    quick_deaths=3,
    stable=60,
    poll=0.02,
    health_every=0.05,
    stop=5,
)


@pytest.fixture
async def child(tmp_path: Path) -> AsyncIterator[Callable[[str], ChildServer]]:
    made: list[ChildServer] = []

    def make(mode: str = "plain") -> ChildServer:
        script = tmp_path / "server.py"
        script.write_text(SERVER)
        socket = tmp_path / "child.sock"
        command = [sys.executable, str(script), str(socket), str(tmp_path / "pids"), mode]
        made.append(ChildServer(command, {"GREETING": "hello"}, tmp_path / "log" / "child.log", socket))
        return made[-1]

    yield make
    for server in made:
        await server.stop(grace=0)


def runs(pid: int) -> bool:
    """True unless the process is gone or a zombie."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in "ZX"


async def family(tmp_path: Path) -> list[int]:
    pids = tmp_path / "pids"
    await eventually(pids.is_file)
    return [int(pid) for pid in pids.read_text().split()]


async def test_a_child_becomes_ready_and_stop_leaves_no_process(child, tmp_path: Path) -> None:
    supervisor = Supervisor(child(), patience=QUICK)
    seen: list[State] = []
    supervisor.on_change(seen.append)
    supervisor.start()
    await supervisor.wait_ready(GUARD_S)
    pids = await family(tmp_path)
    assert supervisor.child.pid == pids[0]
    await supervisor.stop()
    assert [pid for pid in pids if runs(pid)] == []
    assert seen == [State.STARTING, State.READY, State.STOPPED]
    assert not supervisor.child.socket.exists()


async def test_stop_is_idempotent_and_means_nothing_before_start(child) -> None:
    supervisor = Supervisor(child(), patience=QUICK)
    await supervisor.stop()
    supervisor.start()
    await supervisor.wait_ready(GUARD_S)
    await supervisor.stop()
    await supervisor.stop()
    assert supervisor.state is State.STOPPED


async def test_a_child_that_ignores_sigterm_is_killed_with_its_group(child, tmp_path: Path) -> None:
    server = child("stubborn")
    server.start()
    await eventually(server.socket.exists)
    pids = await family(tmp_path)
    assert await server.stop(grace=0.1) == -signal.SIGKILL
    assert [pid for pid in pids if runs(pid)] == []


async def test_a_killed_child_is_restarted_without_its_old_workers(child, tmp_path: Path) -> None:
    supervisor = Supervisor(child(), patience=QUICK)
    seen: list[State] = []
    supervisor.on_change(seen.append)
    supervisor.start()
    await supervisor.wait_ready(GUARD_S)
    server, worker = await family(tmp_path)
    (tmp_path / "pids").unlink()
    os.kill(server, signal.SIGKILL)
    await eventually(lambda: supervisor.restarts == 1)
    await supervisor.wait_ready(GUARD_S)
    assert not runs(worker)
    assert (await family(tmp_path))[0] == supervisor.child.pid != server
    assert seen == [State.STARTING, State.READY, State.DOWN, State.STARTING, State.READY]
    await supervisor.stop()


async def test_quick_deaths_in_a_row_end_in_failed(child) -> None:
    supervisor = Supervisor(child(), patience=QUICK)
    supervisor.on_change(
        lambda state: os.kill(supervisor.child.pid or 0, signal.SIGKILL) if state is State.READY else None
    )
    supervisor.start()
    await eventually(lambda: supervisor.state is State.FAILED)
    assert supervisor.restarts == QUICK.quick_deaths - 1
    assert supervisor.child.pid is None
    with pytest.raises(EngineUnavailable, match="exit code -9"):
        await supervisor.wait_ready(1)
    await supervisor.stop()
    assert supervisor.state is State.FAILED


async def test_a_child_that_never_came_up_is_not_tried_again_and_its_last_words_are_told(child) -> None:
    supervisor = Supervisor(child("doomed"), patience=QUICK)
    supervisor.start()
    with pytest.raises(EngineUnavailable, match=r"(?s)exit code 1.*the server begins\nout of luck"):
        await supervisor.wait_ready(GUARD_S)
    assert (supervisor.state, supervisor.restarts) == (State.FAILED, 0)


async def test_waiting_ends_in_time_and_leaves_a_slow_child_running(child, tmp_path: Path) -> None:
    supervisor = Supervisor(child("deaf"), patience=QUICK)
    supervisor.start()
    pids = await family(tmp_path)
    with pytest.raises(EngineUnavailable, match=r"not ready after 0\.1 s"):
        await supervisor.wait_ready(0.1)
    assert supervisor.state is State.STARTING
    assert runs(pids[0])
    await supervisor.stop()
    assert not any(runs(pid) for pid in pids)


async def test_a_child_that_hangs_counts_as_dead(child, tmp_path: Path) -> None:
    patience = Patience(
        start=GUARD_S, first_delay=0.05, poll=0.02, health_every=0.05, health_timeout=1, hang=3, stop=0.1
    )
    supervisor = Supervisor(child(), patience=patience)
    supervisor.start()
    await supervisor.wait_ready(GUARD_S)
    server, _ = await family(tmp_path)
    os.kill(server, signal.SIGSTOP)
    await eventually(lambda: supervisor.restarts == 1)
    await supervisor.wait_ready(GUARD_S)
    assert not runs(server)
    await supervisor.stop()


async def test_a_supervisor_takes_over_a_child_started_earlier(child) -> None:
    server = child()
    server.start()
    pid = server.pid
    supervisor = Supervisor(server, patience=QUICK)
    supervisor.start()
    await supervisor.wait_ready(GUARD_S)
    assert server.pid == pid
    await supervisor.stop()


async def test_a_child_dies_with_the_process_that_started_it(tmp_path: Path) -> None:
    (tmp_path / "sleeper.py").write_text("import signal; print('begun', flush=True); signal.pause()")
    parent = (
        "import pathlib, signal, sys\n"
        "from soma_vllm.engines.child_process import ChildServer\n"
        "root = pathlib.Path(sys.argv[1])\n"
        "child = ChildServer([sys.executable, str(root / 'sleeper.py')], {}, root / 'log', root / 's')\n"
        "child.start()\n"
        "print(child.pid, flush=True)\n"
        "signal.pause()\n"
    )
    with subprocess.Popen([sys.executable, "-c", parent, str(tmp_path)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        pid = int(process.stdout.readline())
        # Killed any earlier, the parent would be missed before the parent-death signal is set.
        await eventually(lambda: "begun" in (tmp_path / "log").read_text())
        process.kill()
    await eventually(lambda: not runs(pid))


async def test_a_socket_path_the_kernel_cannot_take_is_refused(tmp_path: Path) -> None:
    server = ChildServer(["true"], {}, tmp_path / "log", tmp_path / ("x" * 120))
    with pytest.raises(PreflightError, match="expected at most 107"):
        server.start()


def test_delays_double_up_to_the_longest_and_a_stable_life_forgives() -> None:
    patience = Patience(first_delay=1, longest_delay=3, quick_deaths=5, stable=60)
    backoff = Backoff(patience)
    assert [backoff.died(1) for _ in range(4)] == [1, 2, 3, 3]
    assert backoff.died(61) == 1
    assert [backoff.died(0) for _ in range(4)] == [2, 3, 3, patience.retry]
    assert backoff.exhausted
    assert backoff.died(61) == 1
    assert not backoff.exhausted

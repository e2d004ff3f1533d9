"""What a replay shows of the server that it started."""

from __future__ import annotations

import subprocess
import sys

from soma_vllm.engines.child_process import ChildProcess
from soma_vllm.tools.replay.child_server import _pass_on

SERVER = """
print("listening")
print("2026-11-27T20:00:00Z WARNING vllm: no Triton")
print("    further line")
print("2026-11-27T20:00:00Z ERROR app: died")
print("    Traceback")
print("stopped")
"""


async def test_of_the_servers_log_a_replay_shows_errors_alone() -> None:
    process = ChildProcess([sys.executable, "-c", SERVER])
    output = process.start_with(subprocess.PIPE)
    assert output is not None
    said: list[str] = []
    await _pass_on(output, said.append)
    await process.stop(5.0)
    assert said == ["listening", "2026-11-27T20:00:00Z ERROR app: died", "    Traceback", "stopped"]

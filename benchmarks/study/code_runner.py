"""Runs code that a model wrote, with asserts, in a process of its own.

Guarantees: the process gets no environment, an empty folder, limits of time, memory, file size and open files,
and is killed with its time; in it sockets, processes, writes and foreign functions are refused by an audit
hook. Code passes only if all asserts were reached and held: to exit early is to fail. This keeps accidents of
small models away from the machine; it is no wall against code written to break out.
"""

from __future__ import annotations

import json
import os
import resource
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence

_RUNNER = r"""
import json, sys
given = json.load(sys.stdin)
REFUSED = ("socket.", "subprocess.", "os.", "ctypes.", "shutil.", "tempfile.", "signal.", "pty.", "gc.")
def hook(event, args):
    if event.startswith(REFUSED) and event not in ("os.listdir", "os.scandir", "os.walk", "os.putenv"):
        raise PermissionError(event)
    if event == "open" and not (args[1] is None or set(args[1]) <= set("rbt")):
        raise PermissionError(event)
names = {"__name__": "answer"}
out, sys.stdout = sys.stdout, sys.stderr
sys.addaudithook(hook)
exec(compile(given["code"], "answer", "exec"), names)
for text in given["asserts"]:
    exec(compile(text, "assert", "exec"), names)
out.write(given["token"])
out.flush()
"""


def passes(code: str, asserts: Sequence[str], seconds: float, memory_mb: int) -> bool:
    """Whether every assert holds after the code ran, within `seconds` and `memory_mb` MiB."""
    token = secrets.token_hex(16)
    given = json.dumps({"code": code, "asserts": list(asserts), "token": token})

    def limit() -> None:
        size = memory_mb * 2**20
        resource.setrlimit(resource.RLIMIT_AS, (size, size))
        cpu = int(seconds) + 1
        resource.setrlimit(resource.RLIMIT_CPU, (cpu, cpu))
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
        resource.setrlimit(resource.RLIMIT_NOFILE, (32, 32))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

    with tempfile.TemporaryDirectory() as folder:
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _RUNNER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env={},
            preexec_fn=limit,
            start_new_session=True,
        )
        try:
            output, _ = process.communicate(given.encode(errors="replace"), timeout=seconds)
        except subprocess.TimeoutExpired:
            return False
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.communicate()
    return process.returncode == 0 and output == token.encode()

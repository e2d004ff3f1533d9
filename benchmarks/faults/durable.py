"""`kill -9` at the durable steps of a server: each commit, and each file that is copied, flushed or renamed.

tests/support/crash_play.py plays it in processes of its own: real stores, fake engines.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from support import crash_play

from faults.row import Row, timed
from faults.suite import Scene

STRIDE, QUICK = 4, 40
"""Each so manyth step; the test suite kills at all of them."""
LIMIT_S = 500.0


def durable(scene: Scene) -> None:
    """A kill, and a look at what is left, for every step."""
    row = scene.row("kill -9, server", "each durable step")
    with timed(row):
        arguments = [str(scene.new_folder()), "1", str(QUICK if scene.quick else STRIDE)]
        places = {**os.environ, "PYTHONPATH": str(Path(crash_play.__file__).parents[1])}
        command = [sys.executable, crash_play.__file__, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=False, env=places)
        if done.returncode:
            raise RuntimeError(done.stderr[-300:])
        for line in done.stdout.splitlines():
            _read(row, json.loads(line))


def _read(row: Row, seen: dict[str, object]) -> None:
    row.requests += 1
    for problem in seen["problems"] if isinstance(seen["problems"], list) else ():
        left = "left on disk" in problem or "adapters:" in problem
        row.count("leaks" if left else "lost_turns", f"step {seen['step']}, {seen['name']}: {problem}")

"""examples/chat.py against a real server: what a newcomer runs first."""

from __future__ import annotations

import re
import subprocess
import sys

from support.guard import GUARD_S
from support.server import ROOT, Running


def chat(running: Running, said: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The example, as a user starts it."""
    return subprocess.run(
        [sys.executable, str(ROOT / "examples" / "chat.py"), f"{running.root}/v1", *arguments],
        input=said,
        capture_output=True,
        text=True,
        timeout=GUARD_S,
        check=False,
    )


def test_the_example_chats_through_the_warm_start(tiny_server: Running) -> None:
    done = chat(
        tiny_server, "one\ntwo\n", "--session", "example-chat", "--api-key", "example", "--max-tokens", "8"
    )
    assert (done.returncode, done.stderr) == (0, "")
    told = re.findall(r"(?m)^\[engine: (\w+), adapter: -, phase: (\w+), reason: (.*)\]$", done.stdout)
    assert [(engine, phase) for engine, phase, _ in told] == [("original", "WARM_START")] * 2
    assert all(reason.startswith("warm start") for *_, reason in told)
    assert len(tiny_server.session("example-chat", "example")["turns"]) == 2


def test_the_example_reaches_a_policy_by_the_name_of_the_model(tiny_server: Running) -> None:
    done = chat(tiny_server, "one\n", "--model", "soma:surrogate", "--api-key", "example", "--max-tokens", "8")
    assert (done.returncode, done.stderr) == (0, "")
    assert "[engine: surrogate, adapter: -, " in done.stdout

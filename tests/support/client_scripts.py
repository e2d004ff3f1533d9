"""Clients of others as subprocesses, each in the environment that `make clients` made for it.

Guarantees: a script reaches this machine alone (other hosts are behind a proxy that is not there), reads no
settings of the person who runs the tests, and has ended when its block has. One that says nothing ends after
`GUARD_S`.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from soma_vllm.models.home import soma_home
from support.guard import GUARD_S

SCRIPTS = Path(__file__).parents[1] / "clients" / "scripts"
CLIENTS = soma_home() / "clients"
LEAVE_S = 60.0
"""How long a script may take to end once its input has."""
NOWHERE = "http://127.0.0.1:9"
NOT_INHERITED = ("PYTHON", "OPENAI_", "LITELLM_", "LANGSMITH_", "LANGCHAIN_", "AIDER_", "NODE_")

Say = Callable[[str], dict[str, Any]]
"""A question of the user -> what the script said of the client's answer."""


def require(environment: str) -> None:
    """Skip where an environment was not made, with a word; fail where `make test` was to make it."""
    if environment == "node" and shutil.which("npm") is None:
        pytest.skip("found no npm: clients in JavaScript are left out")
    if not (CLIENTS / environment / ".installed").exists():
        told = f"{environment} is not installed in {CLIENTS / environment}"
        if environment in os.environ.get("CLIENTS_EXPECTED", "").split():
            pytest.fail(f"{told}: `make clients` says why it cannot be", pytrace=False)
        pytest.skip(f"{told}; make clients does it")


def command(script: str, environment: str | None) -> list[str]:
    """What runs a script; without an environment it is run in the one of the tests."""
    if environment == "node":  # evaluated, since modules are looked for from the working directory then
        return ["node", "--input-type=module", "--eval", (SCRIPTS / script).read_text(encoding="utf-8")]
    python = sys.executable if environment is None else str(CLIENTS / environment / "bin" / "python")
    return [python, str(SCRIPTS / script)]


def variables(home: Path, **more: str) -> Mapping[str, str]:
    """The environment of a script."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(NOT_INHERITED)}
    outside = dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"), NOWHERE)
    inside = dict.fromkeys(("NO_PROXY", "no_proxy"), "127.0.0.1,localhost")
    return {**inherited, **outside, **inside, "HOME": str(home), **more}


@contextmanager
def running_script(script: str, environment: str | None, root: str, key: str, folder: Path) -> Iterator[Say]:
    """A script that talks to the server at `root` with this key; it works in `folder`, which is empty."""
    if environment is not None:
        require(environment)
    log = folder / "stderr.txt"
    with (
        log.open("wb") as errors,
        subprocess.Popen(
            command(script, environment),
            cwd=CLIENTS / "node" if environment == "node" else folder,
            env=variables(folder, BASE_URL=f"{root}/v1", API_KEY=key),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            start_new_session=True,  # it may start others, which end with it
        ) as process,
    ):

        def say(question: str) -> dict[str, Any]:
            assert process.stdin is not None
            assert process.stdout is not None
            guard = threading.Timer(GUARD_S, process.kill)
            guard.start()
            try:
                process.stdin.write(f"{question}\n")
                process.stdin.flush()
                line = process.stdout.readline()
            except BrokenPipeError:
                line = ""
            finally:
                guard.cancel()
            assert line, f"{script} ended with {process.wait(GUARD_S)}:\n{log.read_text()[-4000:]}"
            answer: dict[str, Any] = json.loads(line)
            return answer

        try:
            yield say
        finally:
            with suppress(OSError, subprocess.TimeoutExpired):
                process.communicate(timeout=LEAVE_S)
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)

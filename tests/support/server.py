"""Starting a real soma-serve for tests, and looking at what it leaves behind."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import yaml
from openai import OpenAI

import soma_vllm
from support.guard import GUARD_S

ROOT = Path(soma_vllm.__file__).parent.parent
TINY = ROOT / "configs" / "tiny.yaml"


def marker_settings(url: str) -> dict[str, Any]:
    """Beside TINY: an original at `url` that answers in markers, and trainings that learn a marker."""
    return {
        "original_model": None,
        "original": {"url": url, "name": "markers"},
        "mining": {"enabled": False},
        "lora": {"rank": 8, "alpha": 32, "steps": 60, "lr": 2.0e-2, "early_stop_patience": 60},
        "warm_window": 3,
        # Every slot is taken, the last one too: it is the one that vLLM's own kernels leak to base rows.
        # Two adapters stay in the engine's memory; others are read again when their sessions return.
        "surrogate": {"max_loras": 2, "max_cpu_loras": 3},
    }


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class Running:
    """A soma-serve process and the ways to talk to it."""

    def __init__(self, process: subprocess.Popen[bytes], port: int, output: Path, run_dir: Path) -> None:
        self.process = process
        self.root = f"http://127.0.0.1:{port}"
        self.output = output
        self.run_dir = run_dir
        self._clients: dict[str, OpenAI] = {}

    def client(self, key: str = "key") -> OpenAI:
        if key not in self._clients:
            self._clients[key] = OpenAI(base_url=f"{self.root}/v1", api_key=key, max_retries=0, timeout=GUARD_S)
        return self._clients[key]

    def close(self) -> None:
        for client in self._clients.values():
            client.close()

    def session(self, name: str, key: str = "key") -> dict[str, Any]:
        answer = self.get(f"/soma/sessions/{name}", key)
        answer.raise_for_status()
        found: dict[str, Any] = answer.json()
        return found

    def get(self, path: str, key: str = "key", **more: Any) -> httpx.Response:
        """GET a path of the server."""
        headers = {"Authorization": f"Bearer {key}"}
        return httpx.get(f"{self.root}{path}", headers=headers, follow_redirects=True, timeout=GUARD_S, **more)

    def until(self, name: str, *phases: str, key: str = "key") -> dict[str, Any]:
        """The session once it is idle in one of these phases."""
        deadline = time.monotonic() + GUARD_S
        found = self.session(name, key)
        while time.monotonic() < deadline:
            if found["phase"] in phases and found["idle"]:
                return found
            time.sleep(0.2)
            found = self.session(name, key)
        raise AssertionError(f"{name} is {found['phase']} after {GUARD_S:g} s, not {phases}")

    def said(self) -> str:
        """What the server has shown on its terminal, stdout and stderr."""
        return self.output.read_text()

    def logged(self, words: str) -> str:
        """The log file once it holds these words: another process writes it."""
        deadline = time.monotonic() + GUARD_S
        while words not in (found := (self.run_dir / "surrogate.log").read_text()):
            assert time.monotonic() < deadline, f"surrogate.log has no {words!r} after {GUARD_S:g} s"
            time.sleep(0.05)
        return found


class Dialogue:
    """A client that keeps the history itself, as chat clients do."""

    def __init__(
        self, running: Running, name: str, key: str = "key", model: str = "soma", **headers: str
    ) -> None:
        self._client = running.client(key)
        self._headers = {"X-Session-ID": name, **headers}
        self._model = model
        self.messages: list[dict[str, Any]] = []
        self.headers: Any = {}

    def say(self, query: str, max_tokens: int = 16, stream: bool = True) -> str:
        self.messages.append({"role": "user", "content": query})
        request: dict[str, Any] = {
            "model": self._model,
            "messages": self.messages,
            "max_tokens": max_tokens,
            "temperature": 0,
            "extra_headers": self._headers,
        }
        raw = self._client.chat.completions.with_raw_response
        if stream:
            reply = raw.create(**request, stream=True, stream_options={"include_usage": True})
            text = "".join(c.choices[0].delta.content or "" for c in reply.parse() if c.choices)
        else:
            reply = raw.create(**request)
            text = reply.parse().choices[0].message.content or ""
        self.headers = reply.headers
        self.messages.append({"role": "assistant", "content": text})
        return text


def adapted(running: Running, name: str, key: str = "key") -> Dialogue:
    """A dialogue that was switched to its adapter."""
    dialogue = Dialogue(running, name, key, **{"X-SOMA-Force": "adapter"})
    for number in range(1, 4):
        dialogue.say(f"question {number} of {name}")
    assert running.until(name, "SWITCHED", "ORIGINAL_ONLY", key=key)["phase"] == "SWITCHED"
    return dialogue


def engine_metric(running: Running, engine: str, name: str) -> float:
    """A series of an engine's own, summed over labels: the original's server, or the surrogate in ours."""
    if engine == "original":
        transport = httpx.HTTPTransport(uds=str(running.run_dir / "original.sock"))
        client = httpx.Client(transport=transport, base_url="http://original", timeout=GUARD_S)
    else:
        client = httpx.Client(base_url=running.root, timeout=GUARD_S)
    with client:
        lines = client.get("/metrics", follow_redirects=True).text.splitlines()
    values = [float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith((f"{name}{{", f"{name} "))]
    assert values, f"the {engine} has no series {name}"
    return sum(values)


def descendants(pid: int) -> set[int]:
    """Process ids of a process and everything below it, from /proc."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError, IndexError):
                fields = (entry / "stat").read_text().rsplit(")", 1)[1].split()
                parents[int(entry.name)] = int(fields[1])
    found = {pid}
    while grown := {child for child, parent in parents.items() if parent in found} - found:
        found |= grown
    return found


def alive(pids: set[int]) -> set[int]:
    """Those that still run (zombies do not)."""
    running = set()
    for pid in pids:
        with contextlib.suppress(OSError, IndexError):
            if Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z":
                running.add(pid)
    return running


def gone(pids: set[int]) -> set[int]:
    """Those still alive after waiting: Ray's own helpers notice a loss by a missed heartbeat."""
    deadline = time.monotonic() + GUARD_S
    while (left := alive(pids)) and time.monotonic() < deadline:
        time.sleep(0.1)
    return left


def kill(running: Running) -> None:
    """`kill -9`; returns when everything that the server had started has ended too."""
    everybody = {pid: Path(f"/proc/{pid}/cmdline").read_text()[:80] for pid in descendants(running.process.pid)}
    os.kill(running.process.pid, signal.SIGKILL)
    running.process.wait(GUARD_S)
    assert not [everybody[pid] for pid in gone(set(everybody))]


@contextlib.contextmanager
def serving(
    folder: Path, config: Path, settings: dict[str, Any] | None = None, until: str = "listening"
) -> Iterator[Running]:
    """A soma-serve of its own port and run folder that has said `until`; stopped at the end."""
    port = free_port()
    document = yaml.safe_load(config.read_text())
    for name, value in (settings or {}).items():
        both = isinstance(value, dict) and isinstance(document.get(name), dict)
        document[name] = {**document[name], **value} if both else value
    run_dir = folder / "run"
    document["server"] = {**document.get("server", {}), "port": port, "run_dir": str(run_dir)}
    if "storage" not in (settings or {}):
        document["storage"] = {"url": "sqlite+aiosqlite:///{run_dir}/sessions.db"}
    document["adapters"] = {"root": "{run_dir}/adapters"}
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(document))
    output = folder / "output.txt"
    command = [sys.executable, "-m", "soma_vllm.app.serve", "--config", str(path)]
    with output.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, start_new_session=True)
    running = Running(process, port, output, run_dir)
    try:
        wait_until_said(running, until)
        yield running
    finally:
        running.close()
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(GUARD_S)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def wait_until_said(running: Running, words: str) -> None:
    """Return once the server has shown these words on its terminal."""
    deadline = time.monotonic() + GUARD_S
    while time.monotonic() < deadline:
        if running.process.poll() is not None:
            raise AssertionError(f"soma-serve ended with {running.process.returncode}:\n{running.said()}")
        if words in running.said():
            return
        time.sleep(0.2)
    raise AssertionError(f"soma-serve has not said {words!r} after {GUARD_S:g} s:\n{running.said()}")

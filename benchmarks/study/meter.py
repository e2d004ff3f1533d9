"""What a block took: processor seconds of each part of the server, and what each engine counted.

Two ways to count. An engine is *busy* while it has a request running (vLLM's own gauge, looked at every
second): that long its core or GPU is taken. *Processor* time is asked of the operating system, process by
process, so that other work does not enter it; but vLLM's processes poll, while they wait for each other and
for a second afterwards, and it counts that as well. What they take at rest is measured first and taken off.

Parts: `original` (API server and EngineCore), `surrogate` (its EngineCore), `server` (soma-serve: HTTP,
dispatch, the sentence encoder), `trainer`, `baseline` (processes of third-party methods), `ray` (its
housekeeping).
"""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
from prometheus_client.parser import text_string_to_metric_families

from study.connections import NOT_KEPT, fresh_client

LOOK_S = 1.0
IDLE_S = 5.0
"""How long an idle server is watched."""
PARTS = ("original", "surrogate", "server", "trainer", "baseline", "ray")
ENGINES = ("original", "surrogate")
COUNTED = {
    "vllm:prompt_tokens_total": "prompt",
    "vllm:prompt_tokens_cached_total": "cached",
    "vllm:generation_tokens_total": "generated",
    "vllm:request_prefill_time_seconds_sum": "prefill_s",
    "vllm:request_decode_time_seconds_sum": "decode_s",
    "vllm:num_preemptions_total": "preemptions",
}
RUNNING = "vllm:num_requests_running"

Numbers = dict[str, float]


@dataclass(frozen=True)
class Reading:
    """What stood on the meter at one moment, or between two."""

    wall_s: float
    cpu_s: Numbers
    """Processor seconds by part."""
    busy_s: Numbers
    """Seconds with a request running, by engine."""
    engines: dict[str, Numbers] = field(default_factory=dict)
    """Each engine's counters (`COUNTED`), those of users and of the background together."""

    def since(self, before: Reading, idling: Numbers | None = None) -> Reading:
        """What came on top, less what `idling` takes anyway, processor seconds per second by part."""

        def less(now: Numbers, then: Numbers) -> Numbers:
            return {name: round(value - then.get(name, 0.0), 4) for name, value in now.items()}

        engines = {name: less(now, before.engines.get(name, {})) for name, now in self.engines.items()}
        wall_s = self.wall_s - before.wall_s
        anyway = {part: rate * wall_s for part, rate in (idling or {}).items()}
        cpu_s = less(self.cpu_s, before.cpu_s)
        return Reading(
            round(wall_s, 3),
            {part: round(max(0.0, seconds - anyway.get(part, 0.0)), 4) for part, seconds in cpu_s.items()},
            less(self.busy_s, before.busy_s),
            engines,
        )


def server_process(port: int) -> psutil.Process:
    """The process of this machine that listens on a port.

    Raises:
        LookupError: there is none that we may see.
    """
    for connection in psutil.net_connections("tcp"):
        if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port and connection.pid:
            return psutil.Process(connection.pid)
    raise LookupError(f"found no process of this machine that listens on port {port}; expected soma-serve")


class Meter:
    """Reads a running soma-serve, its children and their counters."""

    def __init__(self, server: psutil.Process, root: str) -> None:
        self._server = server
        self._root = root
        self._seconds: dict[tuple[int, float], tuple[str, float]] = {}
        self._busy: defaultdict[str, float] = defaultdict(float)
        self._begun = self._looked = time.perf_counter()
        self._clients = {"surrogate": fresh_client(base_url=root, timeout=30)}
        self._looking: asyncio.Task[None] | None = None
        self.idling = dict.fromkeys(PARTS, 0.0)
        """Processor seconds per second of each part while nobody asks anything."""

    async def __aenter__(self) -> Meter:
        self._look_at_processes()
        socket = self._original_socket()
        if socket is not None:
            transport = httpx.AsyncHTTPTransport(uds=str(socket), limits=NOT_KEPT)
            self._clients["original"] = fresh_client(
                base_url="http://original", transport=transport, timeout=30
            )
        self._looking = asyncio.create_task(self._keep_looking())
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._looking is not None
        self._looking.cancel()
        await asyncio.gather(self._looking, return_exceptions=True)
        for client in self._clients.values():
            await client.aclose()

    async def read(self) -> Reading:
        """What stands on the meter now."""
        if self._looking is not None and self._looking.done():
            self._looking.result()  # raises what ended it
        self._look_at_processes()
        engines = {}
        for name, client in self._clients.items():
            counters = await _series(client)
            engines[name] = {short: counters.get(series, 0.0) for series, short in COUNTED.items()}
        cpu = dict.fromkeys(PARTS, 0.0)
        for part, seconds in self._seconds.values():
            cpu[part] += seconds
        return Reading(time.perf_counter() - self._begun, cpu, dict(self._busy), engines)

    async def learn_idling(self) -> None:
        """Watch the server while it is idle."""
        before = await self.read()
        await asyncio.sleep(IDLE_S)
        found = (await self.read()).since(before)
        self.idling = {part: round(seconds / found.wall_s, 5) for part, seconds in found.cpu_s.items()}

    async def _keep_looking(self) -> None:
        while True:
            await asyncio.sleep(LOOK_S)
            # A process that ends keeps what it was last seen with.
            self._look_at_processes()
            for name, client in self._clients.items():
                running = (await _series(client)).get(RUNNING, 0.0)
                if running > 0:
                    self._busy[name] += time.perf_counter() - self._looked
            self._looked = time.perf_counter()

    def _look_at_processes(self) -> None:
        parts = {self._server.pid: "server"}
        for process in [self._server, *self._server.children(recursive=True)]:  # parents come before children
            try:
                with process.oneshot():
                    part = parts.get(process.pid) or _part(process, parts.get(process.ppid(), "server"))
                    times = process.cpu_times()
                    key = (process.pid, process.create_time())
            except psutil.Error:
                continue
            parts[process.pid] = part
            self._seconds[key] = (part, times.user + times.system)

    def _original_socket(self) -> Path | None:
        for process in self._server.children(recursive=True):
            try:
                command = process.cmdline()
            except psutil.Error:
                continue
            if _is_original(command) and "--uds" in command:
                return Path(command[command.index("--uds") + 1])
        return None


def _part(process: psutil.Process, of_parent: str) -> str:
    command = process.cmdline()
    first = command[0] if command else process.name()
    if _is_original(command):
        return "original"
    if "AdapterTrainer" in first:
        return "trainer"
    if first.rsplit("/", 1)[-1] in ("raylet", "gcs_server") or any("/ray/" in word for word in command):
        return "ray"
    if any("soma_vllm.baselines" in word or "baselines/worker" in word for word in command):
        return "baseline"
    return "surrogate" if of_parent == "server" else of_parent


def _is_original(command: list[str]) -> bool:
    return "vllm.entrypoints.launchers.api_server.entry" in command


async def _series(client: httpx.AsyncClient) -> dict[str, float]:
    """Every series of /metrics, summed over its labels."""
    answer = await client.get("/metrics")
    answer.raise_for_status()
    return parsed(answer.text)


def parsed(text: str) -> dict[str, float]:
    """Every series of a Prometheus exposition, summed over its labels."""
    sums: defaultdict[str, float] = defaultdict(float)
    for family in text_string_to_metric_families(text):
        if family.type == "gauge" or family.name.startswith("vllm"):
            for sample in family.samples:
                sums[sample.name] += sample.value
    return dict(sums)


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    import platform

    model = next(
        (
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
            if line.startswith("model name")
        ),
        platform.processor() or platform.machine(),
    )
    return {
        "processor": model,
        "cores": psutil.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "load_average": [round(load, 2) for load in psutil.getloadavg()],
    }

"""soma-serve as a whole, a pair on one GPU: does it work from the first turn to the last process?

Starts the server on `cuda.yaml`, plays six dialogues, times first tokens with and without dispatch, kills the
original with SIGKILL and waits for the next one; then SIGTERM, and a look at what is left. `serve.txt` has
the server's output and the ends of its engines' logs.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import aiohttp
from common import Step
from tuned import remedy
from vllm_engine import OLD_RUNNER

from dialogues import Client, dispatch_cost, play

MODULE = "soma_vllm.app.serve"
"""What the console script soma-serve runs; without a script, so that an installed package is not needed."""
SLOW = int(os.environ.get("SLOW", "1"))
"""Multiplies limits, for rehearsals."""
MARK = "KIT_RUN", f"{os.getpid()}-{time.time_ns()}"
"""In the environment of all that this step starts, however deep, so that it counts and kills nothing else."""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def settings(step: Step) -> dict[str, Any]:
    """What `cuda.yaml` leaves open, and a CPU's values in a rehearsal."""
    values: dict[str, Any] = {
        "original_model": step.models / "large",
        "surrogate_model": step.models / "small",
        "encoder.model": step.models / "encoder",
    }
    if step.device == "cpu":
        values |= {"training.device": "cpu", "training.dtype": "float32"}
        for engine, core in (("original", 0), ("surrogate", 1)):
            values |= {
                f"{engine}.device": "cpu",
                f"{engine}.cpu_cores": f'"{core}"',
                f"{engine}.kv_cache_gib": 0.25,
                f"{engine}.max_model_len": 4096,
                f"{engine}.extra_args": "[]",
            }
        values |= {"surrogate.max_loras": 4, "surrogate.max_cpu_loras": 8, "max_new_tokens": 12}
    elif not json.loads((step.models / "go.json").read_text()).get("fa3", True):
        triton = '["--kv-cache-memory-bytes","6442450944","--attention-backend","TRITON_ATTN"]'
        values |= {"original.extra_args": triton, "surrogate.extra_args": triton}
    return values


def processes() -> dict[int, str]:
    """Command lines by process id: what this step started and still runs."""
    found = {}
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit() or int(folder.name) == os.getpid():
            continue
        try:
            if "=".join(MARK).encode() not in (folder / "environ").read_bytes().split(b"\0"):
                continue
            command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
            state = (folder / "stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            continue
        if state != "Z":
            found[int(folder.name)] = command
    return found


async def ready(client: Client, server: subprocess.Popen[bytes], limit: float) -> bool:
    """Whether the server answers within `limit` seconds; False at once where it ended."""
    end = time.monotonic() + limit
    while time.monotonic() < end and server.poll() is None:
        if await client.answers():
            return True
        await asyncio.sleep(0.5)
    return False


async def kill_original(step: Step, client: Client) -> None:
    """SIGKILL the original; what both engines answer while it is away, and when it is back."""
    messages = [{"role": "user", "content": "Are you still there?"}]
    victims = [pid for pid, command in processes().items() if "original.sock" in command]
    step.record("killed", pids=victims)
    began = time.monotonic()
    for pid in victims[:1]:
        os.kill(pid, signal.SIGKILL)
    await asyncio.sleep(0.3)
    surrogate = await client.ask(messages, "soma:surrogate", 4)
    original = await client.ask(messages, "soma:original", 4)
    limit = min(90.0 * SLOW, step.left() - 12)
    back = None
    while back is None and time.monotonic() - began < limit:
        if (await client.ask(messages, "soma:original", 4))["status"] == 200:
            back = time.monotonic() - began
        await asyncio.sleep(0.5)
    step.record(
        "original restarted",
        back_after_s=back,
        surrogate_meanwhile=surrogate["status"],
        original_meanwhile=original["status"],
        said=original.get("body"),
    )


def gpu_used() -> str | None:
    """The GPU's memory in use, as nvidia-smi prints it; None where there is no nvidia-smi."""
    asked = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader"]
    try:
        return subprocess.run(asked, capture_output=True, text=True, timeout=20, check=False).stdout.strip()
    except OSError:
        return None


def stop(step: Step, server: subprocess.Popen[bytes]) -> None:
    """SIGTERM; then what is left, which is killed."""
    began = time.monotonic()
    server.send_signal(signal.SIGTERM)
    try:
        code: int | None = server.wait(timeout=30)
    except subprocess.TimeoutExpired:
        code = None
    took = time.monotonic() - began
    time.sleep(2)
    left = processes()
    shown = [command[:100] for command in left.values()][:5]
    step.record("stopped", rc=code, seconds=took, left=shown, gpu_memory=gpu_used())
    for pid in left:
        with suppress(OSError):
            os.kill(pid, signal.SIGKILL)


def start(step: Step, values: dict[str, Any]) -> subprocess.Popen[bytes]:
    """The server, with `values` over `cuda.yaml`."""
    environment = {**os.environ, **remedy(step.models), MARK[0]: MARK[1]}
    if (step.models / OLD_RUNNER).exists():
        environment["VLLM_USE_V2_MODEL_RUNNER"] = "0"
    sets = [part for key, value in values.items() for part in ("--set", f"{key}={value}")]
    config = str(Path(__file__).with_name("cuda.yaml"))
    with (step.options.out / "serve.txt").open("ab") as output:
        return subprocess.Popen(
            [sys.executable, "-m", MODULE, "--config", config, *sets],
            stdout=output,
            stderr=output,
            env=environment,
        )


async def attempt(step: Step, gpus_per_worker: float, limit: float) -> bool:
    """One server, from start to stop; False where it was not ready within `limit` seconds."""
    port = free_port()
    run_dir = Path(os.environ["SOMA_HOME"]) / "run" / f"{time.strftime('%Y%m%d-%H%M%S')}-gpu"
    own = {"server.port": port, "server.run_dir": run_dir, "training.gpus_per_worker": gpus_per_worker}
    server = start(step, settings(step) | own)
    began = time.monotonic()
    try:
        timeout = aiohttp.ClientTimeout(total=60)
        async with aiohttp.ClientSession(timeout=timeout) as http:
            client = Client(http, f"http://127.0.0.1:{port}")
            good = await ready(client, server, limit)
            took = time.monotonic() - began
            step.record("ready", good=good, seconds=took, gpus_per_worker=gpus_per_worker, rc=server.poll())
            if not good:
                return False
            with step.part("dialogues"):
                await asyncio.wait_for(play(step, client), max(20.0, min(100.0 * SLOW, step.left() - 70)))
            with step.part("dispatch"):
                await asyncio.wait_for(dispatch_cost(step, client), 20)
            if step.left() > 55:
                with step.part("restart"):
                    await kill_original(step, client)
        return True
    finally:
        stop(step, server)
        keep_logs(step, run_dir)


def keep_logs(step: Step, run_dir: Path) -> None:
    """Append the ends of the server's own logs to serve.txt."""
    with (step.options.out / "serve.txt").open("a", encoding="utf-8") as output:
        for log in sorted(run_dir.glob("*.log")):
            output.write(f"\n--- {log.name}\n{log.read_text(encoding='utf-8', errors='replace')[-60000:]}\n")


def main() -> None:
    step = Step("serve")
    with step.part("serve"):
        good = asyncio.run(attempt(step, 0.25, min(120.0 * SLOW, step.left() - 60)))
        if not good and step.device == "cuda" and step.left() > 60:
            # Where Ray sees no GPU, a trainer that asks for one never starts.
            asyncio.run(attempt(step, 0.0, step.left() - 30))


if __name__ == "__main__":
    main()

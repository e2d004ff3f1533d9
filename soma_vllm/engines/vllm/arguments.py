"""Command lines and environments of vLLM servers, as pure functions of the configuration.

Guarantees: nothing here imports vLLM or reads the process environment; `extra_args` come last, so that they
overrule what stands before them; a child listens on a Unix socket only and never asks for an API key.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from soma_vllm.config import Config, Engine
from soma_vllm.engines.vllm.parser_choice import parser_arguments

LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Values vLLM accepts for --max-lora-rank (`vllm.config.lora.MaxLoRARanks`)."""

ENGINE_PLUGIN = "soma_engine"
"""General plugin that ties an EngineCore's life to its server's and installs the CPU kernels."""

WORKER_EXTENSION = "soma_vllm.engines.vllm.worker_extension.ReadsAdaptersAside"
"""What the surrogate's workers can do beyond vLLM's own."""

_GIB = 1024**3


def slot_rank(rank: int) -> int:
    """The smallest --max-lora-rank that holds adapters of `rank`.

    Raises:
        ValueError: vLLM serves no such rank.
    """
    for allowed in LORA_RANKS:
        if rank <= allowed:
            return allowed
    raise ValueError(f"lora.rank: found {rank}; expected at most {LORA_RANKS[-1]}")


def vllm_arguments(engine: Engine, model_path: str, served_name: str) -> list[str]:
    """Arguments that both engines share, without a place to listen on."""
    memory = (
        [
            "--kv-cache-memory-bytes",
            str(round(engine.kv_cache_gib * _GIB)),
            "--block-size",
            str(engine.block_size),
        ]
        if engine.device == "cpu"
        else ["--gpu-memory-utilization", str(engine.gpu_memory_utilization)]
    )
    eager = engine.device == "cpu" if engine.enforce_eager is None else engine.enforce_eager
    return [
        *("--model", model_path),
        *("--served-model-name", served_name),
        *("--dtype", engine.dtype),
        *("--max-model-len", str(engine.max_model_len)),
        *("--max-num-seqs", str(engine.max_num_seqs)),
        "--enforce-eager" if eager else "--no-enforce-eager",
        *memory,
        "--enable-prefix-caching",
        "--enable-prompt-tokens-details",
        *("--scheduling-policy", "priority"),
        "--no-enable-log-requests",
        "--disable-uvicorn-access-log",
        *("--uvicorn-log-level", "warning"),
        *parser_arguments(engine, model_path),
        *engine.extra_args,
    ]


def surrogate_arguments(config: Config, model_path: str, served_name: str) -> list[str]:
    """Arguments of the surrogate's server: those of every engine, and multi-LoRA.

    Raises:
        ValueError: vLLM serves no adapters of `config.lora.rank`.
    """
    surrogate = config.surrogate
    return [
        "--enable-lora",
        *("--max-loras", str(surrogate.max_loras)),
        *("--max-cpu-loras", str(surrogate.max_cpu_loras)),
        *("--max-lora-rank", str(slot_rank(config.lora.rank))),
        *("--lora-target-modules", *config.lora.target_modules),
        *("--worker-extension-cls", WORKER_EXTENSION),
        # Ctrl-C reaches the engine's process too, which would abort its requests at once.
        *("--shutdown-timeout", str(math.ceil(config.server.drain_s))),
        "--enable-offline-docs",  # no page of ours loads scripts from elsewhere
        *vllm_arguments(surrogate, model_path, served_name),
    ]


def original_arguments(config: Config, model_path: str, served_name: str, draft_path: str) -> list[str]:
    """Arguments of the original's child: those of every engine, and a draft model where the configuration asks
    for one. `extra_args` still come last."""
    original = config.original
    if original.draft_tokens == 0:
        return vllm_arguments(original, model_path, served_name)
    draft = {"method": "draft_model", "model": draft_path, "num_speculative_tokens": original.draft_tokens}
    return ["--speculative-config", json.dumps(draft), *vllm_arguments(original, model_path, served_name)]


def vllm_environment(
    engine: Engine,
    model_path: str,
    plugins: Sequence[str] = (ENGINE_PLUGIN,),
    logging_level: str = "WARNING",
) -> dict[str, str]:
    """Environment variables to set for one engine, on top of the inherited ones.

    `plugins` becomes VLLM_PLUGINS, vLLM's allow-list for every plugin group.
    """
    environment = {
        "VLLM_PLUGINS": ",".join(plugins),
        "VLLM_LOGGING_LEVEL": logging_level,
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
    }
    if engine.device == "cpu" and engine.cpu_cores is not None:
        environment["VLLM_CPU_OMP_THREADS_BIND"] = engine.cpu_cores
    if engine.device == "cuda" and engine.gpu is not None:
        environment["CUDA_VISIBLE_DEVICES"] = engine.gpu
    if Path(model_path).is_dir():
        environment["HF_HUB_OFFLINE"] = "1"
    return environment


def child_command(arguments: Sequence[str], socket: Path) -> list[str]:
    """Command of a vLLM server that listens on a Unix socket and on no port."""
    return [
        sys.executable,
        "-m",
        "vllm.entrypoints.launchers.api_server.entry",
        "--uds",
        str(socket),
        *arguments,
    ]


def child_environment(engine: Engine, model_path: str) -> dict[str, str]:
    """Environment of a child server.

    VLLM_API_KEY is blanked: the key belongs to soma-serve's clients, and only we can reach the child's socket.
    """
    return {**vllm_environment(engine, model_path), "VLLM_API_KEY": ""}

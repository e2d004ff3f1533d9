"""What soma-serve's processes hold in main memory, estimated before anything starts, and what there is of it.

Guarantees: nothing is loaded; the estimate errs by little, and counts only what soma-serve itself would start.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from soma_vllm.config import Config, Engine
from soma_vllm.documents import read_json
from soma_vllm.engines.vllm.arguments import LORA_RANKS, slot_rank
from soma_vllm.errors import DocumentError

# Resident memory beside weights and caches, GB, as measured with vLLM 0.32 on a CPU.
_API_SERVER_GB = 1.4
_ENGINE_CORE_GB = 0.8
_TRAINER_GB = 1.5
"""Torch, Ray and the activations of one training step."""

GB = 1e9
_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def memory_needs(config: Config, engines: dict[str, tuple[Engine, Path]]) -> Iterator[tuple[str, float]]:
    """What soma-serve's processes will hold in main memory, GB."""
    for role, (engine, path) in engines.items():
        total = _API_SERVER_GB + _ENGINE_CORE_GB
        if engine.device == "cpu":
            total += weights_bytes(path, engine.dtype) / GB + engine.kv_cache_gib * 1024**3 / GB
            total += _head_bytes(path) / GB
            if role == "original" and config.original.draft_tokens:
                total += weights_bytes(engines["surrogate"][1], engine.dtype) / GB
        yield role, total
    surrogate_path = engines["surrogate"][1]
    rows = config.surrogate.max_cpu_loras * config.lora.rank
    if config.surrogate.device == "cpu":  # on a GPU the slots lie in its own memory
        slot = LORA_RANKS[-1] if config.lora.rank > LORA_RANKS[-1] else slot_rank(config.lora.rank)
        rows += config.surrogate.max_loras * slot
    yield "adapters", rows * bytes_per_rank(surrogate_path, config.lora.target_modules) / GB
    if config.training.ray_address is None:
        yield "training", config.training.workers * worker_gb(config, surrogate_path)


def worker_gb(config: Config, surrogate_path: Path) -> float:
    """Main memory of one trainer."""
    on_cpu = config.training.device == "cpu"
    return _TRAINER_GB + (weights_bytes(surrogate_path, config.training.dtype) / GB if on_cpu else 0.0)


def weights_bytes(path: Path, dtype: str = "auto") -> float:
    """Bytes of a model's weights once they are held as `dtype`; "auto" takes the files as they are."""
    size = float(sum(file.stat().st_size for file in path.glob("*.safetensors")))
    config = read_object(path / "config.json")
    stored = _BYTES.get(str(config.get("dtype", config.get("torch_dtype"))))
    return size * _BYTES[dtype] / stored if stored and dtype in _BYTES else size


def _head_bytes(path: Path) -> float:
    """Bytes of the copy that a head shared with the embedding is multiplied from, in 16 bits."""
    config = read_object(path / "config.json")
    shared = bool(config.get("tie_word_embeddings", False))
    return 2.0 * int(config.get("vocab_size", 0)) * int(config.get("hidden_size", 0)) * shared


def bytes_per_rank(path: Path, modules: tuple[str, ...]) -> float:
    """Bytes of one rank of an adapter in 16 bits: an A row and a B column for every adapted module."""
    config = read_object(path / "config.json")
    hidden, inner = int(config.get("hidden_size", 0)), int(config.get("intermediate_size", 0))
    heads = int(config.get("num_attention_heads", 1))
    head = int(config.get("head_dim") or hidden // max(heads, 1))
    query, key = heads * head, int(config.get("num_key_value_heads", heads)) * head
    width = {
        "q_proj": hidden + query,
        "k_proj": hidden + key,
        "v_proj": hidden + key,
        "o_proj": query + hidden,
        "gate_proj": hidden + inner,
        "up_proj": hidden + inner,
        "down_proj": inner + hidden,
    }
    return 2.0 * int(config.get("num_hidden_layers", 0)) * sum(width.get(module, 0) for module in modules)


def available_memory() -> float:
    """Bytes that processes started now can use: the machine's, or the rest of our cgroup's limit."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    available = next(float(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        used = float(Path("/sys/fs/cgroup/memory.current").read_text())
        stat = Path("/sys/fs/cgroup/memory.stat").read_text().splitlines()
    except OSError:
        return available
    if not limit.isdigit():
        return available
    # The kernel gives file cache back when processes ask for memory.
    cache = next((float(line.split()[1]) for line in stat if line.startswith("inactive_file ")), 0.0)
    return min(available, float(limit) - used + cache)


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object, or an empty one where there is none to read."""
    try:
        document = read_json(path)
    except DocumentError:
        return {}
    return document if isinstance(document, dict) else {}

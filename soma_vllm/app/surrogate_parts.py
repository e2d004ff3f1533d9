"""What belongs to the surrogate's engine: leases on its slots, adapters in its memory, its vocabulary."""

from __future__ import annotations

from pathlib import Path

from soma_vllm.adapters.file_provider import AdapterFileProvider
from soma_vllm.adapters.leases import AdapterLeases
from soma_vllm.adapters.loaded import LoadedAdapters, room_for
from soma_vllm.config import Config
from soma_vllm.engines.engine import Salts
from soma_vllm.engines.surrogate import ChatServing, SurrogateEngine
from soma_vllm.models.vocabulary import Vocabulary, read_vocabulary
from soma_vllm.telemetry.adapter_metrics import AdapterMetrics


def open_surrogate(
    config: Config, serving: ChatServing, files: AdapterFileProvider, salts: Salts
) -> tuple[AdapterLeases, SurrogateEngine]:
    """The engine, and the leases that keep adapters in it; its metrics are exposed from now on."""
    settings, metrics = config.surrogate, AdapterMetrics()
    limit = settings.queue_limit if settings.overflow == "wait" else 0
    leases = AdapterLeases(settings.max_loras, limit, settings.queue_wait_s, metrics)
    room = room_for(settings.max_loras, settings.max_cpu_loras)
    loaded = LoadedAdapters(serving, room, files=files, in_use=leases.in_use, meter=metrics)
    metrics.watch(
        resident=lambda: len(loaded.resident()),
        leases=leases.count,
        distinct=leases.distinct,
        waiting=leases.waiting,
    )
    return leases, SurrogateEngine(config.surrogate_name, serving, salts, loaded)


def shared_vocabulary(original: Path | None, surrogate: Path) -> Vocabulary | None:
    """The vocabulary of both models; None where they differ, or where one is unknown. Reads their folders."""
    if original is None:
        return None
    first, second = read_vocabulary(original), read_vocabulary(surrogate)
    return second if first is not None and second is not None and first.digest() == second.digest() else None

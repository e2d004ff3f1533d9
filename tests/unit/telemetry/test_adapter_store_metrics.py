"""Series of the adapter store."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, generate_latest

from soma_vllm.adapters.eviction_policy import Reason
from soma_vllm.telemetry.adapter_store_metrics import AdapterStoreMetrics
from soma_vllm.types import Event, SessionKey

KEY = SessionKey("tenant-1", "session-1")


def test_the_stock_its_comings_and_goings_are_counted_and_nobody_is_named() -> None:
    registry = CollectorRegistry()
    metrics = AdapterStoreMetrics(registry)
    metrics.kept(3, 4096)
    metrics.evicted(Reason.TTL)
    metrics.fetched(0.03)
    for kind in ("adapter_published", "adapter_published", "adapter_retired", "turn"):
        metrics(KEY, Event(kind, 0.0, {"adapter": {"name": "soma-secret", "number": 1, "path": "/p"}}))
    found = generate_latest(registry).decode()
    for line in (
        "soma_adapters_stored 3.0",
        "soma_adapters_stored_bytes 4096.0",
        "soma_adapters_published_total 2.0",
        "soma_adapters_retired_total 1.0",
        'soma_store_evictions_total{reason="ttl"} 1.0',
        'soma_store_evictions_total{reason="lost"} 0.0',
        'soma_adapter_fetch_seconds_bucket{le="0.05"} 1.0',
    ):
        assert line in found
    assert not any(word in found for word in ("tenant-1", "session-1", "soma-secret"))

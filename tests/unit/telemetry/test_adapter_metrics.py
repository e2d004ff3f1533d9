"""Series of the adapters: counted, read when asked, and none that names an adapter."""

from __future__ import annotations

import asyncio

from prometheus_client import CollectorRegistry, generate_latest

from soma_vllm.adapters.leases import AdapterLeases
from soma_vllm.telemetry.adapter_metrics import AdapterMetrics


async def test_holds_and_waits_are_shown_without_any_adapters_name() -> None:
    registry = CollectorRegistry()
    metrics = AdapterMetrics(registry)
    leases = AdapterLeases(1, 10, 5.0, metrics)
    metrics.watch(resident=lambda: 7, leases=leases.count, distinct=leases.distinct, waiting=leases.waiting)
    held = [await leases.acquire("secret-1"), await leases.acquire("secret-1")]
    waiting = asyncio.create_task(leases.acquire("secret-2"))
    await asyncio.sleep(0)
    shown = {
        name: registry.get_sample_value(name)
        for name in (
            "soma_adapters_resident",
            "soma_adapter_holds",
            "soma_adapters_in_flight",
            "soma_slot_queue_length",
        )
    }
    assert list(shown.values()) == [7, 2, 1, 1]
    for ticket in held:
        await leases.release(ticket)
    await leases.release(await waiting)
    assert registry.get_sample_value("soma_slot_wait_seconds_count", {"outcome": "granted"}) == 1
    assert registry.get_sample_value("soma_slot_queue_length") == 0
    assert b"secret" not in generate_latest(registry)


def test_loads_evictions_rejections_and_overflow_are_counted() -> None:
    registry = CollectorRegistry()
    metrics = AdapterMetrics(registry)
    metrics.loaded(0.05, False)
    metrics.loaded(0.0, True)
    metrics.evicted()
    metrics.rejected()
    metrics.overflowed("full")
    assert registry.get_sample_value("soma_adapter_load_seconds_sum", {"state": "cold"}) == 0.05
    assert registry.get_sample_value("soma_adapter_load_seconds_count", {"state": "warm"}) == 1
    assert registry.get_sample_value("soma_adapter_evictions_total") == 1
    assert registry.get_sample_value("soma_adapter_rejections_total") == 1
    assert registry.get_sample_value("soma_slot_overflow_total", {"why": "full"}) == 1

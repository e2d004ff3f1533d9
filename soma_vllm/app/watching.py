"""What of a running server `/ready` and `/metrics` tell: the one list of its parts."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from soma_vllm.api.draining import Draining
from soma_vllm.api.readiness import LATE_S, PartReport, PartState, Readiness
from soma_vllm.app.build import SomaServices
from soma_vllm.app.original_process import OriginalProcess
from soma_vllm.engines.circuit_breaker import Circuit
from soma_vllm.engines.supervisor import State
from soma_vllm.telemetry.server_metrics import ServerMetrics


def watch(
    readiness: Readiness,
    services: SomaServices,
    original: OriginalProcess,
    trainers: Any,
    engine_client: Any,
    draining: Draining,
) -> None:
    """Report the parts of a server that has begun, and count what waits in it."""
    writes, sweeper = services.registry.write_behind, services.sweeper.task

    def store() -> PartReport:
        late = f"the oldest of {writes.behind} writes has waited for {writes.age:.0f} s"
        return PartReport.ok_if(writes.age < LATE_S, late, PartState.DEGRADED)

    def original_state() -> PartReport:
        otherwise = PartState.DEGRADED if original.replaceable else PartState.DOWN
        if services.original.circuit is Circuit.OPEN:
            return PartReport(otherwise, "it failed too often in a row")
        return PartReport.ok_if(original.state in (None, State.READY), f"{original.state}", otherwise)

    parts = {
        "surrogate": lambda: PartReport.ok_if(not engine_client.errored, "its engine has ended"),
        "original": original_state,
        "store": store,
        "writer": lambda: PartReport.ok_if(not writes.task.given_up, "the task has ended"),
        "sweeper": lambda: PartReport.ok_if(not sweeper.given_up, "the task has ended", PartState.DEGRADED),
        "trainers": lambda: PartReport.ok_if(
            not trainers.failing, f"the last {trainers.lost} trainers were lost", PartState.DEGRADED
        ),
        "traffic": lambda: PartReport.ok_if(not draining.active, "the server is about to end"),
    }
    metrics = ServerMetrics()
    for name, report in parts.items():
        readiness.add(name, report)
        metrics.watch_part(name, partial(_is_down, report))
    for task in (writes.task, sweeper):
        metrics.watch_task(task.name, partial(getattr, task, "deaths"))
    metrics.watch(
        writes_behind=lambda: writes.behind,
        oldest_write_seconds=lambda: writes.age,
        unwritten_characters=lambda: writes.characters,
        sessions_live=lambda: services.registry.size,
        requests_in_flight=lambda: draining.in_flight,
        background_tasks=lambda: services.background.count,
        original_restarts=lambda: original.restarts,
    )


def _is_down(report: Callable[[], PartReport]) -> bool:
    return report().state is PartState.DOWN

"""Prometheus series, fed by the stream of session events and exposed on vLLM's own /metrics.

Labels are closed sets (engines, phases, kinds): nothing here grows with sessions, adapters or tenants.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.registry import REGISTRY

from soma_vllm.sessions.state.events import Audited, EventKind, Judged, Trained
from soma_vllm.sessions.state.turn import turn_of
from soma_vllm.types import Event, SessionKey

SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
GAPS = (0.01, 0.02, 0.05, 0.08, 0.12, 0.2, 0.3, 0.5, 0.8, 1.2, 2.0)
NATS = (0.1, 0.2, 0.3, 0.5, 0.8, 1.2, 2.0, 3.0, 5.0, 8.0)


class SessionMetrics:
    """An observer of events."""

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        self._events = Counter("soma_events", "Session events by kind.", ["kind"], registry=registry)
        self._turns = Counter(
            "soma_turns", "Answered turns.", ["engine", "phase", "adapter"], registry=registry
        )
        self._latency = Histogram(
            "soma_turn_latency_seconds",
            "From request to last token.",
            ["engine"],
            buckets=SECONDS,
            registry=registry,
        )
        self._ttft = Histogram(
            "soma_ttft_seconds",
            "From request to first token, streamed turns.",
            ["engine"],
            buckets=SECONDS,
            registry=registry,
        )
        self._gap = Histogram(
            "soma_audit_gap", "Gap of audited turns.", ["engine"], buckets=GAPS, registry=registry
        )
        self._surprise = Histogram(
            "soma_audit_surprise_nats",
            "Mean NLL of an audited answer under the original, per token.",
            buckets=NATS,
            registry=registry,
        )
        self._training = Histogram(
            "soma_training_seconds",
            "Time per training stage.",
            ["stage"],
            buckets=SECONDS,
            registry=registry,
        )
        self._branches = Counter(
            "soma_branches",
            "Sessions that began with turns of another, by cause: another answer or question, no history, one "
            "that was learned from, an answer beside the line (other), or several dialogues alike (shared).",
            ["cause"],
            registry=registry,
        )
        self._verdicts = Counter(
            "soma_verdicts", "Candidates chosen by the gate.", ["candidate"], registry=registry
        )
        self._cost_model = Counter(
            "soma_payback", "Whether an adapter was expected to pay.", ["verdict"], registry=registry
        )
        self._on: Mapping[str, Callable[[Mapping[str, Any]], None]] = {
            EventKind.TURN: self._turn,
            EventKind.AUDITED: self._audited,
            EventKind.BRANCHED: lambda data: self._branches.labels(data.get("cause") or "unknown").inc(),
            EventKind.TRAINED: self._trained,
            EventKind.PAYBACK_JUDGED: lambda data: self._cost_model.labels(
                "pays" if data["pays"] else "costs_more"
            ).inc(),
            EventKind.JUDGED: lambda data: self._verdicts.labels(Judged.from_data(data).candidate).inc(),
        }

    def __call__(self, key: SessionKey, event: Event) -> None:
        """Count one event."""
        self._events.labels(event.kind).inc()
        if (count := self._on.get(event.kind)) is not None:
            count(event.data)

    def _turn(self, data: Mapping[str, Any]) -> None:
        turn = turn_of(data, None)
        self._turns.labels(turn.engine, turn.phase, "yes" if turn.adapter else "no").inc()
        self._latency.labels(turn.engine).observe(turn.latency_s)
        if turn.ttft_s is not None:
            self._ttft.labels(turn.engine).observe(turn.ttft_s)

    def _audited(self, data: Mapping[str, Any]) -> None:
        found = Audited.from_data(data)
        if found.kind == "gap":
            self._gap.labels(found.served_by).observe(found.value)
        else:
            self._surprise.observe(found.value)

    def _trained(self, data: Mapping[str, Any]) -> None:
        for stage, seconds in Trained.from_data(data).stages.items():
            self._training.labels(stage).observe(seconds)

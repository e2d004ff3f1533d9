"""Metrics count events under closed sets of labels."""

from __future__ import annotations

from prometheus_client import CollectorRegistry

from soma_vllm.sessions.state.phases import Phase
from soma_vllm.sessions.state.turn import Turn, turn_event
from soma_vllm.telemetry.session_metrics import SessionMetrics
from soma_vllm.types import Event, Role, SessionKey, Usage


def turn(session: str, adapter: str | None) -> tuple[SessionKey, Event]:
    answered = Turn(
        number=1,
        messages=(),
        answer="",
        engine=Role.SURROGATE,
        adapter=adapter,
        phase=Phase.SWITCHED,
        reason="test",
        usage=Usage(),
        ttft_s=0.1,
        latency_s=0.5,
    )
    return SessionKey("t", session), turn_event(answered, 0, 0.0)


def test_series_do_not_grow_with_sessions_or_adapters() -> None:
    registry = CollectorRegistry()
    metrics = SessionMetrics(registry)
    for number in range(50):
        metrics(*turn(f"s{number}", f"adapter-{number}"))
    labels = {"engine": "surrogate", "phase": "SWITCHED", "adapter": "yes"}
    assert registry.get_sample_value("soma_turns_total", labels) == 50
    samples = [sample for metric in registry.collect() for sample in metric.samples]
    assert not any("adapter-" in str(sample.labels) for sample in samples)


def test_verdicts_and_training_times_are_counted() -> None:
    registry = CollectorRegistry()
    metrics = SessionMetrics(registry)
    key = SessionKey("t", "s")
    metrics(key, Event("judged", 0.0, {"candidate": "plain"}))
    metrics(key, Event("trained", 0.0, {"mining_s": 1.0, "finetune_s": 2.0, "scoring_s": 3.0}))
    assert registry.get_sample_value("soma_verdicts_total", {"candidate": "plain"}) == 1
    assert registry.get_sample_value("soma_training_seconds_sum", {"stage": "finetune"}) == 2.0


def test_gaps_and_surprises_are_counted_apart() -> None:
    registry = CollectorRegistry()
    metrics = SessionMetrics(registry)
    key = SessionKey("t", "s")
    served = {"turn": 1, "served_by": "surrogate"}
    metrics(key, Event("audited", 0.0, {"kind": "gap", "gap": 0.25, "surprise": None, **served}))
    metrics(key, Event("audited", 0.0, {"kind": "surprise", "gap": None, "surprise": 1.5, **served}))
    assert registry.get_sample_value("soma_audit_gap_sum", {"engine": "surrogate"}) == 0.25
    assert registry.get_sample_value("soma_audit_surprise_nats_sum") == 1.5


def test_payback_decisions_are_counted_by_verdict() -> None:
    registry = CollectorRegistry()
    metrics = SessionMetrics(registry)
    for pays in (True, False, False):
        metrics(SessionKey("t", "s"), Event("payback_judged", 0.0, {"pays": pays}))
    assert registry.get_sample_value("soma_payback_total", {"verdict": "pays"}) == 1
    assert registry.get_sample_value("soma_payback_total", {"verdict": "costs_more"}) == 2

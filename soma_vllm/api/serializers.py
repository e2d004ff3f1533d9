"""A session as JSON: phases, numbers and decisions, never conversation text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from soma_vllm.sessions.live_session import LiveSession
from soma_vllm.sessions.sql.records import Summary
from soma_vllm.sessions.state.events import EventKind
from soma_vllm.sessions.state.turn import Turn
from soma_vllm.types import Event

PRIVATE = frozenset({"centroid", "turns", "chain", "asked", "links", "said", "query", "guard", "reworded"})
"""Event data from which text could be inferred, or that repeats other events."""


def view(entry: LiveSession, idle: bool) -> dict[str, Any]:
    """One session as JSON."""
    session = entry.session
    return {
        "session": session.key.session,
        "tenant": session.key.tenant,
        "phase": session.phase,
        "policy": None if session.adapting is None else session.adapting.policy,
        "pinned": session.pinned,
        "serving": session.serving,
        "adapter": None if session.adapter is None else session.adapter.name,
        "trainings": session.trainings,
        "idle": idle,
        "turns": [turn_view(turn) for turn in session.turns],
        "events": [event_view(event) for event in entry.events],
        "training": training_view(entry.events),
    }


def summary_view(summary: Summary) -> dict[str, Any]:
    """One row of a listing."""
    return {
        "session": summary.key.session,
        "tenant": summary.key.tenant,
        "phase": summary.phase,
        "turns": summary.turns,
        "adapter": summary.adapter,
        "updated_at": summary.updated_at,
    }


def turn_view(turn: Turn) -> dict[str, Any]:
    """One turn in numbers."""
    return {
        "turn": turn.number,
        "engine": turn.engine,
        "adapter": turn.adapter,
        "phase": turn.phase,
        "reason": turn.reason,
        "gap": turn.gap,
        "surprise": turn.surprise,
        **asdict(turn.usage),
        "ttft_s": turn.ttft_s,
        "latency_s": round(turn.latency_s, 4),
    }


def event_view(event: Event) -> dict[str, Any]:
    """One event without private data."""
    data = {name: value for name, value in event.data.items() if name not in PRIVATE}
    if isinstance(data.get("adapter"), dict):
        data["adapter"] = data["adapter"]["name"]  # its path is internal
    return {"kind": event.kind, "at": event.at, "data": data}


def training_view(events: Sequence[Event]) -> dict[str, Any] | None:
    """Cost and evidence of the session's latest adaptation; None before the first verdict."""
    trained = next((e.data for e in reversed(events) if e.kind == EventKind.TRAINED), {})
    judged = next((e.data for e in reversed(events) if e.kind == EventKind.JUDGED), None)
    if not trained and judged is None:
        return None
    return {
        "mining_s": trained.get("mining_s"),
        "finetune_s": trained.get("finetune_s"),
        "steps": trained.get("steps"),
        "hardness": trained.get("hardness"),
        "acceptance": None if judged is None else dict(judged),
    }

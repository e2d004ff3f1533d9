"""One log line for each change of a session's phase and each step of a training.

Guarantees: a line holds names and numbers of the event's data, and the sentence that the server itself wrote as
the reason, never what was said; it carries the session's and the tenant's ids. What is remembered of a session
is bounded and goes with the session.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from soma_vllm.logs import as_word, bind_session
from soma_vllm.sessions.state.events import EventKind
from soma_vllm.types import Event, SessionKey

logger = logging.getLogger(__name__)

MOST_SESSIONS = 10_000
"""Sessions whose last turn and verdict are remembered, the latest ones."""

WARN_AT = frozenset({3, 10, 30, 100, 300, 1000})
"""Branches of one dialogue at which it is warned of."""

Data = Mapping[str, Any]
Fields = dict[str, Any]


class EventLog:
    """An observer of events."""

    def __init__(self) -> None:
        self._last: OrderedDict[SessionKey, dict[str, Any]] = OrderedDict()
        self._branches: OrderedDict[SessionKey, int] = OrderedDict()

    def __call__(self, key: SessionKey, event: Event) -> None:
        """Log one event, where it is one to log."""
        if event.kind == EventKind.TURN:
            self._remember(key, turn=event.data.get("number"))
        elif event.kind == EventKind.BRANCHED:
            self._branched(key, event.data)
        elif event.kind == EventKind.JUDGED:
            self._remember(key, judged=event.data.get("numbers", {}))
        elif (line := _LINES.get(event.kind)) is not None:
            words, fields = line
            with bind_session(key):
                logger.info("%s%s", words, _shown(fields(event.data, self._last.get(key, {}))))
        if event.kind == EventKind.CLOSED:
            self._last.pop(key, None)

    def _branched(self, key: SessionKey, data: Data) -> None:
        """Warn where the sessions of one dialogue branch again and again: its client's histories are not those
        on record, so that nothing of it is adapted."""
        root = SessionKey(key.tenant, data.get("family") or str(data.get("of")).partition("~")[0])
        count = self._branches.pop(root, 0) + 1
        self._branches[root] = count
        while len(self._branches) > MOST_SESSIONS:
            self._branches.popitem(last=False)
        if count in WARN_AT:
            with bind_session(key):
                logger.warning(
                    "the dialogue of session %s branched %d times, now because %s; its client's histories are "
                    "not those on record",
                    root.session,
                    count,
                    data.get("why") or "its history differs",
                )

    def _remember(self, key: SessionKey, **what: Any) -> None:
        self._last.setdefault(key, {}).update(what)
        self._last.move_to_end(key)
        while len(self._last) > MOST_SESSIONS:
            self._last.popitem(last=False)


def _of(*names: str) -> Callable[[Data, Data], Fields]:
    """The fields of these names, and the name of an adapter that the event holds."""
    return lambda data, last: {name: data.get(name) for name in names} | _adapter(data)


def _adapter(data: Data) -> Fields:
    found = data.get("adapter")
    return {"adapter": found["name"]} if isinstance(found, dict) else {}


def _switched(data: Data, last: Data) -> Fields:
    candidate = data.get("candidate", "")
    gap = _gaps(last).get(candidate)
    return {"candidate": candidate, "gap": gap, "turn": last.get("turn"), **_adapter(data)}


def _refused(data: Data, last: Data) -> Fields:
    gaps = {f"{candidate}_gap": gap for candidate, gap in _gaps(last).items()}
    return {**gaps, "turn": last.get("turn"), "reason": data.get("reason")}


def _rolled_back(data: Data, last: Data) -> Fields:
    names = ("moving", "drift_threshold", "breaches", "reason")
    return {**{name: data.get(name) for name in names}, "turn": last.get("turn")}


def _submitted(data: Data, last: Data) -> Fields:
    return {"turns": len(data.get("turns", ())), "teacher": data.get("teacher")}


def _trained(data: Data, last: Data) -> Fields:
    stages = ("mining_s", "finetune_s", "scoring_s")
    return {"seconds": sum(data.get(stage, 0.0) for stage in stages), "steps": data.get("steps")}


def _rejected(data: Data, last: Data) -> Fields:
    return {**_adapter(data), "problems": len(data.get("problems", ()))}


def _gaps(last: Data) -> dict[str, float | None]:
    """The mean gap of each candidate of the last verdict."""
    judged = last.get("judged", {}).get("candidates", {})
    return {candidate: numbers.get("mean_gap") for candidate, numbers in judged.items()}


_LINES: Mapping[str, tuple[str, Callable[[Data, Data], Fields]]] = {
    EventKind.ADAPTATION_STARTED: ("adaptation started", lambda data, last: {"turn": last.get("turn")}),
    EventKind.PAYBACK_JUDGED: ("payback judged", _of("pays", "gain", "cost")),
    EventKind.TRAINING_SUBMITTED: ("training submitted", _submitted),
    EventKind.TRAINED: ("trained", _trained),
    EventKind.ADAPTER_PUBLISHED: ("adapter published", _of()),
    EventKind.ADAPTER_LOADED: ("adapter loaded", _of()),
    EventKind.ADAPTER_REJECTED: ("adapter rejected; it will not serve", _rejected),
    EventKind.SWITCHED: ("switched", _switched),
    EventKind.INHERITED: ("switched, as the session that it continues", _of()),
    EventKind.REFUSED: ("refused; the original keeps the session", _refused),
    EventKind.TRAINING_FAILED: ("adaptation failed; the original keeps the session", _of("error")),
    EventKind.ADAPTATION_ABANDONED: ("adaptation abandoned", _of("phase")),
    EventKind.ROLLED_BACK: ("rolled back to the original", _rolled_back),
    EventKind.ADAPTER_EVICTED: ("adapter evicted; the original serves the session", _of("reason")),
    EventKind.ADAPTER_RETIRED: ("adapter retired", _of()),
    EventKind.RESTARTED: ("restarted; the session will be adapted anew", _of("reason")),
    EventKind.PINNED: ("pinned", _of("engine")),
    EventKind.CLOSED: ("closed; the session is being removed", _of()),
}
"""What is said of an event, and which fields: of its data, and of the last turn and verdict."""


def _shown(fields: Fields) -> str:
    return "".join(f" {name}={_value(value)}" for name, value in _set(fields))


def _set(fields: Fields) -> Iterable[tuple[str, Any]]:
    return ((name, value) for name, value in fields.items() if value is not None)


def _value(value: Any) -> str:
    """A number to four digits; words as one word."""
    return f"{value:.4g}" if isinstance(value, float) else as_word(str(value))

"""The phases of a session, as one table.

In every phase but SWITCHED the original answers: that sentence is the safety argument.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum

from soma_vllm.sessions.state.events import EventKind


class Phase(StrEnum):
    """Where a session stands."""

    WARM_START = "WARM_START"
    """The original answers the first W turns."""
    ADAPTING = "ADAPTING"
    """The warm start is complete; candidates are trained and judged in the background."""
    SWITCHED = "SWITCHED"
    """The surrogate answers, plain or with the session's adapter."""
    ROLLED_BACK = "ROLLED_BACK"
    """Drift was seen, or the adapter was evicted; the original answers again, for a cool-down at least."""
    ORIGINAL_ONLY = "ORIGINAL_ONLY"
    """No candidate passed, or training failed; the original keeps the session, for a cool-down at least."""
    CLOSED = "CLOSED"
    """It is being removed."""


TRANSITIONS: Mapping[tuple[Phase, str], Phase] = {
    (Phase.WARM_START, EventKind.ADAPTATION_STARTED): Phase.ADAPTING,
    (Phase.ROLLED_BACK, EventKind.ADAPTATION_STARTED): Phase.ADAPTING,
    (Phase.ORIGINAL_ONLY, EventKind.ADAPTATION_STARTED): Phase.ADAPTING,
    # A server that was stopped starts an unfinished adaptation again.
    (Phase.ADAPTING, EventKind.ADAPTATION_STARTED): Phase.ADAPTING,
    (Phase.ADAPTING, EventKind.SWITCHED): Phase.SWITCHED,
    (Phase.ADAPTING, EventKind.REFUSED): Phase.ORIGINAL_ONLY,
    (Phase.ADAPTING, EventKind.TRAINING_FAILED): Phase.ORIGINAL_ONLY,
    (Phase.SWITCHED, EventKind.ROLLED_BACK): Phase.ROLLED_BACK,
    # Its adapter had to make room, or its files are lost.
    (Phase.SWITCHED, EventKind.ADAPTER_EVICTED): Phase.ROLLED_BACK,
    # A branch of a session goes on as that session would have, where it learned from common turns alone.
    (Phase.WARM_START, EventKind.INHERITED): Phase.SWITCHED,
    # An administrator asked for another adaptation.
    **{(phase, EventKind.RESTARTED): Phase.WARM_START for phase in Phase if phase is not Phase.CLOSED},
    **{(phase, EventKind.CLOSED): Phase.CLOSED for phase in Phase},
}
"""(phase, event) -> next phase. Every other event leaves the phase as it is, or may not happen in it."""

COOLING_DOWN = frozenset({Phase.ROLLED_BACK, Phase.ORIGINAL_ONLY})
"""Phases after a setback: the surrogate is judged again once enough turns are new."""

MOVING = frozenset(kind for _, kind in TRANSITIONS)
"""Events that move a session; one that is not in the table for the session's phase is void."""


def may_happen(phase: Phase, kind: str) -> bool:
    """Whether an event of this kind is allowed in this phase."""
    return kind not in MOVING or (phase, kind) in TRANSITIONS


def after(phase: Phase, kind: str) -> Phase:
    """The phase after an event; the same one for events that move nothing.

    Raises:
        AssertionError: the event may not happen in this phase (ask `may_happen` first).
    """
    assert may_happen(phase, kind), f"{kind} may not happen in {phase}"
    return TRANSITIONS.get((phase, kind), phase)
